//! The CA's files as they lie there: nothing is made, mended or locked.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{Permitted, common_name};
use crate::config::HostName;
use crate::digest::Digest;

/// A key's public half: what stays the same when a certificate is issued again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey(Vec<u8>);

impl PublicKey {
    /// The key that a certificate is for.
    pub fn of(der: &CertificateDer<'_>) -> Option<Self> {
        let (_, cert) = X509Certificate::from_der(der).ok()?;
        Some(Self(cert.public_key().subject_public_key.data.to_vec()))
    }

    /// Sixteen hexadecimal digits of its SHA-256.
    pub fn fingerprint(&self) -> String {
        Digest::of(&self.0).short(16)
    }
}

/// A file that may not be there, or not be what it should be.
pub enum Seen<T> {
    Absent,
    /// Why it cannot be used
    Bad(String),
    There(T),
}

impl<T> Seen<T> {
    /// What is there, if it is there and good.
    pub fn get(&self) -> Option<&T> {
        match self {
            Self::There(value) => Some(value),
            _ => None,
        }
    }
}

/// The CA's files of one data dir.
pub struct Inspection {
    pub dir: PathBuf,
    pub cert_path: PathBuf,
    pub key_path: PathBuf,
    pub cert: Seen<Cert>,
    pub key: Seen<PublicKey>,
}

/// What the certificate says.
pub struct Cert {
    pub der: CertificateDer<'static>,
    pub name: String,
    pub key: PublicKey,
    pub not_before: OffsetDateTime,
    pub not_after: OffsetDateTime,
    permitted: Option<Permitted>,
}

impl Cert {
    /// Whether its name constraints let it vouch for `name`. None: it has no constraints.
    pub fn permits(&self, name: &HostName) -> Option<bool> {
        Some(self.permitted.as_ref()?.covers(name))
    }
}

impl Inspection {
    pub fn of(data_dir: &Path) -> Self {
        let dir = data_dir.join("ca");
        let (cert_path, key_path) = (dir.join("ca.pem"), dir.join("ca.key"));
        Self {
            cert: read(&cert_path, cert),
            key: read(&key_path, |pem| {
                let key = KeyPair::from_pem(pem).map_err(|e| e.to_string())?;
                Ok(PublicKey(key.public_key_raw().to_vec()))
            }),
            dir,
            cert_path,
            key_path,
        }
    }

    /// The key that makes this CA what it is, by either file.
    pub fn public_key(&self) -> Option<&PublicKey> {
        let of_cert = || self.cert.get().map(|cert| &cert.key);
        self.key.get().or_else(of_cert)
    }
}

fn read<T>(path: &Path, parse: impl Fn(&str) -> Result<T, String>) -> Seen<T> {
    match fs::read_to_string(path) {
        Ok(text) => parse(&text).map_or_else(Seen::Bad, Seen::There),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Seen::Absent,
        Err(e) => Seen::Bad(e.to_string()),
    }
}

fn cert(pem: &str) -> Result<Cert, String> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| e.to_string())?;
    let (_, parsed) = X509Certificate::from_der(&der).map_err(|e| e.to_string())?;
    let validity = parsed.validity();
    Ok(Cert {
        name: common_name(&der).unwrap_or_default(),
        key: PublicKey(parsed.public_key().subject_public_key.data.to_vec()),
        not_before: validity.not_before.to_datetime(),
        not_after: validity.not_after.to_datetime(),
        permitted: Permitted::of(&parsed),
        der: der.clone(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::Ca;
    use super::*;

    #[test]
    fn looking_makes_nothing_and_sees_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let seen = Inspection::of(dir.path());
        assert!(matches!(seen.cert, Seen::Absent) && seen.public_key().is_none());
        assert!(!dir.path().join("ca").exists());

        let ca = Ca::open_or_create(dir.path(), &["a.example".parse().unwrap()]).unwrap();
        let seen = Inspection::of(dir.path());
        let cert = seen.cert.get().unwrap();
        assert_eq!(cert.der, *ca.der());
        assert_eq!(cert.permits(&"a.example".parse().unwrap()), Some(true));
        assert_eq!(cert.permits(&"b.example".parse().unwrap()), Some(false));
        assert_eq!(seen.public_key(), Some(&cert.key));
        assert_eq!(cert.key.fingerprint().len(), 16);

        fs::write(&seen.key_path, "nonsense").unwrap();
        let seen = Inspection::of(dir.path());
        assert!(matches!(seen.key, Seen::Bad(_)));
        assert_eq!(seen.public_key(), PublicKey::of(ca.der()).as_ref());
    }
}
