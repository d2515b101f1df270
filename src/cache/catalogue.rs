//! What documents said of archives: which digest a URL should have, and which URLs a registry
//! named. In memory; rebuilt from the kept documents at the start.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, RwLock, Weak};

use url::Url;

use super::url_key;
use crate::config::Authority;
use crate::digest::{Digest, Hasher};
use crate::terraform::registry::Download;
use crate::terraform::route::{Kind, OWN_PREFIX, file_name};
use crate::terraform::signature::NamedKey;

/// Documents known; more than are kept on disk, since some are known without being kept.
const DOCUMENT_LIMIT: usize = 40_000;
/// Names kept of documents that have since been replaced.
const NAMED_LIMIT: usize = 200_000;

/// Sets of keys looked up before those that nobody uses any more are dropped.
const KEY_SETS: usize = 4096;

/// The catalogue of one process.
///
/// The word of a registry that the operator named counts for whatever archive it names. Any other
/// host may be asked by whoever names it, so that its word on an archive elsewhere must count for its
/// own clients alone: its archives bear a mark in their URL's fragment, which nobody else can write
/// and no origin sees. By it they are told apart in every table.
#[derive(Default)]
pub struct Catalogue {
    inner: RwLock<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Registries whose word counts for all, by their authority as in URLs
    trusted: HashSet<String>,
    /// By document
    documents: HashMap<String, (String, Arc<Download>)>,
    /// By archive: the documents that name it, or did when a client may have been told
    archives: HashMap<String, Vec<Claim>>,
    /// By registry host and token
    named: HashMap<(String, String), Named>,
    /// Publishers name the same keys in each of their documents: each set is held once
    keys: HashMap<Digest, Weak<[NamedKey]>>,
}

/// A document's word on an archive.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The key of the document
    pub document: String,
    pub download: Arc<Download>,
}

/// A URL that a registry's document named, and what lies there.
#[derive(Clone, Debug, PartialEq)]
pub struct Named {
    pub url: Url,
    pub kind: Kind,
}

impl Catalogue {
    /// With those registries trusted.
    pub fn trusting(trusted: HashSet<String>) -> Self {
        let inner = Inner {
            trusted,
            ..Inner::default()
        };
        Self {
            inner: RwLock::new(inner),
        }
    }

    /// Trusts other registries from now on.
    pub fn trust(&self, trusted: HashSet<String>) {
        let mut inner = self.write();
        if inner.trusted == trusted {
            return;
        }
        inner.trusted = trusted;
        inner.rebuild();
    }

    /// The URL under which an archive that `registry` named is known.
    pub fn scoped(&self, registry: &str, archive: &Url) -> Url {
        self.read().scoped(registry, archive)
    }

    /// Takes note of a download document of `registry` (its authority as in URLs).
    pub fn learn(&self, document: &str, registry: &str, download: &Arc<Download>) {
        let mut inner = self.write();
        let mut download = Download::clone(download);
        download.archive = inner.scoped(registry, &download.archive);
        inner.drop_claim(document, &url_key(&download.archive));
        let before = inner.documents.get(document);
        let before = before.map(|(_, before)| before.archive.clone());
        if let Some(plain) = before.filter(|before| before.scheme() != "https") {
            // Nobody was told a path for it.
            inner.drop_claim(document, &url_key(&plain));
        }
        download.keys = inner.interned(&download.keys);
        inner.add(document, registry, &Arc::new(download));
        if inner.documents.len() > DOCUMENT_LIMIT
            && let Some(any) = inner.documents.keys().find(|key| *key != document).cloned()
        {
            inner.forget(&any);
        }
        if inner.named.len() > NAMED_LIMIT {
            inner.rebuild();
        }
    }

    /// The document is no longer kept.
    pub fn forget(&self, document: &str) {
        self.write().forget(document);
    }

    /// Which documents name the archive now; where none does, those that did.
    pub fn current_claims(&self, archive_key: &str) -> Vec<Claim> {
        let all = self.claims(archive_key);
        let inner = self.read();
        let is_current = |claim: &&Claim| {
            let now = inner.documents.get(&claim.document);
            now.is_some_and(|(_, download)| url_key(&download.archive) == archive_key)
        };
        let current: Vec<Claim> = all.iter().filter(is_current).cloned().collect();
        match current.is_empty() {
            true => all,
            false => current,
        }
    }

    /// Which documents name the archive, or did when a client may have been told.
    pub fn claims(&self, archive_key: &str) -> Vec<Claim> {
        self.read()
            .archives
            .get(archive_key)
            .cloned()
            .unwrap_or_default()
    }

