//! `larder env`: the settings that send a shell's Terraform traffic through the proxy.

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::ValueEnum;

use super::terraformrc;
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
    /// Without proxy and CA: a Terraform CLI configuration whose registries lie at larder
    #[arg(long)]
    ca_free: bool,
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
    let running = serving(&config.data_dir);
    let addr = match running.as_ref().and_then(|running| running.addr) {
        Some(addr) => addr,
        None => {
            eprintln!(
                "larder: nobody serves {} yet; start `larder serve`",
                config.data_dir.display()
            );
            let configured = config.listen.first().filter(|addr| addr.port() != 0);
            *configured.ok_or_else(|| {
                Exit::usage("listen: port 0 is known only once `larder serve` runs; start it first")
            })?
        }
    };
    let settings = match args.ca_free {
        true => {
            if !addr.ip().is_loopback() && !addr.ip().is_unspecified() {
                eprintln!(
                    "larder: {addr} is not this machine: what Terraform reads from there by plain HTTP can be changed on the way"
                );
            }
            let path = config.data_dir.join("terraformrc");
            let written =
                terraformrc::write(&config, reachable(addr), running.as_ref(), &path, false);
            super::runtime()?.block_on(written)?
        }
        false => settings(&config, addr, running.and_then(|r| r.login).as_deref())?,
    };
    super::print(&args.shell.print(&settings))?;
    Ok(ExitCode::SUCCESS)
}

/// Where the larder is reached that serves the data dir. One that is just being started
/// (`larder serve &` in the line before) is waited for. The proxy of a `larder run` does not count:
/// it ends with the run.
fn serving(data_dir: &Path) -> Option<Running> {
    let start = Instant::now();
    loop {
        let running = instance::find(data_dir).filter(|running| !running.until_unused);
        let patience = match running {
            Some(running) if running.addr.is_some() => return Some(running),
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
    addr: SocketAddr,
    login: Option<&str>,
) -> Result<Vec<(&'static str, String)>, Exit> {
    let addr = reachable(addr);
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

/// Whoever listens everywhere is reached here.
pub fn reachable(mut addr: SocketAddr) -> SocketAddr {
    if addr.ip().is_unspecified() {
        addr.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
    }
    addr
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
