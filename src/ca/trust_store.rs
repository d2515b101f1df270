//! The system's trust store: a folder of certificates, and a tool that makes the system's bundle
//! out of them.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::inspect::PublicKey;
use super::tool::Tool;
use super::{bundle, write_atomically};

/// A larger file is no certificate.
const CERTIFICATE_LIMIT: u64 = 256 << 10;
/// A larger one is no bundle of roots, of which there are a few hundred.
const BUNDLE_LIMIT: u64 = 64 << 20;
/// How systems of one kind keep what they trust. Paths are below the root.
#[derive(Debug)]
struct Way {
    systems: &'static str,
    anchors: &'static str,
    tool: &'static str,
    arguments: &'static [&'static str],
    /// What the tool makes, and clients read
    bundle: &'static str,
    /// A folder of links, in which the tool may leave those to files that are gone
    links: Option<&'static str>,
}

/// The most telling folders first.
const WAYS: [Way; 4] = [
    Way {
        systems: "Fedora, RHEL",
        anchors: "etc/pki/ca-trust/source/anchors",
        tool: "update-ca-trust",
        arguments: &["extract"],
        bundle: "etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
        links: None,
    },
    Way {
        systems: "openSUSE",
        anchors: "etc/pki/trust/anchors",
        tool: "update-ca-certificates",
        arguments: &[],
        bundle: "var/lib/ca-certificates/ca-bundle.pem",
        links: None,
    },
    Way {
        systems: "Arch",
        anchors: "etc/ca-certificates/trust-source/anchors",
        tool: "update-ca-trust",
        arguments: &[],
        bundle: "etc/ca-certificates/extracted/tls-ca-bundle.pem",
        links: None,
    },
    Way {
        systems: "Debian, Ubuntu, Alpine",
        anchors: "usr/local/share/ca-certificates",
        tool: "update-ca-certificates",
        arguments: &[],
        bundle: "etc/ssl/certs/ca-certificates.crt",
        links: Some("etc/ssl/certs"),
    },
];

/// The trust store of this system.
#[derive(Debug)]
pub struct TrustStore {
    root: PathBuf,
    way: &'static Way,
    tool: Tool,
}

/// Why a trust store is not as it was asked for.
#[derive(Debug)]
pub enum Failure {
    /// Only root may write there.
    NotRoot(String),
    Other(String),
}

/// What was done, a line each.
pub type Done = Vec<String>;

impl TrustStore {
    /// The one that exists below `root` (which is `/` but for trying), with its folder and its tool.
    pub fn find(root: &Path) -> Option<Self> {
        WAYS.iter().find_map(|way| {
            let tool = Tool::find(root, way.tool)?;
            root.join(way.anchors).is_dir().then(|| Self {
                root: root.to_owned(),
                way,
                tool,
            })
        })
    }

    /// What [`find`](Self::find) looks for, a line each.
    pub fn known() -> String {
        let lines = WAYS.iter().map(|way| {
            format!(
                "  {}: the folder /{} and the tool {}\n",
                way.systems, way.anchors, way.tool
            )
        });
        lines.collect()
    }

    /// Has the system trust `ca`, and no other certificate over the same key. Where that fails, all is
    /// put back.
    pub async fn install(&self, ca: &CertificateDer<'static>, pem: &str) -> Result<Done, Failure> {
        let key = PublicKey::of(ca).ok_or_else(|| other("the certificate cannot be read"))?;
        let target = self.file_of(&key);
        let (ours, _) = self.files_of(&key);
        let in_place = ours == [target.clone()]
            && fs::read(&target).is_ok_and(|held| held == pem.as_bytes())
            && self.bundled(&key) == [ca.clone()];
        if in_place {
            let line = format!("{} is in place already", target.display());
            return Ok(vec![line, self.confirmed()]);
        }
        let kept = Kept::of(&ours, &target)?;
        let outcome = self.put(ca, pem, &key, &kept).await;
        match outcome {
            Ok(done) => Ok(done),
            Err(why) => Err(self.undo(&kept, why).await),
        }
    }

    async fn put(
        &self,
        ca: &CertificateDer<'static>,
        pem: &str,
        key: &PublicKey,
        kept: &Kept,
    ) -> Result<Done, Failure> {
        let target = &kept.target;
        write(target, pem.as_bytes())?;
        let mut done = vec![match kept.holds(target) {
            true => format!("replaced {}", target.display()),
            false => format!("wrote {}", target.display()),
        }];
        for path in kept.others() {
            remove(path)?;
            done.push(format!(
                "removed {}: an older certificate over the same key",
                path.display()
            ));
        }
        done.push(self.run(self.way.arguments).await?);
        let bundled = self.bundled(key);
        if !bundled.contains(ca) {
            return Err(other(format!(
                "`{}` ended well, but {} does not hold the certificate",
                self.tool_command(),
                self.bundle().display()
            )));
        }
        done.push(self.confirmed());
        if bundled.len() > 1 {
            done.push(self.still_bundled(key));
        }
        Ok(done)
    }

