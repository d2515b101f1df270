//! Which protocol a path speaks, told from the path alone.

use percent_encoding::{percent_decode, percent_decode_str};
use url::Url;

/// The folder of larder's own paths on intercepted hosts.
pub const OWN_PREFIX: &str = "/.larder/";

/// What a path of an intercepted host names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// `/.well-known/terraform.json` (remote service discovery)
    Discovery,
    /// `…/NAMESPACE/TYPE/versions` (provider registry protocol)
    VersionList,
    /// `…/NAMESPACE/TYPE/VERSION/download/OS/ARCH` (provider registry protocol)
    Download,
    /// `…/modules/NAMESPACE/NAME/SYSTEM/versions` (module registry protocol)
    ModuleVersions,
    /// `…/PRODUCT/index.json`, `…/PRODUCT/VERSION/index.json` (releases site)
    ReleaseIndex,
    /// A folder, whose page tools scrape for versions
    Listing,
    /// `…_SHA256SUMS`
    Sums,
    /// `…_SHA256SUMS.sig`, `…_SHA256SUMS.72D7468F.sig`
    Signature,
    /// A file that is fetched once and verified
    Archive,
    /// Anything else: listings, module downloads, keys
    Other,
}

impl Kind {
    /// Whether redirects are followed for the client: the answer is known by its first URL.
    pub fn follows_redirects(self) -> bool {
        matches!(self, Self::Sums | Self::Signature | Self::Archive)
    }

    /// Whether it lists versions, which must not be kept from users for long.
    pub fn is_version_list(self) -> bool {
        matches!(
            self,
            Self::VersionList | Self::ModuleVersions | Self::ReleaseIndex | Self::Listing
        )
    }
}

/// Whether a path that is a document of one kind is asked for as another: what a registry says is at
/// some URL must not stand for what the protocols say.
pub fn is_mistaken(path: &str, wanted: Kind) -> bool {
    let named = route(path);
    let fixed = matches!(
        named,
        Kind::Discovery
            | Kind::VersionList
            | Kind::Download
            | Kind::ModuleVersions
            | Kind::ReleaseIndex
    );
    fixed && named != wanted
}

const ARCHIVE_ENDINGS: [&str; 17] = [
    ".zip",
    ".tar.gz",
    ".tgz",
    ".tar.xz",
    ".txz",
    ".tar.bz2",
    ".tar.zst",
    ".7z",
    ".deb",
    ".rpm",
    ".apk",
    ".dmg",
    ".pkg",
    ".msi",
    ".exe",
    ".appimage",
    ".vsix",
];

/// What `path` (of a request that passed [`check_path`]) names.
pub fn route(path: &str) -> Kind {
    if path == "/.well-known/terraform.json" {
        return Kind::Discovery;
    }
    let segments: Vec<&str> = path.split('/').skip(1).collect();
    let last = segments.last().copied().unwrap_or_default();
    if last.is_empty() {
        return Kind::Listing;
    }
    if last.ends_with("SHA256SUMS") {
        return Kind::Sums;
    }
    if last.contains("SHA256SUMS.") && (last.ends_with(".sig") || last.ends_with(".asc")) {
        return Kind::Signature;
    }
    let lower = last.to_ascii_lowercase();
    if ARCHIVE_ENDINGS.iter().any(|ending| lower.ends_with(ending)) {
        return Kind::Archive;
    }
    if last == "index.json" {
        return Kind::ReleaseIndex;
    }
    // Whatever somebody calls a namespace or a type.
    match segments[..] {
        [.., "modules", _, _, _, "versions"] => return Kind::ModuleVersions,
        [.., "providers", _, _, "versions"] => return Kind::VersionList,
        [.., "providers", _, _, _, "download", _, _] => return Kind::Download,
        _ => {}
    }
    // Whatever else a release holds under its product's name is a build of it, except for what
    // describes it (`…_manifest.json`, which packer reads and sums need not list).
    if let [.., product, version, file] = segments[..]
        && !product.is_empty()
        && is_version(version)
        && file.starts_with(product)
        && !lower.ends_with(".json")
    {
        return Kind::Archive;
    }
    let named = |wanted: &str| segments.contains(&wanted);
    match segments[..] {
        [.., _, _, _, "versions"] if named("modules") => Kind::ModuleVersions,
        [.., _, _, "versions"] if named("providers") => Kind::VersionList,
        [.., _, _, _, "download", _, _] if named("providers") => Kind::Download,
        _ => Kind::Other,
    }
}

