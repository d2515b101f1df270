//! Ways to a registry without interception: by a page that names its host, and on larder's own TLS
//! names. They lead to the same documents and archives; only the URLs in the documents differ, and
//! fit the address by which the client reached larder.

use hyper::body::Incoming;
use hyper::header::{
    AUTHORIZATION, CONTENT_SECURITY_POLICY, COOKIE, HOST, HeaderName, HeaderValue, LOCATION,
    SET_COOKIE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Method, Request, StatusCode, Uri};
use serde_json::json;
use url::Url;

use super::{Asking, Base, Way};
use crate::config::Authority;
use crate::error::{Error, Kind as ErrorKind};
use crate::server::access::Seal;
use crate::server::connection::Peer;
use crate::server::respond::Answer;
use crate::terraform::own::{RegistryPage, Service, registry_page, service_page};
use crate::terraform::route::{Kind, check_path, is_mistaken, route};
use crate::upstream::no_body;

/// What others wrote is no page of larder's, whatever it says it is.
const NO_PAGE: [(HeaderName, &str); 2] = [
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (CONTENT_SECURITY_POLICY, "sandbox"),
];

/// Answers for a path below `/registry/`.
///
/// # Errors
/// `NotFound` for what is not well-formed, before anybody is asked; else as for the host itself.
pub async fn by_name(peer: &Peer, request: Request<Incoming>) -> Result<Answer, Error> {
    let path = request.uri().path().to_owned();
    let rest = path.strip_prefix("/registry/").unwrap_or_default();
    let page = check_path(&path).ok().and_then(|()| registry_page(rest));
    let Some((host, page)) = page else {
        return Err(malformed(
            &path,
            "/registry/HOST/v1/providers/NAMESPACE/TYPE/versions",
        ));
    };
    let (request, seal) = admit(peer, request).await?;
    peer.entrance.server.cache.may_ask(&host)?;
    let segment = rest.split('/').next().unwrap_or_default();
    let prefix = format!("{}/registry/{segment}", own_address(peer, &request)?);
    let base = Base {
        prefix,
        service: None,
        seal,
    };
    answer(peer, request, host, page, base).await
}

/// Answers as the private registry whose host is the name by which this client reached larder over
/// TLS; none where there is no such registry.
pub async fn private(
    peer: &Peer,
    request: Request<Incoming>,
) -> Result<Result<Answer, Error>, Request<Incoming>> {
    let config = &peer.entrance.server.config;
    let named = named_authority(&request);
    let registry = named
        .as_ref()
        .filter(|_| peer.tls)
        .and_then(|named| config.registry_reached_as(named));
    let Some(host) = registry.map(|registry| registry.host.clone()) else {
        return Err(request);
    };
    Ok(async {
        let path = request.uri().path();
        let page = check_path(path).ok().and_then(|()| service_page(path));
        let page = page.ok_or_else(|| malformed(path, "/v1/providers/NAMESPACE/TYPE/versions"))?;
        let (request, seal) = admit(peer, request).await?;
        let base = Base {
            prefix: own_address(peer, &request)?,
            service: None,
            seal,
        };
        answer(peer, request, host, page, base).await
    }
    .await)
}

async fn answer(
    peer: &Peer,
    request: Request<Incoming>,
    host: Authority,
    page: RegistryPage,
    mut base: Base,
) -> Result<Answer, Error> {
    let cache = &peer.entrance.server.cache;
    let (mut parts, _) = request.into_parts();
    if !matches!(parts.method, Method::GET | Method::HEAD) {
        let words = format!("{} can only be read; use GET", parts.uri.path());
        return Err(Error::new(ErrorKind::BadRequest, words));
    }
    let (url, kind) = match page {
        RegistryPage::Discovery => return discovery(peer, &host, &base).await,
        RegistryPage::Service {
            service,
            rest,
            kind,
        } => {
            let address = cache.service(&host, service).await?;
            let joined = Url::parse(&format!("{address}{rest}")).ok();
            // Nothing of what was asked for leads out of the service.
            let within = joined.filter(|url| url.as_str().starts_with(address.as_str()));
            let url = within.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such page"))?;
            base.service = Some((address, service.path()));
            let fixed = matches!(
                kind,
                Some(Kind::VersionList | Kind::Download | Kind::ModuleVersions)
            );
            if !fixed && is_mistaken(url.path(), Kind::Other) {
                let words = format!(
                    "{host}: its {} lies where something else does",
                    service.id()
                );
                return Err(Error::new(ErrorKind::NotFound, words));
            }
            // A module's files are files, whatever they are called.
            let kind = kind.unwrap_or(match route(url.path()) {
                Kind::Archive => Kind::Archive,
                _ => Kind::Other,
            });
            (url, Some(kind))
        }
        RegistryPage::Named(path) => {
            let mut url = cache.service(&host, Service::Providers).await?;
            // It is looked up, and asks for nothing by itself.
            url.set_path(&path);
            (url, None)
        }
    };
    let authority = Authority::of(&url);
    let authority =
        authority.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("{host} has no host")))?;
    cache.reach_of_rules(&host, &url, kind.unwrap_or(Kind::Other))?;
    parts.uri = with_query(&url, parts.uri.query())?;
    // Cookies know no ports: a browser's are those of other services on this machine.
    parts.headers.remove(COOKIE);
    let asking = Asking {
        peer: peer.clone(),
        authority,
        parts,
        way: Way::Pages(base),
        kind,
    };
    let mut answer = asking.answer(no_body()).await?;
    let headers = answer.response.headers_mut();
    headers.remove(SET_COOKIE);
    for (name, value) in NO_PAGE {
        headers.insert(name, HeaderValue::from_static(value));
    }
    // What is relative would lead to larder.
    let location = headers.get(LOCATION).and_then(|to| to.to_str().ok());
    if let Some(absolute) = location.and_then(|to| url.join(to).ok())
        && let Ok(value) = absolute.as_str().try_into()
    {
        headers.insert(LOCATION, value);
    }
    Ok(answer)
}

