//! HEAD, Range, If-Range, If-None-Match and 416: right on a hit, and on a miss no way round the
//! verification.

use crate::common::*;

#[tokio::test]
async fn a_hit_answers_head_with_what_get_would_say() {
    let held = Held::new().await;
    let (get, head) = (held.get(&[]).await, held.client.head(&held.url).await);
    assert_eq!((head.status, head.body.len()), (200, 0));
    for name in ["content-length", "content-type", "etag", "accept-ranges"] {
        assert!(get.header(name).is_some(), "no {name}");
        assert_eq!(head.header(name), get.header(name), "{name}");
    }
    assert_eq!(head.header("accept-ranges"), Some("bytes"));
    head.assert_hit();
}

#[tokio::test]
async fn a_hit_answers_a_range_by_just_these_bytes() {
    let held = Held::new().await;
    let total = held.archive.len();
    for (range, first, last) in [
        ("bytes=0-0".to_owned(), 0, 0),
        ("bytes=1000-1999".to_owned(), 1000, 1999),
        ("bytes=0-".to_owned(), 0, total - 1),
        (format!("bytes={}-", total - 5), total - 5, total - 1),
        ("bytes=-100".to_owned(), total - 100, total - 1),
        (format!("bytes=-{}", total + 100), 0, total - 1),
        (format!("bytes=500-{}", total + 500), 500, total - 1),
    ] {
        let got = held.get(&[("Range", &range)]).await;
        assert_eq!(got.status, 206, "{range}");
        assert!(
            got.complete && got.body == held.archive[first..=last],
            "{range}"
        );
        let place = format!("bytes {first}-{last}/{total}");
        assert_eq!(got.header("content-range"), Some(&*place), "{range}");
        assert!(got.header("etag").is_some(), "{range}");
    }
}

#[tokio::test]
async fn a_range_beyond_the_end_is_416_with_the_length() {
    let held = Held::new().await;
    let total = held.archive.len();
    for range in [format!("bytes={total}-"), "bytes=-0".to_owned()] {
        let got = held.get(&[("Range", &range)]).await;
        assert_eq!(got.status, 416, "{range}");
        let length = format!("bytes */{total}");
        assert_eq!(got.header("content-range"), Some(&*length), "{range}");
    }
}

/// RFC 9110: what is not understood is ignored.
#[tokio::test]
async fn a_range_that_makes_no_sense_gets_the_whole() {
    let held = Held::new().await;
    for range in [
        "lines=1-2",
        "bytes=9-3",
        "bytes=",
        "bytes=a-b",
        "bytes=--5",
        "bytes 0-5",
    ] {
        held.get(&[("Range", range)]).await.assert_is(&held.archive);
    }
}

#[tokio::test]
async fn several_ranges_are_answered_by_all_of_them_or_the_whole() {
    let held = Held::new().await;
    let got = held.get(&[("Range", "bytes=0-9,100-109")]).await;
    match got.status {
        200 => got.assert_is(&held.archive),
        206 => {
            let kind = got.header("content-type").unwrap_or_default();
            assert!(kind.starts_with("multipart/byteranges"), "{kind}");
        }
        status => panic!("{status}"),
    }
}

#[tokio::test]
async fn if_range_is_obeyed() {
    let held = Held::new().await;
    let etag = held.get(&[]).await.header("etag").unwrap().to_owned();
    let range = ("Range", "bytes=10-19");

    let same = held.get(&[range, ("If-Range", &etag)]).await;
    assert_eq!(same.status, 206);
    assert_eq!(same.body, held.archive[10..20]);

    for other in [
        "\"other\"",
        &format!("W/{etag}"),
        "Mon, 01 Jan 2001 00:00:00 GMT",
    ] {
        let got = held.get(&[range, ("If-Range", other)]).await;
        got.assert_is(&held.archive);
    }
}

#[tokio::test]
async fn if_none_match_is_obeyed() {
    let held = Held::new().await;
    let etag = held.get(&[]).await.header("etag").unwrap().to_owned();
    for known in [
        &etag,
        "*",
        &format!("\"other\", {etag}"),
        &format!("W/{etag}"),
    ] {
        let got = held.get(&[("If-None-Match", known)]).await;
        assert_eq!((got.status, got.body.len()), (304, 0), "{known}");
        assert_eq!(got.header("etag"), Some(&*etag), "{known}");
    }
    let got = held.get(&[("If-None-Match", "\"other\"")]).await;
    got.assert_is(&held.archive);
}

