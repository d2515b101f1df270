//! A folder of releases: what is in it, and what is wrong with what is not served of it. All of it
//! reads the disk (blocking); what was found of a file holds until the file changes.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::UNIX_EPOCH;

use flate2::read::MultiGzDecoder;
use moka::sync::Cache;

use crate::digest::{Digest, Hasher};
use crate::terraform::dirhash;
use crate::terraform::own::{ArchiveName, is_part, is_version};
use crate::terraform::signature::{Judgement, Keyring, NamedKey, Tier};
use crate::terraform::sums::Sums;

/// Files of one folder, and of all together.
const FILES: usize = 20_000;
const REMEMBERED: usize = 200_000;
/// Sums, signatures, keys, manifests and documents.
const SMALL: u64 = 16 << 20;
const JUDGEMENTS: u64 = 10_000;
const BUFFER: usize = 256 << 10;
/// What a module may unpack to.
const UNPACKED: u64 = 16 << 30;
/// The folder of public keys, at each level.
pub const KEYS: &str = "keys";

/// A folder by the layout `NAMESPACE/TYPE/terraform-provider-TYPE_VERSION_OS_ARCH.zip`.
pub struct Folder {
    root: PathBuf,
    memory: Mutex<HashMap<PathBuf, (Stamp, Checked)>>,
    /// What is wrong with it, by path
    problems: Mutex<BTreeMap<PathBuf, String>>,
    keyring: Arc<Keyring>,
    judgements: Cache<Digest, Judgement>,
}

/// What changes with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// What was found of an archive.
#[derive(Clone, Debug)]
struct Checked {
    digest: Digest,
    /// Whether it is whole; the words say what is wrong
    whole: Result<(), String>,
}

/// A version of a provider, with what of it may be served.
#[derive(Clone, Debug, Default)]
pub struct Release {
    pub archives: Vec<Archive>,
    /// As it lies in the folder; none where there is none
    pub sums: Option<Vec<u8>>,
    pub signature: Option<Vec<u8>>,
    /// `protocol_versions` of its manifest
    pub protocols: Option<Vec<String>>,
}

/// An archive that was found right.
#[derive(Clone, Debug)]
pub struct Archive {
    pub name: ArchiveName,
    pub digest: Digest,
}

/// A file of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packed {
    TarGz,
    Zip,
}

impl Packed {
    pub fn ending(self) -> &'static str {
        match self {
            Self::TarGz => ".tar.gz",
            Self::Zip => ".zip",
        }
    }
}

/// Whether files that are new are read, or passed over and counted as pending.
#[derive(Debug, Default)]
pub struct Look {
    pub only_known: bool,
    pub pending: Cell<bool>,
}

/// What is wrong with a file, by its path within the folder.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Problem {
    pub path: PathBuf,
    pub why: String,
}

