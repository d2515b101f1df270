//! The gate holds until the last byte: what changes upstream between a question and the end of its
//! answer lets nothing through.

use serde_json::json;

use crate::common::registry::{noise, registry_json};
use crate::common::*;

#[tokio::test]
async fn who_joins_a_fetch_by_its_digest_gets_that_digest_or_nothing() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.9");
    product.publish(&upstream);
    let evil = noise(product.archive.len(), "evil");
    // Somebody else's document claims the same digest for an archive of its own.
    let document = |digest: String| {
        registry_json(&json!({
            "os": "linux", "arch": "amd64", "filename": "evil.zip", "protocols": ["5.0"],
            "download_url": format!("https://{OPENTOFU}/files/evil.zip"),
            "shasum": digest,
        }))
    };
    let path = "/v1/providers/evil/thing/1.0.0/download/linux/amd64";
    upstream.route(OPENTOFU, path, document(sha256(&product.archive)));
    let tap = Tap::at(evil.len() as u64 / 2);
    let reply = Reply::archive(evil.clone()).tapped(&tap);
    upstream.route(OPENTOFU, "/files/evil.zip", reply);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();

    // The digest of the product is known before it is asked for.
    let sums = format!("https://{RELEASES}{}", product.sums_path());
    client.get(&sums).await.assert_is(&product.sums);
    client.get(&format!("https://{OPENTOFU}{path}")).await;
    let mut first = client
        .stream(&format!("https://{OPENTOFU}/files/evil.zip"))
        .await;
    first.at_least(1).await;
    let mut victim = client.stream(&product.archive_url()).await;
    let joined = victim.header("cache-status").unwrap_or_default().to_owned();
    assert!(joined.contains("collapsed"), "{joined}");
    let begun = victim.at_least(1).await;
    upstream.route(OPENTOFU, path, document(sha256(&evil)));
    client.get(&format!("https://{OPENTOFU}{path}")).await;
    tap.open();
    let got = victim.finish_after(begun).await;
    assert!(!got.succeeded() || got.body == product.archive, "complete");
    assert!(!first.finish().await.succeeded());
    // The product itself is there for whoever asks next.
    client
        .get(&product.archive_url())
        .await
        .assert_is(&product.archive);
}

#[tokio::test]
async fn signed_sums_that_vanish_leave_nothing_to_pass_by() {
    let upstream = Upstream::start();
    let signer = Signer::new();
    let setup = Setup::new(&upstream);
    let key = setup.path("trusted.asc");
    std::fs::write(&key, signer.public().armored).unwrap();
    let product = Product::new("terraform", "1.9.9");
    product.publish(&upstream);
    let signature = Reply::file("application/octet-stream", signer.sign(&product.sums));
    let at = format!("{}.72D7468F.sig", product.sums_path());
    upstream.route(RELEASES, &at, signature);
    let fleeting =
        Reply::file("text/plain", product.sums.clone()).header("Cache-Control", "no-store");
    upstream.route_turns(
        RELEASES,
        &product.sums_path(),
        vec![fleeting.clone(), fleeting, Reply::status(404)],
    );
    let evil = noise(product.archive.len(), "evil");
    upstream.route(RELEASES, &product.archive_path(), Reply::archive(evil));
    let options = [
        "--verify",
        "signature",
        "--trusted-key",
        key.to_str().unwrap(),
    ];
    let setup = setup.args(options);
    let larder = setup.start().await;
    for _ in 0..3 {
        let got = larder.client().get(&product.archive_url()).await;
        assert!(!got.succeeded(), "{:?}", got.headers);
    }
    assert!(setup.blobs().is_empty());
}

#[tokio::test]
async fn an_archive_stays_its_providers_when_its_document_names_another() {
    let upstream = Upstream::start();
    let [old, new] = ["1.0.0", "1.0.1"].map(|version| {
        Release::new("acme", "thing", version)
            .on(TERRAFORM, Home::GitHub)
            .unsigned()
    });
    old.publish(&upstream);
    new.publish(&upstream);
    let config = "[verify]\n\"acme/*\" = \"signature\"\n";
    let larder = Setup::new(&upstream).config(config).start().await;
    let client = larder.client();
    let named = client.get(&old.document_url()).await.json();
    let path = named["download_url"].as_str().unwrap().to_owned();
    assert!(path.contains("/.larder/"), "{path}");
    client.get(&path).await.assert_refused(502);
    // The same document names another archive from now on.
    let path_of_document = old.document_path("linux_amd64");
    let renamed = registry_json(&new.document("linux_amd64"));
    upstream.route(TERRAFORM, &path_of_document, renamed);
    client.get(&old.document_url()).await;
    client.get(&path).await.assert_refused(502);
}

