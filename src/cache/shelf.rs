//! Documents on disk: a file each, bounded in number and bytes, the longest unvouched going first.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread::Builder;
use std::time::SystemTime;

use super::document::{Document, document_path};
use crate::error::Exit;
use crate::sync::lock;

const DOCUMENTS: usize = 20_000;
const BYTES: u64 = 1 << 30;
/// Files read at once at the start, when nothing is answered yet: a disk has many to fetch then.
const READERS: usize = 4;

/// The documents of one data dir.
pub struct Shelf {
    dir: PathBuf,
    read_only: bool,
    /// Where files are written before they get their names; emptied at the start
    tmp: PathBuf,
    temporary: AtomicU64,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    documents: HashMap<String, Entry>,
    bytes: u64,
}

struct Entry {
    validated: SystemTime,
    bytes: u64,
}

impl Shelf {
    /// Opens the shelf and shows each document on it. Torn and rotten ones are removed; one that cannot
    /// be read stays until it is fetched anew.
    pub fn open(data_dir: &Path, show: impl FnMut(&Document) + Send) -> Result<Self, Exit> {
        let dir = data_dir.join("metadata");
        std::fs::create_dir_all(&dir).map_err(|e| {
            Exit::usage(format!(
                "data_dir: {}: {e}; mend it or name another folder with --data-dir",
                dir.display()
            ))
        })?;
        Ok(Self::load(data_dir, dir, false, show))
    }

    /// The same for reading alone: nothing is made or removed.
    pub fn peek(data_dir: &Path, show: impl FnMut(&Document) + Send) -> Self {
        Self::load(data_dir, data_dir.join("metadata"), true, show)
    }

    fn load(
        data_dir: &Path,
        dir: PathBuf,
        read_only: bool,
        mut show: impl FnMut(&Document) + Send,
    ) -> Self {
        let this = Self {
            read_only,
            tmp: data_dir.join("tmp"),
            temporary: AtomicU64::new(0),
            held: Mutex::default(),
            dir,
        };
        for_each_file(&this.dir, |path, bytes, found| match found {
            Ok(document) => {
                show(&document);
                this.note(&document.key, document.validated, bytes);
            }
            Err(_) if read_only => {}
            Err(Some(error)) => {
                tracing::warn!(path = %path.display(), %error, "a kept document cannot be read");
            }
            Err(None) => {
                tracing::warn!(path = %path.display(), "a kept document is torn or rotten; dropped it");
                let _ = std::fs::remove_file(path);
            }
        });
        this
    }

    pub fn holds(&self, key: &str) -> bool {
        self.lock().documents.contains_key(key)
    }

    /// Reads a document back; none where there is none, or it is rotten.
    pub async fn read(&self, key: &str) -> Option<Document> {
        let path = document_path(&self.dir, key);
        let read = tokio::task::spawn_blocking(move || std::fs::read(path)).await;
        let bytes = read.ok()?.ok()?;
        Document::from_file(bytes.into()).filter(|document| document.key == key)
    }

    /// Writes a document, in place of an older one. Returns the keys that had to go for it.
    pub async fn write(&self, document: &Document) -> io::Result<Vec<String>> {
        let (file, path) = (document.to_file(), document_path(&self.dir, &document.key));
        let bytes = file.len() as u64;
        let number = self.temporary.fetch_add(1, Ordering::Relaxed);
        let temporary = self.tmp.join(format!("document-{number}"));
        tokio::task::spawn_blocking(move || write_file(&temporary, &path, &file))
            .await
            .map_err(io::Error::other)??;
        self.note(&document.key, document.validated, bytes);
        Ok(self.make_room())
    }

    /// Upstream vouched for a document again.
    pub fn vouch(&self, key: &str, validated: SystemTime) {
        if let Some(entry) = self.lock().documents.get_mut(key) {
            entry.validated = validated;
        }
    }

    pub fn remove(&self, key: &str) {
        let mut held = self.lock();
        if let Some(entry) = held.documents.remove(key) {
            held.bytes -= entry.bytes;
        }
        if !self.read_only {
            let _ = std::fs::remove_file(document_path(&self.dir, key));
        }
    }

