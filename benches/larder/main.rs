//! What larder costs beside others that do the same work for the same client, in one run on one machine.
//!
//! `cargo bench` prints one table; `cargo bench -- hit cold` the rows whose name has one of the words. See
//! benches/README.md for how to read it.

#![allow(clippy::unwrap_used)]

// The kit of the integration tests, of which a part is enough here.
#[allow(unused_imports)]
#[path = "../../tests/it/common/mod.rs"]
mod common;

mod client;
mod crowds;
mod growth;
mod machine;
mod memory;
mod mitmproxy;
mod nginx;
mod rivals;
mod squid;
mod stock;
mod table;
mod upstream;
mod works;

use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::time::Instant;

use futures_util::FutureExt as _;
use tokio::signal::unix::{SignalKind, signal};

use rivals::{Column, Party};
use table::{Row, Sample};
use upstream::{Archive, Place, Upstream};

/// Slow parties take part in so many rounds at most.
const SLOW_ROUNDS: usize = 3;

fn main() {
    if std::env::args().any(|arg| arg == upstream::SERVE) {
        return upstream::serve();
    }
    machine::allow_files();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let options = Options::read();
    runtime.block_on(async {
        // What was started is ended in either case.
        tokio::select! {
            () = bench(options) => {}
            () = told_to_stop() => eprintln!("stopped by a signal"),
        }
    });
}

async fn told_to_stop() {
    let mut terminate = signal(SignalKind::terminate()).unwrap();
    let mut interrupt = signal(SignalKind::interrupt()).unwrap();
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

async fn bench(options: Options) {
    if options.words == [growth::WORD] {
        return growth::run(options.growth, options.rounds).await;
    }
    let with_growth = options
        .asks(growth::WORD)
        .then_some((options.growth, options.rounds));
    let mut rig = Rig::start(options).await;
    rig.hits().await;
    rig.misses().await;
    rig.first_byte().await;
    rig.documents().await;
    rig.connections().await;
    rig.misses_from_nginx().await;
    rig.memory().await;
    rig.crowds().await;
    println!("Bars\n----");
    for verdict in &rig.verdicts {
        println!("{verdict}");
    }
    println!("\n{}", table::markdown(&rig.columns, &rig.rows));
    drop(rig);
    if let Some((size, rounds)) = with_growth {
        growth::run(size, rounds).await;
    }
}

struct Options {
    /// Rows whose name has one of these; all, where there are none
    words: Vec<String>,
    rounds: usize,
    columns: Vec<Column>,
    growth: growth::Size,
}

impl Options {
    /// Whether the word was given.
    fn asks(&self, word: &str) -> bool {
        self.words.iter().any(|given| given == word)
    }

    fn rounds_of(&self, column: Column) -> usize {
        match column.is_slow() {
            true => self.rounds.min(SLOW_ROUNDS),
            false => self.rounds,
        }
    }

    fn read() -> Self {
        let mut options = Self {
            words: Vec::new(),
            rounds: 5,
            columns: Column::ALL.to_vec(),
            growth: growth::Size::default(),
        };
        let mut args = std::env::args().skip(1);
        let number = |arg: Option<String>| arg.and_then(|n| n.parse().ok()).filter(|n| *n > 0);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                // cargo's own
                "--bench" => {}
                "--rounds" => {
                    options.rounds = number(args.next()).expect("--rounds NUMBER");
                }
                "--entries" => {
                    options.growth.entries = number(args.next()).expect("--entries NUMBER");
                }
                "--blobs" => {
                    options.growth.blobs = number(args.next()).expect("--blobs NUMBER");
                }
                "--only" => {
                    let only = args.next().expect("--only COLUMN,COLUMN");
                    let named = |c: &Column| only.split(',').any(|name| c.name().starts_with(name));
                    options.columns.retain(named);
                }
                _ => options.words.push(arg),
            }
        }
        options
    }
}

async fn start_all(columns: &[Column], place: &Place) -> Vec<(Column, Result<Party, String>)> {
    let mut all = Vec::new();
    for column in columns {
        all.push((*column, Party::start(*column, place).await));
    }
    all
}

pub struct Rig {
    options: Options,
    pub upstream: Rc<Upstream>,
    /// nginx in its place
    origin: Option<Rc<nginx::Origin>>,
    /// Those that run now
    pub parties: Vec<Party>,
    /// All that could be started
    columns: Vec<Column>,
    verdicts: Vec<String>,
    /// As they were printed
    rows: Vec<Row>,
    /// Archives that all parties hold, and their sizes
    held: Vec<(usize, Archive)>,
    document_is_held: bool,
}

