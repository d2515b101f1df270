//! Upstream trouble is mended inside: the client notices nothing, or is told plainly.

use std::time::{Duration, Instant};

use crate::common::upstream::Break;
use crate::common::*;

const DISCOVERY: &str = "/.well-known/terraform.json";

#[tokio::test]
async fn two_failures_of_a_document_are_mended_by_the_third_try() {
    for (why, failure) in [
        ("500", Reply::status(500)),
        ("502", Reply::status(502)),
        ("503", Reply::status(503)),
        (
            "429 that says: in an hour",
            Reply::status(429).header("Retry-After", "3600"),
        ),
    ] {
        println!("{why}");
        let upstream = Upstream::start();
        let good = Reply::json("{\"modules.v1\":\"/v1/modules/\"}");
        let turns = vec![failure.clone(), failure, good];
        upstream.route_turns(TERRAFORM, DISCOVERY, turns);
        let larder = Setup::new(&upstream).start().await;

        let got = larder
            .client()
            .get(&format!("https://{TERRAFORM}{DISCOVERY}"))
            .await;

        got.assert_is(b"{\"modules.v1\":\"/v1/modules/\"}");
        assert_eq!(upstream.gets(TERRAFORM, DISCOVERY), 3);
    }
}

#[tokio::test]
async fn two_failures_of_an_archive_are_mended_by_the_third_try() {
    for (why, failure) in [
        ("500", Reply::status(500)),
        (
            "503 with Retry-After",
            Reply::status(503).header("Retry-After", "3600"),
        ),
        ("429", Reply::status(429)),
    ] {
        println!("{why}");
        let cold = Cold::new().await;
        cold.turns(vec![failure.clone(), failure, cold.good()]);
        cold.get().await.assert_is(&cold.archive);
        assert_eq!(cold.gets(), 3);
    }
}

/// Discovery is never retried by terraform: what larder can mend, it must.
#[tokio::test]
async fn a_document_cut_in_the_middle_is_asked_for_again() {
    let upstream = Upstream::start();
    let good = Reply::json("{\"modules.v1\":\"/v1/modules/\"}");
    let turns = vec![good.clone().cut_after(5), good];
    upstream.route_turns(TERRAFORM, DISCOVERY, turns);
    let larder = Setup::new(&upstream).start().await;
    let got = larder
        .client()
        .get(&format!("https://{TERRAFORM}{DISCOVERY}"))
        .await;
    got.assert_is(b"{\"modules.v1\":\"/v1/modules/\"}");
}

#[tokio::test]
async fn an_archive_cut_before_its_first_byte_is_asked_for_again() {
    let cold = Cold::new().await;
    cold.turns(vec![cold.good().cut_after(0), cold.good()]);
    cold.get().await.assert_is(&cold.archive);
}

#[tokio::test]
async fn connections_that_are_reset_are_tried_again() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    upstream.reset_next(2);
    let got = larder
        .client()
        .get(&format!("https://{RELEASES}/terraform/"))
        .await;
    assert_eq!(got.status, 200, "{}", got.text());
}

/// An idle connection that upstream closed meanwhile is no failure at all.
#[tokio::test]
async fn kept_connections_that_died_are_replaced() {
    let upstream = Upstream::start();
    // HTTP/1.1, a right length, no word of closing: larder keeps a connection that is closed.
    let page = Reply::text("a page").breaks_after(6, Break::Clean);
    upstream.route(RELEASES, "/page", page.header("Cache-Control", "no-cache"));
    let larder = Setup::new(&upstream).start().await;
    for _ in 0..5 {
        let got = larder
            .client()
            .get(&format!("https://{RELEASES}/page"))
            .await;
        got.assert_is(b"a page");
    }
}

