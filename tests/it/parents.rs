//! Parent proxies of each kind: what comes through them, who is asked without them, and what is said
//! when they fail. (More of the CONNECT kind is in `proxy`.)

use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::common::*;

const SCHEMES: [&str; 4] = ["http", "https", "socks5", "socks5h"];
/// As it stands in URLs, and decoded.
const LOGIN: (&str, &str) = ("an%20n:SECRET%40%3A%C3%A9", "an n:SECRET@:é");

// --- What comes through ---

#[tokio::test]
async fn archives_and_tunnels_come_through_each_kind_of_parent() {
    for scheme in SCHEMES {
        for login in [None, Some(LOGIN)] {
            let upstream = Upstream::start();
            let release = Release::new("hashicorp", "null", "3.2.1");
            release.publish(&upstream);
            upstream.route(ELSEWHERE, "/", Reply::text("beyond"));
            let parent = Parent::start(&upstream, scheme, login.map(|(_, plain)| plain)).await;
            let url = parent.url(login.map(|(encoded, _)| encoded));
            let setup = Setup::trusting(&upstream);
            let setup = match (scheme, login) {
                ("https", None) => setup.env("https_proxy", &url),
                ("https", _) => setup.config(&format!("upstream_proxy = '{url}'")),
                ("socks5", None) => setup.env("LARDER_UPSTREAM_PROXY", &url),
                ("socks5", _) => setup.env("HTTPS_PROXY", &url),
                _ => setup.args(["--upstream-proxy", &url]),
            };
            let larder = setup.start().await;

            let got = install(&larder.client(), &release).await;
            got.assert_is(&release.archive());
            setup.holds(1).await;
            let blind = larder.client().trusting(&upstream.ca_pem);
            let got = blind.get(&format!("https://{ELSEWHERE}/")).await;
            got.assert_is(b"beyond");

            let asked = parent.asked();
            for host in [TERRAFORM, RELEASES, ELSEWHERE] {
                let target = format!("{host}:443");
                assert!(asked.iter().any(|a| a.target == target), "{url}: {asked:?}");
            }
            let plain = login.map(|(_, plain)| plain);
            for asked in &asked {
                assert_eq!(asked.login.as_deref(), plain, "{url}");
                // The name that its certificate is checked for, and HTTP/1.1 whatever it may know.
                let tls = (scheme == "https").then(|| "localhost http/1.1".to_owned());
                assert_eq!(asked.tls, tls, "{url}");
            }
            assert_eq!(
                upstream.connections(),
                asked.len(),
                "{url}: round the parent"
            );
            assert_eq!(larder.log_with(&["SECRET"]), Vec::<String>::new());
        }
    }
}

#[tokio::test]
async fn a_target_of_connect_to_is_dialled_without_the_parent() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let parent = Parent::start(&upstream, "socks5", None).await;
    let setup = Setup::new(&upstream).args(["--upstream-proxy", &parent.url(None)]);
    let larder = setup.start().await;
    let got = install(&larder.client(), &release).await;
    got.assert_is(&release.archive());
    assert_eq!(parent.asked(), []);
}

/// The process that runs share has the parent of the run that started it.
#[tokio::test]
async fn a_run_hands_the_parent_and_its_exceptions_on() {
    let upstream = Upstream::start();
    upstream.route(RELEASES, "/page", Reply::text("a page"));
    let parent = Parent::start(&upstream, "https", Some(LOGIN.1)).await;
    let setup = Setup::trusting(&upstream)
        .env("LARDER_UPSTREAM_PROXY", &parent.url(Some(LOGIN.0)))
        .args(["--no-proxy", ".direct.example", "--no-proxy", "192.0.2.1"]);
    let mut command = setup.command_with_options(&["run"]);
    command.args(["--", "sh", "-c", "echo $HTTPS_PROXY; read wait"]);
    let mut command = tokio::process::Command::from(command);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut running = command.kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(running.stdout.take().unwrap()).lines();
    let proxy = within("the proxy's address", lines.next_line())
        .await
        .unwrap()
        .unwrap();
    let proxy = proxy.strip_prefix("http://").unwrap().parse().unwrap();
    let client = Client::new(proxy, &std::fs::read(setup.ca_pem()).unwrap());

    assert_asks_for(
        &client,
        &parent,
        &["direct.example", "192.0.2.2"],
        &["a.direct.example", "192.0.2.1"],
    )
    .await;
    client
        .get(&format!("https://{RELEASES}/page"))
        .await
        .assert_is(b"a page");

    // One who wants other exceptions is not served by it.
    for (list, code) in [(".direct.example,192.0.2.1", 0), ("192.0.2.1", 125)] {
        let mut command = setup.command(&["run", "--no-proxy", list]);
        let output = command.args(["--", "true"]).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
    }
    assert_eq!(setup.files_with("SECRET"), Vec::<std::path::PathBuf>::new());
    drop(running.stdin.take());
    within("the end of the run", running.wait()).await.unwrap();
}

