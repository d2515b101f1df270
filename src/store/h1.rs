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

/// Makes the way to a thread that is started by [`work`].
pub(super) fn queue() -> (Queue, Receiver<Digest>) {
    sync_channel(WAITING)
}

/// Starts the thread: first what is held without a hash, then what comes.
pub(super) fn work(store: &Arc<Store>, queue: Receiver<Digest>) {
    let due = store.lock().without_h1();
    let store = Arc::downgrade(store);
    let worker = std::thread::Builder::new().name("h1".into());
    let started = worker.spawn(move || {
        let all = due.into_iter().chain(queue);
        for digest in all {
            if compute(&store, digest).is_none() {
                return;
            }
        }
    });
    if let Err(error) = started {
        tracing::warn!(%error, "no thread for h1 hashes; the mirror will give zh alone");
    }
}

/// None when the store is closed.
fn compute(store: &Weak<Store>, digest: Digest) -> Option<()> {
    let path = content_path(&store.upgrade()?.cache, &digest);
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
        inner.blobs.get(&digest)?.h1.clone()
    }

    /// Has the hash of a new blob computed, if it is a provider's.
    pub(super) fn want_h1(&self, digest: Digest) {
        let due = self.lock().is_without_h1(&digest);
        if let (true, Some(queue)) = (due, &self.h1s) {
            let _ = queue.try_send(digest);
        }
    }

    fn keep_h1(&self, digest: Digest, hash: String) {
        let first = {
            let mut inner = self.lock();
            let Some(blob) = inner.blobs.get_mut(&digest) else {
                return;
            };
            blob.h1 = Some(hash);
            blob.keys.first().cloned()
        };
        let record = first.as_ref().and_then(|key| self.record(key));
        if let (Some(key), Some(record)) = (first, record)
            && let Err(error) = self.name(&key, digest, &record)
        {
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
        blob.is_some_and(|blob| {
            let provider = |key: &String| key.contains("/terraform-provider-");
            let subjects = blob.record.subjects.iter();
            let mut known = subjects.map(|subject| subject.names.len() == 3);
            blob.h1.is_none() && (blob.keys.iter().any(provider) || known.any(|is| is))
        })
    }
}

/// The record as it is written: with the hash that the blob has.
pub(super) fn with_h1(record: &Arc<Record>, h1: Option<&String>) -> Arc<Record> {
    match (h1, &record.h1) {
        (Some(h1), None) => Arc::new(Record {
            h1: Some(h1.clone()),
            ..Record::clone(record)
        }),
        _ => record.clone(),
    }
}
