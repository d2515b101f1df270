//! `min_age`: fresh versions are kept from users, by the date of their archive or by when larder
//! first heard of them.

use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use crate::common::registry::{registry_json, version_list};
use crate::common::upstream::Seen;
use crate::common::*;

const HOUR: Duration = Duration::from_secs(3600);
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
const RULE: &str = "policy_contact = \"security@corp.example\"\nmin_age = \"72h\"\n";
const AUTHORIZATION: [(&str, &str); 1] = [("Authorization", "Bearer token")];

// --- By the archive's date ---

#[tokio::test]
async fn a_fresh_version_is_not_listed_and_its_archive_refused() {
    for home in [Home::Releases, Home::GitHub] {
        let world = World::new(RULE, home).await;
        let old = world.publish("1.0.0", Some(YEAR));
        let fresh = world.publish("2.0.0", Some(HOUR));
        world.lists(&["1.0.0", "2.0.0"]);
        let client = world.larder.client();

        let list = world.list().await;
        assert_eq!(list["versions"], versions(&["1.0.0"]));
        let warning = list["warnings"][0].as_str().unwrap();
        for word in ["1 by", "min_age = 72h", "\"*\"", "security@corp.example"] {
            assert!(warning.contains(word), "{word}: {warning}");
        }
        let document = client.get(&fresh.document_url()).await;
        let mut refusals = vec![document];
        if home == Home::Releases {
            refusals.push(client.get(&fresh.archive_url()).await);
            let private = client.get_with(&fresh.archive_url(), &AUTHORIZATION).await;
            refusals.push(private);
            let head = client.head(&fresh.archive_url()).await;
            assert_eq!(head.status, 403);
        }
        for refusal in refusals {
            let words = refusal.assert_refused(403);
            for word in ["min_age = 72h", "1h old", "2.0.0", "security@corp.example"] {
                assert!(words.contains(word), "{word}: {words}");
            }
        }
        install(&client, &old).await.assert_is(&old.archive());
        world.larder.setup.holds(1).await;
    }
}

#[tokio::test]
async fn an_archive_is_judged_by_its_own_date_before_any_list() {
    let world = World::new(RULE, Home::Releases).await;
    let old = world.publish("1.0.0", Some(YEAR));
    let fresh = world.publish("2.0.0", Some(HOUR));
    let undated = world.publish("3.0.0", None);
    let client = world.larder.client();
    for release in [&fresh, &undated] {
        client.get(&release.archive_url()).await.assert_refused(403);
        assert_eq!(client.head(&release.archive_url()).await.status, 403);
    }
    let setup = world.larder.setup.clone();
    setup.holds(0).await;
    client
        .get(&old.archive_url())
        .await
        .assert_is(&old.archive());
    setup.holds(1).await;
    world.larder.terminate().await;

    // What is held bears its date.
    let text = RULE.replace("72h", "87600h");
    let larder = setup.config(&text).arg("--offline").start().await;
    let got = larder.client().get(&old.archive_url()).await;
    let words = got.assert_refused(403);
    assert!(words.contains("min_age = 87600h"), "{words}");
}

#[tokio::test]
async fn only_the_newest_versions_are_asked_about_and_only_once() {
    let world = World::new(RULE, Home::Releases).await;
    let names: Vec<String> = (0..30).map(|i| format!("1.{}.0", (i * 7) % 30)).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    names.iter().for_each(|name| {
        world.publish(name, Some(YEAR));
    });
    world.lists(&names);
    let shown = versions(&names);
    for _ in 0..2 {
        assert_eq!(world.list().await["versions"], shown);
    }
    let World {
        upstream, larder, ..
    } = world;
    let setup = larder.setup.clone();
    larder.terminate().await;
    let larder = setup.start().await;
    let list = larder.client().get(&list_url()).await.json();
    assert_eq!(list["versions"], shown);

    let asked = |name: &str| {
        let folder = format!("/{name}/");
        let asks = |seen: &Seen| seen.method == "HEAD" && seen.path().contains(&folder);
        upstream.count(asks)
    };
    let counts: Vec<_> = names.iter().map(|name| (asked(name), *name)).collect();
    assert!(counts.contains(&(1, "1.29.0")), "{counts:?}");
    assert!(counts.iter().all(|(count, _)| *count <= 1), "{counts:?}");
    let some = counts.iter().filter(|(count, _)| *count > 0).count();
    assert!(some <= 6, "{counts:?}");
}

