//! The paths by which clients ask larder itself for a registry's content: the registry protocol
//! without interception (`/registry/HOST/v1/…`) and the provider network mirror protocol
//! (`/mirror/HOST/NAMESPACE/TYPE/…`). What is not well-formed has no place here.

use semver::Version;

use super::route::{Kind, OWN_PREFIX};
use crate::config::Authority;

/// A page below `/registry/HOST`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RegistryPage {
    /// `/.well-known/terraform.json`
    Discovery,
    /// What lies at `rest` below the service's own address
    Service {
        service: Service,
        rest: String,
        kind: Option<Kind>,
    },
    /// What a document named (`/.larder/…`)
    Named(String),
}

/// A service of remote service discovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    Providers,
    Modules,
}

impl Service {
    /// As discovery documents name it.
    pub fn id(self) -> &'static str {
        match self {
            Self::Providers => "providers.v1",
            Self::Modules => "modules.v1",
        }
    }

    /// Where it lies below `/registry/HOST`, and on a private registry's own host.
    pub fn path(self) -> &'static str {
        match self {
            Self::Providers => "/v1/providers/",
            Self::Modules => "/v1/modules/",
        }
    }
}

/// Reads what follows `/registry/`.
pub fn registry_page(path: &str) -> Option<(Authority, RegistryPage)> {
    let (host, _) = path.split_once('/')?;
    let page = service_page(&path[host.len()..])?;
    Some((authority(host)?, page))
}

/// Reads a path below `/registry/HOST`, or on the host of a private registry.
pub fn service_page(path: &str) -> Option<RegistryPage> {
    if path == "/.well-known/terraform.json" {
        return Some(RegistryPage::Discovery);
    }
    if path.starts_with(OWN_PREFIX) {
        return Some(RegistryPage::Named(path.to_owned()));
    }
    let services = [Service::Providers, Service::Modules];
    let (service, rest) = services
        .iter()
        .find_map(|service| Some((*service, path.strip_prefix(service.path())?)))?;
    let segments: Vec<&str> = rest.split('/').collect();
    let kind = match (service, &segments[..]) {
        // How Terraform 0.12 asks for providers without a namespace.
        (Service::Providers, ["-", name, "versions"]) if is_part(name) => Some(Kind::VersionList),
        (Service::Providers, ["-", name, version, "download", os, arch])
            if is_part(name) && is_version(version) && is_platform(os, arch) =>
        {
            Some(Kind::Download)
        }
        (Service::Providers, [namespace, name, rest @ ..])
            if is_part(namespace) && is_part(name) =>
        {
            match rest {
                ["versions"] => Some(Kind::VersionList),
                [version, "download", os, arch] if is_version(version) && is_platform(os, arch) => {
                    Some(Kind::Download)
                }
                _ => return None,
            }
        }
        (Service::Modules, [namespace, name, system, rest @ ..])
            if [namespace, name, system].iter().all(|part| is_part(part)) =>
        {
            match rest {
                ["versions"] => Some(Kind::ModuleVersions),
                // The latest version's, which some clients ask for
                ["download"] => Some(Kind::Other),
                [version, "download"] if is_version(version) => Some(Kind::Other),
                // Files of a version, to which its location may lead
                [version, _, ..] if is_version(version) => None,
                _ => return None,
            }
        }
        _ => return None,
    };
    let rest = rest.to_owned();
    Some(RegistryPage::Service {
        service,
        rest,
        kind,
    })
}

/// A page of the network mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorPage {
    pub host: Authority,
    pub namespace: String,
    pub name: String,
    pub page: Page,
}

/// What is asked of a provider's mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Page {
    /// `index.json`
    Index,
    /// `VERSION.json`
    Version(String),
    /// `terraform-provider-TYPE_VERSION_OS_ARCH.zip`
    Archive {
        version: String,
        os: String,
        arch: String,
    },
}

/// Reads what follows `/mirror/`.
pub fn mirror_page(path: &str) -> Option<MirrorPage> {
    let segments: Vec<&str> = path.split('/').collect();
    let [host, namespace, name, file] = segments[..] else {
        return None;
    };
    if !is_part(namespace) || !is_part(name) {
        return None;
    }
    let page = match file.strip_suffix(".json") {
        Some("index") => Page::Index,
        Some(version) if is_version(version) => Page::Version(version.to_owned()),
        Some(_) => return None,
        None => {
            let archive = ArchiveName::parse(file).filter(|archive| archive.name == name)?;
            Page::Archive {
                version: archive.version,
                os: archive.os,
                arch: archive.arch,
            }
        }
    };
    Some(MirrorPage {
        host: authority(host)?,
        // Registries know no case; who asks in another one asks for the same.
        namespace: namespace.to_ascii_lowercase(),
        name: name.to_ascii_lowercase(),
        page,
    })
}

/// Some clients encode the colon before a port.
fn authority(segment: &str) -> Option<Authority> {
    segment.replace("%3A", ":").parse().ok()
}

/// `terraform-provider-TYPE_VERSION_OS_ARCH.zip`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchiveName {
    pub name: String,
    pub version: String,
    pub os: String,
    pub arch: String,
}

impl ArchiveName {
    pub fn parse(file: &str) -> Option<Self> {
        let stem = file
            .strip_prefix("terraform-provider-")?
            .strip_suffix(".zip")?;
        let mut parts = stem.rsplitn(3, '_');
        let (arch, os, rest) = (parts.next()?, parts.next()?, parts.next()?);
        let (name, version) = rest.rsplit_once('_')?;
        let sound = is_part(name) && is_version(version) && is_platform(os, arch);
        sound.then(|| Self {
            name: name.to_owned(),
            version: version.to_owned(),
            os: os.to_owned(),
            arch: arch.to_owned(),
        })
    }

