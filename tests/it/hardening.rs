//! Ways round the rules that were once open, each shut by its test.

use std::time::Duration;

use bytes::Bytes;

use crate::common::registry::{noise, sums_line};
use crate::common::*;

/// Upstream decodes the name; a route told from the raw path would not see an archive.
#[tokio::test]
async fn an_encoded_name_is_no_way_round_verification() {
    let upstream = Upstream::start();
    let folder = "/evil/1.0.0";
    for name in [
        "evil_1.0.0_linux_amd64%2ezip",
        "evil_1.0.0_linux_amd64.zi%70",
    ] {
        let path = format!("{folder}/{name}");
        upstream.route(RELEASES, &path, Reply::archive(noise(200_000, "evil")));
        let larder = Setup::new(&upstream).start().await;
        let got = larder
            .client()
            .get(&format!("https://{RELEASES}{path}"))
            .await;
        assert_eq!(got.status, 400, "{name}");
        assert_eq!(upstream.gets(RELEASES, &path), 0);
    }
}

/// Whatever the ending: what a release holds under its product's name is a build of it.
#[tokio::test]
async fn builds_with_unusual_endings_are_verified() {
    for ending in [".pkg.tar.zst", ".AppImage", "", ".unheard-of"] {
        let upstream = Upstream::start();
        let file = format!("vagrant_2.4.0_linux_amd64{ending}");
        let good = Bytes::from(noise(200_000, "vagrant"));
        let path = format!("/vagrant/2.4.0/{file}");
        let sums = Reply::text(sums_line(&file, &good));
        upstream.route(RELEASES, "/vagrant/2.4.0/vagrant_2.4.0_SHA256SUMS", sums);
        upstream.route(RELEASES, &path, Reply::archive(good.clone()).corrupt_at(9));
        let larder = Setup::new(&upstream).start().await;
        let url = format!("https://{RELEASES}{path}");

        assert!(!larder.client().get(&url).await.succeeded(), "{ending}");
        larder.setup.holds(0).await;
        upstream.route(RELEASES, &path, Reply::archive(good.clone()));
        larder.client().get(&url).await.assert_is(&good);
    }
}

/// There is no byte to withhold: the head itself must wait.
#[tokio::test]
async fn an_empty_archive_waits_for_its_digest() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    upstream.route(RELEASES, &product.archive_path(), Reply::archive(""));
    let larder = Setup::new(&upstream).start().await;

    let got = larder.client().get(&product.archive_url()).await;

    assert!(!got.succeeded(), "{} {}", got.status, got.text());
    larder.setup.holds(0).await;
}

/// `curl -C -` after a cut would put a good tail behind bad bytes.
#[tokio::test]
async fn what_was_cut_off_is_not_completed_by_a_range() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let (path, url) = (product.archive_path(), product.archive_url());
    let tap = Tap::at(100_000);
    let bad = Reply::archive(product.archive.clone()).corrupt_at(9);
    upstream.route(RELEASES, &path, bad.tapped(&tap));
    let larder = Setup::new(&upstream).start().await;
    let mut answer = larder.client().stream(&url).await;
    let start = answer.at_least(50_000).await;
    tap.open();
    let cut = answer.finish_after(start).await;
    assert!(!cut.succeeded());

    upstream.route(RELEASES, &path, Reply::archive(product.archive.clone()));
    let rest = format!("bytes={}-", cut.body.len());
    for what in ["from the fill", "from the store"] {
        let got = larder.client().get_with(&url, &[("Range", &rest)]).await;
        assert_eq!(got.status, 200, "{what}");
        got.assert_is(&product.archive);
        larder.setup.holds(1).await;
    }
}

#[tokio::test]
async fn an_empty_success_is_no_version_list() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    let reload = [("Cache-Control", "no-cache")];
    let good = client.get(&release.versions_url()).await.body;

    for status in [204, 203, 202] {
        upstream.route(TERRAFORM, &release.versions_path(), Reply::status(status));
        client
            .get_with(&release.versions_url(), &reload)
            .await
            .assert_is(&good);
    }
    upstream.route(TERRAFORM, &release.versions_path(), Reply::status(500));
    client
        .get_with(&release.versions_url(), &reload)
        .await
        .assert_is(&good);
}

#[tokio::test]
async fn different_accept_headers_do_not_make_two_requests() {
    let upstream = Upstream::start();
    let gate = Gate::closed();
    let page = Reply::json("{\"modules.v1\":\"/v1/modules/\"}").held_by(&gate);
    let path = "/.well-known/terraform.json";
    upstream.route(TERRAFORM, path, page);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    let url = format!("https://{TERRAFORM}{path}");

    let ask = async |accept: &'static str| client.get_with(&url, &[("Accept", accept)]).await;
    let open = async {
        eventually("upstream is asked", || upstream.gets(TERRAFORM, path) > 0).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        gate.open();
    };
    let (one, two, ()) = tokio::join!(ask("application/json"), ask("*/*"), open);

    assert!(one.succeeded() && two.succeeded());
    assert_eq!(upstream.gets(TERRAFORM, path), 1);
}

#[tokio::test]
async fn an_upstream_that_closes_at_once_is_tried_three_times() {
    let upstream = Upstream::start();
    let larder = Setup::new(&upstream).start().await;
    upstream.reset_next(100);
    let url = format!("https://{TERRAFORM}/.well-known/terraform.json");

    let got = larder.client().get(&url).await;

    assert_eq!(got.status, 502);
    assert_eq!(upstream.connections(), 3);
}

/// What is passed on without being kept has an idle timeout as well.
#[tokio::test]
async fn a_relayed_body_that_stalls_is_cut() {
    let upstream = Upstream::start();
    let tap = Tap::at(1000);
    let page = Reply::text(Bytes::from(noise(5000, "page"))).tapped(&tap);
    upstream.route(RELEASES, "/private", page);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    let url = format!("https://{RELEASES}/private");
    let headers = [("Authorization", "Bearer x")];

    let got = tokio::time::timeout(Duration::from_secs(60), client.get_with(&url, &headers));

    assert!(!got.await.expect("it ends").succeeded());
}

/// A crash between a blob's name and its index entry loses the headers that clients rely on.
#[tokio::test]
async fn a_blob_without_its_entry_is_fetched_anew() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let url = product.archive_url();
    let first = larder.client().get(&url).await;
    larder.setup.holds(1).await;
    let setup = larder.setup.clone();
    larder.kill().await;
    std::fs::remove_dir_all(setup.data_dir().join("cache/index-v5")).unwrap();

    let larder = setup.start().await;
    let again = larder.client().get(&url).await;

    again.assert_is(&product.archive);
    assert_eq!(again.header("content-type"), first.header("content-type"));
    assert_eq!(upstream.gets(RELEASES, &product.archive_path()), 2);
}
