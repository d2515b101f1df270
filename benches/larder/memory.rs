//! The works that are about memory. Each begins with new processes, and is done once.

use crate::client::{Stream, all};
use crate::rivals::{Column, Party};
use crate::table::{Bar, FLAT, Row, Sample, Unit};
use crate::upstream::{Archive, DOCUMENT};
use crate::works::{ARCHIVE, Clock, LARGE, connect_all, get_all};
use crate::{Rig, machine};

const IDLE: usize = 500;
const STREAMS: usize = 64;
/// Before growth is watched.
const WARM_UP: usize = 5_000;
const FURTHER: usize = 20_000;

const SHAKEN: &str = "500 idle connections, after TLS";
const USED: &str = "500 idle connections, after 1 KiB";
const GROWTH: &str = "20,000 further connections";

impl Rig {
    pub async fn memory(&mut self) {
        self.idle().await;
        let slow = [Column::Squid, Column::Mitmproxy];
        self.streams("64 streams, 38.5 MB", ARCHIVE, &slow[1..])
            .await;
        self.streams("64 streams, 200 MiB", LARGE, &slow).await;
        self.growth().await;
    }

    async fn idle(&mut self) {
        if !self.wants(SHAKEN) && !self.wants(USED) {
            return;
        }
        self.restart().await;
        self.hold_document().await;
        let row = |name: &str| {
            let row = Row::new(name, Unit::Request, &[Bar::MemoryKiB(20.0)]);
            row.about("KiB a connection")
        };
        let (mut shaken, mut used) = (row(SHAKEN), row(USED));
        for party in &self.parties {
            // What the first connections cost is no connection's.
            connect_all(&party.hot, IDLE).await;
            machine::settle(party.pid).await;
            let empty = machine::rss(party.pid);
            machine::forget_peak(party.pid);
            let open = party.hot.open_many(IDLE).await;
            shaken.add(party.column, each(party, empty).await);
            let open = documents(open).await;
            used.add(party.column, each(party, empty).await);
            drop(open);
        }
        self.print(&shaken);
        self.print(&used);
    }

    /// How much memory so many streams at once take.
    async fn streams(&mut self, name: &str, size: usize, without: &[Column]) {
        if !self.wants(name) {
            return;
        }
        self.restart_without(without).await;
        let archive = self.held(size).await;
        let row = Row::new(name, Unit::Gigabyte, &[Bar::PeakMiB(64.0)]);
        let amount = (size * STREAMS) as f64 / 1e9;
        let work = async |rig: &Rig, party: &Party, _: &[Archive]| {
            let open = party.hot.open_many(STREAMS).await;
            let clock = Clock::start(rig, party);
            get_all(open, &archive.path, 1).await;
            vec![clock.stop(rig, party, 1, amount).await]
        };
        self.once(row, work).await;
    }

    async fn growth(&mut self) {
        if !self.wants(GROWTH) {
            return;
        }
        // squid takes minutes for it, and does it where this row is asked for.
        let slow = match self.options.words.is_empty() {
            true => &[Column::Mitmproxy, Column::Squid][..],
            false => &[Column::Mitmproxy],
        };
        self.restart_without(slow).await;
        self.hold_document().await;
        let row = Row::new(GROWTH, Unit::Request, &[Bar::MemoryKiB(FLAT)]);
        let row = row.about("KiB of growth");
        let work = async |rig: &Rig, party: &Party, _: &[Archive]| {
            connect_all(&party.hot, WARM_UP).await;
            machine::settle(party.pid).await;
            let before = machine::rss(party.pid) as f64;
            let clock = Clock::start(rig, party);
            connect_all(&party.hot, FURTHER).await;
            let sample = clock.stop(rig, party, FURTHER, 1.0).await;
            vec![Sample {
                memory: Some(machine::rss(party.pid) as f64 - before),
                ..sample
            }]
        };
        self.once(row, work).await;
    }
}

/// What each idle connection takes beside what was there before.
async fn each(party: &Party, empty: u64) -> Sample {
    machine::settle(party.pid).await;
    let more = machine::rss(party.pid) as f64 - empty as f64;
    Sample {
        memory: Some(more / IDLE as f64),
        peak: machine::peak(party.pid),
        ..Sample::default()
    }
}

/// A document over each; the connections stay open.
async fn documents(streams: Vec<Stream>) -> Vec<Stream> {
    let each = streams.into_iter().map(|mut stream| async move {
        stream.get(DOCUMENT).await;
        stream
    });
    all(each).await
}
