//! The `h1:` hashes of held providers: computed by one thread in the background, kept with the blob.

use std::fs::File;
use std::io::BufReader;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Weak};

use super::index::{Record, content_path};
use super::{Inner, Store};
use crate::digest::Digest;
use crate::terraform::dirhash;

/// Blobs that may wait. What finds no place is looked at after the next start.
const WAITING: usize = 1024;
const BUFFER: usize = 256 << 10;

/// The way to the thread.
pub(super) type Queue = SyncSender<Digest>;

/// What waits for it.
pub(super) type Waiting = Receiver<Digest>;

/// Makes the way to [`work`].
pub(super) fn queue() -> (Queue, Waiting) {
    sync_channel(WAITING)
}

/// Computes what is missing: first of what is held without a hash, then of what comes.
pub(super) fn work(store: &Weak<Store>, queue: Waiting) {
    let due = store.upgrade().map(|store| store.lock().without_h1());
    for digest in due.into_iter().flatten().chain(queue) {
        if compute(store, digest).is_none() {
            return;
        }
    }
}

/// None when the store is closed.
fn compute(store: &Weak<Store>, digest: Digest) -> Option<()> {
    let this = store.upgrade()?;
    if !this.lock().is_without_h1(&digest) {
        return Some(());
    }
    let path = content_path(&this.cache, &digest);
    drop(this);
    // It may have been evicted since.
    let Ok(file) = File::open(path) else {
        return Some(());
    };
    let reading = || dirhash::h1(BufReader::with_capacity(BUFFER, file));
    // Whatever a strange zip does to its reader, the next one is read.
    let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(reading));
    let found = found.unwrap_or_else(|_| Err("cannot be read".into()));
    match found {
        Ok(hash) => store.upgrade()?.keep_h1(digest, hash),
        // It may have been the disk: after the next start it is tried again.
        Err(why) => tracing::debug!(%digest, why, "a held archive has no h1 hash"),
    }
    Some(())
}

impl Store {
    /// `h1:…` of a held archive, where it is known by now.
    pub fn h1(&self, digest: Digest) -> Option<String> {
        let inner = self.lock();
        inner.blobs.get(&digest)?.h1.as_deref().map(str::to_owned)
    }

    /// Has the hash of a new blob computed, if it is a provider's.
    pub(super) fn want_h1(&self, digest: Digest) {
        let due = self.lock().is_without_h1(&digest);
        if let (true, Some(queue)) = (due, &self.h1s) {
            let _ = queue.try_send(digest);
        }
    }

    fn keep_h1(&self, digest: Digest, hash: String) {
        match self.lock().blobs.get_mut(&digest) {
            Some(blob) => blob.h1 = Some(hash.into()),
            None => return,
        }
        if let Err(error) = self.rename_first(digest) {
            tracing::debug!(%digest, %error, "an h1 hash cannot be kept");
        }
    }
}

impl Inner {
    fn without_h1(&self) -> Vec<Digest> {
        // The most recently used are asked for first.
        let all = self.order.values().rev();
        all.filter(|digest| self.is_without_h1(digest))
            .copied()
            .collect()
    }

    fn is_without_h1(&self, digest: &Digest) -> bool {
        let blob = self.blobs.get(digest);
        blob.is_some_and(|blob| blob.provider && blob.h1.is_none())
    }
}

/// The record as it is written: with the hash that the blob has.
pub(super) fn with_h1(record: &Arc<Record>, h1: Option<&str>) -> Arc<Record> {
    match (h1, &record.h1) {
        (Some(h1), None) => Arc::new(Record {
            h1: Some(h1.to_owned()),
            ..Record::clone(record)
        }),
        _ => record.clone(),
    }
}
