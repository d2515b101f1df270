//! Asking the process that has the data dir.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, HOST};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;

use crate::instance::Running;

/// Asks, and reads the whole answer as JSON.
pub async fn ask<T: DeserializeOwned>(
    running: &Running,
    method: Method,
    path: &str,
    body: &serde_json::Value,
) -> Result<T, String> {
    let response = send(running, method, path, body.to_string()).await?;
    let status = response.status();
    let body = response
        .into_body()
        .collect()
        .await
        .map_err(|e| e.to_string())?;
    let body = body.to_bytes();
    if !status.is_success() {
        return Err(format!(
            "answered {status}: {}",
            String::from_utf8_lossy(&body)
        ));
    }
    serde_json::from_slice(&body).map_err(|e| e.to_string())
}

/// Asks for a page as any client does, and reads the whole answer.
pub async fn page(running: &Running, path: &str) -> Result<(StatusCode, Bytes), String> {
    let authorization = running.login.as_ref().map(|login| {
        use base64::Engine as _;
        let token = base64::engine::general_purpose::STANDARD.encode(login);
        format!("Basic {token}")
    });
    let body = String::new();
    let response = send_with(running, Method::GET, path, body, authorization).await?;
    let status = response.status();
    let body = response.into_body().collect().await;
    let body = body.map_err(|e| e.to_string())?.to_bytes();
    Ok((status, body))
}

/// Asks, and hands over the answer as it begins.
pub async fn send(
    running: &Running,
    method: Method,
    path: &str,
    body: String,
) -> Result<Response<Incoming>, String> {
    let token = format!("Bearer {}", running.token);
    send_with(running, method, path, body, Some(token)).await
}

async fn send_with(
    running: &Running,
    method: Method,
    path: &str,
    body: String,
    authorization: Option<String>,
) -> Result<Response<Incoming>, String> {
    let mut addr = running.addr.ok_or("is only just starting")?;
    if addr.ip().is_unspecified() {
        addr.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
    }
    let stream = TcpStream::connect(addr).await.map_err(|e| e.to_string())?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| e.to_string())?;
    tokio::spawn(connection);
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, addr.to_string());
    if let Some(authorization) = authorization {
        request = request.header(AUTHORIZATION, authorization);
    }
    let request = request
        .body(Full::new(Bytes::from(body)))
        .map_err(|e| e.to_string())?;
    sender
        .send_request(request)
        .await
        .map_err(|e| e.to_string())
}
