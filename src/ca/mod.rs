//! larder's certificate authority (RFC 5280): one name-constrained root, leaves minted per name.
//!
//! A DNS constraint permits a name and every name below it; this CA mints only for the very names
//! it is asked for, which the caller takes from its own lists.

pub mod bundle;
mod constraints;
mod files;
pub mod inspect;
mod own;
mod tool;
pub mod trust_store;

use std::fs;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use moka::sync::Cache;
use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    NameConstraints, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber,
};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ProducesTickets, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{RootCertStore, ServerConfig};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::config::HostName;
use crate::error::Exit;
use constraints::Permitted;
use files::Files;
use own::OwnCertificate;

const CA_LIFETIME: time::Duration = time::Duration::days(3650);
/// Well below the 90 days at most: a leaf lives in memory only, and is minted anew each day.
const LEAF_LIFETIME: time::Duration = time::Duration::days(30);
const LEAF_REFRESH: Duration = Duration::from_secs(24 * 3600);
/// For clients whose clock is behind.
const BACKDATE: time::Duration = time::Duration::hours(1);
const LEAVES_CACHED: u64 = 1024;

/// The CA in use.
pub struct Ca {
    pem: String,
    der: CertificateDer<'static>,
    not_after: OffsetDateTime,
    issuer: Issuer<'static, KeyPair>,
    permitted: Permitted,
    /// One key for all leaves of this process: it never touches the disk.
    leaf_key: KeyPair,
    provider: Arc<CryptoProvider>,
    ticketer: Arc<dyn ProducesTickets>,
    configs: Cache<HostName, Arc<ServerConfig>>,
    /// Checks the certificates of clients on larder's own names
    clients: Option<Arc<dyn ClientCertVerifier>>,
    /// By name, and how often the operator's certificate was read; none: larder's own leaf
    own_configs: Cache<(HostName, Option<u64>), Arc<ServerConfig>>,
    /// The operator's certificate for larder's own names
    own: Option<OwnCertificate>,
}

impl Ca {
    /// Opens the CA in `data_dir`, or makes one constrained to `names`, localhost and the loopback
    /// addresses. Whoever comes second (another process) finds what the first one made.
    pub fn open_or_create(data_dir: &Path, names: &[HostName]) -> Result<Self, Exit> {
        let files = Files::lock(data_dir)?;
        if !files.cert.exists() {
            let key = if files.key.exists() {
                files.read_key()?
            } else {
                let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
                    .map_err(|e| Exit::failed(format!("the CA's key cannot be made: {e}")))?;
                files.write(&files.key, &key.serialize_pem(), 0o600)?;
                key
            };
            files.issue(&key, names, &subject())?;
        }
        Self::open(&files)
    }

    /// Issues the certificate anew over the same key, for `names`.
    pub fn renew(data_dir: &Path, names: &[HostName]) -> Result<Self, Exit> {
        let files = Files::lock(data_dir)?;
        if !files.key.exists() {
            drop(files);
            return Self::open_or_create(data_dir, names);
        }
        let key = files.read_key()?;
        let subject = files
            .read_cert()
            .ok()
            .and_then(|(_, der)| common_name(&der))
            .unwrap_or_else(subject);
        files.issue(&key, names, &subject)?;
        Self::open(&files)
    }

