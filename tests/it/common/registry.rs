//! Publishes provider releases and products on the upstream, in the shape of the real registry,
//! releases site and GitHub (see the samples in the project's shared data).

use std::collections::HashSet;
use std::io::{Cursor, Write};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use serde_json::{Value, json};
use zip::write::SimpleFileOptions;

use super::signing::{PublicKey, Signer};
use super::upstream::{Seen, in_turn};
use super::{ASSETS, GITHUB, RELEASES, Reply, TERRAFORM, Upstream, sha256, unique};

/// The default size of an archive: far more than the tail that larder holds back.
pub const SIZE: usize = 300 * 1024;

/// Where the files of a provider lie.
#[derive(Clone, Copy, PartialEq)]
pub enum Home {
    /// On releases.hashicorp.com.
    Releases,
    /// On github.com, which redirects to a signed URL that works once.
    GitHub,
}

/// One version of a provider, with everything that its publisher made.
#[derive(Clone)]
pub struct Release {
    pub registry: &'static str,
    pub namespace: String,
    pub name: String,
    pub version: String,
    pub home: Home,
    /// Platform (`linux_amd64`) and archive.
    pub archives: Vec<(String, Bytes)>,
    pub sums: Bytes,
    /// Empty: there is none
    pub signature: Bytes,
    /// That the documents name
    pub keys: Vec<PublicKey>,
}

impl Release {
    /// A release for this machine's platform, on registry.terraform.io and releases.hashicorp.com.
    pub fn new(namespace: &str, name: &str, version: &str) -> Self {
        Self::sized(namespace, name, version, SIZE)
    }

    pub fn sized(namespace: &str, name: &str, version: &str, size: usize) -> Self {
        let archive = provider_zip(name, version, size);
        Self::with_archive(namespace, name, version, archive)
    }

    pub fn with_archive(namespace: &str, name: &str, version: &str, archive: Bytes) -> Self {
        let another = provider_zip(name, version, 10_000);
        let archives = vec![
            ("linux_amd64".to_owned(), archive),
            ("windows_arm64".to_owned(), another),
        ];
        let mut release = Self {
            registry: TERRAFORM,
            namespace: namespace.into(),
            name: name.into(),
            version: version.into(),
            home: Home::Releases,
            archives,
            sums: Bytes::new(),
            signature: Bytes::new(),
            keys: Vec::new(),
        };
        let sums = release.archives.iter();
        let sums = sums.map(|(platform, bytes)| sums_line(&release.filename(platform), bytes));
        release.sums = sums.collect::<String>().into();
        release.signed_by(&Signer::new())
    }

    /// Signed by that key alone, which alone is named.
    pub fn signed_by(mut self, signer: &Signer) -> Self {
        self.signature = signer.sign(&self.sums);
        self.naming(&[signer.public()])
    }

    /// The same under other keys in its documents.
    pub fn naming(mut self, keys: &[PublicKey]) -> Self {
        self.keys = keys.to_vec();
        self
    }

    pub fn unsigned(mut self) -> Self {
        self.signature = Bytes::new();
        self
    }

    /// The signature is over other bytes.
    pub fn badly_signed_by(self, signer: &Signer) -> Self {
        let bad = signer.sign(b"other bytes");
        let mut release = self.signed_by(signer);
        release.signature = bad;
        release
    }

    pub fn on(mut self, registry: &'static str, home: Home) -> Self {
        self.registry = registry;
        self.home = home;
        self
    }

    pub fn archive(&self) -> Bytes {
        self.archives[0].1.clone()
    }

    pub fn digest(&self) -> String {
        sha256(&self.archives[0].1)
    }

    pub fn filename(&self, platform: &str) -> String {
        format!("{}_{platform}.zip", self.stem())
    }

    /// `https://registry…/v1/providers/NS/NAME/versions`
    pub fn versions_url(&self) -> String {
        format!("https://{}{}", self.registry, self.versions_path())
    }