#[tokio::test]
async fn where_rules_are_set_no_document_leads_past_them() {
    let upstream = Upstream::start();
    let release = Release::new("acme", "thing", "1.0.0").on(TERRAFORM, Home::GitHub);
    release.publish(&upstream);
    let text = "max_metadata_size = \"20KiB\"\ndeny = [\"someone/*\"]\nverify = \"signature\"\n";
    let ruled = Setup::new(&upstream).config(text).start().await;
    let free = Setup::new(&upstream)
        .config("max_metadata_size = \"20KiB\"\n")
        .start()
        .await;
    let (document, list) = (
        release.document_path("linux_amd64"),
        release.versions_path(),
    );
    let blanks = " ".repeat(40_000);
    let mut plain = release.document("linux_amd64");
    plain["download_url"] = json!("http://plain.example/thing.zip");
    for (path, reply) in [
        (&document, Reply::redirect("https://elsewhere.example/x")),
        (&list, Reply::redirect("https://elsewhere.example/x")),
        (
            &document,
            Reply::json(format!("{}{blanks}", release.document("linux_amd64"))),
        ),
        (
            &list,
            Reply::json(format!("{}{blanks}", release.versions())),
        ),
        (&document, registry_json(&plain)),
        (
            &list,
            Reply::json(r#"{"versions":[],"Versions":[{"version":"1.0.0"}]}"#),
        ),
    ] {
        upstream.route(TERRAFORM, path, reply.header("Cache-Control", "no-store"));
        let url = format!("https://{TERRAFORM}{path}");
        let words = ruled.client().get(&url).await.assert_refused(502);
        assert!(words.contains("rules are set"), "{words}");
        let got = free.client().get(&url).await;
        assert!(got.status < 400, "{} {}", got.status, got.text());
    }
}

#[tokio::test]
async fn no_document_makes_an_archive_of_a_document() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "thing", "1.0.0");
    release.publish(&upstream);
    let path = "/v1/providers/evil/thing/1.0.0/download/linux/amd64";
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    for url in [
        release.versions_url(),
        release.document_url(),
        release.sums_url(),
    ] {
        let claim = registry_json(&json!({
            "os": "linux", "arch": "amd64", "filename": "x.zip", "protocols": ["5.0"],
            "download_url": url, "shasum": sha256(b"other bytes"),
        }));
        upstream.route(OPENTOFU, path, claim);
        let claimed = client.get(&format!("https://{OPENTOFU}{path}")).await;
        claimed.assert_refused(502);
        let got = client.get(&url).await;
        assert!(
            got.succeeded() && got.status == 200,
            "{url}: {}",
            got.status
        );
    }
}

#[tokio::test]
async fn what_another_urls_fetch_left_is_not_completed_by_a_range() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.9");
    product.publish(&upstream);
    let evil = noise(product.archive.len(), "evil");
    let path = "/v1/providers/evil/thing/1.0.0/download/linux/amd64";
    let claim = registry_json(&json!({
        "os": "linux", "arch": "amd64", "filename": "evil.zip", "protocols": ["5.0"],
        "download_url": format!("https://{OPENTOFU}/files/evil.zip"),
        "shasum": sha256(&product.archive),
    }));
    upstream.route(OPENTOFU, path, claim);
    let tap = Tap::at(evil.len() as u64 / 2);
    let reply = Reply::archive(evil).tapped(&tap);
    upstream.route(OPENTOFU, "/files/evil.zip", reply);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    let sums = format!("https://{RELEASES}{}", product.sums_path());
    client.get(&sums).await.assert_is(&product.sums);
    client.get(&format!("https://{OPENTOFU}{path}")).await;
    let mut first = client
        .stream(&format!("https://{OPENTOFU}/files/evil.zip"))
        .await;
    first.at_least(1).await;
    let mut victim = client.stream(&product.archive_url()).await;
    let begun = victim.at_least(1).await;
    tap.open();
    let cut = victim.finish_after(begun).await;
    assert!(!cut.succeeded());
    let rest = format!("bytes={}-", cut.body.len());
    let got = client
        .get_with(&product.archive_url(), &[("Range", &rest)])
        .await;
    // The whole, since what the client has was never verified.
    got.assert_is(&product.archive);
}
