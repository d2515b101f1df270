//! tfenv and tenv: they read the releases site's pages, and the statuses of curl or none at all.

use std::process::Command;

use super::*;

// --- tfenv ---

const CURL: Headers = &[("User-Agent", "curl/8.5.0"), ("Accept", "*/*")];

#[tokio::test]
async fn tfenv_finds_versions_in_the_page_and_installs_one() {
    let mut upstream = Upstream::start();
    let site = Site::new("terraform", &["1.8.5", "1.9.0-rc1", "1.9.0"]);
    site.publish(&upstream);
    let setup = site.setup(&upstream);
    let larder = setup.start().await;
    for _ in ["cold", "warm"] {
        tfenv(&larder, &site).await.unwrap();
        setup.holds(1).await;
    }
    assert_eq!(upstream.gets(RELEASES, &site.newest().archive_path()), 1);

    upstream.stop();
    tfenv(&larder, &site).await.unwrap();
}

#[tokio::test]
async fn tfenv_follows_the_sites_redirects() {
    let upstream = Upstream::start();
    let site = Site::new("terraform", &["1.9.0"]);
    site.publish(&upstream);
    let product = site.newest();
    let elsewhere = "/moved/terraform_1.9.0_linux_amd64.zip";
    let reply = Reply::archive(product.archive.clone());
    upstream.route(RELEASES, elsewhere, reply);
    let moved = Reply::redirect(&format!("https://{RELEASES}{elsewhere}"));
    upstream.route(RELEASES, &product.archive_path(), moved);
    let larder = site.setup(&upstream).start().await;
    tfenv(&larder, &site).await.unwrap();
}

#[tokio::test]
async fn tfenv_fails_with_curls_codes() {
    let upstream = Upstream::start();
    let site = Site::new("terraform", &["1.9.0"]);
    let archive = site.newest().archive_path();
    let corrupt = Reply::archive(site.newest().archive.clone()).corrupt_at(150_000);
    for (path, reply, wanted) in [
        ("/terraform/", Reply::status(503), "curl: (22) 503"),
        ("/terraform/", Reply::status(404), "curl: (22) 404"),
        (&archive, Reply::status(403), "curl: (22) 403"),
        (&archive, Reply::status(500), "curl: (22) 500"),
        (&archive, corrupt, "curl: (18)"),
    ] {
        site.publish(&upstream);
        upstream.route(RELEASES, path, reply);
        let larder = site.setup(&upstream).start().await;
        let failure = tfenv(&larder, &site).await.unwrap_err();
        assert_eq!(failure, wanted, "{path}");
    }
}

/// Its very commands, by the curl, grep and sha256sum of this machine.
#[tokio::test]
async fn tfenvs_commands_work_in_a_shell() {
    let tools = ["curl", "grep", "sha256sum", "bash"];
    let missing = |tool: &&str| Command::new(tool).arg("--version").output().is_err();
    if let Some(tool) = tools.iter().find(|tool| missing(tool)) {
        println!("skipped: no {tool} on PATH");
        return;
    }
    let upstream = Upstream::start();
    let site = Site::new("terraform", &["1.8.5", "1.9.0"]);
    site.publish(&upstream);
    let larder = site.setup(&upstream).start().await;
    let script = r#"
        set -euo pipefail
        remote=https://releases.hashicorp.com
        page=$(curl --tlsv1.2 -sSf "$remote/terraform/")
        version=$(grep -oE '[0-9]+\.[0-9]+\.[0-9]+' <<<"$page" | uniq | head -n 1)
        zip=terraform_${version}_linux_amd64.zip
        sums=terraform_${version}_SHA256SUMS
        curl --tlsv1.2 -s -f -L -o "$zip" "$remote/terraform/$version/$zip"
        curl --tlsv1.2 -s -f -L -o "$sums" "$remote/terraform/$version/$sums"
        curl --tlsv1.2 -s -f -L -o "$sums.sig" "$remote/terraform/$version/$sums.72D7468F.sig"
        sha256sum -c <(grep -F "$zip" "$sums")
    "#;
    let mut command = Command::new("bash");
    larder.setup.cleanse(&mut command);
    command
        .args(["-c", script])
        .env("HTTPS_PROXY", format!("http://{}", larder.addr))
        .env("CURL_CA_BUNDLE", larder.setup.ca_pem());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let installed = std::fs::read(larder.setup.path(&site.newest().filename())).unwrap();
    assert!(installed == site.newest().archive);
}

