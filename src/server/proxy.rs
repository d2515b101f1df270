//! Requests to the listener itself: CONNECT, absolute-form (RFC 9112 section 3.2), own pages.

use std::net::SocketAddr;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH, COOKIE, HOST, HeaderMap, TRANSFER_ENCODING};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt as _;
use tokio::time::{Instant, timeout};
use url::Url;

use super::access::{Standing, stranger};
use super::connection::{ACCESS_DENIED, LAST_WORDS, Peer, Role, greet, intercept};
use super::io::Stream;
use super::respond::{Answer, Body, Trace, nothing};
use super::{origin, pages, relay, tunnel};
use crate::config::{Authority, HostName};
use crate::error::{Error, Kind};
use crate::telemetry::METRICS;

/// For the head of an answer to a request that is passed on.
const FORWARD_PATIENCE: Duration = Duration::from_secs(30);

/// Answers a request. `may_connect` is false on a connection that came through CONNECT.
pub async fn answer(peer: Peer, request: Request<Incoming>, may_connect: bool) -> Response<Body> {
    if request.headers().get_all(HOST).iter().nth(1).is_some() {
        let trace = Trace::begin(&peer, request.method(), "?".to_owned());
        let words = "the request has several Host headers";
        return trace.send(Answer::error(&Error::new(Kind::BadRequest, words)));
    }
    if request.method() == Method::CONNECT {
        return connect(peer, request, may_connect).await;
    }
    match request.uri().scheme_str().map(str::to_owned) {
        None => own_page(peer, request).await,
        Some(scheme) => absolute(peer, request, &scheme).await,
    }
}

/// Tells an address that may not use larder so.
pub fn turn_away(peer: &Peer, request: &Request<Incoming>) -> Response<Body> {
    let trace = Trace::begin(peer, request.method(), "?".to_owned());
    let error = stranger(peer.addr.ip());
    trace.send(Answer::error(&error).with_reason(&error))
}

/// Refuses a request whose head is larger than about that, in bytes: what hyper reads at once may hold
/// more than it reads at the most.
pub fn too_large(peer: &Peer, request: &Request<Incoming>, limit: usize) -> Option<Response<Body>> {
    let headers = request.headers().iter();
    let headers: usize = headers
        .map(|(name, value)| name.as_str().len() + value.len() + ": \r\n".len())
        .sum();
    let uri = request.uri();
    let path = uri.path_and_query().map_or(0, |path| path.as_str().len());
    let host = uri.authority().map_or(0, |host| host.as_str().len());
    if request.method().as_str().len() + path + host + headers <= limit {
        return None;
    }
    let trace = Trace::begin(peer, request.method(), "?".to_owned());
    let words = format!("the request's head is larger than {limit} bytes; send less of it");
    let mut answer = Answer::error(&Error::new(Kind::BadRequest, words));
    *answer.response.status_mut() = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
    Some(trace.send(answer))
}

/// Ends a connection whose client has yet to say who it is.
pub fn ask_anew(peer: &Peer, request: &Request<Incoming>) -> Response<Body> {
    let trace = Trace::begin(peer, request.method(), "?".to_owned());
    let words = "this proxy asks who its clients are by now; open a connection anew";
    let error = Error::new(Kind::Denied, words);
    trace.send(Answer::error(&error).with_reason(&error))
}

async fn own_page(peer: Peer, request: Request<Incoming>) -> Response<Body> {
    let shown = format!("larder:{}", request.uri().path());
    let trace = Trace::begin(&peer, request.method(), shown);
    let answer = pages::answer(&peer, request).await;
    trace.send(answer)
}

/// `GET https://host/path` and `GET http://host/path`, asked of the proxy itself.
async fn absolute(peer: Peer, request: Request<Incoming>, scheme: &str) -> Response<Body> {
    let uri = request.uri().clone();
    let default = if scheme == "https" { 443 } else { 80 };
    let authority = uri.authority().and_then(|a| {
        let port = a.port_u16().unwrap_or(default);
        (!a.as_str().contains('@')).then_some(Authority::new(a.host().parse().ok()?, port))
    });
    let shown = |a: &Authority| format!("{scheme}://{a}{}", uri.path());
    let Some(authority) = authority else {
        let trace = Trace::begin(&peer, request.method(), "?".to_owned());
        return trace.send(Answer::error(&Error::new(
            Kind::BadRequest,
            "the request names no host; ask for http://HOST/PATH",
        )));
    };
    if peer.entrance.is_own(&authority) {
        return own_page(peer, request).await;
    }
    if let Err(e) = authorize(&peer, request.headers()).await {
        let trace = Trace::begin(&peer, request.method(), shown(&authority));
        return trace.send(Answer::error(&e));
    }
    if scheme == "https" && peer.entrance.server.is_intercepted(&authority) {
        return origin::answer(peer, authority, request).await;
    }
    let trace = Trace::begin(&peer, request.method(), shown(&authority));
    let outcome = match scheme {
        "http" => forward(&peer, &authority, request).await,
        _ => Err(Error::new(
            Kind::BadRequest,
            format!("{authority} is not intercepted; reach it through CONNECT"),
        )),
    };
    trace.send(outcome.unwrap_or_else(|e| Answer::error(&e)))
}

