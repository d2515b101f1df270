//! Which digest an archive should have, by every source that is known.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use hyper::StatusCode;
use hyper::header::{ACCEPT, HeaderMap, HeaderValue};
use moka::sync::Cache;
use url::Url;

use super::metadata::{Answer, Metadata, Wish};
use super::trust::Judge;
use super::url_key;
use crate::config::Republished;
use crate::digest::Digest;
use crate::error::{Error, Kind as ErrorKind};
use crate::store::Store;
use crate::terraform::address::Subject;
use crate::terraform::route::{Kind, file_name, sums_beside};
use crate::terraform::sums::Sums;
use crate::upstream::shown_url;

/// How long a client may come back for the rest of what it was cut off from.
const TAINT: Duration = Duration::from_secs(24 * 3600);

/// A source's word.
#[derive(Clone, Debug, PartialEq)]
pub struct Word {
    /// None: sums that do not list the file
    pub digest: Option<Digest>,
    pub origin: Origin,
    /// The key of the document, or of the archive itself
    pub key: String,
}

/// What kind of source spoke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    Document,
    Sums,
    Earlier,
}

impl Origin {
    /// For metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Document => "registry_document",
            Self::Sums => "sha256sums",
            Self::Earlier => "earlier_download",
        }
    }
}

impl std::fmt::Display for Word {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.origin {
            Origin::Document => write!(f, "registry document {}", self.key),
            Origin::Sums => write!(f, "SHA256SUMS {}", self.key),
            Origin::Earlier => write!(f, "an earlier verified download of {}", self.key),
        }
    }
}

/// What all known sources together say.
#[derive(Clone, Debug)]
pub enum Expected {
    /// They agree, at least one of them.
    Known(Digest, Vec<Word>),
    /// Nobody was heard yet.
    Unknown,
    /// Two contradict each other, or sums are known that lack the file.
    Contradiction(Vec<Word>, String),
}

/// What is known after looking everywhere.
#[derive(Clone, Debug)]
pub enum Verdict {
    Known(Digest, Vec<Word>),
    /// There are no sums: upstream says so (404, 403 or 410), or the name has no place for any.
    NoneToBeHad,
    Contradiction(Vec<Word>, String),
    /// It could not be learnt.
    Failed(Error),
}

/// The sources of digests.
#[derive(Clone)]
pub struct Sources {
    pub metadata: Arc<Metadata>,
    pub store: Arc<Store>,
    pub judge: Arc<Judge>,
    /// Archives of which clients may hold bytes that never were verified
    tainted: Cache<String, ()>,
    /// Archives for which no digest was to be had when they last came
    unverifiable: Cache<String, ()>,
}

impl Sources {
    pub fn new(metadata: Arc<Metadata>, store: Arc<Store>, judge: Arc<Judge>) -> Self {
        Self {
            judge,
            metadata,
            store,
            tainted: Cache::builder()
                .max_capacity(10_000)
                .time_to_live(TAINT)
                .build(),
            unverifiable: Cache::builder()
                .max_capacity(10_000)
                .time_to_live(TAINT)
                .build(),
        }
    }

    /// The same by other rules.
    pub fn renewed(&self, metadata: Arc<Metadata>, judge: Arc<Judge>) -> Self {
        Self {
            judge,
            metadata,
            store: self.store.clone(),
            tainted: self.tainted.clone(),
            unverifiable: self.unverifiable.clone(),
        }
    }

    /// A client was cut off: what it has must not be completed by a later range.
    pub fn taint(&self, archive: &Url) {
        self.tainted.insert(url_key(archive), ());
    }

    /// No digest was to be had for it: of the next fill, clients are told so from the beginning.
    pub fn note_unverifiable(&self, archive: &Url) {
        self.unverifiable.insert(url_key(archive), ());
    }

    pub fn was_unverifiable(&self, archive: &Url) -> bool {
        self.unverifiable.contains_key(&url_key(archive))
    }

    pub fn is_tainted(&self, archive: &Url) -> bool {
        self.tainted.contains_key(&url_key(archive))
    }