// --- Who is asked without it ---

#[tokio::test]
async fn what_no_proxy_covers_is_never_asked_of_the_parent() {
    let covered = [
        "corp.example",
        "a.corp.example",
        "b.dot.example",
        "192.0.2.7",
        "[2001:db8::1]",
    ];
    let list = "CORP.example, .dot.example,192.0.2.0/28 ,[2001:db8::1]:443";
    let others = [
        "acorp.example",
        "dot.example",
        "192.0.2.16",
        "[2001:db8::2]",
    ];
    let inherited = "acorp.example,*.dot.example,192.0.2.16";
    for by in [
        "--no-proxy",
        "LARDER_NO_PROXY",
        "no_proxy = one",
        "no_proxy = more",
        "NO_PROXY",
        "no_proxy",
    ] {
        let upstream = Upstream::start();
        let parent = Parent::start(&upstream, "http", None).await;
        let setup = Setup::without_upstream().args(["--upstream-proxy", &parent.url(None)]);
        let setup = match by {
            "--no-proxy" => setup.args([by, list]).env("NO_PROXY", inherited),
            "LARDER_NO_PROXY" => setup
                .env(by, list)
                .env("NO_PROXY", inherited)
                .config("no_proxy = '*'"),
            "no_proxy = one" => setup
                .config(&format!("no_proxy = '{list}'"))
                .env("no_proxy", inherited),
            "no_proxy = more" => {
                setup.config(&format!("no_proxy = ['{}']", list.replace(',', "','")))
            }
            _ => setup.env(by, &format!("{list},<local>,10.*")),
        };
        let larder = setup.start().await;
        assert_asks_for(&larder.client(), &parent, &others, &covered).await;
        let strange = larder.log_with(&["<local>", "WARN"]);
        assert_eq!(
            strange.len(),
            usize::from(by.len() == 8),
            "{by}: {strange:?}"
        );
    }
}

#[tokio::test]
async fn all_or_nothing_may_be_exempt_and_this_machine_always_is() {
    let echo = Echo::start().await;
    let own = format!("127.0.0.1:{}", echo.port);
    for (list, others, covered) in [
        ("*", &[][..], &["a.example", "192.0.2.1"][..]),
        ("", &["a.example", "192.0.2.1"], &["localhost", "[::1]"]),
    ] {
        let upstream = Upstream::start();
        let parent = Parent::start(&upstream, "socks5h", None).await;
        let setup = Setup::without_upstream()
            .env("HTTPS_PROXY", &parent.url(None))
            .env("NO_PROXY", "a.example,192.0.2.1")
            .args([
                "--tunnel",
                &own,
                "--tunnel",
                "*.example",
                "--tunnel",
                "a.example",
            ])
            .args([
                "--tunnel",
                "192.0.2.1",
                "--tunnel",
                "localhost",
                "--tunnel",
                "::1",
            ])
            .arg(&format!("--no-proxy={list}"));
        let larder = setup.start().await;
        let client = larder.client();
        assert_asks_for(&client, &parent, others, covered).await;
        let before = parent.asked().len();
        let mut tunnel = client.connect(&own).await.unwrap();
        tunnel.write_all(b"x").await.unwrap();
        assert_eq!(within("the echo", tunnel.read_u8()).await.unwrap(), b'x');
        assert_eq!(parent.asked().len(), before);
    }
}

