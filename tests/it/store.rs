//! The store on disk: cacache's format, a budget, and no accident that lets bad bytes through.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::common::larder::binary;
use crate::common::*;

const KIB: usize = 1024;

// --- Format ---

#[tokio::test]
async fn cacache_reads_what_larder_wrote() {
    let (_upstream, releases, larder) = filled(&[]).await;
    let cache = larder.setup.data_dir().join("cache");
    for release in &releases {
        let digest = release.digest();
        let integrity = cacache::Integrity::from_hex(&digest, cacache::Algorithm::Sha256).unwrap();
        let bytes = cacache::read_hash_sync(&cache, &integrity).unwrap();
        assert!(bytes == release.archive());
    }
    let entries: Vec<_> = cacache::list_sync(&cache).map(Result::unwrap).collect();
    for release in &releases {
        let entry = entries.iter().find(|entry| {
            let (_, hex) = entry.integrity.to_hex();
            hex == release.digest()
        });
        let entry = entry.expect("an index entry for each archive");
        assert_eq!(entry.size, release.archive().len());
        assert!(cacache::read_sync(&cache, &entry.key).unwrap() == release.archive());
    }
}

#[tokio::test]
async fn copying_the_folder_moves_the_cache() {
    let (mut upstream, releases, larder) = filled(&[]).await;
    let other = Setup::new(&upstream);
    let setup = larder.setup.clone();
    larder.terminate().await;
    let copied = Command::new("cp")
        .arg("-r")
        .args([setup.data_dir(), other.data_dir()])
        .status();
    assert!(copied.unwrap().success());
    upstream.stop();

    let larder = other.start().await;
    for release in &releases {
        let got = larder.client().get(&release.archive_url()).await;
        got.assert_is(&release.archive());
        got.assert_hit();
    }
}

#[tokio::test]
async fn a_second_writer_is_told_who_holds_the_data_dir() {
    let larder = Setup::without_upstream().start().await;
    let output = larder.setup.serve_command("127.0.0.1:0").output().unwrap();
    assert!(
        matches!(output.status.code(), Some(1 | 2)),
        "{:?}",
        output.status
    );
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(&larder.pid().to_string()), "{said}");
    assert_eq!(larder.client().page("/healthz").await.status, 200);
}

// --- Accidents ---

#[tokio::test]
async fn kill_9_in_the_middle_of_a_fill_leaves_nothing_after_a_start() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let setup = Setup::new(&upstream);
    for stall in [0, 1, 100_000, 290_000, u64::MAX] {
        println!("killed after {stall} bytes");
        let tap = Tap::at(stall);
        release.publish_archive(&upstream, Reply::archive(release.archive()).tapped(&tap));
        let larder = setup.start().await;
        let client = larder.client();
        client.get(&release.document_url()).await;
        let mut answer = client.stream(&release.archive_url()).await;
        let enough = stall.saturating_sub(20_000).min(250_000);
        answer.at_least(enough as usize).await;
        larder.kill().await;

        let larder = setup.start().await;
        assert_eq!(setup.staged(), Vec::<PathBuf>::new());
        for blob in setup.blobs() {
            assert_eq!(sha256(&std::fs::read(&blob).unwrap()), release.digest());
        }
        release.publish_archive(&upstream, Reply::archive(release.archive()));
        let client = larder.client();
        client.get(&release.document_url()).await;
        client
            .get(&release.archive_url())
            .await
            .assert_is(&release.archive());
        setup.holds(1).await;
        larder.terminate().await;
        assert_eq!(setup.command(&["verify"]).status().unwrap().code(), Some(0));
        let gc = setup.command(&["gc", "--max-size", "0"]).status().unwrap();
        assert_eq!((gc.code(), setup.blobs().len()), (Some(0), 0));
    }
}

#[tokio::test]
async fn what_lies_in_tmp_is_removed_at_the_start() {
    let setup = Setup::without_upstream();
    std::fs::create_dir_all(setup.data_dir().join("tmp/folder")).unwrap();
    std::fs::write(setup.data_dir().join("tmp/folder/part"), "half an archive").unwrap();
    std::fs::write(setup.data_dir().join("tmp/part"), "half an archive").unwrap();
    let _larder = setup.start().await;
    assert_eq!(setup.staged(), Vec::<PathBuf>::new());
}

