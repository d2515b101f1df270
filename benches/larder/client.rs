//! The one client: TLS 1.3 with AES-256-GCM and HTTP/1.1, by CONNECT or straight. It reads whole answers and
//! keeps nothing of them.

use std::net::SocketAddr;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{CipherSuite, ClientConfig, ProtocolVersion, RootCertStore};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::common::RELEASES;

/// Read from the session at a time.
const BUFFER: usize = 64 << 10;

/// A way to the releases site.
#[derive(Clone)]
pub struct Route {
    addr: SocketAddr,
    connect: bool,
    tls: Arc<ClientConfig>,
}

impl Route {
    /// To who answers TLS at once.
    pub fn straight(addr: SocketAddr, ca_pem: &[u8]) -> Self {
        Self::new(addr, ca_pem, false)
    }

    /// Through a forward proxy.
    pub fn through(addr: SocketAddr, ca_pem: &[u8]) -> Self {
        Self::new(addr, ca_pem, true)
    }

    fn new(addr: SocketAddr, ca_pem: &[u8], connect: bool) -> Self {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(ca_pem) {
            roots.add(certificate.unwrap()).unwrap();
        }
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        let wanted = CipherSuite::TLS13_AES_256_GCM_SHA384;
        provider
            .cipher_suites
            .retain(|suite| suite.suite() == wanted);
        let mut tls = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        // Each connection is a stranger's.
        tls.resumption = Resumption::disabled();
        Self {
            addr,
            connect,
            tls: Arc::new(tls),
        }
    }

    pub async fn open(&self) -> Stream {
        let mut tcp = TcpStream::connect(self.addr).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        if self.connect {
            tunnel(&mut tcp).await;
        }
        let name = RELEASES.try_into().unwrap();
        let connector = TlsConnector::from(Arc::clone(&self.tls));
        let tls = connector.connect(name, tcp).await.unwrap();
        let session = tls.get_ref().1;
        let suite = session.negotiated_cipher_suite().unwrap().suite();
        assert_eq!(suite, CipherSuite::TLS13_AES_256_GCM_SHA384);
        assert_eq!(session.protocol_version(), Some(ProtocolVersion::TLSv1_3));
        Stream(tls)
    }

    pub async fn open_many(&self, n: usize) -> Vec<Stream> {
        let each = |_| {
            let route = self.clone();
            async move { route.open().await }
        };
        all((0..n).map(each)).await
    }

    /// One document or archive over a connection of its own.
    pub async fn fetch(&self, path: &str) {
        self.open().await.get(path).await;
    }
}

async fn tunnel(tcp: &mut TcpStream) {
    let head = format!("CONNECT {RELEASES}:443 HTTP/1.1\r\nHost: {RELEASES}:443\r\n\r\n");
    tcp.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 4096];
    let mut filled = 0;
    while !answer[..filled].ends_with(b"\r\n\r\n") {
        // A server does not speak first in TLS, so nothing can follow the head.
        let n = tcp.read(&mut answer[filled..]).await.unwrap();
        assert!(n > 0, "the proxy closed on CONNECT");
        filled += n;
    }
    let head = String::from_utf8_lossy(&answer[..filled]);
    assert!(head.get(9..12) == Some("200"), "{head}");
}

pub struct Stream(TlsStream<TcpStream>);

impl Stream {
    /// Asks, and reads the whole answer. Returns its head in lower case.
    pub async fn get(&mut self, path: &str) -> String {
        self.read(path, |_| {}).await
    }

    /// The body.
    pub async fn bytes(&mut self, path: &str) -> Vec<u8> {
        let mut body = Vec::new();
        self.read(path, |part| body.extend_from_slice(part)).await;
        body
    }

    /// The SHA-256 of the body.
    pub async fn digest(&mut self, path: &str) -> String {
        let mut hash = Sha256::new();
        self.read(path, |part| hash.update(part)).await;
        hash.finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// Asks, waits for the first byte of the answer, and hangs up.
    pub async fn first_byte(mut self, path: &str) {
        self.ask(path).await;
        self.0.read_u8().await.unwrap();
    }

    /// `TLSv1_3, TLS13_AES_256_GCM_SHA384, leaf …, ALPN …`
    pub fn negotiated(&self) -> String {
        let session = self.0.get_ref().1;
        let alpn = session.alpn_protocol().map(String::from_utf8_lossy);
        format!(
            "{:?}, {:?}, leaf {}, ALPN {}",
            session.protocol_version().unwrap(),
            session.negotiated_cipher_suite().unwrap().suite(),
            leaf(&session.peer_certificates().unwrap()[0]),
            alpn.as_deref().unwrap_or("none"),
        )
    }

    async fn ask(&mut self, path: &str) {
        let head = format!("GET {path} HTTP/1.1\r\nHost: {RELEASES}\r\n\r\n");
        self.0.write_all(head.as_bytes()).await.unwrap();
        // What TLS has buffered is not sent by reading.
        self.0.flush().await.unwrap();
    }

    async fn read(&mut self, path: &str, mut part: impl FnMut(&[u8])) -> String {
        self.ask(path).await;
        let mut buffer = vec![0; BUFFER];
        let mut filled = 0;
        let end = loop {
            let n = self.0.read(&mut buffer[filled..]).await.unwrap();
            assert!(n > 0, "the answer ended in its head");
            filled += n;
            if let Some(at) = buffer[..filled].windows(4).position(|w| w == b"\r\n\r\n") {
                break at;
            }
        };
        let head = std::str::from_utf8(&buffer[..end]).unwrap();
        let head = head.to_ascii_lowercase();
        let length = content_length(&head);
        part(&buffer[end + 4..filled]);
        let mut got = (filled - end - 4) as u64;
        while got < length {
            let n = self.0.read(&mut buffer).await.unwrap();
            assert!(n > 0, "the answer was cut after {got} of {length} bytes");
            part(&buffer[..n]);
            got += n as u64;
        }
        head
    }
}

/// Of an answer, which must be 200 over HTTP/1.1.
fn content_length(head: &str) -> u64 {
    assert!(head.starts_with("http/1.1 200"), "{head}");
    let length = head.split("content-length: ").nth(1).unwrap();
    length.lines().next().unwrap().trim().parse().unwrap()
}

fn leaf(der: &[u8]) -> String {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).unwrap();
    match certificate.public_key().parsed().unwrap() {
        x509_parser::public_key::PublicKey::EC(point) => format!("P-{}", point.key_size()),
        x509_parser::public_key::PublicKey::RSA(key) => format!("RSA-{}", key.key_size()),
        _ => "of another kind".to_owned(),
    }
}

/// All of them at once, spread over the cores.
pub async fn all<F>(work: impl Iterator<Item = F>) -> Vec<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    let tasks: Vec<_> = work.map(tokio::spawn).collect();
    let mut done = Vec::with_capacity(tasks.len());
    for task in tasks {
        done.push(task.await.unwrap());
    }
    done
}
