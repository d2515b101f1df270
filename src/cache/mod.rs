//! Who may have which bytes when: documents, expected digests, fills and their followers.

pub mod admission;
mod batch;
mod body;
pub mod catalogue;
mod chunks;
pub mod document;
pub mod expect;
pub mod explain;
pub mod fill;
pub mod follower;
mod head;
pub mod metadata;
pub mod mirror;
mod recent;
pub mod services;
mod shelf;
pub mod sightings;
pub mod trust;
pub mod verdict;
mod writer;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};

use hyper::header::HeaderMap;
use tokio::sync::Semaphore;
use url::Url;

pub use head::HeadOnly;

use crate::config::{Authority, Republished};
use crate::digest::Digest;
use crate::error::{Error, Kind as ErrorKind};
use crate::store::{Held, OnRecord, Record, Store};
use crate::sync::lock;
use crate::upstream::download::{Download, Opened, Source};
use crate::upstream::{Upstream, shown_url};
use document::end_to_end;
use expect::{Expected, Sources, Verdict};
use fill::{Fill, FollowGuard, NoArchive, Orphans, Refusal};
use follower::Direct;
use metadata::{Bounds, Metadata, offline};
use services::Hosts;
use sightings::Sightings;
use trust::Judge;
use verdict::Terms;

/// Blobs that are hashed again at once.
const RECHECKS: usize = 2;

/// The cache of one data dir.
pub struct Cache {
    pub metadata: Arc<Metadata>,
    pub store: Arc<Store>,
    pub upstream: Arc<Upstream>,
    sources: Sources,
    sightings: Arc<Sightings>,
    fills: Arc<Mutex<HashMap<String, Arc<Fill>>>>,
    /// How many there may be at once
    fill_limit: usize,
    orphans: Arc<Orphans>,
    rechecks: Arc<Semaphore>,
    hosts: Hosts,
}

/// Where an archive's bytes come from.
pub enum Archive {
    /// Verified and held
    Held(Held),
    /// On its way
    Filling {
        fill: Arc<Fill>,
        /// Keeps it from counting as abandoned
        guard: FollowGuard,
        /// Whether somebody else asked first
        joined: bool,
    },
    /// On its way to this client alone
    Passing(Box<Passing>),
    /// Upstream has none: its answer
    Refused(Arc<Refusal>),
}

/// An archive that passes by the store.
pub struct Passing {
    pub length: Option<u64>,
    pub headers: HeaderMap,
    /// Whether a signature is known to be bad
    pub bad_signature: bool,
    pub direct: Direct,
}

impl Cache {
    pub fn new(
        metadata: Arc<Metadata>,
        store: Arc<Store>,
        upstream: Arc<Upstream>,
        judge: Arc<Judge>,
        sightings: Sightings,
        fill_limit: usize,
        hosts: Hosts,
    ) -> Arc<Self> {
        Arc::new(Self {
            sightings: Arc::new(sightings),
            sources: Sources::new(metadata.clone(), store.clone(), judge),
            metadata,
            store,
            upstream,
            fills: Arc::default(),
            fill_limit,
            orphans: Arc::default(),
            rechecks: Arc::new(Semaphore::new(RECHECKS)),
            hosts,
        })
    }

    /// The same cache by other rules, and by another way upstream. What is under way goes on by the
    /// old ones.
    pub fn renewed(
        &self,
        upstream: Arc<Upstream>,
        judge: Arc<Judge>,
        (bounds, trusted): (Bounds, HashSet<String>),
        fill_limit: usize,
        hosts: Hosts,
    ) -> Arc<Self> {
        let metadata = self.metadata.renewed(upstream.clone(), bounds, trusted);
        Arc::new(Self {
            sources: self.sources.renewed(metadata.clone(), judge),
            metadata,
            store: self.store.clone(),
            upstream,
            sightings: self.sightings.clone(),
            fills: self.fills.clone(),
            fill_limit,
            orphans: self.orphans.clone(),
            rechecks: self.rechecks.clone(),
            hosts,
        })
    }

