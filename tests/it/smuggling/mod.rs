//! Request smuggling and its like: bytes that two parsers may read in two ways. What is not plain is
//! refused; what is taken asks upstream for just what was openly asked, is answered once, and is kept
//! under its own name.

mod answers;
mod requests;

use std::collections::BTreeMap;

use serde_json::Value;

use crate::common::*;

/// A way to larder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Way {
    /// `GET http://…` asked of the listener, for whoever larder does not intercept.
    Forward,
    /// `GET https://…` asked of the listener, for whom it does.
    Absolute,
    /// The listener's own pages.
    Pages,
    /// TLS through CONNECT.
    Connect,
    /// TLS straight to the port.
    Sni,
}

pub const WAYS: [Way; 5] = [
    Way::Forward,
    Way::Absolute,
    Way::Pages,
    Way::Connect,
    Way::Sni,
];

impl Way {
    pub async fn open(self, client: &Client) -> Conn {
        match self {
            Self::Connect => client.open(RELEASES).await,
            Self::Sni => {
                let tls = client.handshake(client.tcp().await, RELEASES).await;
                Conn::new(tls.unwrap())
            }
            _ => client.plain().await,
        }
    }

    pub fn host(self) -> &'static str {
        match self {
            Self::Forward => ELSEWHERE,
            Self::Pages => "larder",
            _ => RELEASES,
        }
    }

    fn target(self, page: &str) -> String {
        match (self, page) {
            (Self::Forward, _) => format!("http://{ELSEWHERE}/{page}"),
            (Self::Absolute, _) => format!("https://{RELEASES}/{page}"),
            (Self::Pages, "first") => "/healthz".into(),
            (Self::Pages, "second") => "/readyz".into(),
            (Self::Pages, _) => "/ca.pem".into(),
            _ => format!("/{page}"),
        }
    }

    /// What a page says: its own URL, or what larder has to say.
    pub fn body(self, page: &str) -> String {
        match (self, page) {
            (Self::Pages, "first") => "alive\n".into(),
            (Self::Pages, _) => "ready\n".into(),
            (Self::Forward, _) => self.target(page),
            _ => Self::Absolute.target(page),
        }
    }

    /// Puts this way's names and the smuggled request into a trick.
    pub fn spell(self, trick: &str) -> String {
        let (host, port) = (
            self.host(),
            if self == Self::Forward { "80" } else { "443" },
        );
        let evil = format!(
            "GET {} HTTP/1.1\r\nHost: {host}\r\n\r\n",
            self.target("evil")
        );
        trick
            .replace("{evil}", &evil)
            .replace("{len}", &evil.len().to_string())
            .replace("{hex}", &format!("{:x}", evil.len()))
            .replace("{first}", &self.target("first"))
            .replace("{evil path}", &self.target("evil"))
            .replace("{host}", host)
            .replace("{HOST}", &host.to_uppercase())
            .replace("{port}", port)
    }
}

/// A larder, and an upstream whose pages each say their own URL.
pub struct Stage {
    pub upstream: Upstream,
    pub larder: Larder,
}

impl Stage {
    pub async fn new() -> Self {
        let upstream = Upstream::start();
        for page in ["first", "second", "evil"] {
            let path = format!("/{page}");
            for host in [RELEASES, TERRAFORM] {
                upstream.route(host, &path, Reply::text(format!("https://{host}{path}")));
            }
            let plain = Reply::text(format!("http://{ELSEWHERE}{path}"));
            upstream.route(ELSEWHERE, &path, plain);
        }
        let target = format!("{ELSEWHERE}:80:127.0.0.1:{}", upstream.addr.port());
        let setup = Setup::new(&upstream).args(["--connect-to", &target]);
        let larder = setup.start().await;
        Self { upstream, larder }
    }

    /// Sends a trick and, on its heels, a clean request with which the connection is to end.
    /// Returns the answers, and what upstream was asked.
    pub async fn plays(&self, way: Way, trick: &str) -> (Vec<(u16, String)>, Vec<String>) {
        let before = self.upstream.journal().len();
        let mut conn = way.open(&self.larder.client()).await;
        let second = format!(
            "GET {} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
            way.target("second"),
            way.host()
        );
        conn.write((way.spell(trick) + &second).as_bytes()).await;
        let mut answers = Vec::new();
        while let Ok(answer) = conn.answer("GET").await {
            let status = answer.status;
            let (body, kept) = answer.finish_and_keep().await;
            answers.push((status, String::from_utf8_lossy(&body).into_owned()));
            conn = kept;
        }
        let asked = self.upstream.journal();
        let asked = asked[before..].iter();
        let asked = asked.map(|seen| format!("{} {}{}", seen.method, seen.host, seen.target));
        (answers, asked.collect())
    }

    /// The trick is answered by an error or the end of the connection, and upstream knows nothing
    /// of it.
    pub async fn refuses(&self, way: Way, trick: &str) {
        let (answers, asked) = self.plays(way, trick).await;
        let second = (200, way.body("second"));
        let refused = match &answers[..] {
            [] => true,
            [(status, _)] => *status >= 400,
            [(status, _), last] => *status >= 400 && *last == second,
            _ => false,
        };
        assert!(refused, "{way:?} {trick:?}: {answers:?}");
        let last =
            (answers.len() == 2 && way != Way::Pages).then(|| format!("GET {}/second", way.host()));
        assert_eq!(asked, Vec::from_iter(last), "{way:?} {trick:?}");
    }

    /// The trick is one request, for the first page, and the next request has its own answer.
    pub async fn takes(&self, way: Way, trick: &str) {
        let (answers, asked) = self.plays(way, trick).await;
        let wanted = ["first", "second"].map(|page| (200, way.body(page)));
        assert_eq!(answers, wanted, "{way:?} {trick:?}");
        let method = trick.trim_start().split(' ').next().unwrap();
        let wanted = [(method, "first"), ("GET", "second")];
        let mut wanted = wanted.map(|(method, page)| format!("{method} {}/{page}", way.host()));
        let wanted = match way {
            Way::Pages => &mut [],
            _ => &mut wanted[..],
        };
        assert_eq!(asked, *wanted, "{way:?} {trick:?}");
    }

    /// Each page that is kept says the URL under which it is kept, and was openly asked for.
    #[track_caller]
    pub fn has_kept_nothing_wrong(&self) {
        for (url, body) in kept(&self.larder.setup) {
            assert_eq!(url, body);
            let page = url.rsplit('/').next().unwrap();
            assert!(["first", "second"].contains(&page), "{url}");
        }
        assert!(self.larder.log_with(&["panicked"]).is_empty());
    }
}

/// The documents on disk, by URL.
pub fn kept(setup: &Setup) -> BTreeMap<String, String> {
    let files = files_below(&setup.data_dir().join("metadata"));
    let documents = files.iter().map(|file| {
        let text = String::from_utf8_lossy(&std::fs::read(file).unwrap()).into_owned();
        let (line, body) = text.split_once('\n').unwrap();
        let line: Value = serde_json::from_str(line).unwrap();
        (line["key"].as_str().unwrap().to_owned(), body.to_owned())
    });
    documents.collect()
}
