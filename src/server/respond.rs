//! Answers: bodies, errors (RFC 9209), cache status (RFC 9211), whole archives and parts of them,
//! and the line that each request leaves in the log.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty, Full, StreamBody};
use hyper::body::{Body as _, Frame, SizeHint};
use hyper::ext::ReasonPhrase;
use hyper::header::{
    ACCEPT_RANGES, CONNECTION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderName,
    HeaderValue, PROXY_AUTHENTICATE, VIA, WWW_AUTHENTICATE,
};
use hyper::{Method, Response, StatusCode};

use super::conditional::{Part, not_modified, part};
use super::connection::Peer;
use super::leases::Summary;
use crate::cache::follower::Reader;
use crate::error::{Error, Kind};
use crate::telemetry::{METRICS, Outcome};
use crate::upstream::download::length;

/// The body of every answer. An error in it resets the connection: so a client sees a cut.
pub type Body = UnsyncBoxBody<Bytes, Error>;

const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

pub fn nothing() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// The bytes of an archive as they come.
pub fn reading(reader: Reader) -> Body {
    let frames = stream::unfold(Some(reader), |reader| async {
        let mut reader = reader?;
        match reader.next().await {
            Ok(Some(bytes)) => Some((Ok(Frame::data(bytes)), Some(reader))),
            Ok(None) => None,
            Err(e) => Some((Err(e), None)),
        }
    });
    StreamBody::new(frames).boxed_unsync()
}

/// An answer and how the cache came to it.
pub struct Answer {
    pub response: Response<Body>,
    /// For logs and metrics: `hit`, `miss`, …
    pub cache: &'static str,
    /// Whether its body counts as archive bytes
    pub archive: Option<ArchiveBytes>,
}

/// Whose bytes an archive's answer sends.
pub struct ArchiveBytes {
    pub from_cache: bool,
    /// Whether a complete answer is a verified one, as far as that was known when it began
    pub verified: bool,
    /// Whether there turned out to be nothing to verify by, once it is over
    pub unverified: Arc<AtomicBool>,
}

impl ArchiveBytes {
    /// Whether what was sent whole was verified.
    fn is_verified(&self) -> bool {
        self.verified && !self.unverified.load(Ordering::Relaxed)
    }
}

impl Answer {
    pub fn new(response: Response<Body>, cache: &'static str) -> Self {
        Self {
            response,
            cache,
            archive: None,
        }
    }

    /// JSON of larder's own.
    pub fn json(status: StatusCode, value: &serde_json::Value) -> Self {
        let mut response = Response::new(full(value.to_string()));
        *response.status_mut() = status;
        let json = HeaderValue::from_static("application/json");
        response.headers_mut().insert(CONTENT_TYPE, json);
        Self::new(response, "own")
    }

    /// A failure or a refusal, with the words for the user.
    pub fn error(error: &Error) -> Self {
        let words = format!("larder: {error}");
        let mut body = serde_json::json!({ "errors": [words] });
        if error.kind() == Kind::Withheld {
            // For whoever looks at the list whatever its status.
            body["versions"] = serde_json::json!([]);
            body["warnings"] = body["errors"].clone();
        }
        let mut answer = Self::json(error.kind().status(), &body);
        answer.cache = "error";
        answer.proxy_status(&format!(
            "error={}; details={}",
            error.kind().token(),
            sf_string(&error.to_string().chars().take(1024).collect::<String>())
        ));
        if matches!(
            error.kind(),
            Kind::Policy | Kind::Withheld | Kind::Unsigned | Kind::Contradiction | Kind::Offline
        ) {
            answer.reason(error);
        }
        if error.kind() == Kind::Unauthenticated {
            answer.header(PROXY_AUTHENTICATE, "Basic realm=\"larder\"");
        }
        if error.kind() == Kind::Unauthorized {
            answer.header(WWW_AUTHENTICATE, "Basic realm=\"larder\"");
        }
        if error.kind() == Kind::BadRequest {
            // What else is on this connection is not to be trusted.
            answer.header(CONNECTION, "close");
        }
        answer.cache_status("fwd=miss");
        answer
    }

