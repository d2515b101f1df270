//! kill -9, at any moment.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::common::*;

const KILLS: usize = 100;
const SIZE: usize = 100 * 1024;
/// Three of eight archives fit.
const BUDGET: u64 = 350 * 1024;

/// Fills, commits and evictions all the time, and no moment at which a kill leaves anything bad: what
/// has a name has the bytes of that name, and what has none is gone after the next start.
#[tokio::test]
async fn a_hundred_kills_leave_nothing_but_whole_archives() {
    let seed = std::env::var("LARDER_TEST_SEED").map_or_else(|_| unique(), |s| s.parse().unwrap());
    println!("LARDER_TEST_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let upstream = Upstream::start();
    let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let releases = names.map(|name| Release::sized("hashicorp", name, "1.0.0", SIZE));
    releases
        .iter()
        .for_each(|release| release.publish(&upstream));
    let setup = Setup::new(&upstream).args(["--max-size", &BUDGET.to_string()]);
    let (mut interrupted, mut evicted) = (0, 0.0);

    for kill in 1..=KILLS {
        println!("kill {kill}");
        let larder = setup.start().await;
        is_sound(&setup, &releases);
        if kill % 10 == 0 {
            let verify = setup.command(&["verify"]).output().unwrap();
            assert_eq!(verify.status.code(), Some(0), "{verify:?}");
        }
        let release = releases.choose(&mut random).unwrap();
        let client = larder.client();
        client.get(&release.document_url()).await;
        let got = client.get(&release.archive_url()).await;
        got.assert_is(&release.archive());

        // Four clients want two archives each.
        let received = Arc::new(AtomicU64::new(0));
        let mut clients = Vec::new();
        for _ in 0..4 {
            let wanted = releases.choose_multiple(&mut random, 2).cloned();
            let (wanted, addr) = (wanted.collect::<Vec<_>>(), larder.addr);
            let received = Arc::clone(&received);
            clients.push(tokio::spawn(async move {
                for release in wanted {
                    // The kill ends them, at whatever place.
                    let _ = fetch(addr, &release, &received).await;
                }
            }));
        }
        let all_done = || clients.iter().all(|client| client.is_finished());
        match random.gen_bool(0.5) {
            true => tokio::time::sleep(Duration::from_micros(random.gen_range(0..40_000))).await,
            false => {
                let enough = random.gen_range(0..8 * SIZE as u64);
                let there = || received.load(Ordering::SeqCst) >= enough || all_done();
                eventually("so many bytes", there).await;
            }
        }
        if kill % 10 == 1 {
            evicted += larder.metric("larder_evictions_total").await;
        }
        larder.signal(Signal::KILL);
        for client in clients {
            client.await.unwrap();
        }
        larder.ended().await;
        interrupted += usize::from(!setup.staged().is_empty());
    }
    println!("{interrupted} fills interrupted, {evicted} evictions in every tenth run");
    // Else the kills came at no interesting moments.
    assert!(interrupted > 0 && evicted > 0.0);

    let larder = setup.start().await;
    is_sound(&setup, &releases);
    for release in &releases {
        let got = larder.client().get(&release.archive_url()).await;
        got.assert_is(&release.archive());
    }
    assert_eq!(larder.terminate().await, Some(0));
    let gc = setup.command(&["gc", "--max-size", "0"]).output().unwrap();
    assert!(gc.status.success(), "{gc:?}");
    assert_eq!(setup.blobs(), Vec::<PathBuf>::new());
    let verify = setup.command(&["verify"]).output().unwrap();
    assert_eq!(verify.status.code(), Some(0), "{verify:?}");
}

/// What must be so after any start.
#[track_caller]
fn is_sound(setup: &Setup, releases: &[Release]) {
    assert_eq!(setup.staged(), Vec::<PathBuf>::new());
    let mut bytes = 0;
    for blob in setup.blobs() {
        let content = std::fs::read(&blob).unwrap();
        let digest = sha256(&content);
        let name: Vec<_> = blob
            .iter()
            .rev()
            .take(3)
            .map(|part| part.to_string_lossy())
            .collect();
        assert_eq!(digest, format!("{}{}{}", name[2], name[1], name[0]));
        let known = releases.iter().any(|release| release.digest() == digest);
        assert!(known, "{blob:?} is nobody's");
        bytes += content.len() as u64;
    }
    assert!(bytes <= BUDGET, "{bytes} bytes are held");
}

/// The document and the archive of a release, over plain TCP: as far as it goes.
async fn fetch(addr: SocketAddr, release: &Release, received: &AtomicU64) -> io::Result<()> {
    for url in [release.document_url(), release.archive_url()] {
        let mut tcp = TcpStream::connect(addr).await?;
        let host = url.split('/').nth(2).unwrap();
        let head = format!("GET {url} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        tcp.write_all(head.as_bytes()).await?;
        let mut buffer = [0; 4096];
        loop {
            match tcp.read(&mut buffer).await? {
                0 => break,
                n => received.fetch_add(n as u64, Ordering::SeqCst),
            };
        }
    }
    Ok(())
}
