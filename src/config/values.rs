//! The values that options take, each with the one way it is written.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use url::Url;

/// A number of bytes: `1048576`, `500MB` (powers of 1000), `50GiB` or `50G` (powers of 1024).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (number, unit) = split_unit(s);
        let factor: u64 = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "ki" | "kib" => 1 << 10,
            "m" | "mi" | "mib" => 1 << 20,
            "g" | "gi" | "gib" => 1 << 30,
            "t" | "ti" | "tib" => 1 << 40,
            "kb" => 1000,
            "mb" => 1000 * 1000,
            "gb" => 1000 * 1000 * 1000,
            "tb" => 1000 * 1000 * 1000 * 1000,
            _ => return Err("not a size; write a number and a unit, such as 50GiB".into()),
        };
        number
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(factor))
            .map(Self)
            .ok_or_else(|| "not a size; write a whole number and a unit, such as 50GiB".into())
    }
}

/// A length of time: `90s`, `15m`, `12h`, `30d`, `500ms`, or plain seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Period(pub Duration);

impl FromStr for Period {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (number, unit) = split_unit(s);
        let millis: u64 = match unit {
            "ms" => 1,
            "" | "s" => 1000,
            "m" | "min" => 60 * 1000,
            "h" => 3600 * 1000,
            "d" => 24 * 3600 * 1000,
            "w" => 7 * 24 * 3600 * 1000,
            _ => {
                return Err("not a time; write a number and a unit, such as 30s, 15m or 7d".into());
            }
        };
        number
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(millis))
            .map(|ms| Self(Duration::from_millis(ms)))
            .ok_or_else(|| "not a time; write a whole number and a unit, such as 30s or 7d".into())
    }
}

fn split_unit(s: &str) -> (&str, &str) {
    let s = s.trim();
    let digits = s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len());
    (&s[..digits], s[digits..].trim_start())
}

/// A host name in lower case, or an IP address without brackets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostName(String);

impl HostName {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The address, if the name is one.
    pub fn ip(&self) -> Option<IpAddr> {
        self.0.parse().ok()
    }

    /// Whether it is a name below `base`, and not `base` itself.
    pub fn is_below(&self, base: &Self) -> bool {
        let rest = self.0.strip_suffix(&base.0);
        rest.is_some_and(|rest| rest.ends_with('.'))
    }
}

impl FromStr for HostName {
    type Err = String;

