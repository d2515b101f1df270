//! Reading cacache's index from disk: one append-only file a key, a line an insertion, each with
//! the SHA-256 of its JSON in front. Writing is left to cacache itself.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha1::{Digest as _, Sha1};

use crate::digest::Digest;
use crate::terraform::address::Subject;
use crate::terraform::signature::Judgement;

/// The name of an index file: the SHA-1 of its key, which is no more than a place to look at.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BucketName([u8; 20]);

/// What the index says of a key.
#[derive(Clone, Debug)]
pub struct Entry {
    pub key: String,
    pub digest: Digest,
    pub size: u64,
    pub record: Arc<Record>,
}

impl Entry {
    /// About how many bytes it takes in memory.
    pub fn weight(&self) -> u32 {
        let record = &self.record;
        let headers = record
            .headers
            .iter()
            .map(|(name, value)| name.len() + value.len() + 48);
        let sources = record.sources.iter().map(|source| source.len() + 24);
        let all = 512 + self.key.len() + headers.sum::<usize>() + sources.sum::<usize>();
        u32::try_from(all).unwrap_or(u32::MAX)
    }
}

/// What is kept with an archive beside its bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Headers of upstream's answer that clients rely on: name and value
    #[serde(default)]
    pub headers: Vec<(String, String)>,
    /// Which sources named the digest
    #[serde(default)]
    pub sources: Vec<String>,
    /// When it was verified, in seconds since 1970
    #[serde(default)]
    pub verified: u64,
    /// Who stands behind the sums that list it
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<Judgement>,
    /// What it is of
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subjects: Vec<Subject>,
    /// The hash of what it unpacks to (`h1:`)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub h1: Option<String>,
}

/// A file of the index as it was found.
#[derive(Debug)]
pub struct Bucket {
    pub path: PathBuf,
    /// The last word on each key; keys that were deleted are absent.
    pub entries: Vec<Entry>,
    /// Lines that are torn or whose checksum is wrong.
    pub torn: usize,
    /// The good lines.
    lines: Vec<String>,
}

/// How a file's name ends that takes the place of a torn one.
pub const MENDING: &str = "mending";

/// The index file's JSON, as cacache writes it.
#[derive(Deserialize)]
struct Line {
    key: String,
    integrity: Option<String>,
    size: u64,
    #[serde(default)]
    metadata: serde_json::Value,
}

/// All files of the index of `cache`. A file that cannot be read is an error with its path.
pub fn buckets(cache: &Path) -> impl Iterator<Item = Result<Bucket, (PathBuf, io::Error)>> {
    bucket_paths(cache).map(|found| {
        let path = found?;
        Bucket::read(&path).map_err(|e| (path, e))
    })
}

/// The paths of all files of the index, or of folders that cannot be read.
pub fn bucket_paths(cache: &Path) -> impl Iterator<Item = Found> {
    files_below(cache.join("index-v5"), 3)
}

/// All content files of `cache` that can be seen, with the digest that their path names, if it names
/// one.
pub fn contents(cache: &Path) -> impl Iterator<Item = (PathBuf, Option<Digest>)> {
    content_paths(cache).flatten().map(|path| {
        let digest = digest_at(&path);
        (path, digest)
    })
}

/// The paths of all content files, or of folders that cannot be read.
pub fn content_paths(cache: &Path) -> impl Iterator<Item = Found> {
    files_below(cache.join("content-v2/sha256"), 3)
}

/// The digest that a content file's path names.
pub fn digest_at(path: &Path) -> Option<Digest> {
    hex_of(path).parse().ok()
}

/// A file, or a folder that cannot be read and why.
pub type Found = Result<PathBuf, (PathBuf, io::Error)>;

/// The hexadecimal digits that the last three parts of a path are.
fn hex_of(path: &Path) -> String {
    let mut parts: Vec<_> = path.iter().rev().take(3).collect();
    parts.reverse();
    parts.iter().map(|part| part.to_string_lossy()).collect()
}

/// Where cacache keeps the content of that digest.
pub fn content_path(cache: &Path, digest: &Digest) -> PathBuf {
    let hex = digest.to_string();
    cache
        .join("content-v2/sha256")
        .join(&hex[..2])
        .join(&hex[2..4])
        .join(&hex[4..])
}

