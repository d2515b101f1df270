//! Blobs on disk in cacache's format: a content file a digest, an index entry a key.
//!
//! Only verified bytes get a final name. Reserved and stored bytes together stay within the
//! budget; what was used longest ago makes room.

mod budget;
mod check;
mod h1;
pub mod index;
mod ledger;
mod listing;
mod names;
mod scan;
mod staged;
mod table;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::SystemTime;

pub use budget::Freed;
pub use check::{Bad, check_all};
pub use index::Record;
pub use ledger::Ledger;
pub use listing::{Listed, list};
pub use staged::{Full, Staged, Verified};

use crate::digest::{Digest, Hasher};
use crate::error::Exit;
use crate::sync::lock;
use crate::telemetry::METRICS;
use index::content_path;
use table::{Inner, Known, Stamp};

/// The store of one data dir. One process at a time may have it open.
pub struct Store {
    cache: PathBuf,
    tmp: PathBuf,
    budget: AtomicU64,
    /// Whether the budget is to fit the disk
    fit: AtomicBool,
    /// Of one archive
    archive_limit: u64,
    temporary: AtomicU64,
    /// For commands that only look
    read_only: bool,
    /// What names once stood for, also where it was evicted
    pub ledger: Ledger,
    /// To whoever computes h1 hashes; none for commands that only look
    h1s: Option<h1::Queue>,
    /// Guards the maps and the names on disk that they mirror.
    inner: Mutex<Inner>,
    /// Told when more of the store is known
    scanned: Condvar,
}

/// A blob opened for reading. Evicting it does not disturb the reader.
#[derive(Clone, Debug)]
pub struct Held {
    pub digest: Digest,
    pub file: Arc<File>,
    pub size: u64,
    pub record: Arc<Record>,
    /// Whose record that is
    pub on_record: OnRecord,
    stamp: Stamp,
    /// Whether the bytes were already found right since the start and did not change since.
    pub checked: bool,
}

/// Which of a blob's names has said what is on record of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnRecord {
    /// The one that was asked for
    Own,
    /// Another one
    Another,
    /// None: its names are not known yet, or no more
    Nothing,
}

impl Store {
    /// Opens the store in `data_dir`, empties `tmp/`, and has it looked through: what a crash left is
    /// mended, what the budget no longer holds is evicted. A large store is open before that is done.
    pub fn open(
        data_dir: &Path,
        budget: Option<u64>,
        archive_limit: u64,
    ) -> Result<Arc<Self>, Exit> {
        let (this, waiting) = Self::unscanned(data_dir, budget, archive_limit)?;
        scan::start(&this, move |store| h1::work(&store, waiting));
        Ok(this)
    }

    fn unscanned(
        data_dir: &Path,
        budget: Option<u64>,
        archive_limit: u64,
    ) -> Result<(Arc<Self>, h1::Waiting), Exit> {
        let (cache, tmp) = (data_dir.join("cache"), data_dir.join("tmp"));
        let broken = |path: &Path, e: io::Error| {
            Exit::usage(format!(
                "data_dir: {}: {e}; mend it or name another folder with --data-dir",
                path.display()
            ))
        };
        fs::create_dir_all(&cache).map_err(|e| broken(&cache, e))?;
        empty(&tmp).map_err(|e| broken(&tmp, e))?;
        rustix::fs::statvfs(&cache).map_err(|e| broken(&cache, e.into()))?;
        let (queue, waiting) = h1::queue();
        let this = Arc::new(Self {
            cache,
            tmp,
            budget: AtomicU64::new(budget.unwrap_or(budget::DEFAULT)),
            fit: AtomicBool::new(budget.is_none()),
            archive_limit,
            temporary: AtomicU64::new(0),
            read_only: false,
            ledger: Ledger::open(data_dir).map_err(|e| broken(&data_dir.join("seen"), e))?,
            h1s: Some(queue),
            inner: Mutex::new(Inner::new()),
            scanned: Condvar::new(),
        });
        this.fit_disk();
        Ok((this, waiting))
    }

    /// The store as it is, for reading alone: nothing is mended, made or removed. Whoever has the
    /// data dir may change it meanwhile.
    pub fn peek(data_dir: &Path) -> Arc<Self> {
        let cache = data_dir.join("cache");
        Arc::new(Self {
            tmp: data_dir.join("tmp"),
            budget: AtomicU64::new(0),
            fit: AtomicBool::new(false),
            archive_limit: 0,
            temporary: AtomicU64::new(0),
            read_only: true,
            ledger: Ledger::peek(data_dir),
            h1s: None,
            inner: Mutex::new(Inner::new()),
            scanned: Condvar::new(),
            cache,
        })
    }

    /// Opens a blob, which counts as a use of it. A blob whose file is gone or has another size is
    /// forgotten. What its first name has on record speaks for it.
    pub fn open_blob(&self, digest: Digest) -> Option<Held> {
        self.open_as(digest, None)
    }

    /// The same as what `key` names, whose record speaks for it if the key does name it.
    pub fn open_named(&self, digest: Digest, key: &str) -> Option<Held> {
        self.open_as(digest, Some(key))
    }

