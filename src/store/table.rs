//! What the store holds, in memory: blobs, their names, and the order of their last use.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::index::{self, Entry, Record, content_path};
use crate::digest::Digest;
use crate::telemetry::METRICS;

/// A use is written to disk no more often than this.
const TOUCH: Duration = Duration::from_secs(60);

#[derive(Default)]
pub(super) struct Inner {
    pub blobs: HashMap<Digest, Blob>,
    pub keys: HashMap<String, (Digest, Arc<Record>)>,
    /// Least recently used first.
    pub order: BTreeMap<u64, Digest>,
    pub clock: u64,
    pub stored: u64,
    pub reserved: u64,
}

pub(super) struct Blob {
    pub size: u64,
    pub record: Arc<Record>,
    pub keys: Vec<String>,
    pub turn: u64,
    pub used: SystemTime,
    /// When the use was last written to disk.
    pub touched: SystemTime,
    /// The file as it was when its digest was last found right.
    pub checked: Option<Stamp>,
    /// The hash of what it unpacks to, once that is known
    pub h1: Option<String>,
}

/// What changes when somebody else writes to a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stamp {
    pub inode: u64,
    pub size: u64,
    pub modified: (i64, i64),
}

impl Inner {
    pub fn insert_blob(
        &mut self,
        digest: Digest,
        size: u64,
        record: Arc<Record>,
        used: SystemTime,
    ) {
        let turn = self.next_turn();
        if let Some(blob) = self.blobs.get_mut(&digest) {
            self.order.remove(&blob.turn);
            self.stored = self.stored - blob.size + size;
            blob.size = size;
            blob.turn = turn;
        } else {
            self.stored += size;
            let blob = Blob {
                size,
                record,
                keys: Vec::new(),
                turn,
                used,
                touched: used,
                checked: None,
                h1: None,
            };
            self.blobs.insert(digest, blob);
        }
        self.order.insert(turn, digest);
        METRICS.stored_bytes.set(self.stored as i64);
    }

    pub fn use_blob(&mut self, digest: Digest) -> Option<(u64, Arc<Record>, Option<Stamp>)> {
        let turn = self.next_turn();
        let blob = self.blobs.get_mut(&digest)?;
        self.order.remove(&blob.turn);
        self.order.insert(turn, digest);
        blob.turn = turn;
        blob.used = SystemTime::now();
        Some((blob.size, blob.record.clone(), blob.checked))
    }

    /// Writes the use to the file's access time, which a next start reads.
    pub fn touch(&mut self, digest: Digest, file: &File) {
        let Some(blob) = self.blobs.get_mut(&digest) else {
            return;
        };
        let now = blob.used;
        if now
            .duration_since(blob.touched)
            .is_ok_and(|age| age < TOUCH)
        {
            return;
        }
        blob.touched = now;
        // A disk that cannot be written loses no more than the order of eviction.
        let _ = file.set_times(fs::FileTimes::new().set_accessed(now));
    }

    pub fn forget(&mut self, digest: Digest) -> Option<Blob> {
        let blob = self.blobs.remove(&digest)?;
        self.order.remove(&blob.turn);
        self.stored -= blob.size;
        for key in &blob.keys {
            self.keys.remove(key);
        }
        METRICS.stored_bytes.set(self.stored as i64);
        Some(blob)
    }

    pub fn next_turn(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
}

impl Stamp {
    pub fn of(file: &File) -> io::Result<Self> {
        let m = file.metadata()?;
        Ok(Self {
            inode: m.ino(),
            size: m.size(),
            modified: (m.mtime(), m.mtime_nsec()),
        })
    }
}

/// Index and content as they are on disk, the least recently used first.
///
/// What a crash left is mended if `mend` says so, and else passed over.
pub(super) fn load(cache: &Path, mend: bool) -> Inner {
    let mut entries: HashMap<Digest, Vec<Entry>> = HashMap::new();
    let mut index_is_whole = true;
    for bucket in index::buckets(cache) {
        match bucket {
            Ok(bucket) => {
                if bucket.torn > 0 && mend {
                    tracing::warn!(path = %bucket.path.display(), "index lines were torn; dropped them");
                    let _ = bucket.mend();
                }
                for entry in bucket.entries {
                    entries.entry(entry.digest).or_default().push(entry);
                }
            }
            Err((path, e)) => {
                index_is_whole = false;
                tracing::warn!(path = %path.display(), error = %e, "an index file cannot be read");
            }
        }
    }
    let mut blobs = Vec::new();
    for (path, digest) in index::contents(cache) {
        if let (Some(digest), Ok(m)) = (digest, fs::metadata(&path)) {
            let used = m.accessed().or_else(|_| m.modified());
            blobs.push((used.unwrap_or(SystemTime::UNIX_EPOCH), digest, m.len()));
        }
    }
    blobs.sort_unstable();
    let mut inner = Inner::default();
    for (used, digest, size) in blobs {
        let named = entries.remove(&digest).unwrap_or_default();
        if !mend && named.first().is_none_or(|entry| entry.size != size) {
            continue;
        }
        if named.is_empty() && index_is_whole {
            // A crash came between its name and its entry: its headers are lost, so it is fetched
            // anew when it is next asked for.
            tracing::warn!(%digest, "a blob has no index entry; dropped it");
            let _ = fs::remove_file(content_path(cache, &digest));
            continue;
        }
        let record = named.first().map(|e| e.record.clone()).unwrap_or_default();
        inner.insert_blob(digest, size, record, used);
        for entry in named {
            if let Some(blob) = inner.blobs.get_mut(&digest) {
                blob.keys.push(entry.key.clone());
                blob.h1 = blob.h1.take().or_else(|| entry.record.h1.clone());
            }
            inner.keys.insert(entry.key, (digest, entry.record));
        }
    }
    // What is left names content that is gone.
    for entry in entries.into_values().flatten().filter(|_| mend) {
        tracing::warn!(key = %entry.key, "an index entry's content is gone; dropped it");
        let _ = cacache::index::delete(cache, &entry.key);
    }
    inner
}
