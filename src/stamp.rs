//! What changes with a file, so that it need not be read again while it does not.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// A file as it was at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    /// Also when it was only linked or given away; `cp -p` cannot set it back
    changed: (i64, i64),
}

impl Stamp {
    /// Of the file to which a path leads.
    ///
    /// # Errors
    /// When there is none, or it cannot be looked at.
    pub fn of(path: &Path) -> io::Result<Self> {
        Ok(Self::from(&fs::metadata(path)?))
    }

    /// Whether nobody wrote to it, as far as its date says.
    pub fn holds_the_same(&self, other: &Self) -> bool {
        let bytes = |stamp: &Self| (stamp.device, stamp.inode, stamp.size, stamp.modified);
        bytes(self) == bytes(other)
    }
}

impl From<&fs::Metadata> for Stamp {
    fn from(m: &fs::Metadata) -> Self {
        Self {
            device: m.dev(),
            inode: m.ino(),
            size: m.size(),
            modified: (m.mtime(), m.mtime_nsec()),
            changed: (m.ctime(), m.ctime_nsec()),
        }
    }
}