    /// The same words as the reason phrase: of a refused CONNECT, Go shows nothing else.
    pub fn with_reason(mut self, error: &Error) -> Self {
        self.header(CONNECTION, "close");
        self.reason(error);
        self
    }

    fn reason(&mut self, error: &Error) {
        let mut words = printable(&format!("larder: {error}"));
        // Some clients take no longer head than 16 KiB.
        words.truncate(1024);
        if let Ok(reason) = ReasonPhrase::try_from(words.into_bytes()) {
            self.response.extensions_mut().insert(reason);
        }
    }

    /// `Proxy-Status: larder; …`
    pub fn proxy_status(&mut self, words: &str) {
        self.header(PROXY_STATUS, &format!("larder; {words}"));
    }

    /// `Cache-Status: larder; …`, and `Via`, which stands on the same answers.
    pub fn cache_status(&mut self, words: &str) {
        self.header(CACHE_STATUS, &format!("larder; {words}"));
        let via = HeaderValue::from_static("1.1 larder");
        self.response.headers_mut().append(VIA, via);
    }

    fn header(&mut self, name: HeaderName, value: &str) {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.response.headers_mut().insert(name, value);
        }
    }
}

/// A string of RFC 8941 section 3.3.3.
pub fn sf_string(text: &str) -> String {
    let escaped = printable(text).replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{escaped}\"")
}

fn printable(text: &str) -> String {
    let fits = |c: char| if (' '..='~').contains(&c) { c } else { '?' };
    text.chars().map(fits).collect()
}

/// Answers for an archive with `headers`: whole, part, 304 or 416. `read` makes the body of the
/// bytes from the first to the second number (exclusive; none: to the end).
pub fn archive(
    method: &Method,
    asked: &HeaderMap,
    mut headers: HeaderMap,
    length: Option<u64>,
    read: impl FnOnce(u64, Option<u64>) -> Body,
) -> Response<Body> {
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    let mut response = Response::new(nothing());
    if not_modified(asked, &headers) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        headers.remove(CONTENT_TYPE);
        *response.headers_mut() = headers;
        return response;
    }
    let part = match length {
        // Ranges are for GET alone (RFC 9110 section 14.2).
        Some(length) if method == Method::GET => part(asked, &headers, length),
        _ => Part::Whole,
    };
    let (at, end) = match part {
        Part::Whole => (0, length),
        Part::Range(first, last) => {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            let total = length.unwrap_or_default();
            insert(
                &mut headers,
                CONTENT_RANGE,
                format!("bytes {first}-{last}/{total}"),
            );
            (first, Some(last + 1))
        }
        Part::Unsatisfiable => {
            *response.status_mut() = StatusCode::RANGE_NOT_SATISFIABLE;
            let total = length.unwrap_or_default();
            insert(&mut headers, CONTENT_RANGE, format!("bytes */{total}"));
            headers.remove(CONTENT_TYPE);
            *response.headers_mut() = headers;
            return response;
        }
    };
    if let Some(end) = end {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(end - at));
    }
    *response.headers_mut() = headers;
    if method != Method::HEAD {
        *response.body_mut() = read(at, end);
    }
    response
}

fn insert(headers: &mut HeaderMap, name: HeaderName, value: String) {
    if let Ok(value) = HeaderValue::from_str(&value) {
        headers.insert(name, value);
    }
}

/// What a request leaves behind, when the last byte of its answer is sent or given up.
pub struct Trace {
    peer: Peer,
    method: Method,
    url: String,
    started: Instant,
}

impl Trace {
    /// Begins with the request. `url` holds no query.
    pub fn begin(peer: &Peer, method: &Method, url: String) -> Self {
        peer.running.fetch_add(1, Ordering::SeqCst);
        Self {
            peer: peer.clone(),
            method: method.clone(),
            url,
            started: Instant::now(),
        }
    }

