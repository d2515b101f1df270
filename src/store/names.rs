//! Names of blobs: entries of the index, read from disk when they are first asked for.

use std::fs;
use std::io;
use std::sync::Arc;

use super::index::{Bucket, BucketName, Entry, Record, content_path};
use super::table::{Inner, Known};
use super::{Store, h1};
use crate::digest::Digest;

/// So often an entry is read again that changed while it was read.
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

    /// What the first name of a blob says: it speaks for the bytes.
    pub(super) fn first_name(&self, digest: Digest) -> Option<Arc<Entry>> {
        let first = {
            let inner = self.lock();
            let blob = inner.blobs.get(&digest)?;
            *blob.names.first()?
        };
        self.look_up(first, |entry: &Entry| entry.digest == digest)
    }

    fn entry(&self, key: &str) -> Option<Arc<Entry>> {
        self.look_up(BucketName::of(key), |entry: &Entry| entry.key == key)
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
            let bucket = Bucket::read(&name.path(&self.cache)).ok()?;
            let entry = Arc::new(bucket.entries.into_iter().find(&wanted)?);
            let mut inner = self.lock();
            if inner.changes != changes {
                continue;
            }
            if !self.holds(&mut inner, &entry) {
                return None;
            }
            inner.note_name(name, &entry);
            inner.hot.insert(name, entry.clone());
            return Some(entry);
        }
        None
    }

    /// Whether the entry's blob is held. As long as not all are known, the disk is asked.
    fn holds(&self, inner: &mut Inner, entry: &Entry) -> bool {
        if inner.blobs.contains_key(&entry.digest) {
            return true;
        }
        self.discover(inner, entry.digest) == Some(entry.size)
    }

    /// Looks for a blob that is not known of yet; its size.
    pub(super) fn discover(&self, inner: &mut Inner, digest: Digest) -> Option<u64> {
        if inner.known >= Known::Contents {
            return None;
        }
        let file = fs::metadata(content_path(&self.cache, &digest)).ok()?;
        let used = file.accessed().or_else(|_| file.modified()).ok()?;
        inner.insert_blob(digest, file.len(), used).found = true;
        Some(file.len())
    }

    /// Lets a further key name a held blob.
    pub fn name(&self, key: &str, digest: Digest, record: &Arc<Record>) -> io::Result<()> {
        let before = self.entry(key);
        let mut inner = self.lock();
        let Some(blob) = inner.blobs.get(&digest) else {
            return Ok(());
        };
        let entry = Entry {
            key: key.to_owned(),
            digest,
            size: blob.size,
            record: h1::with_h1(record, blob.h1.as_deref()),
        };
        self.write(&mut inner, entry)?;
        let Some(before) = before.filter(|before| before.digest != digest) else {
            return Ok(());
        };
        let name = BucketName::of(key);
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
        self.write(&mut inner, own)
    }

    /// Writes an entry, under the lock.
    fn write(&self, inner: &mut Inner, entry: Entry) -> io::Result<()> {
        let opts = cacache::WriteOpts::new()
            .integrity(entry.digest.to_integrity())
            .size(entry.size as usize)
            .metadata(serde_json::to_value(&*entry.record)?);
        cacache::index::insert(&self.cache, &entry.key, opts)
            .map_err(|e| io::Error::other(e.to_string()))?;
        let name = BucketName::of(&entry.key);
        inner.changes += 1;
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
