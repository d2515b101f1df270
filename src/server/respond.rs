//! Answers: bodies, errors (RFC 9209), cache status (RFC 9211), conditions and ranges (RFC 9110
//! sections 13 and 14), and the line that each request leaves in the log.

use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty, Full, StreamBody};
use hyper::body::{Body as _, Frame, SizeHint};
use hyper::ext::ReasonPhrase;
use hyper::header::{
    ACCEPT_RANGES, CONNECTION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap,
    HeaderName, HeaderValue, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, LAST_MODIFIED, RANGE, VIA,
};
use hyper::{Method, Response, StatusCode};

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
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ArchiveBytes {
    pub from_cache: bool,
    /// Whether a digest is known, so that a complete answer is a verified one
    pub verified: bool,
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
        let mut answer = Self::json(
            error.kind().status(),
            &serde_json::json!({ "errors": [words] }),
        );
        answer.cache = "error";
        answer.proxy_status(&format!(
            "error={}; details={}",
            error.kind().token(),
            sf_string(&error.to_string())
        ));
        if error.kind() == Kind::BadRequest {
            // What else is on this connection is not to be trusted.
            answer.header(CONNECTION, "close");
        }
        answer.cache_status("fwd=miss");
        answer
    }

    /// The same words as the reason phrase: of a refused CONNECT, Go shows nothing else.
    pub fn with_reason(mut self, error: &Error) -> Self {
        let words = printable(&format!("larder: {error}"));
        self.header(CONNECTION, "close");
        if let Ok(reason) = ReasonPhrase::try_from(words.into_bytes()) {
            self.response.extensions_mut().insert(reason);
        }
        self
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

/// Whether the client holds what would be sent: then 304 is what it asked for.
pub fn not_modified(asked: &HeaderMap, sent: &HeaderMap) -> bool {
    if asked.contains_key(IF_NONE_MATCH) {
        let Some(etag) = sent.get(ETAG).and_then(|etag| etag.to_str().ok()) else {
            return false;
        };
        let opaque = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
        return asked
            .get_all(IF_NONE_MATCH)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|tag| tag.trim() == "*" || opaque(tag) == opaque(etag));
    }
    match (date(asked, IF_MODIFIED_SINCE), date(sent, LAST_MODIFIED)) {
        (Some(since), Some(modified)) => modified <= since,
        _ => false,
    }
}

/// What part of `length` bytes is asked for.
#[derive(Debug, PartialEq, Eq)]
pub enum Part {
    Whole,
    /// First and last byte
    Range(u64, u64),
    Unsatisfiable,
}

/// Reads `Range` and `If-Range` for an answer that would carry `sent`. Several ranges, and what is
/// no range of bytes, are answered with the whole, as RFC 9110 section 14.2 allows.
pub fn part(asked: &HeaderMap, sent: &HeaderMap, length: u64) -> Part {
    let Some(range) = asked.get(RANGE).and_then(|value| value.to_str().ok()) else {
        return Part::Whole;
    };
    if let Some(condition) = asked.get(IF_RANGE)
        && !range_holds(condition, sent)
    {
        return Part::Whole;
    }
    parse_range(range, length)
}

fn range_holds(condition: &HeaderValue, sent: &HeaderMap) -> bool {
    if condition.as_bytes().starts_with(b"\"") {
        // Strong comparison: a weak tag never matches.
        return sent.get(ETAG) == Some(condition);
    }
    sent.get(LAST_MODIFIED) == Some(condition)
}

