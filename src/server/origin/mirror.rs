//! The provider network mirror protocol:
//! <https://developer.hashicorp.com/terraform/internals/provider-network-mirror-protocol>

use hyper::body::Incoming;
use hyper::header::{CONTENT_LENGTH, HeaderValue, LOCATION};
use hyper::{Method, Request, Response, StatusCode};
use serde_json::{Map, Value, json};
use url::Url;

use super::ways::{admit, malformed};
use super::{Asking, Base, Way};
use crate::cache::Archive;
use crate::cache::fill::NoArchive;
use crate::cache::mirror::Provider;
use crate::config::{Authority, Redirect};
use crate::error::{Error, Kind as ErrorKind};
use crate::server::access::Seal;
use crate::server::connection::Peer;
use crate::server::respond::{Answer, nothing};
use crate::terraform::own::{ArchiveName, Page, mirror_page};
use crate::terraform::route::{Kind, check_path};

/// Answers for a path below `/mirror/`.
///
/// # Errors
/// `NotFound` for what is not well-formed, before anybody is asked; else as for the registry itself.
pub async fn answer(peer: &Peer, request: Request<Incoming>) -> Result<Answer, Error> {
    let path = request.uri().path().to_owned();
    let rest = path.strip_prefix("/mirror/").unwrap_or_default();
    let asked = check_path(&path).ok().and_then(|()| mirror_page(rest));
    let Some(asked) = asked else {
        return Err(malformed(&path, "/mirror/HOST/NAMESPACE/TYPE/index.json"));
    };
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let words = format!("{path} can only be read; use GET");
        return Err(Error::new(ErrorKind::BadRequest, words));
    }
    let folder = path[..path.len() - file_name(&path).len()].to_owned();
    let (request, seal) = admit(peer, request).await?;
    let cache = &peer.entrance.server.cache;
    cache.may_ask(&asked.host)?;
    let provider = Provider {
        host: asked.host,
        namespace: asked.namespace,
        name: asked.name,
    };
    match asked.page {
        Page::Index => {
            let versions = cache.mirrored_versions(&provider).await?;
            let versions = versions.into_iter().map(|one| (one.version, json!({})));
            let versions: Map<String, Value> = versions.collect();
            Ok(document(&request, &json!({ "versions": versions })))
        }
        Page::Version(version) => {
            let archives = cache.mirrored_archives(&provider, &version).await?;
            let archives = archives.into_iter().map(|one| {
                let url = sealed(seal.as_ref(), &folder, &one.file);
                let entry = json!({ "url": url, "hashes": one.hashes });
                (one.file.platform(), entry)
            });
            let archives: Map<String, Value> = archives.collect();
            Ok(document(&request, &json!({ "archives": archives })))
        }
        Page::Archive { version, os, arch } => {
            let file = ArchiveName {
                name: provider.name.clone(),
                version,
                os,
                arch,
            };
            let (_, url) = cache.mirrored_download(&provider, &file).await?;
            archive(peer, request, &url).await
        }
    }
}

/// The archive at `url`, streamed; or the way to it, where that is wanted and it is not held yet.
async fn archive(peer: &Peer, request: Request<Incoming>, url: &Url) -> Result<Answer, Error> {
    let server = &peer.entrance.server;
    let (mut parts, _) = request.into_parts();
    parts.uri = url
        .path()
        .parse()
        .map_err(|_| Error::new(ErrorKind::Nonsense, "the registry names no URL"))?;
    let authority = Authority::of(url)
        .ok_or_else(|| Error::new(ErrorKind::Nonsense, "the registry names no host"))?;
    // Credentials for larder's mirror are for nobody else.
    parts.headers.remove(hyper::header::AUTHORIZATION);
    parts.headers.remove(hyper::header::COOKIE);
    let asking = Asking {
        peer: peer.clone(),
        authority,
        parts,
        way: Way::Pages(Base {
            prefix: String::new(),
            service: None,
            seal: None,
        }),
        kind: Some(Kind::Archive),
    };
    let reachable = server.config.registry(&asking.authority).is_none();
    let is_get = asking.parts.method == Method::GET;
    if server.config.redirect == Redirect::Temporary && reachable && is_get {
        // The fetch that this begins goes on without a client.
        match server.cache.archive(url, asking.shared_headers()).await? {
            Archive::Filling { fill, guard, .. } => {
                if server.cache.sources().judge.policy.restricts() {
                    // Its date comes with its head.
                    let head = match fill.head().await {
                        Ok(head) => Some(head.headers.clone()),
                        Err(NoArchive::Failed(e)) => return Err(e),
                        Err(NoArchive::Refused(_)) => None,
                    };
                    server.cache.admit_archive(url, head.as_ref()).await?;
                }
                drop(guard);
                return elsewhere(url);
            }
            Archive::Passing(_) => return elsewhere(url),
            Archive::Held(_) | Archive::Refused(_) => {}
        }
    }
    match asking.parts.method {
        Method::HEAD => asking.archive_head(url).await,
        _ => asking.archive(url, false).await,
    }
}

/// 307: this archive is to be had there.
fn elsewhere(url: &Url) -> Result<Answer, Error> {
    let mut response = Response::new(nothing());
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    let mut url = url.clone();
    url.set_fragment(None);
    let location = HeaderValue::from_str(url.as_str());
    let location =
        location.map_err(|_| Error::new(ErrorKind::Nonsense, "the registry names no URL"))?;
    response.headers_mut().insert(LOCATION, location);
    response
        .headers_mut()
        .insert(CONTENT_LENGTH, HeaderValue::from(0));
    let mut answer = Answer::new(response, "redirect");
    answer.cache_status("fwd=miss; detail=redirected");
    Ok(answer)
}

fn document(request: &Request<Incoming>, value: &Value) -> Answer {
    let mut answer = Answer::json(StatusCode::OK, value);
    if request.method() == Method::HEAD {
        let length = value.to_string().len();
        let headers = answer.response.headers().clone();
        answer.response = Response::new(nothing());
        *answer.response.headers_mut() = headers;
        answer
            .response
            .headers_mut()
            .insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    answer
}

/// A relative URL: it holds by whatever address the client came.
fn sealed(seal: Option<&Seal>, folder: &str, file: &ArchiveName) -> String {
    match seal {
        Some(seal) => format!("{file}?{}", seal.query(&format!("{folder}{file}"))),
        None => file.to_string(),
    }
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or_default()
}
