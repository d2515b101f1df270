//! The command line's options, as they are given and as they are handed on.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgAction, Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::access::{Cidr, TunnelPattern};
use super::parent::{NoProxy, Parent};
use super::values::{Authority, ConnectTo, HostName, Period, Secret, Size};
use super::{absolute, real};

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
    /// OpenPGP keys to trust in place of HashiCorp's and its partner key, which ship with larder
    #[arg(
        long,
        env = "LARDER_TRUSTED_KEY",
        value_name = "FILE",
        value_delimiter = ','
    )]
    pub trusted_key: Vec<PathBuf>,
    /// What happens to an archive that has another digest than it had before [default: refuse]
    #[arg(long, env = "LARDER_REPUBLISHED", value_name = "HOW")]
    pub republished: Option<Republished>,
    /// Who may connect, such as 10.0.0.0/8 [default: loopback; must be given to listen elsewhere]
    #[arg(
        long,
        env = "LARDER_ALLOW_FROM",
        value_name = "CIDR",
        value_delimiter = ','
    )]
    pub allow_from: Vec<Cidr>,
    /// Users and bcrypt hashes, as `htpasswd -B` writes them: proxying takes their credentials
    #[arg(long, env = "LARDER_HTPASSWD", value_name = "FILE")]
    pub htpasswd: Option<PathBuf>,
    /// PEM file of the CAs whose client certificates proxying takes, over TLS alone
    #[arg(long, env = "LARDER_CLIENT_CA", value_name = "FILE")]
    pub client_ca: Option<PathBuf>,
    /// PEM file of a certificate chain of your own for larder's own names, in place of larder's CA
    #[arg(long, env = "LARDER_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file of the key of --tls-cert; both are read anew when they change
    #[arg(long, env = "LARDER_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Hosts that are tunnelled: allow, deny, or patterns such as *.example.com:443 [default: allow]
    #[arg(
        long,
        env = "LARDER_TUNNEL",
        value_name = "PATTERN",
        value_delimiter = ','
    )]
    pub tunnel: Vec<TunnelPattern>,
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
    /// Parent proxy, http|https|socks5://[USER:PASSWORD@]HOST[:PORT] [default: HTTPS_PROXY as inherited]
    #[arg(
        long,
        env = "LARDER_UPSTREAM_PROXY",
        value_name = "URL",
        hide_env_values = true
    )]
    pub upstream_proxy: Option<Secret>,
    /// Hosts that are reached without the parent: NAME and all below it, .NAME, an address, a range,
    /// each but the last with :PORT where one is meant, or * [default: NO_PROXY as inherited]
    #[arg(long, env = "LARDER_NO_PROXY", value_name = "LIST")]
    pub no_proxy: Vec<NoProxy>,
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
        // In one word: a host name may begin with a hyphen, as an option does.
        let mut add = |name: &str, value: OsString| {
            let mut word = OsString::from(format!("{name}="));
            word.push(value);
            args.push(word);
        };
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
        if let Some(how) = self.republished.and_then(|how| how.to_possible_value()) {
            add("--republished", how.get_name().into());
        }
        for path in &self.trusted_key {
            add("--trusted-key", absolute(path).into());
        }
        for pattern in &self.tunnel {
            add("--tunnel", pattern.to_string().into());
        }
        for authority in &self.intercept {
            add("--intercept", authority.to_string().into());
        }
        for rule in &self.connect_to {
            add("--connect-to", rule.text().into());
        }
        for list in &self.no_proxy {
            add("--no-proxy", list.to_string().into());
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
        if let Some(how) = self.verify {
            wish("verify", format!("{how:?}"));
        }
        if let Some(how) = self.republished {
            wish("republished", format!("{how:?}"));
        }
        for path in &self.trusted_key {
            wish("trusted-key", real(path).display().to_string());
        }
        for pattern in &self.tunnel {
            wish("tunnel", pattern.to_string());
        }
        if let Some(parent) = self
            .upstream_proxy
            .as_ref()
            .and_then(|p| p.0.parse::<Parent>().ok())
        {
            wish("upstream-proxy", parent.to_string());
        }
        if !self.no_proxy.is_empty() {
            let list = NoProxy::concat(self.no_proxy.clone());
            wish("no-proxy", list.to_string());
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

/// Form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// An object a line
    Json,
}

/// What an archive must pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Verify {
    /// Its SHA-256 is the one that every known source names
    #[default]
    Checksum,
    /// Besides, its SHA256SUMS bear a valid signature
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

/// What happens to an archive that has another digest than it had before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Republished {
    /// It is refused
    #[default]
    Refuse,
    /// It is let through, with a warning
    Warn,
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
from_value_enum!(LogFormat, Verify, ThirdParty, Republished);

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        serve: ServeArgs,
    }

    #[test]
    fn what_is_handed_on_reads_as_the_same() {
        let serve = ServeArgs {
            offline: Some(true),
            verify: Some(Verify::Signature),
            tunnel: vec!["-a:1".parse().unwrap(), "*.b:*".parse().unwrap()],
            intercept: vec!["--verify".parse().unwrap()],
            connect_to: vec!["-a:1:b:2".parse().unwrap()],
            no_proxy: vec!["-p:1, .b.example".parse().unwrap()],
            hostname: vec!["-h".parse().unwrap()],
            trusted_key: vec!["-k.asc".into()],
            ..Default::default()
        };
        let words = [vec!["larder".into()], serve.to_args()].concat();
        let line = Line::try_parse_from(words).unwrap();
        assert_eq!(line.serve.wishes(), serve.wishes());
    }
}
