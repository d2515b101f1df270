//! A tool of the system's, run without a shell and not for ever.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;

/// Some systems hand the list of roots on to Java and others, which takes its time.
const TIME: Duration = Duration::from_secs(120);
/// Of its words, in bytes
const SHOWN: u64 = 4096;
/// Also those that users do not have on their PATH
const FOLDERS: [&str; 4] = ["usr/sbin", "usr/bin", "sbin", "bin"];

/// A program where systems have theirs.
#[derive(Debug)]
pub struct Tool(PathBuf);

impl Tool {
    /// The program of that name below `root`.
    pub fn find(root: &Path, name: &str) -> Option<Self> {
        let mut paths = FOLDERS.iter().map(|dir| root.join(dir).join(name));
        let runs = |path: &PathBuf| {
            fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        };
        paths.find(runs).map(Self)
    }

    /// As it is typed.
    pub fn command(&self, arguments: &[&str]) -> String {
        let path = self.0.to_string_lossy();
        [&[path.as_ref()], arguments].concat().join(" ")
    }

    /// Runs it, and says that it did.
    ///
    /// # Errors
    /// Its own words, where it fails.
    pub async fn run(&self, arguments: &[&str]) -> Result<String, String> {
        let shown = self.command(arguments);
        let failed = |why: String| format!("`{shown}` {why}");
        let mut child = Command::new(&self.0)
            .args(arguments)
            .env("PATH", path())
            .env("LC_ALL", "C")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| failed(format!("could not be run: {e}")))?;
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let ended = tokio::time::timeout(TIME, async {
            tokio::join!(words(out), words(err), child.wait())
        });
        let late = |_| failed(format!("took over {} s", TIME.as_secs()));
        let (out, err, status) = ended.await.map_err(late)?;
        let status = status.map_err(|e| failed(format!("could not be waited for: {e}")))?;
        if !status.success() {
            let said = [err, out].join(" ");
            return Err(failed(format!("failed ({status}): {}", said.trim())));
        }
        Ok(format!("ran {shown}"))
    }
}

/// These tools are scripts that need others.
fn path() -> String {
    let folders = FOLDERS.map(|dir| format!("/{dir}")).join(":");
    match std::env::var("PATH") {
        Ok(path) if !path.is_empty() => format!("{path}:{folders}"),
        _ => folders,
    }
}

/// The beginning of what a tool says; the rest is read and dropped, so that it does not wait.
async fn words(pipe: Option<impl AsyncRead + Unpin>) -> String {
    let Some(mut pipe) = pipe else {
        return String::new();
    };
    let mut bytes = Vec::new();
    let _ = (&mut pipe).take(SHOWN).read_to_end(&mut bytes).await;
    let _ = tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await;
    let said = String::from_utf8_lossy(&bytes);
    said.split_whitespace().collect::<Vec<_>>().join(" ")
}
