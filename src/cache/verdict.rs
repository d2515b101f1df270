//! The judgement on an archive's bytes: which digest they should have, and what is said and noted
//! when they have another.

use std::task::Poll;

use futures_util::future::{BoxFuture, Shared, ready};
use futures_util::{FutureExt as _, poll};
use hyper::header::HeaderMap;
use url::Url;

use super::document::headers_to_text;
use super::expect::{Expected, Origin, Sources, Verdict, Word};
use super::trust::Vouched;
use crate::digest::Digest;
use crate::error::{Error, Kind as ErrorKind};
use crate::store::Record;
use crate::telemetry::{METRICS, Source as Label};
use crate::terraform::address::Subject;
use crate::terraform::signature::Judgement;
use crate::upstream::shown_url;

/// Learning the digest, while the bytes are on their way.
pub type Learning = Shared<BoxFuture<'static, Verdict>>;

/// Starts to learn which digest `url` should have. What takes no asking is learnt when this returns.
pub async fn learn(sources: &Sources, url: &Url, credentials: &HeaderMap) -> Learning {
    let (sources, url, credentials) = (sources.clone(), url.clone(), credentials.clone());
    let mut learning = Box::pin(async move { sources.learn(&url, &credentials).await });
    if let Poll::Ready(verdict) = poll!(learning.as_mut()) {
        return ready(verdict).boxed().shared();
    }
    tokio::spawn(learning)
        .map(|joined| {
            joined.unwrap_or_else(|e| {
                Verdict::Failed(Error::new(
                    ErrorKind::Internal,
                    format!("a lookup broke off: {e}"),
                ))
            })
        })
        .boxed()
        .shared()
}

/// The verdict when the bytes are there. A lookup that failed gets another chance: by now upstream
/// may have recovered. Documents that came meanwhile are heard too.
pub async fn settle(
    sources: &Sources,
    learning: &Learning,
    url: &Url,
    credentials: &HeaderMap,
) -> Verdict {
    match learning.clone().await {
        Verdict::NoneToBeHad => match sources.expected(url).await {
            Expected::Unknown => Verdict::NoneToBeHad,
            _ => sources.learn(url, credentials).await,
        },
        contradiction @ Verdict::Contradiction(..) => contradiction,
        Verdict::Known(digest, words) if !credentials.is_empty() => Verdict::Known(digest, words),
        _ => sources.learn(url, credentials).await,
    }
}

/// What was promised of an archive when its fetch began, whatever is learnt of it since.
#[derive(Clone, Copy, Debug, Default)]
pub struct Terms {
    /// The digest by which others may have joined
    pub expected: Option<Digest>,
    /// Whether a rule wanted a signature
    pub strict: bool,
}

/// What bytes are when all of them are there.
pub enum Outcome {
    /// As all sources say; and who stands behind them, if that was to be known
    Verified(Vec<Word>, Option<Vec<Vouched>>),
    /// There is nothing to verify them by.
    Unverified,
}

/// The verdict on bytes whose digest is `found`.
///
/// # Errors
/// When they are not what they should be, or nobody vouches for them who should.
pub async fn conclude(
    sources: &Sources,
    learning: &Learning,
    url: &Url,
    credentials: &HeaderMap,
    terms: Terms,
    found: Digest,
) -> Result<Outcome, Error> {
    let strict = terms.strict || sources.wants_signature(url);
    let verdict = settle(sources, learning, url, credentials).await;
    let (digest, words) = match verdict {
        Verdict::Known(digest, words) => (digest, words),
        // What it was when it was last verified.
        Verdict::NoneToBeHad if terms.expected == Some(found) && !strict => {
            return Ok(Outcome::Verified(Vec::new(), None));
        }
        Verdict::NoneToBeHad if terms.expected.is_none() && !strict => {
            if !sources.metadata.is_own_module(url) {
                note_unverified(url);
            }
            return Ok(Outcome::Unverified);
        }
        other => return Err(refuse(sources, url, found, other).await),
    };
    if let Some(expected) = terms.expected.filter(|expected| *expected != digest) {
        let why = format!(
            "its sources said {expected} when it was asked for, and {digest} when it had come"
        );
        return Err(contradiction(sources, url, &words, &why));
    }
    if digest != found {
        return Err(refuse(sources, url, found, Verdict::Known(digest, words)).await);
    }
    if !strict {
        return Ok(Outcome::Verified(words, None));
    }
    // Documents may have changed since it began: what is there now counts.
    let vouched = sources.vouch(url, credentials, true).await;
    sources
        .content(url, &vouched, Some(digest))
        .map_err(|e| note_refused(url, e))?;
    Ok(Outcome::Verified(words, Some(vouched)))
}

