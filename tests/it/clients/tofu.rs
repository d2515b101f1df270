//! OpenTofu and terragrunt: they speak the registries' protocols.

use super::*;
use crate::common::registry::{publish_discovery, registry_json};

// --- OpenTofu ---

const TOFU: Headers = &[
    ("User-Agent", "OpenTofu/1.12.0"),
    ("X-Terraform-Version", "1.12.0"),
    ("Accept-Encoding", "gzip"),
];

/// Zips lie on GitHub, behind a redirect to a URL that works once; the document names no keys.
#[tokio::test]
async fn opentofu_installs_what_has_no_keys_and_lies_behind_signed_urls() {
    let mut upstream = Upstream::start();
    let release = keyless();
    publish(&upstream, &release);
    let setup = Setup::new(&upstream);
    let larder = setup.start().await;
    for _ in ["cold", "warm"] {
        tofu_init(&larder, &release).await.unwrap();
        setup.holds(1).await;
    }
    assert_eq!(upstream.gets(ASSETS, &release.archive_asset_path()), 1);
    for end in ["/versions", "/download/linux/amd64"] {
        let told = |seen: &Seen| seen.header("x-terraform-version") == Some("1.12.0");
        let asked = |seen: &Seen| seen.host == OPENTOFU && seen.path().ends_with(end);
        assert!(upstream.count(asked) > 0);
        assert_eq!(
            upstream.count(asked),
            upstream.count(|seen| asked(seen) && told(seen))
        );
    }

    larder.terminate().await;
    upstream.stop();
    let larder = setup.start().await;
    tofu_init(&larder, &release).await.unwrap();
}

#[tokio::test]
async fn opentofu_gets_no_corrupt_zip_from_github() {
    let upstream = Upstream::start();
    let release = keyless();
    publish(&upstream, &release);
    let corrupt = Reply::archive(release.archive()).corrupt_at(150_000);
    release.publish_archive(&upstream, corrupt);
    let larder = Setup::new(&upstream).start().await;
    let failure = tofu_init(&larder, &release).await.unwrap_err();
    assert!(failure.contains("unexpected EOF"), "{failure}");
    release.publish_archive(&upstream, Reply::archive(release.archive()));
    tofu_init(&larder, &release).await.unwrap();
}

/// Every platform, every hash, every digit: whatever else larder changes in that document.
#[tokio::test]
async fn the_packages_of_a_document_pass_letter_for_letter() {
    let upstream = Upstream::start();
    let release = keyless();
    publish(&upstream, &release);
    let larder = Setup::new(&upstream).start().await;
    let got = Program::new(&larder, TOFU)
        .get(&release.document_url())
        .await;
    let text = got.text();
    let ours = format!("https://{OPENTOFU}/.larder/");
    assert_eq!(text.matches(&ours).count(), 3, "{text}");
    assert!(text.contains(&packages(&release)), "{text}");
    assert_eq!(content_length(&got), Some(got.body.len()));
}

/// Where a module lies is said by a header, or by JSON with or without a word on credentials.
#[tokio::test]
async fn opentofu_is_told_where_modules_lie_and_fetches_from_the_registry_itself() {
    let upstream = Upstream::start();
    publish_discovery(&upstream, OPENTOFU);
    let base = "/v1/modules/someone/vpc/aws";
    let list = json!({"modules": [{"versions": [{"version": "1.0.0"}, {"version": "2.0.0"}, {"version": "3.0.0"}]}]});
    upstream.route(OPENTOFU, &format!("{base}/versions"), registry_json(&list));
    let get = "git::https://github.com/someone/terraform-aws-vpc?ref=v1.0.0";
    let by_header = Reply::new(204, "text/plain", "").header("X-Terraform-Get", get);
    let by_location = format!("{{ \"location\":\"{get}\" }}\n");
    let direct =
        "{\"location\":\"./package.zip?archive=zip\", \"use_registry_credentials\": false}";
    let at = |version: &str, file: &str| format!("{base}/{version}/{file}");
    upstream.route(OPENTOFU, &at("1.0.0", "download"), by_header);
    upstream.route(
        OPENTOFU,
        &at("2.0.0", "download"),
        Reply::json(by_location.clone()),
    );
    upstream.route(OPENTOFU, &at("3.0.0", "download"), Reply::json(direct));
    let package = Product::sized("module", "3.0.0", 100_000).archive;
    let reply = Reply::archive(package.clone());
    upstream.route(OPENTOFU, &at("3.0.0", "package.zip"), reply);
    let larder = Setup::new(&upstream).start().await;
    let program = Program::new(&larder, TOFU);
    let url = |path: &str| format!("https://{OPENTOFU}{path}");

    for _ in ["cold", "warm"] {
        let versions = program
            .get_ok(&url(&format!("{base}/versions")))
            .await
            .unwrap();
        assert_eq!(versions.json(), list);
        let got = program.get(&url(&at("1.0.0", "download"))).await;
        assert_eq!(
            (got.status, got.header("x-terraform-get")),
            (204, Some(get))
        );
        let got = program
            .get_ok(&url(&at("2.0.0", "download")))
            .await
            .unwrap();
        assert_eq!(got.text(), by_location);
        assert_eq!(got.header("x-terraform-get"), None);
        let got = program
            .get_ok(&url(&at("3.0.0", "download")))
            .await
            .unwrap();
        assert_eq!(got.text(), direct);

        let fetcher = &[
            ("User-Agent", "OpenTofu/1.12.0"),
            ("X-Terraform-Version", "1.12.0"),
            ("Accept", "application/zip, application/x-tar; *;q=0.1"),
            ("Accept-Encoding", "identity, gzip, *;q=0.1"),
        ];
        let fetcher = Program::new(&larder, fetcher);
        let from = url(&format!("{}?archive=zip", at("3.0.0", "package.zip")));
        let got = fetcher.get_ok(&from).await.unwrap();
        assert!(got.body == package);
        assert_eq!(content_length(&got), Some(package.len()));
    }
}

