//! `larder verify`

use std::process::ExitCode;

use crate::cache::document::check_documents;
use crate::config::{CommonArgs, Config, ServeArgs};
use crate::error::Exit;
use crate::instance::Instance;
use crate::store::{Store, check_all};

#[derive(clap::Args)]
pub struct Args {
    /// Remove what is bad; it is fetched anew when next asked for
    #[arg(long)]
    repair: bool,
}

pub fn main(common: &CommonArgs, args: &Args) -> Result<ExitCode, Exit> {
    let config = Config::settle(common, &ServeArgs::default())?;
    let dir = &config.data_dir;
    // Only a repair writes, and nobody else may then.
    let _instance = args
        .repair
        .then(|| Instance::take(dir, false))
        .transpose()?;
    let broken = |e: std::io::Error| Exit::usage(format!("data_dir: {}: {e}", dir.display()));
    let bad_blobs = check_all(dir).map_err(broken)?;
    let bad_documents = check_documents(dir).map_err(broken)?;
    for bad in &bad_blobs {
        super::print(&format!("{bad}\n"))?;
    }
    for (path, what) in &bad_documents {
        super::print(&format!("{}: {what}\n", path.display()))?;
    }
    if bad_blobs.is_empty() && bad_documents.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    if args.repair {
        // Opening mends the index; what names a bad blob goes with the blob.
        let store = Store::open(dir, Some(u64::MAX), u64::MAX)?;
        store.settle();
        for bad in &bad_blobs {
            match bad.blob {
                Some(digest) => store.discard(digest),
                None if bad.path.starts_with(dir.join("cache/content-v2"))
                    && bad.path.is_file() =>
                {
                    std::fs::remove_file(&bad.path).map_err(broken)?;
                }
                None => {}
            }
        }
        for (path, _) in &bad_documents {
            std::fs::remove_file(path).map_err(broken)?;
        }
        eprintln!("larder: removed what was bad");
    }
    Ok(ExitCode::from(1))
}
