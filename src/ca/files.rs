//! The files of the CA.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::{root_params, write_atomically};
use crate::config::HostName;
use crate::error::Exit;

/// The CA's files, locked against another process that would make them at the same time.
pub struct Files {
    dir: PathBuf,
    pub key: PathBuf,
    pub cert: PathBuf,
    _lock: fs::File,
}

impl Files {
    pub fn lock(data_dir: &Path) -> Result<Self, Exit> {
        let dir = data_dir.join("ca");
        let broken = |what: &str, e: io::Error| {
            Exit::usage(format!(
                "data_dir: {}: {what}: {e}; name a folder you can write to with --data-dir",
                dir.display()
            ))
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|e| broken("cannot be made", e))?;
        let lock = fs::File::open(&dir).map_err(|e| broken("cannot be opened", e))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
            .map_err(|e| broken("cannot be locked", e.into()))?;
        Ok(Self {
            key: dir.join("ca.key"),
            cert: dir.join("ca.pem"),
            dir,
            _lock: lock,
        })
    }

    pub fn issue(&self, key: &KeyPair, names: &[HostName], common_name: &str) -> Result<(), Exit> {
        let cert = root_params(names, common_name)
            .and_then(|params| params.self_signed(key))
            .map_err(|e| Exit::failed(format!("the CA's certificate cannot be made: {e}")))?;
        self.write(&self.cert, &cert.pem(), 0o644)
    }

    pub fn write(&self, path: &Path, text: &str, mode: u32) -> Result<(), Exit> {
        write_atomically(path, text.as_bytes(), mode).map_err(|e| {
            Exit::usage(format!(
                "data_dir: {} cannot be written: {e}; make room or name another folder with --data-dir",
                path.display()
            ))
        })
    }

    pub fn read_key(&self) -> Result<KeyPair, Exit> {
        let bad = |why: String| {
            Exit::usage(format!(
                "CA key {}: {why}; remove the `ca` folder for a new CA (its users must trust it anew)",
                self.key.display()
            ))
        };
        let pem = fs::read_to_string(&self.key).map_err(|e| bad(e.to_string()))?;
        KeyPair::from_pem(&pem).map_err(|e| bad(e.to_string()))
    }

    pub fn read_cert(&self) -> Result<(String, CertificateDer<'static>), Exit> {
        let bad = |why: String| {
            Exit::usage(format!(
                "CA certificate {}: {why}; run `larder ca renew` to issue it again",
                self.cert.display()
            ))
        };
        let pem = fs::read_to_string(&self.cert).map_err(|e| bad(e.to_string()))?;
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| bad(e.to_string()))?;
        Ok((pem, der))
    }

    /// Takes the key out of the reach of other users where something (a copy, say) put it there.
    pub fn tighten(&self) -> Result<(), Exit> {
        for (path, mode) in [(&self.dir, 0o700), (&self.key, 0o600)] {
            let loose = fs::metadata(path).is_ok_and(|m| m.permissions().mode() & 0o077 != 0);
            if loose {
                tracing::warn!(path = %path.display(), "was open to other users; closed it");
                fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|e| {
                    Exit::usage(format!(
                        "data_dir: {} is open to other users and cannot be closed: {e}; chmod it to {mode:o}",
                        path.display()
                    ))
                })?;
            }
        }
        Ok(())
    }
}
