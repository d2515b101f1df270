//! A server that plays every host larder fetches from, and can misbehave in each way that networks
//! and sites do; over TLS, and over plain TCP to whom speaks so. It speaks HTTP/1.1 by hand: a server
//! library would mend what is to be broken here.

use std::collections::{HashMap, VecDeque};
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{ASSETS, ELSEWHERE, GITHUB, OPENTOFU, RELEASES, TERRAFORM};

pub struct Upstream {
    pub addr: SocketAddr,
    pub ca_pem: String,
    /// For another server that its CA vouches for, as `localhost` and 127.0.0.1
    pub acceptor: TlsAcceptor,
    world: Arc<World>,
    /// A runtime of its own, so that a test may block its thread on a child process.
    runtime: Option<tokio::runtime::Runtime>,
}

impl Upstream {
    pub fn start() -> Self {
        let (acceptor, ca_pem) = identity();
        let world = Arc::new(World::default());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let addr = listener.local_addr().unwrap();
        let served = Arc::clone(&world);
        let ours = acceptor.clone();
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            while let Ok((tcp, _)) = listener.accept().await {
                tokio::spawn(connection(tcp, ours.clone(), Arc::clone(&served)));
            }
        });
        Self {
            addr,
            ca_pem,
            acceptor,
            world,
            runtime: Some(runtime),
        }
    }

    /// The names this server has a certificate for.
    pub fn names() -> [&'static str; 6] {
        [TERRAFORM, OPENTOFU, RELEASES, GITHUB, ASSETS, ELSEWHERE]
    }

    /// From now on `reply` is what `host` says at `path` (which is without query).
    pub fn route(&self, host: &str, path: &str, reply: Reply) {
        self.route_fn(host, path, move |_| reply.clone());
    }

    /// Each GET gets the next of `replies`, the last one for good. A HEAD uses none up.
    pub fn route_turns(&self, host: &str, path: &str, replies: Vec<Reply>) {
        self.route_fn(host, path, in_turn(replies));
    }

    pub fn route_fn(
        &self,
        host: &str,
        path: &str,
        reply: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) {
        let key = (host.to_owned(), path.to_owned());
        let mut routes = self.world.routes.lock().unwrap();
        routes.insert(key, Arc::new(reply));
    }

    /// Every request so far, in the order they came.
    pub fn journal(&self) -> Vec<Seen> {
        self.world.journal.lock().unwrap().clone()
    }

    pub fn count(&self, wanted: impl Fn(&Seen) -> bool) -> usize {
        let journal = self.world.journal.lock().unwrap();
        journal.iter().filter(|seen| wanted(seen)).count()
    }

    /// How often `path` (without query) was asked for by GET.
    pub fn gets(&self, host: &str, path: &str) -> usize {
        self.count(|seen| seen.method == "GET" && seen.host == host && seen.path() == path)
    }

    /// Body bytes of `.zip` files and release assets sent to anyone.
    pub fn archive_bytes(&self) -> u64 {
        self.world.archive_bytes.load(Ordering::SeqCst)
    }

    /// TCP connections accepted.
    pub fn connections(&self) -> usize {
        self.world.connections.load(Ordering::SeqCst)
    }

    /// What happens to connections that come from now on.
    pub fn line(&self, line: Line) {
        *self.world.line.lock().unwrap() = line;
    }

    /// The next `n` connections are reset before a byte.
    pub fn reset_next(&self, n: usize) {
        self.world.resets.store(n, Ordering::SeqCst);
    }

    /// Closes every connection and refuses new ones, for good.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The state of the wire.
#[derive(Clone, Copy, Default, PartialEq)]
pub enum Line {
    #[default]
    Up,
    /// Connections are accepted and reset.
    Reset,
    /// Connections are accepted and never answered.
    Deaf,
}

/// A request as it came in.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub host: String,
    /// Path and query.
    pub target: String,
    pub headers: Vec<(String, String)>,
    /// Without its framing.
    pub body: Vec<u8>,
}

impl Seen {
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap()
    }

    pub fn query(&self) -> Option<&str> {
        self.target.split_once('?').map(|(_, query)| query)
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let mut named = self.headers.iter();
        let found = named.find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }
}

