//! Reading a file in chunks: what the page cache holds at once, the rest on a thread that may wait.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Bytes, BytesMut};

use crate::error::{Error, Kind};

/// Bytes read at once, the most: many TLS records for one write to the socket. A client that gets
/// much at a time goes to sleep less often.
const CHUNK: u64 = 256 << 10;
/// The least, where there are many readers.
const SMALL: u64 = 64 << 10;
/// Bytes that the chunks of all readers may take before they get smaller.
const ALL: u64 = 4 << 20;
/// Chunks that may be on their way at a time.
const SPARE: usize = 2;

static READERS: AtomicUsize = AtomicUsize::new(0);

/// Reads chunks of one file, into the memory of chunks that were sent.
pub struct Chunks {
    /// What was given out, the oldest first
    given: VecDeque<Bytes>,
}

impl Default for Chunks {
    fn default() -> Self {
        READERS.fetch_add(1, Ordering::Relaxed);
        Self {
            given: VecDeque::new(),
        }
    }
}

impl Drop for Chunks {
    fn drop(&mut self) {
        READERS.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Chunks {
    /// Reads some bytes at `at`: at least one, at most `len`.
    ///
    /// # Errors
    /// When the disk fails, or the file ends before `at + len`.
    pub async fn read(&mut self, file: &Arc<File>, at: u64, len: u64) -> Result<Bytes, Error> {
        let len = len.min(share().max(SMALL)) as usize;
        let mut buffer = self.buffer();
        // Of what was read before, nothing is cleared: it is overwritten, or cut off below.
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        let buffer = match read_warm(file, &mut buffer[..len], at) {
            0 => read_cold(file.clone(), buffer, at, len).await?,
            warm => {
                buffer.truncate(warm);
                buffer
            }
        };
        let bytes = buffer.freeze();
        self.given.push_back(bytes.clone());
        Ok(bytes)
    }

    /// Whether there are so few readers that each may hold a large piece of memory.
    pub fn may_be_large(&self) -> bool {
        share() == CHUNK
    }

    /// The memory of a chunk that nobody holds any more, or new memory.
    fn buffer(&mut self) -> BytesMut {
        if self.given.len() >= SPARE
            && let Some(oldest) = self.given.pop_front()
            && let Ok(buffer) = oldest.try_into_mut()
        {
            return buffer;
        }
        BytesMut::new()
    }
}

fn share() -> u64 {
    CHUNK.min(ALL / READERS.load(Ordering::Relaxed).max(1) as u64)
}

/// Reads what is in memory; nothing where waiting would be needed, or on an error.
#[cfg(target_os = "linux")]
fn read_warm(file: &File, buffer: &mut [u8], at: u64) -> usize {
    use rustix::io::{ReadWriteFlags, preadv2};
    let buffers = &mut [io::IoSliceMut::new(buffer)];
    preadv2(file, buffers, at, ReadWriteFlags::NOWAIT).unwrap_or(0)
}

#[cfg(not(target_os = "linux"))]
fn read_warm(_: &File, _: &mut [u8], _: u64) -> usize {
    0
}

async fn read_cold(
    file: Arc<File>,
    mut buffer: BytesMut,
    at: u64,
    len: usize,
) -> Result<BytesMut, Error> {
    let read = tokio::task::spawn_blocking(move || {
        buffer.truncate(len);
        file.read_exact_at(&mut buffer, at).map(|()| buffer)
    });
    match read.await {
        Ok(Ok(buffer)) => Ok(buffer),
        Ok(Err(e)) => Err(Error::new(
            Kind::Internal,
            format!("the cache cannot be read: {e}; run `larder verify`"),
        )),
        Err(e) => Err(Error::new(Kind::Internal, format!("a read broke off: {e}"))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[tokio::test]
    async fn chunks_are_the_files_bytes_whoever_still_holds_older_ones() {
        let bytes: Vec<u8> = (0..5 * CHUNK + 17).map(|i| (i % 251) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let file = Arc::new(file);
        for held_back in [0, 1, 2, 9] {
            let mut chunks = Chunks::default();
            let (mut at, mut held) = (0, VecDeque::new());
            while at < bytes.len() as u64 {
                let left = bytes.len() as u64 - at;
                let chunk = chunks.read(&file, at, left).await.unwrap();
                assert!(!chunk.is_empty() && chunk.len() as u64 <= CHUNK);
                held.push_back((at as usize, chunk.clone()));
                at += chunk.len() as u64;
                for (at, chunk) in &held {
                    assert_eq!(chunk, &bytes[*at..at + chunk.len()], "{held_back}");
                }
                if held.len() > held_back {
                    held.pop_front();
                }
            }
        }
    }

    #[tokio::test]
    async fn memory_is_used_again_once_it_was_sent() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(9 * CHUNK).unwrap();
        let file = Arc::new(file);
        let mut chunks = Chunks::default();
        let mut seen = std::collections::HashSet::new();
        for i in 0..9 {
            let chunk = chunks.read(&file, i * CHUNK, CHUNK).await.unwrap();
            seen.insert(chunk.as_ptr());
        }
        assert_eq!(seen.len(), SPARE);
    }

    #[tokio::test]
    async fn a_file_that_ends_too_soon_is_an_error() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(10).unwrap();
        let mut chunks = Chunks::default();
        assert_eq!(chunks.read(&file, 0, 10).await.unwrap().len(), 10);
        assert!(chunks.read(&file, 10, 1).await.is_err());
    }
}
