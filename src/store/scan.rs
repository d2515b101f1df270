//! Looking through the store after a start, while it serves: first every blob, then every name.
//!
//! Until then what is asked for is looked up on disk, so that nothing held is missed. What is not
//! known meanwhile is how much there is and what was used last: nothing is evicted, and no more is
//! added than a part of the budget.

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use super::Store;
use super::budget::BATCH;
use super::index::{self, Bucket, BucketName, MENDING, content_path};
use super::table::Known;
use crate::digest::Digest;

/// How long a start waits for it: a store of the usual size is known by then.
const PATIENCE: Duration = Duration::from_millis(100);
/// A folder that could not be read may be readable later: too many files may be open.
const TRIES: usize = 3;
const PAUSE: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 2000 });

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
}

/// Starts the thread that looks through the store and then does what `afterwards` says, and gives it
/// the time that a small store takes.
pub(super) fn start(store: &Arc<Store>, afterwards: impl FnOnce(Weak<Store>) + Send + 'static) {
    let weak = Arc::downgrade(store);
    let thread = std::thread::Builder::new().name("store".into());
    let started = thread.spawn(move || {
        if guarded_scan(&weak).is_some() {
            afterwards(weak);
        }
    });
    match started {
        Ok(_) if store.wait_for_scan(PATIENCE) => {}
        Ok(_) => tracing::info!("the store is large; serving while it is looked through"),
        Err(error) => {
            tracing::warn!(%error, "no thread to look through the store; looking first");
            let _ = guarded_scan(&Arc::downgrade(store));
        }
    }
}

/// Nobody waits for ever for a scan that broke off.
fn guarded_scan(store: &Weak<Store>) -> Option<()> {
    catch_unwind(AssertUnwindSafe(|| scan(store))).unwrap_or_else(|_| {
        tracing::error!(
            "looking through the store broke off; what was not found yet is fetched anew"
        );
        let this = store.upgrade()?;
        this.lock().partial = true;
        this.finish(false);
        Some(())
    })
}

/// None when the store was closed meanwhile.
pub(super) fn scan(store: &Weak<Store>) -> Option<()> {
    let started = Instant::now();
    let cache = store.upgrade()?.cache.clone();
    let contents = scan_contents(store, &cache)?;
    let names = scan_names(store, &cache, contents)?;
    let this = store.upgrade()?;
    if contents && names {
        this.drop_nameless();
    }
    if contents {
        this.fit_disk();
    }
    this.finish(contents);
    let (blobs, bytes) = {
        let inner = this.lock();
        (inner.blobs.len(), inner.stored)
    };
    let took_ms = started.elapsed().as_millis() as u64;
    match contents && names {
        true => tracing::info!(blobs, bytes, took_ms, "all that is held is known"),
        false => {
            tracing::error!(blobs, bytes, took_ms, path = %cache.display(), "parts of the store cannot be read: the budget does not count what lies there; run `larder verify`")
        }
    }
    Some(())
}

/// Whether every folder could be read.
fn scan_contents(store: &Weak<Store>, cache: &Path) -> Option<bool> {
    let mut found: Vec<(SystemTime, Digest, u64)> = Vec::new();
    let whole = in_tries(store, |failed| {
        found.clear();
        for path in index::content_paths(cache) {
            let looked = path.and_then(|path| match fs::metadata(&path) {
                Ok(m) => Ok((m, path)),
                Err(e) => Err((path, e)),
            });
            match looked {
                Ok((m, path)) => {
                    let used = m.accessed().or_else(|_| m.modified());
                    let used = used.unwrap_or(SystemTime::UNIX_EPOCH);
                    found.extend(index::digest_at(&path).map(|digest| (used, digest, m.len())));
                }
                Err(e) => failed(e),
            }
        }
        Some(())
    })?;
    found.sort_unstable();
    for (i, batch) in found.chunks(BATCH).enumerate() {
        let this = store.upgrade()?;
        let mut inner = this.lock();
        for (j, (used, digest, size)) in batch.iter().enumerate() {
            inner.find_blob(*digest, *size, *used, (i * BATCH + j) as u64);
        }
    }
    let this = store.upgrade()?;
    let mut inner = this.lock();
    inner.known = Known::Contents;
    inner.partial = !whole;
    Some(whole)
}

