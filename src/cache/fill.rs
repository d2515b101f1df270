//! A fill: one fetch of one archive, belonging to no client. It writes a staged file that
//! followers read as it grows, and withholds the end until the digest is verified.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use hyper::StatusCode;
use hyper::body::Incoming;
use hyper::header::HeaderMap;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use url::Url;

use super::document::end_to_end;
use super::expect::{Sources, Verdict, Word};
use super::trust::{Vouched, alarm, is_bad, overall};
use super::url_key;
use super::verdict::{Learning, learn, note_republished, note_unverified, record, refuse, settle};
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Kind as ErrorKind};
use crate::store::{Full, Record, Staged, Verified};
use crate::telemetry::METRICS;
use crate::upstream::download::{Download, Head, Opened, Source, Step};
use crate::upstream::{Upstream, chunk, shown_url};

/// The most that is withheld of an archive's end.
const WITHHELD: u64 = 16 << 10;
/// Bytes written at once, at the most. Two such batches are in memory: one written, one received.
const BATCH: usize = 512 << 10;
/// So long the answer's head waits to be able to say whether a digest is to be had.
const GRACE: Duration = Duration::from_millis(20);
const REFUSAL_LIMIT: usize = 64 << 10;
const REFUSAL_PATIENCE: Duration = Duration::from_secs(5);
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
    pub digest: DigestKnown,
    /// Whether a signature is known to be bad
    pub bad_signature: bool,
}

/// What an answer's head can say of the digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DigestKnown {
    Yes,
    NotYet,
    /// None is to be had: the archive is passed through and not kept
    Never,
}

/// Where followers leave the staged file.
pub struct Spill {
    pub at: u64,
    pub hasher: Hasher,
    pub head: Head,
    pub source: Source,
    pub learning: Learning,
    /// The running download, for the first follower that comes to take it
    pub running: Mutex<Option<Box<Download>>>,
}

