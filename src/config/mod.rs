//! What the user asked for: flag over `LARDER_…` variable over config file over default.

mod values;

use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::{ArgAction, Args, ValueEnum};
use serde::{Deserialize, Serialize};

pub use values::{Authority, ConnectTo, HostName, Parent, Period, Secret, Size};

use crate::error::Exit;

/// The hosts that are intercepted without being asked for.
pub const DEFAULT_INTERCEPT: [&str; 3] = [
    "registry.terraform.io",
    "releases.hashicorp.com",
    "registry.opentofu.org",
];
/// Where `serve` listens without being told.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:3128";

/// Options of every command.
#[derive(Args, Clone, Debug, Default)]
pub struct CommonArgs {
    /// Configuration file [default: config.toml in the user's configuration folder for larder]
    #[arg(long, env = "LARDER_CONFIG", value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
    /// Folder of the CA and the cache [default: the user's data folder for larder]
    #[arg(long, env = "LARDER_DATA_DIR", value_name = "DIR", global = true)]
    pub data_dir: Option<PathBuf>,
    /// Say more (twice: everything)
    #[arg(short, long, env = "LARDER_VERBOSE", action = ArgAction::Count, global = true)]
    pub verbose: u8,
    /// Say less (twice: errors alone)
    #[arg(short, long, env = "LARDER_QUIET", action = ArgAction::Count, global = true)]
    pub quiet: u8,
    /// Form of the log [default: text on a terminal, else json]
    #[arg(long, env = "LARDER_LOG_FORMAT", value_name = "FORMAT", global = true)]
    pub log_format: Option<LogFormat>,
}

/// Options of `serve`, which `run` obeys too.
#[derive(Args, Clone, Debug, Default)]
pub struct ServeArgs {
    /// Address to listen on; port 0 picks one and logs it [default: 127.0.0.1:3128]
    #[arg(
        long,
        env = "LARDER_LISTEN",
        value_name = "ADDR",
        value_delimiter = ','
    )]
    pub listen: Vec<SocketAddr>,
    /// Answer from what is held; never connect upstream
    #[arg(long, env = "LARDER_OFFLINE", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", value_parser = clap::builder::BoolishValueParser::new())]
    pub offline: Option<bool>,
    /// What an archive must pass before it is completed to a client [default: checksum]
    #[arg(long, env = "LARDER_VERIFY", value_name = "HOW")]
    pub verify: Option<Verify>,
    /// Most bytes the cache may hold, such as 50GiB [default: 50GiB, or half of free and held together if that is less]
    #[arg(long, env = "LARDER_MAX_SIZE", value_name = "SIZE")]
    pub max_size: Option<Size>,
    /// A further host to intercept
    #[arg(
        long,
        env = "LARDER_INTERCEPT",
        value_name = "HOST[:PORT]",
        value_delimiter = ','
    )]
    pub intercept: Vec<Authority>,
    /// Providers whose archives lie on hosts that are not intercepted [default: rewrite]
    #[arg(long, env = "LARDER_THIRD_PARTY", value_name = "HOW")]
    pub third_party: Option<ThirdParty>,
    /// Connect to HOST2:PORT2 where HOST1:PORT1 is asked for, as curl does; an empty part matches any
    #[arg(
        long,
        env = "LARDER_CONNECT_TO",
        value_name = "HOST1:PORT1:HOST2:PORT2",
        value_delimiter = ','
    )]
    pub connect_to: Vec<ConnectTo>,
    /// PEM file of further CAs to trust upstream
    #[arg(
        long,
        env = "LARDER_UPSTREAM_CA",
        value_name = "FILE",
        value_delimiter = ','
    )]
    pub upstream_ca: Vec<PathBuf>,
    /// Parent proxy, http://[USER:PASSWORD@]HOST:PORT [default: HTTPS_PROXY and NO_PROXY as inherited]
    #[arg(
        long,
        env = "LARDER_UPSTREAM_PROXY",
        value_name = "URL",
        hide_env_values = true
    )]
    pub upstream_proxy: Option<Secret>,
    /// How long running downloads may go on after SIGTERM [default: 10s]
    #[arg(long, env = "LARDER_DRAIN_TIMEOUT", value_name = "TIME")]
    pub drain_timeout: Option<Period>,
    /// A name under which larder itself is reached over TLS
    #[arg(
        long,
        env = "LARDER_HOSTNAME",
        value_name = "NAME",
        value_delimiter = ','
    )]
    pub hostname: Vec<HostName>,
}

