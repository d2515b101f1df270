//! The running larder, and whether this shell's programs go through it.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Limited};
use hyper::{Method, StatusCode};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::net::TcpStream;
use tokio::time::timeout;
use url::Url;

use super::super::{api, serve};
use super::{Case, Finding};
use crate::config::NoProxy;
use crate::config::{Authority, Config};
use crate::instance::Running;

const PATIENCE: Duration = Duration::from_secs(2);
const PAGE_LIMIT: usize = 64 << 10;
const SET_UP: &str = "eval \"$(larder env)\"";

/// What a running larder says.
pub struct Answers {
    ready: StatusCode,
    /// The certificate that it serves with
    ca: Option<CertificateDer<'static>>,
}

/// Asks whoever has the data dir.
pub async fn ask(running: Option<&Running>) -> Option<Result<Answers, String>> {
    let running = running?;
    let asking = async {
        let (ready, _) = page(running, "/readyz").await?;
        let (_, pem) = page(running, "/ca.pem").await?;
        let ca = CertificateDer::from_pem_slice(&pem).ok();
        Ok(Answers { ready, ca })
    };
    let silent = |_| Err(format!("says nothing for {} s", PATIENCE.as_secs()));
    Some(timeout(PATIENCE, asking).await.unwrap_or_else(silent))
}

async fn page(running: &Running, path: &str) -> Result<(StatusCode, Bytes), String> {
    let response = api::send(running, Method::GET, path, String::new()).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), PAGE_LIMIT).collect();
    Ok((status, body.await.map_err(|e| e.to_string())?.to_bytes()))
}

/// The addresses at which somebody listens although nobody has the data dir.
pub async fn taken(config: &Config, running: Option<&Running>) -> Vec<SocketAddr> {
    let mut taken = Vec::new();
    if running.is_some() {
        return taken;
    }
    let fixed = config.listen.iter().filter(|addr| addr.port() != 0);
    // Nobody has many listeners, and this is not to take long.
    for addr in fixed.take(4) {
        let mut at = *addr;
        if at.ip().is_unspecified() {
            at.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
        }
        let dial = timeout(PATIENCE / 4, TcpStream::connect(at)).await;
        if dial.is_ok_and(|stream| stream.is_ok()) {
            taken.push(*addr);
        }
    }
    taken
}

pub fn server(case: &Case) -> Vec<Finding> {
    let Some(running) = &case.running else {
        return not_running(case);
    };
    let process = match running.pid {
        0 => "another process".to_owned(),
        pid => format!("process {pid}"),
    };
    let stop = "stop it, and start `larder serve` again";
    let addr = match running.addr {
        Some(addr) => addr.to_string(),
        None => {
            let found = format!("{process} has the data dir, but does not listen (yet)");
            let mend = format!("look again in a moment; if it stays so, {stop}");
            return vec![Finding::fail("proxy", found, mend)];
        }
    };
    let answers = match &case.server {
        Some(Ok(answers)) => answers,
        Some(Err(why)) => {
            let found = format!("{process} has the data dir, but at {addr} it {why}");
            return vec![Finding::fail("proxy", found, stop)];
        }
        None => return Vec::new(),
    };
    let mut findings = Vec::new();
    if !answers.ready.is_success() {
        let found = format!("{process} at {addr} answers {} to /readyz", answers.ready);
        findings.push(Finding::fail("proxy", found, "see its log"));
    }
    let version = env!("CARGO_PKG_VERSION");
    if running.version != version {
        let other = match running.version.as_str() {
            "" => "another version",
            version => version,
        };
        let found = format!("{process} at {addr} is larder {other}, and this is {version}");
        findings.push(Finding::warn("proxy", found, stop));
    }
    let on_disk = case.ca.cert.get().map(|cert| &cert.der);
    if on_disk.is_some() && answers.ca.is_some() && answers.ca.as_ref() != on_disk {
        let found = format!("{process} at {addr} serves with an older CA certificate");
        findings.push(Finding::warn("proxy", found, stop));
    }
    if findings.is_empty() {
        let kind = match running.until_unused {
            true => ", the proxy of a `larder run`,",
            false => "",
        };
        let found = format!("{process}{kind} serves at {addr}");
        findings.push(Finding::ok("proxy", found));
    }
    findings
}

fn not_running(case: &Case) -> Vec<Finding> {
    if let Some(addr) = case.taken.first() {
        return vec![Finding::warn(
            "proxy",
            format!(
                "nobody serves this data dir, and another program (or a larder with another data dir) has {addr}"
            ),
            "name another address with --listen, or stop that program",
        )];
    }
    vec![Finding::warn(
        "proxy",
        "nobody serves this data dir",
        "start `larder serve` (`larder run -- CMD` starts one for itself)",
    )]
}

/// Whether what is started from this shell goes to larder.
pub fn environment(case: &Case) -> Vec<Finding> {
    let check = "environment";
    let served = case.running.as_ref().filter(|r| !r.until_unused);
    let own = match served.and_then(|running| running.addr) {
        Some(addr) => vec![addr],
        None => case.config.listen.clone(),
    };
    // Go reads the first of each pair first, curl the lower-case one alone.
    let set: Vec<_> = ["HTTPS_PROXY", "https_proxy"]
        .into_iter()
        .filter_map(|name| Some((name, std::env::var(name).ok()?)))
        .filter(|(_, value)| !value.is_empty())
        .collect();
    if set.is_empty() {
        return vec![match served {
            Some(_) => {
                let found = "HTTPS_PROXY is not set: this shell's programs go past larder";
                Finding::warn(check, found, SET_UP)
            }
            None => Finding::ok(check, "no proxy is set; `larder run -- CMD` sets its own"),
        }];
    }
    let mut findings = Vec::new();
    for (name, value) in &set {
        let target = authority(value);
        let ours = target
            .as_ref()
            .is_some_and(|target| serve::is_own(target, &case.config, &own));
        // The value itself may hold a password.
        let shown = target.map_or("nothing that is an address".into(), |t| t.to_string());
        match (ours, served) {
            (true, Some(_)) => {}
            (true, None) => findings.push(Finding::fail(
                check,
                format!("{name} leads to {shown}, where no larder serves this data dir"),
                format!("start `larder serve`, or `unset {name}`"),
            )),
            (false, _) => findings.push(Finding::warn(
                check,
                format!("{name} leads to {shown}, not to this larder"),
                SET_UP,
            )),
        }
    }
    findings.extend(exempted(case));
    if findings.is_empty() {
        findings.push(match set[..] {
            [(name, _)] => Finding::warn(
                check,
                format!("{name} alone is set; some programs read the other spelling"),
                SET_UP,
            ),
            _ => Finding::ok(check, "HTTPS_PROXY leads to this larder"),
        });
    }
    findings
}

fn exempted(case: &Case) -> Option<Finding> {
    let names = ["NO_PROXY", "no_proxy"].into_iter();
    let mut lists =
        names.filter_map(|name| Some((name, NoProxy::inherited(&std::env::var(name).ok()?).0)));
    lists.find_map(|(name, list)| {
        let host = case.config.intercept.iter().find(|a| {
            // Loopback never goes to a proxy, whatever the list says.
            !NoProxy::default().covers(a) && list.covers(a)
        })?;
        Some(Finding::warn(
            "environment",
            format!("{name} has {} go past larder", host.host),
            format!("take what covers {} out of {name}", host.host),
        ))
    })
}

fn authority(proxy: &str) -> Option<Authority> {
    let url = match proxy.contains("://") {
        true => Url::parse(proxy),
        false => Url::parse(&format!("http://{proxy}")),
    };
    Authority::of(&url.ok()?)
}