#[tokio::test]
async fn an_archive_that_fails_for_good_is_an_error_after_three_tries() {
    let cold = Cold::new().await;
    let failure = Reply::status(500).header("Retry-After", "3600");
    cold.turns(vec![failure]);

    let got = cold.get().await;

    assert!((500..600).contains(&got.status), "{}", got.status);
    assert_eq!(cold.gets(), 3);
    assert_ne!(got.header("retry-after"), Some("3600"));
    cold.larder.setup.holds(0).await;
    // Upstream has recovered: nothing of the failure is remembered for long.
    cold.turns(vec![cold.good()]);
    cold.get().await.assert_is(&cold.archive);
}

#[tokio::test]
async fn an_upstream_that_refuses_connections_is_502() {
    let mut cold = Cold::new().await;
    cold.upstream.stop();
    let words = cold.get().await.assert_refused(502);
    assert!(words.contains(RELEASES), "{words}");
}

#[tokio::test]
async fn refusals_of_upstreams_are_not_tried_again() {
    for status in [400, 401, 403, 404, 410] {
        let cold = Cold::new().await;
        cold.turns(vec![Reply::status(status)]);
        assert_eq!(cold.get().await.status, status);
        assert_eq!(cold.gets(), 1, "{status}");
    }
}

#[tokio::test]
async fn an_archive_cut_in_the_middle_is_resumed_behind_the_client() {
    for how in [Break::Reset, Break::Clean] {
        let cold = Cold::new().await;
        cold.turns(vec![cold.good().breaks_after(123_456, how), cold.good()]);

        cold.get().await.assert_is(&cold.archive);

        let journal = cold.upstream.journal();
        let (_, path) = cold.release.archive_path();
        let asks: Vec<_> = journal.iter().filter(|seen| seen.path() == path).collect();
        assert_eq!(asks.len(), 2);
        assert_eq!(asks[0].header("range"), None);
        let range = asks[1].header("range").expect("a Range");
        let first = range
            .strip_prefix("bytes=")
            .and_then(|range| range.strip_suffix('-'));
        let first: usize = first.expect(range).parse().unwrap();
        assert!((1..=123_456).contains(&first), "{range}");
        assert!(
            asks[1]
                .header("if-range")
                .is_some_and(|etag| etag.starts_with('"'))
        );
        cold.larder.setup.holds(1).await;
    }
}

#[tokio::test]
async fn an_archive_without_a_strong_etag_is_resumed_by_its_date_or_not_at_all() {
    let date = "Wed, 12 Mar 2025 17:04:05 GMT";
    let cold = Cold::new().await;
    let dated = cold
        .good()
        .no_validators()
        .last_modified(date)
        .etag("W/\"weak\"");
    cold.turns(vec![dated.clone().cut_after(100_000), dated]);
    cold.get().await.assert_is(&cold.archive);
    let weak = |seen: &upstream::Seen| {
        seen.header("if-range")
            .is_some_and(|tag| tag.starts_with("W/"))
    };
    assert_eq!(
        cold.upstream.count(weak),
        0,
        "If-Range takes strong validators only"
    );
}

#[tokio::test]
async fn an_archive_is_resumed_as_often_as_there_is_progress() {
    let cold = Cold::new().await;
    let mut turns = vec![cold.good().cut_after(40_000); 6];
    turns.push(cold.good());
    cold.turns(turns);
    cold.get().await.assert_is(&cold.archive);
}

#[tokio::test]
async fn an_upstream_that_ignores_ranges_starts_over_unnoticed() {
    let cold = Cold::new().await;
    let whole = cold.good().ignores_ranges();
    cold.turns(vec![whole.clone().cut_after(200_000), whole]);
    cold.get().await.assert_is(&cold.archive);
    cold.larder.setup.holds(1).await;
}

#[tokio::test]
async fn without_validators_it_starts_over_unnoticed() {
    let cold = Cold::new().await;
    let bare = cold.good().no_validators();
    cold.turns(vec![bare.clone().cut_after(200_000), bare]);
    cold.get().await.assert_is(&cold.archive);
}

#[tokio::test]
async fn the_same_bytes_under_a_new_etag_are_the_same_bytes() {
    let cold = Cold::new().await;
    let renamed = cold.good().etag("\"another\"");
    cold.turns(vec![cold.good().cut_after(200_000), renamed]);
    cold.get().await.assert_is(&cold.archive);
}

