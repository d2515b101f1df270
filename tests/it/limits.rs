//! What clients and upstreams can make larder hold, bounded by the config file.

use std::time::Duration;

use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::common::registry::{noise, registry_json};
use crate::common::*;

// --- Connections ---

#[tokio::test]
async fn an_address_with_too_many_connections_gets_no_further_ones() {
    let setup = Setup::without_upstream().config("max_connections_per_address = 3");
    let larder = setup.start().await;
    let client = larder.client();
    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(served(&client).await.expect("one of three"));
    }
    for _ in 0..3 {
        assert!(served(&client).await.is_none(), "a fourth is served");
    }
    open.pop();
    // Its end may take a moment to be noticed.
    let freed = until_served(&client).await;
    assert!(served(&client).await.is_none(), "a fourth is served");
    drop((open, freed));
    until_served(&client).await;
    assert!(larder.metric("larder_connections_refused_total").await >= 4.0);
}

#[tokio::test]
async fn too_many_connections_wait_until_others_end() {
    let setup = Setup::without_upstream().config("max_connections = 2");
    let larder = setup.start().await;
    let client = larder.client();
    let first = served(&client).await.unwrap();
    let _second = served(&client).await.unwrap();
    let mut third = client.tcp().await;
    third.write_all(HEALTH).await.unwrap();
    let mut start = [0; 12];
    let waits = Duration::from_millis(500);
    let early = tokio::time::timeout(waits, third.read(&mut start)).await;
    assert!(early.is_err(), "answered beside two others: {early:?}");
    drop(first);
    within("its turn", third.read_exact(&mut start))
        .await
        .unwrap();
    assert_eq!(&start, b"HTTP/1.1 200");
}

/// Behind NAT, a whole CI is one address.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_connections_of_one_address_do_not_hinder_a_working_client() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
    if limit.maximum.is_some_and(|most| most < 2600) {
        println!("skipped: only {:?} open files are permitted", limit.maximum);
        return;
    }
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    // The slowest machine shall not drop the first of them before the last is there.
    let setup = Setup::new(&upstream).config("handshake_timeout = '10m'\nidle_timeout = '10m'");
    let larder = setup.start().await;
    let client = larder.client();
    let mut half_open = Vec::new();
    for i in 0..2000 {
        let mut tcp = client.tcp().await;
        let start: &[u8] = match i % 3 {
            0 => b"",
            1 => b"GET /healthz HTTP/1.1\r\nHost:",
            _ => b"\x16\x03\x01\x02\x00\x01\x00",
        };
        tcp.write_all(start).await.unwrap();
        half_open.push(tcp);
    }
    client
        .get(&product.archive_url())
        .await
        .assert_is(&product.archive);
    client
        .get(&product.archive_url())
        .await
        .assert_is(&product.archive);
    let connections = larder.metric("larder_connections_open").await;
    assert!(connections > 2000.0, "{connections}");
    assert_eq!(larder.metric("larder_connections_refused_total").await, 0.0);
}

#[tokio::test]
async fn a_connection_is_closed_after_so_many_requests() {
    let upstream = Upstream::start();
    upstream.route(RELEASES, "/page", Reply::text("a page"));
    for most in [1, 3] {
        let setup = Setup::new(&upstream);
        let larder = setup.config(&format!("max_requests_per_connection = {most}"));
        let larder = larder.start().await;
        let client = larder.client();
        for (mut conn, host, path) in [
            (client.open(RELEASES).await, RELEASES, "/page"),
            (client.plain().await, "larder", "/healthz"),
        ] {
            for asked in 1..=most {
                conn.request("GET", host, path, &[]).await;
                let answer = conn.answer("GET").await.unwrap();
                assert_eq!(answer.status, 200);
                let closes = answer.header("connection") == Some("close");
                assert_eq!(closes, asked == most, "{asked} of {most} for {path}");
                (_, conn) = answer.finish_and_keep().await;
            }
            conn.request("GET", host, path, &[]).await;
            assert!(conn.answer("GET").await.is_err(), "one more for {path}");
        }
    }
}

