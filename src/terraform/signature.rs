//! Who stands behind SHA256SUMS, by the detached signature over its raw bytes: judged by the rules that
//! Terraform goes by.

use std::fmt;

use pgp::composed::{ArmorOptions, SignedPublicKey};
use pgp::packet::Signature;
use pgp::types::KeyDetails;
use serde::{Deserialize, Serialize};

use super::openpgp::{
    Issuer, Keys, created, dearmored, fingerprint, issuer, keys_of, signatures_of,
};

/// Different keys, each of which one signature may say it is by.
const ISSUERS: usize = 4;
/// Keys of one registry document that are looked at.
const KEYS: usize = 32;
/// Bytes of the armored keys of one registry document, in all: some kinds of keys take
/// milliseconds to read. Real ones have some kilobytes each.
const NAMED_LIMIT: usize = 256 << 10;

/// Who stands behind SHA256SUMS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tier {
    #[serde(rename = "signed by HashiCorp")]
    HashiCorp,
    /// A key that bears a valid trust signature of HashiCorp's partner key
    #[serde(rename = "signed by a partner")]
    Partner,
    /// Any other key that the registry names
    #[serde(rename = "self-signed")]
    SelfSigned,
    /// No signature, or no key to check it by
    #[serde(rename = "unsigned")]
    Unsigned,
    /// A signature that does not hold
    #[serde(rename = "bad")]
    Bad,
}

impl Tier {
    /// Whether a known key vouches.
    pub fn is_valid(self) -> bool {
        matches!(self, Self::HashiCorp | Self::Partner | Self::SelfSigned)
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HashiCorp => "signed by HashiCorp",
            Self::Partner => "signed by a partner",
            Self::SelfSigned => "self-signed",
            Self::Unsigned => "unsigned",
            Self::Bad => "bad",
        })
    }
}

/// What became of a signature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    pub tier: Tier,
    /// Fingerprint of the primary key that vouches, in upper-case hexadecimal digits
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// When it was signed, in seconds since 1970
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signed: Option<u64>,
    /// Why it is no better
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl Judgement {
    pub fn unsigned(why: impl Into<String>) -> Self {
        Self {
            tier: Tier::Unsigned,
            key: None,
            signed: None,
            why: Some(why.into()),
        }
    }

    pub fn bad(why: impl Into<String>) -> Self {
        Self {
            tier: Tier::Bad,
            ..Self::unsigned(why)
        }
    }
}

impl fmt::Display for Judgement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.tier.fmt(f)?;
        if let Some(key) = &self.key {
            write!(f, ", key {key}")?;
        }
        match &self.why {
            Some(why) => write!(f, " ({why})"),
            None => Ok(()),
        }
    }
}

/// A key as a registry's document names it (`gpg_public_keys`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedKey {
    pub ascii_armor: String,
    /// Detached signature of the partner key over the key's bytes; may be empty
    #[serde(default)]
    pub trust_signature: String,
}

/// The keys that larder trusts by itself.
#[derive(Default)]
pub struct Keyring {
    /// What they sign is "signed by HashiCorp".
    official: Vec<SignedPublicKey>,
    /// Keys that they vouch for belong to partners.
    partners: Vec<SignedPublicKey>,
}

impl Keyring {
    /// HashiCorp's key and its partner key, as they ship in `certs/`.
    pub fn shipped() -> Self {
        let read = |text: &str| keys_of(text.as_bytes()).expect("a key that ships in certs/");
        Self {
            official: read(include_str!("../../certs/hashicorp.asc")),
            partners: read(include_str!("../../certs/hashicorp-partners.asc")),
        }
    }

    /// Adds the public keys of a file, armored or binary: each of them may sign sums and vouch for
    /// partners.
    pub fn trust(&mut self, file: &[u8]) -> Result<(), String> {
        let keys = keys_of(file)?;
        self.official.extend(keys.iter().cloned());
        self.partners.extend(keys);
        Ok(())
    }

    /// The official key of that fingerprint, armored.
    pub fn armored(&self, of: &str) -> Option<String> {
        let key = self.official.iter().find(|key| fingerprint(key) == of)?;
        key.to_armored_string(ArmorOptions::default()).ok()
    }

