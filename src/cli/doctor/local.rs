//! What lies on this machine: configuration, data dir, disk, limits.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, StatVfs, StatVfsMountFlags, accessat, statvfs};
use rustix::process::{Resource, geteuid, getrlimit};

use super::super::{human, keyring, serve};
use super::{Case, Finding};
use crate::instance::lock_path;
use crate::store::list;

/// Below it hardly an archive finds room.
const FULL: u64 = 64 << 20;
const NEARLY_FULL: u64 = 1 << 30;
/// Each document and archive takes a few files.
const FEW_INODES: u64 = 1000;

pub fn config(case: &Case) -> Vec<Finding> {
    let files = [&case.config.htpasswd, &case.config.client_ca];
    let unreadable = files.into_iter().flatten().find_map(|path| {
        let e = fs::File::open(path).err()?;
        Some(format!(
            "{} cannot be read: {e}; mend that, or name another file",
            path.display()
        ))
    });
    let roots = serve::roots(&case.config).err().map(|exit| exit.message);
    let keys = keyring(&case.config).err().map(|exit| exit.message);
    let broken: Vec<_> = [unreadable, roots, keys].into_iter().flatten().collect();
    if !broken.is_empty() {
        let finding = |words: &String| Finding::from_words("config", words);
        return broken.iter().map(finding).collect();
    }
    let file = match &case.file {
        Some((path, _)) if path.exists() => format!("read {}", path.display()),
        Some((path, _)) => format!("defaults, for there is no {}", path.display()),
        None => "defaults".into(),
    };
    // Names alone: a value may hold a password.
    let variables = std::env::vars_os().filter(|(_, value)| !value.is_empty());
    let mut names: Vec<_> = variables
        .map(|(name, _)| name.to_string_lossy().into_owned())
        .filter(|name| name.starts_with("LARDER_"))
        .collect();
    names.sort();
    let found = match names.is_empty() {
        true => file,
        false => format!("{file}; set besides: {}", names.join(", ")),
    };
    vec![Finding::ok("config", found)]
}

pub fn data_dir(case: &Case) -> Vec<Finding> {
    let path = &case.config.data_dir;
    let one = |found| vec![found];
    let name = |mend: &str| format!("{mend}, or name another folder with --data-dir");
    let shown = path.display();
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return one(absent(path)),
        Err(e) => {
            let found = format!("{shown}: {e}");
            return one(Finding::fail("data dir", found, name("mend that")));
        }
    };
    if !meta.is_dir() {
        let found = format!("{shown} is no folder");
        return one(Finding::fail("data dir", found, name("remove it")));
    }
    if let Err(e) = may_write(path) {
        let found = format!("{shown} is not writable: {e}");
        return one(Finding::fail("data dir", found, name("make it writable")));
    }
    let mut findings = Vec::new();
    let (owner, user) = (meta.uid(), geteuid().as_raw());
    if owner != user {
        findings.push(Finding::warn(
            "data dir",
            format!("{shown} belongs to user {owner}, and this is user {user}"),
            "run larder as its owner: files of two users get into each other's way",
        ));
    }
    if meta.mode() & 0o022 != 0 {
        findings.push(Finding::warn(
            "data dir",
            format!(
                "{shown} is open for others to write ({:o})",
                meta.mode() & 0o7777
            ),
            format!("chmod go-w {shown}"),
        ));
    }
    let lock = lock_path(path);
    if let Err(e) = fs::File::open(&lock)
        && e.kind() != io::ErrorKind::NotFound
    {
        findings.push(Finding::warn(
            "data dir",
            format!(
                "{} cannot be read: {e}; so who serves it is not known",
                lock.display()
            ),
            "run this as the user that larder runs as",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok("data dir", format!("{shown} is writable")));
    }
    findings
}

fn absent(path: &Path) -> Finding {
    let shown = path.display();
    match may_write(existing(path)) {
        Ok(()) => Finding::warn(
            "data dir",
            format!("{shown} does not exist yet"),
            "nothing to do: the first `larder serve` or `larder run` makes it",
        ),
        Err(e) => Finding::fail(
            "data dir",
            format!(
                "{shown} does not exist, and cannot be made: {}: {e}",
                existing(path).display()
            ),
            "name another folder with --data-dir",
        ),
    }
}

/// The path itself, or the nearest folder above it that is there.
fn existing(path: &Path) -> &Path {
    let mut above = path.ancestors();
    above.find(|path| path.exists()).unwrap_or(Path::new("/"))
}

fn may_write(path: &Path) -> io::Result<()> {
    let all = Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK;
    Ok(accessat(CWD, path, all, AtFlags::EACCESS)?)
}

pub fn disk(case: &Case) -> Vec<Finding> {
    let place = existing(&case.config.data_dir);
    let finding = match statvfs(place) {
        Ok(disk) => judge_disk(case, place, &disk),
        Err(e) => Finding::fail(
            "disk",
            format!("{}: {e}", place.display()),
            "see whether its disk is there",
        ),
    };
    vec![finding]
}

fn judge_disk(case: &Case, place: &Path, disk: &StatVfs) -> Finding {
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    let found = format!("{} free at {}", human(free), place.display());
    let make_room = "make room, or name a folder on another disk with --data-dir";
    if disk.f_flag.contains(StatVfsMountFlags::RDONLY) {
        let found = format!("{} is mounted read-only", place.display());
        let mend = "mount it writable, or name another folder with --data-dir";
        return Finding::fail("disk", found, mend);
    }
    if free < FULL {
        return Finding::fail("disk", format!("only {found}"), make_room);
    }
    // Some file systems have no fixed number of them, and say 0.
    if disk.f_files > 0 && disk.f_favail < FEW_INODES {
        let found = format!("{found}, but only for {} files", disk.f_favail);
        return Finding::fail("disk", found, make_room);
    }
    let held: u64 = list(&case.config.data_dir).iter().map(|l| l.size).sum();
    let room = free.saturating_add(held);
    match case.config.max_size {
        Some(max) if max > room => Finding::warn(
            "disk",
            format!(
                "max_size is {}, but with {} held there is room for {} in all",
                human(max),
                human(held),
                human(room)
            ),
            "lower max_size (--max-size), or make room: a full disk means archives that are not kept",
        ),
        _ if free < NEARLY_FULL => Finding::warn("disk", format!("only {found}"), make_room),
        _ => Finding::ok("disk", format!("{found}, {} held", human(held))),
    }
}

/// The server raises its limit to the highest that it may have.
pub fn open_files(case: &Case) -> Vec<Finding> {
    let connections = case.config.limits.connections as u64;
    // A connection of a client, and what is open for it: a file, or a connection upstream.
    let wanted = connections.saturating_mul(2);
    let finding = match getrlimit(Resource::Nofile).maximum {
        Some(most) if most < wanted => Finding::warn(
            "open files",
            format!(
                "{most} at the most, but {connections} connections (max_connections) may want {wanted}"
            ),
            "raise the hard limit (ulimit -Hn, LimitNOFILE= of systemd), or lower max_connections",
        ),
        Some(most) => Finding::ok("open files", format!("{most} at the most")),
        None => Finding::ok("open files", "without limit"),
    };
    vec![finding]
}
