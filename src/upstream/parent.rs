//! The way through a parent proxy: CONNECT over plain TCP or over TLS (RFC 9110 section 9.3.6), or
//! SOCKS5 (RFC 1928, RFC 1929).

use std::net::SocketAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsConnector;
use tokio_socks::tcp::Socks5Stream;
use tokio_socks::{Error as Socks, TargetAddr};

use super::dial::Dialled;
use crate::config::{Authority, NoProxy, Parent, Scheme};
use crate::error::{Error, Kind};

/// Of the parent's answer to CONNECT.
const HEAD_LIMIT: usize = 16 * 1024;
/// Letters of what the parent said that are told.
const QUOTE: usize = 100;
const CHECK: &str = "check --upstream-proxy, or HTTPS_PROXY as inherited";

/// A parent proxy, and who is asked without it.
#[derive(Clone)]
pub struct ParentProxy {
    pub proxy: Parent,
    pub except: NoProxy,
    /// For a parent that is reached over TLS
    pub tls: TlsConnector,
}

impl ParentProxy {
    /// Makes of a connection to the parent one to `asked`. The caller bounds the time.
    pub async fn lead(&self, stream: Dialled, asked: &Authority) -> Result<Dialled, Error> {
        let led = match self.proxy.scheme {
            Scheme::Http => self.connect(stream, asked).await,
            Scheme::Https => match self.shake_hands(stream).await {
                Ok(stream) => self.connect(stream, asked).await,
                Err(failure) => Err(failure),
            },
            Scheme::Socks5 => self.socks(stream, asked).await,
        };
        led.map_err(|Failure { kind, what, mend }| {
            let parent = &self.proxy;
            let words = format!(
                "{asked} is reached through the parent proxy {parent}, which {what}; {mend}"
            );
            Error::new(kind, words)
        })
    }

    async fn shake_hands(&self, stream: Dialled) -> Result<Dialled, Failure> {
        let failed = |what| {
            Failure {
            kind: Kind::Tls,
            what,
            mend: "if its CA is your own, name it with --upstream-ca; if it speaks no TLS, write http://".into(),
        }
        };
        let name = ServerName::try_from(self.proxy.authority.host.as_str().to_owned())
            .map_err(|_| failed("has a name that no certificate can have".into()))?;
        let tls = self.tls.connect(name, stream).await;
        let tls = tls.map_err(|e| failed(format!("failed the TLS handshake ({e})")))?;
        Ok(Box::new(tls))
    }

    async fn connect(&self, mut stream: Dialled, asked: &Authority) -> Result<Dialled, Failure> {
        let token = self.token();
        let mut request = format!("CONNECT {asked} HTTP/1.1\r\nHost: {asked}\r\n");
        if let Some(token) = &token {
            request.push_str(&format!("Proxy-Authorization: Basic {token}\r\n"));
        }
        request.push_str("\r\n");
        let lost = |e| Failure::passing(format!("ended the connection at CONNECT ({e})"));
        stream.write_all(request.as_bytes()).await.map_err(lost)?;
        stream.flush().await.map_err(lost)?;
        // Byte by byte: what follows the head belongs to the tunnel.
        let mut head = Vec::new();
        while !head.ends_with(b"\n\r\n") && !head.ends_with(b"\n\n") {
            if head.len() == HEAD_LIMIT {
                return Err(Failure::passing("sent an endless answer to CONNECT"));
            }
            head.push(stream.read_u8().await.map_err(lost)?);
            if head.iter().zip(b"HTTP/1.").any(|(byte, http)| byte != http) {
                return Err(Failure::passing("answered CONNECT with what is no HTTP/1"));
            }
        }
        let head = String::from_utf8_lossy(&head);
        let status_line = head.lines().next().unwrap_or_default();
        let status: Option<u16> = status_line.split(' ').nth(1).and_then(|s| s.parse().ok());
        let said = format!("answered CONNECT with `{}`", self.quoted(status_line));
        match status {
            Some(200..=299) => Ok(stream),
            Some(407) => Err(self.wants_credentials(said, &basic_alternatives(&head))),
            // Such as 403: to ask again is to be refused again.
            Some(400..=499) if !matches!(status, Some(408 | 425 | 429)) => {
                Err(Failure::refused(said))
            }
            _ => Err(Failure::passing(said)),
        }
    }

