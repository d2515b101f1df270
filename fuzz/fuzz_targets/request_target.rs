//! Targets of requests, and the hosts that they are for.
#![no_main]

use http::uri::PathAndQuery;
use larder::config::{Authority, ConnectTo, HostName, NoProxy, Parent, Period, Size};
use larder::terraform::address::Subject;
use larder::terraform::route::{Kind, check_path, file_name, route, sums_beside};
use larder_fuzz::survives_printing;
use libfuzzer_sys::fuzz_target;
use percent_encoding::percent_decode;
use url::Url;

fuzz_target!(|text: &str| {
    target(text);
    protocol(text);
    hosts(text);
    route(text);
});

fn decoded(text: &[u8]) -> Vec<u8> {
    percent_decode(text).collect()
}

fn segments(path: &str) -> Vec<&str> {
    path.split('/').skip(1).collect()
}

/// What HTTP lets through and `check_path` accepts means one thing to everybody.
fn target(text: &str) {
    let Ok(target) = text.parse::<PathAndQuery>() else {
        return;
    };
    let path = target.path();
    let kind = route(path);
    if check_path(path).is_err() {
        return;
    }
    for host in [
        "registry.terraform.io",
        "releases.hashicorp.com",
        "r.example:8443",
    ] {
        let url = Url::parse(&format!("https://{host}{target}")).expect("a path makes a URL");
        let kept = segments(url.path());
        assert_eq!(
            kept.iter()
                .map(|s| decoded(s.as_bytes()))
                .collect::<Vec<_>>(),
            segments(path)
                .iter()
                .map(|s| decoded(s.as_bytes()))
                .collect::<Vec<_>>(),
        );
        assert_eq!(check_path(url.path()), Ok(()));
        assert_eq!(route(url.path()), kind);
        for segment in kept {
            let twice = decoded(&decoded(segment.as_bytes()));
            assert!(twice != b"." && twice != b"..", "{segment}");
            assert!(!twice.iter().any(|b| b"/\\\0\r\n".contains(b)), "{segment}");
        }
        let file = file_name(&url);
        assert!(!file.contains(['/', '\\']) && file != "." && file != "..");
        sums(&url);
        subject(&url, kind);
    }
}

fn sums(archive: &Url) {
    let Some(sums) = sums_beside(archive) else {
        return;
    };
    assert_eq!(sums.origin(), archive.origin());
    assert_eq!((sums.query(), sums.fragment()), (None, None));
    assert_eq!(route(sums.path()), Kind::Sums);
    assert_eq!(check_path(sums.path()), Ok(()));
    let (of_sums, of_archive) = (segments(sums.path()), segments(archive.path()));
    assert_eq!(of_sums.len(), of_archive.len());
    let folders = of_sums.len() - 1;
    assert_eq!(of_sums[..folders], of_archive[..folders]);
}

fn subject(url: &Url, kind: Kind) {
    let subject = Subject::of(url, kind);
    if matches!(kind, Kind::VersionList | Kind::Download) {
        let subject = subject.as_ref().expect("a document is of a provider");
        assert_eq!(subject.names.len(), 3);
        assert_eq!(subject.key().is_some(), kind == Kind::Download);
    }
    let Some(subject) = subject else {
        return;
    };
    assert!((2..=3).contains(&subject.names.len()));
    let host = Authority::of(url).expect("a host").in_https_url();
    assert!(subject.names[0] == host || host == "releases.hashicorp.com");
    let parts = subject
        .names
        .iter()
        .chain(&subject.version)
        .chain(&subject.platform);
    for part in parts {
        assert!(!part.is_empty() && !part.contains('/'), "{subject:?}");
    }
    assert!(subject.to_string().starts_with(&subject.address()));
    if let Some(key) = subject.key() {
        assert!(key.starts_with(&subject.address()));
        assert_eq!(key.matches('/').count(), subject.names.len());
    }
}

/// Whatever a namespace and a type are called, their documents are told as such.
fn protocol(text: &str) {
    let parts: Vec<&str> = text.split('/').collect();
    let sound = |part: &&str| {
        !part.is_empty() && !part.contains(['?', '#']) && check_path(&format!("/{part}")).is_ok()
    };
    if !parts.iter().all(|part| sound(&part)) {
        return;
    }
    if let [namespace, name] = parts[..] {
        let path = format!("/v1/providers/{namespace}/{name}/versions");
        assert_eq!(route(&path), Kind::VersionList, "{path}");
        let path = format!("/v1/providers/{namespace}/{name}/1.0.0/download/linux/amd64");
        assert_eq!(route(&path), Kind::Download, "{path}");
    }
    if let [namespace, name, system] = parts[..] {
        let path = format!("/v1/modules/{namespace}/{name}/{system}/versions");
        assert_eq!(route(&path), Kind::ModuleVersions, "{path}");
    }
}

fn hosts(text: &str) {
    if let Some(host) = survives_printing::<HostName>(text) {
        assert_eq!(host.as_str(), host.as_str().to_ascii_lowercase());
    }
    if let Some(authority) = survives_printing::<Authority>(text) {
        let short = authority.in_https_url();
        assert_eq!(short.parse(), Ok(authority.clone()));
        // Names in punycode may be none to the URL library; what it takes, it takes as the same.
        if let Ok(url) = Url::parse(&format!("https://{short}/x")) {
            assert_eq!(Authority::of(&url), Some(authority.clone()), "{url}");
        }
        let nothing: ConnectTo = ":::".parse().expect("a rule");
        assert_eq!(nothing.apply(&authority), Some(authority.clone()));
        let [a, b] = [format!("{authority}:h:1"), format!("h:1:{authority}")];
        let to: ConnectTo = a.parse().expect("a rule");
        let there: Authority = "h:1".parse().expect("an authority");
        assert_eq!(to.apply(&authority), Some(there.clone()));
        let from: ConnectTo = b.parse().expect("a rule");
        assert_eq!(from.apply(&there), Some(authority));
    }
    if let Ok(rule) = text.parse::<ConnectTo>() {
        assert_eq!(rule.text().parse(), Ok(rule.clone()));
    }
    if let Ok(Size(bytes)) = text.parse() {
        assert_eq!(bytes.to_string().parse(), Ok(Size(bytes)));
    }
    if let Ok(Period(time)) = text.parse() {
        assert_eq!(format!("{}ms", time.as_millis()).parse(), Ok(Period(time)));
    }
    if let Ok(parent) = text.parse::<Parent>() {
        let bare: Parent = format!("{parent:?}").parse().expect("a parent");
        let parent = Parent {
            credentials: None,
            ..parent
        };
        assert_eq!(bare, parent);
    }
    if let Ok(list) = text.parse::<NoProxy>() {
        assert_eq!(list.to_string().parse(), Ok(list));
    }
}