    /// Has the system no longer trust any certificate over that key. Where that fails, all is put back.
    pub async fn uninstall(&self, key: &PublicKey) -> Result<Done, Failure> {
        let (ours, _) = self.files_of(key);
        if ours.is_empty() && self.bundled(key).is_empty() {
            return Ok(vec![format!(
                "{} does not hold it; nothing to take out",
                self.bundle().display()
            )]);
        }
        let kept = Kept::of(&ours, &self.file_of(key))?;
        match self.take_out(key, &ours).await {
            Ok(done) => Ok(done),
            Err(why) => Err(self.undo(&kept, why).await),
        }
    }

    async fn take_out(&self, key: &PublicKey, ours: &[PathBuf]) -> Result<Done, Failure> {
        let mut done = Vec::new();
        for path in ours {
            remove(path)?;
            done.push(format!("removed {}", path.display()));
        }
        done.push(self.run(self.way.arguments).await?);
        if self.has_dead_links(ours) {
            // Debian's tool leaves links to what is gone, unless it is to make all of them anew.
            done.push(self.run(&["--fresh"]).await?);
        }
        if !self.bundled(key).is_empty() {
            return Err(other(self.still_bundled(key)));
        }
        done.push(format!(
            "{} no longer holds it: the system does not trust it",
            self.bundle().display()
        ));
        Ok(done)
    }

    /// The certificates over that key which the system trusts.
    pub fn bundled(&self, key: &PublicKey) -> Vec<CertificateDer<'static>> {
        held(&self.bundle(), key)
    }

    /// Files that other CAs of larder's (or of data dirs that are gone) have here.
    pub fn larder_files(&self) -> Vec<PathBuf> {
        let named = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("larder-ca-")
        };
        self.anchors().into_iter().filter(named).collect()
    }

    /// The command that has the tool read the folder again.
    pub fn tool_command(&self) -> String {
        self.tool.command(self.way.arguments)
    }

    fn bundle(&self) -> PathBuf {
        self.root.join(self.way.bundle)
    }

    /// By the key's fingerprint: a renewed certificate takes the place of the old one, and another
    /// data dir's CA has a file of its own.
    fn file_of(&self, key: &PublicKey) -> PathBuf {
        // Debian's tool reads `.crt` alone; the others take any name.
        let name = format!("larder-ca-{}.crt", key.fingerprint());
        self.root.join(self.way.anchors).join(name)
    }

    fn anchors(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.root.join(self.way.anchors));
        let entries = entries.into_iter().flatten().flatten();
        let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        paths
    }

    /// The files that hold certificates over that key: those that hold nothing else, and the others.
    fn files_of(&self, key: &PublicKey) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let (mut ours, mut mixed) = (Vec::new(), Vec::new());
        for path in self.anchors() {
            let certs = certificates(&path);
            let all = certs.len();
            match over(certs, key).len() {
                0 => {}
                some if some == all => ours.push(path),
                _ => mixed.push(path),
            }
        }
        (ours, mixed)
    }

    fn has_dead_links(&self, gone: &[PathBuf]) -> bool {
        let Some(links) = self.way.links else {
            return false;
        };
        let entries = fs::read_dir(self.root.join(links));
        let mut entries = entries.into_iter().flatten().flatten();
        entries.any(|entry| fs::read_link(entry.path()).is_ok_and(|to| gone.contains(&to)))
    }

    fn confirmed(&self) -> String {
        format!("{} holds it: the system trusts it", self.bundle().display())
    }

    fn still_bundled(&self, key: &PublicKey) -> String {
        let (_, mixed) = self.files_of(key);
        let bundle = self.bundle();
        match mixed.first() {
            Some(path) => format!(
                "{} still holds an older certificate over the same key, out of {}, which holds others too; take it out of that file by hand",
                bundle.display(),
                path.display()
            ),
            None => format!(
                "{} still holds another certificate over the same key; find and remove the file it comes from, and run `{}`",
                bundle.display(),
                self.tool_command()
            ),
        }
    }

    /// Puts the files back, and has the tool read them again.
    async fn undo(&self, kept: &Kept, why: Failure) -> Failure {
        let (root, why) = match why {
            Failure::NotRoot(why) => (true, why),
            Failure::Other(why) => (false, why),
        };
        let back = match kept.put_back() {
            Ok(false) => "nothing was changed".to_owned(),
            Ok(true) => match self.run(self.way.arguments).await {
                Ok(_) => "all files were put back as they were".to_owned(),
                Err(_) => format!(
                    "all files were put back as they were, but {} may be half made: mend what is wrong and run `{}`",
                    self.bundle().display(),
                    self.tool_command()
                ),
            },
            Err(e) => format!("{e}; mend that and run `{}`", self.tool_command()),
        };
        let words = format!("{why}; {back}");
        match root {
            true => Failure::NotRoot(words),
            false => Failure::Other(words),
        }
    }

    async fn run(&self, arguments: &[&str]) -> Result<String, Failure> {
        self.tool.run(arguments).await.map_err(other)
    }
}