impl CommonArgs {
    /// As arguments again, but for the data dir and the log's form.
    pub fn to_args(&self) -> Vec<OsString> {
        let mut args = Vec::new();
        if let Some(config) = &self.config {
            args.extend(["--config".into(), absolute(config).into()]);
        }
        args.extend((0..self.verbose).map(|_| "--verbose".into()));
        args.extend((0..self.quiet).map(|_| "--quiet".into()));
        args
    }
}

impl ServeArgs {
    /// As arguments again, but for the listener, for the parent proxy, which may hold a password,
    /// and for the CAs, whose paths depend on the working directory.
    pub fn to_args(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = Vec::new();
        if let Some(offline) = self.offline {
            args.push(format!("--offline={offline}").into());
        }
        let mut add = |name: &str, value: OsString| args.extend([name.into(), value]);
        if let Some(Size(bytes)) = self.max_size {
            add("--max-size", bytes.to_string().into());
        }
        if let Some(Period(time)) = self.drain_timeout {
            add("--drain-timeout", format!("{}ms", time.as_millis()).into());
        }
        if let Some(how) = self.third_party.and_then(|how| how.to_possible_value()) {
            add("--third-party", how.get_name().into());
        }
        if let Some(how) = self.verify.and_then(|how| how.to_possible_value()) {
            add("--verify", how.get_name().into());
        }
        for authority in &self.intercept {
            add("--intercept", authority.to_string().into());
        }
        for rule in &self.connect_to {
            add("--connect-to", rule.text().into());
        }
        for name in &self.hostname {
            add("--hostname", name.to_string().into());
        }
        args
    }
}

impl ServeArgs {
    /// What was asked for by flag or variable, but for the listener and the drain time: a running
    /// proxy serves it only if it has the same.
    pub fn wishes(&self) -> Vec<Wish> {
        let mut wishes = Vec::new();
        let mut wish = |option: &str, value: String| {
            let option = option.to_owned();
            wishes.push(Wish { option, value });
        };
        if let Some(offline) = self.offline {
            wish("offline", offline.to_string());
        }
        if let Some(Size(bytes)) = self.max_size {
            wish("max-size", bytes.to_string());
        }
        if let Some(how) = self.third_party {
            wish("third-party", format!("{how:?}"));
        }
        if let Some(parent) = self
            .upstream_proxy
            .as_ref()
            .and_then(|p| p.0.parse::<Parent>().ok())
        {
            wish("upstream-proxy", parent.authority.to_string());
        }
        for authority in &self.intercept {
            wish("intercept", authority.to_string());
        }
        for rule in &self.connect_to {
            wish("connect-to", rule.text().to_owned());
        }
        for path in &self.upstream_ca {
            wish("upstream-ca", real(path).display().to_string());
        }
        for name in &self.hostname {
            wish("hostname", name.to_string());
        }
        wishes
    }
}

/// An option as somebody asked for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    pub option: String,
    pub value: String,
}

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
    pub upstream_ca: Vec<PathBuf>,
    pub upstream_proxy: Option<Parent>,
    pub drain_timeout: Duration,
    pub hostnames: Vec<HostName>,
}

impl Config {
    /// Settles flags and variables (already merged by clap) with the config file and the defaults.
    pub fn settle(common: &CommonArgs, serve: &ServeArgs) -> Result<Self, Exit> {
        let (path, required) = match &common.config {
            Some(path) => (Some(path.clone()), true),
            None => (default_config_file(), false),
        };
        let file = match path {
            Some(path) => File::read(&path, required)?,
            None => File::default(),
        };
        file.settle(common, serve)
    }

