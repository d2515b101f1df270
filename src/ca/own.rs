//! A certificate of the operator's own for larder's own names, read anew when its files change.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;

use crate::config::HostName;
use crate::error::Exit;
use crate::stamp::Stamp;
use crate::sync::lock;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// A certificate chain and its key.
pub struct OwnCertificate {
    cert: PathBuf,
    key: PathBuf,
    provider: Arc<CryptoProvider>,
    held: Mutex<Held>,
}

struct Held {
    certified: Arc<CertifiedKey>,
    stamp: [Option<Stamp>; 2],
    looked: Instant,
    /// Grows with each reading
    generation: u64,
}

impl OwnCertificate {
    /// # Errors
    /// When the files cannot be read, or do not belong together.
    pub fn open(cert: &Path, key: &Path, provider: Arc<CryptoProvider>) -> Result<Self, Exit> {
        let stamp = [Stamp::of(cert).ok(), Stamp::of(key).ok()];
        let certified = read(cert, key, &provider).map_err(Exit::usage)?;
        Ok(Self {
            cert: cert.to_owned(),
            key: key.to_owned(),
            provider,
            held: Mutex::new(Held {
                certified: Arc::new(certified),
                stamp,
                looked: Instant::now(),
                generation: 0,
            }),
        })
    }

    /// The certificate, if it is good for `name`, and how often it was read before. Files that turned
    /// bad change nothing.
    pub fn for_name(&self, name: &HostName) -> Option<(Arc<CertifiedKey>, u64)> {
        let (certified, generation) = self.current();
        let leaf = certified.end_entity_cert().ok()?;
        let leaf = ParsedCertificate::try_from(leaf).ok()?;
        let name = ServerName::try_from(name.as_str()).ok()?;
        rustls::client::verify_server_name(&leaf, &name).ok()?;
        Some((certified, generation))
    }

    fn current(&self) -> (Arc<CertifiedKey>, u64) {
        let mut held = lock(&self.held);
        if held.looked.elapsed() > LOOK {
            held.looked = Instant::now();
            let now = [Stamp::of(&self.cert).ok(), Stamp::of(&self.key).ok()];
            if now != held.stamp {
                match read(&self.cert, &self.key, &self.provider) {
                    Ok(certified) => {
                        tracing::info!(cert = %self.cert.display(), "read the certificate anew");
                        held.certified = Arc::new(certified);
                        held.generation += 1;
                        held.stamp = now;
                    }
                    // The other of the two may follow in a moment.
                    Err(why) => {
                        tracing::warn!(
                            why,
                            "the certificate cannot be read anew; it stays as it was"
                        );
                    }
                }
            }
        }
        (held.certified.clone(), held.generation)
    }
}

fn read(cert: &Path, key: &Path, provider: &CryptoProvider) -> Result<CertifiedKey, String> {
    let chain =
        CertificateDer::pem_file_iter(cert).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = chain.map_err(|e| format!("tls_cert: {}: {e}", cert.display()))?;
    if chain.is_empty() {
        return Err(format!(
            "tls_cert: {}: holds no certificate; name a file in PEM form",
            cert.display()
        ));
    }
    let private = PrivateKeyDer::from_pem_file(key)
        .map_err(|e| format!("tls_key: {}: {e}; name a file in PEM form", key.display()))?;
    let certified = CertifiedKey::from_der(chain, private, provider);
    certified.map_err(|e| {
        format!(
            "tls_key: {}: {e}; it must be the key of {}",
            key.display(),
            cert.display()
        )
    })
}