    /// Judges `signature`, a detached one over exactly the bytes of `document`, by the keys that
    /// the registry named and those of the ring. `now` is in seconds since 1970.
    pub fn judge(
        &self,
        document: &[u8],
        signature: &[u8],
        named: &[NamedKey],
        now: u64,
    ) -> Judgement {
        let signatures = match signatures_of(signature) {
            Ok(signatures) => signatures,
            Err(why) => return Judgement::bad(why),
        };
        let mut known: Vec<Known<'_>> = self.official.iter().map(Known::official).collect();
        let mut unreadable = 0;
        let mut left = NAMED_LIMIT;
        let parsed: Vec<_> = named
            .iter()
            .take(KEYS)
            .map(|key| parse(key, &mut left))
            .collect();
        for (key, parsed) in named.iter().zip(&parsed) {
            match parsed {
                Ok(keys) => known.extend(keys.iter().map(|parsed| self.named(parsed, key))),
                Err(_) => unreadable += 1,
            }
        }
        let mut keys = Keys::new(known.iter().map(|known| known.key));
        for signature in &signatures {
            let issuers = known
                .iter()
                .filter_map(|key| Some((key, key.issuer(signature)?)));
            // The same key in another copy is not checked again.
            let mut checked: Vec<(_, Result<(), String>)> = Vec::new();
            let outcomes: Vec<_> = issuers
                .map(|(key, issuer)| {
                    let id = issuer.id();
                    let outcome = match checked.iter().find(|(other, _)| *other == id) {
                        Some((_, outcome)) => outcome.clone(),
                        None if checked.len() == ISSUERS => Err("it names too many keys".into()),
                        None => {
                            let outcome = issuer.check(&mut keys, signature, document, now);
                            checked.push((id, outcome.clone()));
                            outcome
                        }
                    };
                    (key, outcome)
                })
                .collect();
            // A key may be there in several copies: the best of them counts.
            let good = outcomes.iter().filter(|(_, outcome)| outcome.is_ok());
            if let Some((key, _)) = good.min_by_key(|(key, _)| key.standing as u8) {
                return self.vouched(key, signature, now);
            }
            if let Some((key, Err(why))) = outcomes.first() {
                return Judgement {
                    key: Some(fingerprint(key.key)),
                    ..Judgement::bad(why.clone())
                };
            }
        }
        match (named.is_empty(), unreadable) {
            (true, _) => Judgement::unsigned("no key is named to check its signature by"),
            (false, 0) => Judgement::bad("signed by a key that the registry does not name"),
            (false, _) => Judgement::bad(
                "signed by none of the keys that can be read; the registry names some that cannot",
            ),
        }
    }

    fn named<'a>(&self, parsed: &'a SignedPublicKey, named: &'a NamedKey) -> Known<'a> {
        let official = self.official.iter();
        let same = official
            .map(KeyDetails::fingerprint)
            .any(|official| official == parsed.fingerprint());
        Known {
            key: parsed,
            standing: match same {
                true => Standing::Official,
                false => Standing::Named,
            },
            named: Some(named),
        }
    }

    fn vouched(&self, key: &Known<'_>, signature: &Signature, now: u64) -> Judgement {
        let mut judgement = Judgement {
            tier: Tier::SelfSigned,
            key: Some(fingerprint(key.key)),
            signed: created(signature),
            why: None,
        };
        let trust = key.named.map(|named| named.trust_signature.trim());
        judgement.tier = match (key.standing, trust) {
            (Standing::Official, _) => Tier::HashiCorp,
            (Standing::Named, None | Some("")) => Tier::SelfSigned,
            (Standing::Named, Some(trust)) => match self.check_trust(key, trust, now) {
                Ok(()) => Tier::Partner,
                Err(why) => {
                    judgement.why = Some(why);
                    Tier::Bad
                }
            },
        };
        judgement
    }

    /// A trust signature is a detached one over the bytes within the author key's armor.
    fn check_trust(&self, author: &Known<'_>, trust: &str, now: u64) -> Result<(), String> {
        let armor = author.named.map_or("", |named| &named.ascii_armor);
        let author = dearmored(armor.as_bytes())?;
        let signatures =
            signatures_of(trust.as_bytes()).map_err(|why| format!("its trust_signature {why}"))?;
        let mut keys = Keys::new(self.partners.iter());
        let mut outcome = Err("its trust_signature is not by the partner key".to_owned());
        for signature in &signatures {
            for key in &self.partners {
                if let Some(issuer) = issuer(key, signature) {
                    outcome = issuer
                        .check(&mut keys, signature, &author, now)
                        .map_err(|why| format!("its trust_signature does not hold: {why}"));
                    if outcome.is_ok() {
                        return outcome;
                    }
                }
            }
        }
        outcome
    }
}

/// Whether `fingerprint` (of a judgement) is the one that a pin names: hexadecimal digits, with or
/// without spaces.
pub fn is_pinned(fingerprint: &str, pin: &str) -> bool {
    let digits = pin.chars().filter(|c| !c.is_whitespace());
    digits
        .map(|c| c.to_ascii_uppercase())
        .eq(fingerprint.chars())
}

/// A key in one of its copies.
struct Known<'a> {
    key: &'a SignedPublicKey,
    standing: Standing,
    named: Option<&'a NamedKey>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    Official,
    Named,
}

impl<'a> Known<'a> {
    fn official(key: &'a SignedPublicKey) -> Self {
        Self {
            key,
            standing: Standing::Official,
            named: None,
        }
    }

    fn issuer(&self, signature: &Signature) -> Option<Issuer<'a>> {
        issuer(self.key, signature)
    }
}

fn parse(named: &NamedKey, left: &mut usize) -> Result<Vec<SignedPublicKey>, String> {
    let armor = named.ascii_armor.as_bytes();
    *left = left.checked_sub(armor.len()).ok_or("is too large")?;
    keys_of(armor)
}
