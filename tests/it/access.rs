//! Who may use larder, by address and by password.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use base64::Engine as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::common::*;

const PASSWORD: &str = "correct-horse-battery";

// --- Addresses ---

#[tokio::test]
async fn listening_where_others_can_connect_needs_a_word_on_who_may() {
    for listen in ["0.0.0.0:0", "[::]:0"] {
        let setup = Setup::without_upstream();
        let words = ["allow_from", listen];
        assert_refuses_to_start(setup.serve_command(listen), 2, &words);
        let empty = setup.config("allow_from = []");
        assert_refuses_to_start(empty.serve_command(listen), 2, &words);
    }
    for (config, words) in [
        ("allow_from = '10.0.0.0/33'", "10.0.0.0/33"),
        ("allow_from = ['10.0.0.0/8', 'everyone']", "everyone"),
    ] {
        let setup = Setup::without_upstream().config(config);
        let command = setup.serve_command("127.0.0.1:0");
        assert_refuses_to_start(command, 2, &["allow_from", words]);
    }
    for listen in ["0.0.0.0:0", "[::]:0"] {
        if listen.starts_with('[') && TcpListener::bind(listen).await.is_err() {
            continue; // A machine without IPv6.
        }
        let setup = Setup::without_upstream().config("allow_from = '127.0.0.0/8'");
        let larder = setup.start_on(listen).await;
        let tunnel = larder.client().connect(&format!("{TERRAFORM}:443")).await;
        tunnel.expect(listen);
    }
}

#[tokio::test]
async fn loopback_is_who_may_use_a_larder_on_loopback() {
    let upstream = Upstream::start();
    upstream.route(RELEASES, "/page", Reply::text("a page"));
    for listen in ["127.0.0.1:0", "[::1]:0"] {
        if listen.starts_with('[') && TcpListener::bind(listen).await.is_err() {
            continue; // A machine without IPv6.
        }
        let larder = Setup::new(&upstream).start_on(listen).await;
        let client = larder.client().at(larder.addr);
        let got = client.get(&format!("https://{RELEASES}/page")).await;
        got.assert_is(b"a page");
    }
}

#[tokio::test]
async fn loopback_that_is_not_listed_gets_own_pages_and_403_for_all_else() {
    let upstream = Upstream::start();
    upstream.route(RELEASES, "/page", Reply::text("a page"));
    let setup = Setup::new(&upstream).args(["--allow-from", "203.0.113.0/24"]);
    let larder = setup.start().await;
    let client = larder.client();

    assert_turned_away(&client).await;
    // Nor by way of larder itself.
    let own = larder.addr.to_string();
    let mut nested = Conn::new(client.connect(&own).await.unwrap());
    let url = format!("https://{RELEASES}/page");
    nested.request("GET", RELEASES, &url, &[]).await;
    let got = nested.answer("GET").await.unwrap().finish().await;
    got.assert_refused(403);
    let tcp = client.connect(&own).await.unwrap();
    assert!(client.handshake(tcp, RELEASES).await.is_err());
    assert_eq!(upstream.connections(), 0);

    for page in ["/readyz", "/healthz", "/metrics", "/ca.pem", "/"] {
        assert_eq!(client.page(page).await.status, 200, "{page}");
    }
    let gc = setup.command(&["gc"]).output().unwrap();
    assert_eq!(gc.status.code(), Some(0), "{gc:?}");
}

