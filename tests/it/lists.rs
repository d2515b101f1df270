//! Version lists that go wrong: the last good one serves, but not for ever.

use std::time::{Duration, Instant};

use crate::common::registry::{registry_json, version_list};
use crate::common::*;

const LIST: &str = "/v1/providers/someone/thing/versions";
const TEN: [&str; 10] = [
    "1.0.0", "1.1.0", "1.2.0", "1.3.0", "1.4.0", "1.5.0", "1.6.0", "1.7.0", "1.8.0", "1.9.0",
];

#[tokio::test]
async fn a_list_that_lost_most_versions_is_not_believed_at_once() {
    let world = World::new("version_list_grace = \"24h\"\n").await;
    world.publishes(&TEN[6..]);
    for _ in 0..2 {
        let got = world.list().await;
        assert_eq!(got.json(), version_list(&TEN));
        let status = got.cache_status();
        assert!(status.starts_with("larder; fwd=stale"), "{status}");
        assert!(status.contains("4 of the 10 versions"), "{status}");
    }
    world
        .larder
        .logs(&[
            "ERROR",
            "lost most of its versions",
            "version_list_grace",
            LIST,
        ])
        .await;
    let said = world.larder.setup.says(&["explain", &url()]);
    assert!(said.contains("not believed yet"), "{said}");

    // A restart changes nothing.
    let setup = world.larder.setup.clone();
    world.larder.terminate().await;
    let larder = setup.start().await;
    assert_eq!(larder.client().get(&url()).await.json(), version_list(&TEN));
}

#[tokio::test]
async fn after_the_grace_a_short_list_is_believed() {
    let grace = Duration::from_secs(2);
    let world = World::new("version_list_grace = \"2s\"\n").await;
    let few = &TEN[6..];
    world.publishes(few);
    let before = Instant::now();
    assert_eq!(world.list().await.json(), version_list(&TEN));
    let list = loop {
        let list = world.list().await.json();
        if list != version_list(&TEN) {
            break list;
        }
        assert!(before.elapsed() < PATIENCE, "never believed");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert!(before.elapsed() >= grace, "too early");
    assert_eq!(list, version_list(few));
    world.larder.logs(&["believed from now on", LIST]).await;
    // From now on a further loss is measured by it.
    world.publishes(&few[..1]);
    assert_eq!(world.list().await.json(), version_list(few));
}

#[tokio::test]
async fn a_list_that_loses_a_few_or_grows_is_taken_at_once() {
    let world = World::new("").await;
    for versions in [&TEN[5..], &TEN[7..], &TEN[..], &TEN[1..]] {
        world.publishes(versions);
        assert_eq!(world.list().await.json(), version_list(versions));
    }
}

#[tokio::test]
async fn what_is_no_list_never_replaces_one() {
    // Whatever the grace.
    let world = World::new("version_list_grace = \"0s\"\n").await;
    for nonsense in [
        "",
        "null",
        "{}",
        "[]",
        "{\"versions\":3}",
        "<html>captive portal</html>",
        "{\"versions\":[{\"version\":\"1.",
    ] {
        world
            .upstream
            .route(TERRAFORM, LIST, Reply::json(nonsense.to_owned()));
        let got = world.list().await;
        assert_eq!(got.json(), version_list(&TEN), "{nonsense}");
        let status = got.cache_status();
        assert!(status.starts_with("larder; fwd=stale"), "{status}");
    }
    assert!(
        !world
            .larder
            .log_with(&["last good answer serves", LIST])
            .is_empty()
    );
}

#[tokio::test]
async fn upstream_vouching_for_the_old_list_ends_the_doubt() {
    let grace = Duration::from_secs(3);
    let world = World::new("version_list_grace = \"3s\"\n").await;
    world.publishes(&TEN[6..]);
    let doubted = Instant::now();
    assert_eq!(world.list().await.json(), version_list(&TEN));
    world.publishes(&TEN);
    let got = world.list().await;
    assert_eq!(got.cache_status(), "larder; fwd=stale; fwd-status=304");

    // The doubt of then would be over by now.
    tokio::time::sleep((doubted + grace) - Instant::now()).await;
    world.publishes(&TEN[6..]);
    assert_eq!(world.list().await.json(), version_list(&TEN));
}

#[tokio::test]
async fn lists_of_modules_and_products_are_guarded_too() {
    let upstream = Upstream::start();
    let modules = |versions: &[&str]| {
        let list = version_list(versions);
        serde_json::json!({"modules": [{"versions": list["versions"]}]})
    };
    let index = |versions: &[&str]| {
        let versions = versions.iter().map(|v| (v.to_string(), "x".into()));
        let versions: serde_json::Map<_, _> = versions.collect();
        serde_json::json!({"name": "terraform", "versions": versions})
    };
    let module_list = "/v1/modules/a/b/c/versions";
    let product_list = "/terraform/index.json";
    let publish = |versions: &[&str]| {
        upstream.route(TERRAFORM, module_list, registry_json(&modules(versions)));
        upstream.route(RELEASES, product_list, registry_json(&index(versions)));
    };
    publish(&TEN);
    let larder = Setup::new(&upstream).start().await;
    let urls = [
        format!("https://{TERRAFORM}{module_list}"),
        format!("https://{RELEASES}{product_list}"),
    ];
    for url in &urls {
        assert_eq!(larder.client().get(url).await.status, 200);
    }
    publish(&TEN[8..]);
    for (url, list) in urls.iter().zip([modules(&TEN), index(&TEN)]) {
        assert_eq!(larder.client().get(url).await.json(), list);
    }
}

/// A larder that holds a list of ten versions.
struct World {
    upstream: Upstream,
    larder: Larder,
}

impl World {
    async fn new(config: &str) -> Self {
        let upstream = Upstream::start();
        let larder = Setup::new(&upstream).config(config).start().await;
        let world = Self { upstream, larder };
        world.publishes(&TEN);
        assert_eq!(world.list().await.json(), version_list(&TEN));
        world
    }

    fn publishes(&self, versions: &[&str]) {
        let list = registry_json(&version_list(versions));
        self.upstream.route(TERRAFORM, LIST, list);
    }

    async fn list(&self) -> Got {
        self.larder.client().get(&url()).await
    }
}

fn url() -> String {
    format!("https://{TERRAFORM}{LIST}")
}
