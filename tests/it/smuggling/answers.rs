//! Answers of upstream's that two parsers may read in two ways, on every way back to a client.

use std::time::{Duration, Instant};

use futures_util::future::join_all;

use super::{Stage, kept};
use crate::common::*;

/// An answer that somebody else might take for the next one.
const EVIL: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\nEVIL";

/// How an answer goes to a client.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// A document that is kept and shared.
    Document,
    /// A document for one client, passed on as it comes.
    Private,
    /// Plain HTTP, passed on as it comes.
    Forward,
    /// A file that is verified and kept.
    Archive,
}

const KINDS: [Kind; 4] = [Kind::Document, Kind::Private, Kind::Forward, Kind::Archive];

/// Where an odd answer is had, and what it should say.
struct Odd {
    kind: Kind,
    host: &'static str,
    path: String,
    body: Vec<u8>,
}

impl Odd {
    /// Puts the odd answer on the upstream. `number` makes its URL its own.
    fn new(stage: &Stage, kind: Kind, number: usize, answer: &str) -> Self {
        let product = Product::sized(&format!("odd{number}"), "1.0.0", 100);
        product.publish(&stage.upstream);
        let (host, path, body) = match kind {
            Kind::Archive => (RELEASES, product.archive_path(), product.archive.to_vec()),
            Kind::Forward => (ELSEWHERE, format!("/odd{number}"), b"the body".to_vec()),
            _ => (RELEASES, format!("/{kind:?}{number}"), b"the body".to_vec()),
        };
        let length = body.len();
        let answer = answer
            .replace("{type}", "Content-Type: text/plain")
            .replace("{len}", &length.to_string())
            .replace("{hex}", &format!("{length:x}"))
            .replace("{evil}", EVIL);
        let mut bytes = Vec::new();
        for (i, part) in answer.split("{body}").enumerate() {
            bytes.extend_from_slice(if i > 0 { &body } else { b"" });
            bytes.extend_from_slice(part.as_bytes());
        }
        stage.upstream.route(host, &path, Reply::raw(bytes));
        Self {
            kind,
            host,
            path,
            body,
        }
    }

    /// What the client gets; None where the connection ends before an answer.
    async fn get(&self, stage: &Stage) -> Option<Got> {
        let client = stage.larder.client();
        let mut conn = match self.kind {
            Kind::Forward => client.plain().await,
            _ => client.open(self.host).await,
        };
        let headers: &[_] = match self.kind {
            Kind::Private => &[("Authorization", "Bearer x")],
            _ => &[],
        };
        let target = match self.kind {
            Kind::Forward => format!("http://{}{}", self.host, self.path),
            _ => self.path.clone(),
        };
        conn.request("GET", self.host, &target, headers).await;
        Some(conn.answer("GET").await.ok()?.finish().await)
    }

    fn url(&self) -> String {
        format!("https://{}{}", self.host, self.path)
    }
}

/// Whoever asks next gets their own answers, on whatever connection of larder's to upstream.
async fn the_next_ones_get_their_own(stage: &Stage, kind: Kind) {
    let client = stage.larder.client();
    for page in ["first", "second"] {
        if kind == Kind::Forward {
            let mut conn = client.plain().await;
            let url = format!("http://{ELSEWHERE}/{page}");
            conn.request("GET", ELSEWHERE, &url, &[]).await;
            let got = conn.answer("GET").await.unwrap().finish().await;
            got.assert_is(url.as_bytes());
        } else {
            let url = format!("https://{RELEASES}/{page}");
            client.get(&url).await.assert_is(url.as_bytes());
        }
    }
}

