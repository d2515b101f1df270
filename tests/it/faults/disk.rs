//! A disk that is full or read-only.

use std::process::Command;

use crate::common::larder::binary;
use crate::common::*;
use crate::store::{Tight, mounts_are_possible};

#[tokio::test]
async fn once_a_full_disk_has_room_documents_and_archives_are_kept_again() {
    let Some(tight) = Tight::start().await else {
        return;
    };
    let client = &tight.client;
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&tight.upstream);
    // Without validators: upstream sends the whole each time.
    let document = Reply::json(release.document("linux_amd64").to_string());
    let path = release.document_path("linux_amd64");
    tight.upstream.route(TERRAFORM, &path, document);
    let versions = Reply::json(release.versions().to_string());
    tight
        .upstream
        .route(TERRAFORM, &release.versions_path(), versions);
    let documents = || files_below(&tight.data_dir.join("metadata")).len();
    let filler = tight.data_dir.join("filler");
    let full = std::fs::write(&filler, vec![0; 8 << 20]);
    assert!(full.is_err(), "the disk is full now");

    let ask = async || {
        let document = client.get(&release.document_url()).await;
        assert_eq!(document.json(), release.document("linux_amd64"));
        let versions = client.get(&release.versions_url()).await;
        assert_eq!(versions.json(), release.versions());
        let got = client.get(&release.archive_url()).await;
        got.assert_is(&release.archive());
        got
    };
    for _ in 0..2 {
        ask().await;
        assert_eq!((documents(), tight.blobs()), (0, 0));
        assert_eq!(files_below(&tight.data_dir.join("tmp")).len(), 0);
    }
    std::fs::remove_file(filler).unwrap();
    ask().await;
    eventually("all is kept", || documents() >= 2 && tight.blobs() == 1).await;
    ask().await.assert_hit();
}

#[tokio::test]
async fn a_disk_that_becomes_read_only_stops_no_client() {
    let Some(mounted) = Mounted::start().await else {
        return;
    };
    let Mounted { upstream, larder } = &mounted;
    let client = larder.client();
    let names = ["held", "half", "new", "bad"];
    let releases = names.map(|name| Release::new("hashicorp", name, "1.0.0"));
    let [held, half, new, bad] = &releases;
    releases
        .iter()
        .for_each(|release| release.publish(upstream));
    let tap = Tap::at(100_000);
    half.publish_archive(upstream, Reply::archive(half.archive()).tapped(&tap));
    bad.publish_archive(upstream, Reply::archive(bad.archive()).corrupt_at(290_000));
    for release in [held, half] {
        client.get(&release.document_url()).await;
    }
    let got = client.get(&held.archive_url()).await;
    got.assert_is(&held.archive());
    larder.setup.holds(1).await;
    let mut download = client.stream(&half.archive_url()).await;
    let first = download.at_least(50_000).await;

    // Another mount over the same folder: on this one nothing is open for writing.
    mounted.shell("mount --bind $1 $1 && mount -o remount,bind,ro $1 && ! touch $1/x");
    tap.open();

    let got = download.finish_after(first).await;
    got.assert_is(&half.archive());
    for _ in 0..2 {
        let got = client.get(&held.archive_url()).await;
        got.assert_is(&held.archive());
        got.assert_hit();
        let document = client.get(&new.document_url()).await;
        assert_eq!(document.json(), new.document("linux_amd64"));
        let got = client.get(&new.archive_url()).await;
        got.assert_is(&new.archive());
        let rest = [("Range", "bytes=5-")];
        let got = client.get_with(&new.archive_url(), &rest).await;
        assert!(got.succeeded() && got.body == new.archive()[5..]);
        client.get(&bad.document_url()).await;
        assert!(!client.get(&bad.archive_url()).await.succeeded());
    }
    assert_eq!(larder.setup.blobs().len(), 1);

    mounted.shell("umount $1 && touch $1/x && rm $1/x");
    for release in [half, new] {
        let got = client.get(&release.archive_url()).await;
        got.assert_is(&release.archive());
    }
    eventually("all are kept", || larder.setup.blobs().len() == 3).await;
    for release in [held, half, new] {
        let got = client.get(&release.archive_url()).await;
        got.assert_is(&release.archive());
        got.assert_hit();
    }
    assert!(!client.get(&bad.archive_url()).await.succeeded());
    assert!(larder.log_with(&["panicked"]).is_empty());
}

/// Commands that only read need no more than that; a server does, and says so.
#[tokio::test]
async fn a_read_only_data_dir_can_be_verified_and_not_served() {
    if !mounts_are_possible() {
        return;
    }
    let setup = Setup::without_upstream();
    setup.start().await.terminate().await;
    let script = "mount --bind $1 $1 && mount -o remount,bind,ro $1 && shift && exec \"$@\"";
    let run = |command: Command| {
        let mut wrapped = Command::new("timeout");
        setup.cleanse(&mut wrapped);
        wrapped.args(["20", "unshare", "-rm", "sh", "-c", script, "sh"]);
        wrapped.arg(setup.data_dir()).arg(binary());
        wrapped.args(command.get_args()).output().unwrap()
    };
    for arguments in [&["verify"][..], &["ca", "show"]] {
        let output = run(setup.command(arguments));
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {output:?}");
    }
    let offline = setup.clone().arg("--offline");
    for command in [
        setup.serve_command("127.0.0.1:0"),
        offline.serve_command("127.0.0.1:0"),
        setup.command(&["gc"]),
        setup.command(&["verify", "--repair"]),
    ] {
        let output = run(command);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        let folder = setup.data_dir().to_str().unwrap().to_owned();
        for words in [&*folder, "Read-only file system", "--data-dir"] {
            assert!(said.contains(words), "no {words:?} in {said}");
        }
    }
}

/// A larder in a mount namespace of its own.
struct Mounted {
    upstream: Upstream,
    larder: Larder,
}

impl Mounted {
    /// None where this machine permits no namespaces.
    async fn start() -> Option<Self> {
        if !mounts_are_possible() {
            return None;
        }
        let upstream = Upstream::start();
        let setup = Setup::new(&upstream);
        let serve = setup.serve_command("127.0.0.1:0");
        let mut command = Command::new("unshare");
        setup.cleanse(&mut command);
        command.arg("-rm").arg(binary()).args(serve.get_args());
        let larder = setup.spawn(command).await;
        Some(Self { upstream, larder })
    }

    /// Runs a script in the namespace, with the data dir as `$1`.
    #[track_caller]
    fn shell(&self, script: &str) {
        let pid = self.larder.pid().to_string();
        let mut command = Command::new("nsenter");
        command.args(["-t", &pid, "-U", "-m", "--preserve-credentials"]);
        command.args(["sh", "-c", script, "sh"]);
        let output = command.arg(self.larder.setup.data_dir()).output().unwrap();
        assert!(output.status.success(), "{script}: {output:?}");
    }
}
