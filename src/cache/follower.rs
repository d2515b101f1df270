//! What a client reads: a finished blob, a staged file as it grows, or (where the disk had no
//! room) the rest straight from upstream. At most two chunks are in memory.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tokio::sync::watch;
use url::Url;

use super::chunks::Chunks;
use super::expect::Sources;
use super::fill::{Fill, FollowGuard, Phase, Spill, State, vanished, visible};
use super::trust::alarm;
use super::verdict::{Learning, Outcome, Terms, conclude, note_republished};
use crate::digest::Hasher;
use crate::error::{Error, Kind};
use crate::sync::lock;
use crate::telemetry::METRICS;
use crate::upstream::download::{Download, Step};
use crate::upstream::{Upstream, shown_url};

/// Some bytes of an archive, from `at` to `end`, in order.
pub struct Reader {
    from: From,
    at: u64,
    /// Exclusive; none: to the end, wherever that is
    end: Option<u64>,
    chunks: Chunks,
}

enum From {
    Blob(Arc<File>),
    Fill(Box<Following>),
    Upstream(Box<Direct>),
}

struct Following {
    fill: Arc<Fill>,
    /// What the client asked for: another URL may have led to the same digest
    own: Url,
    state: watch::Receiver<State>,
    file: Option<Arc<File>>,
    sources: Sources,
    upstream: Arc<Upstream>,
    _guard: FollowGuard,
}

impl Reader {
    /// Of a finished blob.
    pub fn of_blob(file: Arc<File>, at: u64, end: u64) -> Self {
        Self {
            from: From::Blob(file),
            at,
            end: Some(end),
            chunks: Chunks::default(),
        }
    }

    /// Of a fill that has begun with `file`, for a client that asked for `own`.
    pub fn of_fill(
        (fill, guard): (&Arc<Fill>, FollowGuard),
        (file, own): (Option<Arc<File>>, Url),
        sources: Sources,
        upstream: Arc<Upstream>,
        (at, end): (u64, Option<u64>),
    ) -> Self {
        Self {
            from: From::Fill(Box::new(Following {
                state: fill.state(),
                _guard: guard,
                fill: fill.clone(),
                own,
                file,
                sources,
                upstream,
            })),
            at,
            end,
            chunks: Chunks::default(),
        }
    }

    /// Straight from upstream.
    pub fn of_upstream(direct: Direct, at: u64, end: Option<u64>) -> Self {
        Self {
            from: From::Upstream(Box::new(direct)),
            at,
            end,
            chunks: Chunks::default(),
        }
    }

    /// The next bytes; none at the end.
    ///
    /// # Errors
    /// When the end will not come: then the client's answer must be cut short.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if self.end.is_some_and(|end| self.at >= end) {
                return Ok(None);
            }
            let until = match &mut self.from {
                From::Blob(_) => self.end.unwrap_or(u64::MAX),
                From::Fill(following) => match following.wait_or_taint(self.at).await? {
                    Until::Byte(until) => until,
                    Until::End => return Ok(None),
                    Until::Spilled(spill) => {
                        let direct = following.leave(&spill, self.at).await?;
                        self.from = From::Upstream(Box::new(direct));
                        continue;
                    }
                },
                From::Upstream(direct) => {
                    let Some(mut bytes) = direct.next(self.at).await? else {
                        return Ok(None);
                    };
                    if let Some(end) = self.end {
                        bytes.truncate((end - self.at).min(bytes.len() as u64) as usize);
                    }
                    self.at += bytes.len() as u64;
                    return Ok(Some(bytes));
                }
            };
            let until = self.end.map_or(until, |end| end.min(until));
            if let From::Fill(following) = &self.from
                && self.chunks.may_be_large()
                && let Some(bytes) = following.recent(self.at, until)
            {
                self.at += bytes.len() as u64;
                return Ok(Some(bytes));
            }
            let file = match &self.from {
                From::Blob(file) => Some(file),
                From::Fill(following) => following.file.as_ref(),
                From::Upstream(_) => None,
            };
            let file =
                file.ok_or_else(|| Error::new(Kind::Internal, "a fill grew without a file"))?;
            let bytes = self.chunks.read(file, self.at, until - self.at).await?;
            self.at += bytes.len() as u64;
            return Ok(Some(bytes));
        }
    }
}

enum Until {
    /// Bytes up to here may be read, at least one
    Byte(u64),
    End,
    Spilled(Arc<Spill>),
}

impl Following {
    async fn wait_or_taint(&mut self, at: u64) -> Result<Until, Error> {
        let outcome = self.wait(at).await;
        if outcome.is_err() && at > 0 {
            self.sources.taint(&self.own);
        }
        outcome
    }

    /// Waits until there is more than `at`, or it is over.
    async fn wait(&mut self, at: u64) -> Result<Until, Error> {
        loop {
            {
                let state = self.state.borrow_and_update();
                let length = state.head.as_ref().and_then(|head| head.length);
                match &state.phase {
                    Phase::Whole if at >= state.written => return Ok(Until::End),
                    Phase::Whole => return Ok(Until::Byte(state.written)),
                    Phase::Failed(e) => return Err(e.clone()),
                    Phase::Refused(_) => return Err(vanished(&self.fill.url)),
                    Phase::Running | Phase::Spilled(_) => {
                        let seen = visible(state.written, length);
                        if at < seen {
                            return Ok(Until::Byte(seen));
                        }
                    }
                }
                if let Phase::Spilled(spill) = &state.phase {
                    return Ok(Until::Spilled(spill.clone()));
                }
            }
            if self.state.changed().await.is_err() {
                return Err(vanished(&self.fill.url));
            }
        }
    }