/// Refuses paths that servers and caches read differently: dot segments, empty segments,
/// backslashes, encoded slashes and control characters. The words say why.
pub fn check_path(path: &str) -> Result<(), &'static str> {
    if !path.starts_with('/') {
        return Err("does not start with a slash");
    }
    let is_unsafe = |b: &u8| matches!(b, b'/' | b'\\' | 0..=0x1f | 0x7f);
    let segments: Vec<&str> = path[1..].split('/').collect();
    for (i, segment) in segments.iter().enumerate() {
        let decoded = percent_decode_str(segment).collect::<Vec<u8>>();
        if decoded == b"." || decoded == b".." {
            return Err("holds a dot segment");
        }
        if segment.is_empty() && i + 1 < segments.len() {
            return Err("holds an empty segment");
        }
        if encodes_unreserved(segment) {
            return Err("encodes a character that needs no encoding");
        }
        if decoded.iter().any(is_unsafe) {
            return Err("holds a backslash, an encoded slash or a control character");
        }
        // What some server decodes twice must not be a path of its own there.
        let twice: Vec<u8> = percent_decode(&decoded).collect();
        if twice == b"." || twice == b".." || twice.iter().any(is_unsafe) {
            return Err("is encoded twice");
        }
    }
    Ok(())
}

/// The `…_SHA256SUMS` that lies beside an archive, by the names that publishers use.
pub fn sums_beside(archive: &Url) -> Option<Url> {
    let segments: Vec<&str> = archive.path_segments()?.collect();
    let (file, folders) = segments.split_last()?;
    let stem = ARCHIVE_ENDINGS
        .iter()
        .find_map(|ending| file.strip_suffix(ending))
        .unwrap_or(file);
    let name = release_of(stem).or_else(|| match folders {
        [.., product, version] if file.starts_with(product) && is_version(version) => {
            Some(format!("{product}_{version}"))
        }
        _ => None,
    })?;
    let mut sums = archive.clone();
    sums.set_query(None);
    sums.set_fragment(None);
    sums.path_segments_mut()
        .ok()?
        .pop()
        .push(&decode(&format!("{name}_SHA256SUMS")));
    Some(sums)
}

/// The last segment of a URL's path, decoded: the name by which SHA256SUMS know the file.
pub fn file_name(url: &Url) -> String {
    decode(
        url.path_segments()
            .and_then(|mut s| s.next_back())
            .unwrap_or_default(),
    )
}

/// Whether a letter, digit, `-`, `.`, `_` or `~` stands as `%xx` (RFC 3986 section 2.3): servers
/// read it as itself, so that it would be another name for the same file.
fn encodes_unreserved(segment: &str) -> bool {
    segment.match_indices('%').any(|(at, _)| {
        let code = segment.get(at + 1..at + 3);
        let byte = code.and_then(|hex| u8::from_str_radix(hex, 16).ok());
        byte.is_some_and(|b| b.is_ascii_alphanumeric() || b"-._~".contains(&b))
    })
}

/// `NAME_VERSION` of `NAME_VERSION_OS_ARCH`.
fn release_of(stem: &str) -> Option<String> {
    let mut parts = stem.rsplitn(3, '_');
    let (_arch, _os, release) = (parts.next()?, parts.next()?, parts.next()?);
    let (_, version) = release.rsplit_once('_')?;
    is_version(version).then(|| release.to_owned())
}

fn is_version(s: &str) -> bool {
    s.starts_with(|c: char| c.is_ascii_digit())
}

