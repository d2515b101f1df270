//! Placing files in a private registry's folder: checked first, then each whole or not at all.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use zip::ZipArchive;

use super::folder::{is_protocol, open, protocols_in};
use super::key;
use crate::digest::{Digest, Hasher};
use crate::terraform::dirhash;
use crate::terraform::own::{ArchiveName, is_part};
use crate::terraform::sums::Sums;

/// What Terraform and Go know.
const SYSTEMS: [&str; 8] = [
    "darwin",
    "dragonfly",
    "freebsd",
    "linux",
    "netbsd",
    "openbsd",
    "solaris",
    "windows",
];
const ARCHITECTURES: [&str; 10] = [
    "386", "amd64", "arm", "arm64", "loong64", "mips", "ppc64le", "riscv64", "s390x", "wasm",
];
const SMALL: u64 = 16 << 20;

/// A file that was found right, and where it goes.
#[derive(Debug)]
pub struct Placement {
    pub from: PathBuf,
    /// Within the registry's folder
    pub to: PathBuf,
}

/// What is to be added.
#[derive(Debug)]
pub struct Request<'a> {
    pub root: &'a Path,
    pub namespace: &'a str,
    pub files: &'a [PathBuf],
    /// For versions that come without a manifest; none: as it is
    pub protocols: &'a [String],
}

/// Checks all files, and what they would make together with what is there (blocking).
///
/// # Errors
/// A line for each file that is wrong; nothing was placed.
pub fn check(request: &Request<'_>) -> Result<Vec<Placement>, Vec<String>> {
    let mut wrong = Vec::new();
    if !is_part(request.namespace) {
        wrong.push(format!(
            "{}: not a namespace; it has letters, digits and hyphens",
            request.namespace
        ));
    }
    for protocol in request
        .protocols
        .iter()
        .filter(|protocol| !is_protocol(protocol))
    {
        wrong.push(format!(
            "{protocol}: not a protocol; it would be such as 5.0"
        ));
    }
    let mut placements = Vec::new();
    for file in request.files {
        match check_file(request, file) {
            Ok(to) => placements.push(Placement {
                from: file.clone(),
                to,
            }),
            Err(why) => wrong.push(format!("{}: {why}", file.display())),
        }
    }
    // Archives last: what they need is there before they are seen.
    placements.sort_by_key(|one| one.to.extension().is_some_and(|ending| ending == "zip"));
    match wrong.is_empty() {
        true => Ok(placements),
        false => Err(wrong),
    }
}

/// Copies a checked file to its place (blocking). False if it was there already.
///
/// # Errors
/// Where another file has its name, or the disk fails.
pub fn place(root: &Path, placement: &Placement) -> Result<bool, String> {
    let to = root.join(&placement.to);
    let failed = |e: std::io::Error| format!("{}: {e}", to.display());
    if to.exists() {
        let same = digest(&placement.from).map_err(failed)? == digest(&to).map_err(failed)?;
        return match same {
            true => Ok(false),
            false => Err(format!(
                "{}: is there with other content; a released version does not change: give it another version, or remove the file first",
                to.display()
            )),
        };
    }
    let dir = to.parent().unwrap_or(root);
    fs::create_dir_all(dir).map_err(failed)?;
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    // Hidden from the registry, and on the same disk.
    let temporary = dir.join(format!(".{name}.{}", std::process::id()));
    let placed = fs::copy(&placement.from, &temporary)
        .and_then(|_| fs::File::open(&temporary)?.sync_all())
        .and_then(|()| fs::hard_link(&temporary, &to).or_else(|_| fs::rename(&temporary, &to)))
        .and_then(|()| fs::File::open(dir)?.sync_all());
    let _ = fs::remove_file(&temporary);
    placed.map_err(failed)?;
    Ok(true)
}

