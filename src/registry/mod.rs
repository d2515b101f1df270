//! Private registries: a folder of releases as an origin that speaks the provider and module
//! registry protocols. It is asked like any other origin, over a connection within the process, so
//! that its archives are verified, kept, listed and ruled like all others.
//!
//! <https://developer.hashicorp.com/terraform/internals/provider-registry-protocol>,
//! <https://developer.hashicorp.com/terraform/internals/module-registry-protocol>

pub mod add;
pub mod folder;
pub mod key;

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{
    CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderValue, IF_NONE_MATCH, LAST_MODIFIED,
};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::DuplexStream;
use tokio::sync::oneshot;
use tokio::time::timeout;
use url::Url;

use crate::config::{Authority, PrivateRegistry};
use crate::digest::Digest;
use crate::error::Exit;
use crate::terraform::own::{ArchiveName, is_part, is_version};
use crate::terraform::registry::Download;
use crate::terraform::route::Kind;
use crate::terraform::signature::{Keyring, Tier};
use crate::terraform::versions::listed;
use crate::upstream::Local;
use folder::{Folder, Look, Packed, Problem, Release};
use key::SigningKey;

/// How often everything is looked at without being asked for.
const SURVEY: Duration = Duration::from_secs(30);
/// For new files to be looked at before an answer without them.
const PATIENCE: Duration = Duration::from_secs(3);
const ASKING: usize = 64;
/// Of one connection within the process
const BUFFER: usize = 256 << 10;
/// Signatures that are remembered.
const REMEMBERED: usize = 10_000;
/// Where files lie.
const FILES: &str = "/v1/files/";

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// One private registry.
pub struct Registry {
    pub host: Authority,
    pub folder: Folder,
    data_dir: PathBuf,
    key: OnceLock<Option<SigningKey>>,
    /// One signature a document, whoever asks how often
    signatures: Mutex<HashMap<Digest, Bytes>>,
    /// Sums and signatures that documents named, by the mark in their URL
    sums: Mutex<HashMap<String, (Bytes, Option<Bytes>)>>,
    worker: OnceLock<SyncSender<Ask>>,
}

/// What is to be looked at, and whom to tell.
type Ask = (Place, oneshot::Sender<()>);

#[derive(Clone)]
enum Place {
    Provider(String, String),
    Module(String, String, String),
}

/// What is in a private registry, and what is wrong with it.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Survey {
    pub host: String,
    pub dir: PathBuf,
    pub problems: Vec<Problem>,
}

impl Registry {
    /// # Errors
    /// When its folder cannot be found.
    pub fn open(
        registry: &PrivateRegistry,
        data_dir: &Path,
        keyring: Arc<Keyring>,
    ) -> Result<Arc<Self>, Exit> {
        let folder = Folder::open(&registry.dir, keyring).map_err(|e| {
            Exit::usage(format!(
                "registry: {}: {e}; make that folder, or name another one",
                registry.dir.display()
            ))
        })?;
        Ok(Arc::new(Self {
            host: registry.host.clone(),
            folder,
            data_dir: data_dir.to_owned(),
            key: OnceLock::new(),
            signatures: Mutex::default(),
            sums: Mutex::default(),
            worker: OnceLock::new(),
        }))
    }

    /// Starts to look at what is there, now and then, for as long as the registry lives.
    pub fn watch(registry: &Arc<Self>) {
        let this = registry;
        let (asks, asked) = sync_channel(ASKING);
        let registry = Arc::downgrade(this);
        let worker = std::thread::Builder::new().name("registry".into());
        match worker.spawn(move || work(&registry, &asked)) {
            Ok(_) => drop(this.worker.set(asks)),
            Err(error) => {
                tracing::error!(%error, "no thread to look at a private registry's files")
            }
        }
    }

    /// Whether it is the same folder for the same host.
    pub fn is_same(&self, other: &Self) -> bool {
        self.host == other.host && self.folder.root() == other.folder.root()
    }

    /// What is wrong with it, as far as it was looked at.
    pub fn survey(&self) -> Survey {
        Survey {
            host: self.host.in_https_url(),
            dir: self.folder.root().to_owned(),
            problems: self.folder.problems(),
        }
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        if !matches!(method, Method::GET | Method::HEAD) {
            return status(StatusCode::METHOD_NOT_ALLOWED);
        }
        let asked = request.headers().get(IF_NONE_MATCH).cloned();
        let mut response = self
            .find(&path)
            .await
            .unwrap_or_else(|| status(StatusCode::NOT_FOUND));
        if asked.is_some() && asked.as_ref() == response.headers().get(ETAG) {
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            *response.body_mut() = empty();
            response.headers_mut().remove(CONTENT_LENGTH);
        }
        if method == Method::HEAD {
            *response.body_mut() = empty();
        }
        response
    }

