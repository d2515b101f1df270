//! nginx as Debian ships it: files from disk over TLS, and a second server that is a cache before the upstream. Or
//! it is the upstream itself.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use crate::client::Route;
use crate::common::{RELEASES, free_port};
use crate::rivals::{Column, Party, Program, find, is_root};
use crate::upstream::{Archive, Place, product};

pub async fn start(place: &Place) -> Result<Party, String> {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let ca = identity(at);
    std::fs::write(at.join("upstream-ca.pem"), &place.ca_pem).unwrap();
    let (files, cache) = (free_port(), free_port());
    let servers = [
        file_server(&[local(files)]),
        cache_server(cache, place.addr.port()),
    ];
    let program = launch(folder, &servers.concat(), cache).await?;
    let route = |port: u16| Route::straight(([127, 0, 0, 1], port).into(), ca.as_bytes());
    Ok(Party::of_program(
        Column::Nginx,
        program,
        route(files),
        route(cache),
    ))
}

/// nginx in the upstream's place: what is published are files.
pub struct Origin {
    pub place: Place,
    program: Program,
}

impl Origin {
    pub async fn start() -> Result<Self, String> {
        let folder = tempfile::tempdir().unwrap();
        let ca_pem = identity(folder.path());
        let addr = local(free_port());
        let free = |last| {
            let named = SocketAddr::from((Ipv4Addr::new(127, 0, 0, last), 443));
            TcpListener::bind(named).is_ok().then_some(named)
        };
        let named = (2..50).find_map(free);
        let addrs: Vec<_> = [addr].into_iter().chain(named).collect();
        let program = launch(folder, &file_server(&addrs), addr.port()).await?;
        let place = Place {
            pid: program.pid(),
            addr,
            named,
            ca_pem,
        };
        Ok(Self { place, program })
    }

    /// A new archive, with its sums beside it.
    pub fn publish(&self, size: usize) -> Archive {
        let (product, archive) = product(size);
        let site = self.program.folder.path().join("site");
        let write = |path: &str, bytes: &[u8]| {
            let file = site.join(&path[1..]);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, bytes).unwrap();
        };
        write(&product.sums_path(), &product.sums);
        write(&archive.path, &product.archive);
        archive
    }

    /// GETs of archives so far, by its access log.
    pub fn fetches(&self) -> usize {
        let log = self.program.folder.path().join("access.log");
        let log = std::fs::read_to_string(log).unwrap_or_default();
        let archive = |line: &&str| line.contains("\"GET ") && line.contains(".zip HTTP/");
        log.lines().filter(archive).count()
    }
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

async fn launch(folder: tempfile::TempDir, servers: &str, port: u16) -> Result<Program, String> {
    let nginx = find("nginx")?;
    let at = folder.path();
    for name in ["site", "temp"] {
        std::fs::create_dir(at.join(name)).unwrap();
    }
    std::fs::write(at.join("nginx.conf"), configuration(servers)).unwrap();
    let mut command = Command::new(nginx);
    command.current_dir(at).arg("-p").arg(at);
    command.args(["-e", "error.log", "-c", "nginx.conf"]);
    Program::start(folder, command, port).await
}

/// Writes a certificate of P-256 for the releases site, and its key; returns the CA's.
fn identity(at: &Path) -> String {
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // OpenSSL takes a leaf of its issuer's name for self-signed.
    ca.distinguished_name.push(DnType::CommonName, "bench CA");
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec![RELEASES.to_owned()]).unwrap();
    let leaf = leaf.signed_by(&key, &ca).unwrap();
    std::fs::write(at.join("leaf.pem"), leaf.pem()).unwrap();
    std::fs::write(at.join("leaf.key"), key.serialize_pem()).unwrap();
    ca.pem()
}

/// What Debian's nginx.conf says of performance, stays; an access log is written, as larder writes a line for each
/// request. More connections than its 768, for the rows that have more.
fn configuration(servers: &str) -> String {
    // Without it workers would be another user, who may not read the folder.
    let user = if is_root() { "user root;" } else { "" };
    format!(
        "{user}
daemon off;
worker_processes auto;
pid nginx.pid;
error_log error.log;
events {{ worker_connections 4096; }}
http {{
    sendfile on;
    tcp_nopush on;
    keepalive_requests 10000;
    types_hash_max_size 2048;
    types {{ application/json json; application/zip zip; }}
    default_type application/octet-stream;
    access_log access.log;
    client_body_temp_path temp/body;
    proxy_temp_path temp/proxy;
    fastcgi_temp_path temp/fastcgi;
    uwsgi_temp_path temp/uwsgi;
    scgi_temp_path temp/scgi;

    ssl_protocols TLSv1.3;
    ssl_conf_command Ciphersuites TLS_AES_256_GCM_SHA384;
    ssl_certificate leaf.pem;
    ssl_certificate_key leaf.key;

{servers}}}
"
    )
}

fn file_server(addrs: &[SocketAddr]) -> String {
    let listen = addrs.iter().map(|addr| format!("listen {addr} ssl;"));
    let listen = listen.collect::<Vec<_>>().join(" ");
    format!("    server {{ {listen} root site; }}\n")
}

fn cache_server(cache: u16, upstream: u16) -> String {
    format!(
        "    proxy_cache_path cache levels=1:2 keys_zone=bench:10m max_size=20g use_temp_path=off;
    server {{
        listen 127.0.0.1:{cache} ssl;
        location / {{
            proxy_pass https://127.0.0.1:{upstream};
            proxy_http_version 1.1;
            proxy_set_header Connection \"\";
            proxy_set_header Host {RELEASES};
            proxy_ssl_server_name on;
            proxy_ssl_name {RELEASES};
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate upstream-ca.pem;
            proxy_ssl_protocols TLSv1.3;
            proxy_ssl_conf_command Ciphersuites TLS_AES_256_GCM_SHA384;
            proxy_cache bench;
            proxy_cache_valid 200 1h;
            proxy_cache_lock on;
            proxy_cache_lock_age 60s;
            proxy_cache_lock_timeout 60s;
        }}
    }}
"
    )
}
