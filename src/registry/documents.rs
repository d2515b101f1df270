//! The documents of the registry protocols, written from what a folder holds. Pure functions.

use bytes::Bytes;
use serde_json::{Value, json};

use super::key::id_of;
use super::releases::{Archive, Release, Releases};
use crate::digest::Digest;
use crate::terraform::own::ArchiveName;

/// Where files lie.
const FILES: &str = "/v1/files/";

/// A signature over sums, and the keys to check it by.
#[derive(Default)]
pub struct Signed {
    pub signature: Option<Bytes>,
    /// Armored
    pub keys: Vec<String>,
}

/// The mark of sums in their URL.
pub fn mark_of(sums: &[u8]) -> String {
    Digest::of(sums).short(16)
}

/// The sums of a release: its publisher's, or else computed.
pub fn sums_of(release: &Release) -> Vec<u8> {
    if let Some(sums) = &release.sums {
        return sums.clone();
    }
    let mut lines: Vec<String> = release
        .archives
        .iter()
        .map(|archive| format!("{}  {}\n", archive.digest, archive.name))
        .collect();
    lines.sort_by(|a, b| a[66..].cmp(&b[66..]));
    lines.concat().into_bytes()
}

pub fn version_list(
    namespace: &str,
    name: &str,
    releases: &Releases,
    written: Option<&[u8]>,
) -> String {
    let written: Option<Value> = written.and_then(|bytes| serde_json::from_slice(bytes).ok());
    let written = written
        .as_ref()
        .and_then(|list| list["versions"].as_array());
    let known = |version: &&Value| {
        let version = version["version"].as_str().unwrap_or_default();
        !releases.contains_key(version)
    };
    let others = written.into_iter().flatten().filter(known).cloned();
    let own = releases.iter().map(|(version, release)| {
        let platforms = release.archives.iter();
        let platforms: Vec<Value> = platforms
            .map(|one| json!({ "os": one.name.os, "arch": one.name.arch }))
            .collect();
        json!({ "version": version, "protocols": protocols(release), "platforms": platforms })
    });
    let versions: Vec<Value> = own.chain(others).collect();
    json!({ "id": format!("{namespace}/{name}"), "versions": versions, "warnings": null })
        .to_string()
}

fn protocols(release: &Release) -> Vec<String> {
    release
        .protocols
        .clone()
        .unwrap_or_else(|| vec!["5.0".into()])
}

pub fn download_document(
    namespace: &str,
    release: &Release,
    archive: &Archive,
    sums: &[u8],
    signed: &Signed,
) -> String {
    let ArchiveName {
        name,
        version,
        os,
        arch,
    } = &archive.name;
    // Paths: they hold by whatever address the client came.
    let files = format!("{FILES}{namespace}/{name}");
    let mark = mark_of(sums);
    let sums = format!("{files}/{mark}/terraform-provider-{name}_{version}_SHA256SUMS");
    let keys: Vec<Value> = signed
        .keys
        .iter()
        .map(|armor| {
            json!({ "key_id": id_of(armor).unwrap_or_default(), "ascii_armor": armor,
                "trust_signature": "", "source": "", "source_url": null })
        })
        .collect();
    let mut document = json!({
        "protocols": protocols(release),
        "os": os,
        "arch": arch,
        "filename": archive.name.to_string(),
        "download_url": format!("{files}/{}", archive.name),
        "shasums_url": sums,
        "shasums_signature_url": format!("{sums}.sig"),
        "shasum": archive.digest.to_string(),
        "signing_keys": { "gpg_public_keys": keys },
    });
    if signed.signature.is_none()
        && let Some(fields) = document.as_object_mut()
    {
        fields.shift_remove("shasums_signature_url");
    }
    document.to_string()
}
