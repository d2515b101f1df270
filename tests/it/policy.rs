//! `allow` and `deny`: versions that users may not have are not listed, and refused where they are
//! asked for all the same.

use std::process::Output;

use serde_json::{Value, json};

use crate::common::registry::{registry_json, version_list};
use crate::common::upstream::Seen;
use crate::common::*;
use crate::terraform::{Project, no_terraform};

const CONTACT: &str = "security@corp.example";
const DENY: &str =
    "policy_contact = \"security@corp.example\"\ndeny = [\"hashicorp/thing >= 2.0.0\"]\n";
const RULE: &str = "deny = \"hashicorp/thing >= 2.0.0\"";
const AUTHORIZATION: [(&str, &str); 1] = [("Authorization", "Bearer token")];

// --- Lists ---

#[tokio::test]
async fn a_denied_version_is_not_listed_and_a_warning_says_why() {
    let upstream = Upstream::start();
    let mut list = version_list(&["1.0.0", "2.0.0", "1.1.0", "2.0.0-beta1", "nightly"]);
    list["extra"] = json!({"b": [1e2, null], "a": "\u{fc}"});
    list["versions"][0]["more"] = json!([{"x": 1}]);
    list["warnings"] = json!(["an older warning"]);
    let reply = registry_json(&list).last_modified("Wed, 12 Mar 2025 17:04:05 GMT");
    upstream.route(TERRAFORM, LIST, reply);
    let larder = Setup::new(&upstream).config(DENY).start().await;
    let client = larder.client();
    let url = format!("https://{TERRAFORM}{LIST}");

    let got = client.get(&url).await;

    let mut shown = got.json();
    let warnings = shown["warnings"].take();
    assert_eq!(warnings.as_array().unwrap().len(), 2, "{warnings}");
    assert_eq!(warnings[0], "an older warning");
    let warning = warnings[1].as_str().unwrap();
    // A version that cannot be read may be any.
    for word in [
        "hides",
        "2 by",
        RULE,
        CONTACT,
        "registry.terraform.io/hashicorp/thing",
    ] {
        assert!(warning.contains(word), "{word}: {warning}");
    }
    let versions = list["versions"].as_array_mut().unwrap();
    versions.retain(|v| v["version"] != "2.0.0" && v["version"] != "nightly");
    list["warnings"] = Value::Null;
    assert_eq!(shown, list);
    assert_eq!(got.header("content-type"), Some("application/json"));

    // The client's own copy is of this list, not of upstream's.
    let etag = got.header("etag").unwrap();
    assert_eq!(got.header("last-modified"), None);
    let again = client.get_with(&url, &[("If-None-Match", etag)]).await;
    assert_eq!(again.status, 304);
    let head = client.head(&url).await;
    assert_eq!(head.header("content-length"), got.header("content-length"));
}

#[tokio::test]
async fn what_no_rule_speaks_of_passes_byte_for_byte() {
    let upstream = Upstream::start();
    let odd = "{ \"versions\" :[ {\"version\":\"2.0.0\",\n\t\"x\":1e2}] }\r\n";
    let path = "/v1/providers/hashicorp/other/versions";
    upstream.route(TERRAFORM, path, Reply::json(odd));
    upstream.route(OPENTOFU, LIST, Reply::json(odd));
    let larder = Setup::new(&upstream).config(DENY).start().await;
    for url in [
        format!("https://{TERRAFORM}{path}"),
        format!("https://{OPENTOFU}{LIST}"),
    ] {
        larder.client().get(&url).await.assert_is(odd.as_bytes());
    }
}

#[tokio::test]
async fn products_are_filtered_in_index_and_pages() {
    let upstream = Upstream::start();
    let versions = ["0.15.5", "1.0.0", "1.9.0"];
    let index = |versions: &[&str]| {
        let versions = versions
            .iter()
            .map(|v| (v.to_string(), json!({"version": v})));
        let versions: serde_json::Map<_, _> = versions.collect();
        json!({"name": "terraform", "versions": versions, "other": 1})
    };
    let page = |name: &str, versions: &[&str]| {
        let line = |v: &&str| {
            format!("    <li>\n    <a href=\"/{name}/{v}/\">{name}_{v}</a>\n    </li>\n")
        };
        let lines: String = versions.iter().map(line).collect();
        format!("<html>\n<ul>\n<li><a href=\"../\">../</a></li>\n{lines}</ul>\n</html>\n")
    };
    for name in ["terraform", "packer"] {
        let html = Reply::new(200, "text/html", page(name, &versions));
        upstream.route(RELEASES, &format!("/{name}/"), html);
        let json = registry_json(&index(&versions));
        upstream.route(RELEASES, &format!("/{name}/index.json"), json);
    }
    let config = "deny = [\"terraform < 1.0.0\", \"releases.hashicorp.com/terraform 1.9.0\"]\n";
    let larder = Setup::new(&upstream).config(config).start().await;
    let get = async |path: &str| {
        larder
            .client()
            .get(&format!("https://{RELEASES}{path}"))
            .await
    };

    assert_eq!(get("/terraform/index.json").await.json(), index(&["1.0.0"]));
    let links = |page: &str| page.matches("href=\"/terraform/").count();
    let shown = get("/terraform/").await.text();
    assert_eq!(links(&shown), 1, "{shown}");
    assert!(shown.contains("/terraform/1.0.0/"), "{shown}");
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    get(&product.archive_path()).await.assert_refused(403);

    assert_eq!(get("/packer/index.json").await.json(), index(&versions));
    let all = get("/packer/").await.text();
    assert_eq!(all, page("packer", &versions));
}