fn decode(s: &str) -> String {
    percent_decode_str(s).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_are_told_apart() {
        for (path, kind) in [
            ("/.well-known/terraform.json", Kind::Discovery),
            ("/v1/providers/hashicorp/aws/versions", Kind::VersionList),
            ("/v1/providers/-/aws/versions", Kind::VersionList),
            ("/api/registry/v1/providers/a/b/versions", Kind::VersionList),
            (
                "/v1/providers/hashicorp/aws/5.0.0/download/linux/amd64",
                Kind::Download,
            ),
            ("/v1/modules/a/b/c/versions", Kind::ModuleVersions),
            ("/v1/modules/a/b/c/1.0.0/download", Kind::Other),
            ("/terraform/index.json", Kind::ReleaseIndex),
            ("/terraform/1.9.0/terraform_1.9.0_SHA256SUMS", Kind::Sums),
            ("/t/1/t_1_SHA256SUMS.72D7468F.sig", Kind::Signature),
            (
                "/terraform/1.9.0/terraform_1.9.0_linux_amd64.zip",
                Kind::Archive,
            ),
            ("/vault/1.0.0/vault_1.0.0-1_amd64.deb", Kind::Archive),
            (
                "/vagrant/2.4.0/vagrant_2.4.0-1_x86_64.pkg.tar.zst",
                Kind::Archive,
            ),
            ("/vault/1.0.0/vault_1.0.0_linux_amd64", Kind::Archive),
            ("/p/1.0.0/p_1.0.0_manifest.json", Kind::Other),
            ("/terraform/", Kind::Listing),
            ("/", Kind::Listing),
            ("/.well-known/pgp-key.txt", Kind::Other),
        ] {
            assert_eq!(route(path), kind, "{path}");
        }
    }

    #[test]
    fn a_document_of_the_protocols_is_nothing_else() {
        let list = "/v1/providers/a/b/versions";
        assert!(is_mistaken(list, Kind::Signature) && is_mistaken(list, Kind::ModuleVersions));
        assert!(!is_mistaken(list, Kind::VersionList));
        assert!(!is_mistaken("/v1/p/a/b/versions", Kind::VersionList));
        assert!(!is_mistaken("/files/checksums.txt", Kind::Sums));
    }

    #[test]
    fn tricks_are_refused() {
        for bad in [
            "",
            "a",
            "/a/../b",
            "/a/%2e%2E/b",
            "/a/.%2e",
            "/.",
            "//a",
            "/a//b",
            "/a\\b",
            "/a%5cb",
            "/a%2fb",
            "/a%00b",
            "/a%252fb",
            "/a/%252e%252e/b",
            "/a%250ab",
            "/a/%0a",
            "/a%2ezip",
            "/a.zi%70",
            "/%61",
        ] {
            assert!(check_path(bad).is_err(), "{bad}");
        }
        for good in [
            "/",
            "/a/",
            "/a.b/..c",
            "/a%20b",
            "/vault/1.0.0+ent",
            "/v/1.0.0%2Bent",
        ] {
            assert_eq!(check_path(good), Ok(()), "{good}");
        }
    }

    #[test]
    fn sums_lie_where_publishers_put_them() {
        for (archive, sums) in [
            (
                "https://r/terraform/1.9.0/terraform_1.9.0_linux_amd64.zip",
                Some("https://r/terraform/1.9.0/terraform_1.9.0_SHA256SUMS"),
            ),
            (
                "https://g/o/r/releases/download/v1.2.3/terraform-provider-a_b_1.2.3_linux_amd64.zip?x=1",
                Some(
                    "https://g/o/r/releases/download/v1.2.3/terraform-provider-a_b_1.2.3_SHA256SUMS",
                ),
            ),
            (
                "https://r/vagrant/2.4.0/vagrant_2.4.0-1_amd64.deb",
                Some("https://r/vagrant/2.4.0/vagrant_2.4.0_SHA256SUMS"),
            ),
            (
                "https://r/vault/1.0.0+ent/vault_1.0.0+ent_linux_amd64.zip",
                Some("https://r/vault/1.0.0+ent/vault_1.0.0+ent_SHA256SUMS"),
            ),
            ("https://r/modules/main.zip", None),
        ] {
            let url = Url::parse(archive).expect(archive);
            assert_eq!(
                sums_beside(&url).as_ref().map(Url::as_str),
                sums,
                "{archive}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_path_is_routed_and_an_accepted_one_stays_itself(path in "/[ -~]{0,60}") {
            route(&path);
            if check_path(&path).is_ok() && !path.contains(['?', '#']) {
                let url = Url::parse(&format!("https://h{path}")).expect("a path makes a URL");
                // The URL library resolves dot segments and backslashes: nothing is left to resolve.
                prop_assert_eq!(url.path().matches('/').count(), path.matches('/').count());
                sums_beside(&url);
            }
        }
    }
}