    /// What is known of `archive` without asking anybody.
    pub async fn expected(&self, archive: &Url) -> Expected {
        let key = url_key(archive);
        let mut words = Vec::new();
        let mut sums_urls: Vec<(Url, String)> = Vec::new();
        for claim in self.metadata.catalogue().current_claims(&key) {
            words.push(Word {
                digest: claim.download.digest(),
                origin: Origin::Document,
                key: claim.document.clone(),
            });
            if let Some(sums) = &claim.download.sums {
                sums_urls.push((sums.clone(), claim.download.filename.clone()));
            }
        }
        if let Some(beside) = sums_beside(archive) {
            sums_urls.push((beside, file_name(archive)));
        }
        sums_urls.sort();
        sums_urls.dedup();
        for (url, name) in &sums_urls {
            let Some(sums) = self.metadata.held_sums(url).await else {
                continue;
            };
            words.push(Word {
                digest: sums.digest_of(name),
                origin: Origin::Sums,
                key: url_key(url),
            });
        }
        let mut earlier = vec![key];
        earlier.extend(self.names_in_ledger(archive));
        for key in earlier {
            let digest = self.store.ledger.find(&key);
            if let Some(digest) = digest.or_else(|| self.store.find(&key)) {
                words.push(Word {
                    digest: Some(digest),
                    origin: Origin::Earlier,
                    key,
                });
            }
        }
        self.agree(words)
    }

    /// What the words together say. Where republished archives are let through, what was seen
    /// earlier does not count against what is said now.
    fn agree(&self, mut words: Vec<Word>) -> Expected {
        let agreed = agree(words.clone());
        let now = |word: &Word| word.origin != Origin::Earlier;
        match (&agreed, self.judge.republished) {
            (Expected::Contradiction(..), Republished::Warn) if words.iter().any(now) => {
                words.retain(now);
                agree(words)
            }
            _ => agreed,
        }
    }

    /// The names besides its URL under which the archive's digest is remembered: the versions of
    /// providers that it is of.
    pub fn names_in_ledger(&self, archive: &Url) -> Vec<String> {
        let claims = self.metadata.catalogue().current_claims(&url_key(archive));
        let mut names: Vec<String> = claims
            .iter()
            .filter_map(|claim| Subject::of_document(&Url::parse(&claim.document).ok()?)?.key())
            .collect();
        names.sort();
        names.dedup();
        names
    }

    /// Remembers that `archive` was found to have `digest` (blocking). Returns what else it was
    /// remembered to have.
    pub fn remember(&self, archive: &Url, digest: Digest) -> Vec<Word> {
        let mut names = vec![url_key(archive)];
        names.extend(self.names_in_ledger(archive));
        let ledger = &self.store.ledger;
        let mut others = Vec::new();
        for key in names {
            let before = ledger.find(&key).or_else(|| self.store.find(&key));
            if before.is_some_and(|before| before != digest) {
                others.push(Word {
                    digest: before,
                    origin: Origin::Earlier,
                    key: key.clone(),
                });
            }
            ledger.note(&key, digest);
        }
        others
    }

    /// What is known of `archive` after asking for the sums beside it, if need be.
    ///
    /// `credentials` of a private request are sent along, and then nothing is shared.
    pub async fn learn(&self, archive: &Url, credentials: &HeaderMap) -> Verdict {
        let mut expected = self.expected(archive).await;
        if self.refresh_doubted(&expected).await {
            expected = self.expected(archive).await;
        }
        let hearsay = |words: &[Word]| words.iter().all(|word| word.origin == Origin::Earlier);
        match expected {
            // Where a new digest may be the right one, the sums are asked for.
            Expected::Known(_, words)
                if self.judge.republished == Republished::Warn && hearsay(&words) => {}
            Expected::Known(digest, words) => return Verdict::Known(digest, words),
            Expected::Contradiction(words, why) => return Verdict::Contradiction(words, why),
            Expected::Unknown => {}
        }
        let Some(url) = sums_beside(archive) else {
            return Verdict::NoneToBeHad;
        };
        if !credentials.is_empty() {
            return self.learn_privately(archive, &url, credentials).await;
        }
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        let wish = Wish {
            url: url.clone(),
            kind: Kind::Sums,
            headers,
            reload: false,
        };
        match self.metadata.get(&wish).await {
            Ok(Answer::Document(document, _)) => match document.status {
                StatusCode::OK => match self.metadata.parsed(&document) {
                    Some(sums) => self.listed(archive, &url, &sums).await,
                    None => failed(&url, "no sums in it"),
                },
                StatusCode::NOT_FOUND | StatusCode::FORBIDDEN | StatusCode::GONE => {
                    Verdict::NoneToBeHad
                }
                status => failed(&url, &format!("upstream answered {}", status.as_u16())),
            },
            Ok(Answer::TooLarge) => failed(&url, "too large to be sums"),
            Err(e) => Verdict::Failed(e),
        }
    }

