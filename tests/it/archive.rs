//! Archives stream to the client and into the store at once, and none completes unverified; any
//! number of clients are one upstream GET.

use std::time::Duration;

use serde_json::json;

use crate::common::registry::{noise, registry_json, sums_line};
use crate::common::upstream::Break;
use crate::common::*;

#[tokio::test]
async fn a_cold_archive_arrives_whole_and_is_kept() {
    let (upstream, release, larder) = published().await;
    let client = larder.client();
    client.get(&release.document_url()).await;

    let got = client.get(&release.archive_url()).await;

    got.assert_is(&release.archive());
    let status = got.cache_status();
    assert!(status.starts_with("larder; fwd="), "{status}");
    assert!(got.header("via").is_some());
    let (host, path) = release.archive_path();
    assert_eq!(upstream.gets(host, &path), 1);
    larder.setup.holds(1).await;
}

#[tokio::test]
async fn a_kept_archive_costs_upstream_nothing() {
    let (upstream, release, larder) = published().await;
    let client = larder.client();
    client.get(&release.document_url()).await;
    client.get(&release.archive_url()).await;
    larder.setup.holds(1).await;
    let (sent, requests) = (upstream.archive_bytes(), upstream.journal().len());

    let got = client.get(&release.archive_url()).await;

    got.assert_is(&release.archive());
    got.assert_hit();
    assert_eq!(upstream.archive_bytes(), sent);
    assert_eq!(upstream.journal().len(), requests);
}

/// hc-install refuses other types and chunked answers.
#[tokio::test]
async fn archives_have_a_length_and_their_exact_type_cold_and_warm() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    for what in ["cold", "warm"] {
        let got = larder.client().get(&product.archive_url()).await;
        got.assert_is(&product.archive);
        let length = product.archive.len().to_string();
        assert_eq!(got.header("content-length"), Some(&*length), "{what}");
        assert_eq!(
            got.header("content-type"),
            Some("application/zip"),
            "{what}"
        );
        assert_eq!(got.header("content-encoding"), None, "{what}");
        larder.setup.holds(1).await;
    }
}

#[tokio::test]
async fn a_hit_survives_a_restart() {
    let (mut upstream, release, larder) = published().await;
    larder.client().get(&release.document_url()).await;
    larder.client().get(&release.archive_url()).await;
    larder.setup.holds(1).await;
    let setup = larder.setup.clone();
    assert_eq!(larder.terminate().await, Some(0));
    upstream.stop();

    let larder = setup.start().await;
    let got = larder.client().get(&release.archive_url()).await;

    got.assert_is(&release.archive());
    got.assert_hit();
}

#[tokio::test]
async fn the_first_bytes_arrive_while_upstream_is_still_sending() {
    let (upstream, release, larder) = published().await;
    let client = larder.client();
    client.get(&release.document_url()).await;
    let tap = Tap::at(100_000);
    release.publish_archive(&upstream, Reply::archive(release.archive()).tapped(&tap));

    let mut answer = client.stream(&release.archive_url()).await;
    let first = answer.at_least(60_000).await;

    assert_eq!(answer.status, 200);
    tap.open();
    let got = answer.finish_after(first).await;
    got.assert_is(&release.archive());
}

#[tokio::test]
async fn the_head_arrives_before_the_first_byte_of_the_body() {
    let (upstream, release, larder) = published().await;
    let client = larder.client();
    client.get(&release.document_url()).await;
    let tap = Tap::at(0);
    release.publish_archive(&upstream, Reply::archive(release.archive()).tapped(&tap));

    let answer = client.stream(&release.archive_url()).await;

    assert_eq!(answer.status, 200);
    tap.open();
    answer.finish().await.assert_is(&release.archive());
}

#[tokio::test]
async fn a_corrupt_archive_never_completes_and_leaves_nothing() {
    let archive = Release::new("hashicorp", "null", "3.2.1").archive();
    let middle = archive.len() as u64 / 2;
    let last = archive.len() as u64 - 1;
    let plain = || Reply::archive(archive.clone());
    for (how, reply) in [
        ("first byte", plain().corrupt_at(0)),
        ("middle", plain().corrupt_at(middle)),
        ("last byte", plain().corrupt_at(last)),
        ("chunked", plain().chunked().corrupt_at(middle)),
        (
            "close-delimited",
            plain().close_delimited().corrupt_at(middle),
        ),
        (
            "cut short in good order",
            plain().close_delimited().breaks_after(middle, Break::Clean),
        ),
        ("announced too short", plain().declares_length(middle)),
        ("announced too long", plain().declares_length(last + 1000)),
        ("empty", Reply::archive("")),
    ] {
        println!("{how}");
        let (upstream, release, larder) = published().await;
        let client = larder.client();
        client.get(&release.document_url()).await;
        release.publish_archive(&upstream, reply);

        let got = client.get(&release.archive_url()).await;

        assert!(
            !got.succeeded(),
            "{how}: {} bytes completed",
            got.body.len()
        );
        assert!(got.body.len() < archive.len(), "{how}");
        larder.setup.holds(0).await;

        // And it is asked for anew: nothing bad is remembered.
        release.publish_archive(&upstream, plain());
        client.get(&release.archive_url()).await.assert_is(&archive);
    }
}

