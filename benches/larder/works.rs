//! The works that are measured: a row each.

use std::rc::Rc;
use std::time::Instant;

use crate::client::{Route, Stream, all};
use crate::nginx::Origin;
use crate::rivals::{Column, Party};
use crate::table::{Bar, Row, Sample, Unit};
use crate::upstream::{Archive, DOCUMENT};
use crate::{Rig, machine};

/// As large as terraform-provider-aws 3.39.0.
pub const ARCHIVE: usize = 38_500_000;
pub const LARGE: usize = 200 << 20;
/// Of connections at once, where a row has several.
pub const CLIENTS: usize = 16;
/// Of documents on each of them in a round.
const REQUESTS: usize = 1000;
/// In a round.
const CONNECTIONS: usize = 2000;
/// mitmproxy does one of so many, where a work is many requests.
const PART: usize = 10;

use Column::{Bare, Nginx};

impl Rig {
    pub async fn hits(&mut self) {
        let cheap = [Bar::TimeBy(Nginx, 1.0), Bar::CpuBy(Nginx, 0.8)];
        let rows = [
            ("hit, 1 stream, 38.5 MB", ARCHIVE, 1, 12),
            ("hit, 1 stream, 200 MiB", LARGE, 1, 3),
            ("hit, 16 streams, 38.5 MB", ARCHIVE, CLIENTS, 1),
        ];
        for (name, size, streams, times) in rows {
            if !self.wants(name) {
                continue;
            }
            let archive = self.held(size).await;
            let amount = (size * streams) as f64 / 1e9;
            let row = Row::new(name, Unit::Gigabyte, &cheap);
            let work = async |rig: &Rig, party: &Party, _: &[Archive]| {
                let times = if party.column.is_slow() {
                    (times / 4).max(1)
                } else {
                    times
                };
                let open = party.hot.open_many(streams).await;
                let clock = Clock::start(rig, party);
                get_all(open, &archive.path, times).await;
                vec![clock.stop(rig, party, times, amount).await]
            };
            self.rounds(row, Vec::new, work).await;
        }
    }

    pub async fn misses(&mut self) {
        let rows = [
            ("cold miss, 1 client, 38.5 MB", 1, 0, 3, 2.0),
            ("cold miss, 1 client, at 100 MB/s", 1, 100_000_000, 1, 1.03),
            ("cold miss, 16 at once, 38.5 MB", CLIENTS, 0, 1, 1.5),
        ];
        for (name, clients, rate, archives, limit) in rows {
            if !self.wants(name) {
                continue;
            }
            let fresh = self.fresh(archives, ARCHIVE, rate);
            let work = async |rig: &Rig, party: &Party, fresh: &[Archive]| {
                download_cold(rig, party, fresh, clients).await
            };
            self.rounds(cold_row(name, limit), fresh, work).await;
        }
    }

    /// A miss from a stock server that sends a file, which is what an upstream more often is. Whoever runs after it
    /// must be started anew.
    pub async fn misses_from_nginx(&mut self) {
        let name = "cold miss, 1 client, 38.5 MB, from nginx";
        if !self.wants(name) {
            return;
        }
        match Origin::start().await {
            Ok(origin) => self.origin = Some(Rc::new(origin)),
            Err(why) => return println!("{name}: left out: {why}"),
        }
        self.restart().await;
        let row = cold_row(name, 2.0);
        let origin = self.origin.clone().unwrap();
        let fresh = || (0..3).map(|_| origin.publish(ARCHIVE)).collect();
        self.rounds(
            row,
            fresh,
            async |rig: &Rig, party: &Party, fresh: &[Archive]| {
                download_cold(rig, party, fresh, 1).await
            },
        )
        .await;
        self.parties.clear();
        self.origin = None;
    }

    /// From the request to the first byte of the answer.
    pub async fn first_byte(&mut self) {
        let name = "cold miss, first byte";
        if !self.wants(name) {
            return;
        }
        let row = Row::new(name, Unit::Request, &[Bar::Later(Bare, 2.0)]);
        let fresh = self.fresh(5, 4 << 20, 0);
        let work = async |rig: &Rig, party: &Party, fresh: &[Archive]| {
            let mut samples = Vec::new();
            for archive in fresh {
                let stream = party.cold.open().await;
                let clock = Clock::start(rig, party);
                stream.first_byte(&archive.path).await;
                samples.push(clock.stop(rig, party, 1, 0.0).await);
            }
            samples
        };
        self.rounds(row, fresh, work).await;
    }

