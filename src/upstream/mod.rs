//! Asking the origin: one pooled HTTP/1.1 client over one dial, tries, redirects, resuming.

mod connect;
pub mod dial;
pub mod download;
pub mod guard;
pub mod parent;

use std::collections::HashMap;
use std::error::Error as StdError;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, COOKIE, HeaderMap, HeaderValue, LOCATION, VIA};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::client::legacy::{self, Client};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::DuplexStream;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;
use url::Url;

use crate::config::Authority;
use crate::error::{Error, Kind};
use crate::telemetry::{METRICS, Why};
use connect::Connector;
use dial::Dialer;

/// The body of a request that is sent upstream.
pub type RequestBody = BoxBody<Bytes, hyper::Error>;

/// Tries behind one request, the first one included.
pub const TRIES: u32 = 3;
const BACKOFF: Duration = Duration::from_millis(150);
const REDIRECTS: usize = 10;
const IDLE_CONNECTION: Duration = Duration::from_secs(30);
const HEAD_LIMIT: usize = 256 * 1024;

/// The way to all origins.
pub struct Upstream {
    client: Client<Connector, RequestBody>,
    dialer: Arc<Dialer>,
    locals: Arc<Locals>,
}

/// An origin within this process.
pub trait Local: Send + Sync {
    /// A connection to it, on which HTTP/1.1 is spoken.
    fn open(&self) -> DuplexStream;
}

/// Origins within this process, by the authority in `https` URLs.
pub type Locals = HashMap<Authority, Box<dyn Local>>;

/// A GET or HEAD to be sent, with tries and (where asked for) redirects.
pub struct Ask<'a> {
    pub method: Method,
    pub url: &'a Url,
    pub headers: HeaderMap,
    /// When the head of the answer must be there, over all tries.
    pub deadline: Instant,
    /// How long one try may take of that.
    pub patience: Duration,
    pub follow: bool,
    /// What it is for, in metrics.
    pub purpose: &'static str,
}

impl Upstream {
    pub fn new(dialer: Arc<Dialer>, tls: TlsConnector, locals: Locals) -> Self {
        let locals = Arc::new(locals);
        let connector = Connector {
            dialer: dialer.clone(),
            tls,
            locals: locals.clone(),
        };
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(IDLE_CONNECTION)
            .pool_max_idle_per_host(16)
            .pool_timer(TokioTimer::new())
            .timer(TokioTimer::new())
            .http1_max_buf_size(HEAD_LIMIT)
            .build(connector);
        Self {
            client,
            dialer,
            locals,
        }
    }

    pub fn dialer(&self) -> &Arc<Dialer> {
        &self.dialer
    }

    /// Whether what lies at `url` is not to be asked for.
    pub fn is_offline(&self, url: &Url) -> bool {
        self.dialer.offline && !self.is_local(url)
    }

    /// Whether an origin within this process answers.
    pub fn is_local(&self, url: &Url) -> bool {
        let here = |at: Authority| self.locals.contains_key(&at);
        url.scheme() == "https" && Authority::of(url).is_some_and(here)
    }

    /// Sends one request once. Redirects and error statuses are answers like any other.
    pub async fn send(
        &self,
        mut request: Request<RequestBody>,
        deadline: Instant,
        purpose: &'static str,
    ) -> Result<Response<Incoming>, Error> {
        request
            .headers_mut()
            .append(VIA, HeaderValue::from_static("1.1 larder"));
        let what = shown(request.uri());
        let asked = authority(request.uri());
        METRICS
            .upstream_requests
            .get_or_create(&Why { purpose })
            .inc();
        match timeout_at(deadline, self.client.request(request)).await {
            Ok(Ok(response)) if response.status().is_informational() => Err(Error::new(
                Kind::Nonsense,
                format!(
                    "{what}: upstream answered {} to what was no upgrade; try again later",
                    response.status().as_u16()
                ),
            )),
            Ok(Ok(mut response)) => {
                *response.headers_mut() = copied(response.headers());
                Ok(response)
            }
            Ok(Err(e)) => Err(explain(&what, &e)),
            Err(_) => {
                let way = asked.map(|asked| self.dialer.by_way_of(&asked));
                let way = way.unwrap_or_default();
                Err(Error::new(
                    Kind::Timeout,
                    format!("{what}: upstream did not answer in time{way}; try again later"),
                ))
            }
        }
    }