#[tokio::test]
async fn an_answer_that_can_be_read_in_two_ways_is_refused() {
    let stage = &Stage::new().await;
    let answers = [
        "HTTP/1.1 200 OK\r\n{type}\r\nContent-Length: {len}\r\nContent-Length: 3\r\n\r\n{body}",
        "HTTP/1.1 200 OK\r\n{type}\r\nContent-Length: 3\r\nContent-Length: {len}\r\n\r\n{body}",
        "HTTP/1.1 200 OK\r\n{type}\r\nContent-Length: {len}, 3\r\n\r\n{body}",
        "HTTP/1.1 200 OK\r\n{type}\r\nContent-Length: +{len}\r\n\r\n{body}",
        "HTTP/1.1 200 OK\r\n{type}\r\nContent-Length: 0x{hex}\r\n\r\n{body}",
        "HTTP/1.1 200 OK\r\n{type}\r\nContent-Length: -1\r\n\r\n{body}",
        "HTTP/1.1 200 OK\r\n{type}\r\nContent-Length:\r\n\r\n{body}",
        "HTTP/1.1 200 OK\r\n{type}\r\nContent-Length : {len}\r\n\r\n{body}",
        "HTTP/1.1 200 OK\r\n{type}\r\nX: a\r\n b\r\nContent-Length: {len}\r\n\r\n{body}",
        "HTTP/1.1 200 OK\r\n{type}\r\nTransfer-Encoding:\r\n chunked\r\nContent-Length: {len}\r\n\r\n{body}",
        "HTTP/1.1 200 OK\r\n{type}\r\nX: a\rContent-Length: 3\r\nContent-Length: {len}\r\n\r\n{body}",
        "HTTP/1.1 200 OK\r{type}\rContent-Length: {len}\r\r{body}",
        "HTTP/1.1 200 OK\r\n{type}\r\nX: a\0b\r\nContent-Length: {len}\r\n\r\n{body}",
        "HTTP/1.1 200 OK\r\n{type}\r\nX Y: a\r\nContent-Length: {len}\r\n\r\n{body}",
        "HTTP/1.1 200 OK\r\n{type}\r\nXY\r\nContent-Length: {len}\r\n\r\n{body}",
        "HTTP/1.0 200 OK\r\n{type}\r\nTransfer-Encoding: chunked\r\n\r\n{hex}\r\n{body}\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\n{type}\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n{body}\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\n{type}\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000000\r\n{body}\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\n{type}\r\nTransfer-Encoding: chunked\r\n\r\n{hex}\n{body}\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\n{type}\r\nTransfer-Encoding: chunked\r\n\r\n{hex}\r\n{body}0\r\n\r\n",
        "HTTP/1.1 200 OK\r\n{type}\r\nTransfer-Encoding: chunked\r\n\r\n{hex}\r\n{body}\r\n0\n\n",
        "HTTP/2 200\r\n{type}\r\nContent-Length: {len}\r\n\r\n{body}",
        "HTTP/1.2 200 OK\r\n{type}\r\nContent-Length: {len}\r\n\r\n{body}",
        "HTTP/1.1 +20 OK\r\n{type}\r\nContent-Length: {len}\r\n\r\n{body}",
        "HTTP/1.1 2000 OK\r\n{type}\r\nContent-Length: {len}\r\n\r\n{body}",
        "{body}",
        "\0\0\0\0",
    ];
    let tricks = answers.iter().enumerate();
    let each = tricks.flat_map(|(i, answer)| KINDS.map(|kind| (kind, i, answer)));
    let all = each.map(async |(kind, i, answer)| {
        let odd = Odd::new(stage, kind, i, answer);
        let got = odd.get(stage).await;
        let succeeded = got.as_ref().is_some_and(Got::succeeded);
        assert!(!succeeded, "{kind:?} {answer:?}: {got:?}");
        the_next_ones_get_their_own(stage, kind).await;
    });
    join_all(all).await;
    stage.larder.setup.holds(0).await;
    let kept = kept(&stage.larder.setup);
    assert!(kept.values().all(|body| body != "the body"), "{kept:?}");
    assert!(stage.larder.log_with(&["panicked"]).is_empty());
}

