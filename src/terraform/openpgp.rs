//! Detached OpenPGP signatures (RFC 9580): whether one holds. A key need only have been good when it signed, as
//! Terraform has it.

use pgp::composed::{Deserializable as _, DetachedSignature, SignedPublicKey};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{Signature, SignatureType, SubpacketData};
use pgp::types::{Fingerprint, KeyDetails, Tag};

/// Signature packets of one file that are looked at.
const SIGNATURES: usize = 16;
/// Keys of one file that are looked at.
const KEYS: usize = 32;
/// Bytes of one armored key or signature.
const ARMOR_LIMIT: usize = 512 << 10;

/// The part of a key that a signature says it is by.
pub struct Issuer<'a> {
    key: &'a SignedPublicKey,
    /// None: the primary key
    subkey: Option<&'a pgp::composed::SignedPublicSubKey>,
}

/// None: the signature is by another key.
pub fn issuer<'a>(key: &'a SignedPublicKey, signature: &Signature) -> Option<Issuer<'a>> {
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
pub struct Keys<'a> {
    all: Vec<(Fingerprint, &'a SignedPublicKey)>,
    /// What keys say of themselves, as far as they were asked
    own: Vec<(Fingerprint, Result<&'a Signature, String>)>,
}

impl<'a> Keys<'a> {
    pub fn new(keys: impl Iterator<Item = &'a SignedPublicKey>) -> Self {
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
    pub fn id(&self) -> (Fingerprint, Option<Fingerprint>) {
        let subkey = self.subkey.map(|subkey| subkey.key.fingerprint());
        (self.key.fingerprint(), subkey)
    }

    /// Whether the signature over `document` is good; otherwise why not. `now` is in seconds since 1970.
    pub fn check(
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

/// In seconds since 1970.
pub fn created(signature: &Signature) -> Option<u64> {
    signature.created().map(|time| u64::from(time.as_secs()))
}

/// In upper-case hexadecimal digits.
pub fn fingerprint(key: &SignedPublicKey) -> String {
    key.fingerprint().to_string().to_ascii_uppercase()
}

/// The keys in an armored or binary file, at least one.
pub fn keys_of(bytes: &[u8]) -> Result<Vec<SignedPublicKey>, String> {
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
pub fn signatures_of(bytes: &[u8]) -> Result<Vec<Signature>, String> {
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
pub fn dearmored(bytes: &[u8]) -> Result<Vec<u8>, String> {
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
