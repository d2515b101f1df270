//! Who stands behind an archive: the signatures over the sums that list it, and whether that is
//! enough by the rules for the providers that it is of.

use std::sync::Arc;
use std::time::SystemTime;

use hyper::StatusCode;
use hyper::header::{ACCEPT, HeaderMap, HeaderValue};
use moka::sync::Cache;
use url::Url;

use super::document::Document;
use super::expect::Sources;
use super::metadata::{Answer, Metadata, Wish};
use super::url_key;
use crate::config::policy::VerifyRule;
use crate::config::{Authority, Policy, Republished, Verify};
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Kind as ErrorKind};
use crate::telemetry::METRICS;
use crate::terraform::address::Subject;
use crate::terraform::route::{Kind, file_name, sums_beside};
use crate::terraform::signature::{Judgement, Keyring, NamedKey, Tier, is_pinned};
use crate::terraform::sums::Sums;
use crate::upstream::shown_url;

const JUDGEMENTS: u64 = 10_000;
/// How HashiCorp names its signatures, and how everybody else does.
const SIGNATURE_ENDINGS: [&str; 2] = [".72D7468F.sig", ".sig"];
const HASHICORP_RELEASES: &str = "releases.hashicorp.com";

/// The rules, the keys, and what was judged by them.
pub struct Judge {
    pub policy: Policy,
    pub republished: Republished,
    keyring: Arc<Keyring>,
    judged: Cache<Digest, Judgement>,
}

impl Judge {
    pub fn new(policy: Policy, republished: Republished, keyring: Keyring) -> Self {
        Self {
            policy,
            republished,
            keyring: Arc::new(keyring),
            judged: Cache::new(JUDGEMENTS),
        }
    }

    /// The judgement on a signature, made once. A file that cannot be dealt with is a bad one.
    async fn judge(
        &self,
        sums: &Arc<Document>,
        signature: &Arc<Document>,
        keys: &Arc<[NamedKey]>,
    ) -> Judgement {
        let mut hasher = Hasher::default();
        let parts = [&sums.body[..], &signature.body[..]].into_iter();
        let texts = keys
            .iter()
            .flat_map(|k| [&k.ascii_armor, &k.trust_signature]);
        for part in parts.chain(texts.map(|text| text.as_bytes())) {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let name = hasher.finish();
        if let Some(judged) = self.judged.get(&name) {
            return judged;
        }
        let (keyring, sums) = (self.keyring.clone(), sums.clone());
        let (signature, keys) = (signature.clone(), keys.clone());
        let judged = tokio::task::spawn_blocking(move || {
            keyring.judge(&sums.body, &signature.body, &keys, now())
        });
        let judged = judged
            .await
            .unwrap_or_else(|_| Judgement::bad("its signature cannot be read"));
        self.judged.insert(name, judged.clone());
        judged
    }
}

/// Somebody's claim to an archive: of which subject, listed in which sums, signed how.
struct Party {
    subject: Option<Subject>,
    sums: Option<Url>,
    /// Where the signature may lie, the likeliest place first
    signatures: Vec<Url>,
    keys: Arc<[NamedKey]>,
    /// The name by which the sums know the archive
    filename: String,
}

/// What became of a party's signature.
#[derive(Clone, Debug)]
pub struct Vouched {
    pub subject: Option<Subject>,
    pub judgement: Judgement,
    /// What the sums that were judged say of the archive
    pub listed: Option<Digest>,
    /// Whether the document that names it names keys
    pub names_keys: bool,
}

impl Sources {
    /// What the archive is of, by the documents that name it.
    pub fn claimed_subjects(&self, archive: &Url) -> Vec<Subject> {
        let claims = self.metadata.catalogue().claims(&url_key(archive));
        let documents = claims
            .iter()
            .filter_map(|claim| Url::parse(&claim.document).ok());
        let mut subjects: Vec<Subject> = documents
            .filter_map(|document| Subject::of_document(&document))
            .collect();
        subjects.sort();
        subjects.dedup();
        subjects
    }