#[tokio::test]
async fn an_answer_that_can_be_read_in_one_way_is_taken_so() {
    let stage = &Stage::new().await;
    let answers = [
        "HTTP/1.1 200 OK\r\n{type}\r\nContent-Length: {len}\r\nContent-Length: {len}\r\n\r\n{body}",
        "HTTP/1.1 200 OK\n{type}\nContent-Length: {len}\n\n{body}",
        "HTTP/1.1 200\r\n{type}\r\nContent-Length: {len}\r\n\r\n{body}",
        "HTTP/1.1 200 OK\r\n{type}\r\nTransfer-Encoding: chunked\r\n\r\n{hex};a=b\r\n{body}\r\n0;c\r\n\r\n",
        // Chunks go before a length (RFC 9112 section 6.3).
        "HTTP/1.1 200 OK\r\n{type}\r\nTransfer-Encoding: chunked\r\nContent-Length: {len}\r\n\r\n{hex}\r\n{body}\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\n{type}\r\nContent-Length: {len}\r\nTransfer-Encoding: chunked\r\n\r\n{hex}\r\n{body}\r\n0\r\n\r\n{evil}",
        // Trailers say nothing.
        "HTTP/1.1 200 OK\r\n{type}\r\nTransfer-Encoding: chunked\r\nTrailer: Set-Cookie, Content-Length\r\n\r\n{hex}\r\n{body}\r\n0\r\nSet-Cookie: evil=1\r\nContent-Length: 3\r\n\r\n",
        // What comes before the answer is none, and has no body.
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n{type}\r\nContent-Length: {len}\r\n\r\n{body}",
        "HTTP/1.1 102 Processing\r\nContent-Length: 60\r\n\r\nHTTP/1.1 200 OK\r\n{type}\r\nContent-Length: {len}\r\n\r\n{body}",
        "HTTP/1.1 103 Early Hints\r\nSet-Cookie: evil=1\r\nTransfer-Encoding: chunked\r\n\r\nHTTP/1.1 200 OK\r\n{type}\r\nContent-Length: {len}\r\n\r\n{body}",
        // What comes behind it is nobody's.
        "HTTP/1.1 200 OK\r\n{type}\r\nContent-Length: {len}\r\n\r\n{body}{evil}",
        "HTTP/1.1 200 OK\r\n{type}\r\nContent-Length: {len}\r\n\r\n{body}\r\n\r\n{evil}{evil}{evil}",
        "HTTP/1.1 200 OK\r\n{type}\r\nTransfer-Encoding: chunked\r\n\r\n{hex}\r\n{body}\r\n0\r\n\r\n{evil}",
        "HTTP/1.1 200 OK\r\n{type}\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n{body}{evil}",
    ];
    let mut right = Vec::new();
    for (i, answer) in answers.into_iter().enumerate() {
        for kind in KINDS {
            let odd = Odd::new(stage, kind, i, answer);
            // On a connection that is kept, and on the next one.
            for _ in 0..2 {
                let got = odd.get(stage).await.expect(answer);
                assert_eq!(got.header("set-cookie"), None, "{kind:?} {answer:?}");
                got.assert_is(&odd.body);
                the_next_ones_get_their_own(stage, kind).await;
            }
            right.push(odd);
        }
    }
    stage.larder.setup.holds(answers.len()).await;
    let kept = kept(&stage.larder.setup);
    for odd in right.iter().filter(|odd| odd.kind == Kind::Document) {
        assert_eq!(kept.get(&odd.url()).map(String::as_str), Some("the body"));
    }
    assert!(kept.values().all(|body| !body.contains("EVIL")), "{kept:?}");
    assert!(stage.larder.log_with(&["panicked"]).is_empty());
}

/// An answer without a body has none, whatever it says and whatever follows.
#[tokio::test]
async fn what_follows_an_answer_without_a_body_is_nobodys() {
    let stage = &Stage::new().await;
    let answers = [
        (
            304,
            "HTTP/1.1 304 Not Modified\r\nContent-Length: 64\r\n\r\n{evil}",
        ),
        (
            304,
            "HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n{evil}",
        ),
        (
            204,
            "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n{evil}",
        ),
        (
            404,
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n{evil}",
        ),
        (
            404,
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n\r\n{evil}",
        ),
    ];
    for (i, (status, answer)) in answers.into_iter().enumerate() {
        for kind in KINDS {
            let odd = Odd::new(stage, kind, i, answer);
            let got = odd.get(stage).await.expect(answer);
            // Nobody asked whether it was modified, and no archive is empty.
            assert!(
                [status, 502].contains(&got.status),
                "{kind:?} {answer:?}: {got:?}"
            );
            assert!(!got.text().contains("EVIL"), "{kind:?} {answer:?}");
            the_next_ones_get_their_own(stage, kind).await;
        }
    }
    stage.larder.setup.holds(0).await;
}

