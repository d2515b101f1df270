//! Registries asked by their names (`/registry/HOST/…`), and `larder env --ca-free`.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use crate::common::registry::registry_json;
use crate::common::*;
use crate::terraform::{Project, no_terraform, succeeded};

#[tokio::test]
async fn urls_fit_the_address_by_which_the_client_came_and_lead_to_verified_bytes() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    let foreign = Release::new("someone", "thing", "1.2.3").on(TERRAFORM, Home::GitHub);
    release.publish(&upstream);
    foreign.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();

    for release in [&release, &foreign] {
        let page = format!(
            "/registry/{TERRAFORM}{}",
            release.document_path("linux_amd64")
        );
        let document = client.page(&page).await;
        assert_eq!(document.status, 200, "{}", document.text());
        assert_eq!(document.header("content-type"), Some("application/json"));
        let mut json = document.json();
        let mut original = release.document("linux_amd64");
        for key in ["download_url", "shasums_url", "shasums_signature_url"] {
            let url = json[key].take();
            original[key].take();
            let base = format!("http://{}/registry/{TERRAFORM}/", larder.addr);
            let path = url.as_str().unwrap().strip_prefix(&base).expect(&base);
            let file = client.page(&format!("/registry/{TERRAFORM}/{path}")).await;
            match key {
                "download_url" => file.assert_is(&release.archive()),
                "shasums_url" => file.assert_is(&release.sums),
                _ => file.assert_is(&release.signature),
            }
        }
        // Nothing else was changed.
        assert_eq!(json, original);
        // Another client came by another name.
        let mut conn = client.plain().await;
        conn.request("GET", "larder.example:99", &page, &[]).await;
        let other = conn.answer("GET").await.unwrap().finish().await.json();
        let url = other["download_url"].as_str().unwrap().to_owned();
        assert!(
            url.starts_with("http://larder.example:99/registry/"),
            "{url}"
        );
        // And nothing of either is stored.
        let through = client.get(&release.document_url()).await.text();
        assert!(!through.contains("larder.example") && !through.contains("/registry/registry"));
    }
    assert_eq!(
        larder.setup.files_with("larder.example"),
        Vec::<std::path::PathBuf>::new()
    );
}

#[tokio::test]
async fn what_is_not_well_formed_is_not_found_and_asks_nobody() {
    let upstream = Upstream::start();
    Release::new("hashicorp", "null", "3.2.1").publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    for path in [
        "/registry/",
        "/registry/registry.terraform.io",
        "/registry/registry.terraform.io/v1/providers/hashicorp/null",
        "/registry/registry.terraform.io/v1/providers/hashi%2fcorp/null/versions",
        "/registry/registry.terraform.io/v1/providers/hashicorp/nu..ll/versions",
        "/registry/registry.terraform.io/v1/providers/hashicorp/null/3.2/download/linux/amd64",
        "/registry/registry.terraform.io/v1/providers/hashicorp/null/3.2.1/download/../amd64",
        "/registry/bad..host/v1/providers/hashicorp/null/versions",
        "/registry/registry.terraform.io/v2/providers/hashicorp/null/versions",
        "/mirror/",
        "/mirror/registry.terraform.io/hashicorp/null",
        "/mirror/registry.terraform.io/hashicorp/null/latest.json",
        "/mirror/registry.terraform.io/hashicorp/null/3.2.json",
        "/mirror/bad..host/hashicorp/null/index.json",
        "/mirror/registry.terraform.io/hashi@corp/null/index.json",
        "/mirror/registry.terraform.io/hashicorp/null/terraform-provider-other_1.0.0_linux_amd64.zip",
    ] {
        let refusal = larder.client().page(path).await;
        assert_eq!(refusal.status, 404, "{path}: {}", refusal.text());
        assert!(
            refusal.json()["errors"][0]
                .as_str()
                .unwrap()
                .starts_with("larder: ")
        );
    }
    assert_eq!(upstream.journal().len(), 0);
}

