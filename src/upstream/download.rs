//! The bytes of an archive from upstream, mended behind the reader's back.
//!
//! A body that is cut short or stalls is asked for again from where it stopped (RFC 9110 sections
//! 13.1.5 and 14.2: `Range` with `If-Range`, and the answer's `Content-Range` is checked). Where
//! upstream sends the whole instead, it must begin with the very bytes that were already taken.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{
    ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, IF_RANGE,
    LAST_MODIFIED, RANGE,
};
use hyper::{Method, Response, StatusCode};
use tokio::time::Instant;
use url::Url;

use super::{Ask, Upstream, chunk, shown_url};
use crate::digest::Hasher;
use crate::error::{Error, Kind};
use crate::telemetry::METRICS;

/// For the head of an archive's answer, over all tries.
const HEAD_DEADLINE: Duration = Duration::from_secs(32);
/// For one of them: an upstream that says nothing is asked again.
const HEAD_PATIENCE: Duration = Duration::from_secs(10);
const IDLE: Duration = Duration::from_secs(30);
/// Mends without a single new byte before giving up, and mends of one download in all.
const FRUITLESS_MENDS: u32 = 3;
const ALL_MENDS: u32 = 64;

/// An archive on its way.
pub struct Download {
    upstream: Arc<Upstream>,
    source: Source,
    body: Option<Incoming>,
    head: Head,
    /// New bytes that came in one chunk with the last of those read again.
    pending: Option<Bytes>,
    /// How many bytes have been taken.
    position: u64,
    mends: u32,
    fruitless: u32,
}

/// Where an archive comes from, and what the client's request adds.
#[derive(Clone, Debug)]
pub struct Source {
    /// The stable URL: redirects start from it each time.
    pub url: Url,
    /// Headers to send.
    pub headers: HeaderMap,
    /// Whether the headers hold one client's credentials.
    pub private: bool,
}

/// What the first answer said.
#[derive(Clone, Debug, Default)]
pub struct Head {
    /// The whole archive's length, if upstream told it.
    pub length: Option<u64>,
    pub headers: HeaderMap,
}

/// What came of asking for an archive.
pub enum Opened {
    Archive(Box<Download>),
    /// Upstream answered otherwise: an error status, as it stands.
    Refused(Response<Incoming>),
}

/// What a download comes to next.
pub enum Step {
    Bytes(Bytes),
    /// The body stopped short (or was not asked for yet): [`Download::mend`] goes on.
    Cut(Option<Error>),
    End,
}

impl Download {
    /// Asks for the whole archive.
    pub async fn open(upstream: &Arc<Upstream>, source: Source) -> Result<Opened, Error> {
        let response = request(upstream, &source, None).await?;
        let status = response.status();
        if status.is_client_error() || status.is_server_error() {
            return Ok(Opened::Refused(response));
        }
        if status != StatusCode::OK {
            let what = shown_url(&source.url);
            return Err(Error::new(
                Kind::Nonsense,
                format!(
                    "{what}: upstream answered {} to a plain GET; try again later",
                    status.as_u16()
                ),
            ));
        }
        let (parts, body) = response.into_parts();
        let head = Head {
            length: length(&parts.headers),
            headers: parts.headers,
        };
        Ok(Opened::Archive(Box::new(Self {
            upstream: upstream.clone(),
            source,
            body: Some(body),
            head,
            pending: None,
            position: 0,
            mends: 0,
            fruitless: 0,
        })))
    }

    /// Goes on where another download of the same source was at `position`; nothing is asked yet.
    pub fn continue_from(
        upstream: &Arc<Upstream>,
        source: Source,
        head: Head,
        position: u64,
    ) -> Self {
        Self {
            upstream: upstream.clone(),
            source,
            body: None,
            head,
            pending: None,
            position,
            mends: 0,
            fruitless: 0,
        }
    }

    pub fn head(&self) -> &Head {
        &self.head
    }

    pub fn url(&self) -> &Url {
        &self.source.url
    }

