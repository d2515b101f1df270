//! `larder env`: the settings that send a shell's Terraform traffic through the proxy.

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::ValueEnum;

use crate::ca::{Ca, bundle};
use crate::config::{CommonArgs, Config, ServeArgs};
use crate::error::Exit;
use crate::instance::{self, Running};

/// For a server that has the data dir to listen.
const STARTING: Duration = Duration::from_secs(10);
/// For a server to take the data dir.
const STARTED_JUST_NOW: Duration = Duration::from_millis(500);

#[derive(clap::Args)]
pub struct Args {
    /// Form of the settings
    #[arg(long, value_name = "SHELL", default_value = "sh")]
    shell: Shell,
    #[command(flatten)]
    serve: ServeArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum Shell {
    /// POSIX shells: eval "$(larder env)"
    Sh,
    /// fish: larder env --shell fish | source
    Fish,
    /// PowerShell: larder env --shell powershell | Out-String | Invoke-Expression
    Powershell,
    /// NAME=value lines, for --env-file and the like
    Dotenv,
    /// GitHub Actions: larder env --shell github >> "$GITHUB_ENV"
    Github,
}

pub fn main(common: &CommonArgs, args: &Args) -> Result<ExitCode, Exit> {
    let config = Config::settle(common, &args.serve)?;
    let (addr, login) = match serving(&config.data_dir) {
        Some(found) => found,
        None => {
            eprintln!(
                "larder: nobody serves {} yet; start `larder serve`",
                config.data_dir.display()
            );
            let configured = config.listen.first().filter(|addr| addr.port() != 0);
            let addr = *configured.ok_or_else(|| {
                Exit::usage("listen: port 0 is known only once `larder serve` runs; start it first")
            })?;
            (addr, None)
        }
    };
    let settings = settings(&config, addr, login.as_deref())?;
    super::print(&args.shell.print(&settings))?;
    Ok(ExitCode::SUCCESS)
}

/// Where the larder is reached that serves the data dir. One that is just being started
/// (`larder serve &` in the line before) is waited for. The proxy of a `larder run` does not count:
/// it ends with the run.
fn serving(data_dir: &Path) -> Option<(SocketAddr, Option<String>)> {
    let start = Instant::now();
    loop {
        let running = instance::find(data_dir).filter(|running| !running.until_unused);
        let patience = match running {
            Some(Running {
                addr: Some(addr),
                login,
                ..
            }) => return Some((addr, login)),
            Some(_) => STARTING,
            None => STARTED_JUST_NOW,
        };
        if start.elapsed() > patience {
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The settings for a proxy at `addr` (with `USER:PASSWORD`, if it asks for them), the inherited ones kept where they still matter.
pub fn settings(
    config: &Config,
    mut addr: SocketAddr,
    login: Option<&str>,
) -> Result<Vec<(&'static str, String)>, Exit> {
    if addr.ip().is_unspecified() {
        addr.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
    }
    let ca = Ca::open_or_create(&config.data_dir, &super::serve::names(config))?;
    let bundle = write_bundle(&config.data_dir, &ca)?;
    let proxy = match login {
        Some(login) => format!("http://{login}@{addr}"),
        None => format!("http://{addr}"),
    };
    let mut settings = vec![
        ("HTTPS_PROXY", proxy.clone()),
        ("https_proxy", proxy),
        ("NO_PROXY", no_proxy()),
    ];
    if std::env::var_os("no_proxy").is_some() {
        // curl reads this one first.
        settings.push(("no_proxy", no_proxy()));
    }
    for name in [
        "SSL_CERT_FILE",
        "CURL_CA_BUNDLE",
        "REQUESTS_CA_BUNDLE",
        "NODE_EXTRA_CA_CERTS",
        "GIT_SSL_CAINFO",
    ] {
        settings.push((name, bundle.clone()));
    }
    Ok(settings)
}

fn write_bundle(data_dir: &Path, ca: &Ca) -> Result<String, Exit> {
    let text = bundle::client_bundle(ca.der());
    let path = bundle::write_client_bundle(data_dir, &text)
        .map_err(|e| Exit::usage(format!("data_dir: {}: {e}", data_dir.display())))?;
    Ok(path.to_string_lossy().into_owned())
}

/// What was inherited, and the machine itself, each once.
fn no_proxy() -> String {
    let inherited = ["NO_PROXY", "no_proxy"].map(|name| std::env::var(name).unwrap_or_default());
    let mut entries: Vec<&str> = Vec::new();
    let own = "localhost,127.0.0.1,::1";
    for entry in inherited
        .iter()
        .flat_map(|list| list.split(','))
        .chain(own.split(','))
    {
        let entry = entry.trim();
        if !entry.is_empty() && !entries.contains(&entry) {
            entries.push(entry);
        }
    }
    entries.join(",")
}

impl Shell {
    fn print(self, settings: &[(&str, String)]) -> String {
        settings
            .iter()
            .map(|(name, value)| self.line(name, value))
            .collect()
    }

    fn line(self, name: &str, value: &str) -> String {
        match self {
            Self::Sh => format!("export {name}='{}'\n", value.replace('\'', r"'\''")),
            Self::Fish => {
                let value = value.replace('\\', r"\\").replace('\'', r"\'");
                format!("set -gx {name} '{value}'\n")
            }
            Self::Powershell => format!("$env:{name} = '{}'\n", value.replace('\'', "''")),
            Self::Dotenv | Self::Github => format!("{name}={value}\n"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_quoted_for_each_shell() {
        for (shell, line) in [
            (Shell::Sh, "export A='it'\\''s'\n"),
            (Shell::Fish, "set -gx A 'it\\'s'\n"),
            (Shell::Powershell, "$env:A = 'it''s'\n"),
            (Shell::Dotenv, "A=it's\n"),
        ] {
            assert_eq!(shell.line("A", "it's"), line);
        }
    }
}