impl Rig {
    async fn start(options: Options) -> Self {
        let upstream = Rc::new(Upstream::start());
        let cores = machine::cores();
        println!("{cores} cores, {} rounds, HTTP/1.1", options.rounds);
        let mut parties = Vec::new();
        for (column, started) in start_all(&options.columns, &upstream.place).await {
            let name = column.name();
            match started {
                Ok(party) => {
                    let said = party.hot.open().await.negotiated();
                    println!("{name:<14} {said}");
                    parties.push(party);
                }
                Err(why) => println!("{name:<14} left out: {why} (`just bench` installs all)"),
            }
        }
        println!();
        let columns: Vec<_> = parties.iter().map(|party| party.column).collect();
        table::head(&columns);
        Self {
            options,
            upstream,
            parties,
            columns,
            verdicts: Vec::new(),
            rows: Vec::new(),
            origin: None,
            held: Vec::new(),
            document_is_held: false,
        }
    }

    /// The same parties as new processes that hold nothing: what memory they had use for, is forgotten.
    async fn restart(&mut self) {
        self.restart_without(&[]).await;
    }

    /// The same without some, who would take minutes.
    async fn restart_without(&mut self, without: &[Column]) {
        self.parties.clear();
        self.held.clear();
        self.document_is_held = false;
        let columns = self.columns.iter().filter(|c| !without.contains(c));
        let columns: Vec<_> = columns.copied().collect();
        let place = match &self.origin {
            Some(origin) => &origin.place,
            None => &self.upstream.place,
        };
        let started = start_all(&columns, place).await;
        for (column, started) in started {
            match started {
                Ok(party) => self.parties.push(party),
                Err(why) => println!("{} did not start again: {why}", column.name()),
            }
        }
    }

    fn wants(&self, name: &str) -> bool {
        let words = &self.options.words;
        words.is_empty() || words.iter().any(|word| name.contains(word.as_str()))
    }

    /// GETs of archives that upstream saw so far.
    pub fn fetches(&self) -> usize {
        match &self.origin {
            Some(origin) => origin.fetches(),
            None => self.upstream.fetches(),
        }
    }

    /// In turns, so that whatever else the machine does meets all. `fresh` is called for each round.
    async fn rounds(
        &mut self,
        mut row: Row,
        fresh: impl Fn() -> Vec<Archive>,
        work: impl AsyncFn(&Self, &Party, &[Archive]) -> Vec<Sample>,
    ) -> Row {
        let n = self.parties.len();
        let mut failed = Vec::new();
        let (others, start) = (machine::others(), Instant::now());
        for round in 0..self.options.rounds {
            let fresh = fresh();
            // Nobody is always the one after the slowest.
            for at in 0..n {
                let party = &self.parties[(at + round) % n];
                let rests = round >= self.options.rounds_of(party.column);
                if rests || failed.contains(&party.column) {
                    continue;
                }
                // Who fails is left out, and the others go on.
                let done = AssertUnwindSafe(work(self, party, &fresh));
                match done.catch_unwind().await {
                    Ok(samples) => samples.into_iter().for_each(|s| row.add(party.column, s)),
                    Err(_) => failed.push(party.column),
                }
            }
        }
        row.busy = (machine::others() - others) / start.elapsed().as_secs_f64();
        for column in failed {
            println!("{} failed in this row:", column.name());
            row.forget(column);
        }
        self.print(&row);
        row
    }

    /// In one round.
    async fn once(
        &mut self,
        row: Row,
        work: impl AsyncFn(&Self, &Party, &[Archive]) -> Vec<Sample>,
    ) {
        let rounds = std::mem::replace(&mut self.options.rounds, 1);
        self.rounds(row, Vec::new, work).await;
        self.options.rounds = rounds;
    }

    fn print(&mut self, row: &Row) {
        self.verdicts.extend(row.print(&self.columns));
        self.rows.push(row.clone());
    }

    /// An archive of that size that every party holds.
    async fn held(&mut self, size: usize) -> Archive {
        if let Some((_, archive)) = self.held.iter().find(|(s, _)| *s == size) {
            return archive.clone();
        }
        let archive = self.upstream.publish(size, 0);
        self.hold(std::slice::from_ref(&archive)).await;
        self.held.push((size, archive.clone()));
        archive
    }

    async fn hold(&mut self, archives: &[Archive]) {
        let bare = self.upstream.route();
        self.prepare(async |party| party.hold(archives, &bare).await)
            .await;
    }

    /// Has every party hold the document.
    async fn hold_document(&mut self) {
        if self.document_is_held {
            return;
        }
        let bare = self.upstream.route();
        self.prepare(async |party| party.hold_document(&bare).await)
            .await;
        self.document_is_held = true;
    }

    /// Who fails in this has no place in what follows.
    async fn prepare(&mut self, work: impl AsyncFn(&Party)) {
        let mut failed = Vec::new();
        for party in &self.parties {
            let done = AssertUnwindSafe(work(party)).catch_unwind().await;
            if done.is_err() {
                println!("{} failed, and is left out", party.column.name());
                failed.push(party.column);
            }
        }
        self.parties.retain(|party| !failed.contains(&party.column));
    }
}
