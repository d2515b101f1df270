//! Documents that pass through: fresh, revalidated, or the last good one when upstream fails.

mod fetch;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use hyper::header::{ACCEPT, ACCEPT_ENCODING, HeaderMap, HeaderValue};
use hyper::{Method, StatusCode};
use moka::sync::Cache;
use tokio::time::{Instant, timeout_at};
use url::Url;

use super::body::{decode, read_body};
use super::catalogue::Catalogue;
use super::document::Document;
use super::shelf::Shelf;
use super::url_key;
use crate::config::Authority;
use crate::error::{Error, Exit, Kind as ErrorKind};
use crate::sync::lock;
use crate::telemetry::METRICS;
use crate::terraform::registry::{Download, check};
use crate::terraform::route::{Kind, is_mistaken};
use crate::terraform::sums::Sums;
use crate::upstream::{Ask, Upstream, shown_url};

const VERSION: &str = "x-terraform-version";
/// Clients give up after 10 s: what is behind one request must be over before.
const DEADLINE: Duration = Duration::from_secs(7);
const DEADLINE_WITH_LAST_GOOD: Duration = Duration::from_secs(3);
/// From here on a body may take longer than the deadline, as long as it moves.
const LARGE: u64 = 1 << 20;
const LARGE_DEADLINE: Duration = Duration::from_secs(60);
const HOT_BYTES: u64 = 64 << 20;
/// How long a doubt lasts if nobody asks.
const DOUBT: Duration = Duration::from_secs(3600);

/// What is held of documents, and for how long against the odds.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Bytes; a larger document is passed through, unkept
    pub document: usize,
    /// How long a version list that lost most of its versions is not believed
    pub list_grace: Duration,
}

/// The documents of one data dir.
pub struct Metadata {
    bounds: Bounds,
    shelf: Arc<Shelf>,
    upstream: Arc<Upstream>,
    catalogue: Arc<Catalogue>,
    hot: Cache<String, Arc<Document>>,
    sums: Cache<String, (Arc<Document>, Option<Arc<Sums>>)>,
    flights: Arc<Mutex<HashMap<FlightKey, Flight>>>,
    /// Documents that took part in a contradiction
    doubted: Cache<String, ()>,
}

/// The document, what it is asked for as, and the version of Terraform or OpenTofu that asks
type FlightKey = (String, Kind, Vec<u8>);
type Flight = Shared<BoxFuture<'static, Result<Fetched, Error>>>;

#[derive(Clone)]
enum Fetched {
    /// An answer of any status, and whether upstream merely vouched for what was held
    Document(Arc<Document>, Vouched),
    TooLarge,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Vouched {
    Anew,
    Again,
}

/// A client's wish for a document.
#[derive(Clone)]
pub struct Wish {
    pub url: Url,
    pub kind: Kind,
    /// Of the client's headers, those that are passed on for a shared answer
    pub headers: HeaderMap,
    /// Whether the client wants upstream to be asked even if a held answer is fresh
    pub reload: bool,
}

/// What answers the wish.
pub enum Answer {
    Document(Arc<Document>, How),
    /// Too large to be held: to be passed through.
    TooLarge,
}

/// How a document came to answer (RFC 9211 has the words for it).
#[derive(Clone, Debug)]
pub enum How {
    /// Held, and fresh for so long yet
    Hit(Duration),
    /// Held, and larder is offline
    Offline,
    Miss {
        collapsed: bool,
        kept: bool,
    },
    /// Held, and upstream vouched for it again
    Revalidated,
    /// Held and stale, but upstream failed
    LastGood(Error),
}

impl Metadata {
    /// Reads which documents are kept. What they say of archives is known before this returns.
    pub fn open(
        data_dir: &Path,
        upstream: Arc<Upstream>,
        bounds: Bounds,
        trusted: HashSet<String>,
    ) -> Result<Arc<Self>, Exit> {
        let catalogue = Catalogue::trusting(trusted);
        let shelf = Shelf::open(data_dir, |document| {
            learn(&catalogue, document, &document.base);
        })?;
        Ok(Self::new(shelf, catalogue, upstream, bounds))
    }

