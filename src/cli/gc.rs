//! `larder gc`

use std::process::ExitCode;

use hyper::Method;

use crate::config::{CommonArgs, Config, Period, ServeArgs, Size};
use crate::error::Exit;
use crate::instance::{self, Instance};
use crate::store::{Freed, Store};

#[derive(clap::Args)]
pub struct Args {
    /// Evict, least recently used first, until no more is held [default: the configured budget]
    #[arg(long, env = "LARDER_MAX_SIZE", value_name = "SIZE")]
    max_size: Option<Size>,
    /// Evict what was not used for so long, such as 30d
    #[arg(long, value_name = "AGE")]
    unused_for: Option<Period>,
}

pub fn main(common: &CommonArgs, args: &Args) -> Result<ExitCode, Exit> {
    let config = Config::settle(common, &ServeArgs::default())?;
    let max_size = args.max_size.map(|size| size.0).or(config.max_size);
    let unused_for = args.unused_for.map(|period| period.0);
    let freed: Freed = match instance::find(&config.data_dir) {
        Some(running) => {
            let asked = serde_json::json!({
                "max_size": max_size,
                "unused_for_ms": unused_for.map(|age| age.as_millis() as u64),
            });
            super::runtime()?
                .block_on(super::api::ask(
                    &running,
                    Method::POST,
                    "/api/v1/gc",
                    &asked,
                ))
                .map_err(|e| {
                    Exit::failed(format!(
                        "process {}, which has the data dir, {e}",
                        running.pid
                    ))
                })?
        }
        None => {
            let _instance = Instance::take(&config.data_dir, false)?;
            // Without a budget: what is evicted is counted.
            let store = Store::open(&config.data_dir, Some(u64::MAX), u64::MAX)?;
            store.gc(max_size, unused_for)
        }
    };
    super::print(&format!(
        "evicted {} archives, {}; {} held\n",
        freed.blobs,
        super::human(freed.bytes),
        super::human(freed.held)
    ))?;
    Ok(ExitCode::SUCCESS)
}