/// What to answer, and how to go wrong on the way.
#[derive(Clone)]
pub struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Bytes,
    framing: Framing,
    etag: Option<String>,
    last_modified: Option<String>,
    ranges: bool,
    shifted_range: bool,
    held: Option<Gate>,
    delay: Duration,
    tap: Option<Tap>,
    broken: Option<(u64, Break)>,
    corrupt: Option<u64>,
    gzip: bool,
    head_status: Option<u16>,
}

#[derive(Clone, Copy)]
enum Framing {
    Length,
    /// A length that may be a lie.
    Declared(u64),
    Chunked,
    /// HTTP/1.0: the body ends with the connection.
    Close,
    /// The body is all that is sent: it brings its own head.
    Raw,
}

/// How a connection ends too early.
#[derive(Clone, Copy)]
pub enum Break {
    /// TCP reset.
    Reset,
    /// The TLS session and the connection are closed in good order, the body is short.
    Clean,
}

impl Reply {
    pub fn new(status: u16, content_type: &str, body: impl Into<Bytes>) -> Self {
        Self {
            status,
            headers: vec![("Content-Type".into(), content_type.into())],
            body: body.into(),
            framing: Framing::Length,
            etag: None,
            last_modified: None,
            ranges: false,
            shifted_range: false,
            held: None,
            delay: Duration::ZERO,
            tap: None,
            broken: None,
            corrupt: None,
            gzip: false,
            head_status: None,
        }
    }

    pub fn json(body: impl Into<Bytes>) -> Self {
        Self::new(200, "application/json", body)
    }

    pub fn text(body: impl Into<Bytes>) -> Self {
        Self::new(200, "text/plain", body)
    }

    /// A file as releases.hashicorp.com serves it: strong ETag, Last-Modified, ranges.
    pub fn file(content_type: &str, body: impl Into<Bytes>) -> Self {
        let body = body.into();
        let etag = format!("\"{}\"", &super::sha256(&body)[..16]);
        Self::new(200, content_type, body)
            .etag(&etag)
            .last_modified("Wed, 12 Mar 2025 17:04:05 GMT")
            .ranges()
    }

    pub fn archive(body: impl Into<Bytes>) -> Self {
        Self::file("application/zip", body)
    }

    pub fn status(status: u16) -> Self {
        Self::new(status, "text/plain", format!("status {status}\n"))
    }

    /// These very bytes, head and all. A tap lets them flow, head and all.
    pub fn raw(bytes: impl Into<Bytes>) -> Self {
        let mut reply = Self::new(200, "", bytes);
        reply.framing = Framing::Raw;
        reply
    }

    pub fn redirect(location: &str) -> Self {
        Self::new(302, "text/html", "").header("Location", location)
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        let same = |key: &str| key.eq_ignore_ascii_case(name);
        self.headers.retain(|(key, _)| !same(key));
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Also answers If-None-Match by 304 and, with ranges, If-Range.
    pub fn etag(mut self, etag: &str) -> Self {
        self.etag = Some(etag.into());
        self
    }

    pub fn no_validators(mut self) -> Self {
        self.etag = None;
        self.last_modified = None;
        self
    }

    /// Also answers If-Modified-Since by 304.
    pub fn last_modified(mut self, date: &str) -> Self {
        self.last_modified = Some(date.into());
        self
    }

    pub fn ranges(mut self) -> Self {
        self.ranges = true;
        self
    }

    pub fn ignores_ranges(mut self) -> Self {
        self.ranges = false;
        self
    }

    /// Answers a Range by 206 with the bytes (and the Content-Range) of another place.
    pub fn shifts_ranges(mut self) -> Self {
        self.shifted_range = true;
        self
    }

    pub fn chunked(mut self) -> Self {
        self.framing = Framing::Chunked;
        self
    }

    pub fn close_delimited(mut self) -> Self {
        self.framing = Framing::Close;
        self
    }

    pub fn declares_length(mut self, length: u64) -> Self {
        self.framing = Framing::Declared(length);
        self
    }

    /// Nothing is sent until the gate opens.
    pub fn held_by(mut self, gate: &Gate) -> Self {
        self.held = Some(gate.clone());
        self
    }

    pub fn delayed(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// The body flows as far as the tap permits.
    pub fn tapped(mut self, tap: &Tap) -> Self {
        self.tap = Some(tap.clone());
        self
    }

    /// The connection breaks after so many bytes of this response's body.
    pub fn breaks_after(mut self, bytes: u64, how: Break) -> Self {
        self.broken = Some((bytes, how));
        self
    }

    pub fn cut_after(self, bytes: u64) -> Self {
        self.breaks_after(bytes, Break::Reset)
    }

    /// The byte at this place of the file is another one.
    pub fn corrupt_at(mut self, place: u64) -> Self {
        self.corrupt = Some(place);
        self
    }

    /// Compresses whether or not the client accepts it.
    pub fn gzipped(mut self) -> Self {
        self.gzip = true;
        self
    }

    pub fn refuses_head(mut self, status: u16) -> Self {
        self.head_status = Some(status);
        self
    }
}

/// A door that a test opens.
#[derive(Clone)]
pub struct Gate(Arc<watch::Sender<bool>>);

impl Gate {
    pub fn closed() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }

    pub fn open(&self) {
        self.0.send_replace(true);
    }

    async fn wait(&self) {
        let _ = self.0.subscribe().wait_for(|open| *open).await;
    }
}

/// How many bytes of a file, counted from its start, may have been sent.
#[derive(Clone)]
pub struct Tap(Arc<watch::Sender<u64>>);

impl Tap {
    pub fn at(bytes: u64) -> Self {
        Self(Arc::new(watch::Sender::new(bytes)))
    }

