//! A metadata document as it is kept: an answer's status, headers and bytes, with what freshness
//! says of it (RFC 9111), in one file of a JSON line and the body.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{
    AGE, CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, DATE, ETAG, EXPIRES, HeaderMap, HeaderName,
    HeaderValue, LAST_MODIFIED, PROXY_AUTHENTICATE, RETRY_AFTER, SET_COOKIE,
    STRICT_TRANSPORT_SECURITY, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, VARY,
};
use serde::{Deserialize, Serialize};
use url::Url;

use crate::digest::Digest;
use crate::terraform::registry::{Download, signing_keys};
use crate::terraform::route::Kind;

/// A version list older than this hides releases.
const VERSION_LIST_LIFETIME: Duration = Duration::from_secs(60);
/// A release published a minute ago must not be "not found".
const ERROR_LIFETIME: Duration = Duration::from_secs(3);

/// A document, or an error answer in its place.
#[derive(Clone, Debug)]
pub struct Document {
    pub key: String,
    pub kind: Kind,
    /// What its relative references resolve against
    pub base: Url,
    pub status: StatusCode,
    /// End-to-end headers, without those that are made anew for each client
    pub headers: HeaderMap,
    pub body: Bytes,
    /// When upstream last vouched for it
    pub validated: SystemTime,
    pub lifetime: Duration,
    /// The Accept header that chose it, where upstream says that this mattered
    pub accept: Option<String>,
    /// For a version list: since when upstream has sent one that lost most of its versions
    pub doubtful_since: Option<SystemTime>,
    /// For a provider's download document: what it says
    pub download: Option<Arc<Download>>,
}

/// The first line of a document's file.
#[derive(Serialize, Deserialize)]
struct Line {
    key: String,
    kind: Kind,
    base: Url,
    status: u16,
    headers: Vec<(String, String)>,
    sha256: String,
    /// Milliseconds since 1970
    validated: u64,
    /// Milliseconds
    lifetime: u64,
    accept: Option<String>,
    /// Milliseconds since 1970
    #[serde(default, skip_serializing_if = "Option::is_none")]
    doubtful_since: Option<u64>,
    download: Option<Download>,
}

impl Document {
    /// An answer for one client alone, of which nothing is kept.
    pub fn passing(url: &Url, kind: Kind, body: Bytes) -> Self {
        Self {
            key: String::new(),
            kind,
            base: url.clone(),
            status: StatusCode::OK,
            headers: HeaderMap::new(),
            body,
            validated: SystemTime::now(),
            lifetime: Duration::ZERO,
            accept: None,
            doubtful_since: None,
            download: None,
        }
    }

    /// How long it is fresh yet; none if it is stale.
    pub fn fresh_for(&self, now: SystemTime) -> Option<Duration> {
        // A clock that was set back makes it stale rather than eternal.
        let age = now.duration_since(self.validated).ok()?;
        self.lifetime
            .checked_sub(age)
            .filter(|left| !left.is_zero())
    }

    /// Whether it answers a request that accepts `accept`.
    pub fn answers(&self, accept: Option<&str>) -> bool {
        self.accept
            .as_deref()
            .is_none_or(|chosen| chosen == accept.unwrap_or_default())
    }

    /// About what it takes in memory, in bytes.
    pub fn weight(&self) -> u32 {
        /// Its URLs, what it says of an archive, its place in the table
        const DOCUMENT: usize = 4096;
        const HEADER: usize = 128;
        let headers = self.headers.iter();
        let headers = headers.map(|(name, value)| name.as_str().len() + value.len() + HEADER);
        let all = DOCUMENT + self.body.len() + headers.sum::<usize>();
        u32::try_from(all).unwrap_or(u32::MAX)
    }

    pub fn etag(&self) -> Option<&HeaderValue> {
        self.headers.get(ETAG)
    }

    pub fn last_modified(&self) -> Option<&HeaderValue> {
        self.headers.get(LAST_MODIFIED)
    }

    /// The file's bytes.
    pub fn to_file(&self) -> Vec<u8> {
        let line = Line {
            key: self.key.clone(),
            kind: self.kind,
            base: self.base.clone(),
            status: self.status.as_u16(),
            headers: headers_to_text(&self.headers),
            sha256: Digest::of(&self.body).to_string(),
            validated: millis(self.validated),
            lifetime: self.lifetime.as_millis() as u64,
            accept: self.accept.clone(),
            doubtful_since: self.doubtful_since.map(millis),
            download: self.download.as_deref().cloned(),
        };
        let mut bytes = serde_json::to_vec(&line).unwrap_or_default();
        bytes.push(b'\n');
        bytes.extend_from_slice(&self.body);
        bytes
    }