/// A release whose document names no keys.
fn keyless() -> Release {
    Release::new("someone", "thing", "1.2.3")
        .on(OPENTOFU, Home::GitHub)
        .naming(&[])
}

/// As no library would write it: a number may have more digits than a float keeps.
fn packages(release: &Release) -> String {
    let hash = release.digest();
    let size = release.archive().len();
    format!(
        "\"packages\":{{ \"linux_amd64\" : {{\"hashes\":[\"zh:{hash}\", \"h1:\\u0041BC/+=\"],\"package_size\":{size}}},\
         \"windows_arm64\":{{\"package_size\":9007199254740993,\"hashes\":[ ]}}}}"
    )
}

fn publish(upstream: &Upstream, release: &Release) {
    release.publish(upstream);
    let document = release.document("linux_amd64").to_string();
    let document = format!(
        "{},{}}}",
        document.strip_suffix('}').unwrap(),
        packages(release)
    );
    let reply = Reply::json(document).etag("\"with packages\"");
    upstream.route(OPENTOFU, &release.document_path("linux_amd64"), reply);
}

async fn tofu_init(larder: &Larder, release: &Release) -> Result<(), Failure> {
    let program = Program::new(larder, TOFU);
    let registry = format!("https://{}", release.registry);
    let disco = Program::new(
        larder,
        &[
            ("User-Agent", "OpenTofu/1.12.0"),
            ("Accept", "application/json"),
            ("Accept-Encoding", "gzip"),
        ],
    );
    let services = disco
        .get_ok(&format!("{registry}/.well-known/terraform.json"))
        .await?;
    assert_eq!(services.header("content-type"), Some("application/json"));
    let providers = services.json()["providers.v1"].as_str().unwrap().to_owned();
    let base = format!(
        "{registry}{providers}{}/{}",
        release.namespace, release.name
    );
    let versions = program.get_ok(&format!("{base}/versions")).await?.json();
    assert_eq!(versions["versions"][0]["version"], release.version);
    let document = program
        .get_ok(&format!("{base}/{}/download/linux/amd64", release.version))
        .await?
        .json();
    assert_eq!(
        (&document["os"], &document["arch"]),
        (&json!("linux"), &json!("amd64"))
    );
    let named = |key: &str| document[key].as_str().unwrap();

    // Without keys too, the signature must be there to be fetched.
    let sums = program.get_ok(named("shasums_url")).await?;
    let signature = program.get_ok(named("shasums_signature_url")).await?;
    assert_eq!(
        (sums.body, signature.body),
        (release.sums.to_vec(), release.signature.to_vec())
    );

    // A client of its own, which knows nothing of registries.
    let fetcher = Program::new(
        larder,
        &[
            ("User-Agent", "OpenTofu/1.12.0"),
            ("Accept-Encoding", "gzip"),
        ],
    );
    let zip = fetcher.get_ok(named("download_url")).await?;
    if content_length(&zip).is_some_and(|length| zip.body.len() < length) {
        return Err("incorrect response size".into());
    }
    let package = &document["packages"]["linux_amd64"];
    let hash = sha256(&zip.body);
    assert_eq!(package["package_size"], zip.body.len());
    assert_eq!(package["hashes"][0], format!("zh:{hash}"));
    match hash == named("shasum")
        && sum_of(&String::from_utf8_lossy(&release.sums), named("filename"))? == hash
    {
        true => Ok(()),
        false => Err("checksum mismatch".into()),
    }
}

// --- terragrunt ---

