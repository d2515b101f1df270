//! How much is held: reservations, eviction, the disk's own bound.

use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use super::table::{Inner, Known};
use super::{Full, Store};
use crate::digest::Digest;
use crate::telemetry::METRICS;

/// The budget where none is given, unless half of what is free and held together is less.
pub(super) const DEFAULT: u64 = 50 << 30;
/// The part of the budget that may be added before it is known what is held.
const EARLY: u64 = 16;
/// Blobs entered or removed under one lock by what nobody waits for.
pub(super) const BATCH: usize = 64;
/// The time that others have for the lock between two batches.
const BETWEEN: Duration = Duration::from_millis(1);

/// What an eviction took away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Freed {
    pub blobs: u64,
    pub bytes: u64,
    /// What is held afterwards.
    pub held: u64,
}

impl Store {
    /// In bytes.
    pub fn budget(&self) -> u64 {
        self.budget.load(Ordering::Relaxed)
    }

    /// Holds no more than that from now on (blocking).
    pub fn set_budget(&self, bytes: u64) {
        let known = {
            let inner = self.lock();
            self.fit.store(false, Ordering::Relaxed);
            self.budget.store(bytes, Ordering::Relaxed);
            inner.known
        };
        if known == Known::All {
            self.evict(|inner| inner.stored > self.room(inner), None);
        }
    }

    /// What the budget has for blobs beside what is reserved.
    pub(super) fn room(&self, inner: &Inner) -> u64 {
        self.budget().saturating_sub(inner.reserved)
    }

    /// Where no budget was given: half of what the disk has for larder.
    pub(super) fn fit_disk(&self) {
        let Ok(disk) = rustix::fs::statvfs(&self.cache) else {
            return;
        };
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        let inner = self.lock();
        if self.fit.load(Ordering::Relaxed) {
            let half = free.saturating_add(inner.stored) / 2;
            let budget = DEFAULT.min(half);
            self.budget.store(budget, Ordering::Relaxed);
        }
    }

    /// Evicts what was not used for `unused_for`, then least recently used first until no more
    /// than `max_size` bytes are held (blocking, until all that is held is known).
    pub fn gc(&self, max_size: Option<u64>, unused_for: Option<Duration>) -> Freed {
        self.settle();
        self.evict(
            |inner| max_size.is_some_and(|max| inner.stored > max),
            unused_for,
        )
    }

    /// The same while there is `too_much`. Others come between.
    pub(super) fn evict(
        &self,
        too_much: impl Fn(&Inner) -> bool,
        unused_for: Option<Duration>,
    ) -> Freed {
        let mut freed = Freed::default();
        while self.evict_some(&mut freed, &too_much, unused_for) {
            std::thread::sleep(BETWEEN);
        }
        freed
    }

    /// Evicts no more than is soon done; whether there is more to do.
    fn evict_some(
        &self,
        freed: &mut Freed,
        too_much: impl Fn(&Inner) -> bool,
        unused_for: Option<Duration>,
    ) -> bool {
        let mut inner = self.lock();
        let now = SystemTime::now();
        for _ in 0..BATCH {
            let oldest = inner.order.first_key_value().map(|(_, digest)| *digest);
            let too_old = |digest: &Digest| {
                let used = inner.blobs.get(digest).map(|blob| blob.used);
                // A use in the future, by a clock that was set back, is one just now.
                let unused = used.map(|used| now.duration_since(used).unwrap_or_default());
                unused_for.is_some_and(|age| unused.is_some_and(|unused| unused >= age))
            };
            freed.held = inner.stored;
            let Some(digest) = oldest.filter(|oldest| too_old(oldest) || too_much(&inner)) else {
                return false;
            };
            freed.blobs += 1;
            freed.bytes += self.remove(&mut inner, digest);
            freed.held = inner.stored;
            METRICS.evictions.inc();
        }
        true
    }

    pub(super) fn reserve(&self, bytes: u64) -> Result<(), Full> {
        let mut inner = self.lock();
        // What an upstream announces may be any number.
        let wanted = inner.reserved.checked_add(bytes).ok_or(Full::NoRoom)?;
        let budget = self.budget();
        if wanted > budget {
            return Err(Full::NoRoom);
        }
        if inner.known < Known::All {
            if inner.early.saturating_add(wanted) > budget / EARLY {
                return Err(Full::NoRoom);
            }
            // The scan ends with room for it.
            inner.reserved = wanted;
            return Ok(());
        }
        while inner.stored > budget - wanted {
            let Some((_, digest)) = inner.order.first_key_value() else {
                return Err(Full::NoRoom);
            };
            let digest = *digest;
            self.remove(&mut inner, digest);
            METRICS.evictions.inc();
        }
        inner.reserved = wanted;
        Ok(())
    }

    /// Makes room on the disk for `bytes`, least recently used first. Returns whether there should
    /// be enough; if evicting all could not do it, nothing is evicted.
    pub(super) fn make_room(&self, bytes: u64) -> bool {
        let free = || {
            let disk = rustix::fs::statvfs(&self.tmp).ok()?;
            Some(disk.f_bavail.saturating_mul(disk.f_frsize))
        };
        let mut inner = self.lock();
        let Some(free) = free() else {
            return false;
        };
        if inner.known < Known::All || free.saturating_add(inner.stored) < bytes {
            return free >= bytes;
        }
        let mut freed = 0;
        while free.saturating_add(freed) < bytes
            && let Some((_, digest)) = inner.order.first_key_value()
        {
            let digest = *digest;
            freed += self.remove(&mut inner, digest);
            METRICS.evictions.inc();
        }
        // Another fill may have made the room.
        free.saturating_add(freed) >= bytes
    }

    pub(super) fn release(&self, bytes: u64) {
        self.lock().reserved -= bytes;
    }
}