    /// The registry document for linux_amd64.
    pub fn document_url(&self) -> String {
        format!(
            "https://{}{}",
            self.registry,
            self.document_path("linux_amd64")
        )
    }

    pub fn versions_path(&self) -> String {
        format!("/v1/providers/{}/{}/versions", self.namespace, self.name)
    }

    pub fn document_path(&self, platform: &str) -> String {
        let base = self.versions_path().replace("/versions", "");
        format!(
            "{base}/{}/download/{}",
            self.version,
            platform.replace('_', "/")
        )
    }

    /// Host and path of a file at its publisher's.
    pub fn file_path(&self, file: &str) -> (&'static str, String) {
        let Self {
            namespace,
            name,
            version,
            ..
        } = self;
        match self.home {
            Home::Releases => (
                RELEASES,
                format!("/terraform-provider-{name}/{version}/{file}"),
            ),
            Home::GitHub => (
                GITHUB,
                format!(
                    "/{namespace}/terraform-provider-{name}/releases/download/v{version}/{file}"
                ),
            ),
        }
    }

    pub fn archive_path(&self) -> (&'static str, String) {
        self.file_path(&self.filename("linux_amd64"))
    }

    pub fn archive_url(&self) -> String {
        url_of(self.archive_path())
    }

    pub fn sums_path(&self) -> (&'static str, String) {
        self.file_path(&format!("{}_SHA256SUMS", self.stem()))
    }

    pub fn sums_url(&self) -> String {
        url_of(self.sums_path())
    }

    pub fn signature_url(&self) -> String {
        url_of(self.signature_path())
    }

    pub fn signature_path(&self) -> (&'static str, String) {
        let infix = match self.home {
            Home::Releases => ".72D7468F",
            Home::GitHub => "",
        };
        self.file_path(&format!("{}_SHA256SUMS{infix}.sig", self.stem()))
    }

    /// Where the asset of a GitHub release really lies.
    pub fn asset_path(&self, file: &str) -> String {
        let id = &sha256(self.file_path(file).1.as_bytes())[..12];
        format!("/github-production-release-asset/{id}")
    }

    pub fn archive_asset_path(&self) -> String {
        self.asset_path(&self.filename("linux_amd64"))
    }

    /// The document that the registry serves.
    pub fn document(&self, platform: &str) -> Value {
        let (_, bytes) = self
            .archives
            .iter()
            .find(|(name, _)| name == platform)
            .unwrap();
        let (os, arch) = platform.split_once('_').unwrap();
        let filename = self.filename(platform);
        let keys = self.keys.iter().map(|key| {
            json!({
                "key_id": key.id,
                "ascii_armor": key.armored,
                "trust_signature": key.trust,
                "source": "A Publisher",
                "source_url": "https://publisher.example/security",
            })
        });
        json!({
            "protocols": ["5.0"],
            "os": os,
            "arch": arch,
            "filename": filename,
            "download_url": url_of(self.file_path(&filename)),
            "shasums_url": self.sums_url(),
            "shasums_signature_url": url_of(self.signature_path()),
            "shasum": sha256(bytes),
            "signing_keys": { "gpg_public_keys": keys.collect::<Vec<_>>() },
        })
    }

    pub fn versions(&self) -> Value {
        let platforms = self.archives.iter().map(|(platform, _)| {
            let (os, arch) = platform.split_once('_').unwrap();
            json!({"os": os, "arch": arch})
        });
        json!({
            "id": format!("{}/{}", self.namespace, self.name),
            "versions": [{
                "version": self.version,
                "protocols": ["5.0"],
                "platforms": platforms.collect::<Vec<_>>(),
            }],
            "warnings": null,
        })
    }

