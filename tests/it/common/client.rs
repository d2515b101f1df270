//! A client that hides nothing: CONNECT, TLS and HTTP/1.1 by hand, so that a test sees whether a
//! body was complete, and can send what no library would.

use std::net::SocketAddr;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::within;

#[derive(Clone)]
pub struct Client {
    proxy: SocketAddr,
    roots: Arc<RootCertStore>,
}

impl Client {
    pub fn new(proxy: SocketAddr, ca_pem: &[u8]) -> Self {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(ca_pem) {
            roots.add(certificate.unwrap()).unwrap();
        }
        Self {
            proxy,
            roots: Arc::new(roots),
        }
    }

    /// The same proxy, another trust: for blind tunnels, where the peer is the upstream.
    pub fn trusting(&self, ca_pem: &str) -> Self {
        Self::new(self.proxy, ca_pem.as_bytes())
    }

    /// The same trust, another address of the proxy.
    pub fn at(&self, proxy: SocketAddr) -> Self {
        Self {
            proxy,
            ..self.clone()
        }
    }

    /// A plain connection to the proxy.
    pub async fn plain(&self) -> Conn {
        Conn::new(self.tcp().await)
    }

    pub async fn tcp(&self) -> TcpStream {
        let tcp = TcpStream::connect(self.proxy).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        tcp
    }

    /// CONNECT; the raw tunnel, or the refusal.
    pub async fn connect(&self, authority: &str) -> Result<TcpStream, Got> {
        self.connect_with(authority, "").await
    }

    /// CONNECT with more header lines, each ending in CRLF.
    pub async fn connect_with(&self, authority: &str, headers: &str) -> Result<TcpStream, Got> {
        let mut tcp = self.tcp().await;
        let head = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n{headers}\r\n");
        tcp.write_all(head.as_bytes()).await.unwrap();
        // Byte by byte: what follows the head belongs to the tunnel.
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let byte = within("answer to CONNECT", tcp.read_u8()).await;
            head.push(byte.unwrap_or_else(|error| {
                let said = String::from_utf8_lossy(&head);
                panic!("no answer to CONNECT {authority}: {error}, after {said:?}")
            }));
        }
        let mut conn = Conn::new(tcp);
        if head.starts_with(b"HTTP/1.1 200") {
            return Ok(conn.into_tcp());
        }
        conn.buffer = head;
        Err(conn.answer("CONNECT").await.unwrap().finish().await)
    }

    /// CONNECT and TLS to `host`, under `sni`.
    pub async fn tls(&self, host: &str, sni: &str) -> std::io::Result<TlsStream<TcpStream>> {
        let tcp = match self.connect(&format!("{host}:443")).await {
            Ok(tcp) => tcp,
            Err(refusal) => panic!("CONNECT {host}:443 refused: {refusal:?}"),
        };
        self.handshake(tcp, sni).await
    }

    pub async fn handshake(
        &self,
        tcp: TcpStream,
        sni: &str,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        handshake(tcp, sni, self.config()).await
    }

    /// What `handshake` uses; a test may bend it.
    pub fn config(&self) -> ClientConfig {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(Arc::clone(&self.roots))
            .with_no_client_auth()
    }

    /// The same for a client that has a certificate.
    pub fn certified_config(
        &self,
        certificate: CertificateDer<'static>,
        key: PrivateKeyDer<'static>,
    ) -> ClientConfig {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(Arc::clone(&self.roots))
            .with_client_auth_cert(vec![certificate], key)
            .unwrap()
    }

    /// A connection on which to speak HTTP with `host`.
    pub async fn open(&self, host: &str) -> Conn {
        Conn::new(self.tls(host, host).await.unwrap())
    }

    /// Sends a request on a connection of its own; the head of the answer has come when this returns.
    pub async fn send(&self, method: &str, url: &str, headers: &[(&str, &str)]) -> Answer {
        let (host, target) = split(url);
        let mut conn = self.open(host).await;
        conn.request(method, host, target, headers).await;
        match conn.answer(method).await {
            Ok(answer) => answer,
            Err(error) => panic!("{method} {url}: no answer: {error}"),
        }
    }

    pub async fn stream(&self, url: &str) -> Answer {
        self.send("GET", url, &[]).await
    }

    pub async fn get(&self, url: &str) -> Got {
        self.get_with(url, &[]).await
    }

    pub async fn get_with(&self, url: &str, headers: &[(&str, &str)]) -> Got {
        self.send("GET", url, headers).await.finish().await
    }

    pub async fn head(&self, url: &str) -> Got {
        self.send("HEAD", url, &[]).await.finish().await
    }

    /// One of larder's own pages, over plain HTTP.
    pub async fn page(&self, target: &str) -> Got {
        let mut conn = self.plain().await;
        let host = self.proxy.to_string();
        conn.request("GET", &host, target, &[]).await;
        conn.answer("GET").await.unwrap().finish().await
    }

    /// Asks the proxy itself for a whole URL, over plain HTTP.
    pub async fn absolute(&self, url: &str, headers: &[(&str, &str)]) -> Got {
        let mut conn = self.plain().await;
        let host = url.split('/').nth(2).expect("a host");
        conn.request("GET", host, url, headers).await;
        conn.answer("GET").await.unwrap().finish().await
    }

    /// Whatever comes back for these bytes until the peer closes.
    pub async fn raw(&self, bytes: &[u8]) -> Vec<u8> {
        let mut tcp = self.tcp().await;
        let _ = tcp.write_all(bytes).await; // It may hang up in the middle.
        let mut said = Vec::new();
        let _ = within("end of the connection", tcp.read_to_end(&mut said)).await;
        said
    }
}