    fn open(files: &Files) -> Result<Self, Exit> {
        files.tighten()?;
        let key = files.read_key()?;
        let (pem, der) = files.read_cert()?;
        let bad = |why: String| {
            Exit::usage(format!(
                "CA certificate {}: {why}; run `larder ca renew` to issue it again, or remove the `ca` folder for a new CA",
                files.cert.display()
            ))
        };
        let (_, cert) = X509Certificate::from_der(&der).map_err(|e| bad(e.to_string()))?;
        if cert.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(bad(format!("does not belong to {}", files.key.display())));
        }
        let not_after = cert.validity().not_after.to_datetime();
        if not_after <= OffsetDateTime::now_utc() {
            return Err(bad(format!("expired on {}", not_after.date())));
        }
        let permitted = Permitted::of(&cert)
            .ok_or_else(|| bad("has no name constraints, so it could sign for any host".into()))?;
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(|e| bad(e.to_string()))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let internal = |e: &dyn std::fmt::Display| Exit::failed(format!("TLS cannot start: {e}"));
        Ok(Self {
            pem,
            not_after,
            issuer,
            permitted,
            leaf_key: KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| internal(&e))?,
            ticketer: rustls::crypto::aws_lc_rs::Ticketer::new().map_err(|e| internal(&e))?,
            provider,
            configs: Cache::builder()
                .max_capacity(LEAVES_CACHED)
                .time_to_live(LEAF_REFRESH)
                .build(),
            clients: None,
            own: None,
            own_configs: Cache::builder()
                .max_capacity(LEAVES_CACHED)
                .time_to_live(LEAF_REFRESH)
                .build(),
            der,
        })
    }

    /// The certificate, in PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The certificate, in DER.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// Whether the certificate's constraints let it vouch for `name`.
    pub fn permits(&self, name: &HostName) -> bool {
        self.permitted.covers(name)
    }

    /// TLS for a server of that name, with a leaf minted or remembered.
    pub fn server_config(&self, name: &HostName) -> Result<Arc<ServerConfig>, rcgen::Error> {
        self.configs
            .try_get_with_by_ref(name, || self.mint(name, None).map(Arc::new))
            .map_err(|e| (*e).clone())
    }

    /// TLS for one of larder's own names: clients are asked for a certificate, if they are to be.
    pub fn own_config(&self, name: &HostName) -> Result<Arc<ServerConfig>, rcgen::Error> {
        let own = self.own.as_ref().and_then(|own| own.for_name(name));
        if self.clients.is_none() && own.is_none() {
            return self.server_config(name);
        }
        let key = (
            name.clone(),
            own.as_ref().map(|(_, generation)| *generation),
        );
        let clients = self.clients.as_ref();
        let made = || match &own {
            Some((certified, _)) => self.config_of(certified.clone(), clients),
            None => self.mint(name, clients),
        };
        self.own_configs
            .try_get_with(key, || made().map(Arc::new))
            .map_err(|e| (*e).clone())
    }

    /// Whether larder can be reached over TLS under `name`.
    pub fn serves_own(&self, name: &HostName) -> bool {
        let own = self.own.as_ref().and_then(|own| own.for_name(name));
        own.is_some() || self.permits(name)
    }

    /// Has larder's own names served with a certificate of the operator's, as far as it is good for
    /// them.
    pub fn use_certificate(&mut self, cert: &Path, key: &Path) -> Result<(), Exit> {
        self.own = Some(OwnCertificate::open(cert, key, self.provider.clone())?);
        Ok(())
    }

    /// Has clients on larder's own names asked for a certificate by a CA of that file.
    pub fn ask_clients(&mut self, path: &Path) -> Result<(), Exit> {
        let bad = |why: String| {
            Exit::usage(format!(
                "client_ca: {}: {why}; name a file of PEM certificates",
                path.display()
            ))
        };
        let mut roots = RootCertStore::empty();
        for root in bundle::read_pem(path).map_err(bad)? {
            roots.add(root).map_err(|e| bad(e.to_string()))?;
        }
        let provider = self.provider.clone();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
            .allow_unauthenticated()
            .build()
            .map_err(|e| bad(e.to_string()))?;
        self.clients = Some(verifier);
        Ok(())
    }

    fn mint(
        &self,
        name: &HostName,
        clients: Option<&Arc<dyn ClientCertVerifier>>,
    ) -> Result<ServerConfig, rcgen::Error> {
        let now = OffsetDateTime::now_utc();
        let mut params = CertificateParams::default();
        params.not_before = now - BACKDATE;
        params.not_after = (now + LEAF_LIFETIME).min(self.not_after);
        params.serial_number = Some(self.random_serial()?);
        params.distinguished_name = DistinguishedName::new();
        // A common name is at most 64 characters (RFC 5280 appendix A.1); clients read the SAN.
        if name.as_str().len() <= 64 {
            params
                .distinguished_name
                .push(DnType::CommonName, name.as_str());
        }
        params.subject_alt_names = vec![match name.ip() {
            Some(ip) => SanType::IpAddress(ip),
            None => SanType::DnsName(name.as_str().try_into()?),
        }];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(&self.leaf_key, &self.issuer)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.leaf_key.serialize_der()));
        let certified = CertifiedKey::from_der(vec![leaf.der().clone()], key, &self.provider)
            .map_err(|_| rcgen::Error::CouldNotParseKeyPair)?;
        self.config_of(Arc::new(certified), clients)
    }

    fn config_of(
        &self,
        certified: Arc<CertifiedKey>,
        clients: Option<&Arc<dyn ClientCertVerifier>>,
    ) -> Result<ServerConfig, rcgen::Error> {
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map(|config| {
                match clients {
                    Some(clients) => config.with_client_cert_verifier(clients.clone()),
                    None => config.with_no_client_auth(),
                }
                .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
            })
            .map_err(|_| rcgen::Error::CouldNotParseKeyPair)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        config.ticketer = self.ticketer.clone();
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        Ok(config)
    }

    fn random_serial(&self) -> Result<SerialNumber, rcgen::Error> {
        random_serial(&self.provider)
    }
}

