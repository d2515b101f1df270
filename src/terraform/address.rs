//! What an archive or a list is of: a provider by its registry, or a product of the releases site.

use std::fmt;

use serde::{Deserialize, Serialize};
use url::Url;

use super::route::{Kind, file_name};
use crate::config::Authority;

/// The registry of the providers that HashiCorp publishes on its releases site.
const REGISTRY: &str = "registry.terraform.io";
const RELEASES: &str = "releases.hashicorp.com";
/// What the releases site calls the provider TYPE.
const PROVIDER_PRODUCT: &str = "terraform-provider-";

/// A provider (HOST, NAMESPACE, TYPE) or a product (HOST, PRODUCT), maybe of one version and
/// platform.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Subject {
    pub names: Vec<String>,
    pub version: Option<String>,
    /// `linux_amd64`
    pub platform: Option<String>,
    /// Whether it was asked for without a namespace, as Terraform 0.12 does
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub any_namespace: bool,
}

impl Subject {
    /// Of a document of a registry, by its URL: a download document or a version list.
    pub fn of_document(url: &Url) -> Option<Self> {
        let host = host_of(url)?;
        let segments: Vec<&str> = url.path_segments()?.collect();
        if !segments.contains(&"providers") {
            return None;
        }
        // From the end, as the route is told: `providers` may be in the service's own path too, or
        // be the name of somebody.
        let (namespace, name, version, platform) = match segments[..] {
            [.., namespace, name, "versions"] => (namespace, name, None, None),
            [.., namespace, name, version, "download", os, arch] => {
                (namespace, name, Some(version), Some(format!("{os}_{arch}")))
            }
            _ => return None,
        };
        // How Terraform 0.12 asks for providers without a namespace.
        let any_namespace = namespace == "-";
        let namespace = if any_namespace {
            "hashicorp"
        } else {
            namespace
        };
        Some(Self {
            names: vec![host, namespace.to_lowercase(), name.to_lowercase()],
            version: version.map(str::to_owned),
            platform,
            any_namespace,
        })
    }

    /// Of a file or a folder of the releases site, by its URL. What is there under a provider's
    /// name is HashiCorp's own provider.
    pub fn of_release(url: &Url) -> Option<Self> {
        let host = host_of(url)?;
        let segments: Vec<&str> = url.path_segments()?.filter(|s| !s.is_empty()).collect();
        let (product, version) = match segments[..] {
            ["index.json"] => return None,
            [product] | [product, "index.json"] => (product, None),
            [product, version] | [product, version, _] => (product, Some(version)),
            _ => return None,
        };
        if host != RELEASES {
            return None;
        }
        let provider = product.strip_prefix(PROVIDER_PRODUCT);
        let names = match provider.filter(|name| !name.is_empty()) {
            Some(name) => vec![REGISTRY.to_owned(), "hashicorp".into(), name.to_lowercase()],
            None => vec![host, product.to_lowercase()],
        };
        let platform = (segments.len() == 3).then(|| platform_of(&file_name(url)));
        Some(Self {
            names,
            version: version.map(str::to_owned),
            platform: platform.flatten(),
            any_namespace: false,
        })
    }

    /// Of any kind of URL.
    pub fn of(url: &Url, kind: Kind) -> Option<Self> {
        match kind {
            Kind::VersionList | Kind::Download => Self::of_document(url),
            _ => Self::of_release(url),
        }
    }

    pub fn names(&self) -> Vec<&str> {
        self.names.iter().map(String::as_str).collect()
    }

    /// `HOST/NAMESPACE/TYPE`, without a version.
    pub fn address(&self) -> String {
        self.names.join("/")
    }

    /// The name under which the digest of its archive is remembered; none without a version or a
    /// platform.
    pub fn key(&self) -> Option<String> {
        let (version, platform) = (self.version.as_ref()?, self.platform.as_ref()?);
        Some(format!("{}@{version}/{platform}", self.address()))
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address())?;
        match &self.version {
            Some(version) => write!(f, " {version}"),
            None => Ok(()),
        }
    }
}

/// `OS_ARCH` of `NAME_VERSION_OS_ARCH.zip`.
pub fn platform_of(file: &str) -> Option<String> {
    let stem = file.strip_suffix(".zip")?;
    let mut parts = stem.rsplitn(3, '_');
    let (arch, os, rest) = (parts.next()?, parts.next()?, parts.next()?);
    rest.contains('_').then(|| format!("{os}_{arch}"))
}

fn host_of(url: &Url) -> Option<String> {
    Some(Authority::of(url)?.in_https_url())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(url: &str) -> Option<String> {
        let url = Url::parse(url).unwrap();
        let subject = Subject::of(&url, super::super::route::route(url.path()))?;
        Some(subject.key().unwrap_or_else(|| subject.to_string()))
    }

    #[test]
    fn documents_and_releases_are_of_somebody() {
        for (url, subject) in [
            (
                "https://registry.terraform.io/v1/providers/HashiCorp/aws/versions",
                Some("registry.terraform.io/hashicorp/aws"),
            ),
            (
                "https://registry.terraform.io/v1/providers/-/aws/versions",
                Some("registry.terraform.io/hashicorp/aws"),
            ),
            (
                "https://r.example:8443/x/v1/providers/a/b/1.0.0/download/linux/amd64",
                Some("r.example:8443/a/b@1.0.0/linux_amd64"),
            ),
            (
                "https://r.example/providers/v1/a/b/versions",
                Some("r.example/a/b"),
            ),
            (
                "https://r.example/v1/providers/providers/versions/versions",
                Some("r.example/providers/versions"),
            ),
            (
                "https://releases.hashicorp.com/terraform/index.json",
                Some("releases.hashicorp.com/terraform"),
            ),
            (
                "https://releases.hashicorp.com/terraform/",
                Some("releases.hashicorp.com/terraform"),
            ),
            (
                "https://releases.hashicorp.com/terraform/1.9.0/terraform_1.9.0_linux_amd64.zip",
                Some("releases.hashicorp.com/terraform@1.9.0/linux_amd64"),
            ),
            (
                "https://releases.hashicorp.com/terraform/1.9.0/terraform_1.9.0_SHA256SUMS",
                Some("releases.hashicorp.com/terraform 1.9.0"),
            ),
            (
                "https://releases.hashicorp.com/terraform-provider-null/3.1.0/terraform-provider-null_3.1.0_linux_amd64.zip",
                Some("registry.terraform.io/hashicorp/null@3.1.0/linux_amd64"),
            ),
            (
                "https://releases.hashicorp.com/terraform-provider-/",
                Some("releases.hashicorp.com/terraform-provider-"),
            ),
            ("https://releases.hashicorp.com/", None),
            (
                "https://elsewhere.example/terraform/1.9.0/terraform_1.9.0_linux_amd64.zip",
                None,
            ),
            (
                "https://registry.terraform.io/v1/modules/a/b/c/versions",
                None,
            ),
        ] {
            assert_eq!(of(url).as_deref(), subject, "{url}");
        }
    }

    proptest! {
        #[test]
        fn any_path_is_survived(path in "(/[ -~]{0,10}){0,7}") {
            if let Ok(url) = Url::parse(&format!("https://releases.hashicorp.com{path}")) {
                Subject::of_document(&url);
                Subject::of_release(&url);
            }
        }
    }
}
