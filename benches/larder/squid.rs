//! squid as Debian ships it with OpenSSL: a forward proxy that intercepts, with a disk cache.

use std::path::Path;
use std::process::Command;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use crate::client::Route;
use crate::common::{RELEASES, free_port};
use crate::rivals::{Column, Party, Program, find, is_root, last_lines};
use crate::upstream::Place;

const CERTGEN: &str = "/usr/lib/squid/security_file_certgen";

/// Started as root it becomes Debian's user for it: it refuses to stay root.
const USER: &str = "proxy";

pub async fn start(place: &Place) -> Result<Party, String> {
    let squid = find("squid")?;
    if !Path::new(CERTGEN).is_file() {
        return Err("squid-openssl is not installed".to_owned());
    }
    // It cannot be told of another port than the client asks for.
    let Some(named) = place.named else {
        return Err("port 443 of loopback may not be bound".to_owned());
    };
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let ca = authority(at);
    std::fs::write(at.join("upstream-ca.pem"), &place.ca_pem).unwrap();
    std::fs::write(at.join("hosts"), format!("{} {RELEASES}\n", named.ip())).unwrap();
    let port = free_port();
    std::fs::write(at.join("squid.conf"), configuration(at, port)).unwrap();

    let database = at.join("leaves");
    let mut leaves = Command::new(CERTGEN);
    leaves
        .arg("-c")
        .arg("-s")
        .arg(&database)
        .args(["-M", "4MB"]);
    run(leaves, "security_file_certgen")?;
    if is_root() {
        let mut give = Command::new("chown");
        give.arg("-R").arg(USER).arg(at);
        run(give, "chown")?;
    }
    // Its shared memory is named after this; that of another squid is in the way.
    let service = format!("bench{}", std::process::id());
    let base = || {
        let mut command = Command::new(&squid);
        command.current_dir(at).args(["-N", "-f", "squid.conf"]);
        command.args(["-n", &service]);
        command
    };
    let mut folders = base();
    folders.arg("-z");
    run(folders, "squid -z")?;
    let command = base();
    let program = Program::start(folder, command, port).await?;
    let route = Route::through(([127, 0, 0, 1], port).into(), ca.as_bytes());
    let cold = route.clone();
    Ok(Party::of_program(Column::Squid, program, route, cold))
}

fn run(mut command: Command, what: &str) -> Result<(), String> {
    let output = command.output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{what}: {}", last_lines(&said))),
    }
}

/// Its leaves have its CA's key, so that it must be of P-256. Returns the certificate.
fn authority(at: &Path) -> String {
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name
        .push(DnType::CommonName, "bench squid CA");
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let both = format!("{}{}", ca.pem(), ca.key().serialize_pem());
    std::fs::write(at.join("ca.pem"), both).unwrap();
    ca.pem()
}

fn configuration(at: &Path, port: u16) -> String {
    let user = match is_root() {
        true => format!("cache_effective_user {USER}"),
        false => String::new(),
    };
    let at = at.display();
    format!(
        "{user}
http_port 127.0.0.1:{port} ssl-bump generate-host-certificates=on dynamic_cert_mem_cache_size=4MB \
tls-cert={at}/ca.pem options=NO_SSLv3
sslcrtd_program {CERTGEN} -s {at}/leaves -M 4MB
acl step1 at_step SslBump1
ssl_bump peek step1
ssl_bump bump all
tls_outgoing_options cafile={at}/upstream-ca.pem
hosts_file {at}/hosts
http_access allow localhost
http_access deny all
cache_dir aufs {at}/cache 20000 16 256
maximum_object_size 4 GB
collapsed_forwarding on
max_filedescriptors 16384
access_log stdio:{at}/access.log
cache_log {at}/cache.log
cache_store_log none
pid_filename {at}/squid.pid
coredump_dir {at}
shutdown_lifetime 0 seconds
"
    )
}