    async fn find(self: &Arc<Self>, path: &str) -> Option<Response<Body>> {
        if path == "/.well-known/terraform.json" {
            let services =
                json!({ "modules.v1": "/v1/modules/", "providers.v1": "/v1/providers/" });
            return Some(document(services.to_string()));
        }
        let segments: Vec<&str> = path.split('/').skip(1).collect();
        let (first, rest) = segments
            .split_first()
            .filter(|(first, _)| **first == "v1")?;
        let _ = first;
        match rest {
            ["providers", namespace, name, rest @ ..] if is_part(namespace) && is_part(name) => {
                let releases = self.releases(namespace, name).await;
                let (this, namespace, name) =
                    (self.clone(), (*namespace).to_owned(), (*name).to_owned());
                let rest: Vec<String> = rest.iter().map(|s| (*s).to_owned()).collect();
                blocking(move || this.provider_document(&namespace, &name, &rest, &releases)).await
            }
            ["files", namespace, name, file] if is_part(namespace) && is_part(name) => {
                self.file(namespace, name, file).await
            }
            ["files", namespace, name, mark, file] if is_part(namespace) && is_part(name) => {
                self.marked_file((namespace, name), mark, file).await
            }
            ["modules", namespace, name, system, rest @ ..]
                if [namespace, name, system].iter().all(|part| is_part(part)) =>
            {
                self.module(namespace, name, system, rest).await
            }
            _ => None,
        }
    }

    fn provider_document(
        &self,
        namespace: &str,
        name: &str,
        rest: &[String],
        releases: &Releases,
    ) -> Option<Response<Body>> {
        let rest: Vec<&str> = rest.iter().map(String::as_str).collect();
        let folder = Path::new(namespace).join(name);
        match rest[..] {
            ["versions"] => {
                let written = self.written(&folder.join("versions.json"), |bytes| {
                    listed(Kind::VersionList, bytes)
                        .map(|_| ())
                        .ok_or("is no list of versions".into())
                });
                match (written, releases.is_empty()) {
                    (None, true) => None,
                    (Some(written), true) => Some(document(written)),
                    (written, false) => Some(document(version_list(
                        namespace,
                        name,
                        releases,
                        written.as_deref(),
                    ))),
                }
            }
            [version, "download", os, arch] if is_version(version) => {
                let known = releases.get(version);
                let archive = known.and_then(|release| {
                    let mut archives = release.archives.iter();
                    archives.find(|one| one.name.os == os && one.name.arch == arch)
                });
                if let (Some(release), Some(archive)) = (known, archive) {
                    let sums = Bytes::from(sums_of(release));
                    let signed = self.signed(namespace, name, release, &sums);
                    self.remember(&sums, signed.signature.clone());
                    return Some(document(download_document(
                        namespace, name, release, archive, &sums, &signed,
                    )));
                }
                let path = folder
                    .join(version)
                    .join("download")
                    .join(os)
                    .join(format!("{arch}.json"));
                let at = format!(
                    "https://{}/v1/providers/{namespace}/{name}/{version}/download/{os}/{arch}",
                    self.host
                );
                let at = Url::parse(&at).ok()?;
                let written = self.written(&path, |bytes| Download::parse(&at, bytes).map(|_| ()));
                written.map(document)
            }
            _ => None,
        }
    }

    /// A document that lies in the folder as such, if it is one.
    fn written(
        &self,
        path: &Path,
        check: impl FnOnce(&[u8]) -> Result<(), String>,
    ) -> Option<Vec<u8>> {
        let bytes = self.folder.read(path)?;
        match check(&bytes) {
            Ok(()) => {
                self.folder.accept(path);
                Some(bytes)
            }
            Err(why) => {
                self.folder.refuse(path, why);
                None
            }
        }
    }

