//! Remote service discovery: where a host's registries lie.

use std::sync::Arc;

use hyper::StatusCode;
use hyper::header::{ACCEPT, HeaderMap, HeaderValue, LOCATION};
use url::Url;

use super::Cache;
use super::document::Document;
use super::metadata::{Answer, Wish};
use crate::config::{Authority, Tunnels};
use crate::error::{Error, Kind as ErrorKind};
use crate::terraform::address::Subject;
use crate::terraform::own::Service;
use crate::terraform::registry::service_url;
use crate::terraform::route::Kind;
use crate::upstream::{is_redirect, shown_url};

/// Which hosts may be asked because a document or a client names them.
#[derive(Clone, Debug, Default)]
pub struct Hosts {
    pub mirrors: Tunnels,
    pub tunnels: Tunnels,
    pub intercepted: Vec<Authority>,
    /// Private registries of this larder
    pub own: Vec<Authority>,
}

impl Hosts {
    /// Where `mirror_hosts` lists hosts, it alone decides; else what may be tunnelled to, and what is
    /// intercepted, though not on its other ports.
    fn permit(&self, host: &Authority) -> bool {
        let on_another_port = self.intercepted.iter().any(|one| one.host == host.host);
        let reached = self.intercepted.contains(host)
            || self.mirrors.names(host)
            || self.tunnels.permits(host) && !on_another_port;
        self.own.contains(host) || self.mirrors.permits(host) && reached
    }
}

/// As many as Terraform follows.
const REDIRECTS: usize = 3;

impl Cache {
    /// Where `service` of `host` lies.
    ///
    /// # Errors
    /// `NotFound` where the host says that it does not offer it; else what kept it from saying so.
    pub async fn service(&self, host: &Authority, service: Service) -> Result<Url, Error> {
        let (base, document) = self.discovery(host).await?;
        let none = || {
            Error::new(
                ErrorKind::NotFound,
                format!("{host} offers no {} registry", service.id()),
            )
        };
        if document.status != StatusCode::OK {
            return Err(none());
        }
        match service_url(&base, &document.body, service.id()) {
            Ok(url) => {
                let url = url.ok_or_else(none)?;
                self.permit(host, &url)?;
                Ok(url)
            }
            Err(why) => Err(Error::new(
                ErrorKind::Nonsense,
                format!("{}: {why}; tell who runs it", shown_url(&base)),
            )),
        }
    }

    /// Whether a host may be asked because a client or a document names it.
    ///
    /// # Errors
    /// `Denied`.
    pub fn may_ask(&self, host: &Authority) -> Result<(), Error> {
        if self.hosts.permit(host) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Denied,
            format!(
                "{host} is not asked for others (config keys `mirror_hosts`, `tunnel`){}",
                self.sources().judge.policy.whom_to_ask()
            ),
        ))
    }

    /// Whether `host` may lead larder to `url`.
    fn permit(&self, host: &Authority, url: &Url) -> Result<(), Error> {
        match Authority::of(url).filter(|there| there != host) {
            Some(there) => self.may_ask(&there),
            None => Ok(()),
        }
    }

    /// Whether rules, where some are set, can tell what a document of `host` at `url` is of.
    ///
    /// # Errors
    /// `Policy`, where its registry lies at an address by which they cannot.
    pub fn reach_of_rules(&self, host: &Authority, url: &Url, kind: Kind) -> Result<(), Error> {
        let policy = &self.sources().judge.policy;
        let ruled = policy.restricts() || policy.wants_signatures();
        if !ruled || !matches!(kind, Kind::VersionList | Kind::Download) {
            return Ok(());
        }
        let subject = Subject::of(url, kind);
        let named = subject.as_ref().and_then(|subject| subject.names.first());
        match named == Some(&host.in_https_url()) {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::Policy,
                format!(
                    "{host}: refused, since rules are set (verify, allow, deny, min_age) and its registry lies where they do not reach{}",
                    policy.whom_to_ask()
                ),
            )),
        }
    }

    /// A host's discovery document, and the URL at which it was found in the end.
    pub async fn discovery(&self, host: &Authority) -> Result<(Url, Arc<Document>), Error> {
        let at = format!("https://{host}/.well-known/terraform.json");
        let mut url = Url::parse(&at)
            .map_err(|_| Error::new(ErrorKind::NotFound, format!("{host} is no host")))?;
        for _ in 0..=REDIRECTS {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
            let wish = Wish {
                url: url.clone(),
                kind: Kind::Discovery,
                headers,
                reload: false,
            };
            let Answer::Document(document, _) = self.metadata.get(&wish).await? else {
                break;
            };
            let status = document.status;
            if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() {
                return Err(Error::new(
                    ErrorKind::Incomplete,
                    format!(
                        "{}: upstream answered {}, also when asked again; try again later",
                        shown_url(&url),
                        status.as_u16()
                    ),
                ));
            }
            if !is_redirect(status) {
                return Ok((url, document));
            }
            let location = document.headers.get(LOCATION);
            let next = location.and_then(|to| url.join(to.to_str().ok()?).ok());
            match next.filter(|next| next.scheme() == "https") {
                Some(next) => {
                    self.permit(host, &next)?;
                    url = next;
                }
                None => break,
            }
        }
        Err(Error::new(
            ErrorKind::Nonsense,
            format!(
                "{}: too large, or redirected without end or to no https URL",
                shown_url(&url)
            ),
        ))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn listed(patterns: &[&str]) -> Tunnels {
        let patterns = patterns.iter().map(|pattern| pattern.parse().unwrap());
        Tunnels::new(patterns.collect()).unwrap()
    }

    #[test]
    fn a_list_of_mirrors_decides_alone_and_without_one_tunnels_do() {
        let permits = |mirrors: &[&str], tunnels: &[&str], host: &str| {
            let hosts = Hosts {
                mirrors: listed(mirrors),
                tunnels: listed(tunnels),
                intercepted: vec!["r.example".parse().unwrap()],
                own: vec!["own.example".parse().unwrap()],
            };
            hosts.permit(&host.parse().unwrap())
        };
        for (mirrors, tunnels, host, permitted) in [
            (&[][..], &[][..], "any.example", true),
            (&[], &[], "r.example", true),
            (&[], &[], "r.example:8443", false),
            (&[], &["deny"], "r.example", true),
            (&[], &["deny"], "any.example", false),
            (&[], &["a.example"], "a.example", true),
            (&["a.example"], &["deny"], "a.example", true),
            (&["a.example"], &[], "r.example", false),
            (&["r.example:8443"], &[], "r.example:8443", true),
            (&["a.example"], &["deny"], "own.example", true),
            (&["deny"], &[], "r.example", false),
        ] {
            assert_eq!(
                permits(mirrors, tunnels, host),
                permitted,
                "{mirrors:?} {tunnels:?} {host}"
            );
        }
    }
}
