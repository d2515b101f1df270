//! An upstream that stalls, at every stage of an answer.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::common::*;

/// The client of a document gives up after that.
const DOCUMENT: Duration = Duration::from_secs(10);
/// The head of an archive has 32 s, and a body that stalls is left after 30 s.
const ARCHIVE: Duration = Duration::from_secs(45);
/// Who asks for what does not stall.
const PROMPT: Duration = Duration::from_secs(5);

const HEAD: &str =
    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 14\r\n\r\n";
const BODY: &str = "{\"name\": \"x\"}\n";

/// Wherever it stalls, whoever asked is told in time, and nobody else waits.
#[tokio::test]
async fn an_upstream_that_stalls_anywhere_holds_up_nobody_else() {
    let upstream = Upstream::start();
    // These two do not get so far as to be asked.
    let mute = silent_after(b"").await;
    let half_hello = silent_after(b"\x16\x03\x03\x00\x7a\x02\x00\x00").await;
    let mut setup = Setup::trusting(&upstream);
    for (host, port) in [
        (TERRAFORM, mute),
        (OPENTOFU, half_hello),
        (RELEASES, upstream.addr.port()),
    ] {
        let target = format!("{host}:443:127.0.0.1:{port}");
        setup = setup.args(["--connect-to", &target]);
    }
    let larder = setup.start().await;
    let client = &larder.client();
    let route = |path: &str, reply: Reply| upstream.route(RELEASES, path, reply);
    let stops_after = |bytes: usize| {
        let answer = [HEAD, BODY].concat();
        Reply::raw(answer).tapped(&Tap::at(bytes as u64))
    };

    // Documents: nothing comes, or so much and no more, or a byte now and then.
    route("/mute", Reply::raw("").held_by(&Gate::closed()));
    route("/half-head", stops_after(HEAD.len() / 2));
    route("/whole-head", stops_after(HEAD.len()));
    route("/half-body", stops_after(HEAD.len() + BODY.len() / 2));
    let chunk = HEAD.replace("Content-Length: 14", "Transfer-Encoding: chunked");
    route("/half-chunk", Reply::raw(chunk + "ff\r\n{}"));
    route(
        "/redirect_SHA256SUMS",
        Reply::redirect(&format!("https://{TERRAFORM}/x")),
    );
    let drips = [Tap::at(0), Tap::at(HEAD.len() as u64)];
    let long = format!("{HEAD}{BODY}").replace("14", "9999") + &" ".repeat(9999);
    for (path, tap) in ["/drip-head", "/drip-body"].into_iter().zip(&drips) {
        route(path, Reply::raw(long.clone()).tapped(tap));
    }
    let documents = "/mute /half-head /whole-head /half-body /half-chunk /redirect_SHA256SUMS \
        /drip-head /drip-body";
    let documents = documents
        .split_whitespace()
        .map(|path| format!("https://{RELEASES}{path}"));
    let documents = documents.chain(
        [TERRAFORM, OPENTOFU].map(|host| format!("https://{host}/.well-known/terraform.json")),
    );
    let documents = documents.map(async |url| {
        let started = Instant::now();
        let got = client.get(&url).await;
        assert_eq!(got.status, 504, "{url}: {}", got.text());
        assert!(
            started.elapsed() < DOCUMENT,
            "{url}: {:?}",
            started.elapsed()
        );
    });
    // What was good before is good again.
    route("/good", Reply::raw([HEAD, BODY].concat()));
    let good = format!("https://{RELEASES}/good");
    client.get(&good).await.assert_is(BODY.as_bytes());
    route("/good", stops_after(HEAD.len() + 1));
    let good = async {
        let started = Instant::now();
        client.get(&good).await.assert_is(BODY.as_bytes());
        assert!(started.elapsed() < DOCUMENT, "{:?}", started.elapsed());
    };

    // Archives.
    const SIZE: usize = 30_000;
    let product = |name: &str| {
        let product = Product::sized(name, "1.0.0", SIZE);
        product.publish(&upstream);
        product
    };
    let dripping = product("dripping");
    let raw = Reply::raw([HEAD.as_bytes(), &dripping.archive].concat());
    route(&dripping.archive_path(), raw.tapped(&drips[0]));
    let sumless = product("sumless");
    route(&sumless.sums_path(), stops_after(HEAD.len() + 1));
    let archives = [&dripping, &sumless].map(async |product: &Product| {
        let started = Instant::now();
        let got = client.get(&product.archive_url()).await;
        assert!(!got.succeeded(), "{}", product.name);
        assert!(started.elapsed() < ARCHIVE, "{}", product.name);
    });
    // Only the first time: the rest comes behind the client's back.
    let halved = product("halved");
    let whole = Reply::archive(halved.archive.clone());
    let replies = vec![whole.clone().tapped(&Tap::at(10_000)), whole];
    upstream.route_turns(RELEASES, &halved.archive_path(), replies);
    let halved = async {
        let started = Instant::now();
        client
            .get(&halved.archive_url())
            .await
            .assert_is(&halved.archive);
        assert!(started.elapsed() < ARCHIVE, "{:?}", started.elapsed());
    };

    let stalled = async {
        tokio::join!(join_all(documents), good, join_all(archives), halved);
    };
    let others = async {
        for round in 0.. {
            // Never the end of a head, and never that of the body.
            drips[0].permit(round.min(HEAD.len() as u64 - 2));
            drips[1].permit(HEAD.len() as u64 + round);
            let fine = product(&format!("fine{round}"));
            let started = Instant::now();
            client
                .get(&fine.archive_url())
                .await
                .assert_is(&fine.archive);
            client
                .get(&format!("https://{RELEASES}/fine{round}/"))
                .await;
            assert!(started.elapsed() < PROMPT, "{:?}", started.elapsed());
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    };
    tokio::select! {
        () = stalled => {}
        () = others => {}
    }
    assert!(larder.log_with(&["panicked"]).is_empty());
}

/// A TCP server that takes whatever comes, says so much, and no more.
async fn silent_after(bytes: &'static [u8]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = tcp.write_all(bytes).await;
                while tcp.read_u8().await.is_ok() {}
            });
        }
    });
    port
}