    /// Letters, digits, hyphens and underscores in labels of 1 to 63, 253 in all (RFC 1123); or an
    /// IP address, an IPv6 one with or without brackets.
    fn from_str(s: &str) -> Result<Self, String> {
        let bare = s.strip_prefix('[').and_then(|s| s.strip_suffix(']'));
        if let Ok(ip) = bare.unwrap_or(s).parse::<IpAddr>()
            && (bare.is_none() || ip.is_ipv6())
        {
            return Ok(Self(ip.to_string()));
        }
        let name = s.strip_suffix('.').unwrap_or(s).to_ascii_lowercase();
        let label_ok = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        // A last label that is a number, `0x7f` too, would be read as an IPv4 address by some
        // resolvers, and is by URLs.
        let last_is_number =
            name.rsplit('.')
                .next()
                .is_some_and(|last| match last.strip_prefix("0x") {
                    Some(hex) => hex.bytes().all(|b| b.is_ascii_hexdigit()),
                    None => last.bytes().all(|b| b.is_ascii_digit()),
                });
        if name.len() > 253 || last_is_number || !name.split('.').all(label_ok) {
            return Err("not a host name; write one such as registry.example.com".into());
        }
        Ok(Self(name))
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A host and a port, 443 where none is written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Authority {
    pub host: HostName,
    pub port: u16,
}

impl Authority {
    pub fn new(host: HostName, port: u16) -> Self {
        Self { host, port }
    }

    /// As it stands in an `https` URL: without the port if it is 443.
    pub fn in_https_url(&self) -> String {
        let text = self.to_string();
        match text.strip_suffix(":443") {
            Some(host) => host.to_owned(),
            None => text,
        }
    }

    /// The host and port of an absolute URL.
    pub fn of(url: &Url) -> Option<Self> {
        Some(Self {
            host: url.host_str()?.parse().ok()?,
            port: url.port_or_known_default()?,
        })
    }
}

impl FromStr for Authority {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let whole_is_v6 = s.parse::<std::net::Ipv6Addr>().is_ok();
        let (host, port) = match s.rsplit_once(':') {
            Some((host, port)) if !whole_is_v6 && !port.contains(']') => (host, parse_port(port)?),
            _ => (s, 443),
        };
        if host.contains(':') && !host.starts_with('[') && !whole_is_v6 {
            return Err("not HOST or HOST:PORT; put an IPv6 address in brackets".into());
        }
        Ok(Self {
            host: host.parse()?,
            port,
        })
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.0.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

pub(super) fn parse_port(s: &str) -> Result<u16, String> {
    let digits = !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    s.parse()
        .ok()
        .filter(|port| digits && *port != 0)
        .ok_or_else(|| "not a port; write a number from 1 to 65535".into())
}

/// curl's `--connect-to`: where to connect instead. A part that is none matches any, or stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectTo {
    /// As it was written, in lower case
    text: String,
    from_host: Option<HostName>,
    from_port: Option<u16>,
    to_host: Option<HostName>,
    to_port: Option<u16>,
}

impl ConnectTo {
    /// As it was written, in lower case.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Where to connect for `asked`, if this rule speaks of it.
    pub fn apply(&self, asked: &Authority) -> Option<Authority> {
        let host_fits = self.from_host.as_ref().is_none_or(|h| *h == asked.host);
        let port_fits = self.from_port.is_none_or(|p| p == asked.port);
        (host_fits && port_fits).then(|| Authority {
            host: self.to_host.clone().unwrap_or_else(|| asked.host.clone()),
            port: self.to_port.unwrap_or(asked.port),
        })
    }
}

impl FromStr for ConnectTo {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut rest = s;
        loop {
            let end = match rest.strip_prefix('[') {
                Some(inner) => inner.find(']').map(|at| at + 2),
                None => rest.find(':'),
            };
            match end {
                Some(end) if rest.as_bytes().get(end) == Some(&b':') => {
                    parts.push(&rest[..end]);
                    rest = &rest[end + 1..];
                }
                _ => break,
            }
        }
        parts.push(rest);
        let [from_host, from_port, to_host, to_port] = parts[..] else {
            return Err("not HOST1:PORT1:HOST2:PORT2; write four parts, IPv6 in brackets".into());
        };
        let host = |s: &str| (!s.is_empty()).then(|| s.parse()).transpose();
        let port = |s: &str| (!s.is_empty()).then(|| parse_port(s)).transpose();
        Ok(Self {
            text: s.to_ascii_lowercase(),
            from_host: host(from_host)?,
            from_port: port(from_port)?,
            to_host: host(to_host)?,
            to_port: port(to_port)?,
        })
    }
}

/// Text that may hold a password: it is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl FromStr for Secret {
    type Err = std::convert::Infallible;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Ok(Self(s.to_owned()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn connect_to_has_curls_meaning() {
        let asked: Authority = "Registry.Example:443".parse().expect("authority");
        let to = |rule: &str| {
            let rule: ConnectTo = rule.parse().expect(rule);
            rule.apply(&asked).map(|a| a.to_string())
        };
        assert_eq!(
            to("registry.example:443:127.0.0.1:9").as_deref(),
            Some("127.0.0.1:9")
        );
        assert_eq!(to(":::").as_deref(), Some("registry.example:443"));
        assert_eq!(to("::[::1]:9").as_deref(), Some("[::1]:9"));
        assert_eq!(to("registry.example::other:").as_deref(), Some("other:443"));
        assert_eq!(to("other:443:127.0.0.1:9"), None);
        assert_eq!(to("registry.example:80:127.0.0.1:9"), None);
        for bad in [
            "",
            "a:1:b",
            "a:1:b:2:c",
            "a:x:b:2",
            "::1:1:b:2:",
            "a b:1:c:2",
        ] {
            assert!(bad.parse::<ConnectTo>().is_err(), "{bad}");
        }
    }

    #[test]
    fn authorities_read_and_print() {
        for (text, printed) in [
            ("A.example", "a.example:443"),
            ("a.example.:8443", "a.example:8443"),
            ("[::1]:3128", "[::1]:3128"),
            ("::1", "[::1]:443"),
            ("127.0.0.1:1", "127.0.0.1:1"),
        ] {
            assert_eq!(text.parse::<Authority>().expect(text).to_string(), printed);
        }
        for bad in [
            "", ":443", "a:", "a:0", "a:65536", "a:+1", "a/b", "a@b", "1.2.3", "a..b", "[a]",
            "a:1:2", "0x7f.1", "a.0X7F", "1.0x.",
        ] {
            assert!(bad.parse::<Authority>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn parsers_never_panic(text in "\\PC{0,40}") {
            let _ = text.parse::<Authority>();
            let _ = text.parse::<ConnectTo>();
            let _ = text.parse::<Size>();
            let _ = text.parse::<Period>();
        }

        #[test]
        fn an_authority_survives_printing(text in "[a-z0-9.:\\[\\]-]{0,20}") {
            if let Ok(authority) = text.parse::<Authority>() {
                prop_assert_eq!(authority.to_string().parse(), Ok(authority));
            }
        }
    }
}
