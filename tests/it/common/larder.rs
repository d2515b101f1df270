//! Runs the real binary on a data dir of its own.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use super::{Client, PATIENCE, Upstream, eventually, files_below};

/// The binary under test.
pub fn binary() -> PathBuf {
    let ours = || env!("CARGO_BIN_EXE_larder").into();
    std::env::var_os("LARDER_TEST_BIN")
        .unwrap_or_else(ours)
        .into()
}

/// A data dir, an empty home, and the options under which larder runs there. Clones share the
/// folders, so that `setup.clone().arg("--offline").start()` is a restart.
#[derive(Clone)]
pub struct Setup {
    folder: Arc<TempDir>,
    options: Vec<String>,
    variables: Vec<(String, String)>,
}

impl Setup {
    /// Sends every name that the upstream plays to it.
    pub fn new(upstream: &Upstream) -> Self {
        let mut setup = Self::trusting(upstream);
        for name in Upstream::names() {
            let target = format!("{name}:443:127.0.0.1:{}", upstream.addr.port());
            setup = setup.args(["--connect-to", &target]);
        }
        setup
    }

    /// Trusts the upstream's CA, without knowing where the upstream is.
    pub fn trusting(upstream: &Upstream) -> Self {
        let setup = Self::without_upstream();
        let ca = setup.path("upstream-ca.pem");
        std::fs::write(&ca, &upstream.ca_pem).unwrap();
        setup.args(["--upstream-ca", ca.to_str().unwrap()])
    }

    pub fn without_upstream() -> Self {
        let folder = TempDir::new().unwrap();
        std::fs::create_dir(folder.path().join("home")).unwrap();
        Self {
            folder: Arc::new(folder),
            options: Vec::new(),
            variables: Vec::new(),
        }
    }

    pub fn arg(self, arg: &str) -> Self {
        self.args([arg])
    }

    pub fn args<'a>(mut self, args: impl IntoIterator<Item = &'a str>) -> Self {
        self.options.extend(args.into_iter().map(str::to_owned));
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }

    /// With that text as the config file, in place of an earlier one.
    pub fn config(self, text: &str) -> Self {
        let file = self.path("larder.toml");
        std::fs::write(&file, text).unwrap();
        match self.options.iter().any(|option| option == "--config") {
            true => self,
            false => self.args(["--config", file.to_str().unwrap()]),
        }
    }

    /// An htpasswd file with one user in it.
    pub fn users(&self, user: &str, password: &str) -> PathBuf {
        let path = self.path("htpasswd");
        let hash = bcrypt::hash(password, 4).unwrap();
        std::fs::write(&path, format!("{user}:{hash}\n")).unwrap();
        path
    }

    /// A place for a test's own files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn home(&self) -> PathBuf {
        self.path("home")
    }

    pub fn data_dir(&self) -> PathBuf {
        self.path("data")
    }

    pub fn ca_pem(&self) -> PathBuf {
        self.data_dir().join("ca/ca.pem")
    }

    /// `larder SUBCOMMAND` on this data dir, in an environment without proxies and trust of
    /// the machine's.
    pub fn command(&self, subcommand: &[&str]) -> Command {
        let mut command = Command::new(binary());
        self.cleanse(&mut command);
        command.args(subcommand);
        command.arg("--data-dir").arg(self.data_dir());
        command
    }

    /// The environment that `command` gives, for programs other than larder.
    pub fn cleanse(&self, command: &mut Command) {
        command.env_clear().current_dir(self.folder.path());
        command.env("HOME", self.home());
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        if let Some(profile) = std::env::var_os("LLVM_PROFILE_FILE") {
            command.env("LLVM_PROFILE_FILE", profile);
        }
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null());
    }

    /// What `larder SUBCOMMAND` prints, which must succeed.
    #[track_caller]
    pub fn says(&self, subcommand: &[&str]) -> String {
        let output = self.command(subcommand).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{subcommand:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same, as JSON.
    #[track_caller]
    pub fn says_json(&self, subcommand: &[&str]) -> Value {
        let said = self.says(&[subcommand, &["--json"]].concat());
        serde_json::from_str(&said).unwrap_or_else(|_| panic!("not JSON: {said}"))
    }

    /// `larder SUBCOMMAND` with the upstream's options too, as `run` and `prefetch` want them.
    pub fn command_with_options(&self, subcommand: &[&str]) -> Command {
        let mut command = self.command(subcommand);
        command.args(&self.options);
        command
    }

    /// `larder serve`, whose `--listen` comes last, not yet started.
    pub fn serve_command(&self, listen: &str) -> Command {
        let mut command = self.command_with_options(&["serve"]);
        command.args(["--log-format", "json", "--listen", listen]);
        command
    }

    pub async fn start(&self) -> Larder {
        self.start_on("127.0.0.1:0").await
    }

    pub async fn start_on(&self, listen: &str) -> Larder {
        self.spawn(self.serve_command(listen)).await
    }

    /// Starts what may be `larder serve` behind a wrapper, and waits until it listens.
    pub async fn spawn(&self, mut command: Command) -> Larder {
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("larder starts");
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let lines = Arc::new(Mutex::new(Vec::new()));
        let collected = Arc::clone(&lines);
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                collected.lock().unwrap().push(line);
            }
        });
        let mut larder = Larder {
            addr: SocketAddr::from(([0, 0, 0, 0], 0)),
            child,
            lines,
            setup: self.clone(),
        };
        let started = Instant::now();
        larder.addr = loop {
            if let Some(addr) = larder.announced() {
                break addr;
            }
            let ended = larder.child.try_wait().unwrap();
            assert!(
                ended.is_none() && started.elapsed() < PATIENCE,
                "larder does not listen ({ended:?}):\n{}",
                larder.log().join("\n")
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        larder
    }

    /// The blobs on disk.
    pub fn blobs(&self) -> Vec<PathBuf> {
        files_below(&self.data_dir().join("cache/content-v2"))
    }

    pub fn staged(&self) -> Vec<PathBuf> {
        files_below(&self.data_dir().join("tmp"))
    }

    /// Waits until so many blobs are kept and named in the index, and nothing is staged.
    pub async fn holds(&self, blobs: usize) {
        let what = format!("{blobs} blobs with their names, and an empty tmp/");
        eventually(&what, || {
            let stored = self.blobs().len() == blobs && self.staged().is_empty();
            stored && self.named() == blobs
        })
        .await;
    }

    /// The archives that the index names.
    fn named(&self) -> usize {
        let entries = cacache::list_sync(self.data_dir().join("cache")).flatten();
        let digests: BTreeSet<_> = entries.map(|entry| entry.integrity.to_hex().1).collect();
        digests.len()
    }

    /// The files below the data dir that contain `needle`.
    pub fn files_with(&self, needle: &str) -> Vec<PathBuf> {
        let mut files = files_below(&self.data_dir());
        files.retain(|file| {
            let bytes = std::fs::read(file).unwrap_or_default();
            bytes
                .windows(needle.len())
                .any(|window| window == needle.as_bytes())
        });
        files
    }
}

