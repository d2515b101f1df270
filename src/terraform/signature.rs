//! Detached OpenPGP signatures (RFC 9580) over SHA256SUMS, judged by the rules that Terraform
//! goes by: what is signed are the raw bytes, and a key need only have been good when it signed.

use std::fmt;
use std::path::Path;

use pgp::composed::{ArmorOptions, Deserializable as _, DetachedSignature, SignedPublicKey};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{Signature, SignatureType, SubpacketData};
use pgp::types::{Fingerprint, KeyDetails, Tag};
use serde::{Deserialize, Serialize};

/// Signature packets of one file that are looked at.
const SIGNATURES: usize = 16;
/// Different keys, each of which one signature may say it is by.
const ISSUERS: usize = 4;
/// Keys of one registry document that are looked at.
const KEYS: usize = 32;
/// Bytes of one armored key or signature.
const ARMOR_LIMIT: usize = 512 << 10;
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

    /// Keys from files (blocking), in place of the shipped ones. Each of them may sign sums and
    /// vouch for partners.
    pub fn read(paths: &[impl AsRef<Path>]) -> Result<Self, String> {
        let mut keys = Vec::new();
        for path in paths {
            let path = path.as_ref();
            let read = std::fs::read(path).map_err(|e| e.to_string());
            let read = read.and_then(|bytes| keys_of(&bytes));
            keys.extend(read.map_err(|why| {
                format!(
                    "{}: {why}; name a file of OpenPGP public keys",
                    path.display()
                )
            })?);
        }
        Ok(Self {
            official: keys.clone(),
            partners: keys,
        })
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

/// The part of a key that a signature says it is by.
struct Issuer<'a> {
    key: &'a SignedPublicKey,
    /// None: the primary key
    subkey: Option<&'a pgp::composed::SignedPublicSubKey>,
}

fn issuer<'a>(key: &'a SignedPublicKey, signature: &Signature) -> Option<Issuer<'a>> {
    if is_by(signature, key) {
        return Some(Issuer { key, subkey: None });
    }
    let subkeys = key.public_subkeys.iter();
    let subkey = subkeys
        .filter(|subkey| is_by(signature, &subkey.key))
        .find(|subkey| !subkey.signatures.is_empty())?;
    Some(Issuer {
        key,
        subkey: Some(subkey),
    })
}

fn is_by(signature: &Signature, key: &impl KeyDetails) -> bool {
    signature
        .issuer_key_id()
        .into_iter()
        .any(|id| *id == key.legacy_key_id())
        || signature
            .issuer_fingerprint()
            .into_iter()
            .any(|issuer| *issuer == key.fingerprint())
}

/// All keys at hand: a later copy of the same key may have a longer life.
struct Keys<'a> {
    all: Vec<(Fingerprint, &'a SignedPublicKey)>,
    /// What keys say of themselves, as far as they were asked
    own: Vec<(Fingerprint, Result<&'a Signature, String>)>,
}

impl<'a> Keys<'a> {
    fn new(keys: impl Iterator<Item = &'a SignedPublicKey>) -> Self {
        Self {
            all: keys.map(|key| (key.fingerprint(), key)).collect(),
            own: Vec::new(),
        }
    }

    fn copies(&self, id: &Fingerprint) -> impl Iterator<Item = &'a SignedPublicKey> + Clone {
        let copies = self.all.iter().filter(move |(other, _)| other == id);
        copies.map(|(_, key)| *key)
    }

    /// The latest word of a key on itself, unless it was revoked. Each signature on a key is
    /// checked once, however many copies there are.
    fn own(&mut self, key: &SignedPublicKey) -> Result<&'a Signature, String> {
        let id = key.fingerprint();
        if let Some((_, own)) = self.own.iter().find(|(other, _)| *other == id) {
            return own.clone();
        }
        let revocations = self
            .copies(&id)
            .flat_map(|copy| &copy.details.revocation_signatures);
        let revoked = revocations
            .into_iter()
            .any(|revocation| revocation.verify_key(&key.primary_key).is_ok());
        let own = match revoked {
            true => Err("its key was revoked".to_owned()),
            false => latest(self.copies(&id).flat_map(self_signatures).collect())
                .ok_or_else(|| "its key does not vouch for itself".to_owned()),
        };
        self.own.push((id, own.clone()));
        own
    }
}