#[tokio::test]
async fn log_and_metric_say_which_source_contradicted_what() {
    let (upstream, release, larder) = published().await;
    let client = larder.client();
    client.get(&release.document_url()).await;
    assert_eq!(larder.metric("larder_digest_mismatch_total").await, 0.0);
    let reply = Reply::archive(release.archive()).corrupt_at(1000);
    release.publish_archive(&upstream, reply);
    let mut corrupt = release.archive().to_vec();
    corrupt[1000] ^= 0x55;

    client.get(&release.archive_url()).await;

    let url = release.archive_url();
    let (expected, found) = (release.digest(), sha256(&corrupt));
    larder.logs(&["\"ERROR\"", &url, &expected, &found]).await;
    assert!(larder.metric("larder_digest_mismatch_total").await >= 1.0);
}

/// terraform's own zips, packer, vault: setup-terraform checks nothing, so larder must.
#[tokio::test]
async fn the_sums_beside_an_archive_are_fetched_by_larder_itself() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;

    let got = larder.client().get(&product.archive_url()).await;

    got.assert_is(&product.archive);
    assert_eq!(upstream.gets(RELEASES, &product.sums_path()), 1);
    larder.setup.holds(1).await;
}

#[tokio::test]
async fn a_corrupt_product_never_completes_for_a_client_that_checks_nothing() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let corrupt = Reply::archive(product.archive.clone()).corrupt_at(150_000);
    upstream.route(RELEASES, &product.archive_path(), corrupt);
    let larder = Setup::new(&upstream).start().await;

    let got = larder.client().get(&product.archive_url()).await;

    assert!(!got.succeeded());
    larder.setup.holds(0).await;
    assert!(larder.metric("larder_digest_mismatch_total").await >= 1.0);
}

#[tokio::test]
async fn sums_and_archive_are_fetched_at_the_same_time() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let (sums_gate, tap) = (Gate::closed(), Tap::at(0));
    let sums = Reply::file("text/plain", product.sums.clone()).held_by(&sums_gate);
    upstream.route(RELEASES, &product.sums_path(), sums);
    let archive = Reply::archive(product.archive.clone()).tapped(&tap);
    upstream.route(RELEASES, &product.archive_path(), archive);
    let larder = Setup::new(&upstream).start().await;

    let mut answer = larder.client().stream(&product.archive_url()).await;
    eventually("both asked for", || {
        upstream.gets(RELEASES, &product.sums_path()) == 1
            && upstream.gets(RELEASES, &product.archive_path()) == 1
    })
    .await;
    tap.open();
    let first = answer.at_least(200_000).await;

    // All of the archive is here but its digest is not known: the tail waits.
    let rest = tokio::time::timeout(Duration::from_millis(500), answer.finish_after(first)).await;
    assert!(rest.is_err(), "completed before the digest was known");
    sums_gate.open();
    let got = larder.client().get(&product.archive_url()).await;
    got.assert_is(&product.archive);
    assert_eq!(upstream.gets(RELEASES, &product.archive_path()), 1);
}

/// Any byte may be the last where no length was announced: then too some must stay behind.
#[tokio::test]
async fn the_tail_waits_for_the_digest_with_and_without_a_length() {
    let plain = |product: &Product| Reply::archive(product.archive.clone());
    let framings: [fn(Reply) -> Reply; 3] = [|reply| reply, Reply::chunked, Reply::close_delimited];
    for framing in framings {
        let upstream = Upstream::start();
        let product = Product::new("terraform", "1.9.0");
        product.publish(&upstream);
        let gate = Gate::closed();
        let sums = Reply::file("text/plain", product.sums.clone()).held_by(&gate);
        upstream.route(RELEASES, &product.sums_path(), sums);
        let path = product.archive_path();
        upstream.route(RELEASES, &path, framing(plain(&product)));
        let larder = Setup::new(&upstream).start().await;

        let mut answer = larder.client().stream(&product.archive_url()).await;
        let total = product.archive.len();
        let mut body = answer.at_least(total - 20_000).await;
        let silence = Duration::from_millis(500);
        while let Ok(chunk) = tokio::time::timeout(silence, answer.chunk()).await {
            body.extend(chunk.expect("neither end nor cut before the digest is known"));
        }
        assert!(
            body.len() < total,
            "all of {total} bytes before the digest is known"
        );
        gate.open();
        answer.finish_after(body).await.assert_is(&product.archive);
    }
}

