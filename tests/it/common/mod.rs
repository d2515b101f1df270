//! The black-box kit: an upstream to lie to larder, larder itself, and a client that sees every byte.

// The one test binary uses all of it, but single files may be left out while working on another.
#![allow(dead_code)]

pub mod checks;
pub mod client;
pub mod larder;
pub mod registry;
pub mod signing;
pub mod upstream;

use std::collections::hash_map::RandomState;
use std::future::Future;
use std::hash::{BuildHasher, Hasher};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use checks::{Echo, assert_alive, assert_refuses_to_start, assert_words};
pub use client::{Client, Conn, Got};
pub use larder::{Larder, Setup};
pub use registry::{Home, Product, Release};
pub use signing::Signer;
pub use upstream::{Gate, Line, Reply, Tap, Upstream};

pub const TERRAFORM: &str = "registry.terraform.io";
pub const OPENTOFU: &str = "registry.opentofu.org";
pub const RELEASES: &str = "releases.hashicorp.com";
pub const GITHUB: &str = "github.com";
pub const ASSETS: &str = "release-assets.githubusercontent.com";
/// A host that nobody intercepts.
pub const ELSEWHERE: &str = "elsewhere.example";

/// How long a condition that must come true may take on a slow, busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Longer than any timeout of larder's own, so that a hanging test says where it hangs.
pub const FOREVER: Duration = Duration::from_secs(150);

/// Waits until `holds`; the panic names `what` never came true.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) -> impl Future<Output = ()> {
    let caller = std::panic::Location::caller();
    async move {
        let started = Instant::now();
        while !holds() {
            assert!(
                started.elapsed() < PATIENCE,
                "{caller}: after {PATIENCE:?} still not: {what}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Bounds a wait for another process's bytes.
pub async fn within<T>(what: &str, wait: impl Future<Output = T>) -> T {
    match tokio::time::timeout(FOREVER, wait).await {
        Ok(value) => value,
        Err(_) => panic!("gave up after {FOREVER:?}: {what}"),
    }
}

/// Whether this machine must have what a test needs, by its name in the list LARDER_TEST_REQUIRE: its
/// absence is a failure then, not a skip.
pub fn is_required(what: &str) -> bool {
    let required = std::env::var("LARDER_TEST_REQUIRE").unwrap_or_default();
    required.split(',').any(|name| name.trim() == what)
}

/// Every regular file below `dir`; none if there is no such folder.
pub fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                Ok(_) => files.push(entry.path()),
                Err(_) => {} // Gone since it was listed.
            }
        }
    }
    files.sort();
    files
}

pub fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A number that no other test run has used: for names of secrets and tokens.
pub fn unique() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// As terraform installs: the document, what it names, and then the archive, whose answer this is.
pub async fn install(client: &Client, release: &Release) -> Got {
    let document = client.get(&release.document_url()).await.json();
    let named = |key: &str| document[key].as_str().unwrap().to_owned();
    for key in ["shasums_url", "shasums_signature_url"] {
        client.get(&named(key)).await;
    }
    client.get(&named("download_url")).await
}

/// A TCP port that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}
