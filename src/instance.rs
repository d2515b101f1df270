//! Which process has a data dir: a kernel lock on a file that says who holds it and where it is
//! reached. The lock is gone with the process, however that ends.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::error::Exit;

/// A look at the lock takes it for a moment: so long a start does not take that for an owner.
const LOOKS: Duration = Duration::from_millis(300);

/// The lock, held.
pub struct Instance {
    file: File,
    until_unused: bool,
}

/// What the holder says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Running {
    pub pid: u32,
    /// Where it listens, once it does
    pub addr: Option<SocketAddr>,
    /// What its API asks for
    pub token: String,
    /// `USER:PASSWORD` by which this user's own commands pass where the proxy asks for credentials
    #[serde(default)]
    pub login: Option<String>,
    /// Whether it ends with the last `larder run` that uses it
    #[serde(default)]
    pub until_unused: bool,
    /// Of larder
    #[serde(default)]
    pub version: String,
}

impl Instance {
    /// Takes the data dir for this process.
    pub fn take(data_dir: &Path, until_unused: bool) -> Result<Self, Exit> {
        let path = lock_path(data_dir);
        let broken = |e: io::Error| {
            Exit::usage(format!(
                "data_dir: {}: {e}; name a folder you can write to with --data-dir",
                path.display()
            ))
        };
        std::fs::create_dir_all(data_dir).map_err(|e| {
            Exit::usage(format!(
                "data_dir: {}: {e}; name a folder you can write to with --data-dir",
                data_dir.display()
            ))
        })?;
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(broken)?;
        let start = Instant::now();
        while let Err(e) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
            if e != rustix::io::Errno::WOULDBLOCK {
                return Err(broken(e.into()));
            }
            if start.elapsed() > LOOKS {
                let holder = match read(&file) {
                    Some(Running {
                        pid,
                        until_unused: true,
                        ..
                    }) => {
                        format!("process {pid} (the proxy of a `larder run`, which ends with it)")
                    }
                    Some(running) => format!("process {}", running.pid),
                    None => "another process".to_owned(),
                };
                return Err(Exit::usage(format!(
                    "data_dir: {} is in use by {holder}; stop it, or name another folder with --data-dir",
                    data_dir.display()
                )));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut this = Self { file, until_unused };
        this.write(None, String::new(), None).map_err(broken)?;
        Ok(this)
    }

    /// Tells others where this process is reached.
    pub fn announce(
        &mut self,
        addr: SocketAddr,
        token: String,
        login: Option<String>,
    ) -> io::Result<()> {
        self.write(Some(addr), token, login)
    }

    fn write(
        &mut self,
        addr: Option<SocketAddr>,
        token: String,
        login: Option<String>,
    ) -> io::Result<()> {
        let running = Running {
            pid: std::process::id(),
            addr,
            token,
            login,
            until_unused: self.until_unused,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let text = serde_json::to_vec(&running)?;
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.file.write_all(&text)
    }
}

/// The process that has the data dir, if one has.
pub fn find(data_dir: &Path) -> Option<Running> {
    let file = File::open(lock_path(data_dir)).ok()?;
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => None,
        Err(_) => Some(read(&file).unwrap_or(Running {
            pid: 0,
            addr: None,
            token: String::new(),
            login: None,
            until_unused: false,
            version: String::new(),
        })),
    }
}

fn read(mut file: &File) -> Option<Running> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

/// The file that bears the lock.
pub fn lock_path(data_dir: &Path) -> PathBuf {
    data_dir.join("lock")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_is_first_and_follows_it() {
        let dir = tempfile::tempdir().unwrap();
        assert!(find(dir.path()).is_none());
        let mut first = Instance::take(dir.path(), false).unwrap();
        first
            .announce("127.0.0.1:9".parse().unwrap(), "t".into(), None)
            .unwrap();
        let exit = Instance::take(dir.path(), false).err().unwrap();
        assert_eq!(exit.code, 2);
        assert!(
            exit.message.contains(&std::process::id().to_string()),
            "{exit}"
        );
        assert_eq!(find(dir.path()).unwrap().addr, "127.0.0.1:9".parse().ok());
        drop(first);
        assert!(find(dir.path()).is_none() && Instance::take(dir.path(), false).is_ok());
    }
}
