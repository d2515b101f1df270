//! Users and their passwords (RFC 7617): an htpasswd file of bcrypt hashes, and how many guesses one
//! address has.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use hmac::{Hmac, Mac as _};
use moka::sync::Cache;
use sha2::Sha256;
use tokio::sync::Semaphore;

use super::access::network;
use crate::digest::Digest;
use crate::error::{Error, Exit, Kind};
use crate::stamp::Stamp;
use crate::sync::lock;
use crate::telemetry::METRICS;

/// A credential is not hashed again for so long: clients authenticate every CONNECT.
const REMEMBERED: Duration = Duration::from_secs(300);
const REMEMBERED_CREDENTIALS: u64 = 10_000;
/// Wrong passwords for one user from one address within [`FAILURES_FORGOTTEN`] before no more are
/// looked at.
const FAILURES: u32 = 10;
/// The same for all users of an address.
const ALL_FAILURES: u32 = 50;
const FAILURES_FORGOTTEN: Duration = Duration::from_secs(60);
const FAILING_ADDRESSES: u64 = 10_000;
/// Hashes computed at once.
const HASHES: usize = 2;
/// Credentials that wait to be looked at, in all and of one address.
const WAITING: usize = 64;
const WAITING_OF_ONE: u32 = 16;
/// How often the file is looked at for changes.
const LOOK: Duration = Duration::from_secs(1);
const FILE_LIMIT: u64 = 4 << 20;
/// Seconds of work a guess, where `htpasswd -B` takes 5 and careful people 12.
const MAX_COST: u32 = 15;

/// Users and their bcrypt hashes, as in an htpasswd file, read anew when that changes.
pub struct Users {
    path: PathBuf,
    login: Option<Digest>,
    table: Mutex<Table>,
    key: [u8; 32],
    /// Credentials that were right, by keyed MAC. Those that come at the same time wait for one
    /// another.
    remembered: moka::future::Cache<[u8; 32], ()>,
    /// By address, and user (none: all of them)
    failures: Cache<(IpAddr, Option<Digest>), Arc<AtomicU32>>,
    waiting_of: Cache<IpAddr, Arc<AtomicU32>>,
    hashes: Arc<Semaphore>,
    waiting: Semaphore,
}

struct Table {
    hashes: Arc<HashMap<String, String>>,
    stamp: Option<Stamp>,
    looked: Instant,
    /// Part of every MAC: what was right by an older file is forgotten
    generation: u64,
}

