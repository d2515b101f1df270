//! The one port: own pages, tunnels and their policy, draining, and bad input.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::common::client::handshake;
use crate::common::registry::noise;
use crate::common::*;

// --- Own pages ---

#[tokio::test]
async fn own_pages_answer_over_plain_http() {
    let larder = Setup::without_upstream().start().await;
    let client = larder.client();
    for page in ["/readyz", "/healthz"] {
        let got = client.page(page).await;
        assert!(
            got.succeeded() && got.status == 200,
            "{page}: {}",
            got.status
        );
    }
    let ca = client.page("/ca.pem").await;
    assert_eq!(ca.body, std::fs::read(larder.setup.ca_pem()).unwrap());
    let metrics = larder.metrics().await;
    assert!(metrics.contains("# TYPE larder_"), "{metrics}");
}

#[tokio::test]
async fn proxy_pac_sends_just_the_intercept_set_to_larder() {
    let setup = Setup::without_upstream().args(["--intercept", "tf.corp.example"]);
    let larder = setup.start().await;
    let got = larder.client().page("/proxy.pac").await;
    assert_eq!(got.status, 200);
    assert_eq!(
        got.header("content-type"),
        Some("application/x-ns-proxy-autoconfig")
    );
    let pac = got.text();
    assert!(pac.contains("FindProxyForURL"), "{pac}");
    for host in [TERRAFORM, OPENTOFU, RELEASES, "tf.corp.example"] {
        assert!(pac.contains(host), "{host}: {pac}");
    }
    assert!(!pac.contains(GITHUB), "{pac}");
    assert!(pac.contains(&format!("PROXY {}", larder.addr)), "{pac}");
    assert!(pac.contains("DIRECT"), "{pac}");
}

#[tokio::test]
async fn pages_that_do_not_exist_say_so_in_json() {
    let larder = Setup::without_upstream().start().await;
    let got = larder.client().page("/no/such/page").await;
    assert_eq!(got.status, 404);
    assert!(
        got.json()["errors"][0]
            .as_str()
            .unwrap()
            .starts_with("larder: ")
    );
}

#[tokio::test]
async fn head_and_other_methods_on_own_pages() {
    let larder = Setup::without_upstream().start().await;
    let host = larder.addr.to_string();
    for (method, status) in [("HEAD", 200), ("DELETE", 405), ("POST", 405)] {
        let mut conn = larder.client().plain().await;
        conn.request(method, &host, "/healthz", &[("Content-Length", "0")])
            .await;
        let got = conn.answer(method).await.unwrap().finish().await;
        assert_eq!(got.status, status, "{method}");
    }
}

#[tokio::test]
async fn own_pages_are_there_through_connect_to_larder_itself() {
    let larder = Setup::without_upstream().start().await;
    let port = larder.addr.port();
    for name in ["127.0.0.1", "localhost"] {
        let tcp = larder.client().connect(&format!("{name}:{port}")).await;
        let mut conn = Conn::new(tcp.expect(name));
        conn.request("GET", name, "/healthz", &[]).await;
        let got = conn.answer("GET").await.unwrap().finish().await;
        assert_eq!(got.status, 200, "{name}");
    }
}

#[tokio::test]
async fn own_pages_are_there_over_tls_under_larders_names() {
    let setup = Setup::without_upstream().args(["--hostname", "larder.corp.example"]);
    let larder = setup.start().await;
    let client = larder.client();
    for name in ["localhost", "larder.corp.example"] {
        let tls = client.handshake(client.tcp().await, name).await.unwrap();
        let mut conn = Conn::new(tls);
        conn.request("GET", name, "/readyz", &[]).await;
        let got = conn.answer("GET").await.unwrap().finish().await;
        assert_eq!(got.status, 200, "{name}");
    }
}

#[tokio::test]
async fn tls_straight_to_the_port_is_intercepted_by_name_or_ends() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();

    let tls = client
        .handshake(client.tcp().await, RELEASES)
        .await
        .unwrap();
    let mut conn = Conn::new(tls);
    conn.request("GET", RELEASES, "/terraform/", &[]).await;
    let got = conn.answer("GET").await.unwrap().finish().await;
    assert_eq!(got.status, 200);

    let error = client
        .handshake(client.tcp().await, GITHUB)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("UnrecognisedName"), "{error}");
}

// --- Tunnels ---

#[tokio::test]
async fn other_hosts_are_blind_tunnels() {
    let upstream = Upstream::start();
    upstream.route(ELSEWHERE, "/", Reply::text("their own words"));
    let larder = Setup::new(&upstream).start().await;

    // The peer shows upstream's certificate, not one of larder's.
    let client = larder.client().trusting(&upstream.ca_pem);
    let got = client.get(&format!("https://{ELSEWHERE}/")).await;

    got.assert_is(b"their own words");
    assert_eq!(got.header("via"), None);
    assert_eq!(got.header("cache-status"), None);
}