    /// The archive that a held document names whose URL begins and ends so.
    pub fn archive_of(&self, beginning: &str, ending: &str) -> Option<Url> {
        let inner = self.read();
        let mut found = inner
            .documents
            .iter()
            .filter(|(key, _)| key.starts_with(beginning) && key.to_lowercase().ends_with(ending));
        found
            .next()
            .map(|(_, (_, download))| download.archive.clone())
    }

    /// What a path that [`own_path`] made on `registry` stands for.
    pub fn named(&self, registry: &str, path: &str) -> Option<Named> {
        let (token, file) = path.strip_prefix(OWN_PREFIX)?.split_once('/')?;
        let named = self
            .read()
            .named
            .get(&(registry.to_owned(), token.to_owned()))
            .cloned()?;
        (last_segment(&named.url) == file).then_some(named)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(|e| e.into_inner())
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(|e| e.into_inner())
    }
}

impl Inner {
    fn scoped(&self, registry: &str, archive: &Url) -> Url {
        let mut archive = archive.clone();
        let own = Authority::of(&archive).is_some_and(|at| at.in_https_url() == registry);
        let free = own || self.trusted.contains(registry);
        archive.set_fragment((!free).then(|| format!("of={registry}")).as_deref());
        archive
    }

    /// Names and claims by the documents of now.
    fn rebuild(&mut self) {
        self.named.clear();
        self.archives.clear();
        let documents: Vec<_> = self.documents.clone().into_iter().collect();
        for (document, (registry, download)) in documents {
            let mut download = Download::clone(&download);
            let told = token(&download.archive);
            download.archive = self.scoped(&registry, &download.archive);
            let named = Named {
                url: download.archive.clone(),
                kind: Kind::Archive,
            };
            self.add(&document, &registry, &Arc::new(download));
            // Clients may have been told the path before; of plain HTTP nobody was.
            if named.url.scheme() == "https" {
                self.named.insert((registry, told), named);
            }
        }
    }