#[tokio::test]
async fn a_host_that_is_no_registry_and_an_unlisted_one_are_told_apart() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let setup = Setup::new(&upstream).config(&format!("mirror_hosts = [\"{TERRAFORM}\"]\n"));
    let larder = setup.start().await;
    let ask = |host: &str| {
        let path = format!("/registry/{host}{}", release.versions_path());
        let client = larder.client();
        async move { client.page(&path).await }
    };
    assert_eq!(ask(TERRAFORM).await.status, 200);
    let denied = ask(OPENTOFU).await;
    assert_eq!(denied.status, 403);
    assert!(denied.text().contains("mirror_hosts"), "{}", denied.text());
    drop(larder);
    let larder = Setup::new(&upstream).start().await;
    let none = larder
        .client()
        .page(&format!("/registry/{RELEASES}{}", release.versions_path()))
        .await;
    assert_eq!(none.status, 404);
}

#[tokio::test]
async fn services_lie_where_discovery_says_and_other_services_stay() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let services =
        r#"{"providers.v1":"/deep/v1/providers/","state.v2":"/api/v2/","login.v1":{"client":"x"}}"#;
    upstream.route(
        TERRAFORM,
        "/.well-known/terraform.json",
        Reply::json(services),
    );
    let list = registry_json(&release.versions());
    let deep = format!("/deep{}", release.versions_path());
    upstream.route(TERRAFORM, &deep, list);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    let versions = client
        .page(&format!("/registry/{TERRAFORM}{}", release.versions_path()))
        .await;
    assert_eq!(versions.json(), release.versions());
    assert_eq!(upstream.gets(TERRAFORM, &deep), 1);
    let discovery = client
        .page(&format!("/registry/{TERRAFORM}/.well-known/terraform.json"))
        .await;
    let discovery = discovery.json();
    let own = format!("http://{}/registry/{TERRAFORM}/v1/providers/", larder.addr);
    assert_eq!(discovery["providers.v1"], own);
    assert_eq!(
        discovery["state.v2"],
        format!("https://{TERRAFORM}/api/v2/")
    );
    assert_eq!(discovery["login.v1"]["client"], "x");
    let modules = format!("/registry/{TERRAFORM}/v1/modules/a/b/c/versions");
    assert_eq!(client.page(&modules).await.status, 404);
}

#[tokio::test]
async fn modules_pass_and_their_paths_lead_back() {
    let upstream = Upstream::start();
    registry::publish_discovery(&upstream, TERRAFORM);
    let at = |version: &str, location: &str, body: &str| {
        let path = format!("/v1/modules/a/b/c/{version}/download");
        let reply = Reply::json(body.to_owned()).header("X-Terraform-Get", location);
        upstream.route(TERRAFORM, &path, reply);
    };
    at("1.0.0", "git::https://git.example/x?ref=1", "{}");
    at(
        "2.0.0",
        "./c.tgz?archive=tar.gz",
        r#"{"location":"./c.tgz?archive=tar.gz"}"#,
    );
    at(
        "3.0.0",
        "/elsewhere/c.tgz",
        r#"{"location":"/elsewhere/c.tgz"}"#,
    );
    let tgz = Reply::file("application/gzip", "module");
    upstream.route(TERRAFORM, "/v1/modules/a/b/c/2.0.0/c.tgz", tgz);
    let larder = Setup::new(&upstream).start().await;
    let client = larder.client();
    let base = format!("http://{}/registry/{TERRAFORM}", larder.addr);
    for (version, wanted) in [
        ("1.0.0", "git::https://git.example/x?ref=1".to_owned()),
        (
            "2.0.0",
            format!("{base}/v1/modules/a/b/c/2.0.0/c.tgz?archive=tar.gz"),
        ),
        ("3.0.0", format!("https://{TERRAFORM}/elsewhere/c.tgz")),
    ] {
        let page = format!("/registry/{TERRAFORM}/v1/modules/a/b/c/{version}/download");
        let got = client.page(&page).await;
        assert_eq!(got.header("x-terraform-get"), Some(&*wanted));
        if version != "1.0.0" {
            assert_eq!(got.json()["location"], wanted);
        }
    }
    let file = client
        .page(&format!(
            "/registry/{TERRAFORM}/v1/modules/a/b/c/2.0.0/c.tgz?archive=tar.gz"
        ))
        .await;
    file.assert_is(b"module");
}