    /// The URL of an archive that the document at `document` names.
    pub fn named_archive(&self, document: &Url, archive: &Url) -> Url {
        let registry = Authority::of(document).map(|at| at.in_https_url());
        let catalogue = self.metadata.catalogue();
        catalogue.scoped(&registry.unwrap_or_default(), archive)
    }

    pub fn sources(&self) -> &Sources {
        &self.sources
    }

    /// The archive at `url`, from the store, from a running fill, or from a new one.
    ///
    /// # Errors
    /// When it is not held and cannot be had, or when sources contradict each other.
    pub async fn archive(
        self: &Arc<Self>,
        url: &Url,
        headers: HeaderMap,
    ) -> Result<Archive, Error> {
        let key = url_key(url);
        let digest = self.settled(url).await?;
        self.gate(url, digest, &HeaderMap::new()).await?;
        if let Some(held) = self.held(digest, &key, url).await {
            self.admit_held(url, &held).await?;
            return Ok(Archive::Held(held));
        }
        if self.upstream.is_offline(url) {
            return Err(offline(url));
        }
        let source = Source {
            url: url.clone(),
            headers,
            private: false,
        };
        let terms = self.terms(url, digest);
        match self.join(&key, digest, source.clone(), terms) {
            Joined::Fill(fill, guard, joined) => Ok(Archive::Filling {
                fill,
                guard,
                joined,
            }),
            Joined::Held(held) => {
                self.admit_held(url, &held).await?;
                Ok(Archive::Held(held))
            }
            Joined::TooMany => self.pass(source, terms).await,
        }
    }

    /// The archive at `url` for one client with credentials: verified, never kept or shared.
    pub async fn private_archive(&self, url: &Url, headers: HeaderMap) -> Result<Archive, Error> {
        if self.upstream.is_offline(url) {
            return Err(offline(url));
        }
        self.gate(url, None, &headers).await?;
        let source = Source {
            url: url.clone(),
            headers,
            private: true,
        };
        self.pass(source, self.terms(url, None)).await
    }

    /// A held blob, found right since the start and unchanged; a rotten one is removed.
    async fn held(&self, digest: Option<Digest>, key: &str, url: &Url) -> Option<Held> {
        let digest = digest?;
        let mut held = self.store.open_named(digest, key)?;
        if !held.checked {
            held = self.recheck(held, key).await?;
        }
        if held.on_record == OnRecord::Own {
            return Some(held);
        }
        // Held under another URL, whose signature and date are not this one's.
        let vouched = self.sources.vouch(url, &HeaderMap::new(), false).await;
        let mut record = Record {
            signature: trust::overall(&vouched).cloned(),
            subjects: self.sources.subjects(url),
            ..Record::clone(&held.record)
        };
        record.headers.retain(|(name, _)| name != "last-modified");
        held.record = Arc::new(record);
        // A query may be anything: a name for each would be without bound.
        let plain = url.query().is_none() && url.fragment().is_none();
        let nameless = || self.store.find(key).is_none();
        if held.on_record == OnRecord::Another && plain && nameless() {
            let (store, key, record) = (self.store.clone(), key.to_owned(), held.record.clone());
            tokio::task::spawn_blocking(move || {
                if let Err(error) = store.name_new(&key, digest, &record) {
                    tracing::warn!(%key, %error, "a further name of a blob cannot be kept");
                }
            });
        }
        Some(held)
    }

    async fn recheck(&self, held: Held, key: &str) -> Option<Held> {
        let _permit = self.rechecks.acquire().await.ok()?;
        // Somebody else may have checked it meanwhile.
        let held = self.store.open_named(held.digest, key)?;
        if held.checked {
            return Some(held);
        }
        let (store, opened) = (self.store.clone(), held.clone());
        let right = tokio::task::spawn_blocking(move || store.recheck(&opened)).await;
        right.is_ok_and(|right| right).then_some(held)
    }

