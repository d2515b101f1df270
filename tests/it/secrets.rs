//! What a client sends for one origin is for that origin: credentials are passed on to it alone,
//! and what they open is nobody else's.

use std::path::PathBuf;

use crate::common::*;

/// A header that makes a request private, with a value that no other run has used.
fn secrets() -> [(&'static str, String); 2] {
    [
        ("Authorization", format!("Bearer s3cret-{:x}", unique())),
        ("Cookie", format!("session=s3cret-{:x}", unique())),
    ]
}

#[tokio::test]
async fn a_private_document_is_asked_for_each_time_and_kept_from_others() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let path = release.versions_path();
    for (name, secret) in secrets() {
        let expected = secret.clone();
        upstream.route_fn(TERRAFORM, &path, move |seen| match seen.header(name) {
            Some(value) if value == expected => {
                Reply::json("{\"versions\":[\"private\"]}").header("Cache-Control", "max-age=3600")
            }
            _ => Reply::json("{\"versions\":[\"public\"]}").header("Cache-Control", "max-age=3600"),
        });
        let larder = Setup::new(&upstream).start().await;
        let client = larder.client();
        let with = [(name, &*secret)];
        let before = upstream.gets(TERRAFORM, &path);
        for asked in 1..=2 {
            let got = client.get_with(&release.versions_url(), &with).await;
            assert!(got.text().contains("private"), "{}", got.text());
            assert_eq!(upstream.gets(TERRAFORM, &path), before + asked);
        }
        let got = client.get(&release.versions_url()).await;
        assert!(got.text().contains("public"), "{name}: {}", got.text());
        client.get(&release.versions_url()).await.assert_hit();
        // What is held of others does not answer the private request.
        let got = client.get_with(&release.versions_url(), &with).await;
        assert!(got.text().contains("private"), "{}", got.text());
        client.get(&release.versions_url()).await.assert_hit();
        assert_eq!(upstream.gets(TERRAFORM, &path), before + 4);
    }
}

#[tokio::test]
async fn a_private_archive_is_verified_and_neither_kept_nor_shared() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let (path, url) = (product.archive_path(), product.archive_url());
    for (name, secret) in secrets() {
        let larder = Setup::new(&upstream).start().await;
        let client = larder.client();
        let with = [(name, &*secret)];
        let before = upstream.gets(RELEASES, &path);
        for _ in 0..2 {
            let got = client.get_with(&url, &with).await;
            got.assert_is(&product.archive);
        }
        assert_eq!(upstream.gets(RELEASES, &path), before + 2, "{name}");
        let journal = upstream.journal();
        let asked = journal.iter().filter(|seen| seen.path() == path);
        let bearing = asked.filter(|seen| seen.header(name) == Some(&*secret));
        assert_eq!(bearing.count(), 2);

        let corrupt = Reply::archive(product.archive.clone()).corrupt_at(9);
        upstream.route(RELEASES, &path, corrupt);
        assert!(!client.get_with(&url, &with).await.succeeded(), "{name}");
        product.publish(&upstream);
        larder.setup.holds(0).await;
    }
}

#[tokio::test]
async fn private_requests_at_the_same_time_each_reach_upstream() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    for (path, reply) in [
        (
            product.archive_path(),
            Reply::archive(product.archive.clone()),
        ),
        ("/page".to_owned(), Reply::text("a page")),
    ] {
        let gate = Gate::closed();
        upstream.route(RELEASES, &path, reply.held_by(&gate));
        let url = format!("https://{RELEASES}{path}");
        let ask =
            async |secret: &'static str| client.get_with(&url, &[("Authorization", secret)]).await;
        let public = client.get(&url);
        let both = async {
            let what = "upstream is asked thrice";
            eventually(what, || upstream.gets(RELEASES, &path) == 3).await;
            gate.open();
        };
        let (one, two, public, ()) = tokio::join!(ask("one"), ask("two"), public, both);
        for got in [one, two, public] {
            assert!(got.succeeded(), "{path}: {}", got.status);
        }
    }
}

