//! Documents of the provider and module registry protocols and of the releases site.

use std::fmt;
use std::sync::Arc;

use serde::de::{Deserializer as _, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use url::Url;

use super::route::Kind;
use super::signature::NamedKey;
use super::sums::Sums;
use crate::digest::Digest;

/// What a provider's download document says of an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Download {
    /// `download_url`, resolved against the document's own URL
    pub archive: Url,
    /// `shasums_url`, likewise
    pub sums: Option<Url>,
    /// `shasums_signature_url`, likewise
    pub signature: Option<Url>,
    /// The name by which the sums know the archive
    pub filename: String,
    /// `shasum`, in hexadecimal digits
    pub shasum: String,
    /// `signing_keys`
    #[serde(skip)]
    pub keys: Arc<[NamedKey]>,
}

/// The keys of the three URLs in a download document.
const URL_KEYS: [&str; 3] = ["download_url", "shasums_url", "shasums_signature_url"];

impl Download {
    /// Reads the document that lies at `base`.
    pub fn parse(base: &Url, body: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Raw {
            download_url: String,
            shasums_url: Option<String>,
            shasums_signature_url: Option<String>,
            filename: Option<String>,
            shasum: String,
            signing_keys: Option<Value>,
        }
        each_field(body, |key, _| check_name(key)).map_err(|e| e.to_string())?;
        let raw: Raw = serde_json::from_slice(body).map_err(|e| e.to_string())?;
        let join = |reference: &str| {
            let url = base.join(reference);
            let mut url = url.map_err(|e| format!("names a URL that is none: {e}"))?;
            // It is the client's, and stands for something else here.
            url.set_fragment(None);
            Ok::<_, String>(url)
        };
        let optional = |reference: Option<String>| {
            reference
                .filter(|r| !r.is_empty())
                .map(|r| join(&r))
                .transpose()
        };
        let archive = optional(Some(raw.download_url))?.ok_or("has no download_url")?;
        let named = super::route::route(archive.path());
        if !matches!(named, Kind::Archive | Kind::Other) {
            return Err(format!(
                "names as its archive what is a document: {}",
                archive.path()
            ));
        }
        let shasum: Digest = raw.shasum.parse().map_err(|e| format!("shasum is {e}"))?;
        Ok(Self {
            filename: raw
                .filename
                .unwrap_or_else(|| super::route::file_name(&archive)),
            sums: optional(raw.shasums_url)?,
            signature: optional(raw.shasums_signature_url)?,
            shasum: shasum.to_string(),
            keys: raw.signing_keys.map_or_else(Arc::default, keys_in),
            archive,
        })
    }

    pub fn digest(&self) -> Option<Digest> {
        self.shasum.parse().ok()
    }
}

/// The keys in `signing_keys`. What is no key there is passed over, as long as something is left to
/// verify by: an entry that cannot be read counts as a key that is none.
fn keys_in(signing_keys: Value) -> Arc<[NamedKey]> {
    let Some(Value::Array(keys)) = signing_keys.get("gpg_public_keys") else {
        return Arc::default();
    };
    keys.iter()
        .map(|key| {
            let text = |name: &str| key.get(name).and_then(Value::as_str).unwrap_or_default();
            NamedKey {
                ascii_armor: text("ascii_armor").to_owned(),
                trust_signature: text("trust_signature").to_owned(),
            }
        })
        .collect()
}

/// The `signing_keys` of a download document; none where it cannot be read.
pub fn signing_keys(body: &[u8]) -> Arc<[NamedKey]> {
    #[derive(Deserialize)]
    struct Raw {
        signing_keys: Option<Value>,
    }
    let raw = serde_json::from_slice::<Raw>(body).ok();
    raw.and_then(|raw| raw.signing_keys)
        .map_or_else(Arc::default, keys_in)
}

/// Replaces those of the three URLs for which `instead` has another, and nothing else.
///
/// Returns none where nothing was replaced: the bytes may stay as they are.
pub fn rewrite_download(
    base: &Url,
    body: &[u8],
    instead: impl Fn(&Url) -> Option<String>,
) -> Option<Vec<u8>> {
    let replacement = |key: &str, value: &RawValue| {
        let ours = URL_KEYS.contains(&key);
        let reference: String = serde_json::from_str(value.get()).ok().filter(|_| ours)?;
        let named = (!reference.is_empty()).then(|| base.join(&reference))?;
        instead(&named.ok()?)
    };
    let mut changed = false;
    let mut written = Vec::with_capacity(body.len());
    let read = each_field(body, |key, value| {
        written.push(if written.is_empty() { b'{' } else { b',' });
        written.extend(json(key)?);
        written.push(b':');
        match replacement(key, value) {
            None => written.extend_from_slice(value.get().as_bytes()),
            Some(url) => {
                written.extend(json(&url)?);
                changed = true;
            }
        }
        Ok(())
    });
    written.push(b'}');
    (read.is_ok() && changed).then_some(written)
}