/// Whether every index file could be read. Without all contents, nothing is taken for gone.
fn scan_names(store: &Weak<Store>, cache: &Path, contents: bool) -> Option<bool> {
    in_tries(store, |failed| {
        for path in index::bucket_paths(cache) {
            let this = store.upgrade()?;
            let taken = path.and_then(|path| this.take_in(&path, contents).map_err(|e| (path, e)));
            if let Err(e) = taken {
                failed(e);
            }
        }
        Some(())
    })
}

/// What could not be read, and why.
type Failure = (PathBuf, io::Error);

/// Does it again where something could not be read; whether it was done in the end.
fn in_tries(
    store: &Weak<Store>,
    mut work: impl FnMut(&mut dyn FnMut(Failure)) -> Option<()>,
) -> Option<bool> {
    for tried in 1..=TRIES {
        let mut first: Option<Failure> = None;
        work(&mut |failure| {
            // What is gone by now was evicted.
            if failure.1.kind() != io::ErrorKind::NotFound {
                first.get_or_insert(failure);
            }
        })?;
        let Some((path, error)) = first else {
            return Some(true);
        };
        tracing::warn!(path = %path.display(), %error, tried, "a part of the store cannot be read");
        if tried < TRIES {
            store.upgrade()?;
            std::thread::sleep(PAUSE);
        }
    }
    Some(false)
}

impl Store {
    /// Notes whom an index file names, mends it if it is torn, and drops what names nothing.
    fn take_in(&self, path: &Path, contents: bool) -> io::Result<()> {
        let Some(name) = BucketName::at(path) else {
            if path.extension().is_some_and(|ending| ending == MENDING) {
                // A crash came before it got its name.
                let _ = fs::remove_file(path);
            }
            return Ok(());
        };
        let changes = self.changes();
        let bucket = Bucket::read(path)?;
        let mut inner = self.lock();
        let held = |digest| inner.blobs.contains_key(digest);
        let right = bucket.entries.iter().all(|entry| held(&entry.digest));
        if bucket.torn == 0 && right && inner.changes == changes {
            for entry in &bucket.entries {
                inner.note_name(name, entry);
            }
            return Ok(());
        }
        // Under the lock it does not change.
        let bucket = Bucket::read(path)?;
        if bucket.torn > 0 {
            tracing::warn!(path = %path.display(), "index lines were torn; dropped them");
            let _ = bucket.mend();
        }
        for entry in &bucket.entries {
            if inner.blobs.contains_key(&entry.digest) {
                inner.note_name(name, entry);
            } else if contents {
                if !inner.gone.contains(&entry.digest) {
                    tracing::warn!(key = %entry.key, "an index entry's content is gone; dropped it");
                }
                self.unname(&name, entry.digest);
            }
        }
        Ok(())
    }

    /// A crash came between their name and their entry: their headers are lost, so they are fetched
    /// anew when they are next asked for.
    fn drop_nameless(&self) {
        let nameless: Vec<Digest> = {
            let inner = self.lock();
            let blobs = inner.blobs.iter();
            let nameless = blobs.filter(|(_, blob)| blob.found && blob.names.is_empty());
            nameless.map(|(digest, _)| *digest).collect()
        };
        for batch in nameless.chunks(BATCH) {
            let mut inner = self.lock();
            for digest in batch {
                let blob = inner.blobs.get(digest);
                if blob.is_some_and(|blob| blob.found && blob.names.is_empty()) {
                    tracing::warn!(%digest, "a blob has no index entry; dropped it");
                    inner.forget(*digest);
                    let _ = fs::remove_file(content_path(&self.cache, digest));
                }
            }
        }
    }

    /// The budget holds from here on. What is known in parts tells nothing of what to evict.
    fn finish(&self, whole: bool) {
        loop {
            if whole {
                self.evict(|inner| inner.stored > self.room(inner), None);
            }
            let mut inner = self.lock();
            // Others may have reserved meanwhile.
            if !whole || inner.stored <= self.room(&inner) || inner.order.is_empty() {
                inner.known = Known::All;
                inner.gone = Default::default();
                break;
            }
        }
        self.scanned.notify_all();
    }
}