/// The parent sits where addresses mean something else.
#[tokio::test]
async fn behind_a_parent_literals_and_ports_are_judged_all_the_same() {
    for (listen, refused) in [
        (
            "127.0.0.1:0",
            &[
                "169.254.169.254:443",
                "[fe80::1]:443",
                "[::ffff:127.0.0.1]:443",
                "0.0.0.0:443",
                "a.example:25",
            ][..],
        ),
        (
            "0.0.0.0:0",
            &[
                "10.0.0.1:443",
                "[fd00::1]:443",
                "[64:ff9b::a00:1]:443",
                "a.example:8443",
            ],
        ),
    ] {
        for scheme in ["https", "socks5"] {
            let upstream = Upstream::start();
            let parent = Parent::start(&upstream, scheme, None).await;
            let setup = Setup::trusting(&upstream).args([
                "--upstream-proxy",
                &parent.url(None),
                "--allow-from",
                "127.0.0.1",
            ]);
            let larder = setup.start_on(listen).await;
            for target in refused {
                let refusal = larder.client().connect(target).await.unwrap_err();
                assert_words(&refusal, 403);
            }
            larder.client().connect("a.example:443").await.unwrap();
            let targets: Vec<_> = parent
                .asked()
                .into_iter()
                .map(|asked| asked.target)
                .collect();
            assert_eq!(targets, ["a.example:443"]);
        }
    }
}

#[tokio::test]
async fn an_inherited_parent_that_is_larder_by_another_name_is_none() {
    let upstream = Upstream::start();
    upstream.route(RELEASES, "/page", Reply::text("a page"));
    for host in [
        "https://larder.corp.example",
        "socks5://localhost",
        "http://0.0.0.0",
    ] {
        let port = free_port();
        let url = format!("{host}:{port}");
        let setup = Setup::new(&upstream)
            .env("HTTPS_PROXY", &url)
            .args(["--hostname", "larder.corp.example"]);
        let larder = setup.start_on(&format!("127.0.0.1:{port}")).await;
        assert_eq!(
            larder.log_with(&["parent proxy"]),
            Vec::<String>::new(),
            "{url}"
        );
        let refusal = larder.client().connect("192.0.2.1:25").await.unwrap_err();
        assert_words(&refusal, 403);
        let got = larder
            .client()
            .get(&format!("https://{RELEASES}/page"))
            .await;
        got.assert_is(b"a page");
    }
}

// --- When it fails ---

#[tokio::test]
async fn other_credentials_are_asked_for_once_and_the_own_ones_never_told() {
    for scheme in SCHEMES {
        for (sent, words) in [
            (Some("ann:SECRET-1"), "other credentials"),
            (None, "USER:PASSWORD@"),
        ] {
            let upstream = Upstream::start();
            let parent = Parent::start(&upstream, scheme, Some("ann:SECRET-2")).await;
            let url = parent.url(sent);
            let setup = Setup::trusting(&upstream).args(["-v", "-v", "--upstream-proxy", &url]);
            let larder = setup.start().await;

            let got = larder
                .client()
                .get(&format!("https://{RELEASES}/terraform/"))
                .await;
            let said = got.assert_refused(502);
            // An account that is locked after three wrong passwords is not locked by one request.
            assert_eq!(parent.asked().len(), 1, "{url}");
            let refusal = larder
                .client()
                .connect(&format!("{ELSEWHERE}:443"))
                .await
                .unwrap_err();
            assert_words(&refusal, 502);
            for said in [said, refusal.reason] {
                let name = format!("parent proxy {}", parent.name());
                for word in [words, &name] {
                    assert!(said.contains(word), "{word}: {said}");
                }
                assert!(!said.contains("SECRET"), "{said}");
            }
            assert_eq!(upstream.connections(), 0, "{url}: round the parent");
            let token = STANDARD.encode("ann:SECRET-1");
            for secret in ["SECRET", &token] {
                assert_eq!(larder.log_with(&[secret]), Vec::<String>::new());
                assert!(!larder.metrics().await.contains(secret));
                assert_eq!(setup.files_with(secret), Vec::<std::path::PathBuf>::new());
            }
        }
    }
}