    fn open_as(&self, digest: Digest, key: Option<&str>) -> Option<Held> {
        let mut inner = self.lock();
        if !inner.blobs.contains_key(&digest) && !self.discover(&mut inner, digest, None) {
            return None;
        }
        let blob = inner.use_blob(digest)?;
        let (size, checked) = (blob.size, blob.checked);
        let opened = File::open(content_path(&self.cache, &digest))
            .and_then(|file| Ok((Stamp::of(&file)?, file)));
        match opened {
            Ok((stamp, file)) if stamp.size == size => {
                if !self.read_only {
                    inner.touch(digest, &file);
                }
                drop(inner);
                let own = key.and_then(|key| self.entry(key));
                let own = own.filter(|own| own.digest == digest);
                let on_record = match own {
                    Some(_) => OnRecord::Own,
                    None => OnRecord::Another,
                };
                let entry = own.or_else(|| self.first_name(digest));
                if self.read_only && entry.as_ref().is_some_and(|entry| entry.size != size) {
                    return None;
                }
                Some(Held {
                    digest,
                    file: Arc::new(file),
                    size,
                    on_record: entry.as_ref().map_or(OnRecord::Nothing, |_| on_record),
                    record: entry.map(|entry| entry.record.clone()).unwrap_or_default(),
                    checked: checked == Some(stamp),
                    stamp,
                })
            }
            _ if self.read_only => None,
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::error!(%digest, error = %e, "a blob cannot be opened");
                None
            }
            _ => {
                tracing::error!(%digest, "a blob's file is gone or has another size; dropped it");
                METRICS.rotten_blobs.inc();
                self.remove(&mut inner, digest);
                None
            }
        }
    }

    /// Hashes an opened blob again (blocking). A rotten one is removed.
    pub fn recheck(&self, held: &Held) -> bool {
        let found = hash_file(&held.file);
        let mut inner = self.lock();
        let right = matches!(found, Ok(found) if found == held.digest);
        // What was hashed is this inode; another may have taken its name meanwhile.
        match inner.blobs.get_mut(&held.digest) {
            Some(blob) if right => blob.checked = Some(held.stamp),
            Some(_) if self.names(held) => {
                tracing::error!(digest = %held.digest, "a blob's bytes have rotted; removed it");
                METRICS.rotten_blobs.inc();
                self.remove(&mut inner, held.digest);
            }
            _ => {}
        }
        right
    }

    /// Gives verified bytes their name (blocking): sync, rename, sync the folder, then the index.
    pub fn commit(
        &self,
        mut verified: Verified,
        key: &str,
        record: &Arc<Record>,
    ) -> io::Result<()> {
        let digest = verified.digest();
        let size = verified.len();
        // Blocks beyond the end, where the length was not what was reserved.
        verified.file().set_len(size)?;
        verified.file().sync_all()?;
        let path = content_path(&self.cache, &digest);
        let folder = path.parent().unwrap_or(&self.cache);
        fs::create_dir_all(folder)?;
        let mut inner = self.lock();
        fs::rename(verified.path(), &path)?;
        inner.reserved -= verified.renamed();
        let stamp = Stamp::of(verified.file())?;
        let known = inner.blobs.contains_key(&digest) || inner.known < Known::All;
        let blob = inner.insert_blob(digest, size, SystemTime::now());
        blob.checked = Some(stamp);
        blob.used = SystemTime::now();
        blob.found = false;
        if inner.known < Known::All {
            inner.early += size;
        }
        drop(inner);
        let named = self
            .sync_folders(folder)
            .and_then(|()| self.name(key, digest, record));
        if named.is_err() && !known {
            // Without an entry its headers would be lost at the next start.
            let mut inner = self.lock();
            if inner
                .blobs
                .get(&digest)
                .is_some_and(|blob| blob.names.is_empty())
            {
                inner.forget(digest);
                let _ = fs::remove_file(&path);
            }
        }
        self.want_h1(digest);
        named
    }

    /// Makes a new name last: its folder, and those that may be new themselves.
    fn sync_folders(&self, folder: &Path) -> io::Result<()> {
        let mut folders = folder.ancestors().take(3);
        folders.try_for_each(|folder| File::open(folder)?.sync_all())
    }

    /// Removes a blob that is known to be bad (blocking, until all that is held is known).
    pub fn discard(&self, digest: Digest) {
        self.settle();
        let mut inner = self.lock();
        self.remove(&mut inner, digest);
    }

    fn next_temporary(&self) -> PathBuf {
        let number = self.temporary.fetch_add(1, Ordering::Relaxed);
        self.tmp.join(format!("fill-{number}"))
    }

    /// Takes a blob and all that names it off the disk, under the lock. Returns its size.
    fn remove(&self, inner: &mut Inner, digest: Digest) -> u64 {
        let Some(blob) = inner.forget(digest) else {
            return 0;
        };
        for name in &blob.names {
            self.unname(name, digest);
        }
        match fs::remove_file(content_path(&self.cache, &digest)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%digest, error = %e, "a blob cannot be removed");
            }
            _ => {}
        }
        blob.size
    }

    fn names(&self, held: &Held) -> bool {
        fs::metadata(content_path(&self.cache, &held.digest))
            .is_ok_and(|m| m.ino() == held.stamp.inode)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }
}

/// The digest of a whole file, read from its beginning whatever its position (blocking).
pub fn hash_file(file: &File) -> io::Result<Digest> {
    use std::os::unix::fs::FileExt as _;
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; 256 << 10];
    let mut at = 0;
    loop {
        match file.read_at(&mut buffer, at)? {
            0 => return Ok(hasher.finish()),
            n => {
                hasher.update(&buffer[..n]);
                at += n as u64;
            }
        }
    }
}

fn empty(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