    fn interned(&mut self, keys: &Arc<[NamedKey]>) -> Arc<[NamedKey]> {
        let mut hasher = Hasher::default();
        for text in keys
            .iter()
            .flat_map(|k| [&k.ascii_armor, &k.trust_signature])
        {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        let digest = hasher.finish();
        if let Some(held) = self.keys.get(&digest).and_then(Weak::upgrade) {
            return held;
        }
        if self.keys.len() > KEY_SETS {
            self.keys.retain(|_, held| held.strong_count() > 0);
        }
        self.keys.insert(digest, Arc::downgrade(keys));
        keys.clone()
    }

    fn add(&mut self, document: &str, registry: &str, download: &Arc<Download>) {
        for (url, kind) in urls_of(download) {
            let named = Named {
                url: url.clone(),
                kind,
            };
            self.named.insert((registry.to_owned(), token(url)), named);
        }
        self.archives
            .entry(url_key(&download.archive))
            .or_default()
            .push(Claim {
                document: document.to_owned(),
                download: download.clone(),
            });
        self.documents
            .insert(document.to_owned(), (registry.to_owned(), download.clone()));
    }

    fn forget(&mut self, document: &str) {
        let Some((registry, download)) = self.documents.remove(document) else {
            return;
        };
        self.drop_claim(document, &url_key(&download.archive));
        for (url, _) in urls_of(&download) {
            // The documents of a version's platforms name the same sums.
            let named_elsewhere = self.documents.values().any(|(other, download)| {
                *other == registry && urls_of(download).any(|(named, _)| named == url)
            });
            if !named_elsewhere {
                self.named.remove(&(registry.clone(), token(url)));
            }
        }
    }

    fn drop_claim(&mut self, document: &str, archive: &str) {
        if let Some(claims) = self.archives.get_mut(archive) {
            claims.retain(|claim| claim.document != document);
            if claims.is_empty() {
                self.archives.remove(archive);
            }
        }
    }
}

/// The path on a registry host that stands for a URL elsewhere. It tells nothing of the URL's
/// query, and cannot be made up: it must have been named.
pub fn own_path(url: &Url) -> String {
    format!("{OWN_PREFIX}{}/{}", token(url), last_segment(url))
}

fn token(url: &Url) -> String {
    Digest::of(url.as_str().as_bytes()).short(32)
}

fn last_segment(url: &Url) -> String {
    let raw = url.path_segments().and_then(|mut s| s.next_back());
    // Paths with encoded slashes are refused; such a file gets the name that says nothing.
    match raw {
        Some(raw) if !raw.is_empty() && !file_name(url).contains(['/', '\\', '%']) => {
            raw.to_owned()
        }
        _ => "file".to_owned(),
    }
}

fn urls_of(download: &Download) -> impl Iterator<Item = (&Url, Kind)> {
    let sums = download.sums.iter().map(|url| (url, Kind::Sums));
    let signature = download.signature.iter().map(|url| (url, Kind::Signature));
    std::iter::once((&download.archive, Kind::Archive))
        .chain(sums)
        .chain(signature)
        .filter(|(url, _)| url.scheme() == "https")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn download(archive: &str, shasum: &str) -> Arc<Download> {
        Arc::new(Download {
            archive: Url::parse(archive).unwrap(),
            sums: Some(Url::parse("https://g.example/d/SHA256SUMS").unwrap()),
            signature: None,
            filename: "a.zip".into(),
            shasum: Digest::of(shasum.as_bytes()).to_string(),
            keys: Arc::default(),
        })
    }

    #[test]
    fn only_what_a_registry_named_is_found_and_only_there() {
        let catalogue = Catalogue::trusting(["registry.example".to_owned()].into());
        let named = download("https://g.example/d/a.zip?x=1", "1");
        catalogue.learn("doc", "registry.example", &named);
        let path = own_path(&named.archive);
        assert!(!path.contains("x=1") && path.ends_with("/a.zip"));
        assert_eq!(
            catalogue.named("registry.example", &path),
            Some(Named {
                url: named.archive.clone(),
                kind: Kind::Archive
            })
        );
        assert_eq!(catalogue.named("other.example", &path), None);
        assert_eq!(
            catalogue.named("registry.example", &path.replace("a.zip", "b.zip")),
            None
        );
        let made_up = Url::parse("https://evil.example/a.zip").unwrap();
        assert_eq!(
            catalogue.named("registry.example", &own_path(&made_up)),
            None
        );
    }

    #[test]
    fn an_untrusted_registry_speaks_for_its_own_clients_alone() {
        let catalogue = Catalogue::trusting(["r.example".to_owned()].into());
        let (good, evil) = (
            download("https://g.example/a.zip", "1"),
            download("https://g.example/a.zip", "2"),
        );
        catalogue.learn("good", "r.example", &good);
        catalogue.learn("evil", "evil.example", &evil);
        let claims = catalogue.claims(&url_key(&good.archive));
        assert_eq!((claims.len(), &*claims[0].document), (1, "good"));
        let scoped = catalogue.scoped("evil.example", &evil.archive);
        let claims = catalogue.claims(&url_key(&scoped));
        assert_eq!((claims.len(), &*claims[0].document), (1, "evil"));
        let path = own_path(&scoped);
        assert_eq!(
            catalogue.named("evil.example", &path).map(|n| n.url),
            Some(scoped)
        );
        assert_eq!(catalogue.named("r.example", &path), None);
        // What it has itself is its own affair.
        let own = Url::parse("https://evil.example/b.zip").unwrap();
        assert_eq!(catalogue.scoped("evil.example", &own), own);
        catalogue.trust(["evil.example".to_owned()].into());
        let claims = catalogue.claims(&url_key(&evil.archive));
        assert_eq!((claims.len(), &*claims[0].document), (1, "evil"));
    }

    #[test]
    fn a_replaced_document_keeps_its_old_paths_and_their_claims() {
        let catalogue = Catalogue::trusting(["r".to_owned()].into());
        let (old, new) = (
            download("https://g/a.zip", "1"),
            download("https://g/b.zip", "2"),
        );
        catalogue.learn("doc", "r", &old);
        catalogue.learn("doc", "r", &new);
        // The old path leads to the old archive, which is still of somebody.
        assert_eq!(catalogue.claims(&url_key(&old.archive)).len(), 1);
        assert_eq!(catalogue.claims(&url_key(&new.archive)).len(), 1);
        assert!(catalogue.named("r", &own_path(&old.archive)).is_some());
        catalogue.learn("another platform", "r", &download("https://g/c.zip", "3"));
        catalogue.forget("doc");
        let shared = new.sums.clone().unwrap();
        assert!(catalogue.named("r", &own_path(&shared)).is_some());
        assert!(catalogue.claims(&url_key(&new.archive)).is_empty());
        assert!(catalogue.named("r", &own_path(&new.archive)).is_none());
    }
}