#[tokio::test]
async fn credentials_go_to_the_registry_alone_and_their_document_leads_to_it() {
    let upstream = Upstream::start();
    let release = Release::new("corp", "thing", "1.0.0");
    release.publish(&upstream);
    let mut document = release.document("linux_amd64");
    document["shasums_url"] = "../../../sums".into();
    let path = release.document_path("linux_amd64");
    let reply = registry_json(&document);
    upstream.route_fn(TERRAFORM, &path, move |seen| {
        match seen.header("authorization") {
            Some("Bearer s3cret") => reply.clone(),
            _ => Reply::status(401),
        }
    });
    let larder = Setup::new(&upstream).start().await;
    let mut conn = larder.client().plain().await;
    let page = format!("/registry/{TERRAFORM}{path}");
    let host = larder.addr.to_string();
    let token = [("Authorization", "Bearer s3cret")];
    conn.request("GET", &host, &page, &token).await;
    let got = conn.answer("GET").await.unwrap().finish().await;
    let json = got.json();
    assert_eq!(json["download_url"], release.archive_url());
    let sums = format!("https://{TERRAFORM}/v1/providers/corp/thing/sums");
    assert_eq!(json["shasums_url"], sums);
    assert_eq!(larder.client().page(&page).await.status, 401);
    assert_eq!(
        larder.setup.files_with("s3cret"),
        Vec::<std::path::PathBuf>::new()
    );
}

/// The file that `larder env --ca-free` names.
pub fn ca_free(larder: &Larder, home_variables: &[(&str, &str)]) -> String {
    let mut command = larder.setup.command_with_options(&["env", "--ca-free"]);
    command.envs(home_variables.iter().copied());
    let output = command.output().unwrap();
    succeeded(&output);
    let text = String::from_utf8(output.stdout).unwrap();
    let value = text.trim().strip_prefix("export TF_CLI_CONFIG_FILE='");
    value
        .unwrap_or_else(|| panic!("{text}"))
        .trim_end_matches('\'')
        .to_owned()
}

#[tokio::test]
async fn env_without_a_ca_carries_the_users_own_configuration_over() {
    let upstream = Upstream::start();
    let larder = Setup::new(&upstream).start().await;
    let home = larder.setup.home();
    let own = "plugin_cache_dir = \"/tmp/x\"\ncredentials \"a.example\" {\n  token = \"t0ken\"\n}\nhost \"registry.terraform.io\" { services = { \"x.v1\" = \"https://x/\" } }\n";
    std::fs::write(home.join(".terraformrc"), own).unwrap();
    std::fs::create_dir(home.join(".terraform.d")).unwrap();
    let json = r#"{"credentials":{"b.example":{"token":"other"}}}"#;
    std::fs::write(home.join(".terraform.d/credentials.tfrc.json"), json).unwrap();

    let file = ca_free(&larder, &[]);

    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let text = std::fs::read_to_string(&file).unwrap();
    let base = format!("http://{}/registry", larder.addr);
    for part in [
        "plugin_cache_dir = \"/tmp/x\"".to_owned(),
        "token = \"t0ken\"".into(),
        "credentials \"b.example\"".into(),
        format!("\"providers.v1\" = \"{base}/registry.terraform.io/v1/providers/\""),
        format!("\"modules.v1\" = \"{base}/registry.opentofu.org/v1/modules/\""),
    ] {
        assert!(text.contains(&part), "{part}: {text}");
    }
    assert!(
        !text.contains("x.v1") && !text.contains("releases.hashicorp.com"),
        "{text}"
    );
    // Evaluated in a shell that has evaluated it already, it is the same.
    assert_eq!(ca_free(&larder, &[("TF_CLI_CONFIG_FILE", &file)]), file);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
    // A file that the user named is what counts, and is carried over again and again.
    let named = larder.setup.path("own.tfrc");
    std::fs::write(&named, "disable_checkpoint = true\n").unwrap();
    for variable in [named.to_str().unwrap(), &file] {
        ca_free(&larder, &[("TF_CLI_CONFIG_FILE", variable)]);
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(
            text.contains("disable_checkpoint") && !text.contains("t0ken"),
            "{text}"
        );
    }
    std::fs::write(&named, "host \"x\" {\n").unwrap();
    let mut command = larder.setup.command_with_options(&["env", "--ca-free"]);
    let refused = command.env("TF_CLI_CONFIG_FILE", &named).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(
        said.contains("own.tfrc") && said.contains("line 1"),
        "{said}"
    );
}