/// Where the service `id` (`providers.v1`) lies by the discovery document at `base`; none where the
/// host does not offer it. Always with a slash at the end.
///
/// Remote service discovery: <https://developer.hashicorp.com/terraform/internals/remote-service-discovery>
pub fn service_url(base: &Url, body: &[u8], id: &str) -> Result<Option<Url>, String> {
    let document: serde_json::Map<String, Value> =
        serde_json::from_slice(body).map_err(|e| format!("is no discovery document: {e}"))?;
    let Some(reference) = document.get(id) else {
        return Ok(None);
    };
    let reference = reference.as_str();
    let reference = reference.ok_or_else(|| format!("says of {id} what is no URL"))?;
    let url = base.join(reference);
    let mut url = url.map_err(|e| format!("names for {id} a URL that is none: {e}"))?;
    if url.scheme() != "https" || !url.username().is_empty() || url.password().is_some() {
        return Err(format!("names for {id} a URL that is not https"));
    }
    url.set_query(None);
    url.set_fragment(None);
    if !url.path().ends_with('/') {
        let path = format!("{}/", url.path());
        url.set_path(&path);
    }
    Ok(Some(url))
}

/// The source in `X-Terraform-Get` or `location` of a module's download at `base`, where it is a
/// path: as an absolute URL. What begins otherwise is an address of its own.
pub fn module_location(base: &Url, location: &str) -> Option<Url> {
    let is_path = ["/", "./", "../"].iter().any(|p| location.starts_with(p));
    is_path.then(|| base.join(location).ok())?
}

fn json(text: &str) -> Result<Vec<u8>, String> {
    serde_json::to_vec(text).map_err(|e| e.to_string())
}

/// Go reads keys whatever their case: a client must not find other URLs than larder does.
fn check_name(key: &str) -> Result<(), String> {
    // Up and down: there is a long s, and a sign for Kelvin.
    let folded = key.to_uppercase().to_lowercase();
    let mut known = URL_KEYS.iter().chain(&["filename", "shasum"]);
    match folded != key && known.any(|known| *known == folded) {
        true => Err(format!(
            "has a key {key:?}, which clients take for {folded}"
        )),
        false => Ok(()),
    }
}

/// Hands on the keys of an object in their order, each with its value as it stands there: a number
/// keeps its digits, however many they are. Nothing is kept, since a document of megabytes would
/// be a tree of hundreds.
fn each_field<'a, F>(body: &'a [u8], each: F) -> serde_json::Result<()>
where
    F: FnMut(&str, &'a RawValue) -> Result<(), String>,
{
    struct Object<F>(F);

    impl<'de, F: FnMut(&str, &'de RawValue) -> Result<(), String>> Visitor<'de> for Object<F> {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<M: MapAccess<'de>>(mut self, mut map: M) -> Result<(), M::Error> {
            while let Some((key, value)) = map.next_entry::<String, _>()? {
                (self.0)(&key, value).map_err(M::Error::custom)?;
            }
            Ok(())
        }
    }

    let mut reader = serde_json::Deserializer::from_slice(body);
    reader.deserialize_map(Object(each))?;
    reader.end()
}

/// Whether `body` is a document of the kind that lies at `base`; the words say what is wrong.
pub fn check(kind: Kind, base: &Url, body: &[u8]) -> Result<(), String> {
    match kind {
        Kind::Discovery | Kind::ReleaseIndex => object(body),
        Kind::ModuleVersions => list(body, "modules"),
        Kind::VersionList => list(body, "versions"),
        Kind::Download => Download::parse(base, body).map(|_| ()),
        Kind::Sums => Sums::parse(body).map(|_| ()),
        Kind::Signature if body.is_empty() => Err("is empty".into()),
        Kind::Signature if body.trim_ascii_start().starts_with(b"<") => {
            Err("is a page, not a signature".into())
        }
        Kind::Signature | Kind::Archive | Kind::Listing | Kind::Other => Ok(()),
    }
}