#[tokio::test]
async fn a_parent_that_fails_is_named_and_not_gone_round() {
    const ENDLESS: &str = "endless";
    for (scheme, says, words) in [
        ("http", Some("HTTP/1.1 503 Down\r\n\r\n"), "503 Down"),
        ("http", Some("220 mail.example ESMTP\r\n"), "no HTTP"),
        ("http", Some(""), "ended the connection"),
        ("http", Some(ENDLESS), "endless"),
        ("https", Some("HTTP/1.1 400 Bad\r\n\r\n"), "write http://"),
        ("socks5", Some("HTTP/1.1 400 Bad\r\n\r\n"), "no SOCKS5"),
        ("socks5", Some("\x05"), "ended the connection"),
        ("http", None, "cannot be connected to"),
    ] {
        let upstream = Upstream::start();
        let parent = match says {
            Some(ENDLESS) => {
                let head = format!("HTTP/1.1 200 OK\r\n{}", "X: y\r\n".repeat(20_000));
                Parent::saying(&upstream, scheme, &head).await
            }
            Some(says) => Parent::saying(&upstream, scheme, says).await,
            None => Parent::gone(&upstream, scheme),
        };
        let setup =
            Setup::trusting(&upstream).args(["--upstream-proxy", &parent.url(Some("u:SECRET"))]);
        let larder = setup.start().await;
        let client = larder.client();
        let refusal = client.connect(&format!("{ELSEWHERE}:443")).await;
        let refusal = refusal.unwrap_err();
        assert_words(&refusal, 502);
        let mut all = vec![refusal.reason];
        // Fetches have three tries with pauses between them, so not for each.
        if ["503 Down", "no SOCKS5"].contains(&words) {
            let got = client.get(&format!("https://{RELEASES}/terraform/")).await;
            all.push(got.assert_refused(502));
        }
        for said in all {
            for word in [words, "parent proxy", &parent.name()] {
                assert!(said.contains(word), "{word}: {said}");
            }
            assert!(!said.contains("SECRET"), "{said}");
        }
        assert_eq!(
            upstream.connections(),
            0,
            "{scheme} {says:?}: round the parent"
        );
        assert_alive(&larder).await;
    }
}

/// Bytes after the head of a 200 are the origin's to all that CONNECT knows; here they are none.
#[tokio::test]
async fn more_than_a_head_spoils_the_handshake_and_the_parent_is_named() {
    let upstream = Upstream::start();
    let page = "HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n<html></html>";
    let parent = Parent::saying(&upstream, "http", page).await;
    let setup = Setup::trusting(&upstream).args(["--upstream-proxy", &parent.url(None)]);
    let larder = setup.start().await;
    let got = larder
        .client()
        .get(&format!("https://{RELEASES}/terraform/"))
        .await;
    let said = got.assert_refused(502);
    for word in ["TLS", "through the parent proxy", &parent.name()] {
        assert!(said.contains(word), "{word}: {said}");
    }
}

#[tokio::test]
async fn a_parent_with_another_certificate_gets_no_credentials() {
    let (upstream, stranger) = (Upstream::start(), Upstream::start());
    let parent = Parent::start(&stranger, "https", Some(LOGIN.1)).await;
    let setup = Setup::trusting(&upstream).args(["--upstream-proxy", &parent.url(Some(LOGIN.0))]);
    let larder = setup.start().await;
    let refusal = larder
        .client()
        .connect(&format!("{ELSEWHERE}:443"))
        .await
        .unwrap_err();
    assert_words(&refusal, 502);
    assert!(
        refusal.reason.contains("--upstream-ca"),
        "{}",
        refusal.reason
    );
    assert_eq!(parent.asked(), []);
}

#[tokio::test]
async fn a_parent_that_cannot_be_used_stops_the_start() {
    for (variable, value, words) in [
        (
            "HTTPS_PROXY",
            "socks4://u:SECRET@p:1",
            &["HTTPS_PROXY", "socks4", "socks5://"][..],
        ),
        (
            "https_proxy",
            "http://u:SECRET#1@p:1",
            &["https_proxy", "%23"],
        ),
        (
            "HTTPS_PROXY",
            "socks5://:SECRET@p",
            &["HTTPS_PROXY", "255 bytes"],
        ),
        (
            "LARDER_UPSTREAM_PROXY",
            "https://u:SECRET@p:0",
            &["upstream_proxy"],
        ),
        ("LARDER_NO_PROXY", "a.example,b c/d", &["no-proxy", "range"]),
        ("LARDER_NO_PROXY", "*.10.0.0.1", &["no-proxy", "10.0.0.0/8"]),
    ] {
        let setup = Setup::without_upstream().env(variable, value);
        let said = assert_refuses_to_start(setup.serve_command("127.0.0.1:0"), 2, words);
        assert!(!said.contains("SECRET"), "{said}");
    }
}

