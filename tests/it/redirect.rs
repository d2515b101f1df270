//! Connections that the kernel redirects to larder, as at an egress gateway. Needs `nft` and a
//! network namespace, in which each test runs itself again.

use std::net::SocketAddr;
use std::process::Command;

use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::common::client::handshake;
use crate::common::*;

/// Set in the namespace.
const WITHIN: &str = "LARDER_TEST_WITHIN";
/// Where clients are sent from; larder's own connections come from elsewhere.
const CLIENT: &str = "127.0.0.9";
/// Where they want to go.
const SITE: &str = "127.66.0.1";
const LARDER: &str = "127.0.0.1:3128";

#[tokio::test]
async fn an_intercepted_name_is_served_and_any_other_is_led_on() {
    if !within_namespace("redirect::an_intercepted_name_is_served_and_any_other_is_led_on") {
        return;
    }
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    upstream.route(ELSEWHERE, "/", Reply::text("beyond"));
    lead(SITE, upstream.addr).await;
    let setup = Setup::new(&upstream).args(["--tunnel", "127.66.0.0/16:*"]);
    let larder = setup.start_on(LARDER).await;
    let client = larder.client();

    let tls = client
        .handshake(redirected(SITE).await, TERRAFORM)
        .await
        .unwrap();
    let mut conn = Conn::new(tls);
    conn.request("GET", TERRAFORM, &release.versions_path(), &[])
        .await;
    let versions = conn.answer("GET").await.unwrap().finish().await;
    assert_eq!(versions.json(), release.versions());
    let seen = upstream.connections();

    // Whoever that is keeps its own certificate.
    let beyond = client.trusting(&upstream.ca_pem);
    let tls = handshake(redirected(SITE).await, ELSEWHERE, beyond.config())
        .await
        .unwrap();
    let mut conn = Conn::new(tls);
    conn.request("GET", ELSEWHERE, "/", &[]).await;
    assert_eq!(
        conn.answer("GET").await.unwrap().finish().await.text(),
        "beyond"
    );
    assert_eq!(upstream.connections(), seen + 1);
    larder.logs(&["tunnel", ELSEWHERE]).await;
    // A name of larder's own is larder.
    let tls = client
        .handshake(redirected(SITE).await, "localhost")
        .await
        .unwrap();
    let mut conn = Conn::new(tls);
    conn.request("GET", "localhost", "/readyz", &[]).await;
    assert_eq!(conn.answer("GET").await.unwrap().finish().await.status, 200);
}

#[tokio::test]
async fn the_rules_for_tunnels_hold() {
    if !within_namespace("redirect::the_rules_for_tunnels_hold") {
        return;
    }
    let upstream = Upstream::start();
    lead(SITE, upstream.addr).await;
    for (options, words) in [
        (&[][..], "this machine"),
        (&["--tunnel", "deny"], "not tunnelled"),
        (&["--tunnel", "other.example:443"], "not tunnelled"),
    ] {
        let setup = Setup::without_upstream().args(options.iter().copied());
        let larder = setup.start_on(LARDER).await;
        let mut tcp = redirected(SITE).await;
        let refused = handshake(&mut tcp, ELSEWHERE, larder.client().config()).await;
        assert!(refused.is_err(), "{options:?}");
        larder
            .logs(&["redirected connection was refused", words])
            .await;
        assert_eq!(upstream.connections(), 0, "{options:?}");
        larder.terminate().await;
    }
}

#[tokio::test]
async fn without_a_redirect_an_unknown_name_ends_the_handshake() {
    let larder = Setup::without_upstream().start().await;
    let mut tcp = larder.client().tcp().await;
    let refused = handshake(&mut tcp, ELSEWHERE, larder.client().config()).await;
    let error = refused.unwrap_err().to_string();
    assert!(
        error.contains("UnrecognizedName") || error.contains("UnrecognisedName"),
        "{error}"
    );
}

/// Whether this is the namespace; outside, the test `name` is run in one.
fn within_namespace(name: &str) -> bool {
    if std::env::var_os(WITHIN).is_some() {
        return true;
    }
    let rules = format!(
        "ip link set lo up && nft add table ip nat && nft 'add chain ip nat out {{ type nat hook output priority -100; }}' && nft add rule ip nat out ip saddr {CLIENT} tcp dport 443 redirect to :3128"
    );
    let able = Command::new("unshare")
        .args(["-n", "sh", "-c", &rules])
        .output();
    if !able.is_ok_and(|output| output.status.success()) {
        assert!(
            !is_required("nft"),
            "no nft, or no network namespace to use it in"
        );
        println!("skipped: no nft, or no network namespace to use it in");
        return false;
    }
    let test = std::env::current_exe().unwrap();
    let script = format!("{rules} && exec \"$0\" \"$@\"");
    let status = Command::new("unshare")
        .args(["-n", "sh", "-c", &script])
        .arg(test)
        .args(["--exact", name, "--nocapture"])
        .env(WITHIN, "1")
        .status()
        .unwrap();
    assert!(status.success());
    false
}

/// A connection on its way to port 443 of `to`.
async fn redirected(to: &str) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(format!("{CLIENT}:0").parse().unwrap()).unwrap();
    let to = format!("{to}:443").parse().unwrap();
    within("connection", socket.connect(to)).await.unwrap()
}

/// A site on port 443 that is in truth `upstream`.
async fn lead(site: &str, upstream: SocketAddr) {
    let listener = TcpListener::bind(format!("{site}:443")).await.unwrap();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut far = TcpStream::connect(upstream).await?;
                tokio::io::copy_bidirectional(&mut near, &mut far).await
            });
        }
    });
}
