//! What larder adds to the bare upstream: the same client does the same work through larder and
//! straight at the upstream, in turns, in one run. Ratios and CPU hold better than times here.
//!
//! `cargo bench` prints one table. See benches/README.md for how to read it.

#![allow(clippy::unwrap_used)]

// The kit of the integration tests, of which a part is enough here.
#[allow(unused_imports)]
#[path = "../tests/it/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rustls::ClientConfig;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use common::{Client, Larder, Product, RELEASES, Reply, Setup, Upstream};

/// Rounds of each row; the table shows medians.
const ROUNDS: usize = 5;
/// As large as terraform-provider-aws 3.39.0.
const ARCHIVE: usize = 38_500_000;
const LARGE: usize = 200 << 20;
const CLIENTS: usize = 16;
const REQUESTS: usize = 500;
const CONNECTIONS: usize = 300;
const DOCUMENT: &str = "/terraform/document.json";

type Stream = TlsStream<TcpStream>;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(bench());
}

async fn bench() {
    let upstream = Upstream::start();
    let document = Reply::json(
        vec![b' '; 1022]
            .into_iter()
            .chain(*b"{}")
            .collect::<Vec<u8>>(),
    );
    let document = document.header("Cache-Control", "max-age=3600");
    upstream.route(RELEASES, DOCUMENT, document);
    let larder = Setup::new(&upstream)
        .args(["--max-size", "20GiB"])
        .start()
        .await;
    let bench = Bench {
        direct: Route::direct(&upstream),
        proxied: Route::through(&larder),
        upstream,
        larder,
    };
    println!(
        "{:<38} {:>9} {:>9} {:>6} {:>11} {:>13} {:>9} {:>8}",
        "work", "larder", "direct", "ratio", "spread", "larder CPU", "peak RSS", "fetches"
    );
    bench.hits("hit, 38.5 MB, 1 stream", ARCHIVE, 1).await;
    bench.hits("hit, 200 MiB, 1 stream", LARGE, 1).await;
    bench
        .hits("hit, 38.5 MB, 16 streams", ARCHIVE, CLIENTS)
        .await;
    bench.misses("cold miss, 38.5 MB, 1 client", 1).await;
    bench
        .misses("cold miss, 38.5 MB, 16 clients", CLIENTS)
        .await;
    bench.first_byte().await;
    bench.documents().await;
    bench.connections().await;
}

struct Bench {
    upstream: Upstream,
    larder: Larder,
    direct: Route,
    proxied: Route,
}

/// A way to the releases site.
#[derive(Clone)]
struct Route {
    addr: std::net::SocketAddr,
    connect: bool,
    tls: Arc<ClientConfig>,
}

/// Medians of a row.
struct Row<'a> {
    name: &'a str,
    larder: Vec<Duration>,
    direct: Vec<Duration>,
    cpu: String,
    rss: u64,
    fetches: usize,
}

impl Bench {
    async fn hits(&self, name: &str, size: usize, clients: usize) {
        let path = self.publish(size).await;
        fetch(&self.proxied, &path).await;
        self.row(name, size * clients, async |route| {
            all(clients, async || fetch(route, &path).await).await;
        })
        .await;
    }

    async fn misses(&self, name: &str, clients: usize) {
        self.row(name, ARCHIVE * clients, async |route| {
            let path = self.publish(ARCHIVE).await;
            let start = Instant::now();
            all(clients, async || fetch(route, &path).await).await;
            TIMED.set(start.elapsed());
        })
        .await;
    }

    /// From the request to the first byte of the answer, on a miss.
    async fn first_byte(&self) {
        self.row("cold miss, first byte", 1, async |route| {
            let path = self.publish(ARCHIVE).await;
            let mut stream = route.open().await;
            let start = Instant::now();
            ask(&mut stream, &path).await;
            let mut byte = [0];
            stream.read_exact(&mut byte).await.unwrap();
            TIMED.set(start.elapsed());
            drop(stream);
        })
        .await;
    }

    async fn documents(&self) {
        fetch(&self.proxied, DOCUMENT).await;
        let name = "1 KiB document, 16 connections";
        self.row_per_request(name, CLIENTS * REQUESTS, async |route| {
            all(CLIENTS, async || {
                let mut stream = route.open().await;
                for _ in 0..REQUESTS {
                    get(&mut stream, DOCUMENT).await;
                }
            })
            .await;
        })
        .await;
    }

    async fn connections(&self) {
        let name = "new connection + 1 KiB";
        self.row_per_request(name, CONNECTIONS, async |route| {
            for _ in 0..CONNECTIONS {
                fetch(route, DOCUMENT).await;
            }
        })
        .await;
    }

    async fn row(&self, name: &str, bytes: usize, work: impl AsyncFn(&Route)) {
        let zips = || self.upstream.count(|seen| seen.path().ends_with(".zip"));
        let mut fetches = 0;
        let row = self.measure(name, async |route| {
            let before = zips();
            work(route).await;
            if route.connect {
                fetches = fetches.max(zips() - before);
            }
        });
        let (mut row, cpu) = row.await;
        let gigabytes = (ROUNDS * bytes) as f64 / 1e9;
        row.fetches = fetches;
        row.cpu = match bytes {
            1 => "-".to_owned(),
            _ => format!("{:.2} s/GB", cpu / gigabytes),
        };
        row.print();
    }

    async fn row_per_request(&self, name: &str, requests: usize, work: impl AsyncFn(&Route)) {
        let (mut row, cpu) = self.measure(name, async |route| work(route).await).await;
        row.cpu = format!("{:.0} us/req", cpu * 1e6 / (ROUNDS * requests) as f64);
        row.print();
    }

