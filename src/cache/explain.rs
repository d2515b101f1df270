//! Why a URL would be a hit or a miss now, which checksum applies to it, where that came from, and
//! what the rules say. Nobody is asked.

use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;
use url::Url;

use super::expect::{Expected, Word};
use super::trust::overall;
use super::{Cache, url_key};
use crate::terraform::route::{Kind, route};
use crate::terraform::signature::Judgement;

/// What is known of a URL.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    pub url: String,
    /// `hit`, `miss`, `stale` (upstream is asked whether it still holds), or `refused`
    pub outcome: &'static str,
    pub why: String,
    /// What it is of: `HOST/NAMESPACE/TYPE VERSION`
    pub of: Vec<String>,
    pub sha256: Option<String>,
    /// Who says so
    pub sources: Vec<String>,
    /// Who stands behind it
    pub signature: Option<Judgement>,
    /// Bytes
    pub size: Option<u64>,
    /// Seconds since 1970
    pub verified: Option<u64>,
}

impl Cache {
    /// Explains a URL.
    pub async fn explain(self: &Arc<Self>, url: &Url) -> Explanation {
        let claimed = !self.metadata.catalogue().claims(&url_key(url)).is_empty();
        let kind = route(url.path());
        match kind == Kind::Archive || claimed {
            true => self.explain_archive(url).await,
            false => self.explain_document(url, kind).await,
        }
    }

    async fn explain_archive(self: &Arc<Self>, url: &Url) -> Explanation {
        let sources = self.sources();
        let key = url_key(url);
        let vouched = sources.vouch(url, &Default::default(), false).await;
        let at_hand = vouched.iter().any(|party| party.listed.is_some());
        let record = self.store.record(&key);
        let on_record = record.as_ref().and_then(|record| record.signature.clone());
        let signature = match at_hand {
            true => overall(&vouched).cloned(),
            false => on_record,
        };
        let mut this = Explanation {
            url: key.clone(),
            outcome: "miss",
            why: "it is not held: it would be fetched from upstream and verified on the way".into(),
            of: sources
                .subjects(url)
                .iter()
                .map(ToString::to_string)
                .collect(),
            sha256: None,
            sources: Vec::new(),
            signature,
            size: None,
            verified: record.map(|record| record.verified),
        };
        let names = |words: &[Word]| words.iter().map(ToString::to_string).collect();
        let digest = match sources.expected(url).await {
            Expected::Known(digest, words) => {
                this.sources = names(&words);
                this.sha256 = Some(digest.to_string());
                Some(digest)
            }
            Expected::Unknown => {
                this.why.push_str(
                    "; no checksum is known yet, the SHA256SUMS beside it would be asked for",
                );
                None
            }
            Expected::Contradiction(words, why) => {
                this.sources = names(&words);
                this.outcome = "refused";
                this.why = format!("its sources contradict each other: {why}");
                return this;
            }
        };
        let held = digest.and_then(|digest| self.store.open_blob(digest));
        let headers = held
            .as_ref()
            .map(|held| super::document::headers_from_text(&held.record.headers));
        if let Err(e) = self.admit_archive(url, headers.as_ref()).await {
            (this.outcome, this.why) = ("refused", e.to_string());
            return this;
        }
        if let Err(e) = self.judge_gate(url, digest, &Default::default()).await {
            (this.outcome, this.why) = match at_hand {
                true => ("refused", e.to_string()),
                false => (
                    "miss",
                    format!("it would be refused unless a valid signature is found: {e}"),
                ),
            };
            return this;
        }
        if let Some(held) = held {
            this.outcome = "hit";
            this.why = "it is held".into();
            this.size = Some(held.size);
        }
        this
    }

    async fn explain_document(&self, url: &Url, kind: Kind) -> Explanation {
        let key = url_key(url);
        let mut this = Explanation {
            url: key.clone(),
            outcome: "miss",
            why: "it is not held: upstream would be asked".into(),
            of: Vec::new(),
            sha256: None,
            sources: Vec::new(),
            signature: None,
            size: None,
            verified: None,
        };
        let subject = crate::terraform::address::Subject::of(url, kind);
        this.of = subject.iter().map(ToString::to_string).collect();
        let Some(held) = self.metadata.held(&key).await else {
            return this;
        };
        this.size = Some(held.body.len() as u64);
        (this.outcome, this.why) = match held.fresh_for(SystemTime::now()) {
            Some(left) => (
                "hit",
                format!("it is held, and fresh for {} s yet", left.as_secs()),
            ),
            None => (
                "stale",
                "it is held, but upstream would be asked first; it serves if upstream fails".into(),
            ),
        };
        if held.doubtful_since.is_some() {
            this.why.push_str(
                "; upstream's newer list lost most of its versions and is not believed yet",
            );
        }
        this
    }
}