    /// `linux_amd64`
    pub fn platform(&self) -> String {
        format!("{}_{}", self.os, self.arch)
    }
}

impl std::fmt::Display for ArchiveName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            name,
            version,
            os,
            arch,
        } = self;
        write!(f, "terraform-provider-{name}_{version}_{os}_{arch}.zip")
    }
}

/// Whether it is a namespace, a type, or a module's name: letters, digits, and within them hyphens
/// and underscores, 64 at most.
pub fn is_part(part: &str) -> bool {
    let bytes = part.as_bytes();
    let inner = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    matches!(bytes, [first, ..] if first.is_ascii_alphanumeric())
        && matches!(bytes, [.., last] if last.is_ascii_alphanumeric())
        && bytes.len() <= 64
        && bytes.iter().all(inner)
}

/// Whether it is a version (semver.org), without a leading `v`.
pub fn is_version(version: &str) -> bool {
    version.len() <= 128 && Version::parse(version).is_ok()
}

fn is_platform(os: &str, arch: &str) -> bool {
    let is_word = |word: &str| {
        (1..=32).contains(&word.len())
            && word
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    };
    is_word(os) && is_word(arch)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn registry_pages_are_told_apart() {
        let kind = |path: &str| match registry_page(path)?.1 {
            RegistryPage::Service { kind, rest, .. } => Some((rest, kind)),
            _ => None,
        };
        for (path, rest, wanted) in [
            (
                "r.example/v1/providers/a/b/versions",
                "a/b/versions",
                Some(Kind::VersionList),
            ),
            (
                "r.example:1/v1/providers/-/b/versions",
                "-/b/versions",
                Some(Kind::VersionList),
            ),
            (
                "r.example/v1/providers/a/b/1.0.0-rc1/download/linux/386",
                "a/b/1.0.0-rc1/download/linux/386",
                Some(Kind::Download),
            ),
            (
                "r.example/v1/modules/a/b/c/versions",
                "a/b/c/versions",
                Some(Kind::ModuleVersions),
            ),
            (
                "r.example/v1/modules/a/b/c/1.0.0/download",
                "a/b/c/1.0.0/download",
                Some(Kind::Other),
            ),
            (
                "r.example/v1/modules/a/b/c/1.0.0/c.tgz",
                "a/b/c/1.0.0/c.tgz",
                None,
            ),
        ] {
            assert_eq!(kind(path), Some((rest.to_owned(), wanted)), "{path}");
        }
        let discovery = registry_page("r.example/.well-known/terraform.json").unwrap();
        assert_eq!(discovery.0.to_string(), "r.example:443");
        assert_eq!(discovery.1, RegistryPage::Discovery);
    }

    #[test]
    fn what_is_not_well_formed_is_nothing() {
        for path in [
            "",
            "r.example",
            "r.example/",
            "/v1/providers/a/b/versions",
            "r example/v1/providers/a/b/versions",
            "-_-..x/v1/providers/a/b/versions",
            "r.example/v1/providers/a/versions",
            "r.example/v1/providers/a/b/c/versions",
            "r.example/v1/providers/a%2fx/b/versions",
            "r.example/v1/providers/../b/versions",
            "r.example/v1/providers/a/-b/versions",
            "r.example/v1/providers/a/b/latest/download/linux/amd64",
            "r.example/v1/providers/a/b/1.0/download/linux/amd64",
            "r.example/v1/providers/a/b/1.0.0/download/linux/amd_64",
            "r.example/v1/modules/a/b/versions",
            "r.example/v1/modules/a/b/c/x/download",
            "r.example/v2/providers/a/b/versions",
        ] {
            assert_eq!(registry_page(path), None, "{path}");
        }
        for path in [
            "",
            "r.example/a/b",
            "r.example/a/b/c/index.json",
            "r.example/a/../index.json",
            "r.example//b/index.json",
            "r.example/a/b/1.0.json",
            "r.example/a/b/v1.0.0.json",
            "r.example/a/b/.json",
            "r.example/a/b/terraform-provider-c_1.0.0_linux_amd64.zip",
            "r.example/a/b/terraform-provider-b_1.0_linux_amd64.zip",
            "r.example/a/b/b_1.0.0_linux_amd64.zip",
            "r.example:x/a/b/index.json",
        ] {
            assert_eq!(mirror_page(path), None, "{path}");
        }
    }

    #[test]
    fn mirror_pages_are_told_apart() {
        let page = |file: &str| mirror_page(&format!("r.example/A/b_c/{file}")).unwrap();
        assert_eq!(page("index.json").page, Page::Index);
        assert_eq!(page("index.json").namespace, "a");
        assert_eq!(page("1.0.0+x.json").page, Page::Version("1.0.0+x".into()));
        let archive = page("terraform-provider-b_c_1.2.3_linux_amd64.zip").page;
        let (version, os, arch) = ("1.2.3".into(), "linux".into(), "amd64".into());
        assert_eq!(archive, Page::Archive { version, os, arch });
    }

    proptest! {
        #[test]
        fn any_path_is_survived(path in "[ -~]{0,60}") {
            registry_page(&path);
            mirror_page(&path);
        }

        #[test]
        fn a_name_is_read_as_it_is_written(name in "[a-z][a-z_]{0,8}[a-z]", major in 0..99u32, os in "[a-z0-9]{1,9}") {
            let archive = ArchiveName { name, version: format!("{major}.0.1-rc.1"), os, arch: "arm64".into() };
            prop_assert_eq!(ArchiveName::parse(&archive.to_string()), Some(archive));
        }
    }
}
