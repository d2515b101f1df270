//! Looking through the store after a start, while it serves: first every blob, then every name.
//!
//! Until then what is asked for is looked up on disk, so that nothing held is missed. What is not
//! known meanwhile is how much there is and what was used last: nothing is evicted, and no more is
//! added than a part of the budget.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use super::Store;
use super::index::{self, Bucket, BucketName, content_path};
use super::table::Known;
use crate::digest::Digest;

/// Blobs entered under one lock.
const BATCH: usize = 512;
/// How long a start waits for it: a store of the usual size is known by then.
const PATIENCE: Duration = Duration::from_millis(250);

impl Store {
    /// Waits until all blobs and names are known (blocking), no longer than `patience`; whether
    /// they are.
    pub(super) fn wait_for_scan(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut inner = self.lock();
        while inner.known < Known::All {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.scanned.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(|e| e.into_inner()).0;
        }
        true
    }

    /// Waits until all blobs and names are known (blocking). For a store that is written to.
    pub fn settle(&self) {
        while !self.read_only && !self.wait_for_scan(Duration::from_secs(1)) {}
    }

    fn advance(&self, known: Known) {
        let mut inner = self.lock();
        inner.known = known;
        inner.gone = Default::default();
        drop(inner);
        self.scanned.notify_all();
    }
}

/// Starts the thread that looks through the store and then does what `afterwards` says, and gives it
/// the time that a small store takes.
pub(super) fn start(store: &Arc<Store>, afterwards: impl FnOnce(Weak<Store>) + Send + 'static) {
    let weak = Arc::downgrade(store);
    let thread = std::thread::Builder::new().name("store".into());
    let started = thread.spawn(move || {
        if scan(&weak).is_some() {
            afterwards(weak);
        }
    });
    match started {
        Ok(_) if store.wait_for_scan(PATIENCE) => {}
        Ok(_) => tracing::info!("the store is large; serving while it is looked through"),
        Err(error) => {
            tracing::warn!(%error, "no thread to look through the store; looking first");
            let _ = scan(&Arc::downgrade(store));
        }
    }
}

/// None when the store was closed meanwhile.
pub(super) fn scan(store: &Weak<Store>) -> Option<()> {
    let started = Instant::now();
    let cache = store.upgrade()?.cache.clone();
    scan_contents(store, &cache)?;
    let whole = scan_names(store, &cache)?;
    let this = store.upgrade()?;
    if whole {
        this.drop_nameless();
    }
    this.fit_disk();
    let (blobs, bytes) = {
        let mut inner = this.lock();
        this.evict(&mut inner, Some(this.budget()), None);
        (inner.blobs.len(), inner.stored)
    };
    this.advance(Known::All);
    let took = started.elapsed().as_millis() as u64;
    tracing::info!(blobs, bytes, took_ms = took, "all that is held is known");
    Some(())
}

fn scan_contents(store: &Weak<Store>, cache: &Path) -> Option<()> {
    let mut found: Vec<(SystemTime, Digest, u64)> = Vec::new();
    for (path, digest) in index::contents(cache) {
        if let (Some(digest), Ok(m)) = (digest, fs::metadata(&path)) {
            let used = m.accessed().or_else(|_| m.modified());
            found.push((used.unwrap_or(SystemTime::UNIX_EPOCH), digest, m.len()));
        }
    }
    found.sort_unstable();
    for (i, batch) in found.chunks(BATCH).enumerate() {
        let this = store.upgrade()?;
        let mut inner = this.lock();
        for (j, (used, digest, size)) in batch.iter().enumerate() {
            inner.find_blob(*digest, *size, *used, (i * BATCH + j) as u64);
        }
    }
    store.upgrade()?.advance(Known::Contents);
    Some(())
}

/// Whether every index file could be read.
fn scan_names(store: &Weak<Store>, cache: &Path) -> Option<bool> {
    let mut whole = true;
    for bucket in index::buckets(cache) {
        let this = store.upgrade()?;
        match bucket {
            Ok(bucket) => this.take_in(&bucket),
            // An eviction came between.
            Err((_, e)) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err((path, e)) => {
                whole = false;
                tracing::warn!(path = %path.display(), error = %e, "an index file cannot be read");
            }
        }
    }
    Some(whole)
}

impl Store {
    /// Notes whom an index file names, mends it if it is torn, and drops what names nothing.
    fn take_in(&self, bucket: &Bucket) {
        let Some(name) = BucketName::at(&bucket.path) else {
            return;
        };
        let mut inner = self.lock();
        let held = |digest| inner.blobs.contains_key(digest);
        let right = bucket.entries.iter().all(|entry| held(&entry.digest));
        if bucket.torn == 0 && right {
            for entry in &bucket.entries {
                inner.note_name(name, entry);
            }
            return;
        }
        // It may have changed since it was read: under the lock it does not.
        let Ok(bucket) = Bucket::read(&bucket.path) else {
            return;
        };
        if bucket.torn > 0 {
            tracing::warn!(path = %bucket.path.display(), "index lines were torn; dropped them");
            let _ = bucket.mend();
        }
        for entry in &bucket.entries {
            if inner.blobs.contains_key(&entry.digest) {
                inner.note_name(name, entry);
            } else {
                tracing::warn!(key = %entry.key, "an index entry's content is gone; dropped it");
                self.unname(&name, entry.digest);
            }
        }
    }

    /// A crash came between their name and their entry: their headers are lost, so they are fetched
    /// anew when they are next asked for.
    fn drop_nameless(&self) {
        let mut inner = self.lock();
        let nameless: Vec<Digest> = inner
            .blobs
            .iter()
            .filter(|(_, blob)| blob.found && blob.names.is_empty())
            .map(|(digest, _)| *digest)
            .collect();
        for digest in nameless {
            tracing::warn!(%digest, "a blob has no index entry; dropped it");
            inner.forget(digest);
            let _ = fs::remove_file(content_path(&self.cache, &digest));
        }
    }
}
