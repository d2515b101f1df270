//! `larder serve`

use std::ffi::OsString;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_rustls::TlsConnector;

use crate::ca::{Ca, bundle};
use crate::cache::Cache;
use crate::cache::metadata::{Bounds, Metadata};
use crate::cache::services::Hosts;
use crate::cache::sightings::Sightings;
use crate::cache::trust::Judge;
use crate::config::{Authority, Cidr, CommonArgs, Config, HostName, NoProxy, Parent, ServeArgs};
use crate::digest::Digest;
use crate::error::Exit;
use crate::instance::Instance;
use crate::registry::Registry;
use crate::registry::key::KeyHolder;
use crate::server::Server;
use crate::store::Store;
use crate::telemetry::start_logs;
use crate::upstream::dial::{self, Dialer};
use crate::upstream::guard::Reach;
use crate::upstream::parent::ParentProxy;
use crate::upstream::{Local, Locals, Upstream};

/// A proxy started for runs waits so long for the first of them.
const FIRST_LEASE: Duration = Duration::from_secs(30);
const LAST_COMMITS: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub serve: ServeArgs,
    /// End when the last `larder run` that uses this process ends
    #[arg(long, hide = true)]
    pub until_unused: bool,
}

pub fn main(common: &CommonArgs, args: &Args) -> Result<ExitCode, Exit> {
    let config = settle(common, args)?;
    start_logs(common, config.log_format);
    let runtime = super::runtime()?;
    let mut instance = None;
    let outcome = runtime.block_on(serve(common, args, config, &mut instance));
    // Commits that are under way end before somebody else may have the data dir.
    runtime.shutdown_timeout(LAST_COMMITS);
    drop(instance);
    outcome.map(|()| ExitCode::SUCCESS)
}

fn settle(common: &CommonArgs, args: &Args) -> Result<Config, Exit> {
    let mut config = Config::settle(common, &args.serve)?;
    if args.until_unused {
        // The proxy of a run, on loopback, is for this user's own processes.
        config.allow_from = Cidr::loopback().to_vec();
        (config.htpasswd, config.client_ca) = (None, None);
    }
    Ok(config)
}

async fn serve(
    common: &CommonArgs,
    args: &Args,
    config: Config,
    instance: &mut Option<Instance>,
) -> Result<(), Exit> {
    let mut stop = Stop::listen()?;
    let hangup = signal(SignalKind::hangup());
    let mut hangup = hangup.map_err(|e| Exit::failed(format!("signals: {e}")))?;
    raise_open_files();
    let instance = instance.insert(Instance::take(&config.data_dir, args.until_unused)?);
    let ca = open_ca(&config)?;
    let judge = judge(&config)?;
    let store = Store::open(
        &config.data_dir,
        config.max_size,
        config.limits.archive_bytes,
    )?;
    let listeners = bind(&config).await?;
    let addrs: Vec<_> = listeners
        .iter()
        .filter_map(|l| l.local_addr().ok())
        .collect();
    let registries = registries(&config)?;
    let upstream = Arc::new(upstream(&config, addrs.clone(), locals(&registries))?);
    let trusted = config.trusted_registries();
    let metadata = Metadata::open(&config.data_dir, upstream.clone(), bounds(&config), trusted)?;
    let cache = Cache::new(
        metadata,
        store,
        upstream,
        judge,
        Sightings::new(&config.data_dir),
        config.limits.fills,
        hosts(&config),
    );
    let (token, login) = (random()?, format!("larder:{}", random()?));
    announce(instance, &config, &addrs, &token, &login)?;
    for addr in &addrs {
        tracing::info!(%addr, data_dir = %config.data_dir.display(), budget = cache.store.budget(), offline = config.offline, "listening");
    }
    registries.iter().for_each(Registry::watch);
    let known = config.htpasswd.is_some().then(|| login.clone());
    let server = Server::new(config, ca, cache, registries, token.clone(), known)?;
    let current = server.clone();
    let until = async {
        loop {
            tokio::select! {
                () = stop.wait() => return,
                () = current.leases().all_over(FIRST_LEASE), if args.until_unused => return,
                _ = hangup.recv() => {}
            }
            let reloaded = reload(common, args, &current.latest(), &addrs, &login);
            let announced =
                reloaded.and_then(|config| announce(instance, &config, &addrs, &token, &login));
            match announced {
                Ok(()) => tracing::info!("the configuration was read anew"),
                Err(error) => {
                    tracing::error!(%error, "the configuration cannot be read anew; nothing has changed")
                }
            }
        }
    };
    server.run(listeners, until).await;
    Ok(())
}