#[tokio::test]
async fn the_etag_is_the_same_cold_and_warm() {
    let miss = Miss::new(|archive| archive).await;
    let cold = miss.get(&[]).await.header("etag").map(str::to_owned);
    miss.larder.setup.holds(1).await;
    let warm = miss.get(&[]).await.header("etag").map(str::to_owned);
    assert!(warm.is_some());
    // A cold answer may do without one, but may not name another.
    assert!(cold.is_none() || cold == warm, "{cold:?} then {warm:?}");
}

#[tokio::test]
async fn head_on_a_miss_starts_no_download() {
    let miss = Miss::new(|archive| archive).await;

    let head = miss.client.head(&miss.url).await;

    assert_eq!((head.status, head.body.len()), (200, 0));
    let length = miss.archive.len().to_string();
    assert_eq!(head.header("content-length"), Some(&*length));
    assert_eq!(head.header("content-type"), Some("application/zip"));
    assert_eq!(miss.gets(), 0);
    assert_eq!(miss.upstream.archive_bytes(), 0);
}

#[tokio::test]
async fn head_on_a_miss_waits_for_no_body_where_upstream_refuses_head() {
    for status in [405, 403, 501] {
        let tap = Tap::at(0);
        let miss = Miss::new(|archive| archive.refuses_head(status).tapped(&tap)).await;

        let head = miss.client.head(&miss.url).await;

        assert_eq!(head.status, 200, "upstream refuses HEAD by {status}");
        let length = miss.archive.len().to_string();
        assert_eq!(head.header("content-length"), Some(&*length), "{status}");
        tap.open();
        miss.get(&[]).await.assert_is(&miss.archive);
    }
}

#[tokio::test]
async fn head_on_what_does_not_exist_is_404() {
    let miss = Miss::new(|_| Reply::status(404)).await;
    assert_eq!(miss.client.head(&miss.url).await.status, 404);
}

#[tokio::test]
async fn head_then_get_is_one_download() {
    let miss = Miss::new(|archive| archive).await;
    miss.client.head(&miss.url).await;
    miss.get(&[]).await.assert_is(&miss.archive);
    assert_eq!(miss.gets(), 1);
}

/// What terraform 1.11 does with GitHub's redirects behind larder.
#[tokio::test]
async fn head_works_through_a_signed_redirect() {
    let upstream = Upstream::start();
    let release = Release::new("someone", "thing", "1.2.3").on(TERRAFORM, Home::GitHub);
    release.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    let document = client.get(&release.document_url()).await.json();
    let url = document["download_url"].as_str().unwrap();

    let head = client.head(url).await;

    assert_eq!(head.status, 200);
    let length = release.archive().len().to_string();
    assert_eq!(head.header("content-length"), Some(&*length));
    client.get(url).await.assert_is(&release.archive());
}

#[tokio::test]
async fn head_while_a_fill_runs_waits_for_nothing() {
    let tap = Tap::at(100_000);
    let miss = Miss::new(|archive| archive.tapped(&tap)).await;
    let mut answer = miss.client.stream(&miss.url).await;
    let first = answer.at_least(10_000).await;

    let head = miss.client.head(&miss.url).await;

    assert_eq!(head.status, 200);
    tap.open();
    answer.finish_after(first).await.assert_is(&miss.archive);
    assert_eq!(miss.gets(), 1);
}

#[tokio::test]
async fn a_range_on_a_miss_is_served_from_a_fill_of_the_whole() {
    let miss = Miss::new(|archive| archive).await;

    let got = miss.get(&[("Range", "bytes=1000-1999")]).await;

    assert_eq!(got.status, 206);
    assert!(got.complete && got.body == miss.archive[1000..2000]);
    let place = format!("bytes 1000-1999/{}", miss.archive.len());
    assert_eq!(got.header("content-range"), Some(&*place));
    miss.larder.setup.holds(1).await;
    let ranged = miss.upstream.count(|seen| seen.header("range").is_some());
    assert_eq!(ranged, 0, "a Range was passed on");
    assert_eq!(miss.gets(), 1);
}

#[tokio::test]
async fn a_range_that_has_arrived_does_not_wait_for_the_rest() {
    let tap = Tap::at(100_000);
    let miss = Miss::new(|archive| archive.tapped(&tap)).await;

    let got = miss.get(&[("Range", "bytes=1000-1999")]).await;

    assert!(got.succeeded() && got.body == miss.archive[1000..2000]);
    assert_eq!(miss.gets(), 1);
    tap.open();
}