#[tokio::test]
async fn a_request_with_too_large_a_head_is_refused() {
    for (limit, fits, too_much) in [("8KiB", 6_000, 25_000), ("20000", 18_000, 60_000)] {
        let setup = Setup::without_upstream().config(&format!("max_header_size = '{limit}'"));
        let larder = setup.start().await;
        let client = larder.client();
        for (size, status) in [(fits, "200"), (too_much, "431")] {
            let long = "x".repeat(size);
            for head in [
                format!("GET /healthz HTTP/1.1\r\nConnection: close\r\nX-Long: {long}\r\n\r\n"),
                format!("GET /healthz?{long} HTTP/1.1\r\nConnection: close\r\n\r\n"),
            ] {
                let said = client.raw(head.as_bytes()).await;
                let said = String::from_utf8_lossy(&said);
                let refused = status == "431" && said.is_empty();
                let start = format!("HTTP/1.1 {status}");
                assert!(
                    refused || said.starts_with(&start),
                    "{limit}, {size}: {said:.40}"
                );
            }
        }
    }
}

#[tokio::test]
async fn silent_and_half_open_clients_are_dropped_when_their_time_is_over() {
    let upstream = Upstream::start();
    let setup = Setup::new(&upstream).config("handshake_timeout = '1s'\nidle_timeout = '1s'");
    let larder = setup.start().await;
    let client = larder.client();
    let connect = format!("{TERRAFORM}:443");
    let mut waiting: Vec<(&str, TcpStream)> = vec![("silent", client.tcp().await)];
    for (what, bytes) in [
        ("half a request", &b"GET /healthz HTTP/1.1\r\nHost:"[..]),
        ("half a method", b"G"),
        ("half a ClientHello", b"\x16\x03\x01\x02\x00\x01\x00"),
        ("kept alive", HEALTH),
    ] {
        let mut tcp = client.tcp().await;
        tcp.write_all(bytes).await.unwrap();
        waiting.push((what, tcp));
    }
    waiting.push((
        "silent after CONNECT",
        client.connect(&connect).await.unwrap(),
    ));
    let mut half = client.connect(&connect).await.unwrap();
    half.write_all(b"\x16\x03\x01\x02\x00\x01\x00")
        .await
        .unwrap();
    waiting.push(("half a ClientHello after CONNECT", half));
    let tls = client.tls(RELEASES, RELEASES).await.unwrap();
    waiting.push(("silent after TLS", tls.into_inner().0));
    // By default it would be thirty seconds.
    let limit = tokio::time::Instant::now() + Duration::from_secs(20);
    for (what, mut tcp) in waiting {
        let mut said = Vec::new();
        let closed = tokio::time::timeout_at(limit, tcp.read_to_end(&mut said)).await;
        assert!(closed.is_ok(), "{what}: still open after 20 s");
    }
    assert_alive(&larder).await;
}

// --- Documents and archives ---

#[tokio::test]
async fn a_document_that_is_too_large_passes_whole_and_unkept() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let padding: String = noise(40_000, "")
        .iter()
        .map(|b| char::from(b % 26 + b'a'))
        .collect();
    let mut versions = release.versions();
    versions["warnings"] = vec![padding].into();
    let large = registry_json(&versions);
    let text = serde_json::to_string_pretty(&versions).unwrap();
    let larder = Setup::new(&upstream).config("max_metadata_size = '30KiB'");
    let larder = larder.start().await;
    let client = larder.client();
    let path = release.versions_path();
    for reply in [
        large.clone(),
        large.clone().chunked(),
        large.close_delimited(),
    ] {
        upstream.route(TERRAFORM, &path, reply);
        for _ in 0..2 {
            let before = upstream.gets(TERRAFORM, &path);
            let got = client.get(&release.versions_url()).await;
            got.assert_is(text.as_bytes());
            assert!(
                !got.cache_status().contains("hit"),
                "{}",
                got.cache_status()
            );
            assert!(upstream.gets(TERRAFORM, &path) > before);
        }
    }
    let kept = larder.setup.files_with(&text[1000..1100]);
    assert_eq!(kept, Vec::<std::path::PathBuf>::new());
    // What fits is kept as ever.
    client.get(&release.document_url()).await;
    let got = client.get(&release.document_url()).await;
    assert!(
        got.cache_status().contains("fwd-status=304"),
        "{}",
        got.cache_status()
    );
}