// --- Refusals ---

#[tokio::test]
async fn a_denied_versions_document_and_archive_are_refused_with_rule_and_contact() {
    for home in [Home::Releases, Home::GitHub] {
        let upstream = Upstream::start();
        let [old, new] = published(&upstream, home);
        let setup = Setup::new(&upstream);
        // Before the rule was made, all of it was kept.
        let larder = setup.start().await;
        let mut named = Vec::new();
        for release in [&old, &new] {
            install(&larder.client(), release).await;
            let document = larder.client().get(&release.document_url()).await.json();
            named.push(document["download_url"].as_str().unwrap().to_owned());
        }
        setup.holds(2).await;
        larder.terminate().await;

        let setup = setup.config(DENY);
        let asked = |upstream: &Upstream| upstream.count(|seen| seen.target.contains("2.0.0"));
        let before = asked(&upstream);
        for offline in [false, true] {
            let mut setup = setup.clone();
            if offline {
                setup = setup.arg("--offline");
            }
            let larder = setup.start().await;
            let client = larder.client();
            for url in [new.document_url(), named[1].clone()] {
                let got = client.get(&url).await;
                let words = got.assert_refused(403);
                for word in [RULE, CONTACT, "registry.terraform.io/hashicorp/thing 2.0.0"] {
                    assert!(words.contains(word), "{word}: {words}");
                }
                assert_eq!(got.reason, words);
                assert_eq!(client.head(&url).await.status, 403, "{url}");
                let range = client.get_with(&url, &[("Range", "bytes=0-9")]).await;
                range.assert_refused(403);
                if !offline {
                    let private = client.get_with(&url, &AUTHORIZATION).await;
                    private.assert_refused(403);
                }
            }
            larder.logs(&["WARN", "refused by policy", "2.0.0"]).await;
            assert!(larder.metric("larder_policy_refusals_total").await >= 6.0);
            client.get(&old.document_url()).await.json();
            client.get(&named[0]).await.assert_is(&old.archive());
            larder.terminate().await;
        }
        assert_eq!(asked(&upstream), before);
        // Refused, not thrown away.
        setup.holds(2).await;
    }
}

/// The list is asked for with the client's own credentials, and shown to it alone.
#[tokio::test]
async fn credentials_are_no_way_round() {
    let upstream = Upstream::start();
    let [old, new] = published(&upstream, Home::Releases);
    let larder = Setup::new(&upstream).config(DENY).start().await;
    let client = larder.client();
    let list = client.get_with(&old.versions_url(), &AUTHORIZATION).await;
    let versions = list.json()["versions"].clone();
    assert_eq!(versions, version_list(&["1.0.0"])["versions"]);
    assert!(list.json()["warnings"][0].as_str().unwrap().contains(RULE));
    let sent = |seen: &Seen| seen.header("authorization").is_some();
    assert_eq!(upstream.count(sent), 1);
    for url in [new.document_url(), new.archive_url()] {
        let got = client.get_with(&url, &AUTHORIZATION).await;
        assert!(got.assert_refused(403).contains(RULE));
    }
    assert_eq!(upstream.count(sent), 1);
    let got = client.get_with(&old.archive_url(), &AUTHORIZATION).await;
    got.assert_is(&old.archive());
}

#[tokio::test]
async fn the_releases_site_is_no_way_round() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let setup = Setup::new(&upstream);
    for deny in [
        "hashicorp/null",
        "hashicorp/*",
        "*/*/null",
        "registry.terraform.io/*",
    ] {
        let config = format!("deny = \"{deny}\"\n");
        let larder = setup.clone().config(&config).start().await;
        let got = larder.client().get(&release.archive_url()).await;
        let words = got.assert_refused(403);
        assert!(words.contains(config.trim()), "{words}");
        let (host, path) = release.archive_path();
        assert_eq!(upstream.gets(host, &path), 0);
        larder.terminate().await;
    }
    let larder = setup
        .config("deny = \"hashicorp/null < 3.2.1\"\n")
        .start()
        .await;
    let got = larder.client().get(&release.archive_url()).await;
    got.assert_is(&release.archive());
}

// --- allow ---