#[tokio::test]
async fn a_registry_document_and_sums_that_disagree_let_nothing_through() {
    for liar in ["document", "sums"] {
        let upstream = Upstream::start();
        let mut release = Release::new("hashicorp", "null", "3.2.1");
        let archive = release.archive();
        let false_digest = sha256(b"something else");
        let mut document = release.document("linux_amd64");
        match liar {
            "document" => document["shasum"] = json!(false_digest),
            _ => {
                let sums = String::from_utf8(release.sums.to_vec()).unwrap();
                release.sums = sums.replace(&release.digest(), &false_digest).into();
            }
        }
        release.publish(&upstream);
        let path = release.document_path("linux_amd64");
        upstream.route(TERRAFORM, &path, registry_json(&document));
        let larder = Setup::new(&upstream).start().await;
        let client = larder.client();
        client.get(&release.document_url()).await;
        client.get(&release.sums_url()).await;

        let got = client.get(&release.archive_url()).await;

        assert!(
            !got.succeeded(),
            "the {liar} lied and {} bytes completed",
            archive.len()
        );
        larder.setup.holds(0).await;
        larder
            .logs(&["\"ERROR\"", &false_digest, &release.digest()])
            .await;
    }
}

#[tokio::test]
async fn without_any_digest_an_archive_passes_through_unkept_and_says_so() {
    for status in [404, 403, 410] {
        let upstream = Upstream::start();
        let product = Product::new("terraform", "1.9.0");
        product.publish(&upstream);
        upstream.route(RELEASES, &product.sums_path(), Reply::status(status));
        let larder = Setup::new(&upstream).start().await;
        let client = larder.client();

        client
            .get(&product.archive_url())
            .await
            .assert_is(&product.archive);
        larder.logs(&[&product.archive_path(), "digest"]).await;
        larder.setup.holds(0).await;

        // Now that larder knows, the head knows too.
        let again = client.get(&product.archive_url()).await;
        again.assert_is(&product.archive);
        let said = again.cache_status();
        assert!(
            said.contains("no-digest") && !said.contains("hit"),
            "{said}"
        );
        assert_eq!(
            upstream.gets(RELEASES, &product.archive_path()),
            2,
            "{status}"
        );
        larder.setup.holds(0).await;
    }
}

#[tokio::test]
async fn any_other_failure_to_learn_the_digest_cuts_the_tail() {
    let other_file = sums_line("terraform_1.9.0_darwin_arm64.zip", b"other");
    let half_a_digest = "0123456789abcdef  terraform_1.9.0_linux_amd64.zip\n";
    for (why, sums) in [
        ("500", Reply::status(500)),
        ("429", Reply::status(429)),
        ("401", Reply::status(401)),
        ("cut", Reply::text(vec![b'a'; 1000]).cut_after(100)),
        ("without this file", Reply::text(other_file)),
        (
            "a page of HTML",
            Reply::new(200, "text/html", "<html>log in</html>"),
        ),
        ("not a digest", Reply::text(half_a_digest)),
        ("empty", Reply::text("")),
    ] {
        println!("{why}");
        let upstream = Upstream::start();
        let product = Product::new("terraform", "1.9.0");
        product.publish(&upstream);
        upstream.route(RELEASES, &product.sums_path(), sums);
        let larder = Setup::new(&upstream).start().await;

        let got = larder.client().get(&product.archive_url()).await;

        assert!(!got.succeeded(), "sums: {why}");
        larder.setup.holds(0).await;
    }
}

#[tokio::test]
async fn an_archive_without_a_length_is_verified_to_its_end() {
    let archive = Release::new("hashicorp", "null", "3.2.1").archive();
    let plain = || Reply::archive(archive.clone());
    for reply in [plain().chunked(), plain().close_delimited()] {
        let (upstream, release, larder) = published().await;
        let client = larder.client();
        client.get(&release.document_url()).await;
        release.publish_archive(&upstream, reply);
        client.get(&release.archive_url()).await.assert_is(&archive);
        eventually("nothing staged", || larder.setup.staged().is_empty()).await;
    }
}

