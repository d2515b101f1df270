//! Connecting: overrides, resolution, the guard, a parent proxy. One dial serves tunnels and
//! fetches, so that no way round the guard exists.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

use super::guard::{Reach, judge};
use super::parent::ParentProxy;
use crate::config::{Authority, ConnectTo, HostName, Tunnels};
use crate::error::{Error, Kind};

/// For all addresses of a name together, and all that a parent proxy does.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For one address where there are others to try.
const ADDRESS_TIMEOUT: Duration = Duration::from_secs(2);

/// What was connected to: over TCP, or through a parent proxy by TLS over TCP.
pub type Dialled = Box<dyn Stream>;

pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// How larder connects to anybody.
pub struct Dialer {
    pub offline: bool,
    pub reach: Reach,
    pub connect_to: Vec<ConnectTo>,
    /// Hosts that the user named: they may be anywhere but larder itself.
    pub configured: Vec<Authority>,
    /// What the user listed of hosts, ports and addresses to tunnel to
    pub listed: Tunnels,
    /// The registries that are asked for whoever names them, where they are listed
    pub mirrors: Tunnels,
    pub parent: Option<ParentProxy>,
    /// Where larder listens.
    pub own: Vec<SocketAddr>,
}

/// How far a target that nobody configured may lie.
#[derive(Clone, Copy)]
struct Guard<'a> {
    reach: Reach,
    /// By any of which it may be listed
    listed: [&'a Tunnels; 2],
}

impl Dialer {
    /// A connection to where `asked` leads, past the guard.
    pub async fn dial(&self, asked: &Authority) -> Result<Dialled, Error> {
        self.dial_to(asked, None, [&self.listed; 2]).await
    }

    /// The same for a fetch of larder's own: registries that are asked by name may be listed.
    pub async fn dial_origin(&self, asked: &Authority) -> Result<Dialled, Error> {
        self.dial_to(asked, None, [&self.listed, &self.mirrors])
            .await
    }

    /// A connection to `at`, where a client was on its way to `asked` when the kernel sent it here.
    pub async fn dial_at(&self, asked: &Authority, at: SocketAddr) -> Result<Dialled, Error> {
        self.dial_to(asked, Some(at), [&self.listed; 2]).await
    }

    async fn dial_to(
        &self,
        asked: &Authority,
        at: Option<SocketAddr>,
        listed: [&Tunnels; 2],
    ) -> Result<Dialled, Error> {
        if self.offline {
            return Err(Error::new(
                Kind::Offline,
                format!(
                    "{asked} was not connected to: larder is offline; start it without --offline"
                ),
            ));
        }
        timeout(CONNECT_TIMEOUT, self.dial_unbounded(asked, at, listed))
            .await
            .unwrap_or_else(|_| {
                let seconds = CONNECT_TIMEOUT.as_secs();
                let words = match self.parent_of(asked) {
                    None => format!("{asked} did not answer within {seconds} s; check the network, or set --upstream-proxy if it is reached through one"),
                    Some(parent) => format!("{asked} is reached through the parent proxy {}, which did not lead there within {seconds} s; check --upstream-proxy, or HTTPS_PROXY as inherited", parent.proxy),
                };
                Err(Error::new(Kind::Timeout, words))
            })
    }

    /// The parent through which `asked` is reached.
    pub fn parent_of(&self, asked: &Authority) -> Option<&ParentProxy> {
        if self.overridden(asked).is_some() {
            return None;
        }
        self.parent
            .as_ref()
            .filter(|parent| !parent.except.covers(asked))
    }

    /// ` through the parent proxy …`, for words about a failure on the way to `asked`.
    pub fn by_way_of(&self, asked: &Authority) -> String {
        match self.parent_of(asked) {
            Some(parent) => format!(" through the parent proxy {}", parent.proxy),
            None => String::new(),
        }
    }

