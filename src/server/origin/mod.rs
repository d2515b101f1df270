//! Requests for intercepted hosts: documents, archives, and what is neither.

mod documents;
mod mirror;
mod ways;

use std::sync::Arc;

use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::{
    ACCEPT, CACHE_CONTROL, CONTENT_LENGTH, ETAG, HOST, HeaderMap, HeaderName, HeaderValue, PRAGMA,
    RANGE, USER_AGENT,
};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode, Version};
use url::Url;

pub use mirror::answer as mirror;
pub use ways::{by_name as registry_by_name, private as private_registry};

use super::access::Seal;
use super::connection::Peer;
use super::proxy::is_private;
use super::relay::{self, forwarded_without_ranges};
use super::respond::{
    Answer, ArchiveBytes, Body, Trace, archive, full, nothing, reading, sf_string,
};
use crate::cache::fill::Refusal;
use crate::cache::follower::Reader;
use crate::cache::{Archive, HeadOnly, Passing, url_key};
use crate::config::Authority;
use crate::error::{Error, Kind as ErrorKind};
use crate::store::Held;
use crate::terraform::address::Subject;
use crate::terraform::route::{Kind, OWN_PREFIX, check_path, route};
use crate::terraform::signature::Tier;
use crate::upstream::{RequestBody, no_body, shown_url};

/// Answers a request that came for `authority`.
pub async fn answer(
    peer: Peer,
    authority: Authority,
    request: Request<Incoming>,
) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let shown = format!("https://{}{}", authority.in_https_url(), parts.uri.path());
    let trace = Trace::begin(&peer, &parts.method, shown);
    let asking = Asking {
        peer,
        authority,
        parts,
        way: Way::Intercepted,
        kind: None,
    };
    let answer = asking.answer(body.boxed()).await;
    trace.send(answer.unwrap_or_else(|e| Answer::error(&e)))
}

struct Asking {
    peer: Peer,
    /// The host that is asked, as in the URL
    authority: Authority,
    parts: Parts,
    way: Way,
    /// What the path is, where that is known otherwise
    kind: Option<Kind>,
}

/// How a client came to the host, and so how the URLs of its documents must lead back.
enum Way {
    /// Through CONNECT, or by a ClientHello with its name
    Intercepted,
    /// By pages of larder's own
    Pages(Base),
}

/// Where pages of larder's own stand for a host, by the address at which this client reached them.
struct Base {
    /// `http://127.0.0.1:3128/registry/HOST`
    prefix: String,
    /// The address of the service that was asked for, and its place below the prefix
    service: Option<(Url, &'static str)>,
    /// Makes the URLs of archives good without further credentials
    seal: Option<Seal>,
}

impl Asking {
    async fn answer(&self, body: RequestBody) -> Result<Answer, Error> {
        self.check()?;
        let mut url = self.url()?;
        let path = self.parts.uri.path();
        let metadata = &self.peer.entrance.server.cache.metadata;
        let mut kind = self.kind.unwrap_or_else(|| route(path));
        if path.starts_with(OWN_PREFIX) {
            let named = metadata
                .catalogue()
                .named(&self.authority.in_https_url(), path);
            let named = named.ok_or_else(|| {
                Error::new(
                    ErrorKind::NotFound,
                    format!(
                        "{path}: no document of {} names this; ask its registry again",
                        self.authority.host
                    ),
                )
            })?;
            (url, kind) = (named.url, named.kind);
        } else if kind == Kind::Other && !metadata.catalogue().claims(&url_key(&url)).is_empty() {
            // Whatever its name looks like: a document says that it is an archive. But what the
            // protocols name is what they say, whoever claims it.
            kind = Kind::Archive;
        } else if kind == Kind::Other && is_page_of_product(&url) {
            kind = Kind::Listing;
        }
        let elsewhere = path.starts_with(OWN_PREFIX);
        let plain = matches!(self.parts.method, Method::GET | Method::HEAD);
        if !plain && (elsewhere || kind == Kind::Archive) {
            let words = format!("{path} can only be read; use GET");
            return Err(Error::new(ErrorKind::BadRequest, words));
        }
        if !plain {
            return self.pass(&url, body).await;
        }
        // Credentials are for this host alone, not for where its document points.
        let server = &self.peer.entrance.server;
        let own = server.config.registry(&self.authority).is_some();
        let private = is_private(&self.parts.headers) && !elsewhere && !own;
        let cache = &server.cache;
        let policy = &cache.sources().judge.policy;
        if kind == Kind::Download
            && policy.restricts()
            && let Some(subject) = Subject::of(&url, kind)
        {
            cache.admit_document(&subject).await?;
        }
        match (kind, private) {
            (Kind::VersionList | Kind::ReleaseIndex | Kind::Listing, true)
                if policy.restricts() =>
            {
                self.private_list(&url, kind).await
            }
            (Kind::Archive, private) if self.parts.method == Method::GET => {
                self.archive(&url, private).await
            }
            (Kind::Archive, true) => {
                let asked = forwarded_without_ranges(&self.parts.headers);
                cache.gate(&url, None, &asked).await?;
                self.pass(&url, no_body()).await
            }
            (Kind::Download | Kind::Other, true) if matches!(self.way, Way::Pages(_)) => {
                self.private_document(&url, kind).await
            }
            (_, true) => self.pass(&url, no_body()).await,
            (Kind::Archive, false) => self.archive_head(&url).await,
            (kind, false) => self.document(&url, kind).await,
        }
    }

