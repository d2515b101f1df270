//! `larder list` and `larder explain`: how an archive was verified, and why a URL would be a hit.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::common::*;

#[tokio::test]
async fn list_shows_how_each_archive_was_verified() {
    let World {
        upstream: _upstream,
        release,
        signer,
        setup,
        larder,
    } = World::new().await;
    for larder in [Some(larder), None] {
        let before = snapshot(&setup);
        let all = setup.says_json(&["list"]);
        assert_eq!(all.as_array().unwrap().len(), 1, "{all:#}");
        let listed = &all[0];
        for (key, value) in [
            ("/address", "registry.terraform.io/acme/thing"),
            ("/version", "1.2.3"),
            ("/platform", "linux_amd64"),
            ("/sha256", &release.digest()),
            ("/urls/0", &release.archive_url()),
            ("/verified/tier", "self-signed"),
            ("/verified/key", &signer.fingerprint()),
            ("/verified/signature/key", &signer.fingerprint()),
        ] {
            let found = listed.pointer(key).and_then(Value::as_str);
            assert_eq!(found, Some(value), "{key} in {listed:#}");
        }
        assert_eq!(listed["size"], release.archive().len());
        assert_sources(&listed["verified"]["sources"], &release);
        for date in [&listed["verified"]["when"], &listed["last_used"]] {
            assert_recent(date);
        }

        let text = setup.says(&["list"]);
        assert_eq!(text.lines().count(), 1, "{text}");
        for word in [
            "registry.terraform.io/acme/thing",
            "1.2.3",
            "linux_amd64",
            "kB",
            "self-signed",
        ] {
            assert!(text.contains(word), "{word}: {text}");
        }
        assert_eq!(snapshot(&setup), before);
        if let Some(larder) = larder {
            larder.terminate().await;
        }
    }
}

#[tokio::test]
async fn explain_says_hit_by_url_and_by_address_and_what_is_known() {
    let World {
        upstream: _upstream,
        release,
        signer,
        setup,
        larder,
    } = World::new().await;
    let url = release.archive_url();
    let by_address = ["explain", "acme/thing@1.2.3", "--platform", "linux_amd64"];
    let in_full = [
        "explain",
        "registry.terraform.io/acme/thing@1.2.3",
        "--platform",
        "linux_amd64",
    ];
    for larder in [Some(larder), None] {
        let before = snapshot(&setup);
        for what in [&["explain", &url][..], &by_address, &in_full] {
            let explained = &setup.says_json(what)[0];
            for (key, value) in [
                ("/url", &*url),
                ("/outcome", "hit"),
                ("/of/0", "registry.terraform.io/acme/thing 1.2.3"),
                ("/sha256", &release.digest()),
                ("/signature/tier", "self-signed"),
                ("/signature/key", &signer.fingerprint()),
            ] {
                let found = explained.pointer(key).and_then(Value::as_str);
                assert_eq!(found, Some(value), "{key} in {explained:#}");
            }
            assert_sources(&explained["sources"], &release);

            let text = setup.says(what);
            for word in [
                &*url,
                "hit",
                "self-signed",
                &release.digest(),
                &signer.fingerprint(),
                &release.document_url(),
                &release.sums_url(),
                "verified",
            ] {
                assert!(text.contains(word), "{word}: {text}");
            }
        }
        assert_eq!(snapshot(&setup), before);
        if let Some(larder) = larder {
            larder.terminate().await;
        }
    }
}

#[tokio::test]
async fn explain_says_miss_for_what_is_not_held() {
    let world = World::new().await;
    let World { release, .. } = &world;
    let other = release.file_path(&release.filename("windows_arm64"));
    let other = format!("https://{}{}", other.0, other.1);
    let connections = world.upstream.connections();
    // The sums that are held say what it should be.
    let explained = &world.setup.says_json(&["explain", &other])[0];
    assert_eq!(explained["outcome"], "miss", "{explained:#}");
    assert_eq!(explained["sha256"], sha256(&release.archives[1].1));

    let unheard_of = format!("https://{RELEASES}/a/1.0.0/a_1.0.0_linux_amd64.zip");
    let text = world.setup.says(&["explain", &unheard_of]);
    assert!(text.contains("miss: it is not held"), "{text}");
    let text = world.setup.says(&["explain", "terraform@1.9.0"]);
    assert!(
        text.contains("miss") && text.contains("/terraform/1.9.0/"),
        "{text}"
    );

    let output = world
        .setup
        .command(&["explain", "acme/other@1.2.3"])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.contains("miss"), "{errors}");
    for nonsense in ["acme", "a/b/c/d@1.0.0", "acme/thing@latest"] {
        let status = world.setup.command(&["explain", nonsense]).status();
        assert_eq!(status.unwrap().code(), Some(2), "{nonsense}");
    }
    // Nobody was asked.
    assert_eq!(world.upstream.connections(), connections);
    assert_eq!(world.setup.blobs().len(), 1);
}