/// Whether text holds a URL whose query is a credential (a presigned URL of S3, GCS or Azure, or a
/// token): such text must not be written to disk.
pub fn holds_signed_url(text: &[u8]) -> bool {
    const MARKS: [&str; 9] = [
        "x-amz-signature=",
        "x-amz-security-token=",
        "x-goog-signature=",
        "signature=",
        "sig=",
        "token=",
        "access_token=",
        "jwt=",
        "key-pair-id=",
    ];
    let text = String::from_utf8_lossy(text).to_ascii_lowercase();
    // Writers of JSON escape some of what parts a query, those of pages the ampersand.
    let text = text
        .replace("\\u0026", "&")
        .replace("\\u003d", "=")
        .replace("\\u003f", "?")
        .replace("&amp;", "&");
    MARKS.iter().any(|mark| {
        text.match_indices(mark)
            .any(|(at, _)| text[..at].ends_with(['?', '&']))
    })
}

fn object(body: &[u8]) -> Result<(), String> {
    each_field(body, |_, _| Ok(())).map_err(|e| format!("is no JSON object: {e}"))
}

fn list(body: &[u8], wanted: &str) -> Result<(), String> {
    let mut is_list = false;
    let read = each_field(body, |key, value| {
        if key == wanted {
            is_list = value.get().starts_with('[');
        }
        Ok(())
    });
    read.map_err(|e| format!("is no JSON object: {e}"))?;
    match is_list {
        true => Ok(()),
        false => Err(format!("has no list of {wanted}")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const REAL: &[u8] = include_bytes!("../../tests/data/random_3.4.3_linux_amd64.json");

    fn base() -> Url {
        Url::parse("https://registry.terraform.io/v1/providers/hashicorp/random/3.4.3/download/linux/amd64").unwrap()
    }

    #[test]
    fn a_real_document_reads() {
        let download = Download::parse(&base(), REAL).unwrap();
        assert_eq!(download.archive.host_str(), Some("releases.hashicorp.com"));
        assert_eq!(
            download.filename,
            "terraform-provider-random_3.4.3_linux_amd64.zip"
        );
        assert!(
            download
                .signature
                .unwrap()
                .path()
                .ends_with(".72D7468F.sig")
        );
        assert!(check(Kind::Download, &base(), REAL).is_ok());
        assert_eq!(download.keys.len(), 1);
        assert_eq!(download.keys, signing_keys(REAL));
        assert!(download.keys[0].ascii_armor.starts_with("-----BEGIN PGP"));
    }

    #[test]
    fn relative_urls_resolve_against_the_document() {
        let body = br#"{"download_url":"../../../files/a.zip","shasums_url":"/sums","shasum":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}"#;
        let download = Download::parse(&base(), body).unwrap();
        assert_eq!(
            download.archive.path(),
            "/v1/providers/hashicorp/random/files/a.zip"
        );
        assert_eq!(
            download.sums.unwrap().as_str(),
            "https://registry.terraform.io/sums"
        );
        assert_eq!(download.filename, "a.zip");
    }

    #[test]
    fn rewriting_changes_three_urls_and_nothing_else() {
        let there = |url: &Url| Some(format!("https://x/{}", super::super::route::file_name(url)));
        let written = rewrite_download(&base(), REAL, there).unwrap();
        let (mut old, new): (Value, Value) = (
            serde_json::from_slice(REAL).unwrap(),
            serde_json::from_slice(&written).unwrap(),
        );
        for key in URL_KEYS {
            assert!(
                new[key]
                    .as_str()
                    .unwrap()
                    .starts_with("https://x/terraform-provider-random")
            );
            old[key] = new[key].clone();
        }
        assert_eq!(old, new);
        assert_eq!(rewrite_download(&base(), REAL, |_| None), None);
    }

    #[test]
    fn what_is_not_rewritten_keeps_its_letters() {
        let digest = Digest::of(b"");
        let rest =
            r#""shasums_url":"","x":[1.0,1E2,123456789012345678901234567890,1e999,"\ud800"],"x":2"#;
        let body = format!(r#"{{"download_url":"a.zip","shasum":"{digest}", {rest} }}"#);
        let written = rewrite_download(&base(), body.as_bytes(), |_| Some("https://x/".into()));
        let wanted = format!(r#"{{"download_url":"https://x/","shasum":"{digest}",{rest}}}"#);
        assert_eq!(String::from_utf8(written.unwrap()).unwrap(), wanted);
    }

    #[test]
    fn keys_that_clients_read_otherwise_are_refused() {
        let digest = Digest::of(b"");
        for key in ["Download_URL", "\\u017fhasum", "SHASUMS_URL", "FileName"] {
            let body = format!(r#"{{"download_url":"a","shasum":"{digest}","{key}":"b"}}"#);
            let why = Download::parse(&base(), body.as_bytes()).unwrap_err();
            assert!(why.contains("clients"), "{why}");
        }
    }

    #[test]
    fn services_are_found_where_the_document_says() {
        let base = Url::parse("https://r.example/.well-known/terraform.json").unwrap();
        let body = br#"{"providers.v1":"/api/p","modules.v1":"https://m.example/v1/","x":{"a":1},"plain.v1":"http://r.example/"}"#;
        let url = |id| service_url(&base, body, id).map(|url| url.map(String::from));
        assert_eq!(
            url("providers.v1"),
            Ok(Some("https://r.example/api/p/".into()))
        );
        assert_eq!(url("modules.v1"), Ok(Some("https://m.example/v1/".into())));
        assert_eq!(url("login.v1"), Ok(None));
        assert!(url("x").is_err() && url("plain.v1").is_err());
        assert!(service_url(&base, b"[]", "x").is_err());
    }

    #[test]
    fn only_paths_are_resolved() {
        let base = Url::parse("https://r.example/v1/modules/a/b/c/1.0.0/download").unwrap();
        let at = |location| module_location(&base, location).map(String::from);
        let own = "https://r.example/v1/modules/a/b/c/1.0.0/x.tgz";
        assert_eq!(at("./x.tgz").as_deref(), Some(own));
        assert_eq!(
            at("/x.tgz?archive=tar.gz").as_deref(),
            Some("https://r.example/x.tgz?archive=tar.gz")
        );
        assert_eq!(at("git::https://g.example/a"), None);
        assert_eq!(at("https://g.example/a"), None);
    }

    #[test]
    fn nonsense_is_told() {
        for (kind, bad) in [
            (Kind::Discovery, &b"<html>"[..]),
            (Kind::Discovery, b"[]"),
            (Kind::VersionList, b"{\"versions\":"),
            (Kind::VersionList, b"{\"versions\":{}}"),
            (Kind::VersionList, b"{}"),
            (Kind::ModuleVersions, b"{\"versions\":[]}"),
            (Kind::Download, b"{}"),
            (
                Kind::Download,
                br#"["a",null,null,"a","e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]"#,
            ),
            (Kind::Download, br#"{"download_url":"a","shasum":"short"}"#),
            (
                Kind::Download,
                br#"{"download_url":"","shasum":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}"#,
            ),
            (
                Kind::Download,
                br#"{"download_url":"/v1/providers/a/b/versions","shasum":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}"#,
            ),
            (
                Kind::Download,
                br#"{"download_url":"/files/","shasum":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}"#,
            ),
            (Kind::Sums, b"<html>"),
            (Kind::Signature, b""),
            (Kind::Signature, b" <html>"),
        ] {
            assert!(check(kind, &base(), bad).is_err(), "{kind:?}");
        }
        let versions = include_bytes!("../../tests/data/random_versions.json");
        assert_eq!(check(Kind::VersionList, &base(), versions), Ok(()));
    }

    #[test]
    fn signed_urls_are_seen_and_keys_are_not_mistaken_for_them() {
        for signed in [
            "https://b.s3/x?X-Amz-Algorithm=a&X-Amz-Signature=0",
            r#"{"u":"https://b/x?a=1\u0026sig=9"}"#,
            r#"{"u":"https://b/x?a\u003d1\u0026sig\u003D9"}"#,
            r#"<a href="https://b/x?a=1&amp;sig=9">"#,
            "https://x/a?token=1",
        ] {
            assert!(holds_signed_url(signed.as_bytes()), "{signed}");
        }
        assert!(!holds_signed_url(REAL));
        assert!(!holds_signed_url(b"https://x/a?archive=zip&ref=v1 ...sig="));
    }

    proptest! {
        #[test]
        fn any_document_is_survived(body in "\\PC{0,120}") {
            let _ = Download::parse(&base(), body.as_bytes());
            let _ = check(Kind::VersionList, &base(), body.as_bytes());
            let _ = rewrite_download(&base(), body.as_bytes(), |_| Some("x".into()));
            holds_signed_url(body.as_bytes());
        }
    }
}
