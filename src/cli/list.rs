//! `larder list`

use std::process::ExitCode;
use std::time::SystemTime;

use serde_json::json;

use crate::config::{CommonArgs, Config, ServeArgs};
use crate::error::Exit;
use crate::store::{Listed, list};

#[derive(clap::Args)]
pub struct Args {
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub fn main(common: &CommonArgs, args: &Args) -> Result<ExitCode, Exit> {
    let config = Config::settle(common, &ServeArgs::default())?;
    let held = list(&config.data_dir);
    if args.json {
        let all: Vec<_> = held.iter().map(to_json).collect();
        super::print(&format!("{:#}\n", serde_json::Value::from(all)))?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows: Vec<[String; 6]> = held.iter().map(row).collect();
    let mut widths = [0; 6];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in rows {
        let cells = row.iter().zip(widths);
        let line: String = cells.map(|(cell, w)| format!("{cell:<w$}  ")).collect();
        super::print(&format!("{}\n", line.trim_end()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Name, version, platform, size, how it was verified, when it was last used.
fn row(listed: &Listed) -> [String; 6] {
    let subject = listed.record.subjects.first();
    let nameless = || listed.keys.first().cloned().unwrap_or_default();
    let part = |part: Option<&String>| part.cloned().unwrap_or_else(|| "-".into());
    let verified = match &listed.record.signature {
        Some(judgement) => format!("checksum, {}", judgement.tier),
        None => "checksum".into(),
    };
    [
        subject.map_or_else(nameless, |subject| subject.address()),
        part(subject.and_then(|subject| subject.version.as_ref())),
        part(subject.and_then(|subject| subject.platform.as_ref())),
        super::human(listed.size),
        verified,
        super::date(listed.used),
    ]
}

fn to_json(listed: &Listed) -> serde_json::Value {
    let record = &listed.record;
    let subject = record.subjects.first();
    let verified = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(record.verified);
    json!({
        "address": subject.map(|subject| subject.address()),
        "version": subject.and_then(|subject| subject.version.clone()),
        "platform": subject.and_then(|subject| subject.platform.clone()),
        "sha256": listed.digest.to_string(),
        "size": listed.size,
        "urls": listed.keys,
        "verified": {
            "sources": record.sources,
            "signature": record.signature,
            "tier": record.signature.as_ref().map(|judgement| judgement.tier),
            "key": record.signature.as_ref().and_then(|judgement| judgement.key.clone()),
            "when": super::date(verified),
        },
        "last_used": super::date(listed.used),
    })
}
