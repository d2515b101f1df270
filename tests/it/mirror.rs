//! The provider network mirror protocol.

use serde_json::{Value, json};

use crate::common::*;
use crate::terraform::{Project, no_terraform};

fn base(release: &Release) -> String {
    format!(
        "/mirror/{}/{}/{}",
        release.registry, release.namespace, release.name
    )
}

#[tokio::test]
async fn a_mirror_lists_versions_platforms_and_hashes_and_streams_the_archive() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    let base = base(&release);

    let index = client.page(&format!("{base}/index.json")).await;
    assert_eq!(index.header("content-type"), Some("application/json"));
    assert_eq!(index.json(), json!({ "versions": { "3.2.1": {} } }));

    let page = format!("{base}/3.2.1.json");
    let version = client.page(&page).await;
    assert_eq!(version.header("content-type"), Some("application/json"));
    let archives = version.json()["archives"].clone();
    for (platform, bytes) in &release.archives {
        let archive = &archives[platform];
        assert_eq!(archive["hashes"], json!([format!("zh:{}", sha256(bytes))]));
        let file = format!("terraform-provider-null_3.2.1_{platform}.zip");
        assert_eq!(archive["url"], Value::from(file.clone()));
    }
    assert_eq!(archives.as_object().unwrap().len(), release.archives.len());
    // Of all platforms one document and one file of sums were enough.
    let documents = upstream.count(|seen| seen.path().contains("/download/"));
    assert_eq!((documents, upstream.archive_bytes()), (1, 0));

    let file = format!("{base}/terraform-provider-null_3.2.1_linux_amd64.zip");
    let archive = client.page(&file).await;
    archive.assert_is(&release.archive());
    assert_eq!(archive.header("content-type"), Some("application/zip"));
    larder.setup.holds(1).await;
    client.page(&file).await.assert_hit();
    // Its own hash comes when it was computed, and only for what is held.
    let hashes =
        || async { client.page(&page).await.json()["archives"]["linux_amd64"]["hashes"].clone() };
    let mut found = hashes().await;
    let start = std::time::Instant::now();
    while found.as_array().unwrap().len() < 2 && start.elapsed() < PATIENCE {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        found = hashes().await;
    }
    assert!(found[0].as_str().unwrap().starts_with("h1:"), "{found}");
    assert_eq!(found[1], format!("zh:{}", release.digest()));
    // It is kept with the archive.
    let setup = larder.setup.clone();
    larder.terminate().await;
    let larder = setup.start().await;
    let kept =
        larder.client().page(&page).await.json()["archives"]["linux_amd64"]["hashes"].clone();
    assert_eq!(kept, found);
}

#[tokio::test]
async fn what_the_registry_lacks_is_not_found_and_what_fails_is_not() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    let base = base(&release);
    for path in [
        format!("/mirror/{TERRAFORM}/hashicorp/none/index.json"),
        format!("{base}/9.9.9.json"),
        format!("{base}/terraform-provider-null_3.2.1_plan9_mips.zip"),
    ] {
        let none = client.page(&path).await;
        assert_eq!(none.status, 404, "{path}: {}", none.text());
    }
    let failing = Release::new("hashicorp", "broken", "1.0.0");
    failing.publish(&upstream);
    upstream.route(TERRAFORM, &failing.versions_path(), Reply::status(500));
    let path = format!("/mirror/{TERRAFORM}/hashicorp/broken/index.json");
    let failed = client.page(&path).await;
    assert_eq!(failed.status, 502, "{}", failed.text());
}

#[tokio::test]
async fn a_mirrored_archive_is_verified_and_sums_that_contradict_are_refused() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let corrupt = Reply::archive(release.archive()).corrupt_at(1000);
    release.publish_archive(&upstream, corrupt);
    let larder = Setup::new(&upstream).start().await;
    let base = base(&release);
    let file = format!("{base}/terraform-provider-null_3.2.1_linux_amd64.zip");
    assert!(!larder.client().page(&file).await.succeeded());
    larder.setup.holds(0).await;

    let other = Release::new("hashicorp", "other", "1.0.0");
    other.publish(&upstream);
    let mut document = other.document("linux_amd64");
    document["shasum"] = release.digest().into();
    let reply = registry::registry_json(&document);
    upstream.route(TERRAFORM, &other.document_path("linux_amd64"), reply);
    let page = format!("/mirror/{TERRAFORM}/hashicorp/other/1.0.0.json");
    let refused = larder.client().page(&page).await;
    assert_eq!(refused.status, 502, "{}", refused.text());
}