/// The file looks untouched from outside: only hashing it finds out.
#[tokio::test]
async fn a_rotten_blob_is_refetched_on_its_first_hit_after_a_start() {
    let spoilers: [fn(&mut Vec<u8>); 3] = [
        |bytes| bytes[200_000] ^= 1,
        |bytes| *bytes.last_mut().unwrap() ^= 1,
        |bytes| bytes.truncate(100_000),
    ];
    for spoiler in spoilers {
        let (upstream, releases, larder) = filled(&[]).await;
        let setup = larder.setup.clone();
        let release = &releases[0];
        larder.terminate().await;
        spoil(&setup, release, spoiler, Times::Kept);

        let larder = setup.start().await;
        let got = larder.client().get(&release.archive_url()).await;

        got.assert_is(&release.archive());
        let (host, path) = release.archive_path();
        assert_eq!(upstream.gets(host, &path), 2);
        setup.holds(3).await;
        assert!(
            digests(&setup).contains(&release.digest()),
            "repaired on disk"
        );
    }
}

#[tokio::test]
async fn a_blob_that_changes_while_larder_runs_is_refetched() {
    let (upstream, releases, larder) = filled(&[]).await;
    let release = &releases[0];
    larder
        .client()
        .get(&release.archive_url())
        .await
        .assert_hit();
    spoil(&larder.setup, release, |bytes| bytes[7] ^= 1, Times::New);

    let got = larder.client().get(&release.archive_url()).await;

    got.assert_is(&release.archive());
    let (host, path) = release.archive_path();
    assert_eq!(upstream.gets(host, &path), 2);
}

#[tokio::test]
async fn a_rotten_blob_never_completes_without_upstream_and_is_removed() {
    let (mut upstream, releases, larder) = filled(&[]).await;
    let setup = larder.setup.clone();
    let release = &releases[0];
    larder.terminate().await;
    spoil(&setup, release, |bytes| bytes[0] ^= 1, Times::Kept);
    upstream.stop();

    let larder = setup.start().await;
    for range in ["bytes=0-", "bytes=0-99", "bytes=-1"] {
        let got = larder
            .client()
            .get_with(&release.archive_url(), &[("Range", range)])
            .await;
        assert!(!got.succeeded(), "{range}");
    }
    let got = larder.client().get(&release.archive_url()).await;
    assert!(!got.succeeded());
    setup.holds(2).await;
}

#[tokio::test]
async fn a_blob_that_is_gone_is_refetched() {
    let (upstream, releases, larder) = filled(&[]).await;
    let release = &releases[0];
    std::fs::remove_file(blob_of(&larder.setup, release)).unwrap();
    let got = larder.client().get(&release.archive_url()).await;
    got.assert_is(&release.archive());
    let (host, path) = release.archive_path();
    assert_eq!(upstream.gets(host, &path), 2);
    larder.setup.holds(3).await;
}

/// The index is an append-only file that a crash may have torn.
#[tokio::test]
async fn a_torn_index_stops_nothing() {
    let (_upstream, releases, larder) = filled(&[]).await;
    let setup = larder.setup.clone();
    larder.terminate().await;
    for file in files_below(&setup.data_dir().join("cache/index-v5")) {
        let mut bytes = std::fs::read(&file).unwrap();
        bytes.truncate(bytes.len() - 10);
        bytes.extend_from_slice(b"\nnonsense\t{\"key\":\n\xff\xfe");
        std::fs::write(&file, bytes).unwrap();
    }
    let larder = setup.start().await;
    for release in &releases {
        let got = larder.client().get(&release.archive_url()).await;
        got.assert_is(&release.archive());
    }
}

// --- Budget ---

#[tokio::test]
async fn the_least_recently_used_goes_first() {
    let (upstream, releases, larder) = filled(&["--max-size", "1MiB"]).await;
    // The first is used again, so the second is the oldest.
    larder
        .client()
        .get(&releases[0].archive_url())
        .await
        .assert_hit();
    let fourth = Release::new("hashicorp", "fourth", "1.0.0");
    fourth.publish(&upstream);

    fetch(&larder, &fourth).await;

    let kept = [&releases[0], &releases[2], &fourth].map(Release::digest);
    eventually("the second is evicted", || {
        digests(&larder.setup) == kept.clone().into()
    })
    .await;
    let client = larder.client();
    client.get(&releases[0].archive_url()).await.assert_hit();
    client
        .get(&releases[1].archive_url())
        .await
        .assert_is(&releases[1].archive());
}

