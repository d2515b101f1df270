//! Version lists: which versions they name, how two of them differ, and lists with versions left
//! out. Provider and module registry protocols, the releases site's indexes and its pages.

use std::collections::HashSet;
use std::fmt;

use serde::Deserialize;
use serde_json::Value;

use super::route::Kind;

/// Platforms of one version that are looked at.
const PLATFORMS: usize = 64;

/// A version and the platforms (`OS_ARCH`) that it is said to be for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub version: String,
    pub platforms: Vec<String>,
}

/// The versions that a list names; none where it is no list.
pub fn listed(kind: Kind, body: &[u8]) -> Option<Vec<Listed>> {
    match kind {
        Kind::VersionList => providers(&serde_json::from_slice(body).ok()?),
        Kind::ModuleVersions => {
            let list: Value = serde_json::from_slice(body).ok()?;
            let modules = list.get("modules")?.as_array()?.iter();
            Some(modules.filter_map(providers).flatten().collect())
        }
        Kind::ReleaseIndex => {
            #[derive(Deserialize)]
            struct Index {
                versions: serde_json::Map<String, Value>,
            }
            let index: Index = serde_json::from_slice(body).ok()?;
            let versions = index.versions.into_iter();
            Some(versions.map(|(version, _)| bare(version)).collect())
        }
        Kind::Listing => Some(linked(&String::from_utf8_lossy(body)).map(bare).collect()),
        _ => None,
    }
}

/// `versions` of a list. Go reads keys whatever their case, and takes the last one: a list in which
/// clients could find others than larder is none.
fn providers(list: &Value) -> Option<Vec<Listed>> {
    let list = list.as_object()?;
    let plain =
        |key: &String, known: &str| *key == known || key.to_uppercase() != known.to_uppercase();
    if !list.keys().all(|key| plain(key, "versions")) {
        return None;
    }
    let versions = list.get("versions")?.as_array()?.iter();
    versions
        .map(|version| {
            let version = version.as_object()?;
            if !version.keys().all(|key| plain(key, "version")) {
                return None;
            }
            let name = version.get("version").and_then(Value::as_str);
            let platforms = version.get("platforms").and_then(Value::as_array);
            let platforms = platforms.into_iter().flatten().take(PLATFORMS);
            Some(Listed {
                version: name.unwrap_or_default().to_owned(),
                platforms: platforms
                    .filter_map(|platform| {
                        let part = |name| platform.get(name).and_then(Value::as_str);
                        Some(format!("{}_{}", part("os")?, part("arch")?))
                    })
                    .collect(),
            })
        })
        .collect()
}

fn bare(version: impl Into<String>) -> Listed {
    Listed {
        version: version.into(),
        platforms: Vec::new(),
    }
}

/// The versions that a page of the releases site links to: `href="/PRODUCT/VERSION/"`.
fn linked(page: &str) -> impl Iterator<Item = &str> {
    page.lines().filter_map(version_of_line)
}

fn version_of_line(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once("href=\"/")?;
    let (path, _) = rest.split_once('"')?;
    let mut segments = path.split('/');
    let (_product, version) = (segments.next()?, segments.next()?);
    version
        .starts_with(|c: char| c.is_ascii_digit())
        .then_some(version)
}

/// What a list has lost against an older one, if that is most of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    pub before: usize,
    pub kept: usize,
}

impl Loss {
    pub fn between(kind: Kind, old: &[u8], new: &[u8]) -> Option<Self> {
        let old = listed(kind, old)?;
        let new = listed(kind, new).unwrap_or_default();
        let shorter = new.len() < old.len();
        let new: HashSet<&str> = new.iter().map(|listed| listed.version.as_str()).collect();
        let kept = old
            .iter()
            .filter(|listed| new.contains(listed.version.as_str()));
        let loss = Self {
            before: old.len(),
            kept: kept.count(),
        };
        // A list of builds that replace each other is as long as before.
        (shorter && loss.kept * 2 < loss.before).then_some(loss)
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "names {} of the {} versions that it named before",
            self.kept, self.before
        )
    }
}

/// The list without the versions that `hides` names; none where nothing is hidden. A provider's
/// list is given the `warning`, which Terraform shows.
pub fn without(
    kind: Kind,
    body: &[u8],
    hides: impl Fn(&str) -> bool,
    warning: &str,
) -> Option<Vec<u8>> {
    if kind == Kind::Listing {
        let page = String::from_utf8_lossy(body);
        let shown = |line: &&str| !version_of_line(line).is_some_and(&hides);
        let kept: String = page.split_inclusive('\n').filter(shown).collect();
        return (kept.len() < page.len()).then(|| kept.into_bytes());
    }
    let mut document: Value = serde_json::from_slice(body).ok()?;
    let changed = match kind {
        Kind::VersionList => {
            let changed = retain(&mut document, &hides);
            if changed {
                let fields = document.as_object_mut()?;
                match fields.get_mut("warnings") {
                    Some(Value::Array(warnings)) => warnings.push(warning.into()),
                    _ => {
                        fields.insert("warnings".into(), vec![warning].into());
                    }
                }
            }
            changed
        }
        Kind::ReleaseIndex => {
            let versions = document.get_mut("versions")?.as_object_mut()?;
            let before = versions.len();
            versions.retain(|version, _| !hides(version));
            versions.len() < before
        }
        _ => false,
    };
    changed.then(|| serde_json::to_vec(&document).ok())?
}

