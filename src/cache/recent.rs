//! What a fill wrote last and is still in memory: a follower that keeps up takes it from there, where
//! it need not be copied.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;

/// Bytes that all fills together may keep so, in at most twice as much memory (see `Batch::take`).
const ALL: usize = 8 << 20;

static KEPT: AtomicUsize = AtomicUsize::new(0);

/// Bytes of an archive, from `at`.
pub struct Recent {
    at: u64,
    chunks: Vec<Bytes>,
    taken: usize,
}

impl Recent {
    /// Keeps them, if there is room.
    pub fn keep(at: u64, chunks: Vec<Bytes>) -> Option<Arc<Self>> {
        let taken = chunks.iter().map(Bytes::len).sum();
        let fits = |kept: usize| Some(kept + taken).filter(|all| *all <= ALL);
        let kept = KEPT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits);
        kept.is_ok().then(|| Arc::new(Self { at, chunks, taken }))
    }

    /// Some of the bytes from `at` to `until`; none where they are not here.
    pub fn read(&self, at: u64, until: u64) -> Option<Bytes> {
        let mut skip = usize::try_from(at.checked_sub(self.at)?).ok()?;
        for chunk in &self.chunks {
            if skip < chunk.len() {
                let wanted = until.saturating_sub(at).min((chunk.len() - skip) as u64);
                return Some(chunk.slice(skip..skip + wanted as usize)).filter(|b| !b.is_empty());
            }
            skip -= chunk.len();
        }
        None
    }
}

impl Drop for Recent {
    fn drop(&mut self) {
        KEPT.fetch_sub(self.taken, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_here_is_read_and_nothing_else() {
        let chunks = ["abc", "", "de"].map(Bytes::from).to_vec();
        let recent = Recent::keep(10, chunks).expect("room");
        let read = |at, until| recent.read(at, until);
        assert_eq!(read(10, 100).as_deref(), Some(&b"abc"[..]));
        assert_eq!(read(11, 12).as_deref(), Some(&b"b"[..]));
        assert_eq!(read(13, 100).as_deref(), Some(&b"de"[..]));
        assert_eq!(read(14, 15).as_deref(), Some(&b"e"[..]));
        for (at, until) in [(9, 100), (15, 100), (12, 12), (u64::MAX, u64::MAX)] {
            assert_eq!(read(at, until), None, "{at} to {until}");
        }
    }

    #[test]
    fn there_is_a_bound_and_room_again_afterwards() {
        let whole = || Recent::keep(0, vec![Bytes::from(vec![0; ALL / 2 + 1])]);
        let kept = whole();
        assert!(kept.is_some());
        assert!(whole().is_none());
        drop(kept);
        assert!(whole().is_some());
    }
}
