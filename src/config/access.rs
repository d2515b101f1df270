//! Who may use larder, and where its tunnels may lead.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;

use super::values::{Authority, HostName};

/// A range of addresses (RFC 4632), or a single one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr(IpNet);

impl Cidr {
    /// 127.0.0.0/8 and ::1.
    pub fn loopback() -> [Self; 2] {
        [
            IpNet::new_assert(IpAddr::from([127, 0, 0, 0]), 8),
            IpNet::new_assert(IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]), 128),
        ]
        .map(Self)
    }

    /// An IPv4-mapped address counts as the IPv4 address that it is.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.0.contains(&ip.to_canonical())
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let net = s.parse::<IpNet>();
        let net = net.or_else(|_| s.parse::<IpAddr>().map(IpNet::from));
        let net = net.map_err(|_| "not a range of addresses; write one such as 10.0.0.0/8")?;
        Ok(Self(canonical(net.trunc())))
    }
}

/// IPv4-mapped addresses count as IPv4 ones, as they do where they are looked for.
fn canonical(net: IpNet) -> IpNet {
    let IpAddr::V4(ip) = net.addr().to_canonical() else {
        return net;
    };
    let length = match net {
        IpNet::V4(_) => Some(net.prefix_len()),
        IpNet::V6(_) => net.prefix_len().checked_sub(96),
    };
    let mapped = length.and_then(|length| IpNet::new(ip.into(), length).ok());
    mapped.unwrap_or(net)
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where tunnels may lead.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Tunnels {
    /// To wherever the guard lets them
    #[default]
    Allow,
    Deny,
    /// To these alone
    Listed(Vec<TunnelPattern>),
}

impl Tunnels {
    /// From the values of the option.
    pub fn new(patterns: Vec<TunnelPattern>) -> Result<Self, String> {
        match patterns[..] {
            [] | [TunnelPattern::Allow] => Ok(Self::Allow),
            [TunnelPattern::Deny] => Ok(Self::Deny),
            _ if patterns
                .iter()
                .any(|p| matches!(p, TunnelPattern::Allow | TunnelPattern::Deny)) =>
            {
                Err("`allow` and `deny` stand alone; list patterns, or one of them".into())
            }
            _ => Ok(Self::Listed(patterns)),
        }
    }

    /// Whether `asked` may be tunnelled to, as far as names and ports go.
    pub fn permits(&self, asked: &Authority) -> bool {
        match self {
            Self::Allow => true,
            Self::Deny => false,
            Self::Listed(patterns) => patterns.iter().any(|pattern| pattern.fits(asked)),
        }
    }

    /// Whether the very port is listed, so that the rule for ports does not apply.
    pub fn lists_port(&self, asked: &Authority) -> bool {
        self.patterns()
            .any(|pattern| pattern.fits(asked) && pattern.port().is_some())
    }

    /// Whether `ip` may be dialled for `asked` whatever kind of address it is: the host is listed
    /// by its own name, or the address by a range. A wildcard lists names, not where they lead.
    pub fn lists(&self, asked: &Authority, ip: IpAddr) -> bool {
        self.patterns().any(|pattern| match pattern {
            TunnelPattern::Host(host, _) => *host == asked.host && pattern.fits(asked),
            TunnelPattern::Range(range, port) => range.contains(ip) && port.fits(asked.port),
            _ => false,
        })
    }

    /// Whether `asked` is listed.
    pub fn names(&self, asked: &Authority) -> bool {
        self.patterns().any(|pattern| pattern.fits(asked))
    }

    /// Whether names or addresses are listed.
    pub fn is_list(&self) -> bool {
        matches!(self, Self::Listed(_))
    }

    /// Whether the address itself is listed, by a range.
    pub fn lists_address(&self, at: SocketAddr) -> bool {
        self.patterns().any(|pattern| {
            matches!(pattern, TunnelPattern::Range(range, port) if range.contains(at.ip()) && port.fits(at.port()))
        })
    }

    fn patterns(&self) -> impl Iterator<Item = &TunnelPattern> {
        match self {
            Self::Listed(patterns) => patterns.iter(),
            _ => [].iter(),
        }
    }
}

/// `allow`, `deny`, or hosts: `HOST`, `*.DOMAIN`, an address or a range of them, each with `:PORT`
/// or `:*` where another than 443 is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TunnelPattern {
    Allow,
    Deny,
    Host(HostName, Ports),
    /// All names below the domain
    Below(HostName, Ports),
    Range(Cidr, Ports),
}

/// Which ports a pattern speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ports {
    /// 443, since none was written
    Default,
    One(u16),
    Any,
}

impl Ports {
    fn fits(self, port: u16) -> bool {
        match self {
            Self::Default => port == 443,
            Self::One(one) => port == one,
            Self::Any => true,
        }
    }
}

impl TunnelPattern {
    fn port(&self) -> Option<Ports> {
        match self {
            Self::Host(_, ports) | Self::Below(_, ports) | Self::Range(_, ports) => {
                Some(*ports).filter(|ports| *ports != Ports::Default)
            }
            Self::Allow | Self::Deny => None,
        }
    }

    fn fits(&self, asked: &Authority) -> bool {
        match self {
            Self::Allow => true,
            Self::Deny => false,
            Self::Host(host, ports) => *host == asked.host && ports.fits(asked.port),
            Self::Below(domain, ports) => asked.host.is_below(domain) && ports.fits(asked.port),
            Self::Range(range, ports) => {
                let ip = asked.host.ip();
                ip.is_some_and(|ip| range.contains(ip)) && ports.fits(asked.port)
            }
        }
    }
}

