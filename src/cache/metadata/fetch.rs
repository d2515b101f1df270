//! Asking upstream for a document, and what becomes of the answer.

use std::sync::Arc;
use std::time::SystemTime;

use hyper::body::Incoming;
use hyper::header::{
    ACCEPT, ACCEPT_ENCODING, AGE, CONTENT_ENCODING, HeaderMap, HeaderValue, IF_MODIFIED_SINCE,
    IF_NONE_MATCH,
};
use hyper::{Method, Response, StatusCode};
use tokio::time::{Instant, timeout_at};
use url::Url;

use super::{DEADLINE, Fetched, LARGE, LARGE_DEADLINE, Metadata, Vouched, Wish, learn, nonsense};
use crate::cache::body::{decode, is_text, read_body};
use crate::cache::document::{Document, Freshness, end_to_end};
use crate::cache::url_key;
use crate::error::{Error, Kind as ErrorKind};
use crate::terraform::registry::{Download, check, holds_signed_url};
use crate::terraform::route::Kind;
use crate::terraform::versions::Loss;
use crate::upstream::download::length;
use crate::upstream::{Ask, TRIES, backoff, shown_url};

impl Metadata {
    /// Asks, and asks again where an answer's body breaks off, all within one deadline.
    pub(super) async fn fetch(
        &self,
        wish: &Wish,
        held: Option<Arc<Document>>,
    ) -> Result<Fetched, Error> {
        let deadline = Instant::now() + DEADLINE;
        // A doubted document must come whole: a 304 would vouch for the doubted bytes.
        let held = held.filter(|held| !self.is_doubted(&held.key));
        let mut headers = wish.headers.clone();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Some(etag) = held.as_ref().and_then(|held| held.etag()) {
            headers.insert(IF_NONE_MATCH, etag.clone());
        }
        if let Some(date) = held.as_ref().and_then(|held| held.last_modified()) {
            headers.insert(IF_MODIFIED_SINCE, date.clone());
        }
        let ask = Ask {
            method: Method::GET,
            url: &wish.url,
            headers,
            deadline,
            patience: DEADLINE,
            follow: wish.kind.follows_redirects(),
            purpose: "metadata",
        };
        let mut tried = 1;
        loop {
            let response = self.upstream.ask(&ask).await?;
            let outcome = match (response.status(), &held) {
                (StatusCode::NOT_MODIFIED, Some(held)) => {
                    let document = self.vouched(held, &wish.url, response.headers()).await;
                    return Ok(Fetched::Document(document, Vouched::Again));
                }
                (StatusCode::NOT_MODIFIED, None) => {
                    return Err(nonsense(
                        &wish.url,
                        "answered 304 to a question without a condition",
                    ));
                }
                (StatusCode::PARTIAL_CONTENT, _) => {
                    return Err(nonsense(&wish.url, "is a part that was not asked for"));
                }
                _ => self.receive(wish, response, deadline).await,
            };
            let broke_off = matches!(&outcome, Err(e) if e.kind() == ErrorKind::Incomplete);
            let pause = backoff(tried);
            if !broke_off || tried == TRIES || Instant::now() + pause >= deadline {
                return outcome;
            }
            tokio::time::sleep(pause).await;
            tried += 1;
        }
    }

    /// Upstream vouched for the held document again (RFC 9111 section 4.3.4).
    async fn vouched(&self, held: &Document, url: &Url, headers: &HeaderMap) -> Arc<Document> {
        let mut document = held.clone();
        let mut fresh = end_to_end(headers);
        // The held bytes are identity, whatever coding the 304 speaks of.
        fresh.remove(CONTENT_ENCODING);
        document.headers.remove(AGE);
        for name in fresh.keys() {
            document.headers.remove(name);
        }
        for (name, value) in &fresh {
            document.headers.append(name.clone(), value.clone());
        }
        document.validated = SystemTime::now();
        document.lifetime =
            Freshness::of(document.kind, document.status, &document.headers).lifetime;
        let was_doubtful = document.doubtful_since.take().is_some();
        let document = Arc::new(document);
        learn(&self.catalogue, &document, url);
        self.hot.insert(document.key.clone(), document.clone());
        self.shelf.vouch(&document.key, document.validated);
        let signed = |document: &Document| holds_signed_url(&document.body);
        if was_doubtful || !self.shelf.holds(&document.key) && !signed(&document) {
            // Or it came when the disk was full.
            self.write(&document).await;
        }
        document
    }

