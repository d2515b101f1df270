//! Connecting: overrides, resolution, the guard, a parent proxy. One dial serves tunnels and
//! fetches, so that no way round the guard exists.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use base64::Engine as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

use super::guard::{Reach, judge};
use crate::config::{Authority, ConnectTo, HostName, Parent, Tunnels};
use crate::error::{Error, Kind};

/// For all addresses of a name together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For one address where there are others to try.
const ADDRESS_TIMEOUT: Duration = Duration::from_secs(2);
const PARENT_HEAD_LIMIT: usize = 16 * 1024;

/// How larder connects to anybody.
pub struct Dialer {
    pub offline: bool,
    pub reach: Reach,
    pub connect_to: Vec<ConnectTo>,
    /// Hosts that the user named: they may be anywhere but larder itself.
    pub configured: Vec<Authority>,
    /// What the user listed of hosts, ports and addresses to tunnel to
    pub listed: Tunnels,
    pub parent: Option<ParentProxy>,
    /// Where larder listens.
    pub own: Vec<SocketAddr>,
}

/// A parent proxy and who is asked without it.
#[derive(Clone, Debug)]
pub struct ParentProxy {
    pub proxy: Parent,
    pub except: NoProxy,
}

impl Dialer {
    /// A TCP connection to where `asked` leads, past the guard.
    pub async fn dial(&self, asked: &Authority) -> Result<TcpStream, Error> {
        if self.offline {
            return Err(Error::new(
                Kind::Offline,
                format!(
                    "{asked} was not connected to: larder is offline; start it without --offline"
                ),
            ));
        }
        timeout(CONNECT_TIMEOUT, self.dial_unbounded(asked))
            .await
            .unwrap_or_else(|_| {
                Err(Error::new(
                    Kind::Timeout,
                    format!("{asked} did not answer within {} s; check the network, or set --upstream-proxy if it is reached through one", CONNECT_TIMEOUT.as_secs()),
                ))
            })
    }

    /// Ports that may be reached on targets nobody named.
    fn judge_port(&self, asked: &Authority) -> Result<(), Error> {
        let allowed = match self.reach {
            Reach::LikeTheUser => asked.port != 25,
            Reach::PublicOnly => asked.port == 443,
        };
        match allowed || self.listed.lists_port(asked) {
            true => Ok(()),
            false => Err(Error::new(
                Kind::Denied,
                format!(
                    "{asked}: port {} is not connected to; name the target with --tunnel or --connect-to if it is meant",
                    asked.port
                ),
            )),
        }
    }

    fn overridden(&self, asked: &Authority) -> Option<Authority> {
        self.connect_to.iter().find_map(|rule| rule.apply(asked))
    }

    async fn dial_unbounded(&self, asked: &Authority) -> Result<TcpStream, Error> {
        if let Some(target) = self.overridden(asked) {
            return self.connect(asked, &target, None).await;
        }
        let guard = (!self.configured.contains(asked)).then_some(self.reach);
        if guard.is_some() {
            self.judge_port(asked)?;
        }
        if let Some(parent) = &self.parent
            && !parent.except.covers(asked)
        {
            // Behind a parent, names are its to resolve: literals are all that can be judged.
            if let (Some(ip), Some(reach)) = (asked.host.ip(), guard) {
                self.judge(asked, ip, reach)?;
            }
            let proxy = &parent.proxy.authority;
            let stream = self.connect(proxy, proxy, None).await.map_err(|e| {
                let words = format!("{asked} is reached through the parent proxy {proxy} (--upstream-proxy, or HTTPS_PROXY as inherited), but {e}");
                Error::new(e.kind(), words)
            })?;
            return connect_through(stream, asked, &parent.proxy).await;
        }
        self.connect(asked, asked, guard).await
    }