    /// Installs the routes for all of it, as the real sites answer them.
    pub fn publish(&self, upstream: &Upstream) {
        publish_discovery(upstream, self.registry);
        let versions = registry_json(&self.versions());
        upstream.route(self.registry, &self.versions_path(), versions);
        for (platform, bytes) in &self.archives {
            let document = registry_json(&self.document(platform));
            upstream.route(self.registry, &self.document_path(platform), document);
            self.publish_file(
                upstream,
                &self.filename(platform),
                Reply::archive(bytes.clone()),
            );
        }
        let binary = |bytes: &Bytes| Reply::file("application/octet-stream", bytes.clone());
        let text = Reply::file("text/plain", self.sums.clone());
        let (_, sums) = self.sums_path();
        self.publish_file(upstream, last_segment(&sums), text);
        let (_, signature) = self.signature_path();
        let signed = match self.signature.is_empty() {
            true => Reply::status(404),
            false => binary(&self.signature),
        };
        self.publish_file(upstream, last_segment(&signature), signed);
    }

    /// One file at its publisher's, for tests that want it otherwise than `publish` made it.
    pub fn publish_file(&self, upstream: &Upstream, file: &str, reply: Reply) {
        self.publish_file_fn(upstream, file, move |_| reply.clone());
    }

    /// Each GET of the file's bytes gets the next of `replies`, the last one for good.
    pub fn publish_archive_turns(&self, upstream: &Upstream, replies: Vec<Reply>) {
        self.publish_file_fn(upstream, &self.filename("linux_amd64"), in_turn(replies));
    }

    pub fn publish_archive(&self, upstream: &Upstream, reply: Reply) {
        self.publish_file(upstream, &self.filename("linux_amd64"), reply);
    }

    fn publish_file_fn(
        &self,
        upstream: &Upstream,
        file: &str,
        reply: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) {
        let (host, path) = self.file_path(file);
        if self.home == Home::Releases {
            upstream.route_fn(host, &path, reply);
            return;
        }
        // GitHub: 302 to a URL whose signature is good for one GET.
        let asset = self.asset_path(file);
        let location = format!("https://{ASSETS}{asset}");
        let unused = Arc::new(Mutex::new(HashSet::new()));
        let issued = Arc::clone(&unused);
        upstream.route_fn(host, &path, move |_| {
            let query = format!(
                "sp=r&sv=2018-11-09&sig=SECRET%2B{:x}%3D&rscd=x%20y",
                unique()
            );
            issued.lock().unwrap().insert(query.clone());
            Reply::redirect(&format!("{location}?{query}")).header("Cache-Control", "no-cache")
        });
        upstream.route_fn(ASSETS, &asset, move |seen| {
            let query = seen.query().unwrap_or_default();
            let mut unused = unused.lock().unwrap();
            let valid = match seen.method.as_str() {
                "GET" => unused.remove(query),
                _ => unused.contains(query),
            };
            match valid {
                true => reply(seen),
                false => Reply::new(
                    403,
                    "application/xml",
                    "<Error>AuthenticationFailed</Error>",
                ),
            }
        });
    }
}

/// Something that HashiCorp ships on the releases site, outside of any registry.
#[derive(Clone)]
pub struct Product {
    pub name: String,
    pub version: String,
    pub archive: Bytes,
    pub sums: Bytes,
}

impl Product {
    pub fn new(name: &str, version: &str) -> Self {
        Self::sized(name, version, SIZE)
    }

    pub fn sized(name: &str, version: &str, size: usize) -> Self {
        let archive = zip_of(name, size, version);
        let mut product = Self {
            name: name.into(),
            version: version.into(),
            archive,
            sums: Bytes::new(),
        };
        let file = product.filename();
        product.sums = sums_line(&file, &product.archive).into();
        product
    }

    pub fn filename(&self) -> String {
        format!("{}_{}_linux_amd64.zip", self.name, self.version)
    }

    pub fn folder(&self) -> String {
        format!("/{}/{}/", self.name, self.version)
    }

    pub fn archive_path(&self) -> String {
        format!("{}{}", self.folder(), self.filename())
    }

    pub fn archive_url(&self) -> String {
        format!("https://{RELEASES}{}", self.archive_path())
    }