    async fn socks(&self, stream: Dialled, asked: &Authority) -> Result<Dialled, Failure> {
        let target = match asked.host.ip() {
            Some(ip) => TargetAddr::Ip(SocketAddr::new(ip, asked.port)),
            None => TargetAddr::Domain(asked.host.as_str().into(), asked.port),
        };
        let led = match &self.proxy.credentials {
            None => Socks5Stream::connect_with_socket(stream, target).await,
            Some((user, password)) => {
                Socks5Stream::connect_with_password_and_socket(stream, target, user, password).await
            }
        };
        led.map(Socks5Stream::into_inner).map_err(|e| match e {
            Socks::NoAcceptableAuthMethods
            | Socks::AuthorizationRequired
            | Socks::PasswordAuthFailure(_) => {
                self.wants_credentials("refused the login".into(), &[])
            }
            Socks::ConnectionNotAllowedByRuleset => {
                Failure::refused("answered that its rules do not allow it")
            }
            Socks::Io(e) => Failure::passing(format!("ended the connection at its login ({e})")),
            Socks::InvalidResponseVersion
            | Socks::InvalidReservedByte
            | Socks::UnknownAddressType
            | Socks::UnknownAuthMethod => Failure::passing("answered with what is no SOCKS5"),
            // Words of the library for the codes of RFC 1928 section 6
            e => Failure::passing(format!("answered: {e}")),
        })
    }

    /// RFC 7617 section 2
    fn token(&self) -> Option<String> {
        let (user, password) = self.proxy.credentials.as_ref()?;
        Some(STANDARD.encode(format!("{user}:{password}")))
    }

    fn wants_credentials(&self, what: String, others: &[&str]) -> Failure {
        let mend = match &self.proxy.credentials {
            _ if !others.is_empty() => format!(
                "it asks for {}, and larder knows Basic alone: put a proxy between them that knows both",
                others.join(", ")
            ),
            Some(_) => "it wants other credentials than those of --upstream-proxy, or of HTTPS_PROXY as inherited".into(),
            None => "it wants credentials: write them as USER:PASSWORD@ before its host in --upstream-proxy, or in HTTPS_PROXY".into(),
        };
        Failure {
            kind: Kind::ParentRefused,
            what,
            mend,
        }
    }

    /// What the parent said, as far as it can be told: it may say anything, our password too.
    fn quoted(&self, said: &str) -> String {
        let password = self
            .proxy
            .credentials
            .as_ref()
            .map(|(_, password)| password.clone());
        let secrets = [password, self.token()];
        let mut secrets = secrets.iter().flatten().filter(|secret| !secret.is_empty());
        if secrets.any(|secret| said.contains(secret.as_str())) {
            return "…".into();
        }
        let printable = said.chars().filter(|c| c.is_ascii_graphic() || *c == ' ');
        printable.take(QUOTE).collect()
    }
}

/// Why the parent did not lead to where it should.
struct Failure {
    kind: Kind,
    what: String,
    mend: String,
}

impl Failure {
    /// Another try may succeed.
    fn passing(what: impl Into<String>) -> Self {
        Self {
            kind: Kind::ConnectFailed,
            what: what.into(),
            mend: format!("try again later, or {CHECK}"),
        }
    }

    fn refused(what: impl Into<String>) -> Self {
        Self {
            kind: Kind::ParentRefused,
            what: what.into(),
            mend:
                "have it allowed there, or list the host in --no-proxy if it can be reached without"
                    .into(),
        }
    }
}