/// Writes a file whole or not at all.
pub fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = dir.join(format!(".{name}.{}", std::process::id()));
    let result = (|| {
        let _ = fs::remove_file(&temporary);
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        fs::File::open(dir)?.sync_all()
    })();
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result
}

fn root_params(names: &[HostName], common_name: &str) -> Result<CertificateParams, rcgen::Error> {
    let now = OffsetDateTime::now_utc();
    let mut params = CertificateParams::default();
    params.not_before = now - BACKDATE;
    params.not_after = now + CA_LIFETIME;
    params.serial_number = Some(random_serial(
        &rustls::crypto::aws_lc_rs::default_provider(),
    )?);
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let mut permitted = vec![
        GeneralSubtree::DnsName("localhost".into()),
        GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(
            IpAddr::from([127, 0, 0, 1]),
            32,
        )),
        GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(
            IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
            128,
        )),
    ];
    for name in names {
        permitted.push(match name.ip() {
            Some(ip) => GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(
                ip,
                if ip.is_ipv4() { 32 } else { 128 },
            )),
            None => GeneralSubtree::DnsName(name.as_str().into()),
        });
    }
    params.name_constraints = Some(NameConstraints {
        permitted_subtrees: permitted,
        excluded_subtrees: Vec::new(),
    });
    Ok(params)
}

/// 16 random bytes, positive (RFC 5280 section 4.1.2.2).
fn random_serial(provider: &CryptoProvider) -> Result<SerialNumber, rcgen::Error> {
    let mut bytes = [0u8; 16];
    provider
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| rcgen::Error::RingUnspecified)?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

/// Two CAs on one machine must be told apart in a trust store.
fn subject() -> String {
    let mut bytes = [0u8; 4];
    let random = rustls::crypto::aws_lc_rs::default_provider().secure_random;
    // On failure the name is merely less telling.
    let _ = random.fill(&mut bytes);
    format!("larder CA {:08x}", u32::from_be_bytes(bytes))
}

fn common_name(der: &CertificateDer<'_>) -> Option<String> {
    let (_, cert) = X509Certificate::from_der(der).ok()?;
    let name = cert.subject().iter_common_name().next()?.as_str().ok()?;
    Some(name.to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn name(s: &str) -> HostName {
        s.parse().unwrap()
    }

    #[test]
    fn permits_what_it_is_constrained_to_and_below() {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::open_or_create(dir.path(), &[name("a.example"), name("10.0.0.7")]).unwrap();
        for yes in [
            "a.example",
            "x.a.example",
            "localhost",
            "127.0.0.1",
            "::1",
            "10.0.0.7",
        ] {
            assert!(ca.permits(&name(yes)), "{yes}");
        }
        for no in [
            "example",
            "ba.example",
            "b.example",
            "127.0.0.2",
            "10.0.0.8",
            "::2",
        ] {
            assert!(!ca.permits(&name(no)), "{no}");
        }
    }

    #[test]
    fn renewing_keeps_key_and_subject_and_changes_the_names() {
        let dir = tempfile::tempdir().unwrap();
        let old = Ca::open_or_create(dir.path(), &[name("a.example")]).unwrap();
        let key = fs::read(dir.path().join("ca/ca.key")).unwrap();
        let new = Ca::renew(dir.path(), &[name("b.example")]).unwrap();
        assert_eq!(fs::read(dir.path().join("ca/ca.key")).unwrap(), key);
        assert_eq!(common_name(old.der()), common_name(new.der()));
        assert!(new.permits(&name("b.example")) && !new.permits(&name("a.example")));
    }

    #[test]
    fn broken_files_stop_the_start_with_the_mend() {
        let dir = tempfile::tempdir().unwrap();
        Ca::open_or_create(dir.path(), &[]).unwrap();
        let cert = dir.path().join("ca/ca.pem");
        let good = fs::read_to_string(&cert).unwrap();
        fs::write(&cert, "nonsense").unwrap();
        let exit = Ca::open_or_create(dir.path(), &[]).err().unwrap();
        assert_eq!(exit.code, 2);
        assert!(exit.message.contains("larder ca renew"), "{exit}");
        fs::write(&cert, good).unwrap();
        fs::write(dir.path().join("ca/ca.key"), "nonsense").unwrap();
        assert_eq!(Ca::open_or_create(dir.path(), &[]).err().unwrap().code, 2);
    }

    #[test]
    fn another_cas_certificate_is_refused() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        Ca::open_or_create(a.path(), &[]).unwrap();
        Ca::open_or_create(b.path(), &[]).unwrap();
        fs::copy(a.path().join("ca/ca.pem"), b.path().join("ca/ca.pem")).unwrap();
        let exit = Ca::open_or_create(b.path(), &[]).err().unwrap();
        assert!(exit.message.contains("does not belong"), "{exit}");
    }
}
