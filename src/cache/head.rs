//! HEAD of an archive: what a GET would say, without a download.

use std::sync::Arc;
use std::time::Duration;

use hyper::header::{ACCEPT_ENCODING, HeaderMap, HeaderValue};
use hyper::{Method, StatusCode};
use tokio::time::Instant;
use url::Url;

use super::document::end_to_end;
use super::metadata::offline;
use super::{Cache, running, url_key};
use crate::error::Error;
use crate::store::Held;
use crate::upstream::Ask;

/// For everything behind a HEAD of an archive that is not held.
const HEAD_DEADLINE: Duration = Duration::from_secs(7);

/// The answer to HEAD.
pub enum HeadOnly {
    Held(Held),
    Upstream {
        status: StatusCode,
        length: Option<u64>,
        headers: HeaderMap,
    },
}

impl Cache {
    /// What HEAD should say, without a download.
    pub async fn archive_head(
        self: &Arc<Self>,
        url: &Url,
        headers: HeaderMap,
    ) -> Result<HeadOnly, Error> {
        let deadline = Instant::now() + HEAD_DEADLINE;
        let key = url_key(url);
        let digest = self.settled(url).await?;
        self.gate(url, digest, &HeaderMap::new()).await?;
        if let Some(held) = self.held(digest, &key, url).await {
            self.admit_held(url, &held).await?;
            return Ok(HeadOnly::Held(held));
        }
        if self.upstream.is_offline(url) {
            return Err(offline(url));
        }
        let running = running(&self.lock(), &key, digest, url).cloned();
        if let Some(head) = running.and_then(|fill| fill.state().borrow().head.clone()) {
            return Ok(HeadOnly::Upstream {
                status: StatusCode::OK,
                length: head.length,
                headers: head.headers.clone(),
            });
        }
        let head = self.ask_head(url, headers, deadline).await?;
        if let HeadOnly::Upstream {
            status, headers, ..
        } = &head
            && status.is_success()
        {
            self.admit_archive(url, Some(headers)).await?;
        }
        Ok(head)
    }

    pub(super) async fn ask_head(
        &self,
        url: &Url,
        mut headers: HeaderMap,
        deadline: Instant,
    ) -> Result<HeadOnly, Error> {
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let mut ask = Ask {
            method: Method::HEAD,
            url,
            headers,
            deadline,
            patience: HEAD_DEADLINE,
            follow: true,
            purpose: "head",
        };
        let mut response = self.upstream.ask(&ask).await;
        let refuses = |status: StatusCode| matches!(status.as_u16(), 400 | 403 | 405 | 501);
        if response
            .as_ref()
            .is_ok_and(|response| refuses(response.status()))
        {
            // A presigned URL is signed for GET alone, and some servers know no HEAD. The body is
            // not read: dropping it ends the transfer.
            ask.method = Method::GET;
            response = self.upstream.ask(&ask).await;
        }
        let response = response?;
        Ok(HeadOnly::Upstream {
            status: response.status(),
            length: crate::upstream::download::length(response.headers()),
            headers: end_to_end(response.headers()),
        })
    }
}