#[tokio::test]
async fn tunnels_carry_any_bytes_both_ways_and_half_closes() {
    let echo = Echo::start().await;
    let larder = echo.setup().start().await;
    let mut tcp = larder.client().connect(&echo.name(443)).await.unwrap();
    let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let (mut read, mut write) = tcp.split();
    let send = async {
        write.write_all(&bytes).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut back = Vec::new();
    let (_, result) = tokio::join!(send, within("the echo", read.read_to_end(&mut back)));
    result.unwrap();
    assert!(
        back == bytes,
        "{} of {} bytes came back",
        back.len(),
        bytes.len()
    );
}

/// Bytes sent on the heels of CONNECT, before its answer, are the tunnel's.
#[tokio::test]
async fn bytes_that_come_with_the_connect_are_not_lost() {
    let echo = Echo::start().await;
    let larder = echo.setup().start().await;
    let mut tcp = larder.client().tcp().await;
    let name = echo.name(443);
    let early = format!("CONNECT {name} HTTP/1.1\r\nHost: {name}\r\n\r\nearly");
    tcp.write_all(early.as_bytes()).await.unwrap();
    tcp.shutdown().await.unwrap();
    let mut back = String::new();
    within("the echo", tcp.read_to_string(&mut back))
        .await
        .unwrap();
    assert!(back.starts_with("HTTP/1.1 200"), "{back}");
    assert!(back.ends_with("\r\n\r\nearly"), "{back}");
}

#[tokio::test]
async fn tunnels_go_to_any_port_but_25_while_larder_is_on_loopback() {
    let echo = Echo::start().await;
    let larder = echo.setup().start().await;
    for port in [22, 443, 8443] {
        larder
            .client()
            .connect(&echo.name(port))
            .await
            .expect("a tunnel");
    }
    // The echo's name is configured for every port; another's is not.
    let refusal = larder
        .client()
        .connect("mail.example:25")
        .await
        .unwrap_err();
    assert_words(&refusal, 403);
}

#[tokio::test]
async fn tunnels_do_not_lead_into_the_machine() {
    let echo = Echo::start().await;
    let larder = Setup::without_upstream().start().await;
    let port = echo.port;
    for place in [
        format!("127.0.0.1:{port}"),
        format!("localhost:{port}"),
        format!("LOCALHOST.:{port}"),
        format!("127.9.9.9:{port}"),
        format!("[::1]:{port}"),
        format!("[::ffff:127.0.0.1]:{port}"),
        format!("0.0.0.0:{port}"),
        format!("[::]:{port}"),
        format!("2130706433:{port}"),
        format!("0x7f.1:{port}"),
        format!("127.1:{port}"),
        format!("0177.0.0.1:{port}"),
        "169.254.169.254:80".to_owned(),
        "[fe80::1]:443".to_owned(),
    ] {
        let refusal = larder.client().connect(&place).await.expect_err(&place);
        assert_eq!(refusal.status / 100, 4, "{place}: {}", refusal.text());
        assert_words(&refusal, refusal.status);
    }
    assert_eq!(echo.connections(), 0);
}

#[tokio::test]
async fn intercepted_hosts_have_no_other_ports() {
    let upstream = Upstream::start();
    let larder = Setup::new(&upstream).start().await;
    for host in [TERRAFORM, RELEASES, OPENTOFU, "REGISTRY.terraform.io"] {
        let refusal = larder
            .client()
            .connect(&format!("{host}:8443"))
            .await
            .unwrap_err();
        assert_words(&refusal, 403);
    }
    assert_eq!(upstream.connections(), 0);
}

/// Another spelling of an intercepted name must not become a tunnel past the verification.
#[tokio::test]
async fn every_spelling_of_an_intercepted_host_is_intercepted() {
    let upstream = Upstream::start();
    Product::new("terraform", "1.9.0").publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    for spelling in ["RELEASES.hashicorp.COM:443", "releases.hashicorp.com.:443"] {
        match client.connect(spelling).await {
            Ok(tcp) => {
                let tls = client.handshake(tcp, RELEASES).await;
                tls.expect("larder's certificate");
            }
            Err(refusal) => assert_eq!(refusal.status / 100, 4, "{spelling}"),
        }
    }
}

/// Once others can connect, larder must not be their way into this network.
#[tokio::test]
async fn a_larder_that_others_can_reach_tunnels_to_443_of_public_places_only() {
    let echo = Echo::start().await;
    let setup = echo.setup().args(["--allow-from", "127.0.0.0/8"]);
    let larder = setup.start_on("0.0.0.0:0").await;
    for place in [
        "public.example:80",
        "public.example:8443",
        "10.1.2.3:443",
        "172.16.0.1:443",
        "192.168.1.1:443",
        "100.64.0.1:443",
        "169.254.169.254:443",
        "127.0.0.1:443",
        "localhost:443",
        "[::1]:443",
        "[fd00::1]:443",
        "[fe80::1]:443",
        "[::ffff:10.0.0.1]:443",
        "[64:ff9b::10.0.0.1]:443",
    ] {
        let refusal = larder.client().connect(place).await.expect_err(place);
        assert_words(&refusal, 403);
    }
    // What is configured may be reached: by the name and port that are configured.
    larder
        .client()
        .connect(&echo.name(443))
        .await
        .expect("a configured tunnel");
}

#[tokio::test]
async fn a_tunnel_to_a_dead_port_is_502_in_the_reason_phrase_too() {
    let port = free_port();
    let target = format!("{ELSEWHERE}:443:127.0.0.1:{port}");
    let larder = Setup::without_upstream()
        .args(["--connect-to", &target])
        .start()
        .await;
    let refusal = larder
        .client()
        .connect(&format!("{ELSEWHERE}:443"))
        .await
        .unwrap_err();
    assert_words(&refusal, 502);
    assert!(refusal.reason.contains(ELSEWHERE), "{}", refusal.reason);
}

#[tokio::test]
async fn malformed_authorities_are_400() {
    let larder = Setup::without_upstream().start().await;
    for authority in [
        "registry.terraform.io",
        "registry.terraform.io:",
        ":443",
        "registry.terraform.io:99999",
        "registry.terraform.io:0",
        "registry.terraform.io:-1",
        "registry.terraform.io:443:443",
        "user@registry.terraform.io:443",
        "user:password@registry.terraform.io:443",
        "https://registry.terraform.io/",
        "/",
        "*",
        "[::1:443",
        "::1:443",
        "a..b:443",
        "a_b\\c:443",
        "a%00b:443",
        "bad host:443",
    ] {
        let head = format!("CONNECT {authority} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        let said = larder.client().raw(head.as_bytes()).await;
        let said = String::from_utf8_lossy(&said);
        assert!(said.starts_with("HTTP/1.1 400"), "{authority}: {said}");
    }
    assert_alive(&larder).await;
}

/// curl and pip speak so to a proxy for http:// URLs.
#[tokio::test]
async fn absolute_form_requests_are_proxied() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let asked = tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut head = vec![0; 4096];
        let read = tcp.read(&mut head).await.unwrap();
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nplain";
        tcp.write_all(answer).await.unwrap();
        String::from_utf8_lossy(&head[..read]).into_owned()
    });
    let target = format!("{ELSEWHERE}:80:127.0.0.1:{port}");
    let larder = Setup::without_upstream()
        .args(["--connect-to", &target])
        .start()
        .await;
    let mut conn = larder.client().plain().await;
    let url = format!("http://{ELSEWHERE}/path?query");

    conn.request(
        "GET",
        ELSEWHERE,
        &url,
        &[("Proxy-Authorization", "Basic c2VjcmV0")],
    )
    .await;
    let got = conn.answer("GET").await.unwrap().finish().await;

    got.assert_is(b"plain");
    let asked = asked.await.unwrap();
    assert!(asked.starts_with("GET /path?query HTTP/1.1\r\n"), "{asked}");
    let lower = asked.to_lowercase();
    assert!(lower.contains(&format!("host: {ELSEWHERE}")), "{asked}");
    assert!(!lower.contains("proxy-authorization"), "{asked}");
}