#[tokio::test]
async fn an_archive_that_is_too_large_passes_verified_and_unkept() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let (path, url) = (product.archive_path(), product.archive_url());
    let good = Reply::archive(product.archive.clone());
    let larder = Setup::new(&upstream).config("max_archive_size = '100KiB'");
    let larder = larder.start().await;
    let client = larder.client();
    for reply in [good.clone(), good.clone().chunked()] {
        upstream.route(RELEASES, &path, reply.clone());
        for _ in 0..2 {
            let before = upstream.gets(RELEASES, &path);
            client.get(&url).await.assert_is(&product.archive);
            assert!(upstream.gets(RELEASES, &path) > before);
            larder.setup.holds(0).await;
        }
        let (one, two) = tokio::join!(client.get(&url), client.get(&url));
        one.assert_is(&product.archive);
        two.assert_is(&product.archive);
        upstream.route(RELEASES, &path, reply.corrupt_at(200_000));
        let got = client.get(&url).await;
        assert!(
            !got.succeeded(),
            "status {}, {} bytes",
            got.status,
            got.body.len()
        );
        assert!(got.body.len() < product.archive.len());
        larder.setup.holds(0).await;
    }
    let small = Product::sized("vault", "1.0.0", 50_000);
    small.publish(&upstream);
    client
        .get(&small.archive_url())
        .await
        .assert_is(&small.archive);
    larder.setup.holds(1).await;
}

#[tokio::test]
async fn archives_beyond_the_fills_at_once_pass_verified_and_unkept() {
    let upstream = Upstream::start();
    let [first, second] = ["1.9.0", "1.9.1"].map(|version| Product::new("terraform", version));
    let tap = Tap::at(100_000);
    for product in [&first, &second] {
        product.publish(&upstream);
    }
    let good = |product: &Product| Reply::archive(product.archive.clone());
    upstream.route(RELEASES, &first.archive_path(), good(&first).tapped(&tap));
    let larder = Setup::new(&upstream).config("max_fills = 1").start().await;
    let client = larder.client();
    let mut filling = client.stream(&first.archive_url()).await;
    let start = filling.at_least(50_000).await;

    for reply in [good(&second), good(&second).chunked()] {
        upstream.route(RELEASES, &second.archive_path(), reply.clone());
        let got = client.get(&second.archive_url()).await;
        got.assert_is(&second.archive);
        assert!(
            !got.cache_status().contains("stored;"),
            "{}",
            got.cache_status()
        );
        assert_eq!(larder.setup.blobs().len(), 0);
        upstream.route(RELEASES, &second.archive_path(), reply.corrupt_at(9));
        assert!(!client.get(&second.archive_url()).await.succeeded());
    }
    upstream.route(RELEASES, &second.archive_path(), good(&second));

    tap.open();
    filling.finish_after(start).await.assert_is(&first.archive);
    larder.setup.holds(1).await;
    // There is room for it now.
    client
        .get(&second.archive_url())
        .await
        .assert_is(&second.archive);
    larder.setup.holds(2).await;
}

// --- Tunnels ---

