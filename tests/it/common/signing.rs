//! Publishers' keys: they sign sums, and each other.

use bytes::Bytes;
use pgp::composed::{
    ArmorOptions, DetachedSignature, KeyType, SecretKeyParamsBuilder, SignedPublicKey,
    SignedSecretKey,
};
use pgp::crypto::ecc_curve::ECCCurve;
use pgp::crypto::hash::HashAlgorithm;
use pgp::ser::Serialize;
use pgp::types::{KeyDetails, Password};

/// A fresh key pair.
#[derive(Clone)]
pub struct Signer(SignedSecretKey);

/// A key as registry documents name it.
#[derive(Clone)]
pub struct PublicKey {
    pub id: String,
    pub armored: String,
    /// `trust_signature`
    pub trust: String,
}

impl Signer {
    pub fn new() -> Self {
        Self::of_kind(KeyType::Ed25519Legacy)
    }

    /// With a key that terraform before 0.15 can read: those know no EdDSA.
    pub fn for_old_clients() -> Self {
        Self::of_kind(KeyType::ECDSA(ECCCurve::P256))
    }

    fn of_kind(kind: KeyType) -> Self {
        let mut params = SecretKeyParamsBuilder::default();
        params
            .key_type(kind)
            .can_certify(true)
            .can_sign(true)
            .primary_user_id("A Publisher <publisher@example.com>".into());
        let params = params.build().unwrap();
        Self(params.generate(rand::thread_rng()).unwrap())
    }

    /// A detached binary signature.
    pub fn sign(&self, bytes: &[u8]) -> Bytes {
        self.signature(bytes).to_bytes().unwrap().into()
    }

    /// A `trust_signature` for another's key.
    pub fn vouches_for(&self, other: &Self) -> String {
        let bytes = other.certificate().to_bytes().unwrap();
        let signature = self.signature(&bytes);
        signature
            .to_armored_string(ArmorOptions::default())
            .unwrap()
    }

    pub fn public(&self) -> PublicKey {
        let key = self.certificate();
        PublicKey {
            id: key.legacy_key_id().to_string().to_uppercase(),
            armored: key.to_armored_string(ArmorOptions::default()).unwrap(),
            trust: String::new(),
        }
    }

    /// In upper-case hexadecimal digits.
    pub fn fingerprint(&self) -> String {
        self.certificate().fingerprint().to_string().to_uppercase()
    }

    fn certificate(&self) -> SignedPublicKey {
        SignedPublicKey::from(self.0.clone())
    }

    fn signature(&self, bytes: &[u8]) -> DetachedSignature {
        let (password, hash) = (Password::empty(), HashAlgorithm::Sha256);
        let key = &self.0.primary_key;
        DetachedSignature::sign_binary_data(rand::thread_rng(), key, &password, hash, bytes)
            .unwrap()
    }
}