    /// Ports that may be reached on targets nobody named.
    fn judge_port(asked: &Authority, guard: Guard<'_>) -> Result<(), Error> {
        let allowed = match guard.reach {
            Reach::LikeTheUser => asked.port != 25,
            Reach::PublicOnly => asked.port == 443,
        };
        match allowed || guard.listed.iter().any(|l| l.lists_port(asked)) {
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

    async fn dial_unbounded(
        &self,
        asked: &Authority,
        at: Option<SocketAddr>,
        listed: [&Tunnels; 2],
    ) -> Result<Dialled, Error> {
        if let Some(target) = self.overridden(asked) {
            return Ok(Box::new(self.connect(asked, &target, None).await?));
        }
        let reach = self.reach;
        let guard = (!self.configured.contains(asked)).then_some(Guard { reach, listed });
        if let Some(guard) = guard {
            Self::judge_port(asked, guard)?;
        }
        if let Some(parent) = self.parent_of(asked) {
            // Behind a parent, names are its to resolve: literals are all that can be judged.
            if let (Some(ip), Some(guard)) = (asked.host.ip(), guard) {
                Self::judge(asked, ip, guard)?;
            }
            let proxy = &parent.proxy.authority;
            let tcp = self.connect(proxy, proxy, None).await.map_err(|e| {
                let words = format!("{asked} is reached through the parent proxy {} (--upstream-proxy, or HTTPS_PROXY as inherited), but {e}", parent.proxy);
                Error::new(e.kind(), words)
            })?;
            return parent.lead(Box::new(tcp), asked).await;
        }
        let Some(at) = at else {
            return Ok(Box::new(self.connect(asked, asked, guard).await?));
        };
        if is_local(at.ip()) && !self.listed.lists_address(at) {
            return Err(Error::new(
                Kind::Loop,
                format!(
                    "{asked} was to be reached at {at}, which is this machine; mend the redirect"
                ),
            ));
        }
        self.judge_claim(asked, at).await?;
        let there = Authority::new(host_of(at.ip()), at.port());
        Ok(Box::new(self.connect(asked, &there, guard).await?))
    }

    /// Whether `asked`, which the client says, is where it was going: rules that list names would
    /// otherwise be as good as none.
    async fn judge_claim(&self, asked: &Authority, at: SocketAddr) -> Result<(), Error> {
        if !self.listed.is_list() || self.listed.lists_address(at) {
            return Ok(());
        }
        let known = resolve(asked).await?;
        match known.iter().any(|address| address.ip() == at.ip()) {
            true => Ok(()),
            false => Err(Error::new(
                Kind::Denied,
                format!(
                    "{asked} is not at {at}, where the client was going; the list `tunnel` goes by names"
                ),
            )),
        }
    }

    async fn connect(
        &self,
        asked: &Authority,
        target: &Authority,
        guard: Option<Guard<'_>>,
    ) -> Result<TcpStream, Error> {
        let addresses = resolve(target).await?;
        let mut refused = None;
        let mut allowed = Vec::new();
        for address in addresses {
            if is_own(&self.own, address) {
                refused = Some(Error::new(
                    Kind::Loop,
                    format!(
                        "{asked} leads to {address}, which is larder itself; mend DNS, /etc/hosts or --connect-to"
                    ),
                ));
            } else if let Some(Err(e)) = guard.map(|guard| Self::judge(asked, address.ip(), guard))
            {
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

    fn judge(asked: &Authority, ip: IpAddr, guard: Guard<'_>) -> Result<(), Error> {
        match judge(ip, guard.reach) {
            Err(what) if !guard.listed.iter().any(|l| l.lists(asked, ip)) => {
                Err(prohibited(asked, ip, what))
            }
            _ => Ok(()),
        }
    }
}

/// Whether somebody who connects to `address` reaches one of these listeners.
pub fn is_own(listeners: &[SocketAddr], address: SocketAddr) -> bool {
    listeners.iter().any(|listener| {
        listener.port() == address.port()
            && (listener.ip() == address.ip()
                || address.ip().is_unspecified()
                || listener.ip().is_unspecified() && is_local(address.ip()))
    })
}

/// Whether the address is one of this machine's: only those can be bound.
fn is_local(ip: IpAddr) -> bool {
    ip.is_loopback() || std::net::UdpSocket::bind((ip, 0)).is_ok()
}

fn host_of(ip: IpAddr) -> HostName {
    let text = ip.to_string();
    text.parse().expect("an address is a host")
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn dialer(listener: SocketAddr) -> Dialer {
        Dialer {
            offline: false,
            reach: Reach::LikeTheUser,
            connect_to: vec![],
            configured: vec![],
            listed: Tunnels::default(),
            mirrors: Tunnels::default(),
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
        assert_eq!(dialer.dial(&asked).await.err().unwrap().kind(), Kind::Loop);
    }

    #[tokio::test]
    async fn loopback_is_dialled_only_where_it_is_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut dialer = dialer("127.0.0.1:1".parse().unwrap());
        let asked: Authority = format!("localhost:{port}").parse().unwrap();
        assert_eq!(
            dialer.dial(&asked).await.err().unwrap().kind(),
            Kind::ProhibitedAddress
        );
        dialer.configured.push(asked.clone());
        assert!(dialer.dial(&asked).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_parent_that_says_nothing_is_waited_for_no_longer_than_anybody() {
        for scheme in ["http", "https", "socks5"] {
            let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("{scheme}://u:SECRET@{}", silent.local_addr().unwrap());
            let mut dialer = dialer("127.0.0.1:1".parse().unwrap());
            dialer.parent = Some(ParentProxy {
                proxy: url.parse().unwrap(),
                except: Default::default(),
                tls: crate::upstream::tls(Vec::new()).unwrap(),
            });
            let start = tokio::time::Instant::now();
            let asked = "a.example".parse().unwrap();
            let e = dialer.dial(&asked).await.err().unwrap();
            assert!(start.elapsed() <= CONNECT_TIMEOUT, "{:?}", start.elapsed());
            assert_eq!(e.kind(), Kind::Timeout);
            let told = e.to_string();
            assert!(
                told.contains("a.example:443") && !told.contains("SECRET"),
                "{told}"
            );
            assert!(
                told.contains(&format!("parent proxy {scheme}://127.0.0.1")),
                "{told}"
            );
        }
    }

    #[tokio::test]
    async fn offline_dials_nobody() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let asked: Authority = listener.local_addr().unwrap().to_string().parse().unwrap();
        let mut dialer = dialer("127.0.0.1:1".parse().unwrap());
        dialer.configured.push(asked.clone());
        dialer.offline = true;
        assert_eq!(
            dialer.dial(&asked).await.err().unwrap().kind(),
            Kind::Offline
        );
    }
}