/// An answer that is no archive.
pub struct Refusal {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Fill {
    /// Starts a fill. `done` runs when the blob is committed, or all is over.
    pub fn start(
        upstream: Arc<Upstream>,
        sources: Sources,
        source: Source,
        orphans: Arc<Orphans>,
        admit: Admit,
        done: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> Arc<Self> {
        let (sender, state) = watch::channel(State {
            head: None,
            written: 0,
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
                learning: learn(&sources, &source.url, &HeaderMap::new()),
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
        let mut all = self.0.lock().unwrap_or_else(|e| e.into_inner());
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

/// Finding out who stands behind an archive, while its bytes are on their way; none where that
/// broke off.
type Vouching = Shared<BoxFuture<'static, Option<Vec<Vouched>>>>;

fn start_vouching(sources: &Sources, url: &Url) -> Vouching {
    let (sources, url) = (sources.clone(), url.clone());
    let task = tokio::spawn(async move { sources.vouch(&url, &HeaderMap::new(), true).await });
    task.map(Result::ok).boxed().shared()
}

struct Writer {
    upstream: Arc<Upstream>,
    sources: Sources,
    source: Source,
    learning: Learning,
    vouching: Vouching,
    sender: watch::Sender<State>,
    admit: Admit,
}

/// Whether an archive with such headers may be had at all.
pub type Admit = Box<dyn Fn(Url, HeaderMap) -> BoxFuture<'static, Result<(), Error>> + Send + Sync>;

/// A staged file, or its remains and why it cannot grow.
type Written = (Staged, Result<(), Full>);

impl Writer {
    async fn run(self) {
        let download = match Download::open(&self.upstream, self.source.clone()).await {
            Ok(Opened::Archive(download)) => download,
            Ok(Opened::Refused(response)) => {
                let refusal = refusal(response, &self.source.url).await;
                return self.end(Phase::Refused(Arc::new(refusal)));
            }
            Err(e) => return self.end(Phase::Failed(e)),
        };
        let head = download.head().clone();
        if let Err(e) = (self.admit)(self.source.url.clone(), head.headers.clone()).await {
            return self.end(Phase::Failed(e));
        }
        let staged = {
            let (store, length) = (self.sources.store.clone(), head.length);
            blocking(move || store.stage(length)).await
        };
        let file = match &staged {
            Ok(staged) => Some(staged.file().clone()),
            Err(_) => None,
        };
        let early = tokio::time::timeout(GRACE, self.learning.clone()).await;
        let nobody = HeaderMap::new();
        let vouched = self.sources.vouch(&self.source.url, &nobody, false).await;
        let begun = Arc::new(FillHead {
            length: head.length,
            headers: end_to_end(&head.headers),
            file,
            digest: match early {
                Ok(Verdict::Known(..)) => DigestKnown::Yes,
                Ok(Verdict::NoneToBeHad) => DigestKnown::Never,
                _ => DigestKnown::NotYet,
            },
            bad_signature: is_bad(&vouched),
        });
        self.sender
            .send_modify(|state| state.head = Some(begun.clone()));
        match staged {
            Ok(staged) => self.copy(download, staged, &begun).await,
            Err(full) => self.spill(download, Hasher::default(), &full),
        }
    }

    /// Receives and writes at the same time.
    async fn copy(&self, mut download: Box<Download>, staged: Staged, head: &FillHead) {
        let mut idle = Some(staged);
        let mut busy: Option<JoinHandle<Written>> = None;
        let mut batch = Vec::new();
        let mut batched = 0;
        let mut ended = false;
        loop {
            if let Some(mut staged) = idle.take_if(|_| !batch.is_empty()) {
                let bytes = std::mem::take(&mut batch);
                batched = 0;
                busy = Some(tokio::task::spawn_blocking(move || {
                    let written = bytes
                        .iter()
                        .try_for_each(|chunk: &Bytes| staged.append(chunk));
                    (staged, written)
                }));
            }
            if ended && busy.is_none() {
                break;
            }
            tokio::select! {
                written = join(&mut busy), if busy.is_some() => {
                    busy = None;
                    let (staged, result) = written;
                    if let Err(full) = result {
                        // What is in `batch` was received but not written: it must come again.
                        let hasher = staged.hasher().clone();
                        let again = self.rewound(&download, staged.len());
                        return self.spill(again, hasher, &full);
                    }
                    self.sender.send_modify(|state| state.written = staged.len());
                    idle = Some(staged);
                }
                step = download.next(), if !ended && batched < BATCH => match step {
                    Ok(Step::Bytes(bytes)) => {
                        batched += bytes.len();
                        batch.push(bytes);
                    }
                    Ok(Step::End) => ended = true,
                    Ok(Step::Cut(cause)) => {
                        let (mut staged, mut result) = match busy.take() {
                            Some(writing) => join(&mut Some(writing)).await,
                            None => (idle.take().expect("a staged file is idle or busy"), Ok(())),
                        };
                        for bytes in batch.drain(..) {
                            if result.is_ok() {
                                result = staged.append(&bytes);
                            }
                        }
                        batched = 0;
                        self.sender.send_modify(|state| state.written = staged.len());
                        let hasher = staged.hasher().clone();
                        if let Err(full) = result {
                            let again = self.rewound(&download, staged.len());
                            return self.spill(again, hasher, &full);
                        }
                        if let Err(e) = download.mend(cause, &hasher).await {
                            return self.end(Phase::Failed(e));
                        }
                        idle = Some(staged);
                    }
                    Err(e) => return self.end(Phase::Failed(e)),
                },
            }
        }
        let staged = idle
            .take()
            .expect("the loop ends with the staged file idle");
        self.finish(staged, head).await;
    }

    async fn finish(&self, staged: Staged, head: &FillHead) {
        let verdict = settle(
            &self.sources,
            &self.learning,
            &self.source.url,
            &HeaderMap::new(),
        )
        .await;
        let (digest, words) = match verdict {
            Verdict::Known(digest, words) => (digest, words),
            Verdict::NoneToBeHad => {
                note_unverified(&self.source.url);
                return self.end(Phase::Whole);
            }
            other => {
                let found = staged.hasher().so_far();
                return self.end(Phase::Failed(
                    refuse(&self.sources, &self.source.url, found, other).await,
                ));
            }
        };
        match staged.verify(digest) {
            Ok(verified) => {
                let vouched = match self.vouch(digest).await {
                    Ok(vouched) => vouched,
                    Err(e) => return self.end(Phase::Failed(e)),
                };
                // Followers have waited for nothing but this.
                self.end(Phase::Whole);
                METRICS.archives_verified.inc();
                self.commit(verified, &words, head, vouched).await;
            }
            Err(found) => {
                let verdict = Verdict::Known(digest, words);
                self.end(Phase::Failed(
                    refuse(&self.sources, &self.source.url, found, verdict).await,
                ));
            }
        }
    }

    /// Where a rule wants a signature, followers wait for it.
    async fn vouch(&self, digest: Digest) -> Result<Option<Vec<Vouched>>, Error> {
        let (sources, url) = (&self.sources, &self.source.url);
        if !sources.wants_signature(url) {
            return Ok(None);
        }
        self.vouching.clone().await;
        // Documents may have changed meanwhile: what is at hand now counts.
        let vouched = sources.vouch(url, &HeaderMap::new(), true).await;
        sources.content(url, &vouched, Some(digest))?;
        Ok(Some(vouched))
    }

    async fn commit(
        &self,
        verified: Verified,
        words: &[Word],
        head: &FillHead,
        vouched: Option<Vec<Vouched>>,
    ) {
        let source = &self.source.url;
        let nobody = HeaderMap::new();
        // What is known by now is kept at once: the process may end at any moment.
        let (vouched, complete) = match (vouched, self.vouching.clone().now_or_never()) {
            (Some(vouched), _) | (None, Some(Some(vouched))) => (vouched, true),
            _ => (self.sources.vouch(source, &nobody, false).await, false),
        };
        let kept = self.record(words, head, &vouched);
        let (sources, key) = (self.sources.clone(), url_key(source));
        let (digest, named) = (verified.digest(), source.clone());
        let (as_key, as_kept) = (key.clone(), kept.clone());
        let committed = blocking(move || {
            let before = sources.remember(&named, digest);
            note_republished(&named, digest, &before);
            sources.store.commit(verified, &as_key, &as_kept)
        });
        let url = shown_url(source);
        match committed.await {
            Ok(()) => tracing::debug!(%url, %digest, "kept"),
            Err(e) => {
                tracing::error!(%url, %digest, error = %e, "a verified archive cannot be kept")
            }
        }
        if complete {
            return alarm(source, &vouched);
        }
        let vouched = self.vouching.clone().await.unwrap_or(vouched);
        alarm(source, &vouched);
        let fuller = self.record(words, head, &vouched);
        if fuller != kept {
            let store = self.sources.store.clone();
            let named = blocking(move || store.name(&key, digest, &fuller)).await;
            if let Err(error) = named {
                tracing::warn!(%url, %error, "who signed an archive cannot be kept");
            }
        }
    }

    fn record(&self, words: &[Word], head: &FillHead, vouched: &[Vouched]) -> Arc<Record> {
        let subjects = self.sources.subjects(&self.source.url);
        let signature = overall(vouched).cloned();
        Arc::new(record(words, &head.headers, signature, subjects))
    }

    /// A download that begins again at `at`, where the written bytes end.
    fn rewound(&self, download: &Download, at: u64) -> Box<Download> {
        let head = download.head().clone();
        Box::new(Download::continue_from(
            &self.upstream,
            self.source.clone(),
            head,
            at,
        ))
    }

    fn spill(&self, download: Box<Download>, hasher: Hasher, full: &Full) {
        let url = shown_url(&self.source.url);
        match full {
            Full::TooLarge => {
                tracing::warn!(%url, "larger than max_archive_size; passing this archive through, verified")
            }
            Full::NoRoom => {
                tracing::warn!(%url, "no room to keep this archive; passing it through, verified")
            }
            Full::Disk(e) => {
                tracing::error!(%url, error = %e, "the disk fails; passing this archive through, verified")
            }
        }
        self.end(Phase::Spilled(Arc::new(Spill {
            at: download.position(),
            hasher,
            head: download.head().clone(),
            source: self.source.clone(),
            learning: self.learning.clone(),
            running: Mutex::new(Some(download)),
        })));
    }

    fn end(&self, phase: Phase) {
        if let Phase::Failed(cause) = &phase {
            if self.sender.borrow().head.is_some() {
                self.sources.taint(&self.source.url);
            }
            tracing::warn!(url = %shown_url(&self.source.url), %cause, "a download failed; nothing of it is kept");
        }
        self.sender.send_modify(|state| state.phase = phase);
    }
}

/// Reads a refusal, as much of it as is fit to be relayed.
pub async fn refusal(response: hyper::Response<Incoming>, url: &Url) -> Refusal {
    let (parts, mut body) = response.into_parts();
    let mut bytes = Vec::new();
    let reading = async {
        while let Ok(Some(next)) = chunk(&mut body, REFUSAL_PATIENCE, url).await {
            if bytes.len() + next.len() > REFUSAL_LIMIT {
                break;
            }
            bytes.extend_from_slice(&next);
        }
    };
    // What came by then is what there is.
    let _ = tokio::time::timeout(REFUSAL_PATIENCE, reading).await;
    Refusal {
        status: parts.status,
        headers: end_to_end(&parts.headers),
        body: bytes.into(),
    }
}

async fn join(writing: &mut Option<JoinHandle<Written>>) -> Written {
    let handle = writing.as_mut().expect("a write is running");
    match handle.await {
        Ok(written) => written,
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
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
