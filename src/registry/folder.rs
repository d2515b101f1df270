//! A folder and its files: what leads out of it, what is whole, what changed, and what is wrong. All
//! of it reads the disk (blocking); what was found of a file holds until the file changes.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use flate2::read::MultiGzDecoder;
use moka::sync::Cache;
use serde::{Deserialize, Serialize};

use crate::ca::write_atomically;
use crate::digest::Digest;
use crate::stamp::Stamp;
use crate::store::hash_file;
use crate::sync::lock;
use crate::terraform::signature::{Judgement, Keyring};

/// Files of one folder, and of all together.
const FILES: usize = 20_000;
const REMEMBERED: usize = 200_000;
/// Sums, signatures, keys, manifests and documents.
const SMALL: u64 = 16 << 20;
const JUDGEMENTS: u64 = 10_000;
const BUFFER: usize = 256 << 10;
/// What could not be read is not tried again for so long, nor what is being written: others must not
/// wait for it.
const FAULT: Duration = Duration::from_secs(60);
const WRITING: Duration = Duration::from_secs(2);
/// What a module may unpack to.
const UNPACKED: u64 = 16 << 30;

/// A folder of releases; [`super::releases`] knows its layout.
pub struct Folder {
    root: PathBuf,
    /// Where what was found is kept from one start to the next
    memory_file: Option<PathBuf>,
    memory: Mutex<HashMap<PathBuf, (Stamp, Checked)>>,
    /// Files that are being read
    busy: Mutex<HashSet<PathBuf>>,
    /// Files that could not be read, or are being written
    faults: Mutex<HashMap<PathBuf, Fault>>,
    /// Held by who looks at everything
    surveying: Mutex<()>,
    /// What is wrong with it, by path
    problems: Mutex<BTreeMap<PathBuf, String>>,
    pub(super) keyring: Arc<Keyring>,
    pub(super) judgements: Cache<Digest, Judgement>,
}

/// What was found of an archive.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Checked {
    sha256: String,
    /// What is wrong with it; none: it is whole
    wrong: Option<String>,
}

/// Whether files that are new are read, or passed over and counted as pending.
#[derive(Debug, Default)]
pub struct Look {
    pub only_known: bool,
    pub pending: Cell<bool>,
}

/// What kept a file from being read.
#[derive(Clone)]
struct Fault {
    since: Instant,
    /// The file as it was then
    stamp: Option<Stamp>,
    /// Whether somebody wrote to it
    written: bool,
    why: String,
}

impl Fault {
    fn refusal(&self) -> Refusal {
        match self.written {
            true => Refusal::Written(self.why.clone()),
            false => Refusal::Wrong(self.why.clone()),
        }
    }

    /// Whether there is no use in trying again, for a file that is like `stamp` now.
    fn holds(&self, stamp: &Stamp) -> bool {
        let same = self.stamp.as_ref() == Some(stamp);
        match self.written {
            // Quiet since: it may be whole.
            true => !same && self.since.elapsed() < WRITING,
            false => same && self.since.elapsed() < FAULT,
        }
    }
}

/// Why a file is not served.
pub(super) enum Refusal {
    /// For these words
    Wrong(String),
    /// For these words: somebody writes to it
    Written(String),
    /// It is not known yet.
    Pending,
    /// It was told elsewhere.
    Told,
}

/// What is wrong with a file, by its path within the folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    pub path: PathBuf,
    pub why: String,
}