#[tokio::test]
async fn absolute_form_requests_obey_the_tunnel_policy() {
    let echo = Echo::start().await;
    let larder = Setup::without_upstream().start().await;
    let mut conn = larder.client().plain().await;
    let url = format!("http://127.0.0.1:{}/", echo.port);
    conn.request("GET", "127.0.0.1", &url, &[]).await;
    let got = conn.answer("GET").await.unwrap().finish().await;
    got.assert_refused(403);
    assert_eq!(echo.connections(), 0);
}

// --- Ways upstream ---

#[tokio::test]
async fn a_parent_proxy_carries_fetches_and_tunnels() {
    for by in ["--upstream-proxy", "HTTPS_PROXY"] {
        let upstream = Upstream::start();
        Product::new("terraform", "1.9.0").publish(&upstream);
        upstream.route(ELSEWHERE, "/", Reply::text("beyond"));
        let parent = Parent::start(upstream.addr.port()).await;
        let setup = Setup::trusting(&upstream);
        let url = format!("http://user:s3cret@127.0.0.1:{}", parent.port);
        let setup = match by {
            "HTTPS_PROXY" => setup.env(by, &url),
            _ => setup.args([by, &*url]),
        };
        let larder = setup.start().await;

        let got = larder
            .client()
            .get(&format!("https://{RELEASES}/terraform/"))
            .await;
        assert_eq!(got.status, 200, "{by}: {}", got.text());
        let blind = larder.client().trusting(&upstream.ca_pem);
        blind
            .get(&format!("https://{ELSEWHERE}/"))
            .await
            .assert_is(b"beyond");

        let asked = parent.asked();
        for host in [RELEASES, ELSEWHERE] {
            let connect = format!("CONNECT {host}:443 HTTP/1.1");
            assert!(
                asked.iter().any(|head| head.starts_with(&connect)),
                "{by}: {asked:?}"
            );
        }
        let credentials = "proxy-authorization: basic dxnlcjpzm2nyzxq=";
        assert!(
            asked
                .iter()
                .all(|head| head.to_lowercase().contains(credentials)),
            "{asked:?}"
        );
    }
}