#[tokio::test]
async fn a_stranger_gets_403_for_everything_and_an_alert_for_tls() {
    let Some(ip) = other_address() else { return };
    let upstream = Upstream::start();
    upstream.route(RELEASES, "/page", Reply::text("a page"));
    let setup = Setup::new(&upstream);
    let strict = setup.clone().args(["--allow-from", "127.0.0.0/8"]);
    let larder = strict.start_on("0.0.0.0:0").await;
    let port = larder.addr.port();
    let stranger = larder.client().at(SocketAddr::new(ip, port));

    for target in [
        format!("{TERRAFORM}:443"),
        format!("{ELSEWHERE}:443"),
        format!("127.0.0.1:{port}"),
        "nonsense".to_owned(),
    ] {
        let refusal = stranger.connect(&target).await.unwrap_err();
        assert_words(&refusal, 403);
        assert!(refusal.reason.contains("allow_from"), "{}", refusal.reason);
    }
    for page in ["/readyz", "/healthz", "/metrics", "/ca.pem", "/", "/none"] {
        stranger.page(page).await.assert_refused(403);
    }
    for url in [
        format!("https://{RELEASES}/page"),
        format!("http://{ELSEWHERE}/"),
    ] {
        stranger.absolute(&url, &[]).await.assert_refused(403);
    }
    for name in [RELEASES, "localhost", GITHUB] {
        let refused = stranger.handshake(stranger.tcp().await, name).await;
        let error = refused.expect_err(name).to_string();
        assert!(error.contains("AccessDenied"), "{name}: {error}");
    }
    assert_eq!(upstream.connections(), 0);
    assert_alive(&larder).await;
    drop(larder);

    let open = setup.args(["--allow-from", &format!("127.0.0.1,{ip}")]);
    let larder = open.start_on("0.0.0.0:0").await;
    let listed = larder.client().at(SocketAddr::new(ip, larder.addr.port()));
    let got = listed.get(&format!("https://{RELEASES}/page")).await;
    got.assert_is(b"a page");
}

// --- Passwords ---

#[tokio::test]
async fn the_right_password_opens_tunnels_interception_and_absolute_urls() {
    let upstream = Upstream::start();
    upstream.route(RELEASES, "/page", Reply::text("a page"));
    upstream.route(ELSEWHERE, "/", Reply::text("beyond"));
    let larder = with_users(Setup::new(&upstream), &["ann", "bob"])
        .start()
        .await;
    let client = larder.client();
    let url = format!("https://{RELEASES}/page");
    for user in ["ann", "bob", "ann"] {
        let header = login(user, PASSWORD);
        let got = get_as(&client, &header, RELEASES, "/page").await;
        got.assert_is(b"a page");
        let blind = client.trusting(&upstream.ca_pem);
        let got = get_as(&blind, &header, ELSEWHERE, "/").await;
        got.assert_is(b"beyond");

        let headers = [("Proxy-Authorization", &*header)];
        client.absolute(&url, &headers).await.assert_is(b"a page");
        // The scheme's name has no case (RFC 9110 section 11.1).
        let lower = header.replace("Basic", "bASIC");
        let headers = [("proxy-authorization", &*lower)];
        client.absolute(&url, &headers).await.assert_is(b"a page");
    }
}

#[tokio::test]
async fn anything_but_the_right_password_is_asked_for_one_by_407() {
    let upstream = Upstream::start();
    let larder = with_users(Setup::new(&upstream), &["ann"]).start().await;
    let client = larder.client();
    let right = login("ann", PASSWORD);
    let encoded = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
    for (what, headers) in [
        ("none", String::new()),
        ("wrong", line(&login("ann", "guess"))),
        ("empty", line(&login("ann", ""))),
        ("unknown", line(&login("eve", PASSWORD))),
        ("two", line(&right).repeat(2)),
        ("another scheme", line(&right.replace("Basic", "Bearer"))),
        ("no scheme", line(&right.replace("Basic ", ""))),
        ("no token", line("Basic")),
        ("bad base64", line("Basic !!!!")),
        ("no colon", line(&format!("Basic {}", encoded(b"ann")))),
        (
            "not UTF-8",
            line(&format!("Basic {}", encoded(b"ann:\xff\xfe"))),
        ),
        ("for the origin", line(&right).replace("Proxy-", "")),
    ] {
        for target in [TERRAFORM, ELSEWHERE] {
            // A wrong guess counts once: there are but ten.
            if target == ELSEWHERE && matches!(what, "wrong" | "empty" | "unknown") {
                continue;
            }
            let target = format!("{target}:443");
            let refusal = client.connect_with(&target, &headers).await;
            let refusal = refusal.expect_err(what);
            assert_words(&refusal, 407);
            let asks = refusal.header("proxy-authenticate").unwrap_or_default();
            assert!(asks.starts_with("Basic realm="), "{what}: {asks}");
        }
        let url = format!("https://{RELEASES}/page");
        let head = format!("GET {url} HTTP/1.1\r\nHost: {RELEASES}\r\n{headers}\r\n");
        let mut conn = client.plain().await;
        conn.write(head.as_bytes()).await;
        let got = conn.answer("GET").await.unwrap().finish().await;
        got.assert_refused(407);
        assert!(got.header("proxy-authenticate").is_some(), "{what}");
    }
    let raw =
        b"CONNECT x.example:443 HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic \xff\r\n\r\n";
    assert!(client.raw(raw).await.starts_with(b"HTTP/1.1 407"));
    assert_eq!(upstream.connections(), 0);
    // Its own pages are for whoever may connect.
    assert_alive(&larder).await;
}

