//! The OpenPGP key by which larder signs what its owner has not: Terraform wants a signature.

use std::path::{Path, PathBuf};

use pgp::composed::{
    ArmorOptions, Deserializable as _, DetachedSignature, KeyType, SecretKeyParamsBuilder,
    SignedPublicKey, SignedSecretKey,
};
use pgp::crypto::ecc_curve::ECCCurve;
use pgp::crypto::hash::HashAlgorithm;
use pgp::ser::Serialize as _;
use pgp::types::{KeyDetails as _, Password};

use crate::ca::write_atomically;
use crate::error::Exit;

/// A key pair. The secret part lies in the data dir (0600) and is never shown.
pub struct SigningKey {
    secret: SignedSecretKey,
    /// `ABCD0123…`, of the primary key
    pub id: String,
    pub fingerprint: String,
    /// The public key, armored
    pub public: String,
}

impl SigningKey {
    /// The key of a data dir, made if there is none (blocking). The second says whether it was made.
    ///
    /// # Errors
    /// When it cannot be read or made.
    pub fn open_or_create(data_dir: &Path) -> Result<(Self, bool), Exit> {
        let path = path(data_dir);
        let broken = |why: String| {
            Exit::usage(format!(
                "the registry's key {}: {why}; mend it, or remove it for a new one",
                path.display()
            ))
        };
        if path.exists() {
            let text = std::fs::read_to_string(&path).map_err(|e| broken(e.to_string()))?;
            let (secret, _) =
                SignedSecretKey::from_string(&text).map_err(|e| broken(e.to_string()))?;
            return Ok((Self::of(secret).map_err(broken)?, false));
        }
        let secret = generate().map_err(broken)?;
        let text = secret
            .to_armored_string(ArmorOptions::default())
            .map_err(|e| broken(e.to_string()))?;
        if let Some(dir) = path.parent() {
            use std::os::unix::fs::DirBuilderExt as _;
            let mut builder = std::fs::DirBuilder::new();
            let made = builder.recursive(true).mode(0o700).create(dir);
            made.map_err(|e| broken(e.to_string()))?;
        }
        write_atomically(&path, text.as_bytes(), 0o600).map_err(|e| broken(e.to_string()))?;
        Ok((Self::of(secret).map_err(broken)?, true))
    }

    fn of(secret: SignedSecretKey) -> Result<Self, String> {
        let public = SignedPublicKey::from(secret.clone());
        Ok(Self {
            id: public.legacy_key_id().to_string().to_uppercase(),
            fingerprint: public.fingerprint().to_string().to_uppercase(),
            public: public
                .to_armored_string(ArmorOptions::default())
                .map_err(|e| e.to_string())?,
            secret,
        })
    }

    /// A detached binary signature.
    pub fn sign(&self, bytes: &[u8]) -> Result<Vec<u8>, String> {
        let (password, hash) = (Password::empty(), HashAlgorithm::Sha256);
        let key = &self.secret.primary_key;
        let rng = rand::rngs::OsRng;
        DetachedSignature::sign_binary_data(rng, key, &password, hash, bytes)
            .and_then(|signature| signature.to_bytes())
            .map_err(|e| e.to_string())
    }
}

/// Where the secret key of a data dir lies.
pub fn path(data_dir: &Path) -> PathBuf {
    data_dir.join("registry").join("signing.key")
}

/// The id of a public key, as registry documents name it.
pub fn id_of(armored: &str) -> Option<String> {
    let (key, _) = SignedPublicKey::from_string(armored).ok()?;
    Some(key.legacy_key_id().to_string().to_uppercase())
}

/// On a curve that every Terraform since 0.13 can verify.
fn generate() -> Result<SignedSecretKey, String> {
    let mut params = SecretKeyParamsBuilder::default();
    params
        .key_type(KeyType::ECDSA(ECCCurve::P256))
        .can_certify(true)
        .can_sign(true)
        .primary_user_id("larder private registry".into());
    let params = params.build().map_err(|e| e.to_string())?;
    params
        .generate(rand::rngs::OsRng)
        .map_err(|e| e.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::terraform::signature::{Keyring, NamedKey, Tier};

    #[test]
    fn a_key_is_made_once_kept_secret_and_its_signatures_hold() {
        let dir = tempfile::tempdir().unwrap();
        let (made, new) = SigningKey::open_or_create(dir.path()).unwrap();
        let (key, again) = SigningKey::open_or_create(dir.path()).unwrap();
        assert!(new && !again && made.fingerprint == key.fingerprint);
        let mode = std::fs::metadata(path(dir.path()))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!key.public.contains("PRIVATE"));
        assert_eq!(id_of(&key.public), Some(key.id.clone()));
        let signature = key.sign(b"sums").unwrap();
        let named = [NamedKey {
            ascii_armor: key.public.clone(),
            trust_signature: String::new(),
        }];
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = now.unwrap().as_secs() + 1;
        let judge = |bytes: &[u8]| {
            Keyring::shipped()
                .judge(bytes, &signature, &named, now)
                .tier
        };
        assert_eq!(
            (judge(b"sums"), judge(b"other")),
            (Tier::SelfSigned, Tier::Bad)
        );
    }
}