    /// What the archive is of, by the documents that name it and by its URL.
    pub fn subjects(&self, archive: &Url) -> Vec<Subject> {
        let mut subjects = self.claimed_subjects(archive);
        let here = Subject::of_release(archive);
        subjects.extend(here.filter(|here| !subjects.contains(here)));
        if subjects.is_empty()
            && let Some(record) = self.store.record(&url_key(archive))
        {
            subjects.clone_from(&record.subjects);
        }
        subjects
    }

    /// Whether a rule wants a signature for the archive.
    pub fn wants_signature(&self, archive: &Url) -> bool {
        self.judge.policy.wants_signatures()
            && !self.metadata.is_own_module(archive)
            && self.parties(archive).iter().any(|party| {
                let rule = self.rule(party.subject.as_ref(), archive);
                rule.how == Verify::Signature
            })
    }

    /// Judges the signatures over all sums that list the archive. What is not held is asked for
    /// where `ask` says so, with the `credentials` of a private request.
    pub async fn vouch(&self, archive: &Url, credentials: &HeaderMap, ask: bool) -> Vec<Vouched> {
        let mut all = Vec::new();
        for party in self.parties(archive) {
            let (judgement, listed) = self.vouch_one(archive, &party, credentials, ask).await;
            all.push(Vouched {
                names_keys: !party.keys.is_empty(),
                subject: party.subject,
                judgement,
                listed,
            });
        }
        all
    }

    /// Whether the rules are content with what stands behind the archive, whose digest is
    /// `digest` if that is known yet.
    ///
    /// # Errors
    /// When a rule wants a signature that is not there, or one by another key.
    pub fn content(
        &self,
        archive: &Url,
        vouched: &[Vouched],
        digest: Option<Digest>,
    ) -> Result<(), Error> {
        for party in vouched {
            let rule = self.rule(party.subject.as_ref(), archive);
            let satisfied = |party: &Vouched| {
                let listed = digest.is_none() || party.listed == digest;
                satisfies(&rule, &party.judgement, listed)
            };
            let Err(why) = satisfied(party) else {
                continue;
            };
            // OpenTofu's registry may name no keys for what Terraform's names some for: the same
            // bytes by the same author are as good.
            let keyless = party.judgement.tier == Tier::Unsigned && !party.names_keys;
            let mut others = vouched.iter().filter(|other| is_same(party, other));
            if !(keyless && others.any(|other| satisfied(other).is_ok())) {
                return Err(self.refusal(archive, party.subject.as_ref(), &why));
            }
        }
        Ok(())
    }

    /// The same by what is on record of an archive whose documents are not at hand.
    pub fn content_with_record(
        &self,
        archive: &Url,
        judgement: Option<&Judgement>,
    ) -> Result<(), Error> {
        let unsigned = Judgement::unsigned("no signature is on record");
        let judgement = judgement.unwrap_or(&unsigned);
        for party in self.parties(archive) {
            let rule = self.rule(party.subject.as_ref(), archive);
            satisfies(&rule, judgement, true)
                .map_err(|why| self.refusal(archive, party.subject.as_ref(), &why))?;
        }
        Ok(())
    }

    fn refusal(&self, archive: &Url, subject: Option<&Subject>, why: &str) -> Error {
        let of = subject.map_or_else(String::new, |subject| format!(" of {subject}"));
        let url = shown_url(archive);
        Error::new(
            ErrorKind::Unsigned,
            format!(
                "{url}: refused: this archive{of} must bear a valid signature (verify = \"signature\"), but {why}{}",
                self.judge.policy.whom_to_ask()
            ),
        )
    }

    fn rule(&self, subject: Option<&Subject>, archive: &Url) -> VerifyRule {
        match subject {
            Some(subject) => self.judge.policy.verify(&subject.names()),
            None => self
                .judge
                .policy
                .verify(&[archive.host_str().unwrap_or_default()]),
        }
    }