    pub fn permit(&self, bytes: u64) {
        self.0.send_replace(bytes);
    }

    pub fn open(&self) {
        self.permit(u64::MAX);
    }

    /// Waits until the byte at `place` may go; says up to where.
    async fn beyond(&self, place: u64) -> u64 {
        let mut limit = self.0.subscribe();
        match limit.wait_for(|limit| *limit > place).await {
            Ok(limit) => *limit,
            Err(_) => u64::MAX,
        }
    }
}

/// A handler that gives each GET the next of `replies`, and the last one for good.
pub fn in_turn(replies: Vec<Reply>) -> impl Fn(&Seen) -> Reply {
    let left = Mutex::new(VecDeque::from(replies));
    move |seen| {
        let mut left = left.lock().unwrap();
        if left.len() > 1 && seen.method == "GET" {
            left.pop_front().unwrap()
        } else {
            left.front().unwrap().clone()
        }
    }
}

type Handler = Arc<dyn Fn(&Seen) -> Reply + Send + Sync>;

#[derive(Default)]
struct World {
    routes: Mutex<HashMap<(String, String), Handler>>,
    journal: Mutex<Vec<Seen>>,
    archive_bytes: AtomicU64,
    connections: AtomicUsize,
    line: Mutex<Line>,
    resets: AtomicUsize,
}

impl World {
    fn reply_to(&self, seen: &Seen) -> Reply {
        let key = (seen.host.clone(), seen.path().to_owned());
        let handler = self.routes.lock().unwrap().get(&key).cloned();
        match handler {
            Some(handler) => handler(seen),
            None => Reply::new(404, "text/plain", "no such thing here\n"),
        }
    }
}

/// A throwaway CA and one certificate for every name.
fn identity() -> (TlsAcceptor, String) {
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();

    let key = KeyPair::generate().unwrap();
    let names = Upstream::names().map(str::to_owned).to_vec();
    let own = vec!["127.0.0.1".into(), "localhost".into()];
    let leaf = CertificateParams::new([names, own].concat()).unwrap();
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

async fn connection(tcp: TcpStream, acceptor: TlsAcceptor, world: Arc<World>) {
    world.connections.fetch_add(1, Ordering::SeqCst);
    let minus_one = |n: usize| n.checked_sub(1);
    let reset_this = world
        .resets
        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, minus_one)
        .is_ok();
    let line = *world.line.lock().unwrap();
    if reset_this || line == Line::Reset {
        let _ = tcp.set_zero_linger();
        return;
    }
    if line == Line::Deaf {
        std::future::pending::<()>().await;
    }

    let _ = tcp.set_nodelay(true);
    let mut first = [0];
    let _ = tcp.peek(&mut first).await;
    // A TLS handshake record.
    if first != [22] {
        return converse(tcp, &world).await;
    }
    if let Ok(tls) = acceptor.accept(tcp).await {
        converse(tls, &world).await;
    }
}

trait Wire: AsyncRead + AsyncWrite + Unpin {
    fn tcp(&self) -> &TcpStream;
}

impl Wire for TcpStream {
    fn tcp(&self) -> &TcpStream {
        self
    }
}

impl Wire for TlsStream<TcpStream> {
    fn tcp(&self) -> &TcpStream {
        self.get_ref().0
    }
}

async fn converse(mut wire: impl Wire, world: &World) {
    let mut buffer = Vec::new();
    while let Some(seen) = next_request(&mut wire, &mut buffer).await {
        let reply = world.reply_to(&seen);
        world.journal.lock().unwrap().push(seen.clone());
        match answer(&mut wire, &seen, reply, world).await {
            Ok(Next::Request) => {}
            Ok(Next::Close) => break,
            Ok(Next::Reset) => {
                let _ = wire.tcp().set_zero_linger();
                return;
            }
            Err(_) => return, // The peer has gone.
        }
    }
    let _ = wire.shutdown().await;
}

/// What follows an answer.
enum Next {
    Request,
    Close,
    Reset,
}

/// Reads one request, with its body.
async fn next_request(wire: &mut impl Wire, buffer: &mut Vec<u8>) -> Option<Seen> {
    let head = until(wire, buffer, b"\r\n\r\n").await?;
    let head = String::from_utf8_lossy(&head).into_owned();

    let mut lines = head.split("\r\n");
    let mut start = lines.next()?.split(' ');
    let (method, target) = (start.next()?.to_owned(), start.next()?.to_owned());
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect();
    let mut seen = Seen {
        method,
        host: String::new(),
        target,
        headers,
        body: Vec::new(),
    };
    let host = seen.header("host").unwrap_or_default();
    seen.host = host.trim_end_matches(":443").to_owned();

    if seen.header("transfer-encoding").is_some() {
        loop {
            let size = until(wire, buffer, b"\r\n").await?;
            let size = std::str::from_utf8(&size).ok()?;
            let size = usize::from_str_radix(size, 16).ok()?;
            let chunk = exactly(wire, buffer, size).await?;
            seen.body.extend(chunk);
            exactly(wire, buffer, 2).await?;
            if size == 0 {
                return Some(seen);
            }
        }
    }
    let length = seen.header("content-length").unwrap_or("0");
    seen.body = exactly(wire, buffer, length.parse().ok()?).await?;
    Some(seen)
}

/// The bytes before `end`, which is read too.
async fn until(wire: &mut impl Wire, buffer: &mut Vec<u8>, end: &[u8]) -> Option<Vec<u8>> {
    loop {
        let mut windows = buffer.windows(end.len());
        if let Some(at) = windows.position(|window| window == end) {
            let mut bytes: Vec<u8> = buffer.drain(..at + end.len()).collect();
            bytes.truncate(at);
            return Some(bytes);
        }
        if wire.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
}

async fn exactly(wire: &mut impl Wire, buffer: &mut Vec<u8>, size: usize) -> Option<Vec<u8>> {
    while buffer.len() < size {
        if wire.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    Some(buffer.drain(..size).collect())
}

async fn answer(
    wire: &mut impl Wire,
    seen: &Seen,
    mut reply: Reply,
    world: &World,
) -> std::io::Result<Next> {
    if let Some(gate) = &reply.held {
        gate.wait().await;
    }
    tokio::time::sleep(reply.delay).await;

    let is_head = seen.method == "HEAD";
    if let (true, Some(status)) = (is_head, reply.head_status) {
        reply = Reply::status(status);
    }
    if let (Some(place), false) = (reply.corrupt, reply.body.is_empty()) {
        let mut body = reply.body.to_vec();
        body[place as usize] ^= 0x55;
        reply.body = body.into();
    }
    if reply.gzip {
        reply.body = gzip(&reply.body).into();
        reply = reply.header("Content-Encoding", "gzip");
    }
    let start = conditions(seen, &mut reply);

    let bodiless = is_head || matches!(reply.status, 204 | 304);
    wire.write_all(head_of(&reply).as_bytes()).await?;
    wire.flush().await?;
    if bodiless {
        return Ok(Next::Request);
    }
    let counted = seen.path().ends_with(".zip") || seen.host == ASSETS;
    let sent = |bytes: usize| {
        if counted {
            world
                .archive_bytes
                .fetch_add(bytes as u64, Ordering::SeqCst);
        }
    };
    send_body(wire, &reply, start, sent).await
}

/// Turns the reply into a 304 or a 206 where the request and the reply's habits ask for it.
/// Returns the place in the file where the body begins.
fn conditions(seen: &Seen, reply: &mut Reply) -> u64 {
    if reply.status != 200 {
        return 0;
    }
    let same =
        |asked: Option<&str>, ours: &Option<String>| asked.is_some() && asked == ours.as_deref();
    let fresh = match seen.header("if-none-match") {
        Some(tags) => same(Some(tags), &reply.etag),
        None => same(seen.header("if-modified-since"), &reply.last_modified),
    };
    if fresh {
        reply.status = 304;
        reply.body = Bytes::new();
        return 0;
    }

    let if_range = seen.header("if-range");
    let unchanged =
        if_range.is_none() || same(if_range, &reply.etag) || same(if_range, &reply.last_modified);
    if !(reply.ranges && unchanged) {
        return 0;
    }
    let total = reply.body.len() as u64;
    let Some((mut first, last)) = seen.header("range").and_then(|range| span(range, total)) else {
        return 0;
    };
    if reply.shifted_range {
        first = first.saturating_sub(1000);
    }
    reply.status = 206;
    reply.body = reply.body.slice(first as usize..=last as usize);
    let place = format!("bytes {first}-{last}/{total}");
    reply.headers.push(("Content-Range".into(), place));
    first
}

/// The first and last byte of a single `bytes=a-b`, `bytes=a-` or `bytes=-n` that can be satisfied.
fn span(range: &str, total: u64) -> Option<(u64, u64)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let (first, last) = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) => (first, last.min(total - 1)),
        (Ok(first), Err(_)) => (first, total - 1),
        (Err(_), Ok(suffix)) => (total.saturating_sub(suffix), total - 1),
        (Err(_), Err(_)) => return None,
    };
    (first <= last).then_some((first, last))
}