    /// In turns, so that whatever else the machine does meets both.
    async fn measure<'a>(
        &self,
        name: &'a str,
        mut work: impl AsyncFnMut(&Route),
    ) -> (Row<'a>, f64) {
        let pid = self.larder.pid();
        forget_peak(pid);
        let (mut larder, mut direct, mut cpu) = (Vec::new(), Vec::new(), 0.0);
        for _ in 0..ROUNDS {
            direct.push(timed(&mut work, &self.direct).await);
            let before = cpu_seconds(pid);
            larder.push(timed(&mut work, &self.proxied).await);
            cpu += cpu_seconds(pid) - before;
        }
        let row = Row {
            name,
            larder,
            direct,
            cpu: String::new(),
            rss: peak_rss(pid),
            fetches: 0,
        };
        (row, cpu)
    }

    /// A new archive of that size; its path.
    async fn publish(&self, size: usize) -> String {
        let version = format!("1.0.{}", common::unique());
        let product = Product::sized("terraform", &version, size);
        product.publish(&self.upstream);
        product.archive_path()
    }
}

std::thread_local! {
    /// Where only a part of the work counts.
    static TIMED: std::cell::Cell<Duration> = const { std::cell::Cell::new(Duration::ZERO) };
}

async fn timed(work: &mut impl AsyncFnMut(&Route), route: &Route) -> Duration {
    TIMED.set(Duration::ZERO);
    let start = Instant::now();
    work(route).await;
    let whole = start.elapsed();
    // `block_on` keeps this future on one thread.
    match TIMED.get() {
        Duration::ZERO => whole,
        part => part,
    }
}

async fn all<F: Future>(n: usize, work: impl Fn() -> F) {
    join_all((0..n).map(|_| work())).await;
}

impl Route {
    fn direct(upstream: &Upstream) -> Self {
        let client = Client::new(upstream.addr, upstream.ca_pem.as_bytes());
        Self {
            addr: upstream.addr,
            connect: false,
            tls: Arc::new(client.config()),
        }
    }

    fn through(larder: &Larder) -> Self {
        Self {
            addr: larder.addr,
            connect: true,
            tls: Arc::new(larder.client().config()),
        }
    }

    async fn open(&self) -> Stream {
        let mut tcp = TcpStream::connect(self.addr).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        if self.connect {
            let head = format!("CONNECT {RELEASES}:443 HTTP/1.1\r\nHost: {RELEASES}:443\r\n\r\n");
            tcp.write_all(head.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            while !answer.ends_with(b"\r\n\r\n") {
                answer.push(tcp.read_u8().await.unwrap());
            }
        }
        let mut tls = (*self.tls).clone();
        // Each connection is a stranger's.
        tls.resumption = rustls::client::Resumption::disabled();
        let name = RELEASES.try_into().unwrap();
        let connector = TlsConnector::from(Arc::new(tls));
        connector.connect(name, tcp).await.unwrap()
    }
}

async fn fetch(route: &Route, path: &str) {
    get(&mut route.open().await, path).await;
}

async fn ask(stream: &mut Stream, path: &str) {
    let head = format!("GET {path} HTTP/1.1\r\nHost: {RELEASES}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    // What TLS has buffered is not sent by reading.
    stream.flush().await.unwrap();
}

/// Asks, and reads the whole answer without keeping it.
async fn get(stream: &mut Stream, path: &str) {
    ask(stream, path).await;
    let mut buffer = vec![0; 256 << 10];
    let mut filled = 0;
    let (length, mut got) = loop {
        let n = stream.read(&mut buffer[filled..]).await.unwrap();
        assert!(n > 0, "the answer ended in its head");
        filled += n;
        if let Some(end) = buffer[..filled].windows(4).position(|w| w == b"\r\n\r\n") {
            let head = std::str::from_utf8(&buffer[..end])
                .unwrap()
                .to_ascii_lowercase();
            assert!(head.starts_with("http/1.1 200"), "{head}");
            let length = head.split("content-length: ").nth(1).unwrap();
            let length: usize = length.lines().next().unwrap().trim().parse().unwrap();
            break (length, filled - end - 4);
        }
    };
    while got < length {
        let n = stream.read(&mut buffer).await.unwrap();
        assert!(n > 0, "the answer was cut after {got} of {length} bytes");
        got += n;
    }
}

impl Row<'_> {
    fn print(mut self) {
        let (larder, direct) = (median(&mut self.larder), median(&mut self.direct));
        let spread = |all: &[Duration]| all[all.len() - 1].as_secs_f64() / all[0].as_secs_f64();
        println!(
            "{:<38} {:>9} {:>9} {:>6.2} {:>11} {:>13} {:>9} {:>8}",
            self.name,
            human(larder),
            human(direct),
            larder.as_secs_f64() / direct.as_secs_f64(),
            format!("{:.2}/{:.2}", spread(&self.larder), spread(&self.direct)),
            self.cpu,
            format!("{:.1} MiB", self.rss as f64 / 1024.0),
            self.fetches,
        );
    }
}

/// The middle one; the slice is sorted afterwards.
fn median(all: &mut [Duration]) -> Duration {
    all.sort_unstable();
    all[all.len() / 2]
}

fn human(time: Duration) -> String {
    match time.as_secs_f64() {
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 0.01 => format!("{:.0} ms", s * 1e3),
        s => format!("{:.2} ms", s * 1e3),
    }
}

/// User and system time of a process (proc(5), in ticks of 10 ms).
fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    let ticks: u64 = fields[11..13]
        .iter()
        .map(|f| f.parse::<u64>().unwrap())
        .sum();
    ticks as f64 / 100.0
}

/// In KiB.
fn peak_rss(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .unwrap();
    line.split_ascii_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

/// Has the peak counted from now on.
fn forget_peak(pid: u32) {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
}