    async fn file(
        self: &Arc<Self>,
        namespace: &str,
        name: &str,
        file: &str,
    ) -> Option<Response<Body>> {
        if let Some(archive) = ArchiveName::parse(file) {
            let releases = self.releases(namespace, name).await;
            let known = releases.get(&archive.version)?;
            known.archives.iter().find(|one| one.name == archive)?;
            let path = Path::new(namespace).join(name).join(file);
            return self.stream(path, "application/zip").await;
        }
        let prefix = format!("terraform-provider-{name}_");
        let (version, ending) = file.strip_prefix(&prefix)?.split_once("_SHA256SUMS")?;
        let releases = self.releases(namespace, name).await;
        let release = releases.get(version)?.clone();
        let (this, namespace, name) = (self.clone(), namespace.to_owned(), name.to_owned());
        let (sums, signature) = blocking(move || {
            let sums = Bytes::from(sums_of(&release));
            let signed = this.signed(&namespace, &name, &release, &sums);
            this.remember(&sums, signed.signature.clone());
            (sums, signed.signature)
        })
        .await;
        sums_or_signature(ending, sums, signature)
    }

    /// Sums by their own digest: what one document named stays what it was when files come.
    async fn marked_file(
        self: &Arc<Self>,
        (namespace, name): (&str, &str),
        mark: &str,
        file: &str,
    ) -> Option<Response<Body>> {
        let (stem, ending) = file.split_once("_SHA256SUMS")?;
        let known = |this: &Self| lock(&this.sums).get(mark).cloned();
        if known(self).is_none() {
            // It was named before a restart: then it is what it is now, or gone.
            self.file(namespace, name, &format!("{stem}_SHA256SUMS"))
                .await?;
        }
        let (sums, signature) = known(self)?;
        sums_or_signature(ending, sums, signature)
    }

    fn remember(&self, sums: &Bytes, signature: Option<Bytes>) {
        let mut known = lock(&self.sums);
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(mark_of(sums), (sums.clone(), signature));
    }

    async fn module(
        self: &Arc<Self>,
        namespace: &str,
        name: &str,
        system: &str,
        rest: &[&str],
    ) -> Option<Response<Body>> {
        let place = Place::Module(namespace.into(), name.into(), system.into());
        let (ns, n, s) = (namespace.to_owned(), name.to_owned(), system.to_owned());
        let versions = self
            .known(place, move |folder, look| {
                folder.module_versions(&ns, &n, &s, look)
            })
            .await;
        if versions.is_empty() {
            return None;
        }
        match *rest {
            ["versions"] => {
                let all: Vec<Value> = versions
                    .keys()
                    .map(|version| json!({ "version": version }))
                    .collect();
                let source = format!("{namespace}/{name}/{system}");
                let list = json!({ "modules": [{ "source": source, "versions": all }] });
                Some(document(list.to_string()))
            }
            [version, "download"] => {
                // Beside this document, by whatever address the client came.
                let location = format!("./{version}{}", versions.get(version)?.ending());
                let body = json!({ "location": location }).to_string();
                let mut response = document(body);
                let value = HeaderValue::try_from(location).ok()?;
                response.headers_mut().insert("x-terraform-get", value);
                Some(response)
            }
            [version, file] => {
                let packed = versions.get(version)?;
                (file == format!("{version}{}", packed.ending())).then_some(())?;
                let folder = Path::new(namespace).join(name).join(system);
                let kind = match packed {
                    Packed::TarGz => "application/gzip",
                    Packed::Zip => "application/zip",
                };
                self.stream(folder.join(file), kind).await
            }
            _ => None,
        }
    }

    async fn releases(self: &Arc<Self>, namespace: &str, name: &str) -> Releases {
        let place = Place::Provider(namespace.into(), name.into());
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.known(place, move |folder, look| {
            folder.releases(&namespace, &name, look)
        })
        .await
    }