#[tokio::test]
async fn credentials_do_not_cross_to_another_host_with_a_redirect() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let (path, url) = (product.archive_path(), product.archive_url());
    let there = format!("/stored{path}");
    upstream.route(ELSEWHERE, &there, Reply::archive(product.archive.clone()));
    let there_url = format!("https://{ELSEWHERE}{there}");
    upstream.route(RELEASES, &path, Reply::redirect("/near"));
    upstream.route(RELEASES, "/near", Reply::redirect(&there_url));
    // And back: what was dropped stays dropped.
    let back_url = format!("https://{ELSEWHERE}/back");
    upstream.route(RELEASES, "/doc", Reply::redirect(&back_url));
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    for (name, secret) in secrets() {
        let with = [(name, &*secret)];
        let got = client.get_with(&url, &with).await;
        got.assert_is(&product.archive);
        // Of a document the client hears, and goes there itself.
        let got = client
            .get_with(&format!("https://{RELEASES}/doc"), &with)
            .await;
        assert_eq!(
            (got.status, got.header("location")),
            (302, Some(&*back_url))
        );

        let journal = upstream.journal();
        let bears = |host: &str, path: &str| {
            let mut asked = journal.iter().filter(|seen| seen.host == host);
            asked.any(|seen| seen.path() == path && seen.header(name) == Some(&*secret))
        };
        for near in [&*path, "/near", "/doc"] {
            assert!(bears(RELEASES, near), "{near} without {name}");
        }
        assert!(!bears(ELSEWHERE, &there), "{name} crossed");
    }
    assert!(upstream.gets(ELSEWHERE, &there) >= 2);
}

/// A registry's token is not GitHub's business, though larder fetches from there in its name.
#[tokio::test]
async fn credentials_for_a_registry_do_not_go_to_where_its_documents_point() {
    let upstream = Upstream::start();
    let release = Release::new("someone", "thing", "1.2.3").on(TERRAFORM, Home::GitHub);
    release.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    let document = client.get(&release.document_url()).await.json();
    let url = document["download_url"].as_str().unwrap();
    for (name, secret) in secrets() {
        let with = [(name, &*secret)];
        client
            .get_with(url, &with)
            .await
            .assert_is(&release.archive());
        let journal = upstream.journal();
        let leaked = journal.iter().find(|seen| seen.header(name).is_some());
        assert!(leaked.is_none(), "{leaked:?}");
    }
}

#[tokio::test]
async fn secrets_are_neither_logged_nor_written() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let release = Release::new("someone", "thing", "1.2.3").on(TERRAFORM, Home::GitHub);
    release.publish(&upstream);
    let set = Reply::text("a page").header("Set-Cookie", "given=s3cret-cookie-given");
    upstream.route(RELEASES, "/page", set);
    let larder = Setup::new(&upstream).arg("-vv").start().await;
    let client = larder.client();
    let document = client.get(&release.document_url()).await.json();
    let rewritten = document["download_url"].as_str().unwrap().to_owned();
    let secrets = secrets();
    for (name, secret) in &secrets {
        let with = [(*name, &**secret)];
        for url in [
            release.versions_url(),
            release.document_url(),
            rewritten.clone(),
            product.archive_url(),
            format!("https://{RELEASES}/page"),
            format!("https://{RELEASES}/none"),
        ] {
            client.get_with(&url, &with).await;
            client.send("HEAD", &url, &with).await;
        }
        let body = [with[0], ("Content-Length", "0")];
        client.send("POST", &release.versions_url(), &body).await;
        let plain = format!("http://{ELSEWHERE}:1/");
        client.absolute(&plain, &with).await;
        client
            .connect_with(
                &format!("{ELSEWHERE}:443"),
                &format!("{name}: {secret}\r\n"),
            )
            .await
            .unwrap();
        client.page("/metrics").await;
    }
    for _ in 0..2 {
        // Nor is a cookie that upstream gives one client given to another.
        let got = client.get(&format!("https://{RELEASES}/page")).await;
        assert_eq!(got.header("set-cookie"), None);
    }
    client.get(&product.archive_url()).await;
    larder.setup.holds(2).await;
    let asked = upstream.journal();
    assert!(asked.iter().any(|seen| seen.header("cookie").is_some()));

    assert!(!larder.log_with(&["TRACE"]).is_empty());
    let shown = |secret: &str| secret.split(['=', ' ']).next_back().unwrap().to_owned();
    for secret in [
        shown(&secrets[0].1),
        shown(&secrets[1].1),
        "s3cret-cookie-given".into(),
    ] {
        assert_eq!(larder.log_with(&[&secret]), Vec::<String>::new());
        assert_eq!(larder.setup.files_with(&secret), Vec::<PathBuf>::new());
    }
    let metrics = larder.metrics().await;
    assert!(!metrics.contains("s3cret"), "{metrics}");
}
