//! A data dir that has grown: how soon larder serves from it, what it takes of memory, and what a hit costs. Run
//! when asked for by name: `cargo bench -- index`.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::client::{Route, Stream};
use crate::common::{Larder, Setup, free_port};
use crate::upstream::Upstream;
use crate::{machine, rivals, stock};

pub const WORD: &str = "index";

/// What larder says when it has looked through its data dir.
const KNOWN: &str = "all that is held is known";

/// Of names in the ledger: as many as larder remembers.
const LEDGER: usize = 500_000;
/// As many as larder keeps.
const DOCUMENTS: usize = 20_000;
/// Of hits, for each latency.
const HITS: usize = 200;
/// Between hits while larder looks through the rest.
const PAUSE: Duration = Duration::from_millis(20);
/// Beyond the usual bound of the kit: it is the measurement.
const PATIENCE: Duration = Duration::from_secs(600);
/// From one blob to the next that is asked for: a prime, so that they lie everywhere.
const STRIDE: usize = 7_919;

/// Of the data dir that has grown.
#[derive(Clone, Copy)]
pub struct Size {
    pub entries: usize,
    pub blobs: usize,
}

impl Default for Size {
    fn default() -> Self {
        Self {
            entries: 1_000_000,
            blobs: 100_000,
        }
    }
}

pub async fn run(size: Size, rounds: usize) {
    let Size { entries, blobs } = size;
    assert!(
        blobs >= 5_000 && entries >= blobs,
        "--entries >= --blobs >= 5000"
    );
    let upstream = Upstream::start();
    println!(
        "A data dir that has grown, {rounds} starts each with all files in the page cache, and then one with none\n"
    );

    let setup = rivals::larder_at(&upstream.place);
    let mut empty = start(&setup, rounds).await;
    empty.wait_until_known().await;
    empty.of_fetched(&upstream).await;
    let none = empty.known_rss;
    let empty = empty.end(None, &setup, &[]).await;

    let setup = rivals::larder_at(&upstream.place);
    stock::documents(&setup.data_dir(), DOCUMENTS).await;
    let mut documents = start(&setup, rounds).await;
    documents.wait_until_known().await;
    let documents = documents.end(Some((none, DOCUMENTS)), &setup, &[]).await;

    let setup = rivals::larder_at(&upstream.place);
    let begun = Instant::now();
    stock::archives(&setup.data_dir(), entries, blobs, LEDGER).await;
    let took = begun.elapsed().as_secs_f64();
    println!(
        "{entries} entries, {blobs} blobs, up to {LEDGER} names in the ledger: made in {took:.0} s"
    );
    let requests = upstream.requests();
    let mut grown = start(&setup, rounds).await;
    let others = grown.of_held(size).await;
    let grown = grown.end(Some((none, entries)), &setup, &others).await;
    println!(
        "of all these hits upstream saw {} requests\n",
        upstream.requests() - requests
    );
    print(&[("empty", empty), ("documents", documents), ("index", grown)]);
    println!(
        "documents: {DOCUMENTS} kept documents of providers and nothing else; index: the entries and blobs"
    );
    println!(
        "Hits are of 1 KiB over one connection, by one client: median and the 99th of a hundred."
    );
}

