//! The API by which other larder commands work through the process that has the data dir. Each
//! request bears the token from the lock file, which only that user can read.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{AUTHORIZATION, HeaderMap};
use hyper::{Method, Request, Response, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::Server;
use super::connection::Peer;
use super::respond::{Answer, full};
use crate::config::Wish;
use crate::error::{Error, Kind};

const BODY_LIMIT: usize = 64 << 10;
/// For files that are new in private registries.
const LOOKING: Duration = Duration::from_secs(3);

/// What `larder gc` asks for.
#[derive(Debug, Serialize, Deserialize)]
pub struct GcRequest {
    pub max_size: Option<u64>,
    pub unused_for_ms: Option<u64>,
}

/// Answers an API request.
pub async fn answer(peer: &Peer, request: Request<Incoming>) -> Answer {
    let server = &peer.entrance.server;
    if !is_authorized(request.headers(), &server.token) {
        let words = "the API is for larder's own commands";
        return Answer::error(&Error::new(Kind::Denied, words));
    }
    let (parts, body) = request.into_parts();
    let path = parts.uri.path();
    let outcome = match (&parts.method, path) {
        (&Method::POST, "/api/v1/gc") => gc(server, body).await,
        (&Method::GET, "/api/v1/registries") => Ok(registries(server).await),
        (method, _) => match (method, path.strip_prefix("/api/v1/runs/")) {
            (&Method::POST, Some(id)) => lease(server, id, body).await,
            (&Method::GET, Some(id)) => summary(server, id).await,
            _ => Err(Error::new(Kind::NotFound, format!("no API at {path}"))),
        },
    };
    outcome.unwrap_or_else(|e| Answer::error(&e))
}

/// Compared by digest, so that the time taken says nothing of the token.
fn is_authorized(headers: &HeaderMap, token: &str) -> bool {
    use crate::digest::Digest;
    let given = headers
        .get(AUTHORIZATION)
        .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    !token.is_empty()
        && given.is_some_and(|given| Digest::of(given) == Digest::of(token.as_bytes()))
}

async fn gc(server: &Server, body: Incoming) -> Result<Answer, Error> {
    let asked: GcRequest = read(body).await?;
    let store = server.cache.store.clone();
    let freed = tokio::task::spawn_blocking(move || {
        store.gc(
            asked.max_size,
            asked.unused_for_ms.map(Duration::from_millis),
        )
    });
    let freed = freed
        .await
        .map_err(|e| Error::new(Kind::Internal, e.to_string()))?;
    Ok(Answer::json(StatusCode::OK, &serde_json::json!(freed)))
}

/// What is wrong in the private registries, after a look at what is new, if that is not long.
async fn registries(server: &Server) -> Answer {
    let looks = server.registries.iter().map(|one| {
        let one = one.clone();
        tokio::task::spawn_blocking(move || one.folder.survey(&one.host))
    });
    let looking = futures_util::future::join_all(looks);
    let _ = tokio::time::timeout(LOOKING, looking).await;
    let surveys: Vec<_> = server.registries.iter().map(|one| one.survey()).collect();
    Answer::json(StatusCode::OK, &serde_json::json!(surveys))
}

/// A body of JSON.
async fn read<T: DeserializeOwned>(body: Incoming) -> Result<T, Error> {
    let bad = |e: String| Error::new(Kind::BadRequest, e);
    let body = Limited::new(body, BODY_LIMIT).collect().await;
    let body = body.map_err(|e| bad(e.to_string()))?.to_bytes();
    serde_json::from_slice(&body).map_err(|e| bad(e.to_string()))
}

/// Opens a lease that lasts as long as the answer is being read.
async fn lease(server: &Arc<Server>, id: &str, body: Incoming) -> Result<Answer, Error> {
    let wishes: Vec<Wish> = read(body).await?;
    let unlike = wishes.iter().find(|wish| !server.config.fulfils(wish));
    if let Some(Wish { option, value }) = unlike {
        let mut response = Response::new(full(format!("--{option}={value}")));
        *response.status_mut() = StatusCode::CONFLICT;
        return Ok(Answer::new(response, "own"));
    }
    if !server.shared.leases.open(id) {
        return Err(Error::new(Kind::Busy, "this process is ending; ask again"));
    }
    let hold = Hold {
        draining: server.shared.draining.subscribe(),
        server: server.clone(),
        id: id.to_owned(),
    };
    let frames = stream::unfold((true, hold), |(first, mut hold)| async move {
        if first {
            let frame = Ok::<_, Error>(Frame::data(Bytes::from_static(b"leased\n")));
            return Some((frame, (false, hold)));
        }
        let _ = hold.draining.wait_for(|on| *on).await;
        None
    });
    let response = Response::new(StreamBody::new(frames).boxed_unsync());
    Ok(Answer::new(response, "own"))
}

/// Ends a lease when its reader is gone.
struct Hold {
    server: Arc<Server>,
    id: String,
    draining: watch::Receiver<bool>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.server.shared.leases.close(&self.id);
    }
}

async fn summary(server: &Server, id: &str) -> Result<Answer, Error> {
    let summary = server.shared.leases.summary(id).await;
    let summary =
        summary.ok_or_else(|| Error::new(Kind::NotFound, format!("no run {id} is known")))?;
    Ok(Answer::json(StatusCode::OK, &serde_json::json!(summary)))
}
