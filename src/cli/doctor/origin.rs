//! The hosts that are intercepted, asked as larder asks them; and the time that they say it is.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use hyper::header::{AGE, DATE, HeaderMap};
use hyper::{Request, StatusCode};
use tokio::time::Instant;

use super::super::serve;
use super::{Case, Finding};
use crate::config::{Authority, Config};
use crate::error::{Error, Exit};
use crate::upstream::{Upstream, no_body};

/// For all hosts, which are asked at once: name, connection, TLS and the head of an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Beyond that certificates and signed URLs are found invalid.
const CLOCK_LIMIT: Duration = Duration::from_secs(300);

/// A host and what came of asking it.
pub struct Origin {
    host: Authority,
    answer: Result<Answer, Error>,
}

struct Answer {
    status: StatusCode,
    took: Duration,
    /// Its clock less ours, in seconds
    ahead: Option<i64>,
}

/// Asks every intercepted host, unless offline.
///
/// # Errors
/// When larder could not even begin to ask: `serve` would not start.
pub async fn ask_all(config: &Config, own: Vec<SocketAddr>) -> Result<Vec<Origin>, Exit> {
    if config.offline {
        return Ok(Vec::new());
    }
    let upstream = serve::upstream(config, own, Default::default())?;
    let deadline = Instant::now() + PATIENCE;
    let asked = config.intercept.iter();
    let asked = asked.filter(|host| config.registry(host).is_none());
    let asking = asked.map(async |host| Origin {
        host: host.clone(),
        answer: ask(&upstream, host, deadline).await,
    });
    Ok(join_all(asking).await)
}

async fn ask(upstream: &Upstream, host: &Authority, deadline: Instant) -> Result<Answer, Error> {
    let path = match host.host.as_str() {
        "releases.hashicorp.com" => "/",
        _ => "/.well-known/terraform.json",
    };
    let mut request = Request::new(no_body());
    let uri = format!("https://{}{path}", host.in_https_url());
    *request.uri_mut() = uri.parse().map_err(|_| {
        let words = format!("{host}: not a host that can be asked; mend --intercept");
        Error::new(crate::error::Kind::BadRequest, words)
    })?;
    let start = Instant::now();
    let response = upstream.send(request, deadline, "doctor").await?;
    Ok(Answer {
        status: response.status(),
        took: start.elapsed(),
        ahead: ahead(response.headers(), SystemTime::now()),
    })
}

/// An answer out of a cache bears the time when it was made, and its age since (RFC 9111 section 5.1).
fn ahead(headers: &HeaderMap, now: SystemTime) -> Option<i64> {
    let date = httpdate::parse_http_date(headers.get(DATE)?.to_str().ok()?).ok()?;
    let age = headers
        .get(AGE)
        .and_then(|age| age.to_str().ok()?.parse().ok());
    let seconds = |time: SystemTime| {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        i64::try_from(since.as_secs()).ok()
    };
    Some(seconds(date)?.saturating_add(age.unwrap_or(0)) - seconds(now)?)
}

pub fn upstream(case: &Case) -> Vec<Finding> {
    if case.config.offline {
        return vec![Finding::ok("upstream", "not asked: larder is offline")];
    }
    match &case.upstream {
        Ok(origins) => origins.iter().map(judge).collect(),
        Err(exit) => vec![Finding::from_words("upstream", &exit.message)],
    }
}

fn judge(origin: &Origin) -> Finding {
    let check = format!("upstream {}", origin.host.in_https_url());
    let answer = match &origin.answer {
        Ok(answer) => answer,
        Err(e) => return Finding::from_words(&check, &e.to_string()),
    };
    let found = format!(
        "answers {} after {} ms",
        answer.status.as_u16(),
        answer.took.as_millis()
    );
    match answer.status.as_u16() {
        // A host without that page is there all the same.
        200..=399 | 404 => Finding::ok(&check, found),
        500.. => Finding::fail(
            &check,
            found,
            "try again later; what is held serves meanwhile",
        ),
        _ => Finding::warn(
            &check,
            found,
            "find out who refuses: the host itself, or a proxy or filter before it",
        ),
    }
}

pub fn clock(case: &Case) -> Vec<Finding> {
    let mend = "set this machine's clock (timedatectl set-ntp true)";
    if let Some(cert) = case.ca.cert.get()
        && SystemTime::now() < SystemTime::from(cert.not_before)
    {
        let found = format!(
            "it is {}, before the CA was made ({})",
            super::super::date(SystemTime::now()),
            super::super::date(cert.not_before.into())
        );
        return vec![Finding::fail("clock", found, mend)];
    }
    let origins = case.upstream.as_ref().map_or(&[][..], Vec::as_slice);
    let told = origins.iter().filter_map(|origin| {
        let answer = origin.answer.as_ref().ok()?;
        Some((answer.ahead?, &origin.host.host))
    });
    // One of them may be wrong itself.
    let Some((ahead, host)) = told.min_by_key(|(ahead, _)| ahead.unsigned_abs()) else {
        let found = "no host upstream said what time it is";
        return vec![Finding::ok("clock", found)];
    };
    let off = Duration::from_secs(ahead.unsigned_abs());
    let way = if ahead > 0 { "behind" } else { "ahead of" };
    let found = format!("{} s {way} {host}", off.as_secs());
    vec![match off > CLOCK_LIMIT {
        true => Finding::fail("clock", found, mend),
        false => Finding::ok("clock", found),
    }]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_age_of_an_answer_is_no_fault_of_the_clock() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let headers = |date: SystemTime, age: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(DATE, httpdate::fmt_http_date(date).parse().unwrap());
            if let Some(age) = age {
                headers.insert(AGE, age.parse().unwrap());
            }
            headers
        };
        let hour = Duration::from_secs(3600);
        for (date, age, expected) in [
            (now, None, 0),
            (now + hour, None, 3600),
            (now - hour, None, -3600),
            (now - hour, Some("3600"), 0),
            (now - hour, Some("nonsense"), -3600),
        ] {
            assert_eq!(ahead(&headers(date, age), now), Some(expected));
        }
        assert_eq!(ahead(&HeaderMap::new(), now), None);
    }
}
