//! The CA: its files, what it may vouch for, and who trusts it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;

use super::super::serve;
use super::{Case, Finding};
use crate::ca::bundle::read_pem;
use crate::ca::inspect::{Cert, Seen};
use crate::ca::trust_store::{held, system_bundle};

/// So long before its end it is time to renew it: clients must get the new one.
const SOON: Duration = Duration::from_secs(60 * 24 * 3600);
const RENEW: &str = "larder ca renew";
const SET_UP: &str = "eval \"$(larder env)\"";
/// What `larder env` sets.
const BUNDLES: [&str; 5] = [
    "SSL_CERT_FILE",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
];

pub fn files(case: &Case) -> Vec<Finding> {
    let ca = &case.ca;
    let (cert, key) = (ca.cert_path.display(), ca.key_path.display());
    let anew = format!(
        "put it back from a copy, or remove {} for a new CA (which is to be trusted anew)",
        ca.dir.display()
    );
    if matches!((&ca.cert, &ca.key), (Seen::Absent, Seen::Absent)) {
        return vec![Finding::warn(
            "ca",
            format!("{} holds none yet", ca.dir.display()),
            "nothing to do: the first `larder serve` or `larder run` makes it",
        )];
    }
    let mut findings = Vec::new();
    let mut fail = |found: String, mend: &str| findings.push(Finding::fail("ca", found, mend));
    match &ca.key {
        Seen::Absent => fail(format!("{key} is missing"), &anew),
        Seen::Bad(why) => fail(format!("{key}: {why}"), &anew),
        Seen::There(_) => {}
    }
    match &ca.cert {
        Seen::Absent => fail(format!("{cert} is missing"), RENEW),
        Seen::Bad(why) => fail(format!("{cert}: {why}"), RENEW),
        Seen::There(cert) => {
            if ca.key.get().is_some_and(|key| *key != cert.key) {
                let names = (ca.cert_path.display(), ca.key_path.display());
                fail(format!("{} does not belong to {}", names.0, names.1), RENEW);
            }
        }
    }
    for (path, mode, what) in [(&ca.dir, 0o700, "folder"), (&ca.key_path, 0o600, "key")] {
        let found = fs::metadata(path).map_or(mode, |m| m.permissions().mode() & 0o777);
        if found & 0o077 != 0 {
            fail(
                format!(
                    "the {what} {} is open to other users ({found:o})",
                    path.display()
                ),
                &format!("chmod {mode:o} {}", path.display()),
            );
        }
    }
    if let Some(cert) = ca.cert.get() {
        match validity(cert) {
            Some(finding) => findings.push(finding),
            None if findings.is_empty() => findings.push(Finding::ok(
                "ca",
                format!("{}, valid until {}", cert.name, cert.not_after.date()),
            )),
            None => {}
        }
    }
    findings
}

fn validity(cert: &Cert) -> Option<Finding> {
    let now = SystemTime::now();
    let until = cert.not_after.date();
    if now >= SystemTime::from(cert.not_after) {
        let found = format!("{} expired on {until}", cert.name);
        return Some(Finding::fail("ca", found, RENEW));
    }
    (now + SOON >= SystemTime::from(cert.not_after)).then(|| {
        let found = format!("{} expires soon, on {until}", cert.name);
        Finding::warn("ca", found, RENEW)
    })
}

pub fn constraints(case: &Case) -> Vec<Finding> {
    let check = "name constraints";
    let Some(cert) = case.ca.cert.get() else {
        return Vec::new();
    };
    let names = serve::names(&case.config);
    let mut missing = Vec::new();
    for name in &names {
        match cert.permits(name) {
            Some(true) => {}
            Some(false) => missing.push(name.as_str()),
            None => {
                let found = "the CA has none, so it could vouch for any host";
                return vec![Finding::fail(check, found, RENEW)];
            }
        }
    }
    vec![match missing.is_empty() {
        true => {
            let found = format!("the CA may vouch for all {} hosts", names.len());
            Finding::ok(check, found)
        }
        false => Finding::fail(
            check,
            format!("the CA may not vouch for {}", missing.join(", ")),
            "larder ca renew (with the options of the server), and start larder again",
        ),
    }]
}