    /// Asks with tries on connect errors, 429 and 5xx, within the deadline. After the last try an
    /// error status is an answer, to be judged by the caller.
    pub async fn ask(&self, ask: &Ask<'_>) -> Result<Response<Incoming>, Error> {
        let mut tried = 1;
        loop {
            let outcome = self.ask_once(ask).await;
            let again = match &outcome {
                Ok((response, hops)) => {
                    let status = response.status();
                    status == StatusCode::TOO_MANY_REQUESTS
                        || status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED
                        // A signed URL that has expired: the stable one gives a new one.
                        || *hops > 0 && matches!(status.as_u16(), 400 | 401 | 403 | 410)
                }
                Err(e) => e.is_transient(),
            };
            let pause = backoff(tried);
            if !again || tried == TRIES || Instant::now() + pause >= ask.deadline {
                return outcome.map(|(response, _)| response);
            }
            tracing::debug!(url = %shown_url(ask.url), tried, "asking again");
            tokio::time::sleep(pause).await;
            tried += 1;
        }
    }

    async fn ask_once(&self, ask: &Ask<'_>) -> Result<(Response<Incoming>, usize), Error> {
        let deadline = ask.deadline.min(Instant::now() + ask.patience);
        let mut url = ask.url.clone();
        let mut headers = ask.headers.clone();
        for hops in 0..=REDIRECTS {
            let mut request = Request::new(no_body());
            *request.method_mut() = ask.method.clone();
            *request.uri_mut() = to_uri(&url)?;
            *request.headers_mut() = headers.clone();
            let response = self.send(request, deadline, ask.purpose).await?;
            if !ask.follow || !is_redirect(response.status()) {
                return Ok((response, hops));
            }
            let next = redirect_target(&url, &response)?;
            if Authority::of(&next) != Authority::of(&url) {
                headers.remove(AUTHORIZATION);
                headers.remove(COOKIE);
            }
            url = next;
        }
        Err(Error::new(
            Kind::Nonsense,
            format!("{}: more than {REDIRECTS} redirects", shown_url(ask.url)),
        ))
    }
}

/// TLS to origins and to a parent proxy, by these roots.
pub fn tls(roots: Vec<CertificateDer<'static>>) -> Result<TlsConnector, String> {
    let mut store = RootCertStore::empty();
    let (_, unreadable) = store.add_parsable_certificates(roots);
    if unreadable > 0 {
        tracing::debug!(
            unreadable,
            "some roots are of a form that is not understood"
        );
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(|e| e.to_string())?
        .with_root_certificates(store)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(tls)))
}

/// Waits for the next chunk of a body, no longer than `idle`.
pub async fn chunk(
    body: &mut Incoming,
    idle: Duration,
    what: &Url,
) -> Result<Option<Bytes>, Error> {
    loop {
        let frame = match timeout(idle, body.frame()).await {
            Ok(frame) => frame,
            Err(_) => {
                return Err(Error::new(
                    Kind::Timeout,
                    format!(
                        "{}: upstream sent nothing for {} s",
                        shown_url(what),
                        idle.as_secs()
                    ),
                ));
            }
        };
        match frame {
            None => return Ok(None),
            Some(Ok(frame)) => {
                // Trailers are of no use to these clients.
                if let Ok(data) = frame.into_data()
                    && !data.is_empty()
                {
                    return Ok(Some(data));
                }
            }
            Some(Err(e)) => {
                return Err(Error::new(
                    Kind::Incomplete,
                    format!("{}: upstream cut the answer short: {e}", shown_url(what)),
                ));
            }
        }
    }
}

/// A body of nothing.
pub fn no_body() -> RequestBody {
    Empty::new().map_err(|never| match never {}).boxed()
}

/// A URL as it may be shown and logged: without query, fragment and credentials.
pub fn shown_url(url: &Url) -> String {
    let authority = match Authority::of(url) {
        Some(authority) if url.scheme() == "https" => authority.in_https_url(),
        Some(authority) => authority.to_string(),
        None => String::new(),
    };
    format!("{}://{authority}{}", url.scheme(), url.path())
}

pub fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

fn redirect_target(from: &Url, response: &Response<Incoming>) -> Result<Url, Error> {
    let next = response
        .headers()
        .get(LOCATION)
        .and_then(|value| std::str::from_utf8(value.as_bytes()).ok())
        .and_then(|reference| from.join(reference).ok())
        .filter(|next| next.scheme() == "https" && next.host().is_some());
    next.ok_or_else(|| {
        Error::new(
            Kind::Nonsense,
            format!("{}: redirects to no https URL", shown_url(from)),
        )
    })
}