    async fn receive(
        &self,
        wish: &Wish,
        response: Response<Incoming>,
        deadline: Instant,
    ) -> Result<Fetched, Error> {
        let (parts, body) = response.into_parts();
        let announced = length(&parts.headers);
        if announced.is_some_and(|length| length > self.bounds.document as u64) {
            return Ok(Fetched::TooLarge);
        }
        let large = announced.is_none_or(|length| length > LARGE);
        if wish.kind == Kind::Other && large && !is_text(&parts.headers) {
            return Ok(Fetched::TooLarge);
        }
        // Pages and indexes of the releases site are asked for by tools that wait longer.
        let patient = matches!(wish.kind, Kind::ReleaseIndex | Kind::Listing | Kind::Other);
        let deadline = match announced {
            Some(length) if patient && length > LARGE => deadline + LARGE_DEADLINE - DEADLINE,
            _ => deadline,
        };
        let read = timeout_at(deadline, read_body(body, &wish.url, self.bounds.document)).await;
        let Some(body) = read.unwrap_or_else(|_| {
            Err(Error::new(
                ErrorKind::Timeout,
                format!(
                    "{}: upstream's answer took too long; try again later",
                    shown_url(&wish.url)
                ),
            ))
        })?
        else {
            return Ok(Fetched::TooLarge);
        };
        let Some(body) = decode(&parts.headers, body, self.bounds.document)
            .map_err(|why| nonsense(&wish.url, &why))?
        else {
            return Ok(Fetched::TooLarge);
        };
        if parts.status.is_success() {
            // Where a document is expected, an empty success is none.
            check(wish.kind, &wish.url, &body).map_err(|why| nonsense(&wish.url, &why))?;
            self.check_against_last_good(wish, &body).await?;
        }
        let freshness = Freshness::of(wish.kind, parts.status, &parts.headers);
        let mut headers = end_to_end(&parts.headers);
        headers.remove(CONTENT_ENCODING);
        let download = (wish.kind == Kind::Download && parts.status == StatusCode::OK)
            .then(|| Download::parse(&wish.url, &body).ok().map(Arc::new))
            .flatten();
        let mut base = wish.url.clone();
        base.set_query(None);
        let accept = wish
            .headers
            .get(ACCEPT)
            .and_then(|value| value.to_str().ok());
        let document = Arc::new(Document {
            key: url_key(&wish.url),
            kind: wish.kind,
            base,
            status: parts.status,
            headers,
            body,
            validated: SystemTime::now(),
            lifetime: freshness.lifetime,
            accept: freshness
                .by_accept
                .then(|| accept.unwrap_or_default().to_owned()),
            doubtful_since: None,
            download,
        });
        if freshness.keep {
            self.keep(&document, &wish.url).await;
            self.doubted.invalidate(&document.key);
        } else {
            // Its URLs must be answered all the same, for as long as this process lives.
            learn(&self.catalogue, &document, &wish.url);
        }
        Ok(Fetched::Document(document, Vouched::Anew))
    }

    /// Keeps a good document on disk, or an error in memory for its few seconds unless that would
    /// hide the last good answer.
    async fn keep(&self, document: &Arc<Document>, url: &Url) {
        let good = matches!(document.status.as_u16(), 200 | 203 | 204);
        if !good {
            let hides = self
                .held(&document.key)
                .await
                .is_some_and(|held| held.status.is_success());
            if !hides && document.status.is_client_error() {
                self.hot.insert(document.key.clone(), document.clone());
            }
            return;
        }
        learn(&self.catalogue, document, url);
        self.hot.insert(document.key.clone(), document.clone());
        let headers = document
            .headers
            .values()
            .any(|v| holds_signed_url(v.as_bytes()));
        if headers || holds_signed_url(&document.body) {
            return;
        }
        self.write(document).await;
    }

    /// A list that suddenly lost most of its versions is not believed for some time: the last good
    /// one may well be the true one.
    async fn check_against_last_good(&self, wish: &Wish, body: &[u8]) -> Result<(), Error> {
        if self.upstream.is_local(&wish.url) {
            // Its owner takes versions away, and no portal is in between.
            return Ok(());
        }
        let accept = wish.headers.get(ACCEPT);
        let accept = accept.and_then(|value| value.to_str().ok());
        let last = self.held(&url_key(&wish.url)).await;
        let Some(last) = last.filter(|last| last.answers(accept)) else {
            return Ok(());
        };
        let Some(lost) = (last.status == StatusCode::OK)
            .then(|| Loss::between(wish.kind, &last.body, body))
            .flatten()
        else {
            return Ok(());
        };
        let now = SystemTime::now();
        // A clock that was set back begins anew.
        let since = last.doubtful_since.filter(|since| *since <= now);
        let url = shown_url(&wish.url);
        let doubted = now.duration_since(since.unwrap_or(now)).unwrap_or_default();
        if doubted >= self.bounds.list_grace {
            tracing::warn!(%url, %lost, "a version list lost most of its versions and stayed so; believed from now on");
            return Ok(());
        }
        tracing::error!(%url, %lost, "a version list lost most of its versions; the last good one serves until version_list_grace is over");
        if since.is_none() {
            let mut marked = Document::clone(&last);
            marked.doubtful_since = Some(now);
            let marked = Arc::new(marked);
            self.hot.insert(marked.key.clone(), marked.clone());
            if self.shelf.holds(&marked.key) {
                self.write(&marked).await;
            }
        }
        Err(nonsense(&wish.url, &format!("{lost}")))
    }

    async fn write(&self, document: &Document) {
        match self.shelf.write(document).await {
            Ok(gone) => gone.iter().for_each(|key| self.drop_document(key)),
            Err(error) => {
                tracing::warn!(key = %document.key, %error, "a document cannot be kept on disk");
            }
        }
    }
}