#[tokio::test]
async fn a_restart_forgets_neither_the_budget_nor_the_order() {
    let (upstream, releases, larder) = filled(&["--max-size", "1MiB"]).await;
    let setup = larder.setup.clone();
    larder.terminate().await;
    let larder = setup.start().await;
    let fourth = Release::new("hashicorp", "fourth", "1.0.0");
    fourth.publish(&upstream);

    fetch(&larder, &fourth).await;

    let kept = [&releases[1], &releases[2], &fourth].map(Release::digest);
    eventually("the first is evicted", || {
        digests(&setup) == kept.clone().into()
    })
    .await;
}

#[tokio::test]
async fn a_smaller_budget_holds_from_the_next_start() {
    let (_upstream, releases, larder) = filled(&[]).await;
    let setup = larder.setup.clone();
    larder.terminate().await;
    let _larder = setup.clone().args(["--max-size", "700KiB"]).start().await;
    let kept = [&releases[1], &releases[2]].map(Release::digest);
    eventually("the first is evicted", || {
        digests(&setup) == kept.clone().into()
    })
    .await;
}

#[tokio::test]
async fn an_archive_larger_than_the_budget_passes_through_verified_and_unkept() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let larder = Setup::new(&upstream)
        .args(["--max-size", "100KiB"])
        .start()
        .await;
    let client = larder.client();
    client.get(&release.document_url()).await;
    let (host, path) = release.archive_path();
    for asked in 1..=2 {
        client
            .get(&release.archive_url())
            .await
            .assert_is(&release.archive());
        assert_eq!(upstream.gets(host, &path), asked);
        larder.setup.holds(0).await;
    }
    release.publish_archive(&upstream, Reply::archive(release.archive()).corrupt_at(99));
    assert!(!client.get(&release.archive_url()).await.succeeded());
    let got = client
        .get_with(&release.archive_url(), &[("Range", "bytes=0-")])
        .await;
    assert!(!got.succeeded());
    larder.setup.holds(0).await;
}

/// Reserved and stored together stay within the budget.
#[tokio::test]
async fn fills_at_the_same_time_do_not_burst_the_budget() {
    let upstream = Upstream::start();
    let larder = Setup::new(&upstream)
        .args(["--max-size", "1MiB"])
        .start()
        .await;
    let tap = Tap::at(100_000);
    let mut downloads = Vec::new();
    for name in ["a", "b", "c"] {
        let release = Release::sized("hashicorp", name, "1.0.0", 600 * KIB);
        release.publish(&upstream);
        release.publish_archive(&upstream, Reply::archive(release.archive()).tapped(&tap));
        let client = larder.client();
        client.get(&release.document_url()).await;
        let mut answer = client.stream(&release.archive_url()).await;
        let first = answer.at_least(10_000).await;
        downloads.push((release, answer, first));
    }
    tap.open();
    for (release, answer, first) in downloads {
        answer
            .finish_after(first)
            .await
            .assert_is(&release.archive());
        let sizes = larder
            .setup
            .blobs()
            .into_iter()
            .map(|blob| std::fs::metadata(blob).map_or(0, |data| data.len()));
        let stored: u64 = sizes.sum();
        assert!(stored <= 1 << 20, "{stored} bytes stored");
    }
    eventually("nothing staged", || larder.setup.staged().is_empty()).await;
}

#[tokio::test]
async fn eviction_never_breaks_a_reader() {
    let upstream = Upstream::start();
    // More than the kernel buffers for a reader that does not read.
    let release = Release::sized("hashicorp", "big", "1.0.0", 16 << 20);
    release.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    fetch(&larder, &release).await;
    larder.setup.holds(1).await;
    let mut reader = larder.client().stream(&release.archive_url()).await;
    let first = reader.at_least(1).await;

    let gc = larder
        .setup
        .command(&["gc", "--max-size", "0"])
        .output()
        .unwrap();

    assert!(gc.status.success(), "{gc:?}");
    larder.setup.holds(0).await;
    reader
        .finish_after(first)
        .await
        .assert_is(&release.archive());
}