async fn tfenv(larder: &Larder, site: &Site) -> Result<(), Failure> {
    let program = Program::new(larder, CURL);
    let product = site.newest();
    let page = curl(&program, &format!("https://{RELEASES}/terraform/")).await?;
    assert_eq!(page.text(), site.listing());
    let zip = curl(&program, &product.archive_url()).await?;
    let folder = format!("https://{RELEASES}{}", product.folder());
    let stem = format!("{folder}terraform_{}_SHA256SUMS", product.version);
    let sums = curl(&program, &stem).await?;
    let signature = curl(&program, &format!("{stem}.72D7468F.sig")).await?;
    assert_eq!(sums.body, product.sums);
    assert_eq!(signature.body, site.released.last().unwrap().1);
    match sha256(&zip.body) == sum_of(&sums.text(), &product.filename())? {
        true => Ok(()),
        false => Err("SHA256 hash does not match!".into()),
    }
}

/// `curl -f -L`
async fn curl(program: &Program, url: &str) -> Result<Got, Failure> {
    let mut url = url.to_owned();
    for _ in 0..50 {
        let got = program.get(&url).await;
        match (got.status, got.header("location")) {
            (300..=399, Some(location)) => url = location.to_owned(),
            (status @ 400.., _) => return Err(format!("curl: (22) {status}")),
            _ if !got.complete => return Err("curl: (18)".into()),
            _ => return Ok(got),
        }
    }
    Err("curl: (47)".into())
}

// --- tenv ---

#[tokio::test]
async fn tenv_installs_by_index_and_by_page() {
    let upstream = Upstream::start();
    let site = Site::new("terraform", &["1.8.5", "1.9.0"]);
    site.publish(&upstream);
    let larder = site.setup(&upstream).start().await;
    let mut versions = tenv_index(&larder).await.unwrap();
    versions.sort();
    assert_eq!(versions, ["1.8.5", "1.9.0"]);
    assert_eq!(tenv_page(&larder).await, ["1.9.0", "1.8.5"]);
    for _ in ["cold", "warm"] {
        let zip = tenv_install(&larder, &site).await.unwrap();
        assert!(zip == site.newest().archive);
    }
}

/// Its page has no slash at the end; a list older than a minute hides releases there too.
#[tokio::test]
async fn tenvs_page_is_fresh_for_a_minute_at_most() {
    let upstream = Upstream::start();
    let site = Site::new("terraform", &["1.9.0"]);
    site.publish(&upstream);
    for path in ["/terraform", "/terraform/", "/terraform/index.json"] {
        let reply = match path.ends_with("json") {
            true => Reply::json(site.index().to_string()),
            false => Reply::new(200, "text/html", site.listing()),
        };
        upstream.route(
            RELEASES,
            path,
            reply.header("Cache-Control", "max-age=86400"),
        );
        let larder = site.setup(&upstream).start().await;
        let program = Program::new(&larder, GO);
        let url = format!("https://{RELEASES}{path}");
        program.get(&url).await;
        let again = program.get(&url).await;
        again.assert_hit();
        let (_, left) = again.cache_status().split_once("ttl=").unwrap();
        assert!(left.parse::<u64>().unwrap() <= 60, "{path}: {left}");
    }
}

/// It looks at no status: whatever upstream's failure looks like, it must not look like an answer.
#[tokio::test]
async fn tenv_takes_no_failure_for_a_list() {
    let upstream = Upstream::start();
    let site = Site::new("terraform", &["1.9.0"]);
    let index = r#"{"name":"terraform","versions":{"6.6.6":{"version":"6.6.6"}}}"#;
    let page = "<html><a href=\"/terraform/6.6.6/\">terraform_6.6.6</a></html>";
    for status in [429, 500, 502, 503, 504] {
        let larder = site.setup(&upstream).start().await;
        upstream.route(
            RELEASES,
            "/terraform/index.json",
            Reply::new(status, "application/json", index),
        );
        for path in ["/terraform", "/terraform/"] {
            upstream.route(RELEASES, path, Reply::new(status, "text/html", page));
        }
        assert!(tenv_index(&larder).await.is_err(), "{status}");
        assert_eq!(tenv_page(&larder).await, Vec::<String>::new(), "{status}");
    }
}

#[tokio::test]
async fn tenv_gets_the_last_good_list_when_upstream_fails() {
    let mut upstream = Upstream::start();
    let site = Site::new("terraform", &["1.8.5", "1.9.0"]);
    site.publish(&upstream);
    let larder = site.setup(&upstream).start().await;
    tenv_index(&larder).await.unwrap();
    tenv_page(&larder).await;
    tenv_install(&larder, &site).await.unwrap();
    larder.setup.holds(1).await;
    upstream.stop();
    assert_eq!(tenv_index(&larder).await.unwrap().len(), 2);
    assert_eq!(tenv_page(&larder).await.len(), 2);
    tenv_install(&larder, &site).await.unwrap();
}