    /// Reads a file back; none if it is torn or rotten.
    pub fn from_file(bytes: Bytes) -> Option<Self> {
        let end = bytes.iter().position(|b| *b == b'\n')?;
        let line: Line = serde_json::from_slice(&bytes[..end]).ok()?;
        let body = bytes.slice(end + 1..);
        if Digest::of(&body).to_string() != line.sha256 {
            return None;
        }
        Some(Self {
            key: line.key,
            kind: line.kind,
            base: line.base,
            status: StatusCode::from_u16(line.status).ok()?,
            headers: headers_from_text(&line.headers),
            validated: SystemTime::UNIX_EPOCH + Duration::from_millis(line.validated),
            lifetime: Duration::from_millis(line.lifetime),
            accept: line.accept,
            doubtful_since: line
                .doubtful_since
                .map(|since| SystemTime::UNIX_EPOCH + Duration::from_millis(since)),
            download: line.download.map(|mut download| {
                download.keys = signing_keys(&body);
                Arc::new(download)
            }),
            body,
        })
    }
}

fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_millis() as u64
}

/// Where a document of that key is kept.
pub fn document_path(dir: &Path, key: &str) -> PathBuf {
    dir.join(Digest::of(key.as_bytes()).to_string())
}

/// Checks every kept document (blocking); the path and what is wrong with each bad one.
pub fn check_documents(data_dir: &Path) -> io::Result<Vec<(PathBuf, String)>> {
    let dir = data_dir.join("metadata");
    let mut bad = Vec::new();
    let entries = match std::fs::read_dir(&dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(bad),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        match std::fs::read(&path).map(|bytes| Document::from_file(bytes.into())) {
            Ok(Some(document)) if document_path(&dir, &document.key) == path => {}
            Ok(_) => bad.push((path, "document is torn or rotten".into())),
            // Replaced or evicted meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => bad.push((path, format!("document cannot be read: {e}"))),
        }
    }
    Ok(bad)
}

/// What upstream's headers allow.
pub struct Freshness {
    /// Whether it may be kept at all
    pub keep: bool,
    pub lifetime: Duration,
    /// Whether Accept chose the answer
    pub by_accept: bool,
}

impl Freshness {
    /// Of an answer of that kind and status.
    pub fn of(kind: Kind, status: StatusCode, headers: &HeaderMap) -> Self {
        let directives = CacheControl::of(headers);
        let vary: Vec<String> = list(headers, VARY);
        let known = ["accept", "accept-encoding", "origin"];
        let age = seconds(headers, AGE).unwrap_or_default();
        let told = directives
            .max_age
            .map(|max| max.saturating_sub(age))
            .or_else(|| expires_in(headers))
            .filter(|_| !directives.no_cache)
            .unwrap_or_default();
        let bound = match kind {
            _ if !status.is_success() => ERROR_LIFETIME,
            kind if kind.is_version_list() => VERSION_LIST_LIFETIME,
            _ => Duration::MAX,
        };
        Self {
            keep: !directives.no_store
                && !directives.private
                && vary.iter().all(|name| known.contains(&name.as_str())),
            lifetime: told.min(bound),
            by_accept: vary.iter().any(|name| name == "accept"),
        }
    }
}

#[derive(Default)]
struct CacheControl {
    max_age: Option<Duration>,
    no_cache: bool,
    no_store: bool,
    private: bool,
}

impl CacheControl {
    fn of(headers: &HeaderMap) -> Self {
        let mut this = Self::default();
        let mut shared = None;
        for directive in list(headers, CACHE_CONTROL) {
            let (name, value) = directive.split_once('=').unwrap_or((&directive, ""));
            // A number too large to read means forever; one that is none means stale.
            let age = || match value.trim_matches('"').parse::<u64>() {
                Ok(seconds) => Duration::from_secs(seconds.min(u32::MAX.into())),
                Err(_) => Duration::ZERO,
            };
            match name {
                "max-age" => this.max_age = Some(age()),
                "s-maxage" => shared = Some(age()),
                "no-cache" => this.no_cache = true,
                "no-store" => this.no_store = true,
                "private" => this.private = true,
                _ => {}
            }
        }
        this.max_age = shared.or(this.max_age);
        this
    }
}

/// The headers that a client may see: end-to-end ones (RFC 9110 section 7.6.1), without those that
/// speak of upstream's connection, of one client, or of a wait that larder does itself.
pub fn end_to_end(headers: &HeaderMap) -> HeaderMap {
    const DROPPED: [HeaderName; 10] = [
        CONNECTION,
        CONTENT_LENGTH,
        PROXY_AUTHENTICATE,
        RETRY_AFTER,
        SET_COOKIE,
        STRICT_TRANSPORT_SECURITY,
        TE,
        TRAILER,
        TRANSFER_ENCODING,
        UPGRADE,
    ];
    const DROPPED_TOO: [&str; 6] = [
        "alt-svc",
        "keep-alive",
        "proxy-connection",
        "proxy-authentication-info",
        "cache-status",
        "proxy-status",
    ];
    let by_connection = list(headers, CONNECTION);
    let mut kept = HeaderMap::with_capacity(headers.len());
    for (name, value) in headers {
        let dropped = DROPPED.contains(name)
            || DROPPED_TOO.contains(&name.as_str())
            || by_connection.iter().any(|listed| listed == name.as_str());
        if !dropped {
            kept.append(name.clone(), value.clone());
        }
    }
    kept
}