    async fn connect(
        &self,
        asked: &Authority,
        target: &Authority,
        guard: Option<Reach>,
    ) -> Result<TcpStream, Error> {
        let addresses = resolve(target).await?;
        let mut refused = None;
        let mut allowed = Vec::new();
        for address in addresses {
            if self.is_own(address) {
                refused = Some(Error::new(
                    Kind::Loop,
                    format!(
                        "{asked} leads to {address}, which is larder itself; mend DNS, /etc/hosts or --connect-to"
                    ),
                ));
            } else if let Some(Err(e)) = guard.map(|reach| self.judge(asked, address.ip(), reach)) {
                refused = Some(e);
            } else {
                allowed.push(address);
            }
        }
        let mut last = refused.unwrap_or_else(|| {
            Error::new(Kind::Dns, format!("{asked} has no address; check the name"))
        });
        let count = allowed.len();
        for (i, address) in allowed.into_iter().enumerate() {
            let patience = if i + 1 < count {
                ADDRESS_TIMEOUT
            } else {
                CONNECT_TIMEOUT
            };
            match timeout(patience, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => {
                    // Without it, small requests wait for the peer's delayed acknowledgement.
                    let _ = stream.set_nodelay(true);
                    return Ok(stream);
                }
                Ok(Err(e)) => {
                    last = Error::new(
                        Kind::ConnectFailed,
                        format!(
                            "{asked} cannot be connected to at {address}: {e}; check the network"
                        ),
                    );
                }
                Err(_) => {
                    last = Error::new(
                        Kind::Timeout,
                        format!("{asked} did not answer at {address}; check the network"),
                    );
                }
            }
        }
        Err(last)
    }

    fn judge(&self, asked: &Authority, ip: IpAddr, reach: Reach) -> Result<(), Error> {
        match judge(ip, reach) {
            Err(what) if !self.listed.lists(asked, ip) => Err(prohibited(asked, ip, what)),
            _ => Ok(()),
        }
    }

    fn is_own(&self, address: SocketAddr) -> bool {
        self.own.iter().any(|listener| {
            listener.port() == address.port()
                && (listener.ip() == address.ip()
                    || address.ip().is_unspecified()
                    || listener.ip().is_unspecified() && is_local(address.ip()))
        })
    }
}

/// Whether the address is one of this machine's: only those can be bound.
fn is_local(ip: IpAddr) -> bool {
    ip.is_loopback() || std::net::UdpSocket::bind((ip, 0)).is_ok()
}

async fn resolve(target: &Authority) -> Result<Vec<SocketAddr>, Error> {
    if let Some(ip) = target.host.ip() {
        return Ok(vec![SocketAddr::new(ip, target.port)]);
    }
    lookup_host((target.host.as_str(), target.port))
        .await
        .map(Iterator::collect)
        .map_err(|e| {
            Error::new(
                Kind::Dns,
                format!(
                    "{} cannot be resolved: {e}; check the name and DNS",
                    target.host
                ),
            )
        })
}

fn prohibited(asked: &Authority, ip: IpAddr, what: &str) -> Error {
    Error::new(
        Kind::ProhibitedAddress,
        format!(
            "{asked} leads to {ip}, {what}, where larder does not connect; name it with --tunnel, --connect-to or --intercept if it is meant"
        ),
    )
}

/// RFC 9110 section 9.3.6, as a client.
async fn connect_through(
    mut stream: TcpStream,
    asked: &Authority,
    parent: &Parent,
) -> Result<TcpStream, Error> {
    let failed = |why: String| {
        Error::new(
            Kind::ConnectFailed,
            format!(
                "parent proxy {}: {why} for {asked}; check --upstream-proxy",
                parent.authority
            ),
        )
    };
    let mut request = format!("CONNECT {asked} HTTP/1.1\r\nHost: {asked}\r\n");
    if let Some((user, password)) = &parent.credentials {
        let token = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        request.push_str(&format!("Proxy-Authorization: Basic {token}\r\n"));
    }
    request.push_str("\r\n");
    stream
        .write_all(request.as_bytes())
        .await
        .map_err(|e| failed(e.to_string()))?;
    // Byte by byte: what follows the head belongs to the tunnel.
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > PARENT_HEAD_LIMIT {
            return Err(failed("sent an endless answer".into()));
        }
        head.push(stream.read_u8().await.map_err(|e| failed(e.to_string()))?);
    }
    let head = String::from_utf8_lossy(&head);
    let status_line = head.lines().next().unwrap_or_default();
    match status_line.split(' ').nth(1) {
        Some(status) if status.starts_with('2') => Ok(stream),
        _ => Err(failed(format!("answered `{status_line}`"))),
    }
}