impl Users {
    pub fn open(path: &Path, login: Option<String>) -> Result<Self, Exit> {
        let bad = |why: String| {
            Exit::usage(format!(
                "htpasswd: {}: {why}; write it with `htpasswd -B`",
                path.display()
            ))
        };
        let hashes = read(path).map_err(bad)?;
        if hashes.is_empty() {
            return Err(bad("names no user".into()));
        }
        Ok(Self {
            path: path.to_owned(),
            login: login.map(|login| Digest::of(login.as_bytes())),
            table: Mutex::new(Table {
                hashes: Arc::new(hashes),
                stamp: Stamp::of(path).ok(),
                looked: Instant::now(),
                generation: 0,
            }),
            key: random()?,
            remembered: moka::future::Cache::builder()
                .max_capacity(REMEMBERED_CREDENTIALS)
                .time_to_live(REMEMBERED)
                .build(),
            failures: Cache::builder()
                .max_capacity(FAILING_ADDRESSES)
                .time_to_live(FAILURES_FORGOTTEN)
                .build(),
            waiting_of: Cache::builder()
                .max_capacity(FAILING_ADDRESSES)
                .time_to_idle(FAILURES_FORGOTTEN)
                .build(),
            hashes: Arc::new(Semaphore::new(HASHES)),
            waiting: Semaphore::new(WAITING),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// # Errors
    /// `Unauthenticated` where they are wrong, `TooManyGuesses`, `Busy`.
    pub async fn check(&self, ip: IpAddr, (user, password): (String, String)) -> Result<(), Error> {
        // Compared by digest, so that the time taken says nothing of the secret.
        let own = Digest::of(format!("{user}:{password}").as_bytes());
        if self.login == Some(own) {
            return Ok(());
        }
        let (hashes, generation) = self.current().await;
        let mac = self.mac(generation, &user, &password);
        let checking = self.hash(ip, &hashes, user, password);
        let checked = self.remembered.try_get_with(mac, checking).await;
        checked.map_err(|e| Error::clone(&e))
    }

    /// Looks at credentials that are not remembered.
    async fn hash(
        &self,
        ip: IpAddr,
        hashes: &HashMap<String, String>,
        user: String,
        password: String,
    ) -> Result<(), Error> {
        let from = network(ip);
        let by_all = self.failures.get_with((from, None), Arc::default);
        if by_all.load(Ordering::Relaxed) >= ALL_FAILURES {
            return Err(too_many());
        }
        let named = Digest::of(user.as_bytes());
        let by_user = self.failures.get_with((from, Some(named)), Arc::default);
        let guessed = || {
            by_user.load(Ordering::Relaxed) >= FAILURES
                || by_all.load(Ordering::Relaxed) >= ALL_FAILURES
        };
        if guessed() {
            return Err(too_many());
        }
        let busy = || Error::new(Kind::Busy, "too many logins at once; try again");
        let share = self.waiting_of.get_with(from, Arc::default);
        let _share = Share::of(&share).ok_or_else(busy)?;
        let _waiting = self.waiting.try_acquire().map_err(|_| busy())?;
        let permit = self.hashes.clone().acquire_owned().await;
        let permit = permit.map_err(|_| busy())?;
        // Others of the same address were looked at meanwhile.
        if guessed() {
            return Err(too_many());
        }
        let known = hashes.get(&user).cloned();
        // An unknown user takes as long as a known one.
        let stand_in = hashes.values().next().cloned().unwrap_or_default();
        // Counted before, since a client may be gone after.
        by_user.fetch_add(1, Ordering::Relaxed);
        by_all.fetch_add(1, Ordering::Relaxed);
        let right = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let hash = known.as_deref().unwrap_or(&stand_in);
            let right = bcrypt::verify(password, hash).unwrap_or(false);
            right && known.is_some()
        });
        if right.await.unwrap_or(false) {
            by_user.fetch_sub(1, Ordering::Relaxed);
            by_all.fetch_sub(1, Ordering::Relaxed);
            return Ok(());
        }
        METRICS.failed_logins.inc();
        tracing::warn!(client = %ip, "a login to the proxy failed");
        Err(Error::new(
            Kind::Unauthenticated,
            "the user or the password is wrong",
        ))
    }

    fn mac(&self, generation: u64, user: &str, password: &str) -> [u8; 32] {
        let mut mac =
            Hmac::<Sha256>::new_from_slice(&self.key).expect("HMAC takes a key of any length");
        mac.update(&generation.to_le_bytes());
        mac.update(&(user.len() as u64).to_le_bytes());
        mac.update(user.as_bytes());
        mac.update(password.as_bytes());
        mac.finalize().into_bytes().into()
    }

    /// The table, read anew where the file has changed. A file that turned bad changes nothing; one
    /// that names nobody any more lets nobody in.
    async fn current(&self) -> (Arc<HashMap<String, String>>, u64) {
        let (stale, known) = {
            let mut table = lock(&self.table);
            let stale = table.looked.elapsed() > LOOK;
            if stale {
                table.looked = Instant::now();
            }
            (stale, table.stamp)
        };
        if stale {
            let path = self.path.clone();
            let read = tokio::task::spawn_blocking(move || {
                let now = Stamp::of(&path).ok();
                (now != known).then(|| (now, read(&path)))
            });
            match read.await {
                Ok(Some((stamp, Ok(hashes)))) => {
                    let mut table = lock(&self.table);
                    table.hashes = Arc::new(hashes);
                    table.stamp = stamp;
                    table.generation += 1;
                }
                Ok(Some((_, Err(why)))) => {
                    tracing::error!(path = %self.path.display(), why, "htpasswd cannot be read anew; the users stay as they were");
                }
                _ => {}
            }
        }
        let table = lock(&self.table);
        (table.hashes.clone(), table.generation)
    }
}

fn too_many() -> Error {
    Error::new(
        Kind::TooManyGuesses,
        "too many wrong passwords from this address; wait a minute",
    )
}

/// A place among the credentials of one address that wait.
struct Share(Arc<AtomicU32>);

impl Share {
    fn of(count: &Arc<AtomicU32>) -> Option<Self> {
        if count.fetch_add(1, Ordering::Relaxed) >= WAITING_OF_ONE {
            count.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Self(count.clone()))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn read(path: &Path) -> Result<HashMap<String, String>, String> {
    let length = std::fs::metadata(path).map_err(|e| e.to_string())?.len();
    if length > FILE_LIMIT {
        return Err("is too large".into());
    }
    parse(&std::fs::read_to_string(path).map_err(|e| e.to_string())?)
}

/// Lines of `USER:HASH`, where the hash is bcrypt's. The words never show a hash.
fn parse(text: &str) -> Result<HashMap<String, String>, String> {
    let mut hashes = HashMap::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let at = i + 1;
        let (user, hash) = line
            .split_once(':')
            .ok_or_else(|| format!("line {at} is not USER:HASH"))?;
        let parts: bcrypt::HashParts = hash
            .parse()
            .map_err(|_| format!("line {at}: the hash of {user:?} is not bcrypt's"))?;
        if parts.get_cost() > MAX_COST {
            return Err(format!(
                "line {at}: the hash of {user:?} costs {}, more than {MAX_COST}",
                parts.get_cost()
            ));
        }
        hashes.insert(user.to_owned(), hash.to_owned());
    }
    Ok(hashes)
}

pub fn random() -> Result<[u8; 32], Exit> {
    let mut bytes = [0; 32];
    rustls::crypto::aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| Exit::failed("the system gives no random bytes"))?;
    Ok(bytes)
}

/// User and password of `Bearer USER:PASSWORD`.
pub fn bearer(value: &[u8]) -> Option<(String, String)> {
    let text = std::str::from_utf8(value).ok()?;
    let (scheme, token) = text.split_once(' ')?;
    let (user, password) = token.trim().split_once(':')?;
    let known = scheme.eq_ignore_ascii_case("bearer");
    known.then(|| (user.to_owned(), password.to_owned()))
}

/// User and password of `Basic …`.
pub fn basic(value: &[u8]) -> Option<(String, String)> {
    let text = std::str::from_utf8(value).ok()?;
    let (scheme, token) = text.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = base64::engine::general_purpose::STANDARD
        .decode(token.trim())
        .ok()?;
    let decoded = String::from_utf8(decoded).ok()?;
    let (user, password) = decoded.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_bcrypt_is_taken_and_no_hash_is_shown() {
        let hash = bcrypt::hash("secret", 4).unwrap();
        let users = parse(&format!("# people\n\nann:{hash}\r\n")).unwrap();
        assert_eq!(users["ann"], hash);
        let dear = hash.replace("$04$", "$31$");
        for bad in [
            "ann",
            "ann:$apr1$x$yyyyyyyyyyyyyyyyyyyyyy",
            "ann:{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=",
            "ann:plain",
            &format!("ann:{dear}"),
        ] {
            let why = parse(bad).unwrap_err();
            assert!(!why.contains("$") && !why.contains("{SHA}"), "{why}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_survived(value in proptest::collection::vec(any::<u8>(), 0..60)) {
            basic(&value);
            basic(&[b"Basic ", &value[..]].concat());
        }
    }
}