#[tokio::test]
async fn a_full_disk_stops_no_client() {
    let Some(tight) = Tight::start().await else {
        return;
    };
    let client = &tight.client;
    let (host, path) = tight.release.archive_path();
    client.get(&tight.release.document_url()).await;

    // More than there is: known before the first byte.
    client
        .get(&tight.release.archive_url())
        .await
        .assert_is(&tight.release.archive());
    assert_eq!(tight.blobs(), 0);
    let corrupt = Reply::archive(tight.release.archive()).corrupt_at(99);
    tight.release.publish_archive(&tight.upstream, corrupt);
    assert!(!client.get(&tight.release.archive_url()).await.succeeded());
    assert_eq!(tight.upstream.gets(host, &path), 2);

    // What fits is kept as ever.
    let small = Release::new("hashicorp", "small", "1.0.0");
    small.publish(&tight.upstream);
    client.get(&small.document_url()).await;
    client
        .get(&small.archive_url())
        .await
        .assert_is(&small.archive());
    eventually("the small one is kept", || tight.blobs() == 1).await;
}

/// Where the disk is smaller than the budget, the least recently used makes room all the same.
#[tokio::test]
async fn a_full_disk_evicts_like_a_full_budget() {
    let Some(tight) = Tight::start().await else {
        return;
    };
    let client = &tight.client;
    for version in ["1.0.0", "2.0.0", "3.0.0"] {
        let medium = Release::sized("hashicorp", "medium", version, 1 << 20);
        medium.publish(&tight.upstream);
        let (host, path) = medium.archive_path();
        for _ in 0..2 {
            client.get(&medium.document_url()).await;
            let got = client.get(&medium.archive_url()).await;
            got.assert_is(&medium.archive());
            eventually("it is kept", || tight.blobs() > 0).await;
        }
        assert_eq!(tight.upstream.gets(host, &path), 1, "{version}");
    }
    // What could never fit makes nobody go.
    let held = tight.blobs();
    client.get(&tight.release.document_url()).await;
    let big = client.get(&tight.release.archive_url()).await;
    big.assert_is(&tight.release.archive());
    assert_eq!(tight.blobs(), held);
}

#[tokio::test]
async fn a_disk_that_fills_in_the_middle_stops_no_client() {
    for corrupt in [false, true] {
        let Some(tight) = Tight::start().await else {
            return;
        };
        let small = Release::sized("hashicorp", "small", "1.0.0", 1 << 20);
        small.publish(&tight.upstream);
        let tap = Tap::at(100_000);
        let mut reply = Reply::archive(small.archive()).tapped(&tap);
        if corrupt {
            reply = reply.corrupt_at(900_000);
        }
        small.publish_archive(&tight.upstream, reply);
        tight.client.get(&small.document_url()).await;
        let mut answer = tight.client.stream(&small.archive_url()).await;
        let first = answer.at_least(10_000).await;

        // Someone else takes what is left.
        let filler = tight.data_dir.join("filler");
        let full = std::fs::write(filler, vec![0; 8 << 20]);
        assert!(full.is_err(), "the disk is full now");
        tap.open();

        let got = answer.finish_after(first).await;
        match corrupt {
            false => got.assert_is(&small.archive()),
            true => assert!(!got.succeeded()),
        }
        // Documents are answered too, though nothing can be written.
        let versions = tight.client.get(&small.versions_url()).await;
        assert_eq!(versions.json(), small.versions());
    }
}

// --- Commands ---

#[tokio::test]
async fn verify_names_what_is_bad_and_touches_nothing_without_repair() {
    for serving in [true, false] {
        let (_upstream, releases, larder) = filled(&[]).await;
        let setup = larder.setup.clone();
        let larder = match serving {
            true => Some(larder),
            false => larder.terminate().await.and(None),
        };
        let clean = setup.command(&["verify"]).output().unwrap();
        assert_eq!(clean.status.code(), Some(0), "{clean:?}");
        assert!(!stdout(&clean).contains(&releases[0].digest()), "{clean:?}");

        spoil(&setup, &releases[0], |bytes| bytes[5] ^= 1, Times::Kept);
        std::fs::remove_file(blob_of(&setup, &releases[1])).unwrap();
        let found = setup.command(&["verify"]).output().unwrap();
        assert_eq!(found.status.code(), Some(1), "{found:?}");
        let lines = stdout(&found);
        for (release, bad) in releases.iter().zip([1, 1, 0]) {
            let digest = release.digest();
            let named = lines.lines().filter(|line| line.contains(&digest)).count();
            assert_eq!(named, bad, "{}: {lines}", release.name);
        }
        assert_eq!(setup.blobs().len(), 2, "nothing deleted");
        drop(larder);
    }
}