#[tokio::test]
async fn a_backport_that_was_thought_old_is_refused_at_its_archive() {
    let world = World::new(RULE, Home::Releases).await;
    let backport = world.publish("1.0.1", Some(HOUR));
    let mut names = vec!["1.0.1".to_owned()];
    for i in 0..20 {
        let name = format!("2.{i}.0");
        world.publish(&name, Some(YEAR));
        names.push(name);
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    world.lists(&names);
    assert_eq!(world.list().await["versions"], versions(&names));
    let client = world.larder.client();
    let words = client
        .get(&backport.archive_url())
        .await
        .assert_refused(403);
    assert!(words.contains("min_age = 72h"), "{words}");
    world.larder.setup.holds(0).await;
}

// --- By first sight ---

#[tokio::test]
async fn a_version_that_appears_later_waits_until_it_is_old_enough() {
    let age = Duration::from_secs(4);
    let world = World::new("min_age = \"4s\"\n", Home::Releases).await;
    world.publish("1.0.0", Some(YEAR));
    world.publish("1.1.0", Some(YEAR));
    world.lists(&["1.0.0", "1.1.0"]);
    let all = versions(&["1.0.0", "1.1.0"]);
    assert_eq!(world.list().await["versions"], all);

    // One without a date, and one whose date is to come.
    let undated = world.publish("1.2.0", None);
    let dated = world.publish("1.3.0", None);
    let ahead = SystemTime::now() + HOUR;
    let ahead = Reply::archive(dated.archive()).last_modified(&httpdate::fmt_http_date(ahead));
    dated.publish_archive(&world.upstream, ahead);
    world.lists(&["1.0.0", "1.1.0", "1.2.0", "1.3.0"]);
    let before = Instant::now();
    assert_eq!(world.list().await["versions"], all);
    let setup = world.larder.setup.clone();
    let World {
        upstream: _upstream,
        larder,
        ..
    } = world;
    larder.terminate().await;

    // A restart forgets nothing.
    let larder = setup.start().await;
    let all = versions(&["1.0.0", "1.1.0", "1.2.0", "1.3.0"]);
    while larder.client().get(&list_url()).await.json()["versions"] != all {
        assert!(before.elapsed() < PATIENCE, "never old enough");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // Ages are whole seconds.
    assert!(before.elapsed() > age - Duration::from_secs(1), "too early");
    for release in [&undated, &dated] {
        let got = install(&larder.client(), release).await;
        got.assert_is(&release.archive());
    }
}

#[tokio::test]
async fn a_version_that_appears_later_with_an_old_archive_is_shown_at_once() {
    let world = World::new(RULE, Home::Releases).await;
    world.publish("1.0.0", Some(YEAR));
    world.lists(&["1.0.0"]);
    assert_eq!(world.list().await["versions"], versions(&["1.0.0"]));
    world.publish("1.1.0", Some(YEAR));
    world.publish("1.2.0", Some(HOUR));
    world.lists(&["1.0.0", "1.1.0", "1.2.0"]);
    assert_eq!(
        world.list().await["versions"],
        versions(&["1.0.0", "1.1.0"])
    );
}

#[tokio::test]
async fn a_silent_upstream_delays_the_list_by_seconds_and_hides_what_bears_no_date() {
    let world = World::new(RULE, Home::Releases).await;
    let gate = Gate::closed();
    let names = ["1.0.0", "1.1.0", "1.2.0"];
    for name in names {
        let release = world.publish(name, Some(YEAR));
        let date = httpdate::fmt_http_date(SystemTime::now() - YEAR);
        let reply = Reply::archive(release.archive()).last_modified(&date);
        release.publish_archive(&world.upstream, reply.held_by(&gate));
    }
    world.lists(&names);
    let before = Instant::now();
    let list = world.list().await;
    assert!(
        before.elapsed() < Duration::from_secs(7),
        "{:?}",
        before.elapsed()
    );
    assert_eq!(list["versions"], json!([]));
    // It was no answer: it is asked again.
    gate.open();
    assert_eq!(world.list().await["versions"], versions(&names));
}

// --- Rules ---

#[tokio::test]
async fn each_pattern_has_its_age() {
    let text = "[min_age]\n\"*\" = \"72h\"\n\"acme/*\" = \"1h\"\n\"acme/thing\" = \"0s\"\n\"acme/slow\" = \"8760h\"\n";
    let world = World::new(text, Home::Releases).await;
    for (namespace, name, shown) in [
        ("acme", "thing", true),
        ("acme", "other", true),
        ("acme", "slow", false),
        ("someone", "thing", false),
    ] {
        let release = Release::sized(namespace, name, "1.0.0", 20_000);
        let release = release.on(TERRAFORM, Home::GitHub);
        release.publish(&world.upstream);
        let date = httpdate::fmt_http_date(SystemTime::now() - 2 * HOUR);
        let reply = Reply::archive(release.archive()).last_modified(&date);
        release.publish_archive(&world.upstream, reply);
        let client = world.larder.client();
        let list = client.get(&release.versions_url()).await.json();
        let count = list["versions"].as_array().unwrap().len();
        assert_eq!(count == 1, shown, "{namespace}/{name}: {list}");
        match shown {
            true => install(&client, &release)
                .await
                .assert_is(&release.archive()),
            false => {
                let got = client.get(&release.document_url()).await;
                got.assert_refused(403);
            }
        }
    }
}

#[tokio::test]
async fn products_are_dated_by_their_sums() {
    let world = World::new(RULE, Home::Releases).await;
    let mut index = serde_json::Map::new();
    let mut page = String::new();
    for (version, age) in [("1.8.0", YEAR), ("1.9.0", HOUR)] {
        let product = Product::new("terraform", version);
        product.publish(&world.upstream);
        let date = httpdate::fmt_http_date(SystemTime::now() - age);
        let dated = |body: &bytes::Bytes| Reply::archive(body.clone()).last_modified(&date);
        for (path, body) in [
            (product.archive_path(), &product.archive),
            (product.sums_path(), &product.sums),
        ] {
            world.upstream.route(RELEASES, &path, dated(body));
        }
        index.insert(version.into(), json!({}));
        page.push_str(&format!("<a href=\"/terraform/{version}/\">x</a>\n"));
    }
    let index = registry_json(&json!({"name": "terraform", "versions": index}));
    world
        .upstream
        .route(RELEASES, "/terraform/index.json", index);
    let page = Reply::new(200, "text/html", page);
    world.upstream.route(RELEASES, "/terraform/", page);
    let client = world.larder.client();
    let get = async |path: &str| client.get(&format!("https://{RELEASES}{path}")).await;
    let index = get("/terraform/index.json").await.json();
    assert_eq!(index["versions"], json!({"1.8.0": {}}));
    let page = get("/terraform/").await.text();
    assert!(page.contains("1.8.0") && !page.contains("1.9.0"), "{page}");
    for (version, status) in [("1.8.0", 200), ("1.9.0", 403)] {
        let got = client
            .get(&Product::new("terraform", version).archive_url())
            .await;
        assert_eq!(got.status, status, "{version}");
    }
}

#[tokio::test]
async fn without_the_rule_nothing_is_asked_and_no_byte_changed() {
    let world = World::new("", Home::Releases).await;
    let fresh = world.publish("2.0.0", Some(Duration::ZERO));
    let odd = "{ \"versions\" :[ {\"version\":\"2.0.0\",\n\t\"platforms\":[{\"os\":\"linux\",\"arch\":\"amd64\"}]}] }\r\n";
    world.upstream.route(TERRAFORM, LIST, Reply::json(odd));
    let got = world.larder.client().get(&list_url()).await;
    got.assert_is(odd.as_bytes());
    assert_eq!(world.asked(), 0);
    let got = install(&world.larder.client(), &fresh).await;
    got.assert_is(&fresh.archive());
    assert!(!world.larder.setup.data_dir().join("sightings").exists());
}

const LIST: &str = "/v1/providers/hashicorp/thing/versions";

fn list_url() -> String {
    format!("https://{TERRAFORM}{LIST}")
}

/// As the list shows them.
fn versions(names: &[&str]) -> Value {
    version_list(names)["versions"].clone()
}

struct World {
    upstream: Upstream,
    larder: Larder,
    home: Home,
}

impl World {
    async fn new(config: &str, home: Home) -> Self {
        let upstream = Upstream::start();
        let larder = Setup::new(&upstream).config(config).start().await;
        Self {
            upstream,
            larder,
            home,
        }
    }

    /// A version of hashicorp/thing, whose archive is so old, or does not say.
    fn publish(&self, version: &str, age: Option<Duration>) -> Release {
        let release =
            Release::sized("hashicorp", "thing", version, 20_000).on(TERRAFORM, self.home);
        release.publish(&self.upstream);
        let mut reply = Reply::archive(release.archive()).no_validators();
        if let Some(age) = age {
            reply = reply.last_modified(&httpdate::fmt_http_date(SystemTime::now() - age));
        }
        release.publish_archive(&self.upstream, reply);
        release
    }

    fn lists(&self, names: &[&str]) {
        let list = registry_json(&version_list(names));
        self.upstream.route(TERRAFORM, LIST, list);
    }

    async fn list(&self) -> Value {
        self.larder.client().get(&list_url()).await.json()
    }

    /// Versions whose archive was asked about.
    fn asked(&self) -> usize {
        self.upstream.count(|seen| seen.method == "HEAD")
    }
}
