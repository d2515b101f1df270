//! Other programs than terraform, played: each test sends what one of them sends, in its order and
//! with its headers, and checks what it checks, no more.

mod listings;
mod releases;
mod tofu;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::common::upstream::Seen;
use crate::common::*;

/// What Go's standard client sends of itself.
const GO: Headers = &[
    ("User-Agent", "Go-http-client/1.1"),
    ("Accept-Encoding", "gzip"),
];

type Headers = &'static [(&'static str, &'static str)];

/// The end of a program that gave up, with its reason.
type Failure = String;

/// A program: a connection for each request, always the same headers.
struct Program {
    client: Client,
    headers: Headers,
}

impl Program {
    fn new(larder: &Larder, headers: Headers) -> Self {
        let client = larder.client();
        Self { client, headers }
    }

    async fn get(&self, url: &str) -> Got {
        self.client.get_with(url, self.headers).await
    }

    /// For a program that takes 200 alone, and wants the whole.
    async fn get_ok(&self, url: &str) -> Result<Got, Failure> {
        let got = self.get(url).await;
        match (got.status, got.complete) {
            (200, true) => Ok(got),
            (200, false) => Err(format!("{url}: unexpected EOF")),
            (status, _) => Err(format!("{url}: {status}")),
        }
    }
}

/// As Go has it: unknown where the body was chunked or compressed.
fn content_length(got: &Got) -> Option<usize> {
    if got.header("content-encoding").is_some() || got.header("transfer-encoding").is_some() {
        return None;
    }
    got.header("content-length")?.parse().ok()
}

/// The checksum that SHA256SUMS name for `file`.
fn sum_of(sums: &str, file: &str) -> Result<String, Failure> {
    let mut lines = sums.lines().map(str::split_whitespace);
    let named = lines
        .find_map(|mut words| Some((words.next()?, words.next()?)).filter(|line| line.1 == file));
    Ok(named
        .ok_or_else(|| format!("no sum of {file}"))?
        .0
        .to_owned())
}

/// Versions of one product as the releases site shows them, signed.
struct Site {
    signer: Signer,
    /// Each with the signature over its sums, the newest last
    released: Vec<(Product, Bytes)>,
    json_type: &'static str,
    zip_type: &'static str,
}

impl Site {
    fn new(name: &str, versions: &[&str]) -> Self {
        let products = versions.iter().map(|version| Product::new(name, version));
        Self::of(products)
    }

    fn of(products: impl IntoIterator<Item = Product>) -> Self {
        let signer = Signer::new();
        let signed = |product: Product| {
            let signature = signer.sign(&product.sums);
            (product, signature)
        };
        Self {
            released: products.into_iter().map(signed).collect(),
            signer,
            json_type: "application/json",
            zip_type: "application/zip",
        }
    }

    /// Larder with the site's key in place of HashiCorp's.
    fn setup(&self, upstream: &Upstream) -> Setup {
        let setup = Setup::new(upstream);
        let key = setup.path("trusted.asc");
        std::fs::write(&key, self.signer.public().armored).unwrap();
        setup.args(["--trusted-key", key.to_str().unwrap()])
    }

    fn newest(&self) -> &Product {
        &self.released.last().unwrap().0
    }

    fn name(&self) -> &str {
        &self.newest().name
    }

    fn index_url(&self) -> String {
        format!("https://{RELEASES}/{}/index.json", self.name())
    }

    /// `…/index.json` of one version.
    fn version_index(&self, product: &Product) -> Value {
        let Product { name, version, .. } = product;
        let sums = format!("{name}_{version}_SHA256SUMS");
        json!({
            "name": name,
            "version": version,
            "shasums": sums,
            "shasums_signature": format!("{sums}.sig"),
            "shasums_signatures": [format!("{sums}.72D7468F.sig"), format!("{sums}.sig")],
            "builds": [{
                "name": name, "version": version, "os": "linux", "arch": "amd64",
                "filename": product.filename(), "url": product.archive_url(),
            }],
        })
    }

    fn index(&self) -> Value {
        let versions = self.released.iter();
        let versions = versions.map(|(one, _)| (one.version.clone(), self.version_index(one)));
        json!({"name": self.name(), "versions": versions.collect::<serde_json::Map<_, _>>()})
    }

    fn listing(&self) -> String {
        let item = |(product, _): &(Product, Bytes)| {
            let Product { name, version, .. } = product;
            format!(
                "    <li>\n    <a href=\"{}\">{name}_{version}</a>\n    </li>\n",
                product.folder()
            )
        };
        let items: String = self.released.iter().rev().map(item).collect();
        format!(
            "<!DOCTYPE html>\n<html>\n<body>\n    <ul>\n    <li><a href=\"../\">../</a></li>\n{items}    </ul>\n</body>\n</html>\n"
        )
    }

    fn publish(&self, upstream: &Upstream) {
        let json = |value: Value| Reply::file(self.json_type, value.to_string());
        let put = |path: String, reply: Reply| upstream.route(RELEASES, &path, reply);
        put(format!("/{}/index.json", self.name()), json(self.index()));
        let listing = Reply::new(200, "text/html; charset=utf-8", self.listing());
        // tenv asks without the slash.
        put(format!("/{}", self.name()), listing.clone());
        put(format!("/{}/", self.name()), listing);
        for (product, signature) in &self.released {
            let sums = product.sums_path();
            let signature = Reply::file("application/octet-stream", signature.clone());
            put(
                format!("{}index.json", product.folder()),
                json(self.version_index(product)),
            );
            put(format!("{sums}.sig"), signature.clone());
            put(format!("{sums}.72D7468F.sig"), signature);
            put(sums, Reply::file("text/plain", product.sums.clone()));
            let archive = Reply::file(self.zip_type, product.archive.clone());
            put(product.archive_path(), archive);
        }
    }
}