/// The client has bytes of the one; those of the other must not follow.
#[tokio::test]
async fn other_bytes_after_a_cut_are_never_spliced() {
    let cold = Cold::new().await;
    let other = cold.good().corrupt_at(10).etag("\"another\"");
    // The client has read far into the wrong bytes when the right ones come, and go on.
    let tap = Tap::at(290_000);
    cold.turns(vec![other.cut_after(200_000), cold.good().tapped(&tap)]);
    let got = cold.get().await;
    let length = got.body.len();
    assert!(
        !got.succeeded() && length <= 200_000,
        "spliced: {length} bytes"
    );

    // Whoever comes now gets the right ones.
    tap.open();
    cold.get().await.assert_is(&cold.archive);
}

#[tokio::test]
async fn a_range_that_upstream_answers_with_another_is_not_spliced() {
    let cold = Cold::new().await;
    // Were it taken for the rest, the client would see it before the digest can tell.
    let shifted = cold.good().shifts_ranges().tapped(&Tap::at(280_000));
    cold.turns(vec![cold.good().cut_after(200_000), shifted, cold.good()]);
    let got = cold.get().await;
    assert!(
        cold.archive.starts_with(&got.body),
        "wrong bytes reached the client"
    );
    assert!(!got.succeeded() || got.body == cold.archive);
}

#[tokio::test]
async fn an_archive_that_is_cut_for_good_cuts_the_client_and_leaves_nothing() {
    let cold = Cold::new().await;
    let cut = cold.good().cut_after(100_000);
    // Every try ends at the same place: a resumed one gets nothing.
    let nothing = cold.good().cut_after(0);
    cold.turns(vec![cut, nothing]);

    let got = cold.get().await;

    assert_eq!(got.status, 200);
    assert!(!got.complete && cold.archive.starts_with(&got.body));
    cold.larder.setup.holds(0).await;
    cold.turns(vec![cold.good()]);
    cold.get().await.assert_is(&cold.archive);
}

#[tokio::test]
async fn an_expired_signed_url_starts_again_from_the_stable_one() {
    let upstream = Upstream::start();
    let release = Release::new("someone", "thing", "1.2.3").on(TERRAFORM, Home::GitHub);
    release.publish(&upstream);
    let good = Reply::archive(release.archive());
    let turns = vec![good.clone().cut_after(100_000), good];
    release.publish_archive_turns(&upstream, turns);
    let larder = Setup::new(&upstream).start().await;
    let document = larder.client().get(&release.document_url()).await.json();

    let url = document["download_url"].as_str().unwrap();
    let got = larder.client().get(url).await;

    got.assert_is(&release.archive());
    larder.setup.holds(1).await;
    let (host, path) = release.archive_path();
    assert_eq!(
        upstream.gets(host, &path),
        2,
        "the stable URL once for each signed one"
    );
}

/// Late joiners and the live client have the same bytes, whatever happened in between.
#[tokio::test]
async fn a_joiner_after_the_cut_has_the_whole_too() {
    let cold = Cold::new().await;
    let tap = Tap::at(150_000);
    cold.turns(vec![
        cold.good().cut_after(100_000),
        cold.good().tapped(&tap),
    ]);
    let mut first = cold
        .larder
        .client()
        .stream(&cold.release.archive_url())
        .await;
    let start = first.at_least(110_000).await;

    let mut late = cold
        .larder
        .client()
        .stream(&cold.release.archive_url())
        .await;
    let late_start = late.at_least(110_000).await;
    tap.open();

    first.finish_after(start).await.assert_is(&cold.archive);
    late.finish_after(late_start).await.assert_is(&cold.archive);
    assert_eq!(cold.gets(), 2);
}

#[tokio::test]
async fn an_upstream_that_falls_silent_in_the_middle_is_left_and_resumed() {
    let cold = Cold::new().await;
    let silent = cold.good().tapped(&Tap::at(100_000));
    cold.turns(vec![silent, cold.good()]);
    cold.get().await.assert_is(&cold.archive);
    assert_eq!(cold.gets(), 2);
}