impl BucketName {
    pub fn of(key: &str) -> Self {
        Self(Sha1::digest(key).into())
    }

    /// The name of the index file at `path`.
    pub fn at(path: &Path) -> Option<Self> {
        let (hex, mut name) = (hex_of(path), [0; 20]);
        if hex.len() != 40 || !hex.is_ascii() {
            return None;
        }
        for (i, byte) in name.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).ok()?;
        }
        Some(Self(name))
    }

    /// Where cacache keeps it.
    pub fn path(&self, cache: &Path) -> PathBuf {
        let hex: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        let (first, second) = (&hex[..2], &hex[2..4]);
        let folder = cache.join("index-v5").join(first).join(second);
        folder.join(&hex[4..])
    }
}

impl Bucket {
    /// Reads one file of the index.
    pub fn read(path: &Path) -> io::Result<Self> {
        let bytes = fs::read(path)?;
        let mut this = Self {
            path: path.to_owned(),
            entries: Vec::new(),
            torn: 0,
            lines: Vec::new(),
        };
        let mut last: HashMap<String, Option<Entry>> = HashMap::new();
        for raw in bytes.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            match std::str::from_utf8(raw).ok().and_then(parse_line) {
                Some((key, entry)) => {
                    last.insert(key, entry);
                    this.lines.push(String::from_utf8_lossy(raw).into_owned());
                }
                None => this.torn += 1,
            }
        }
        this.entries = last.into_values().flatten().collect();
        Ok(this)
    }

    /// Writes the file anew without its torn lines.
    pub fn mend(&self) -> io::Result<()> {
        let temporary = self.path.with_extension(MENDING);
        let text: String = self.lines.iter().flat_map(|line| ["\n", line]).collect();
        fs::write(&temporary, text)?;
        fs::rename(&temporary, &self.path)
    }
}

/// The key, and its entry unless the line deletes it.
fn parse_line(line: &str) -> Option<(String, Option<Entry>)> {
    let (checksum, json) = line.split_once('\t')?;
    if checksum != Digest::of(json.as_bytes()).to_string() {
        return None;
    }
    let line: Line = serde_json::from_str(json).ok()?;
    let Some(integrity) = line.integrity else {
        return Some((line.key, None));
    };
    let entry = Entry {
        digest: Digest::from_integrity(&integrity.parse().ok()?)?,
        size: line.size,
        record: Arc::new(serde_json::from_value(line.metadata).unwrap_or_default()),
        key: line.key.clone(),
    };
    Some((line.key, Some(entry)))
}

/// All files below `dir`, folder by folder: there may be millions.
fn files_below(dir: PathBuf, depth: usize) -> Box<dyn Iterator<Item = Found>> {
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Box::new(std::iter::empty()),
        Err(e) => return Box::new(std::iter::once(Err((dir, e)))),
    };
    Box::new(
        entries.flat_map(move |entry| -> Box<dyn Iterator<Item = Found>> {
            let kind = entry.and_then(|entry| Ok((entry.file_type()?, entry.path())));
            match kind {
                Ok((kind, path)) if kind.is_dir() && depth > 0 => files_below(path, depth - 1),
                Ok((kind, path)) if kind.is_file() => Box::new(std::iter::once(Ok(path))),
                Ok(_) => Box::new(std::iter::empty()),
                Err(e) => Box::new(std::iter::once(Err((dir.clone(), e)))),
            }
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_file_lies_where_cacache_puts_it() {
        let dir = tempfile::tempdir().expect("a folder");
        let opts = cacache::WriteOpts::new().integrity(Digest::of(b"a").to_integrity());
        cacache::index::insert(dir.path(), "a key", opts).expect("an entry");
        let found = buckets(dir.path()).next().expect("a file").expect("read");
        assert_eq!(found.path, BucketName::of("a key").path(dir.path()));
        assert_eq!(BucketName::at(&found.path), Some(BucketName::of("a key")));
        assert_eq!(BucketName::at(Path::new("a/b/c")), None);
    }
}