    /// Whether a proxy with this configuration does what was wished for.
    pub fn fulfils(&self, wish: &Wish) -> bool {
        let value = &wish.value;
        match wish.option.as_str() {
            "offline" => *value == self.offline.to_string(),
            "max-size" => self
                .max_size
                .is_some_and(|bytes| *value == bytes.to_string()),
            "third-party" => *value == format!("{:?}", self.third_party),
            "upstream-proxy" => {
                let parent = self.upstream_proxy.as_ref();
                parent.is_some_and(|parent| *value == parent.authority.to_string())
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

    /// Whether nobody but this machine's users can reach the listeners.
    pub fn loopback_only(&self) -> bool {
        self.listen.iter().all(|addr| addr.ip().is_loopback())
    }
}

/// The config file as written: each value as text, parsed by the same rules as its flag.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(skip)]
    path: PathBuf,
    data_dir: Option<PathBuf>,
    log_format: Option<String>,
    listen: Option<OneOrMore>,
    offline: Option<bool>,
    verify: Option<String>,
    max_size: Option<String>,
    intercept: Option<OneOrMore>,
    third_party: Option<String>,
    connect_to: Option<OneOrMore>,
    upstream_ca: Option<OneOrMore>,
    upstream_proxy: Option<String>,
    drain_timeout: Option<String>,
    hostname: Option<OneOrMore>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl File {
    fn read(path: &Path, required: bool) -> Result<Self, Exit> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !required => {
                return Ok(Self::default());
            }
            Err(e) => {
                return Err(Exit::usage(format!(
                    "config file {}: cannot be read: {e}; name a readable file with --config",
                    path.display()
                )));
            }
        };
        let mut file = Self::parse(&text)
            .map_err(|e| Exit::usage(format!("config file {}: {e}", path.display())))?;
        file.path = path.to_owned();
        Ok(file)
    }

    fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|e: toml::de::Error| {
            // Without the line itself: it may hold a password.
            let start = e.span().map_or(0, |span| span.start);
            let line = text[..start.min(text.len())].matches('\n').count() + 1;
            let words = text.lines().nth(line - 1).unwrap_or_default();
            let secret = words.contains("proxy") || words.contains('@');
            let shown = if secret { "" } else { words.trim() };
            format!("line {line}: {shown}: {}; mend it; `larder serve --help` names the keys (in snake case) and their values", e.message())
        })
    }

    fn settle(self, common: &CommonArgs, serve: &ServeArgs) -> Result<Config, Exit> {
        if serve
            .verify
            .map_or_else(|| self.one("verify", &self.verify), |v| Ok(Some(v)))?
            == Some(Verify::Signature)
        {
            return Err(Exit::usage(
                "verify: value `signature` is not available in this version; use `checksum`",
            ));
        }
        let data_dir = common
            .data_dir
            .clone()
            .or_else(|| self.data_dir.clone())
            .or_else(default_data_dir)
            .ok_or_else(|| {
                Exit::usage("data_dir: no home folder to put it in; name one with --data-dir")
            })?;
        let mut listen = self.many("listen", &serve.listen, &self.listen)?;
        if listen.is_empty() {
            listen.push(DEFAULT_LISTEN.parse().expect("a literal socket address"));
        }
        let mut intercept: Vec<Authority> = DEFAULT_INTERCEPT
            .iter()
            .map(|host| host.parse().expect("a literal host name"))
            .collect();
        for more in self.many("intercept", &serve.intercept, &self.intercept)? {
            if !intercept.contains(&more) {
                intercept.push(more);
            }
        }
        let upstream_ca = if serve.upstream_ca.is_empty() {
            self.upstream_ca.as_ref().map_or_else(Vec::new, |list| {
                list.values().iter().map(PathBuf::from).collect()
            })
        } else {
            serve.upstream_ca.clone()
        };
        Ok(Config {
            data_dir: std::path::absolute(&data_dir)
                .map_err(|e| Exit::usage(format!("data_dir: {}: {e}", data_dir.display())))?,
            log_format: match common.log_format {
                Some(format) => Some(format),
                None => self.one("log_format", &self.log_format)?,
            },
            listen,
            offline: serve.offline.or(self.offline).unwrap_or(false),
            max_size: match serve.max_size {
                Some(size) => Some(size),
                None => self.one("max_size", &self.max_size)?,
            }
            .map(|size| size.0),
            intercept,
            third_party: match serve.third_party {
                Some(how) => how,
                None => self
                    .one("third_party", &self.third_party)?
                    .unwrap_or_default(),
            },
            connect_to: self.many("connect_to", &serve.connect_to, &self.connect_to)?,
            upstream_ca: upstream_ca.iter().map(|path| absolute(path)).collect(),
            upstream_proxy: match &serve.upstream_proxy {
                Some(text) => Some(text.clone()),
                None => self.upstream_proxy.clone().map(Secret),
            }
            .map(|text| {
                let parsed = text.0.parse();
                // Without the value: it may hold a password.
                parsed.map_err(|e: String| {
                    Exit::usage(format!("upstream_proxy (--upstream-proxy): {e}"))
                })
            })
            .transpose()?,
            drain_timeout: match serve.drain_timeout {
                Some(time) => Some(time),
                None => self.one("drain_timeout", &self.drain_timeout)?,
            }
            .map_or(Duration::from_secs(10), |time| time.0),
            hostnames: self.many("hostname", &serve.hostname, &self.hostname)?,
        })
    }

    fn one<T: FromStr<Err = String>>(
        &self,
        key: &str,
        value: &Option<String>,
    ) -> Result<Option<T>, Exit> {
        value
            .as_deref()
            .map(|text| self.value(key, text))
            .transpose()
    }

    fn many<T: FromStr + Clone>(
        &self,
        key: &str,
        given: &[T],
        value: &Option<OneOrMore>,
    ) -> Result<Vec<T>, Exit>
    where
        T::Err: fmt::Display,
    {
        match value {
            Some(list) if given.is_empty() => list
                .values()
                .iter()
                .map(|text| self.value(key, text))
                .collect(),
            _ => Ok(given.to_vec()),
        }
    }

    fn value<T: FromStr>(&self, key: &str, text: &str) -> Result<T, Exit>
    where
        T::Err: fmt::Display,
    {
        text.parse().map_err(|e| {
            Exit::usage(format!(
                "config file {}: key `{key}`: value `{text}`: {e}",
                self.path.display()
            ))
        })
    }
}

