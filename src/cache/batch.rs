//! Bytes on their way into a staged file, gathered: the more at once, the less often a task waits for a
//! thread and the other way round. The memory is larder's own and used again, so that what hyper receives
//! into is free for it at once.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;

/// Bytes of one batch, at the most. Two are in memory for each fill, one received, one written; and the
/// one before where there is room.
const BATCH: usize = 2 << 20;
/// Of all fills, before their batches get smaller
const ALL: usize = 8 << 20;
const SMALL: usize = 128 << 10;
/// A piece of memory, and the least where there are many fills. A client gets as much at a time.
const SLAB: usize = 256 << 10;
const SMALL_SLAB: usize = 64 << 10;
/// Large slabs that are kept though nobody uses them: as many as one fill takes.
const SPARE: usize = 3 * BATCH / SLAB;

static FILLS: AtomicUsize = AtomicUsize::new(0);
static UNUSED: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

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
                self.open = Slab::take((share() / 8).clamp(SMALL_SLAB, SLAB));
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

impl Slab {
    fn take(size: usize) -> Self {
        let kept = || UNUSED.lock().unwrap_or_else(|e| e.into_inner()).pop();
        let memory = if size == SLAB { kept() } else { None };
        Self(memory.unwrap_or_else(|| Vec::with_capacity(size)))
    }
}

impl AsRef<[u8]> for Slab {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        if self.0.capacity() != SLAB {
            return;
        }
        let mut unused = UNUSED.lock().unwrap_or_else(|e| e.into_inner());
        if unused.len() < SPARE {
            self.0.clear();
            unused.push(std::mem::take(&mut self.0));
        }
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
                let pieces = batch.take();
                prop_assert!(batch.is_empty());
                prop_assert!(pieces.iter().all(|piece| !piece.is_empty() && piece.len() <= SLAB));
                // All slabs are full but for the last, which is half full or has memory of its own.
                let short = pieces.iter().filter(|piece| piece.len() < SMALL_SLAB / 2);
                prop_assert!(short.count() <= 1);
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
    fn a_batch_is_full_and_so_many_slabs_are_kept() {
        let mut batch = Batch::new();
        while !batch.is_full() {
            batch.push(&[1; 50_000]);
        }
        assert!((SMALL..BATCH + 50_000).contains(&batch.len));
        let all: Vec<_> = (0..SPARE + 5).map(|_| Slab::take(SLAB)).collect();
        assert!(all.iter().all(|slab| slab.0.capacity() == SLAB));
        drop(all);
        assert!(UNUSED.lock().unwrap_or_else(|e| e.into_inner()).len() <= SPARE);
        // Small ones are not: they would be of no use to the next.
        drop(Slab::take(SMALL_SLAB));
        let unused = UNUSED.lock().unwrap_or_else(|e| e.into_inner());
        assert!(
            unused
                .iter()
                .all(|memory| memory.is_empty() && memory.capacity() == SLAB)
        );
    }
}