    pub fn sums_path(&self) -> String {
        format!("{}{}_{}_SHA256SUMS", self.folder(), self.name, self.version)
    }

    pub fn publish(&self, upstream: &Upstream) {
        let Self { name, version, .. } = self;
        let put = |path: &str, reply: Reply| upstream.route(RELEASES, path, reply);
        let page = |link: &str| {
            let html =
                format!("<!DOCTYPE html>\n<ul><li><a href=\"{link}\">{link}</a></li></ul>\n");
            Reply::new(200, "text/html; charset=utf-8", html)
        };
        let index = json!({
            "name": name,
            "version": version,
            "shasums": format!("{name}_{version}_SHA256SUMS"),
            "builds": [{
                "name": name, "version": version, "os": "linux", "arch": "amd64",
                "filename": self.filename(), "url": self.archive_url(),
            }],
        });
        put(&self.archive_path(), Reply::archive(self.archive.clone()));
        put(
            &self.sums_path(),
            Reply::file("text/plain", self.sums.clone()),
        );
        put(
            &format!("{}index.json", self.folder()),
            registry_json(&index),
        );
        put(&self.folder(), page(&self.archive_path()));
        put(&format!("/{name}/"), page(&self.folder()));
    }
}

/// A registry's list of those versions for linux_amd64.
pub fn version_list(versions: &[&str]) -> Value {
    let version = |version: &&str| {
        json!({
            "version": version,
            "protocols": ["5.0"],
            "platforms": [{"os": "linux", "arch": "amd64"}],
        })
    };
    json!({
        "id": "someone/thing",
        "versions": versions.iter().map(version).collect::<Vec<_>>(),
        "warnings": null,
    })
}

/// `/.well-known/terraform.json` of a registry.
pub fn publish_discovery(upstream: &Upstream, registry: &str) {
    let services = r#"{"modules.v1":"/v1/modules/","providers.v1":"/v1/providers/"}"#;
    let reply = Reply::json(services).header("Cache-Control", "max-age=3600");
    upstream.route(registry, "/.well-known/terraform.json", reply);
}

/// JSON in the dress the registry gives it, with validators but no lifetime.
pub fn registry_json(value: &Value) -> Reply {
    let text = serde_json::to_string_pretty(value).unwrap();
    let etag = format!("W/\"{}\"", &sha256(text.as_bytes())[..16]);
    Reply::json(text).etag(&etag)
}

/// A provider's zip: one executable of Terraform's naming, which nothing can compress.
pub fn provider_zip(name: &str, version: &str, size: usize) -> Bytes {
    let executable = format!("terraform-provider-{name}_v{version}_x5");
    zip_of(&executable, size, version)
}

fn zip_of(executable: &str, size: usize, seed: &str) -> Bytes {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::with_capacity(size + 1024)));
    let options = SimpleFileOptions::default()
        .compression_method(zip::CompressionMethod::Stored)
        .last_modified_time(zip::DateTime::default())
        .unix_permissions(0o755);
    zip.start_file(executable, options).unwrap();
    zip.write_all(&noise(size, &format!("{executable} {seed}")))
        .unwrap();
    zip.finish().unwrap().into_inner().into()
}

/// Bytes that look random and are the same in every run (xorshift64*).
pub fn noise(size: usize, seed: &str) -> Vec<u8> {
    let seed = &sha256(seed.as_bytes())[..16];
    let mut state = u64::from_str_radix(seed, 16).unwrap() | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

pub fn sums_line(file: &str, bytes: &[u8]) -> String {
    format!("{}  {file}\n", sha256(bytes))
}

fn url_of((host, path): (&str, String)) -> String {
    format!("https://{host}{path}")
}

fn last_segment(path: &str) -> &str {
    path.rsplit('/').next().unwrap()
}

impl Release {
    fn stem(&self) -> String {
        format!("terraform-provider-{}_{}", self.name, self.version)
    }
}
