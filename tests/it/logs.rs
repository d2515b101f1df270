//! A line a request, and no secrets anywhere.

use std::io::Read;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::common::*;

#[tokio::test]
async fn each_request_is_a_line_at_info() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    client.get(&release.document_url()).await;
    client.get(&release.archive_url()).await;
    larder.setup.holds(1).await;
    client.get(&release.archive_url()).await;
    client.get(&format!("https://{RELEASES}/nothing")).await;

    let length = release.archive().len().to_string();
    let archive = release.archive_url();
    larder
        .logs(&["\"INFO\"", "GET", &release.document_url(), "200"])
        .await;
    larder
        .logs(&["\"INFO\"", "GET", &archive, "200", &length, "miss"])
        .await;
    larder
        .logs(&["\"INFO\"", "GET", &archive, "200", &length, "hit"])
        .await;
    larder
        .logs(&[
            "\"INFO\"",
            "GET",
            &format!("https://{RELEASES}/nothing"),
            "404",
        ])
        .await;
    for line in larder.log_with(&["\"INFO\"", &archive, "GET"]) {
        let line: Value = serde_json::from_str(&line).unwrap();
        let fields = line.as_object().unwrap().keys();
        let timed = fields
            .into_iter()
            .any(|key| key.contains("duration") || key.contains("elapsed"));
        assert!(timed, "{line}");
    }
    let lines = larder.log_with(&["\"INFO\"", &archive, "GET", "200"]);
    assert_eq!(lines.len(), 2, "one line a request: {lines:#?}");
}

#[tokio::test]
async fn every_line_of_the_json_log_is_json() {
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let larder = Setup::new(&upstream).args(["-v"]).start().await;
    larder.client().get(&product.archive_url()).await;
    larder.client().raw(b"GARBAGE\r\n\r\n").await;
    for line in larder.log() {
        let parsed: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line}"));
        assert!(
            parsed["message"].is_string() && parsed["level"].is_string(),
            "{line}"
        );
    }
}

#[tokio::test]
async fn the_text_log_is_for_people() {
    let setup = Setup::without_upstream();
    let mut command = setup.command(&["serve", "--log-format", "text", "--listen", "127.0.0.1:0"]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let mut said = String::new();
    while !said.contains("listening") {
        let mut part = [0; 1000];
        let read = stderr.read(&mut part).unwrap();
        assert!(read > 0, "{said}");
        said.push_str(&String::from_utf8_lossy(&part[..read]));
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(!said.starts_with('{'), "{said}");
    assert!(said.contains("127.0.0.1:"), "{said}");
    assert!(!said.contains('\x1b'), "no colours into a pipe: {said:?}");
}

#[tokio::test]
async fn no_secret_reaches_log_metrics_or_disk() {
    let upstream = Upstream::start();
    let release = Release::new("someone", "thing", "1.2.3").on(TERRAFORM, Home::GitHub);
    release.publish(&upstream);
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let setup = Setup::new(&upstream).args(["-v", "-v"]);
    let larder = setup.start().await;
    let client = larder.client();
    let document = client.get(&release.document_url()).await.json();

    // The signed URL that github.com redirects to says SECRET; once well, once in vain.
    client
        .get(document["download_url"].as_str().unwrap())
        .await
        .assert_is(&release.archive());
    release.publish_archive(&upstream, Reply::status(500));
    larder.setup.holds(1).await;
    let gc = larder
        .setup
        .command(&["gc", "--max-size", "0"])
        .output()
        .unwrap();
    assert!(gc.status.success(), "{gc:?}");
    client.get(document["download_url"].as_str().unwrap()).await;

    // Queries, headers and credentials of the client's.
    let secrets = [
        ("Authorization", "Bearer SECRET-bearer"),
        ("Cookie", "session=SECRET-cookie"),
        ("X-Vault-Token", "SECRET-token"),
    ];
    for url in [
        format!("{}?X-Amz-Signature=SECRET-query", product.archive_url()),
        format!("https://{RELEASES}/nothing?token=SECRET-query"),
        format!("https://{TERRAFORM}/v1/modules/search?q=SECRET-query"),
    ] {
        client.get(&url).await;
        client.get_with(&url, &secrets).await;
    }
    // "user:SECRET-proxy" in base64, and a failing tunnel with it.
    let basic = "Proxy-Authorization: Basic dXNlcjpTRUNSRVQtcHJveHk=\r\n";
    let _ = client
        .connect_with(&format!("{TERRAFORM}:443"), basic)
        .await;
    let _ = client.connect_with("127.0.0.1:1", basic).await;
    client
        .raw(b"GET /healthz?SECRET-query HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .await;
    client.raw(b"GET http://user:SECRET-userinfo@127.0.0.1:1/?SECRET-query HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
    larder.logs(&["\"INFO\"", "/healthz"]).await;

    let metrics = larder.metrics().await;
    for needle in ["SECRET", "U0VDUkVU", "dXNlcjpTRUNSRVQtcHJveHk="] {
        assert_eq!(larder.log_with(&[needle]), Vec::<String>::new());
        assert!(!metrics.contains(needle), "{metrics}");
        assert_eq!(
            larder.setup.files_with(needle),
            Vec::<std::path::PathBuf>::new()
        );
    }
}

#[tokio::test]
async fn the_password_of_the_parent_proxy_is_not_logged() {
    let parent = format!("http://user:SECRET-parent@127.0.0.1:{}", free_port());
    let setup = Setup::without_upstream().args(["-v", "-v", "--upstream-proxy", &parent]);
    let larder = setup.start().await;
    let got = larder
        .client()
        .get(&format!("https://{RELEASES}/terraform/"))
        .await;
    assert_eq!(got.status, 502);
    assert!(!got.text().contains("SECRET"), "{}", got.text());
    assert_eq!(larder.log_with(&["SECRET"]), Vec::<String>::new());
    assert!(!larder.metrics().await.contains("SECRET"));
}
