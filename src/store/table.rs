//! What the store holds, in memory: blobs, the order of their last use, and the index entries that
//! were used lately. All other entries stay on disk.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use moka::sync::Cache;

use super::index::{BucketName, Entry};
use crate::digest::Digest;
use crate::telemetry::METRICS;

/// A use is written to disk no more often than this.
const TOUCH: Duration = Duration::from_secs(60);
/// Index entries in memory, in bytes.
const HOT: u64 = 32 << 20;
/// The turns before this one are for what the scan finds: it was used before everything else.
const FIRST_TURN: u64 = 1 << 40;

pub(super) struct Inner {
    pub blobs: HashMap<Digest, Blob>,
    /// Least recently used first.
    pub order: BTreeMap<u64, Digest>,
    pub clock: u64,
    pub stored: u64,
    pub reserved: u64,
    /// Entries as they are on disk; of each, its key must be compared
    pub hot: Cache<BucketName, Arc<Entry>>,
    /// Goes up with each change of an entry
    pub changes: u64,
    pub known: Known,
    /// Whether there may be more, where it could not be looked
    pub partial: bool,
    /// Bytes committed before all was known
    pub early: u64,
    /// Blobs removed before all contents were known
    pub gone: HashSet<Digest>,
}

/// How far the scan has come.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Known {
    /// What was asked for
    Asked,
    /// Every blob
    Contents,
    /// Every blob and all its names
    All,
}

pub(super) struct Blob {
    pub size: u64,
    /// The index files that name it, the first of which speaks for its bytes
    pub names: Vec<BucketName>,
    /// Whether a name says that it is a provider's
    pub provider: bool,
    pub turn: u64,
    pub used: SystemTime,
    /// When the use was last written to disk.
    pub touched: SystemTime,
    /// The file as it was when its digest was last found right.
    pub checked: Option<Stamp>,
    /// The hash of what it unpacks to, once that is known
    pub h1: Option<Box<str>>,
    /// Whether it was there at the start
    pub found: bool,
}

/// What changes when somebody else writes to a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stamp {
    pub inode: u64,
    pub size: u64,
    pub modified: (i64, i64),
}

impl Inner {
    pub fn new() -> Self {
        Self {
            blobs: HashMap::new(),
            order: BTreeMap::new(),
            clock: FIRST_TURN,
            stored: 0,
            reserved: 0,
            hot: Cache::builder()
                .weigher(|_, entry: &Arc<Entry>| entry.weight())
                .max_capacity(HOT)
                .build(),
            changes: 0,
            known: Known::Asked,
            partial: false,
            early: 0,
            gone: HashSet::new(),
        }
    }

    /// A blob that is used now; what is known of one of that digest stays known.
    pub fn insert_blob(&mut self, digest: Digest, size: u64, used: SystemTime) -> &mut Blob {
        let turn = self.next_turn();
        self.gone.remove(&digest);
        self.place(digest, size, used, turn)
    }

    /// A blob that the scan found, as the `turn`th of all that it found by age.
    pub fn find_blob(&mut self, digest: Digest, size: u64, used: SystemTime, turn: u64) {
        if !self.blobs.contains_key(&digest) && !self.gone.contains(&digest) {
            self.place(digest, size, used, turn.min(FIRST_TURN)).found = true;
        }
    }

    fn place(&mut self, digest: Digest, size: u64, used: SystemTime, turn: u64) -> &mut Blob {
        let blob = self.blobs.entry(digest).or_insert_with(|| Blob {
            size: 0,
            names: Vec::new(),
            provider: false,
            turn,
            used,
            touched: used,
            checked: None,
            h1: None,
            found: false,
        });
        self.order.remove(&blob.turn);
        self.order.insert(turn, digest);
        self.stored = self.stored - blob.size + size;
        METRICS.stored_bytes.set(self.stored as i64);
        blob.size = size;
        blob.turn = turn;
        blob
    }

    /// Takes note that the entry names a blob which is held.
    pub fn note_name(&mut self, name: BucketName, entry: &Entry) {
        let Some(blob) = self.blobs.get_mut(&entry.digest) else {
            return;
        };
        if !blob.names.contains(&name) {
            blob.names.push(name);
        }
        let mut subjects = entry.record.subjects.iter();
        blob.provider |= entry.key.contains("/terraform-provider-")
            || subjects.any(|subject| subject.names.len() == 3);
        if blob.h1.is_none() {
            blob.h1 = entry.record.h1.as_deref().map(Box::from);
        }
    }

    pub fn use_blob(&mut self, digest: Digest) -> Option<&Blob> {
        let turn = self.next_turn();
        let blob = self.blobs.get_mut(&digest)?;
        self.order.remove(&blob.turn);
        self.order.insert(turn, digest);
        blob.turn = turn;
        blob.used = SystemTime::now();
        Some(blob)
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
        self.changes += 1;
        for name in &blob.names {
            self.hot.invalidate(name);
        }
        if self.known < Known::Contents {
            self.gone.insert(digest);
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
