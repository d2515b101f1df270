//! Documents as clients get them: conditions, ages, rewritten URLs, versions left out.

use std::time::SystemTime;

use hyper::header::{AGE, CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderValue, LAST_MODIFIED};
use hyper::{Method, Response, StatusCode};
use url::Url;

use super::{Asking, failed_upstream, is_failure, wants_reload};
use crate::cache::catalogue::own_path;
use crate::cache::document::Document;
use crate::cache::metadata::{Answer as Found, How, Wish};
use crate::config::{Authority, ThirdParty};
use crate::digest::Digest;
use crate::error::{Error, Kind as ErrorKind};
use crate::server::conditional::not_modified;
use crate::server::relay::forwarded_without_ranges;
use crate::server::respond::{Answer, Body, full, nothing, sf_string};
use crate::terraform::address::Subject;
use crate::terraform::registry::{Download, rewrite_download};
use crate::terraform::route::Kind;
use crate::terraform::versions;
use crate::upstream::{no_body, shown_url};

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
        let filtered = self.filtered(document, url).await?;
        if let Some(rewritten) = filtered.or_else(|| self.rewritten(document)) {
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

    /// A download document whose URLs elsewhere lead through this registry host.
    fn rewritten(&self, document: &Document) -> Option<Vec<u8>> {
        document.download.as_ref()?;
        let server = &self.peer.entrance.server;
        if server.config.third_party != ThirdParty::Rewrite {
            return None;
        }
        let here = self.authority.in_https_url();
        rewrite_download(&document.base, &document.body, |url| {
            let elsewhere = Authority::of(url).is_some_and(|a| !server.is_intercepted(&a));
            (elsewhere && url.scheme() == "https")
                .then(|| format!("https://{here}{}", own_path(url)))
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