#[tokio::test]
async fn rules_hold_for_the_mirror() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    let unsigned = Release::new("someone", "thing", "1.0.0").unsigned();
    release.publish(&upstream);
    unsigned.publish(&upstream);
    let rules = "deny = [\"hashicorp/null\"]\n[verify]\n\"*\" = \"signature\"\n";
    let larder = Setup::new(&upstream).config(rules).start().await;
    let client = larder.client();
    let base = base(&release);
    assert_eq!(client.page(&format!("{base}/index.json")).await.status, 451);
    let file = format!("{base}/terraform-provider-null_3.2.1_linux_amd64.zip");
    assert_eq!(client.page(&file).await.status, 403);
    let page = format!("/mirror/{TERRAFORM}/someone/thing/1.0.0.json");
    let refused = client.page(&page).await;
    assert_eq!(refused.status, 502);
    assert!(refused.text().contains("signature"), "{}", refused.text());
    assert_eq!(upstream.archive_bytes(), 0);
}

#[tokio::test]
async fn a_client_may_be_sent_to_the_origin_while_larder_fetches_for_the_next() {
    let upstream = Upstream::start();
    let release = Release::new("someone", "thing", "1.2.3").on(TERRAFORM, Home::GitHub);
    release.publish(&upstream);
    let larder = Setup::new(&upstream)
        .config("redirect = \"307\"\n")
        .start()
        .await;
    let client = larder.client();
    let file = format!(
        "{}/terraform-provider-thing_1.2.3_linux_amd64.zip",
        base(&release)
    );
    let sent = client.page(&file).await;
    assert_eq!(sent.status, 307);
    assert_eq!(sent.header("location"), Some(&*release.archive_url()));
    larder.setup.holds(1).await;
    let held = client.page(&file).await;
    held.assert_hit();
    held.assert_is(&release.archive());
}

#[tokio::test]
async fn terraform_installs_from_the_mirror() {
    if no_terraform() {
        return;
    }
    let upstream = Upstream::start();
    let releases = [
        Release::new("hashicorp", "null", "3.2.1"),
        Release::new("someone", "thing", "1.2.3").on(TERRAFORM, Home::GitHub),
    ];
    releases
        .iter()
        .for_each(|release| release.publish(&upstream));
    let larder = Setup::new(&upstream).start().await;
    let config = format!(
        "provider_installation {{\n  network_mirror {{\n    url = \"https://localhost:{}/mirror/\"\n  }}\n}}\n",
        larder.addr.port()
    );
    let first = Project::new(&larder, "first", &releases);
    first.init_configured(&config);
    larder.setup.holds(2).await;
    let sent = upstream.archive_bytes();
    let second = Project::new(&larder, "second", &releases);
    second.init_configured(&config);
    assert_eq!(upstream.archive_bytes(), sent);
    assert!(second.lock().contains("\"h1:"), "{}", second.lock());
}

#[tokio::test]
async fn who_only_looks_starts_no_download_and_rules_come_before_a_redirect() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let young = httpdate::fmt_http_date(std::time::SystemTime::now());
    let archive = Reply::archive(release.archive()).last_modified(&young);
    release.publish_archive(&upstream, archive);
    let setup = Setup::new(&upstream).config("redirect = \"307\"\n");
    let larder = setup.start().await;
    let file = format!(
        "{}/terraform-provider-null_3.2.1_linux_amd64.zip",
        base(&release)
    );
    let mut conn = larder.client().plain().await;
    conn.request("HEAD", &larder.addr.to_string(), &file, &[])
        .await;
    assert_eq!(conn.answer("HEAD").await.unwrap().status, 200);
    let (_, path) = release.archive_path();
    assert_eq!(upstream.gets(RELEASES, &path), 0);
    larder.terminate().await;

    let ruled = Setup::new(&upstream).config("redirect = \"307\"\nmin_age = \"1d\"\n");
    let larder = ruled.start().await;
    assert_eq!(larder.client().page(&file).await.status, 403);
}

#[tokio::test]
async fn listing_a_registry_for_the_mirror_opens_no_tunnel() {
    let upstream = Upstream::start();
    let larder = Setup::new(&upstream)
        .config(&format!(
            "mirror_hosts = [\"localhost:{}\"]\n",
            upstream.addr.port()
        ))
        .start()
        .await;
    let authority = format!("localhost:{}", upstream.addr.port());
    let refused = larder.client().connect(&authority).await.unwrap_err();
    assert_eq!(refused.status, 403, "{refused:?}");
    // But larder asks it.
    let page = format!("/registry/{authority}/v1/providers/a/b/versions");
    larder.client().page(&page).await;
    assert_eq!(
        upstream.count(|seen| seen.path() == "/.well-known/terraform.json"),
        1
    );
}