    fn parties(&self, archive: &Url) -> Vec<Party> {
        let claims = self.metadata.catalogue().claims(&url_key(archive));
        let mut parties: Vec<Party> = claims
            .iter()
            .map(|claim| {
                let document = Url::parse(&claim.document).ok();
                Party {
                    subject: document.and_then(|url| Subject::of_document(&url)),
                    sums: claim.download.sums.clone(),
                    signatures: claim.download.signature.iter().cloned().collect(),
                    keys: claim.download.keys.clone(),
                    filename: claim.download.filename.clone(),
                }
            })
            .collect();
        let on_record = self.store.record(&url_key(archive));
        let on_record = on_record
            .as_ref()
            .and_then(|record| record.subjects.first());
        let subject = || Subject::of_release(archive).or_else(|| on_record.cloned());
        if parties.is_empty()
            && let Some(sums) = sums_beside(archive)
        {
            let endings = SIGNATURE_ENDINGS.iter();
            let skipped = match archive.host_str() {
                Some(HASHICORP_RELEASES) => 0,
                _ => 1,
            };
            let beside = endings.skip(skipped).map(|ending| {
                let mut url = sums.clone();
                url.set_path(&format!("{}{ending}", sums.path()));
                url
            });
            parties.push(Party {
                subject: subject(),
                signatures: beside.collect(),
                keys: Arc::default(),
                filename: file_name(archive),
                sums: Some(sums),
            });
        } else if parties.is_empty() {
            parties.push(Party {
                subject: subject(),
                signatures: Vec::new(),
                keys: Arc::default(),
                filename: file_name(archive),
                sums: None,
            });
        }
        parties
    }

    async fn vouch_one(
        &self,
        archive: &Url,
        party: &Party,
        credentials: &HeaderMap,
        ask: bool,
    ) -> (Judgement, Option<Digest>) {
        let unsigned = |why: &str| (Judgement::unsigned(why), None);
        let (Some(sums), false) = (&party.sums, party.signatures.is_empty()) else {
            return unsigned("no signature is named for it");
        };
        let nobody = HeaderMap::new();
        let nobody = &nobody;
        let fetch = |url: Url, kind: Kind| async move {
            // Credentials are for the archive's own host alone.
            let credentials = match Authority::of(&url) == Authority::of(archive) {
                true => credentials,
                false => nobody,
            };
            self.document(&url, kind, credentials, ask).await
        };
        let likeliest = party.signatures[0].clone();
        let (sums, first) = tokio::join!(
            fetch(sums.clone(), Kind::Sums),
            fetch(likeliest, Kind::Signature)
        );
        let sums = match sums {
            Ok(sums) => sums,
            Err(why) => return (Judgement::unsigned(format!("its SHA256SUMS {why}")), None),
        };
        let listed = Sums::parse(&sums.body).ok();
        let listed = listed.and_then(|sums| sums.digest_of(&party.filename));
        let mut found = first;
        for url in &party.signatures[1..] {
            if found.is_err() {
                found = fetch(url.clone(), Kind::Signature).await;
            }
        }
        match found {
            Ok(signature) => (
                self.judge.judge(&sums, &signature, &party.keys).await,
                listed,
            ),
            Err(why) => (Judgement::unsigned(format!("its signature {why}")), listed),
        }
    }

