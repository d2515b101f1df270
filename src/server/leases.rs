//! Which `larder run` a connection belongs to, so that each can be told what it got.
//!
//! All runs use one listener. A run marks its command's environment; on Linux, the kernel tells
//! which process holds the other end of a loopback connection, and that process's environment
//! says whose it is. Where that cannot be told, a lone run is
//! given it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::sync::lock;

/// The variable by which a run marks its command.
pub const MARK: &str = "LARDER_RUN";
/// How far up a client's ancestors are looked at.
const GENERATIONS: usize = 64;

/// The runs that use this process.
#[derive(Default)]
pub struct Leases {
    open: Mutex<HashMap<String, Arc<Tally>>>,
    /// Set, under the lock of `open`, when this process is ending
    over: AtomicBool,
    /// None before the first
    count: watch::Sender<Option<usize>>,
    /// Answers whose run is being looked for
    undecided: watch::Sender<usize>,
}

/// What was done for one run.
#[derive(Debug, Default)]
struct Tally {
    from_cache: AtomicU64,
    from_upstream: AtomicU64,
    verified: AtomicUsize,
}

/// What a run is told at its end.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Summary {
    /// Archive bytes that were held already
    pub from_cache: u64,
    /// Archive bytes that were fetched for it
    pub from_upstream: u64,
    /// Archives that were sent whole and have the digest they should have
    pub verified: usize,
}

/// A connection's run, looked for since the connection was accepted: its client is alive then.
#[derive(Clone)]
pub struct Whose(Shared<BoxFuture<'static, Option<Holder>>>);

/// The process at the other end of a connection.
#[derive(Clone, Debug, Default, PartialEq)]
struct Holder {
    /// The mark in its environment
    mark: Option<String>,
    /// It and its ancestors
    pids: Vec<u32>,
}

impl Leases {
    /// Takes a run in; not if this process is ending.
    pub fn open(&self, id: &str) -> bool {
        let mut open = self.lock();
        if self.over.load(Ordering::SeqCst) {
            return false;
        }
        open.insert(id.to_owned(), Arc::default());
        self.count.send_replace(Some(open.len()));
        true
    }

    /// From now on no run is taken in.
    pub fn end(&self) {
        let _open = self.lock();
        self.over.store(true, Ordering::SeqCst);
    }

    pub fn close(&self, id: &str) {
        let mut open = self.lock();
        open.remove(id);
        self.count.send_replace(Some(open.len()));
    }

    /// What was done for a run so far; none if there is no such run.
    pub async fn summary(&self, id: &str) -> Option<Summary> {
        let mut undecided = self.undecided.subscribe();
        let decided = undecided.wait_for(|n| *n == 0);
        // At the worst the last archive is missing from a line for people.
        let _ = tokio::time::timeout(Duration::from_secs(2), decided).await;
        let open = self.lock();
        let tally = open.get(id)?;
        Some(Summary {
            from_cache: tally.from_cache.load(Ordering::Relaxed),
            from_upstream: tally.from_upstream.load(Ordering::Relaxed),
            verified: tally.verified.load(Ordering::Relaxed),
        })
    }

    /// Waits until there was a run and none is left; or until nobody came within `patience`. After
    /// that no run is taken in.
    pub async fn all_over(&self, patience: Duration) {
        let mut count = self.count.subscribe();
        let first = count.wait_for(Option::is_some);
        let _ = tokio::time::timeout(patience, first).await;
        loop {
            // The sender lives as long as the server. None: nobody came.
            let _ = count.wait_for(|count| count.unwrap_or(0) == 0).await;
            // One may have come since.
            let open = self.lock();
            if open.is_empty() {
                self.over.store(true, Ordering::SeqCst);
                return;
            }
        }
    }

    /// Starts to look for the run behind a connection; none where there are no runs.
    pub fn whose(&self, client: SocketAddr, server: SocketAddr) -> Option<Whose> {
        // Others than this machine's processes cannot be looked at, and are no runs.
        if !client.ip().to_canonical().is_loopback() || self.lock().is_empty() {
            return None;
        }
        let search = tokio::task::spawn_blocking(move || holder_of(client, server));
        Some(Whose(
            search.map(|found| found.ok().flatten()).boxed().shared(),
        ))
    }

    /// Adds an answer to its run, once that is known.
    pub fn count(self: &Arc<Self>, whose: Whose, answer: Summary) {
        self.undecided.send_modify(|n| *n += 1);
        let this = self.clone();
        tokio::spawn(async move {
            let holder = whose.0.await;
            let open = this.lock().clone();
            let alone = open.len() == 1;
            for (id, tally) in open {
                // A client of another user, say, cannot be looked at: a lone run is the likeliest.
                if holder.as_ref().map_or(alone, |holder| holder.is_of(&id)) {
                    tally
                        .from_cache
                        .fetch_add(answer.from_cache, Ordering::Relaxed);
                    tally
                        .from_upstream
                        .fetch_add(answer.from_upstream, Ordering::Relaxed);
                    tally.verified.fetch_add(answer.verified, Ordering::Relaxed);
                }
            }
            this.undecided.send_modify(|n| *n -= 1);
        });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Tally>>> {
        lock(&self.open)
    }
}

impl Holder {
    /// Whether it is the run's command or a descendant of it. The name of a run begins with the
    /// number of its process.
    fn is_of(&self, id: &str) -> bool {
        let runner = id.split('-').next().and_then(|pid| pid.parse().ok());
        match &self.mark {
            Some(mark) => mark == id,
            // A command may clear its environment.
            None => runner.is_some_and(|runner| self.pids.contains(&runner)),
        }
    }
}

/// Who holds the other end of a loopback connection (blocking; proc(5)).
fn holder_of(client: SocketAddr, server: SocketAddr) -> Option<Holder> {
    let inode = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| std::fs::read_to_string(table).ok())
        .find_map(|table| socket_inode(&table, client.port(), server.port()))?;
    let socket = format!("socket:[{inode}]");
    let holds = |pid: &u32| {
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd"));
        let mut fds = fds.into_iter().flatten().flatten();
        fds.any(|fd| {
            std::fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == socket.as_str())
        })
    };
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    let mut pid = processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .find(holds)?;
    let mut holder = Holder::default();
    while pid > 1 && holder.pids.len() < GENERATIONS {
        holder.pids.push(pid);
        holder.mark = holder.mark.or_else(|| mark_of(pid));
        let Some(parent) = parent_of(pid) else {
            break;
        };
        pid = parent;
    }
    Some(holder)
}