impl FromStr for TunnelPattern {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.to_ascii_lowercase().as_str() {
            "allow" => return Ok(Self::Allow),
            "deny" => return Ok(Self::Deny),
            // As host names they would print as those words, and read as them the next time.
            "allow." | "deny." => return Err(format!("not a host name; write {s}:443")),
            _ => {}
        }
        if let Ok(range) = s.parse::<Cidr>() {
            return Ok(Self::whole(range, Ports::Default));
        }
        let (host, ports) = match s.rsplit_once(':') {
            Some((host, "*")) => (host, Ports::Any),
            Some((host, port)) => {
                let port = port.parse().ok().filter(|port| *port != 0);
                (
                    host,
                    Ports::One(port.ok_or("not a port; write a number or *")?),
                )
            }
            None => (s, Ports::Default),
        };
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        if let Ok(range) = bare.parse::<Cidr>() {
            return Ok(Self::whole(range, ports));
        }
        match host.strip_prefix("*.") {
            Some(domain) => Ok(Self::Below(domain.parse()?, ports)),
            None => Ok(Self::Host(host.parse()?, ports)),
        }
    }
}

impl TunnelPattern {
    fn whole(range: Cidr, ports: Ports) -> Self {
        Self::Range(range, ports)
    }
}

impl fmt::Display for TunnelPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports = match self {
            Self::Allow => return f.write_str("allow"),
            Self::Deny => return f.write_str("deny"),
            Self::Host(host, ports) => {
                write!(f, "{host}")?;
                ports
            }
            Self::Below(domain, ports) => {
                write!(f, "*.{domain}")?;
                ports
            }
            Self::Range(range, ports) => {
                match (ports, range.0) {
                    (Ports::Default, _) | (_, IpNet::V4(_)) => write!(f, "{range}")?,
                    _ => write!(f, "[{range}]")?,
                }
                ports
            }
        };
        match ports {
            Ports::Default => Ok(()),
            Ports::One(port) => write!(f, ":{port}"),
            Ports::Any => f.write_str(":*"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn listed(patterns: &[&str]) -> Tunnels {
        Tunnels::new(patterns.iter().map(|p| p.parse().unwrap()).collect()).unwrap()
    }

    #[test]
    fn patterns_fit_hosts_ports_and_addresses() {
        let tunnels = listed(&[
            "a.example",
            "*.b.example:8443",
            "10.0.0.0/8:*",
            "[fd00::/8]:22",
        ]);
        for (asked, permitted) in [
            ("a.example:443", true),
            ("a.example:8443", false),
            ("x.a.example:443", false),
            ("x.b.example:8443", true),
            ("x.b.example:443", false),
            ("b.example:8443", false),
            ("xb.example:8443", false),
            ("10.1.2.3:5", true),
            ("11.1.2.3:443", false),
            ("[fd00::1]:22", true),
        ] {
            assert_eq!(
                tunnels.permits(&asked.parse().unwrap()),
                permitted,
                "{asked}"
            );
        }
    }

    #[test]
    fn a_wildcard_lists_no_addresses_and_a_name_does() {
        let tunnels = listed(&["a.example", "*.b.example", "192.168.1.0/24"]);
        let inside: IpAddr = "10.0.0.1".parse().unwrap();
        assert!(tunnels.lists(&"a.example:443".parse().unwrap(), inside));
        assert!(!tunnels.lists(&"x.b.example:443".parse().unwrap(), inside));
        let range: IpAddr = "192.168.1.9".parse().unwrap();
        assert!(tunnels.lists(&"x.b.example:443".parse().unwrap(), range));
        assert!(!Tunnels::Allow.lists(&"a.example:443".parse().unwrap(), inside));
    }

    #[test]
    fn patterns_survive_printing_and_nonsense_is_refused() {
        for text in [
            "allow",
            "deny",
            "a.example",
            "*.a.example:*",
            "10.0.0.0/8:22",
            "[fd00::/8]:22",
            "fd00::/8",
        ] {
            let pattern: TunnelPattern = text.parse().unwrap();
            assert_eq!(pattern.to_string(), text);
        }
        assert_eq!("ALLOW".parse(), Ok(TunnelPattern::Allow));
        for bad in ["", "a:0", "a:x", "*", "*.", "a b", "*a.example", "allow."] {
            assert!(bad.parse::<TunnelPattern>().is_err(), "{bad}");
        }
        let mixed = ["allow", "a.example"].map(|p| p.parse().unwrap()).to_vec();
        assert!(Tunnels::new(mixed).is_err());
    }

    #[test]
    fn ranges_hold_mapped_addresses() {
        let range: Cidr = "10.0.0.0/8".parse().unwrap();
        assert!(range.contains("::ffff:10.1.1.1".parse().unwrap()));
        assert!(!range.contains("11.1.1.1".parse().unwrap()));
        let mapped: Cidr = "::ffff:10.0.0.0/104".parse().unwrap();
        assert_eq!(mapped, range);
        let all: Cidr = "::/0".parse().unwrap();
        assert_eq!(all.to_string(), "::/0");
        assert!(
            "10.0.0.1"
                .parse::<Cidr>()
                .unwrap()
                .contains("10.0.0.1".parse().unwrap())
        );
        assert!("10.0.0.0/33".parse::<Cidr>().is_err());
    }
}