/// One range of `bytes=…` (RFC 9110 section 14.1.2).
pub fn parse_range(range: &str, length: u64) -> Part {
    let Some((unit, spec)) = range.split_once('=') else {
        return Part::Whole;
    };
    if !unit.trim().eq_ignore_ascii_case("bytes") || spec.contains(',') {
        return Part::Whole;
    }
    let Some((first, last)) = spec.trim().split_once('-') else {
        return Part::Whole;
    };
    let number = |text: &str| -> Option<u64> {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        // A number too large to read is beyond any archive's end.
        digits.then(|| text.parse().unwrap_or(u64::MAX))
    };
    match (number(first), number(last)) {
        (None, Some(suffix)) if first.is_empty() => match suffix.min(length) {
            0 => Part::Unsatisfiable,
            suffix => Part::Range(length - suffix, length - 1),
        },
        (Some(first), _) if last.is_empty() => match first < length {
            true => Part::Range(first, length - 1),
            false => Part::Unsatisfiable,
        },
        (Some(first), Some(last)) if first <= last => match first < length {
            true => Part::Range(first, last.min(length - 1)),
            false => Part::Unsatisfiable,
        },
        _ => Part::Whole,
    }
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

fn date(headers: &HeaderMap, name: HeaderName) -> Option<SystemTime> {
    httpdate::parse_http_date(headers.get(name)?.to_str().ok()?).ok()
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
            body,
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
    body: Body,
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

impl Drop for Traced {
    fn drop(&mut self) {
        if let Some(archive) = self.archive {
            let mut answer = Summary::default();
            if archive.from_cache {
                METRICS.cache_bytes.inc_by(self.sent);
                answer.from_cache = self.sent;
            } else {
                answer.from_upstream = self.sent;
            }
            answer.verified = usize::from(archive.verified && self.done);
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
mod tests {
    use super::*;
    use crate::cache::document::headers_from_text;
    use proptest::prelude::*;

    fn headers(lines: &[(&str, &str)]) -> HeaderMap {
        let text: Vec<_> = lines
            .iter()
            .map(|(n, v)| (n.to_string(), v.to_string()))
            .collect();
        headers_from_text(&text)
    }

    #[test]
    fn ranges_read_as_the_rfc_says() {
        for (range, part) in [
            ("bytes=0-", Part::Range(0, 99)),
            ("bytes=0-0", Part::Range(0, 0)),
            ("bytes=90-200", Part::Range(90, 99)),
            ("bytes=-5", Part::Range(95, 99)),
            ("bytes=-500", Part::Range(0, 99)),
            ("bytes=99-", Part::Range(99, 99)),
            ("bytes=100-", Part::Unsatisfiable),
            ("bytes=-0", Part::Unsatisfiable),
            ("bytes=99999999999999999999999-", Part::Unsatisfiable),
            ("bytes=5-4", Part::Whole),
            ("bytes=0-1,5-6", Part::Whole),
            ("bytes=a-b", Part::Whole),
            ("bytes=--5", Part::Whole),
            ("bytes=+1-5", Part::Whole),
            ("items=0-5", Part::Whole),
            ("bytes", Part::Whole),
        ] {
            assert_eq!(parse_range(range, 100), part, "{range}");
        }
    }

    #[test]
    fn a_changed_archive_is_sent_whole() {
        let sent = headers(&[
            ("etag", "\"1\""),
            ("last-modified", "Mon, 01 Jan 2024 00:00:00 GMT"),
        ]);
        let with = |condition: &str| {
            part(
                &headers(&[("range", "bytes=5-"), ("if-range", condition)]),
                &sent,
                9,
            )
        };
        assert_eq!(with("\"1\""), Part::Range(5, 8));
        assert_eq!(with("Mon, 01 Jan 2024 00:00:00 GMT"), Part::Range(5, 8));
        for other in ["\"2\"", "W/\"1\"", "Mon, 01 Jan 2024 00:00:01 GMT"] {
            assert_eq!(with(other), Part::Whole, "{other}");
        }
    }

    #[test]
    fn conditions_hold_weakly_and_tags_go_before_dates() {
        let sent = headers(&[
            ("etag", "W/\"1\""),
            ("last-modified", "Mon, 01 Jan 2024 00:00:00 GMT"),
        ]);
        let asked = |lines: &[(&str, &str)]| not_modified(&headers(lines), &sent);
        assert!(asked(&[("if-none-match", "\"0\", \"1\"")]));
        assert!(asked(&[("if-none-match", "*")]));
        assert!(asked(&[(
            "if-modified-since",
            "Mon, 01 Jan 2024 00:00:00 GMT"
        )]));
        assert!(!asked(&[(
            "if-modified-since",
            "Sun, 31 Dec 2023 00:00:00 GMT"
        )]));
        assert!(!asked(&[
            ("if-none-match", "\"2\""),
            ("if-modified-since", "Mon, 01 Jan 2024 00:00:00 GMT")
        ]));
        assert!(!asked(&[]));
    }

    #[test]
    fn strings_in_headers_are_escaped() {
        assert_eq!(sf_string("a \"b\" \\ \u{e9}\n"), r#""a \"b\" \\ ??""#);
    }

    proptest! {
        #[test]
        fn a_range_lies_within(range in "bytes=[0-9]{0,4}-[0-9]{0,4}", length in 0u64..500) {
            if let Part::Range(first, last) = parse_range(&range, length) {
                prop_assert!(first <= last && last < length);
            }
        }

        #[test]
        fn any_range_is_survived(range in "\\PC{0,30}", length: u64) {
            parse_range(&range, length);
        }
    }
}
