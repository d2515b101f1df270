//! Clients that hang, in great numbers.

use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::AsyncWriteExt;

use crate::common::*;

const HANGING: usize = 1000;
/// Whoever does not hang.
const PROMPT: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_thousand_half_open_clients_hold_up_nobody() {
    // Each takes a file here and one in larder, which inherits the limit.
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    if limit
        .maximum
        .is_some_and(|files| files < 3 * HANGING as u64)
    {
        println!("skipped: no more than {limit:?} files here (ulimit -Hn)");
        return;
    }
    let upstream = Upstream::start();
    let names = ["before", "during", "later"];
    let releases = names.map(|name| Release::new("hashicorp", name, "1.0.0"));
    releases
        .iter()
        .for_each(|release| release.publish(&upstream));
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    let works = async |release: &Release, what: &str| {
        let started = Instant::now();
        client.get(&release.document_url()).await;
        client
            .get(&release.archive_url())
            .await
            .assert_is(&release.archive());
        assert_eq!(client.page("/healthz").await.status, 200);
        assert!(
            started.elapsed() < PROMPT,
            "{what}: {:?}",
            started.elapsed()
        );
    };
    works(&releases[0], "before").await;

    let connect = format!("CONNECT {RELEASES}:443 HTTP/1.1\r\nHost: {RELEASES}\r\n\r\n");
    let half_hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
    let beginnings = [
        b"".to_vec(),
        b"GET /healthz HTTP/1.1\r\nHost: lar".to_vec(),
        b"POST https://releases.hashicorp.com/x HTTP/1.1\r\nHost: releases.hashicorp.com\r\nContent-Length: 9\r\n\r\nhalf".to_vec(),
        half_hello.to_vec(),
        connect.clone().into_bytes(),
        [connect.as_bytes(), half_hello].concat(),
    ];
    let mut hanging = Vec::new();
    for beginning in beginnings.iter().cycle().take(HANGING) {
        let mut tcp = client.tcp().await;
        tcp.write_all(beginning).await.unwrap();
        hanging.push(tcp);
    }
    works(&releases[1], "during").await;
    let files =
        || std::fs::read_dir(format!("/proc/{}/fd", larder.pid())).map_or(0, Iterator::count);
    assert!(files() > HANGING, "{} files: they do not hang", files());
    works(&releases[2], "still during").await;
    client.get(&releases[0].archive_url()).await.assert_hit();

    drop(hanging);
    eventually("they have hung up", || files() < HANGING / 2).await;
    assert!(larder.log_with(&["panicked"]).is_empty());
    assert_eq!(larder.terminate().await, Some(0));
}
