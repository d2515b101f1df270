//! Where larder goes for its clients: the tunnels it may be asked for, and the places that a
//! document or a redirect may send it to.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::common::registry::registry_json;
use crate::common::*;

/// What `tunnel` allows, in each test by a rule or two.
const OTHERS_CAN_CONNECT: &str = "0.0.0.0:0";

// --- Tunnels by name and port ---

#[tokio::test]
async fn no_tunnels_means_none_and_interception_goes_on() {
    let upstream = Upstream::start();
    upstream.route(RELEASES, "/page", Reply::text("a page"));
    let setup = Setup::new(&upstream).config("tunnel = 'deny'\npolicy_contact = '#infra'");
    let larder = setup.start().await;
    let client = larder.client();
    for target in [format!("{ELSEWHERE}:443"), "192.0.2.1:443".to_owned()] {
        let refusal = client.connect(&target).await.unwrap_err();
        assert_words(&refusal, 403);
        for word in ["tunnel", "#infra"] {
            assert!(refusal.reason.contains(word), "{}", refusal.reason);
        }
    }
    let got = client.absolute(&format!("http://{ELSEWHERE}/"), &[]).await;
    got.assert_refused(403);
    assert_eq!(upstream.connections(), 0);
    let got = client.get(&format!("https://{RELEASES}/page")).await;
    got.assert_is(b"a page");
}

#[tokio::test]
async fn a_list_of_tunnels_allows_what_it_lists() {
    let echo = Echo::start().await;
    let patterns = "['a.example', '*.b.example:8443', 'any.example:*', '198.51.100.0/24:22', '[2001:db8::]:443']";
    // Everything leads to the echo: whom the list lets through gets there.
    let everything = format!("::127.0.0.1:{}", echo.port);
    let setup = Setup::without_upstream()
        .config(&format!("tunnel = {patterns}"))
        .args(["--connect-to", &everything]);
    for listen in ["127.0.0.1:0", OTHERS_CAN_CONNECT] {
        let setup = setup.clone().args(["--allow-from", "127.0.0.1"]);
        let larder = setup.start_on(listen).await;
        for (target, allowed) in [
            ("a.example:443", true),
            ("A.EXAMPLE.:443", true),
            ("a.example:80", false),
            ("x.a.example:443", false),
            ("aa.example:443", false),
            ("x.b.example:8443", true),
            ("x.y.b.example:8443", true),
            ("x.b.example:443", false),
            ("b.example:8443", false),
            ("evil-b.example:8443", false),
            ("x.b.example.evil.example:8443", false),
            ("any.example:1", true),
            ("any.example:25", true),
            ("198.51.100.7:22", true),
            ("[::ffff:198.51.100.7]:22", true),
            ("198.51.100.7:443", false),
            ("198.51.101.7:22", false),
            ("[2001:db8::]:443", true),
            ("[2001:db8::1]:443", false),
            ("other.example:443", false),
        ] {
            match larder.client().connect(target).await {
                Ok(_) => assert!(allowed, "{target} on {listen}"),
                Err(refusal) => {
                    assert!(!allowed, "{target} on {listen}: {}", refusal.text());
                    assert_words(&refusal, 403);
                }
            }
        }
    }
}

#[tokio::test]
async fn plain_urls_obey_the_list_of_tunnels() {
    let echo = Echo::start().await;
    let setup = echo.setup().config("tunnel = 'other.example:80'");
    let larder = setup.start().await;
    let got = larder.client().absolute("http://echo.example/", &[]).await;
    got.assert_refused(403);
    assert_eq!(echo.connections(), 0);
}

#[tokio::test]
async fn nonsense_for_a_tunnel_stops_the_start() {
    for (value, word) in [
        ("'deny nothing'", "deny nothing"),
        ("['deny', 'a.example']", "deny"),
        ("'a.example:0'", "a.example:0"),
        ("'*'", "*"),
        ("['']", "tunnel"),
        ("7", "tunnel"),
    ] {
        let setup = Setup::without_upstream().config(&format!("tunnel = {value}"));
        let command = setup.serve_command("127.0.0.1:0");
        assert_refuses_to_start(command, 2, &["tunnel", word]);
    }
}

// --- Tunnels by address ---