#[tokio::test]
async fn an_archive_that_does_not_exist_stays_so() {
    let (upstream, _, larder) = published().await;
    for status in [404, 403] {
        let path = format!("/vault/{status}.0.0/vault_{status}.0.0_linux_amd64.zip");
        upstream.route(RELEASES, &path, Reply::status(status));
        let got = larder
            .client()
            .get(&format!("https://{RELEASES}{path}"))
            .await;
        assert_eq!(got.status, status);
        assert!(got.complete);
    }
    larder.setup.holds(0).await;
}

#[tokio::test]
async fn an_archive_fetched_with_credentials_is_not_shared() {
    let (upstream, release, larder) = published().await;
    let client = larder.client();
    let (host, path) = release.archive_path();
    let secret = Release::sized("hashicorp", "null", "3.2.1", 250_000).archive();
    let for_all = release.archive();
    upstream.route_fn(host, &path, move |seen| {
        match seen.header("authorization") {
            Some(_) => Reply::archive(secret.clone()),
            None => Reply::archive(for_all.clone()),
        }
    });
    let authorization = [("Authorization", "Bearer let-me-in")];

    client
        .get_with(&release.archive_url(), &authorization)
        .await;
    client
        .get_with(&release.archive_url(), &authorization)
        .await;

    larder.setup.holds(0).await;
    assert_eq!(upstream.gets(host, &path), 2);
    client.get(&release.document_url()).await;
    let anonymous = client.get(&release.archive_url()).await;
    anonymous.assert_is(&release.archive());
}

/// The catalogue's invariant: a digest once known for a URL never changes silently.
#[tokio::test]
async fn a_digest_that_changes_is_logged() {
    let (upstream, release, larder) = published().await;
    let client = larder.client();
    let path = release.document_path("linux_amd64");
    let publish = |release: &Release| {
        let document = registry_json(&release.document("linux_amd64"));
        upstream.route(
            TERRAFORM,
            &path,
            document.header("Cache-Control", "no-cache"),
        );
    };
    publish(&release);
    client.get(&release.document_url()).await;
    client.get(&release.archive_url()).await;
    larder.setup.holds(1).await;
    let old = release.digest();

    let changed = Release::sized("hashicorp", "null", "3.2.1", 260_000);
    changed.publish(&upstream);
    publish(&changed);
    let served = client.get(&release.document_url()).await.json();
    assert_eq!(served["shasum"], json!(changed.digest()));
    let got = client.get(&release.archive_url()).await;

    assert!(
        !got.succeeded() || got.body == changed.archive(),
        "the old archive for the new digest"
    );
    larder
        .logs(&[&release.archive_url(), &old, &changed.digest()])
        .await;
}

#[tokio::test]
async fn one_digest_under_two_urls_is_one_archive() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let elsewhere = release.clone().on(OPENTOFU, Home::GitHub);
    elsewhere.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    client.get(&release.document_url()).await;
    client.get(&release.archive_url()).await;
    larder.setup.holds(1).await;
    let sent = upstream.archive_bytes();

    let document = client.get(&elsewhere.document_url()).await.json();
    let got = client.get(document["download_url"].as_str().unwrap()).await;

    got.assert_is(&release.archive());
    got.assert_hit();
    assert_eq!(upstream.archive_bytes(), sent);
}

#[tokio::test]
async fn twenty_clients_are_one_upstream_get() {
    let (upstream, release, larder) = published().await;
    let client = larder.client();
    client.get(&release.document_url()).await;
    let tap = Tap::at(100_000);
    release.publish_archive(&upstream, Reply::archive(release.archive()).tapped(&tap));

    // Each of them has read from its start before upstream goes on.
    let mut clients = Vec::new();
    for _ in 0..20 {
        let mut answer = client.stream(&release.archive_url()).await;
        let first = answer.at_least(50_000).await;
        clients.push((answer, first));
    }
    tap.open();

    let mut joined = 0;
    for (answer, first) in clients {
        let got = answer.finish_after(first).await;
        got.assert_is(&release.archive());
        joined += usize::from(got.cache_status().contains("collapsed"));
    }
    let (host, path) = release.archive_path();
    assert_eq!(upstream.gets(host, &path), 1);
    assert_eq!(joined, 19);
}