/// The shell that starts larder may already have `larder env` evaluated.
#[tokio::test]
async fn larder_is_not_its_own_parent() {
    let upstream = Upstream::start();
    Product::new("terraform", "1.9.0").publish(&upstream);
    let listen = format!("127.0.0.1:{}", free_port());
    let setup = Setup::new(&upstream).env("HTTPS_PROXY", &format!("http://{listen}"));
    let larder = setup.start_on(&listen).await;
    let got = larder
        .client()
        .get(&format!("https://{RELEASES}/terraform/"))
        .await;
    assert_eq!(got.status, 200, "{}", got.text());
}

#[tokio::test]
async fn a_fetch_that_would_dial_larder_itself_is_refused() {
    let port = free_port();
    let target = format!("{RELEASES}:443:127.0.0.1:{port}");
    let setup = Setup::without_upstream().args(["--connect-to", &target]);
    let larder = setup.start_on(&format!("127.0.0.1:{port}")).await;
    let got = larder
        .client()
        .get(&format!("https://{RELEASES}/terraform/"))
        .await;
    assert!(got.status >= 400, "{}", got.status);
    assert!(got.text().contains("itself"), "{}", got.text());
}

#[tokio::test]
async fn options_come_by_variable_and_by_file_and_the_flag_wins() {
    let upstream = Upstream::start();
    Product::new("terraform", "1.9.0").publish(&upstream);
    let right = format!("{RELEASES}:443:127.0.0.1:{}", upstream.addr.port());
    let wrong = format!("{RELEASES}:443:127.0.0.1:{}", free_port());
    for (what, flag, variable, file, reached) in [
        ("file", None, None, Some(&right), true),
        ("variable over file", None, Some(&right), Some(&wrong), true),
        (
            "flag over variable",
            Some(&right),
            Some(&wrong),
            Some(&wrong),
            true,
        ),
        (
            "flag over all",
            Some(&wrong),
            Some(&right),
            Some(&right),
            false,
        ),
    ] {
        let setup = Setup::without_upstream();
        let ca = setup.path("upstream-ca.pem");
        std::fs::write(&ca, &upstream.ca_pem).unwrap();
        let mut config = format!("upstream_ca = [{ca:?}]\n");
        if let Some(target) = file {
            config.push_str(&format!("connect_to = [{target:?}]\n"));
        }
        std::fs::write(setup.path("larder.toml"), config).unwrap();
        let config = setup.path("larder.toml").to_str().unwrap().to_owned();
        let mut setup = setup.args(["--config", &*config]);
        if let Some(target) = variable {
            setup = setup.env("LARDER_CONNECT_TO", target);
        }
        if let Some(target) = flag {
            setup = setup.args(["--connect-to", &**target]);
        }
        let larder = setup.start().await;
        let got = larder
            .client()
            .get(&format!("https://{RELEASES}/terraform/"))
            .await;
        assert_eq!(got.status == 200, reached, "{what}: {}", got.text());
    }
}

// --- Draining ---

#[tokio::test]
async fn sigterm_lets_running_downloads_finish_and_closes_the_idle() {
    let (upstream, release, tap) = stalled();
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    client.get(&release.document_url()).await;
    let mut download = client.stream(&release.archive_url()).await;
    let first = download.at_least(10_000).await;
    let mut idle = client.open(RELEASES).await;
    idle.request("GET", RELEASES, "/nothing", &[]).await;
    let (_, idle) = idle.answer("GET").await.unwrap().finish_and_keep().await;
    let addr = larder.addr;

    larder.signal(Signal::TERM);

    assert!(
        idle.answer("GET").await.is_err(),
        "an idle connection is closed at once"
    );
    eventually("no new connections", || {
        std::net::TcpStream::connect(addr).is_err()
    })
    .await;
    tap.open();
    download
        .finish_after(first)
        .await
        .assert_is(&release.archive());
    assert_eq!(larder.ended().await.code(), Some(0));
}

#[tokio::test]
async fn the_drain_timeout_ends_what_does_not_finish() {
    for signal in [Signal::TERM, Signal::INT] {
        let (upstream, release, _tap) = stalled();
        let setup = Setup::new(&upstream).args(["--drain-timeout", "1s"]);
        let larder = setup.start().await;
        let client = larder.client();
        client.get(&release.document_url()).await;
        let mut download = client.stream(&release.archive_url()).await;
        download.at_least(10_000).await;

        larder.signal(signal);

        let asked = Instant::now();
        assert_eq!(larder.ended().await.code(), Some(0));
        assert!(
            asked.elapsed() < Duration::from_secs(8),
            "{:?}",
            asked.elapsed()
        );
        assert!(!download.finish().await.succeeded());
    }
}