impl Folder {
    /// What was found earlier is read from `memory_file`, if there is one.
    ///
    /// # Errors
    /// When the folder cannot be found.
    pub fn open(
        root: &Path,
        memory_file: Option<PathBuf>,
        keyring: Arc<Keyring>,
    ) -> io::Result<Self> {
        let known = memory_file.as_ref().and_then(|file| fs::read(file).ok());
        let known = known.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Ok(Self {
            root: fs::canonicalize(root)?,
            memory_file,
            memory: Mutex::new(known.unwrap_or_default()),
            busy: Mutex::default(),
            faults: Mutex::default(),
            surveying: Mutex::default(),
            problems: Mutex::default(),
            judgements: Cache::new(JUDGEMENTS),
            keyring,
        })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What is wrong with files that were looked at.
    pub fn problems(&self) -> Vec<Problem> {
        let problems = lock(&self.problems);
        let all = problems.iter().map(|(path, why)| Problem {
            path: path.clone(),
            why: why.clone(),
        });
        all.collect()
    }

    /// Notes what is wrong with a file; it is logged once.
    pub fn refuse(&self, path: &Path, why: impl Into<String>) {
        let why = why.into();
        let mut problems = lock(&self.problems);
        let news = problems.get(path) != Some(&why);
        if news && problems.len() < FILES {
            tracing::warn!(
                path = shown(&self.root.join(path)),
                why,
                "something is wrong in a private registry"
            );
            problems.insert(path.to_owned(), why);
        }
    }

    /// Notes that nothing is wrong with a file any more.
    pub fn accept(&self, path: &Path) {
        lock(&self.problems).remove(path);
    }

    /// A small file, whole.
    pub fn read(&self, path: &Path) -> Option<Vec<u8>> {
        let real = self.resolve(path)?;
        let mut bytes = Vec::new();
        let read = File::open(&real).and_then(|file| file.take(SMALL + 1).read_to_end(&mut bytes));
        match read {
            Ok(n) if n as u64 <= SMALL => Some(bytes),
            Ok(_) => {
                self.refuse(path, "is too large");
                None
            }
            Err(e) => {
                self.refuse(path, format!("cannot be read: {e}"));
                None
            }
        }
    }

    /// Opens an archive that was found right, if it is still the same.
    pub fn open_archive(&self, path: &Path) -> Option<(File, fs::Metadata)> {
        let file = File::open(self.resolve(path)?).ok()?;
        let metadata = file.metadata().ok()?;
        let known = lock(&self.memory).get(path).map(|(stamp, _)| *stamp);
        let same = known.is_some_and(|known| known.holds_the_same(&Stamp::from(&metadata)));
        same.then_some((file, metadata))
    }

    /// The digest of an archive that `whole` finds nothing wrong with, read anew if it has changed.
    pub(super) fn examined(
        &self,
        path: &Path,
        look: &Look,
        whole: impl FnOnce(&Path) -> Result<(), String>,
    ) -> Result<Digest, Refusal> {
        let fault = |why: String, stamp: Option<Stamp>, written: bool| {
            let mut faults = lock(&self.faults);
            if faults.len() >= FILES {
                faults.clear();
            }
            let fault = Fault {
                since: Instant::now(),
                stamp,
                written,
                why,
            };
            let refusal = fault.refusal();
            faults.insert(path.to_owned(), fault);
            refusal
        };
        let real = self.resolve(path).ok_or(Refusal::Told)?;
        let words = |e: io::Error| format!("cannot be read: {e}");
        let stamp = Stamp::of(&real).map_err(|e| fault(words(e), None, false))?;
        let known = lock(&self.memory).get(path).cloned();
        match known {
            Some((known, checked)) if known == stamp => return checked.verdict(),
            // Until it is read again, its bytes are checked against the digest as they are sent.
            Some((known, checked)) if look.only_known && known.holds_the_same(&stamp) => {
                return checked.verdict();
            }
            _ => {}
        }
        let faulty = lock(&self.faults).get(path).cloned();
        if let Some(faulty) = faulty.filter(|fault| fault.holds(&stamp)) {
            return Err(faulty.refusal());
        }
        if look.only_known {
            look.pending.set(true);
            return Err(Refusal::Pending);
        }
        let Some(_busy) = Busy::with(self, path) else {
            look.pending.set(true);
            return Err(Refusal::Pending);
        };
        let digest = hash(&real).map_err(|e| fault(words(e), Some(stamp), false))?;
        let checked = Checked {
            sha256: digest.to_string(),
            wrong: whole(&real).err(),
        };
        let after = Stamp::of(&real).ok();
        if after != Some(stamp) {
            let why = "is being written; it is looked at again".into();
            return Err(fault(why, after, true));
        }
        lock(&self.faults).remove(path);
        let mut memory = lock(&self.memory);
        if memory.len() >= REMEMBERED {
            memory.clear();
        }
        memory.insert(path.to_owned(), (stamp, checked.clone()));
        checked.verdict()
    }

    /// Where a path within the folder leads, if that is a file within it.
    pub(super) fn resolve(&self, path: &Path) -> Option<PathBuf> {
        let at = self.root.join(path);
        let real = match fs::canonicalize(&at) {
            Ok(real) => real,
            Err(e) if is_absence(&e) => {
                if at.is_symlink() {
                    self.refuse(path, "is a link to what is not there");
                }
                return None;
            }
            Err(e) => {
                self.refuse(path, format!("cannot be read: {e}"));
                return None;
            }
        };
        if !real.starts_with(&self.root) {
            self.refuse(path, "is a link out of the folder");
            return None;
        }
        if !fs::metadata(&real).is_ok_and(|m| m.is_file()) {
            self.refuse(path, "is no file");
            return None;
        }
        Some(real)
    }

    /// The names of what lies in a folder, in order, without what is hidden.
    pub(super) fn entries(&self, folder: &Path) -> Vec<String> {
        let at = self.root.join(folder);
        if fs::canonicalize(&at).is_ok_and(|real| !real.starts_with(&self.root)) {
            self.refuse(folder, "is a link out of the folder");
            return Vec::new();
        }
        let entries = match fs::read_dir(at) {
            Ok(entries) => entries,
            Err(e) if is_absence(&e) => return Vec::new(),
            Err(e) => {
                self.refuse(folder, format!("cannot be read: {e}"));
                return Vec::new();
            }
        };
        let mut names = Vec::new();
        for entry in entries.flatten() {
            match entry.file_name().into_string() {
                Ok(name) if name.starts_with('.') => {}
                Ok(name) => names.push(name),
                Err(name) => self.refuse(&folder.join(name), "has a name that is no text"),
            }
            if names.len() > FILES {
                self.refuse(
                    folder,
                    format!("holds more than {FILES} files; the rest is not served"),
                );
                break;
            }
        }
        names.truncate(FILES);
        names.sort_unstable();
        names
    }

    /// A place to look at everything from; none where somebody does already.
    pub(super) fn begin_survey(&self) -> Option<MutexGuard<'_, ()>> {
        match self.surveying.try_lock() {
            Ok(place) => Some(place),
            Err(TryLockError::Poisoned(place)) => Some(place.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    pub(super) fn is_folder(&self, path: &Path) -> bool {
        self.root.join(path).is_dir()
    }

    pub(super) fn forget_what_is_gone(&self) {
        let is_there = |path: &PathBuf| self.root.join(path).symlink_metadata().is_ok();
        lock(&self.problems).retain(|path, _| is_there(path));
        let known: Vec<PathBuf> = lock(&self.memory).keys().cloned().collect();
        for path in known.into_iter().filter(|path| !is_there(path)) {
            lock(&self.memory).remove(&path);
        }
        lock(&self.faults).retain(|path, _| is_there(path));
    }

    /// Keeps what was found for the next start.
    pub fn keep_memory(&self) {
        let Some(file) = &self.memory_file else {
            return;
        };
        let text = serde_json::to_vec(&*lock(&self.memory)).unwrap_or_default();
        if fs::read(file).is_ok_and(|held| held == text) {
            return;
        }
        let kept = file.parent().map_or(Ok(()), fs::create_dir_all);
        if let Err(error) = kept.and_then(|()| write_atomically(file, &text, 0o600)) {
            tracing::debug!(%error, "what is known of a private registry's files cannot be kept");
        }
    }
}

/// A file that is being read, by one thread at a time.
struct Busy<'a>(&'a Folder, &'a Path);

impl<'a> Busy<'a> {
    fn with(folder: &'a Folder, path: &'a Path) -> Option<Self> {
        let new = lock(&folder.busy).insert(path.to_owned());
        new.then_some(Self(folder, path))
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        lock(&self.0.busy).remove(self.1);
    }
}

impl Checked {
    fn verdict(&self) -> Result<Digest, Refusal> {
        let digest = self.sha256.parse();
        match (&self.wrong, digest) {
            (None, Ok(digest)) => Ok(digest),
            (Some(why), _) => Err(Refusal::Wrong(why.clone())),
            (None, Err(_)) => Err(Refusal::Pending),
        }
    }
}

/// A file for [`crate::terraform::dirhash::h1`].
pub fn open(path: &Path) -> Result<BufReader<File>, String> {
    let file = File::open(path).map_err(|e| format!("cannot be read: {e}"))?;
    Ok(BufReader::with_capacity(BUFFER, file))
}

/// The digest of a file.
pub fn hash(path: &Path) -> io::Result<Digest> {
    hash_file(&File::open(path)?)
}

/// Whether a gzip file is whole (RFC 1952 has a checksum and a length at its end).
pub(super) fn gunzip(path: &Path) -> Result<(), String> {
    let mut unpacked = MultiGzDecoder::new(open(path)?).take(UNPACKED + 1);
    let unpacked = io::copy(&mut unpacked, &mut io::sink());
    match unpacked.map_err(|e| format!("is no whole gzip file: {e}"))? {
        0 => Err("is empty".into()),
        n if n > UNPACKED => Err("unpacks to too much".into()),
        _ => Ok(()),
    }
}

/// A path of whatever letters, on one line.
pub fn shown(path: &Path) -> String {
    let text = path.display().to_string();
    match text.contains(char::is_control) {
        true => format!("{text:?}"),
        false => text,
    }
}

/// What a client may well ask for is not wrong because it is not there.
fn is_absence(e: &io::Error) -> bool {
    use io::ErrorKind::{InvalidFilename, NotADirectory, NotFound};
    matches!(e.kind(), NotFound | NotADirectory | InvalidFilename)
}
