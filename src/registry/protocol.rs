//! The provider and module registry protocols over a folder:
//! <https://developer.hashicorp.com/terraform/internals/provider-registry-protocol>,
//! <https://developer.hashicorp.com/terraform/internals/module-registry-protocol>

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{
    CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderValue, IF_NONE_MATCH, LAST_MODIFIED,
};
use hyper::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use super::documents::{Signed, download_document, mark_of, sums_of, version_list};
use super::folder::{Folder, Look};
use super::key::{SigningKey, id_of};
use super::layout::part_of;
use super::releases::{Packed, Release};
use super::{BUFFER, Registry};
use crate::digest::Digest;
use crate::sync::blocking;
use crate::terraform::own::{ArchiveName, is_part, is_version};
use crate::terraform::signature::Tier;

/// For new files to be looked at before an answer without them: clients' patience is for more than
/// this.
const PATIENCE: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(20);

pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// What a request comes to, if not to an answer.
enum Nothing {
    /// 404
    None,
    /// 503: there are files that were not looked at yet
    Pending,
}

type Found = Result<Response<Body>, Nothing>;

/// Answers a request.
pub async fn answer(registry: Arc<Registry>, request: Request<Incoming>) -> Response<Body> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    if !matches!(method, Method::GET | Method::HEAD) {
        return status(StatusCode::METHOD_NOT_ALLOWED);
    }
    let asked = request.headers().get(IF_NONE_MATCH).cloned();
    let mut response = match registry.find(&path).await {
        Ok(response) => response,
        Err(Nothing::None) => status(StatusCode::NOT_FOUND),
        Err(Nothing::Pending) => status(StatusCode::SERVICE_UNAVAILABLE),
    };
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

impl Registry {
    async fn find(self: &Arc<Self>, path: &str) -> Found {
        if path == "/.well-known/terraform.json" {
            let services =
                json!({ "modules.v1": "/v1/modules/", "providers.v1": "/v1/providers/" });
            return Ok(document(services.to_string()));
        }
        let segments: Vec<&str> = path.split('/').skip(1).collect();
        match segments[..] {
            ["v1", "providers", namespace, name, "versions"]
                if is_part(namespace) && is_part(name) =>
            {
                self.versions(namespace, name).await
            }
            [
                "v1",
                "providers",
                namespace,
                name,
                version,
                "download",
                os,
                arch,
            ] if is_part(namespace) && is_part(name) && is_version(version) => {
                let file = format!("terraform-provider-{name}_{version}_{os}_{arch}.zip");
                let file = ArchiveName::parse(&file).ok_or(Nothing::None)?;
                self.download(namespace, file).await
            }
            ["v1", "files", namespace, name, file] if is_part(namespace) && is_part(name) => {
                self.file(namespace, name, file).await
            }
            ["v1", "files", namespace, name, mark, file] if is_part(namespace) && is_part(name) => {
                self.marked_file((namespace, name), mark, file).await
            }
            ["v1", "modules", namespace, name, system, ref rest @ ..]
                if [namespace, name, system].iter().all(|part| is_part(part)) =>
            {
                self.module(namespace, name, system, rest).await
            }
            _ => Err(Nothing::None),
        }
    }

    async fn versions(self: &Arc<Self>, namespace: &str, name: &str) -> Found {
        let (ns, ty) = (namespace.to_owned(), name.to_owned());
        let (found, pending) = self
            .known(move |folder, look| {
                (
                    folder.releases(&ns, &ty, look),
                    folder.version_list(&ns, &ty),
                )
            })
            .await;
        match found {
            // A list without the newest would be taken for all there is.
            _ if pending => Err(Nothing::Pending),
            (releases, None) if releases.is_empty() => Err(Nothing::None),
            (releases, Some(written)) if releases.is_empty() => Ok(document(written)),
            (releases, written) => {
                let list = version_list(namespace, name, &releases, written.as_deref());
                Ok(document(list))
            }
        }
    }

    async fn download(self: &Arc<Self>, namespace: &str, file: ArchiveName) -> Found {
        let release = self.release(namespace, &file.name, &file.version).await;
        let (this, namespace) = (self.clone(), namespace.to_owned());
        blocking(move || {
            let archives = release.as_ref().map(|release| release.archives.iter());
            let archive = archives
                .ok()
                .and_then(|mut all| all.find(|one| one.name == file));
            if let (Ok(release), Some(archive)) = (&release, archive) {
                let (sums, signed) = this.sums(&namespace, &file, release);
                let text = download_document(&namespace, release, archive, &sums, &signed);
                return Ok(document(text));
            }
            let of = (&*namespace, &*file.name, &*file.version);
            let written = this.folder.download(&this.host, of, (&file.os, &file.arch));
            match (written, release) {
                (Some(written), _) => Ok(document(written)),
                (None, Err(Nothing::Pending)) => Err(Nothing::Pending),
                (None, _) => Err(Nothing::None),
            }
        })
        .await
    }