#[tokio::test]
async fn no_spelling_of_an_internal_address_is_tunnelled_to_for_others() {
    let echo = Echo::start().await;
    let port = echo.port;
    // The port is open to all of them: the address is what is refused.
    let setup = Setup::without_upstream().args(["--allow-from", "127.0.0.1", "--tunnel", "allow"]);
    let listed = Setup::without_upstream()
        .args(["--allow-from", "127.0.0.1"])
        .args(["--tunnel", "*.localhost:*", "--tunnel", "0.0.0.0/8:*"]);
    for setup in [setup, listed] {
        let larder = setup.start_on(OTHERS_CAN_CONNECT).await;
        for target in [
            "10.1.2.3:443",
            "100.127.255.255:443",
            "169.254.169.254:443",
            "172.31.255.255:443",
            "192.168.1.1:443",
            "224.0.0.1:443",
            "239.255.255.255:443",
            "240.0.0.1:443",
            "255.255.255.255:443",
            "localhost:443",
            "LocalHost.:443",
            "[::]:443",
            "[::1]:443",
            "[::127.0.0.1]:443",
            "[::ffff:192.168.1.1]:443",
            "[::ffff:7f00:1]:443",
            "[64:ff9b::7f00:1]:443",
            "[64:ff9b::169.254.169.254]:443",
            "[2002:7f00:1::1]:443",
            "[fc00::1]:443",
            "[fe80::1]:443",
            "[febf::1]:443",
            "[fec0::1]:443",
            "[ff02::1]:443",
            "2130706433:443",
            "0x7f000001:443",
            "127.1:443",
            "0177.1:443",
        ] {
            let refusal = larder.client().connect(target).await;
            let refusal = refusal.expect_err(target);
            assert_eq!(refusal.status / 100, 4, "{target}: {}", refusal.text());
        }
        for target in [format!("127.0.0.1:{port}"), format!("localhost:{port}")] {
            let refusal = larder.client().connect(&target).await.expect_err(&target);
            assert_words(&refusal, 403);
        }
    }
    assert_eq!(echo.connections(), 0);
}

#[tokio::test]
async fn a_listed_host_or_range_may_be_internal() {
    let echo = Echo::start().await;
    let port = echo.port;
    for (pattern, reached, refused) in [
        (format!("localhost:{port}"), "localhost", "127.0.0.1"),
        ("localhost:*".to_owned(), "localhost", "127.0.0.1"),
        (format!("127.0.0.0/8:{port}"), "127.0.0.1", "localhost"),
        (format!("127.0.0.1:{port}"), "127.0.0.1", "127.0.0.2"),
    ] {
        for listen in ["127.0.0.1:0", OTHERS_CAN_CONNECT] {
            let setup =
                Setup::without_upstream().args(["--allow-from", "127.0.0.1", "--tunnel", &pattern]);
            let larder = setup.start_on(listen).await;
            let client = larder.client();
            let tcp = client.connect(&format!("{reached}:{port}")).await;
            let mut tcp = tcp.unwrap_or_else(|refusal| panic!("{pattern}: {}", refusal.text()));
            tcp.write_all(b"hello").await.unwrap();
            let mut back = [0; 5];
            within("the echo", tcp.read_exact(&mut back)).await.unwrap();
            assert_eq!(&back, b"hello");
            let refusal = client.connect(&format!("{refused}:{port}")).await;
            assert_words(&refusal.expect_err(&pattern), 403);
            // One that is not listed with its port.
            let refusal = client.connect(&format!("{reached}:{}", free_port())).await;
            if !pattern.ends_with('*') {
                assert_words(&refusal.expect_err(&pattern), 403);
            }
        }
    }
}

// --- What documents and redirects say ---

