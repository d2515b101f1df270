//! The API by which other larder commands work through the process that has the data dir. Each
//! request bears the token from the lock file, which only that user can read.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{AUTHORIZATION, HeaderMap};
use hyper::{Method, Request, Response, StatusCode};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::connection::Peer;
use super::respond::Answer;
use super::{Server, Tally};
use crate::error::{Error, Kind};

const BODY_LIMIT: usize = 4096;

/// A listener of its own for one `larder run`, whose traffic is counted apart.
pub struct Lease {
    addr: SocketAddr,
    tally: Arc<Tally>,
    over: watch::Sender<bool>,
}

/// What `larder run` is told of its lease.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LeaseInfo {
    pub addr: SocketAddr,
    pub from_cache: u64,
    pub from_upstream: u64,
    pub verified: usize,
}

/// What `larder gc` asks for.
#[derive(Debug, Serialize, Deserialize)]
pub struct GcRequest {
    pub max_size: Option<u64>,
    pub unused_for_ms: Option<u64>,
}

impl Lease {
    fn info(&self) -> LeaseInfo {
        LeaseInfo {
            addr: self.addr,
            from_cache: self.tally.from_cache.load(Ordering::Relaxed),
            from_upstream: self.tally.from_upstream.load(Ordering::Relaxed),
            verified: self.tally.verified.load(Ordering::Relaxed),
        }
    }
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
        (&Method::POST, "/api/v1/lease") => lease(server.clone()).await,
        (&Method::GET, _) if path.starts_with("/api/v1/lease/") => lease_info(server, path),
        _ => Err(Error::new(Kind::NotFound, format!("no API at {path}"))),
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
    let bad = |e: String| Error::new(Kind::BadRequest, e);
    let body = Limited::new(body, BODY_LIMIT)
        .collect()
        .await
        .map_err(|e| bad(e.to_string()))?;
    let asked: GcRequest =
        serde_json::from_slice(&body.to_bytes()).map_err(|e| bad(e.to_string()))?;
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

/// Opens a listener that lives as long as the answer is being read.
async fn lease(server: Arc<Server>) -> Result<Answer, Error> {
    let failed = |e: std::io::Error| Error::new(Kind::Internal, format!("no port for a run: {e}"));
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
    let addr = listener.local_addr().map_err(failed)?;
    let lease = Arc::new(Lease {
        addr,
        tally: Arc::default(),
        over: watch::Sender::new(false),
    });
    let own = &server.cache.upstream.dialer().own;
    own.write().unwrap_or_else(|e| e.into_inner()).push(addr);
    {
        let mut leases = server.leases.lock().unwrap_or_else(|e| e.into_inner());
        leases.push(lease.clone());
        server.lease_count.send_replace(Some(leases.len()));
    }
    let over = Some(lease.over.subscribe());
    server.clone().listen(listener, lease.tally.clone(), over);
    let first = serde_json::to_vec(&lease.info()).unwrap_or_default();
    let hold = Hold {
        draining: server.draining.subscribe(),
        server,
        lease,
    };
    let frames = stream::unfold((Some(first), hold), |(first, mut hold)| async move {
        if let Some(mut first) = first {
            first.push(b'\n');
            let frame = Ok::<_, Error>(Frame::data(Bytes::from(first)));
            return Some((frame, (None, hold)));
        }
        let _ = hold.draining.wait_for(|on| *on).await;
        None
    });
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    *response.status_mut() = StatusCode::OK;
    Ok(Answer::new(response, "own"))
}

/// Ends a lease when its reader is gone.
struct Hold {
    server: Arc<Server>,
    lease: Arc<Lease>,
    draining: watch::Receiver<bool>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.lease.over.send_replace(true);
        let own = &self.server.cache.upstream.dialer().own;
        own.write()
            .unwrap_or_else(|e| e.into_inner())
            .retain(|a| *a != self.lease.addr);
        let mut leases = self.server.leases.lock().unwrap_or_else(|e| e.into_inner());
        leases.retain(|lease| lease.addr != self.lease.addr);
        self.server.lease_count.send_replace(Some(leases.len()));
    }
}

fn lease_info(server: &Server, path: &str) -> Result<Answer, Error> {
    let port = path
        .rsplit('/')
        .next()
        .and_then(|port| port.parse::<u16>().ok());
    let leases = server.leases.lock().unwrap_or_else(|e| e.into_inner());
    let lease = leases.iter().find(|lease| Some(lease.addr.port()) == port);
    let lease = lease.ok_or_else(|| Error::new(Kind::NotFound, format!("no lease at {path}")))?;
    Ok(Answer::json(
        StatusCode::OK,
        &serde_json::json!(lease.info()),
    ))
}