pub async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
    tcp: S,
    sni: &str,
    config: ClientConfig,
) -> std::io::Result<TlsStream<S>> {
    let name = ServerName::try_from(sni.to_owned()).unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    within("TLS handshake", connector.connect(name, tcp)).await
}

fn split(url: &str) -> (&str, &str) {
    let rest = url.strip_prefix("https://").expect("an https URL");
    let slash = rest.find('/').expect("a path");
    rest.split_at(slash)
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {
    fn into_tcp(self: Box<Self>) -> TcpStream;
}

impl Io for TcpStream {
    fn into_tcp(self: Box<Self>) -> TcpStream {
        *self
    }
}

impl Io for TlsStream<TcpStream> {
    fn into_tcp(self: Box<Self>) -> TcpStream {
        self.into_inner().0
    }
}

/// Through a proxy that is itself reached over TLS.
impl Io for TlsStream<TlsStream<TcpStream>> {
    fn into_tcp(self: Box<Self>) -> TcpStream {
        Box::new(self.into_inner().0).into_tcp()
    }
}

/// A connection and what was read ahead on it.
pub struct Conn {
    io: Box<dyn Io>,
    buffer: Vec<u8>,
}

impl Conn {
    #[expect(private_bounds, reason = "TCP or TLS, nothing else")]
    pub fn new(io: impl Io + 'static) -> Self {
        Self {
            io: Box::new(io),
            buffer: Vec::new(),
        }
    }

    fn into_tcp(self) -> TcpStream {
        self.io.into_tcp()
    }

    pub async fn request(
        &mut self,
        method: &str,
        host: &str,
        target: &str,
        headers: &[(&str, &str)],
    ) {
        let mut head = format!("{method} {target} HTTP/1.1\r\nHost: {host}\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        self.write(head.as_bytes()).await;
    }

    pub async fn write(&mut self, bytes: &[u8]) {
        // A peer that has hung up is found out by reading.
        let _ = self.io.write_all(bytes).await;
        let _ = self.io.flush().await;
    }

    /// The head of the next answer; an error if the connection ends first.
    pub async fn answer(mut self, method: &str) -> std::io::Result<Answer> {
        let end = loop {
            if let Some(at) = self.buffer.windows(4).position(|four| four == b"\r\n\r\n") {
                break at;
            }
            if self.fill().await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        };
        let head = String::from_utf8(self.buffer.drain(..end + 4).collect()).unwrap();
        let mut lines = head.trim_end().split("\r\n");
        let mut start = lines.next().unwrap().splitn(3, ' ');
        let version = start.next().unwrap().to_owned();
        let status = start.next().unwrap().parse().unwrap();
        let reason = start.next().unwrap_or_default().to_owned();
        let headers: Vec<(String, String)> = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        let header = |name| {
            headers
                .iter()
                .find(|(key, _)| key == name)
                .map(|(_, value)| value)
        };
        let left = match (header("content-length"), header("transfer-encoding")) {
            _ if method == "HEAD" || matches!(status, 204 | 304) => Left::Bytes(0),
            (_, Some(_)) => Left::Chunks(0),
            (Some(length), None) => Left::Bytes(length.parse().unwrap()),
            (None, None) => Left::UntilClose,
        };
        Ok(Answer {
            version,
            status,
            reason,
            headers,
            left,
            cut: false,
            conn: self,
        })
    }

    async fn fill(&mut self) -> std::io::Result<usize> {
        within("bytes from larder", self.io.read_buf(&mut self.buffer)).await
    }

    async fn line(&mut self) -> std::io::Result<String> {
        loop {
            if let Some(at) = self.buffer.windows(2).position(|two| two == b"\r\n") {
                let line = self.buffer.drain(..at + 2).collect::<Vec<_>>();
                return Ok(String::from_utf8_lossy(&line[..at]).into_owned());
            }
            if self.fill().await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

/// An answer whose body is still on its way.
pub struct Answer {
    pub version: String,
    pub status: u16,
    pub reason: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    left: Left,
    cut: bool,
    conn: Conn,
}

/// What must still come for the body to be complete.
enum Left {
    Bytes(u64),
    /// So many bytes of this chunk, and more chunks.
    Chunks(u64),
    UntilClose,
    Nothing,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }

    /// The next part of the body; `None` when it has ended, or was cut.
    pub async fn chunk(&mut self) -> Option<Vec<u8>> {
        if self.cut {
            return None;
        }
        match self.try_chunk().await {
            Ok(chunk) => chunk,
            Err(_) => {
                self.cut = true;
                None
            }
        }
    }

    /// At least `n` further bytes, however the body goes on.
    pub async fn at_least(&mut self, n: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < n {
            match self.chunk().await {
                Some(chunk) => bytes.extend(chunk),
                None => panic!("the body ended after {} of {n} bytes", bytes.len()),
            }
        }
        bytes
    }

    /// The rest.
    pub async fn finish(self) -> Got {
        self.finish_after(Vec::new()).await
    }

    /// The rest, as the continuation of what was read before.
    pub async fn finish_after(mut self, mut body: Vec<u8>) -> Got {
        while let Some(chunk) = self.chunk().await {
            body.extend(chunk);
        }
        Got {
            version: self.version,
            status: self.status,
            reason: self.reason,
            headers: self.headers,
            body,
            complete: !self.cut,
        }
    }

    /// The whole body, and the connection for the next request.
    pub async fn finish_and_keep(mut self) -> (Vec<u8>, Conn) {
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk().await {
            body.extend(chunk);
        }
        assert!(!self.cut, "cut after {} bytes", body.len());
        (body, self.conn)
    }

    async fn try_chunk(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        if let Left::Chunks(0) = self.left {
            let size = self.conn.line().await?;
            let size = size.split(';').next().unwrap().trim();
            let size = u64::from_str_radix(size, 16).map_err(std::io::Error::other)?;
            self.left = Left::Chunks(size);
            if size == 0 {
                while !self.conn.line().await?.is_empty() {}
                self.left = Left::Nothing;
            }
        }
        let wanted = match self.left {
            Left::Nothing | Left::Bytes(0) => return Ok(None),
            Left::Bytes(left) | Left::Chunks(left) => left,
            Left::UntilClose => u64::MAX,
        };
        if self.conn.buffer.is_empty() && self.conn.fill().await? == 0 {
            let whole = matches!(self.left, Left::UntilClose);
            self.left = Left::Nothing;
            self.cut = !whole;
            return Ok(None);
        }
        let size = wanted.min(self.conn.buffer.len() as u64);
        let chunk = self.conn.buffer.drain(..size as usize).collect();
        match &mut self.left {
            Left::Bytes(left) => *left -= size,
            Left::Chunks(left) => {
                *left -= size;
                if *left == 0 {
                    self.conn.line().await?;
                }
            }
            Left::UntilClose | Left::Nothing => {}
        }
        Ok(Some(chunk))
    }
}

/// An answer with its body, as far as it came.
#[derive(Debug)]
pub struct Got {
    pub version: String,
    pub status: u16,
    pub reason: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Whether the body ended as its framing promised.
    pub complete: bool,
}

impl Got {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", self.text()))
    }

    pub fn cache_status(&self) -> &str {
        self.header("cache-status").unwrap_or("(no Cache-Status)")
    }

    /// Whether a client would take this for the whole of something.
    pub fn succeeded(&self) -> bool {
        self.complete && matches!(self.status, 200 | 206)
    }

    /// Not so much as `assert_eq` on megabytes would print.
    #[track_caller]
    pub fn assert_is(&self, bytes: &[u8]) {
        let Self {
            status, complete, ..
        } = self;
        let length = self.body.len();
        assert!(
            *status == 200 && *complete && self.body == bytes,
            "status {status}, complete {complete}, {length} of {} bytes, equal so far {}, {:?}",
            bytes.len(),
            bytes.starts_with(&self.body),
            self.headers,
        );
    }

    #[track_caller]
    pub fn assert_hit(&self) {
        let status = self.cache_status();
        assert!(status.contains("larder; hit"), "Cache-Status: {status}");
    }

    /// A refusal of larder's own: its words in JSON, and Proxy-Status. Returns the words.
    #[track_caller]
    pub fn assert_refused(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{} {:?}", self.text(), self.headers);
        let proxy_status = self.header("proxy-status").unwrap_or_default();
        assert!(
            proxy_status.starts_with("larder"),
            "Proxy-Status: {proxy_status}"
        );
        let words = self.json()["errors"][0]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        assert!(words.starts_with("larder: "), "{words}");
        words
    }
}
