//! The command line: one file a command.

mod api;
mod ca;
mod doctor;
mod env;
mod explain;
mod gc;
mod list;
mod registry;
mod run;
mod serve;
mod terraformrc;
mod verify;

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::SystemTime;

use clap::builder::Resettable;
use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use rustls::pki_types::CertificateDer;
use tokio_rustls::TlsConnector;

use crate::cache::Cache;
use crate::cache::metadata::{Bounds, Metadata};
use crate::cache::sightings::Sightings;
use crate::cache::trust::Judge;
use crate::config::{CommonArgs, Config};
use crate::error::Exit;
use crate::store::Store;
use crate::terraform::signature::Keyring;
use crate::upstream::Upstream;
use crate::upstream::dial::Dialer;
use crate::upstream::guard::Reach;

/// A caching, verifying forward proxy for Terraform and OpenTofu
#[derive(Parser)]
#[command(name = "larder", version, arg_required_else_help = true)]
#[command(after_help = "Start with: larder run -- terraform init")]
struct Cli {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the proxy in the foreground until SIGTERM or SIGINT
    Serve(serve::Args),
    /// Run a command whose Terraform traffic goes through the cache
    Run(run::Args),
    /// Print the settings that send a shell's Terraform traffic through the proxy
    Env(env::Args),
    /// Show, install, take out or renew larder's certificate authority
    Ca(ca::Args),
    /// List what is held, and how it was verified
    List(list::Args),
    /// Say why something would be a hit or a miss, which checksum applies, and where that came from
    Explain(explain::Args),
    /// Hash every blob again and check every index entry
    Verify(verify::Args),
    /// Add releases to a private registry, or make the key by which it signs
    Registry(registry::Args),
    /// Evict what was used longest ago
    Gc(gc::Args),
    /// Look for what keeps larder from working, and say how it is mended
    Doctor(doctor::Args),
    /// Print shell completions
    Completions { shell: clap_complete::Shell },
}

/// Runs the command that the process's arguments name.
pub fn main() -> ExitCode {
    let parsed = without_empty_variables(Cli::command())
        .try_get_matches()
        .and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    let outcome = match cli.command {
        Command::Serve(args) => serve::main(&cli.common, &args),
        Command::Run(args) => run::main(&cli.common, args),
        Command::Env(args) => env::main(&cli.common, &args),
        Command::Ca(args) => ca::main(&cli.common, &args),
        Command::List(args) => list::main(&cli.common, &args),
        Command::Explain(args) => explain::main(&cli.common, &args),
        Command::Verify(args) => verify::main(&cli.common, &args),
        Command::Registry(args) => registry::main(&cli.common, &args),
        Command::Gc(args) => gc::main(&cli.common, &args),
        Command::Doctor(args) => doctor::main(&cli.common, &args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "larder", &mut script);
            print(&String::from_utf8_lossy(&script)).map(|()| ExitCode::SUCCESS)
        }
    };
    outcome.unwrap_or_else(|exit| {
        eprintln!("larder: {exit}");
        ExitCode::from(exit.code)
    })
}

/// An empty variable is as good as none: CI systems set all that they know of.
fn without_empty_variables(command: clap::Command) -> clap::Command {
    let names: Vec<String> = command
        .get_subcommands()
        .map(|sub| sub.get_name().to_owned())
        .collect();
    let command = command.mut_args(|arg| {
        let variable = arg.get_env().map(std::env::var_os);
        match variable {
            Some(Some(value)) if value.is_empty() => arg.env(Resettable::Reset),
            _ => arg,
        }
    });
    names.into_iter().fold(command, |command, name| {
        command.mut_subcommand(name, without_empty_variables)
    })
}

/// Says what is wrong with the arguments. For `run`, 2 could be its command's own exit code.
fn usage(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    let command = Cli::command();
    let subcommand = std::env::args_os()
        .skip(1)
        .find(|arg| command.get_subcommands().any(|sub| arg == sub.get_name()));
    let of_run = subcommand.is_some_and(|name| name == "run");
    match error.exit_code() {
        0 => ExitCode::SUCCESS,
        _ if of_run => ExitCode::from(run::FAILED),
        code => ExitCode::from(code as u8),
    }
}

/// Prints to stdout. A reader that left early (`| head`) is no failure.
fn print(text: &str) -> Result<(), Exit> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Exit::failed(format!("stdout: {e}")))
        }
        _ => Ok(()),
    }
}

/// `38.5 MB`: for people, in powers of 1000.
fn human(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 1000.0 {
            return match unit {
                "B" => format!("{bytes} B"),
                _ => format!("{value:.1} {unit}"),
            };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

/// `2026-01-31T12:00:00Z`
fn date(time: SystemTime) -> String {
    let time = time::OffsetDateTime::from(time);
    let (date, clock) = (time.date(), time.time());
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z",
        date.year(),
        u8::from(date.month()),
        date.day(),
        clock.hour(),
        clock.minute(),
        clock.second()
    )
}

/// The cache as it is on disk, for commands that only look.
fn peek(config: &Config) -> Result<Arc<Cache>, Exit> {
    let judge = Judge::new(config.policy.clone(), config.republished, keyring(config)?);
    let dialer = Dialer {
        offline: true,
        reach: Reach::PublicOnly,
        connect_to: Vec::new(),
        configured: Vec::new(),
        listed: Default::default(),
        mirrors: Default::default(),
        parent: None,
        own: Vec::new(),
    };
    let tls = upstream_tls(Vec::new())?;
    let upstream = Arc::new(Upstream::new(Arc::new(dialer), tls, Default::default()));
    let bounds = Bounds {
        document: config.limits.metadata_bytes,
        list_grace: config.version_list_grace,
    };
    let metadata = Metadata::peek(
        &config.data_dir,
        upstream.clone(),
        bounds,
        config.trusted_registries(),
    );
    let store = Store::peek(&config.data_dir);
    let judge = Arc::new(judge);
    Ok(Cache::new(
        metadata,
        store,
        upstream,
        judge,
        Sightings::peek(&config.data_dir),
        0,
        Default::default(),
    ))
}

fn upstream_tls(roots: Vec<CertificateDer<'static>>) -> Result<TlsConnector, Exit> {
    crate::upstream::tls(roots).map_err(|e| Exit::failed(format!("TLS cannot start: {e}")))
}

/// The keys that signatures are checked by, besides those that registries name.
fn keyring(config: &Config) -> Result<Keyring, Exit> {
    if config.trusted_keys.is_empty() {
        return Ok(Keyring::shipped());
    }
    let mut ring = Keyring::default();
    for path in &config.trusted_keys {
        let read = std::fs::read(path).map_err(|e| e.to_string());
        let trusted = read.and_then(|file| ring.trust(&file));
        trusted.map_err(|why| {
            Exit::usage(format!(
                "trusted_key: {}: {why}; name a file of OpenPGP public keys",
                path.display()
            ))
        })?;
    }
    Ok(ring)
}

/// The runtime of a command that talks or serves.
fn runtime() -> Result<tokio::runtime::Runtime, Exit> {
    tokio::runtime::Runtime::new().map_err(|e| Exit::failed(format!("no runtime: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_for_people() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (38_500_000, "38.5 MB"),
            (5_000_000_000, "5.0 GB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