/// `NO_PROXY`: hosts that are asked without the parent.
#[derive(Clone, Debug, Default)]
pub struct NoProxy(Vec<String>);

impl NoProxy {
    /// Entries by commas: a name (with all below it), an address, `HOST:PORT`, or `*`.
    pub fn parse(list: &str) -> Self {
        Self(
            list.split(',')
                .map(|entry| entry.trim().to_ascii_lowercase())
                .filter(|entry| !entry.is_empty())
                .collect(),
        )
    }

    pub fn covers(&self, asked: &Authority) -> bool {
        if asked.host.as_str() == "localhost" || asked.host.ip().is_some_and(|ip| ip.is_loopback())
        {
            return true;
        }
        self.0.iter().any(|entry| {
            if entry == "*" {
                return true;
            }
            let (name, port_fits) = match entry.rsplit_once(':') {
                Some((name, port)) if port.parse::<u16>().is_ok() && !name.contains(':') => {
                    (name, port == asked.port.to_string())
                }
                _ => (entry.as_str(), true),
            };
            let name = name.trim_start_matches("*.").trim_start_matches('.');
            port_fits && below(&asked.host, name)
        })
    }
}

fn below(host: &HostName, base: &str) -> bool {
    host.as_str()
        .strip_suffix(base)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn no_proxy_covers_names_below_addresses_and_ports() {
        let list = NoProxy::parse("corp.example, .dot.example,10.0.0.1,port.example:8443");
        let covers = |s: &str| list.covers(&s.parse().unwrap());
        for yes in [
            "corp.example",
            "a.corp.example",
            "x.dot.example",
            "10.0.0.1",
            "port.example:8443",
            "localhost",
        ] {
            assert!(covers(yes), "{yes}");
        }
        for no in ["ecorp.example", "example", "10.0.0.2", "port.example"] {
            assert!(!covers(no), "{no}");
        }
        assert!(NoProxy::parse("*").covers(&"any.example".parse().unwrap()));
    }

    fn dialer(listener: SocketAddr) -> Dialer {
        Dialer {
            offline: false,
            reach: Reach::LikeTheUser,
            connect_to: vec![],
            configured: vec![],
            listed: Tunnels::default(),
            parent: None,
            own: vec![listener],
        }
    }

    #[tokio::test]
    async fn a_dial_that_ends_at_larder_is_a_loop_even_when_configured() {
        let listener = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let own = listener.local_addr().unwrap();
        let mut dialer = dialer(own);
        let asked: Authority = "registry.terraform.io".parse().unwrap();
        dialer.connect_to = vec![format!("::127.0.0.1:{}", own.port()).parse().unwrap()];
        assert_eq!(dialer.dial(&asked).await.unwrap_err().kind(), Kind::Loop);
    }

    #[tokio::test]
    async fn loopback_is_dialled_only_where_it_is_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut dialer = dialer("127.0.0.1:1".parse().unwrap());
        let asked: Authority = format!("localhost:{port}").parse().unwrap();
        assert_eq!(
            dialer.dial(&asked).await.unwrap_err().kind(),
            Kind::ProhibitedAddress
        );
        dialer.configured.push(asked.clone());
        assert!(dialer.dial(&asked).await.is_ok());
    }

    #[tokio::test]
    async fn offline_dials_nobody() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let asked: Authority = listener.local_addr().unwrap().to_string().parse().unwrap();
        let mut dialer = dialer("127.0.0.1:1".parse().unwrap());
        dialer.configured.push(asked.clone());
        dialer.offline = true;
        assert_eq!(dialer.dial(&asked).await.unwrap_err().kind(), Kind::Offline);
    }
}
