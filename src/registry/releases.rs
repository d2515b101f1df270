//! What a folder holds by its layout: `NAMESPACE/TYPE/terraform-provider-TYPE_VERSION_OS_ARCH.zip` and
//! what belongs to it, `NAMESPACE/NAME/SYSTEM/VERSION.tar.gz`, and documents written by hand.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use url::Url;

use super::folder::{Folder, Look, Refusal, gunzip, open};
use super::layout::{
    Part, check_download, check_list, fits, is_provider_part, listed, part_of, protocols_in,
    public_keys,
};
use crate::config::Authority;
use crate::digest::{Digest, Hasher};
use crate::terraform::dirhash;
use crate::terraform::own::{ArchiveName, is_part, is_version};
use crate::terraform::signature::{Judgement, NamedKey, Tier};

/// The folder of public keys, at each level.
pub const KEYS: &str = "keys";
/// Keys of one provider.
const KEY_LIMIT: usize = 32;
const MANIFESTS: [&str; 2] = ["manifest.json", "terraform-registry-manifest.json"];

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

pub type Releases = BTreeMap<String, Release>;

/// An archive that was found right.
#[derive(Clone, Debug)]
pub struct Archive {
    pub name: ArchiveName,
    pub digest: Digest,
}

/// How a module's file is packed.
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

/// The names of one version's files.
#[derive(Default)]
struct Files {
    archives: Vec<ArchiveName>,
    sums: Option<String>,
    signature: Option<String>,
    manifest: Option<String>,
}

impl Folder {
    /// Looks at everything, and names what is wrong. `host` is whose documents they are.
    pub fn survey(&self, host: &Authority) {
        let Some(_place) = self.begin_survey() else {
            return;
        };
        self.forget_what_is_gone();
        let look = &Look::default();
        self.check_keys(Path::new(KEYS));
        for namespace in self.entries(Path::new("")) {
            let Some(at) = self.place(Path::new(""), &namespace) else {
                continue;
            };
            self.check_keys(&at.join(KEYS));
            for name in self.entries(&at) {
                let Some(at) = self.place(&at, &name) else {
                    continue;
                };
                self.check_keys(&at.join(KEYS));
                let releases = self.releases(&namespace, &name, look);
                if !releases.is_empty() && !is_provider_part(&namespace, &name) {
                    self.refuse(
                        &at,
                        "cannot be asked for: Terraform asks in lower case, and without double hyphens",
                    );
                }
                self.version_list(&namespace, &name);
                for inner in self.entries(&at) {
                    let within = at.join(&inner);
                    if !self.is_folder(&within) || inner == KEYS {
                        continue;
                    }
                    match is_version(&inner) {
                        true => self.check_documents(host, (&namespace, &name, &inner)),
                        false => drop(self.module_versions(&namespace, &name, &inner, look)),
                    }
                }
            }
        }
        self.keep_memory();
    }

    /// A folder that may be a namespace or a type; what else lies there is told.
    fn place(&self, within: &Path, name: &str) -> Option<PathBuf> {
        let at = within.join(name);
        if !self.is_folder(&at) {
            let zip = name.to_ascii_lowercase().ends_with(".zip");
            if zip {
                self.refuse(&at, "lies beside the folders; its place is NAMESPACE/TYPE/");
            }
            return None;
        }
        // Every ext4 file system has the other.
        if name == KEYS || name == "lost+found" {
            return None;
        }
        if !is_part(name) {
            self.refuse(&at, "is no namespace or type: letters, digits, hyphens");
            return None;
        }
        Some(at)
    }

    /// The releases of a provider, by version.
    pub fn releases(&self, namespace: &str, name: &str, look: &Look) -> Releases {
        let folder = Path::new(namespace).join(name);
        let all = self.files(&folder, name).into_iter();
        let releases = all.map(|(version, files)| {
            let release = self.release((&folder, namespace, name, &version), &files, look);
            (version, release)
        });
        releases
            .filter(|(_, release)| !release.archives.is_empty())
            .collect()
    }

    /// One release of a provider.
    pub fn release_of(
        &self,
        namespace: &str,
        name: &str,
        version: &str,
        look: &Look,
    ) -> Option<Release> {
        let folder = Path::new(namespace).join(name);
        let files = self.files(&folder, name).remove(version)?;
        let release = self.release((&folder, namespace, name, version), &files, look);
        (!release.archives.is_empty()).then_some(release)
    }