/// Go's client again, which asks for gzip itself and so would have to undo it itself.
const GRUNT: Headers = GO;

/// Its provider cache, in as many processes as there are units, all at once.
#[tokio::test]
async fn twenty_terragrunts_are_one_download() {
    for home in [Home::Releases, Home::GitHub] {
        let upstream = Upstream::start();
        let release = Release::new("someone", "thing", "1.2.3").on(TERRAFORM, home);
        release.publish(&upstream);
        let tap = Tap::at(1000);
        release.publish_archive(&upstream, Reply::archive(release.archive()).tapped(&tap));
        let larder = Setup::new(&upstream).start().await;
        let mut units = Vec::new();
        for _ in 0..20 {
            let program = Program::new(&larder, GRUNT);
            let release = release.clone();
            units.push(tokio::spawn(async move {
                let document = grunt_asks(&program, &release).await?;
                let named = |key: &str| document[key].as_str().unwrap().to_owned();
                let zip = program
                    .client
                    .send("GET", &named("download_url"), GRUNT)
                    .await;
                Ok::<_, Failure>((program, document, zip))
            }));
        }
        let mut begun = Vec::new();
        for unit in units {
            begun.push(unit.await.unwrap().unwrap());
        }
        // All of them wait for the one.
        tap.open();
        for (program, document, zip) in begun {
            let zip = zip.finish().await;
            zip.assert_is(&release.archive());
            assert_eq!(zip.header("content-encoding"), None);
            assert_eq!(content_length(&zip), Some(zip.body.len()));
            let named = |key: &str| document[key].as_str().unwrap();
            let sums = program.get_ok(named("shasums_url")).await.unwrap();
            let signature = program
                .get_ok(named("shasums_signature_url"))
                .await
                .unwrap();
            assert_eq!(sums.body, release.sums);
            assert_eq!(signature.body, release.signature);
            assert_eq!(
                sum_of(&sums.text(), named("filename")).unwrap(),
                named("shasum")
            );
        }
        let (host, path) = match home {
            Home::Releases => release.archive_path(),
            Home::GitHub => (ASSETS, release.archive_asset_path()),
        };
        assert_eq!(upstream.gets(host, &path), 1);
        larder.setup.holds(1).await;
    }
}

/// It takes any other status than 200 for an empty answer, and tries a zip six times.
#[tokio::test]
async fn terragrunt_gets_whole_answers_from_an_upstream_in_trouble() {
    let upstream = Upstream::start();
    let release = Release::new("someone", "thing", "1.2.3");
    release.publish(&upstream);
    let good = registry_json(&release.versions());
    let busy = Reply::status(503);
    upstream.route_turns(
        TERRAFORM,
        &release.versions_path(),
        vec![busy.clone(), good],
    );
    let whole = Reply::archive(release.archive());
    let turns = vec![busy, whole.clone().cut_after(100_000), whole];
    release.publish_archive_turns(&upstream, turns);
    let larder = Setup::new(&upstream).start().await;
    let program = Program::new(&larder, GRUNT);
    let document = grunt_asks(&program, &release).await.unwrap();
    let zip = program
        .get_ok(document["download_url"].as_str().unwrap())
        .await
        .unwrap();
    assert!(zip.body == release.archive());
}

/// As far as the document of the archive.
async fn grunt_asks(program: &Program, release: &Release) -> Result<Value, Failure> {
    let registry = format!("https://{}", release.registry);
    let services = program
        .get_ok(&format!("{registry}/.well-known/terraform.json"))
        .await?
        .json();
    let providers = services["providers.v1"].as_str().unwrap();
    let base = format!(
        "{registry}{providers}{}/{}",
        release.namespace, release.name
    );
    let versions = program.get_ok(&format!("{base}/versions")).await?.json();
    assert_eq!(versions, release.versions());
    let document = format!("{base}/{}/download/linux/amd64", release.version);
    Ok(program.get_ok(&document).await?.json())
}

/// Without that cache it is many `terraform init` at once.
#[tokio::test(flavor = "multi_thread")]
async fn terraform_inits_at_the_same_time_are_one_download() {
    if crate::terraform::no_terraform() {
        return;
    }
    let upstream = Upstream::start();
    let releases = [Release::sized("hashicorp", "null", "3.2.1", 3 << 20)];
    releases[0].publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let names = ["one", "two", "three", "four"];
    let projects = names.map(|name| crate::terraform::Project::new(&larder, name, &releases));
    std::thread::scope(|scope| {
        for project in &projects {
            scope.spawn(|| project.init_succeeds());
        }
    });
    let (host, path) = releases[0].archive_path();
    assert_eq!(upstream.gets(host, &path), 1);
    assert!(
        projects
            .iter()
            .all(|project| project.lock() == projects[0].lock())
    );
}