/// Tunnels to `others` lead to the parent and those to `covered` do not, on port 443.
async fn assert_asks_for(client: &Client, parent: &Parent, others: &[&str], covered: &[&str]) {
    for host in covered {
        // Nobody is there. Some networks say so at once, others never.
        let target = format!("{host}:443");
        let direct = client.connect(&target);
        if let Ok(Ok(_)) = tokio::time::timeout(Duration::from_millis(100), direct).await {
            panic!("{host}: somebody was there");
        }
    }
    for host in others {
        client.connect(&format!("{host}:443")).await.unwrap();
    }
    let asked: Vec<_> = parent
        .asked()
        .into_iter()
        .map(|asked| asked.target)
        .collect();
    let expected: Vec<_> = others.iter().map(|host| format!("{host}:443")).collect();
    assert_eq!(asked, expected);
}

// --- A parent ---

/// A proxy that leads everybody to the upstream, or says something else.
struct Parent {
    scheme: &'static str,
    port: u16,
    script: Arc<Script>,
}

struct Script {
    manner: Manner,
    acceptor: TlsAcceptor,
    upstream: std::net::SocketAddr,
    /// `USER:PASSWORD` that it wants
    login: Option<String>,
    /// In place of all that a proxy would say
    says: Option<String>,
    asked: Mutex<Vec<Asked>>,
}

#[derive(Clone, Copy, PartialEq)]
enum Manner {
    Http,
    Https,
    Socks,
}

/// What a client wanted, as far as it got.
#[derive(Clone, Debug, Default, PartialEq)]
struct Asked {
    /// HOST:PORT
    target: String,
    /// USER:PASSWORD
    login: Option<String>,
    /// The name that was asked for in the handshake, and the protocol agreed on
    tls: Option<String>,
}

trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

impl Parent {
    async fn start(upstream: &Upstream, scheme: &'static str, login: Option<&str>) -> Self {
        Self::scripted(upstream, scheme, login, None).await
    }

    async fn saying(upstream: &Upstream, scheme: &'static str, says: &str) -> Self {
        Self::scripted(upstream, scheme, None, Some(says)).await
    }

    /// Nobody listens there.
    fn gone(upstream: &Upstream, scheme: &'static str) -> Self {
        let script = Arc::new(Script::new(upstream, scheme, None, None));
        let port = free_port();
        Self {
            scheme,
            port,
            script,
        }
    }

    async fn scripted(
        upstream: &Upstream,
        scheme: &'static str,
        login: Option<&str>,
        says: Option<&str>,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let script = Arc::new(Script::new(upstream, scheme, login, says));
        let played = Arc::clone(&script);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let script = Arc::clone(&played);
                tokio::spawn(async move { script.play(tcp).await });
            }
        });
        Self {
            scheme,
            port,
            script,
        }
    }

    /// As it is written in options, reached by a name that the upstream's CA vouches for.
    fn url(&self, login: Option<&str>) -> String {
        let login = login.map(|login| format!("{login}@")).unwrap_or_default();
        format!("{}://{login}localhost:{}", self.scheme, self.port)
    }

    /// As larder names it.
    fn name(&self) -> String {
        format!(
            "{}://localhost:{}",
            self.scheme.trim_end_matches('h'),
            self.port
        )
    }

    fn asked(&self) -> Vec<Asked> {
        self.script.asked.lock().unwrap().clone()
    }
}

impl Script {
    fn new(upstream: &Upstream, scheme: &str, login: Option<&str>, says: Option<&str>) -> Self {
        Self {
            manner: match scheme {
                "http" => Manner::Http,
                "https" => Manner::Https,
                _ => Manner::Socks,
            },
            acceptor: upstream.acceptor.clone(),
            upstream: upstream.addr,
            login: login.map(str::to_owned),
            says: says.map(str::to_owned),
            asked: Mutex::default(),
        }
    }