impl Issuer<'_> {
    fn id(&self) -> (Fingerprint, Option<Fingerprint>) {
        let subkey = self.subkey.map(|subkey| subkey.key.fingerprint());
        (self.key.fingerprint(), subkey)
    }

    /// Whether the signature is good.
    fn check(
        &self,
        keys: &mut Keys<'_>,
        signature: &Signature,
        document: &[u8],
        now: u64,
    ) -> Result<(), String> {
        let signed = created(signature).ok_or("says not when it was made")?;
        check_form(signature, signed, now)?;
        let primary = &self.key.primary_key;
        let verified = match self.subkey {
            None => signature.verify(primary, document),
            Some(subkey) => signature.verify(&subkey.key, document),
        };
        verified.map_err(|_| "the signature does not fit the bytes")?;

        let own = keys.own(self.key)?;
        check_life(primary, own, signed)?;
        let Some(subkey) = self.subkey else {
            return may_sign(own);
        };
        let id = self.key.fingerprint();
        let same = keys.copies(&id).flat_map(|copy| &copy.public_subkeys);
        let same = same.filter(|other| other.key.fingerprint() == subkey.key.fingerprint());
        let (mut bindings, mut revoked) = (Vec::new(), false);
        for signature in same.flat_map(|other| &other.signatures) {
            if signature
                .verify_subkey_binding(primary, &subkey.key)
                .is_err()
            {
                continue;
            }
            match signature.typ() {
                Some(SignatureType::SubkeyRevocation) => revoked = true,
                _ => bindings.push(signature),
            }
        }
        if revoked {
            return Err("its subkey was revoked".into());
        }
        let binding = latest(bindings).ok_or("its subkey is not bound to its key")?;
        check_life(&subkey.key, binding, signed)?;
        may_sign(binding)?;
        // RFC 9580 section 5.2.1.10: or else anybody's signing subkey could be adopted.
        let back = binding
            .embedded_signature()
            .ok_or("its subkey does not agree to its key")?;
        back.verify_primary_key_binding(&subkey.key, primary)
            .map_err(|_| "its subkey does not agree to its key".to_owned())
    }
}

fn check_form(signature: &Signature, signed: u64, now: u64) -> Result<(), String> {
    if !matches!(
        signature.typ(),
        Some(SignatureType::Binary | SignatureType::Text)
    ) {
        return Err("is no signature over a file".into());
    }
    let strong = [
        HashAlgorithm::Sha224,
        HashAlgorithm::Sha256,
        HashAlgorithm::Sha384,
        HashAlgorithm::Sha512,
        HashAlgorithm::Sha3_256,
        HashAlgorithm::Sha3_512,
    ];
    if !signature
        .hash_alg()
        .is_some_and(|hash| strong.contains(&hash))
    {
        return Err("the signature's hash is too weak".into());
    }
    let expires = signature.signature_expiration_time();
    let expires = expires.map_or(0, |life| u64::from(life.as_secs()));
    if expires > 0 && signed.saturating_add(expires) < now {
        return Err("the signature itself has expired".into());
    }
    let notations = signature.config().into_iter().flat_map(|config| {
        config
            .hashed_subpackets()
            .filter(|part| part.is_critical && matches!(part.data, SubpacketData::Notation(_)))
    });
    match notations.count() {
        0 => Ok(()),
        _ => Err("the signature has a critical notation that larder does not know".into()),
    }
}

/// The certifications by which a key says what it may do and for how long.
fn self_signatures(key: &SignedPublicKey) -> impl Iterator<Item = &Signature> {
    let primary = &key.primary_key;
    let direct = key.details.direct_signatures.iter();
    let direct = direct.filter(|signature| signature.verify_key(primary).is_ok());
    let users = key.details.users.iter();
    let users = users.flat_map(move |user| {
        let signatures = user.signatures.iter();
        signatures.filter(move |signature| {
            signature.typ() != Some(SignatureType::CertRevocation)
                && is_by(signature, primary)
                && signature
                    .verify_certification(primary, Tag::UserId, &user.id)
                    .is_ok()
        })
    });
    direct.chain(users)
}