#[tokio::test]
async fn tunnels_and_fills_without_clients_do_not_hold_the_drain() {
    let (upstream, release, _tap) = stalled();
    let larder = Setup::new(&upstream)
        .args(["--drain-timeout", "60s"])
        .start()
        .await;
    let client = larder.client();
    client.get(&release.document_url()).await;
    let mut download = client.stream(&release.archive_url()).await;
    download.at_least(10_000).await;
    drop(download);
    let _tunnel = client.connect(&format!("{ELSEWHERE}:443")).await.unwrap();

    assert_eq!(larder.terminate().await, Some(0));
}

#[tokio::test]
async fn an_idle_larder_ends_at_once() {
    let larder = Setup::without_upstream().start().await;
    let asked = Instant::now();
    assert_eq!(larder.terminate().await, Some(0));
    assert!(asked.elapsed() < Duration::from_secs(5));
}

// --- Bad input ---

#[tokio::test]
async fn malformed_requests_get_a_4xx_or_a_close() {
    let larder = Setup::without_upstream().start().await;
    let mut answered = Vec::new();
    let many = "X-Many: y\r\n".repeat(5000);
    let long = "x".repeat(70_000);
    for bad in [
        "\r\n\r\n\r\n\r\n\r\n".to_owned(),
        "GARBAGE\r\n\r\n".to_owned(),
        "GET\r\n\r\n".to_owned(),
        "GET /healthz HTTP/9.9\r\nHost: x\r\n\r\n".to_owned(),
        "GET /healthz HTTP/2.0\r\nHost: x\r\n\r\n".to_owned(),
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
        "GET healthz HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
        "GET /hea\0lthz HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
        "GET /healthz HTTP/1.1\r\nHost x\r\n\r\n".to_owned(),
        "GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n".to_owned(),
        "GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n".to_owned(),
        "GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n"
            .to_owned(),
        "GET ftp://elsewhere.example/ HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
        "GET http:///nohost HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
        format!("GET /{long} HTTP/1.1\r\nHost: x\r\n\r\n"),
        format!("GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: {long}\r\n\r\n"),
        format!("GET /healthz HTTP/1.1\r\nHost: x\r\n{many}\r\n"),
        format!("CONNECT {long}:443 HTTP/1.1\r\nHost: x\r\n\r\n"),
        "SSH-2.0-OpenSSH_9.6\r\n".to_owned(),
        "\x16\x03\x01\u{7f}\u{7f}not a ClientHello".to_owned(),
        "\x04\x01\x00\x50\x7f\x00\x00\x01\x00".to_owned(),
    ] {
        // Half a request may wait for its other half, but not once its sender has closed.
        let start: String = bad.chars().take(60).collect();
        let mut tcp = larder.client().tcp().await;
        let _ = tcp.write_all(bad.as_bytes()).await;
        let _ = tcp.shutdown().await;
        let mut end = Vec::new();
        let _ = within(&start, tcp.read_to_end(&mut end)).await;
        let said = String::from_utf8_lossy(&end);
        let refused = said.starts_with("HTTP/1.1 4") || said.starts_with("HTTP/1.0 4");
        // 505 is what there is for a version; a TLS alert is a close.
        let versions = said.starts_with("HTTP/1.1 505") || end.starts_with(&[0x15]);
        if !(refused || versions || end.is_empty()) {
            answered.push(format!("{start:?}: {said:.40}"));
        }
    }
    assert_eq!(answered, Vec::<String>::new());
    assert_alive(&larder).await;
}

#[tokio::test]
async fn noise_is_survived() {
    let larder = Setup::without_upstream().start().await;
    for round in 0..100 {
        let mut bytes = noise(round * 7 % 300 + 1, &format!("round {round}"));
        // Half of it looks like TLS, so that both ways in are tried.
        if round % 2 == 0 {
            bytes.splice(..0, [0x16, 0x03, 0x01, 0x00, 0x80]);
        }
        let mut tcp = larder.client().tcp().await;
        let _ = tcp.write_all(&bytes).await;
        let _ = tcp.shutdown().await;
        let mut said = Vec::new();
        let _ = within("the end", tcp.read_to_end(&mut said)).await;
        assert!(!said.starts_with(b"HTTP/1.1 2"), "round {round}");
    }
    assert_alive(&larder).await;
}