#[tokio::test]
async fn tunnels_beyond_the_limit_are_503_until_one_ends() {
    let echo = Echo::start().await;
    let larder = echo.setup().config("max_tunnels = 1").start().await;
    let client = larder.client();
    let mut first = client.connect(&echo.name(443)).await.unwrap();
    assert!(is_echoed(&mut first).await);
    let refusal = client.connect(&echo.name(443)).await.unwrap_err();
    assert_words(&refusal, 503);
    // Interception is no tunnel.
    client.connect(&format!("{TERRAFORM}:443")).await.unwrap();
    drop(first);
    let mut second = None;
    for _ in 0..400 {
        match client.connect(&echo.name(443)).await {
            Ok(tunnel) => {
                second = Some(tunnel);
                break;
            }
            Err(refusal) => assert_words(&refusal, 503),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(is_echoed(&mut second.expect("a tunnel")).await);
}

#[tokio::test]
async fn a_tunnel_without_a_byte_ends_by_itself() {
    let echo = Echo::start().await;
    let setup = echo.setup().config("tunnel_idle_timeout = '1s'");
    let larder = setup.start().await;
    let mut tunnel = larder.client().connect(&echo.name(443)).await.unwrap();
    assert!(is_echoed(&mut tunnel).await);
    let mut byte = [0; 1];
    let end = tokio::time::timeout(PATIENCE, tunnel.read(&mut byte)).await;
    assert!(matches!(end, Ok(Ok(0) | Err(_))), "{end:?}");
}

#[tokio::test]
async fn a_busy_tunnel_ends_with_its_lifetime() {
    let echo = Echo::start().await;
    let larder = echo.setup().config("tunnel_lifetime = '2s'").start().await;
    let mut tunnel = larder.client().connect(&echo.name(443)).await.unwrap();
    let begun = std::time::Instant::now();
    while is_echoed(&mut tunnel).await {
        assert!(begun.elapsed() < PATIENCE, "still open");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(
        begun.elapsed() >= Duration::from_millis(1900),
        "{:?}",
        begun.elapsed()
    );
}

// --- Values ---

#[tokio::test]
async fn a_bad_limit_stops_the_start_and_is_named() {
    let counts = [
        "max_connections",
        "max_connections_per_address",
        "max_requests_per_connection",
        "max_fills",
        "max_tunnels",
    ];
    let sizes = ["max_header_size", "max_metadata_size", "max_archive_size"];
    let times = [
        "handshake_timeout",
        "idle_timeout",
        "tunnel_idle_timeout",
        "tunnel_lifetime",
    ];
    let bad: [(&[&str], &[&str]); 3] = [
        (
            &counts,
            &["'many'", "-1", "1.5", "[1]", "99999999999999999999"],
        ),
        (
            &sizes,
            &[
                "'lots'",
                "'-1'",
                "'1.5GiB'",
                "''",
                "'99999999999TiB'",
                "true",
            ],
        ),
        (
            &times,
            &[
                "'soon'",
                "'-1s'",
                "''",
                "'1 fortnight'",
                "'99999999999999w'",
                "[]",
            ],
        ),
    ];
    for (keys, values) in bad {
        for key in keys {
            for value in values {
                let setup = Setup::without_upstream().config(&format!("{key} = {value}"));
                let command = setup.serve_command("127.0.0.1:0");
                assert_refuses_to_start(command, 2, &["larder.toml", key]);
            }
        }
    }
}

const HEALTH: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: larder\r\n\r\n";

/// A connection that was answered on; none if it was closed.
async fn served(client: &Client) -> Option<Conn> {
    let mut conn = client.plain().await;
    conn.write(HEALTH).await;
    let answer = conn.answer("GET").await.ok()?;
    assert_eq!(answer.status, 200);
    Some(answer.finish_and_keep().await.1)
}

async fn until_served(client: &Client) -> Conn {
    for _ in 0..400 {
        if let Some(conn) = served(client).await {
            return conn;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("no connection is served any more");
}

async fn is_echoed(tunnel: &mut TcpStream) -> bool {
    let mut back = [0; 4];
    let sent = tunnel.write_all(b"ping").await.is_ok();
    sent && within("the echo", tunnel.read_exact(&mut back))
        .await
        .is_ok()
}