    /// Refuses what names another host, or a path that servers read differently.
    fn check(&self) -> Result<(), Error> {
        let uri = &self.parts.uri;
        let bad = |words: String| Error::new(ErrorKind::BadRequest, words);
        check_path(uri.path()).map_err(|why| bad(format!("the path {why}")))?;
        if let Way::Pages(_) = self.way {
            return Ok(());
        }
        if self.parts.method == Method::CONNECT {
            return Err(bad("CONNECT within an intercepted connection".into()));
        }
        let hosts: Vec<_> = self.parts.headers.get_all(HOST).iter().collect();
        let named_in_url = uri.authority().map(|a| a.as_str());
        let host = match (hosts[..].first(), hosts.len()) {
            (Some(host), 1) => Some(host.to_str().map_err(|_| bad("Host is no host".into()))?),
            (None, _) if self.parts.version < Version::HTTP_11 || named_in_url.is_some() => None,
            (None, _) => return Err(bad("the request has no Host".into())),
            _ => return Err(bad("the request has several Host headers".into())),
        };
        for named in [host, named_in_url].into_iter().flatten() {
            if !is_host(named, &self.authority, 443) {
                return Err(Error::new(
                    ErrorKind::Misdirected,
                    format!(
                        "this connection is for {}, the request is for another host; open a connection for that one",
                        self.authority
                    ),
                ));
            }
        }
        if uri.scheme_str().is_some_and(|scheme| scheme != "https") {
            return Err(bad("the request's URL is not https".into()));
        }
        Ok(())
    }

    fn url(&self) -> Result<Url, Error> {
        let path = self.parts.uri.path_and_query().map_or("/", |p| p.as_str());
        Url::parse(&format!("https://{}{path}", self.authority))
            .map_err(|e| Error::new(ErrorKind::BadRequest, format!("the URL is none: {e}")))
    }

    /// The headers that go upstream for an answer that all may share: nothing that could choose
    /// another answer than the key says, nothing that identifies a client.
    fn shared_headers(&self) -> HeaderMap {
        let passed = |name: &HeaderName| {
            *name == ACCEPT || *name == USER_AGENT || name.as_str().starts_with("x-terraform-")
        };
        let mut headers = HeaderMap::new();
        for (name, value) in &self.parts.headers {
            if passed(name) {
                headers.append(name.clone(), value.clone());
            }
        }
        headers
    }

    async fn pass(&self, url: &Url, body: RequestBody) -> Result<Answer, Error> {
        let upstream = &self.peer.entrance.server.cache.upstream;
        relay::pass(upstream, &self.parts, url, body).await
    }