#[tokio::test]
async fn one_connection_serves_many_requests() {
    let (upstream, release, tap) = stalled();
    tap.open();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    larder.client().get(&release.document_url()).await;
    let (_, provider) = release.archive_path();
    let mut conn = larder.client().open(RELEASES).await;
    for (method, target, body) in [
        ("GET", release.sums_path().1, &release.sums),
        ("HEAD", provider.clone(), &bytes::Bytes::new()),
        ("GET", provider.clone(), &release.archive()),
        ("GET", product.archive_path(), &product.archive),
        ("HEAD", product.archive_path(), &bytes::Bytes::new()),
        ("GET", provider, &release.archive()),
        ("GET", product.sums_path(), &product.sums),
    ] {
        conn.request(method, RELEASES, &target, &[]).await;
        let answer = conn.answer(method).await.unwrap();
        assert_eq!(answer.status, 200, "{method} {target}");
        let (read, kept) = answer.finish_and_keep().await;
        assert!(read == *body, "{method} {target}");
        conn = kept;
    }
}

/// Else whoever can choose a body chooses the next request.
#[tokio::test]
async fn the_body_of_a_request_is_not_a_request() {
    let upstream = Upstream::start();
    upstream.route(RELEASES, "/first", Reply::text("first"));
    upstream.route(RELEASES, "/smuggled", Reply::text("smuggled"));
    upstream.route(RELEASES, "/second", Reply::text("second"));
    let larder = Setup::new(&upstream).start().await;
    let smuggled = format!("GET /smuggled HTTP/1.1\r\nHost: {RELEASES}\r\n\r\n");
    for method in ["GET", "POST"] {
        let mut conn = larder.client().open(RELEASES).await;
        let length = smuggled.len().to_string();
        let headers = [("Content-Length", &*length)];
        conn.request(method, RELEASES, "/first", &headers).await;
        conn.write(smuggled.as_bytes()).await;
        let (_, mut conn) = conn.answer(method).await.unwrap().finish_and_keep().await;
        conn.request("GET", RELEASES, "/second", &[]).await;
        if let Ok(answer) = conn.answer("GET").await {
            answer.finish().await.assert_is(b"second");
        }
    }
    assert_eq!(upstream.count(|seen| seen.path() == "/smuggled"), 0);
}

#[tokio::test]
async fn headers_up_to_the_cap_are_fine() {
    let larder = Setup::without_upstream().start().await;
    let host = larder.addr.to_string();
    let mut conn = larder.client().plain().await;
    conn.request("GET", &host, "/healthz", &[("X-Long", &"x".repeat(30_000))])
        .await;
    assert_eq!(conn.answer("GET").await.unwrap().status, 200);
}

#[tokio::test]
async fn plain_bytes_after_connect_end_the_connection() {
    let upstream = Upstream::start();
    let larder = Setup::new(&upstream).start().await;
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: registry.terraform.io\r\n\r\n"[..],
        b"\0\0\0\0\0\0\0\0",
    ] {
        let mut tcp = larder
            .client()
            .connect(&format!("{TERRAFORM}:443"))
            .await
            .unwrap();
        tcp.write_all(bytes).await.unwrap();
        let mut said = Vec::new();
        let _ = within("the end", tcp.read_to_end(&mut said)).await;
        let text = String::from_utf8_lossy(&said);
        assert!(!text.contains("HTTP/1.1 2"), "{text}");
    }
    assert_eq!(upstream.connections(), 0);
    assert_alive(&larder).await;
}

/// Trap: trusting CONNECT's host but neither SNI nor Host.
#[tokio::test]
async fn a_client_hello_without_or_with_another_name_gets_no_other_hosts_entry() {
    let upstream = Upstream::start();
    Product::new("terraform", "1.9.0").publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();

    // Another name than CONNECT's, intercepted or not.
    for sni in [TERRAFORM, GITHUB] {
        let tcp = client.connect(&format!("{RELEASES}:443")).await.unwrap();
        if let Ok(tls) = client.handshake(tcp, sni).await {
            let mut conn = Conn::new(tls);
            conn.request("GET", sni, "/terraform/", &[]).await;
            if let Ok(answer) = conn.answer("GET").await {
                assert!(
                    (400..500).contains(&answer.status),
                    "{sni}: {}",
                    answer.status
                );
            }
        }
    }
    assert_eq!(upstream.connections(), 0);

    // None at all: CONNECT's own, or the end.
    let tcp = client.connect(&format!("{RELEASES}:443")).await.unwrap();
    let mut config = client.config();
    config.enable_sni = false;
    if let Ok(tls) = handshake(tcp, RELEASES, config).await {
        let mut conn = Conn::new(tls);
        conn.request("GET", RELEASES, "/terraform/", &[]).await;
        assert_eq!(conn.answer("GET").await.unwrap().status, 200);
    }
    assert_alive(&larder).await;
}

