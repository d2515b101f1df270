//! `larder doctor`: looks for what keeps larder from working, and says how it is mended.
//!
//! Nothing is made or changed, and all of it is bounded in time. A further check is a line in
//! [`CHECKS`] and a function from the [`Case`] to its findings; what it needs of others (the network,
//! another process) is gathered into the case beforehand.

mod authority;
mod local;
mod origin;
mod proxy;
mod registries;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout, timeout_at};

use crate::ca::inspect::Inspection;
use crate::config::{CommonArgs, Config, ServeArgs};
use crate::error::Exit;
use crate::instance::{self, Running};
use crate::registry::Survey;

/// For all checks together, once everything is gathered.
const CHECKING: Duration = Duration::from_secs(3);
/// For the first look at the data dir: it may lie on a network.
const LOOKING: Duration = Duration::from_secs(2);

/// The checks, in the order of their lines.
const CHECKS: [(&str, Check); 13] = [
    ("config", local::config),
    ("data dir", local::data_dir),
    ("disk", local::disk),
    ("open files", local::open_files),
    ("proxy", proxy::server),
    ("environment", proxy::environment),
    ("ca", authority::files),
    ("name constraints", authority::constraints),
    ("system trust", authority::system),
    ("shell trust", authority::shell),
    ("upstream", origin::upstream),
    ("clock", origin::clock),
    ("registry", registries::check),
];

/// Looks at one thing. It may block; it is not waited for without end.
type Check = fn(&Case) -> Vec<Finding>;

/// All that the checks go by.
struct Case {
    config: Config,
    /// The config file, and whether it was named
    file: Option<(PathBuf, bool)>,
    /// What stands for /
    root: PathBuf,
    ca: Inspection,
    running: Option<Running>,
    /// What the running larder says, or why it says nothing
    server: Option<Result<proxy::Answers, String>>,
    /// Where somebody else listens that larder is to listen
    taken: Vec<std::net::SocketAddr>,
    upstream: Result<Vec<origin::Origin>, Exit>,
    registries: Vec<Result<Survey, String>>,
}

/// What a check found.
#[derive(Clone, Debug, Serialize)]
struct Finding {
    level: Level,
    /// The thing that was looked at
    check: String,
    found: String,
    /// What to do about it
    mend: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    /// It works, but not as well as it could, or not for long, or not for this shell
    Warn,
    /// Something does not work
    Fail,
}

impl Finding {
    fn ok(check: &str, found: impl Into<String>) -> Self {
        Self {
            level: Level::Ok,
            check: check.into(),
            found: found.into(),
            mend: None,
        }
    }

    fn warn(check: &str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            level: Level::Warn,
            mend: Some(mend.into()),
            ..Self::ok(check, found)
        }
    }

    fn fail(check: &str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            level: Level::Fail,
            ..Self::warn(check, found, mend)
        }
    }

    /// An error's words end in what to do, after the last semicolon.
    fn from_words(check: &str, words: &str) -> Self {
        match words.rsplit_once("; ") {
            Some((found, mend)) => Self::fail(check, found, mend),
            None => Self::fail(check, words, "see `larder doctor --help`"),
        }
    }

    fn line(&self) -> String {
        let level = match self.level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        let mend = self.mend.as_ref().map(|mend| format!("; {mend}"));
        let text = format!("{}: {}{}", self.check, self.found, mend.unwrap_or_default());
        // A line each, whatever others put into their words.
        let text: Vec<_> = text.split_whitespace().collect();
        format!("{level}  {}\n", text.join(" "))
    }
}

#[derive(clap::Args)]
pub struct Args {
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Folder that is taken for /, to try things out
    #[arg(long, value_name = "DIR", default_value = "/", hide = true)]
    root: PathBuf,
    /// The options that the server is started with
    #[command(flatten)]
    serve: ServeArgs,
}

pub fn main(common: &CommonArgs, args: &Args) -> Result<ExitCode, Exit> {
    let findings = match Config::settle(common, &args.serve) {
        Ok(config) => {
            let runtime = super::runtime()?;
            let file = Config::file(common);
            let findings = runtime.block_on(examine(config, file, args.root.clone()));
            // What hangs is left behind.
            runtime.shutdown_background();
            findings
        }
        Err(exit) => vec![Finding::from_words("config", &exit.message)],
    };
    let healthy = findings.iter().all(|f| f.level != Level::Fail);
    let text = match args.json {
        true => {
            let version = env!("CARGO_PKG_VERSION");
            let all = json!({"larder": version, "healthy": healthy, "findings": findings});
            format!("{all:#}\n")
        }
        false => findings.iter().map(Finding::line).collect(),
    };
    super::print(&text)?;
    Ok(ExitCode::from(u8::from(!healthy)))
}

async fn examine(config: Config, file: Option<(PathBuf, bool)>, root: PathBuf) -> Vec<Finding> {
    let data_dir = config.data_dir.clone();
    let look = spawn_blocking(move || (instance::find(&data_dir), Inspection::of(&data_dir)));
    let Ok(Ok((running, ca))) = timeout(LOOKING, look).await else {
        let found = format!("{} does not answer", config.data_dir.display());
        let mend = "see whether its disk or network is there";
        return vec![Finding::fail("data dir", found, mend)];
    };
    let own = match running.as_ref().and_then(|running| running.addr) {
        Some(addr) => vec![addr],
        None => config.listen.clone(),
    };
    let (server, taken, upstream, registries) = tokio::join!(
        proxy::ask(running.as_ref()),
        proxy::taken(&config, running.as_ref()),
        origin::ask_all(&config, own),
        registries::survey(&config, running.as_ref())
    );
    let case = Arc::new(Case {
        config,
        file,
        root,
        ca,
        running,
        server,
        taken,
        upstream,
        registries,
    });
    let deadline = Instant::now() + CHECKING;
    let checks = CHECKS.map(|(name, check)| {
        let case = case.clone();
        (name, spawn_blocking(move || check(&case)))
    });
    let mut findings = Vec::new();
    for (name, check) in checks {
        match timeout_at(deadline, check).await {
            Ok(Ok(found)) => findings.extend(found),
            Ok(Err(_)) => findings.push(Finding::fail(
                name,
                "this check broke off",
                "please report it, with what `larder doctor` says besides",
            )),
            Err(_) => findings.push(Finding::fail(
                name,
                format!("no answer within {} s", CHECKING.as_secs()),
                "see whether the disks it lies on are there",
            )),
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_a_line_with_its_mend() {
        let words = "a is\nbroken; or so; mend it";
        let finding = Finding::from_words("thing", words);
        assert_eq!(finding.line(), "FAIL  thing: a is broken; or so; mend it\n");
        assert_eq!(finding.mend.as_deref(), Some("mend it"));
        assert_eq!(Finding::ok("thing", "fine").line(), "ok    thing: fine\n");
    }
}