    async fn archive(&self, url: &Url, private: bool) -> Result<Answer, Error> {
        let cache = &self.peer.entrance.server.cache;
        let mut asked = self.parts.headers.clone();
        if cache.sources().is_tainted(url) {
            // Whoever was cut off holds bytes that never were verified: no part may complete them.
            asked.remove(RANGE);
        }
        let found = match private {
            true => {
                cache
                    .private_archive(url, forwarded_without_ranges(&self.parts.headers))
                    .await?
            }
            false => cache.archive(url, self.shared_headers()).await?,
        };
        match found {
            Archive::Held(held) => Ok(self.held(&asked, held)),
            Archive::Refused(refusal) => Ok(refused(url, &refusal)),
            Archive::Passing(passing) => self.passing(&asked, *passing).await,
            Archive::Filling {
                fill,
                guard,
                joined,
            } => {
                let head = match fill.head().await {
                    Ok(head) => head,
                    Err(no) => return Result::from(no).map(|refusal| refused(url, &refusal)),
                };
                cache.admit_archive(url, Some(&head.headers)).await?;
                let mut length = head.length;
                let endless = length.is_none() && self.parts.version < Version::HTTP_11;
                if endless || length == Some(0) {
                    // Its client could not tell a cut from the end: it waits for the verdict.
                    length = Some(fill.whole().await?);
                }
                let collapsed = if joined { "; collapsed" } else { "" };
                let (words, verified) = match (head.has_no_digest(), &head.file) {
                    (true, _) => ("fwd=miss; detail=no-digest-not-stored", false),
                    (_, Some(_)) if head.bad_signature => {
                        ("fwd=miss; stored; detail=bad-signature", true)
                    }
                    (_, None) if head.bad_signature => ("fwd=miss; detail=bad-signature", true),
                    (_, None) => ("fwd=miss; detail=no-room-not-stored", true),
                    _ => ("fwd=miss; stored", true),
                };
                let (sources, upstream) = (cache.sources().clone(), cache.upstream.clone());
                let own = url.clone();
                let (at_fill, file) = ((&fill, guard), head.file.clone());
                let response = archive(
                    &self.parts.method,
                    &asked,
                    head.headers.clone(),
                    length,
                    |at, end| {
                        reading(Reader::of_fill(
                            at_fill,
                            (file, own),
                            sources,
                            upstream,
                            (at, end),
                        ))
                    },
                );
                let mut answer = Answer::new(response, if joined { "collapsed" } else { "miss" });
                answer.cache_status(&format!("{words}{collapsed}"));
                let verified = verified && answer.response.status() == StatusCode::OK;
                answer.archive = Some(ArchiveBytes {
                    from_cache: joined,
                    verified,
                    unverified: head.unverified.clone(),
                });
                Ok(answer)
            }
        }
    }

    fn held(&self, asked: &HeaderMap, held: Held) -> Answer {
        let headers = held_headers(&held);
        let signature = held.record.signature.as_ref();
        let bad = signature.is_some_and(|signature| signature.tier == Tier::Bad);
        let (file, size) = (held.file, held.size);
        let response = archive(&self.parts.method, asked, headers, Some(size), |at, end| {
            reading(Reader::of_blob(file, at, end.unwrap_or(size)))
        });
        let mut answer = Answer::new(response, "hit");
        answer.cache_status(if bad {
            "hit; detail=bad-signature"
        } else {
            "hit"
        });
        if self.parts.method == Method::GET {
            answer.archive = Some(ArchiveBytes {
                from_cache: true,
                verified: answer.response.status() == StatusCode::OK,
                unverified: Arc::default(),
            });
        }
        answer
    }

    async fn passing(&self, asked: &HeaderMap, passing: Passing) -> Result<Answer, Error> {
        if passing.length.is_none() && self.parts.version < Version::HTTP_11 {
            return Err(Error::new(
                ErrorKind::Incomplete,
                "upstream announces no length, without which HTTP/1.0 cannot tell a whole archive from a part; use HTTP/1.1",
            ));
        }
        let mut direct = passing.direct;
        let unverified = direct.unverified();
        if passing.length == Some(0) {
            // There is no end to withhold.
            direct.verdict().await?;
        }
        let response = archive(
            &self.parts.method,
            asked,
            passing.headers,
            passing.length,
            |at, end| reading(Reader::of_upstream(direct, at, end)),
        );
        let mut answer = Answer::new(response, "pass");
        answer.cache_status(match passing.bad_signature {
            true => "fwd=bypass; detail=bad-signature",
            false => "fwd=bypass; detail=not-stored",
        });
        answer.archive = Some(ArchiveBytes {
            from_cache: false,
            verified: answer.response.status() == StatusCode::OK,
            unverified,
        });
        Ok(answer)
    }