    /// A release's sums and who signed them, remembered under the mark that documents name.
    fn sums(&self, namespace: &str, file: &ArchiveName, release: &Release) -> (Bytes, Signed) {
        let sums = Bytes::from(sums_of(release));
        let signed = self.signed(namespace, &file.name, release, &sums);
        let stem = format!(
            "{}/terraform-provider-{}_{}",
            mark_of(&sums),
            file.name,
            file.version
        );
        self.sums
            .insert(stem, (sums.clone(), signed.signature.clone()));
        (sums, signed)
    }

    async fn file(self: &Arc<Self>, namespace: &str, name: &str, file: &str) -> Found {
        if let Some(archive) = ArchiveName::parse(file) {
            let release = self.release(namespace, name, &archive.version).await?;
            let known = release.archives.iter().any(|one| one.name == archive);
            if archive.name != name || !known {
                return Err(Nothing::None);
            }
            let path = Path::new(namespace).join(name).join(file);
            return self.stream(path, "application/zip").await;
        }
        let (of, version, _) = part_of(file).ok_or(Nothing::None)?;
        if of != name {
            return Err(Nothing::None);
        }
        let release = self.release(namespace, name, version).await?;
        let (this, namespace) = (self.clone(), namespace.to_owned());
        let any = release.archives.first().ok_or(Nothing::None)?.name.clone();
        let (sums, signed) = blocking(move || this.sums(&namespace, &any, &release)).await;
        sums_or_signature(file, sums, signed.signature)
    }

    /// Sums by their own digest: what one document named stays what it was when files come.
    async fn marked_file(
        self: &Arc<Self>,
        (namespace, name): (&str, &str),
        mark: &str,
        file: &str,
    ) -> Found {
        let (of, version, _) = part_of(file).ok_or(Nothing::None)?;
        let stem = format!("{mark}/terraform-provider-{of}_{version}");
        if !self.sums.contains_key(&stem) {
            // It was named before a restart: then it is what it is now, or gone.
            self.file(
                namespace,
                name,
                &format!("terraform-provider-{of}_{version}_SHA256SUMS"),
            )
            .await?;
        }
        let (sums, signature) = self.sums.get(&stem).ok_or(Nothing::None)?;
        sums_or_signature(file, sums, signature)
    }

    async fn module(
        self: &Arc<Self>,
        namespace: &str,
        name: &str,
        system: &str,
        rest: &[&str],
    ) -> Found {
        let (ns, n, s) = (namespace.to_owned(), name.to_owned(), system.to_owned());
        let (versions, pending) = self
            .known(move |folder, look| folder.module_versions(&ns, &n, &s, look))
            .await;
        let nothing = || {
            if pending {
                Nothing::Pending
            } else {
                Nothing::None
            }
        };
        if versions.is_empty() {
            return Err(nothing());
        }
        match *rest {
            ["versions"] if pending => Err(Nothing::Pending),
            ["versions"] => {
                let all = versions.keys().map(|version| json!({ "version": version }));
                let all: Vec<Value> = all.collect();
                let source = format!("{namespace}/{name}/{system}");
                let list = json!({ "modules": [{ "source": source, "versions": all }] });
                Ok(document(list.to_string()))
            }
            [version, "download"] => {
                // Beside this document, by whatever address the client came.
                let packed = versions.get(version).ok_or_else(nothing)?;
                let location = format!("./{version}{}", packed.ending());
                let mut response = document(json!({ "location": location }).to_string());
                let value = HeaderValue::try_from(location).map_err(|_| Nothing::None)?;
                response.headers_mut().insert("x-terraform-get", value);
                Ok(response)
            }
            [version, file] => {
                let packed = versions.get(version).ok_or_else(nothing)?;
                if file != format!("{version}{}", packed.ending()) {
                    return Err(Nothing::None);
                }
                let folder = Path::new(namespace).join(name).join(system);
                let kind = match packed {
                    Packed::TarGz => "application/gzip",
                    Packed::Zip => "application/zip",
                };
                self.stream(folder.join(file), kind).await
            }
            _ => Err(Nothing::None),
        }
    }

