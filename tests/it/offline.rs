//! `--offline`: what is held answers, what is not says how to bring it in, upstream hears nothing.

use crate::common::registry::registry_json;
use crate::common::*;

#[tokio::test]
async fn what_is_held_answers_without_upstream() {
    let world = World::new().await;
    let client = world.larder.client();

    client
        .get(&world.release.document_url())
        .await
        .assert_is(world.document.as_bytes());
    let versions = client.get(&world.release.versions_url()).await;
    assert_eq!(versions.json(), world.release.versions());
    client
        .get(&world.release.sums_url())
        .await
        .assert_is(&world.release.sums);
    let got = client.get(&world.release.archive_url()).await;
    got.assert_is(&world.release.archive());
    got.assert_hit();

    world.assert_silent();
}

#[tokio::test]
async fn head_and_range_of_what_is_held_answer_too() {
    let world = World::new().await;
    let client = world.larder.client();
    let url = world.release.archive_url();
    assert_eq!(client.head(&url).await.status, 200);
    let got = client.get_with(&url, &[("Range", "bytes=5-9")]).await;
    assert_eq!(
        (got.status, &*got.body),
        (206, &world.release.archive()[5..10])
    );
    world.assert_silent();
}

#[tokio::test]
async fn what_is_not_held_is_504_and_says_how_to_bring_it_in() {
    let world = World::new().await;
    let client = world.larder.client();
    let (host, path) = world.release.archive_path();
    for url in [
        format!("https://{TERRAFORM}/v1/providers/hashicorp/random/versions"),
        format!("https://{RELEASES}/terraform/1.9.0/terraform_1.9.0_linux_amd64.zip"),
        format!(
            "https://{host}{}",
            path.replace("linux_amd64", "windows_arm64")
        ),
        format!("https://{RELEASES}/"),
        format!("https://{OPENTOFU}/.well-known/terraform.json"),
    ] {
        for method in ["GET", "HEAD"] {
            let got = client.send(method, &url, &[]).await.finish().await;
            assert_eq!(got.status, 504, "{method} {url}");
        }
        let words = client.get(&url).await.assert_refused(504);
        for word in ["offline", "larder prefetch", "larder import"] {
            assert!(words.contains(word), "{url}: {words}");
        }
    }
    world.assert_silent();
}

#[tokio::test]
async fn credentials_do_not_lead_upstream() {
    let world = World::new().await;
    let headers = [("Authorization", "Bearer token")];
    let url = world.release.versions_url();
    let got = world.larder.client().get_with(&url, &headers).await;
    assert!(matches!(got.status, 200 | 504), "{}", got.status);
    world.assert_silent();
}

#[tokio::test]
async fn tunnels_are_upstream_connections() {
    let world = World::new().await;
    let refusal = world
        .larder
        .client()
        .connect(&format!("{ELSEWHERE}:443"))
        .await
        .unwrap_err();
    let words = refusal.assert_refused(504);
    assert!(words.contains("offline"), "{words}");
    assert_eq!(refusal.reason, words);
    world.assert_silent();
}

#[tokio::test]
async fn a_rotten_archive_is_not_held() {
    let world = World::new().await;
    let blob = &world.larder.setup.blobs()[0];
    let mut bytes = std::fs::read(blob).unwrap();
    bytes[1000] ^= 1;
    std::fs::remove_file(blob).unwrap();
    std::fs::write(blob, bytes).unwrap();
    let got = world
        .larder
        .client()
        .get(&world.release.archive_url())
        .await;
    assert!(!got.succeeded());
    world.assert_silent();
}

/// A larder that was online once, and is not now.
struct World {
    upstream: Upstream,
    connections: usize,
    release: Release,
    document: String,
    larder: Larder,
}

impl World {
    async fn new() -> Self {
        let upstream = Upstream::start();
        let release = Release::new("hashicorp", "null", "3.2.1");
        release.publish(&upstream);
        // Stale at once: offline that must not matter.
        let document = release.document("linux_amd64");
        let path = release.document_path("linux_amd64");
        let stale = registry_json(&document).header("Cache-Control", "no-cache");
        upstream.route(TERRAFORM, &path, stale);
        let setup = Setup::new(&upstream);
        let larder = setup.start().await;
        let client = larder.client();
        let discovery = format!("https://{TERRAFORM}/.well-known/terraform.json");
        for url in [
            discovery,
            release.versions_url(),
            release.document_url(),
            release.sums_url(),
            release.archive_url(),
        ] {
            assert!(client.get(&url).await.succeeded(), "{url}");
        }
        setup.holds(1).await;
        larder.terminate().await;

        let larder = setup.arg("--offline").start().await;
        Self {
            connections: upstream.connections(),
            upstream,
            document: serde_json::to_string_pretty(&document).unwrap(),
            release,
            larder,
        }
    }

    #[track_caller]
    fn assert_silent(&self) {
        assert_eq!(self.upstream.connections(), self.connections);
    }
}