/// The upstream has not even answered when the others come.
#[tokio::test]
async fn clients_that_come_before_upstreams_head_share_the_fetch() {
    let (upstream, release, larder) = published().await;
    let client = larder.client();
    client.get(&release.document_url()).await;
    let gate = Gate::closed();
    release.publish_archive(&upstream, Reply::archive(release.archive()).held_by(&gate));
    let url = release.archive_url();

    let clients: Vec<_> = (0..16)
        .map(|_| {
            let (client, url) = (client.clone(), url.clone());
            tokio::spawn(async move { client.get(&url).await })
        })
        .collect();
    let (host, path) = release.archive_path();
    eventually("upstream is asked", || upstream.gets(host, &path) > 0).await;
    // Those that come later than this only make the test easier to pass.
    tokio::time::sleep(Duration::from_millis(300)).await;
    gate.open();

    for client in clients {
        client.await.unwrap().assert_is(&release.archive());
    }
    assert_eq!(upstream.gets(host, &path), 1);
}

#[tokio::test]
async fn clients_share_the_fetch_of_an_archive_whose_digest_is_not_known_yet() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let gate = Gate::closed();
    let sums = Reply::file("text/plain", product.sums.clone()).held_by(&gate);
    upstream.route(RELEASES, &product.sums_path(), sums);
    let larder = Setup::new(&upstream).start().await;

    let mut clients = Vec::new();
    for _ in 0..8 {
        let mut answer = larder.client().stream(&product.archive_url()).await;
        let first = answer.at_least(50_000).await;
        clients.push((answer, first));
    }
    gate.open();

    for (answer, first) in clients {
        answer.finish_after(first).await.assert_is(&product.archive);
    }
    assert_eq!(upstream.gets(RELEASES, &product.archive_path()), 1);
    assert_eq!(upstream.gets(RELEASES, &product.sums_path()), 1);
}

#[tokio::test]
async fn a_client_that_stops_reading_stalls_nobody() {
    let upstream = Upstream::start();
    // More than the kernel buffers for a reader that does not read.
    let release = Release::sized("hashicorp", "big", "1.0.0", 16 << 20);
    release.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    client.get(&release.document_url()).await;
    let mut leader = client.stream(&release.archive_url()).await;
    let first = leader.at_least(1).await;

    let follower = client.get(&release.archive_url()).await;

    follower.assert_is(&release.archive());
    larder.setup.holds(1).await;
    // At its own speed, the leader misses nothing either.
    leader
        .finish_after(first)
        .await
        .assert_is(&release.archive());
    let (host, path) = release.archive_path();
    assert_eq!(upstream.gets(host, &path), 1);
}

#[tokio::test]
async fn a_leader_that_hangs_up_takes_nobody_along() {
    let (upstream, release, larder) = published().await;
    let client = larder.client();
    client.get(&release.document_url()).await;
    let tap = Tap::at(100_000);
    release.publish_archive(&upstream, Reply::archive(release.archive()).tapped(&tap));
    let mut leader = client.stream(&release.archive_url()).await;
    leader.at_least(10_000).await;
    let mut follower = client.stream(&release.archive_url()).await;
    let first = follower.at_least(10_000).await;

    drop(leader);
    tap.open();

    follower
        .finish_after(first)
        .await
        .assert_is(&release.archive());
    let (host, path) = release.archive_path();
    assert_eq!(upstream.gets(host, &path), 1);
}

#[tokio::test]
async fn a_fill_without_clients_goes_on_to_the_end() {
    let (upstream, release, larder) = published().await;
    let client = larder.client();
    client.get(&release.document_url()).await;
    let tap = Tap::at(100_000);
    release.publish_archive(&upstream, Reply::archive(release.archive()).tapped(&tap));
    let mut only = client.stream(&release.archive_url()).await;
    only.at_least(10_000).await;

    drop(only);
    tap.open();

    larder.setup.holds(1).await;
    let got = client.get(&release.archive_url()).await;
    got.assert_is(&release.archive());
    got.assert_hit();
    let (host, path) = release.archive_path();
    assert_eq!(upstream.gets(host, &path), 1);
}

/// Committing a short body because its reader left would poison the store.
#[tokio::test]
async fn an_abandoned_fill_that_upstream_cuts_leaves_nothing() {
    let (upstream, release, larder) = published().await;
    let client = larder.client();
    client.get(&release.document_url()).await;
    let tap = Tap::at(100_000);
    let cut = Reply::archive(release.archive())
        .tapped(&tap)
        .cut_after(200_000);
    let gone = Reply::archive(release.archive())
        .no_validators()
        .cut_after(0);
    release.publish_archive_turns(&upstream, vec![cut, gone]);
    let mut only = client.stream(&release.archive_url()).await;
    only.at_least(10_000).await;

    drop(only);
    tap.open();

    larder.setup.holds(0).await;
}

