//! Parent proxies, and the hosts that are reached without one.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use url::Url;

use super::access::Cidr;
use super::values::{Authority, HostName, parse_port};

/// How a parent proxy is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// CONNECT (RFC 9110 section 9.3.6)
    Http,
    /// The same over TLS
    Https,
    /// RFC 1928; the parent resolves names, whether `socks5` or `socks5h` was written
    Socks5,
}

/// A parent proxy. Its credentials are never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Parent {
    pub scheme: Scheme,
    pub authority: Authority,
    /// User and password, decoded.
    pub credentials: Option<(String, String)>,
}

impl Scheme {
    fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
            Self::Socks5 => "socks5",
        }
    }

    /// Where none is written, as in Go.
    fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
            Self::Socks5 => 1080,
        }
    }
}

impl FromStr for Parent {
    type Err = String;

    /// The words hold nothing of the value but its scheme: it may hold a password.
    fn from_str(s: &str) -> Result<Self, String> {
        let with_scheme = match s.contains("://") {
            true => s.to_owned(),
            false => format!("http://{s}"),
        };
        let bad = || {
            match s.contains('@') {
            true => "not a proxy URL; write http://USER:PASSWORD@HOST:PORT, with `/`, `?`, `#` and `@` of the password as %2F, %3F, %23 and %40".to_owned(),
            false => "not a proxy URL; write http://HOST:PORT".to_owned(),
        }
        };
        let url = Url::parse(&with_scheme).map_err(|_| bad())?;
        let scheme = match url.scheme() {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            "socks5" | "socks5h" => Scheme::Socks5,
            other => {
                return Err(format!(
                    "{other}:// is no kind of parent that larder knows; write http://, https:// or socks5://HOST:PORT"
                ));
            }
        };
        let host = url.host_str().ok_or_else(bad)?;
        let port = url.port().unwrap_or_else(|| scheme.default_port());
        let bare = matches!(url.path(), "" | "/") && url.query().is_none();
        if !bare || url.fragment().is_some() || port == 0 {
            return Err(bad());
        }
        Ok(Self {
            scheme,
            authority: Authority::new(host.parse().map_err(|_| bad())?, port),
            credentials: credentials(&url, scheme)?,
        })
    }
}

fn credentials(url: &Url, scheme: Scheme) -> Result<Option<(String, String)>, String> {
    if url.username().is_empty() && url.password().is_none() {
        return Ok(None);
    }
    let decode = |s: &str| match percent_encoding::percent_decode_str(s).decode_utf8() {
        Ok(text) => Ok(text.into_owned()),
        Err(_) => Err("the user or the password is no UTF-8 once %XX is decoded; encode it anew"),
    };
    let user = decode(url.username())?;
    let password = decode(url.password().unwrap_or_default())?;
    let fits = |text: &str| (1..=255).contains(&text.len());
    match scheme {
        // RFC 1929 section 2
        Scheme::Socks5 if !fits(&user) || !fits(&password) => Err(
            "a user and a password for SOCKS5 have 1 to 255 bytes each; write both, or neither"
                .into(),
        ),
        // RFC 7617 section 2
        Scheme::Http | Scheme::Https if user.contains(':') => {
            Err("a user's name may hold no colon; ask whoever runs the parent for another".into())
        }
        _ => Ok(Some((user, password))),
    }
}

impl fmt::Display for Parent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), self.authority)
    }
}