    /// The same for reading alone, beside whoever has the data dir.
    pub fn peek(
        data_dir: &Path,
        upstream: Arc<Upstream>,
        bounds: Bounds,
        trusted: HashSet<String>,
    ) -> Arc<Self> {
        let catalogue = Catalogue::trusting(trusted);
        let shelf = Shelf::peek(data_dir, |document| {
            learn(&catalogue, document, &document.base);
        });
        Self::new(shelf, catalogue, upstream, bounds)
    }

    fn new(
        shelf: Shelf,
        catalogue: Catalogue,
        upstream: Arc<Upstream>,
        bounds: Bounds,
    ) -> Arc<Self> {
        Arc::new(Self {
            bounds,
            shelf: Arc::new(shelf),
            upstream,
            catalogue: Arc::new(catalogue),
            hot: Cache::builder()
                .weigher(|_, document: &Arc<Document>| document.weight())
                .max_capacity(HOT_BYTES)
                .build(),
            sums: Cache::new(1024),
            flights: Arc::default(),
            doubted: Cache::builder()
                .max_capacity(10_000)
                .time_to_live(DOUBT)
                .build(),
        })
    }

    /// The same documents by another way upstream.
    pub fn renewed(
        &self,
        upstream: Arc<Upstream>,
        bounds: Bounds,
        trusted: HashSet<String>,
    ) -> Arc<Self> {
        self.catalogue.trust(trusted);
        Arc::new(Self {
            bounds,
            shelf: self.shelf.clone(),
            upstream,
            catalogue: self.catalogue.clone(),
            hot: self.hot.clone(),
            sums: self.sums.clone(),
            flights: self.flights.clone(),
            doubted: self.doubted.clone(),
        })
    }

    /// Whether `url` is a module's archive in a private registry: no protocol has sums or signatures
    /// for those, and its folder is this machine's own.
    pub fn is_own_module(&self, url: &Url) -> bool {
        url.path().starts_with("/v1/modules/") && self.upstream.is_local(url)
    }

    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// The document for a wish, within the deadlines, whatever upstream does.
    ///
    /// # Errors
    /// When upstream fails and nothing is held.
    pub async fn get(self: &Arc<Self>, wish: &Wish) -> Result<Answer, Error> {
        let started = Instant::now();
        // Where the protocols have a document, what names it as something else is wrong.
        let named = matches!(wish.kind, Kind::Sums | Kind::Signature | Kind::Discovery);
        if named && is_mistaken(wish.url.path(), wish.kind) {
            return Err(nonsense(&wish.url, "is something else by its address"));
        }
        let key = url_key(&wish.url);
        let accept = wish
            .headers
            .get(ACCEPT)
            .and_then(|value| value.to_str().ok());
        let held = self.held_as(&key, wish.kind).await;
        let fits = |held: &Arc<Document>| held.answers(accept);
        let last_good = held.clone().filter(|held| held.status.is_success());
        if self.upstream.is_offline(&wish.url) {
            let held = last_good.ok_or_else(|| offline(&wish.url))?;
            return Ok(Answer::Document(held, How::Offline));
        }
        if let Some(held) = held.filter(fits) {
            let left = held.fresh_for(SystemTime::now());
            if let Some(left) = left.filter(|_| !wish.reload && !self.is_doubted(&key)) {
                return Ok(Answer::Document(held, How::Hit(left)));
            }
        }
        let patience = match last_good {
            Some(_) => DEADLINE_WITH_LAST_GOOD,
            None => LARGE_DEADLINE,
        };
        let vouchable = last_good.clone().filter(fits);
        let asking = self.ask(&key, accept, wish, &vouchable);
        let (outcome, collapsed) =
            timeout_at(started + patience, asking)
                .await
                .unwrap_or_else(|_| {
                    let words = format!(
                        "{}: upstream did not answer in time; try again later",
                        shown_url(&wish.url)
                    );
                    (Err(Error::new(ErrorKind::Timeout, words)), false)
                });
        let failure = match outcome {
            Ok(Fetched::TooLarge) => return Ok(Answer::TooLarge),
            Ok(Fetched::Document(document, Vouched::Again)) => {
                return Ok(Answer::Document(document, How::Revalidated));
            }
            Ok(Fetched::Document(document, Vouched::Anew)) => {
                let failed = document.status == StatusCode::TOO_MANY_REQUESTS
                    || document.status.is_server_error();
                if !failed || last_good.is_none() {
                    let kept = self.shelf.holds(&key);
                    return Ok(Answer::Document(document, How::Miss { collapsed, kept }));
                }
                Error::new(
                    ErrorKind::Incomplete,
                    format!(
                        "{}: upstream answered {}",
                        shown_url(&wish.url),
                        document.status.as_u16()
                    ),
                )
            }
            Err(e) => e,
        };
        let Some(last_good) = last_good else {
            return Err(failure);
        };
        METRICS.stale_answers.inc();
        tracing::warn!(url = %shown_url(&wish.url), cause = %failure, "upstream failed; the last good answer serves");
        Ok(Answer::Document(last_good, How::LastGood(failure)))
    }