    /// The files of a provider, by version; what has a wrong name is told.
    fn files(&self, folder: &Path, name: &str) -> BTreeMap<String, Files> {
        let mut all: BTreeMap<String, Files> = BTreeMap::new();
        let names = self.entries(folder);
        let general = MANIFESTS
            .iter()
            .find(|manifest| names.iter().any(|n| n == *manifest));
        for file in &names {
            let path = folder.join(file);
            if let Some(archive) = ArchiveName::parse(file) {
                match archive.name == name {
                    true => {
                        let version = archive.version.clone();
                        all.entry(version).or_default().archives.push(archive);
                    }
                    false => {
                        self.refuse(&path, format!("is not of {name}, in whose folder it lies"))
                    }
                }
                continue;
            }
            if file.to_ascii_lowercase().ends_with(".zip") {
                self.refuse(
                    &path,
                    format!("has a wrong name; it would be terraform-provider-{name}_VERSION_OS_ARCH.zip"),
                );
                continue;
            }
            let Some((_, version, part)) = part_of(file).filter(|(of, ..)| *of == name) else {
                continue;
            };
            let files = all.entry(version.to_owned()).or_default();
            match part {
                Part::Sums => files.sums = Some(file.clone()),
                // That without a key in its name comes first.
                Part::Signature => {
                    let shorter = files
                        .signature
                        .as_ref()
                        .is_none_or(|other| file.len() < other.len());
                    if shorter {
                        files.signature = Some(file.clone());
                    }
                }
                Part::Manifest => files.manifest = Some(file.clone()),
            }
        }
        for files in all.values_mut() {
            let general = || general.map(|manifest| (*manifest).to_owned());
            files.manifest = files.manifest.take().or_else(general);
        }
        all
    }

    fn release(
        &self,
        (folder, namespace, name, version): (&Path, &str, &str, &str),
        files: &Files,
        look: &Look,
    ) -> Release {
        let mut release = Release::default();
        if files.archives.is_empty() {
            return release;
        }
        if let Some(manifest) = &files.manifest {
            release.protocols = self.protocols(&folder.join(manifest));
        }
        let mut sums = None;
        if let Some(file) = &files.sums {
            let path = folder.join(file);
            let Some(bytes) = self.read(&path) else {
                return Release::default();
            };
            match listed(&bytes) {
                Ok(parsed) => {
                    self.accept(&path);
                    sums = Some(parsed);
                }
                Err(why) => {
                    self.refuse(&path, format!("{why}; nothing of {version} is served"));
                    return Release::default();
                }
            }
            release.sums = Some(bytes);
            if let Some(file) = &files.signature {
                release.signature = self.read(&folder.join(file));
                if !self.is_well_signed((&folder.join(file), namespace, name, version), &release) {
                    return Release::default();
                }
            }
        }
        for archive in &files.archives {
            let path = folder.join(archive.to_string());
            let whole = |path: &Path| dirhash::h1(open(path)?).map(|_| ());
            let found = self.examined(&path, look, whole).and_then(|digest| {
                fits(sums.as_ref(), &archive.to_string(), digest).map_err(Refusal::Wrong)
            });
            match found {
                Ok(digest) => {
                    self.accept(&path);
                    let name = archive.clone();
                    release.archives.push(Archive { name, digest });
                }
                Err(Refusal::Wrong(why)) => self.refuse(&path, why),
                // Where sums are computed, a release is shown whole: they must not change in a moment.
                Err(Refusal::Pending) if release.sums.is_none() => return Release::default(),
                Err(Refusal::Written(why)) if release.sums.is_none() => {
                    self.refuse(&path, why);
                    return Release::default();
                }
                Err(Refusal::Written(why)) => self.refuse(&path, why),
                Err(Refusal::Pending) => {}
                Err(Refusal::Told) => {}
            }
        }
        release
    }

