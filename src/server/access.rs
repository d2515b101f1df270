//! Who may use the proxy and its pages: addresses, credentials (RFC 9110 section 11), client
//! certificates, and how many connections one address may have.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, Weak};

use hmac::{Hmac, Mac as _};
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderName, PROXY_AUTHORIZATION};
use sha2::Sha256;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::users::{Users, basic, bearer, random};
use crate::config::{Cidr, Config};
use crate::digest::Digest;
use crate::error::{Error, Exit, Kind};
use crate::sync::lock;
use crate::telemetry::METRICS;

/// Connections of addresses that may not use larder; further ones are closed.
const STRANGERS: usize = 64;

/// What an address may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Use the proxy
    Allowed,
    /// Look at larder's own pages: this machine's own checks and commands
    PagesOnly,
    Stranger,
}

/// The gatekeeper of a server.
pub struct Access {
    allow_from: Vec<Cidr>,
    users: Option<Arc<Users>>,
    wants_certificate: bool,
    per_address: usize,
    connections: Arc<Mutex<HashMap<IpAddr, usize>>>,
    /// Connections that are only told that they are not welcome
    strangers: Arc<Semaphore>,
    tunnels: Arc<Semaphore>,
    tunnels_per_address: usize,
    tunnels_of: Arc<Mutex<HashMap<IpAddr, Weak<Semaphore>>>>,
    seal: Seal,
}

impl Access {
    /// `login` is what this machine's user passes with, as `USER:PASSWORD`.
    pub fn new(config: &Config, login: Option<String>) -> Result<Self, Exit> {
        let users = config.htpasswd.as_deref();
        let users = users.map(|path| Users::open(path, login)).transpose()?;
        Ok(Self {
            allow_from: config.allow_from.clone(),
            users: users.map(Arc::new),
            wants_certificate: config.client_ca.is_some(),
            per_address: config.limits.connections_per_address,
            connections: Arc::default(),
            strangers: Arc::new(Semaphore::new(STRANGERS)),
            tunnels: Arc::new(Semaphore::new(config.limits.tunnels)),
            tunnels_per_address: match config.loopback_only() {
                true => config.limits.tunnels,
                false => config.limits.tunnels.div_ceil(2),
            },
            tunnels_of: Arc::default(),
            seal: Seal(random()?),
        })
    }

    /// By another configuration: who is connected counts on, who is known stays known.
    ///
    /// # Errors
    /// When the users cannot be read.
    pub fn renewed(&self, config: &Config, login: Option<String>) -> Result<Self, Exit> {
        let same = |users: &&Arc<Users>| Some(users.path()) == config.htpasswd.as_deref();
        let users = match (self.users.as_ref().filter(same), &config.htpasswd) {
            (Some(users), _) => Some(users.clone()),
            (None, Some(path)) => Some(Arc::new(Users::open(path, login)?)),
            (None, None) => None,
        };
        Ok(Self {
            allow_from: config.allow_from.clone(),
            users,
            wants_certificate: config.client_ca.is_some(),
            per_address: config.limits.connections_per_address,
            connections: self.connections.clone(),
            strangers: self.strangers.clone(),
            tunnels: self.tunnels.clone(),
            tunnels_per_address: self.tunnels_per_address,
            tunnels_of: self.tunnels_of.clone(),
            seal: self.seal.clone(),
        })
    }

    pub fn standing(&self, ip: IpAddr) -> Standing {
        let ip = ip.to_canonical();
        if self.allow_from.iter().any(|range| range.contains(ip)) {
            Standing::Allowed
        } else if ip.is_loopback() {
            Standing::PagesOnly
        } else {
            Standing::Stranger
        }
    }

    /// Whether a connection that says nothing of its user may be served as a proxy's.
    pub fn is_open(&self) -> bool {
        self.users.is_none() && !self.wants_certificate
    }

    /// Counts a connection of an address; none if it has too many.
    /// `permit` is its place among those of all addresses.
    pub fn admit(self: &Arc<Self>, ip: IpAddr, permit: OwnedSemaphorePermit) -> Option<Place> {
        let permit = match self.standing(ip) {
            // They take no place from those who are.
            Standing::Stranger => self.strangers.clone().try_acquire_owned().ok()?,
            _ => permit,
        };
        let from = network(ip);
        let mut connections = lock(&self.connections);
        let count = connections.entry(from).or_default();
        if *count >= self.per_address {
            METRICS.connections_refused.inc();
            return None;
        }
        *count += 1;
        METRICS.connections.inc();
        Some(Place {
            _permit: permit,
            access: self.clone(),
            from,
        })
    }

    /// A place for a tunnel, if there is one: of one address no more than half of all.
    pub fn tunnel(&self, ip: IpAddr) -> Option<TunnelPlace> {
        let share = {
            let mut all = lock(&self.tunnels_of);
            all.retain(|_, share| share.strong_count() > 0);
            let share = all.get(&network(ip)).and_then(Weak::upgrade);
            share.unwrap_or_else(|| {
                let share = Arc::new(Semaphore::new(self.tunnels_per_address));
                all.insert(network(ip), Arc::downgrade(&share));
                share
            })
        };
        Some(TunnelPlace {
            _share: share.try_acquire_owned().ok()?,
            _permit: self.tunnels.clone().try_acquire_owned().ok()?,
        })
    }

