//! Documents of registries.
#![no_main]

use std::collections::HashMap;
use std::sync::LazyLock;

use larder::terraform::registry::{Download, check, holds_signed_url, rewrite_download};
use larder::terraform::route::Kind;
use larder::terraform::sums::Sums;
use larder::terraform::versions::{Loss, listed, without};
use libfuzzer_sys::fuzz_target;
use serde::de::IgnoredAny;
use serde_json::Value;
use serde_json::value::RawValue;
use url::Url;

static BASE: LazyLock<Url> = LazyLock::new(|| {
    let base =
        "https://registry.terraform.io/v1/providers/hashicorp/random/3.4.3/download/linux/amd64";
    Url::parse(base).expect("a URL")
});

const URL_KEYS: [&str; 3] = ["download_url", "shasums_url", "shasums_signature_url"];

fuzz_target!(|data: &[u8]| {
    documents(data);
    download(data);
    lists(data);
    if let Ok(text) = std::str::from_utf8(data) {
        signed_urls(text);
    }
});

fn documents(data: &[u8]) {
    let ok = |kind| check(kind, &BASE, data).is_ok();
    let value = serde_json::from_slice::<Value>(data);
    // A tree cannot hold all that is JSON: neither every number nor every depth.
    let json = serde_json::from_slice::<IgnoredAny>(data).is_ok();
    for kind in [Kind::Discovery, Kind::ReleaseIndex, Kind::ModuleVersions] {
        match &value {
            Ok(value) => assert_eq!(ok(kind), value.is_object()),
            Err(_) => assert!(json || !ok(kind)),
        }
    }
    match &value {
        Ok(value) => assert_eq!(ok(Kind::VersionList), value["versions"].is_array()),
        Err(_) => assert!(json || !ok(Kind::VersionList)),
    }
    assert_eq!(ok(Kind::Download), Download::parse(&BASE, data).is_ok());
    assert_eq!(ok(Kind::Sums), Sums::parse(data).is_ok());
    assert_eq!(
        ok(Kind::Signature),
        !data.is_empty() && data.trim_ascii_start().first() != Some(&b'<')
    );
    for kind in [Kind::Archive, Kind::Listing, Kind::Other] {
        assert!(ok(kind));
    }
}

/// What is hidden is left out of a list, and nothing else.
fn lists(data: &[u8]) {
    let hides = |version: &str| version.len() % 2 == 1;
    for kind in [Kind::VersionList, Kind::ReleaseIndex, Kind::Listing] {
        let Some(all) = listed(kind, data) else {
            continue;
        };
        assert_eq!(without(kind, data, |_| false, "why"), None);
        let before = all.len();
        let kept: Vec<_> = all.into_iter().filter(|one| !hides(&one.version)).collect();
        match without(kind, data, hides, "why") {
            Some(rest) => assert_eq!(listed(kind, &rest), Some(kept)),
            None => assert_eq!(kept.len(), before),
        }
        assert_eq!(Loss::between(kind, data, data), None);
    }
}

fn download(data: &[u8]) {
    let nothing = rewrite_download(&BASE, data, |_| None);
    assert_eq!(nothing, None);
    let Ok(download) = Download::parse(&BASE, data) else {
        return;
    };
    let digest = download.digest().expect("a digest");
    assert_eq!(digest.to_string(), download.shasum);
    // It is kept on disk and read back.
    let written = serde_json::to_string(&download).expect("is written");
    assert_eq!(
        serde_json::from_str::<Download>(&written).ok(),
        Some(download.clone())
    );
    let all = rewrite_download(&BASE, data, |url| Some(format!("https://x/?{url}")))
        .expect("a document that reads is rewritten");
    let one = rewrite_download(&BASE, data, |url| {
        (*url == download.archive).then(|| "https://x/".to_owned())
    })
    .expect("a document that reads is rewritten");

    let there = Download::parse(&BASE, &all).expect("still reads");
    let went = |old: &Url, new: &Url| {
        let wanted = Url::parse(&format!("https://x/?{old}")).expect("a URL");
        assert_eq!(*new, wanted);
    };
    went(&download.archive, &there.archive);
    for (old, new) in [
        (&download.sums, &there.sums),
        (&download.signature, &there.signature),
    ] {
        assert_eq!(old.is_some(), new.is_some());
        if let (Some(old), Some(new)) = (old, new) {
            went(old, new);
        }
    }
    assert_eq!(there.shasum, download.shasum);

    // Nothing but the three URLs differs, to the letter.
    let raw = |data: &[u8]| serde_json::from_slice::<HashMap<String, Box<RawValue>>>(data).ok();
    if let Some(old) = raw(data) {
        for new in [&all, &one] {
            let new = raw(new).expect("still an object");
            assert_eq!(old.len(), new.len());
            for (key, new) in &new {
                if !URL_KEYS.contains(&&key[..]) {
                    assert_eq!(old[key].get(), new.get(), "{key}");
                }
            }
        }
    }
    let keys = |data: &[u8]| match serde_json::from_slice::<Value>(data) {
        Ok(Value::Object(fields)) => fields.keys().cloned().collect(),
        _ => vec![],
    };
    assert!(keys(data).is_empty() || keys(data) == keys(&all));
    // Go reads keys whatever their case; whoever downloads must not read other ones than larder.
    for key in keys(data) {
        let folded = key.to_uppercase().to_lowercase();
        let ours = URL_KEYS.contains(&&folded[..]) || folded == "shasum" || folded == "filename";
        assert!(!ours || key == folded, "{key}");
    }
}

fn signed_urls(text: &str) {
    let holds = holds_signed_url(text.as_bytes());
    let marks = [
        "x-amz-signature=",
        "x-amz-security-token=",
        "x-goog-signature=",
        "signature=",
        "sig=",
        "token=",
        "jwt=",
        "key-pair-id=",
    ];
    if holds {
        // More text around it hides nothing.
        assert!(holds_signed_url(format!("<{text}>").as_bytes()));
        assert!(holds_signed_url(text.to_ascii_uppercase().as_bytes()));
    }
    let Ok(url) = BASE.join(text) else {
        return;
    };
    let query = url.query().unwrap_or_default().to_ascii_lowercase();
    let signed = query
        .split('&')
        .any(|part| marks.iter().any(|mark| part.starts_with(mark)));
    if signed {
        let plain = serde_json::to_string(url.as_str()).expect("is written");
        // As the writers of Go and of Gson have it, and in pages.
        let go = plain.replace('&', "\\u0026");
        let gson = go.replace('=', "\\u003d");
        let page = plain.replace('&', "&amp;");
        for written in [plain, go, gson, page] {
            assert!(holds_signed_url(written.as_bytes()), "{written}");
        }
    }
}