#[tokio::test]
async fn terraform_installs_without_a_ca_and_its_lock_is_complete() {
    if no_terraform() {
        return;
    }
    let upstream = Upstream::start();
    let releases = [
        Release::new("hashicorp", "null", "3.2.1"),
        Release::new("someone", "thing", "1.2.3").on(TERRAFORM, Home::GitHub),
        Release::new("hashicorp", "random", "3.4.3").on(OPENTOFU, Home::GitHub),
    ];
    releases
        .iter()
        .for_each(|release| release.publish(&upstream));
    let larder = Setup::new(&upstream).start().await;
    let file = ca_free(&larder, &[]);
    let variables = [("TF_CLI_CONFIG_FILE", &*file)];
    let first = Project::new(&larder, "first", &releases);
    let output = first.init_with(&variables);
    succeeded(&output);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("self-signed"), "{said}");
    larder.setup.holds(3).await;
    let sent = upstream.archive_bytes();
    let second = Project::new(&larder, "second", &releases);
    succeeded(&second.init_with(&variables));
    assert_eq!(upstream.archive_bytes(), sent);
    assert_eq!(first.lock(), second.lock());
    for release in &releases {
        for (_, archive) in &release.archives {
            let hash = format!("\"zh:{}\"", sha256(archive));
            assert!(first.lock().contains(&hash), "{}", first.lock());
        }
    }
}

#[tokio::test]
async fn run_without_a_ca_installs_and_leaves_no_configuration_behind() {
    if no_terraform() {
        return;
    }
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let setup = Setup::new(&upstream);
    let larder = setup.start().await;
    let project = Project::new(&larder, "project", std::slice::from_ref(&release));
    drop(larder);
    let mut command: Command = setup.command_with_options(&["run", "--ca-free"]);
    command.args(["--", "terraform", "init", "-no-color"]);
    command
        .current_dir(project.path(""))
        .env("CHECKPOINT_DISABLE", "1");
    let output = command.output().unwrap();
    succeeded(&output);
    let summary = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(summary.contains("1 archives verified"), "{summary}");
    let left = std::fs::read_dir(setup.data_dir()).unwrap().flatten();
    let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
    assert!(
        !left
            .iter()
            .any(|name| name.to_string_lossy().starts_with("terraformrc")),
        "{left:?}"
    );
}

#[tokio::test]
async fn where_there_are_users_pages_want_a_password_and_archives_a_seal() {
    if no_terraform() {
        return;
    }
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let setup = Setup::new(&upstream);
    let users = setup.users("ann", "pass:word");
    let larder = setup
        .args(["--htpasswd", users.to_str().unwrap()])
        .start()
        .await;
    let client = larder.client();
    let page = format!(
        "/registry/{TERRAFORM}{}",
        release.document_path("linux_amd64")
    );
    let mirror = format!("/mirror/{TERRAFORM}/hashicorp/null/index.json");
    for path in [&page, &mirror] {
        let refused = client.page(path).await;
        assert_eq!(refused.status, 401, "{}", refused.text());
        assert!(refused.header("www-authenticate").is_some());
    }
    assert_eq!(upstream.connections(), 0);
    // As Terraform sends what it knows for a host.
    let mut conn = client.plain().await;
    let token = [("Authorization", "Bearer ann:pass:word")];
    conn.request("GET", &larder.addr.to_string(), &page, &token)
        .await;
    let document = conn.answer("GET").await.unwrap().finish().await.json();
    let url = document["download_url"].as_str().unwrap();
    let path = url
        .strip_prefix(&format!("http://{}", larder.addr))
        .unwrap();
    client.page(path).await.assert_is(&release.archive());
    let (bare, _) = path.split_once('?').unwrap();
    assert_eq!(client.page(bare).await.status, 401);
    let sums = document["shasums_url"].as_str().unwrap();
    let (_, seal) = sums.split_once('?').unwrap();
    assert_eq!(client.page(&format!("{bare}?{seal}")).await.status, 401);
    // The registry never saw the password.
    assert!(
        upstream
            .journal()
            .iter()
            .all(|seen| seen.header("authorization").is_none())
    );
    // `larder env` on this machine passes by itself.
    let file = ca_free(&larder, &[]);
    let project = Project::new(&larder, "project", &[release]);
    succeeded(&project.init_with(&[("TF_CLI_CONFIG_FILE", &file)]));
}