#[tokio::test]
async fn an_unknown_user_is_told_what_a_wrong_password_is_told() {
    let larder = with_users(Setup::without_upstream(), &["ann"])
        .start()
        .await;
    let mut told = Vec::new();
    for header in [login("ann", "guess"), login("eve", "guess")] {
        let target = format!("{ELSEWHERE}:443");
        let refusal = larder.client().connect_with(&target, &line(&header)).await;
        let mut refusal = refusal.unwrap_err();
        refusal.headers.retain(|(name, _)| name != "date");
        told.push((
            refusal.status,
            refusal.reason.clone(),
            refusal.headers,
            refusal.body,
        ));
    }
    assert_eq!(told[0], told[1]);
}

/// However often their password was right: what is remembered is of the file as it was.
#[tokio::test]
async fn who_is_taken_out_of_the_file_is_out_within_seconds() {
    let setup = with_users(Setup::without_upstream(), &["ann", "bobby"]);
    let larder = setup.start().await;
    let client = larder.client();
    let [ann, bobby] = ["ann", "bobby"].map(|user| line(&login(user, PASSWORD)));
    let target = format!("{TERRAFORM}:443");
    for header in [&ann, &bobby, &ann, &bobby] {
        client.connect_with(&target, header).await.unwrap();
    }

    write_users(&setup, &["bobby", "carol"]);

    let changed = Instant::now();
    let refusal = loop {
        match client.connect_with(&target, &ann).await {
            Ok(_) => assert!(changed.elapsed() < PATIENCE, "ann is still in"),
            Err(refusal) => break refusal,
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_words(&refusal, 407);
    client.connect_with(&target, &bobby).await.unwrap();
    let carol = line(&login("carol", PASSWORD));
    client.connect_with(&target, &carol).await.unwrap();
}

#[tokio::test]
async fn after_ten_wrong_passwords_only_the_remembered_go_on() {
    let larder = with_users(Setup::without_upstream(), &["ann", "bob"])
        .start()
        .await;
    let client = larder.client();
    let target = format!("{TERRAFORM}:443");
    let [ann, bob] = ["ann", "bob"].map(|user| line(&login(user, PASSWORD)));
    client.connect_with(&target, &ann).await.unwrap();
    for guess in 0..10 {
        let header = line(&login("bob", &format!("guess {guess}")));
        let refusal = client.connect_with(&target, &header).await.unwrap_err();
        assert_words(&refusal, 407);
    }
    let refusal = client.connect_with(&target, &bob).await.unwrap_err();
    assert_words(&refusal, 429);
    // Other users are not bob's; all of an address may guess fifty times.
    for guess in 10..50 {
        let header = line(&login(&format!("user {guess}"), "guess"));
        let refusal = client.connect_with(&target, &header).await.unwrap_err();
        assert_words(&refusal, 407);
    }
    let eve = line(&login("eve", "guess"));
    let refusal = client.connect_with(&target, &eve).await.unwrap_err();
    assert_words(&refusal, 429);
    client.connect_with(&target, &ann).await.unwrap();
    assert!(larder.metric("larder_failed_logins_total").await >= 10.0);
}

#[tokio::test]
async fn a_bad_htpasswd_stops_the_start_and_shows_no_hash() {
    let hash = bcrypt::hash(PASSWORD, 4).unwrap();
    let dear = hash.replacen("$04$", "$31$", 1);
    let md5 = "$apr1$OaQsiSKk$D4ZHVNJ1lI7DwNqIKd.zG.";
    let sha = "{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=";
    for (text, words) in [
        (format!("ann:{md5}\n"), "bcrypt"),
        (format!("ann:{sha}\n"), "bcrypt"),
        (format!("bob:{hash}\nann:{PASSWORD}\n"), "line 2"),
        (format!("ann:{dear}\n"), "costs 31"),
        (format!("ann {hash}\n"), "line 1"),
        (String::new(), "no user"),
        ("# nobody yet\n\n".to_owned(), "no user"),
    ] {
        let setup = with_users(Setup::without_upstream(), &["ann"]);
        std::fs::write(users_file(&setup), &text).unwrap();
        let command = setup.serve_command("127.0.0.1:0");
        let said = assert_refuses_to_start(command, 2, &["htpasswd", words]);
        for secret in [&hash, &dear, md5, sha, PASSWORD] {
            assert!(!said.contains(secret), "{said}");
        }
    }
    let setup = Setup::without_upstream().config("htpasswd = '/no/such/htpasswd'");
    let command = setup.serve_command("127.0.0.1:0");
    assert_refuses_to_start(command, 2, &["htpasswd", "/no/such/htpasswd"]);
}

/// A ClientHello says nothing of who sends it.
#[tokio::test]
async fn interception_by_name_alone_is_closed_to_who_must_log_in() {
    let upstream = Upstream::start();
    let larder = with_users(Setup::new(&upstream), &["ann"]).start().await;
    let client = larder.client();
    let refused = client.handshake(client.tcp().await, RELEASES).await;
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("UnrecognisedName"), "{error}");
    // Not even within a connection to larder itself.
    let own = client.connect(&larder.addr.to_string()).await.unwrap();
    assert!(client.handshake(own, RELEASES).await.is_err());
    client
        .handshake(client.tcp().await, "localhost")
        .await
        .unwrap();
    assert_eq!(upstream.connections(), 0);
}

#[tokio::test]
async fn the_proxys_password_goes_neither_upstream_nor_to_log_nor_disk() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    upstream.route(RELEASES, "/page", Reply::text("a page"));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let plain = listener.local_addr().unwrap().port();
    let asked = tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut head = vec![0; 4096];
        let read = tcp.read(&mut head).await.unwrap();
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nplain";
        tcp.write_all(answer).await.unwrap();
        String::from_utf8_lossy(&head[..read]).into_owned()
    });
    let setup = Setup::new(&upstream).args([
        "-vv",
        "--connect-to",
        &format!("plain.example:80:127.0.0.1:{plain}"),
    ]);
    let larder = with_users(setup, &["ann"]).start().await;
    let client = larder.client();
    let (right, wrong) = (login("ann", PASSWORD), login("ann", "wrong-guess-here"));
    let target = format!("{RELEASES}:443");
    client
        .connect_with(&target, &line(&wrong))
        .await
        .unwrap_err();

    let tcp = client.connect_with(&target, &line(&right)).await.unwrap();
    let mut conn = Conn::new(client.handshake(tcp, RELEASES).await.unwrap());
    let with = [("Proxy-Authorization", &*right)];
    let private = [with[0], ("Authorization", "Bearer origin-token")];
    for (path, headers) in [
        ("/page", &with[..]),
        ("/page", &private[..]),
        (&*product.archive_path(), &with[..]),
        (&*product.archive_path(), &private[..]),
    ] {
        conn.request("GET", RELEASES, path, headers).await;
        let answer = conn.answer("GET").await.unwrap();
        assert_eq!(answer.status, 200);
        (_, conn) = answer.finish_and_keep().await;
    }
    let got = client
        .absolute(&format!("https://{target}/page"), &with)
        .await;
    got.assert_is(b"a page");
    let got = client.absolute("http://plain.example/", &with).await;
    got.assert_is(b"plain");

    let asked = asked.await.unwrap().to_lowercase();
    assert!(!asked.contains("proxy-auth"), "{asked}");
    let journal = upstream.journal();
    assert!(journal.len() >= 4, "{journal:?}");
    let leaked = journal
        .iter()
        .find(|seen| seen.header("proxy-authorization").is_some());
    assert!(leaked.is_none(), "{leaked:?}");
    larder.setup.holds(1).await;
    assert!(!larder.log_with(&["TRACE"]).is_empty());
    let tokens = [&right, &wrong].map(|header| header.trim_start_matches("Basic ").to_owned());
    for secret in [PASSWORD, "wrong-guess-here", &tokens[0], &tokens[1]] {
        assert_eq!(larder.log_with(&[secret]), Vec::<String>::new());
        assert_eq!(larder.setup.files_with(secret), Vec::<PathBuf>::new());
    }
}

