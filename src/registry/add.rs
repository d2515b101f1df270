//! Placing files in a private registry's folder: checked first, then each whole or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde_json::json;
use zip::ZipArchive;

use super::folder::{Folder, hash, open};
use super::layout::{
    Part, fits, is_protocol, is_provider_part, listed, part_of, protocols_in, public_keys,
};
use super::releases::KEYS;
use crate::terraform::dirhash;
use crate::terraform::own::ArchiveName;
use crate::terraform::signature::Tier;

/// What Terraform and Go know.
const SYSTEMS: [&str; 10] = [
    "aix",
    "darwin",
    "dragonfly",
    "freebsd",
    "illumos",
    "linux",
    "netbsd",
    "openbsd",
    "solaris",
    "windows",
];
const ARCHITECTURES: [&str; 14] = [
    "386", "amd64", "arm", "arm64", "loong64", "mips", "mips64", "mips64le", "mipsle", "ppc64",
    "ppc64le", "riscv64", "s390x", "wasm",
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
pub struct Request<'a> {
    pub folder: &'a Folder,
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
    for protocol in request.protocols.iter().filter(|p| !is_protocol(p)) {
        wrong.push(format!(
            "{protocol}: not a protocol; it would be such as 5.0"
        ));
    }
    let mut placements = Vec::new();
    for file in request.files {
        let checked = check_file(request, file).and_then(|placement| {
            is_free(request.root, &placement)?;
            Ok(placement)
        });
        match checked {
            Ok(placement) => placements.push(placement),
            Err(why) => wrong.push(format!("{}: {why}", file.display())),
        }
    }
    if wrong.is_empty() {
        for (name, version) in releases_of(&placements) {
            if let Err(why) = check_together(request, &placements, (&name, &version)) {
                wrong.push(format!("{name} {version}: {why}"));
            }
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
    let failed = |e: io::Error| format!("{}: {e}", to.display());
    if is_free(root, placement)? == Free::There {
        return Ok(false);
    }
    let dir = to.parent().unwrap_or(root);
    fs::create_dir_all(dir).map_err(failed)?;
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    // Hidden from the registry, and on the same disk.
    let temporary = dir.join(format!(".{name}.{}", std::process::id()));
    let copied = fs::copy(&placement.from, &temporary).and_then(|_| {
        // For whoever serves it.
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o644))?;
        fs::File::open(&temporary)?.sync_all()
    });
    let named = copied.and_then(|()| name_it(&temporary, &to));
    let _ = fs::remove_file(&temporary);
    match named {
        Ok(()) => fs::File::open(dir)
            .and_then(|dir| dir.sync_all())
            .map(|()| true)
            .map_err(failed),
        // Somebody was faster.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            is_free(root, placement).map(|_| false)
        }
        Err(e) => Err(failed(e)),
    }
}

/// Gives a file a name that nobody has.
fn name_it(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from, to) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(e),
        // A file system without links.
        Err(_) if fs::symlink_metadata(to).is_err() => fs::rename(from, to),
        linked => linked,
    }
}

#[derive(PartialEq)]
enum Free {
    Yes,
    /// The same file is there already.
    There,
}

/// Whether a file can have its place, which must be within the folder.
fn is_free(root: &Path, placement: &Placement) -> Result<Free, String> {
    let to = root.join(&placement.to);
    let real_root = fs::canonicalize(root).map_err(|e| format!("{}: {e}", root.display()))?;
    let existing = to.ancestors().skip(1).find(|dir| dir.exists());
    let real = existing.and_then(|dir| fs::canonicalize(dir).ok());
    if !real.is_some_and(|real| real.starts_with(&real_root)) {
        return Err(format!(
            "{} leads out of the folder by a link",
            to.display()
        ));
    }
    if fs::symlink_metadata(&to).is_err() {
        return Ok(Free::Yes);
    }
    let digest = |path: &Path| hash(path).map_err(|e| format!("{}: {e}", path.display()));
    match digest(&placement.from)? == digest(&to)? {
        true => Ok(Free::There),
        false => Err(format!(
            "{} is there with other content; a released version does not change: give it another version, or remove the file first",
            to.display()
        )),
    }
}

/// The manifests that say which protocols the added versions speak, where none does yet.
pub fn manifests(request: &Request<'_>, placements: &[Placement]) -> Vec<(PathBuf, String)> {
    if request.protocols.is_empty() {
        return Vec::new();
    }
    let versions = request.protocols;
    let text = json!({ "version": 1, "metadata": { "protocol_versions": versions } }).to_string();
    let names = releases_of(placements).into_iter().map(|(name, version)| {
        let file = format!("terraform-provider-{name}_{version}_manifest.json");
        Path::new(request.namespace).join(&name).join(file)
    });
    let missing = names.filter(|to| {
        let comes = placements.iter().any(|placement| placement.to == *to);
        !comes && fs::symlink_metadata(request.root.join(to)).is_err()
    });
    missing.map(|to| (to, text.clone())).collect()
}