    fn note(&self, key: &str, validated: SystemTime, bytes: u64) {
        let mut held = self.lock();
        held.bytes += bytes;
        let entry = Entry { validated, bytes };
        if let Some(old) = held.documents.insert(key.to_owned(), entry) {
            held.bytes -= old.bytes;
        }
    }

    /// A tenth goes at once, so that sorting is rare.
    fn make_room(&self) -> Vec<String> {
        let mut by_age: Vec<_> = {
            let held = self.lock();
            if held.documents.len() <= DOCUMENTS && held.bytes <= BYTES {
                return Vec::new();
            }
            let ages = held.documents.iter();
            ages.map(|(key, entry)| (entry.validated, key.clone()))
                .collect()
        };
        by_age.sort_unstable();
        by_age.truncate(by_age.len() / 10 + 1);
        let gone: Vec<_> = by_age.into_iter().map(|(_, key)| key).collect();
        gone.iter().for_each(|key| self.remove(key));
        gone
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        lock(&self.held)
    }
}

/// What a file holds; otherwise why it cannot be read, or none where it is torn or rotten.
type Found = Result<Document, Option<io::Error>>;

/// Shows each file in `dir`, its length, and what it holds.
fn for_each_file(dir: &Path, show: impl FnMut(&Path, u64, Found) + Send) {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let (entries, show) = (Mutex::new(entries), Mutex::new(show));
    let next = || lock(&entries).next().map(|entry| entry.path());
    let read_on = || {
        while let Some(path) = next() {
            let (len, found) = match std::fs::read(&path) {
                Ok(bytes) => {
                    let len = bytes.len() as u64;
                    let document = Document::from_file(bytes.into())
                        .filter(|document| document_path(dir, &document.key) == path);
                    (len, document.ok_or(None))
                }
                Err(error) => (0, Err(Some(error))),
            };
            lock(&show)(&path, len, found);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..READERS {
            // Without them it takes longer, and that is all.
            let _ = Builder::new().spawn_scoped(scope, read_on);
        }
        read_on();
    });
}

/// Whole or not at all after a crash of this process; a torn file after a power cut is told by its
/// digest, so there is no sync to wait for.
fn write_file(temporary: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    for folder in [temporary.parent(), path.parent()].into_iter().flatten() {
        std::fs::create_dir_all(folder)?;
    }
    let written = std::fs::write(temporary, bytes).and_then(|()| std::fs::rename(temporary, path));
    if written.is_err() {
        let _ = std::fs::remove_file(temporary);
    }
    written
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::terraform::route::Kind;
    use bytes::Bytes;
    use url::Url;

    #[test]
    fn each_file_is_shown_once_as_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let keys: Vec<_> = (0..100).map(|n| format!("https://host/{n}")).collect();
        for key in &keys {
            let url = Url::parse(key).unwrap();
            let mut document = Document::passing(&url, Kind::Other, Bytes::from_static(b"{}"));
            document.key = key.clone();
            std::fs::write(document_path(dir, key), document.to_file()).unwrap();
        }
        std::fs::write(dir.join("torn"), "{").unwrap();
        std::fs::create_dir(dir.join("folder")).unwrap();
        let (mut shown, mut torn, mut unread) = (Vec::new(), Vec::new(), Vec::new());
        for_each_file(dir, |path, len, found| match found {
            Ok(document) => {
                assert_eq!(len, path.metadata().unwrap().len());
                shown.push(document.key);
            }
            Err(None) => torn.push(path.to_owned()),
            Err(Some(_)) => unread.push(path.to_owned()),
        });
        shown.sort();
        let mut keys = keys;
        keys.sort();
        let (is_torn, is_unread) = (vec![dir.join("torn")], vec![dir.join("folder")]);
        assert_eq!((shown, torn, unread), (keys, is_torn, is_unread));
        for_each_file(&dir.join("none"), |_, _, _| panic!("there is nothing"));
    }
}