    async fn learn_privately(&self, archive: &Url, sums: &Url, credentials: &HeaderMap) -> Verdict {
        match self.metadata.fetch_privately(sums, credentials).await {
            Ok((StatusCode::OK, body)) => match Sums::parse(&body) {
                Ok(parsed) => self.listed(archive, sums, &parsed).await,
                Err(why) => failed(sums, &why),
            },
            Ok((StatusCode::NOT_FOUND | StatusCode::FORBIDDEN | StatusCode::GONE, _)) => {
                Verdict::NoneToBeHad
            }
            Ok((status, _)) => failed(sums, &format!("upstream answered {}", status.as_u16())),
            Err(e) => Verdict::Failed(e),
        }
    }

    /// The word of sums just fetched, together with whatever else is known by now.
    async fn listed(&self, archive: &Url, url: &Url, sums: &Sums) -> Verdict {
        let word = Word {
            digest: sums.digest_of(&file_name(archive)),
            origin: Origin::Sums,
            key: url_key(url),
        };
        let mut words = match self.expected(archive).await {
            Expected::Known(_, words) | Expected::Contradiction(words, _) => words,
            Expected::Unknown => Vec::new(),
        };
        if !words.contains(&word) {
            words.push(word);
        }
        match self.agree(words) {
            Expected::Known(digest, words) => Verdict::Known(digest, words),
            Expected::Contradiction(words, why) => Verdict::Contradiction(words, why),
            Expected::Unknown => Verdict::NoneToBeHad,
        }
    }

    /// Fetches documents anew that contradicted something: upstream may have mended them. Returns
    /// whether there were any.
    async fn refresh_doubted(&self, expected: &Expected) -> bool {
        let (words, all) = match expected {
            Expected::Known(_, words) => (words, false),
            Expected::Contradiction(words, _) => (words, true),
            Expected::Unknown => return false,
        };
        if all {
            self.doubt(words);
        }
        let doubted = words
            .iter()
            .filter(|word| word.origin != Origin::Earlier && self.metadata.is_doubted(&word.key));
        let refreshed = join_all(doubted.map(|word| self.metadata.refresh(&word.key))).await;
        !refreshed.is_empty()
    }

    /// Sources that took part in a contradiction are fetched anew the next time.
    pub fn doubt(&self, words: &[Word]) {
        for word in words.iter().filter(|word| word.origin != Origin::Earlier) {
            self.metadata.doubt(&word.key);
        }
    }
}

fn agree(words: Vec<Word>) -> Expected {
    let Some(first) = words.first() else {
        return Expected::Unknown;
    };
    if let Some(silent) = words.iter().find(|word| word.digest.is_none()) {
        let why = format!("{silent} does not list it");
        return Expected::Contradiction(words, why);
    }
    let Some(digest) = first.digest else {
        return Expected::Unknown;
    };
    match words.iter().find(|word| word.digest != Some(digest)) {
        None => Expected::Known(digest, words),
        Some(other) => {
            let says = other.digest.map(|d| d.to_string()).unwrap_or_default();
            let why = format!("{first} says SHA-256 {digest}, {other} says {says}");
            Expected::Contradiction(words, why)
        }
    }
}

fn failed(sums: &Url, why: &str) -> Verdict {
    Verdict::Failed(Error::new(
        ErrorKind::Nonsense,
        format!(
            "{}: {why}, so the archive cannot be verified; try again later",
            shown_url(sums)
        ),
    ))
}