impl Folder {
    /// # Errors
    /// When the folder cannot be found.
    pub fn open(root: &Path, keyring: Arc<Keyring>) -> std::io::Result<Self> {
        Ok(Self {
            root: fs::canonicalize(root)?,
            memory: Mutex::default(),
            problems: Mutex::default(),
            judgements: Cache::new(JUDGEMENTS),
            keyring,
        })
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

    /// Looks at everything. Returns how many providers and modules there are.
    pub fn survey(&self) -> (usize, usize) {
        self.forget_what_is_gone();
        let look = &Look::default();
        let (mut providers, mut modules) = (0, 0);
        for namespace in self.folders(Path::new("")) {
            for name in self.folders(&namespace) {
                let [ns, ty] = [&namespace, &name].map(|path| last(path));
                let releases = self.releases(&ns, &ty, look);
                let documents = self.resolve(&name.join("versions.json"));
                providers += usize::from(!releases.is_empty() || documents.is_some());
                for system in self.folders(&name) {
                    let system = last(&system);
                    if !is_version(&system) {
                        let versions = self.module_versions(&ns, &ty, &system, look);
                        modules += usize::from(!versions.is_empty());
                    }
                }
            }
        }
        (providers, modules)
    }

    /// The releases of a provider, by version.
    pub fn releases(&self, namespace: &str, name: &str, look: &Look) -> BTreeMap<String, Release> {
        let folder = Path::new(namespace).join(name);
        let files = self.files(&folder);
        let mut named: BTreeMap<String, Vec<ArchiveName>> = BTreeMap::new();
        for file in &files {
            match ArchiveName::parse(file) {
                Some(archive) if archive.name == name => {
                    named.entry(archive.version.clone()).or_default().push(archive);
                }
                Some(_) => self.refuse(&folder.join(file), format!("is not of {name}, in whose folder it lies")),
                None if file.ends_with(".zip") => self.refuse(
                    &folder.join(file),
                    format!("has a wrong name; it would be terraform-provider-{name}_VERSION_OS_ARCH.zip"),
                ),
                None => {}
            }
        }
        let releases = named.into_iter().map(|(version, archives)| {
            let mut release = self.release((&folder, name, &version), archives, &files, look);
            self.check_signature((&folder, namespace, name, &version), &mut release, &files);
            (version, release)
        });
        releases
            .filter(|(_, release)| !release.archives.is_empty())
            .collect()
    }

    fn release(
        &self,
        (folder, name, version): (&Path, &str, &str),
        archives: Vec<ArchiveName>,
        files: &HashSet<String>,
        look: &Look,
    ) -> Release {
        let stem = format!("terraform-provider-{name}_{version}");
        let sums_name = format!("{stem}_SHA256SUMS");
        let given = files.contains(&sums_name);
        let sums = given.then(|| self.read(&folder.join(&sums_name))).flatten();
        if given && sums.is_none() {
            return Release::default();
        }
        let parsed = sums.as_deref().map(Sums::parse).transpose();
        let parsed = match parsed {
            Ok(parsed) => parsed,
            Err(why) => {
                self.refuse(
                    &folder.join(&sums_name),
                    format!("{why}; nothing of {version} is served"),
                );
                return Release::default();
            }
        };
        let signature_name = signature_name(files, &sums_name);
        let mut release = Release {
            signature: signature_name.and_then(|name| self.read(&folder.join(name))),
            protocols: self.protocols(folder, &stem, files),
            sums,
            archives: Vec::new(),
        };
        for archive in archives {
            let path = folder.join(archive.to_string());
            match self.check(&path, parsed.as_ref(), &archive, look) {
                Ok(digest) => {
                    self.accept(&path);
                    release.archives.push(Archive {
                        name: archive,
                        digest,
                    });
                }
                Err(Some(why)) => self.refuse(&path, why),
                // Refused where it was resolved.
                Err(None) => {}
            }
        }
        release
    }

    /// Refuses a release whose publisher's signature is bad, as Terraform would.
    fn check_signature(
        &self,
        (folder, namespace, name, version): (&Path, &str, &str, &str),
        release: &mut Release,
        files: &HashSet<String>,
    ) {
        let (Some(sums), Some(signature)) = (&release.sums, &release.signature) else {
            return;
        };
        let sums_name = format!("terraform-provider-{name}_{version}_SHA256SUMS");
        let path = folder.join(signature_name(files, &sums_name).unwrap_or(&sums_name));
        let keys = self.keys(namespace, name);
        let judgement = self.judge(sums, signature, &keys);
        match judgement.tier {
            Tier::Bad => {
                let why = judgement.why.unwrap_or_default();
                self.refuse(&path, format!("is no good signature ({why}); nothing of {version} is served"));
                release.archives.clear();
            }
            Tier::Unsigned => self.refuse(
                &path,
                format!("no public key in {KEYS}/ can check it, which Terraform needs; put the publisher's there"),
            ),
            _ => self.accept(&path),
        }
    }

    /// What a publisher's own signature is worth.
    pub fn judge(&self, sums: &[u8], signature: &[u8], keys: &[String]) -> Judgement {
        let mut hasher = Hasher::default();
        let keys_bytes = keys.iter().map(|key| key.as_bytes());
        for part in [sums, signature].into_iter().chain(keys_bytes) {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        self.judgements.get_with(hasher.finish(), || {
            let named: Vec<NamedKey> = keys
                .iter()
                .map(|key| NamedKey {
                    ascii_armor: key.clone(),
                    trust_signature: String::new(),
                })
                .collect();
            let now = UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
            self.keyring.judge(sums, signature, &named, now)
        })
    }

    /// The digest of an archive that may be served.
    fn check(
        &self,
        path: &Path,
        sums: Option<&Sums>,
        archive: &ArchiveName,
        look: &Look,
    ) -> Result<Digest, Option<String>> {
        let whole = |path: &Path| dirhash::h1(open(path)?).map(|_| ());
        let checked = self.examined(path, look, whole)?;
        checked.whole.map_err(Some)?;
        if let Some(sums) = sums {
            match sums.digest_of(&archive.to_string()) {
                Some(listed) if listed == checked.digest => {}
                Some(listed) => {
                    return Err(Some(format!(
                        "has SHA-256 {}, but SHA256SUMS says {listed}",
                        checked.digest
                    )));
                }
                None => return Err(Some("is not listed in SHA256SUMS".into())),
            }
        }
        Ok(checked.digest)
    }

    /// What is known of a file, found anew if it has changed. Without words it was refused before, or
    /// is pending.
    fn examined(
        &self,
        path: &Path,
        look: &Look,
        whole: impl FnOnce(&Path) -> Result<(), String>,
    ) -> Result<Checked, Option<String>> {
        let real = self.resolve(path).ok_or(None)?;
        let stamp = Stamp::of(&real).map_err(|e| Some(format!("cannot be read: {e}")))?;
        if let Some((known, checked)) = lock(&self.memory).get(path)
            && *known == stamp
        {
            return Ok(checked.clone());
        }
        if look.only_known {
            look.pending.set(true);
            return Err(None);
        }
        let digest = hash(&real).map_err(|e| Some(format!("cannot be read: {e}")))?;
        let checked = Checked {
            digest,
            whole: whole(&real),
        };
        if Stamp::of(&real).ok() != Some(stamp) {
            return Err(Some("is being written; it is looked at again".into()));
        }
        let mut memory = lock(&self.memory);
        if memory.len() >= REMEMBERED {
            memory.clear();
        }
        memory.insert(path.to_owned(), (stamp, checked.clone()));
        Ok(checked)
    }

    fn protocols(&self, folder: &Path, stem: &str, files: &HashSet<String>) -> Option<Vec<String>> {
        let names = [
            format!("{stem}_manifest.json"),
            "manifest.json".into(),
            "terraform-registry-manifest.json".into(),
        ];
        let name = names.iter().find(|name| files.contains(*name))?;
        let path = folder.join(name);
        match protocols_in(&self.read(&path)?) {
            Ok(protocols) => {
                self.accept(&path);
                Some(protocols)
            }
            Err(why) => {
                self.refuse(&path, format!("{why}; protocol 5.0 is taken for granted"));
                None
            }
        }
    }

    /// The public keys of a provider: those of the nearest folder that has any.
    pub fn keys(&self, namespace: &str, name: &str) -> Vec<String> {
        let namespace = Path::new(namespace);
        let folders = [namespace.join(name), namespace.to_owned(), PathBuf::new()];
        for folder in folders.map(|folder| folder.join(KEYS)) {
            let mut names: Vec<String> = self.files(&folder).into_iter().collect();
            names.retain(|name| name.ends_with(".asc"));
            names.sort();
            let keys: Vec<String> = names
                .iter()
                .filter_map(|name| String::from_utf8(self.read(&folder.join(name))?).ok())
                .collect();
            if !keys.is_empty() {
                return keys;
            }
        }
        Vec::new()
    }

    /// The versions of a module, and how each is packed.
    pub fn module_versions(
        &self,
        namespace: &str,
        name: &str,
        system: &str,
        look: &Look,
    ) -> BTreeMap<String, Packed> {
        let folder = Path::new(namespace).join(name).join(system);
        let mut versions = BTreeMap::new();
        for file in self.files(&folder) {
            let packed = [Packed::TarGz, Packed::Zip];
            let packed = packed
                .into_iter()
                .find_map(|packed| Some((file.strip_suffix(packed.ending())?, packed)));
            let path = folder.join(&file);
            let (version, packed) = match packed {
                Some((version, packed)) if is_version(version) => (version, packed),
                Some(_) => {
                    self.refuse(
                        &path,
                        "has a wrong name; it would be VERSION.tar.gz or VERSION.zip".into(),
                    );
                    continue;
                }
                None => continue,
            };
            let whole = |path: &Path| match packed {
                Packed::Zip => dirhash::h1(open(path)?).map(|_| ()),
                Packed::TarGz => gunzip(path),
            };
            match self
                .examined(&path, look, whole)
                .map(|checked| checked.whole)
            {
                Ok(Ok(())) => {
                    self.accept(&path);
                    versions.insert(version.to_owned(), packed);
                }
                Ok(Err(why)) | Err(Some(why)) => self.refuse(&path, why),
                Err(None) => {}
            }
        }
        versions
    }

    /// A small file, whole.
    pub fn read(&self, path: &Path) -> Option<Vec<u8>> {
        let real = self.resolve(path)?;
        let mut bytes = Vec::new();
        let read = File::open(&real).and_then(|file| file.take(SMALL + 1).read_to_end(&mut bytes));
        match read {
            Ok(n) if n as u64 <= SMALL => Some(bytes),
            Ok(_) => {
                self.refuse(path, "is too large".into());
                None
            }
            Err(e) => {
                self.refuse(path, format!("cannot be read: {e}"));
                None
            }
        }
    }

    /// Opens an archive that [`Self::releases`] or [`Self::module_versions`] showed, if it is still
    /// the same.
    pub fn open_archive(&self, path: &Path) -> Option<(File, fs::Metadata)> {
        let file = File::open(self.resolve(path)?).ok()?;
        let metadata = file.metadata().ok()?;
        let known = lock(&self.memory).get(path).map(|(stamp, _)| *stamp);
        (known == Some(Stamp::from(&metadata))).then_some((file, metadata))
    }

    /// Where a path within the folder leads, if that is a file within it.
    fn resolve(&self, path: &Path) -> Option<PathBuf> {
        let real = match fs::canonicalize(self.root.join(path)) {
            Ok(real) => real,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                if self.root.join(path).is_symlink() {
                    self.refuse(path, "is a link to what is not there".into());
                }
                return None;
            }
            Err(e) => {
                self.refuse(path, format!("cannot be read: {e}"));
                return None;
            }
        };
        if !real.starts_with(&self.root) {
            self.refuse(path, "is a link out of the folder".into());
            return None;
        }
        if !fs::metadata(&real).is_ok_and(|m| m.is_file()) {
            return None;
        }
        Some(real)
    }

    /// The names of what lies in a folder, without what is hidden.
    fn entries(&self, folder: &Path) -> Vec<String> {
        let at = self.root.join(folder);
        if fs::canonicalize(&at).is_ok_and(|real| !real.starts_with(&self.root)) {
            self.refuse(folder, "is a link out of the folder".into());
            return Vec::new();
        }
        let entries = fs::read_dir(at).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<String> = names
            .filter(|name| !name.starts_with('.'))
            .take(FILES + 1)
            .collect();
        if names.len() > FILES {
            self.refuse(
                folder,
                format!("holds more than {FILES} files; the rest is not served"),
            );
            names.truncate(FILES);
        }
        names
    }

    fn files(&self, folder: &Path) -> HashSet<String> {
        self.entries(folder).into_iter().collect()
    }

    /// The folders within one that may be namespaces, types, names or systems.
    fn folders(&self, folder: &Path) -> Vec<PathBuf> {
        let names = self.entries(folder).into_iter();
        let paths = names.filter(|name| is_part(name) && name != KEYS);
        let paths = paths.map(|name| folder.join(name));
        paths.filter(|path| self.root.join(path).is_dir()).collect()
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Notes what is wrong with a file; it is logged once.
    pub fn refuse(&self, path: &Path, why: String) {
        let mut problems = lock(&self.problems);
        let news = problems.get(path) != Some(&why);
        if news && problems.len() < FILES {
            tracing::warn!(path = %self.root.join(path).display(), why, "something is wrong in a private registry");
            problems.insert(path.to_owned(), why);
        }
    }

    /// Notes that nothing is wrong with a file any more.
    pub fn accept(&self, path: &Path) {
        lock(&self.problems).remove(path);
    }

    fn forget_what_is_gone(&self) {
        let is_there = |path: &PathBuf| self.root.join(path).symlink_metadata().is_ok();
        lock(&self.problems).retain(|path, _| is_there(path));
        let known: Vec<PathBuf> = lock(&self.memory).keys().cloned().collect();
        for path in known.into_iter().filter(|path| !is_there(path)) {
            lock(&self.memory).remove(&path);
        }
    }
}

/// `protocol_versions` of a manifest.
pub fn protocols_in(manifest: &[u8]) -> Result<Vec<String>, String> {
    #[derive(serde::Deserialize)]
    struct Manifest {
        metadata: Metadata,
    }
    #[derive(serde::Deserialize)]
    struct Metadata {
        protocol_versions: Vec<String>,
    }
    let read: Manifest =
        serde_json::from_slice(manifest).map_err(|e| format!("is no manifest: {e}"))?;
    let protocols = read.metadata.protocol_versions;
    match protocols.iter().find(|protocol| !is_protocol(protocol)) {
        None if !protocols.is_empty() => Ok(protocols),
        None => Err("names no protocol_versions".into()),
        Some(bad) => Err(format!(
            "names the protocol {bad:?}; it would be such as 5.0"
        )),
    }
}

/// `MAJOR.MINOR`, of a major version that Terraform has spoken.
pub fn is_protocol(text: &str) -> bool {
    let numbers = text.split_once('.');
    numbers.is_some_and(|(major, minor)| {
        matches!(major, "4" | "5" | "6")
            && minor.parse::<u8>().is_ok_and(|n| n.to_string() == minor)
    })
}

/// `…_SHA256SUMS.sig`, or one that names its key: `…_SHA256SUMS.72D7468F.sig`.
fn signature_name<'a>(files: &'a HashSet<String>, sums: &str) -> Option<&'a String> {
    let names = files.iter().filter(|name| {
        let rest = name.strip_prefix(sums);
        rest.is_some_and(|rest| rest.starts_with('.') && rest.ends_with(".sig"))
    });
    names.min_by_key(|name| (name.len(), *name))
}

/// A file for [`dirhash::h1`].
pub fn open(path: &Path) -> Result<BufReader<File>, String> {
    let file = File::open(path).map_err(|e| format!("cannot be read: {e}"))?;
    Ok(BufReader::with_capacity(BUFFER, file))
}

fn hash(path: &Path) -> std::io::Result<Digest> {
    let mut file = File::open(path)?;
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; BUFFER];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finish()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// Whether a gzip file is whole (RFC 1952 has a checksum and a length at its end).
fn gunzip(path: &Path) -> Result<(), String> {
    let mut unpacked = MultiGzDecoder::new(open(path)?).take(UNPACKED + 1);
    let unpacked = std::io::copy(&mut unpacked, &mut std::io::sink());
    match unpacked.map_err(|e| format!("is no whole gzip file: {e}"))? {
        0 => Err("is empty".into()),
        n if n > UNPACKED => Err("unpacks to too much".into()),
        _ => Ok(()),
    }
}

impl Stamp {
    fn of(path: &Path) -> std::io::Result<Self> {
        Ok(Self::from(&fs::metadata(path)?))
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

fn last(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Changed in steps that do not panic.
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