/// The path of `url`, and of a client's own query what is not larder's.
fn with_query(url: &Url, query: Option<&str>) -> Result<Uri, Error> {
    let bad = |_| Error::new(ErrorKind::BadRequest, "the path cannot be asked for");
    let query = query.map(Seal::without).unwrap_or_default();
    match &*query {
        "" => url.path().parse().map_err(bad),
        query => format!("{}?{query}", url.path()).parse().map_err(bad),
    }
}

/// A discovery document whose registries are larder's pages.
async fn discovery(peer: &Peer, host: &Authority, base: &Base) -> Result<Answer, Error> {
    let cache = &peer.entrance.server.cache;
    let (at, document) = cache.discovery(host).await?;
    if !document.status.is_success() {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("{host} has no registry"),
        ));
    }
    let services: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&document.body).unwrap_or_default();
    let services: serde_json::Map<_, _> = services
        .into_iter()
        .map(|(id, value)| {
            let own = [Service::Providers, Service::Modules];
            let own = own.iter().find(|service| service.id() == id);
            let value = match (own, value.as_str()) {
                (Some(service), _) => json!(format!("{}{}", base.prefix, service.path())),
                // Relative ones are the host's own.
                (None, Some(reference)) => at.join(reference).map_or(value, |url| json!(url)),
                (None, None) => value,
            };
            (id, value)
        })
        .collect();
    Ok(Answer::json(StatusCode::OK, &services.into()))
}

/// Lets pass who may use the proxy. What larder itself was told of credentials stays behind.
pub(super) async fn admit(
    peer: &Peer,
    mut request: Request<Incoming>,
) -> Result<(Request<Incoming>, Option<Seal>), Error> {
    let foreign = request
        .headers()
        .get("sec-fetch-site")
        .map(|site| site.as_bytes());
    if foreign.is_some_and(|site| !matches!(site, b"none" | b"same-origin")) {
        let words = "a page of another site may not ask registries through larder";
        return Err(Error::new(ErrorKind::Denied, words));
    }
    let access = &peer.entrance.server.access;
    let (path, query) = (request.uri().path(), request.uri().query());
    access
        .authorize_page(
            peer.addr.ip(),
            peer.standing,
            peer.certified,
            request.headers(),
            (path, query),
        )
        .await?;
    let seal = access.seal();
    if seal.is_some() {
        request.headers_mut().remove(AUTHORIZATION);
    }
    Ok((request, seal))
}

pub(super) fn malformed(path: &str, wanted: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("{path}: no such page; it would be {wanted}"),
    )
}

/// The scheme and authority by which this client reached larder.
fn own_address(peer: &Peer, request: &Request<Incoming>) -> Result<String, Error> {
    let scheme = if peer.tls { "https" } else { "http" };
    let named = request.uri().authority().map(|a| a.as_str().to_owned());
    let named = named.or_else(|| {
        let host = request.headers().get(HOST)?;
        host.to_str().ok().map(str::to_owned)
    });
    let named = named.unwrap_or_else(|| peer.entrance.local.to_string());
    let sound = !named.contains('@') && named.parse::<Authority>().is_ok();
    match sound {
        true => Ok(format!("{scheme}://{named}")),
        false => Err(Error::new(ErrorKind::BadRequest, "Host is no host")),
    }
}

fn named_authority(request: &Request<Incoming>) -> Option<Authority> {
    let named = request.uri().authority().map(|a| a.as_str());
    let host = request.headers().get(HOST).and_then(|h| h.to_str().ok());
    named.or(host)?.parse().ok()
}

impl Base {
    /// The URL of a path below, for this client.
    pub(super) fn url(&self, path: &str) -> String {
        let url = format!("{}{path}", self.prefix);
        let (Some(seal), Ok(parsed)) = (&self.seal, Url::parse(&url)) else {
            return url;
        };
        // Of `PATH//FOLDER` clients fetch PATH and look for the folder in it.
        let fetched = match parsed.path().split_once("//") {
            Some((fetched, _)) => fetched,
            None => parsed.path(),
        };
        let mark = if url.contains('?') { '&' } else { '?' };
        format!("{url}{mark}{}", seal.query(fetched))
    }
}
