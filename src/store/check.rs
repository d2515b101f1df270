//! `larder verify`: every byte and every entry, read only.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::hash_file;
use super::index::{buckets, content_path, contents};
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
pub fn check_all(data_dir: &Path) -> io::Result<Vec<Bad>> {
    let cache = data_dir.join("cache");
    if !cache.exists() {
        return Ok(Vec::new());
    }
    fs::read_dir(&cache)?;
    let mut bad = Vec::new();
    let mut sizes = HashMap::new();
    for (path, digest) in contents(&cache) {
        match check_content(&path, digest) {
            Ok(size) => {
                sizes.insert(digest, size);
            }
            Err(what) => bad.push(Bad {
                path,
                what,
                blob: digest,
            }),
        }
    }
    for bucket in buckets(&cache) {
        let bucket = match bucket {
            Ok(bucket) => bucket,
            Err((path, e)) => {
                bad.push(Bad {
                    path,
                    what: format!("index file cannot be read: {e}"),
                    blob: None,
                });
                continue;
            }
        };
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
            match sizes.get(&Some(entry.digest)) {
                Some(size) if *size == entry.size => {}
                Some(size) => say(format!(
                    "index entry for {} says {} bytes, the blob has {size}",
                    entry.key, entry.size
                )),
                None if content_path(&cache, &entry.digest).exists() => say(format!(
                    "index entry for {} names a bad blob {}",
                    entry.key, entry.digest
                )),
                None => say(format!(
                    "index entry for {} names a blob that is gone: {}",
                    entry.key, entry.digest
                )),
            }
        }
    }
    Ok(bad)
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
