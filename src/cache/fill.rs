//! A fill: one fetch of one archive, belonging to no client. It writes a staged file that
//! followers read as it grows, and withholds the end until the digest is verified.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use bytes::Bytes;
use futures_util::FutureExt as _;
use hyper::StatusCode;
use hyper::header::HeaderMap;
use tokio::sync::{Notify, watch};
use url::Url;

use super::expect::{Sources, Verdict};
use super::recent::Recent;
use super::verdict::{Learning, Terms, learn};
use super::writer::{Admit, Writer, start_vouching};
use crate::digest::Hasher;
use crate::error::{Error, Kind as ErrorKind};
use crate::sync::lock;
use crate::telemetry::METRICS;
use crate::upstream::download::{Download, Head, Source};
use crate::upstream::{Upstream, shown_url};

/// The most that is withheld of an archive's end.
const WITHHELD: u64 = 16 << 10;
/// Fills that go on though nobody follows them.
const ORPHANS: usize = 32;

/// How much of `written` bytes may be seen before the digest is verified.
///
/// With an announced length all but the end; without one, always less than there is, since any
/// byte may be the last.
pub fn visible(written: u64, length: Option<u64>) -> u64 {
    match length {
        Some(length) => written.min(length - WITHHELD.min(length.div_ceil(2))),
        None => written - WITHHELD.min(written.div_ceil(2)),
    }
}

/// A fill as its followers see it.
pub struct Fill {
    pub url: Url,
    state: watch::Receiver<State>,
    followers: AtomicUsize,
    abandoned: AtomicBool,
    abandon: Notify,
    orphans: Arc<Orphans>,
}

/// How far a fill has come.
#[derive(Clone)]
pub struct State {
    /// What upstream's answer said, once it is there
    pub head: Option<Arc<FillHead>>,
    pub written: u64,
    /// The last of what is written, while more comes
    pub recent: Option<Arc<Recent>>,
    pub phase: Phase,
}

#[derive(Clone)]
pub enum Phase {
    Running,
    /// All bytes may be seen: verified, or there is no digest to verify by
    Whole,
    /// The disk has no room for the rest: each follower goes on from upstream by itself
    Spilled(Arc<Spill>),
    /// Upstream answered otherwise
    Refused(Arc<Refusal>),
    Failed(Error),
}

/// What is known when an archive begins.
pub struct FillHead {
    pub length: Option<u64>,
    /// End-to-end headers
    pub headers: HeaderMap,
    /// None where the archive went past the disk from the beginning
    pub file: Option<Arc<File>>,
    pub learning: Learning,
    /// Whether a signature is known to be bad
    pub bad_signature: bool,
    /// Whether there turned out to be nothing to verify by, once that is known
    pub unverified: Arc<AtomicBool>,
}

/// Where followers leave the staged file.
pub struct Spill {
    pub at: u64,
    pub hasher: Hasher,
    pub head: Head,
    pub source: Source,
    pub learning: Learning,
    pub terms: Terms,
    pub unverified: Arc<AtomicBool>,
    /// The running download, for the first follower that comes to take it
    pub running: Mutex<Option<Box<Download>>>,
}

