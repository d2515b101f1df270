//! One connection: what speaks on it is told by its first byte.

use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use rustls::server::Acceptor;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::LazyConfigAcceptor;

use super::access::{Place, Standing};
use super::io::{Patient, Peeked, Stream};
use super::leases::Whose;
use super::serving::{serve, serve_when_asked};
use super::{Entrance, proxy};
use crate::config::{Authority, HostName};

/// For what larder itself says at the end of a connection.
pub const LAST_WORDS: Duration = Duration::from_secs(5);
/// Bytes encrypted before they are written: several TLS records in one write.
const WRITE: usize = 256 << 10;
/// Bytes that the kernel takes for a client beyond what it can send. It would take megabytes, and a
/// thousand clients' come to more than `net.ipv4.tcp_mem` has for all: then windows shrink and packets are
/// dropped.
#[cfg(any(target_os = "linux", target_os = "android"))]
const UNSENT: u32 = 256 << 10;
/// Alert: fatal, `unrecognized_name` (RFC 6066 section 3)
const UNRECOGNIZED_NAME: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];
/// Alert: fatal, `access_denied` (RFC 8446 section 6.2)
pub const ACCESS_DENIED: [u8; 7] = [21, 3, 3, 0, 2, 2, 49];

/// Whom the requests on a connection are for.
#[derive(Clone)]
pub enum Role {
    /// The listener: proxying and own pages
    Front,
    /// Own pages alone: larder asked through larder
    Pages,
    /// An intercepted host
    Origin(Authority),
    /// Nothing: the address may not use larder
    Stranger,
}

/// What the requests on one connection share.
#[derive(Clone)]
pub struct Peer {
    pub entrance: Entrance,
    pub addr: SocketAddr,
    /// Held while draining must wait for this connection
    pub alive: Option<mpsc::Sender<()>>,
    /// The run whose connection it is, if there are runs
    pub whose: Option<Whose>,
    /// Requests whose answers are not over
    pub running: Arc<AtomicUsize>,
    /// Its place among all connections, for as long as anything of it lives
    pub _place: Arc<Place>,
    /// What its address may do
    pub standing: Standing,
    /// Whether it presented a client certificate
    pub certified: bool,
    /// Whether it came by TLS to larder's own name
    pub tls: bool,
    /// Whether it said who it is, where that is asked for
    pub identified: bool,
    /// Where it was going, if the kernel redirected it here
    pub redirected: Option<SocketAddr>,
}

/// A connection that was accepted.
pub async fn handle(
    entrance: Entrance,
    stream: TcpStream,
    addr: SocketAddr,
    alive: Option<mpsc::Sender<()>>,
    place: Place,
) {
    let _ = stream.set_nodelay(true);
    bound_unsent(&stream);
    let peer = Peer {
        whose: entrance.server.leases().whose(addr, entrance.local),
        addr,
        alive,
        running: Arc::default(),
        _place: Arc::new(place),
        standing: entrance.server.access.standing(addr.ip()),
        certified: false,
        tls: false,
        identified: false,
        redirected: original_destination(&stream),
        entrance,
    };
    let role = match peer.standing {
        Standing::Stranger => Role::Stranger,
        _ => Role::Front,
    };
    greet(peer, Patient::new(stream), role).await;
}

/// Leaves what is not sent yet with larder, which has a bound for it.
fn bound_unsent(stream: &TcpStream) {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    if let Err(error) = socket2::SockRef::from(stream).set_tcp_notsent_lowat(UNSENT) {
        tracing::debug!(%error, "TCP_NOTSENT_LOWAT");
    }
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    let _ = stream;
}

/// Boxed, since a connection may hold another one.
pub type Served = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Looks at the first byte and serves what speaks.
pub fn greet(peer: Peer, stream: impl Stream, role: Role) -> Served {
    then_served(Box::pin(greet_inner(peer, stream, role)))
}

/// After CONNECT to an intercepted host: TLS with the very name that was asked for.
pub fn intercept(peer: Peer, stream: impl Stream, authority: Authority) -> Served {
    then_served(Box::pin(intercept_inner(peer, stream, authority)))
}