/// Reads the configuration again, and serves by it from the next request on.
fn reload(
    common: &CommonArgs,
    args: &Args,
    server: &Arc<Server>,
    addrs: &[SocketAddr],
    login: &str,
) -> Result<Config, Exit> {
    let mut config = settle(common, args)?;
    for (key, changed) in keep_fixed(&mut config, &server.config) {
        if changed {
            tracing::warn!(
                key,
                "this setting holds from the start on; restart larder to change it"
            );
        }
    }
    let ca = open_ca(&config)?;
    let judge = judge(&config)?;
    let mut registries = registries(&config)?;
    for registry in &mut registries {
        let known = server
            .registries
            .iter()
            .find(|known| known.is_same(registry));
        match known {
            // What it knows of its files is still true.
            Some(known) if config.trusted_keys == server.config.trusted_keys => {
                *registry = known.clone();
            }
            _ => Registry::watch(registry),
        }
    }
    let upstream = Arc::new(upstream(&config, addrs.to_vec(), locals(&registries))?);
    let documents = (bounds(&config), config.trusted_registries());
    let (fills, hosts) = (config.limits.fills, hosts(&config));
    // Made last: from then on documents count by the new configuration.
    let cache = || {
        let cache = &server.cache;
        cache.renewed(upstream, judge, documents, fills, hosts)
    };
    let known = config.htpasswd.is_some().then(|| login.to_owned());
    server.renew(config.clone(), ca, cache, registries, known)?;
    if let Some(bytes) = config
        .max_size
        .filter(|bytes| *bytes != server.cache.store.budget())
    {
        let store = server.cache.store.clone();
        tokio::task::spawn_blocking(move || store.set_budget(bytes));
    }
    Ok(config)
}

/// Puts back what cannot change while larder runs. Returns each such key, and whether it was to.
fn keep_fixed(config: &mut Config, before: &Config) -> Vec<(&'static str, bool)> {
    fn keep<T: PartialEq + Clone>(now: &mut T, before: &T) -> bool {
        let changed = now != before;
        now.clone_from(before);
        changed
    }
    let (limits, old) = (&mut config.limits, &before.limits);
    let mut kept = vec![
        (
            "max_connections",
            keep(&mut limits.connections, &old.connections),
        ),
        ("max_tunnels", keep(&mut limits.tunnels, &old.tunnels)),
        (
            "max_archive_size",
            keep(&mut limits.archive_bytes, &old.archive_bytes),
        ),
        ("listen", keep(&mut config.listen, &before.listen)),
        ("data_dir", keep(&mut config.data_dir, &before.data_dir)),
        (
            "log_format",
            keep(&mut config.log_format, &before.log_format),
        ),
    ];
    if config.max_size.is_none() {
        kept.push(("max_size", keep(&mut config.max_size, &before.max_size)));
    }
    kept
}

fn announce(
    instance: &mut Instance,
    config: &Config,
    addrs: &[SocketAddr],
    token: &str,
    login: &str,
) -> Result<(), Exit> {
    let Some(first) = addrs.first() else {
        return Ok(());
    };
    let login = config.htpasswd.is_some().then(|| login.to_owned());
    instance
        .announce(*first, token.to_owned(), login)
        .map_err(|e| Exit::usage(format!("data_dir: {}: {e}", config.data_dir.display())))
}

fn open_ca(config: &Config) -> Result<Ca, Exit> {
    let ca = Ca::open_or_create(&config.data_dir, &names(config))?;
    for name in names(config).iter().filter(|name| !ca.permits(name)) {
        tracing::warn!(%name, "the CA may not sign for this host; run `larder ca renew`, then reload larder (SIGHUP) or start it again");
    }
    Ok(ca)
}

fn judge(config: &Config) -> Result<Arc<Judge>, Exit> {
    let keyring = super::keyring(config)?;
    let policy = config.policy.clone();
    Ok(Arc::new(Judge::new(policy, config.republished, keyring)))
}

fn hosts(config: &Config) -> Hosts {
    Hosts {
        mirrors: config.mirror_hosts.clone(),
        tunnels: config.tunnels.clone(),
        intercepted: config.intercept.clone(),
        own: config
            .registries
            .iter()
            .map(|one| one.host.clone())
            .collect(),
    }
}

fn bounds(config: &Config) -> Bounds {
    Bounds {
        document: config.limits.metadata_bytes,
        list_grace: config.version_list_grace,
    }
}

fn locals(registries: &[Arc<Registry>]) -> Locals {
    let locals = registries.iter().map(|registry| {
        let local: Box<dyn Local> = Box::new(registry.clone());
        (registry.host.clone(), local)
    });
    locals.collect()
}

/// The private registries that are configured.
pub fn registries(config: &Config) -> Result<Vec<Arc<Registry>>, Exit> {
    let keyring = Arc::new(super::keyring(config)?);
    let (key, data_dir) = (KeyHolder::new(&config.data_dir), &config.data_dir);
    let registries = config.registries.iter();
    registries
        .map(|registry| Registry::open(registry, Some(data_dir), key.clone(), keyring.clone()))
        .collect()
}

/// Each client may take two files or more; what the system allows at the most is not too much.
fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::debug!(%error, "the limit of open files cannot be raised");
        }
    }
}