impl OneOrMore {
    fn values(&self) -> &[String] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::More(values) => values,
        }
    }
}

/// Form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// An object a line
    Json,
}

/// What an archive must pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Verify {
    /// Its SHA-256 is the one that every known source names
    Checksum,
    /// Not available in this version
    Signature,
}

/// What happens to `download_url`s on hosts that are not intercepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ThirdParty {
    /// The document names a path of the registry host instead, and larder fetches
    #[default]
    Rewrite,
    /// The hosts are expected among `--intercept`
    Intercept,
    /// They are tunnelled, uncached
    Tunnel,
}

macro_rules! from_value_enum {
    ($($kind:ty),*) => {$(
        impl FromStr for $kind {
            type Err = String;
            fn from_str(s: &str) -> Result<Self, String> {
                <Self as ValueEnum>::from_str(s, false).map_err(|_| {
                    let all: Vec<_> = Self::value_variants().iter()
                        .filter_map(|v| Some(v.to_possible_value()?.get_name().to_owned()))
                        .collect();
                    format!("unknown; write one of {}", all.join(", "))
                })
            }
        }
    )*};
}
from_value_enum!(LogFormat, Verify, ThirdParty);

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

#[cfg(test)]
mod tests {
    use super::*;

    fn settle(text: &str, serve: &ServeArgs) -> Result<Config, String> {
        let common = CommonArgs {
            data_dir: Some("/data".into()),
            ..Default::default()
        };
        File::parse(text)?
            .settle(&common, serve)
            .map_err(|exit| exit.message)
    }

    #[test]
    fn file_over_default_and_flag_over_file() {
        let text = "listen = '127.0.0.1:1'\nmax_size = '2G'\nintercept = ['a.example:8443']\nhostname = 'L.example.'";
        let config = settle(text, &ServeArgs::default()).expect("settles");
        assert_eq!(config.listen, ["127.0.0.1:1".parse().expect("address")]);
        assert_eq!(config.max_size, Some(2 << 30));
        assert_eq!(config.intercept.len(), DEFAULT_INTERCEPT.len() + 1);
        assert_eq!(config.hostnames[0].as_str(), "l.example");
        let flags = ServeArgs {
            max_size: Some(Size(7)),
            ..Default::default()
        };
        assert_eq!(settle(text, &flags).expect("settles").max_size, Some(7));
    }

    #[test]
    fn a_bad_value_is_named_with_its_key_and_the_mend() {
        for (text, words) in [
            ("max_size = '50 bananas'", ["max_size", "50 bananas", "GiB"]),
            ("drain_timeout = 'soon'", ["drain_timeout", "soon", "30s"]),
            ("third_party = 'no'", ["third_party", "no", "rewrite"]),
            ("intercept = ['a b']", ["intercept", "a b", "host name"]),
            ("color = 'red'", ["color", "red", "keys"]),
            ("offline = 'x'", ["offline", "x", "boolean"]),
        ] {
            let message = settle(text, &ServeArgs::default()).expect_err(text);
            for word in words {
                assert!(message.contains(word), "{text}: {message}");
            }
        }
    }
}