#[tokio::test]
async fn a_late_joiner_misses_nothing() {
    let (upstream, release, larder) = published().await;
    let client = larder.client();
    client.get(&release.document_url()).await;
    let tap = Tap::at(250_000);
    release.publish_archive(&upstream, Reply::archive(release.archive()).tapped(&tap));
    let mut early = client.stream(&release.archive_url()).await;
    let first = early.at_least(200_000).await;

    let mut late = client.stream(&release.archive_url()).await;
    let start = late.at_least(200_000).await;
    assert_eq!(start[..200_000], release.archive()[..200_000]);
    tap.open();

    late.finish_after(start).await.assert_is(&release.archive());
    early
        .finish_after(first)
        .await
        .assert_is(&release.archive());
}

#[tokio::test]
async fn followers_of_a_corrupt_fill_are_all_cut() {
    let (upstream, release, larder) = published().await;
    let client = larder.client();
    client.get(&release.document_url()).await;
    let tap = Tap::at(200_000);
    let corrupt = Reply::archive(release.archive()).corrupt_at(250_000);
    release.publish_archive(&upstream, corrupt.tapped(&tap));
    let mut clients = Vec::new();
    for _ in 0..5 {
        let mut answer = client.stream(&release.archive_url()).await;
        let first = answer.at_least(100_000).await;
        clients.push((answer, first));
    }

    tap.open();

    for (answer, first) in clients {
        assert!(!answer.finish_after(first).await.succeeded());
    }
    larder.setup.holds(0).await;
}

// --- Third-party providers ---

#[tokio::test]
async fn the_three_urls_of_a_github_provider_are_pointed_at_the_registry() {
    let (_upstream, release, larder) = github(TERRAFORM, &[]).await;
    let client = larder.client();

    let got = client.get(&release.document_url()).await;

    let (served, original) = (got.json(), release.document("linux_amd64"));
    for (key, value) in original.as_object().unwrap() {
        let now = &served[key];
        match key.as_str() {
            "download_url" | "shasums_url" | "shasums_signature_url" => {
                let url = now.as_str().unwrap();
                let base = format!("https://{TERRAFORM}/.larder/");
                assert!(url.starts_with(&base), "{key}: {url}");
            }
            _ => assert_eq!(now, value, "{key}"),
        }
    }
    assert_eq!(
        served.as_object().unwrap().len(),
        original.as_object().unwrap().len()
    );
    let length = got.body.len().to_string();
    assert_eq!(got.header("content-length"), Some(&*length));
    assert_eq!(got.header("content-type"), Some("application/json"));
}

#[tokio::test]
async fn a_rewritten_document_has_an_etag_of_its_own() {
    let (upstream, release, larder) = github(TERRAFORM, &[]).await;
    let client = larder.client();
    let url = release.document_url();
    let upstreams = "\"from-upstream\"";
    let document = release.document("linux_amd64");
    let reply = registry_json(&document).etag(upstreams);
    upstream.route(TERRAFORM, &release.document_path("linux_amd64"), reply);

    let got = client.get(&url).await;
    let etag = got.header("etag").expect("an ETag").to_owned();
    assert!(!etag.contains("from-upstream"), "{etag}");

    let same = client.get_with(&url, &[("If-None-Match", &etag)]).await;
    assert_eq!(same.status, 304);
    let other = client.get_with(&url, &[("If-None-Match", upstreams)]).await;
    assert_eq!(
        other.status, 200,
        "upstream's ETag is not that of these bytes"
    );
}

#[tokio::test]
async fn a_github_provider_is_verified_and_kept_under_its_stable_url() {
    let (upstream, release, larder) = github(TERRAFORM, &[]).await;
    let client = larder.client();
    let document = client.get(&release.document_url()).await.json();
    let url = |key: &str| document[key].as_str().unwrap().to_owned();

    client
        .get(&url("shasums_url"))
        .await
        .assert_is(&release.sums);
    client
        .get(&url("shasums_signature_url"))
        .await
        .assert_is(&release.signature);
    client
        .get(&url("download_url"))
        .await
        .assert_is(&release.archive());
    larder.setup.holds(1).await;
    let sent = upstream.archive_bytes();
    let again = client.get(&url("download_url")).await;

    again.assert_is(&release.archive());
    again.assert_hit();
    assert_eq!(upstream.archive_bytes(), sent);
    assert_eq!(upstream.gets(ASSETS, &release.archive_asset_path()), 1);
    let (host, path) = release.archive_path();
    assert_eq!(upstream.gets(host, &path), 1);
}

