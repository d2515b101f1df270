//! What a folder holds by its layout: `NAMESPACE/TYPE/terraform-provider-TYPE_VERSION_OS_ARCH.zip` and
//! what belongs to it, `NAMESPACE/NAME/SYSTEM/VERSION.tar.gz`, and documents written by hand.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde_json::Value;
use url::Url;

use super::folder::{Folder, Look, Refusal, gunzip, open};
use super::key;
use crate::config::Authority;
use crate::digest::{Digest, Hasher};
use crate::terraform::dirhash;
use crate::terraform::own::{ArchiveName, is_part, is_version};
use crate::terraform::registry::Download;
use crate::terraform::signature::{Judgement, NamedKey, Tier};
use crate::terraform::sums::Sums;

/// The folder of public keys, at each level.
pub const KEYS: &str = "keys";
const PUBLIC_KEY: &str = "-----BEGIN PGP PUBLIC KEY BLOCK-----";
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
            let Some((of, version, part)) = part_of(file).filter(|(of, ..)| *of == name) else {
                continue;
            };
            debug_assert_eq!(of, name);
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
                // A release is shown whole: what is computed over it must not change in a moment.
                Err(Refusal::Pending) => return Release::default(),
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
                    Err(Refusal::Wrong(why)) => self.refuse(&path, why),
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

/// What a file beside the archives is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Sums,
    Signature,
    Manifest,
}

/// Type, version and kind of `terraform-provider-TYPE_VERSION_SHA256SUMS` and its like.
pub fn part_of(file: &str) -> Option<(&str, &str, Part)> {
    let rest = file.strip_prefix("terraform-provider-")?;
    let (release, part) = match rest.strip_suffix("_manifest.json") {
        Some(release) => (release, Part::Manifest),
        None => {
            let (release, ending) = rest.split_once("_SHA256SUMS")?;
            let signature = ending.starts_with('.') && ending.ends_with(".sig");
            match ending {
                "" => (release, Part::Sums),
                // Of a key too: `.72D7468F.sig`
                _ if signature => (release, Part::Signature),
                _ => return None,
            }
        }
    };
    let (name, version) = release.rsplit_once('_')?;
    (is_part(name) && is_version(version)).then_some((name, version, part))
}

/// Sums as Terraform reads them: it takes the mark of `sha256sum -b` for a part of the name.
pub fn listed(sums: &[u8]) -> Result<Sums, String> {
    let text = String::from_utf8_lossy(sums);
    if text.lines().any(|line| line.contains(" *")) {
        return Err("has lines of `sha256sum -b` (with *), which Terraform does not read".into());
    }
    Sums::parse(sums)
}

/// The digest of `file`, if the sums agree.
pub fn fits(sums: Option<&Sums>, file: &str, digest: Digest) -> Result<Digest, String> {
    let Some(sums) = sums else {
        return Ok(digest);
    };
    match sums.digest_of(file) {
        Some(listed) if listed == digest => Ok(digest),
        Some(listed) => Err(format!(
            "has SHA-256 {digest}, but SHA256SUMS says {listed}"
        )),
        None => Err("is not listed in SHA256SUMS".into()),
    }
}

