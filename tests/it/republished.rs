//! What was published once must not come back under the same name with other bytes.

use crate::common::registry::{SIZE, provider_zip};
use crate::common::*;

#[tokio::test]
async fn other_bytes_under_the_same_url_are_refused_and_the_old_ones_stay() {
    let (upstream, first, larder) = kept(&[]).await;
    let setup = larder.setup.clone();
    let again = republished(&first);
    again.publish(&upstream);

    let got = install(&larder.client(), &again).await;
    let words = got.assert_refused(502);
    for word in [
        "published anew",
        "republished",
        &first.digest(),
        &again.digest(),
    ] {
        assert!(words.contains(word), "{word}: {words}");
    }
    assert_eq!(got.reason, words);
    larder.logs(&["ERROR", &first.archive_url()]).await;
    assert!(larder.metric("larder_republished_total").await >= 1.0);
    assert_eq!(larder.client().head(&again.archive_url()).await.status, 502);
    assert_holds(&setup, &[&first]);
    larder.terminate().await;
    assert_eq!(setup.command(&["verify"]).status().unwrap().code(), Some(0));

    let larder = setup.start().await;
    let got = install(&larder.client(), &again).await;
    got.assert_refused(502);
    assert_holds(&setup, &[&first]);
    larder.terminate().await;

    // Nor is it forgotten with the bytes.
    setup.says(&["gc", "--max-size", "0"]);
    assert_holds(&setup, &[]);
    let larder = setup.start().await;
    install(&larder.client(), &again).await.assert_refused(502);
    setup.holds(0).await;

    // Who takes it back is believed again.
    first.publish(&upstream);
    let got = install(&larder.client(), &first).await;
    got.assert_is(&first.archive());
    setup.holds(1).await;
    assert_holds(&setup, &[&first]);
}

/// The old URL still has the old bytes; the registry names another.
#[tokio::test]
async fn other_bytes_of_the_same_version_under_another_url_are_refused() {
    let (upstream, first, larder) = kept(&[]).await;
    let setup = larder.setup.clone();
    let again = republished(&first).on(TERRAFORM, Home::GitHub);
    again.publish(&upstream);
    let words = install(&larder.client(), &again).await.assert_refused(502);
    assert!(words.contains("published anew"), "{words}");
    assert_holds(&setup, &[&first]);
    larder.terminate().await;

    setup.says(&["gc", "--max-size", "0"]);
    let larder = setup.start().await;
    install(&larder.client(), &again).await.assert_refused(502);
    setup.holds(0).await;
    assert_eq!(upstream.gets(ASSETS, &again.archive_asset_path()), 0);
}

#[tokio::test]
async fn the_same_bytes_may_move() {
    let (upstream, first, larder) = kept(&[]).await;
    let moved = first.clone().on(TERRAFORM, Home::GitHub);
    moved.publish(&upstream);
    let got = install(&larder.client(), &moved).await;
    got.assert_is(&first.archive());
    got.assert_hit();
}

#[tokio::test]
async fn with_a_warning_the_new_bytes_are_served_and_the_old_ones_stay() {
    let (upstream, first, larder) = kept(&["--republished", "warn"]).await;
    let setup = larder.setup.clone();
    let again = republished(&first);
    again.publish(&upstream);

    install(&larder.client(), &again)
        .await
        .assert_is(&again.archive());
    setup.holds(2).await;
    larder
        .logs(&["WARN", "REPUBLISHED", &again.digest(), &first.digest()])
        .await;
    assert!(larder.metric("larder_republished_total").await >= 1.0);
    assert_holds(&setup, &[&first, &again]);
    larder.terminate().await;

    let larder = setup.start().await;
    let got = larder.client().get(&again.archive_url()).await;
    got.assert_is(&again.archive());
    got.assert_hit();
    assert_holds(&setup, &[&first, &again]);
    assert_eq!(setup.command(&["verify"]).status().unwrap().code(), Some(0));
    let digests = [first.digest(), again.digest()];
    let listed = setup.says_json(&["list"]);
    for digest in digests {
        assert!(listed.to_string().contains(&digest), "{listed:#}");
    }
}

/// The documents are the old ones: this is corruption, and no option lets it pass.
#[tokio::test]
async fn bytes_that_no_document_names_are_refused_in_any_case() {
    let (upstream, first, larder) = kept(&["--republished", "warn"]).await;
    let setup = larder.setup.clone();
    larder.terminate().await;
    setup.says(&["gc", "--max-size", "0"]);
    let again = republished(&first);
    first.publish_archive(&upstream, Reply::archive(again.archive()));
    let larder = setup.start().await;
    let got = install(&larder.client(), &first).await;
    assert!(!got.succeeded());
    setup.holds(0).await;
}

#[tokio::test]
async fn a_product_is_not_replaced_either() {
    let upstream = Upstream::start();
    let first = Product::new("terraform", "1.9.0");
    first.publish(&upstream);
    let setup = Setup::new(&upstream);
    let larder = setup.start().await;
    let client = larder.client();
    let sums = format!("https://{RELEASES}{}", first.sums_path());
    client
        .get(&first.archive_url())
        .await
        .assert_is(&first.archive);
    setup.holds(1).await;

    let again = Product::sized("terraform", "1.9.0", SIZE + 1);
    again.publish(&upstream);
    client.get(&sums).await.assert_is(&again.sums);
    client.get(&first.archive_url()).await.assert_refused(502);
    setup.holds(1).await;
}

/// A larder that has fetched a release.
async fn kept(options: &[&str]) -> (Upstream, Release, Larder) {
    let upstream = Upstream::start();
    let release = Release::new("acme", "thing", "1.2.3");
    release.publish(&upstream);
    let setup = Setup::new(&upstream).args(options.iter().copied());
    let larder = setup.start().await;
    let got = install(&larder.client(), &release).await;
    got.assert_is(&release.archive());
    setup.holds(1).await;
    (upstream, release, larder)
}

/// Other bytes with sums and a signature that are right for them.
fn republished(release: &Release) -> Release {
    let Release {
        namespace,
        name,
        version,
        ..
    } = release;
    let archive = provider_zip(name, "another build", SIZE);
    Release::with_archive(namespace, name, version, archive)
}

/// The blobs on disk are the archives of these releases.
#[track_caller]
fn assert_holds(setup: &Setup, releases: &[&Release]) {
    let blobs = setup.blobs().into_iter();
    let mut found: Vec<_> = blobs
        .map(|blob| sha256(&std::fs::read(blob).unwrap()))
        .collect();
    let mut wanted: Vec<_> = releases.iter().map(|release| release.digest()).collect();
    found.sort();
    wanted.sort();
    assert_eq!(found, wanted);
}