/// Neither tunnel nor interception nor whole URL, with words that name the mend.
pub async fn assert_turned_away(client: &Client) {
    for host in [TERRAFORM, ELSEWHERE] {
        let refusal = client.connect(&format!("{host}:443")).await.unwrap_err();
        assert_words(&refusal, 403);
    }
    for url in [
        format!("https://{RELEASES}/page"),
        format!("http://{ELSEWHERE}/"),
    ] {
        client.absolute(&url, &[]).await.assert_refused(403);
    }
    let refused = client.handshake(client.tcp().await, RELEASES).await;
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("UnrecognisedName"), "{error}");
}

/// An address of this machine that is not loopback. Asking for a route sends nothing.
fn other_address() -> Option<IpAddr> {
    let own = UdpSocket::bind("0.0.0.0:0").ok().and_then(|socket| {
        socket.connect("198.51.100.1:9").ok()?;
        Some(socket.local_addr().ok()?.ip())
    });
    let own = own.filter(|ip| !ip.is_loopback() && !ip.is_unspecified());
    if own.is_none() {
        assert!(!is_required("address"), "no address but loopback");
        println!("skipped: this machine has no address but loopback");
    }
    own
}

fn users_file(setup: &Setup) -> PathBuf {
    setup.path("htpasswd")
}