/// What was needed to find out who speaks is given back before the connection is served: it may be
/// idle for long.
fn then_served(greeting: Pin<Box<dyn Future<Output = Option<Served>> + Send>>) -> Served {
    Box::pin(async move {
        if let Some(served) = greeting.await {
            served.await;
        }
    })
}

/// Where a connection was going before the kernel redirected it (Linux's netfilter remembers).
fn original_destination(stream: &TcpStream) -> Option<SocketAddr> {
    let local = stream.local_addr().ok()?;
    #[cfg(target_os = "linux")]
    let original = {
        use rustix::net::sockopt::{ip_original_dst, ipv6_original_dst};
        match local.ip().to_canonical() {
            IpAddr::V4(_) => SocketAddr::from(ip_original_dst(stream).ok()?),
            IpAddr::V6(_) => SocketAddr::from(ipv6_original_dst(stream).ok()?),
        }
    };
    #[cfg(not(target_os = "linux"))]
    let original = local;
    let same = original.ip() == local.ip().to_canonical() && original.port() == local.port();
    (!same).then_some(original)
}

async fn greet_inner(peer: Peer, stream: impl Stream, role: Role) -> Option<Served> {
    let mut draining = peer.entrance.server.shared.draining.subscribe();
    let patience = match role {
        Role::Stranger => LAST_WORDS,
        _ => peer.entrance.server.config.limits.handshake,
    };
    let peeked = tokio::select! {
        peeked = timeout(patience, Peeked::new(stream)) => peeked,
        _ = draining.wait_for(|on| *on) => return None,
    };
    let Ok(Ok(Some(mut stream))) = peeked else {
        return None;
    };
    if stream.is_tls() && matches!(role, Role::Stranger) {
        tracing::info!(client = %peer.addr.ip(), "TLS from an address that allow_from does not list; closed");
        let _ = timeout(LAST_WORDS, stream.write_all(&ACCESS_DENIED)).await;
        let _ = timeout(LAST_WORDS, stream.shutdown()).await;
        None
    } else if stream.is_tls() {
        accept_tls(peer, stream, None, role).await
    } else {
        Some(serve(peer, stream, role))
    }
}

