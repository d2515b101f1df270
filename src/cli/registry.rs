//! `larder registry`: what goes into the folder of a private registry.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Subcommand;

use crate::ca::write_atomically;
use crate::config::{Authority, CommonArgs, Config, PrivateRegistry, ServeArgs};
use crate::error::Exit;
use crate::registry::add::{Request, check, manifests, place};
use crate::registry::folder::Folder;
use crate::registry::key::{self, SigningKey};
use crate::registry::releases::KEYS;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Check files of a provider's release and place them in the registry's folder
    Add(AddArgs),
    /// Make the key that signs what has no signature, and print its public part
    Keygen,
}

#[derive(clap::Args)]
struct AddArgs {
    /// terraform-provider-TYPE_VERSION_OS_ARCH.zip, its SHA256SUMS, signature and manifest, public keys (*.asc)
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Whose release it is [default: the one that the registry's folder has]
    #[arg(long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Of several registries, the one with this host
    #[arg(long, value_name = "HOST")]
    host: Option<Authority>,
    /// Plugin protocol of what comes without a manifest, such as 6.0 [default: 5.0]
    #[arg(long, value_name = "VERSION")]
    protocol: Vec<String>,
}

pub fn main(common: &CommonArgs, args: &Args) -> Result<ExitCode, Exit> {
    let config = Config::settle(common, &ServeArgs::default())?;
    match &args.action {
        Action::Add(args) => add(&config, args),
        Action::Keygen => {
            let (key, made) = SigningKey::open_or_create(&config.data_dir)?;
            let path = key::path(&config.data_dir);
            let what = if made { "made" } else { "there already" };
            eprintln!(
                "larder: {} {what}; fingerprint {}",
                path.display(),
                key.fingerprint
            );
            super::print(&key.public)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn add(config: &Config, args: &AddArgs) -> Result<ExitCode, Exit> {
    let registry = chosen(config, args.host.as_ref())?;
    let namespace = match &args.namespace {
        Some(namespace) => namespace.clone(),
        None => only_namespace(registry)?,
    };
    let folder = Folder::open(&registry.dir, None, Arc::new(super::keyring(config)?));
    let folder = folder.map_err(|e| Exit::usage(format!("{}: {e}", registry.dir.display())))?;
    let request = Request {
        folder: &folder,
        root: &registry.dir,
        namespace: &namespace,
        files: &args.files,
        protocols: &args.protocol,
    };
    let placements = check(&request).map_err(|wrong| {
        let lines = wrong.join("\n  ");
        Exit::failed(format!("nothing was added:\n  {lines}"))
    })?;
    for (to, text) in manifests(&request, &placements) {
        let to = registry.dir.join(to);
        let written = std::fs::create_dir_all(to.parent().unwrap_or(&registry.dir))
            .and_then(|()| write_atomically(&to, text.as_bytes(), 0o644));
        written.map_err(|e| Exit::failed(format!("{}: {e}", to.display())))?;
    }
    for placement in &placements {
        let new = place(&registry.dir, placement).map_err(Exit::failed)?;
        let what = if new { "added" } else { "there already" };
        super::print(&format!("{}: {what}\n", placement.to.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn chosen<'a>(config: &'a Config, host: Option<&Authority>) -> Result<&'a PrivateRegistry, Exit> {
    match (host, &config.registries[..]) {
        (Some(host), _) => config.registry(host).ok_or_else(|| {
            Exit::usage(format!(
                "--host: no [[registry]] in the config file has the host {}",
                host.in_https_url()
            ))
        }),
        (None, [registry]) => Ok(registry),
        (None, []) => Err(Exit::usage(
            "the config file has no [[registry]]; write one with its `host` and `dir`",
        )),
        (None, _) => Err(Exit::usage(
            "the config file has several registries; say which with --host",
        )),
    }
}

fn only_namespace(registry: &PrivateRegistry) -> Result<String, Exit> {
    let entries = std::fs::read_dir(&registry.dir)
        .into_iter()
        .flatten()
        .flatten();
    let folders = entries.filter(|entry| entry.path().is_dir());
    let names = folders.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names = names.filter(|name| !name.starts_with('.') && name != KEYS);
    match (names.next(), names.next()) {
        (Some(name), None) => Ok(name),
        _ => Err(Exit::usage(
            "--namespace: say whose release it is, such as --namespace corp",
        )),
    }
}