    async fn archive_head(&self, url: &Url) -> Result<Answer, Error> {
        let cache = &self.peer.entrance.server.cache;
        let (status, length, headers) = match cache.archive_head(url, self.shared_headers()).await?
        {
            HeadOnly::Held(held) => return Ok(self.held(&self.parts.headers, held)),
            HeadOnly::Upstream {
                status,
                length,
                headers,
            } => (status, length, headers),
        };
        let mut response = Response::new(nothing());
        if is_failure(status) {
            return Ok(failed_upstream(url, status));
        }
        if status == StatusCode::OK {
            response = archive(
                &Method::HEAD,
                &self.parts.headers,
                headers,
                length,
                |_, _| nothing(),
            );
        } else {
            *response.status_mut() = status;
            *response.headers_mut() = headers;
            if let Some(length) = length {
                response
                    .headers_mut()
                    .insert(CONTENT_LENGTH, HeaderValue::from(length));
            }
        }
        let mut answer = Answer::new(response, "miss");
        answer.cache_status(&format!("fwd=miss; fwd-status={}", status.as_u16()));
        Ok(answer)
    }
}

/// Whether a `Host` value names the authority, where `default` is the port that goes unsaid.
pub fn is_host(value: &str, authority: &Authority, default: u16) -> bool {
    let with_port = match value.rsplit_once(':') {
        Some((_, port)) if !port.contains(']') => value.to_owned(),
        _ => format!("{value}:{default}"),
    };
    // Clients may leave the port out even where it is not the default one.
    let bare = value
        .parse::<crate::config::HostName>()
        .is_ok_and(|host| host == authority.host);
    bare || with_port
        .parse::<Authority>()
        .is_ok_and(|named| named == *authority)
}

fn held_headers(held: &Held) -> HeaderMap {
    let mut headers = crate::cache::document::headers_from_text(&held.record.headers);
    if !headers.contains_key(ETAG) {
        let etag = format!("\"sha256-{}\"", held.digest);
        headers.insert(
            ETAG,
            HeaderValue::try_from(etag).expect("hexadecimal digits are a header value"),
        );
    }
    headers
}

/// Whether this is a product's page on the releases site, asked for without the slash at its end.
fn is_page_of_product(url: &Url) -> bool {
    Subject::of_release(url).is_some_and(|subject| subject.version.is_none())
}

/// A client that reloads (RFC 9111 section 5.2.1.4) wants upstream to be asked.
fn wants_reload(headers: &HeaderMap) -> bool {
    headers
        .get_all(CACHE_CONTROL)
        .iter()
        .chain(headers.get_all(PRAGMA))
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.to_ascii_lowercase().contains("no-cache"))
}

/// Whether a status says that upstream failed, which larder has already tried to mend.
fn is_failure(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS
}

/// Upstream's status, with larder's words.
fn failed_upstream(url: &Url, status: StatusCode) -> Answer {
    let code = status.as_u16();
    let words = format!(
        "{}: upstream answered {code}, also when asked again; try again later",
        shown_url(url)
    );
    let mut answer = Answer::error(&Error::new(ErrorKind::Incomplete, words.as_str()));
    *answer.response.status_mut() = status;
    answer.proxy_status(&format!(
        "error=http_response_incomplete; received-status={code}; details={}",
        sf_string(&words)
    ));
    answer
}

/// Upstream's refusal, relayed.
fn refused(url: &Url, refusal: &Refusal) -> Answer {
    if is_failure(refusal.status) {
        return failed_upstream(url, refusal.status);
    }
    let mut headers = refusal.headers.clone();
    headers.insert(CONTENT_LENGTH, HeaderValue::from(refusal.body.len()));
    let mut response = Response::new(full(refusal.body.clone()));
    *response.status_mut() = refusal.status;
    *response.headers_mut() = headers;
    let mut answer = Answer::new(response, "miss");
    answer.cache_status(&format!("fwd=miss; fwd-status={}", refusal.status.as_u16()));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_compared_with_its_port() {
        let at = |s: &str| s.parse::<Authority>().expect(s);
        assert!(is_host("A.example", &at("a.example"), 443));
        assert!(is_host("a.example:443", &at("a.example"), 443));
        assert!(is_host("a.example:8443", &at("a.example:8443"), 443));
        assert!(!is_host("a.example:80", &at("a.example"), 443));
        assert!(!is_host("b.example", &at("a.example"), 443));
        assert!(!is_host("a.example@b.example", &at("a.example"), 443));
    }
}
