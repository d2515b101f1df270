//! Private registries: folders of releases.

use std::path::{Path, PathBuf};

use crate::by_name::ca_free;
use crate::common::registry::{provider_zip, sums_line};
use crate::common::signing::Signer;
use crate::common::*;
use crate::terraform::{Project, no_terraform, succeeded};

const HOST: &str = "tf.corp.example";

/// A registry's folder, and a larder set up for it.
struct Corp {
    dir: PathBuf,
    setup: Setup,
}

impl Corp {
    fn new(upstream: &Upstream) -> Self {
        Self::with(upstream, HOST, "")
    }

    fn with(upstream: &Upstream, host: &str, more: &str) -> Self {
        let setup = Setup::new(upstream);
        let dir = setup.path("releases");
        std::fs::create_dir(&dir).unwrap();
        let text = format!(
            "{more}\n[[registry]]\nhost = \"{host}\"\ndir = \"{}\"\n",
            dir.display()
        );
        let setup = setup.config(&text);
        Self { dir, setup }
    }

    fn put(&self, path: &str, bytes: impl AsRef<[u8]>) {
        let path = self.dir.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    /// An unsigned release for this machine's platform.
    fn release(&self, name: &str, version: &str) -> Vec<u8> {
        let zip = provider_zip(name, version, 200_000).to_vec();
        self.put(&archive_path(name, version, "linux_amd64"), &zip);
        zip
    }
}

fn archive_path(name: &str, version: &str, platform: &str) -> String {
    format!("corp/{name}/terraform-provider-{name}_{version}_{platform}.zip")
}

fn url(path: &str) -> String {
    format!("https://{HOST}{path}")
}

const VERSIONS: &str = "/v1/providers/corp/thing/versions";
const DOWNLOAD: &str = "/v1/providers/corp/thing/1.0.0/download/linux/amd64";

#[tokio::test]
async fn a_folder_answers_as_a_registry_and_new_files_appear_by_themselves() {
    let upstream = Upstream::start();
    let corp = Corp::new(&upstream);
    let zip = corp.release("thing", "1.0.0");
    let larder = corp.setup.start().await;
    let client = larder.client();

    let discovery = client.get(&url("/.well-known/terraform.json")).await;
    assert_eq!(discovery.header("content-type"), Some("application/json"));
    assert_eq!(discovery.json()["providers.v1"], "/v1/providers/");
    let list = client.get(&url(VERSIONS)).await.json();
    assert_eq!(list["versions"][0]["version"], "1.0.0");
    assert_eq!(list["versions"][0]["protocols"][0], "5.0");
    assert_eq!(list["versions"][0]["platforms"][0]["arch"], "amd64");
    let document = client.get(&url(DOWNLOAD)).await.json();
    assert_eq!(document["shasum"], sha256(&zip));
    assert_eq!(
        document["filename"],
        "terraform-provider-thing_1.0.0_linux_amd64.zip"
    );
    let file = |key: &str| url(document[key].as_str().unwrap());
    client.get(&file("download_url")).await.assert_is(&zip);
    let sums = client.get(&file("shasums_url")).await.text();
    assert_eq!(
        sums,
        sums_line("terraform-provider-thing_1.0.0_linux_amd64.zip", &zip)
    );
    assert!(
        !client
            .get(&file("shasums_signature_url"))
            .await
            .body
            .is_empty()
    );
    larder.setup.holds(1).await;
    let part = client
        .get_with(&file("download_url"), &[("Range", "bytes=10-19")])
        .await;
    assert_eq!((part.status, &part.body[..]), (206, &zip[10..20]));

    // Another platform, another version, another provider: at once.
    corp.put(
        &archive_path("thing", "1.0.0", "darwin_arm64"),
        provider_zip("thing", "1.0.0", 9_000),
    );
    corp.release("thing", "1.1.0");
    corp.release("other", "0.1.0");
    let list = client.get(&url(VERSIONS)).await.json();
    let versions: Vec<_> = list["versions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v["version"].as_str().unwrap())
        .collect();
    assert_eq!(versions, ["1.0.0", "1.1.0"]);
    let other = client.get(&url("/v1/providers/corp/other/versions")).await;
    assert_eq!(other.status, 200);
    // What was named before stays what it was; what is named now lists all.
    assert_eq!(client.get(&file("shasums_url")).await.text(), sums);
    let now = client.get(&url(DOWNLOAD)).await.json();
    let sums = client
        .get(&url(now["shasums_url"].as_str().unwrap()))
        .await
        .text();
    assert_eq!(sums.lines().count(), 2, "{sums}");
    client.get(&file("download_url")).await.assert_is(&zip);
    assert_eq!(
        client
            .get(&url("/v1/providers/corp/none/versions"))
            .await
            .status,
        404
    );
    assert_eq!(upstream.connections(), 0);
}

#[tokio::test]
async fn what_is_wrong_is_refused_by_name_and_the_rest_is_served() {
    let upstream = Upstream::start();
    let corp = Corp::new(&upstream);
    let good = corp.release("thing", "1.0.0");
    // Half a zip, as a copy that goes on leaves it.
    corp.put(
        &archive_path("thing", "2.0.0", "linux_amd64"),
        &good[..good.len() / 2],
    );
    corp.put("corp/thing/thing-3.0.0.zip", &good);
    corp.put(
        "corp/thing/terraform-provider-else_3.0.0_linux_amd64.zip",
        &good,
    );
    corp.put(&archive_path("thing", "4.0.0", "linux_amd64"), &good);
    corp.put(
        "corp/thing/terraform-provider-thing_4.0.0_SHA256SUMS",
        sums_line("terraform-provider-thing_4.0.0_linux_amd64.zip", b"x"),
    );
    corp.put(&archive_path("thing", "5.0.0", "linux_amd64"), &good);
    corp.put(
        "corp/thing/terraform-provider-thing_5.0.0_SHA256SUMS",
        sums_line("terraform-provider-thing_5.0.0_darwin_amd64.zip", b"x"),
    );
    let outside = corp
        .setup
        .path("terraform-provider-thing_6.0.0_linux_amd64.zip");
    std::fs::write(&outside, &good).unwrap();
    std::os::unix::fs::symlink(
        &outside,
        corp.dir.join(archive_path("thing", "6.0.0", "linux_amd64")),
    )
    .unwrap();
    let elsewhere = corp.setup.path("elsewhere");
    std::fs::create_dir_all(elsewhere.join("thing")).unwrap();
    std::os::unix::fs::symlink(&elsewhere, corp.dir.join("linked")).unwrap();
    // A link within is as good as what it leads to.
    std::os::unix::fs::symlink(
        "terraform-provider-thing_1.0.0_linux_amd64.zip",
        corp.dir.join(archive_path("thing", "7.0.0", "linux_amd64")),
    )
    .unwrap();
    corp.put(&archive_path("thing", "8.0.0", "linux_amd64"), &good);
    corp.put(
        "corp/thing/terraform-provider-thing_8.0.0_SHA256SUMS",
        sums_line("terraform-provider-thing_8.0.0_linux_amd64.zip", &good),
    );
    corp.put(
        "corp/thing/terraform-provider-thing_8.0.0_SHA256SUMS.sig",
        Signer::new().sign(b"other"),
    );
    corp.put("corp/keys/signer.asc", Signer::new().public().armored);
    let larder = corp.setup.start().await;
    let client = larder.client();

    let list = client.get(&url(VERSIONS)).await.json();
    let versions: Vec<_> = list["versions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v["version"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(versions, ["1.0.0", "7.0.0"]);
    for (name, why) in [
        ("thing_2.0.0", "no whole zip"),
        ("thing-3.0.0.zip", "wrong name"),
        ("else_3.0.0", "not of thing"),
        ("thing_4.0.0", "SHA256SUMS says"),
        ("thing_5.0.0", "not listed"),
        ("thing_6.0.0", "out of the folder"),
        ("thing_8.0.0", "no good signature"),
        ("linked", "out of the folder"),
    ] {
        larder.logs(&[name, why]).await;
    }
    for version in ["2.0.0", "6.0.0"] {
        let path = DOWNLOAD.replace("1.0.0", version);
        assert_eq!(client.get(&url(&path)).await.status, 404);
        let file = format!(
            "/v1/files/{}",
            archive_path("thing", version, "linux_amd64")
        );
        assert_eq!(client.get(&url(&file)).await.status, 404);
    }
    for path in [
        "/v1/files/corp/thing/..%2f..%2fhome",
        "/v1/providers/linked/thing/versions",
        "/v1/files/../x",
    ] {
        assert!(client.get(&url(path)).await.status >= 400, "{path}");
    }
    // The copy comes to its end.
    corp.put(&archive_path("thing", "2.0.0", "linux_amd64"), &good);
    let list = client.get(&url(VERSIONS)).await.text();
    assert!(list.contains("2.0.0"), "{list}");
}

#[tokio::test]
async fn publishers_sums_signatures_keys_and_protocols_are_passed_as_they_are() {
    let upstream = Upstream::start();
    let corp = Corp::new(&upstream);
    let zip = corp.release("thing", "1.0.0");
    let signer = Signer::new();
    let mut sums = sums_line("terraform-provider-thing_1.0.0_linux_amd64.zip", &zip);
    sums.push_str(&sums_line(
        "terraform-provider-thing_1.0.0_manifest.json",
        b"{}",
    ));
    let signature = signer.sign(sums.as_bytes());
    let stem = "corp/thing/terraform-provider-thing_1.0.0";
    corp.put(&format!("{stem}_SHA256SUMS"), &sums);
    corp.put(&format!("{stem}_SHA256SUMS.sig"), &signature);
    corp.put(
        &format!("{stem}_manifest.json"),
        r#"{"version":1,"metadata":{"protocol_versions":["6.0","5.1"]}}"#,
    );
    corp.put("keys/all.asc", Signer::new().public().armored);
    corp.put("corp/thing/keys/own.asc", signer.public().armored);
    let larder = corp.setup.start().await;
    let client = larder.client();
    let document = client.get(&url(DOWNLOAD)).await.json();
    assert_eq!(document["protocols"], serde_json::json!(["6.0", "5.1"]));
    let keys = document["signing_keys"]["gpg_public_keys"]
        .as_array()
        .unwrap();
    assert_eq!(keys.len(), 1);
    assert_eq!(keys[0]["key_id"], signer.public().id);
    let file = |key: &str| url(document[key].as_str().unwrap());
    assert_eq!(client.get(&file("shasums_url")).await.text(), sums);
    assert_eq!(
        client.get(&file("shasums_signature_url")).await.body,
        signature
    );
}

#[tokio::test]
async fn documents_whose_archives_lie_elsewhere_are_fetched_verified_and_kept() {
    let upstream = Upstream::start();
    let corp = Corp::new(&upstream);
    let release = Release::new("someone", "thing", "1.0.0").on(TERRAFORM, Home::GitHub);
    release.publish(&upstream);
    corp.put("corp/thing/versions.json", release.versions().to_string());
    corp.put(
        "corp/thing/1.0.0/download/linux/amd64.json",
        release.document("linux_amd64").to_string(),
    );
    corp.put("corp/thing/2.0.0/download/linux/amd64.json", "{}");
    let larder = corp.setup.start().await;
    let client = larder.client();
    assert_eq!(client.get(&url(VERSIONS)).await.json(), release.versions());
    let document = client.get(&url(DOWNLOAD)).await.json();
    let archive = document["download_url"].as_str().unwrap();
    assert!(archive.starts_with(&url("/.larder/")), "{archive}");
    client.get(archive).await.assert_is(&release.archive());
    larder.setup.holds(1).await;
    client.get(archive).await.assert_hit();
    assert_eq!(
        client
            .get(&url(&DOWNLOAD.replace("1.0.0", "2.0.0")))
            .await
            .status,
        404
    );
    larder.logs(&["amd64.json"]).await;
}

#[tokio::test]
async fn modules_are_served_for_both_clients() {
    let upstream = Upstream::start();
    let corp = Corp::new(&upstream);
    let zip = provider_zip("any", "1", 5_000);
    corp.put("corp/net/aws/1.0.0.zip", &zip);
    corp.put("corp/net/aws/latest.zip", &zip);
    corp.put("corp/net/aws/2.0.0.tar.gz", b"\x1f\x8b no gzip");
    let larder = corp.setup.start().await;
    let client = larder.client();
    let list = client
        .get(&url("/v1/modules/corp/net/aws/versions"))
        .await
        .json();
    assert_eq!(
        list["modules"][0]["versions"],
        serde_json::json!([{ "version": "1.0.0" }])
    );
    let at = client
        .get(&url("/v1/modules/corp/net/aws/1.0.0/download"))
        .await;
    assert_eq!(at.header("x-terraform-get"), Some("./1.0.0.zip"));
    assert_eq!(at.json()["location"], "./1.0.0.zip");
    client
        .get(&url("/v1/modules/corp/net/aws/1.0.0/1.0.0.zip"))
        .await
        .assert_is(&zip);
    for (name, why) in [
        ("latest.zip", "wrong name"),
        ("2.0.0.tar.gz", "no whole gzip"),
    ] {
        larder.logs(&[name, why]).await;
    }
}

#[tokio::test]
async fn a_private_registry_answers_offline_and_to_the_mirror() {
    let upstream = Upstream::start();
    let corp = Corp::new(&upstream);
    let zip = corp.release("thing", "1.0.0");
    let larder = corp.setup.clone().arg("--offline").start().await;
    let client = larder.client();
    let base = format!("/mirror/{HOST}/corp/thing");
    let version = client.page(&format!("{base}/1.0.0.json")).await.json();
    let hashes = version["archives"]["linux_amd64"]["hashes"].clone();
    assert_eq!(hashes[0], format!("zh:{}", sha256(&zip)));
    let archive = client
        .page(&format!(
            "{base}/terraform-provider-thing_1.0.0_linux_amd64.zip"
        ))
        .await;
    archive.assert_is(&zip);
}

/// By the running larder, and without one.
#[tokio::test]
async fn doctor_names_what_is_not_served() {
    let upstream = Upstream::start();
    let corp = Corp::new(&upstream);
    let good = corp.release("thing", "1.0.0");
    let doctor = |corp: &Corp| {
        let mut command = corp.setup.command_with_options(&["doctor", "--offline"]);
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let lines = said.lines().filter(|line| line.contains("registry: "));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let lines = doctor(&corp);
    assert!(lines.len() == 1 && lines[0].starts_with("ok"), "{lines:?}");
    let cut = archive_path("thing", "2.0.0", "linux_amd64");
    corp.put(&cut, &good[..1000]);
    for running in [false, true] {
        let larder = match running {
            true => Some(corp.setup.start().await),
            false => None,
        };
        if let Some(larder) = &larder {
            larder.logs(&["2.0.0", "no whole zip"]).await;
        }
        let lines = doctor(&corp);
        assert!(
            lines.len() == 1 && lines[0].starts_with("FAIL"),
            "{lines:?}"
        );
        assert!(
            lines[0].contains(&cut) && lines[0].contains("no whole zip"),
            "{lines:?}"
        );
    }
}

#[test]
fn a_folder_that_is_not_there_and_a_public_host_are_refused() {
    for (host, dir, word) in [
        ("tf.corp.example", "/nowhere", "no folder"),
        ("registry.terraform.io", "/tmp", "public host"),
    ] {
        let text = format!("[[registry]]\nhost = \"{host}\"\ndir = \"{dir}\"\n");
        let setup = Setup::without_upstream().config(&text);
        assert_refuses_to_start(setup.serve_command("127.0.0.1:0"), 2, &["registry", word]);
    }
}

fn add(corp: &Corp, args: &[&str]) -> std::process::Output {
    let config = corp.setup.path("larder.toml");
    let mut command =
        corp.setup
            .command(&["registry", "add", "--config", config.to_str().unwrap()]);
    command.args(args).output().unwrap()
}

#[test]
fn add_checks_and_places_and_changes_nothing_else() {
    let upstream = Upstream::start();
    let corp = Corp::new(&upstream);
    let file = |name: &str, bytes: &[u8]| {
        let path = corp.setup.path(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let zip = provider_zip("thing", "1.0.0", 20_000);
    let good = file("terraform-provider-thing_1.0.0_linux_amd64.zip", &zip);
    let cut = file(
        "terraform-provider-thing_1.0.0_darwin_amd64.zip",
        &zip[..9_000],
    );
    let odd = file("terraform-provider-thing_1.0.0_plan_amd64.zip", &zip);
    let named = file("thing.zip", &zip);
    let other = file("terraform-provider-other_1.0.0_linux_amd64.zip", &zip);
    for (bad, why) in [
        (&cut, "no whole zip"),
        (&odd, "no platform"),
        (&named, "wrong name"),
        (&other, "no program"),
    ] {
        let output = add(&corp, &["--namespace", "corp", &good, bad]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(&**bad) && said.contains(why), "{said}");
        assert_eq!(files_below(&corp.dir), Vec::<PathBuf>::new());
    }
    assert_eq!(add(&corp, &[&good]).status.code(), Some(2));
    succeeded(&add(
        &corp,
        &["--namespace", "corp", "--protocol", "6.0", &good],
    ));
    let placed = corp
        .dir
        .join("corp/thing/terraform-provider-thing_1.0.0_linux_amd64.zip");
    assert_eq!(std::fs::read(&placed).unwrap(), zip);
    let manifest = corp
        .dir
        .join("corp/thing/terraform-provider-thing_1.0.0_manifest.json");
    assert!(std::fs::read_to_string(manifest).unwrap().contains("6.0"));
    // Again is fine; other content is not.
    succeeded(&add(&corp, &[&good]));
    file(
        "terraform-provider-thing_1.0.0_linux_amd64.zip",
        &provider_zip("thing", "1.0.0", 30_000),
    );
    let changed = add(&corp, &[&good]);
    assert_eq!(changed.status.code(), Some(1));
    assert_eq!(std::fs::read(&placed).unwrap(), zip);
    assert_eq!(files_below(&corp.dir).len(), 2);
}

#[test]
fn keygen_makes_one_key_and_prints_its_public_part() {
    let upstream = Upstream::start();
    let corp = Corp::new(&upstream);
    let keygen = || {
        corp.setup
            .command(&["registry", "keygen"])
            .output()
            .unwrap()
    };
    let (first, second) = (keygen(), keygen());
    succeeded(&first);
    assert_eq!(first.stdout, second.stdout);
    let text = String::from_utf8(first.stdout).unwrap();
    assert!(text.starts_with("-----BEGIN PGP PUBLIC KEY"), "{text}");
}

/// Through the proxy, without a CA, and by larder's own name.
#[tokio::test]
async fn terraform_installs_a_private_provider_and_a_module_by_every_way() {
    if no_terraform() {
        return;
    }
    let upstream = Upstream::start();
    let port = free_port();
    let host = format!("localhost:{port}");
    let corp = Corp::with(&upstream, &host, "");
    corp.release("thing", "1.0.0");
    corp.put("corp/net/aws/1.0.0.zip", module_zip());
    let text = std::fs::read_to_string(corp.setup.path("larder.toml")).unwrap();
    let text = format!(
        "{text}\n[[registry]]\nhost = \"{HOST}\"\ndir = \"{}\"\n",
        corp.dir.display()
    );
    let setup = corp.setup.clone().config(&text);
    let larder = setup.start_on(&format!("127.0.0.1:{port}")).await;
    let main = |host: &str| {
        let provider = format!(
            "terraform {{\n  required_providers {{\n    thing = {{ source = \"{host}/corp/thing\" }}\n  }}\n}}\n"
        );
        // A module's host must have a dot.
        let module = format!(
            "module \"net\" {{\n  source = \"{HOST}/corp/net/aws\"\n  version = \"1.0.0\"\n}}\n"
        );
        match host.contains(':') {
            true => provider,
            false => provider + &module,
        }
    };
    let config = ca_free(&larder, &[]);
    let ca = setup.ca_pem();
    let ca = ca.to_str().unwrap();
    let proxy = format!("http://{}", larder.addr);
    let mut locks = Vec::new();
    for (name, host, variables) in [
        (
            "proxied",
            HOST,
            vec![("HTTPS_PROXY", &*proxy), ("SSL_CERT_FILE", ca)],
        ),
        ("free", HOST, vec![("TF_CLI_CONFIG_FILE", &*config)]),
        ("direct", &host, vec![("SSL_CERT_FILE", ca)]),
    ] {
        let project = Project::new(&larder, name, &[]);
        std::fs::write(project.path("main.tf"), main(host)).unwrap();
        let output = project.init_with(&variables);
        succeeded(&output);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains("self-signed"), "{said}");
        let installed = files_below(&project.path(".terraform/modules"));
        let module = installed.iter().any(|file| file.ends_with("main.tf"));
        assert_eq!(module, host == HOST, "{installed:?}");
        locks.push(project.lock().replace(host, "HOST"));
    }
    assert!(
        locks
            .iter()
            .all(|lock| *lock == locks[0] && lock.contains("zh:")),
        "{locks:?}"
    );
    assert_eq!(upstream.connections(), 0);
}

fn module_zip() -> Vec<u8> {
    use std::io::Write as _;
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    zip.start_file("main.tf", zip::write::SimpleFileOptions::default())
        .unwrap();
    zip.write_all(b"output \"x\" {\n  value = 1\n}\n").unwrap();
    zip.finish().unwrap().into_inner()
}

/// HashiCorp's own zip, with its own sums and signature, under another namespace.
#[tokio::test]
async fn a_real_signed_provider_is_served_under_another_namespace() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let read = |name: &str| std::fs::read(data.join(name)).unwrap();
    let upstream = Upstream::start();
    let corp = Corp::new(&upstream);
    let name = "corp/null/terraform-provider-null_3.1.0";
    corp.put(
        &format!("{name}_SHA256SUMS"),
        read("terraform-provider-null_3.1.0_SHA256SUMS"),
    );
    let signature = read("signing/terraform-provider-null_3.1.0_SHA256SUMS.72D7468F.sig");
    corp.put(&format!("{name}_SHA256SUMS.72D7468F.sig"), &signature);
    // Not the archive that HashiCorp signed for.
    corp.put(
        &format!("{name}_linux_amd64.zip"),
        provider_zip("null", "3.1.0", 9_000),
    );
    let larder = corp.setup.start().await;
    let versions = larder
        .client()
        .get(&url("/v1/providers/corp/null/versions"))
        .await;
    assert_eq!(versions.status, 404);
    larder
        .logs(&["null_3.1.0_linux_amd64", "SHA256SUMS says"])
        .await;
}

#[tokio::test]
async fn no_private_key_is_ever_shown_and_the_key_that_signed_is_named() {
    let upstream = Upstream::start();
    let corp = Corp::new(&upstream);
    let zip = corp.release("thing", "1.0.0");
    let signer = Signer::new();
    let sums = sums_line("terraform-provider-thing_1.0.0_linux_amd64.zip", &zip);
    let stem = "corp/thing/terraform-provider-thing_1.0.0";
    corp.put(&format!("{stem}_SHA256SUMS"), &sums);
    corp.put(
        &format!("{stem}_SHA256SUMS.sig"),
        signer.sign(sums.as_bytes()),
    );
    let (public, other) = (signer.public().armored, Signer::new().public().armored);
    corp.put("keys/two.asc", format!("{other}\n{public}"));
    corp.put(
        "keys/secret.asc",
        public.replace("PUBLIC KEY", "PRIVATE KEY"),
    );
    corp.put(
        "keys/mixed.asc",
        format!("{public}{}", public.replace("PUBLIC KEY", "PRIVATE KEY")),
    );
    let larder = corp.setup.start().await;
    let document = larder.client().get(&url(DOWNLOAD)).await;
    assert!(!document.text().contains("PRIVATE"));
    let json = document.json();
    let keys = json["signing_keys"]["gpg_public_keys"].as_array().unwrap();
    let ids: Vec<_> = keys
        .iter()
        .map(|key| key["key_id"].as_str().unwrap())
        .collect();
    assert!(
        ids.len() == 2 && ids.contains(&&*signer.public().id),
        "{ids:?}"
    );
    for name in ["secret.asc", "mixed.asc"] {
        larder.logs(&[name, "PRIVATE key"]).await;
    }
}

#[tokio::test]
async fn written_documents_speak_for_no_file_of_the_registry_and_for_no_other_registry() {
    let upstream = Upstream::start();
    let corp = Corp::new(&upstream);
    let zip = corp.release("thing", "1.0.0");
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let mut lie = release.document("linux_amd64");
    lie["shasum"] = sha256(b"other").into();
    corp.put("evil/null/1.0.0/download/linux/amd64.json", lie.to_string());
    let own = format!(
        "https://{HOST}/v1/files/{}",
        archive_path("thing", "1.0.0", "linux_amd64")
    );
    lie["download_url"] = own.into();
    corp.put("evil/own/1.0.0/download/linux/amd64.json", lie.to_string());
    lie["download_url"] = "http://files.example/x.zip".into();
    corp.put(
        "evil/plain/1.0.0/download/linux/amd64.json",
        lie.to_string(),
    );
    corp.put("evil/list/versions.json", r#"{"versions":[{"version":5}]}"#);
    let larder = corp.setup.start().await;
    let client = larder.client();
    for (name, status) in [("null", 200), ("own", 404), ("plain", 404)] {
        let path = format!("/v1/providers/evil/{name}/1.0.0/download/linux/amd64");
        assert_eq!(client.get(&url(&path)).await.status, status, "{name}");
    }
    assert_eq!(
        client
            .get(&url("/v1/providers/evil/list/versions"))
            .await
            .status,
        404
    );
    for (name, why) in [
        ("own/1.0.0", "file of this registry"),
        ("plain/1.0.0", "not https"),
        ("list/versions.json", "`version` is none"),
    ] {
        larder.logs(&[name, why]).await;
    }
    let document = client.get(&url(DOWNLOAD)).await.json();
    client
        .get(&url(document["download_url"].as_str().unwrap()))
        .await
        .assert_is(&zip);
    client.get(&release.document_url()).await;
    client
        .get(&release.archive_url())
        .await
        .assert_is(&release.archive());
}

#[tokio::test]
async fn everything_that_is_not_served_is_named_and_its_owner_may_take_versions_away() {
    let upstream = Upstream::start();
    let corp = Corp::with(&upstream, HOST, "verify = \"signature\"\n");
    for version in ["1.0.0", "1.1.0", "1.2.0", "1.3.0", "1.4.0"] {
        corp.release("thing", version);
    }
    let zip = provider_zip("any", "1", 5_000);
    for (path, bytes) in [
        ("stray.zip", &zip[..]),
        ("corp/stray.zip", &zip),
        (
            "corp/thing/terraform-provider-thing_2.0.0_linux_amd64.ZIP",
            &zip,
        ),
        ("my.corp/thing/x", b"x"),
        (
            "corp/Upper/terraform-provider-Upper_1.0.0_linux_amd64.zip",
            &zip,
        ),
        ("keys/binary.asc", b"\xff\xfe"),
        ("corp/thing/terraform-provider-thing_1.4.0_SHA256SUMS", b""),
        ("corp/net/aws/1.0.0.zip", &zip),
        ("corp/net/aws/1.0.0.tar.gz", &gzip(b"a tar")),
    ] {
        corp.put(path, bytes);
    }
    let line = sums_line("terraform-provider-thing_1.4.0_linux_amd64.zip", &zip);
    corp.put(
        "corp/thing/terraform-provider-thing_1.4.0_SHA256SUMS",
        line.replace("  ", " *"),
    );
    std::fs::create_dir(
        corp.dir
            .join("corp/thing/terraform-provider-thing_3.0.0_linux_amd64.zip"),
    )
    .unwrap();
    let larder = corp.setup.start().await;
    let client = larder.client();
    for (name, why) in [
        ("releases/stray.zip", "beside the folders"),
        ("corp/stray.zip", "beside the folders"),
        ("linux_amd64.ZIP", "wrong name"),
        ("my.corp", "no namespace"),
        ("corp/Upper", "lower case"),
        ("binary.asc", "armored"),
        ("1.4.0_SHA256SUMS", "sha256sum -b"),
        ("thing_3.0.0", "no file"),
        ("aws/1.0.0.zip", "lies beside"),
    ] {
        larder.logs(&[name, why]).await;
    }
    // Of a module there is nothing to be signed.
    let module = client
        .get(&url("/v1/modules/corp/net/aws/1.0.0/1.0.0.tar.gz"))
        .await;
    assert_eq!((module.status, module.succeeded()), (200, true));
    let versions = async || {
        let list = client.get(&url(VERSIONS)).await.json();
        list["versions"].as_array().unwrap().len()
    };
    assert_eq!(versions().await, 4);
    for version in ["1.1.0", "1.2.0", "1.3.0"] {
        std::fs::remove_file(corp.dir.join(archive_path("thing", version, "linux_amd64"))).unwrap();
    }
    assert_eq!(versions().await, 1);
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

#[test]
fn add_breaks_no_release_that_is_there_and_stays_within_the_folder() {
    let upstream = Upstream::start();
    let corp = Corp::new(&upstream);
    let zip = corp.release("thing", "1.0.0");
    let file = |name: &str, bytes: &[u8]| {
        let path = corp.setup.path(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let wrong = file(
        "terraform-provider-thing_1.0.0_SHA256SUMS",
        sums_line("terraform-provider-thing_1.0.0_linux_amd64.zip", b"x").as_bytes(),
    );
    let before = files_below(&corp.dir);
    let refused = |output: std::process::Output, why: &str| {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.code() == Some(1) && said.contains(why),
            "{said}"
        );
    };
    refused(
        add(&corp, &["--namespace", "corp", &wrong]),
        "SHA256SUMS says",
    );
    let right = file(
        "terraform-provider-thing_1.0.0_SHA256SUMS",
        sums_line("terraform-provider-thing_1.0.0_linux_amd64.zip", &zip).as_bytes(),
    );
    let junk = file("terraform-provider-thing_1.0.0_SHA256SUMS.sig", b"junk");
    refused(
        add(&corp, &["--namespace", "corp", &right, &junk]),
        "no good signature",
    );
    let new = file(
        "terraform-provider-new_1.0.0_linux_amd64.zip",
        &provider_zip("new", "1.0.0", 9_000),
    );
    for namespace in ["Corp", "keys", "a--b", "../x"] {
        refused(
            add(&corp, &["--namespace", namespace, &new]),
            "cannot be asked for",
        );
    }
    let outside = corp.setup.path("outside");
    std::fs::create_dir(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, corp.dir.join("linked")).unwrap();
    refused(add(&corp, &["--namespace", "linked", &new]), "by a link");
    assert_eq!(files_below(&outside), Vec::<PathBuf>::new());
    std::fs::remove_file(corp.dir.join("linked")).unwrap();
    assert_eq!(files_below(&corp.dir), before);
    let signer = Signer::new();
    let good = file(
        "terraform-provider-thing_1.0.0_SHA256SUMS.sig",
        &signer.sign(&std::fs::read(&right).unwrap()),
    );
    let key = file("signer.asc", signer.public().armored.as_bytes());
    succeeded(&add(&corp, &["--namespace", "corp", &right, &good, &key]));
}

#[tokio::test]
async fn what_cannot_be_read_holds_up_nothing_else() {
    let upstream = Upstream::start();
    let corp = Corp::new(&upstream);
    let zip = corp.release("thing", "1.0.0");
    let other = archive_path("thing", "1.0.0", "darwin_arm64");
    // A folder that cannot be read as a file is as unreadable for root as for anybody.
    std::fs::create_dir_all(corp.dir.join(&other)).unwrap();
    let larder = corp.setup.start().await;
    let client = larder.client();
    let list = client.get(&url(VERSIONS)).await.json();
    assert_eq!(list["versions"].as_array().unwrap().len(), 1);
    let document = client.get(&url(DOWNLOAD)).await.json();
    assert_eq!(document["shasum"], sha256(&zip));
    larder.logs(&["darwin_arm64", "no file"]).await;
    let missing = DOWNLOAD.replace("linux/amd64", "darwin/arm64");
    assert_eq!(client.get(&url(&missing)).await.status, 404);
}

/// Lock files are made of the sums: they must not change in a moment.
#[tokio::test]
async fn sums_are_not_computed_over_half_a_release() {
    use std::io::Write as _;
    let upstream = Upstream::start();
    let corp = Corp::new(&upstream);
    corp.release("thing", "1.0.0");
    corp.release("thing", "2.0.0");
    let path = corp
        .dir
        .join(archive_path("thing", "2.0.0", "darwin_arm64"));
    let whole = provider_zip("thing", "2.0.0", 64 << 20);
    let half = whole.len() / 2;
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(&whole[..half]).unwrap();
    let larder = corp.setup.start().await;
    let client = larder.client();
    let platforms = |list: &serde_json::Value| {
        let two = list["versions"].as_array().unwrap().iter();
        let mut two = two.filter(|version| version["version"] == "2.0.0");
        two.next()
            .map_or(0, |version| version["platforms"].as_array().unwrap().len())
    };
    file.write_all(&whole[half..]).unwrap();
    drop(file);
    // Whole or not at all, and soon.
    let start = std::time::Instant::now();
    loop {
        let list = client.get(&url(VERSIONS)).await.json();
        match platforms(&list) {
            0 if start.elapsed() < PATIENCE => {}
            found => break assert_eq!(found, 2, "{list:#}"),
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}