async fn intercept_inner(peer: Peer, stream: impl Stream, authority: Authority) -> Option<Served> {
    let mut draining = peer.entrance.server.shared.draining.subscribe();
    let patience = peer.entrance.server.config.limits.handshake;
    let peeked = tokio::select! {
        peeked = timeout(patience, Peeked::new(stream)) => peeked,
        _ = draining.wait_for(|on| *on) => return None,
    };
    let Ok(Ok(Some(mut stream))) = peeked else {
        return None;
    };
    if stream.is_tls() {
        let role = Role::Origin(authority.clone());
        return accept_tls(peer, stream, Some(authority), role).await;
    }
    tracing::info!(peer = %peer.addr, host = %authority, "plain bytes after CONNECT; closed");
    let body = r#"{"errors":["larder: this host is served over TLS alone; use an https URL"]}"#;
    let answer = format!(
        "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    let _ = timeout(LAST_WORDS, stream.write_all(answer.as_bytes())).await;
    let _ = timeout(LAST_WORDS, stream.shutdown()).await;
    None
}

/// Shakes hands for the CONNECT's host, or for whom the ClientHello names.
async fn accept_tls<S: Stream>(
    peer: Peer,
    mut stream: Peeked<S>,
    connect: Option<Authority>,
    role: Role,
) -> Option<Served> {
    let server = peer.entrance.server.clone();
    let mut draining = server.shared.draining.subscribe();
    if peer.redirected.is_some() && connect.is_none() {
        stream.record();
    }
    let handshake = async {
        let mut start = LazyConfigAcceptor::new(Acceptor::default(), stream)
            .await
            .ok()?;
        let named = start.client_hello().server_name().map(str::to_owned);
        let named: Option<HostName> = match named {
            Some(name) => Some(name.parse().ok()?),
            None => None,
        };
        let chosen = choose(&peer, connect.as_ref(), named.as_ref(), role);
        let chosen_is_none = chosen.is_none();
        let config = chosen.as_ref().and_then(|(name, role)| {
            let config = match role {
                Role::Origin(_) => server.ca.server_config(name),
                _ => server.ca.own_config(name),
            };
            config
                .inspect_err(|error| tracing::error!(%name, %error, "a leaf cannot be minted"))
                .ok()
        });
        let (Some((_, role)), Some(config)) = (chosen, config) else {
            if let (Some(at), None) = (peer.redirected, &connect)
                && chosen_is_none
            {
                let hello = start.io.recorded();
                return Some(Greeted::Through(at, named, hello, start.io));
            }
            tracing::info!(peer = %peer.addr, sni = ?named.map(|n| n.to_string()), connect = ?connect.map(|a| a.to_string()), "TLS for a name that is not served here; closed");
            let mut stream = start.io;
            let _ = stream.write_all(&UNRECOGNIZED_NAME).await;
            let _ = stream.shutdown().await;
            return None;
        };
        start.io.recorded();
        let asks_clients = !matches!(role, Role::Origin(_));
        let tls = start.into_stream(config).await;
        if let Err(error) = &tls {
            tracing::debug!(peer = %peer.addr, %error, "TLS handshake failed; does the client trust larder's CA? `larder env` sets it up");
        }
        let mut tls = tls.ok()?;
        tls.get_mut().1.set_buffer_limit(Some(WRITE));
        // The session's certificates were checked by the verifier, now or when it began.
        let certified = asks_clients && tls.get_ref().1.peer_certificates().is_some();
        Some(Greeted::Tls(Box::new(tls), role, certified))
    };
    let done = tokio::select! {
        done = timeout(server.config.limits.handshake, handshake) => done,
        _ = draining.wait_for(|on| *on) => return None,
    };
    match done.ok()?? {
        Greeted::Through(at, named, hello, stream) => {
            Some(Box::pin(proxy::through(peer, stream, at, named, hello)))
        }
        Greeted::Tls(tls, role, certified) => {
            let certified = certified || peer.certified;
            let tls_peer = Peer {
                certified,
                tls: true,
                ..peer
            };
            Some(serve_when_asked(tls_peer, tls, role))
        }
    }
}

/// What came of a ClientHello.
enum Greeted<S> {
    /// It is served here
    Tls(Box<tokio_rustls::server::TlsStream<Peeked<S>>>, Role, bool),
    /// It is for somebody else: where it was going, whom it named, and its bytes
    Through(SocketAddr, Option<HostName>, Vec<u8>, Peeked<S>),
}

/// The name for the leaf, and whose requests come.
fn choose(
    peer: &Peer,
    connect: Option<&Authority>,
    named: Option<&HostName>,
    role: Role,
) -> Option<(HostName, Role)> {
    let server = &peer.entrance.server;
    if let Some(authority) = connect {
        let fits = match named {
            Some(name) => *name == authority.host,
            // Addresses are never named in a ClientHello (RFC 6066 section 3).
            None => authority.host.ip().is_some(),
        };
        return fits.then(|| (authority.host.clone(), role));
    }
    let Some(name) = named else {
        if peer.redirected.is_some() {
            return None;
        }
        let own: HostName = match peer.entrance.local.ip() {
            ip if ip.is_loopback() => ip.to_string().parse().ok()?,
            _ => "localhost".parse().ok()?,
        };
        return server.ca.serves_own(&own).then_some((own, role));
    };
    if server.is_own_name(name) {
        return server.ca.serves_own(name).then(|| (name.clone(), role));
    }
    if !server.ca.permits(name) {
        return None;
    }
    // Nobody has said who they are before a ClientHello.
    if peer.standing != Standing::Allowed || !server.access.is_open() {
        return None;
    }
    let port = peer.redirected.map(|at| at.port());
    let mut intercept = server.config.intercept.iter();
    let fits = |a: &&Authority| a.host == *name && port.is_none_or(|port| a.port == port);
    let authority = intercept.find(fits)?;
    Some((name.clone(), Role::Origin(authority.clone())))
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn the_kernel_holds_little_that_is_not_sent() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap());
        let (far, near) = tokio::join!(far, listener.accept());
        let (_far, (near, _)) = (far.unwrap(), near.unwrap());
        bound_unsent(&near);
        let bound = socket2::SockRef::from(&near).tcp_notsent_lowat().unwrap();
        assert_eq!(bound, UNSENT);
    }
}
