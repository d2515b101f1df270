//! The bare upstream, in a process of its own: the releases site out of memory, as fast as rustls lets one write.
//! It is led by lines on its standard input, and ends with it.

use std::collections::HashMap;
use std::io::{BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::client::Route;
use crate::common::{Product, RELEASES, unique};
use crate::machine::cores;

/// A document of 1 KiB that may be held for an hour.
pub const DOCUMENT: &str = "/terraform/document.json";

/// The argument that makes this program the upstream.
pub const SERVE: &str = "--serve-upstream";

/// Given to TLS at a time, and what it may hold back: 16 records go into one system call.
const WRITE: usize = 256 << 10;

/// A throttled answer goes out in steps of this length.
const STEP: Duration = Duration::from_millis(5);

/// What the upstream says of itself when it starts.
#[derive(Serialize, Deserialize)]
pub struct Place {
    pub pid: u32,
    pub addr: SocketAddr,
    /// On port 443, for those who cannot be told a port; none where that takes a privilege
    pub named: Option<SocketAddr>,
    pub ca_pem: String,
}

impl Place {
    /// Straight to it.
    pub fn route(&self) -> Route {
        Route::straight(self.addr, self.ca_pem.as_bytes())
    }
}

/// What was published.
#[derive(Clone, Serialize, Deserialize)]
pub struct Archive {
    pub path: String,
    pub sha256: String,
}

/// The process, from outside.
pub struct Upstream {
    pub place: Place,
    child: Child,
    talk: Mutex<(ChildStdin, BufReader<ChildStdout>)>,
}

impl Upstream {
    pub fn start() -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg(SERVE);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let place = answer(&mut output);
        Self {
            place: serde_json::from_str(&place).unwrap(),
            child,
            talk: Mutex::new((input, output)),
        }
    }

    pub fn route(&self) -> Route {
        self.place.route()
    }

    /// A new archive, sent at so many bytes a second; 0: as fast as can be.
    pub fn publish(&self, size: usize, rate: u64) -> Archive {
        serde_json::from_str(&self.ask(&format!("archive {size} {rate}"))).unwrap()
    }

    /// GETs of archives so far.
    pub fn fetches(&self) -> usize {
        self.ask("fetches").parse().unwrap()
    }

    /// Requests of all kinds so far, also for what there is not.
    pub fn requests(&self) -> usize {
        self.ask("requests").parse().unwrap()
    }

    fn ask(&self, line: &str) -> String {
        let (input, output) = &mut *self.talk.lock().unwrap();
        writeln!(input, "{line}").unwrap();
        answer(output)
    }
}