/// The manifests that say which protocols the added versions speak, where none does yet.
pub fn manifests(request: &Request<'_>, placements: &[Placement]) -> Vec<(PathBuf, String)> {
    let mut manifests = Vec::new();
    for placement in placements {
        let name = placement
            .to
            .file_name()
            .unwrap_or_default()
            .to_string_lossy();
        let Some(archive) = ArchiveName::parse(&name).filter(|_| !request.protocols.is_empty())
        else {
            continue;
        };
        let file = format!(
            "terraform-provider-{}_{}_manifest.json",
            archive.name, archive.version
        );
        let to = placement.to.with_file_name(file);
        if !manifests.iter().any(|(other, _)| *other == to) {
            let versions = request.protocols;
            let text =
                serde_json::json!({ "version": 1, "metadata": { "protocol_versions": versions } });
            manifests.push((to, text.to_string()));
        }
    }
    manifests
}

fn check_file(request: &Request<'_>, file: &Path) -> Result<PathBuf, String> {
    let name = file
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or("has no name")?;
    if !fs::metadata(file).map_err(|e| e.to_string())?.is_file() {
        return Err("is no file".into());
    }
    let namespace = Path::new(request.namespace);
    if name.ends_with(".asc") {
        let text = String::from_utf8(small(file)?).map_err(|_| "is no armored key")?;
        if text.contains("PRIVATE KEY") {
            return Err("holds a private key; export the public one".into());
        }
        key::id_of(&text).ok_or("is no OpenPGP public key")?;
        return Ok(namespace.join(super::folder::KEYS).join(name));
    }
    if let Some(archive) = ArchiveName::parse(name) {
        check_archive(request, file, &archive)?;
        return Ok(namespace.join(&archive.name).join(name));
    }
    let of = name.strip_prefix("terraform-provider-").and_then(|rest| {
        let (ty, rest) = rest.split_once('_')?;
        let (_, kind) = rest.split_once('_')?;
        Some((ty, kind))
    });
    match of {
        Some((ty, "SHA256SUMS")) if is_part(ty) => {
            Sums::parse(&small(file)?)?;
            Ok(namespace.join(ty).join(name))
        }
        Some((ty, kind)) if is_part(ty) && kind.starts_with("SHA256SUMS.") && kind.ends_with(".sig") => {
            match small(file)?.is_empty() {
                true => Err("is empty".into()),
                false => Ok(namespace.join(ty).join(name)),
            }
        }
        Some((ty, "manifest.json")) if is_part(ty) => {
            protocols_in(&small(file)?)?;
            Ok(namespace.join(ty).join(name))
        }
        _ => Err("has a wrong name; it would be terraform-provider-TYPE_VERSION_OS_ARCH.zip, …_VERSION_SHA256SUMS, …_SHA256SUMS.sig, …_VERSION_manifest.json, or a public key NAME.asc".into()),
    }
}

fn check_archive(request: &Request<'_>, file: &Path, archive: &ArchiveName) -> Result<(), String> {
    let (os, arch) = (&*archive.os, &*archive.arch);
    if !SYSTEMS.contains(&os) || !ARCHITECTURES.contains(&arch) {
        return Err(format!("{os}_{arch} is no platform of Terraform's"));
    }
    dirhash::h1(open(file)?)?;
    let header = executable_header(file, archive)?;
    if let Some(found) = platform_in(&header)
        && !found.fits(os, arch)
    {
        return Err(format!("holds a program for {found}, not for {os}_{arch}"));
    }
    // By the sums that come along, or else by those that lie there.
    let sums_name = format!(
        "terraform-provider-{}_{}_SHA256SUMS",
        archive.name, archive.version
    );
    let given = request
        .files
        .iter()
        .find(|path| path.file_name().is_some_and(|name| *name == *sums_name));
    let there = request
        .root
        .join(request.namespace)
        .join(&archive.name)
        .join(&sums_name);
    let sums = given.cloned().or_else(|| there.is_file().then_some(there));
    let Some(sums) = sums else {
        return Ok(());
    };
    let listed = Sums::parse(&small(&sums)?)?.digest_of(&archive.to_string());
    let found = digest(file).map_err(|e| e.to_string())?;
    match listed {
        Some(listed) if listed == found => Ok(()),
        Some(listed) => Err(format!(
            "has SHA-256 {found}, but {} says {listed}",
            sums.display()
        )),
        None => Err(format!(
            "{} does not list it; add sums that do",
            sums.display()
        )),
    }
}