#[tokio::test]
async fn a_document_that_names_an_internal_archive_leads_nowhere() {
    let trap = Echo::start().await;
    let port = trap.port;
    let upstream = Upstream::start();
    let setup = Setup::new(&upstream).args(["--allow-from", "127.0.0.1"]);
    for listen in ["127.0.0.1:0", OTHERS_CAN_CONNECT] {
        let larder = setup.start_on(listen).await;
        let mut places = vec![
            format!("https://127.0.0.1:{port}"),
            format!("https://localhost:{port}"),
            format!("https://[::1]:{port}"),
            format!("https://[::ffff:127.0.0.1]:{port}"),
            format!("https://2130706433:{port}"),
            format!("https://user:pw@127.0.0.1:{port}"),
            "https://169.254.169.254".to_owned(),
        ];
        if listen == OTHERS_CAN_CONNECT {
            let more = [
                "https://10.9.8.7",
                "https://192.168.0.1",
                "https://[fd00::1]",
            ];
            places.extend(more.map(str::to_owned));
            places.push(format!("https://{ELSEWHERE}:8443"));
        }
        let fields = ["download_url", "shasums_url", "shasums_signature_url"];
        for (place, field) in places
            .iter()
            .flat_map(|place| fields.map(|field| (place, field)))
        {
            // A version of its own, lest it be held by its digest.
            let version = format!("1.{}.0", unique());
            let release = Release::new("someone", "thing", &version).on(TERRAFORM, Home::GitHub);
            release.publish(&upstream);
            let mut document = release.document("linux_amd64");
            let named = format!("{place}/{version}/{field}.zip");
            document[field] = named.clone().into();
            let path = release.document_path("linux_amd64");
            upstream.route(TERRAFORM, &path, registry_json(&document));
            let client = larder.client();
            let got = client.get(&release.document_url()).await;
            if got.status != 200 {
                continue; // Refused as nonsense: so much the better.
            }
            let document = got.json();
            let given = document[field].as_str().unwrap();
            match given.strip_prefix(&format!("https://{TERRAFORM}/.larder/")) {
                Some(_) => {
                    let got = client.get(given).await;
                    assert_eq!(got.status, 403, "{named} on {listen}: {}", got.text());
                }
                // Left as it is, for the client to find refused.
                None => assert_eq!(given, named),
            }
            // Nor does larder go there to verify the archive.
            let archive = document["download_url"].as_str().unwrap();
            if field != "download_url" {
                client.get(archive).await.assert_is(&release.archive());
            }
        }
    }
    assert_eq!(trap.connections(), 0);
}

#[tokio::test]
async fn a_redirect_to_an_internal_address_is_not_followed() {
    let trap = Echo::start().await;
    let port = trap.port;
    let upstream = Upstream::start();
    let release = Release::new("someone", "thing", "1.0.0").on(TERRAFORM, Home::GitHub);
    release.publish(&upstream);
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let setup = Setup::new(&upstream).args(["--allow-from", "127.0.0.1"]);
    for listen in ["127.0.0.1:0", OTHERS_CAN_CONNECT] {
        let larder = setup.start_on(listen).await;
        let client = larder.client();
        let third_party = ours_of(&client, &release).await;
        let (host, path) = release.archive_path();
        for place in [
            format!("https://127.0.0.1:{port}/x.zip"),
            format!("https://localhost:{port}/x.zip"),
            format!("http://127.0.0.1:{port}/x.zip"),
            format!("//[::ffff:127.0.0.1]:{port}/x.zip"),
            format!("ftp://127.0.0.1:{port}/x.zip"),
            "https://169.254.169.254/latest/meta-data/".to_owned(),
            "file:///etc/passwd".to_owned(),
        ] {
            let redirect = Reply::redirect(&place);
            upstream.route(host, &path, redirect.clone());
            upstream.route(RELEASES, &product.archive_path(), redirect.clone());
            upstream.route(RELEASES, &product.sums_path(), redirect);
            for url in [&third_party, &product.archive_url()] {
                let got = client.get(url).await;
                assert!(!got.succeeded(), "{url} to {place} on {listen}");
                assert!(got.status >= 400, "{url} to {place}: {}", got.status);
                let private = [("Authorization", "Bearer x")];
                let got = client.get_with(url, &private).await;
                assert!(!got.succeeded(), "{url} to {place} on {listen}");
            }
        }
    }
    assert_eq!(trap.connections(), 0);
}

#[tokio::test]
async fn redirects_are_followed_ten_times_and_no_more() {
    let upstream = Upstream::start();
    let release = Release::new("someone", "thing", "1.0.0").on(TERRAFORM, Home::GitHub);
    release.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    let url = ours_of(&client, &release).await;
    let (host, path) = release.archive_path();

    let round = Reply::redirect(&format!("https://{host}{path}"));
    upstream.route(host, &path, round);
    let got = client.get(&url).await;
    assert_eq!(got.status, 502, "{}", got.text());
    assert!(got.text().contains("redirects"), "{}", got.text());
    assert_eq!(upstream.gets(host, &path), 11);

    let hop = |n: usize| format!("/hop/{n}");
    upstream.route(host, &path, Reply::redirect(&hop(1)));
    for n in 1..=9 {
        upstream.route(host, &hop(n), Reply::redirect(&hop(n + 1)));
    }
    upstream.route(host, &hop(10), Reply::archive(release.archive()));
    client.get(&url).await.assert_is(&release.archive());
}

/// The URL under which the release's document, as larder serves it, names its archive.
async fn ours_of(client: &Client, release: &Release) -> String {
    let document = client.get(&release.document_url()).await.json();
    let url = document["download_url"].as_str().unwrap().to_owned();
    assert!(url.contains("/.larder/"), "{url}");
    url
}