/// Plain HTTP passes under the same rules as a tunnel.
async fn forward(
    peer: &Peer,
    authority: &Authority,
    mut request: Request<Incoming>,
) -> Result<Answer, Error> {
    let server = &peer.entrance.server;
    judge(peer, authority)?;
    let host = request.headers().get(HOST).and_then(|h| h.to_str().ok());
    let agrees = host.is_none_or(|host| origin::is_host(host, authority, 80));
    if !agrees {
        return Err(Error::new(
            Kind::BadRequest,
            "Host and the request's URL name different hosts",
        ));
    }
    let url = Url::parse(&request.uri().to_string())
        .map_err(|e| Error::new(Kind::BadRequest, format!("the URL is none: {e}")))?;
    // The URL is what counts (RFC 9112 section 3.2.2); the client writes Host from it.
    request.headers_mut().remove(HOST);
    let (parts, body) = request.into_parts();
    let mut outgoing = Request::new(http_body_util::BodyExt::boxed(body));
    *outgoing.method_mut() = parts.method;
    *outgoing.uri_mut() = parts.uri;
    *outgoing.headers_mut() = relay::forwarded(&parts.headers);
    let deadline = Instant::now() + FORWARD_PATIENCE;
    let upstream = &server.cache.upstream;
    let response = upstream.send(outgoing, deadline, "forward").await?;
    Ok(relay::relay(response, &url, "fwd=bypass"))
}

/// CONNECT (RFC 9110 section 9.3.6).
async fn connect(peer: Peer, request: Request<Incoming>, may_connect: bool) -> Response<Body> {
    let asked = parse_connect(&request);
    let shown = match &asked {
        Ok(authority) => authority.to_string(),
        Err(_) => "?".to_owned(),
    };
    let mut trace = Trace::begin(&peer, request.method(), shown);
    let refuse = |trace: Trace, e: &Error| trace.send(Answer::error(e).with_reason(e));
    let authority = match asked {
        Ok(authority) if may_connect => authority,
        Ok(_) => {
            let words = "CONNECT within CONNECT to larder itself; connect directly";
            return refuse(trace, &Error::new(Kind::Denied, words));
        }
        Err(e) => return refuse(trace, &e),
    };
    let server = peer.entrance.server.clone();
    if peer.entrance.is_own(&authority) {
        trace.log("own", 200, 0);
        return upgrade(peer, request, |peer, io| greet(peer, io, Role::Pages));
    }
    if let Err(e) = authorize(&peer, request.headers()).await {
        return refuse(trace, &e);
    }
    if server.is_intercepted(&authority) {
        if !server.ca.permits(&authority.host) {
            let words = format!(
                "the CA may not sign for {}: it was made for another host list; run `larder ca renew`, then reload larder (SIGHUP) or start it again",
                authority.host
            );
            return refuse(trace, &Error::new(Kind::Denied, words));
        }
        trace.log("intercept", 200, 0);
        let identified = !server.access.is_open();
        let peer = Peer { identified, ..peer };
        return upgrade(peer, request, |peer, io| intercept(peer, io, authority));
    }
    let reached = async {
        judge(&peer, &authority)?;
        let permit = server
            .access
            .tunnel(peer.addr.ip())
            .ok_or_else(|| Error::new(Kind::Busy, "too many tunnels are open; try again later"))?;
        let upstream = &server.cache.upstream;
        Ok((upstream.dialer().dial(&authority).await?, permit))
    };
    let (far, permit) = match reached.await {
        Ok(reached) => reached,
        Err(e) => return refuse(trace, &e),
    };
    // Draining does not wait for tunnels.
    trace.detach();
    tokio::spawn(async move {
        let _permit = permit;
        let Ok(near) = hyper::upgrade::on(request).await else {
            return;
        };
        METRICS.tunnels.inc();
        let bytes = tunnel::run(TokioIo::new(near), far, &server.config.limits).await;
        METRICS.tunnels.dec();
        trace.log("tunnel", 200, bytes);
    });
    Response::new(nothing())
}

