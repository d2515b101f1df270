//! Since when larder knows of which version: a file a provider or product. Registries' lists carry
//! no dates, so this is what the cooldown counts from.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use std::time::Duration;

use futures_util::future::{BoxFuture, Shared};
use moka::future::Cache;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use crate::digest::Digest;

/// Books in memory; the others are on disk.
const BOOKS: u64 = 256;
/// Versions of one provider; those beyond count as old.
const VERSIONS: usize = 20_000;

/// How long a version is not asked about again whose date could not be had.
const UNDATED: Duration = Duration::from_secs(60);

/// Asking for dates, for everybody who waits.
pub type Flight = Shared<BoxFuture<'static, ()>>;

/// What is known of a version's age. Seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// When larder first heard of it
    pub first: u64,
    /// What upstream says of its archive (`Last-Modified`)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modified: Option<u64>,
    /// Whether it was never asked about, since a newer version was old enough
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub presumed_old: bool,
}

impl Seen {
    /// From when its age counts, where its archive bears the date `archive`.
    pub fn born(&self, archive: Option<u64>) -> u64 {
        let known = [archive, self.modified].into_iter().flatten().min();
        match (self.presumed_old, known) {
            (true, None) => 0,
            // The presumption ends where the archive itself says otherwise.
            (true, Some(known)) => known,
            (false, known) => known.map_or(self.first, |known| known.min(self.first)),
        }
    }
}

/// What is known of one provider or product.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Book {
    address: String,
    /// Whether, since newer ones were old enough, those of its first list count as old that were
    /// never asked about
    #[serde(default)]
    pub presumed: bool,
    pub versions: BTreeMap<String, Seen>,
}

impl Book {
    /// Takes note of a version. It is new to a book that is full, and then counts as seen now.
    pub fn see(&mut self, version: &str, now: u64) -> Seen {
        let new = Seen {
            first: now,
            modified: None,
            presumed_old: false,
        };
        if let Some(seen) = self.versions.get_mut(version) {
            // The clock was ahead then.
            seen.first = seen.first.min(now);
            return *seen;
        }
        if self.versions.len() < VERSIONS {
            self.versions.insert(version.to_owned(), new);
        }
        new
    }
}

/// The books of one data dir.
pub struct Sightings {
    dir: PathBuf,
    tmp: PathBuf,
    temporary: AtomicU64,
    books: Cache<String, Arc<Mutex<Book>>>,
    /// Of lists that only some may see: in memory alone
    private: Cache<String, Arc<Mutex<Book>>>,
    /// Versions that were asked about in vain, for a while
    undated: Cache<String, ()>,
    /// Who asks upstream, by address
    pub flights: std::sync::Mutex<HashMap<String, Flight>>,
    read_only: bool,
}

impl Sightings {
    pub fn new(data_dir: &std::path::Path) -> Self {
        Self {
            dir: data_dir.join("sightings"),
            tmp: data_dir.join("tmp"),
            temporary: AtomicU64::new(0),
            books: Cache::new(BOOKS),
            private: Cache::new(BOOKS),
            undated: Cache::builder()
                .max_capacity(10_000)
                .time_to_live(UNDATED)
                .build(),
            flights: std::sync::Mutex::default(),
            read_only: false,
        }
    }

    /// The same for reading alone.
    pub fn peek(data_dir: &std::path::Path) -> Self {
        Self {
            read_only: true,
            ..Self::new(data_dir)
        }
    }

    /// Whether a version's date could not be had a moment ago.
    pub fn is_undated(&self, address: &str, version: &str) -> bool {
        self.undated.contains_key(&format!("{address}@{version}"))
    }

    pub async fn note_undated(&self, address: &str, version: &str) {
        let name = format!("{address}@{version}");
        self.undated.insert(name, ()).await;
    }

    /// The book of a list that a client's credentials brought, of which nothing is kept.
    pub async fn private_book(&self, address: &str) -> Arc<Mutex<Book>> {
        let empty = async { Arc::default() };
        self.private.get_with(address.to_owned(), empty).await
    }

    /// The book of an address. Its lock is never held while upstream is asked.
    pub async fn book(&self, address: &str) -> Arc<Mutex<Book>> {
        let path = self.path(address);
        let empty = Book {
            address: address.to_owned(),
            ..Default::default()
        };
        let open = async {
            let read = tokio::task::spawn_blocking(move || std::fs::read(path)).await;
            let bytes = read.ok().and_then(Result::ok);
            let book = bytes.and_then(|bytes| serde_json::from_slice::<Book>(&bytes).ok());
            let book = book.filter(|book| book.address == empty.address);
            Arc::new(Mutex::new(book.unwrap_or(empty)))
        };
        self.books.get_with(address.to_owned(), open).await
    }

    /// Writes a book to disk. One that cannot be written holds for as long as it is in memory.
    pub async fn keep(&self, book: &Book) {
        if self.read_only {
            return;
        }
        let (path, bytes) = (self.path(&book.address), serde_json::to_vec(book));
        let number = self.temporary.fetch_add(1, Ordering::Relaxed);
        let temporary = self.tmp.join(format!("sightings-{number}"));
        let written = tokio::task::spawn_blocking(move || -> io::Result<()> {
            for folder in [temporary.parent(), path.parent()].into_iter().flatten() {
                std::fs::create_dir_all(folder)?;
            }
            std::fs::write(&temporary, bytes?)?;
            std::fs::rename(&temporary, &path)
        });
        if let Ok(Err(error)) = written.await {
            tracing::warn!(address = %book.address, %error, "the ages of versions cannot be kept on disk");
        }
    }

    fn path(&self, address: &str) -> PathBuf {
        let name = Digest::of(address.as_bytes());
        self.dir.join(format!("{name}.json"))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn age_counts_from_the_earliest_that_is_known() {
        let seen = |modified, presumed_old| Seen {
            first: 100,
            modified,
            presumed_old,
        };
        assert_eq!(seen(None, false).born(None), 100);
        assert_eq!(seen(Some(50), false).born(None), 50);
        assert_eq!(seen(Some(150), false).born(None), 100);
        assert_eq!(seen(None, false).born(Some(70)), 70);
        assert_eq!(seen(None, true).born(None), 0);
        // A backport that is younger than the presumption.
        assert_eq!(seen(None, true).born(Some(95)), 95);
    }

    #[tokio::test]
    async fn books_outlive_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let sightings = Sightings::new(dir.path());
        let book = sightings.book("a/b/c").await;
        let mut book = book.lock().await;
        book.see("1.0.0", 7);
        assert_eq!(book.see("1.0.0", 9).first, 7);
        sightings.keep(&book).await;
        let again = Sightings::new(dir.path()).book("a/b/c").await;
        assert_eq!(again.lock().await.versions["1.0.0"].first, 7);
        let other = Sightings::new(dir.path()).book("a/b/d").await;
        assert!(other.lock().await.versions.is_empty());
    }
}
