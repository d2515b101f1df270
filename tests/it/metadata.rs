//! Metadata passes through byte for byte, is kept, revalidated, shared, and outlives every failure
//! of upstream's.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::common::registry::{publish_discovery, registry_json};
use crate::common::upstream::Seen;
use crate::common::*;

/// As the real registry never formats it: any re-serialisation would show.
const ODD_JSON: &str = "{ \"versions\" :[ {\"version\":\"1.0.0\",\n\t\"protocols\":[\"5.0\"]}] ,\"x\":1e2,\"u\":\"\\u0041\"}\r\n\n";

const ODD_MODULES: &str = "{\"modules\" : [ {\"versions\":[{\"version\":\"1.0.0\" } ]}]}\n";

const VERSIONS: &str = "/v1/providers/hashicorp/null/versions";
const DISCOVERY: &str = "/.well-known/terraform.json";

#[tokio::test]
async fn documents_pass_through_byte_for_byte() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let releases = |path: &str| format!("https://{RELEASES}{path}");
    let binary = "application/octet-stream";
    let listing = "text/html; charset=utf-8";
    let vendor = "application/vnd+hashicorp.releases-api.v0+json";
    let odd = |kind: &str| Reply::new(200, kind, ODD_JSON);
    upstream.route(TERRAFORM, DISCOVERY, odd("application/json"));
    upstream.route(TERRAFORM, VERSIONS, odd("application/json; charset=utf-8"));
    upstream.route(
        TERRAFORM,
        "/v1/providers/-/null/versions",
        odd("application/json"),
    );
    upstream.route(
        TERRAFORM,
        "/v1/modules/a/b/aws/versions",
        Reply::json(ODD_MODULES),
    );
    upstream.route(RELEASES, "/terraform/index.json", odd(vendor));
    upstream.route(RELEASES, "/terraform/1.9.0/index.json", odd(vendor));
    let larder = Setup::new(&upstream).start().await;
    let registry = |path: &str| format!("https://{TERRAFORM}{path}");
    let document = serde_json::to_string_pretty(&release.document("linux_amd64")).unwrap();
    let page =
        |link: &str| format!("<!DOCTYPE html>\n<ul><li><a href=\"{link}\">{link}</a></li></ul>\n");

    for (url, kind, body) in [
        (registry(DISCOVERY), "application/json", ODD_JSON.as_bytes()),
        (
            registry(VERSIONS),
            "application/json; charset=utf-8",
            ODD_JSON.as_bytes(),
        ),
        (
            registry("/v1/providers/-/null/versions"),
            "application/json",
            ODD_JSON.as_bytes(),
        ),
        (
            registry("/v1/modules/a/b/aws/versions"),
            "application/json",
            ODD_MODULES.as_bytes(),
        ),
        (
            release.document_url(),
            "application/json",
            document.as_bytes(),
        ),
        (release.sums_url(), "text/plain", &release.sums),
        (
            releases(&release.signature_path().1),
            binary,
            &release.signature,
        ),
        (
            releases("/terraform/index.json"),
            vendor,
            ODD_JSON.as_bytes(),
        ),
        (
            releases("/terraform/1.9.0/index.json"),
            vendor,
            ODD_JSON.as_bytes(),
        ),
        (
            releases("/terraform/"),
            listing,
            page("/terraform/1.9.0/").as_bytes(),
        ),
        (
            releases("/terraform/1.9.0/"),
            listing,
            page(&product.archive_path()).as_bytes(),
        ),
    ] {
        for what in ["first", "second"] {
            let got = larder.client().get(&url).await;
            println!("{url} {what}");
            got.assert_is(body);
            assert_eq!(got.header("content-type"), Some(kind), "{url}");
            let length = body.len().to_string();
            assert_eq!(got.header("content-length"), Some(&*length), "{url}");
            assert!(got.header("cache-status").is_some(), "{url}");
            assert!(got.header("via").is_some(), "{url}");
        }
    }
}