/// In memory of their own: hyper's share what was received into, all of which would be kept for as long as
/// these are.
fn copied(headers: &HeaderMap) -> HeaderMap {
    let own = |value: &HeaderValue| HeaderValue::from_bytes(value.as_bytes()).ok();
    headers
        .iter()
        .filter_map(|(name, value)| Some((name.clone(), own(value)?)))
        .collect()
}

fn to_uri(url: &Url) -> Result<Uri, Error> {
    url[..url::Position::AfterQuery].parse().map_err(|_| {
        Error::new(
            Kind::BadRequest,
            format!("{}: not a URL that can be asked for", shown_url(url)),
        )
    })
}

fn authority(uri: &Uri) -> Option<Authority> {
    let default = match uri.scheme_str() {
        Some("https") => 443,
        _ => 80,
    };
    let host = uri.host()?.parse().ok()?;
    Some(Authority::new(host, uri.port_u16().unwrap_or(default)))
}

fn shown(uri: &Uri) -> String {
    match Url::parse(&uri.to_string()) {
        Ok(url) => shown_url(&url),
        Err(_) => uri.path().to_owned(),
    }
}

/// Exponential, with jitter of its own length so that a fleet does not come back in step.
pub fn backoff(tried: u32) -> Duration {
    let base = BACKOFF * 2u32.pow(tried - 1);
    let random = RandomState::new().build_hasher().finish();
    base + base.mul_f64((random % 1000) as f64 / 1000.0)
}

/// The cause that larder itself gave, or else what hyper says of it.
fn explain(what: &str, error: &legacy::Error) -> Error {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    let mut words = error.to_string();
    while let Some(e) = cause {
        if let Some(own) = e.downcast_ref::<Error>() {
            return own.clone();
        }
        words = e.to_string();
        cause = e.source();
    }
    Error::new(
        Kind::Incomplete,
        format!("{what}: upstream did not answer in HTTP: {words}; try again later"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_holds_no_query_and_no_credentials() {
        let url = Url::parse("https://me:pw@h.example:443/a/b?X-Amz-Signature=1#f").expect("url");
        assert_eq!(shown_url(&url), "https://h.example/a/b");
    }

    #[test]
    fn kept_headers_keep_nothing_else_in_memory() {
        let received = Bytes::from(b"a, b".to_vec());
        let values = [received.slice(..1), received.slice(3..)];
        let values = values.map(|value| HeaderValue::from_maybe_shared(value).expect("a value"));
        let all: HeaderMap = values.map(|value| (VIA, value)).into_iter().collect();
        let kept = copied(&all);
        assert_eq!(kept, all);
        drop(all);
        assert!(received.is_unique());
    }

    #[tokio::test(start_paused = true)]
    async fn words_about_a_timeout_name_the_parent() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("bound");
        let proxy = format!("https://{}", silent.local_addr().expect("bound"));
        let tls = tls(Vec::new()).expect("TLS");
        let dialer = Dialer {
            offline: false,
            reach: guard::Reach::LikeTheUser,
            connect_to: vec![],
            configured: vec![],
            listed: Default::default(),
            mirrors: Default::default(),
            parent: Some(parent::ParentProxy {
                proxy: proxy.parse().expect("a parent"),
                except: Default::default(),
                tls: tls.clone(),
            }),
            own: vec![],
        };
        let upstream = Upstream::new(Arc::new(dialer), tls, Locals::default());
        let mut request = Request::new(no_body());
        *request.uri_mut() = "https://a.example/b?secret".parse().expect("a URI");
        // Less than the dial has.
        let deadline = Instant::now() + Duration::from_secs(1);
        let outcome = upstream.send(request, deadline, "test").await;
        let words = outcome.expect_err("nobody answered").to_string();
        assert!(words.starts_with("https://a.example/b: "), "{words}");
        assert!(
            words.contains(&format!("through the parent proxy {proxy}")),
            "{words}"
        );
    }

    #[test]
    fn backoff_grows_and_stays_bounded() {
        for tried in 1..TRIES {
            let pause = backoff(tried);
            assert!(pause >= BACKOFF * 2u32.pow(tried - 1) && pause < BACKOFF * 2u32.pow(tried));
        }
    }
}
