//! Documents as clients get them: conditions, ages, rewritten URLs, versions left out.

use std::time::SystemTime;

use http_body_util::{BodyExt as _, Limited};
use hyper::header::{
    AGE, CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderMap, HeaderName, HeaderValue, LAST_MODIFIED,
};
use hyper::{Method, Response, StatusCode};
use serde_json::Value;
use url::Url;

use super::{Asking, Way, failed_upstream, is_failure, wants_reload};
use crate::cache::catalogue::own_path;
use crate::cache::document::Document;
use crate::cache::metadata::{Answer as Found, How, Wish};
use crate::config::{Authority, ThirdParty};
use crate::digest::Digest;
use crate::error::{Error, Kind as ErrorKind};
use crate::server::conditional::not_modified;
use crate::server::relay::{self, forwarded_without_ranges};
use crate::server::respond::{Answer, Body, full, nothing, sf_string};
use crate::terraform::address::Subject;
use crate::terraform::registry::{Download, module_location, rewrite_download};
use crate::terraform::route::Kind;
use crate::terraform::versions;
use crate::upstream::{no_body, shown_url};

/// Where a module lies (module registry protocol).
const TERRAFORM_GET: HeaderName = HeaderName::from_static("x-terraform-get");

impl Asking {
    pub(super) async fn document(&self, url: &Url, kind: Kind) -> Result<Answer, Error> {
        let wish = Wish {
            url: url.clone(),
            kind,
            headers: self.shared_headers(),
            reload: wants_reload(&self.parts.headers),
        };
        let cache = &self.peer.entrance.server.cache;
        let (document, how) = match cache.metadata.get(&wish).await? {
            Found::Document(document, how) => (document, how),
            Found::TooLarge if self.is_ruled(kind) || self.hides_versions_of(url, kind) => {
                return Err(unfit(url, "it is larger than max_metadata_size"));
            }
            Found::TooLarge => return self.pass(url, no_body()).await,
        };
        if self.is_ruled(kind) {
            self.check_ruled(&document, url)?;
        }
        let (words, outcome) = match &how {
            How::Hit(left) => (format!("hit; ttl={}", left.as_secs()), "hit"),
            How::Offline => ("hit; detail=offline".to_owned(), "hit"),
            How::Revalidated => ("fwd=stale; fwd-status=304".to_owned(), "revalidated"),
            How::Miss { collapsed, kept } => {
                let collapsed = if *collapsed { "; collapsed" } else { "" };
                let stored = if *kept { "; stored" } else { "" };
                let status = document.status.as_u16();
                (
                    format!("fwd=miss; fwd-status={status}{stored}{collapsed}"),
                    "miss",
                )
            }
            How::LastGood(cause) => {
                let cause = sf_string(&format!("last good answer, upstream failed: {cause}"));
                (format!("fwd=stale; detail={cause}"), "stale")
            }
        };
        if is_failure(document.status) {
            return Ok(failed_upstream(url, document.status));
        }
        let mut answer = Answer::new(self.present(&document, url).await?, outcome);
        answer.cache_status(&words);
        Ok(answer)
    }

    /// Whether rules depend on what such a document says.
    fn is_ruled(&self, kind: Kind) -> bool {
        let policy = &self.peer.entrance.server.cache.sources().judge.policy;
        let ruled = policy.restricts() || policy.wants_signatures();
        ruled && matches!(kind, Kind::VersionList | Kind::Download)
    }

    /// Whether versions may have to be left out of it.
    fn hides_versions_of(&self, url: &Url, kind: Kind) -> bool {
        let policy = &self.peer.entrance.server.cache.sources().judge.policy;
        let list = matches!(kind, Kind::ReleaseIndex | Kind::Listing);
        list && policy.restricts() && Subject::of(url, kind).is_some()
    }

    /// Refuses what would lead clients past the rules.
    fn check_ruled(&self, document: &Document, url: &Url) -> Result<(), Error> {
        if document.status.is_redirection() {
            return Err(unfit(
                url,
                "upstream redirects it to where rules do not reach",
            ));
        }
        if document.status != StatusCode::OK {
            return Ok(());
        }
        let plain = |download: &Download| {
            let urls = [
                Some(&download.archive),
                download.sums.as_ref(),
                download.signature.as_ref(),
            ];
            urls.into_iter()
                .flatten()
                .any(|url| url.scheme() != "https")
        };
        match document.kind {
            Kind::VersionList if versions::listed(document.kind, &document.body).is_none() => Err(
                unfit(url, "clients may find other versions in it than larder"),
            ),
            Kind::Download if document.download.as_deref().is_none_or(plain) => {
                Err(unfit(url, "it names a URL that is not https"))
            }
            _ => Ok(()),
        }
    }

