//! What is held, read from the disk as it is: nobody needs to have the data dir.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use super::index::{Record, buckets, content_path, contents};
use crate::digest::Digest;

/// A blob and everything that names it.
#[derive(Clone, Debug)]
pub struct Listed {
    pub digest: Digest,
    pub size: u64,
    /// The names of its bytes: URLs, without queries
    pub keys: Vec<String>,
    pub record: Arc<Record>,
    pub used: SystemTime,
}

/// All blobs of `data_dir` (blocking), the most recently used first. What cannot be read is left
/// out: `larder verify` tells of it.
pub fn list(data_dir: &Path) -> Vec<Listed> {
    let cache = data_dir.join("cache");
    let mut all: HashMap<Digest, Listed> = HashMap::new();
    for (path, digest) in contents(&cache) {
        if let (Some(digest), Ok(m)) = (digest, fs::metadata(&path))
            && path == content_path(&cache, &digest)
        {
            let used = m.accessed().or_else(|_| m.modified());
            let listed = Listed {
                digest,
                size: m.len(),
                keys: Vec::new(),
                record: Arc::default(),
                used: used.unwrap_or(SystemTime::UNIX_EPOCH),
            };
            all.insert(digest, listed);
        }
    }
    for entry in buckets(&cache).flatten().flat_map(|bucket| bucket.entries) {
        if let Some(listed) = all.get_mut(&entry.digest) {
            listed.keys.push(entry.key);
            // The fullest record speaks: a further name may have been given with less known.
            let fuller = |record: &Record| {
                let signed = record.signature.is_some();
                (signed, record.subjects.len(), record.sources.len())
            };
            if fuller(&entry.record) >= fuller(&listed.record) {
                listed.record = entry.record;
            }
        }
    }
    let mut all: Vec<Listed> = all.into_values().collect();
    all.iter_mut().for_each(|listed| listed.keys.sort());
    all.sort_by(|a, b| b.used.cmp(&a.used).then(a.digest.cmp(&b.digest)));
    all
}