#[tokio::test]
async fn an_upstream_that_never_sends_a_head_is_left() {
    let cold = Cold::new().await;
    cold.turns(vec![cold.good().held_by(&Gate::closed())]);
    // Within FOREVER, that is.
    cold.get().await.assert_refused(504);
    cold.turns(vec![cold.good()]);
    cold.get().await.assert_is(&cold.archive);
}

/// Over a slow line an archive takes as long as it takes: longer than any timeout there is.
#[tokio::test]
async fn a_slow_body_has_no_total_timeout() {
    let cold = Cold::new().await;
    let tap = Tap::at(1000);
    cold.turns(vec![cold.good().tapped(&tap)]);
    let (client, url) = (cold.larder.client(), cold.release.archive_url());
    let download = tokio::spawn(async move { client.get(&url).await });
    let started = Instant::now();
    let mut permitted = 1000;
    while started.elapsed() < Duration::from_secs(45) {
        tokio::time::sleep(Duration::from_secs(1)).await;
        permitted += 1000;
        tap.permit(permitted);
    }
    assert!(!download.is_finished());
    tap.open();
    download.await.unwrap().assert_is(&cold.archive);
    assert_eq!(cold.gets(), 1);
}

#[tokio::test]
async fn a_redirect_in_circles_ends() {
    let cold = Cold::new().await;
    cold.turns(vec![Reply::redirect(&cold.release.archive_url())]);
    let got = cold.get().await;
    got.assert_refused(502);
    assert!(cold.gets() <= 40, "{} times round", cold.gets());
}

#[tokio::test]
async fn relative_redirects_are_followed() {
    let cold = Cold::new().await;
    cold.turns(vec![Reply::redirect("../../moved.zip?sig=s")]);
    cold.upstream.route(RELEASES, "/moved.zip", cold.good());
    cold.get().await.assert_is(&cold.archive);
}

/// Every hop of a redirect is judged as a tunnel would be.
#[tokio::test]
async fn redirects_into_the_machine_are_refused() {
    let inside = Upstream::start();
    inside.route("127.0.0.1", "/secret.zip", Reply::archive("secret"));
    let port = inside.addr.port();
    for place in [
        format!("https://127.0.0.1:{port}/secret.zip"),
        format!("https://localhost:{port}/secret.zip"),
        format!("http://127.0.0.1:{port}/secret.zip"),
        format!("https://[::ffff:127.0.0.1]:{port}/secret.zip"),
        format!("https://2130706433:{port}/secret.zip"),
        "file:///etc/passwd".to_owned(),
    ] {
        let cold = Cold::new().await;
        cold.turns(vec![Reply::redirect(&place)]);
        let got = cold.get().await;
        assert!(got.status >= 400, "{place}: {}", got.status);
        cold.larder.setup.holds(0).await;
    }
    assert_eq!(inside.connections(), 0);
}

/// A provider that larder has heard of, not fetched.
struct Cold {
    upstream: Upstream,
    release: Release,
    larder: Larder,
    archive: bytes::Bytes,
}

impl Cold {
    async fn new() -> Self {
        let upstream = Upstream::start();
        let release = Release::new("hashicorp", "null", "3.2.1");
        release.publish(&upstream);
        let larder = Setup::new(&upstream).start().await;
        larder.client().get(&release.document_url()).await;
        Self {
            upstream,
            archive: release.archive(),
            release,
            larder,
        }
    }

    fn good(&self) -> Reply {
        Reply::archive(self.archive.clone())
    }

    fn turns(&self, replies: Vec<Reply>) {
        self.release.publish_archive_turns(&self.upstream, replies);
    }

    async fn get(&self) -> Got {
        self.larder.client().get(&self.release.archive_url()).await
    }

    fn gets(&self) -> usize {
        let (host, path) = self.release.archive_path();
        self.upstream.gets(host, &path)
    }
}