    /// Refuses a release whose publisher's signature is bad, as Terraform would.
    fn is_well_signed(
        &self,
        (path, namespace, name, version): (&Path, &str, &str, &str),
        release: &Release,
    ) -> bool {
        let (Some(sums), Some(signature)) = (&release.sums, &release.signature) else {
            // What cannot be read was told.
            return false;
        };
        let judgement = self.judge(sums, signature, &self.keys(namespace, name));
        match judgement.tier {
            Tier::Bad => {
                let why = judgement.why.unwrap_or_default();
                self.refuse(
                    path,
                    format!("is no good signature ({why}); nothing of {version} is served"),
                );
                return false;
            }
            Tier::Unsigned => self.refuse(
                path,
                format!("no public key in {KEYS}/ can check it, which Terraform needs; put the publisher's there"),
            ),
            _ => self.accept(path),
        }
        true
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

    fn protocols(&self, path: &Path) -> Option<Vec<String>> {
        match protocols_in(&self.read(path)?) {
            Ok(protocols) => {
                self.accept(path);
                Some(protocols)
            }
            Err(why) => {
                self.refuse(path, format!("{why}; protocol 5.0 is taken for granted"));
                None
            }
        }
    }

    /// The public keys of a provider: those of the nearest folder that has any. A block each.
    pub fn keys(&self, namespace: &str, name: &str) -> Vec<String> {
        let namespace = Path::new(namespace);
        let folders = [namespace.join(name), namespace.to_owned(), PathBuf::new()];
        let mut keys = folders
            .into_iter()
            .map(|folder| self.keys_in(&folder.join(KEYS)));
        keys.find(|keys| !keys.is_empty()).unwrap_or_default()
    }

    fn keys_in(&self, folder: &Path) -> Vec<String> {
        let mut keys = Vec::new();
        for name in self.entries(folder) {
            if !name.ends_with(".asc") || keys.len() >= KEY_LIMIT {
                continue;
            }
            let path = folder.join(&name);
            let Some(bytes) = self.read(&path) else {
                continue;
            };
            match public_keys(&bytes) {
                Ok(found) => {
                    self.accept(&path);
                    keys.extend(found);
                }
                Err(why) => self.refuse(&path, why),
            }
        }
        keys.truncate(KEY_LIMIT);
        keys
    }

    fn check_keys(&self, folder: &Path) {
        self.keys_in(folder);
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
        let names = self.entries(&folder);
        // In this order: of two for one version the first is served.
        for packed in [Packed::TarGz, Packed::Zip] {
            for file in &names {
                let Some(version) = file.strip_suffix(packed.ending()) else {
                    continue;
                };
                let path = folder.join(file);
                if !is_version(version) {
                    let why = "has a wrong name; it would be VERSION.tar.gz or VERSION.zip";
                    self.refuse(&path, why);
                    continue;
                }
                if versions.contains_key(version) {
                    let why = format!("lies beside {version}.tar.gz, which is served in its place");
                    self.refuse(&path, why);
                    continue;
                }
                let whole = |path: &Path| match packed {
                    Packed::Zip => dirhash::h1(open(path)?).map(|_| ()),
                    Packed::TarGz => gunzip(path),
                };
                match self.examined(&path, look, whole) {
                    Ok(_) => {
                        self.accept(&path);
                        versions.insert(version.to_owned(), packed);
                    }
                    Err(Refusal::Wrong(why) | Refusal::Written(why)) => self.refuse(&path, why),
                    Err(Refusal::Pending | Refusal::Told) => {}
                }
            }
        }
        versions
    }

    /// A list of versions that was written by hand.
    pub fn version_list(&self, namespace: &str, name: &str) -> Option<Vec<u8>> {
        let path = Path::new(namespace).join(name).join("versions.json");
        self.written(&path, check_list)
    }

    /// A download document that was written by hand.
    pub fn download(
        &self,
        host: &Authority,
        (namespace, name, version): (&str, &str, &str),
        (os, arch): (&str, &str),
    ) -> Option<Vec<u8>> {
        let path = Path::new(namespace).join(name).join(version);
        let path = path.join("download").join(os).join(format!("{arch}.json"));
        let at = format!(
            "https://{host}/v1/providers/{namespace}/{name}/{version}/download/{os}/{arch}"
        );
        let at = Url::parse(&at).ok()?;
        self.written(&path, |bytes| check_download(&at, host, (os, arch), bytes))
    }

    fn check_documents(&self, host: &Authority, (namespace, name, version): (&str, &str, &str)) {
        let folder = Path::new(namespace)
            .join(name)
            .join(version)
            .join("download");
        for os in self.entries(&folder) {
            for file in self.entries(&folder.join(&os)) {
                if let Some(arch) = file.strip_suffix(".json") {
                    self.download(host, (namespace, name, version), (&os, arch));
                }
            }
        }
    }

    fn written(
        &self,
        path: &Path,
        check: impl FnOnce(&[u8]) -> Result<(), String>,
    ) -> Option<Vec<u8>> {
        let bytes = self.read(path)?;
        match check(&bytes) {
            Ok(()) => {
                self.accept(path);
                Some(bytes)
            }
            Err(why) => {
                self.refuse(path, why);
                None
            }
        }
    }
}