#[tokio::test]
async fn a_host_header_of_another_host_is_refused() {
    let upstream = Upstream::start();
    Product::new("terraform", "1.9.0").publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    for host in [
        RELEASES,
        GITHUB,
        "evil.example",
        "registry.terraform.io:8443",
        "",
        "a b",
    ] {
        let mut conn = larder.client().open(TERRAFORM).await;
        conn.request("GET", host, "/terraform/", &[]).await;
        let answer = conn.answer("GET").await.unwrap();
        assert!(
            (400..500).contains(&answer.status),
            "{host:?}: {}",
            answer.status
        );
    }
    // An absolute target inside the tunnel is a Host too.
    let mut conn = larder.client().open(TERRAFORM).await;
    let target = format!("https://{RELEASES}/terraform/");
    conn.request("GET", TERRAFORM, &target, &[]).await;
    let answer = conn.answer("GET").await.unwrap();
    assert!(
        (400..500).contains(&answer.status),
        "{target}: {}",
        answer.status
    );
    assert_eq!(upstream.connections(), 0);
    // Its own, with or without the port, in any case.
    for host in [
        RELEASES,
        "releases.hashicorp.com:443",
        "Releases.HashiCorp.com",
    ] {
        let mut conn = larder.client().open(RELEASES).await;
        conn.request("GET", host, "/terraform/", &[]).await;
        assert_eq!(conn.answer("GET").await.unwrap().status, 200, "{host}");
    }
}

#[tokio::test]
async fn path_tricks_on_own_pages_reach_no_file() {
    let larder = Setup::without_upstream().start().await;
    for path in [
        "/../ca/ca.key",
        "/ca.pem/../ca/ca.key",
        "/%2e%2e/ca/ca.key",
        "/..%2fca%2fca.key",
        "//ca/ca.key",
        "/ca/ca.key",
        "/\\..\\ca\\ca.key",
        "/mirror/../../ca/ca.key",
        "/registry/../ca/ca.key",
        "/ca.pem%00.key",
        "/./ca/ca.key",
        "//etc/passwd",
        "/%2fetc/passwd",
    ] {
        let got = larder.client().page(path).await;
        assert!((400..500).contains(&got.status), "{path}: {}", got.status);
        let text = got.text();
        assert!(
            !text.contains("PRIVATE") && !text.contains("root:"),
            "{path}"
        );
    }
    assert_alive(&larder).await;
}

#[tokio::test]
async fn path_tricks_on_intercepted_hosts_reach_no_other_entry() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    client.get(&product.archive_url()).await;
    larder.setup.holds(1).await;
    let before = upstream.journal().len();
    let file = product.filename();
    for path in [
        format!("/terraform/1.9.0/../1.9.0/{file}"),
        format!("/terraform/1.9.0/%2e%2e/1.9.0/{file}"),
        format!("/terraform/1.9.0/..%2f1.9.0/{file}"),
        format!("/terraform/./1.9.0/{file}"),
        format!("//terraform/1.9.0/{file}"),
        format!("/terraform//1.9.0/{file}"),
        format!("/terraform\\1.9.0\\{file}"),
        format!("/terraform/1.9.0/%5c{file}"),
        "/../../../../etc/passwd".to_owned(),
        "/.larder/../terraform/".to_owned(),
        "/.larder/%2e%2e/%2e%2e/ca/ca.key".to_owned(),
    ] {
        let got = client.get(&format!("https://{RELEASES}{path}")).await;
        assert!((400..500).contains(&got.status), "{path}: {}", got.status);
    }
    assert_eq!(
        upstream.journal().len(),
        before,
        "none of them is upstream's business"
    );
    assert_alive(&larder).await;
}