    /// The headers that hold credentials; empty where there are none.
    pub fn credentials(&self) -> HeaderMap {
        match self.source.private {
            true => self.source.headers.clone(),
            false => HeaderMap::new(),
        }
    }

    /// Whether it is one client's own.
    pub fn is_private(&self) -> bool {
        self.source.private
    }

    pub fn position(&self) -> u64 {
        self.position
    }

    /// What comes next. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Step, Error> {
        if let Some(bytes) = self.pending.take() {
            return self.take(bytes).map(Step::Bytes);
        }
        let Some(body) = &mut self.body else {
            return Ok(Step::Cut(None));
        };
        let cause = match chunk(body, IDLE, &self.source.url).await {
            Ok(Some(bytes)) => return self.take(bytes).map(Step::Bytes),
            Ok(None) if self.is_whole() => return Ok(Step::End),
            Ok(None) => Error::new(
                Kind::Incomplete,
                format!("{}: ended early", shown_url(&self.source.url)),
            ),
            Err(e) => e,
        };
        self.body = None;
        Ok(Step::Cut(Some(cause)))
    }

    /// Goes on after a cut. `taken` has hashed all bytes up to here.
    ///
    /// # Errors
    /// When there is no going on: upstream is gone, or sends other bytes than before.
    pub async fn mend(&mut self, cause: Option<Error>, taken: &Hasher) -> Result<(), Error> {
        if let Some(cause) = cause {
            if !cause.is_transient() || self.mends == ALL_MENDS || self.fruitless == FRUITLESS_MENDS
            {
                return Err(cause);
            }
            tracing::info!(url = %shown_url(&self.source.url), at = self.position, %cause, "resuming");
            self.mends += 1;
            self.fruitless += 1;
            METRICS.resumes.inc();
        }
        loop {
            match self.resume(taken).await {
                Ok(body) => {
                    self.body = Some(body);
                    return Ok(());
                }
                Err(e) if e.is_transient() && self.fruitless < FRUITLESS_MENDS => {
                    self.fruitless += 1;
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn take(&mut self, bytes: Bytes) -> Result<Bytes, Error> {
        self.position += bytes.len() as u64;
        self.fruitless = 0;
        METRICS.upstream_bytes.inc_by(bytes.len() as u64);
        match self.head.length {
            Some(length) if self.position > length => Err(self.changed("is longer than announced")),
            _ => Ok(bytes),
        }
    }

    fn is_whole(&self) -> bool {
        self.head
            .length
            .is_none_or(|length| length == self.position)
    }

    /// A body that stands at `position`.
    async fn resume(&mut self, taken: &Hasher) -> Result<Incoming, Error> {
        if let Some(validator) = self.validator().filter(|_| self.position > 0) {
            let response = request(
                &self.upstream,
                &self.source,
                Some((self.position, validator)),
            )
            .await?;
            match response.status() {
                StatusCode::PARTIAL_CONTENT if self.fits(response.headers()) => {
                    return Ok(response.into_body());
                }
                StatusCode::OK => return self.start_over(response, taken).await,
                // A range that was not asked for, or none: the plain request decides.
                StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {}
                _ => return Err(self.refused(&response)),
            }
        }
        let response = request(&self.upstream, &self.source, None).await?;
        match response.status() {
            StatusCode::OK => self.start_over(response, taken).await,
            _ => Err(self.refused(&response)),
        }
    }

    /// Reads what was already taken once more, and lets it pass only if it is the same.
    async fn start_over(
        &mut self,
        response: Response<Incoming>,
        taken: &Hasher,
    ) -> Result<Incoming, Error> {
        if let (Some(old), Some(new)) = (self.head.length, length(response.headers()))
            && old != new
        {
            return Err(self.changed("has another length now"));
        }
        let mut body = response.into_body();
        let mut again = Hasher::default();
        let mut left = self.position;
        while left > 0 {
            let Some(mut bytes) = chunk(&mut body, IDLE, &self.source.url).await? else {
                return Err(self.changed("is shorter now"));
            };
            METRICS.upstream_bytes.inc_by(bytes.len() as u64);
            if bytes.len() as u64 > left {
                let rest = bytes.split_off(left as usize);
                again.update(&bytes);
                self.proven(&again, taken)?;
                self.pending = Some(rest);
                return Ok(body);
            }
            again.update(&bytes);
            left -= bytes.len() as u64;
        }
        self.proven(&again, taken)?;
        Ok(body)
    }

    fn proven(&self, again: &Hasher, taken: &Hasher) -> Result<(), Error> {
        if again.so_far() == taken.so_far() {
            return Ok(());
        }
        Err(self.changed("has other bytes now"))
    }

    fn validator(&self) -> Option<HeaderValue> {
        let strong_etag = self
            .head
            .headers
            .get(ETAG)
            .filter(|etag| etag.as_bytes().starts_with(b"\""));
        strong_etag
            .or_else(|| self.head.headers.get(LAST_MODIFIED))
            .cloned()
    }

    /// Whether a 206 is the rest of the same archive: from here to the announced end.
    fn fits(&mut self, headers: &HeaderMap) -> bool {
        let Some((start, end, total)) = content_range(headers) else {
            return false;
        };
        // Without any word on the whole length, nobody could tell the end from a cut.
        let Some(length) = self.head.length.or(total) else {
            return false;
        };
        let same = match (self.head.headers.get(ETAG), headers.get(ETAG)) {
            (Some(old), Some(new)) => old == new,
            _ => true,
        };
        let fits = same
            && start == self.position
            && end + 1 == length
            && total.is_none_or(|total| total == length);
        if fits {
            self.head.length = Some(length);
        }
        fits
    }

    fn refused(&self, response: &Response<Incoming>) -> Error {
        let status = response.status();
        let kind = if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            Kind::Incomplete
        } else {
            Kind::Contradiction
        };
        Error::new(
            kind,
            format!(
                "{}: upstream answered {} when the rest was asked for",
                shown_url(&self.source.url),
                status.as_u16()
            ),
        )
    }

    fn changed(&self, how: &str) -> Error {
        Error::new(
            Kind::Contradiction,
            format!(
                "{}: changed while it was downloaded: it {how}; try again",
                shown_url(&self.source.url)
            ),
        )
    }
}

async fn request(
    upstream: &Upstream,
    source: &Source,
    from: Option<(u64, HeaderValue)>,
) -> Result<Response<Incoming>, Error> {
    let mut headers = source.headers.clone();
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    if let Some((position, validator)) = from {
        let range = HeaderValue::from_str(&format!("bytes={position}-"))
            .expect("digits are a header value");
        headers.insert(RANGE, range);
        headers.insert(IF_RANGE, validator);
    }
    upstream
        .ask(&Ask {
            method: Method::GET,
            url: &source.url,
            headers,
            deadline: Instant::now() + HEAD_DEADLINE,
            patience: HEAD_PATIENCE,
            follow: true,
            purpose: "archive",
        })
        .await
}

/// The announced length; none where it is absent or no number.
pub fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// `bytes FIRST-LAST/TOTAL` (RFC 9110 section 14.4).
fn content_range(headers: &HeaderMap) -> Option<(u64, u64, Option<u64>)> {
    let value = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = value.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    let total = match total {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    (first <= last && last < u64::MAX && total.is_none_or(|total| last < total))
        .then_some((first, last, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_read() {
        let read = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_RANGE, value.parse().expect("a header value"));
            content_range(&headers)
        };
        assert_eq!(read("bytes 5-9/10"), Some((5, 9, Some(10))));
        assert_eq!(read("bytes 5-9/*"), Some((5, 9, None)));
        for bad in [
            "5-9/10",
            "bytes 9-5/10",
            "bytes 5-10/10",
            "bytes */10",
            "bytes 5-9",
            "bytes a-b/c",
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