#[tokio::test]
async fn with_a_list_of_what_is_allowed_all_else_is_refused() {
    let upstream = Upstream::start();
    let [old, new] = published(&upstream, Home::Releases);
    let other = Release::new("hashicorp", "other", "1.0.0");
    let elsewhere = Release::new("someone", "thing", "1.0.0").on(TERRAFORM, Home::GitHub);
    let product = Product::new("terraform", "1.9.0");
    other.publish(&upstream);
    elsewhere.publish(&upstream);
    product.publish(&upstream);
    let config = format!(
        "policy_contact = \"{CONTACT}\"\nallow = [\"acme/*\", \"registry.terraform.io/hashicorp/th* ~> 1.0\"]\n"
    );
    let larder = Setup::new(&upstream).config(&config).start().await;
    let client = larder.client();

    let list = client.get(&old.versions_url()).await.json();
    assert_eq!(list["versions"], version_list(&["1.0.0"])["versions"]);
    install(&client, &old).await.assert_is(&old.archive());
    let mut all = vec![
        client.get(&new.document_url()).await.assert_refused(403),
        client.get(&new.archive_url()).await.assert_refused(403),
        client.get(&other.archive_url()).await.assert_refused(403),
    ];
    for release in [&other, &elsewhere] {
        // Of an empty list, terraform says no more than that there is no such provider.
        let list = client.get(&release.versions_url()).await;
        assert_eq!(list.json()["versions"], json!([]));
        all.push(list.assert_refused(451));
        let document = client.get(&release.document_url()).await;
        all.push(document.assert_refused(403));
    }
    for words in all {
        assert!(words.contains("`allow`"), "{words}");
        assert!(words.contains(CONTACT), "{words}");
    }
    // Of products the list does not speak.
    let got = client.get(&product.archive_url()).await;
    got.assert_is(&product.archive);
}

#[tokio::test]
async fn a_denial_comes_before_a_permission() {
    let upstream = Upstream::start();
    let [old, new] = published(&upstream, Home::Releases);
    let config = "allow = \"hashicorp/thing\"\ndeny = \"hashicorp/thing = 2.0.0\"\n";
    let larder = Setup::new(&upstream).config(config).start().await;
    let client = larder.client();
    client.get(&new.archive_url()).await.assert_refused(403);
    let got = client.get(&old.archive_url()).await;
    got.assert_is(&old.archive());
}

// --- terraform ---

#[tokio::test]
async fn terraform_picks_the_newest_version_that_is_left() {
    if no_terraform() {
        return;
    }
    let upstream = Upstream::start();
    let [old, new] = published(&upstream, Home::Releases);
    let setup = Setup::new(&upstream);
    let any = [Release {
        version: ">= 1.0.0".into(),
        ..old.clone()
    }];
    let larder = setup.clone().config(DENY).start().await;
    let project = Project::new(&larder, "project", &any);
    let output = project.init();
    assert!(output.status.success(), "{output:?}");
    assert_says_why(&output);
    let version = |release: &Release| format!("version     = \"{}\"", release.version);
    assert!(
        project.lock().contains(&version(&old)),
        "{}",
        project.lock()
    );
    larder.terminate().await;

    let larder = setup.config("").start().await;
    let project = Project::new(&larder, "without", &any);
    project.init_succeeds();
    assert!(
        project.lock().contains(&version(&new)),
        "{}",
        project.lock()
    );
}

#[tokio::test]
async fn terraform_installs_nothing_where_nothing_is_left() {
    if no_terraform() {
        return;
    }
    let upstream = Upstream::start();
    let [old, _] = published(&upstream, Home::Releases);
    let any = [Release {
        version: ">= 1.0.0".into(),
        ..old
    }];
    let config = format!("deny = [\"hashicorp/*\"]\npolicy_contact = \"{CONTACT}\"\n");
    let larder = Setup::new(&upstream).config(&config).start().await;
    let output = Project::new(&larder, "project", &any).init();
    assert!(!output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).replace(['\n', '│'], " ");
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        said.contains("hashicorp/*") && said.contains(CONTACT),
        "{said}"
    );
    assert_eq!(upstream.archive_bytes(), 0);
}

#[tokio::test]
async fn terraform_says_why_the_version_that_it_wants_is_not_there() {
    if no_terraform() {
        return;
    }
    let upstream = Upstream::start();
    let [_, new] = published(&upstream, Home::Releases);
    let larder = Setup::new(&upstream).config(DENY).start().await;
    let output = Project::new(&larder, "project", &[new]).init();
    assert!(!output.status.success(), "{output:?}");
    assert_says_why(&output);
}

/// Rule and contact are in what it prints.
#[track_caller]
fn assert_says_why(output: &Output) {
    // It breaks lines where they are long.
    let said = String::from_utf8_lossy(&output.stdout);
    let said: Vec<_> = said.split_whitespace().collect();
    let said = said.join(" ");
    for word in [RULE, CONTACT] {
        assert!(said.contains(word), "{word}: {said}");
    }
}

const LIST: &str = "/v1/providers/hashicorp/thing/versions";

/// hashicorp/thing in two versions.
fn published(upstream: &Upstream, home: Home) -> [Release; 2] {
    let versions = ["1.0.0", "2.0.0"];
    let releases = versions.map(|version| {
        let release = Release::sized("hashicorp", "thing", version, 50_000).on(TERRAFORM, home);
        release.publish(upstream);
        release
    });
    upstream.route(TERRAFORM, LIST, registry_json(&version_list(&versions)));
    releases
}
