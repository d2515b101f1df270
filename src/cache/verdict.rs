//! The judgement on an archive's bytes: which digest they should have, and what is said and noted
//! when they have another.

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use hyper::header::HeaderMap;
use url::Url;

use super::document::headers_to_text;
use super::expect::{Expected, Origin, Sources, Verdict, Word};
use crate::digest::Digest;
use crate::error::{Error, Kind as ErrorKind};
use crate::store::Record;
use crate::telemetry::{METRICS, Source as Label};
use crate::terraform::address::Subject;
use crate::terraform::signature::Judgement;
use crate::upstream::shown_url;

/// Learning the digest, while the bytes are on their way.
pub type Learning = Shared<BoxFuture<'static, Verdict>>;

/// Starts to learn which digest `url` should have.
pub fn learn(sources: &Sources, url: &Url, credentials: &HeaderMap) -> Learning {
    let (sources, url, credentials) = (sources.clone(), url.clone(), credentials.clone());
    let task = tokio::spawn(async move { sources.learn(&url, &credentials).await });
    task.map(|joined| {
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
        Verdict::NoneToBeHad => (Vec::new(), "no digest is known".to_owned()),
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
    }
}