    /// A version list that a client's own credentials brought, with what it must not show left out.
    pub(super) async fn private_list(&self, url: &Url, kind: Kind) -> Result<Answer, Error> {
        let cache = &self.peer.entrance.server.cache;
        let asked = forwarded_without_ranges(&self.parts.headers);
        let (status, body) = cache.metadata.fetch_privately(url, &asked).await?;
        let mut document = Document::passing(url, kind, body);
        document.status = status;
        if self.is_ruled(kind) {
            self.check_ruled(&document, url)?;
        }
        let json = kind != Kind::Listing;
        let json = if json {
            "application/json"
        } else {
            "text/html"
        };
        document
            .headers
            .insert(CONTENT_TYPE, HeaderValue::from_static(json));
        let mut answer = Answer::new(self.present(&document, url).await?, "pass");
        answer.cache_status("fwd=bypass");
        Ok(answer)
    }

    /// A document that a client's own credentials brought by larder's own pages: its URLs must lead
    /// to where they did, since the client knows no other address than larder's.
    pub(super) async fn private_document(&self, url: &Url, kind: Kind) -> Result<Answer, Error> {
        let asked = forwarded_without_ranges(&self.parts.headers);
        let upstream = &self.peer.entrance.server.cache.upstream;
        let mut answer = relay::pass_with(upstream, &self.parts, url, asked).await?;
        if let Some(location) = self.moved_location(url, answer.response.headers()) {
            answer
                .response
                .headers_mut()
                .insert(TERRAFORM_GET, location);
        }
        let json = answer.response.headers().get(CONTENT_TYPE);
        let json = json.is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
        let changes = kind == Kind::Download || kind == Kind::Other && json;
        let get = self.parts.method == Method::GET;
        if !(changes && get && answer.response.status().is_success()) {
            return Ok(answer);
        }
        let (mut parts, body) = answer.response.into_parts();
        let limit = self.peer.entrance.server.config.limits.metadata_bytes;
        let body = Limited::new(body, limit).collect().await;
        let body = body.map_err(|_| unfit_answer(url))?.to_bytes();
        let changed = match kind {
            Kind::Download => rewrite_download(url, &body, |named| Some(named.to_string())),
            _ => self.moved_in(url, &body),
        };
        let body = changed.map_or(body, Into::into);
        parts
            .headers
            .insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        answer.response = Response::from_parts(parts, full(body));
        Ok(answer)
    }

    /// A version list without what users may not have, if that is anything.
    ///
    /// # Errors
    /// When nothing would be left of a provider's list: of an empty one Terraform says no more than
    /// that there is no such provider.
    async fn filtered(&self, document: &Document, url: &Url) -> Result<Option<Vec<u8>>, Error> {
        let cache = &self.peer.entrance.server.cache;
        if document.status != StatusCode::OK || !cache.sources().judge.policy.restricts() {
            return Ok(None);
        }
        let Some(listed) = versions::listed(document.kind, &document.body) else {
            return Ok(None);
        };
        let private = document.key.is_empty();
        let hidden = cache.hidden(url, document.kind, listed, private).await;
        let Some(hidden) = hidden else {
            return Ok(None);
        };
        if hidden.all && document.kind == Kind::VersionList {
            let words = hidden.warning.trim_start_matches("larder ");
            return Err(Error::new(ErrorKind::Withheld, words));
        }
        let hides = |version: &str| hidden.versions.contains(version);
        let (kind, body) = (document.kind, &document.body);
        Ok(versions::without(kind, body, hides, &hidden.warning))
    }

