//! `larder explain`

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use url::Url;

use crate::cache::Cache;
use crate::cache::explain::Explanation;
use crate::config::{CommonArgs, Config, ServeArgs, pattern};
use crate::error::Exit;
use crate::store::list;
use crate::terraform::lock;

#[derive(clap::Args)]
pub struct Args {
    /// A URL, a provider (hashicorp/aws@5.0.0), a product (terraform@1.9.0), or a .terraform.lock.hcl
    #[arg(value_name = "URL|ADDRESS")]
    what: String,
    /// Platform of a provider or product [default: this machine's]
    #[arg(long, value_name = "OS_ARCH")]
    platform: Option<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// The rules and keys that the server was started with
    #[command(flatten)]
    serve: ServeArgs,
}

pub fn main(common: &CommonArgs, args: &Args) -> Result<ExitCode, Exit> {
    let config = Config::settle(common, &args.serve)?;
    let platform = args.platform.clone().unwrap_or_else(this_platform);
    let runtime = super::runtime()?;
    let explained = runtime.block_on(async {
        let cache = super::peek(&config)?;
        let mut all = Vec::new();
        for (url, expected) in wanted(&args.what, &platform, &config, &cache)? {
            let mut explanation = cache.explain(&url).await;
            if let Some(hashes) = expected {
                against_lock(&mut explanation, &hashes);
            }
            all.push(explanation);
        }
        Ok::<_, Exit>(all)
    })?;
    if args.json {
        let value = serde_json::to_value(&explained).unwrap_or_default();
        super::print(&format!("{value:#}\n"))?;
    } else {
        for explanation in &explained {
            super::print(&text(explanation))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The URLs that are asked about, and for a lock file the hashes that it lists.
type Wanted = Vec<(Url, Option<Vec<String>>)>;

fn wanted(what: &str, platform: &str, config: &Config, cache: &Arc<Cache>) -> Result<Wanted, Exit> {
    if what.contains("://") {
        let url = Url::parse(what).map_err(|e| Exit::usage(format!("{what}: {e}")))?;
        return Ok(vec![(url, None)]);
    }
    if std::path::Path::new(what).is_file() {
        let bad = |e: String| Exit::failed(format!("{what}: {e}"));
        let text = std::fs::read_to_string(what).map_err(|e| bad(e.to_string()))?;
        let locked = lock::parse(&text).map_err(bad)?;
        let all = locked.into_iter().map(|locked| {
            let names: Vec<&str> = locked.provider.split('/').collect();
            let url = archive_of(&names, &locked.version, platform, config, cache)?;
            let hashes = locked.digests().map(|digest| digest.to_string()).collect();
            Ok((url, Some(hashes)))
        });
        return all.collect();
    }
    let usage = || {
        Exit::usage(format!(
            "{what}: neither a URL, a file, nor an address; write one such as hashicorp/aws@5.0.0 or terraform@1.9.0"
        ))
    };
    let (address, version) = what.split_once('@').ok_or_else(usage)?;
    pattern::version_of(version).ok_or_else(usage)?;
    let parts: Vec<&str> = address.split('/').collect();
    let names = match parts[..] {
        [product] if !product.is_empty() => vec!["releases.hashicorp.com", product],
        [namespace, name] => vec!["registry.terraform.io", namespace, name],
        [_, _, _] => parts,
        _ => return Err(usage()),
    };
    Ok(vec![(
        archive_of(&names, version, platform, config, cache)?,
        None,
    )])
}

/// Where the archive lies: as its document says, as it is on record, or (for a product) by rule.
fn archive_of(
    names: &[&str],
    version: &str,
    platform: &str,
    config: &Config,
    cache: &Arc<Cache>,
) -> Result<Url, Exit> {
    let (os, arch) = platform.split_once('_').ok_or_else(|| {
        Exit::usage(format!(
            "--platform: {platform}: write one such as linux_amd64"
        ))
    })?;
    if let [host, product] = names {
        let url = format!("https://{host}/{product}/{version}/{product}_{version}_{platform}.zip");
        return url
            .parse()
            .map_err(|e| Exit::usage(format!("{product}: {e}")));
    }
    let address = names.join("/").to_lowercase();
    let [host, namespace, name] = names else {
        return Err(Exit::usage(format!("{address}: not HOST/NAMESPACE/TYPE")));
    };
    let ending = format!("/{namespace}/{name}/{version}/download/{os}/{arch}").to_lowercase();
    let catalogue = cache.metadata.catalogue();
    if let Some(url) = catalogue.archive_of(&format!("https://{host}/"), &ending) {
        return Ok(url);
    }
    let held = list(&config.data_dir);
    let on_record = held.iter().find(|listed| {
        listed.record.subjects.iter().any(|subject| {
            subject.address() == address
                && subject.version.as_deref() == Some(version)
                && subject.platform.as_deref() == Some(platform)
        })
    });
    let url = on_record.and_then(|listed| listed.keys.iter().find_map(|key| key.parse().ok()));
    url.ok_or_else(|| {
        Exit::failed(format!(
            "{address} {version} for {platform}: a miss: neither its registry document nor its archive is held"
        ))
    })
}

fn against_lock(explanation: &mut Explanation, hashes: &[String]) {
    let Some(digest) = &explanation.sha256 else {
        return;
    };
    let listed = hashes.contains(digest);
    explanation.sources.push(match listed {
        true => "the lock file".into(),
        false => "but not the lock file: `terraform init` would refuse it".into(),
    });
}

fn text(explanation: &Explanation) -> String {
    let Explanation {
        url, outcome, why, ..
    } = explanation;
    let mut text = format!("{url}\n  {outcome}: {why}\n");
    let mut line = |name: &str, value: &str| text.push_str(&format!("  {name}: {value}\n"));
    for of in &explanation.of {
        line("of", of);
    }
    if let Some(size) = explanation.size {
        line("size", &super::human(size));
    }
    if let Some(digest) = &explanation.sha256 {
        line("sha256", digest);
    }
    for source in &explanation.sources {
        line("named by", source);
    }
    if let Some(signature) = &explanation.signature {
        line("signature", &signature.to_string());
    }
    if let Some(verified) = explanation.verified {
        let when = SystemTime::UNIX_EPOCH + Duration::from_secs(verified);
        line("verified", &super::date(when));
    }
    text
}

/// As Terraform names it.
fn this_platform() -> String {
    let os = match std::env::consts::OS {
        "macos" => "darwin",
        os => os,
    };
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        arch => arch,
    };
    format!("{os}_{arch}")
}
