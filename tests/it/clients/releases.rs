//! hc-install, setup-terraform and packer: they read the releases site's JSON.

use super::*;

// --- hc-install ---

const HC_INSTALL: Headers = &[
    ("User-Agent", "hc-install/0.9.2"),
    ("Accept-Encoding", "gzip"),
];

#[tokio::test]
async fn hc_install_gets_the_exact_types_and_lengths_cold_warm_and_after_a_restart() {
    for json_type in [
        "application/json",
        "application/vnd+hashicorp.releases-api.v0+json",
    ] {
        for zip_type in ["application/zip", "application/x-zip-compressed"] {
            let mut upstream = Upstream::start();
            let mut site = Site::new("terraform", &["1.8.5", "1.9.0"]);
            (site.json_type, site.zip_type) = (json_type, zip_type);
            site.publish(&upstream);
            let setup = site.setup(&upstream);
            let larder = setup.start().await;
            for _ in ["cold", "warm"] {
                hc_install(&larder, &site).await.unwrap();
                setup.holds(1).await;
            }
            let archive = site.newest().archive_path();
            assert_eq!(upstream.gets(RELEASES, &archive), 1);
            let agents = upstream.journal();
            let mut agents = agents.iter().filter(|seen| seen.target == archive);
            assert!(agents.all(|seen| seen.header("user-agent") == Some("hc-install/0.9.2")));

            larder.terminate().await;
            upstream.stop();
            let larder = setup.start().await;
            hc_install(&larder, &site).await.unwrap();
        }
    }
}

/// Where upstream announces no length it fails, with larder or without, until larder holds the zip.
#[tokio::test]
async fn hc_install_gets_a_length_from_larder_where_upstream_has_none() {
    let upstream = Upstream::start();
    let site = Site::new("terraform", &["1.9.0"]);
    site.publish(&upstream);
    let chunked = Reply::archive(site.newest().archive.clone()).chunked();
    upstream.route(RELEASES, &site.newest().archive_path(), chunked);
    let larder = site.setup(&upstream).start().await;
    larder.client().get(&site.newest().archive_url()).await;
    larder.setup.holds(1).await;
    hc_install(&larder, &site).await.unwrap();
}

#[tokio::test]
async fn hc_install_gets_no_corrupt_zip() {
    let upstream = Upstream::start();
    let site = Site::new("terraform", &["1.9.0"]);
    site.publish(&upstream);
    let corrupt = Reply::archive(site.newest().archive.clone()).corrupt_at(150_000);
    upstream.route(RELEASES, &site.newest().archive_path(), corrupt);
    let larder = site.setup(&upstream).start().await;
    let failure = hc_install(&larder, &site).await.unwrap_err();
    assert!(failure.contains("unexpected EOF"), "{failure}");
}

async fn hc_install(larder: &Larder, site: &Site) -> Result<(), Failure> {
    let program = Program::new(larder, HC_INSTALL);
    let product = site.newest();
    let site_url = |path: &str| format!("https://{RELEASES}{path}");
    let index = async |url: &str| {
        let got = program.get_ok(url).await?;
        match got.header("content-type") {
            Some("application/json" | "application/vnd+hashicorp.releases-api.v0+json") => {}
            other => return Err(format!("unexpected Content-Type: {other:?}")),
        }
        serde_json::from_slice::<Value>(&got.body).map_err(|e| e.to_string())
    };
    let versions = index(&site.index_url()).await?;
    assert_eq!(versions, site.index());
    let folder = product.folder();
    let version = index(&site_url(&format!("{folder}index.json"))).await?;
    let build = &version["builds"][0];
    // Of the signatures it takes the one by the key that it knows.
    let names = version["shasums_signatures"].as_array().unwrap();
    let mut names = names.iter().filter_map(Value::as_str);
    let signature = names
        .find(|name| name.ends_with("_SHA256SUMS.72D7468F.sig"))
        .unwrap();

    let signature = program
        .get_ok(&site_url(&format!("{folder}{signature}")))
        .await?;
    assert_eq!(signature.body, site.released.last().unwrap().1);
    let sums = version["shasums"].as_str().unwrap();
    let sums = program
        .get_ok(&site_url(&format!("{folder}{sums}")))
        .await?;
    assert_eq!(sums.body, product.sums);
    let sum = sum_of(&sums.text(), build["filename"].as_str().unwrap())?;

    let zip = program.get_ok(build["url"].as_str().unwrap()).await?;
    match zip.header("content-type") {
        Some(own) if own == site.zip_type => {}
        other => return Err(format!("unexpected content-type: {other:?}")),
    }
    if content_length(&zip) != Some(zip.body.len()) {
        return Err(format!("unexpected size: {:?}", zip.headers));
    }
    match sha256(&zip.body) == sum {
        true => Ok(()),
        false => Err("checksum mismatch".into()),
    }
}

// --- setup-terraform ---

#[tokio::test]
async fn setup_terraform_installs_what_the_sums_say_though_it_reads_none() {
    let upstream = Upstream::start();
    let site = Site::new("terraform", &["1.8.5", "1.9.0"]);
    site.publish(&upstream);
    let larder = site.setup(&upstream).start().await;
    for _ in ["cold", "warm"] {
        let zip = setup_terraform(&larder, &site).await.unwrap();
        assert!(zip == site.newest().archive);
        larder.setup.holds(1).await;
    }
    assert_eq!(upstream.gets(RELEASES, &site.newest().archive_path()), 1);
    assert_eq!(upstream.gets(RELEASES, &site.newest().sums_path()), 1);
}