/// Connections that send nothing, or half of something, are no one's.
#[tokio::test]
async fn idle_and_half_open_connections_are_dropped_after_thirty_seconds() {
    let upstream = Upstream::start();
    Product::new("terraform", "1.9.0").publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    let connect = format!("{TERRAFORM}:443");
    let mut waiting: Vec<(&str, TcpStream)> = vec![("silent", client.tcp().await)];
    for (what, bytes) in [
        ("half a request", &b"GET /healthz HTTP/1.1\r\nHost:"[..]),
        ("half a method", b"G"),
        ("half a ClientHello", b"\x16\x03\x01\x02\x00\x01\x00"),
        ("kept alive", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"),
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
    let mut tls = client.tls(RELEASES, RELEASES).await.unwrap();
    tls.write_all(b"GET /terraform/ HTTP/1.1\r\n")
        .await
        .unwrap();
    let (tls, _) = tls.into_inner();
    waiting.push(("half a request after TLS", tls));

    let limit = tokio::time::Instant::now() + Duration::from_secs(40);
    for (what, mut tcp) in waiting {
        let mut said = Vec::new();
        let closed = tokio::time::timeout_at(limit, tcp.read_to_end(&mut said)).await;
        assert!(closed.is_ok(), "{what}: still open after 40 s");
    }
    assert_alive(&larder).await;
}

#[tokio::test]
async fn the_default_address_is_squids_on_loopback() {
    let setup = Setup::without_upstream();
    let output = setup.command(&["serve", "--help"]).output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && help.contains("127.0.0.1:3128"),
        "{help}"
    );
}

// --- A start that cannot be ---

#[tokio::test]
async fn a_broken_configuration_stops_the_start_with_2_and_says_where() {
    for (config, words) in [
        ("listen = [", &["larder.toml"][..]),
        ("max_size = \"lots\"", &["max_size", "lots"]),
        ("drain_timeout = \"soon\"", &["drain_timeout", "soon"]),
        ("listen = [\"nowhere\"]", &["listen", "nowhere"]),
        ("verify = \"maybe\"", &["verify", "maybe"]),
        ("connect_to = [\"a:b\"]", &["connect_to", "a:b"]),
        (
            "upstream_ca = [\"/no/such/file.pem\"]",
            &["upstream_ca", "/no/such/file.pem"],
        ),
        ("no_such_key = 1", &["no_such_key"]),
        ("max_size = [1]", &["max_size"]),
    ] {
        let setup = Setup::without_upstream();
        let file = setup.path("larder.toml");
        std::fs::write(&file, config).unwrap();
        let setup = setup.args(["--config", file.to_str().unwrap()]);
        // Where the file speaks of `listen`, no flag may overrule it.
        let command = match config.starts_with("listen") {
            true => setup.command_with_options(&["serve"]),
            false => setup.serve_command("127.0.0.1:0"),
        };
        assert_refuses_to_start(command, 2, words);
    }
}

#[tokio::test]
async fn a_broken_option_stops_the_start_with_2_and_says_which() {
    for (args, words) in [
        (&["--listen", "nowhere"][..], &["listen", "nowhere"][..]),
        (&["--max-size", "lots"], &["max-size", "lots"]),
        (&["--connect-to", "a:b"], &["connect-to", "a:b"]),
        (&["--intercept", "no/host"], &["intercept", "no/host"]),
        (
            &["--upstream-proxy", "gopher://x"],
            &["upstream-proxy", "gopher"],
        ),
        (
            &["--config", "/no/such/larder.toml"],
            &["/no/such/larder.toml"],
        ),
        (&["--no-such-option"], &["--no-such-option"]),
    ] {
        let setup = Setup::without_upstream().args(args.iter().copied());
        assert_refuses_to_start(setup.command_with_options(&["serve"]), 2, words);
    }
    let setup = Setup::without_upstream().env("LARDER_MAX_SIZE", "lots");
    let command = setup.serve_command("127.0.0.1:0");
    assert_refuses_to_start(command, 2, &["max-size", "lots"]);
}

#[tokio::test]
async fn a_broken_data_dir_stops_the_start_with_2_and_says_where() {
    type Breakage = fn(&Setup);
    let breakages: [(Breakage, &[&str]); 4] = [
        (
            |setup| std::fs::write(setup.data_dir(), "a file").unwrap(),
            &["data"],
        ),
        (
            |setup| {
                std::fs::create_dir_all(setup.data_dir()).unwrap();
                std::fs::write(setup.data_dir().join("cache"), "a file").unwrap();
            },
            &["data/cache"],
        ),
        (
            |setup| {
                std::fs::create_dir_all(setup.data_dir().join("ca")).unwrap();
                std::fs::write(setup.ca_pem(), "no certificate").unwrap();
            },
            &["ca/ca."],
        ),
        (
            |setup| {
                std::fs::create_dir_all(setup.data_dir().join("ca")).unwrap();
                std::fs::write(setup.data_dir().join("ca/ca.key"), "no key").unwrap();
            },
            &["ca/ca."],
        ),
    ];
    for (broken, words) in breakages {
        let setup = Setup::without_upstream();
        broken(&setup);
        assert_refuses_to_start(setup.serve_command("127.0.0.1:0"), 2, words);
    }
}

#[tokio::test]
async fn an_address_in_use_stops_the_start_and_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let setup = Setup::without_upstream();
    let output = setup.serve_command(&addr).output().unwrap();
    assert!(
        matches!(output.status.code(), Some(1 | 2)),
        "{:?}",
        output.status
    );
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(&addr), "{said}");
}

/// A provider whose archive stalls after 100 000 bytes.
fn stalled() -> (Upstream, Release, Tap) {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let tap = Tap::at(100_000);
    release.publish_archive(&upstream, Reply::archive(release.archive()).tapped(&tap));
    (upstream, release, tap)
}

/// A proxy that leads every CONNECT to one port of this machine.
struct Parent {
    port: u16,
    asked: Arc<std::sync::Mutex<Vec<String>>>,
}

impl Parent {
    async fn start(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = Arc::new(std::sync::Mutex::new(Vec::new()));
        let heads = Arc::clone(&asked);
        tokio::spawn(async move {
            while let Ok((mut tcp, _)) = listener.accept().await {
                let heads = Arc::clone(&heads);
                tokio::spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        head.push(tcp.read_u8().await?);
                    }
                    heads
                        .lock()
                        .unwrap()
                        .push(String::from_utf8_lossy(&head).into_owned());
                    let mut beyond = TcpStream::connect(("127.0.0.1", target)).await?;
                    tcp.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
                        .await?;
                    tokio::io::copy_bidirectional(&mut tcp, &mut beyond).await
                });
            }
        });
        Self { port, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}