    /// The held document, if any, however old.
    pub async fn held(&self, key: &str) -> Option<Arc<Document>> {
        if let Some(hot) = self.hot.get(key) {
            return Some(hot);
        }
        if !self.shelf.holds(key) {
            return None;
        }
        let Some(document) = self.shelf.read(key).await else {
            tracing::warn!(key, "a kept document is gone or rotten; dropped it");
            self.drop_document(key);
            return None;
        };
        let document = Arc::new(document);
        self.hot.insert(key.to_owned(), document.clone());
        Some(document)
    }

    /// The held document as one of that kind. What was kept as something else counts if it is one: the
    /// same URL may be asked for by its path alone, or because a document names it.
    pub async fn held_as(&self, key: &str, kind: Kind) -> Option<Arc<Document>> {
        let held = self.held(key).await?;
        if held.kind == kind || kind == Kind::Other {
            return Some(held);
        }
        let good = held.status == StatusCode::OK && check(kind, &held.base, &held.body).is_ok();
        if held.kind != Kind::Other || !good {
            return None;
        }
        let mut adopted = Document::clone(&held);
        adopted.kind = kind;
        if kind == Kind::Download {
            let download = Download::parse(&held.base, &held.body);
            adopted.download = download.ok().map(Arc::new);
            learn(&self.catalogue, &adopted, &adopted.base);
        }
        Some(Arc::new(adopted))
    }

    /// The held SHA256SUMS at `url`, parsed once; none where none are held.
    pub async fn held_sums(&self, url: &Url) -> Option<Arc<Sums>> {
        let document = self.held(&url_key(url)).await?;
        if document.status != StatusCode::OK {
            return None;
        }
        self.parsed(&document)
    }

    /// A document's sums, parsed once.
    pub fn parsed(&self, document: &Arc<Document>) -> Option<Arc<Sums>> {
        if let Some((of, sums)) = self.sums.get(&document.key)
            && Arc::ptr_eq(&of, document)
        {
            return sums;
        }
        let sums = Sums::parse(&document.body).ok().map(Arc::new);
        self.sums
            .insert(document.key.clone(), (document.clone(), sums.clone()));
        sums
    }

    /// Asks with a client's credentials; nothing of the answer is kept or shared.
    pub async fn fetch_privately(
        &self,
        url: &Url,
        headers: &HeaderMap,
    ) -> Result<(StatusCode, Bytes), Error> {
        let deadline = Instant::now() + DEADLINE;
        let mut headers = headers.clone();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let ask = Ask {
            method: Method::GET,
            url,
            headers,
            deadline,
            patience: DEADLINE,
            follow: true,
            purpose: "metadata",
        };
        let (parts, body) = self.upstream.ask(&ask).await?.into_parts();
        let body = timeout_at(deadline, read_body(body, url, self.bounds.document))
            .await
            .unwrap_or(Ok(None))?;
        let body = body.map(|body| decode(&parts.headers, body, self.bounds.document));
        match body {
            Some(Ok(Some(body))) => Ok((parts.status, body)),
            _ => Err(nonsense(url, "is too large or too slow")),
        }
    }