/// Says, in log and metrics, that an archive lacks the signature that a rule wants.
pub fn note_refused(url: &Url, error: Error) -> Error {
    METRICS.unsigned_refused.inc();
    tracing::error!(url = %shown_url(url), cause = %error, "archive refused: verify = \"signature\" is not satisfied");
    error
}

/// Says which source contradicted what, and has them asked anew.
pub async fn refuse(sources: &Sources, url: &Url, found: Digest, verdict: Verdict) -> Error {
    let shown = shown_url(url);
    let (words, why) = match verdict {
        Verdict::Failed(e) => {
            METRICS
                .digest_mismatch
                .get_or_create(&Label { source: "unknown" })
                .inc();
            tracing::error!(url = %shown, cause = %e, "archive refused: its digest could not be learnt");
            return e;
        }
        Verdict::Known(digest, words) => {
            let names: Vec<_> = words.iter().map(ToString::to_string).collect();
            let why = format!(
                "its SHA-256 is {found}, but {} says {digest}",
                names.join(" and ")
            );
            (words, why)
        }
        Verdict::Contradiction(words, why) => (words, why),
        Verdict::NoneToBeHad => (
            Vec::new(),
            "no digest is to be had for it any more".to_owned(),
        ),
    };
    contradiction(sources, url, &words, &why)
}

/// Says, in log, metrics and words, that sources or bytes contradict each other.
pub fn contradiction(sources: &Sources, url: &Url, words: &[Word], why: &str) -> Error {
    let shown = shown_url(url);
    let mut labels: Vec<_> = words.iter().map(|word| word.origin.label()).collect();
    labels.dedup();
    for source in labels {
        METRICS
            .digest_mismatch
            .get_or_create(&Label { source })
            .inc();
    }
    tracing::error!(url = %shown, %why, "archive refused: its sources contradict");
    sources.doubt(words);
    let republished = words.iter().any(|word| word.origin == Origin::Earlier);
    let advice = match republished {
        true => {
            METRICS.republished.inc();
            "it was published anew under an old name: ask its publisher why, and only then set republished = \"warn\""
        }
        false => "do not use this archive, and tell its publisher if it stays so",
    };
    Error::new(
        ErrorKind::Contradiction,
        format!("{shown}: refused: {why}; {advice}"),
    )
}

/// An archive for which no digest is to be had went to a client.
pub fn note_unverified(url: &Url) {
    METRICS.unverified_archives.inc();
    tracing::warn!(url = %shown_url(url), detail = "no-digest", "passed through unverified and not kept: upstream has no SHA256SUMS for it");
}

/// An archive has another digest than it had before, and that is let through.
pub fn note_republished(url: &Url, digest: Digest, before: &[Word]) {
    for word in before {
        METRICS.republished.inc();
        let old = word.digest.map(|digest| digest.to_string());
        tracing::warn!(url = %shown_url(url), %digest, before = old, name = %word.key, "REPUBLISHED: this archive has another digest than it had before; served because of republished = \"warn\"");
    }
}

/// What is kept of an archive beside its bytes.
pub fn record(
    words: &[Word],
    headers: &HeaderMap,
    signature: Option<Judgement>,
    subjects: Vec<Subject>,
) -> Record {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let kept = [
        "content-type",
        "content-disposition",
        "etag",
        "last-modified",
        "cache-control",
    ];
    Record {
        headers: headers_to_text(headers)
            .into_iter()
            .filter(|(name, _)| kept.contains(&name.as_str()))
            .collect(),
        sources: words.iter().map(ToString::to_string).collect(),
        verified: now.unwrap_or_default().as_secs(),
        signature,
        subjects,
        h1: None,
    }
}