    /// A held document, or one asked for. The words say why there is none.
    async fn document(
        &self,
        url: &Url,
        kind: Kind,
        credentials: &HeaderMap,
        ask: bool,
    ) -> Result<Arc<Document>, String> {
        let key = url_key(url);
        let held = self.metadata.held_as(&key, kind).await;
        let good = held.filter(|held| held.status == StatusCode::OK);
        if let Some(good) = good.filter(|_| !ask || !self.metadata.is_doubted(&key)) {
            return Ok(good);
        }
        if !ask {
            return Err("is not at hand".into());
        }
        if !credentials.is_empty() {
            let fetched = self.metadata.fetch_privately(url, credentials).await;
            return match fetched.map_err(|e| e.to_string())? {
                (StatusCode::OK, body) => Ok(Arc::new(Document::passing(url, kind, body))),
                (status, _) => Err(format!("was answered {}", status.as_u16())),
            };
        }
        match ask_for(&self.metadata, url, kind).await {
            Ok(Answer::Document(document, _)) if document.status == StatusCode::OK => Ok(document),
            Ok(Answer::Document(document, _)) => {
                Err(format!("was answered {}", document.status.as_u16()))
            }
            Ok(Answer::TooLarge) => Err("is too large".into()),
            Err(e) => Err(format!("cannot be had: {e}")),
        }
    }
}

/// Whether two parties speak of the same NAMESPACE/TYPE of whichever registries.
fn is_same(one: &Vouched, other: &Vouched) -> bool {
    match (&one.subject, &other.subject) {
        (Some(one), Some(other)) => one.names.len() == 3 && one.names[1..] == other.names[1..],
        _ => false,
    }
}

/// The judgement that speaks for all: a bad one spoils the rest, and else the best one counts.
pub fn overall(vouched: &[Vouched]) -> Option<&Judgement> {
    let judgements = || vouched.iter().map(|party| &party.judgement);
    judgements()
        .find(|judgement| judgement.tier == Tier::Bad)
        .or_else(|| judgements().min_by_key(|judgement| judgement.tier as u8))
}

/// Whether a signature is bad.
pub fn is_bad(vouched: &[Vouched]) -> bool {
    overall(vouched).is_some_and(|judgement| judgement.tier == Tier::Bad)
}

/// Sounds the alarm where a signature is bad.
pub fn alarm(archive: &Url, vouched: &[Vouched]) {
    for party in vouched {
        if party.judgement.tier == Tier::Bad {
            METRICS.bad_signatures.inc();
            let why = party.judgement.why.as_deref().unwrap_or_default();
            let subject = party.subject.as_ref().map(ToString::to_string);
            tracing::error!(url = %shown_url(archive), subject, why, "BAD SIGNATURE over the SHA256SUMS of this archive; its checksum agrees, so it is served and marked (verify = \"signature\" would refuse it)");
        }
    }
}

async fn ask_for(metadata: &Arc<Metadata>, url: &Url, kind: Kind) -> Result<Answer, Error> {
    let mut headers = HeaderMap::new();
    headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
    let wish = Wish {
        url: url.clone(),
        kind,
        headers,
        reload: false,
    };
    metadata.get(&wish).await
}

fn satisfies(rule: &VerifyRule, judgement: &Judgement, listed: bool) -> Result<(), String> {
    if rule.how == Verify::Checksum {
        return Ok(());
    }
    if !judgement.tier.is_valid() {
        return Err(format!("it is {judgement}"));
    }
    if !listed {
        return Err("the signed SHA256SUMS do not list it".into());
    }
    let key = judgement.key.as_deref().unwrap_or_default();
    match rule.keys.is_empty() || rule.keys.iter().any(|pin| is_pinned(key, pin)) {
        true => Ok(()),
        false => Err(format!(
            "it is {judgement}, which is none of the pinned keys"
        )),
    }
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn party(tier: Tier) -> Vouched {
        Vouched {
            subject: None,
            judgement: Judgement {
                tier,
                ..Judgement::bad("")
            },
            names_keys: true,
            listed: None,
        }
    }

    #[test]
    fn one_bad_signature_spoils_all_and_else_the_best_counts() {
        let tier = |tiers: &[Tier]| {
            let vouched: Vec<_> = tiers.iter().copied().map(party).collect();
            overall(&vouched).map(|judgement| judgement.tier)
        };
        assert_eq!(tier(&[]), None);
        assert_eq!(
            tier(&[Tier::Unsigned, Tier::SelfSigned, Tier::HashiCorp]),
            Some(Tier::HashiCorp)
        );
        assert_eq!(tier(&[Tier::HashiCorp, Tier::Bad]), Some(Tier::Bad));
    }
}
