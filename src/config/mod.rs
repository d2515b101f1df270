//! What the user asked for: flag over `LARDER_…` variable over config file over default.

pub mod access;
mod args;
mod file;
pub mod limits;
mod parent;
pub mod pattern;
pub mod policy;
mod values;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use access::{Cidr, Tunnels};
pub use args::{CommonArgs, LogFormat, Republished, ServeArgs, ThirdParty, Verify, Wish};
pub use file::File;
pub use limits::Limits;
pub use parent::{NoProxy, Parent, Scheme};
pub use policy::Policy;
pub use values::{Authority, ConnectTo, HostName, Period, Secret, Size};

use crate::error::Exit;

/// The hosts that are intercepted without being asked for.
pub const DEFAULT_INTERCEPT: [&str; 3] = [
    "registry.terraform.io",
    "releases.hashicorp.com",
    "registry.opentofu.org",
];
/// Where `serve` listens without being told.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:3128";

/// Everything settled.
#[derive(Clone, Debug)]
pub struct Config {
    pub data_dir: PathBuf,
    pub log_format: Option<LogFormat>,
    pub listen: Vec<SocketAddr>,
    pub offline: bool,
    /// In bytes; none: as much as the default rule allows.
    pub max_size: Option<u64>,
    /// The default set and what was added.
    pub intercept: Vec<Authority>,
    pub third_party: ThirdParty,
    pub connect_to: Vec<ConnectTo>,
    /// None: the keys that ship with larder
    pub trusted_keys: Vec<PathBuf>,
    pub republished: Republished,
    /// How long a version list that lost most of its versions is not believed
    pub version_list_grace: Duration,
    pub policy: Policy,
    pub allow_from: Vec<Cidr>,
    pub htpasswd: Option<PathBuf>,
    pub client_ca: Option<PathBuf>,
    /// Certificate chain and key for larder's own names
    pub own_certificate: Option<(PathBuf, PathBuf)>,
    pub tunnels: Tunnels,
    pub limits: Limits,
    pub upstream_ca: Vec<PathBuf>,
    /// None: the one that the environment names, if any
    pub upstream_proxy: Option<Parent>,
    /// None: what the environment lists
    pub no_proxy: Option<NoProxy>,
    pub drain_timeout: Duration,
    pub hostnames: Vec<HostName>,
    pub registries: Vec<PrivateRegistry>,
    /// The registries that larder asks for whoever names them in a path
    pub mirror_hosts: Tunnels,
    /// What clients of the mirror get for an archive that is not held
    pub redirect: Redirect,
}

/// A folder of releases that answers as a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrivateRegistry {
    pub host: Authority,
    pub dir: PathBuf,
}

/// What clients of the mirror get for an archive that is not held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Redirect {
    /// Its bytes, as they come
    #[default]
    Never,
    /// 307 to the origin, while it is fetched for the next one
    Temporary,
}

impl std::str::FromStr for Redirect {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "never" => Ok(Self::Never),
            "307" => Ok(Self::Temporary),
            _ => Err("unknown; write \"307\" or \"never\"".into()),
        }
    }
}

impl Config {
    /// Settles flags and variables (already merged by clap) with the config file and the defaults.
    pub fn settle(common: &CommonArgs, serve: &ServeArgs) -> Result<Self, Exit> {
        let file = match Self::file(common) {
            Some((path, required)) => File::read(&path, required)?,
            None => File::default(),
        };
        file.settle(common, serve)
    }

    /// The config file, and whether it must be there (it was named) or may be (it is the user's).
    pub fn file(common: &CommonArgs) -> Option<(PathBuf, bool)> {
        match &common.config {
            Some(path) => Some((path.clone(), true)),
            None => Some((default_config_file()?, false)),
        }
    }

    /// Whether a proxy with this configuration does what was wished for.
    pub fn fulfils(&self, wish: &Wish) -> bool {
        let value = &wish.value;
        match wish.option.as_str() {
            "offline" => *value == self.offline.to_string(),
            "max-size" => self
                .max_size
                .is_some_and(|bytes| *value == bytes.to_string()),
            "verify" => *value == format!("{:?}", self.policy.verify),
            "republished" => *value == format!("{:?}", self.republished),
            "trusted-key" => self
                .trusted_keys
                .iter()
                .any(|path| *value == real(path).display().to_string()),
            "tunnel" => match &self.tunnels {
                Tunnels::Allow => value == "allow",
                Tunnels::Deny => value == "deny",
                Tunnels::Listed(patterns) => patterns.iter().any(|p| *value == p.to_string()),
            },
            "third-party" => *value == format!("{:?}", self.third_party),
            "upstream-proxy" => {
                let parent = self.upstream_proxy.as_ref();
                parent.is_some_and(|parent| *value == parent.to_string())
            }
            "no-proxy" => {
                let list = self.no_proxy.as_ref();
                list.is_some_and(|list| *value == list.to_string())
            }
            "intercept" => self.intercept.iter().any(|a| *value == a.to_string()),
            "connect-to" => self.connect_to.iter().any(|rule| value == rule.text()),
            "upstream-ca" => self
                .upstream_ca
                .iter()
                .any(|path| *value == real(path).display().to_string()),
            "hostname" => self.hostnames.iter().any(|name| value == name.as_str()),
            _ => false,
        }
    }

    /// The registries whose word on archives elsewhere counts for all: those that are intercepted.
    /// What a private registry's folder says of other hosts' archives is for its own clients.
    pub fn trusted_registries(&self) -> HashSet<String> {
        let intercepted = self.intercept.iter();
        let trusted = intercepted.filter(|host| self.registry(host).is_none());
        trusted.map(Authority::in_https_url).collect()
    }

    /// The private registry of that host.
    pub fn registry(&self, host: &Authority) -> Option<&PrivateRegistry> {
        self.registries
            .iter()
            .find(|registry| registry.host == *host)
    }

    /// The private registry that a client means who reached larder as `named`. A host without a port
    /// goes by its name on any port.
    pub fn registry_reached_as(&self, named: &Authority) -> Option<&PrivateRegistry> {
        let by_name = |registry: &&PrivateRegistry| {
            registry.host.port == 443 && registry.host.host == named.host
        };
        self.registry(named)
            .or_else(|| self.registries.iter().find(by_name))
    }

    /// Whether nobody but this machine's users can reach the listeners.
    pub fn loopback_only(&self) -> bool {
        self.listen.iter().all(|addr| addr.ip().is_loopback())
    }
}

/// A path that holds from any working directory.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// A path without links and dots, where it can be told.
fn real(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| absolute(path))
}

fn default_data_dir() -> Option<PathBuf> {
    Some(
        directories::ProjectDirs::from("", "", "larder")?
            .data_dir()
            .to_owned(),
    )
}

fn default_config_file() -> Option<PathBuf> {
    let dirs = directories::ProjectDirs::from("", "", "larder")?;
    Some(dirs.config_dir().join("config.toml"))
}