/// By their own time, whatever the time of what they signed: a life may be extended afterwards.
fn latest(signatures: Vec<&Signature>) -> Option<&Signature> {
    let dated = signatures.into_iter();
    dated.max_by_key(|signature| created(signature).unwrap_or_default())
}

fn check_life(key: &impl KeyDetails, own: &Signature, signed: u64) -> Result<(), String> {
    let born = u64::from(key.created_at().as_secs());
    let life = own
        .key_expiration_time()
        .map_or(0, |life| u64::from(life.as_secs()));
    if signed < born {
        return Err("it is older than its key".into());
    }
    if life > 0 && signed > born + life {
        return Err("its key had expired when it was made".into());
    }
    Ok(())
}

fn may_sign(own: &Signature) -> Result<(), String> {
    let flags = own.config().is_some_and(|config| {
        config
            .hashed_subpackets()
            .any(|part| matches!(part.data, SubpacketData::KeyFlags(_)))
    });
    match !flags || own.key_flags().sign() {
        true => Ok(()),
        false => Err("its key is not for signing".into()),
    }
}

fn created(signature: &Signature) -> Option<u64> {
    signature.created().map(|time| u64::from(time.as_secs()))
}

fn fingerprint(key: &SignedPublicKey) -> String {
    key.fingerprint().to_string().to_ascii_uppercase()
}

fn parse(named: &NamedKey, left: &mut usize) -> Result<Vec<SignedPublicKey>, String> {
    let armor = named.ascii_armor.as_bytes();
    *left = left.checked_sub(armor.len()).ok_or("is too large")?;
    keys_of(armor)
}

/// The keys in an armored or binary file, at least one.
fn keys_of(bytes: &[u8]) -> Result<Vec<SignedPublicKey>, String> {
    let bytes = dearmored(bytes)?;
    let parsed = SignedPublicKey::from_bytes_many(&bytes[..]).map_err(|e| e.to_string())?;
    let keys: Result<Vec<_>, _> = parsed.take(KEYS).collect();
    match keys {
        Ok(keys) if keys.is_empty() => Err("holds no public key".into()),
        Ok(keys) => Ok(keys),
        Err(_) => Err("holds no public key that can be read".into()),
    }
}

/// The signatures in an armored or binary file, at least one.
fn signatures_of(bytes: &[u8]) -> Result<Vec<Signature>, String> {
    let bad = || "holds no OpenPGP signature that can be read".to_owned();
    let bytes = dearmored(bytes).map_err(|_| bad())?;
    let parsed = DetachedSignature::from_bytes_many(&bytes[..]).map_err(|_| bad())?;
    let signatures: Vec<_> = parsed
        .take(SIGNATURES)
        .map_while(Result::ok)
        .map(|detached| detached.signature)
        .collect();
    match signatures.is_empty() {
        true => Err(bad()),
        false => Ok(signatures),
    }
}

/// The bytes within the armor (RFC 9580 section 6), or as they are where there is none.
fn dearmored(bytes: &[u8]) -> Result<Vec<u8>, String> {
    use std::io::Read as _;
    if bytes.len() > ARMOR_LIMIT {
        return Err("is too large".into());
    }
    // Text may stand before the armor, as it may for Go.
    let begins = |at: &usize| {
        let before = bytes[..*at].trim_ascii_end();
        bytes[*at..].starts_with(b"-----BEGIN PGP")
            && (before.is_empty() || bytes[before.len()..*at].contains(&b'\n'))
    };
    let Some(begin) = (0..bytes.len())
        .filter(|at| bytes[*at] == b'-')
        .find(begins)
    else {
        return Ok(bytes.to_owned());
    };
    let options = pgp::armor::DearmorOptions::default().set_limit(ARMOR_LIMIT);
    let mut inner = Vec::new();
    pgp::armor::Dearmor::with_options(&bytes[begin..], options)
        .take(ARMOR_LIMIT as u64)
        .read_to_end(&mut inner)
        .map_err(|_| "its armor is torn".to_owned())?;
    Ok(inner)
}
