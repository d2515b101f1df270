//! Data dirs as larder leaves them behind after years, made in a minute.

use std::fs;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use cacache::{Algorithm, Integrity, WriteOpts};
use serde_json::{Value, json};

use crate::common::registry::noise;
use crate::common::{RELEASES, Release, Setup, Upstream, eventually, files_below, sha256};
use crate::machine::cores;

/// Of a blob, in bytes.
const BLOB: usize = 1 << 10;

/// Blobs and entries that are written before a signal is heard.
const STEP: usize = 20_000;

/// The path on the releases site of the `n`th archive that the index names.
pub fn archive_path(n: usize) -> String {
    let product = product(n);
    format!("/{product}/1.0.{n}/{product}_1.0.{n}_linux_amd64.zip")
}

fn product(n: usize) -> String {
    format!("terraform-provider-bench{n}")
}

fn archive_url(n: usize) -> String {
    format!("https://{RELEASES}{}", archive_path(n))
}

/// Fills `data_dir` with so many index entries, which name so many blobs in turn, and with a ledger of the first
/// `ledger` of them.
pub async fn archives(data_dir: &Path, entries: usize, blobs: usize, ledger: usize) {
    let cache = data_dir.join("cache");
    let digests = in_steps(blobs, &|n| blob(&cache, n)).await;
    in_steps(entries, &|n| entry(&cache, n, &digests[n % blobs])).await;

    let mut seen = BufWriter::new(fs::File::create(data_dir.join("seen")).unwrap());
    for n in 0..ledger.min(entries) {
        writeln!(seen, "{} {}", digests[n % blobs], archive_url(n)).unwrap();
    }
    let seen = seen.into_inner().unwrap();
    // What is to be measured afterwards is not the disk that still writes this.
    rustix::fs::syncfs(&seen).unwrap();
}

/// What `make` gives for each number below `n`, in that order, on all cores.
async fn in_steps<T: Send>(n: usize, make: &(impl Fn(usize) -> T + Sync)) -> Vec<T> {
    let mut made = Vec::with_capacity(n);
    for from in (0..n).step_by(STEP) {
        let to = (from + STEP).min(n);
        let part = (to - from).div_ceil(cores());
        std::thread::scope(|scope| {
            let parts = (from..to).step_by(part);
            let work = |at: usize| (at..(at + part).min(to)).map(make).collect::<Vec<_>>();
            let threads: Vec<_> = parts.map(|at| scope.spawn(move || work(at))).collect();
            for thread in threads {
                made.extend(thread.join().unwrap());
            }
        });
        tokio::task::yield_now().await;
    }
    made
}

/// Returns its digest.
fn blob(cache: &Path, n: usize) -> String {
    let bytes = noise(BLOB, &n.to_string());
    let digest = sha256(&bytes);
    let (first, second) = (&digest[..2], &digest[2..4]);
    let folder = cache.join("content-v2/sha256").join(first).join(second);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(&digest[4..]), bytes).unwrap();
    digest
}

/// With what larder keeps beside a provider's archive.
fn entry(cache: &Path, n: usize, digest: &str) {
    let (product, version) = (product(n), format!("1.0.{n}"));
    let sums = format!("https://{RELEASES}/{product}/{version}/{product}_{version}_SHA256SUMS");
    let metadata = json!({
        "headers": [
            ["content-type", "application/zip"],
            ["etag", format!("\"{}\"", &digest[..32])],
            ["last-modified", "Wed, 12 Mar 2025 17:04:05 GMT"],
        ],
        "sources": [format!("SHA256SUMS {sums}")],
        "verified": 1_741_800_000,
        "subjects": [{
            "names": ["registry.terraform.io", "hashicorp", format!("bench{n}")],
            "version": version,
            "platform": "linux_amd64",
        }],
        "h1": "h1:Zm9yIGEgYmVuY2gsIG5vdGhpbmcgbW9yZSB0aGFuIGl0cz0=",
    });
    let integrity = Integrity::from_hex(digest, Algorithm::Sha256).unwrap();
    let opts = WriteOpts::new().integrity(integrity).size(BLOB);
    cacache::index::insert(cache, &archive_url(n), opts.metadata(metadata)).unwrap();
}

/// In the place of each copy's own name in the document that all are copies of; as long as theirs.
const NAME: &str = "bench-000000";

/// Fills `data_dir` with so many kept documents: copies, under other names, of one that larder itself kept.
pub async fn documents(data_dir: &Path, n: usize) {
    let (line, body) = kept_document().await;
    let folder = data_dir.join("metadata");
    fs::create_dir_all(&folder).unwrap();
    for i in 0..n {
        let name = format!("bench-{i:06}");
        let body = body.replace(NAME, &name);
        let mut line: Value = serde_json::from_str(&line.replace(NAME, &name)).unwrap();
        line["sha256"] = sha256(body.as_bytes()).into();
        let file = folder.join(sha256(line["key"].as_str().unwrap().as_bytes()));
        fs::write(file, format!("{line}\n{body}")).unwrap();
    }
    rustix::fs::syncfs(fs::File::open(folder).unwrap()).unwrap();
}

/// A provider's download document: what larder wrote of it, and its body.
async fn kept_document() -> (String, String) {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", NAME, "1.0.0");
    release.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    larder.client().get(&release.document_url()).await;
    let folder = larder.setup.data_dir().join("metadata");
    let mut kept = None;
    eventually("the document is kept", || {
        let mut texts = files_below(&folder).into_iter().filter_map(read);
        kept = texts.find(|(line, _)| line.contains("/download/"));
        kept.is_some()
    })
    .await;
    kept.unwrap()
}

fn read(file: PathBuf) -> Option<(String, String)> {
    let text = fs::read_to_string(file).ok()?;
    let (line, body) = text.split_once('\n')?;
    Some((line.to_owned(), body.to_owned()))
}
