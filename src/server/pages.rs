//! larder's own pages.

use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};

use super::connection::Peer;
use super::respond::{Answer, full};
use super::{control, origin};
use crate::error::{Error, Kind};
use crate::telemetry::METRICS;
use crate::terraform::route::OWN_PREFIX;

/// Answers a request for a page of larder itself.
pub async fn answer(peer: &Peer, request: Request<Incoming>) -> Answer {
    let path = request.uri().path().to_owned();
    if path.starts_with("/api/v1/") {
        return control::answer(peer, request).await;
    }
    if path.starts_with("/registry/") {
        let answer = origin::registry_by_name(peer, request).await;
        return answer.unwrap_or_else(|e| Answer::error(&e));
    }
    if path.starts_with("/mirror/") {
        let answer = origin::mirror(peer, request).await;
        return answer.unwrap_or_else(|e| Answer::error(&e));
    }
    let of_registry = ["/.well-known/terraform.json", "/v1/", OWN_PREFIX];
    let mut request = request;
    if of_registry.iter().any(|prefix| path.starts_with(prefix)) {
        match origin::private_registry(peer, request).await {
            Ok(answer) => return answer.unwrap_or_else(|e| Answer::error(&e)),
            // There is none of that name.
            Err(back) => request = back,
        }
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let words = format!("{path} can only be read; use GET");
        let mut answer = Answer::error(&Error::new(Kind::BadRequest, words));
        *answer.response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        return answer;
    }
    let server = &peer.entrance.server;
    match path.as_str() {
        "/readyz" => text("text/plain; charset=utf-8", "ready\n"),
        "/healthz" => text("text/plain; charset=utf-8", "alive\n"),
        "/ca.pem" => text("application/x-pem-file", server.ca.pem().to_owned()),
        "/proxy.pac" => text("application/x-ns-proxy-autoconfig", pac(peer)),
        "/metrics" => text(
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            METRICS.text(),
        ),
        "/" => text("text/plain; charset=utf-8", HOME),
        _ => Answer::error(&Error::new(
            Kind::NotFound,
            format!("no page {path} here; this is a proxy: `larder env` sets a shell up for it"),
        )),
    }
}

const HOME: &str = "larder, a caching proxy for Terraform and OpenTofu\n\n\
    Set HTTPS_PROXY to this address and trust /ca.pem, or evaluate `larder env`.\n\
    Pages: /readyz /healthz /ca.pem /proxy.pac /metrics\n";

fn text(kind: &'static str, body: impl Into<bytes::Bytes>) -> Answer {
    let mut response = Response::new(full(body));
    let kind = HeaderValue::from_static(kind);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    Answer::new(response, "own")
}

/// Proxy auto-configuration: the intercepted hosts through larder, all else directly.
fn pac(peer: &Peer) -> String {
    let hosts: Vec<_> = peer
        .entrance
        .server
        .config
        .intercept
        .iter()
        .map(|authority| format!("{:?}", authority.host.as_str()))
        .collect();
    format!(
        "function FindProxyForURL(url, host) {{\n  var hosts = [{}];\n  if (hosts.indexOf(host.toLowerCase()) >= 0) return \"PROXY {}; DIRECT\";\n  return \"DIRECT\";\n}}\n",
        hosts.join(", "),
        reached(peer)
    )
}

/// The address by which clients reach this listener.
fn reached(peer: &Peer) -> String {
    let local = peer.entrance.local;
    let server = &peer.entrance.server;
    match server.config.hostnames.first() {
        Some(name) => format!("{name}:{}", local.port()),
        None if local.ip().is_unspecified() => format!("localhost:{}", local.port()),
        None => local.to_string(),
    }
}
