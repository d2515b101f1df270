//! The config file as it is written, and how it is settled with the options.

mod rules;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use super::access::{Cidr, Tunnels};
use super::args::{CommonArgs, ServeArgs};
use super::parent::NoProxy;
use super::values::{Authority, Period, Secret};
use super::{
    Config, DEFAULT_INTERCEPT, DEFAULT_LISTEN, PrivateRegistry, absolute, default_data_dir,
};
use crate::error::Exit;

/// A version list that lost most of its versions is not believed for so long.
const LIST_GRACE: Duration = Duration::from_secs(24 * 3600);

/// The config file as written: each value as text, parsed by the same rules as its flag.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    #[serde(skip)]
    path: PathBuf,
    data_dir: Option<PathBuf>,
    log_format: Option<String>,
    listen: Option<OneOrMore>,
    offline: Option<bool>,
    verify: Option<PerPattern<VerifyValue>>,
    trusted_key: Option<OneOrMore>,
    republished: Option<String>,
    version_list_grace: Option<String>,
    min_age: Option<PerPattern<String>>,
    allow: Option<OneOrMore>,
    deny: Option<OneOrMore>,
    policy_contact: Option<String>,
    allow_from: Option<OneOrMore>,
    htpasswd: Option<PathBuf>,
    client_ca: Option<PathBuf>,
    tls_cert: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    tunnel: Option<OneOrMore>,
    max_connections: Option<usize>,
    max_connections_per_address: Option<usize>,
    max_requests_per_connection: Option<u64>,
    max_header_size: Option<String>,
    max_metadata_size: Option<String>,
    max_archive_size: Option<String>,
    max_fills: Option<usize>,
    handshake_timeout: Option<String>,
    idle_timeout: Option<String>,
    max_tunnels: Option<usize>,
    tunnel_idle_timeout: Option<String>,
    tunnel_lifetime: Option<String>,
    max_size: Option<String>,
    intercept: Option<OneOrMore>,
    third_party: Option<String>,
    connect_to: Option<OneOrMore>,
    upstream_ca: Option<OneOrMore>,
    upstream_proxy: Option<String>,
    no_proxy: Option<OneOrMore>,
    drain_timeout: Option<String>,
    hostname: Option<OneOrMore>,
    registry: Option<Vec<RegistryTable>>,
    mirror_hosts: Option<OneOrMore>,
    redirect: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RegistryTable {
    host: String,
    dir: PathBuf,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

/// A value for all, or values by pattern.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a value, or a table of values by pattern"
)]
enum PerPattern<T> {
    One(String),
    Each(BTreeMap<String, T>),
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected `checksum`, `signature`, or { keys = [\"FINGERPRINT\"] }"
)]
enum VerifyValue {
    How(String),
    Pinned(Pinned),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pinned {
    keys: Vec<String>,
}

impl File {
    pub fn read(path: &Path, required: bool) -> Result<Self, Exit> {
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

    pub fn parse(text: &str) -> Result<Self, String> {
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

    pub fn settle(self, common: &CommonArgs, serve: &ServeArgs) -> Result<Config, Exit> {
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
        let registries = self.registries()?;
        for registry in &registries {
            if !intercept.contains(&registry.host) {
                intercept.push(registry.host.clone());
            }
        }
        let upstream_ca = paths(&serve.upstream_ca, &self.upstream_ca);
        let path = |given: &Option<PathBuf>, own: &Option<PathBuf>| {
            given.as_ref().or(own.as_ref()).map(|path| absolute(path))
        };
        let mut allow_from = self.many("allow_from", &serve.allow_from, &self.allow_from)?;
        if allow_from.is_empty() {
            if let Some(open) = listen.iter().find(|addr| !addr.ip().is_loopback()) {
                return Err(Exit::usage(format!(
                    "listen: others can connect to {open}; say who may with allow_from (--allow-from), such as 10.0.0.0/8"
                )));
            }
            allow_from = Cidr::loopback().to_vec();
        }
        let tunnels = Tunnels::new(self.many("tunnel", &serve.tunnel, &self.tunnel)?)
            .map_err(|e| Exit::usage(format!("tunnel: {e}")))?;
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
            trusted_keys: paths(&serve.trusted_key, &self.trusted_key),
            republished: match serve.republished {
                Some(how) => how,
                None => self
                    .one("republished", &self.republished)?
                    .unwrap_or_default(),
            },
            version_list_grace: self
                .period("version_list_grace", &self.version_list_grace)?
                .unwrap_or(LIST_GRACE),
            policy: self.policy(serve.verify)?,
            allow_from,
            htpasswd: path(&serve.htpasswd, &self.htpasswd),
            client_ca: path(&serve.client_ca, &self.client_ca),
            own_certificate: match (
                path(&serve.tls_cert, &self.tls_cert),
                path(&serve.tls_key, &self.tls_key),
            ) {
                (Some(cert), Some(key)) => Some((cert, key)),
                (None, None) => None,
                _ => {
                    return Err(Exit::usage(
                        "tls_cert: a certificate needs its key and a key its certificate; give both --tls-cert and --tls-key",
                    ));
                }
            },
            tunnels,
            limits: self.limits()?,
            upstream_ca,
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
            // A list of nothing is a list too: the inherited one does not count then.
            no_proxy: (!serve.no_proxy.is_empty() || self.no_proxy.is_some())
                .then(|| self.many("no_proxy", &serve.no_proxy, &self.no_proxy))
                .transpose()?
                .map(NoProxy::concat),
            drain_timeout: match serve.drain_timeout {
                Some(time) => Some(time),
                None => self.one("drain_timeout", &self.drain_timeout)?,
            }
            .map_or(Duration::from_secs(10), |time| time.0),
            hostnames: self.many("hostname", &serve.hostname, &self.hostname)?,
            registries,
            mirror_hosts: Tunnels::new(self.many("mirror_hosts", &[], &self.mirror_hosts)?)
                .map_err(|e| Exit::usage(format!("mirror_hosts: {e}")))?,
            redirect: self.one("redirect", &self.redirect)?.unwrap_or_default(),
        })
    }