    async fn present(&self, document: &Document, url: &Url) -> Result<Response<Body>, Error> {
        let mut headers = document.headers.clone();
        let mut body = document.body.clone();
        if let Some(location) = self.moved_location(&document.base, &headers) {
            headers.insert(TERRAFORM_GET, location);
        }
        let filtered = self.filtered(document, url).await?;
        let rewritten = filtered.or_else(|| self.rewritten(document));
        let rewritten = rewritten.or_else(|| self.moved_body(document));
        if let Some(rewritten) = rewritten {
            let etag = format!("\"larder-{}\"", Digest::of(&rewritten).short(32));
            body = rewritten.into();
            for name in ["content-md5", "digest", "content-digest", "repr-digest"] {
                headers.remove(name);
            }
            headers.remove(LAST_MODIFIED);
            headers.insert(
                ETAG,
                HeaderValue::try_from(etag).expect("hexadecimal digits are a header value"),
            );
        }
        // RFC 9111 section 4.2.3: what upstream's caches had it for, and how long it is held.
        let before: u64 = headers
            .get(AGE)
            .and_then(|age| age.to_str().ok()?.trim().parse().ok())
            .unwrap_or_default();
        let held = SystemTime::now().duration_since(document.validated);
        let age = before.saturating_add(held.unwrap_or_default().as_secs());
        if age > 0 {
            headers.insert(AGE, HeaderValue::from(age));
        }
        let mut response = Response::new(nothing());
        *response.status_mut() = document.status;
        if document.status.is_success() && not_modified(&self.parts.headers, &headers) {
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            headers.remove(CONTENT_TYPE);
        } else if document.status != StatusCode::NO_CONTENT {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
            if self.parts.method != Method::HEAD {
                *response.body_mut() = full(body);
            }
        }
        *response.headers_mut() = headers;
        Ok(response)
    }

    /// A download document whose URLs lead through larder, by the address that this client knows.
    fn rewritten(&self, document: &Document) -> Option<Vec<u8>> {
        let download = document.download.as_ref()?;
        let catalogue = self.peer.entrance.server.cache.metadata.catalogue();
        let here = self.authority.in_https_url();
        let config = &self.peer.entrance.server.config;
        let third_parties = config.third_party == ThirdParty::Rewrite;
        let is_intercepted = |a: &Authority| self.peer.entrance.server.is_intercepted(a);
        rewrite_download(&document.base, &document.body, |url| {
            let authority = Authority::of(url).filter(|_| url.scheme() == "https")?;
            let named = match *url == download.archive {
                true => catalogue.scoped(&here, url),
                false => url.clone(),
            };
            // What counts for its own clients alone is not to be had by anybody else's address.
            let scoped = named.fragment().is_some() && matches!(self.way, Way::Intercepted);
            match (&self.way, is_intercepted(&authority)) {
                (Way::Intercepted, intercepted) if scoped || !intercepted && third_parties => {
                    Some(format!("https://{here}{}", own_path(&named)))
                }
                (Way::Pages(base), intercepted) if intercepted || third_parties => {
                    Some(base.url(&own_path(&named)))
                }
                // What is relative would lead to larder.
                (Way::Pages(_), _) => Some(url.to_string()),
                _ => None,
            }
        })
    }

    /// The source of a module where it is a path: by the address that this client knows.
    fn moved_location(&self, base: &Url, headers: &HeaderMap) -> Option<HeaderValue> {
        let location = headers.get(TERRAFORM_GET)?.to_str().ok()?;
        HeaderValue::try_from(self.moved(base, location)?).ok()
    }

    /// The same in the body that OpenTofu reads.
    fn moved_body(&self, document: &Document) -> Option<Vec<u8>> {
        if document.kind != Kind::Other || !matches!(self.way, Way::Pages(_)) {
            return None;
        }
        self.moved_in(&document.base, &document.body)
    }

    fn moved_in(&self, base: &Url, body: &[u8]) -> Option<Vec<u8>> {
        let mut body: serde_json::Map<String, Value> = serde_json::from_slice(body).ok()?;
        let moved = self.moved(base, body.get("location")?.as_str()?)?;
        body.insert("location".into(), moved.into());
        serde_json::to_vec(&body).ok()
    }

    fn moved(&self, base: &Url, location: &str) -> Option<String> {
        let Way::Pages(pages) = &self.way else {
            return None;
        };
        let url = module_location(base, location)?;
        let (service, place) = pages.service.as_ref()?;
        let below = url.as_str().strip_prefix(service.as_str());
        Some(match below {
            Some(rest) => pages.url(&format!("{place}{rest}")),
            None => url.to_string(),
        })
    }
}

/// A document by which users would get past the rules.
fn unfit(url: &Url, why: &str) -> Error {
    Error::new(
        ErrorKind::Nonsense,
        format!(
            "{}: refused, since rules are set (verify, allow, deny, min_age) and {why}",
            shown_url(url)
        ),
    )
}

fn unfit_answer(url: &Url) -> Error {
    Error::new(
        ErrorKind::Nonsense,
        format!(
            "{}: the answer broke off or is larger than max_metadata_size; try again later",
            shown_url(url)
        ),
    )
}