/// A connection that the kernel redirected here and that is for nobody here: on to where it was
/// going, under the rules for tunnels. `hello` was read of it already.
pub async fn through(
    mut peer: Peer,
    mut stream: impl Stream,
    at: SocketAddr,
    named: Option<HostName>,
    hello: Vec<u8>,
) {
    let server = peer.entrance.server.clone();
    let host = named.or_else(|| at.ip().to_string().parse().ok());
    let Some(host) = host else {
        return;
    };
    let authority = Authority::new(host, at.port());
    let mut trace = Trace::begin(&peer, &Method::CONNECT, authority.to_string());
    let reached = async {
        if peer.standing != Standing::Allowed {
            return Err(stranger(peer.addr.ip()));
        }
        if !server.access.is_open() {
            return Err(Error::new(
                Kind::Denied,
                format!(
                    "{authority}: whoever is redirected cannot say who they are (htpasswd, client_ca)"
                ),
            ));
        }
        judge_at(&peer, &authority, Some(at))?;
        let permit = server
            .access
            .tunnel(peer.addr.ip())
            .ok_or_else(|| Error::new(Kind::Busy, "too many tunnels are open; try again later"))?;
        let dialer = server.cache.upstream.dialer();
        let mut far = dialer.dial_at(&authority, at).await?;
        far.write_all(&hello)
            .await
            .map_err(|e| Error::new(Kind::Incomplete, format!("{authority} hung up: {e}")))?;
        Ok((far, permit))
    };
    let reached = reached.await;
    // Draining does not wait for tunnels.
    trace.detach();
    peer.alive = None;
    match reached {
        Ok((far, _permit)) => {
            METRICS.tunnels.inc();
            let bytes = tunnel::run(stream, far, &server.config.limits).await;
            METRICS.tunnels.dec();
            trace.log("tunnel", 200, bytes);
        }
        Err(error) => {
            tracing::info!(client = %peer.addr.ip(), %authority, %error, "a redirected connection was refused");
            let _ = timeout(LAST_WORDS, stream.write_all(&ACCESS_DENIED)).await;
            let _ = timeout(LAST_WORDS, stream.shutdown()).await;
            trace.log("error", error.kind().status().as_u16(), 0);
        }
    }
}

/// Says 200 and serves the connection that follows.
fn upgrade<F>(
    peer: Peer,
    request: Request<Incoming>,
    serve: impl FnOnce(Peer, TokioIo<hyper::upgrade::Upgraded>) -> F + Send + 'static,
) -> Response<Body>
where
    F: Future<Output = ()> + Send + 'static,
{
    let nested = Peer {
        running: std::sync::Arc::default(),
        // What comes within is a connection of its own.
        tls: false,
        redirected: None,
        ..peer
    };
    tokio::spawn(async move {
        match hyper::upgrade::on(request).await {
            Ok(io) => serve(nested, TokioIo::new(io)).await,
            Err(error) => tracing::debug!(%error, "a CONNECT was left before it began"),
        }
    });
    Response::new(nothing())
}

fn parse_connect(request: &Request<Incoming>) -> Result<Authority, Error> {
    let bad = || {
        Error::new(
            Kind::BadRequest,
            "malformed CONNECT; write CONNECT HOST:PORT",
        )
    };
    let uri = request.uri();
    let authority = uri.authority().ok_or_else(bad)?;
    let plain = uri.scheme().is_none() && uri.path_and_query().is_none();
    let with_port = authority.port_u16().is_some() && !authority.as_str().contains('@');
    let headers = request.headers();
    // RFC 9110 section 9.3.6: what follows the head is the tunnel's.
    let with_body = headers.contains_key(CONTENT_LENGTH) || headers.contains_key(TRANSFER_ENCODING);
    if !plain || !with_port || with_body {
        return Err(bad());
    }
    authority.as_str().parse().map_err(|_| bad())
}

/// The rule for intercepted hosts; ports and addresses are judged where they are dialled.
fn judge(peer: &Peer, authority: &Authority) -> Result<(), Error> {
    judge_at(peer, authority, None)
}

/// The same where it is known to be `at` an address, which may be listed itself.
fn judge_at(peer: &Peer, authority: &Authority, at: Option<SocketAddr>) -> Result<(), Error> {
    let server = &peer.entrance.server;
    if server.is_intercepted_host(&authority.host) {
        return Err(Error::new(
            Kind::Denied,
            format!(
                "{authority}: this host is intercepted on another port, and not tunnelled; add --intercept {authority} if it is meant"
            ),
        ));
    }
    let tunnels = &server.config.tunnels;
    if !tunnels.permits(authority) && !at.is_some_and(|at| tunnels.lists_address(at)) {
        return Err(Error::new(
            Kind::Denied,
            format!(
                "{authority} is not tunnelled to (config key `tunnel`){}",
                server.config.policy.whom_to_ask()
            ),
        ));
    }
    Ok(())
}

async fn authorize(peer: &Peer, headers: &HeaderMap) -> Result<(), Error> {
    let access = &peer.entrance.server.access;
    access
        .authorize(peer.addr.ip(), peer.standing, peer.certified, headers)
        .await
}

/// Whether the request is one client's own: its answer is for nobody else.
pub fn is_private(headers: &HeaderMap) -> bool {
    headers.contains_key(AUTHORIZATION) || headers.contains_key(COOKIE)
}
