//! Bytes on their way into a staged file, gathered: the more at once, the less often a task waits for a
//! thread and the other way round. The memory is larder's own and used again, so that what hyper receives
//! into is free for it at once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use bytes::Bytes;

use crate::sync::lock;

/// Bytes of one batch, at the most. Two are in memory for each fill, one received, one written; and the
/// one before where there is room.
const BATCH: usize = 2 << 20;
/// Of all fills, before their batches get smaller
const ALL: usize = 8 << 20;
const SMALL: usize = 128 << 10;
/// The pieces of memory that batches are made of, which a client is sent one at a time
const SLAB: usize = 256 << 10;
/// Where a batch would be no more than a few of them
const SMALL_SLAB: usize = 64 << 10;
/// Slabs that are kept though nobody uses them: three batches of one fill. Small ones are not kept.
const SPARE: usize = 3 * BATCH / SLAB;

static FILLS: AtomicUsize = AtomicUsize::new(0);
static UNUSED: Unused = Unused(Mutex::new(Vec::new()));

/// What one fill has received and not yet begun to write.
pub struct Batch {
    full: Vec<Bytes>,
    open: Slab,
    len: usize,
}

impl Batch {
    /// Of a fill that begins to receive.
    pub fn new() -> Self {
        FILLS.fetch_add(1, Ordering::Relaxed);
        Self {
            full: Vec::new(),
            open: Slab::default(),
            len: 0,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether it has its share of the memory that is for all fills.
    pub fn is_full(&self) -> bool {
        self.len >= share()
    }

    /// Copies `bytes` behind what there is.
    pub fn push(&mut self, mut bytes: &[u8]) {
        self.len += bytes.len();
        while !bytes.is_empty() {
            if self.open.0.capacity() == 0 {
                self.open = match share() {
                    few if few < 4 * SLAB => Slab(Vec::with_capacity(SMALL_SLAB)),
                    _ => Slab(UNUSED.take()),
                };
            }
            let room = self.open.0.capacity() - self.open.0.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.open.0.extend_from_slice(now);
            bytes = later;
            if now.len() == room {
                self.close();
            }
        }
    }

    /// What was received, in pieces that take at most twice the memory they need.
    pub fn take(&mut self) -> Vec<Bytes> {
        if self.open.0.len() >= self.open.0.capacity() / 2 {
            self.close();
        } else if !self.open.0.is_empty() {
            self.full.push(Bytes::copy_from_slice(&self.open.0));
            self.open.0.clear();
        }
        self.len = 0;
        std::mem::take(&mut self.full)
    }

    fn close(&mut self) {
        let slab = std::mem::take(&mut self.open);
        if !slab.0.is_empty() {
            self.full.push(Bytes::from_owner(slab));
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        FILLS.fetch_sub(1, Ordering::Relaxed);
    }
}

fn share() -> usize {
    (ALL / FILLS.load(Ordering::Relaxed).max(1)).clamp(SMALL, BATCH)
}

/// Memory that others use after it.
#[derive(Default)]
struct Slab(Vec<u8>);

impl AsRef<[u8]> for Slab {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        UNUSED.keep(std::mem::take(&mut self.0));
    }
}

/// Memory of slabs for the next.
struct Unused(Mutex<Vec<Vec<u8>>>);

impl Unused {
    fn take(&self) -> Vec<u8> {
        let kept = self.lock().pop();
        kept.unwrap_or_else(|| Vec::with_capacity(SLAB))
    }

    /// Keeps `memory`, if there is room for it.
    fn keep(&self, mut memory: Vec<u8>) {
        let mut kept = self.lock();
        if memory.capacity() == SLAB && kept.len() < SPARE {
            memory.clear();
            kept.push(memory);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        lock(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_taken_is_what_was_pushed_in_little_more_memory_than_it_needs(
            steps in prop::collection::vec((0usize..400_000, any::<bool>()), 0..12),
        ) {
            let (mut batch, mut pushed, mut taken) = (Batch::new(), Vec::new(), Vec::new());
            let mut check = |batch: &mut Batch, pushed: &[u8]| {
                let open = (batch.open.0.len(), batch.open.0.capacity());
                let pieces = batch.take();
                prop_assert!(batch.is_empty() && batch.open.0.is_empty());
                // Of what is not half full, the bytes go and the memory stays.
                let stays = open.1 > 0 && open.0 < open.1 / 2;
                prop_assert_eq!(batch.open.0.capacity(), if stays { open.1 } else { 0 });
                prop_assert!(pieces.iter().all(|piece| !piece.is_empty() && piece.len() <= SLAB));
                pieces.iter().for_each(|piece| taken.extend_from_slice(piece));
                prop_assert_eq!(&taken[..], pushed);
                Ok(())
            };
            for (n, (len, takes)) in steps.into_iter().enumerate() {
                let bytes: Vec<_> = (0..len).map(|i| (i * 31 + n) as u8).collect();
                batch.push(&bytes);
                pushed.extend_from_slice(&bytes);
                if takes {
                    check(&mut batch, &pushed)?;
                }
            }
            check(&mut batch, &pushed)?;
        }
    }

    #[test]
    fn a_batch_has_a_bound() {
        let mut batch = Batch::new();
        while !batch.is_full() {
            batch.push(&[1; 50_000]);
        }
        assert!((SMALL..BATCH + 50_000).contains(&batch.len));
    }

    #[test]
    fn memory_is_used_again_and_only_so_much_is_kept() {
        let unused = Unused(Mutex::default());
        let mut first = unused.take();
        first.push(1);
        let at = first.as_ptr();
        unused.keep(first);
        let again = unused.take();
        assert_eq!(
            (again.as_ptr(), again.len(), again.capacity()),
            (at, 0, SLAB)
        );
        unused.keep(Vec::with_capacity(SMALL_SLAB));
        assert_eq!(unused.lock().len(), 0);
        for _ in 0..SPARE + 5 {
            unused.keep(Vec::with_capacity(SLAB));
        }
        assert_eq!(unused.lock().len(), SPARE);
        // What followers have read goes back to all.
        drop(Bytes::from_owner(Slab(Vec::with_capacity(SLAB))));
        assert!(!UNUSED.lock().is_empty());
    }
}