    pub async fn documents(&mut self) {
        let name = "1 KiB document held, 16 connections";
        if !self.wants(name) {
            return;
        }
        self.hold_document().await;
        let row = Row::new(name, Unit::Request, &[Bar::CpuMicros(45.0)]);
        let work = async |rig: &Rig, party: &Party, _: &[Archive]| {
            let times = share(party, REQUESTS);
            let open = party.hot.open_many(CLIENTS).await;
            let clock = Clock::start(rig, party);
            get_all(open, DOCUMENT, times).await;
            vec![clock.stop(rig, party, CLIENTS * times, 1.0).await]
        };
        self.rounds(row, Vec::new, work).await;
    }

    pub async fn connections(&mut self) {
        let name = "new connection, TLS, 1 KiB";
        if !self.wants(name) {
            return;
        }
        self.hold_document().await;
        let row = Row::new(name, Unit::Request, &[Bar::CpuMicros(700.0)]);
        let work = async |rig: &Rig, party: &Party, _: &[Archive]| {
            let connections = share(party, CONNECTIONS);
            let clock = Clock::start(rig, party);
            connect_all(&party.hot, connections).await;
            vec![clock.stop(rig, party, connections, 1.0).await]
        };
        self.rounds(row, Vec::new, work).await;
    }

    /// What makes new archives for each round; all parties of a round get the same.
    fn fresh(&self, n: usize, size: usize, rate: u64) -> impl Fn() -> Vec<Archive> + use<> {
        let upstream = std::rc::Rc::clone(&self.upstream);
        move || (0..n).map(|_| upstream.publish(size, rate)).collect()
    }
}

fn cold_row(name: &str, limit: f64) -> Row {
    let bars = [Bar::TimeBy(Bare, limit), Bar::Fetches(1)];
    Row::new(name, Unit::Gigabyte, &bars)
}

/// Each archive by so many clients at once.
async fn download_cold(
    rig: &Rig,
    party: &Party,
    archives: &[Archive],
    clients: usize,
) -> Vec<Sample> {
    let amount = (ARCHIVE * clients) as f64 / 1e9;
    let mut samples = Vec::new();
    for archive in archives {
        machine::touch_page_cache();
        let open = party.cold.open_many(clients).await;
        let clock = Clock::start(rig, party);
        get_all(open, &archive.path, 1).await;
        samples.push(clock.stop(rig, party, 1, amount).await);
    }
    samples
}

/// How many of `n` a party does.
fn share(party: &Party, n: usize) -> usize {
    if party.column == Column::Mitmproxy {
        return n / PART;
    }
    n
}

/// Each stream asks for the same so many times.
pub async fn get_all(streams: Vec<Stream>, path: &str, times: usize) {
    let each = streams.into_iter().map(|mut stream| {
        let path = path.to_owned();
        async move {
            for _ in 0..times {
                stream.get(&path).await;
            }
        }
    });
    all(each).await;
}

/// New connections, one after another by each client, with a document each.
pub async fn connect_all(route: &Route, connections: usize) {
    let each = (0..CLIENTS).map(|_| {
        let route = route.clone();
        async move {
            for _ in 0..connections / CLIENTS {
                route.fetch(DOCUMENT).await;
            }
        }
    });
    all(each).await;
}

/// Between the beginning of a work and its end.
pub struct Clock {
    cpu: f64,
    client_cpu: f64,
    fetches: usize,
    start: Instant,
}

impl Clock {
    pub fn start(rig: &Rig, party: &Party) -> Self {
        machine::forget_peak(party.pid);
        Self {
            cpu: machine::cpu(party.pid),
            client_cpu: machine::own_cpu(),
            fetches: rig.fetches(),
            start: Instant::now(),
        }
    }

    /// The time is that of one of `times`, which are `amount` each.
    pub async fn stop(self, rig: &Rig, party: &Party, times: usize, amount: f64) -> Sample {
        let time = self.start.elapsed().as_secs_f64() / times as f64;
        let client_cpu = machine::own_cpu() - self.client_cpu;
        machine::settle(party.pid).await;
        Sample {
            time: Some(time),
            cpu: machine::cpu(party.pid) - self.cpu,
            client_cpu,
            amount: amount * times as f64,
            times,
            peak: machine::peak(party.pid),
            fetches: rig.fetches() - self.fetches,
            memory: None,
        }
    }
}
