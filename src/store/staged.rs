//! From bytes on their way to a blob with a name: staged → verified → committed.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use rustix::io::{Errno, pwritev};

use super::Store;
use crate::digest::{Digest, Hasher};

/// What a reservation grows by where the length is not known beforehand.
const STEP: u64 = 16 << 20;
/// Slices in one write, of which POSIX promises 16.
const SLICES: usize = 16;

/// A file in `tmp/` that grows and is hashed as it grows. Dropped, it is gone.
pub struct Staged {
    store: Arc<Store>,
    file: Arc<File>,
    path: PathBuf,
    hasher: Hasher,
    len: u64,
    reserved: u64,
    /// Whether `path` still names the file.
    named: bool,
}

/// Staged bytes that have the digest they should have. Only [`Staged::verify`] makes one.
pub struct Verified {
    staged: Staged,
    digest: Digest,
}

/// Why staged bytes could not grow.
#[derive(Debug)]
pub enum Full {
    /// The budget or the disk has no room.
    NoRoom,
    /// It is larger than what is kept.
    TooLarge,
    Disk(io::Error),
}

impl Store {
    /// Starts a staged file; the space for `len` bytes is reserved, in the budget and on the disk,
    /// before this returns.
    pub fn stage(self: &Arc<Self>, len: Option<u64>) -> Result<Staged, Full> {
        if len.is_some_and(|len| len > self.archive_limit) {
            return Err(Full::TooLarge);
        }
        let reserved = len.unwrap_or(STEP);
        self.reserve(reserved)?;
        let mut created = self.create_staged(len);
        if matches!(created, Err(Full::NoRoom)) && self.make_room(reserved) {
            // Not the budget but the disk is what bounds the store.
            created = self.create_staged(len);
        }
        match created {
            Ok((file, path)) => Ok(Staged {
                store: self.clone(),
                file: Arc::new(file),
                path,
                hasher: Hasher::default(),
                len: 0,
                reserved,
                named: true,
            }),
            Err(full) => {
                self.release(reserved);
                Err(full)
            }
        }
    }

    fn create_staged(&self, len: Option<u64>) -> Result<(File, PathBuf), Full> {
        let path = self.next_temporary();
        let create = || {
            File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o644)
                .open(&path)
        };
        let file = match create() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                // Somebody tidied the folder away.
                path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
                create()?
            }
            file => file?,
        };
        if let Some(len) = len.filter(|len| *len > 0)
            && let Err(full) = allocate(&file, len)
        {
            let _ = std::fs::remove_file(&path);
            return Err(full);
        }
        Ok((file, path))
    }
}

impl Staged {
    /// The file, for followers: they may read the bytes that were appended so far.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The hash of all bytes so far.
    pub fn hasher(&self) -> &Hasher {
        &self.hasher
    }

    /// Appends and hashes. After an error the bytes so far are as they were.
    pub fn append(&mut self, chunks: &[Bytes]) -> Result<(), Full> {
        let added: u64 = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        let len = self.len + added;
        if len > self.store.archive_limit {
            return Err(Full::TooLarge);
        }
        while len > self.reserved {
            self.store.reserve(STEP)?;
            self.reserved += STEP;
        }
        self.write(chunks, added)?;
        chunks.iter().for_each(|chunk| self.hasher.update(chunk));
        self.len = len;
        Ok(())
    }

    /// Writes `chunks` behind what there is, with one call as a rule: the page cache takes large
    /// pieces for less.
    fn write(&self, chunks: &[Bytes], len: u64) -> io::Result<()> {
        let mut slices: Vec<_> = chunks.iter().map(|chunk| IoSlice::new(chunk)).collect();
        let (mut slices, mut written) = (&mut slices[..], 0);
        while written < len {
            let count = slices.len().min(SLICES);
            match pwritev(&self.file, &slices[..count], self.len + written) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    written += n as u64;
                    IoSlice::advance_slices(&mut slices, n);
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Lets the bytes pass as `expected`; or they are gone, and the digest that they had is returned.
    pub fn verify(self, expected: Digest) -> Result<Verified, Digest> {
        let found = self.hasher.so_far();
        if found != expected {
            return Err(found);
        }
        Ok(Verified {
            staged: self,
            digest: found,
        })
    }
}

impl Verified {
    pub fn digest(&self) -> Digest {
        self.digest
    }

    pub fn len(&self) -> u64 {
        self.staged.len
    }

    pub fn is_empty(&self) -> bool {
        self.staged.len == 0
    }

    pub(super) fn file(&self) -> &File {
        &self.staged.file
    }

    pub(super) fn path(&self) -> &PathBuf {
        &self.staged.path
    }

    /// The file has its final name: gives the reservation back to be counted as stored.
    pub(super) fn renamed(&mut self) -> u64 {
        self.staged.named = false;
        std::mem::take(&mut self.staged.reserved)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if self.named {
            let _ = std::fs::remove_file(&self.path);
        }
        self.store.release(self.reserved);
    }
}

impl From<io::Error> for Full {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoRoom,
            _ => Self::Disk(e),
        }
    }
}

/// Takes the blocks now, so that the disk cannot fill up on the way.
fn allocate(file: &File, len: u64) -> Result<(), Full> {
    use rustix::fs::{FallocateFlags, fallocate, fstatvfs};
    match fallocate(file, FallocateFlags::KEEP_SIZE, 0, len) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let disk = fstatvfs(file).map_err(|e| Full::from(io::Error::from(e)))?;
            if disk.f_bavail.saturating_mul(disk.f_frsize) < len {
                return Err(Full::NoRoom);
            }
            Ok(())
        }
        Err(e) => Err(Full::from(io::Error::from(e))),
    }
}