#[tokio::test]
async fn the_real_registrys_documents_pass_through() {
    let upstream = Upstream::start();
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data");
    let files = [
        (
            "/v1/providers/hashicorp/random/versions",
            "random_versions.json",
        ),
        (
            "/v1/providers/hashicorp/random/3.4.3/download/linux/amd64",
            "random_3.4.3_linux_amd64.json",
        ),
    ];
    let larder = Setup::new(&upstream).start().await;
    for (path, file) in files {
        let body = std::fs::read(format!("{data}/{file}")).unwrap();
        upstream.route(TERRAFORM, path, Reply::json(body.clone()));
        let got = larder
            .client()
            .get(&format!("https://{TERRAFORM}{path}"))
            .await;
        got.assert_is(&body);
    }
}

#[tokio::test]
async fn statuses_and_the_headers_that_clients_rely_on_pass_through() {
    let (upstream, larder) = started().await;
    let module = "/v1/modules/a/b/aws/1.0.0/download";
    let source = "https://api.github.com/repos/a/terraform-aws-b/tarball/v1.0.0?archive=tar.gz";
    let reply = Reply::new(204, "text/plain", "").header("X-Terraform-Get", source);
    upstream.route(TERRAFORM, module, reply);
    let page = Reply::json("{}")
        .header("X-Terraform-Page", "yes")
        .header("Cache-Control", "max-age=30")
        .last_modified("Wed, 12 Mar 2025 17:04:05 GMT");
    upstream.route(TERRAFORM, "/v1/modules/a/b/aws", page);
    upstream.route(
        RELEASES,
        "/nothing",
        Reply::new(403, "application/xml", "<Error/>"),
    );

    let got = larder.client().get(&registry(module)).await;
    assert_eq!(got.status, 204);
    assert_eq!(got.header("x-terraform-get"), Some(source));

    let got = larder.client().get(&registry("/v1/modules/a/b/aws")).await;
    assert_eq!(
        got.header("last-modified"),
        Some("Wed, 12 Mar 2025 17:04:05 GMT")
    );

    let got = larder
        .client()
        .get(&registry("/v1/providers/no/such/versions"))
        .await;
    assert_eq!(
        (got.status, got.text().as_str()),
        (404, "no such thing here\n")
    );

    let got = larder
        .client()
        .get(&format!("https://{RELEASES}/nothing"))
        .await;
    assert_eq!((got.status, got.text().as_str()), (403, "<Error/>"));
    assert_eq!(got.header("content-type"), Some("application/xml"));
}

#[tokio::test]
async fn queries_are_part_of_the_name() {
    let (upstream, larder) = started().await;
    let page = |seen: &Seen| {
        let body = format!("{{\"asked\":\"{}\"}}", seen.query().unwrap_or("nothing"));
        Reply::json(body).header("Cache-Control", "max-age=60")
    };
    upstream.route_fn(TERRAFORM, "/v1/modules/search", page);
    for target in ["?q=a&b=%20+", "?q=b", "", "?q=a&b=%20+"] {
        let got = larder
            .client()
            .get(&registry(&format!("/v1/modules/search{target}")))
            .await;
        let asked = target.strip_prefix('?').unwrap_or("nothing");
        assert_eq!(got.json()["asked"], json!(asked));
    }
}

#[tokio::test]
async fn a_document_is_fresh_for_what_upstream_says() {
    let (upstream, larder) = started().await;
    publish_discovery(&upstream, TERRAFORM); // max-age=3600
    larder.client().get(&registry(DISCOVERY)).await;
    let got = larder.client().get(&registry(DISCOVERY)).await;
    got.assert_hit();
    assert_eq!(upstream.gets(TERRAFORM, DISCOVERY), 1);

    upstream.route(
        TERRAFORM,
        VERSIONS,
        Reply::json("{\"versions\":[]}").header("Cache-Control", "no-cache"),
    );
    for asked in 1..4 {
        larder.client().get(&registry(VERSIONS)).await;
        assert_eq!(upstream.gets(TERRAFORM, VERSIONS), asked);
    }
}

