//! A Terraform CLI configuration of larder's own making: its `host` blocks lead the registries
//! to larder over plain HTTP, so that no CA and no proxy is needed. The rest is its user's.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::StatusCode;
use serde_json::{Map, Value, json};
use tokio::time::timeout;

use crate::ca::write_atomically;
use crate::config::Config;
use crate::error::Exit;
use crate::instance::Running;
use crate::terraform::cli_config::{carried, credentials_block, host_block};

/// Hosts whose services are known without asking.
const KNOWN: [&str; 2] = ["registry.terraform.io", "registry.opentofu.org"];
/// An intercepted host that is no registry.
const RELEASES: &str = "releases.hashicorp.com";
/// For a host to say where its services lie.
const DISCOVERY: Duration = Duration::from_secs(8);
/// The line of a file of ours that names its user's own.
const FROM: &str = "# larder: made from ";
const NOT_FOUND: &str = "Terraform's own places";

/// Writes the configuration for a larder at `addr` to `path` (0600: it may hold credentials), and
/// returns what is to be set.
pub async fn write(
    config: &Config,
    addr: SocketAddr,
    running: Option<&Running>,
    path: &Path,
    for_tofu: bool,
) -> Result<Vec<(&'static str, String)>, Exit> {
    let own = UserConfig::find(for_tofu)?;
    let login = running.and_then(|running| running.login.as_deref());
    let mut blocks = String::new();
    let mut hosts = Vec::new();
    for authority in &config.intercept {
        let host = authority.in_https_url();
        if host == RELEASES {
            continue;
        }
        let base = format!("http://{addr}/registry/{host}");
        let services = match (KNOWN.contains(&host.as_str()), running) {
            (false, Some(running)) => services_of(running, &host, &base).await,
            _ => Some(registries(&base)),
        };
        if let Some(services) = services {
            blocks.push_str(&host_block(&host, &services));
            if let Some(login) = login {
                // A URL with a password is none to Terraform.
                blocks.push_str(&credentials_block(&host, login));
            }
            hosts.push(host);
        }
    }
    let mut text = format!(
        "# Made by `larder env --ca-free`; it is written anew each time.\n{FROM}{}\n\n{blocks}",
        own.origin
    );
    let mut set = HashSet::new();
    for (file, content) in &own.files {
        let ours = |word: &str| word == "host" || login.is_some() && word == "credentials";
        let kept = carried(content, &mut set, |word, label| {
            ours(word) && hosts.iter().any(|own| own == label)
        });
        let kept = kept.map_err(|why| {
            Exit::usage(format!(
                "CLI configuration {}: {why}; mend it",
                file.display()
            ))
        })?;
        text.push_str(&format!("\n# {}\n{kept}", file.display()));
    }
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(|e| broken(dir, &e))?;
    }
    write_atomically(path, text.as_bytes(), 0o600).map_err(|e| broken(path, &e))?;
    Ok(vec![(
        "TF_CLI_CONFIG_FILE",
        path.to_string_lossy().into_owned(),
    )])
}

fn broken(path: &Path, e: &std::io::Error) -> Exit {
    Exit::usage(format!(
        "data_dir: {}: {e}; name a folder you can write to with --data-dir",
        path.display()
    ))
}

fn registries(base: &str) -> Map<String, Value> {
    let mut services = Map::new();
    services.insert(
        "providers.v1".into(),
        json!(format!("{base}/v1/providers/")),
    );
    services.insert("modules.v1".into(), json!(format!("{base}/v1/modules/")));
    services
}

/// All services of a host, its registries by larder's pages; none where it has none.
async fn services_of(running: &Running, host: &str, base: &str) -> Option<Map<String, Value>> {
    let path = format!("/registry/{host}/.well-known/terraform.json");
    let asked = timeout(DISCOVERY, super::api::page(running, &path)).await;
    let (status, body) = match asked {
        Ok(Ok(answer)) => answer,
        _ => return Some(registries(base)),
    };
    if status == StatusCode::NOT_FOUND {
        return None;
    }
    let mut services: Map<String, Value> = serde_json::from_slice(&body).unwrap_or_default();
    if !status.is_success() || services.is_empty() {
        return Some(registries(base));
    }
    for (id, value) in registries(base) {
        if services.contains_key(&id) {
            services.insert(id, value);
        }
    }
    Some(services)
}

/// The files that Terraform would read.
struct UserConfig {
    files: Vec<(PathBuf, String)>,
    /// The value of the variable, or that there was none
    origin: String,
}

impl UserConfig {
    fn find(for_tofu: bool) -> Result<Self, Exit> {
        let named = ["TF_CLI_CONFIG_FILE", "TERRAFORM_CONFIG"]
            .iter()
            .filter_map(std::env::var_os)
            .find(|value| !value.is_empty());
        let Some(named) = named.map(PathBuf::from) else {
            return Self::at_home(for_tofu);
        };
        if !named.exists() {
            // As Terraform does.
            eprintln!(
                "larder: TF_CLI_CONFIG_FILE names {}, which is not there",
                named.display()
            );
            return Ok(Self {
                files: Vec::new(),
                origin: named.display().to_string(),
            });
        }
        let content = read(&named)?;
        let origin = content.lines().find_map(|line| line.strip_prefix(FROM));
        match origin.filter(|_| content.starts_with("# Made by `larder env")) {
            Some(NOT_FOUND) => Self::at_home(for_tofu),
            // What larder made is made from something else.
            Some(origin) if Path::new(origin).exists() => Self::of(PathBuf::from(origin)),
            Some(origin) => Ok(Self {
                files: Vec::new(),
                origin: origin.to_owned(),
            }),
            None => Self::of(named),
        }
    }

    fn of(path: PathBuf) -> Result<Self, Exit> {
        let content = read(&path)?;
        let path = std::path::absolute(&path).unwrap_or(path);
        Ok(Self {
            origin: path.display().to_string(),
            files: vec![(path, content)],
        })
    }

    fn at_home(for_tofu: bool) -> Result<Self, Exit> {
        let mut files = Vec::new();
        if let Some(dirs) = directories::BaseDirs::new() {
            let home = dirs.home_dir();
            let mut main = [".terraformrc", ".tofurc"].map(|name| home.join(name));
            if for_tofu {
                main.reverse();
            }
            let mut paths: Vec<PathBuf> = main
                .into_iter()
                .find(|path| path.is_file())
                .into_iter()
                .collect();
            let more = std::fs::read_dir(home.join(".terraform.d"));
            let mut more: Vec<PathBuf> = more
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path())
                .collect();
            more.retain(|path| is_settings(path));
            more.sort();
            paths.extend(more);
            for path in paths {
                let content = read(&path)?;
                files.push((path, content));
            }
        }
        Ok(Self {
            files,
            origin: NOT_FOUND.into(),
        })
    }
}

fn is_settings(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let ignored = name.starts_with('.') || name.ends_with('~');
    !ignored && (name.ends_with(".tfrc") || name.ends_with(".tfrc.json")) && path.is_file()
}

fn read(path: &Path) -> Result<String, Exit> {
    std::fs::read_to_string(path).map_err(|e| {
        Exit::usage(format!(
            "CLI configuration {}: {e}; mend it, or unset TF_CLI_CONFIG_FILE",
            path.display()
        ))
    })
}
