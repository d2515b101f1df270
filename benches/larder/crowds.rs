//! Rising numbers of clients, who take as many bytes in all. Run when asked for by name: `cargo bench -- clients`.

use crate::Rig;
use crate::client::{Stream, all};
use crate::rivals::{Column, Party};
use crate::table::{Row, Sample, Unit};
use crate::upstream::Archive;
use crate::works::Clock;

const SIZE: usize = 4_000_000;
/// Downloads in a row.
const DOWNLOADS: usize = 1_000;
const CROWDS: [usize; 5] = [1, 16, 64, 256, 1_000];
/// What throughput may lose from 16 clients to more before it is said to fall: such is the noise.
const HOLDS: f64 = 0.9;

impl Rig {
    pub async fn crowds(&mut self) {
        if !self.options.asks("clients") {
            return;
        }
        let slow = [Column::Squid, Column::Mitmproxy];
        self.restart_without(&slow).await;
        for (kinds, what) in [(1, "one archive"), (100, "100 archives")] {
            let publish = |_| self.upstream.publish(SIZE, 0);
            let archives: Vec<_> = (0..kinds).map(publish).collect();
            self.hold(&archives).await;
            let mut rates = Vec::new();
            for clients in CROWDS {
                let name = format!("clients: {clients}, {what} of 4 MB");
                let row = Row::new(&name, Unit::Gigabyte, &[]).about("KiB of peak RSS a client");
                let work = async |rig: &Rig, party: &Party, _: &[Archive]| {
                    vec![crowd(rig, party, clients, &archives).await]
                };
                let row = self.rounds(row, Vec::new, work).await;
                rates.extend(row.rate(Column::Larder));
            }
            self.holds(what, &rates);
        }
    }

    /// Whether throughput holds from the second crowd on.
    fn holds(&mut self, what: &str, rates: &[f64]) {
        let Some((first, more)) = rates.get(1).zip(rates.get(2..)) else {
            return;
        };
        let least = more.iter().copied().fold(f64::MAX, f64::min) / first;
        let met = if least >= HOLDS { "met" } else { "NOT MET" };
        let bar = format!("bar: throughput >= {HOLDS} x 16 clients' {least:>8.2}  {met}");
        println!("  {bar}\n");
        self.verdicts.push(format!("clients: {what:<43} {bar}"));
    }
}

/// After a download over each: the first has windows and buffers to grow, and many clients would have no
/// other.
async fn warm(open: Vec<Stream>, archive: &Archive) -> Vec<Stream> {
    let first = open.into_iter().map(|mut stream| {
        let path = archive.path.clone();
        async move {
            stream.get(&path).await;
            stream
        }
    });
    all(first).await
}

async fn crowd(rig: &Rig, party: &Party, clients: usize, archives: &[Archive]) -> Sample {
    let open = warm(party.hot.open_many(clients).await, &archives[0]).await;
    let clock = Clock::start(rig, party);
    let downloads = open.into_iter().enumerate().map(|(client, mut stream)| {
        // Each its share of the downloads, over all archives in turn.
        let share = (client..DOWNLOADS).step_by(clients);
        let paths: Vec<_> = share
            .map(|n| archives[n % archives.len()].path.clone())
            .collect();
        async move {
            for path in paths {
                stream.get(&path).await;
            }
        }
    });
    all(downloads).await;
    let amount = (SIZE * DOWNLOADS) as f64 / 1e9;
    let sample = clock.stop(rig, party, 1, amount).await;
    Sample {
        memory: Some(sample.peak as f64 / clients as f64),
        ..sample
    }
}