/// A version list older than a minute hides releases, whatever upstream says of its lifetime.
#[tokio::test]
async fn a_version_list_is_never_fresh_for_more_than_a_minute() {
    let (upstream, larder) = started().await;
    let old = Reply::json("{\"versions\":[]}").header("Cache-Control", "public, max-age=86400");
    upstream.route(TERRAFORM, VERSIONS, old);
    larder.client().get(&registry(VERSIONS)).await;
    let asked = Instant::now();
    larder.client().get(&registry(VERSIONS)).await.assert_hit();
    assert_eq!(upstream.gets(TERRAFORM, VERSIONS), 1);
    upstream.route(TERRAFORM, VERSIONS, Reply::json(ODD_JSON));

    tokio::time::sleep(Duration::from_secs(61).saturating_sub(asked.elapsed())).await;

    larder
        .client()
        .get(&registry(VERSIONS))
        .await
        .assert_is(ODD_JSON.as_bytes());
}

#[tokio::test]
async fn a_missing_document_is_asked_for_again_after_seconds() {
    for status in [404, 403] {
        let (upstream, larder) = started().await;
        let missing = Reply::status(status).header("Cache-Control", "max-age=3600");
        upstream.route(TERRAFORM, VERSIONS, missing);
        assert_eq!(
            larder.client().get(&registry(VERSIONS)).await.status,
            status
        );
        upstream.route(TERRAFORM, VERSIONS, Reply::json(ODD_JSON));

        let started = Instant::now();
        while larder.client().get(&registry(VERSIONS)).await.status != 200 {
            assert!(
                started.elapsed() < Duration::from_secs(15),
                "{status} is remembered"
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

/// An answer of 404 is an answer: a provider that was taken down is gone, not stale.
#[tokio::test]
async fn a_document_that_was_withdrawn_is_gone() {
    let (upstream, larder) = started().await;
    let reply = Reply::json(ODD_JSON).header("Cache-Control", "no-cache");
    upstream.route(TERRAFORM, VERSIONS, reply);
    larder.client().get(&registry(VERSIONS)).await;
    upstream.route(TERRAFORM, VERSIONS, Reply::status(404));
    assert_eq!(larder.client().get(&registry(VERSIONS)).await.status, 404);
}

#[tokio::test]
async fn a_stale_document_is_revalidated() {
    type With = fn(Reply) -> Reply;
    let validators: [(&str, With); 2] = [
        ("if-none-match", |reply| reply.etag("W/\"version-7\"")),
        ("if-modified-since", |reply| {
            reply.last_modified("Wed, 12 Mar 2025 17:04:05 GMT")
        }),
    ];
    for (header, validator) in validators {
        let (upstream, larder) = started().await;
        let reply = Reply::json(ODD_JSON).header("Cache-Control", "max-age=0");
        upstream.route(TERRAFORM, VERSIONS, validator(reply));
        larder
            .client()
            .get(&registry(VERSIONS))
            .await
            .assert_is(ODD_JSON.as_bytes());

        // Upstream answers 304, the client did not ask for one.
        let got = larder.client().get(&registry(VERSIONS)).await;

        got.assert_is(ODD_JSON.as_bytes());
        let conditional = upstream.count(|seen| seen.header(header).is_some());
        assert_eq!(conditional, 1, "{header}");
    }
}

#[tokio::test]
async fn a_304_reaches_only_who_asked_for_it() {
    let (upstream, larder) = started().await;
    let etag = "\"version-8\"";
    let reply = Reply::json(ODD_JSON)
        .etag(etag)
        .header("Cache-Control", "max-age=0");
    upstream.route(TERRAFORM, VERSIONS, reply);
    for _ in 0..2 {
        let asked = larder
            .client()
            .get_with(&registry(VERSIONS), &[("If-None-Match", etag)])
            .await;
        assert_eq!((asked.status, asked.body.len()), (304, 0));
        let other = larder
            .client()
            .get_with(&registry(VERSIONS), &[("If-None-Match", "\"x\"")])
            .await;
        other.assert_is(ODD_JSON.as_bytes());
        larder
            .client()
            .get(&registry(VERSIONS))
            .await
            .assert_is(ODD_JSON.as_bytes());
    }

    // Fatal to terraform, and nonsense: nothing conditional was asked.
    upstream.route(TERRAFORM, "/v1/providers/a/b/versions", Reply::status(304));
    let got = larder
        .client()
        .get(&registry("/v1/providers/a/b/versions"))
        .await;
    assert!(got.status >= 500, "{}", got.status);
}

#[tokio::test]
async fn head_of_a_document_says_what_get_would() {
    let (upstream, larder) = started().await;
    upstream.route(TERRAFORM, VERSIONS, Reply::json(ODD_JSON).etag("\"7\""));
    for what in ["cold", "warm"] {
        let head = larder.client().head(&registry(VERSIONS)).await;
        assert_eq!((head.status, head.body.len()), (200, 0), "{what}");
        assert_eq!(
            head.header("content-type"),
            Some("application/json"),
            "{what}"
        );
        let length = ODD_JSON.len().to_string();
        assert_eq!(head.header("content-length"), Some(&*length), "{what}");
        larder.client().get(&registry(VERSIONS)).await;
    }
}

#[tokio::test]
async fn concurrent_asks_for_one_document_are_one_upstream_request() {
    let (upstream, larder) = started().await;
    let gate = Gate::closed();
    let reply = Reply::json(ODD_JSON).header("Cache-Control", "max-age=60");
    upstream.route(TERRAFORM, VERSIONS, reply.held_by(&gate));
    let clients: Vec<_> = (0..20)
        .map(|_| {
            let client = larder.client();
            tokio::spawn(async move { client.get(&registry(VERSIONS)).await })
        })
        .collect();
    eventually("upstream is asked", || {
        upstream.gets(TERRAFORM, VERSIONS) > 0
    })
    .await;
    // Those that come later than this only make the test easier to pass.
    tokio::time::sleep(Duration::from_millis(300)).await;
    gate.open();
    for client in clients {
        client.await.unwrap().assert_is(ODD_JSON.as_bytes());
    }
    assert_eq!(upstream.gets(TERRAFORM, VERSIONS), 1);
}

/// A registry may tell old versions of terraform something else, and says so in Vary.
#[tokio::test]
async fn terraforms_of_two_versions_at_once_each_get_their_own_answer() {
    let (upstream, larder) = started().await;
    let path = "/v1/providers/a/b/versions";
    let gate = Gate::closed();
    let held = gate.clone();
    upstream.route_fn(TERRAFORM, path, move |seen| {
        let version = seen.header("x-terraform-version").unwrap_or("none");
        let body = format!("{{\"versions\":[],\"for\":\"{version}\"}}");
        let reply = Reply::json(body).header("Vary", "X-Terraform-Version");
        reply.held_by(&held)
    });
    let ask = |version: &'static str| {
        let client = larder.client();
        tokio::spawn(async move {
            let headers = [("X-Terraform-Version", version)];
            client.get_with(&registry(path), &headers).await.json()
        })
    };
    let asked = ["0.12.29", "1.11.4", "0.12.29"].map(|version| (version, ask(version)));
    eventually("two are asked for", || upstream.gets(TERRAFORM, path) == 2).await;
    gate.open();
    for (version, answer) in asked {
        assert_eq!(answer.await.unwrap()["for"], version);
    }
}

/// The one who asked first has gone; those who joined must not go with it.
#[tokio::test]
async fn a_first_asker_that_hangs_up_takes_nobody_along() {
    let (upstream, larder) = started().await;
    let gate = Gate::closed();
    let reply = Reply::json(ODD_JSON).header("Cache-Control", "max-age=60");
    upstream.route(TERRAFORM, VERSIONS, reply.held_by(&gate));
    let mut first = larder.client().open(TERRAFORM).await;
    first.request("GET", TERRAFORM, VERSIONS, &[]).await;
    eventually("upstream is asked", || {
        upstream.gets(TERRAFORM, VERSIONS) > 0
    })
    .await;
    let mut second = larder.client().open(TERRAFORM).await;
    second.request("GET", TERRAFORM, VERSIONS, &[]).await;

    drop(first);
    gate.open();

    let got = second.answer("GET").await.unwrap().finish().await;
    got.assert_is(ODD_JSON.as_bytes());
}

#[tokio::test]
async fn the_last_good_answer_stands_in_for_every_failure() {
    let each = failures().into_iter().map(async |(why, failure)| {
        let (upstream, larder) = started().await;
        let good = Reply::json(ODD_JSON)
            .header("Cache-Control", "no-cache")
            .etag("\"good\"");
        upstream.route(TERRAFORM, VERSIONS, good);
        larder
            .client()
            .get(&registry(VERSIONS))
            .await
            .assert_is(ODD_JSON.as_bytes());
        upstream.route(TERRAFORM, VERSIONS, failure);

        let asked = Instant::now();
        let got = larder.client().get(&registry(VERSIONS)).await;

        println!("{why}: {} {}", got.status, got.cache_status());
        got.assert_is(ODD_JSON.as_bytes());
        assert_eq!(
            got.header("content-type"),
            Some("application/json"),
            "{why}"
        );
        assert_eq!(got.header("retry-after"), None, "{why}");
        let said = got.cache_status();
        assert!(
            said.contains("fwd=stale") && said.contains("detail"),
            "{why}: {said}"
        );
        assert!(
            asked.elapsed() < Duration::from_secs(6),
            "{why}: {:?}",
            asked.elapsed()
        );
    });
    join_all(each).await;
}

#[tokio::test]
async fn a_rewritten_document_outlives_upstream_too() {
    let upstream = Upstream::start();
    let release = Release::new("someone", "thing", "1.2.3").on(TERRAFORM, Home::GitHub);
    release.publish(&upstream);
    let path = release.document_path("linux_amd64");
    let document = registry_json(&release.document("linux_amd64"));
    upstream.route(
        TERRAFORM,
        &path,
        document.header("Cache-Control", "no-cache"),
    );
    let larder = Setup::new(&upstream).start().await;
    let good = larder.client().get(&release.document_url()).await;
    upstream.route(TERRAFORM, &path, Reply::status(500));

    let got = larder.client().get(&release.document_url()).await;

    got.assert_is(&good.body);
    assert!(
        got.cache_status().contains("fwd=stale"),
        "{}",
        got.cache_status()
    );
}

#[tokio::test]
async fn sums_and_listings_outlive_upstream_too() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let urls = [
        product.sums_path(),
        product.folder(),
        format!("{}index.json", product.folder()),
    ];
    let mut good = Vec::new();
    for path in &urls {
        good.push(
            larder
                .client()
                .get(&format!("https://{RELEASES}{path}"))
                .await,
        );
    }
    let setup = larder.setup.clone();
    assert_eq!(larder.terminate().await, Some(0));
    upstream.line(Line::Reset);

    let larder = setup.start().await;
    for (path, good) in urls.iter().zip(good) {
        let got = larder
            .client()
            .get(&format!("https://{RELEASES}{path}"))
            .await;
        got.assert_is(&good.body);
        assert_eq!(got.header("content-type"), good.header("content-type"));
    }
}

#[tokio::test]
async fn the_last_good_answer_survives_kill_and_restart() {
    let (upstream, larder) = started().await;
    let good = Reply::json(ODD_JSON)
        .header("Cache-Control", "no-cache")
        .header("X-Terraform-Get", "x");
    upstream.route(TERRAFORM, VERSIONS, good);
    larder.client().get(&registry(VERSIONS)).await;
    let setup = larder.setup.clone();
    let kept = || !files_below(&setup.data_dir().join("metadata")).is_empty();
    eventually("the document is on disk", kept).await;
    larder.kill().await;
    upstream.line(Line::Reset);

    let larder = setup.start().await;
    let got = larder.client().get(&registry(VERSIONS)).await;

    got.assert_is(ODD_JSON.as_bytes());
    assert_eq!(got.header("content-type"), Some("application/json"));
    assert_eq!(got.header("x-terraform-get"), Some("x"));
    assert!(
        got.cache_status().contains("fwd=stale"),
        "{}",
        got.cache_status()
    );
}

/// Trap: one malformed version list cached. What follows it must be the last good one.
#[tokio::test]
async fn nonsense_never_replaces_the_last_good_answer() {
    let (upstream, larder) = started().await;
    let no_cache = |reply: Reply| reply.header("Cache-Control", "no-cache");
    upstream.route(TERRAFORM, VERSIONS, no_cache(Reply::json(ODD_JSON)));
    larder.client().get(&registry(VERSIONS)).await;
    for nonsense in [
        "{\"versions\":[",
        "",
        "<html>welcome to the airport</html>",
        "[]",
        "null",
    ] {
        upstream.route(TERRAFORM, VERSIONS, no_cache(Reply::json(nonsense)));
        let got = larder.client().get(&registry(VERSIONS)).await;
        println!("{nonsense:?}");
        got.assert_is(ODD_JSON.as_bytes());
    }
    upstream.route(TERRAFORM, VERSIONS, Reply::status(503));
    larder
        .client()
        .get(&registry(VERSIONS))
        .await
        .assert_is(ODD_JSON.as_bytes());
}

#[tokio::test]
async fn without_a_last_good_answer_a_failure_is_a_quick_and_plain_error() {
    let each = failures().into_iter().map(async |(why, failure)| {
        let (upstream, larder) = started().await;
        upstream.route(TERRAFORM, VERSIONS, failure);

        let asked = Instant::now();
        let got = larder.client().get(&registry(VERSIONS)).await;

        println!("{why}: {} {}", got.status, got.text());
        // Ten seconds are what terraform gives.
        assert!(
            asked.elapsed() < Duration::from_secs(9),
            "{why}: {:?}",
            asked.elapsed()
        );
        // An error of upstream's own may be passed on, anything else is larder's to explain.
        match why {
            "500" | "503" | "429" => assert_eq!(got.status.to_string(), why),
            _ => {
                assert!(matches!(got.status, 502 | 504), "{why}: {}", got.status);
                got.assert_refused(got.status);
            }
        }
        let wait = got.header("retry-after").unwrap_or("0");
        assert!(
            wait.parse::<u32>().unwrap() <= 10,
            "{why}: Retry-After: {wait}"
        );
    });
    join_all(each).await;
}

#[tokio::test]
async fn a_silent_upstream_is_504_within_the_deadline() {
    let (upstream, larder) = started().await;
    upstream.line(Line::Deaf);
    let asked = Instant::now();
    let got = larder.client().get(&registry(VERSIONS)).await;
    assert!(
        asked.elapsed() < Duration::from_secs(9),
        "{:?}",
        asked.elapsed()
    );
    got.assert_refused(504);
}

/// One deadline for all tries: three slow ones must not add up.
#[tokio::test]
async fn slow_tries_share_one_deadline() {
    let (upstream, larder) = started().await;
    let slow = Reply::status(503).delayed(Duration::from_secs(4));
    upstream.route(TERRAFORM, VERSIONS, slow);
    let asked = Instant::now();
    let got = larder.client().get(&registry(VERSIONS)).await;
    assert!(
        asked.elapsed() < Duration::from_secs(9),
        "{:?}",
        asked.elapsed()
    );
    assert!((500..600).contains(&got.status));
}

#[tokio::test]
async fn gzip_that_was_not_accepted_is_undone() {
    let (upstream, larder) = started().await;
    let reply = Reply::json(ODD_JSON).etag("\"gz\"").gzipped();
    upstream.route(TERRAFORM, VERSIONS, reply);
    for headers in [
        &[][..],
        &[("Accept-Encoding", "identity")],
        &[("Accept-Encoding", "br")],
    ] {
        let got = larder.client().get_with(&registry(VERSIONS), headers).await;
        got.assert_is(ODD_JSON.as_bytes());
        assert_eq!(got.header("content-encoding"), None);
    }
}

#[tokio::test]
async fn a_client_that_accepts_gzip_gets_no_other_client_gzip() {
    let (upstream, larder) = started().await;
    upstream.route_fn(TERRAFORM, VERSIONS, |seen| {
        let reply = Reply::json(ODD_JSON).header("Vary", "Accept-Encoding");
        let reply = reply.header("Cache-Control", "max-age=60");
        match seen.header("accept-encoding") {
            Some(coding) if coding.contains("gzip") => reply.gzipped(),
            _ => reply,
        }
    });
    let accepting = [("Accept-Encoding", "gzip")];
    let got = larder
        .client()
        .get_with(&registry(VERSIONS), &accepting)
        .await;
    assert!(got.succeeded());
    if got.header("content-encoding").is_none() {
        got.assert_is(ODD_JSON.as_bytes());
    }
    let got = larder.client().get(&registry(VERSIONS)).await;
    got.assert_is(ODD_JSON.as_bytes());
    assert_eq!(got.header("content-encoding"), None);
}

#[tokio::test]
async fn answers_to_credentials_are_neither_kept_nor_shared() {
    let (upstream, larder) = started().await;
    upstream.route_fn(TERRAFORM, VERSIONS, |seen| {
        let who = seen.header("authorization").unwrap_or("nobody");
        let body = json!({"versions": [], "for": who}).to_string();
        Reply::json(body).header("Cache-Control", "public, max-age=3600")
    });
    let get = async |token: &str| {
        let authorization = format!("Bearer {token}");
        let headers = [("Authorization", &*authorization)];
        let got = larder
            .client()
            .get_with(&registry(VERSIONS), &headers)
            .await;
        got.json()["for"].as_str().unwrap().to_owned()
    };
    assert_eq!(get("alice-s3cret").await, "Bearer alice-s3cret");
    assert_eq!(get("bob-s3cret").await, "Bearer bob-s3cret");
    assert_eq!(get("alice-s3cret").await, "Bearer alice-s3cret");
    assert_eq!(upstream.gets(TERRAFORM, VERSIONS), 3);

    let anonymous = larder.client().get(&registry(VERSIONS)).await;
    assert_eq!(anonymous.json()["for"], json!("nobody"));
    // Nor does the anonymous answer, fresh as it is, stand in for one with credentials.
    assert_eq!(get("alice-s3cret").await, "Bearer alice-s3cret");
    assert_eq!(
        larder.setup.files_with("s3cret"),
        Vec::<std::path::PathBuf>::new()
    );
}

/// The last good answer of one user is not another's, not even while upstream is down.
#[tokio::test]
async fn answers_to_credentials_do_not_outlive_upstream() {
    let (upstream, larder) = started().await;
    upstream.route(
        TERRAFORM,
        VERSIONS,
        Reply::json("{\"versions\":[],\"for\":\"alice\"}"),
    );
    let alice = [("Authorization", "Bearer alice")];
    larder.client().get_with(&registry(VERSIONS), &alice).await;
    upstream.route(TERRAFORM, VERSIONS, Reply::status(500));
    for headers in [&[][..], &[("Authorization", "Bearer bob")], &alice] {
        let got = larder.client().get_with(&registry(VERSIONS), headers).await;
        assert!(
            got.status >= 500 && !got.text().contains("alice"),
            "{}",
            got.text()
        );
    }
}

#[tokio::test]
async fn concurrent_asks_with_credentials_are_not_joined() {
    let (upstream, larder) = started().await;
    let gate = Gate::closed();
    let held = gate.clone();
    upstream.route_fn(TERRAFORM, VERSIONS, move |seen| {
        let who = seen.header("authorization").unwrap_or("nobody");
        Reply::json(json!({"versions": [], "for": who}).to_string()).held_by(&held)
    });
    let clients: Vec<_> = ["Bearer a", "Bearer b", "Bearer c"]
        .map(|token| {
            let client = larder.client();
            tokio::spawn(async move {
                let headers = [("Authorization", token)];
                let got = client.get_with(&registry(VERSIONS), &headers).await;
                (token, got.json())
            })
        })
        .into();
    eventually("each is asked for", || {
        upstream.gets(TERRAFORM, VERSIONS) == 3
    })
    .await;
    gate.open();
    for client in clients {
        let (token, got): (_, Value) = client.await.unwrap();
        assert_eq!(got["for"], json!(token));
    }
}

#[tokio::test]
async fn documents_of_one_host_are_not_anothers() {
    let (upstream, larder) = started().await;
    let fresh = |body: &'static str| Reply::json(body).header("Cache-Control", "max-age=60");
    upstream.route(
        TERRAFORM,
        VERSIONS,
        fresh("{\"versions\":[],\"of\":\"terraform\"}"),
    );
    upstream.route(
        OPENTOFU,
        VERSIONS,
        fresh("{\"versions\":[],\"of\":\"opentofu\"}"),
    );
    for _ in 0..2 {
        for (host, name) in [(TERRAFORM, "terraform"), (OPENTOFU, "opentofu")] {
            let got = larder
                .client()
                .get(&format!("https://{host}{VERSIONS}"))
                .await;
            assert_eq!(got.json()["of"], json!(name));
        }
    }
}

/// Every way in which upstream fails to give a version list. Each reply is for good.
fn failures() -> Vec<(&'static str, Reply)> {
    let odd = || Reply::json(ODD_JSON);
    vec![
        ("500", Reply::status(500)),
        ("503", Reply::status(503).header("Retry-After", "3600")),
        ("429", Reply::status(429).header("Retry-After", "3600")),
        ("silent", odd().held_by(&Gate::closed())),
        ("stalled in the body", odd().tapped(&Tap::at(10))),
        ("reset in the body", odd().cut_after(10)),
        ("longer announced than sent", odd().declares_length(10_000)),
        ("malformed", Reply::json("{\"versions\":[{\"version\":")),
        (
            "HTML",
            Reply::new(200, "text/html", "<html>log in first</html>"),
        ),
        ("HTML called JSON", Reply::json("<html>log in first</html>")),
        ("empty", Reply::json("")),
        ("not gzip", odd().header("Content-Encoding", "gzip")),
    ]
}

fn registry(path: &str) -> String {
    format!("https://{TERRAFORM}{path}")
}

async fn started() -> (Upstream, Larder) {
    let upstream = Upstream::start();
    let larder = Setup::new(&upstream).start().await;
    (upstream, larder)
}

/// Sums at an address that does not say so are asked for by clients as anything, and by larder as sums.
#[tokio::test]
async fn sums_at_an_odd_address_are_one_document_whoever_asks() {
    let upstream = Upstream::start();
    let release = Release::new("someone", "thing", "1.2.3");
    release.publish(&upstream);
    let mut document = release.document("linux_amd64");
    let (odd, signed) = (
        format!("https://{RELEASES}/odd/sums"),
        format!("https://{RELEASES}/odd/sums.asc"),
    );
    document["shasums_url"] = odd.clone().into();
    document["shasums_signature_url"] = signed.clone().into();
    upstream.route(
        TERRAFORM,
        &release.document_path("linux_amd64"),
        registry::registry_json(&document),
    );
    upstream.route(RELEASES, "/odd/sums", Reply::text(release.sums.clone()));
    upstream.route(
        RELEASES,
        "/odd/sums.asc",
        Reply::file("application/octet-stream", release.signature.clone()),
    );
    let setup = Setup::new(&upstream).args(["--verify", "signature"]);
    let larder = setup.start().await;
    let client = larder.client();
    for _ in 0..2 {
        client.get(&release.document_url()).await;
        client.get(&odd).await.assert_is(&release.sums);
        client.get(&signed).await.assert_is(&release.signature);
        client
            .get(&release.archive_url())
            .await
            .assert_is(&release.archive());
        larder.setup.holds(1).await;
    }
    larder.terminate().await;
    let larder = setup.clone().arg("--offline").start().await;
    let client = larder.client();
    client.get(&odd).await.assert_is(&release.sums);
    client.get(&signed).await.assert_is(&release.signature);
    client.get(&release.archive_url()).await.assert_hit();
}
