//! Bodies of documents: read within bounds, and freed of codings that were not asked for.

use std::io::Read as _;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper::body::Incoming;
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap};
use url::Url;

use crate::error::Error;
use crate::upstream::chunk;

/// Between two chunks.
const IDLE: Duration = Duration::from_secs(7);

/// Reads a body; none where it is over the limit.
pub async fn read_body(
    mut body: Incoming,
    url: &Url,
    limit: usize,
) -> Result<Option<Bytes>, Error> {
    let mut bytes = BytesMut::new();
    while let Some(next) = chunk(&mut body, IDLE, url).await? {
        if bytes.len() + next.len() > limit {
            return Ok(None);
        }
        bytes.extend_from_slice(&next);
    }
    Ok(Some(bytes.freeze()))
}

/// Undoes a coding that was not asked for. None where the result is over the limit.
pub fn decode(headers: &HeaderMap, body: Bytes, limit: usize) -> Result<Option<Bytes>, String> {
    let coding = headers
        .get(CONTENT_ENCODING)
        .map_or("identity", |value| value.to_str().unwrap_or("?"));
    match coding.trim().to_ascii_lowercase().as_str() {
        "" | "identity" => Ok(Some(body)),
        "gzip" | "x-gzip" => {
            let mut out = Vec::new();
            flate2::read::MultiGzDecoder::new(&body[..])
                .take(limit as u64 + 1)
                .read_to_end(&mut out)
                .map_err(|e| format!("is no gzip, though it says so: {e}"))?;
            Ok((out.len() <= limit).then(|| out.into()))
        }
        other => Err(format!("is coded in {other}, which was not asked for")),
    }
}

/// Whether an answer says that it is for reading.
pub fn is_text(headers: &HeaderMap) -> bool {
    let kind = headers
        .get(CONTENT_TYPE)
        .map_or("", |value| value.to_str().unwrap_or_default());
    ["text/", "json", "xml", "pgp"]
        .iter()
        .any(|mark| kind.contains(mark))
}