impl fmt::Debug for Parent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Hosts that are reached without the parent, as `NO_PROXY` lists them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NoProxy(Vec<Exempt>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Exempt {
    All,
    /// The names below `base`, and itself if it was written without `.` or `*.` before it
    Names {
        base: HostName,
        itself: bool,
        port: Option<u16>,
    },
    Address(IpAddr, Option<u16>),
    Range(Cidr),
}

impl NoProxy {
    /// The lists as one.
    pub fn concat(lists: Vec<Self>) -> Self {
        Self(lists.into_iter().flat_map(|list| list.0).collect())
    }

    /// What of an inherited list can be understood, and the entries that cannot: other programs
    /// may know what to make of those.
    pub fn inherited(list: &str) -> (Self, Vec<&str>) {
        let mut understood = Vec::new();
        let mut strange = Vec::new();
        for entry in entries(list) {
            match entry.parse() {
                Ok(exempt) => understood.push(exempt),
                Err(_) => strange.push(entry),
            }
        }
        (Self(understood), strange)
    }

    /// Whether `asked` is reached without the parent. This machine always is.
    pub fn covers(&self, asked: &Authority) -> bool {
        is_this_machine(&asked.host) || self.0.iter().any(|exempt| exempt.covers(asked))
    }
}

impl FromStr for NoProxy {
    type Err = String;

    /// Entries by commas or blanks: a name (with all below it), `.NAME` or `*.NAME` (what is below
    /// it), an address, each with `:PORT` where one is meant; a range of addresses; `*`.
    fn from_str(s: &str) -> Result<Self, String> {
        let all: Result<_, _> = entries(s).map(str::parse).collect();
        all.map(Self)
    }
}

impl fmt::Display for NoProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries: Vec<_> = self.0.iter().map(Exempt::to_string).collect();
        f.write_str(&entries.join(","))
    }
}

fn entries(list: &str) -> impl Iterator<Item = &str> {
    list.split(|c: char| c == ',' || c.is_whitespace())
        .filter(|entry| !entry.is_empty())
}

fn is_this_machine(host: &HostName) -> bool {
    let is_loopback = |ip: IpAddr| ip.to_canonical().is_loopback();
    host.as_str() == "localhost" || host.ip().is_some_and(is_loopback)
}

impl Exempt {
    fn covers(&self, asked: &Authority) -> bool {
        let fits = |port: &Option<u16>| port.is_none_or(|port| port == asked.port);
        let ip = asked.host.ip().map(|ip| ip.to_canonical());
        match self {
            Self::All => true,
            Self::Names { base, itself, port } => {
                fits(port) && (asked.host.is_below(base) || *itself && asked.host == *base)
            }
            Self::Address(address, port) => fits(port) && ip == Some(*address),
            Self::Range(range) => ip.is_some_and(|ip| range.contains(ip)),
        }
    }
}

impl FromStr for Exempt {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        if s == "*" {
            return Ok(Self::All);
        }
        if s.contains('/') {
            return s.parse().map(Self::Range);
        }
        let is_whole = s.ends_with(']') || s.parse::<Ipv6Addr>().is_ok();
        let (host, port) = match s.rsplit_once(':') {
            Some((host, port)) if !is_whole => (host, Some(parse_port(port)?)),
            _ => (s, None),
        };
        let below = host.strip_prefix("*.").or_else(|| host.strip_prefix('.'));
        let base: HostName = below.unwrap_or(host).parse().map_err(|_| {
            format!("`{s}` is no host; write NAME, .NAME, an address or a range, with :PORT where one is meant, or *")
        })?;
        match (base.ip(), below) {
            (Some(ip), None) => Ok(Self::Address(ip.to_canonical(), port)),
            (Some(_), Some(_)) => Err(format!(
                "`{s}`: nothing is below an address; write 10.0.0.0/8"
            )),
            (None, _) => Ok(Self::Names {
                base,
                itself: below.is_none(),
                port,
            }),
        }
    }
}