/// Whoever names a host has it asked: its word must not count against anybody's archive.
#[tokio::test]
async fn a_registry_that_nobody_configured_speaks_for_its_own_clients_alone() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    registry::publish_discovery(&upstream, ELSEWHERE);
    let mut lie = release.document("linux_amd64");
    lie["shasum"] = sha256(b"another").into();
    let path = "/v1/providers/x/y/1.0.0/download/linux/amd64";
    upstream.route(ELSEWHERE, path, registry_json(&lie));
    let setup = Setup::new(&upstream);
    let larder = setup.start().await;
    let client = larder.client();
    assert_eq!(client.get(&release.document_url()).await.status, 200);
    let page = format!("/registry/{ELSEWHERE}{path}");
    let document = client.page(&page).await;
    let url = document.json()["download_url"].as_str().unwrap().to_owned();
    // For its own clients it does.
    let own = url
        .strip_prefix(&format!("http://{}", larder.addr))
        .unwrap();
    assert!(!client.page(own).await.succeeded());
    client
        .get(&release.archive_url())
        .await
        .assert_is(&release.archive());
    larder.setup.holds(1).await;
    larder.terminate().await;
    let larder = setup.start().await;
    let client = larder.client();
    client.get(&release.archive_url()).await.assert_hit();
    assert!(!client.page(own).await.succeeded());
}

#[tokio::test]
async fn nothing_leads_out_of_a_registrys_service() {
    let upstream = Upstream::start();
    registry::publish_discovery(&upstream, ELSEWHERE);
    for path in ["/secret", "/v1/secret", "/.larder/secret"] {
        upstream.route(ELSEWHERE, path, Reply::text("secret"));
    }
    let larder = Setup::new(&upstream).start().await;
    for path in [
        ".larder/%2e%2e/secret",
        ".larder/../secret",
        ".larder/x/y",
        "v1/modules/a/b/c/1.0.0/../../../../../../secret",
        "v1/modules/a/b/c/1.0.0/..\\..\\..\\..\\..\\secret",
        "v1/modules/a/b/c/1.0.0/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/secret",
        "v1/modules/a/b/c/1.0.0//secret",
    ] {
        let got = larder
            .client()
            .page(&format!("/registry/{ELSEWHERE}/{path}"))
            .await;
        assert_eq!(got.status, 404, "{path}: {}", got.text());
    }
    let asked: Vec<_> = upstream
        .journal()
        .iter()
        .map(|seen| seen.path().to_owned())
        .collect();
    assert!(
        asked
            .iter()
            .all(|path| path == "/.well-known/terraform.json"),
        "{asked:?}"
    );
}

#[tokio::test]
async fn a_browsers_cookies_stay_and_what_others_wrote_is_no_page() {
    let upstream = Upstream::start();
    registry::publish_discovery(&upstream, ELSEWHERE);
    let page = Reply::new(200, "text/html", "<script>").header("Set-Cookie", "a=b; Path=/");
    upstream.route(ELSEWHERE, "/v1/modules/a/b/c/1.0.0/x.html", page);
    let larder = Setup::new(&upstream).start().await;
    let ask = async |header: (&str, &str)| {
        let mut conn = larder.client().plain().await;
        let path = format!("/registry/{ELSEWHERE}/v1/modules/a/b/c/1.0.0/x.html");
        conn.request("GET", &larder.addr.to_string(), &path, &[header])
            .await;
        conn.answer("GET").await.unwrap().finish().await
    };
    let got = ask(("Cookie", "session=s3cret")).await;
    assert_eq!((got.status, got.header("set-cookie")), (200, None));
    assert_eq!(got.header("x-content-type-options"), Some("nosniff"));
    assert_eq!(got.header("content-security-policy"), Some("sandbox"));
    let sent = upstream.count(|seen| seen.header("cookie").is_some());
    assert_eq!(sent, 0);
    let before = upstream.journal().len();
    assert_eq!(ask(("Sec-Fetch-Site", "cross-site")).await.status, 403);
    assert_eq!(upstream.journal().len(), before);
}