/// The armored public keys in a file, each by itself.
pub fn public_keys(bytes: &[u8]) -> Result<Vec<String>, String> {
    let text = std::str::from_utf8(bytes)
        .map_err(|_| "is no armored key; export it with `gpg --armor --export`")?;
    if text.contains("PRIVATE KEY") {
        return Err("holds a PRIVATE key, which is nobody else's; put the public one there".into());
    }
    let mut keys = Vec::new();
    for block in text.split(PUBLIC_KEY).skip(1) {
        let end = "-----END PGP PUBLIC KEY BLOCK-----";
        let (inner, _) = block.split_once(end).ok_or("holds a key that is cut off")?;
        let key = format!("{PUBLIC_KEY}{inner}{end}\n");
        key::id_of(&key).ok_or("holds a key that cannot be read")?;
        keys.push(key);
    }
    match keys.is_empty() {
        true => Err("holds no armored public key".into()),
        false => Ok(keys),
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

/// Whether Terraform can ask for a provider of that name.
pub fn is_provider_part(namespace: &str, name: &str) -> bool {
    let sound = |part: &str| {
        let lower = !part.bytes().any(|b| b.is_ascii_uppercase());
        is_part(part) && lower && !part.contains("--") && part != KEYS
    };
    sound(namespace) && sound(name)
}

fn check_list(bytes: &[u8]) -> Result<(), String> {
    let bad = |why: &str| Err(format!("is no list of versions: {why}"));
    let list: Value =
        serde_json::from_slice(bytes).or_else(|e| bad(&e.to_string()).map(|()| Value::Null))?;
    let Some(versions) = list.get("versions").and_then(Value::as_array) else {
        return bad("it has no `versions`");
    };
    for version in versions {
        let name = version.get("version").and_then(Value::as_str);
        if !name.is_some_and(is_version) {
            return bad("a `version` is none");
        }
        let texts = |key: &str| match version.get(key) {
            None | Some(Value::Null) => true,
            Some(Value::Array(all)) => all.iter().all(Value::is_string),
            _ => false,
        };
        let platforms = match version.get("platforms") {
            None | Some(Value::Null) => true,
            Some(Value::Array(all)) => all
                .iter()
                .all(|one| one["os"].is_string() && one["arch"].is_string()),
            _ => false,
        };
        if !texts("protocols") || !platforms {
            return bad("`protocols` are a list of texts, `platforms` one of `os` and `arch`");
        }
    }
    Ok(())
}

fn check_download(
    at: &Url,
    host: &Authority,
    platform: (&str, &str),
    bytes: &[u8],
) -> Result<(), String> {
    let download = Download::parse(at, bytes)?;
    let urls = [
        Some(&download.archive),
        download.sums.as_ref(),
        download.signature.as_ref(),
    ];
    for url in urls.into_iter().flatten() {
        if url.scheme() != "https" {
            return Err(format!("names {url}, which is not https"));
        }
        if Authority::of(url).as_ref() == Some(host) {
            return Err("names a file of this registry, which has a document by itself".into());
        }
    }
    let document: Value = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let said = (document["os"].as_str(), document["arch"].as_str());
    match said == (Some(platform.0), Some(platform.1)) {
        true => Ok(()),
        false => Err("is not for the `os` and `arch` by which it lies".into()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_told_by_their_names() {
        let prefix = "terraform-provider-my_prov_1.0.0-rc.1_";
        for (file, part) in [
            ("SHA256SUMS", Some(Part::Sums)),
            ("SHA256SUMS.sig", Some(Part::Signature)),
            ("SHA256SUMS.72D7468F.sig", Some(Part::Signature)),
            ("manifest.json", Some(Part::Manifest)),
            ("SHA256SUMS.txt", None),
            ("SHA256SUM", None),
        ] {
            let name = format!("{prefix}{file}");
            let found = part_of(&name);
            assert_eq!(
                found,
                part.map(|part| ("my_prov", "1.0.0-rc.1", part)),
                "{file}"
            );
        }
        assert_eq!(part_of("terraform-provider-x_SHA256SUMS"), None);
        assert_eq!(part_of("terraform-provider-_1.0.0_SHA256SUMS"), None);
    }

    #[test]
    fn only_public_keys_are_taken_each_by_itself() {
        let key = include_str!("../../certs/hashicorp.asc");
        assert_eq!(public_keys(key.as_bytes()).unwrap().len(), 1);
        let two = format!("a comment\n{key}\n{key}");
        let keys = public_keys(two.as_bytes()).unwrap();
        assert!(keys.len() == 2 && key::id_of(&keys[1]).is_some());
        let private = key.replace("PUBLIC KEY", "PRIVATE KEY");
        for bad in [&private, &format!("{key}{private}"), &key[..900], "", "key"] {
            assert!(public_keys(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn written_documents_are_checked() {
        for bad in [
            "",
            "[]",
            "{}",
            r#"{"versions":{}}"#,
            r#"{"versions":[{"version":5}]}"#,
            r#"{"versions":[{"version":"1.0"}]}"#,
            r#"{"versions":[{"version":"1.0.0","protocols":"x"}]}"#,
            r#"{"versions":[{"version":"1.0.0","platforms":[{"os":1}]}]}"#,
        ] {
            assert!(check_list(bad.as_bytes()).is_err(), "{bad}");
        }
        let good = r#"{"versions":[{"version":"1.0.0","protocols":["5.0"],"platforms":null}]}"#;
        assert_eq!(check_list(good.as_bytes()), Ok(()));
    }
}