/// The names that the CA is to be constrained to.
pub fn names(config: &Config) -> Vec<HostName> {
    let mut names: Vec<HostName> = Vec::new();
    let intercepted = config.intercept.iter().map(|authority| &authority.host);
    for name in intercepted.chain(&config.hostnames) {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    names
}

/// Whom to trust upstream.
pub fn roots(config: &Config) -> Result<Vec<CertificateDer<'static>>, Exit> {
    let mut roots = bundle::upstream_roots();
    for path in &config.upstream_ca {
        roots.extend(bundle::read_pem(path).map_err(|why| {
            Exit::usage(format!(
                "upstream_ca: {}: {why}; name a file of PEM certificates",
                path.display()
            ))
        })?);
    }
    Ok(roots)
}

/// The way to all origins; `own` is where larder listens.
pub fn upstream(config: &Config, own: Vec<SocketAddr>, locals: Locals) -> Result<Upstream, Exit> {
    let tls = super::upstream_tls(roots(config)?)?;
    let dialer = Dialer {
        offline: config.offline,
        reach: match config.loopback_only() {
            true => Reach::LikeTheUser,
            false => Reach::PublicOnly,
        },
        connect_to: config.connect_to.clone(),
        configured: config.intercept.clone(),
        listed: config.tunnels.clone(),
        mirrors: config.mirror_hosts.clone(),
        parent: parent(config, &own, &tls)?,
        own,
    };
    Ok(Upstream::new(Arc::new(dialer), tls, locals))
}

async fn bind(config: &Config) -> Result<Vec<TcpListener>, Exit> {
    let mut listeners = Vec::new();
    for addr in &config.listen {
        let listener = TcpListener::bind(addr).await.map_err(|e| {
            Exit::usage(format!(
                "listen: {addr}: {e}; free it, or name another address with --listen (port 0 picks a free one)"
            ))
        })?;
        listeners.push(listener);
    }
    Ok(listeners)
}

/// The configured parent, or the one that the environment names: which may well be this very larder.
fn parent(
    config: &Config,
    listeners: &[SocketAddr],
    tls: &TlsConnector,
) -> Result<Option<ParentProxy>, Exit> {
    let Some(proxy) = (match &config.upstream_proxy {
        Some(proxy) => Some(proxy.clone()),
        None => inherited_parent()?,
    }) else {
        return Ok(None);
    };
    if is_own(&proxy.authority, config, listeners) {
        return Ok(None);
    }
    let except = match &config.no_proxy {
        Some(list) => list.clone(),
        None => inherited_exceptions(),
    };
    tracing::info!(parent = %proxy, no_proxy = %except, "upstream is reached through a parent proxy");
    Ok(Some(ParentProxy {
        proxy,
        except,
        tls: tls.clone(),
    }))
}

fn inherited_parent() -> Result<Option<Parent>, Exit> {
    let Some((name, value)) = inherited(["HTTPS_PROXY", "https_proxy"]) else {
        return Ok(None);
    };
    // Without the value: it may hold a password.
    let broken = |e: String| {
        Exit::usage(format!(
            "{name} as inherited: {e}; mend or unset it, or name the parent with --upstream-proxy"
        ))
    };
    let text = value
        .into_string()
        .map_err(|_| broken("not UTF-8".into()))?;
    text.parse().map(Some).map_err(broken)
}

fn inherited_exceptions() -> NoProxy {
    let Some((name, value)) = inherited(["NO_PROXY", "no_proxy"]) else {
        return NoProxy::default();
    };
    let text = value.to_string_lossy();
    let (list, strange) = NoProxy::inherited(&text);
    for entry in strange {
        tracing::warn!(
            variable = name,
            ?entry,
            "an entry that larder does not understand counts for nothing; write the list for larder with --no-proxy"
        );
    }
    list
}

/// The first of these variables that is not empty.
fn inherited(names: [&'static str; 2]) -> Option<(&'static str, OsString)> {
    let mut values = names
        .into_iter()
        .filter_map(|name| Some((name, std::env::var_os(name)?)));
    values.find(|(_, value)| !value.is_empty())
}

/// An inherited HTTPS_PROXY may well be this very larder.
pub fn is_own(parent: &Authority, config: &Config, listeners: &[SocketAddr]) -> bool {
    let Authority { host, port } = parent;
    match host.ip() {
        Some(ip) => dial::is_own(listeners, SocketAddr::new(ip, *port)),
        None => {
            let named = host.as_str() == "localhost" || config.hostnames.contains(host);
            named && listeners.iter().any(|own| own.port() == *port)
        }
    }
}

fn random() -> Result<String, Exit> {
    let mut bytes = [0u8; 32];
    rustls::crypto::aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| Exit::failed("the system gives no random bytes"))?;
    Ok(Digest::of(&bytes).to_string())
}

/// SIGTERM or SIGINT. A second one ends the process at once.
struct Stop {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
}

impl Stop {
    fn listen() -> Result<Self, Exit> {
        let on = |kind| signal(kind).map_err(|e| Exit::failed(format!("signals: {e}")));
        Ok(Self {
            term: on(SignalKind::terminate())?,
            int: on(SignalKind::interrupt())?,
        })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
        let (Ok(mut term), Ok(mut int)) = (
            signal(SignalKind::terminate()),
            signal(SignalKind::interrupt()),
        ) else {
            return;
        };
        tokio::spawn(async move {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            std::process::exit(1);
        });
    }
}