    /// Puts the answer on its way.
    pub fn send(self, answer: Answer) -> Response<Body> {
        let (parts, body) = answer.response.into_parts();
        let outcome = Outcome {
            cache: answer.cache,
            status: parts.status.as_u16(),
        };
        METRICS.requests.get_or_create(&outcome).inc();
        let traced = Traced {
            length: length(&parts.headers),
            done: body.is_end_stream(),
            body: CutLate { body, cause: None },
            trace: self,
            outcome,
            archive: answer.archive,
            sent: 0,
        };
        Response::from_parts(parts, traced.boxed_unsync())
    }

    /// Draining need not wait for what is traced from here on.
    pub fn detach(&mut self) {
        self.peer.alive = None;
    }

    /// A tunnel's or an upgraded connection's line.
    pub fn log(&self, cache: &str, status: u16, bytes: u64) {
        tracing::info!(
            method = %self.method, url = %self.url, status, bytes, cache,
            duration_ms = self.started.elapsed().as_millis() as u64, client = %self.peer.addr.ip(),
            "request"
        );
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.peer.running.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Traced {
    body: CutLate,
    trace: Trace,
    outcome: Outcome,
    archive: Option<ArchiveBytes>,
    length: Option<u64>,
    sent: u64,
    done: bool,
}

impl hyper::body::Body for Traced {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => self.sent += frame.data_ref().map_or(0, |data| data.len() as u64),
            Some(Err(cause)) => {
                tracing::warn!(url = %self.trace.url, %cause, "answer cut short");
            }
            None => self.done = true,
        }
        // The last byte ends it too: where the length is known, nobody polls for more.
        self.done |= self.length == Some(self.sent);
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A body that fails a turn after its last bytes. hyper drops the head and whatever else it has not
/// sent when a body fails, and sends what the socket takes when a body has nothing yet: a client is to
/// see an answer that is cut short, not none.
struct CutLate {
    body: Body,
    cause: Option<Error>,
}

impl hyper::body::Body for CutLate {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if let Some(cause) = self.cause.take() {
            return Poll::Ready(Some(Err(cause)));
        }
        match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Err(cause)) => {
                self.cause = Some(cause);
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            frame => Poll::Ready(frame),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.cause.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        if let Some(archive) = &self.archive {
            let mut answer = Summary::default();
            if archive.from_cache {
                METRICS.cache_bytes.inc_by(self.sent);
                answer.from_cache = self.sent;
            } else {
                answer.from_upstream = self.sent;
            }
            answer.verified = usize::from(self.done && archive.is_verified());
            if let Some(whose) = self.trace.peer.whose.clone() {
                let leases = self.trace.peer.entrance.server.leases();
                leases.count(whose, answer);
            }
        }
        self.trace
            .log(self.outcome.cache, self.outcome.status, self.sent);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::convert::Infallible;

    use hyper::server::conn::http1;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn what_came_before_a_cut_is_sent() {
        for before in [None, Some("some bytes")] {
            let (mut client, server) = tokio::io::duplex(4096);
            let service = service_fn(|_| async move {
                let data = before.map(|bytes| Ok(Frame::data(Bytes::from(bytes))));
                let cut = Err(Error::new(Kind::Timeout, "cut"));
                let body = StreamBody::new(stream::iter(data.into_iter().chain([cut])));
                let (body, cause) = (body.boxed_unsync(), None);
                Ok::<_, Infallible>(Response::new(CutLate { body, cause }))
            });
            let serving = http1::Builder::new().serve_connection(TokioIo::new(server), service);
            client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
            let mut said = String::new();
            let (served, read) = tokio::join!(serving, client.read_to_string(&mut said));
            served.unwrap_err();
            read.unwrap();
            assert!(said.starts_with("HTTP/1.1 200 OK\r\n"), "{said:?}");
            assert!(said.contains(before.unwrap_or_default()), "{said:?}");
            assert!(!said.ends_with("0\r\n\r\n"), "{said:?}");
        }
    }

    #[test]
    fn strings_in_headers_are_escaped() {
        assert_eq!(sf_string("a \"b\" \\ \u{e9}\n"), r#""a \"b\" \\ ??""#);
    }
}