    /// Some of the bytes from `at` to `until`, if they are still in memory.
    fn recent(&self, at: u64, until: u64) -> Option<Bytes> {
        self.state.borrow().recent.as_ref()?.read(at, until)
    }

    /// Goes on from upstream where the staged file ends.
    async fn leave(&self, spill: &Arc<Spill>, at: u64) -> Result<Direct, Error> {
        let running = {
            let mut running = lock(&spill.running);
            running.take()
        };
        let download = running.unwrap_or_else(|| {
            let (source, head) = (spill.source.clone(), spill.head.clone());
            Box::new(Download::continue_from(
                &self.upstream,
                source,
                head,
                spill.at,
            ))
        });
        let (sources, learning) = (self.sources.clone(), spill.learning.clone());
        let mut direct = Direct::new(*download, sources, learning, spill.terms);
        direct.hasher = spill.hasher.clone();
        direct.unverified = spill.unverified.clone();
        if at < spill.at {
            // Written but withheld: at most what is always withheld.
            let file = self.file.clone().ok_or_else(|| vanished(&self.fill.url))?;
            let mut chunks = Chunks::default();
            let mut rest = Vec::new();
            while at + (rest.len() as u64) < spill.at {
                let so_far = at + rest.len() as u64;
                let more = chunks.read(&file, so_far, spill.at - so_far).await?;
                rest.extend_from_slice(&more);
            }
            direct.hold(rest.into(), at);
        }
        Ok(direct)
    }
}

/// Bytes from upstream that pass by the disk, hashed on the way, their end withheld until the
/// digest is verified.
pub struct Direct {
    download: Download,
    sources: Sources,
    learning: Learning,
    terms: Terms,
    hasher: Hasher,
    unverified: Arc<AtomicBool>,
    /// Received, not yet given out
    held: VecDeque<Bytes>,
    /// The position of the first byte of `held`
    held_at: u64,
    whole: bool,
}

impl Direct {
    /// A download at its beginning.
    pub fn new(download: Download, sources: Sources, learning: Learning, terms: Terms) -> Self {
        Self {
            terms,
            held_at: download.position(),
            download,
            sources,
            learning,
            hasher: Hasher::default(),
            unverified: Arc::default(),
            held: VecDeque::new(),
            whole: false,
        }
    }

    fn hold(&mut self, bytes: Bytes, at: u64) {
        self.held_at = at;
        self.held.push_front(bytes);
    }

    /// The next bytes from position `at`, before which nothing is wanted.
    async fn next(&mut self, at: u64) -> Result<Option<Bytes>, Error> {
        let next = self.next_inner(at).await;
        if next.is_err() {
            self.sources.taint(self.download.url());
        }
        next
    }

    async fn next_inner(&mut self, at: u64) -> Result<Option<Bytes>, Error> {
        loop {
            let received = self.download.position();
            let seen = match self.whole {
                true => received,
                false => visible(received, self.download.head().length),
            };
            if let Some(bytes) = self.give(at, seen) {
                return Ok(Some(bytes));
            }
            if self.whole {
                return Ok(None);
            }
            match self.download.next().await? {
                Step::Bytes(bytes) => {
                    self.hasher.update(&bytes);
                    self.held.push_back(bytes);
                }
                Step::Cut(cause) => self.download.mend(cause, &self.hasher).await?,
                Step::End => {
                    self.verify().await?;
                    self.whole = true;
                }
            }
        }
    }

    /// Takes the next held bytes that lie before `seen`, dropping what lies before `at`.
    fn give(&mut self, at: u64, seen: u64) -> Option<Bytes> {
        while let Some(first) = self.held.front_mut() {
            if self.held_at < at {
                let skipped = (at - self.held_at).min(first.len() as u64);
                drop(first.split_to(skipped as usize));
                self.held_at += skipped;
                if first.is_empty() {
                    self.held.pop_front();
                }
                continue;
            }
            let given = seen.saturating_sub(self.held_at).min(first.len() as u64);
            if given == 0 {
                return None;
            }
            let bytes = first.split_to(given as usize);
            self.held_at += given;
            if first.is_empty() {
                self.held.pop_front();
            }
            return Some(bytes);
        }
        None
    }

    /// Whether there turned out to be nothing to verify by, once that is known.
    pub fn unverified(&self) -> Arc<AtomicBool> {
        self.unverified.clone()
    }

    /// Waits for the end and its verification, where there is nothing to give out before.
    pub async fn verdict(&mut self) -> Result<(), Error> {
        self.next(0).await.map(|_| ())
    }

    async fn verify(&self) -> Result<(), Error> {
        let (url, headers) = (self.download.url(), self.download.credentials());
        let (sources, found) = (&self.sources, self.hasher.so_far());
        let outcome = conclude(sources, &self.learning, url, &headers, self.terms, found).await;
        match outcome {
            Ok(Outcome::Verified(_, vouched)) => {
                METRICS.archives_verified.inc();
                let (sources, url) = (self.sources.clone(), url.clone());
                let private = self.download.is_private();
                // The client need not wait for the alarm.
                tokio::spawn(async move {
                    let vouched = match vouched {
                        Some(vouched) => vouched,
                        None => sources.vouch(&url, &headers, true).await,
                    };
                    alarm(&url, &vouched);
                    if !private {
                        let remembering = move || {
                            note_republished(&url, found, &sources.remember(&url, found));
                        };
                        let _ = tokio::task::spawn_blocking(remembering).await;
                    }
                });
                Ok(())
            }
            Ok(Outcome::Unverified) => {
                self.unverified.store(true, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => {
                tracing::warn!(url = %shown_url(url), cause = %error, "cut short");
                Err(error)
            }
        }
    }
}
