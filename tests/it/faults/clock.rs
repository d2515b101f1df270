//! A clock that jumps between two runs: what was kept bears times of another year.

use std::fs::{File, FileTimes};
use std::path::Path;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use rcgen::{CertificateParams, KeyPair};
use serde_json::Value;
use time::OffsetDateTime;

use crate::common::*;

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

fn dates() -> [(&'static str, SystemTime); 2] {
    let now = SystemTime::now();
    [("ahead", now + 20 * YEAR), ("behind", now - 20 * YEAR)]
}

/// Everything below the data dir was last used at this time, and written a little earlier: so the
/// kernel (mount(8), relatime) does not note by itself that something is read.
fn set_times(setup: &Setup, time: SystemTime) {
    for path in files_below(&setup.data_dir()) {
        let written = time - Duration::from_secs(3600);
        let times = FileTimes::new().set_accessed(time).set_modified(written);
        File::open(&path).unwrap().set_times(times).unwrap();
    }
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    for path in files_below(&setup.data_dir().join("metadata")) {
        set_validated(&path, since.as_millis() as u64);
    }
}

fn set_validated(document: &Path, millis: u64) {
    let bytes = std::fs::read(document).unwrap();
    let end = bytes.iter().position(|byte| *byte == b'\n').unwrap();
    let mut line: Value = serde_json::from_slice(&bytes[..end]).unwrap();
    assert!(line["validated"].is_u64(), "{line}");
    line["validated"] = millis.into();
    let line = serde_json::to_vec(&line).unwrap();
    std::fs::write(document, [&line, &bytes[end..]].concat()).unwrap();
}

/// A future date is no freshness for years, and no reason to lose the last good answer.
#[tokio::test]
async fn documents_of_another_time_are_asked_for_again() {
    for (which, time) in dates() {
        let upstream = Upstream::start();
        let [old, new] = ["1.0.0", "2.0.0"].map(|v| Release::new("hashicorp", "null", v));
        let fresh = |release: &Release| {
            let versions = release.versions().to_string();
            Reply::json(versions).header("Cache-Control", "max-age=50")
        };
        upstream.route(TERRAFORM, &old.versions_path(), fresh(&old));
        let setup = Setup::new(&upstream);
        let larder = setup.start().await;
        let got = larder.client().get(&old.versions_url()).await;
        assert_eq!(got.json(), old.versions());
        larder.terminate().await;
        set_times(&setup, time);

        upstream.route(TERRAFORM, &old.versions_path(), Reply::status(500));
        let larder = setup.start().await;
        let got = larder.client().get(&old.versions_url()).await;
        assert_eq!(got.json(), old.versions(), "{which}");
        let gets = upstream.gets(TERRAFORM, &old.versions_path());
        assert!(gets > 1, "{which}: upstream was not asked");
        let age = got.header("age").unwrap_or("0").parse::<u64>().unwrap();
        assert_eq!(age > YEAR.as_secs(), which == "behind", "{age}");

        upstream.route(TERRAFORM, &old.versions_path(), fresh(&new));
        let client = larder.client();
        for asked in ["anew", "again"] {
            let got = client.get(&old.versions_url()).await;
            assert_eq!(got.json(), new.versions(), "{which} {asked}");
        }
        let more = upstream.gets(TERRAFORM, &old.versions_path()) - gets;
        assert_eq!(more, 1, "{which}: what is new is fresh");
    }
}

#[tokio::test]
async fn archives_of_another_time_are_served_and_grow_old_from_their_next_use() {
    for (which, time) in dates() {
        let upstream = Upstream::start();
        let setup = Setup::new(&upstream);
        let products = ["used", "unused"].map(|name| Product::new(name, "1.0.0"));
        let [used, _] = &products;
        let larder = setup.start().await;
        for (held, product) in products.iter().enumerate() {
            product.publish(&upstream);
            let got = larder.client().get(&product.archive_url()).await;
            got.assert_is(&product.archive);
            setup.holds(held + 1).await;
        }
        larder.terminate().await;
        set_times(&setup, time);
        let gc = |arguments: [&str; 2]| {
            let gc = setup.command(&["gc", arguments[0], arguments[1]]).output();
            assert!(gc.as_ref().is_ok_and(|gc| gc.status.success()), "{gc:?}");
        };

        let larder = setup.start().await;
        let got = larder.client().get(&used.archive_url()).await;
        got.assert_is(&used.archive);
        got.assert_hit();
        larder.terminate().await;
        gc(["--unused-for", "1h"]);
        let kept = [used.archive.clone()];
        match which {
            "behind" => assert_eq!(contents(&setup), kept),
            // Nobody knows for how long the other one was not used.
            _ => assert!(contents(&setup).contains(&kept[0])),
        }
        let verify = setup.command(&["verify"]).output().unwrap();
        assert_eq!(verify.status.code(), Some(0), "{verify:?}");
        gc(["--unused-for", "0s"]);
        assert!(!contents(&setup).contains(&kept[0]), "{which}");
        gc(["--max-size", "0"]);
        assert!(setup.blobs().is_empty(), "{which}");
    }
}

/// The blobs' bytes.
fn contents(setup: &Setup) -> Vec<Bytes> {
    let blobs = setup.blobs().into_iter();
    blobs
        .map(|blob| std::fs::read(blob).unwrap().into())
        .collect()
}

/// Ten years pass in the end.
#[tokio::test]
async fn an_expired_ca_says_how_it_is_renewed() {
    let setup = Setup::without_upstream();
    setup.start().await.terminate().await;
    let key = std::fs::read_to_string(setup.data_dir().join("ca/ca.key")).unwrap();
    let key = KeyPair::from_pem(&key).unwrap();
    let mut params = CertificateParams::default();
    params.not_after = OffsetDateTime::now_utc() - Duration::from_secs(60);
    let expired = params.self_signed(&key).unwrap();
    std::fs::write(setup.ca_pem(), expired.pem()).unwrap();

    let start = setup.serve_command("127.0.0.1:0").output().unwrap();
    assert_eq!(start.status.code(), Some(2), "{start:?}");
    let said = String::from_utf8_lossy(&start.stderr);
    for words in ["ca.pem", "expired", "larder ca renew"] {
        assert!(said.contains(words), "no {words:?} in {said}");
    }
    let renew = setup.command(&["ca", "renew"]).output().unwrap();
    assert!(renew.status.success(), "{renew:?}");
    let larder = setup.start().await;
    let client = larder.client();
    let tls = client.handshake(client.tcp().await, RELEASES).await;
    tls.expect("a certificate of today");
}