/// A larder on such a data dir, and what was seen of it.
struct Grown {
    larder: Larder,
    begun: Instant,
    /// Seconds from exec until /readyz answered, of each start
    ready: Vec<f64>,
    /// KiB
    ready_rss: u64,
    known_after: f64,
    known_rss: u64,
    peak: u64,
    latencies: Vec<(&'static str, String)>,
    /// CPU seconds that others had had by then
    others: f64,
    /// How many cores they had since
    busy: f64,
}

/// Starts so often; the last one stays.
async fn start(setup: &Setup, rounds: usize) -> Grown {
    let mut ready = Vec::new();
    loop {
        let addr = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let (others, begun) = (machine::others(), Instant::now());
        let listen = addr.to_string();
        let (larder, after) = tokio::join!(setup.start_on(&listen), wait_until_ready(addr, begun));
        ready.push(after);
        if ready.len() == rounds {
            ready.sort_by(f64::total_cmp);
            let ready_rss = machine::rss(larder.pid());
            return Grown {
                larder,
                begun,
                ready,
                ready_rss,
                known_after: 0.0,
                known_rss: 0,
                peak: 0,
                latencies: Vec::new(),
                others,
                busy: 0.0,
            };
        }
        larder.terminate().await;
    }
}

/// Returns the seconds since `begun`.
async fn wait_until_ready(addr: SocketAddr, begun: Instant) -> f64 {
    while !is_ready(addr).await.unwrap_or(false) {
        assert!(begun.elapsed() < PATIENCE, "larder is not ready");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    begun.elapsed().as_secs_f64()
}

async fn is_ready(addr: SocketAddr) -> std::io::Result<bool> {
    let mut tcp = TcpStream::connect(addr).await?;
    let request = format!("GET /readyz HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n");
    tcp.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).await?;
    Ok(answer.starts_with("HTTP/1.1 200"))
}

impl Grown {
    fn is_known(&self) -> bool {
        !self.larder.log_with(&[KNOWN]).is_empty()
    }