    /// What is known of a place, once new files in it were looked at, if that does not take long.
    async fn known<T: Send + 'static>(
        self: &Arc<Self>,
        place: Place,
        list: impl Fn(&Folder, &Look) -> T + Clone + Send + 'static,
    ) -> T {
        let look = |this: Arc<Self>, list: Box<dyn Fn(&Folder, &Look) -> T + Send>| {
            blocking(move || {
                let look = Look {
                    only_known: true,
                    ..Look::default()
                };
                let found = list(&this.folder, &look);
                (found, look.pending.get())
            })
        };
        let (found, pending) = look(self.clone(), Box::new(list.clone())).await;
        let Some(worker) = self.worker.get().filter(|_| pending) else {
            return found;
        };
        let (done, is_done) = oneshot::channel();
        if worker.try_send((place, done)).is_err() {
            return found;
        }
        let _ = timeout(PATIENCE, is_done).await;
        look(self.clone(), Box::new(list)).await.0
    }

    /// The signature over a release's sums, and the keys to check it by.
    fn signed(&self, namespace: &str, name: &str, release: &Release, sums: &[u8]) -> Signed {
        let Some(signature) = release.signature.clone().filter(|_| release.sums.is_some()) else {
            let Some(key) = self.key() else {
                return Signed::default();
            };
            return Signed {
                signature: self.made(key, sums),
                keys: vec![key.public.clone()],
            };
        };
        let mut keys = self.folder.keys(namespace, name);
        if keys.is_empty() && self.folder.judge(sums, &signature, &[]).tier == Tier::HashiCorp {
            keys.push(include_str!("../../certs/hashicorp.asc").to_owned());
        }
        Signed {
            signature: Some(signature.into()),
            keys,
        }
    }

    fn made(&self, key: &SigningKey, sums: &[u8]) -> Option<Bytes> {
        let digest = Digest::of(sums);
        let mut signatures = lock(&self.signatures);
        if let Some(made) = signatures.get(&digest) {
            return Some(made.clone());
        }
        if signatures.len() >= REMEMBERED {
            signatures.clear();
        }
        match key.sign(sums) {
            Ok(made) => {
                let made = Bytes::from(made);
                signatures.insert(digest, made.clone());
                Some(made)
            }
            Err(error) => {
                tracing::error!(error, "a private registry's sums cannot be signed");
                None
            }
        }
    }

    fn key(&self) -> Option<&SigningKey> {
        let opened = self.key.get_or_init(|| match SigningKey::open_or_create(&self.data_dir) {
            Ok((key, made)) => {
                if made {
                    tracing::info!(fingerprint = %key.fingerprint, "made a key to sign what has no signature in private registries");
                }
                Some(key)
            }
            Err(error) => {
                tracing::error!(%error, "no key to sign what has no signature; Terraform will refuse it");
                None
            }
        });
        opened.as_ref()
    }

    async fn stream(self: &Arc<Self>, path: PathBuf, kind: &'static str) -> Option<Response<Body>> {
        let this = self.clone();
        let (file, metadata) = blocking(move || this.folder.open_archive(&path)).await?;
        let length = metadata.len();
        let file = Arc::new(file);
        let frames = stream::unfold(0, move |at| {
            let file = file.clone();
            async move {
                if at >= length {
                    return None;
                }
                let read = blocking(move || read_at(&file, at, length)).await;
                match read {
                    Ok(bytes) => {
                        let next = at + bytes.len() as u64;
                        Some((Ok(Frame::data(bytes)), next))
                    }
                    Err(e) => Some((Err(e), u64::MAX)),
                }
            }
        });
        let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        if let Ok(modified) = metadata.modified()
            && let Ok(value) = HeaderValue::try_from(httpdate::fmt_http_date(modified))
        {
            headers.insert(LAST_MODIFIED, value);
        }
        Some(response)
    }
}

impl Local for Arc<Registry> {
    fn open(&self) -> DuplexStream {
        let (near, far) = tokio::io::duplex(BUFFER);
        let registry = self.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let registry = registry.clone();
                async move { Ok::<_, Infallible>(registry.answer(request).await) }
            });
            let served = http1::Builder::new().serve_connection(TokioIo::new(far), service);
            if let Err(error) = served.await {
                tracing::debug!(%error, "a connection to a private registry ended");
            }
        });
        near
    }
}

type Releases = std::collections::BTreeMap<String, Release>;

#[derive(Default)]
struct Signed {
    signature: Option<Bytes>,
    keys: Vec<String>,
}