/// With its validation switched off it unpacks any zip that it gets, under whatever status.
#[tokio::test]
async fn tenv_takes_no_failure_for_a_zip() {
    let upstream = Upstream::start();
    let site = Site::new("terraform", &["1.9.0"]);
    let product = site.newest();
    let evil = Product::sized("terraform", "6.6.6", 1000).archive;
    for status in [400, 401, 403, 404, 410, 429, 451, 500, 503] {
        for kind in ["application/zip", "text/plain"] {
            site.publish(&upstream);
            let reply = Reply::new(status, kind, evil.clone());
            upstream.route(RELEASES, &product.archive_path(), reply);
            let larder = site.setup(&upstream).start().await;
            let got = Program::new(&larder, GO).get(&product.archive_url()).await;
            let opened = zip::ZipArchive::new(std::io::Cursor::new(got.body));
            assert!(opened.is_err(), "{status} {kind}");
            assert_eq!(got.status, status);
            larder.setup.holds(0).await;
        }
    }
}

/// A refusal of larder's own is no list and no sums, with or without rules.
#[tokio::test]
async fn tenv_takes_no_refusal_for_an_answer() {
    let upstream = Upstream::start();
    let site = Site::new("terraform", &["1.9.0"]);
    site.publish(&upstream);
    let setup = site.setup(&upstream);
    let denying = setup.clone().config("deny = [\"terraform\"]\n");
    for (setup, reason) in [(setup.arg("--offline"), "offline"), (denying, "denied")] {
        let larder = setup.start().await;
        assert_eq!(tenv_page(&larder).await, Vec::<String>::new(), "{reason}");
        assert!(tenv_index(&larder).await.is_ok_and(|list| list.is_empty()) || reason == "offline");
        tenv_install(&larder, &site).await.unwrap_err();
    }
}

/// As far as it has versions: the keys of an object.
async fn tenv_index(larder: &Larder) -> Result<Vec<String>, Failure> {
    let index = format!("https://{RELEASES}/terraform/index.json");
    let got = Program::new(larder, GO).get(&index).await;
    let index: Value = serde_json::from_slice(&got.body).map_err(|e| e.to_string())?;
    let versions = index["versions"].as_object();
    let versions = versions.ok_or("unexpected value returned by API")?;
    Ok(versions.keys().cloned().collect())
}

/// The versions that the links of the page name.
async fn tenv_page(larder: &Larder) -> Vec<String> {
    let got = Program::new(larder, GO)
        .get(&format!("https://{RELEASES}/terraform"))
        .await;
    let page = got.text();
    let links = page
        .split("<a href=\"")
        .skip(1)
        .filter_map(|rest| rest.split('"').next());
    let names = links.filter_map(|link| link.split('/').rfind(|part| !part.is_empty()));
    let is_version = |name: &&str| name.starts_with(|c: char| c.is_ascii_digit());
    names.filter(is_version).map(str::to_owned).collect()
}

async fn tenv_install(larder: &Larder, site: &Site) -> Result<Vec<u8>, Failure> {
    let program = Program::new(larder, GO);
    let product = site.newest();
    let folder = format!("https://{RELEASES}{}", product.folder());
    // Statuses count for nothing, an answer that is cut short does.
    let get = async |url: String| {
        let got = program.get(&url).await;
        got.complete
            .then_some(got.body)
            .ok_or("unexpected EOF".to_owned())
    };
    let index = get(format!("{folder}index.json")).await?;
    let index: Value = serde_json::from_slice(&index).map_err(|e| e.to_string())?;
    let text = |value: &Value| {
        value
            .as_str()
            .map(str::to_owned)
            .ok_or("unexpected value".to_owned())
    };
    let build = &index["builds"][0];
    let (url, file) = (text(&build["url"])?, text(&build["filename"])?);
    let (sums, signature) = (text(&index["shasums"])?, text(&index["shasums_signature"])?);

    let zip = get(url).await?;
    let sums = get(format!("{folder}{sums}")).await?;
    let sum = sum_of(&String::from_utf8_lossy(&sums), &file)?;
    if sha256(&zip) != sum {
        return Err("invalid sha256 checksum".into());
    }
    let signature = get(format!("{folder}{signature}")).await?;
    match signature == site.released.last().unwrap().1 {
        true => Ok(zip),
        false => Err("invalid signature".into()),
    }
}