    /// The digest that is expected, if it is known, once a contradiction has had its chance to be
    /// mended upstream.
    async fn settled(&self, url: &Url) -> Result<Option<Digest>, Error> {
        match self.sources.expected(url).await {
            Expected::Known(digest, words) => {
                // What was only seen earlier binds nobody where republished archives may pass.
                let hearsay = words
                    .iter()
                    .all(|word| word.origin == expect::Origin::Earlier);
                let loose = self.sources.judge.republished == Republished::Warn && hearsay;
                let held = !loose || self.store.find(&url_key(url)) == Some(digest);
                return Ok(held.then_some(digest));
            }
            Expected::Unknown => return Ok(None),
            Expected::Contradiction(..) => {}
        }
        match self.sources.learn(url, &HeaderMap::new()).await {
            Verdict::Known(digest, _) => Ok(Some(digest)),
            Verdict::NoneToBeHad => Ok(None),
            Verdict::Failed(e) => Err(e),
            Verdict::Contradiction(words, why) => {
                Err(verdict::contradiction(&self.sources, url, &words, &why))
            }
        }
    }

    async fn admit_held(&self, url: &Url, held: &Held) -> Result<(), Error> {
        if !self.sources.judge.policy.restricts() {
            return Ok(());
        }
        let headers = document::headers_from_text(&held.record.headers);
        self.admit_archive(url, Some(&headers)).await
    }

    /// Refuses what the rules do not let pass, before a byte of it is asked for.
    ///
    /// # Errors
    /// `Policy` or `Unsigned`.
    pub async fn gate(
        &self,
        url: &Url,
        digest: Option<Digest>,
        credentials: &HeaderMap,
    ) -> Result<(), Error> {
        let judged = self.judge_gate(url, digest, credentials).await;
        judged.map_err(|e| match e.kind() {
            ErrorKind::Unsigned => verdict::note_refused(url, e),
            _ => e,
        })
    }

    async fn judge_gate(
        &self,
        url: &Url,
        digest: Option<Digest>,
        credentials: &HeaderMap,
    ) -> Result<(), Error> {
        self.admit_archive(url, None).await?;
        let sources = &self.sources;
        if !sources.wants_signature(url) {
            return Ok(());
        }
        let ask = !self.upstream.is_offline(url);
        let vouched = sources.vouch(url, credentials, ask).await;
        let outcome = sources.content(url, &vouched, digest);
        let at_hand = vouched.iter().all(|party| party.listed.is_some());
        let key = url_key(url);
        let same = digest.is_some() && sources.store.find(&key) == digest;
        match (outcome, sources.store.record(&key)) {
            (Err(_), Some(record)) if !at_hand && same && credentials.is_empty() => {
                sources.content_with_record(url, record.signature.as_ref())
            }
            (outcome, _) => outcome,
        }
    }

    fn terms(&self, url: &Url, expected: Option<Digest>) -> Terms {
        Terms {
            expected,
            strict: self.sources.wants_signature(url),
        }
    }

    fn join(
        self: &Arc<Self>,
        key: &str,
        digest: Option<Digest>,
        source: Source,
        mut terms: Terms,
    ) -> Joined {
        let changes = self.store.changes();
        let seen = self.store.find(key);
        let mut fills = self.lock();
        let url = source.url.clone();
        if let Some(fill) = running(&fills, key, digest, &url).filter(|fill| fill.is_joinable()) {
            return Joined::Fill(fill.clone(), fill.follow(), true);
        }
        // A fill may have been committed between the look into the store and the lock.
        let digest = digest.or_else(|| match self.store.changes() == changes {
            true => seen,
            false => self.store.find(key),
        });
        if let Some(held) = digest
            .and_then(|d| self.store.open_named(d, key))
            .filter(|held| held.checked)
        {
            return Joined::Held(held);
        }
        if fills.len() >= self.fill_limit {
            return Joined::TooMany;
        }
        terms.expected = digest;
        let fill_key = digest.map_or_else(|| key.to_owned(), |digest| fill_key(digest, &url));
        let (this, done_key) = (self.clone(), fill_key.clone());
        let gate = self.clone();
        let fill = Fill::start(
            self.upstream.clone(),
            self.sources.clone(),
            source,
            terms,
            self.orphans.clone(),
            Box::new(move |url, headers| {
                let gate = gate.clone();
                Box::pin(async move { gate.admit_archive(&url, Some(&headers)).await })
            }),
            move |fill| {
                let mut fills = this.lock();
                // A newcomer may have taken the place of a fill that had failed.
                if fills
                    .get(&done_key)
                    .is_some_and(|held| Arc::ptr_eq(held, fill))
                {
                    fills.remove(&done_key);
                }
            },
        );
        let guard = fill.follow();
        fills.insert(fill_key, fill.clone());
        Joined::Fill(fill, guard, false)
    }