fn work(registry: &Weak<Registry>, asked: &Receiver<Ask>) {
    let mut first = true;
    loop {
        let ask = match first {
            true => Err(RecvTimeoutError::Timeout),
            false => asked.recv_timeout(SURVEY),
        };
        first = false;
        let Some(registry) = registry.upgrade() else {
            return;
        };
        match ask {
            Ok((place, done)) => {
                let (folder, look) = (&registry.folder, &Look::default());
                match place {
                    Place::Provider(namespace, name) => {
                        drop(folder.releases(&namespace, &name, look))
                    }
                    Place::Module(namespace, name, system) => {
                        drop(folder.module_versions(&namespace, &name, &system, look));
                    }
                }
                let _ = done.send(());
            }
            Err(RecvTimeoutError::Timeout) => {
                let (providers, modules) = registry.folder.survey();
                tracing::debug!(host = %registry.host, providers, modules, "looked at a private registry");
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn mark_of(sums: &[u8]) -> String {
    Digest::of(sums).short(16)
}

fn sums_or_signature(
    ending: &str,
    sums: Bytes,
    signature: Option<Bytes>,
) -> Option<Response<Body>> {
    match ending {
        "" => Some(bytes(sums, "text/plain")),
        ".sig" => Some(bytes(signature?, "application/octet-stream")),
        _ => None,
    }
}

/// The sums of a release: its publisher's, or else computed.
fn sums_of(release: &Release) -> Vec<u8> {
    if let Some(sums) = &release.sums {
        return sums.clone();
    }
    let mut lines: Vec<String> = release
        .archives
        .iter()
        .map(|archive| format!("{}  {}\n", archive.digest, archive.name))
        .collect();
    lines.sort_by(|a, b| a[66..].cmp(&b[66..]));
    lines.concat().into_bytes()
}

fn version_list(
    namespace: &str,
    name: &str,
    releases: &Releases,
    written: Option<&[u8]>,
) -> String {
    let written: Option<Value> = written.and_then(|bytes| serde_json::from_slice(bytes).ok());
    let written = written
        .as_ref()
        .and_then(|list| list["versions"].as_array());
    let known = |version: &&Value| {
        let version = version["version"].as_str().unwrap_or_default();
        !releases.contains_key(version)
    };
    let others = written.into_iter().flatten().filter(known).cloned();
    let own = releases.iter().map(|(version, release)| {
        let platforms = release.archives.iter();
        let platforms: Vec<Value> = platforms
            .map(|one| json!({ "os": one.name.os, "arch": one.name.arch }))
            .collect();
        json!({ "version": version, "protocols": protocols(release), "platforms": platforms })
    });
    let versions: Vec<Value> = own.chain(others).collect();
    json!({ "id": format!("{namespace}/{name}"), "versions": versions, "warnings": null })
        .to_string()
}

fn protocols(release: &Release) -> Vec<String> {
    release
        .protocols
        .clone()
        .unwrap_or_else(|| vec!["5.0".into()])
}

fn download_document(
    namespace: &str,
    name: &str,
    release: &Release,
    archive: &folder::Archive,
    sums: &[u8],
    signed: &Signed,
) -> String {
    let ArchiveName {
        version, os, arch, ..
    } = &archive.name;
    // Paths: they hold by whatever address the client came.
    let files = format!("{FILES}{namespace}/{name}");
    let mark = mark_of(sums);
    let sums = format!("{files}/{mark}/terraform-provider-{name}_{version}_SHA256SUMS");
    let keys: Vec<Value> = signed
        .keys
        .iter()
        .map(|armor| {
            json!({ "key_id": key::id_of(armor).unwrap_or_default(), "ascii_armor": armor,
                "trust_signature": "", "source": "", "source_url": null })
        })
        .collect();
    let mut document = json!({
        "protocols": protocols(release),
        "os": os,
        "arch": arch,
        "filename": archive.name.to_string(),
        "download_url": format!("{files}/{}", archive.name),
        "shasums_url": sums,
        "shasums_signature_url": format!("{sums}.sig"),
        "shasum": archive.digest.to_string(),
        "signing_keys": { "gpg_public_keys": keys },
    });
    if signed.signature.is_none()
        && let Some(fields) = document.as_object_mut()
    {
        fields.shift_remove("shasums_signature_url");
    }
    document.to_string()
}

/// JSON that upstream must be asked for each time: files may have come.
fn document(body: impl Into<Bytes>) -> Response<Body> {
    bytes(body, "application/json")
}

fn bytes(body: impl Into<Bytes>, kind: &'static str) -> Response<Body> {
    let body = body.into();
    let etag = format!("\"{}\"", Digest::of(&body).short(32));
    let length = body.len();
    let body = Full::new(body)
        .map_err(|never| match never {})
        .boxed_unsync();
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(
        ETAG,
        HeaderValue::try_from(etag).expect("hexadecimal digits are a header value"),
    );
    response
}

fn status(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(empty());
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_LENGTH, HeaderValue::from(0));
    response
}

fn empty() -> Body {
    http_body_util::Empty::new()
        .map_err(|never| match never {})
        .boxed_unsync()
}

fn read_at(file: &File, at: u64, length: u64) -> std::io::Result<Bytes> {
    use std::os::unix::fs::FileExt as _;
    let mut buffer = vec![0; (length - at).min(BUFFER as u64) as usize];
    file.read_exact_at(&mut buffer, at)?;
    Ok(buffer.into())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Changed in steps that do not panic.
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
