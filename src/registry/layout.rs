//! Names and small files of the layout: what each is, and what is wrong with it. Pure functions.

use serde_json::Value;
use url::Url;

use super::key;
use super::releases::KEYS;
use crate::config::Authority;
use crate::digest::Digest;
use crate::terraform::own::{is_part, is_version};
use crate::terraform::registry::Download;
use crate::terraform::sums::Sums;

const PUBLIC_KEY: &str = "-----BEGIN PGP PUBLIC KEY BLOCK-----";

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

/// Whether it is a list of versions that clients can read.
pub fn check_list(bytes: &[u8]) -> Result<(), String> {
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

/// Whether it is a download document for `platform` that leads elsewhere.
pub fn check_download(
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
