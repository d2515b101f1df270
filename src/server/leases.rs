//! Which `larder run` a connection belongs to, so that each can be told what it got.
//!
//! All runs use one listener. A run marks its command's environment; on Linux, the kernel tells
//! which process holds the other end of a loopback connection, and that process's environment
//! says whose it is. Elsewhere what was done while a run lasted counts for it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// The variable by which a run marks its command.
pub const MARK: &str = "LARDER_RUN";

/// The runs that use this process.
#[derive(Default)]
pub struct Leases {
    open: Mutex<HashMap<String, Arc<Tally>>>,
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

/// A connection's run, looked for since an archive began to be sent on it.
pub struct Whose(tokio::task::JoinHandle<Option<String>>);

impl Leases {
    pub fn open(&self, id: &str) {
        let mut open = self.lock();
        open.insert(id.to_owned(), Arc::default());
        self.count.send_replace(Some(open.len()));
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

    /// Waits until there was a run and none is left; or until nobody came within `patience`.
    pub async fn all_over(&self, patience: Duration) {
        let mut count = self.count.subscribe();
        let first = count.wait_for(Option::is_some);
        if tokio::time::timeout(patience, first).await.is_err() {
            return;
        }
        // The sender lives as long as the server.
        let _ = count.wait_for(|count| *count == Some(0)).await;
    }

    /// Starts to look for the run behind a connection; none where there are no runs.
    pub fn whose(&self, client: SocketAddr, server: SocketAddr) -> Option<Whose> {
        if self.lock().is_empty() {
            return None;
        }
        self.undecided.send_modify(|n| *n += 1);
        Some(Whose(tokio::task::spawn_blocking(move || {
            mark_of_peer(client, server)
        })))
    }

    /// Adds an answer to its run, once that is known.
    pub fn count(self: &Arc<Self>, whose: Whose, answer: Summary) {
        let this = self.clone();
        tokio::spawn(async move {
            let id = whose.0.await.ok().flatten();
            for (open, tally) in this.lock().iter() {
                if id.as_ref().is_some_and(|id| id == open) || !cfg!(target_os = "linux") {
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
        self.open.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The mark in the environment of the process at the other end (blocking).
fn mark_of_peer(client: SocketAddr, server: SocketAddr) -> Option<String> {
    let inode = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| std::fs::read_to_string(table).ok())
        .find_map(|table| socket_inode(&table, client.port(), server.port()))?;
    let socket = format!("socket:[{inode}]");
    let holds = |pid: &std::path::Path| {
        let fds = std::fs::read_dir(pid.join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        fds.filter_map(|fd| std::fs::read_link(fd.path()).ok())
            .any(|target| target.as_os_str() == socket.as_str())
    };
    let processes = std::fs::read_dir("/proc")
        .ok()?
        .flatten()
        .map(|entry| entry.path());
    let holder = processes
        .filter(|path| {
            path.file_name()
                .is_some_and(|n| n.as_encoded_bytes()[0].is_ascii_digit())
        })
        .find(|path| holds(path))?;
    let environment = std::fs::read(holder.join("environ")).ok()?;
    environment.split(|b| *b == 0).find_map(|variable| {
        let (name, value) = std::str::from_utf8(variable).ok()?.split_once('=')?;
        (name == MARK).then(|| value.to_owned())
    })
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
        let mark = mark_of_peer(client, server);
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_eq!(mark.as_deref(), Some("run-7"));
    }

    #[test]
    fn tables_of_the_kernel_read() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   0: 0100007F:0C38 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1\n   1: 0100007F:D2F0 0100007F:0C38 01 00000000:00000000 00:00000000 00000000     0        0 4711 1\n";
        assert_eq!(socket_inode(table, 0xD2F0, 0x0C38), Some(4711));
        assert_eq!(socket_inode(table, 0x0C38, 0xD2F0), None);
        assert_eq!(socket_inode("", 1, 2), None);
    }
}