/// The beginning of the provider's program.
fn executable_header(file: &Path, archive: &ArchiveName) -> Result<Vec<u8>, String> {
    let mut zip = ZipArchive::new(open(file)?).map_err(|e| e.to_string())?;
    let wanted = format!("terraform-provider-{}", archive.name);
    for i in 0..zip.len() {
        let mut entry = zip.by_index(i).map_err(|e| e.to_string())?;
        let fits = entry.name().is_ok_and(|name| name.starts_with(&wanted));
        if fits && entry.is_file() {
            let mut header = Vec::new();
            let read = entry.by_ref().take(4096).read_to_end(&mut header);
            read.map_err(|e| e.to_string())?;
            return Ok(header);
        }
    }
    Err(format!(
        "holds no program {wanted}…, which Terraform would run"
    ))
}

/// What a program says that it runs on; a part is none where it does not say.
#[derive(Debug, PartialEq)]
struct Found {
    systems: &'static [&'static str],
    arch: Option<&'static str>,
}

impl Found {
    fn fits(&self, os: &str, arch: &str) -> bool {
        self.systems.contains(&os) && self.arch.is_none_or(|own| own == arch)
    }
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.systems[0])?;
        match self.arch {
            Some(arch) => write!(f, "_{arch}"),
            None => Ok(()),
        }
    }
}

/// Told from the headers of ELF, Mach-O and PE files; none for scripts and the like.
fn platform_in(header: &[u8]) -> Option<Found> {
    let half = |at: usize| Some(u16::from_le_bytes(header.get(at..at + 2)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_le_bytes(header.get(at..at + 4)?.try_into().ok()?));
    if header.starts_with(b"\x7fELF") {
        let little = header.get(5) == Some(&1);
        let arch = match half(18).filter(|_| little) {
            Some(3) => Some("386"),
            Some(62) => Some("amd64"),
            Some(40) => Some("arm"),
            Some(183) => Some("arm64"),
            _ => None,
        };
        let systems = &[
            "linux",
            "freebsd",
            "netbsd",
            "openbsd",
            "dragonfly",
            "solaris",
        ];
        return Some(Found { systems, arch });
    }
    if word(0) == Some(0xfeed_facf) {
        let arch = match word(4) {
            Some(0x0100_0007) => Some("amd64"),
            Some(0x0100_000c) => Some("arm64"),
            _ => None,
        };
        return Some(Found {
            systems: &["darwin"],
            arch,
        });
    }
    if header.starts_with(b"MZ") {
        let at = word(0x3c)? as usize;
        let arch = match half(at.checked_add(4)?) {
            Some(0x14c) => Some("386"),
            Some(0x8664) => Some("amd64"),
            Some(0xaa64) => Some("arm64"),
            _ => None,
        };
        return Some(Found {
            systems: &["windows"],
            arch,
        });
    }
    None
}

fn small(path: &Path) -> Result<Vec<u8>, String> {
    let size = fs::metadata(path).map_err(|e| e.to_string())?.len();
    if size > SMALL {
        return Err("is too large".into());
    }
    fs::read(path).map_err(|e| e.to_string())
}

fn digest(path: &Path) -> std::io::Result<Digest> {
    let mut file = fs::File::open(path)?;
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finish()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn programs_say_what_they_run_on() {
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18] = 183;
        let found = platform_in(&elf).unwrap();
        assert!(found.fits("linux", "arm64") && found.fits("freebsd", "arm64"));
        assert!(!found.fits("linux", "amd64") && !found.fits("windows", "arm64"));
        let macho = [0xcf, 0xfa, 0xed, 0xfe, 7, 0, 0, 1];
        assert!(platform_in(&macho).unwrap().fits("darwin", "amd64"));
        let mut pe = vec![0; 256];
        pe[..2].copy_from_slice(b"MZ");
        pe[0x3c] = 0x80;
        pe[0x84..0x86].copy_from_slice(&[0x4c, 0x01]);
        assert!(platform_in(&pe).unwrap().fits("windows", "386"));
        assert_eq!(platform_in(b"#!/bin/sh"), None);
        assert_eq!(platform_in(b""), None);
    }
}
