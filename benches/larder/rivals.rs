//! The parties: each is started with what it needs, led to the bench's upstream, and ended with what it started.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::client::Route;
use crate::common::{Larder, RELEASES, Setup};
use crate::upstream::{Archive, DOCUMENT, Place};
use crate::{machine, mitmproxy, nginx, squid};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    Larder,
    Nginx,
    Squid,
    Mitmproxy,
    Bare,
}

impl Column {
    pub const ALL: [Self; 5] = [
        Self::Larder,
        Self::Nginx,
        Self::Squid,
        Self::Mitmproxy,
        Self::Bare,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Larder => "larder",
            Self::Nginx => "nginx",
            Self::Squid => "squid",
            Self::Mitmproxy => "mitmproxy",
            Self::Bare => "bare upstream",
        }
    }

    /// Those that need so long that they do less of the same.
    pub fn is_slow(self) -> bool {
        matches!(self, Self::Squid | Self::Mitmproxy)
    }
}

pub struct Party {
    pub column: Column,
    /// The process that all its others descend from
    pub pid: u32,
    /// To what is held
    pub hot: Route,
    /// To what must come from upstream
    pub cold: Route,
    process: Process,
}

enum Process {
    Larder(#[expect(dead_code, reason = "ends when dropped")] Larder),
    Program(Program),
    /// It is the upstream's own.
    Bare,
}

impl Party {
    /// Why not, where that is so.
    pub async fn start(column: Column, place: &Place) -> Result<Self, String> {
        match column {
            Column::Larder => Ok(larder(place).await),
            Column::Nginx => nginx::start(place).await,
            Column::Squid => squid::start(place).await,
            Column::Mitmproxy => mitmproxy::start(place).await,
            Column::Bare => {
                let route = place.route();
                Ok(Self {
                    column,
                    pid: place.pid,
                    hot: route.clone(),
                    cold: route,
                    process: Process::Bare,
                })
            }
        }
    }

    pub fn of_program(column: Column, program: Program, hot: Route, cold: Route) -> Self {
        Self {
            column,
            pid: program.pid(),
            hot,
            cold,
            process: Process::Program(program),
        }
    }

    /// Has it hold those archives, the very ones.
    pub async fn hold(&self, archives: &[Archive], bare: &Route) {
        // Some hold it from the second time on.
        for again in [false, true] {
            for Archive { path, sha256 } in archives {
                if self.column == Column::Nginx && !again {
                    self.keep(path, bare).await;
                }
                let digest = self.hot.open().await.digest(path).await;
                assert_eq!(digest, *sha256, "{} sends others", self.column.name());
            }
            machine::settle(self.pid).await;
        }
    }

    pub async fn hold_document(&self, bare: &Route) {
        if self.column == Column::Nginx {
            self.keep(DOCUMENT, bare).await;
        }
        self.hot.fetch(DOCUMENT).await;
        self.hot.fetch(DOCUMENT).await;
    }

    /// As a file in the program's folder `site`.
    async fn keep(&self, path: &str, bare: &Route) {
        let Process::Program(program) = &self.process else {
            return;
        };
        let file = program.folder.path().join("site").join(&path[1..]);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, bare.open().await.bytes(path).await).unwrap();
    }
}

/// The release binary as it comes, but for where upstream is and how much it may keep.
pub fn larder_at(place: &Place) -> Setup {
    let setup = Setup::without_upstream();
    let ca = setup.path("upstream-ca.pem");
    std::fs::write(&ca, &place.ca_pem).unwrap();
    let target = format!("{RELEASES}:443:127.0.0.1:{}", place.addr.port());
    setup.args(["--upstream-ca", ca.to_str().unwrap()]).args([
        "--connect-to",
        &target,
        "--max-size",
        "20GiB",
    ])
}

/// The way through it.
pub fn through(larder: &Larder) -> Route {
    let ca = std::fs::read(larder.setup.ca_pem()).unwrap();
    Route::through(larder.addr, &ca)
}

async fn larder(place: &Place) -> Party {
    let larder = larder_at(place).start().await;
    let route = through(&larder);
    Party {
        column: Column::Larder,
        pid: larder.pid(),
        hot: route.clone(),
        cold: route,
        process: Process::Larder(larder),
    }
}

/// Another's program in a folder of its own; ended with all its children when dropped.
pub struct Program {
    pub folder: tempfile::TempDir,
    child: Child,
}

impl Program {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Starts it, and waits until it accepts connections. Its output goes to `output` in its folder.
    pub async fn start(
        folder: tempfile::TempDir,
        mut command: Command,
        port: u16,
    ) -> Result<Self, String> {
        let said = folder.path().join("output");
        let output = std::fs::File::create(&said).unwrap();
        command.stdin(Stdio::null());
        command.stdout(output.try_clone().unwrap()).stderr(output);
        let child = command.spawn().map_err(|error| error.to_string())?;
        let mut program = Self { folder, child };
        let started = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            let ended = program.child.try_wait().unwrap();
            if ended.is_some() || started.elapsed() > Duration::from_secs(20) {
                let said = std::fs::read_to_string(&said).unwrap_or_default();
                return Err(format!("it does not listen: {}", last_lines(&said)));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(program)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let all = machine::tree(self.child.id());
        signal(self.child.id(), Signal::TERM);
        for _ in 0..100 {
            if let Ok(Some(_)) = self.child.try_wait() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Helpers that outlive their parent.
        let ours = |pid: &&u32| is_below(**pid, self.folder.path());
        all.iter()
            .skip(1)
            .filter(ours)
            .for_each(|pid| signal(*pid, Signal::KILL));
    }
}

fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid as i32) {
        let _ = kill_process(pid, signal);
    }
}

/// Whether that is still a process that was started in this folder, and no other with its number.
fn is_below(pid: u32, folder: &Path) -> bool {
    let at = std::fs::read_link(format!("/proc/{pid}/cwd"));
    at.is_ok_and(|at| at.starts_with(folder))
}

/// The last of what a program said, in one.
pub fn last_lines(said: &str) -> String {
    let lines: Vec<_> = said.lines().collect();
    let last = lines.len().saturating_sub(4);
    lines[last..].join(" / ")
}

/// The path of a program, among those of an administrator too.
pub fn find(name: &str) -> Result<std::path::PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain([Path::new("/usr/sbin").to_owned()]);
    let mut files = folders.map(|folder| folder.join(name));
    files
        .find(|file| file.is_file())
        .ok_or_else(|| format!("{name} is not installed"))
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