/// The authentication schemes of a 407, if Basic is none of them (RFC 9110 section 11.7.1).
fn basic_alternatives(head: &str) -> Vec<&str> {
    let known = ["Basic", "Digest", "Negotiate", "NTLM", "Kerberos", "Bearer"];
    let fields = head.lines().filter_map(|line| line.split_once(':'));
    let challenges: Vec<_> = fields
        .filter(|(name, _)| name.eq_ignore_ascii_case("Proxy-Authenticate"))
        .flat_map(|(_, value)| value.split([' ', ',', '\t']))
        .collect();
    let named = known.into_iter().filter(|scheme| {
        challenges
            .iter()
            .any(|word| word.eq_ignore_ascii_case(scheme))
    });
    let named: Vec<_> = named.collect();
    match named.contains(&"Basic") {
        true => Vec::new(),
        false => named,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use tokio::io::duplex;

    use super::*;

    fn parent(url: &str) -> ParentProxy {
        ParentProxy {
            proxy: url.parse().unwrap(),
            except: NoProxy::default(),
            tls: crate::upstream::tls(Vec::new()).unwrap(),
        }
    }

    /// What comes of it when the parent says `said` as soon as it is connected to and then hangs
    /// up, and what it was asked.
    async fn led(url: &str, asked: &str, said: &[u8]) -> (Result<Dialled, Error>, Vec<u8>) {
        let (near, mut far) = duplex(1 << 20);
        far.write_all(said).await.unwrap();
        far.shutdown().await.unwrap();
        let asked = asked.parse().unwrap();
        let led = parent(url).lead(Box::new(near), &asked).await;
        let mut request = vec![0; 1 << 10];
        // The other end is held by what was led there, if anything.
        let read = tokio::time::timeout(Duration::from_secs(1), far.read(&mut request)).await;
        request.truncate(read.map_or(0, Result::unwrap));
        (led, request)
    }

    #[tokio::test(start_paused = true)]
    async fn connect_is_asked_for_with_credentials_and_what_follows_is_the_tunnels() {
        for (head, rest) in [
            (
                &b"HTTP/1.1 200 Connection established\r\nContent-Length: 9\r\n\r\n"[..],
                &b"SSH-2.0"[..],
            ),
            (b"HTTP/1.0 204\n\n", b"\r\n\r\n"),
        ] {
            let said = [head, rest].concat();
            let (led, request) = led("http://us%20er:p%40w@p:1", "a.example:22", &said).await;
            let mut got = Vec::new();
            led.unwrap().read_to_end(&mut got).await.unwrap();
            assert_eq!(got, rest);
            assert_eq!(
                String::from_utf8(request).unwrap(),
                "CONNECT a.example:22 HTTP/1.1\r\nHost: a.example:22\r\n\
                 Proxy-Authorization: Basic dXMgZXI6cEB3\r\n\r\n"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_parent_that_does_not_lead_there_is_named_with_what_it_said() {
        let endless = [&b"HTTP/1.1 200 OK\r\n"[..], &b"X: y\r\n".repeat(100_000)].concat();
        let long = format!("HTTP/1.1 503 {}\r\n\r\n", "x".repeat(9_000));
        let ntlm =
            "HTTP/1.1 407 No\r\nProxy-Authenticate: Negotiate\r\nproxy-authenticate: NTLM\r\n\r\n";
        let either = "HTTP/1.1 407 No\r\nProxy-Authenticate: NTLM, basic realm=\"x\"\r\n\r\n";
        for (url, said, kind, words) in [
            (
                "http://u:SECRET@p:1",
                either,
                Kind::ParentRefused,
                "other credentials",
            ),
            (
                "http://u:SECRET@p:1",
                ntlm,
                Kind::ParentRefused,
                "asks for Negotiate, NTLM",
            ),
            (
                "http://p:1",
                either,
                Kind::ParentRefused,
                "write them as USER:PASSWORD@",
            ),
            (
                "http://p:1",
                "HTTP/1.1 403 No\r\n\r\n",
                Kind::ParentRefused,
                "`HTTP/1.1 403 No`",
            ),
            (
                "http://p:1",
                "HTTP/1.1 503 \x1bBusy\r\n\r\n",
                Kind::ConnectFailed,
                "`HTTP/1.1 503 Busy`",
            ),
            (
                "http://p:1",
                "HTTP/1.1 429 No\r\n\r\n",
                Kind::ConnectFailed,
                "429",
            ),
            (
                "http://p:1",
                "HTTP/1.1 OK\r\n\r\n",
                Kind::ConnectFailed,
                "`HTTP/1.1 OK`",
            ),
            (
                "http://u:SECRET@p:1",
                "HTTP/1.1 500 SECRET\r\n\r\n",
                Kind::ConnectFailed,
                "`…`",
            ),
            (
                "http://u:SECRET@p:1",
                "HTTP/1.1 500 dTpTRUNSRVQ=\r\n\r\n",
                Kind::ConnectFailed,
                "`…`",
            ),
            ("http://p:1", &long, Kind::ConnectFailed, "503 xxx"),
            (
                "http://p:1",
                "HTTP/1.1 200 OK\r\n",
                Kind::ConnectFailed,
                "ended the connection",
            ),
            (
                "http://p:1",
                "",
                Kind::ConnectFailed,
                "ended the connection",
            ),
            ("http://p:1", "\x15\x03\x01", Kind::ConnectFailed, "no HTTP"),
            ("http://p:1", "SSH-2.0", Kind::ConnectFailed, "no HTTP"),
            (
                "http://p:1",
                str::from_utf8(&endless).unwrap(),
                Kind::ConnectFailed,
                "endless",
            ),
            (
                "https://p:1",
                "HTTP/1.1 400 TLS, please\r\n\r\n",
                Kind::Tls,
                "write http://",
            ),
            ("https://p:1", "", Kind::Tls, "--upstream-ca"),
        ] {
            let (led, _) = led(url, "a.example:443", said.as_bytes()).await;
            let e = led.err().expect(words);
            let told = e.to_string();
            assert_eq!(e.kind(), kind, "{told}");
            let scheme = url.split(':').next().unwrap();
            for part in [
                words,
                "a.example:443",
                &format!("parent proxy {scheme}://p:1"),
                "; ",
            ] {
                assert!(told.contains(part), "{part}: {told}");
            }
            assert!(!told.contains("SECRET") && told.len() < 500, "{told}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn socks_gets_names_and_addresses_as_they_are() {
        let granted = b"\x05\x00\x05\x00\x00\x01\0\0\0\0\0\0";
        for (asked, request) in [
            ("a.example:443", &b"\x03\x09a.example\x01\xbb"[..]),
            ("192.0.2.1:80", b"\x01\xc0\x00\x02\x01\x00\x50"),
            (
                "[2001:db8::1]:443",
                b"\x04\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x01\x01\xbb",
            ),
        ] {
            for url in ["socks5://p", "socks5h://p"] {
                let said = [&granted[..], b"hello"].concat();
                let (led, got) = led(url, asked, &said).await;
                let mut rest = Vec::new();
                led.unwrap().read_to_end(&mut rest).await.unwrap();
                assert_eq!(rest, b"hello");
                assert_eq!(got, [b"\x05\x01\x00\x05\x01\x00", request].concat());
            }
        }
        let said = b"\x05\x02\x01\x00\x05\x00\x00\x03\x01x\0\0";
        let (led, got) = led("socks5://us:p%40w@p", "a:1", said).await;
        led.unwrap();
        assert_eq!(
            got,
            b"\x05\x02\x00\x02\x01\x02us\x03p@w\x05\x01\x00\x03\x01a\x00\x01"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_socks_answers_is_told() {
        for (said, kind, words) in [
            (
                &b"\x05\xff"[..],
                Kind::ParentRefused,
                "wants other credentials",
            ),
            (
                b"\x05\x02\x01\x01",
                Kind::ParentRefused,
                "wants other credentials",
            ),
            (
                b"\x05\x00\x05\x02\x00\x01\0\0\0\0\0\0",
                Kind::ParentRefused,
                "rules",
            ),
            (
                b"\x05\x00\x05\x05\x00\x01\0\0\0\0\0\0",
                Kind::ConnectFailed,
                "refused",
            ),
            (
                b"\x05\x00\x05\x04\x00\x01\0\0\0\0\0\0",
                Kind::ConnectFailed,
                "nreachable",
            ),
            (
                b"\x05\x00\x05\x63\x00\x01\0\0\0\0\0\0",
                Kind::ConnectFailed,
                "no SOCKS5",
            ),
            (
                b"\x05\x00\x05\x00\x00\x09",
                Kind::ConnectFailed,
                "no SOCKS5",
            ),
            (b"\x05\x07", Kind::ConnectFailed, "no SOCKS5"),
            (b"HTTP/1.1 400 Bad", Kind::ConnectFailed, "no SOCKS5"),
            (b"\x05\x00\x05", Kind::ConnectFailed, "ended the connection"),
            (b"", Kind::ConnectFailed, "ended the connection"),
        ] {
            let (led, _) = led("socks5://u:SECRET@p", "a.example", said).await;
            let e = led.err().expect(words);
            let told = e.to_string();
            assert_eq!(e.kind(), kind, "{told}");
            assert!(told.contains(words), "{words}: {told}");
            assert!(told.contains("parent proxy socks5://p:1080"), "{told}");
            assert!(!told.contains("SECRET"), "{told}");
        }
    }
}