/// Headers as text, for files. Values that are no text are left out.
pub fn headers_to_text(headers: &HeaderMap) -> Vec<(String, String)> {
    headers
        .iter()
        .filter_map(|(name, value)| Some((name.to_string(), value.to_str().ok()?.to_owned())))
        .collect()
}

pub fn headers_from_text(text: &[(String, String)]) -> HeaderMap {
    let parsed = text.iter().filter_map(|(name, value)| {
        let name = HeaderName::try_from(name).ok()?;
        Some((name, HeaderValue::try_from(value).ok()?))
    });
    let mut headers = HeaderMap::new();
    for (name, value) in parsed {
        headers.append(name, value);
    }
    headers
}

/// The elements of a header that is a list, in lower case.
fn list(headers: &HeaderMap, name: HeaderName) -> Vec<String> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|element| element.trim().to_ascii_lowercase())
        .filter(|element| !element.is_empty())
        .collect()
}

fn seconds(headers: &HeaderMap, name: HeaderName) -> Option<Duration> {
    let value = headers.get(name)?.to_str().ok()?;
    value.trim().parse().ok().map(Duration::from_secs)
}

fn expires_in(headers: &HeaderMap) -> Option<Duration> {
    let date = |name| httpdate::parse_http_date(headers.get(name)?.to_str().ok()?).ok();
    let from = date(DATE).unwrap_or_else(SystemTime::now);
    date(EXPIRES)?.duration_since(from).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn headers(lines: &[(&str, &str)]) -> HeaderMap {
        let text: Vec<_> = lines
            .iter()
            .map(|(n, v)| (n.to_string(), v.to_string()))
            .collect();
        headers_from_text(&text)
    }

    fn lifetime(kind: Kind, status: u16, lines: &[(&str, &str)]) -> u64 {
        let status = StatusCode::from_u16(status).unwrap();
        Freshness::of(kind, status, &headers(lines))
            .lifetime
            .as_secs()
    }

    #[test]
    fn freshness_is_what_upstream_says_within_bounds() {
        let hour = ("cache-control", "public, max-age=3600");
        assert_eq!(lifetime(Kind::Download, 200, &[hour]), 3600);
        assert_eq!(lifetime(Kind::Download, 200, &[hour, ("age", "600")]), 3000);
        assert_eq!(lifetime(Kind::VersionList, 200, &[hour]), 60);
        assert_eq!(lifetime(Kind::Download, 404, &[hour]), 3);
        assert_eq!(lifetime(Kind::Download, 200, &[]), 0);
        assert_eq!(
            lifetime(
                Kind::Download,
                200,
                &[("cache-control", "max-age=9, s-maxage=5")]
            ),
            5
        );
        assert_eq!(
            lifetime(
                Kind::Download,
                200,
                &[("cache-control", "max-age=9, no-cache")]
            ),
            0
        );
        assert_eq!(
            lifetime(Kind::Download, 200, &[("cache-control", "max-age=x")]),
            0
        );
        let dates = [
            ("date", "Mon, 01 Jan 2024 00:00:00 GMT"),
            ("expires", "Mon, 01 Jan 2024 00:01:00 GMT"),
        ];
        assert_eq!(lifetime(Kind::Download, 200, &dates), 60);
    }

    #[test]
    fn what_is_for_one_client_is_not_kept() {
        for (line, keep) in [
            (("cache-control", "no-store"), false),
            (("cache-control", "private, max-age=5"), false),
            (("vary", "*"), false),
            (("vary", "Authorization"), false),
            (("vary", "Accept-Encoding, Origin"), true),
            (("cache-control", "public"), true),
        ] {
            let freshness = Freshness::of(Kind::Other, StatusCode::OK, &headers(&[line]));
            assert_eq!(freshness.keep, keep, "{line:?}");
        }
    }

    #[test]
    fn hop_by_hop_headers_stay_behind() {
        let all = headers(&[
            ("connection", "close, x-hop"),
            ("x-hop", "1"),
            ("set-cookie", "a=b"),
            ("retry-after", "3600"),
            ("x-terraform-get", "git::x"),
            ("content-type", "application/json"),
            ("etag", "\"1\""),
        ]);
        let kept = end_to_end(&all);
        let mut names: Vec<_> = kept.keys().map(|name| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["content-type", "etag", "x-terraform-get"]);
    }

    #[test]
    fn a_file_reads_back_and_a_torn_one_does_not() {
        let document = Document {
            key: "k".into(),
            kind: Kind::Other,
            base: Url::parse("https://h/").unwrap(),
            status: StatusCode::OK,
            headers: headers(&[("etag", "\"1\"")]),
            body: Bytes::from_static(b"line\nline"),
            validated: SystemTime::UNIX_EPOCH + Duration::from_secs(9),
            lifetime: Duration::from_secs(60),
            accept: None,
            doubtful_since: None,
            download: None,
        };
        let bytes = document.to_file();
        let read = Document::from_file(bytes.clone().into()).unwrap();
        assert_eq!(
            (read.body, read.headers, read.validated),
            (document.body, document.headers, document.validated)
        );
        for end in 0..bytes.len() {
            assert!(
                Document::from_file(bytes[..end].to_vec().into()).is_none(),
                "{end}"
            );
        }
    }
}
