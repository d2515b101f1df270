//! Which digest a name had when it was last verified, remembered beyond eviction: one append-only
//! file, a line a name, of which the last one counts.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use crate::digest::Digest;
use crate::sync::lock;

/// Names remembered. Beyond, the oldest half is forgotten at the next start.
const NAMES: usize = 500_000;

const BUFFER: usize = 256 << 10;

/// The ledger of one data dir.
pub struct Ledger {
    path: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// By the digest of the name
    seen: HashMap<[u8; 16], Digest>,
    file: Option<File>,
}

impl Ledger {
    /// Reads the ledger of `data_dir`, and writes it anew where it has grown too long. A line that
    /// is torn says nothing.
    pub fn open(data_dir: &Path) -> io::Result<Self> {
        let path = path(data_dir);
        let (mut seen, mut lines) = (HashMap::new(), 0);
        let whole = read(&path, |digest, name| {
            seen.insert(short(name), digest);
            lines += 1;
        })?;
        if !whole || lines > NAMES {
            let forgotten = if lines > NAMES { lines - NAMES / 2 } else { 0 };
            write_anew(&path, forgotten)?;
        }
        let file = File::options().append(true).create(true).open(&path)?;
        Ok(Self {
            path,
            inner: Mutex::new(Inner {
                seen,
                file: Some(file),
            }),
        })
    }

    /// The ledger as it is, for reading alone.
    pub fn peek(data_dir: &Path) -> Self {
        let path = path(data_dir);
        let mut seen = HashMap::new();
        let _ = read(&path, |digest, name| {
            seen.insert(short(name), digest);
        });
        Self {
            inner: Mutex::new(Inner { seen, file: None }),
            path,
        }
    }

    /// The digest that `name` had.
    pub fn find(&self, name: &str) -> Option<Digest> {
        self.lock().seen.get(&short(name)).copied()
    }

    /// `name` has that digest from now on (blocking).
    pub fn note(&self, name: &str, digest: Digest) {
        if name.contains(['\n', '\r']) {
            return;
        }
        let mut inner = self.lock();
        if inner.seen.get(&short(name)) == Some(&digest) {
            return;
        }
        if inner.seen.len() >= 2 * NAMES && !inner.seen.contains_key(&short(name)) {
            return;
        }
        inner.seen.insert(short(name), digest);
        let Some(file) = &mut inner.file else {
            return;
        };
        if let Err(error) = file.write_all(format!("{digest} {name}\n").as_bytes()) {
            tracing::warn!(path = %self.path.display(), %error, "a digest cannot be remembered beyond this process");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }
}

fn path(data_dir: &Path) -> PathBuf {
    data_dir.join("seen")
}

fn short(name: &str) -> [u8; 16] {
    let digest = Digest::of(name.as_bytes());
    let mut short = [0; 16];
    short.copy_from_slice(&digest.as_bytes()[..16]);
    short
}

/// Shows each good line, the oldest first; whether there are no others.
fn read(path: &Path, mut show: impl FnMut(Digest, &str)) -> io::Result<bool> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(e) => return Err(e),
    };
    let mut lines = BufReader::with_capacity(BUFFER, file);
    let (mut line, mut whole) = (Vec::new(), true);
    loop {
        line.clear();
        if lines.read_until(b'\n', &mut line)? == 0 {
            return Ok(whole);
        }
        // Of a line without its end, the name may be torn where the digest is whole.
        let text = line
            .strip_suffix(b"\n")
            .and_then(|line| std::str::from_utf8(line).ok());
        let parsed = text.and_then(|text| {
            let (digest, name) = text.split_once(' ')?;
            (!name.is_empty()).then_some((digest.parse().ok()?, name))
        });
        match parsed {
            Some((digest, name)) => show(digest, name),
            None => whole = false,
        }
    }
}

/// Without its first good lines, and without those that are torn.
fn write_anew(path: &Path, mut forgotten: usize) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = BufWriter::with_capacity(BUFFER, File::create(&temporary)?);
    let mut written = Ok(());
    read(path, |digest, name| match forgotten {
        0 if written.is_ok() => written = writeln!(file, "{digest} {name}"),
        0 => {}
        _ => forgotten -= 1,
    })?;
    written?;
    file.into_inner()
        .map_err(io::IntoInnerError::into_error)?
        .sync_all()?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_counts_and_outlives_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let ledger = Ledger::open(dir.path()).unwrap();
        assert_eq!(ledger.find("x"), None);
        ledger.note("x", a);
        ledger.note("y", a);
        ledger.note("x", b);
        ledger.note("x", b);
        drop(ledger);
        assert_eq!(
            fs::read_to_string(path(dir.path()))
                .unwrap()
                .lines()
                .count(),
            3
        );
        for ledger in [Ledger::open(dir.path()).unwrap(), Ledger::peek(dir.path())] {
            assert_eq!((ledger.find("x"), ledger.find("y")), (Some(b), Some(a)));
        }
    }

    #[test]
    fn a_torn_end_is_cut_off_and_the_rest_holds() {
        let dir = tempfile::tempdir().unwrap();
        let a = Digest::of(b"a");
        let whole = format!("{a} x\n{a} y\n");
        for end in whole.len() - 67..whole.len() {
            fs::write(path(dir.path()), &whole[..end]).unwrap();
            let ledger = Ledger::open(dir.path()).unwrap();
            assert_eq!(
                (ledger.find("x"), ledger.find("y")),
                (Some(a), None),
                "{end}"
            );
            ledger.note("z", a);
            assert_eq!(
                Ledger::open(dir.path()).unwrap().find("z"),
                Some(a),
                "{end}"
            );
        }
    }
}