/// The files as they were, to be put back.
struct Kept {
    target: PathBuf,
    files: Vec<(PathBuf, Vec<u8>)>,
}

impl Kept {
    fn of(ours: &[PathBuf], target: &Path) -> Result<Self, Failure> {
        let mut files = Vec::new();
        let of_that_name = target.exists() && !ours.contains(&target.to_owned());
        for path in ours
            .iter()
            .chain(of_that_name.then_some(&target.to_owned()))
        {
            let bytes = fs::read(path).map_err(|e| refused("read", path, &e))?;
            files.push((path.clone(), bytes));
        }
        Ok(Self {
            target: target.to_owned(),
            files,
        })
    }

    fn holds(&self, path: &Path) -> bool {
        self.files.iter().any(|(kept, _)| kept == path)
    }

    fn others(&self) -> impl Iterator<Item = &PathBuf> {
        let paths = self.files.iter().map(|(path, _)| path);
        paths.filter(|path| **path != self.target)
    }

    /// Whether anything had to be put back.
    fn put_back(&self) -> Result<bool, String> {
        let mut changed = false;
        if !self.holds(&self.target) && self.target.exists() {
            fs::remove_file(&self.target)
                .map_err(|e| format!("{} was left behind: {e}", self.target.display()))?;
            changed = true;
        }
        for (path, bytes) in &self.files {
            if fs::read(path).is_ok_and(|held| held == *bytes) {
                continue;
            }
            write(path, bytes).map_err(|_| format!("{} could not be put back", path.display()))?;
            changed = true;
        }
        Ok(changed)
    }
}

/// The file that holds the system's roots, for looking at alone.
pub fn system_bundle(root: &Path) -> Option<PathBuf> {
    let files = bundle::SYSTEM_FILES.iter();
    files
        .map(|file| root.join(file.trim_start_matches('/')))
        .find(|file| file.exists())
}

/// The certificates over that key in a bundle, each once; what else it holds may be of any form.
pub fn held(bundle: &Path, key: &PublicKey) -> Vec<CertificateDer<'static>> {
    let small = fs::metadata(bundle).is_ok_and(|m| m.is_file() && m.len() <= BUNDLE_LIMIT);
    let bytes = match small {
        true => fs::read(bundle).unwrap_or_default(),
        false => Vec::new(),
    };
    let all = CertificateDer::pem_slice_iter(&bytes).flatten().collect();
    let mut found: Vec<CertificateDer<'static>> = Vec::new();
    for cert in over(all, key) {
        if !found.contains(&cert) {
            found.push(cert);
        }
    }
    found
}

/// Those of the certificates that are over that key.
fn over(certs: Vec<CertificateDer<'static>>, key: &PublicKey) -> Vec<CertificateDer<'static>> {
    let ours = |cert: &CertificateDer<'_>| PublicKey::of(cert).as_ref() == Some(key);
    certs.into_iter().filter(ours).collect()
}

/// A file's certificates, in PEM or DER; none if it holds nothing of that kind.
fn certificates(path: &Path) -> Vec<CertificateDer<'static>> {
    let small = fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() <= CERTIFICATE_LIMIT);
    let bytes = match small {
        true => fs::read(path).unwrap_or_default(),
        false => Vec::new(),
    };
    let pem: Vec<_> = CertificateDer::pem_slice_iter(&bytes).flatten().collect();
    match pem.is_empty() && bytes.first() == Some(&0x30) {
        true => vec![CertificateDer::from(bytes)],
        false => pem,
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    write_atomically(path, bytes, 0o644)
        // Whatever the umask: all are to read it.
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o644)))
        .map_err(|e| refused("written", path, &e))
}

fn remove(path: &Path) -> Result<(), Failure> {
    fs::remove_file(path).map_err(|e| refused("removed", path, &e))
}

fn refused(what: &str, path: &Path, e: &io::Error) -> Failure {
    let words = format!("{} cannot be {what}: {e}", path.display());
    let denied = e.kind() == io::ErrorKind::PermissionDenied;
    match denied && !rustix::process::geteuid().is_root() {
        true => Failure::NotRoot(words),
        false => Failure::Other(words),
    }
}

fn other(words: impl Into<String>) -> Failure {
    Failure::Other(words.into())
}