fn retain(list: &mut Value, hides: impl Fn(&str) -> bool) -> bool {
    let Some(Value::Array(versions)) = list.get_mut("versions") else {
        return false;
    };
    let before = versions.len();
    versions.retain(|version| {
        let version = version.get("version").and_then(Value::as_str);
        !version.is_some_and(&hides)
    });
    versions.len() < before
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RANDOM: &[u8] = include_bytes!("../../tests/data/random_versions.json");
    const PAGE: &str = "<ul>\n<li><a href=\"../\">../</a></li>\n<li><a href=\"/terraform/1.9.0/\">terraform_1.9.0</a></li>\n<li><a href=\"/terraform/1.8.0/\">x</a></li>\n</ul>\n";

    #[test]
    fn lists_of_all_kinds_are_read() {
        let versions = |kind, body: &[u8]| -> Vec<String> {
            let listed = listed(kind, body).unwrap().into_iter();
            listed.map(|listed| listed.version).collect()
        };
        assert!(versions(Kind::VersionList, RANDOM).contains(&"3.4.3".to_owned()));
        let random = listed(Kind::VersionList, RANDOM).unwrap();
        assert!(random[0].platforms.contains(&"linux_amd64".to_owned()));
        assert_eq!(versions(Kind::Listing, PAGE.as_bytes()), ["1.9.0", "1.8.0"]);
        let index = br#"{"name":"terraform","versions":{"1.9.0":{},"1.8.0":{}}}"#;
        assert_eq!(versions(Kind::ReleaseIndex, index), ["1.9.0", "1.8.0"]);
        let modules = br#"{"modules":[{"versions":[{"version":"1.0.0"}]}]}"#;
        assert_eq!(versions(Kind::ModuleVersions, modules), ["1.0.0"]);
        assert_eq!(listed(Kind::ReleaseIndex, br#"{"version":"1.9.0"}"#), None);
    }

    #[test]
    fn a_list_that_clients_read_otherwise_is_none() {
        for body in [
            r#"{"versions":[],"Versions":[{"version":"6.6.6"}]}"#,
            r#"{"versions":[{"version":"1.0.0","VERSION":"6.6.6"}]}"#,
            r#"{"ver\u017fions":[{"version":"6.6.6"}],"versions":[]}"#,
        ] {
            assert_eq!(listed(Kind::VersionList, body.as_bytes()), None, "{body}");
        }
        // What is odd but plain is read.
        let odd = br#"{"versions":[{"version":"1.0.0"}],"versions":[{"version":"2.0.0","platforms":[{"os":"x"}]},{"version":null}]}"#;
        let versions = listed(Kind::VersionList, odd).unwrap();
        assert_eq!((versions.len(), &*versions[0].version), (2, "2.0.0"));
    }

    #[test]
    fn a_loss_is_most_of_the_list() {
        let list = |n: usize| {
            let versions: Vec<_> = (0..n)
                .map(|i| serde_json::json!({"version": format!("{i}.0.0")}))
                .collect();
            serde_json::json!({ "versions": versions }).to_string()
        };
        let loss = |old: usize, new: usize| {
            Loss::between(
                Kind::VersionList,
                list(old).as_bytes(),
                list(new).as_bytes(),
            )
        };
        assert_eq!(loss(10, 5), None);
        assert_eq!(
            loss(10, 4),
            Some(Loss {
                before: 10,
                kept: 4
            })
        );
        assert_eq!(loss(1, 0), Some(Loss { before: 1, kept: 0 }));
        assert_eq!(loss(0, 0), None);
        let nightly = |name: &str| format!(r#"{{"versions":[{{"version":"{name}"}}]}}"#);
        let (old, new) = (nightly("1.0.0-dev1"), nightly("1.0.0-dev2"));
        assert_eq!(
            Loss::between(Kind::VersionList, old.as_bytes(), new.as_bytes()),
            None
        );
        assert_eq!(loss(3, 9), None);
    }

    #[test]
    fn hidden_versions_are_left_out_and_nothing_else_changes() {
        let hides = |version: &str| version == "3.4.3";
        let written = without(Kind::VersionList, RANDOM, hides, "why").unwrap();
        let mut new: Value = serde_json::from_slice(&written).unwrap();
        let mut old: Value = serde_json::from_slice(RANDOM).unwrap();
        assert_eq!(new["warnings"][0], "why");
        let versions = old["versions"].as_array_mut().unwrap();
        versions.retain(|version| version["version"] != "3.4.3");
        (new["warnings"], old["warnings"]) = (Value::Null, Value::Null);
        assert_eq!(old, new);
        assert_eq!(without(Kind::VersionList, RANDOM, |_| false, ""), None);
        let page = without(Kind::Listing, PAGE.as_bytes(), |v| v == "1.9.0", "").unwrap();
        assert_eq!(
            page.len(),
            PAGE.len() - PAGE.lines().nth(2).unwrap().len() - 1
        );
        let index = br#"{"versions":{"1.9.0":{},"1.8.0":{"a":1}}}"#;
        let index = without(Kind::ReleaseIndex, index, |v| v == "1.9.0", "").unwrap();
        assert_eq!(index, br#"{"versions":{"1.8.0":{"a":1}}}"#);
    }

    proptest! {
        #[test]
        fn any_list_is_survived(body in "\\PC{0,120}", hide: bool) {
            for kind in [Kind::VersionList, Kind::ModuleVersions, Kind::ReleaseIndex, Kind::Listing] {
                listed(kind, body.as_bytes());
                without(kind, body.as_bytes(), |_| hide, "");
                Loss::between(kind, body.as_bytes(), body.as_bytes());
            }
        }
    }
}