    async fn pass(&self, source: Source, terms: Terms) -> Result<Archive, Error> {
        let private = source.private;
        let credentials = if private {
            source.headers.clone()
        } else {
            HeaderMap::new()
        };
        let learning = verdict::learn(&self.sources, &source.url, &credentials).await;
        match Download::open(&self.upstream, source.clone()).await? {
            Opened::Archive(download) => {
                let head = download.head().clone();
                self.admit_archive(&source.url, Some(&head.headers)).await?;
                let vouched = self.sources.vouch(&source.url, &credentials, false).await;
                Ok(Archive::Passing(Box::new(Passing {
                    length: head.length,
                    headers: end_to_end(&head.headers),
                    bad_signature: trust::is_bad(&vouched),
                    direct: Direct::new(*download, self.sources.clone(), learning, terms),
                })))
            }
            Opened::Refused(response) => {
                let refusal = writer::refusal(response, &source.url).await;
                Ok(Archive::Refused(Arc::new(refusal)))
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Fill>>> {
        lock(&self.fills)
    }
}

enum Joined {
    Fill(Arc<Fill>, FollowGuard, bool),
    Held(Held),
    TooMany,
}

/// The fill of a digest, or of a URL whose digest was not known when it began.
fn running<'a>(
    fills: &'a HashMap<String, Arc<Fill>>,
    key: &str,
    digest: Option<Digest>,
    url: &Url,
) -> Option<&'a Arc<Fill>> {
    digest
        .and_then(|digest| fills.get(&fill_key(digest, url)))
        .or_else(|| fills.get(key))
}

/// Whoever joins a fetch by its digest waits for its origin: it is none that a stranger chose.
fn fill_key(digest: Digest, url: &Url) -> String {
    match url.fragment() {
        Some(of) => format!("{digest}#{of}"),
        None => digest.to_string(),
    }
}

impl From<NoArchive> for Result<Arc<Refusal>, Error> {
    fn from(no: NoArchive) -> Self {
        match no {
            NoArchive::Refused(refusal) => Ok(refusal),
            NoArchive::Failed(e) => Err(e),
        }
    }
}

/// The name under which a URL is remembered. A query may be a credential: only its digest is in
/// the name.
pub fn url_key(url: &Url) -> String {
    let shown = match Authority::of(url) {
        Some(_) => shown_url(url),
        None => url.path().to_owned(),
    };
    let mut key = match url.query() {
        Some(query) => format!("{shown}?sha256={}", Digest::of(query.as_bytes())),
        None => shown,
    };
    // An archive of a registry that speaks for its own clients alone.
    if let Some(of) = url.fragment() {
        key.push('#');
        key.push_str(of);
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_urls_apart_and_hide_queries() {
        let key = |url: &str| url_key(&Url::parse(url).expect(url));
        assert_eq!(key("https://H.example:443/a"), "https://h.example/a");
        assert_ne!(key("https://h.example/a"), key("https://h.example:8443/a"));
        let signed = key("https://h.example/a?sig=secret");
        assert!(signed.starts_with("https://h.example/a?sha256=") && !signed.contains("secret"));
        assert_ne!(signed, key("https://h.example/a?sig=other"));
    }
}
