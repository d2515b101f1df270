//! mitmproxy as Debian ships it. It has no cache: all comes from upstream.

use std::path::Path;
use std::process::Command;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use crate::client::Route;
use crate::common::free_port;
use crate::rivals::{Column, Party, Program, find};
use crate::upstream::Place;

const ADDON: &str = include_str!("mitmproxy.py");

pub async fn start(place: &Place) -> Result<Party, String> {
    let mitmdump = find("mitmdump")?;
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let ca = authority(at);
    std::fs::write(at.join("addon.py"), ADDON).unwrap();
    std::fs::write(at.join("upstream-ca.pem"), &place.ca_pem).unwrap();
    let port = free_port();

    let mut command = Command::new(mitmdump);
    command.current_dir(at);
    command.env("BENCH_UPSTREAM_PORT", place.addr.port().to_string());
    command.args(["--quiet", "--listen-host", "127.0.0.1"]);
    command.args(["--listen-port", &port.to_string()]);
    command.args(["--scripts", "addon.py", "--set", "confdir=."]);
    command.args(["--set", "stream_large_bodies=1m"]);
    command.args(["--set", "ssl_verify_upstream_trusted_ca=upstream-ca.pem"]);
    let program = Program::start(folder, command, port).await?;
    let route = Route::through(([127, 0, 0, 1], port).into(), ca.as_bytes());
    let cold = route.clone();
    Ok(Party::of_program(Column::Mitmproxy, program, route, cold))
}

/// Its leaves have its CA's key, so that it must be of P-256. Returns the certificate.
fn authority(at: &Path) -> String {
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name
        .push(DnType::CommonName, "bench mitmproxy CA");
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let both = format!("{}{}", ca.key().serialize_pem(), ca.pem());
    std::fs::write(at.join("mitmproxy-ca.pem"), both).unwrap();
    ca.pem()
}