#[tokio::test]
async fn the_end_of_a_good_archive_comes_by_range_on_a_miss() {
    let miss = Miss::new(|archive| archive).await;
    let got = miss.get(&[("Range", "bytes=-100")]).await;
    assert_eq!(got.status, 206);
    assert!(got.complete && got.body == miss.archive[miss.archive.len() - 100..]);
}

#[tokio::test]
async fn no_range_is_a_way_round_the_verification() {
    let total = Release::new("hashicorp", "null", "3.2.1").archive().len();
    for range in [
        "bytes=0-".to_owned(),
        format!("bytes=0-{}", total - 1),
        format!("bytes=-{total}"),
        "bytes=1-".to_owned(),
        "bytes=-1".to_owned(),
        format!("bytes={}-", total - 1),
        format!("bytes={}-{}", total - 100, total + 100),
    ] {
        let miss = Miss::new(|archive| archive.corrupt_at(150_000)).await;
        let got = miss.get(&[("Range", &range)]).await;
        assert!(!got.succeeded(), "{range} completed");
        miss.larder.setup.holds(0).await;
    }
}

#[tokio::test]
async fn the_parts_of_a_corrupt_archive_do_not_add_up() {
    let miss = Miss::new(|archive| archive.corrupt_at(10)).await;
    let mut whole = true;
    for first in (0..miss.archive.len()).step_by(50_000) {
        let range = format!("bytes={first}-{}", first + 49_999);
        whole &= miss.get(&[("Range", &range)]).await.succeeded();
    }
    assert!(
        !whole,
        "a client that fetches by parts has the corrupt archive"
    );
    miss.larder.setup.holds(0).await;
}

#[tokio::test]
async fn a_range_beyond_the_end_on_a_miss_is_416() {
    let miss = Miss::new(|archive| archive).await;
    let range = format!("bytes={}-", miss.archive.len());
    let got = miss.get(&[("Range", &range)]).await;
    assert_eq!(got.status, 416);
    let length = format!("bytes */{}", miss.archive.len());
    assert_eq!(got.header("content-range"), Some(&*length));
}

/// Trap: a 206 where nobody asked for a part.
#[tokio::test]
async fn a_plain_get_is_never_answered_by_206() {
    let miss = Miss::new(|archive| archive).await;
    miss.get(&[("Range", "bytes=5-")]).await;
    assert_eq!(miss.get(&[]).await.status, 200);
    miss.larder.setup.holds(1).await;
    assert_eq!(miss.get(&[]).await.status, 200);
}

/// An archive that larder holds.
struct Held {
    _larder: Larder,
    _upstream: Upstream,
    client: Client,
    url: String,
    archive: bytes::Bytes,
}

impl Held {
    async fn new() -> Self {
        let miss = Miss::new(|archive| archive).await;
        miss.get(&[]).await.assert_is(&miss.archive);
        miss.larder.setup.holds(1).await;
        Self {
            _larder: miss.larder,
            _upstream: miss.upstream,
            client: miss.client,
            url: miss.url,
            archive: miss.archive,
        }
    }

    async fn get(&self, headers: &[(&str, &str)]) -> Got {
        self.client.get_with(&self.url, headers).await
    }
}

/// An archive that larder has heard of, through its registry document, but not fetched.
struct Miss {
    larder: Larder,
    upstream: Upstream,
    client: Client,
    url: String,
    path: String,
    archive: bytes::Bytes,
}

impl Miss {
    async fn new(bend: impl FnOnce(Reply) -> Reply) -> Self {
        let upstream = Upstream::start();
        let release = Release::new("hashicorp", "null", "3.2.1");
        release.publish(&upstream);
        release.publish_archive(&upstream, bend(Reply::archive(release.archive())));
        let larder = Setup::new(&upstream).start().await;
        let client = larder.client();
        client.get(&release.document_url()).await;
        Self {
            client,
            larder,
            upstream,
            url: release.archive_url(),
            path: release.archive_path().1,
            archive: release.archive(),
        }
    }

    async fn get(&self, headers: &[(&str, &str)]) -> Got {
        self.client.get_with(&self.url, headers).await
    }

    fn gets(&self) -> usize {
        self.upstream.gets(RELEASES, &self.path)
    }
}