    async fn play(&self, mut tcp: TcpStream) -> std::io::Result<()> {
        if let Some(says) = &self.says {
            // Read first: what is closed unread is reset, and what was said may be lost.
            let _ = tcp.read(&mut [0; 4096]).await?;
            tcp.write_all(says.as_bytes()).await?;
            return tcp.shutdown().await;
        }
        let mut asked = Asked::default();
        let mut wire: Box<dyn Wire> = match self.manner {
            Manner::Https => {
                let tls = self.acceptor.accept(tcp).await?;
                let agreed = tls.get_ref().1;
                let protocol = agreed.alpn_protocol().unwrap_or_default();
                let protocol = String::from_utf8_lossy(protocol);
                asked.tls = Some(format!(
                    "{} {protocol}",
                    agreed.server_name().unwrap_or("-")
                ));
                Box::new(tls)
            }
            _ => Box::new(tcp),
        };
        let granted = match self.manner {
            Manner::Socks => self.socks(&mut wire, asked).await?,
            _ => self.connect(&mut wire, asked).await?,
        };
        if !granted {
            return wire.shutdown().await;
        }
        let mut beyond = TcpStream::connect(self.upstream).await?;
        tokio::io::copy_bidirectional(&mut wire, &mut beyond).await?;
        Ok(())
    }

    /// Whether the client is led on. What it asked for is noted before it hears of it.
    async fn connect(&self, wire: &mut impl Wire, mut asked: Asked) -> std::io::Result<bool> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(wire.read_u8().await?);
        }
        let head = String::from_utf8(head).unwrap();
        let target = head.strip_prefix("CONNECT ").unwrap();
        asked.target = target.split(' ').next().unwrap().to_owned();
        asked.login = head
            .lines()
            .find_map(|line| line.strip_prefix("Proxy-Authorization: Basic "))
            .map(|token| String::from_utf8(STANDARD.decode(token).unwrap()).unwrap());
        let granted = asked.login == self.login;
        self.note(asked);
        let answer = match granted {
            true => "200 Connection established\r\n",
            false => "407 Who are you?\r\nProxy-Authenticate: Basic realm=\"parent\"\r\n",
        };
        let answer = format!("HTTP/1.1 {answer}\r\n");
        wire.write_all(answer.as_bytes()).await?;
        wire.flush().await?;
        Ok(granted)
    }

    fn note(&self, asked: Asked) {
        self.asked.lock().unwrap().push(asked);
    }

    /// RFC 1928 and 1929
    async fn socks(&self, wire: &mut impl Wire, mut asked: Asked) -> std::io::Result<bool> {
        assert_eq!(wire.read_u8().await?, 5);
        let methods = counted(wire).await?;
        let method = if self.login.is_some() { 2 } else { 0 };
        if !methods.contains(&method) {
            self.note(asked);
            wire.write_all(&[5, 0xff]).await?;
            return Ok(false);
        }
        wire.write_all(&[5, method]).await?;
        if method == 2 {
            assert_eq!(wire.read_u8().await?, 1);
            let login = [counted(wire).await?, b":".to_vec(), counted(wire).await?].concat();
            asked.login = Some(String::from_utf8(login).unwrap());
            if asked.login != self.login {
                self.note(asked);
                wire.write_all(&[1, 1]).await?;
                return Ok(false);
            }
            wire.write_all(&[1, 0]).await?;
        }
        let mut head = [0; 4];
        wire.read_exact(&mut head).await?;
        assert_eq!(head[..3], [5, 1, 0]);
        let host = match head[3] {
            3 => String::from_utf8(counted(wire).await?).unwrap(),
            1 => std::net::Ipv4Addr::from(wire.read_u32().await?).to_string(),
            _ => format!("[{}]", std::net::Ipv6Addr::from(wire.read_u128().await?)),
        };
        asked.target = format!("{host}:{}", wire.read_u16().await?);
        self.note(asked);
        wire.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await?;
        Ok(true)
    }
}

/// As many bytes as the first one says.
async fn counted(wire: &mut impl Wire) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; wire.read_u8().await?.into()];
    wire.read_exact(&mut bytes).await?;
    Ok(bytes)
}