/// RFC 9110 section 15.2 allows any number of them; a client's patience does not.
#[tokio::test]
async fn a_flood_of_interim_answers_ends_in_time_and_harms_nobody() {
    let stage = &Stage::new().await;
    let some = "HTTP/1.1 100 Continue\r\n\r\n".repeat(2000);
    let some = some + "HTTP/1.1 200 OK\r\n{type}\r\nContent-Length: {len}\r\n\r\n{body}";
    let endless = "HTTP/1.1 103 Early Hints\r\nLink: </evil>\r\n\r\n".repeat(400_000);
    let odd = Odd::new(stage, Kind::Document, 1, &some);
    odd.get(stage).await.unwrap().assert_is(&odd.body);

    let flood = async {
        let odd = Odd::new(stage, Kind::Document, 2, &endless);
        let asked = Instant::now();
        let got = odd.get(stage).await.unwrap();
        assert!(matches!(got.status, 502 | 504), "{}", got.status);
        let took = asked.elapsed();
        assert!(took < Duration::from_secs(10), "{took:?}");
    };
    let others = async {
        for _ in 0..20 {
            the_next_ones_get_their_own(stage, Kind::Document).await;
        }
    };
    tokio::join!(flood, others);
    the_next_ones_get_their_own(stage, Kind::Document).await;
    assert_eq!(
        kept(&stage.larder.setup).get(&format!("https://{RELEASES}/Document2")),
        None
    );
}

/// Where a redirect leads is a URL, whatever else is written in it.
#[tokio::test]
async fn a_redirect_puts_nothing_into_the_next_request() {
    let stage = &Stage::new().await;
    let product = Product::new("terraform", "1.9.0");
    product.publish(&stage.upstream);
    let place = format!("https://{RELEASES}/real.zip");
    let file = Reply::archive(product.archive.clone());
    stage.upstream.route(RELEASES, "/real.zip", file);
    for location in [
        "{place}?a=%0d%0aX-Evil:%201%0d%0a%0d%0aGET%20/evil",
        "{place}%0d%0aX-Evil:%201",
        "{place}%00%0a",
        "{place} HTTP/1.1 X-Evil: 1",
        "{place}\tHTTP/1.1",
        "{place}?X-Evil:\u{e9}\u{20ac}",
        "{place}#\tX-Evil: 1",
        "//releases.hashicorp.com/real.zip#X-Evil",
        "https://x-evil:x-evil@releases.hashicorp.com/real.zip",
        "https://releases.hashicorp.com\\@evil.example/real.zip",
        "https://releases.hashicorp.com:x/real.zip",
        "https://releases.hashicorp.com%0d%0aX-Evil/real.zip",
        "http://releases.hashicorp.com/real.zip",
        "https:///real.zip",
        "",
    ] {
        let redirect = Reply::redirect(&location.replace("{place}", &place));
        stage
            .upstream
            .route(RELEASES, &product.archive_path(), redirect);
        let before = stage.upstream.journal().len();
        let got = stage.larder.client().get(&product.archive_url()).await;
        match got.status {
            200 => got.assert_is(&product.archive),
            status => assert!((400..600).contains(&status), "{location:?}: {status}"),
        }
        for seen in &stage.upstream.journal()[before..] {
            let known = [RELEASES, ELSEWHERE].contains(&&*seen.host);
            let evil = ["x-evil", "authorization"];
            let evil = evil.iter().any(|name| seen.header(name).is_some());
            assert!(known && !evil, "{location:?}: {seen:?}");
            let plain = |c: char| c.is_ascii_graphic();
            assert!(seen.target.chars().all(plain), "{location:?}: {seen:?}");
        }
        let gc = ["gc", "--max-size", "0"];
        let gc = stage.larder.setup.command(&gc).output().unwrap();
        assert!(gc.status.success(), "{gc:?}");
    }
    assert!(stage.upstream.gets(RELEASES, "/real.zip") > 0);
    // What is passed on, for the client to follow, is passed on in one line.
    let raw = "HTTP/1.1 302 Found\r\nLocation: /x\rSet-Cookie: evil=1\r\nContent-Length: 0\r\n\r\n";
    stage.upstream.route(RELEASES, "/page", Reply::raw(raw));
    let url = format!("https://{RELEASES}/page");
    let got = stage.larder.client().get(&url).await;
    assert_eq!((got.status, got.header("set-cookie")), (502, None));
    let encoded = "/x%0d%0aSet-Cookie:%20evil=1";
    stage
        .upstream
        .route(RELEASES, "/page", Reply::redirect(encoded));
    let got = stage.larder.client().get(&url).await;
    assert_eq!((got.status, got.header("location")), (302, Some(encoded)));
    assert_eq!(got.header("set-cookie"), None);
}
