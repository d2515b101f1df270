//! The OpenPGP key by which larder signs what its owner has not: Terraform wants a signature.

use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

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
use crate::sync::lock;

/// A key pair. The secret part lies in the data dir (0600) and is never shown.
pub struct SigningKey {
    secret: SignedSecretKey,
    /// `ABCD0123…`, of the primary key
    pub id: String,
    pub fingerprint: String,
    /// The public key, armored
    pub public: String,
}

/// The key of a data dir, for all registries of a process. What kept it from being had is tried again.
pub struct KeyHolder {
    data_dir: PathBuf,
    key: Mutex<Option<Arc<SigningKey>>>,
}

impl KeyHolder {
    pub fn new(data_dir: &Path) -> Arc<Self> {
        Arc::new(Self {
            data_dir: data_dir.to_owned(),
            key: Mutex::default(),
        })
    }

    /// The key, made if there is none (blocking).
    pub fn key(&self) -> Option<Arc<SigningKey>> {
        let mut held = lock(&self.key);
        if held.is_none() {
            match SigningKey::open_or_create(&self.data_dir) {
                Ok((key, made)) => {
                    if made {
                        tracing::info!(fingerprint = %key.fingerprint, "made a key to sign what has no signature in private registries");
                    }
                    *held = Some(Arc::new(key));
                }
                Err(error) => {
                    tracing::error!(%error, "no key to sign what has no signature; Terraform will refuse it");
                }
            }
        }
        held.clone()
    }
}

impl SigningKey {
    /// The key of a data dir, made if there is none (blocking). The second says whether it was made:
    /// of several that make one at a time, one is first.
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
        let mut made = false;
        if !path.exists() {
            let text = generate()
                .and_then(|secret| {
                    let armored = secret.to_armored_string(ArmorOptions::default());
                    armored.map_err(|e| e.to_string())
                })
                .map_err(broken)?;
            made = write_first(&path, &text).map_err(|e| broken(e.to_string()))?;
        }
        let text = std::fs::read_to_string(&path).map_err(|e| broken(e.to_string()))?;
        let (secret, _) = SignedSecretKey::from_string(&text).map_err(|e| broken(e.to_string()))?;
        Ok((Self::of(secret).map_err(broken)?, made))
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

/// Writes a file whole unless there is one. Returns whether it was first.
fn write_first(path: &Path, text: &str) -> io::Result<bool> {
    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)?;
    static MADE: AtomicU64 = AtomicU64::new(0);
    let number = MADE.fetch_add(1, Ordering::Relaxed);
    let temporary = dir.join(format!(".signing.{}.{number}", std::process::id()));
    write_atomically(&temporary, text.as_bytes(), 0o600)?;
    let linked = std::fs::hard_link(&temporary, path);
    let _ = std::fs::remove_file(&temporary);
    match linked {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(e),
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
    fn of_many_makers_one_is_first_and_all_have_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let make = || SigningKey::open_or_create(dir.path()).unwrap();
        let made: Vec<_> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..8).map(|_| scope.spawn(make)).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert_eq!(made.iter().filter(|(_, first)| *first).count(), 1);
        assert!(
            made.iter()
                .all(|(key, _)| key.fingerprint == made[0].0.fingerprint)
        );
        assert_eq!(
            std::fs::read_dir(dir.path().join("registry"))
                .unwrap()
                .count(),
            1
        );
    }

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
