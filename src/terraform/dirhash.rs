//! `h1:`, the hash of a package's unpacked files, as Go modules define it (dirhash, Hash1) and lock
//! files bear it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Read, Seek, SeekFrom};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zip::ZipArchive;

use crate::digest::{Digest, Hasher};

/// Files of one package, and bytes that they unpack to: far more than any provider has.
const FILES: usize = 100_000;
const UNPACKED: u64 = 16 << 30;
const CHUNK: usize = 128 << 10;

/// The hash of what a zip unpacks to (blocking). Every file is read, and its CRC checked.
///
/// # Errors
/// The words say what is wrong with the zip.
pub fn h1(zip: impl Read + Seek) -> Result<String, String> {
    let mut digests = BTreeMap::new();
    each_file(zip, |name, digest| match digests.insert(name, digest) {
        None => Ok(()),
        Some(_) => Err("holds a file twice".into()),
    })?;
    let mut summary = String::new();
    for (name, digest) in digests {
        // Writing to a string does not fail.
        let _ = writeln!(summary, "{digest}  {name}");
    }
    let sum = Digest::of(summary.as_bytes());
    Ok(format!("h1:{}", STANDARD.encode(sum.as_bytes())))
}

/// Reads every file of a zip to its end and hands on its name and digest.
fn each_file(
    mut zip: impl Read + Seek,
    mut each: impl FnMut(String, Digest) -> Result<(), String>,
) -> Result<(), String> {
    // Before the list of files is read into memory.
    match announced_files(&mut zip) {
        Some(files) if files <= FILES as u64 => {}
        Some(_) => return Err(format!("holds more than {FILES} files")),
        None => return Err("is no whole zip: its end is missing".into()),
    }
    let mut zip = ZipArchive::new(zip).map_err(|e| format!("is no whole zip: {e}"))?;
    if zip.offset() != 0 {
        return Err("is no whole zip: something lies before it".into());
    }
    if zip.len() > FILES {
        return Err(format!("holds more than {FILES} files"));
    }
    let mut left = UNPACKED;
    for i in 0..zip.len() {
        let mut file = zip.by_index(i).map_err(|e| format!("is damaged: {e}"))?;
        let name = file.name().map(|name| name.into_owned());
        let name = name.map_err(|e| format!("is damaged: {e}"))?;
        if name.contains('\n') {
            return Err("holds a file whose name has a line break".into());
        }
        let digest = hash(&mut file, &mut left).map_err(|e| format!("is damaged: {name}: {e}"))?;
        if !file.is_dir() {
            each(name, digest)?;
        }
    }
    Ok(())
}

/// How many files the end of a zip says there are (APPNOTE.TXT sections 4.3.14 to 4.3.16): the
/// largest of all ends that may be one.
fn announced_files(zip: &mut (impl Read + Seek)) -> Option<u64> {
    let length = zip.seek(SeekFrom::End(0)).ok()?;
    // The end, a comment of at most 64 KiB behind it, and a 64-bit end before it.
    let at = length.saturating_sub(22 + 65_535 + 20 + 56 + 4096);
    zip.seek(SeekFrom::Start(at)).ok()?;
    let mut tail = Vec::new();
    zip.take(length - at).read_to_end(&mut tail).ok()?;
    let numbers = |mark: &[u8; 4], offset: usize, size: usize| {
        let mut most = None;
        for start in memmem(&tail, mark) {
            if let Some(bytes) = tail.get(start + offset..start + offset + size) {
                let mut number = [0; 8];
                number[..size].copy_from_slice(bytes);
                most = most.max(Some(u64::from_le_bytes(number)));
            }
        }
        most
    };
    let short = numbers(b"PK\x05\x06", 10, 2)?;
    // A 64-bit end counts where something says where it lies.
    let located = memmem(&tail, b"PK\x06\x07").next().is_some();
    let long = numbers(b"PK\x06\x06", 32, 8).filter(|_| located);
    Some(long.unwrap_or_default().max(short))
}

fn memmem<'a>(text: &'a [u8], mark: &'a [u8; 4]) -> impl Iterator<Item = usize> + 'a {
    let windows = text.windows(mark.len()).enumerate();
    windows.filter_map(move |(at, window)| (window == mark).then_some(at))
}

fn hash(file: &mut impl Read, left: &mut u64) -> io::Result<Digest> {
    let mut hasher = Hasher::default();
    let mut chunk = vec![0; CHUNK];
    loop {
        let n = file.read(&mut chunk)?;
        if n == 0 {
            return Ok(hasher.finish());
        }
        *left = left
            .checked_sub(n as u64)
            .ok_or_else(|| io::Error::other("unpacks to too much"))?;
        hasher.update(&chunk[..n]);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Cursor, Write as _};

    use proptest::prelude::*;
    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;

    fn zip_of(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, bytes) in files {
            let options = SimpleFileOptions::default();
            match name.ends_with('/') {
                true => zip.add_directory(*name, options).unwrap(),
                false => zip.start_file(*name, options).unwrap(),
            }
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    #[test]
    fn the_hash_is_that_of_the_sorted_files() {
        let zip = zip_of(&[("b/x", b"2"), ("b/", b""), ("a", b"1")]);
        // By hand: printf '%s  a\n%s  b/x\n' … | sha256sum | xxd -r -p | base64
        let lines = format!("{}  a\n{}  b/x\n", Digest::of(b"1"), Digest::of(b"2"));
        let sum = STANDARD.encode(Digest::of(lines.as_bytes()).as_bytes());
        assert_eq!(h1(Cursor::new(zip)), Ok(format!("h1:{sum}")));
    }

    #[test]
    fn what_is_cut_damaged_or_has_a_zip_within_is_told() {
        let inner = zip_of(&[("deep", b"in it")]);
        let options =
            SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        let mut outer = ZipWriter::new(Cursor::new(Vec::new()));
        outer.start_file("inner.zip", options).unwrap();
        outer.write_all(&inner).unwrap();
        outer.start_file("more", options).unwrap();
        outer.write_all(&[7; 4000]).unwrap();
        let outer = outer.finish().unwrap().into_inner();
        assert!(h1(Cursor::new(&outer)).is_ok());
        for end in 0..outer.len() {
            assert!(h1(Cursor::new(&outer[..end])).is_err(), "{end}");
        }
        let mut damaged = outer.clone();
        let at = damaged.windows(4).position(|w| w == [7; 4]).unwrap();
        damaged[at] = 8;
        assert!(h1(Cursor::new(&damaged)).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..300), at in 0..200usize, to: u8) {
            let _ = h1(Cursor::new(&bytes));
            let mut zip = zip_of(&[("a", b"1"), ("b", b"22")]);
            if let Some(byte) = zip.get_mut(at) {
                *byte = to;
            }
            let _ = h1(Cursor::new(&zip));
        }
    }
}
