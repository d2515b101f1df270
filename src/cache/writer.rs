//! The work of a fill: bytes from upstream into a staged file, the verdict on them, the commit.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use hyper::body::Incoming;
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap};
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_blocking};
use url::Url;

use super::batch::Batch;
use super::document::end_to_end;
use super::expect::{Sources, Word};
use super::fill::{FillHead, Phase, Refusal, Spill, State};
use super::recent::Recent;
use super::trust::{Vouched, alarm, is_bad, overall};
use super::url_key;
use super::verdict::{Learning, Outcome, Terms, conclude, note_republished, record};
use crate::digest::Hasher;
use crate::error::Error;
use crate::store::{Full, Record, Staged, Verified};
use crate::sync::{blocking, joined};
use crate::telemetry::METRICS;
use crate::upstream::download::{Download, Opened, Source, Step};
use crate::upstream::{Upstream, chunk, shown_url};

/// So long the head of an archive waits that had no digest the last time, to be able to say so.
const GRACE: Duration = Duration::from_millis(20);
const REFUSAL_LIMIT: usize = 64 << 10;
const REFUSAL_PATIENCE: Duration = Duration::from_secs(5);

/// Finding out who stands behind an archive, while its bytes are on their way; none where that
/// broke off.
pub(super) type Vouching = Shared<BoxFuture<'static, Option<Vec<Vouched>>>>;

/// Starts to find out who stands behind the archive.
pub fn start_vouching(sources: &Sources, url: &Url) -> Vouching {
    let (sources, url) = (sources.clone(), url.clone());
    let task = tokio::spawn(async move { sources.vouch(&url, &HeaderMap::new(), true).await });
    task.map(Result::ok).boxed().shared()
}

/// What does the work of a fill.
pub(super) struct Writer {
    pub upstream: Arc<Upstream>,
    pub sources: Sources,
    pub source: Source,
    pub learning: Learning,
    pub terms: Terms,
    pub vouching: Vouching,
    pub sender: watch::Sender<State>,
    pub admit: Admit,
}

/// Whether an archive with such headers may be had at all.
pub type Admit = Box<dyn Fn(Url, HeaderMap) -> BoxFuture<'static, Result<(), Error>> + Send + Sync>;

/// A staged file, the bytes that were to be appended to it, and whether they are.
type Appended = (Staged, Vec<Bytes>, Result<(), Full>);

impl Writer {
    pub async fn run(self) {
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
        if self.sources.was_unverifiable(&self.source.url) {
            let _ = tokio::time::timeout(GRACE, self.learning.clone()).await;
        }
        let nobody = HeaderMap::new();
        let vouched = self.sources.vouch(&self.source.url, &nobody, false).await;
        let begun = Arc::new(FillHead {
            length: head.length,
            headers: end_to_end(&head.headers),
            file,
            learning: self.learning.clone(),
            bad_signature: is_bad(&vouched),
            unverified: Arc::default(),
        });
        self.sender
            .send_modify(|state| state.head = Some(begun.clone()));
        match staged {
            Ok(staged) => self.copy(download, staged, &begun).await,
            Err(full) => self.spill(download, Hasher::default(), &full, &begun),
        }
    }

    /// Receives and writes at the same time.
    async fn copy(&self, mut download: Box<Download>, staged: Staged, head: &FillHead) {
        let mut idle = Some(staged);
        let mut busy: Option<JoinHandle<Appended>> = None;
        let mut batch = Batch::new();
        let mut ended = false;
        loop {
            if let Some(staged) = idle.take_if(|_| !batch.is_empty()) {
                busy = Some(append(staged, batch.take()));
            }
            if ended && busy.is_none() {
                break;
            }
            tokio::select! {
                written = next(&mut busy), if busy.is_some() => {
                    busy = None;
                    let (staged, bytes, result) = written;
                    if let Err(full) = result {
                        // What is in `batch` was received but not written: it must come again.
                        let hasher = staged.hasher().clone();
                        let again = self.rewound(&download, staged.len());
                        return self.spill(again, hasher, &full, head);
                    }
                    self.sender.send_modify(|state| {
                        state.recent = None;
                        state.recent = Recent::keep(state.written, bytes);
                        state.written = staged.len();
                    });
                    idle = Some(staged);
                }
                step = download.next(), if !ended && !batch.is_full() => match step {
                    Ok(Step::Bytes(bytes)) => batch.push(&bytes),
                    Ok(Step::End) => ended = true,
                    Ok(Step::Cut(cause)) => {
                        let (mut staged, mut result) = match busy.take() {
                            Some(appending) => {
                                let (staged, _, result) = joined(appending).await;
                                (staged, result)
                            }
                            None => (idle.take().expect("a staged file is idle or busy"), Ok(())),
                        };
                        if result.is_ok() {
                            (staged, _, result) = joined(append(staged, batch.take())).await;
                        }
                        self.sender.send_modify(|state| {
                            state.recent = None;
                            state.written = staged.len();
                        });
                        let hasher = staged.hasher().clone();
                        if let Err(full) = result {
                            let again = self.rewound(&download, staged.len());
                            return self.spill(again, hasher, &full, head);
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
        // What is still to be done may take long and needs none of it.
        drop(batch);
        self.finish(staged, head).await;
    }

    async fn finish(&self, staged: Staged, head: &FillHead) {
        let nobody = HeaderMap::new();
        let found = staged.hasher().so_far();
        let (sources, url) = (&self.sources, &self.source.url);
        let outcome = conclude(sources, &self.learning, url, &nobody, self.terms, found).await;
        let (words, vouched) = match outcome {
            Ok(Outcome::Verified(words, vouched)) => (words, vouched),
            Ok(Outcome::Unverified) => {
                sources.note_unverifiable(url);
                head.unverified.store(true, Ordering::Relaxed);
                return self.end(Phase::Whole);
            }
            Err(e) => return self.end(Phase::Failed(e)),
        };
        // Followers have waited for nothing but this.
        self.end(Phase::Whole);
        METRICS.archives_verified.inc();
        if let Ok(verified) = staged.verify(found) {
            self.commit(verified, &words, head, vouched).await;
        }
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

    fn spill(&self, download: Box<Download>, hasher: Hasher, full: &Full, begun: &FillHead) {
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
            terms: self.terms,
            unverified: begun.unverified.clone(),
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
        self.sender.send_modify(|state| {
            state.recent = None;
            state.phase = phase;
        });
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
    let mut headers = end_to_end(&parts.headers);
    if !is_text(&bytes) {
        // Some clients look at no status: they would unpack it.
        bytes.clear();
        headers.remove(CONTENT_TYPE);
        headers.remove(CONTENT_ENCODING);
    }
    Refusal {
        status: parts.status,
        headers,
        body: bytes.into(),
    }
}

/// No archive is text: each format has bytes in its head that are not. Text may end within a letter.
fn is_text(bytes: &[u8]) -> bool {
    let ends_early = |error: std::str::Utf8Error| error.error_len().is_none();
    !bytes.contains(&0) && std::str::from_utf8(bytes).map_or_else(ends_early, |_| true)
}

/// Appends on a thread that may wait, begun at once.
fn append(mut staged: Staged, bytes: Vec<Bytes>) -> JoinHandle<Appended> {
    spawn_blocking(move || {
        let appended = staged.append(&bytes);
        (staged, bytes, appended)
    })
}

async fn next(appending: &mut Option<JoinHandle<Appended>>) -> Appended {
    joined(appending.as_mut().expect("a batch is being written")).await
}
