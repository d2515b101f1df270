//! Connections: what speaks on them, who they are for, how long they may take, and draining.

mod access;
pub mod conditional;
mod connection;
mod control;
mod io;
mod leases;
mod origin;
mod pages;
mod proxy;
mod relay;
mod respond;
mod serving;
mod tunnel;
mod users;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};

use crate::ca::Ca;
use crate::cache::Cache;
use crate::config::{Authority, Config, HostName};
use crate::error::Exit;
use crate::registry::Registry;
use crate::sync::lock;
use access::Access;

pub use leases::{Leases, MARK, Summary};

/// Everything that a request needs, by one reading of the configuration.
pub struct Server {
    pub config: Config,
    pub ca: Ca,
    pub cache: Arc<Cache>,
    pub registries: Vec<Arc<Registry>>,
    /// What the API asks for
    pub token: String,
    access: Arc<Access>,
    shared: Arc<Shared>,
}

/// What lasts from one reading of the configuration to the next.
struct Shared {
    connections: Arc<Semaphore>,
    draining: watch::Sender<bool>,
    leases: Arc<Leases>,
    /// Cloned into all that draining waits for
    alive: Mutex<Option<mpsc::Sender<()>>>,
    /// By the last reading; none before the first one is done
    current: RwLock<Option<Arc<Server>>>,
}

/// A listener's share in all its connections.
#[derive(Clone)]
struct Entrance {
    server: Arc<Server>,
    local: SocketAddr,
}

impl Server {
    /// # Errors
    /// When the users or the clients' CAs cannot be read.
    pub fn new(
        config: Config,
        mut ca: Ca,
        cache: Arc<Cache>,
        registries: Vec<Arc<Registry>>,
        token: String,
        login: Option<String>,
    ) -> Result<Arc<Self>, Exit> {
        let access = Access::new(&config, login)?;
        prepare(&mut ca, &config)?;
        let shared = Shared {
            connections: Arc::new(Semaphore::new(config.limits.connections)),
            draining: watch::Sender::new(false),
            leases: Arc::default(),
            alive: Mutex::default(),
            current: RwLock::default(),
        };
        let this = Arc::new(Self {
            access: Arc::new(access),
            shared: Arc::new(shared),
            config,
            ca,
            cache,
            registries,
            token,
        });
        this.become_current();
        Ok(this)
    }

    /// The same server by another configuration: requests that begin from now on are served by it.
    ///
    /// # Errors
    /// As for [`Self::new`]; then nothing changes.
    pub fn renew(
        &self,
        config: Config,
        mut ca: Ca,
        cache: impl FnOnce() -> Arc<Cache>,
        registries: Vec<Arc<Registry>>,
        login: Option<String>,
    ) -> Result<Arc<Self>, Exit> {
        let access = self.access.renewed(&config, login)?;
        prepare(&mut ca, &config)?;
        let cache = cache();
        let this = Arc::new(Self {
            access: Arc::new(access),
            shared: self.shared.clone(),
            token: self.token.clone(),
            config,
            ca,
            cache,
            registries,
        });
        this.become_current();
        Ok(this)
    }

    fn become_current(self: &Arc<Self>) {
        let current = self.shared.current.write();
        *current.unwrap_or_else(|e| e.into_inner()) = Some(self.clone());
    }

    /// By the last reading of the configuration.
    pub fn latest(self: &Arc<Self>) -> Arc<Self> {
        let current = self.shared.current.read();
        let current = current.unwrap_or_else(|e| e.into_inner());
        current.clone().unwrap_or_else(|| self.clone())
    }

    /// Serves on the listeners until `stop` comes, then drains: idle connections close at once,
    /// running requests may finish within the configured time.
    pub async fn run(self: Arc<Self>, listeners: Vec<TcpListener>, stop: impl Future<Output = ()>) {
        let (alive, mut all_gone) = mpsc::channel::<()>(1);
        *lock(&self.shared.alive) = Some(alive);
        for listener in listeners {
            tokio::spawn(self.clone().accept(listener));
        }
        stop.await;
        tracing::info!("draining");
        self.shared.leases.end();
        self.shared.draining.send_replace(true);
        lock(&self.shared.alive).take();
        let patience = self.latest().config.drain_timeout;
        let drained = tokio::time::timeout(patience, all_gone.recv()).await;
        match drained {
            Ok(_) => tracing::info!("drained"),
            Err(_) => {
                tracing::warn!("requests were still running after the drain timeout; cut short")
            }
        }
    }

    /// The runs that use this process.
    pub fn leases(&self) -> &Arc<Leases> {
        &self.shared.leases
    }

    /// Accepts until draining begins.
    async fn accept(self: Arc<Self>, listener: TcpListener) {
        let Ok(local) = listener.local_addr() else {
            return;
        };
        let mut draining = self.shared.draining.subscribe();
        loop {
            let accepted = tokio::select! {
                accepted = async {
                    let place = self.shared.connections.clone().acquire_owned().await;
                    (place, listener.accept().await)
                } => accepted,
                _ = draining.wait_for(|on| *on) => return,
            };
            match accepted {
                (Ok(permit), Ok((stream, peer))) => {
                    let server = self.latest();
                    let Some(place) = server.access.admit(peer.ip(), permit) else {
                        tracing::debug!(client = %peer.ip(), "closed: this address has too many connections");
                        continue;
                    };
                    let entrance = Entrance { server, local };
                    let alive = self.stay_alive();
                    tokio::spawn(connection::handle(entrance, stream, peer, alive, place));
                }
                (_, Err(error)) => {
                    // Out of file descriptors, say: others must close theirs first.
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                (Err(_), _) => return,
            }
        }
    }

    /// Something that draining waits for, until it is dropped. None when draining has begun.
    fn stay_alive(&self) -> Option<mpsc::Sender<()>> {
        lock(&self.shared.alive).clone()
    }

    /// Whether `host` is intercepted, on whatever port.
    fn is_intercepted_host(&self, host: &HostName) -> bool {
        self.config.intercept.iter().any(|a| a.host == *host)
    }

    fn is_intercepted(&self, authority: &Authority) -> bool {
        self.config.intercept.contains(authority)
    }

    /// Whether larder itself goes by that name.
    fn is_own_name(&self, host: &HostName) -> bool {
        host.as_str() == "localhost" || self.config.hostnames.contains(host)
    }
}

/// What the configuration says of larder's own names.
fn prepare(ca: &mut Ca, config: &Config) -> Result<(), Exit> {
    if let Some(path) = &config.client_ca {
        ca.ask_clients(path)?;
    }
    if let Some((cert, key)) = &config.own_certificate {
        ca.use_certificate(cert, key)?;
    }
    Ok(())
}

impl Entrance {
    /// Whether the authority is this listener.
    fn is_own(&self, authority: &Authority) -> bool {
        let by_address = |ip: std::net::IpAddr| {
            ip == self.local.ip()
                || ip.is_loopback()
                    && (self.local.ip().is_loopback() || self.local.ip().is_unspecified())
        };
        authority.port == self.local.port()
            && (self.server.is_own_name(&authority.host)
                || authority.host.ip().is_some_and(by_address))
    }
}
