//! Names of blobs: entries of the index, read from disk when they are first asked for.

use std::fs;
use std::io;
use std::sync::Arc;

use super::index::{Bucket, BucketName, Entry, Record, content_path};
use super::table::{Inner, Known};
use super::{Store, h1};
use crate::digest::Digest;

/// So often an entry that changed while it was read is read again without the lock.
const AGAIN: usize = 3;

impl Store {
    /// The digest under which the bytes of `key` are held.
    pub fn find(&self, key: &str) -> Option<Digest> {
        self.entry(key).map(|entry| entry.digest)
    }

    /// What is kept of the archive of `key` beside its bytes.
    pub fn record(&self, key: &str) -> Option<Arc<Record>> {
        self.entry(key).map(|entry| entry.record.clone())
    }

    /// A number that is another one whenever an entry may have changed.
    pub fn changes(&self) -> u64 {
        self.lock().changes
    }

    pub(super) fn entry(&self, key: &str) -> Option<Arc<Entry>> {
        self.look_up(BucketName::of(key), |entry: &Entry| entry.key == key)
    }

    /// What a name of a blob says; with several, that of the first one speaks for the bytes.
    pub(super) fn first_name(&self, digest: Digest) -> Option<Arc<Entry>> {
        let names = self.lock().blobs.get(&digest)?.names.clone();
        let wanted = |entry: &Entry| entry.digest == digest;
        names
            .into_iter()
            .find_map(|name| self.look_up(name, wanted))
    }

    /// The wanted entry of an index file, if what it names is held. Who asks for the first time
    /// waits for the disk.
    fn look_up(&self, name: BucketName, wanted: impl Fn(&Entry) -> bool) -> Option<Arc<Entry>> {
        for _ in 0..AGAIN {
            let changes = {
                let mut inner = self.lock();
                if let Some(hot) = inner.hot.get(&name).filter(|hot| wanted(hot)) {
                    return self.holds(&mut inner, &hot).then_some(hot);
                }
                inner.changes
            };
            let bucket = patiently(|| Bucket::read(&name.path(&self.cache)));
            let mut inner = self.lock();
            if inner.changes == changes {
                return self.take_up(&mut inner, name, bucket, &wanted);
            }
        }
        let mut inner = self.lock();
        self.look_up_locked(&mut inner, name, &wanted)
    }

    /// The same where nothing may change meanwhile.
    fn look_up_locked(
        &self,
        inner: &mut Inner,
        name: BucketName,
        wanted: &impl Fn(&Entry) -> bool,
    ) -> Option<Arc<Entry>> {
        if let Some(hot) = inner.hot.get(&name).filter(|hot| wanted(hot)) {
            return self.holds(inner, &hot).then_some(hot);
        }
        let bucket = Bucket::read(&name.path(&self.cache));
        self.take_up(inner, name, bucket, wanted)
    }

    fn take_up(
        &self,
        inner: &mut Inner,
        name: BucketName,
        bucket: io::Result<Bucket>,
        wanted: &impl Fn(&Entry) -> bool,
    ) -> Option<Arc<Entry>> {
        let entry = Arc::new(bucket.ok()?.entries.into_iter().find(wanted)?);
        if !self.holds(inner, &entry) {
            return None;
        }
        inner.note_name(name, &entry);
        inner.hot.insert(name, entry.clone());
        Some(entry)
    }

    /// Whether the entry's blob is held. As long as not all are known, the disk is asked.
    fn holds(&self, inner: &mut Inner, entry: &Entry) -> bool {
        inner.blobs.contains_key(&entry.digest)
            || self.discover(inner, entry.digest, Some(entry.size))
    }

    /// Looks for a blob that is not known of yet, of that size if one is named.
    pub(super) fn discover(&self, inner: &mut Inner, digest: Digest, size: Option<u64>) -> bool {
        if inner.known >= Known::Contents && !inner.partial {
            return false;
        }
        let Ok(file) = fs::metadata(content_path(&self.cache, &digest)) else {
            return false;
        };
        let used = file.accessed().or_else(|_| file.modified());
        if size.is_some_and(|size| size != file.len()) {
            return false;
        }
        let used = used.unwrap_or(std::time::SystemTime::UNIX_EPOCH);
        inner.insert_blob(digest, file.len(), used).found = true;
        true
    }