#[tokio::test]
async fn a_corrupt_github_archive_never_completes() {
    let (upstream, release, larder) = github(TERRAFORM, &[]).await;
    let client = larder.client();
    let document = client.get(&release.document_url()).await.json();
    let corrupt = Reply::archive(release.archive()).corrupt_at(123);
    release.publish_archive(&upstream, corrupt);

    let got = client.get(document["download_url"].as_str().unwrap()).await;

    assert!(!got.succeeded());
    larder.setup.holds(0).await;
}

#[tokio::test]
async fn rewritten_urls_work_after_a_restart() {
    let (_upstream, release, larder) = github(TERRAFORM, &[]).await;
    let document = larder.client().get(&release.document_url()).await.json();
    let setup = larder.setup.clone();
    assert_eq!(larder.terminate().await, Some(0));

    let larder = setup.start().await;
    let client = larder.client();

    let url = |key: &str| document[key].as_str().unwrap().to_owned();
    client
        .get(&url("download_url"))
        .await
        .assert_is(&release.archive());
    client
        .get(&url("shasums_url"))
        .await
        .assert_is(&release.sums);
}

/// Else larder would be an open door to any site, under the registry's name.
#[tokio::test]
async fn rewritten_paths_answer_only_what_a_document_of_that_registry_named() {
    let (upstream, release, larder) = github(TERRAFORM, &[]).await;
    let client = larder.client();
    let document = client.get(&release.document_url()).await.json();
    let url = document["download_url"].as_str().unwrap().to_owned();
    let (host, path) = release.archive_path();
    let secret = Reply::text("not for you");
    for forged in [path.replace("linux_amd64", "linux_arm64"), "/secret".into()] {
        upstream.route(host, &forged, secret.clone());
    }

    let last = url.rfind('/').unwrap();
    let mut forgeries = vec![
        url.replace("linux_amd64", "linux_arm64"),
        format!("{}/secret", &url[..last]),
        format!("https://{TERRAFORM}/.larder/github.com/secret"),
        format!("https://{TERRAFORM}/.larder/https://github.com/secret"),
        format!("https://{TERRAFORM}/.larder/https/github.com/secret"),
        format!("https://{TERRAFORM}/.larder/"),
    ];
    // Named by registry.terraform.io, so not by registry.opentofu.org.
    forgeries.push(url.replace(TERRAFORM, OPENTOFU));
    for forged in forgeries {
        assert_ne!(forged, url);
        let got = client.get(&forged).await;
        assert!((400..500).contains(&got.status), "{forged}: {}", got.status);
    }
    assert_eq!(
        upstream.count(|seen| seen.host == GITHUB || seen.host == ASSETS),
        0
    );
    client.get(&url).await.assert_is(&release.archive());
}

#[tokio::test]
async fn github_stays_a_blind_tunnel_under_rewrite() {
    let (upstream, _, larder) = github(TERRAFORM, &[]).await;
    upstream.route(GITHUB, "/hello", Reply::text("hello"));
    let client = larder.client().trusting(&upstream.ca_pem);
    let got = client.get(&format!("https://{GITHUB}/hello")).await;
    got.assert_is(b"hello");
    assert_eq!(got.header("via"), None);
}

#[tokio::test]
async fn third_party_tunnel_leaves_the_document_alone() {
    let (_upstream, release, larder) = github(TERRAFORM, &["--third-party", "tunnel"]).await;
    let got = larder.client().get(&release.document_url()).await;
    let original = serde_json::to_string_pretty(&release.document("linux_amd64")).unwrap();
    got.assert_is(original.as_bytes());
}

#[tokio::test]
async fn third_party_intercept_follows_the_redirect_of_an_intercepted_host_inside() {
    let options = ["--third-party", "intercept", "--intercept", GITHUB];
    let (upstream, release, larder) = github(TERRAFORM, &options).await;
    let client = larder.client();
    let got = client.get(&release.document_url()).await;
    let original = serde_json::to_string_pretty(&release.document("linux_amd64")).unwrap();
    got.assert_is(original.as_bytes());

    client
        .get(&release.archive_url())
        .await
        .assert_is(&release.archive());
    larder.setup.holds(1).await;
    let sent = upstream.archive_bytes();
    let again = client.get(&release.archive_url()).await;

    again.assert_is(&release.archive());
    again.assert_hit();
    assert_eq!(upstream.archive_bytes(), sent);
}

