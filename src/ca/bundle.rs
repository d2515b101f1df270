//! Roots: those the system trusts, for dialling upstream and for the bundles given to clients.

use std::collections::HashSet;
use std::env;
use std::path::{Path, PathBuf};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

/// Where systems keep their roots in one file.
pub(super) const SYSTEM_FILES: [&str; 6] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
    "/usr/local/share/certs/ca-root-nss.crt",
];

/// The roots to trust upstream: an inherited `SSL_CERT_FILE`/`SSL_CERT_DIR` or else the system's.
pub fn upstream_roots() -> Vec<CertificateDer<'static>> {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "a system root could not be read");
    }
    found.certs
}

/// The certificates of a PEM file, at least one.
pub fn read_pem(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certs: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .map_err(|e| e.to_string())?
        .collect();
    match certs {
        Ok(certs) if certs.is_empty() => Err("holds no certificate".into()),
        Ok(certs) => Ok(certs),
        Err(e) => Err(e.to_string()),
    }
}

/// System roots, the inherited `SSL_CERT_FILE`'s, and larder's CA, each once, in PEM.
pub fn client_bundle(ca: &CertificateDer<'static>) -> String {
    let mut certs = match SYSTEM_FILES
        .iter()
        .map(Path::new)
        .find(|path| path.exists())
    {
        Some(path) => read_pem(path).unwrap_or_default(),
        None => Vec::new(),
    };
    // Where no such file is (macOS), and where the user replaced or widened the roots.
    certs.extend(upstream_roots());
    certs.push(ca.clone());
    let mut seen = HashSet::new();
    let mut pem = String::new();
    for cert in &certs {
        if seen.insert(cert.as_ref()) {
            pem.push_str(&to_pem(cert));
        }
    }
    pem
}

/// Writes the bundle where clients of this environment can read it, and says where.
///
/// Environments with different inherited roots get files of their own.
pub fn write_client_bundle(data_dir: &Path, bundle: &str) -> std::io::Result<PathBuf> {
    let inherited = env::var_os("SSL_CERT_FILE").or(env::var_os("SSL_CERT_DIR"));
    let name = match inherited {
        None => "bundle.pem".to_owned(),
        Some(_) => format!(
            "bundle-{}.pem",
            crate::digest::Digest::of(bundle.as_bytes()).short(12)
        ),
    };
    let path = data_dir.join("ca").join(name);
    if std::fs::read(&path).is_ok_and(|held| held == bundle.as_bytes()) {
        return Ok(path);
    }
    super::write_atomically(&path, bundle.as_bytes(), 0o644)?;
    Ok(path)
}

fn to_pem(cert: &CertificateDer<'_>) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new("CERTIFICATE", cert.as_ref()), config)
}