impl fmt::Display for Exempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port = match self {
            Self::All => return f.write_str("*"),
            Self::Range(range) => return range.fmt(f),
            Self::Names { base, itself, port } => {
                let dot = if *itself { "" } else { "." };
                write!(f, "{dot}{base}")?;
                port
            }
            Self::Address(IpAddr::V6(ip), port) => {
                write!(f, "[{ip}]")?;
                port
            }
            Self::Address(ip, port) => {
                write!(f, "{ip}")?;
                port
            }
        };
        port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parents_are_read_with_their_schemes_and_default_ports() {
        for (text, printed) in [
            ("proxy.example:8080", "http://proxy.example:8080"),
            ("http://Proxy.Example/", "http://proxy.example:80"),
            ("HTTPS://proxy.example", "https://proxy.example:443"),
            ("socks5://proxy.example", "socks5://proxy.example:1080"),
            ("socks5h://[2001:db8::1]:9", "socks5://[2001:db8::1]:9"),
            ("socks5://10.0.0.1:9", "socks5://10.0.0.1:9"),
        ] {
            assert_eq!(text.parse::<Parent>().unwrap().to_string(), printed);
        }
        for bad in [
            "",
            "http://",
            "socks5://",
            "gopher://x",
            "socks4://x:1",
            "http://x:0",
            "http://x:y",
            "http://x:1/path",
            "http://x:1?query",
            "http://u:1#2@x:3",
            "http://u%3Av:p@x:1",
            "http://u:%FF@x:1",
            "socks5://u@x:1",
            "socks5://:p@x:1",
        ] {
            assert!(bad.parse::<Parent>().is_err(), "{bad}");
        }
    }

    #[test]
    fn credentials_are_decoded_and_hidden() {
        for (text, user, password) in [
            ("http://me:s%40c%3aret@p.example:8080", "me", "s@c:ret"),
            ("https://me@p.example", "me", ""),
            ("http://:token@p.example", "", "token"),
            ("socks5://m%C3%A9:100%@p.example", "mé", "100%"),
        ] {
            let parent: Parent = text.parse().unwrap();
            let expected = Some((user.to_owned(), password.to_owned()));
            assert_eq!(parent.credentials, expected, "{text}");
            for shown in [format!("{parent}"), format!("{parent:?}")] {
                assert!(!shown.contains('@') && !shown.contains("ret"), "{shown}");
            }
        }
    }

    #[test]
    fn no_proxy_is_what_go_and_curl_make_of_it() {
        let list = "corp.example, .Dot.example *.star.example,10.0.0.1,port.example:8443,.p.example:1,\
                    192.168.0.0/16,[2001:db8::1]:8443,2001:db8::2,[2001:db8::3],fd00::/8,10.0.0.2:80,\
                    dotted.example.";
        let list: NoProxy = list.parse().unwrap();
        let covers = |s: &str| list.covers(&s.parse().unwrap());
        for yes in [
            "corp.example",
            "CORP.example:1",
            "a.b.corp.example",
            "x.dot.example",
            "x.star.example:8443",
            "10.0.0.1",
            "10.0.0.1:80",
            "[::ffff:10.0.0.1]:443",
            "port.example:8443",
            "x.port.example:8443",
            "x.p.example:1",
            "192.168.3.4",
            "[2001:db8::1]:8443",
            "[2001:db8::2]:1",
            "[2001:db8:0::3]:1",
            "[fd12::1]:443",
            "10.0.0.2:80",
            "dotted.example",
            "localhost",
            "127.9.9.9",
            "[::1]:443",
            "[::ffff:127.0.0.1]:443",
        ] {
            assert!(covers(yes), "{yes}");
        }
        for no in [
            "ecorp.example",
            "corp.example.evil.example",
            "example",
            "dot.example",
            "star.example",
            "10.0.0.11",
            "port.example",
            "p.example:1",
            "x.p.example",
            "192.169.0.1",
            "[2001:db8::1]:443",
            "10.0.0.2",
            "localhost.example",
        ] {
            assert!(!covers(no), "{no}");
        }
        let all: NoProxy = " * ".parse().unwrap();
        assert!(all.covers(&"any.example".parse().unwrap()));
    }

    #[test]
    fn an_inherited_list_may_hold_what_only_others_understand() {
        let (list, strange) =
            NoProxy::inherited("<local>,a.example, 10.*,$(x).example,,b.example:x");
        assert_eq!(list.to_string(), "a.example");
        assert_eq!(strange, ["<local>", "10.*", "$(x).example", "b.example:x"]);
        for entry in strange
            .into_iter()
            .chain(["*.10.0.0.1", "a/b", "a:0", ".", "*x"])
        {
            assert!(entry.parse::<NoProxy>().is_err(), "{entry}");
        }
    }

    proptest! {
        #[test]
        fn parsers_never_panic(text in "\\PC{0,40}") {
            let _ = text.parse::<Parent>();
            let _ = text.parse::<NoProxy>();
            let _ = NoProxy::inherited(&text);
        }

        #[test]
        fn a_list_survives_printing(text in "[a-z0-9.:/*, \\[\\]-]{0,30}") {
            if let Ok(list) = text.parse::<NoProxy>() {
                prop_assert_eq!(list.to_string().parse(), Ok(list));
            }
        }
    }
}