#[tokio::test]
async fn relative_urls_are_resolved_against_the_document() {
    for (download, path) in [
        ("/files/null.zip", "/files/null.zip"),
        (
            "../../../files/null.zip",
            "/v1/providers/hashicorp/null/files/null.zip",
        ),
    ] {
        let upstream = Upstream::start();
        let release = Release::new("hashicorp", "null", "3.2.1");
        release.publish(&upstream);
        let mut document = release.document("linux_amd64");
        document["download_url"] = json!(download);
        let document_path = release.document_path("linux_amd64");
        upstream.route(TERRAFORM, &document_path, registry_json(&document));
        upstream.route(TERRAFORM, path, Reply::archive(release.archive()));
        let larder = Setup::new(&upstream).start().await;
        let client = larder.client();

        let served = client.get(&release.document_url()).await.json();
        let base = url::Url::parse(&release.document_url()).unwrap();
        let url = base.join(served["download_url"].as_str().unwrap()).unwrap();

        client.get(url.as_str()).await.assert_is(&release.archive());
        larder.setup.holds(1).await;
        let again = client.get(url.as_str()).await;
        again.assert_hit();
        assert_eq!(upstream.gets(TERRAFORM, path), 1, "{download}");
    }
}

/// A path that looks like no archive at all is one, because a document says so.
#[tokio::test]
async fn a_corrupt_archive_under_a_relative_url_never_completes() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let mut document = release.document("linux_amd64");
    document["download_url"] = json!("/get/4711");
    let document_path = release.document_path("linux_amd64");
    upstream.route(TERRAFORM, &document_path, registry_json(&document));
    let corrupt = Reply::archive(release.archive()).corrupt_at(99);
    upstream.route(TERRAFORM, "/get/4711", corrupt);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    client.get(&release.document_url()).await;

    let got = client.get(&format!("https://{TERRAFORM}/get/4711")).await;

    assert!(!got.succeeded());
    larder.setup.holds(0).await;
}

#[tokio::test]
async fn opentofus_registry_works() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1").on(OPENTOFU, Home::GitHub);
    release.publish(&upstream);
    // It may name no keys; and since 1.12 it may announce packages, which must stay as they are.
    let mut document = release.document("linux_amd64");
    document["signing_keys"] = json!({"gpg_public_keys": []});
    document["packages"] = json!({
        "linux_amd64": {"hashes": [format!("zh:{}", release.digest())], "package_size": 300_000},
    });
    let path = release.document_path("linux_amd64");
    upstream.route(OPENTOFU, &path, registry_json(&document));
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();

    let served = client.get(&release.document_url()).await.json();

    assert_eq!(served["packages"], document["packages"]);
    assert_eq!(served["signing_keys"], document["signing_keys"]);
    let url = served["download_url"].as_str().unwrap();
    assert!(
        url.starts_with(&format!("https://{OPENTOFU}/.larder/")),
        "{url}"
    );
    client.get(url).await.assert_is(&release.archive());
    larder.setup.holds(1).await;
}

/// Only a few bytes: the tail is at most half of it, and still nothing bad completes.
#[tokio::test]
async fn tiny_archives_are_verified_too() {
    let upstream = Upstream::start();
    let [good, bad] = ["1.0.0", "2.0.0"].map(|version| {
        let archive = noise(40, version).into();
        let release = Release::with_archive("hashicorp", "tiny", version, archive);
        release.publish(&upstream);
        release
    });
    bad.publish_archive(&upstream, Reply::archive(bad.archive()).corrupt_at(39));
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    client.get(&good.document_url()).await;
    client.get(&bad.document_url()).await;

    let got = client.get(&good.archive_url()).await;
    got.assert_is(&good.archive());
    assert!(!client.get(&bad.archive_url()).await.succeeded());
}

async fn published() -> (Upstream, Release, Larder) {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    (upstream, release, larder)
}

async fn github(registry: &'static str, options: &[&str]) -> (Upstream, Release, Larder) {
    let upstream = Upstream::start();
    let release = Release::new("someone", "thing", "1.2.3").on(registry, Home::GitHub);
    release.publish(&upstream);
    let setup = Setup::new(&upstream).args(options.iter().copied());
    (upstream, release, setup.start().await)
}