    async fn wait_until_known(&mut self) {
        while !self.is_known() {
            assert!(self.begun.elapsed() < PATIENCE, "never known: {KNOWN}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.note_known().await;
    }

    /// What was measured, and what a start takes that has to read all from disk, as after a boot, and hits on it.
    async fn end(
        mut self,
        each: Option<(u64, usize)>,
        setup: &Setup,
        paths: &[String],
    ) -> Vec<(&'static str, String)> {
        let took = self.begun.elapsed().as_secs_f64();
        self.busy = (machine::others() - self.others) / took;
        let mut cells = self.column(each);
        self.larder.terminate().await;
        if !machine::forget_files() {
            println!("a start from disk: left out, for want of privilege");
            return cells;
        }
        let mut cold = start(setup, 1).await;
        cells.push(("from disk: exec to /readyz, ms", millis(cold.ready[0])));
        cold.measure("from disk: first time, right after ready", paths)
            .await;
        cells.append(&mut cold.latencies);
        cells
    }

    async fn note_known(&mut self) {
        self.known_after = self.begun.elapsed().as_secs_f64();
        machine::settle(self.larder.pid()).await;
        self.known_rss = machine::rss(self.larder.pid());
        self.peak = machine::peak(self.larder.pid());
    }

    /// Hits on what it has just fetched.
    async fn of_fetched(&mut self, upstream: &Upstream) {
        let fetched: Vec<_> = (0..HITS)
            .map(|_| upstream.publish(1 << 10, 0).path)
            .collect();
        let mut stream = self.open().await;
        for path in &fetched {
            stream.get(path).await;
        }
        machine::settle(self.larder.pid()).await;
        self.measure("again", &fetched).await;
    }

    /// Hits on what was there at the start. Returns some that were not asked for.
    async fn of_held(&mut self, size: Size) -> Vec<String> {
        let mut paths = never_asked(size);
        let mut some = || paths.by_ref().take(HITS).collect::<Vec<_>>();
        let early = some();
        self.measure("first time, right after ready", &early).await;
        let overtaken = self.is_known();

        let mut stream = self.open().await;
        let mut meanwhile = Vec::new();
        while !self.is_known() {
            assert!(self.begun.elapsed() < PATIENCE, "never known: {KNOWN}");
            meanwhile.extend(hits(&mut stream, &paths.by_ref().take(1).collect::<Vec<_>>()).await);
            tokio::time::sleep(PAUSE).await;
        }
        self.note_known().await;
        self.note_hits("first time, one each 20 ms until known", meanwhile);
        if overtaken {
            println!("all was known before the first {HITS} hits were over");
        }

        let late: Vec<_> = paths.by_ref().take(HITS).collect();
        self.measure("first time, all known", &late).await;
        self.measure("again", &late).await;
        paths.take(HITS).collect()
    }

    async fn open(&self) -> Stream {
        let route: Route = rivals::through(&self.larder);
        route.open().await
    }

    async fn measure(&mut self, what: &'static str, paths: &[String]) {
        let mut stream = self.open().await;
        let times = hits(&mut stream, paths).await;
        self.note_hits(what, times);
    }

    fn note_hits(&mut self, what: &'static str, mut times: Vec<f64>) {
        if times.is_empty() {
            return;
        }
        times.sort_by(f64::total_cmp);
        let (median, late) = (times[times.len() / 2], times[times.len() * 99 / 100]);
        let text = format!("{:.0}, {:.0} us", median * 1e6, late * 1e6);
        self.latencies.push((what, text));
    }

    /// What each of so many takes beside a memory in KiB, where it is of that kind.
    fn column(&self, each: Option<(u64, usize)>) -> Vec<(&'static str, String)> {
        let mib = |kib: u64| format!("{:.1}", kib as f64 / 1024.0);
        let (ready, last) = (&self.ready, self.ready.len() - 1);
        let mut cells = vec![
            ("exec to /readyz, ms", millis(ready[ready.len() / 2])),
            (
                "  fastest..slowest",
                format!("{:.0}..{:.0}", ready[0] * 1e3, ready[last] * 1e3),
            ),
            ("exec to all known, s", format!("{:.2}", self.known_after)),
            ("RSS when ready, MiB", mib(self.ready_rss)),
            ("RSS when all is known, MiB", mib(self.known_rss)),
            ("peak RSS until then, MiB", mib(self.peak)),
        ];
        if let Some((empty, n)) = each {
            let bytes = (self.known_rss as f64 - empty as f64) * 1024.0 / n as f64;
            cells.push(("RSS of each, bytes", format!("{bytes:.0}")));
        }
        cells.extend(self.latencies.iter().cloned());
        let others = format!("{:.1}", self.busy.max(0.0));
        cells.push(("cores that others had meanwhile", others));
        cells
    }
}

fn millis(seconds: f64) -> String {
    format!("{:.0}", seconds * 1e3)
}

/// Paths of archives that are held, each of another blob, until all have been named.
fn never_asked(size: Size) -> impl Iterator<Item = String> {
    let Size { entries, blobs } = size;
    (0..blobs).map(move |n| {
        let blob = n * STRIDE % blobs;
        // Any of those that name it.
        let names = (entries - blob).div_ceil(blobs);
        stock::archive_path(blob + blobs * (n % names))
    })
}

/// The seconds of each, which must be a hit.
async fn hits(stream: &mut Stream, paths: &[String]) -> Vec<f64> {
    let mut times = Vec::with_capacity(paths.len());
    for path in paths {
        let start = Instant::now();
        let head = stream.get(path).await;
        times.push(start.elapsed().as_secs_f64());
        assert!(head.contains("cache-status: larder; hit"), "{path}: {head}");
    }
    times
}

fn print(columns: &[(&str, Vec<(&'static str, String)>)]) {
    let mut labels: Vec<&str> = Vec::new();
    // The last has all of them, in their order.
    for (label, _) in columns.iter().rev().flat_map(|(_, cells)| cells) {
        if !labels.contains(label) {
            labels.push(label);
        }
    }
    let line = |label: &str, cells: Vec<&str>| {
        let cells: String = cells.iter().map(|cell| format!("{cell:>16}")).collect();
        println!("{label:<42}{cells}");
    };
    line("", columns.iter().map(|(name, _)| *name).collect());
    for label in labels {
        let cell = |cells: &[(&str, String)]| {
            let found = cells.iter().find(|(l, _)| *l == label);
            found.map_or("-".to_owned(), |(_, text)| text.clone())
        };
        let cells: Vec<_> = columns.iter().map(|(_, cells)| cell(cells)).collect();
        line(label, cells.iter().map(String::as_str).collect());
    }
    println!();
}