    fn registries(&self) -> Result<Vec<PrivateRegistry>, Exit> {
        let mut registries: Vec<PrivateRegistry> = Vec::new();
        for table in self.registry.iter().flatten() {
            let host: Authority = self.value("registry.host", &table.host)?;
            let dir = absolute(&table.dir);
            if registries.iter().any(|other| other.host == host) {
                return Err(Exit::usage(format!(
                    "config file {}: key `registry`: {} is there twice; one folder serves a host",
                    self.path.display(),
                    table.host
                )));
            }
            if DEFAULT_INTERCEPT.contains(&host.in_https_url().as_str()) {
                return Err(Exit::usage(format!(
                    "config file {}: key `registry`: {} is a public host; name one of your own",
                    self.path.display(),
                    table.host
                )));
            }
            if !dir.is_dir() {
                return Err(Exit::usage(format!(
                    "config file {}: key `registry`: {} is no folder; make it, or name another one",
                    self.path.display(),
                    dir.display()
                )));
            }
            registries.push(PrivateRegistry { host, dir });
        }
        Ok(registries)
    }

    fn period(&self, key: &str, value: &Option<String>) -> Result<Option<Duration>, Exit> {
        let period: Option<Period> = self.one(key, value)?;
        Ok(period.map(|period| period.0))
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

fn paths(given: &[PathBuf], own: &Option<OneOrMore>) -> Vec<PathBuf> {
    let own = own.as_ref().filter(|_| given.is_empty());
    match own {
        Some(list) => list.values().iter().map(|p| absolute(p.as_ref())).collect(),
        None => given.iter().map(|path| absolute(path)).collect(),
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::args::Verify;
    use crate::config::values::Size;
    use proptest::prelude::*;

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
            ("deny = 'a/b ?'", ["deny", "?", "constraint"]),
            ("min_age = { 'a/*' = 'x' }", ["min_age", "x", "30s"]),
            (
                "verify = { 'a/*' = { keys = ['AB'] } }",
                ["verify", "AB", "fingerprint"],
            ),
            (
                "listen = '0.0.0.0:1'",
                ["listen", "0.0.0.0:1", "allow_from"],
            ),
            (
                "tunnel = ['deny', 'a.example']",
                ["tunnel", "deny", "alone"],
            ),
            ("no_proxy = ['a b/c']", ["no_proxy", "b/c", "range"]),
            ("color = 'red'", ["color", "red", "keys"]),
            ("offline = 'x'", ["offline", "x", "boolean"]),
        ] {
            let message = settle(text, &ServeArgs::default()).expect_err(text);
            for word in words {
                assert!(message.contains(word), "{text}: {message}");
            }
        }
    }

    #[test]
    fn rules_are_read_with_their_patterns() {
        let text = r#"
            allow_from = ["10.0.0.0/8"]
            listen = "0.0.0.0:3128"
            min_age = "72h"
            [verify]
            "*" = "signature"
            "acme/*" = "checksum"
            "acme/pinned" = { keys = ["5BFE EC43 17E7 4600 8621  9706 37A6 AB3B CF2C 170A"] }
        "#;
        let text = text.replace("\n            [", "\n[");
        let policy = settle(&text, &ServeArgs::default()).unwrap().policy;
        let how = |ns, name| policy.verify(&["registry.terraform.io", ns, name]);
        assert_eq!(how("hashicorp", "aws").how, Verify::Signature);
        assert_eq!(how("acme", "x").how, Verify::Checksum);
        assert_eq!(how("acme", "pinned").how, Verify::Signature);
        assert_eq!(how("acme", "pinned").keys.len(), 1);
        let age = policy.min_age(&["releases.hashicorp.com", "terraform"]);
        assert_eq!(age.unwrap().0, Duration::from_secs(72 * 3600));
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "\\PC{0,60}", key in "(verify|min_age|allow|tunnel|listen|connect_to|max_size)") {
            for text in [text.clone(), format!("{key} = [\"{text}\"]"), format!("{key} = {text}")] {
                let _ = settle(&text, &ServeArgs::default());
            }
        }
    }
}