/// Users who all have the one password. The file is replaced, as an editor does.
fn write_users(setup: &Setup, users: &[&str]) {
    let lines = users.iter().map(|user| {
        let hash = bcrypt::hash(PASSWORD, 4).unwrap();
        format!("{user}:{hash}\n")
    });
    let draft = setup.path("htpasswd.new");
    std::fs::write(&draft, lines.collect::<String>()).unwrap();
    std::fs::rename(draft, users_file(setup)).unwrap();
}

fn with_users(setup: Setup, users: &[&str]) -> Setup {
    write_users(&setup, users);
    let file = users_file(&setup);
    setup.args(["--htpasswd", file.to_str().unwrap()])
}

fn login(user: &str, password: &str) -> String {
    let token = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    format!("Basic {token}")
}

/// A page through a CONNECT with these credentials.
async fn get_as(client: &Client, header: &str, host: &str, path: &str) -> Got {
    let target = format!("{host}:443");
    let tcp = client.connect_with(&target, &line(header)).await.unwrap();
    let mut conn = Conn::new(client.handshake(tcp, host).await.unwrap());
    conn.request("GET", host, path, &[]).await;
    conn.answer("GET").await.unwrap().finish().await
}

fn line(value: &str) -> String {
    format!("Proxy-Authorization: {value}\r\n")
}
