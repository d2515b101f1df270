//! `larder run -- CMD`: a command whose Terraform traffic goes through the cache.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant, SystemTime};

use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::{Method, StatusCode};
use rustix::io::FdFlags;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use crate::config::{CommonArgs, Config, ServeArgs, Wish};
use crate::error::Exit;
use crate::instance::{self, Running};
use crate::server::{MARK, Summary};

/// For the proxy to come up, over all attempts.
const PATIENCE: Duration = Duration::from_secs(30);
/// For an answer of the proxy to a question of ours.
const ANSWER: Duration = Duration::from_secs(5);
const LOG_LIMIT: u64 = 1 << 20;
/// larder itself failed.
pub const FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    serve: ServeArgs,
    /// Without proxy and CA, by a Terraform CLI configuration; always so where Go does not read SSL_CERT_FILE
    #[arg(long)]
    ca_free: bool,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub fn main(common: &CommonArgs, args: Args) -> Result<ExitCode, Exit> {
    let outcome = Config::settle(common, &args.serve)
        .and_then(|config| super::runtime()?.block_on(run(common, &args, &config)));
    outcome.map_err(|exit| Exit {
        code: if exit.code >= FAILED {
            exit.code
        } else {
            FAILED
        },
        message: exit.message,
    })
}

async fn run(common: &CommonArgs, args: &Args, config: &Config) -> Result<ExitCode, Exit> {
    let lease = Lease::take(common, &args.serve, config).await?;
    let (addr, running) = (lease.addr, &lease.running);
    let mut own_config = None;
    let settings = if args.ca_free || cfg!(any(target_os = "macos", target_os = "windows")) {
        let name = Path::new(&args.command[0]).file_name().unwrap_or_default();
        let for_tofu = name.to_string_lossy().starts_with("tofu");
        let path = OwnConfig::place(&config.data_dir);
        let addr = super::env::reachable(addr);
        let path = &own_config.insert(path).0;
        super::terraformrc::write(config, addr, Some(running), path, for_tofu).await?
    } else {
        super::env::settings(config, addr, running.login.as_deref())?
    };
    let program = &args.command[0];
    let mut command = Command::new(program);
    command
        .args(&args.command[1..])
        .envs(settings)
        .env(MARK, &lease.id);
    let signals = Signals::listen()?;
    let child = command.spawn().map_err(|e| Exit {
        code: match e.kind() {
            std::io::ErrorKind::NotFound => NOT_FOUND,
            _ => NOT_EXECUTABLE,
        },
        message: format!(
            "{}: {e}; is it installed and on the PATH?",
            program.to_string_lossy()
        ),
    })?;
    let status = signals.forward_until_exit(child).await?;
    match lease.summary().await {
        Ok(_) if common.quiet > 0 => {}
        Ok(info) => eprintln!(
            "larder: {} from cache, {} from upstream, {} archives verified",
            super::human(info.from_cache),
            super::human(info.from_upstream),
            info.verified
        ),
        Err(e) => eprintln!("larder: the proxy is gone before its time: {e}"),
    }
    Ok(exit_code(status))
}

/// A run's CLI configuration, which may hold credentials: gone with the run.
struct OwnConfig(PathBuf);