    /// Whether the request may be proxied.
    ///
    /// # Errors
    /// `Denied` for a foreign address or a missing certificate, `Unauthenticated` without good
    /// credentials, `Busy` where too many wrong ones were given.
    pub async fn authorize(
        &self,
        ip: IpAddr,
        standing: Standing,
        certified: bool,
        headers: &HeaderMap,
    ) -> Result<(), Error> {
        if standing != Standing::Allowed {
            return Err(stranger(ip));
        }
        if self.wants_certificate && !certified {
            return Err(uncertified());
        }
        match &self.users {
            Some(users) => {
                let given = sole(headers, PROXY_AUTHORIZATION).and_then(basic);
                let given = given.ok_or_else(|| {
                    Error::new(
                        Kind::Unauthenticated,
                        "this proxy takes a user and a password; write HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT",
                    )
                });
                users.check(ip, given?).await
            }
            None => Ok(()),
        }
    }

    /// Whether a page that asks upstream may be had. Users say who they are by `Authorization`, with
    /// Basic, or with `USER:PASSWORD` as the bearer token that Terraform knows for the host; or by
    /// a URL with a seal, which a document gave them.
    ///
    /// # Errors
    /// As [`Self::authorize`], but `Unauthorized` without good credentials.
    pub async fn authorize_page(
        &self,
        ip: IpAddr,
        standing: Standing,
        certified: bool,
        headers: &HeaderMap,
        (path, query): (&str, Option<&str>),
    ) -> Result<(), Error> {
        let Some(users) = &self.users else {
            return self.authorize(ip, standing, certified, headers).await;
        };
        if standing != Standing::Allowed {
            return Err(stranger(ip));
        }
        if self.wants_certificate && !certified {
            return Err(uncertified());
        }
        if self.seal.fits(path, query) {
            return Ok(());
        }
        let given = sole(headers, AUTHORIZATION);
        let given = given.and_then(|value| basic(value).or_else(|| bearer(value)));
        let given = given.ok_or_else(|| {
            Error::new(
                Kind::Unauthorized,
                "this larder takes a user and a password; write them into its URL, or give Terraform USER:PASSWORD as the token for this host",
            )
        });
        let checked = users.check(ip, given?).await;
        checked.map_err(|e| match e.kind() {
            Kind::Unauthenticated => Error::new(Kind::Unauthorized, e.to_string()),
            _ => e,
        })
    }

    /// What makes URLs good without credentials, where there are users.
    pub fn seal(&self) -> Option<Seal> {
        self.users.as_ref().map(|_| self.seal.clone())
    }
}

/// Stands for its reader's credentials in the URL of one path, for as long as this process lives:
/// Terraform sends none with archives.
#[derive(Clone)]
pub struct Seal([u8; 32]);

impl Seal {
    const NAME: &str = "larder-seal=";

    /// The query that makes `path` good.
    pub fn query(&self, path: &str) -> String {
        let mac = self.mac(path).finalize().into_bytes();
        let hex: String = mac.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{}{hex}", Self::NAME)
    }

    /// A query without its seal.
    pub fn without(query: &str) -> String {
        let parts = query
            .split('&')
            .filter(|part| !part.starts_with(Self::NAME));
        parts.collect::<Vec<_>>().join("&")
    }

    fn fits(&self, path: &str, query: Option<&str>) -> bool {
        // Clients add to a query.
        let parts = query.unwrap_or_default().split('&');
        let mut given = parts.filter(|part| part.starts_with(Self::NAME));
        // Compared by digest, so that the time taken says nothing of the seal.
        given.any(|given| Digest::of(given.as_bytes()) == Digest::of(self.query(path).as_bytes()))
    }

    fn mac(&self, path: &str) -> Hmac<Sha256> {
        let mut mac =
            Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes a key of any length");
        mac.update(path.as_bytes());
        mac
    }
}

fn uncertified() -> Error {
    Error::new(
        Kind::Denied,
        "this proxy takes clients with a certificate alone: connect to it over TLS (HTTPS_PROXY=https://HOST:PORT) and present one",
    )
}

/// A header's value, where it is there once.
fn sole(headers: &HeaderMap, name: HeaderName) -> Option<&[u8]> {
    let mut given = headers.get_all(name).iter();
    let (Some(value), None) = (given.next(), given.next()) else {
        return None;
    };
    Some(value.as_bytes())
}

/// The refusal of an address that may not use larder.
pub fn stranger(ip: IpAddr) -> Error {
    Error::new(
        Kind::Denied,
        format!(
            "{} may not use this proxy; its operator can add it to allow_from",
            ip.to_canonical()
        ),
    )
}

/// A tunnel that counts.
pub struct TunnelPlace {
    _share: OwnedSemaphorePermit,
    _permit: OwnedSemaphorePermit,
}

/// A connection that counts; no more once it is dropped.
pub struct Place {
    _permit: OwnedSemaphorePermit,
    access: Arc<Access>,
    from: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        METRICS.connections.dec();
        let mut connections = lock(&self.access.connections);
        if let Some(count) = connections.get_mut(&self.from) {
            *count -= 1;
            if *count == 0 {
                connections.remove(&self.from);
            }
        }
    }
}

/// Who has an IPv6 address has its /64.
pub fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(v6) => {
            let bits = v6.to_bits() >> 64 << 64;
            Ipv6Addr::from_bits(bits).into()
        }
        v4 => v4,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_an_address_or_a_64() {
        let of = |ip: &str| network(ip.parse().unwrap()).to_string();
        assert_eq!(of("10.1.2.3"), "10.1.2.3");
        assert_eq!(of("::ffff:10.1.2.3"), "10.1.2.3");
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    }
}