/// Type and version of the archives among them.
fn releases_of(placements: &[Placement]) -> BTreeSet<(String, String)> {
    let names = placements
        .iter()
        .filter_map(|placement| placement.to.file_name()?.to_str());
    let releases = names.filter_map(|name| {
        if let Some(archive) = ArchiveName::parse(name) {
            return Some((archive.name, archive.version));
        }
        let (name, version, _) = part_of(name)?;
        Some((name.to_owned(), version.to_owned()))
    });
    releases.collect()
}

fn check_file(request: &Request<'_>, file: &Path) -> Result<Placement, String> {
    let name = file
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or("has no name")?;
    if !fs::metadata(file).map_err(|e| e.to_string())?.is_file() {
        return Err("is no file".into());
    }
    let namespace = Path::new(request.namespace);
    let placed = |ty: &str| {
        if !is_provider_part(request.namespace, ty) {
            return Err(format!(
                "{}/{ty} cannot be asked for: lower-case letters, digits and single hyphens",
                request.namespace
            ));
        }
        Ok(Placement {
            from: file.to_owned(),
            to: namespace.join(ty).join(name),
        })
    };
    if name.ends_with(".asc") {
        public_keys(&small(file)?)?;
        let keys = placed("x").map(|_| namespace.join(KEYS))?;
        return Ok(Placement {
            from: file.to_owned(),
            to: keys.join(name),
        });
    }
    if let Some(archive) = ArchiveName::parse(name) {
        check_archive(file, &archive)?;
        return placed(&archive.name);
    }
    let (ty, _, part) = part_of(name).ok_or("has a wrong name; it would be terraform-provider-TYPE_VERSION_OS_ARCH.zip, …_VERSION_SHA256SUMS, …_SHA256SUMS.sig, …_VERSION_manifest.json, or a public key NAME.asc")?;
    let bytes = small(file)?;
    match part {
        Part::Sums => listed(&bytes).map(|_| ())?,
        Part::Manifest => protocols_in(&bytes).map(|_| ())?,
        Part::Signature if bytes.is_empty() => return Err("is empty".into()),
        Part::Signature => {}
    }
    placed(ty)
}

fn check_archive(file: &Path, archive: &ArchiveName) -> Result<(), String> {
    let (os, arch) = (&*archive.os, &*archive.arch);
    if !SYSTEMS.contains(&os) || !ARCHITECTURES.contains(&arch) {
        return Err(format!("{os}_{arch} is no platform of Terraform's"));
    }
    dirhash::h1(open(file)?)?;
    let header = executable_header(file, archive)?;
    match platform_in(&header) {
        Some(found) if !found.fits(os, arch) => {
            Err(format!("holds a program for {found}, not for {os}_{arch}"))
        }
        _ => Ok(()),
    }
}

/// Whether what is there and what comes make a release that is served: sums that fit every archive,
/// and a signature that is good.
fn check_together(
    request: &Request<'_>,
    placements: &[Placement],
    (name, version): (&str, &str),
) -> Result<(), String> {
    let folder = request.root.join(request.namespace).join(name);
    let there = fs::read_dir(&folder).into_iter().flatten().flatten();
    let there = there.map(|entry| entry.path());
    let mut all: BTreeMap<String, PathBuf> = BTreeMap::new();
    let coming = placements
        .iter()
        .filter(|one| one.to.starts_with(Path::new(request.namespace).join(name)));
    for path in there.chain(coming.map(|one| one.from.clone())) {
        if let Some(file) = path.file_name().and_then(|name| name.to_str()) {
            all.insert(file.to_owned(), path.clone());
        }
    }
    let stem = format!("terraform-provider-{name}_{version}");
    let Some(sums_file) = all.get(&format!("{stem}_SHA256SUMS")) else {
        return Ok(());
    };
    let bytes = small(sums_file)?;
    let sums = listed(&bytes)?;
    for (file, path) in &all {
        let archive = ArchiveName::parse(file);
        if archive.is_some_and(|archive| archive.name == name && archive.version == version) {
            let digest = hash(path).map_err(|e| format!("{}: {e}", path.display()))?;
            fits(Some(&sums), file, digest).map_err(|why| format!("{}: {why}", path.display()))?;
        }
    }
    let signature = all.get(&format!("{stem}_SHA256SUMS.sig"));
    let Some(signature) = signature else {
        return Ok(());
    };
    let mut keys = request.folder.keys(request.namespace, name);
    for placement in placements
        .iter()
        .filter(|one| one.to.extension().is_some_and(|e| e == "asc"))
    {
        keys.extend(public_keys(&small(&placement.from)?)?);
    }
    let judgement = request.folder.judge(&bytes, &small(signature)?, &keys);
    match judgement.tier {
        Tier::Bad => Err(format!(
            "{}: is no good signature ({})",
            signature.display(),
            judgement.why.unwrap_or_default()
        )),
        _ => Ok(()),
    }
}

/// The beginning of the provider's program.
fn executable_header(file: &Path, archive: &ArchiveName) -> Result<Vec<u8>, String> {
    let mut zip = ZipArchive::new(open(file)?).map_err(|e| e.to_string())?;
    let wanted = format!("terraform-provider-{}", archive.name);
    for i in 0..zip.len() {
        let mut entry = zip.by_index(i).map_err(|e| e.to_string())?;
        let fits = entry
            .name()
            .is_ok_and(|name| name.starts_with(&wanted) && !name.contains(['/', '\\']));
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