    /// Lets a further key name a held blob (blocking).
    pub fn name(&self, key: &str, digest: Digest, record: &Arc<Record>) -> io::Result<()> {
        self.name_locked(&mut self.lock(), key, digest, record)
    }

    /// The same where the key names nothing that is held yet.
    pub fn name_new(&self, key: &str, digest: Digest, record: &Arc<Record>) -> io::Result<()> {
        let mut inner = self.lock();
        let wanted = |entry: &Entry| entry.key == key;
        match self.look_up_locked(&mut inner, BucketName::of(key), &wanted) {
            Some(_) => Ok(()),
            None => self.name_locked(&mut inner, key, digest, record),
        }
    }

    fn name_locked(
        &self,
        inner: &mut Inner,
        key: &str,
        digest: Digest,
        record: &Arc<Record>,
    ) -> io::Result<()> {
        let name = BucketName::of(key);
        let before = self.look_up_locked(inner, name, &|entry: &Entry| entry.key == key);
        let Some(blob) = inner.blobs.get(&digest) else {
            return Ok(());
        };
        let entry = Entry {
            key: key.to_owned(),
            digest,
            size: blob.size,
            record: h1::with_h1(record, blob.h1.as_deref()),
        };
        self.write(inner, entry)?;
        let Some(before) = before.filter(|before| before.digest != digest) else {
            return Ok(());
        };
        let Some(old) = inner.blobs.get_mut(&before.digest) else {
            return Ok(());
        };
        old.names.retain(|one| *one != name);
        if !old.names.is_empty() {
            return Ok(());
        }
        // Without any name it would be gone at the next start.
        let own = Entry {
            key: format!("sha256:{}", before.digest),
            ..Entry::clone(&before)
        };
        self.write(inner, own)
    }

    /// Writes what is known of a blob by now to its first name (blocking).
    pub(super) fn rename_first(&self, digest: Digest) -> io::Result<()> {
        let Some(first) = self.first_name(digest) else {
            return Ok(());
        };
        let mut inner = self.lock();
        let wanted = |entry: &Entry| entry.key == first.key;
        let now = self.look_up_locked(&mut inner, BucketName::of(&first.key), &wanted);
        match now.filter(|now| now.digest == digest) {
            Some(now) => self.name_locked(&mut inner, &now.key, digest, &now.record),
            None => Ok(()),
        }
    }

    /// Writes an entry, under the lock.
    fn write(&self, inner: &mut Inner, entry: Entry) -> io::Result<()> {
        let opts = cacache::WriteOpts::new()
            .integrity(entry.digest.to_integrity())
            .size(entry.size as usize)
            .metadata(serde_json::to_value(&*entry.record)?);
        // Also where it fails, something may have been written.
        inner.changes += 1;
        let name = BucketName::of(&entry.key);
        inner.hot.invalidate(&name);
        cacache::index::insert(&self.cache, &entry.key, opts)
            .map_err(|e| io::Error::other(e.to_string()))?;
        inner.note_name(name, &entry);
        inner.hot.insert(name, Arc::new(entry));
        Ok(())
    }

    /// Takes what an index file says of a blob off the disk, under the lock; with nothing else in it,
    /// the file.
    pub(super) fn unname(&self, name: &BucketName, digest: Digest) {
        let path = name.path(&self.cache);
        let Ok(bucket) = Bucket::read(&path) else {
            return;
        };
        let (ours, others): (Vec<_>, Vec<_>) = bucket
            .entries
            .iter()
            .partition(|entry| entry.digest == digest);
        if others.is_empty() && fs::remove_file(&path).is_ok() {
            return;
        }
        for entry in ours {
            if let Err(error) = cacache::index::delete(&self.cache, &entry.key) {
                tracing::warn!(%error, "an index entry cannot be deleted");
            }
        }
    }
}

/// Does what may wait for the disk, letting others go on where this thread serves several.
fn patiently<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}