/// How a list of roots stands to the CA.
enum Trust {
    Current,
    /// It holds an older certificate over the same key.
    Older,
    No,
}

fn trust(case: &Case, cert: &Cert, bundle: &Path) -> Trust {
    let key = case.ca.public_key().unwrap_or(&cert.key);
    let held = held(bundle, key);
    match held.contains(&cert.der) {
        true => Trust::Current,
        false if held.is_empty() => Trust::No,
        false => Trust::Older,
    }
}

/// The system's trust store, which need not hold it.
pub fn system(case: &Case) -> Vec<Finding> {
    let check = "system trust";
    let Some(cert) = case.ca.cert.get() else {
        return Vec::new();
    };
    if cfg!(target_os = "macos") {
        let found = "the keychains are not looked into";
        return vec![Finding::ok(check, found)];
    }
    let Some(bundle) = system_bundle(&case.root) else {
        let found = "no file with the system's roots is known here";
        return vec![Finding::ok(check, found)];
    };
    let shown = bundle.display();
    vec![match trust(case, cert, &bundle) {
        Trust::Current => Finding::ok(check, format!("{shown} holds the CA")),
        Trust::Older => Finding::warn(
            check,
            format!("{shown} holds an older certificate of the CA"),
            "larder ca install",
        ),
        Trust::No => Finding::ok(
            check,
            format!("{shown} does not hold the CA (only `larder ca install` puts it there)"),
        ),
    }]
}

/// The bundles that this shell's variables name.
pub fn shell(case: &Case) -> Vec<Finding> {
    let check = "shell trust";
    let Some(cert) = case.ca.cert.get() else {
        return Vec::new();
    };
    let set: Vec<_> = BUNDLES
        .into_iter()
        .filter_map(|name| Some((name, PathBuf::from(std::env::var_os(name)?))))
        .filter(|(_, path)| !path.as_os_str().is_empty())
        .collect();
    let file = set.iter().find(|(name, _)| *name == "SSL_CERT_FILE");
    let system = system_bundle(&case.root);
    if file.is_none()
        && !system.is_some_and(|bundle| matches!(trust(case, cert, &bundle), Trust::Current))
    {
        let found =
            "neither SSL_CERT_FILE nor the system's store has this shell's programs trust the CA";
        let mend = format!("{SET_UP}, or larder ca install");
        return vec![Finding::warn(check, found, mend)];
    }
    let mut findings = Vec::new();
    for (name, path) in &set {
        let problem = match trust(case, cert, path) {
            Trust::Current => continue,
            Trust::Older => "holds an older certificate of the CA",
            Trust::No => "does not hold the CA",
        };
        let found = format!("{name} names {}, which {problem}", path.display());
        findings.push(Finding::warn(check, found, SET_UP));
    }
    if let Some((name, path)) = file.filter(|(_, path)| path.starts_with(&case.ca.dir)) {
        let lacking = lacking(case, path);
        if lacking > 0 {
            let path = path.display();
            let found = format!("{name} names {path}, which lacks {lacking} of the system's roots");
            findings.push(Finding::warn(check, found, SET_UP));
        }
    }
    if findings.is_empty() {
        let found = match file {
            Some((name, path)) => format!("{name} names {}, which holds the CA", path.display()),
            None => "the system's store holds the CA".into(),
        };
        findings.push(Finding::ok(check, found));
    }
    findings
}

/// How many of the system's roots a bundle of larder's does not hold: it was made before them.
fn lacking(case: &Case, bundle: &Path) -> usize {
    let roots = |path: &Path| read_pem(path).unwrap_or_default();
    let Some(system) = system_bundle(&case.root) else {
        return 0;
    };
    let held: Vec<CertificateDer<'static>> = roots(bundle);
    let system = roots(&system);
    system.iter().filter(|root| !held.contains(root)).count()
}