/// A running `larder serve`; killed when dropped.
pub struct Larder {
    pub addr: SocketAddr,
    pub setup: Setup,
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Larder {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A client that trusts this larder's CA.
    pub fn client(&self) -> Client {
        let ca = std::fs::read(self.setup.ca_pem()).unwrap();
        Client::new(SocketAddr::from(([127, 0, 0, 1], self.addr.port())), &ca)
    }

    /// The lines logged so far.
    pub fn log(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    /// The log lines that hold each of `needles`.
    pub fn log_with(&self, needles: &[&str]) -> Vec<String> {
        let mut lines = self.log();
        lines.retain(|line| needles.iter().all(|needle| line.contains(needle)));
        lines
    }

    /// Waits for a log line that holds each of `needles`.
    pub async fn logs(&self, needles: &[&str]) {
        let what = format!("a log line with {needles:?}");
        eventually(&what, || !self.log_with(needles).is_empty()).await;
    }

    pub async fn metrics(&self) -> String {
        let page = self.client().page("/metrics").await;
        assert_eq!(page.status, 200);
        String::from_utf8(page.body).unwrap()
    }

    /// The sum of a metric over its labels; 0 if it is not there yet.
    pub async fn metric(&self, name: &str) -> f64 {
        let text = self.metrics().await;
        let lines = text.lines().filter_map(|line| line.rsplit_once(' '));
        let ours = lines.filter(|(key, _)| key.split('{').next() == Some(name));
        ours.filter_map(|(_, value)| value.parse::<f64>().ok())
            .sum()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// The exit status, once it has ended by itself or by a signal sent before.
    pub async fn ended(mut self) -> std::process::ExitStatus {
        let mut status = None;
        eventually("larder ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        })
        .await;
        status.unwrap()
    }

    /// SIGTERM, and the exit code.
    pub async fn terminate(self) -> Option<i32> {
        self.signal(Signal::TERM);
        self.ended().await.code()
    }

    /// kill -9, and the process is gone.
    pub async fn kill(self) {
        self.signal(Signal::KILL);
        self.ended().await;
    }

    fn announced(&self) -> Option<SocketAddr> {
        let lines = self.lines.lock().unwrap();
        let mut lines = lines
            .iter()
            .filter_map(|line| serde_json::from_str(line).ok());
        let said = lines.find(|line: &Value| line["message"] == "listening")?;
        said["addr"].as_str()?.parse().ok()
    }
}

impl Drop for Larder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- larder's log\n{}\n---", self.log().join("\n"));
        }
    }
}