/// It tries three times, and unpacks whatever ends well.
#[tokio::test]
async fn setup_terraform_never_completes_a_corrupt_zip() {
    let upstream = Upstream::start();
    let site = Site::new("terraform", &["1.9.0"]);
    site.publish(&upstream);
    let product = site.newest();
    let good = Reply::archive(product.archive.clone());
    let truncated = product.archive.slice(..200_000);
    for bad in [
        good.clone().corrupt_at(0),
        good.clone().corrupt_at(product.archive.len() as u64 - 1),
        good.clone().corrupt_at(150_000).chunked(),
        Reply::archive(truncated),
        Reply::archive(vec![]),
        Reply::new(200, "text/html", "<html>log in first</html>"),
    ] {
        upstream.route(RELEASES, &product.archive_path(), bad);
        let larder = site.setup(&upstream).start().await;
        setup_terraform(&larder, &site).await.unwrap_err();
        larder.setup.holds(0).await;

        upstream.route(RELEASES, &product.archive_path(), good.clone());
        let zip = setup_terraform(&larder, &site).await.unwrap();
        assert!(zip == product.archive);
    }
}

async fn setup_terraform(larder: &Larder, site: &Site) -> Result<Vec<u8>, Failure> {
    let lister = Program::new(
        larder,
        &[
            ("Accept", "application/json, text/plain, */*"),
            ("User-Agent", "GitHub Action: Setup Terraform"),
            ("Accept-Encoding", "gzip, compress, deflate, br"),
        ],
    );
    let index = lister.get(&site.index_url()).await;
    if !(200..300).contains(&index.status) {
        return Err(format!("status {}", index.status));
    }
    let build = &index.json()["versions"][&site.newest().version]["builds"][0];
    let url = build["url"].as_str().unwrap().to_owned();

    let headers = &[
        ("user-agent", "actions/tool-cache"),
        ("Connection", "close"),
    ];
    let downloader = Program::new(larder, headers);
    let mut failure = String::new();
    for _ in 0..3 {
        let zip = downloader.get(&url).await;
        match (zip.status, zip.complete) {
            (200, true) => return Ok(zip.body),
            (200, false) => failure = "aborted".into(),
            (status @ (408 | 429 | 500..), _) => failure = format!("status {status}"),
            (status, _) => return Err(format!("status {status}")),
        }
    }
    Err(failure)
}

// --- packer ---

/// The manifest is a file of the release; some sums list it, others do not.
#[tokio::test]
async fn packer_installs_a_plugin_whether_or_not_the_sums_list_its_manifest() {
    for listed in [true, false] {
        let mut upstream = Upstream::start();
        let site = packer_site(listed);
        site.publish(&upstream);
        publish_manifest(&upstream, &site, Reply::file("application/json", MANIFEST));
        let setup = site.setup(&upstream);
        let larder = setup.start().await;
        for _ in ["cold", "warm"] {
            packer_init(&larder, &site).await.unwrap();
        }
        eventually("the zip is held", || setup.staged().is_empty()).await;
        assert_eq!(upstream.gets(RELEASES, &site.newest().archive_path()), 1);

        upstream.stop();
        packer_init(&larder, &site).await.unwrap();
    }
}

#[tokio::test]
async fn packer_is_told_of_every_failure_by_the_status() {
    let upstream = Upstream::start();
    let site = packer_site(true);
    let product = site.newest();
    let larder = site.setup(&upstream).start().await;
    let paths = [
        "/packer-plugin-docker/index.json".to_owned(),
        product.sums_path(),
        manifest_path(&site),
        product.archive_path(),
    ];
    for path in &paths {
        for status in [403, 404, 429, 500, 503] {
            site.publish(&upstream);
            publish_manifest(&upstream, &site, Reply::file("application/json", MANIFEST));
            upstream.route(RELEASES, path, Reply::status(status));
            let program = Program::new(&larder, GO);
            let got = program.get(&format!("https://{RELEASES}{path}")).await;
            assert!(got.status >= 400 && got.complete, "{path}: {status}");
        }
    }
}

const MANIFEST: &str = "{\"version\":1,\"metadata\":{\"protocol_version\":\"5.0\"}}\n";

fn packer_site(lists_manifest: bool) -> Site {
    let mut product = Product::new("packer-plugin-docker", "1.1.1");
    if lists_manifest {
        let name = "packer-plugin-docker_1.1.1_manifest.json";
        let line = registry::sums_line(name, MANIFEST.as_bytes());
        product.sums = [&product.sums[..], line.as_bytes()].concat().into();
    }
    Site::of([product])
}

fn manifest_path(site: &Site) -> String {
    site.newest()
        .sums_path()
        .replace("SHA256SUMS", "manifest.json")
}

fn publish_manifest(upstream: &Upstream, site: &Site, reply: Reply) {
    upstream.route(RELEASES, &manifest_path(site), reply);
}

async fn packer_init(larder: &Larder, site: &Site) -> Result<(), Failure> {
    let program = Program::new(larder, GO);
    let product = site.newest();
    let get = async |path: &str| {
        let got = program.get(&format!("https://{RELEASES}{path}")).await;
        match (got.status, got.complete) {
            (400.., _) => Err(format!("{path}: {}", got.status)),
            (_, false) => Err(format!("{path}: unexpected EOF")),
            _ => Ok(got),
        }
    };
    let index = get("/packer-plugin-docker/index.json").await?.json();
    assert!(
        index["versions"]
            .as_object()
            .unwrap()
            .contains_key(&product.version)
    );
    let sums = get(&product.sums_path()).await?.text();
    let sum = sum_of(&sums, &product.filename())?;
    let manifest = get(&manifest_path(site)).await?;
    assert_eq!(manifest.text(), MANIFEST);
    let zip = get(&product.archive_path()).await?;
    match sha256(&zip.body) == sum {
        true => Ok(()),
        false => Err("Checksums did not match".into()),
    }
}
