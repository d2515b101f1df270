//! `larder verify`: every byte and every entry, read only.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::hash_file;
use super::index::{Bucket, buckets, content_path, content_paths, digest_at};
use crate::digest::Digest;

/// Something wrong in the store.
#[derive(Debug)]
pub struct Bad {
    pub path: PathBuf,
    pub what: String,
    /// The blob that is not what its name says, if it is a blob.
    pub blob: Option<Digest>,
}

impl fmt::Display for Bad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.what)
    }
}

/// Hashes every blob of `data_dir` and checks every line of the index (blocking).
///
/// A server may commit and evict meanwhile: what looks bad is judged once more before it is told.
pub fn check_all(data_dir: &Path) -> io::Result<Vec<Bad>> {
    let cache = data_dir.join("cache");
    if !cache.exists() {
        return Ok(Vec::new());
    }
    fs::read_dir(&cache)?;
    let mut sizes = HashMap::new();
    let mut suspects = Vec::new();
    let mut unreadable = Vec::new();
    for path in content_paths(&cache) {
        let path = match path {
            Ok(path) => path,
            Err((_, e)) if e.kind() == io::ErrorKind::NotFound => continue,
            Err((path, e)) => {
                unreadable.push(Bad {
                    path,
                    what: format!("cannot be read: {e}"),
                    blob: None,
                });
                continue;
            }
        };
        let digest = digest_at(&path);
        match check_content(&path, digest) {
            Ok(size) => {
                sizes.insert(digest, size);
            }
            Err(_) => suspects.push((path, digest)),
        }
    }
    let known = |digest: &Digest| sizes.get(&Some(*digest)).copied();
    let torn: Vec<PathBuf> = buckets(&cache)
        .filter_map(|bucket| match bucket {
            Ok(bucket) => (!check_bucket(&bucket, &cache, known).is_empty()).then_some(bucket.path),
            Err((path, _)) => Some(path),
        })
        .collect();
    if suspects.is_empty() && torn.is_empty() {
        return Ok(unreadable);
    }
    std::thread::sleep(SETTLE);
    let mut bad = unreadable;
    for (path, digest) in suspects {
        match check_content(&path, digest) {
            Err(what) if path.exists() => bad.push(Bad {
                path,
                what,
                blob: digest,
            }),
            // Evicted meanwhile, or right after all.
            _ => {}
        }
    }
    let anew = |digest: &Digest| check_content(&content_path(&cache, digest), Some(*digest)).ok();
    for path in torn {
        match Bucket::read(&path) {
            Ok(bucket) => bad.extend(check_bucket(&bucket, &cache, anew)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => bad.push(Bad {
                what: format!("index file cannot be read: {e}"),
                path,
                blob: None,
            }),
        }
    }
    Ok(bad)
}

/// For a commit or an eviction that was under way.
const SETTLE: Duration = Duration::from_millis(300);

/// What is wrong with an index file, where `size` tells the size of each good blob.
fn check_bucket(bucket: &Bucket, cache: &Path, size: impl Fn(&Digest) -> Option<u64>) -> Vec<Bad> {
    let mut bad = Vec::new();
    let mut say = |what| {
        bad.push(Bad {
            path: bucket.path.clone(),
            what,
            blob: None,
        });
    };
    if bucket.torn > 0 {
        say(format!("{} torn index lines", bucket.torn));
    }
    for entry in &bucket.entries {
        match size(&entry.digest) {
            Some(size) if size == entry.size => {}
            Some(size) => say(format!(
                "index entry for {} says {} bytes, the blob has {size}",
                entry.key, entry.size
            )),
            None if content_path(cache, &entry.digest).exists() => say(format!(
                "index entry for {} names a bad blob {}",
                entry.key, entry.digest
            )),
            None => say(format!(
                "index entry for {} names a blob that is gone: {}",
                entry.key, entry.digest
            )),
        }
    }
    bad
}

fn check_content(path: &Path, digest: Option<Digest>) -> Result<u64, String> {
    let digest = digest.ok_or("is not named by a SHA-256")?;
    let file = File::open(path).map_err(|e| format!("cannot be read: {e}"))?;
    let found = hash_file(&file).map_err(|e| format!("cannot be read: {e}"))?;
    if found != digest {
        return Err(format!("blob has SHA-256 {found}, not the one of its name"));
    }
    file.metadata().map(|m| m.len()).map_err(|e| e.to_string())
}