fn answer(output: &mut impl std::io::BufRead) -> String {
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert!(line.ends_with('\n'), "the upstream ended");
    line.trim_end().to_owned()
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process, from inside.
pub fn serve() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores())
        .enable_all()
        .build()
        .unwrap();
    let (acceptor, ca_pem) = identity();
    let site = Arc::new(Site::default());
    let mut document = vec![b' '; 1022];
    document.extend(b"{}");
    let head = "Content-Type: application/json\r\nCache-Control: public, max-age=3600\r\n";
    site.put(DOCUMENT, head, document.into(), 0);

    let listen = |addr: SocketAddr| {
        let listener = runtime.block_on(TcpListener::bind(addr)).ok()?;
        let addr = listener.local_addr().ok()?;
        runtime.spawn(accept(listener, acceptor.clone(), Arc::clone(&site)));
        Some(addr)
    };
    let addr = listen((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let named = (2..50).find_map(|last| listen((Ipv4Addr::new(127, 0, 0, last), 443).into()));
    let place = Place {
        pid: std::process::id(),
        addr,
        named,
        ca_pem,
    };
    println!("{}", serde_json::to_string(&place).unwrap());

    for line in std::io::stdin().lines().map_while(Result::ok) {
        println!("{}", site.obey(&line));
    }
}

#[derive(Default)]
struct Site {
    files: Mutex<HashMap<String, Arc<File>>>,
    fetches: AtomicUsize,
    requests: AtomicUsize,
}

struct File {
    head: String,
    body: Bytes,
    rate: u64,
    is_archive: bool,
}

impl Site {
    fn obey(&self, line: &str) -> String {
        let words: Vec<_> = line.split(' ').collect();
        match words[..] {
            ["archive", size, rate] => {
                let archive = self.publish(size.parse().unwrap(), rate.parse().unwrap());
                serde_json::to_string(&archive).unwrap()
            }
            ["fetches"] => self.fetches.load(Ordering::SeqCst).to_string(),
            ["requests"] => self.requests.load(Ordering::SeqCst).to_string(),
            _ => unreachable!("{line}"),
        }
    }

    fn publish(&self, size: usize, rate: u64) -> Archive {
        let (product, archive) = product(size);
        let stamp = "Last-Modified: Wed, 12 Mar 2025 17:04:05 GMT\r\n";
        let plain = format!("Content-Type: text/plain\r\n{stamp}");
        self.put(&product.sums_path(), &plain, product.sums, 0);
        let tag = &archive.sha256[..16];
        let zip = format!("Content-Type: application/zip\r\nETag: \"{tag}\"\r\n{stamp}");
        self.put(&archive.path, &zip, product.archive, rate);
        archive
    }

    fn put(&self, path: &str, head: &str, body: Bytes, rate: u64) {
        let length = body.len();
        let file = File {
            head: format!("HTTP/1.1 200 OK\r\n{head}Content-Length: {length}\r\n\r\n"),
            body,
            rate,
            is_archive: path.ends_with(".zip"),
        };
        let mut files = self.files.lock().unwrap();
        files.insert(path.to_owned(), Arc::new(file));
    }
}

/// An archive with its sums that nobody has seen.
pub fn product(size: usize) -> (Product, Archive) {
    let version = format!("1.0.{}", unique());
    let product = Product::sized("terraform", &version, size);
    let sums = String::from_utf8(product.sums.to_vec()).unwrap();
    let archive = Archive {
        path: product.archive_path(),
        sha256: sums.split(' ').next().unwrap().to_owned(),
    };
    (product, archive)
}

/// A throwaway CA and its certificate for the site, both of P-256.
fn identity() -> (TlsAcceptor, String) {
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // OpenSSL takes a leaf of its issuer's name for self-signed.
    ca.distinguished_name.push(DnType::CommonName, "bench CA");
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec![RELEASES.to_owned()]).unwrap();
    let leaf = leaf.signed_by(&key, &ca).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key)
        .unwrap();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    (TlsAcceptor::from(Arc::new(config)), ca.pem())
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, site: Arc<Site>) {
    loop {
        let Ok((tcp, _)) = listener.accept().await else {
            continue;
        };
        let (acceptor, site) = (acceptor.clone(), Arc::clone(&site));
        tokio::spawn(async move {
            let _ = tcp.set_nodelay(true);
            if let Ok(mut tls) = acceptor.accept(tcp).await {
                tls.get_mut().1.set_buffer_limit(Some(2 * WRITE));
                let _ = converse(&mut tls, &site).await; // An error: the peer has gone.
            }
        });
    }
}

async fn converse(tls: &mut TlsStream<TcpStream>, site: &Site) -> std::io::Result<()> {
    let mut buffer = Vec::with_capacity(4096);
    loop {
        let end = loop {
            if let Some(at) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                break at + 4;
            }
            if tls.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
        buffer.drain(..end);
        let mut words = head.split(' ');
        let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        site.requests.fetch_add(1, Ordering::SeqCst);
        let file = site.files.lock().unwrap().get(path).cloned();
        match file {
            None => {
                let none = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n";
                tls.write_all(none).await?;
            }
            Some(file) if method == "HEAD" => tls.write_all(file.head.as_bytes()).await?,
            Some(file) => {
                site.fetches
                    .fetch_add(usize::from(file.is_archive), Ordering::SeqCst);
                send(tls, &file).await?;
            }
        }
        tls.flush().await?;
    }
}

async fn send(tls: &mut TlsStream<TcpStream>, file: &File) -> std::io::Result<()> {
    let (head, body) = (file.head.as_bytes(), &file.body);
    if body.len() <= 16 << 10 {
        return tls.write_all(&[head, body].concat()).await;
    }
    tls.write_all(head).await?;
    if file.rate == 0 {
        for part in body.chunks(WRITE) {
            tls.write_all(part).await?;
        }
        return Ok(());
    }
    // By the clock, so that a late step is made up for.
    let mut clock = tokio::time::interval(STEP);
    let step = (file.rate as f64 * STEP.as_secs_f64()) as usize;
    for part in body.chunks(step) {
        clock.tick().await;
        tls.write_all(part).await?;
        tls.flush().await?;
    }
    Ok(())
}