/// An answer that is no archive.
pub struct Refusal {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl FillHead {
    /// Whether it is known by now that no digest is to be had: it is passed through and not kept.
    pub fn has_no_digest(&self) -> bool {
        matches!(
            self.learning.clone().now_or_never(),
            Some(Verdict::NoneToBeHad)
        )
    }
}

impl Fill {
    /// Starts a fill. `done` runs when the blob is committed, or all is over.
    pub fn start(
        upstream: Arc<Upstream>,
        sources: Sources,
        source: Source,
        terms: Terms,
        orphans: Arc<Orphans>,
        admit: Admit,
        done: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> Arc<Self> {
        let (sender, state) = watch::channel(State {
            head: None,
            written: 0,
            recent: None,
            phase: Phase::Running,
        });
        let this = Arc::new(Self {
            url: source.url.clone(),
            state,
            followers: AtomicUsize::new(0),
            abandoned: AtomicBool::new(false),
            abandon: Notify::new(),
            orphans,
        });
        let fill = this.clone();
        tokio::spawn(async move {
            // However the task ends, the table is told.
            let told = fill.clone();
            let _done = CallOnDrop(Some(move || done(&told)));
            METRICS.fills.inc();
            let writer = Writer {
                upstream,
                learning: learn(&sources, &source.url, &HeaderMap::new()).await,
                terms,
                vouching: start_vouching(&sources, &source.url),
                sources,
                source,
                sender,
                admit,
            };
            tokio::select! {
                () = writer.run() => {}
                () = fill.abandon.notified() => {
                    tracing::info!(url = %shown_url(&fill.url), "a fill without clients was given up: too many of them");
                }
            }
            METRICS.fills.dec();
        });
        this
    }

    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// Waits for the archive to begin.
    pub async fn head(&self) -> Result<Arc<FillHead>, NoArchive> {
        let mut state = self.state.clone();
        loop {
            {
                let state = state.borrow_and_update();
                match &state.phase {
                    Phase::Failed(e) => return Err(NoArchive::Failed(e.clone())),
                    Phase::Refused(refusal) => return Err(NoArchive::Refused(refusal.clone())),
                    _ => {}
                }
                if let Some(head) = &state.head {
                    return Ok(head.clone());
                }
            }
            if state.changed().await.is_err() {
                return Err(NoArchive::Failed(vanished(&self.url)));
            }
        }
    }

    /// Waits until all bytes may be seen; their number.
    pub async fn whole(&self) -> Result<u64, Error> {
        let mut state = self.state.clone();
        loop {
            {
                let state = state.borrow_and_update();
                match &state.phase {
                    Phase::Whole => return Ok(state.written),
                    Phase::Failed(e) => return Err(e.clone()),
                    Phase::Refused(_) | Phase::Spilled(_) => return Err(vanished(&self.url)),
                    Phase::Running => {}
                }
            }
            if state.changed().await.is_err() {
                return Err(vanished(&self.url));
            }
        }
    }

    /// One more follower; the count falls when the guard is dropped.
    pub fn follow(self: &Arc<Self>) -> FollowGuard {
        self.followers.fetch_add(1, Ordering::SeqCst);
        FollowGuard(self.clone())
    }

    /// Whether it goes on though everybody left.
    pub fn is_orphan(&self) -> bool {
        self.followers.load(Ordering::SeqCst) == 0
            && matches!(self.state.borrow().phase, Phase::Running)
    }

    /// Whether a newcomer may still join.
    pub fn is_joinable(&self) -> bool {
        let over = matches!(
            self.state.borrow().phase,
            Phase::Failed(_) | Phase::Refused(_) | Phase::Spilled(_)
        );
        !over && self.state.has_changed().is_ok() && !self.abandoned.load(Ordering::SeqCst)
    }

    /// Ends a fill that nobody follows.
    pub fn give_up(&self) {
        self.abandoned.store(true, Ordering::SeqCst);
        self.abandon.notify_one();
    }
}

/// Counts as a follower for as long as it lives.
pub struct FollowGuard(Arc<Fill>);

impl Drop for FollowGuard {
    fn drop(&mut self) {
        if self.0.followers.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.orphans.add(&self.0);
        }
    }
}

/// Fills that everybody left. They go on, but only so many of them.
#[derive(Default)]
pub struct Orphans(Mutex<VecDeque<Weak<Fill>>>);

impl Orphans {
    fn add(&self, fill: &Arc<Fill>) {
        let mut all = lock(&self.0);
        all.retain(|other| {
            let other = other.upgrade();
            other.is_some_and(|other| other.is_orphan() && !Arc::ptr_eq(&other, fill))
        });
        all.push_back(Arc::downgrade(fill));
        if all.len() > ORPHANS
            && let Some(oldest) = all.pop_front().and_then(|oldest| oldest.upgrade())
        {
            oldest.give_up();
        }
    }
}

/// Why an archive did not begin.
pub enum NoArchive {
    Refused(Arc<Refusal>),
    Failed(Error),
}

/// A fill whose writer is gone without a word.
pub fn vanished(url: &Url) -> Error {
    Error::new(
        ErrorKind::Incomplete,
        format!("{}: the download broke off; try again", shown_url(url)),
    )
}

struct CallOnDrop<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> Drop for CallOnDrop<F> {
    fn drop(&mut self) {
        if let Some(call) = self.0.take() {
            call();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_end_is_never_seen_and_what_was_seen_stays(
            length in 1u64..200_000, written in 0u64..200_000, announced: bool,
        ) {
            let written = written.min(length);
            let told = announced.then_some(length);
            prop_assert!(visible(written, told) < length);
            prop_assert!(visible(written, told) <= written);
            prop_assert!(written == 0 || visible(written - 1, told) <= visible(written, told));
            // The first bytes are not held back for want of more.
            prop_assert!(length < 2 || written < 2 || visible(written, told) > 0);
        }
    }
}
