//! `larder ca`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;

use crate::ca::inspect::{Inspection, PublicKey, Seen};
use crate::ca::trust_store::{Done, Failure, TrustStore};
use crate::ca::{Ca, bundle};
use crate::config::{CommonArgs, Config, HostName, ServeArgs};
use crate::error::Exit;
use crate::instance;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Print the CA certificate
    Show(ServeArgs),
    /// Print the system's roots and the CA certificate
    Bundle(ServeArgs),
    /// Put the CA certificate into the system's trust store, in place of an older one
    Install(SystemArgs),
    /// Take the CA certificate, older ones too, out of the system's trust store
    Uninstall(SystemArgs),
    /// Issue the certificate again, over the same key, for the present host list
    Renew(SystemArgs),
}

#[derive(clap::Args)]
struct SystemArgs {
    #[command(flatten)]
    serve: ServeArgs,
    /// Folder that is taken for /, to try things out: the tools in it are run as they are
    #[arg(long, value_name = "DIR", default_value = "/", hide = true)]
    root: PathBuf,
}

pub fn main(common: &CommonArgs, args: &Args) -> Result<ExitCode, Exit> {
    let serve = match &args.action {
        Action::Show(serve) | Action::Bundle(serve) => serve,
        Action::Install(args) | Action::Uninstall(args) | Action::Renew(args) => &args.serve,
    };
    let config = Config::settle(common, serve)?;
    let names = super::serve::names(&config);
    match &args.action {
        Action::Show(_) => super::print(Ca::open_or_create(&config.data_dir, &names)?.pem())?,
        Action::Bundle(_) => {
            let ca = Ca::open_or_create(&config.data_dir, &names)?;
            super::print(&bundle::client_bundle(ca.der()))?;
        }
        Action::Install(args) => install(&config.data_dir, &names, &args.root)?,
        Action::Uninstall(args) => uninstall(&config.data_dir, &args.root)?,
        Action::Renew(args) => renew(&config.data_dir, &names, &args.root)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn install(data_dir: &Path, names: &[HostName], root: &Path) -> Result<(), Exit> {
    refuse_to_make_one_under_sudo(data_dir)?;
    let ca = Ca::open_or_create(data_dir, names)?;
    let Some(store) = TrustStore::find(root) else {
        let seen = Inspection::of(data_dir);
        super::print(&install_by_hand(&seen))?;
        return Err(Exit::failed(no_store("installed", root)));
    };
    let outcome = super::runtime()?.block_on(store.install(ca.der(), ca.pem()));
    say(outcome, "install", data_dir, root)?;
    let missing: Vec<_> = names.iter().filter(|name| !ca.permits(name)).collect();
    if !missing.is_empty() {
        let words: Vec<_> = missing.iter().map(|name| name.as_str()).collect();
        eprintln!(
            "larder: the certificate may not vouch for {}; run `larder ca renew`, and install it again",
            words.join(", ")
        );
    }
    Ok(())
}

fn uninstall(data_dir: &Path, root: &Path) -> Result<(), Exit> {
    let seen = Inspection::of(data_dir);
    let Some(store) = TrustStore::find(root) else {
        // Without its name, others would be named along with it.
        if let Some(cert) = seen.cert.get() {
            super::print(&uninstall_by_hand(&cert.name))?;
        }
        return Err(Exit::failed(no_store("taken out", root)));
    };
    let Some(key) = seen.public_key() else {
        return Err(Exit::failed(no_ca(data_dir, &store)));
    };
    let outcome = super::runtime()?.block_on(store.uninstall(key));
    say(outcome, "uninstall", data_dir, root)
}

fn renew(data_dir: &Path, names: &[HostName], root: &Path) -> Result<(), Exit> {
    let ca = Ca::renew(data_dir, names)?;
    super::print(ca.pem())?;
    eprintln!("larder: renewed; what is next:");
    if let Some(running) = instance::find(data_dir) {
        eprintln!(
            "larder: process {} serves with the old certificate until it is reloaded (kill -HUP) or started again",
            running.pid
        );
    }
    let key = PublicKey::of(ca.der());
    let store = TrustStore::find(root);
    let installed = store
        .zip(key)
        .is_some_and(|(store, key)| !store.bundled(&key).is_empty());
    if installed {
        eprintln!(
            "larder: the system's trust store holds the old one; replace it: {}",
            sudo("install", data_dir, root)
        );
    }
    eprintln!(
        "larder: shells that were set up by `larder env` need it once more, and whoever has the certificate otherwise needs the new one (`larder ca show`)"
    );
    Ok(())
}

/// The lines of what was done, or why it was not.
fn say(
    outcome: Result<Done, Failure>,
    action: &str,
    data_dir: &Path,
    root: &Path,
) -> Result<(), Exit> {
    match outcome {
        Ok(done) => super::print(&format!("{}\n", done.join("\n"))),
        Err(Failure::NotRoot(why)) => Err(Exit::failed(format!(
            "{why}; only root may: run {}",
            sudo(action, data_dir, root)
        ))),
        Err(Failure::Other(why)) => Err(Exit::failed(why)),
    }
}

/// The data dir is named: root's home is another one.
fn sudo(action: &str, data_dir: &Path, root: &Path) -> String {
    let program = std::env::current_exe().unwrap_or_else(|_| "larder".into());
    let mut words = vec![
        "sudo".to_owned(),
        word(&program),
        "ca".into(),
        action.into(),
        "--data-dir".into(),
        word(data_dir),
    ];
    if root != Path::new("/") {
        words.extend(["--root".into(), word(root)]);
    }
    words.join(" ")
}

/// A path as a POSIX shell takes it for one word.
fn word(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:,@".contains(c);
    match text.chars().all(plain) {
        true => text.into_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

/// A CA that `sudo` makes would lie in root's home, or be root's in the user's, and be of no use to
/// the larder that the user runs.
fn refuse_to_make_one_under_sudo(data_dir: &Path) -> Result<(), Exit> {
    let by_sudo = std::env::var("SUDO_UID").is_ok_and(|uid| !uid.is_empty() && uid != "0");
    if !by_sudo || !matches!(Inspection::of(data_dir).cert, Seen::Absent) {
        return Ok(());
    }
    Err(Exit::failed(format!(
        "{} holds no CA; run `larder ca install` without sudo first: it makes the CA and says how to go on",
        data_dir.display()
    )))
}

fn no_store(what: &str, root: &Path) -> String {
    match std::env::consts::OS {
        "macos" | "windows" => format!("nothing was {what}; the commands above do it"),
        _ => format!(
            "nothing was {what}: below {} there is no trust store of a kind that larder knows; install the package ca-certificates, or run what is above where clients are",
            root.display()
        ),
    }
}

fn no_ca(data_dir: &Path, store: &TrustStore) -> String {
    let files = store.larder_files();
    let words = format!(
        "{} holds no CA, so there is none to take out; name its data dir with --data-dir",
        data_dir.display()
    );
    if files.is_empty() {
        return words;
    }
    let files: Vec<_> = files.iter().map(|file| word(file)).collect();
    format!(
        "{words}; installed by some larder: {} (to take that out without its data dir, remove it and run `{}`)",
        files.join(" "),
        store.tool_command()
    )
}

fn install_by_hand(seen: &Inspection) -> String {
    let file = word(&seen.cert_path);
    let mut text = format!("The CA certificate is {}.\n\n", seen.cert_path.display());
    if std::env::consts::OS != "macos" {
        text.push_str(&format!(
            "On Linux, `larder ca install` knows\n{}\n",
            TrustStore::known()
        ));
    }
    text.push_str(&format!(
        "On macOS, have your own programs, or those of all users, trust it:\n  \
         security add-trusted-cert -r trustRoot -k ~/Library/Keychains/login.keychain-db {file}\n  \
         sudo security add-trusted-cert -d -r trustRoot -k /Library/Keychains/System.keychain {file}\n\n\
         On Windows, the same, with a copy of the file (the second in a prompt of an administrator):\n  \
         certutil -user -addstore Root ca.pem\n  \
         certutil -addstore Root ca.pem\n\n"
    ));
    text
}

fn uninstall_by_hand(name: &str) -> String {
    format!(
        "The CA goes by the name {name:?}.\n\n\
         On macOS, out of your own keychain, or that of all users:\n  \
         security delete-certificate -t -c {name:?} ~/Library/Keychains/login.keychain-db\n  \
         sudo security delete-certificate -t -c {name:?} /Library/Keychains/System.keychain\n\n\
         On Windows, the same (the second in a prompt of an administrator):\n  \
         certutil -user -delstore Root {name:?}\n  \
         certutil -delstore Root {name:?}\n\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_can_be_pasted_into_a_shell() {
        for (path, text) in [
            (
                "/home/ann/.local/share/larder",
                "/home/ann/.local/share/larder",
            ),
            ("/a b/it's", r"'/a b/it'\''s'"),
            ("/a;b", "'/a;b'"),
            ("/~x", "'/~x'"),
        ] {
            assert_eq!(word(Path::new(path)), text);
        }
    }
}