#[tokio::test]
async fn explain_compares_with_a_lock_file() {
    let world = World::new().await;
    let World { release, .. } = &world;
    let lock = |digest: &str| {
        let file = world.setup.path(".terraform.lock.hcl");
        let text = format!(
            "provider \"registry.terraform.io/acme/thing\" {{\n  version = \"1.2.3\"\n  hashes = [\n    \"h1:AAAA\",\n    \"zh:{digest}\",\n  ]\n}}\n"
        );
        std::fs::write(&file, text).unwrap();
        file.to_str().unwrap().to_owned()
    };
    let right = lock(&release.digest());
    let what = ["explain", &right, "--platform", "linux_amd64"];
    let text = world.setup.says(&what);
    assert!(
        text.contains("hit") && text.contains("the lock file"),
        "{text}"
    );
    assert!(!text.contains("not the lock file"), "{text}");
    lock(&sha256(b"something else"));
    let text = world.setup.says(&what);
    assert!(text.contains("not the lock file"), "{text}");
}

#[tokio::test]
async fn explain_says_what_the_rules_refuse() {
    let world = World::new().await;
    let World { release, .. } = &world;
    let file = world.setup.path("strict.toml");
    let pin = Signer::new().fingerprint();
    for (text, words) in [
        ("deny = \"acme/*\"\n".to_owned(), "deny = \"acme/*\""),
        (
            format!("[verify]\n\"*\" = {{ keys = [\"{pin}\"] }}\n"),
            "none of the pinned keys",
        ),
        ("verify = \"signature\"\n".to_owned(), "it is held"),
    ] {
        std::fs::write(&file, text).unwrap();
        let url = release.archive_url();
        let what = ["explain", &url, "--config", file.to_str().unwrap()];
        let explained = &world.setup.says_json(&what)[0];
        let outcome = match words {
            "it is held" => "hit",
            _ => "refused",
        };
        assert_eq!(explained["outcome"], outcome, "{explained:#}");
        let why = explained["why"].as_str().unwrap();
        assert!(why.contains(words), "{why}");
    }
}

#[tokio::test]
async fn nothing_held_is_an_empty_list() {
    let setup = Setup::without_upstream();
    assert_eq!(setup.says(&["list"]), "");
    assert_eq!(setup.says_json(&["list"]), Value::Array(Vec::new()));
    assert!(!setup.data_dir().exists());
}

/// A larder that has fetched a self-signed release.
struct World {
    upstream: Upstream,
    release: Release,
    signer: Signer,
    setup: Setup,
    larder: Larder,
}

impl World {
    async fn new() -> Self {
        let upstream = Upstream::start();
        let signer = Signer::new();
        let release = Release::new("acme", "thing", "1.2.3").signed_by(&signer);
        release.publish(&upstream);
        let setup = Setup::new(&upstream);
        let larder = setup.start().await;
        let got = install(&larder.client(), &release).await;
        got.assert_is(&release.archive());
        setup.holds(1).await;
        // What the background adds to an entry is there.
        let hashed = || !setup.files_with("\"h1\":").is_empty();
        eventually("the h1 hash to be kept", hashed).await;
        Self {
            upstream,
            release,
            signer,
            setup,
            larder,
        }
    }
}

/// Document and sums are among them.
#[track_caller]
fn assert_sources(sources: &Value, release: &Release) {
    for source in [
        format!("registry document {}", release.document_url()),
        format!("SHA256SUMS {}", release.sums_url()),
    ] {
        let mut all = sources.as_array().unwrap().iter();
        assert!(all.any(|named| *named == *source), "{source}: {sources:#}");
    }
}

/// Of today, or of yesterday if this runs at midnight.
#[track_caller]
fn assert_recent(date: &Value) {
    let now = SystemTime::now();
    let day = |ago: u64| {
        let then = now - Duration::from_secs(ago * 24 * 3600);
        time::OffsetDateTime::from(then).date().to_string()
    };
    let date = date.as_str().unwrap();
    assert!(date.ends_with('Z'), "{date}");
    assert!(
        date.starts_with(&day(0)) || date.starts_with(&day(1)),
        "{date}"
    );
}

/// Every file of the data dir, with its bytes and when it changed.
fn snapshot(setup: &Setup) -> Vec<(PathBuf, String, SystemTime)> {
    let files = files_below(&setup.data_dir()).into_iter();
    files
        .map(|file| {
            let modified = file.metadata().unwrap().modified().unwrap();
            let bytes = sha256(&std::fs::read(&file).unwrap());
            (file, bytes, modified)
        })
        .collect()
}