#[tokio::test]
async fn verify_repair_removes_the_bad_and_nothing_else() {
    let (_upstream, releases, larder) = filled(&[]).await;
    let setup = larder.setup.clone();
    larder.terminate().await;
    spoil(&setup, &releases[0], |bytes| bytes[5] ^= 1, Times::Kept);
    std::fs::remove_file(blob_of(&setup, &releases[1])).unwrap();

    let repair = setup.command(&["verify", "--repair"]).output().unwrap();

    assert!(matches!(repair.status.code(), Some(0 | 1)), "{repair:?}");
    assert_eq!(digests(&setup), BTreeSet::from([releases[2].digest()]));
    let again = setup.command(&["verify"]).output().unwrap();
    assert_eq!(again.status.code(), Some(0), "{again:?}");
    let larder = setup.start().await;
    for release in &releases {
        let got = larder.client().get(&release.archive_url()).await;
        got.assert_is(&release.archive());
    }
}

#[tokio::test]
async fn gc_evicts_the_least_recently_used_with_and_without_a_server() {
    for serving in [true, false] {
        let (upstream, releases, larder) = filled(&[]).await;
        larder
            .client()
            .get(&releases[0].archive_url())
            .await
            .assert_hit();
        let setup = larder.setup.clone();
        let larder = match serving {
            true => Some(larder),
            false => larder.terminate().await.and(None),
        };
        let gc = setup
            .command(&["gc", "--max-size", "400KiB"])
            .output()
            .unwrap();
        assert!(gc.status.success(), "serving {serving}: {gc:?}");
        eventually("one is left", || setup.blobs().len() == 1).await;
        if let Some(larder) = larder {
            assert_eq!(digests(&setup), BTreeSet::from([releases[0].digest()]));
            let client = larder.client();
            client.get(&releases[0].archive_url()).await.assert_hit();
            client
                .get(&releases[1].archive_url())
                .await
                .assert_is(&releases[1].archive());
            let (host, path) = releases[1].archive_path();
            assert_eq!(
                upstream.gets(host, &path),
                2,
                "the server knows that it is gone"
            );
        }
    }
}

#[tokio::test]
async fn gc_by_age_evicts_what_was_not_used_for_so_long() {
    let (_upstream, _releases, larder) = filled(&[]).await;
    let setup = larder.setup.clone();
    larder.terminate().await;
    for (age, left) in [("1h", 3), ("0s", 0)] {
        let gc = setup
            .command(&["gc", "--unused-for", age])
            .output()
            .unwrap();
        assert!(gc.status.success(), "{gc:?}");
        assert_eq!(setup.blobs().len(), left, "{age}");
    }
}

/// Three providers of 300 KiB, fetched in order.
/// A commit or an eviction under way is nothing bad.
#[tokio::test]
async fn verify_beside_a_busy_server_finds_nothing() {
    let upstream = Upstream::start();
    let larder = Setup::new(&upstream)
        .args(["--max-size", "3MB"])
        .start()
        .await;
    let client = larder.client();
    let over = std::sync::atomic::AtomicBool::new(false);
    let work = async {
        for round in 0.. {
            if over.load(std::sync::atomic::Ordering::Relaxed) {
                break;
            }
            let product = Product::new("terraform", &format!("1.0.{round}"));
            product.publish(&upstream);
            client
                .get(&product.archive_url())
                .await
                .assert_is(&product.archive);
        }
    };
    let setup = larder.setup.clone();
    let verify = async {
        for _ in 0..10 {
            let mut command = setup.command(&["verify"]);
            let output = tokio::task::spawn_blocking(move || command.output().unwrap());
            let output = output.await.unwrap();
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stdout)
            );
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
    };
    tokio::join!(work, verify);
}