    async fn release(
        self: &Arc<Self>,
        namespace: &str,
        name: &str,
        version: &str,
    ) -> Result<Release, Nothing> {
        let of = (namespace.to_owned(), name.to_owned(), version.to_owned());
        let (release, pending) = self
            .known(move |folder, look| folder.release_of(&of.0, &of.1, &of.2, look))
            .await;
        match (release, pending) {
            (Some(release), _) => Ok(release),
            (None, true) => Err(Nothing::Pending),
            (None, false) => Err(Nothing::None),
        }
    }

    /// What is known of something, once new files in it were looked at, if that does not take long;
    /// and whether there are files that were not.
    async fn known<T: Send + 'static>(
        self: &Arc<Self>,
        list: impl Fn(&Folder, &Look) -> T + Clone + Send + 'static,
    ) -> (T, bool) {
        let look = async |only_known: bool| {
            let (this, list) = (self.clone(), list.clone());
            blocking(move || {
                let look = Look {
                    only_known,
                    ..Look::default()
                };
                let found = list(&this.folder, &look);
                (found, look.pending.get())
            })
            .await
        };
        let found = look(true).await;
        if !found.1 {
            return found;
        }
        let (this, list) = (self.clone(), list.clone());
        // It goes on whoever leaves.
        let reading = tokio::spawn(async move {
            let Ok(_permit) = this.looks.clone().acquire_owned().await else {
                return;
            };
            let folder = this.clone();
            let reading = tokio::task::spawn_blocking(move || {
                drop(list(&folder.folder, &Look::default()));
            });
            let _ = reading.await;
        });
        let deadline = Instant::now() + PATIENCE;
        let _ = timeout_at(deadline, reading).await;
        loop {
            let found = look(true).await;
            // What is pending still is being read for somebody else.
            if !found.1 || Instant::now() >= deadline {
                return found;
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// The signature over a release's sums, and the keys to check it by.
    fn signed(&self, namespace: &str, name: &str, release: &Release, sums: &[u8]) -> Signed {
        let Some(signature) = release.signature.clone().filter(|_| release.sums.is_some()) else {
            let Some(key) = self.key.key() else {
                return Signed::default();
            };
            return Signed {
                signature: self.made(&key, sums),
                keys: vec![key.public.clone()],
            };
        };
        let mut keys = self.folder.keys(namespace, name);
        let judgement = self.folder.judge(sums, &signature, &keys);
        if judgement.tier == Tier::HashiCorp {
            // The key that vouched must be among those that the document names.
            let own = judgement
                .key
                .and_then(|key| self.folder.keyring.armored(&key));
            let named = |own: &String| keys.iter().any(|key| id_of(key) == id_of(own));
            if let Some(own) = own.filter(|own| !named(own)) {
                keys.push(own);
            }
        }
        Signed {
            signature: Some(signature.into()),
            keys,
        }
    }

    fn made(&self, key: &SigningKey, sums: &[u8]) -> Option<Bytes> {
        let made = self
            .signatures
            .try_get_with(Digest::of(sums), || key.sign(sums).map(Bytes::from));
        let failed = |error: Arc<String>| {
            tracing::error!(%error, "a private registry's sums cannot be signed");
        };
        made.map_err(failed).ok()
    }

    async fn stream(self: &Arc<Self>, path: PathBuf, kind: &'static str) -> Found {
        let this = self.clone();
        let opened = blocking(move || this.folder.open_archive(&path)).await;
        let (file, metadata) = opened.ok_or(Nothing::Pending)?;
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
        Ok(response)
    }
}

fn sums_or_signature(file: &str, sums: Bytes, signature: Option<Bytes>) -> Found {
    match file.ends_with("_SHA256SUMS") {
        true => Ok(bytes(sums, "text/plain")),
        false if file.ends_with("_SHA256SUMS.sig") => {
            let signature = signature.ok_or(Nothing::None)?;
            Ok(bytes(signature, "application/octet-stream"))
        }
        false => Err(Nothing::None),
    }
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
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

fn read_at(file: &File, at: u64, length: u64) -> std::io::Result<Bytes> {
    use std::os::unix::fs::FileExt as _;
    let mut buffer = vec![0; (length - at).min(BUFFER as u64) as usize];
    file.read_exact_at(&mut buffer, at)?;
    Ok(buffer.into())
}
