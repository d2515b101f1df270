//! `larder ca`

use std::process::ExitCode;

use clap::Subcommand;

use crate::ca::{Ca, bundle};
use crate::config::{CommonArgs, Config, ServeArgs};
use crate::error::Exit;

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
    /// Issue the certificate again, over the same key, for the present host list
    Renew(ServeArgs),
}

pub fn main(common: &CommonArgs, args: &Args) -> Result<ExitCode, Exit> {
    let (Action::Show(serve) | Action::Bundle(serve) | Action::Renew(serve)) = &args.action;
    let config = Config::settle(common, serve)?;
    let names = super::serve::names(&config);
    match &args.action {
        Action::Show(_) => super::print(Ca::open_or_create(&config.data_dir, &names)?.pem())?,
        Action::Bundle(_) => {
            let ca = Ca::open_or_create(&config.data_dir, &names)?;
            super::print(&bundle::client_bundle(ca.der()))?;
        }
        Action::Renew(_) => {
            super::print(Ca::renew(&config.data_dir, &names)?.pem())?;
            eprintln!(
                "larder: renewed. Start larder again, and replace the certificate wherever it was installed or bundled (`larder env` makes a new bundle)."
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}