impl OwnConfig {
    /// Beside those of other runs. What was left by killed ones is removed.
    fn place(data_dir: &Path) -> Self {
        let prefix = "terraformrc-";
        for entry in std::fs::read_dir(data_dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let pid = name
                .to_string_lossy()
                .strip_prefix(prefix)
                .map(str::to_owned);
            let pid = pid.and_then(|pid| rustix::process::Pid::from_raw(pid.parse().ok()?));
            if pid.is_some_and(|pid| rustix::process::test_kill_process(pid).is_err()) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        Self(data_dir.join(format!("{prefix}{}", std::process::id())))
    }
}

impl Drop for OwnConfig {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn exit_code(status: ExitStatus) -> ExitCode {
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => 128u8.wrapping_add(signal as u8),
        (None, None) => FAILED,
    };
    ExitCode::from(code)
}

/// A place in the process that has the data dir.
struct Lease {
    id: String,
    addr: SocketAddr,
    running: Running,
    /// As long as this is open, the lease lasts.
    _open: Incoming,
}

impl Lease {
    /// From whoever has the data dir, or else from a proxy started for it.
    async fn take(common: &CommonArgs, serve: &ServeArgs, config: &Config) -> Result<Self, Exit> {
        let start = Instant::now();
        let mut started: Option<(Child, PathBuf, u64)> = None;
        let mut last = String::from("did not come up");
        let mut wishes = serve.wishes();
        while start.elapsed() < PATIENCE {
            let running = instance::find(&config.data_dir);
            let of_a_run = running.as_ref().is_some_and(|running| running.until_unused);
            if of_a_run && wishes.iter().all(|wish| wish.option != "offline") {
                // What another run wanted is not what this one takes for granted.
                wishes.push(Wish {
                    option: "offline".into(),
                    value: config.offline.to_string(),
                });
            }
            match running.map(|running| (running.addr, running)) {
                Some((Some(addr), running)) => match Self::ask_soon(running, addr, &wishes).await {
                    Ok(lease) => return Ok(lease),
                    Err(Refusal::Unlike(exit)) => return Err(exit),
                    // It may be ending: then its place is free in a moment.
                    Err(Refusal::Gone(e)) => last = e,
                },
                Some((None, _)) => {}
                None => match &mut started {
                    None => started = Some(start_proxy(common, serve, config)?),
                    Some((child, log, from)) => {
                        if let Ok(Some(status)) = child.try_wait() {
                            // Another run may have been first; if nobody was, it could not start.
                            if !status.success() && instance::find(&config.data_dir).is_none() {
                                return Err(Exit::failed(log_since(log, *from)));
                            }
                            started = None;
                        }
                    }
                },
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Err(Exit::failed(format!(
            "the proxy for {} {last}; see {}",
            config.data_dir.display(),
            log_path(&config.data_dir).display()
        )))
    }

    async fn ask_soon(
        running: Running,
        addr: SocketAddr,
        wishes: &[Wish],
    ) -> Result<Self, Refusal> {
        let stopped = |_| Err(Refusal::Gone("does not answer (is it stopped?)".into()));
        timeout(ANSWER, Self::ask(running, addr, wishes))
            .await
            .unwrap_or_else(stopped)
    }

    async fn ask(running: Running, addr: SocketAddr, wishes: &[Wish]) -> Result<Self, Refusal> {
        let gone = |e: String| Refusal::Gone(e);
        let id = format!("{}-{}", std::process::id(), unix_nanos());
        let path = format!("/api/v1/runs/{id}");
        let wishes = serde_json::json!(wishes).to_string();
        let response = super::api::send(&running, Method::POST, &path, wishes).await;
        let response = response.map_err(gone)?;
        let status = response.status();
        let mut open = response.into_body();
        // The first bytes come when the lease is there.
        let first = open
            .frame()
            .await
            .ok_or_else(|| gone("ended while it was asked".into()))?;
        let first = first.map_err(|e| gone(e.to_string()))?;
        if status == StatusCode::CONFLICT {
            let words = first
                .data_ref()
                .map_or(Default::default(), |words| String::from_utf8_lossy(words));
            return Err(Refusal::Unlike(Exit::failed(format!(
                "process {} serves this data dir without {words}; stop it, leave that out, or use another --data-dir",
                running.pid
            ))));
        }
        if !status.is_success() {
            return Err(gone(format!("answered {status}")));
        }
        Ok(Self {
            id,
            addr,
            running,
            _open: open,
        })
    }

    async fn summary(&self) -> Result<Summary, String> {
        let path = format!("/api/v1/runs/{}", self.id);
        let nothing = serde_json::Value::Null;
        let asking = super::api::ask(&self.running, Method::GET, &path, &nothing);
        timeout(ANSWER, asking)
            .await
            .unwrap_or_else(|_| Err("it does not answer".into()))
    }
}

/// Why there is no lease.
enum Refusal {
    /// The process is ending or only starting
    Gone(String),
    /// It was started with other options
    Unlike(Exit),
}

fn unix_nanos() -> u128 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap_or_default().as_nanos()
}

/// Starts a proxy of its own, apart from the terminal: it outlives this run if others use it.
fn start_proxy(
    common: &CommonArgs,
    serve: &ServeArgs,
    config: &Config,
) -> Result<(Child, PathBuf, u64), Exit> {
    let path = log_path(&config.data_dir);
    let broken = |e: std::io::Error| {
        Exit::failed(format!(
            "data_dir: {}: {e}; name a folder you can write to with --data-dir",
            config.data_dir.display()
        ))
    };
    std::fs::create_dir_all(&config.data_dir).map_err(broken)?;
    let log = File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&path)
        .map_err(broken)?;
    let mut from = log.metadata().map_or(0, |m| m.len());
    if from > LOG_LIMIT {
        log.set_len(0).map_err(broken)?;
        from = 0;
    }
    let program = std::env::current_exe().map_err(broken)?;
    let mut command = Command::new(program);
    command
        .args(["serve", "--until-unused", "--log-format", "json"])
        .arg("--data-dir")
        .arg(&config.data_dir)
        .args(common.to_args())
        .args(serve.to_args())
        .args(["--listen", "127.0.0.1:0"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .current_dir("/")
        .process_group(0);
    for path in &config.upstream_ca {
        command.arg("--upstream-ca").arg(path);
    }
    for name in ["SSL_CERT_FILE", "SSL_CERT_DIR"] {
        let inherited = std::env::var_os(name).filter(|value| !value.is_empty());
        if let Some(Ok(path)) = inherited.map(std::path::absolute) {
            command.env(name, path);
        }
    }
    if let Some(parent) = &serve.upstream_proxy {
        // It may hold a password, which arguments would show to every user.
        command.env("LARDER_UPSTREAM_PROXY", &parent.0);
    }
    let kept = keep_to_ourselves();
    let child = command.spawn();
    give_on(&kept);
    Ok((child.map_err(broken)?, path, from))
}

/// Marks the descriptors that this process was given (a lock, a pipe, a process substitution) as
/// closed on exec: the proxy may outlive those who wait for them. Returns them, for the command.
#[allow(unsafe_code)]
fn keep_to_ourselves() -> Vec<RawFd> {
    let open = std::fs::read_dir("/dev/fd").into_iter().flatten().flatten();
    let numbers = open.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers
        .filter(|number: &RawFd| *number > 2)
        .filter(|number| {
            // SAFETY: the number is borrowed for these two calls alone, neither of which closes it.
            // The one that listed the folder may be gone by now: then both fail with EBADF.
            let fd = unsafe { BorrowedFd::borrow_raw(*number) };
            rustix::io::fcntl_getfd(fd).is_ok_and(|flags| !flags.contains(FdFlags::CLOEXEC))
                && rustix::io::fcntl_setfd(fd, FdFlags::CLOEXEC).is_ok()
        })
        .collect()
}

/// Undoes [`keep_to_ourselves`]: the command gets what it was given.
#[allow(unsafe_code)]
fn give_on(kept: &[RawFd]) {
    for number in kept {
        // SAFETY: these were open without CLOEXEC, so nobody in this process owns and closes them.
        let fd = unsafe { BorrowedFd::borrow_raw(*number) };
        let _ = rustix::io::fcntl_setfd(fd, FdFlags::empty());
    }
}

fn log_path(data_dir: &Path) -> PathBuf {
    data_dir.join("run.log")
}

/// What the proxy said when it could not start.
fn log_since(path: &Path, from: u64) -> String {
    let mut text = String::new();
    let read = File::open(path).and_then(|mut file| {
        file.seek(SeekFrom::Start(from))?;
        file.read_to_string(&mut text)
    });
    let words = text.lines().rfind(|line| line.starts_with("larder: "));
    match (read, words) {
        (Ok(_), Some(words)) => words.trim_start_matches("larder: ").to_owned(),
        _ => format!("the proxy could not start; see {}", path.display()),
    }
}

/// Signals that are meant for the command.
struct Signals(Vec<(i32, tokio::signal::unix::Signal)>);

impl Signals {
    fn listen() -> Result<Self, Exit> {
        let kinds = [
            SignalKind::interrupt(),
            SignalKind::quit(),
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
        ];
        let mut all = Vec::new();
        for kind in kinds {
            let signal = signal(kind).map_err(|e| Exit::failed(format!("signals: {e}")))?;
            all.push((kind.as_raw_value(), signal));
        }
        Ok(Self(all))
    }

    /// Passes signals on until the command ends.
    async fn forward_until_exit(self, mut child: Child) -> Result<ExitStatus, Exit> {
        let pid = rustix::process::Pid::from_child(&child);
        let forwarders: Vec<_> = self
            .0
            .into_iter()
            .map(|(number, mut signal)| {
                tokio::spawn(async move {
                    while signal.recv().await.is_some() {
                        if comes_from_terminal(number) {
                            // The terminal sent it to the command as well: twice would be too much
                            // (terraform takes the second interrupt for "at once").
                            continue;
                        }
                        if let Some(signal) = rustix::process::Signal::from_named_raw(number) {
                            let _ = rustix::process::kill_process(pid, signal);
                        }
                    }
                })
            })
            .collect();
        let status = tokio::task::spawn_blocking(move || child.wait()).await;
        for forwarder in forwarders {
            forwarder.abort();
        }
        match status {
            Ok(Ok(status)) => Ok(status),
            Ok(Err(e)) => Err(Exit::failed(format!(
                "the command cannot be waited for: {e}"
            ))),
            Err(e) => Err(Exit::failed(format!(
                "the command cannot be waited for: {e}"
            ))),
        }
    }
}

/// Whether an interrupt or quit reached the whole foreground group of the terminal.
fn comes_from_terminal(number: i32) -> bool {
    let by_key = number == SignalKind::interrupt().as_raw_value()
        || number == SignalKind::quit().as_raw_value();
    by_key
        && File::open("/dev/tty")
            .ok()
            .and_then(|tty| rustix::termios::tcgetpgrp(tty).ok())
            .is_some_and(|group| group == rustix::process::getpgrp())
}