async fn filled(options: &[&str]) -> (Upstream, Vec<Release>, Larder) {
    let upstream = Upstream::start();
    let larder = Setup::new(&upstream)
        .args(options.iter().copied())
        .start()
        .await;
    let mut releases = Vec::new();
    for (held, name) in ["first", "second", "third"].into_iter().enumerate() {
        let release = Release::new("hashicorp", name, "1.0.0");
        release.publish(&upstream);
        fetch(&larder, &release).await;
        larder.setup.holds(held + 1).await;
        releases.push(release);
    }
    (upstream, releases, larder)
}

async fn fetch(larder: &Larder, release: &Release) {
    let client = larder.client();
    client.get(&release.document_url()).await;
    client
        .get(&release.archive_url())
        .await
        .assert_is(&release.archive());
}

/// What the blobs on disk really are.
fn digests(setup: &Setup) -> BTreeSet<String> {
    let blobs = setup.blobs().into_iter();
    let bytes = blobs.filter_map(|blob| std::fs::read(blob).ok());
    bytes.map(|bytes| sha256(&bytes)).collect()
}

fn blob_of(setup: &Setup, release: &Release) -> PathBuf {
    let digest = release.digest();
    let (a, b, rest) = (&digest[..2], &digest[2..4], &digest[4..]);
    setup
        .data_dir()
        .join("cache/content-v2/sha256")
        .join(a)
        .join(b)
        .join(rest)
}

#[derive(PartialEq)]
enum Times {
    /// As a failing disk does it.
    Kept,
    New,
}

fn spoil(setup: &Setup, release: &Release, how: impl FnOnce(&mut Vec<u8>), times: Times) {
    let blob = blob_of(setup, release);
    let modified = std::fs::metadata(&blob).unwrap().modified().unwrap();
    let mut bytes = std::fs::read(&blob).unwrap();
    how(&mut bytes);
    // Blobs may be read-only: another file takes the place.
    std::fs::remove_file(&blob).unwrap();
    std::fs::write(&blob, bytes).unwrap();
    if times == Times::Kept {
        let file = std::fs::File::options().write(true).open(&blob).unwrap();
        file.set_modified(modified).unwrap();
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A larder whose data dir is a disk of 3 MiB of its own, in a mount namespace.
pub struct Tight {
    pub upstream: Upstream,
    /// Larger than the disk.
    release: Release,
    pub client: Client,
    /// As seen from outside of the namespace.
    pub data_dir: PathBuf,
    _larder: Larder,
}

impl Tight {
    /// None where this machine permits no namespaces.
    pub async fn start() -> Option<Self> {
        if !mounts_are_possible() {
            return None;
        }
        let upstream = Upstream::start();
        let release = Release::sized("hashicorp", "big", "1.0.0", 4 << 20);
        release.publish(&upstream);
        let setup = Setup::new(&upstream).args(["--max-size", "1GiB"]);
        std::fs::create_dir(setup.data_dir()).unwrap();
        let serve = setup.serve_command("127.0.0.1:0");
        let mut command = Command::new("unshare");
        setup.cleanse(&mut command);
        let script = "mount -t tmpfs -o size=3m none \"$1\" && shift && exec \"$@\"";
        command
            .args(["-rm", "sh", "-c", script, "sh"])
            .arg(setup.data_dir());
        command.arg(binary()).args(serve.get_args());
        let larder = setup.spawn(command).await;

        let root = Path::new("/proc")
            .join(larder.pid().to_string())
            .join("root");
        let inside = setup.data_dir();
        let data_dir = root.join(inside.strip_prefix("/").unwrap());
        let ca = std::fs::read(data_dir.join("ca/ca.pem")).unwrap();
        Some(Self {
            upstream,
            release,
            client: Client::new(larder.addr, &ca),
            data_dir,
            _larder: larder,
        })
    }

    pub fn blobs(&self) -> usize {
        files_below(&self.data_dir.join("cache/content-v2")).len()
    }
}

/// Whether this machine permits mount namespaces to this user; says so if not.
pub fn mounts_are_possible() -> bool {
    let possible = Command::new("unshare").args(["-rm", "true"]).status();
    if possible.is_ok_and(|status| status.success()) {
        return true;
    }
    assert!(!is_required("unshare"), "no mount namespaces here");
    println!("skipped: no mount namespaces here (unshare -rm)");
    false
}