    /// Has a document fetched anew, whole, the next time: it was contradicted.
    pub fn doubt(&self, key: &str) {
        self.doubted.insert(key.to_owned(), ());
    }

    pub fn is_doubted(&self, key: &str) -> bool {
        self.doubted.contains_key(key)
    }

    /// Asks for a held document again, as far as that is possible.
    pub async fn refresh(self: &Arc<Self>, key: &str) {
        let Some(held) = self.held(key).await else {
            return;
        };
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        let wish = Wish {
            url: held.base.clone(),
            kind: held.kind,
            headers,
            reload: true,
        };
        if url_key(&wish.url) != key {
            // Its URL had a query, which was not kept: only a client can ask again.
            return;
        }
        if let Err(cause) = self.get(&wish).await {
            tracing::debug!(key, %cause, "a doubted document could not be fetched anew");
        }
    }

    /// Joins the flight for the document, or starts it; whether it was joined. An answer that was
    /// chosen by another Accept header is none for this client: then a flight of its own follows.
    async fn ask(
        self: &Arc<Self>,
        key: &str,
        accept: Option<&str>,
        wish: &Wish,
        held: &Option<Arc<Document>>,
    ) -> (Result<Fetched, Error>, bool) {
        loop {
            let (flight, joined) = self.join_flight(key, wish, held);
            let outcome = flight.await;
            match &outcome {
                Ok(Fetched::Document(document, _)) if joined && !document.answers(accept) => {}
                _ => return (outcome, joined),
            }
        }
    }

    fn join_flight(
        self: &Arc<Self>,
        key: &str,
        wish: &Wish,
        held: &Option<Arc<Document>>,
    ) -> (Flight, bool) {
        // A registry may tell each version of its clients something else.
        let version = wish.headers.get(VERSION).map(HeaderValue::as_bytes);
        let version = version.unwrap_or_default().to_vec();
        let key = (key.to_owned(), wish.kind, version);
        let mut flights = lock(&self.flights);
        if let Some(flight) = flights.get(&key) {
            return (flight.clone(), true);
        }
        let (this, wish, held) = (self.clone(), wish.clone(), held.clone());
        let (table, table_key) = (self.clone(), key.clone());
        let task = tokio::spawn(async move {
            // However the task ends, the place is free for the next one. Made within the task: a
            // runtime that is closing drops it here, under the lock.
            let _landing = Landing(table, table_key);
            this.fetch(&wish, held).await
        });
        let flight = task
            .map(|joined| {
                joined.unwrap_or_else(|e| {
                    Err(Error::new(
                        ErrorKind::Internal,
                        format!("a fetch broke off: {e}"),
                    ))
                })
            })
            .boxed()
            .shared();
        flights.insert(key, flight.clone());
        (flight, false)
    }

    /// A document is no longer kept; what it said of archives is forgotten with it.
    fn drop_document(&self, key: &str) {
        self.shelf.remove(key);
        self.hot.invalidate(key);
        self.catalogue.forget(key);
    }
}

/// Takes note of what a download document at `url` says.
fn learn(catalogue: &Catalogue, document: &Document, url: &Url) {
    if let (Some(download), Some(registry)) = (&document.download, Authority::of(url)) {
        catalogue.learn(&document.key, &registry.in_https_url(), download);
    }
}

/// Takes a flight out of the table.
struct Landing(Arc<Metadata>, FlightKey);

impl Drop for Landing {
    fn drop(&mut self) {
        lock(&self.0.flights).remove(&self.1);
    }
}

fn nonsense(url: &Url, why: &str) -> Error {
    Error::new(
        ErrorKind::Nonsense,
        format!(
            "{}: upstream's answer {why}; try again later, or check that no captive portal is in the way",
            shown_url(url)
        ),
    )
}

/// What a client is told for what is not held.
pub fn offline(url: &Url) -> Error {
    Error::new(
        ErrorKind::Offline,
        format!(
            "{} is not held and larder is offline; bring it in with `larder prefetch` where there is a network, or with `larder import`",
            shown_url(url)
        ),
    )
}