fn mark_of(pid: u32) -> Option<String> {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    environment.split(|b| *b == 0).find_map(|variable| {
        let (name, value) = std::str::from_utf8(variable).ok()?.split_once('=')?;
        (name == MARK).then(|| value.to_owned())
    })
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// The inode of the socket with that local and remote port in a table of `/proc/net` (proc(5)).
fn socket_inode(table: &str, local: u16, remote: u16) -> Option<u64> {
    let port = |address: &str| u16::from_str_radix(address.rsplit(':').next()?, 16).ok();
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        let fits = port(fields.get(1)?) == Some(local) && port(fields.get(2)?) == Some(remote);
        let inode = fields.get(9)?.parse().ok()?;
        (fits && inode != 0).then_some(inode)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn the_process_at_the_other_end_is_known_by_its_environment() {
        use std::process::{Command, Stdio};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        let script = format!("exec 3<>/dev/tcp/127.0.0.1/{}; read wait", server.port());
        let mut child = Command::new("bash")
            .args(["-c", &script])
            .env(MARK, "run-7")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let (_stream, client) = listener.accept().unwrap();
        let holder = holder_of(client, server).unwrap();
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(holder.is_of("run-7") && !holder.is_of("run-8"));
        assert_eq!(holder.pids[..2], [child.id(), std::process::id()]);
        let unmarked = Holder {
            mark: None,
            ..holder
        };
        assert!(unmarked.is_of(&format!("{}-1", std::process::id())));
    }

    #[test]
    fn tables_of_the_kernel_read() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   0: 0100007F:0C38 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1\n   1: 0100007F:D2F0 0100007F:0C38 01 00000000:00000000 00:00000000 00000000     0        0 4711 1\n";
        assert_eq!(socket_inode(table, 0xD2F0, 0x0C38), Some(4711));
        assert_eq!(socket_inode(table, 0x0C38, 0xD2F0), None);
        assert_eq!(socket_inode("", 1, 2), None);
    }
}