#[tokio::test]
async fn a_seal_stays_good_for_what_clients_make_of_a_modules_address() {
    let upstream = Upstream::start();
    registry::publish_discovery(&upstream, TERRAFORM);
    let reply = Reply::json("{}").header("X-Terraform-Get", "./c.tgz//inner?archive=tar.gz&x=1");
    upstream.route(TERRAFORM, "/v1/modules/a/b/c/1.0.0/download", reply);
    let file = "/v1/modules/a/b/c/1.0.0/c.tgz";
    upstream.route(TERRAFORM, file, Reply::file("application/gzip", "module"));
    let setup = Setup::new(&upstream);
    let users = setup.users("ann", "word");
    let larder = setup
        .args(["--htpasswd", users.to_str().unwrap()])
        .start()
        .await;
    let client = larder.client();
    let mut conn = client.plain().await;
    let page = format!("/registry/{TERRAFORM}/v1/modules/a/b/c/1.0.0/download");
    let token = [("Authorization", "Bearer ann:word")];
    conn.request("GET", &larder.addr.to_string(), &page, &token)
        .await;
    let got = conn.answer("GET").await.unwrap().finish().await;
    let location = got.header("x-terraform-get").unwrap().to_owned();
    let (_, query) = location.split_once('?').unwrap();
    assert!(
        location.contains("c.tgz//inner?") && query.matches('?').count() == 0,
        "{location}"
    );
    // The folder and `archive` are for the client; `terraform-get` is its own.
    let query = query.replace("archive=tar.gz&", "");
    let asked = format!("/registry/{TERRAFORM}{file}?{query}&terraform-get=1");
    client.page(&asked).await.assert_is(b"module");
    let seen = upstream.journal();
    let seen = seen.iter().find(|seen| seen.path() == file).unwrap();
    assert_eq!(seen.query(), Some("x=1&terraform-get=1"));
    assert_eq!(
        client
            .page(&format!("/registry/{TERRAFORM}{file}?x=1"))
            .await
            .status,
        401
    );
}

/// A registry's own documents are what the protocols say they are, whoever leads larder to them.
#[tokio::test]
async fn no_other_host_makes_something_else_of_a_registrys_documents() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let services =
        format!(r#"{{"providers.v1":"/v1/providers/","modules.v1":"https://{TERRAFORM}/v1/"}}"#);
    upstream.route(
        ELSEWHERE,
        "/.well-known/terraform.json",
        Reply::json(services),
    );
    let mut lie = release.document("linux_amd64");
    lie["shasums_signature_url"] = release.versions_url().into();
    let path = "/v1/providers/x/y/1.0.0/download/linux/amd64";
    upstream.route(ELSEWHERE, path, registry_json(&lie));
    let setup = Setup::new(&upstream).config("deny = [\"hashicorp/null\"]\n");
    let larder = setup.start().await;
    let client = larder.client();
    let base = format!("/registry/{ELSEWHERE}/v1/modules/providers/hashicorp/null");
    for rest in ["3.2.1/download/linux/amd64", "versions"] {
        let got = client.page(&format!("{base}/{rest}")).await;
        assert!(
            !got.succeeded() || got.status >= 400,
            "{rest}: {}",
            got.text()
        );
        assert!(!got.text().contains("3.2.1\""), "{rest}: {}", got.text());
    }
    // What names it as a signature gets none.
    let page = format!("/registry/{ELSEWHERE}{path}");
    let document = client.page(&page).await;
    if document.status == 200 {
        let url = document.json()["shasums_signature_url"]
            .as_str()
            .unwrap()
            .to_owned();
        let own = url
            .strip_prefix(&format!("http://{}", larder.addr))
            .unwrap();
        assert!(!client.page(own).await.succeeded() || client.page(own).await.status >= 400);
    }
    assert_eq!(client.get(&release.versions_url()).await.status, 451);
    assert_eq!(client.get(&release.document_url()).await.status, 403);
}

#[tokio::test]
async fn a_host_that_may_be_asked_leads_to_no_other() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1").on(OPENTOFU, Home::Releases);
    release.publish(&upstream);
    let there = format!("https://{OPENTOFU}/v1/providers/");
    let services = format!(r#"{{"providers.v1":"{there}"}}"#);
    upstream.route(
        ELSEWHERE,
        "/.well-known/terraform.json",
        Reply::json(services),
    );
    upstream.route(
        GITHUB,
        "/.well-known/terraform.json",
        Reply::redirect(&format!("https://{OPENTOFU}/.well-known/terraform.json")),
    );
    let rules = format!("mirror_hosts = [\"{ELSEWHERE}\", \"{GITHUB}\"]\n");
    let larder = Setup::new(&upstream).config(&rules).start().await;
    for host in [ELSEWHERE, GITHUB] {
        for page in [
            format!("/registry/{host}/v1/providers/hashicorp/null/versions"),
            format!("/mirror/{host}/hashicorp/null/index.json"),
        ] {
            let refused = larder.client().page(&page).await;
            assert_eq!(refused.status, 403, "{page}: {}", refused.text());
        }
    }
    assert_eq!(upstream.count(|seen| seen.host == OPENTOFU), 0);
}