fn head_of(reply: &Reply) -> String {
    let mut head = match reply.framing {
        Framing::Raw => return String::new(),
        Framing::Close => format!("HTTP/1.0 {} Played\r\nConnection: close\r\n", reply.status),
        _ => format!("HTTP/1.1 {} Played\r\n", reply.status),
    };
    let mut line = |name: &str, value: &str| head.push_str(&format!("{name}: {value}\r\n"));
    for (name, value) in &reply.headers {
        line(name, value);
    }
    if let Some(etag) = &reply.etag {
        line("ETag", etag);
    }
    if let Some(date) = &reply.last_modified {
        line("Last-Modified", date);
    }
    if reply.ranges {
        line("Accept-Ranges", "bytes");
    }
    match reply.framing {
        _ if matches!(reply.status, 204 | 304) => {}
        Framing::Length => line("Content-Length", &reply.body.len().to_string()),
        Framing::Declared(length) => line("Content-Length", &length.to_string()),
        Framing::Chunked => line("Transfer-Encoding", "chunked"),
        Framing::Close | Framing::Raw => {}
    }
    head.push_str("\r\n");
    head
}

async fn send_body(
    wire: &mut impl Wire,
    reply: &Reply,
    start: u64,
    sent: impl Fn(usize),
) -> std::io::Result<Next> {
    const CHUNK: u64 = 16 * 1024;
    let length = reply.body.len() as u64;
    let (stop, how) = match reply.broken {
        Some((bytes, how)) if bytes <= length => (bytes, Some(how)),
        _ => (length, None),
    };
    let mut at = 0;
    while at < stop {
        let permitted = match &reply.tap {
            Some(tap) => tap.beyond(start + at).await - start,
            None => u64::MAX,
        };
        let end = stop.min(permitted).min(at + CHUNK);
        let part = &reply.body[at as usize..end as usize];
        if let Framing::Chunked = reply.framing {
            let size = format!("{:x}\r\n", part.len());
            wire.write_all(&[size.as_bytes(), part, b"\r\n"].concat())
                .await?;
        } else {
            wire.write_all(part).await?;
        }
        wire.flush().await?;
        sent(part.len());
        at = end;
    }
    match (how, reply.framing) {
        (Some(Break::Reset), _) => Ok(Next::Reset),
        (Some(Break::Clean), _) | (None, Framing::Close) => Ok(Next::Close),
        (None, Framing::Length | Framing::Raw) => Ok(Next::Request),
        (None, Framing::Declared(declared)) if declared == length => Ok(Next::Request),
        (None, Framing::Declared(_)) => Ok(Next::Close),
        (None, Framing::Chunked) => {
            wire.write_all(b"0\r\n\r\n").await?;
            wire.flush().await?;
            Ok(Next::Request)
        }
    }
}

fn gzip(body: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(body).unwrap();
    encoder.finish().unwrap()
}
