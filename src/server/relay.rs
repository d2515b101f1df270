//! Passing requests and answers on for one client alone: nothing of them is kept.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{
    ACCEPT_ENCODING, CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, PROXY_AUTHORIZATION, SET_COOKIE,
    TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response};
use tokio::time::Instant;
use url::Url;

use super::respond::Answer;
use crate::cache::document::end_to_end;
use crate::cache::metadata::offline;
use crate::error::{Error, Kind as ErrorKind};
use crate::upstream::{Ask, RequestBody, Upstream, chunk};

/// For the head of an answer that is passed on.
const PASS_DEADLINE: Duration = Duration::from_secs(7);
/// Where the request has a body to send first.
const PASS_WITH_BODY_DEADLINE: Duration = Duration::from_secs(60);
/// Between two chunks of a body that is passed on.
const RELAY_IDLE: Duration = Duration::from_secs(30);

/// Passes a request on for this client alone; nothing of the answer is kept.
pub async fn pass(
    upstream: &Arc<Upstream>,
    parts: &Parts,
    url: &Url,
    body: RequestBody,
) -> Result<Answer, Error> {
    let headers = forwarded(&parts.headers);
    if matches!(parts.method, Method::GET | Method::HEAD) {
        return pass_with(upstream, parts, url, headers).await;
    }
    if upstream.is_offline(url) {
        return Err(offline(url));
    }
    let mut request = Request::new(body);
    *request.method_mut() = parts.method.clone();
    *request.uri_mut() = url
        .as_str()
        .parse()
        .map_err(|_| Error::new(ErrorKind::BadRequest, "the URL cannot be asked for"))?;
    *request.headers_mut() = headers;
    let deadline = Instant::now() + PASS_WITH_BODY_DEADLINE;
    let response = upstream.send(request, deadline, "pass").await?;
    Ok(relay(response, url, "fwd=bypass"))
}

/// Passes a GET or HEAD on with those headers.
pub async fn pass_with(
    upstream: &Arc<Upstream>,
    parts: &Parts,
    url: &Url,
    headers: HeaderMap,
) -> Result<Answer, Error> {
    if upstream.is_offline(url) {
        return Err(offline(url));
    }
    let ask = Ask {
        method: parts.method.clone(),
        url,
        headers,
        deadline: Instant::now() + PASS_DEADLINE,
        patience: PASS_DEADLINE,
        follow: false,
        purpose: "pass",
    };
    let response = upstream.ask(&ask).await?;
    Ok(relay(response, url, "fwd=bypass"))
}

/// Upstream's answer as it comes, for one client.
pub fn relay(response: Response<Incoming>, url: &Url, words: &str) -> Answer {
    let (parts, body) = response.into_parts();
    let mut headers = end_to_end(&parts.headers);
    // RFC 9112 section 6.3: where both are there, the length is none.
    let chunked = parts.headers.contains_key(TRANSFER_ENCODING);
    let kept = [Some(SET_COOKIE), Some(CONTENT_LENGTH).filter(|_| !chunked)];
    for name in kept.into_iter().flatten() {
        for value in parts.headers.get_all(&name) {
            headers.append(name.clone(), value.clone());
        }
    }
    let frames = stream::unfold(Some((body, url.clone())), |state| async {
        let (mut body, url) = state?;
        match chunk(&mut body, RELAY_IDLE, &url).await {
            Ok(Some(bytes)) => Some((Ok(Frame::data(bytes)), Some((body, url)))),
            Ok(None) => None,
            Err(e) => Some((Err(e), None)),
        }
    });
    let mut relayed = Response::new(StreamBody::new(frames).boxed_unsync());
    *relayed.status_mut() = parts.status;
    *relayed.headers_mut() = headers;
    let mut answer = Answer::new(relayed, "pass");
    answer.cache_status(words);
    answer
}

/// A client's headers as they are passed on: end-to-end ones, without those for the proxy.
pub fn forwarded(headers: &HeaderMap) -> HeaderMap {
    let mut passed = end_to_end(headers);
    for name in [
        HOST,
        CONNECTION,
        PROXY_AUTHORIZATION,
        TE,
        TRAILER,
        TRANSFER_ENCODING,
        UPGRADE,
    ] {
        passed.remove(name);
    }
    passed
}

/// For an archive that is verified on the way, which must come whole.
pub fn forwarded_without_ranges(headers: &HeaderMap) -> HeaderMap {
    let mut passed = forwarded(headers);
    for name in [
        "range",
        "if-range",
        "if-none-match",
        "if-modified-since",
        "if-match",
        "if-unmodified-since",
    ] {
        passed.remove(name);
    }
    passed.remove(ACCEPT_ENCODING);
    passed
}
