//! A provider as the network mirror protocol shows it: its versions, and of each version the
//! archives with their hashes.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt as _};
use hyper::StatusCode;
use hyper::header::{ACCEPT, HeaderMap, HeaderValue, LOCATION};
use tokio::time::timeout;
use url::Url;

use super::document::Document;
use super::metadata::{Answer, Wish};
use super::{Cache, expect::Expected};
use crate::config::Authority;
use crate::digest::Digest;
use crate::error::{Error, Kind as ErrorKind};
use crate::terraform::address::Subject;
use crate::terraform::own::{ArchiveName, Service, is_version};
use crate::terraform::registry::Download;
use crate::terraform::route::Kind;
use crate::terraform::versions::{Listed, listed};
use crate::upstream::{is_redirect, shown_url};

/// Clients give up after 10 s.
const DEADLINE: Duration = Duration::from_secs(7);
const REDIRECTS: usize = 4;
/// Documents of one version that are asked for at once.
const AT_ONCE: usize = 4;
/// Whose document is asked for first: of it alone, where that is enough.
const LIKELIEST: &str = "linux_amd64";

/// A provider by its address.
#[derive(Clone, Debug)]
pub struct Provider {
    pub host: Authority,
    pub namespace: String,
    pub name: String,
}

/// An archive of one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirrored {
    pub file: ArchiveName,
    /// `h1:…` where it is held and known, and `zh:…`
    pub hashes: Vec<String>,
}

impl Cache {
    /// The versions that users may have.
    ///
    /// # Errors
    /// `NotFound` where the registry has no such provider, `Withheld` where the rules leave none.
    pub async fn mirrored_versions(
        self: &Arc<Self>,
        provider: &Provider,
    ) -> Result<Vec<Listed>, Error> {
        let service = self.service(&provider.host, Service::Providers).await?;
        let reference = format!("{}/{}/versions", provider.namespace, provider.name);
        let url = below(&service, &reference)?;
        self.reach_of_rules(&provider.host, &url, Kind::VersionList)?;
        let document = self.asked_for(&url, Kind::VersionList).await?;
        let all = listed(Kind::VersionList, &document.body);
        let mut all = all.ok_or_else(|| {
            let words = format!("{}: not a list of versions", shown_url(&url));
            Error::new(ErrorKind::Nonsense, words)
        })?;
        all.retain(|one| is_version(&one.version));
        let hidden = self.hidden(&url, Kind::VersionList, all.clone(), false);
        if let Some(hidden) = hidden.await {
            if hidden.all {
                let words = hidden.warning.trim_start_matches("larder ");
                return Err(Error::new(ErrorKind::Withheld, words));
            }
            all.retain(|one| !hidden.versions.contains(&one.version));
        }
        Ok(all)
    }

    /// The archives of a version, one a platform.
    ///
    /// # Errors
    /// `NotFound` where there is no such version, or what the rules or contradictions say against it.
    pub async fn mirrored_archives(
        self: &Arc<Self>,
        provider: &Provider,
        version: &str,
    ) -> Result<Vec<Mirrored>, Error> {
        let found = timeout(DEADLINE, self.find_archives(provider, version)).await;
        found.unwrap_or_else(|_| {
            Err(Error::new(
                ErrorKind::Timeout,
                format!("{provider} {version}: upstream did not answer in time; try again later"),
            ))
        })
    }

    async fn find_archives(
        self: &Arc<Self>,
        provider: &Provider,
        version: &str,
    ) -> Result<Vec<Mirrored>, Error> {
        let all = self.mirrored_versions(provider).await?;
        let found = all.into_iter().find(|one| one.version == version);
        let found = found.ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("{provider} has no version {version}"),
            )
        })?;
        let mut platforms: Vec<ArchiveName> = found
            .platforms
            .iter()
            .filter_map(|platform| file_of(provider, version, platform))
            .collect();
        platforms.sort_by_key(|file| file.platform() != LIKELIEST);
        platforms.dedup();
        if platforms.is_empty() {
            platforms.extend(file_of(provider, version, LIKELIEST));
        }
        let mut failure = None;
        for file in &platforms {
            let found = match self.mirrored_download(provider, file).await {
                Ok(found) => found,
                // Another platform's may be there, or be held.
                Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Offline) => {
                    failure = failure.or(Some(e));
                    continue;
                }
                Err(e) => return Err(e),
            };
            return match self.listed_archives(&found, file, &platforms).await? {
                Some(mirrored) => Ok(mirrored),
                None => Ok(self.each_archive(provider, &platforms).await),
            };
        }
        let none = Error::new(ErrorKind::NotFound, format!("{provider} has no archives"));
        Err(failure.unwrap_or(none))
    }

    /// What the registry says of one archive, and the URL under which that is known here.
    ///
    /// # Errors
    /// As for [`Self::mirrored_archives`].
    pub async fn mirrored_download(
        self: &Arc<Self>,
        provider: &Provider,
        file: &ArchiveName,
    ) -> Result<(Arc<Download>, Url), Error> {
        let service = self.service(&provider.host, Service::Providers).await?;
        let url = below(
            &service,
            &format!(
                "{}/{}/{}/download/{}/{}",
                provider.namespace, provider.name, file.version, file.os, file.arch
            ),
        )?;
        self.reach_of_rules(&provider.host, &url, Kind::Download)?;
        if let Some(subject) = Subject::of(&url, Kind::Download) {
            self.admit_document(&subject).await?;
        }
        let document = self.asked_for(&url, Kind::Download).await?;
        let download = document.download.clone().ok_or_else(|| {
            Error::new(
                ErrorKind::Nonsense,
                format!("{}: not a download document", shown_url(&url)),
            )
        })?;
        let archive = self.named_archive(&document.base, &download.archive);
        Ok((download, archive))
    }

    /// The archives that the sums list beside the one of `download`; none where there are no sums.
    async fn listed_archives(
        &self,
        (download, archive): &(Arc<Download>, Url),
        file: &ArchiveName,
        platforms: &[ArchiveName],
    ) -> Result<Option<Vec<Mirrored>>, Error> {
        let Some(sums_url) = &download.sums else {
            return Ok(None);
        };
        let sources = self.sources();
        let ask = !self.upstream.is_offline(sums_url);
        let vouched = sources.vouch(archive, &HeaderMap::new(), ask).await;
        sources.content(archive, &vouched, download.digest())?;
        let Some(sums) = sources.metadata.held_sums(sums_url).await else {
            return Ok(None);
        };
        if let Expected::Contradiction(_, why) = sources.expected(archive).await {
            return Err(Error::new(
                ErrorKind::Contradiction,
                format!("{}: refused: {why}", shown_url(archive)),
            ));
        }
        // As the sums name this one, so they name the others.
        let own = file.platform();
        let archives = platforms.iter().filter_map(|other| {
            let name = match download.filename.contains(&own) {
                true => download.filename.replace(&own, &other.platform()),
                false => other.to_string(),
            };
            let digest = sums.digest_of(&name)?;
            Some(self.mirrored(other, digest))
        });
        Ok(Some(archives.collect()))
    }

    /// By each platform's own document.
    async fn each_archive(
        self: &Arc<Self>,
        provider: &Provider,
        platforms: &[ArchiveName],
    ) -> Vec<Mirrored> {
        let asked = platforms.iter().map(|file| {
            let (this, provider, file) = (self.clone(), provider.clone(), file.clone());
            async move {
                let (download, _) = this.mirrored_download(&provider, &file).await.ok()?;
                Some(this.mirrored(&file, download.digest()?))
            }
        });
        let asked: Vec<_> = asked.collect();
        let found = stream::iter(asked).buffered(AT_ONCE);
        found.filter_map(|one| async { one }).collect().await
    }

    fn mirrored(&self, file: &ArchiveName, digest: Digest) -> Mirrored {
        let mut hashes: Vec<String> = self.store.h1(digest).into_iter().collect();
        hashes.push(format!("zh:{digest}"));
        Mirrored {
            file: file.clone(),
            hashes,
        }
    }

    /// A registry's document, whose absence is an error.
    async fn asked_for(&self, url: &Url, kind: Kind) -> Result<Arc<Document>, Error> {
        let mut url = url.clone();
        let policy = &self.sources().judge.policy;
        // Rules go by the address of the document: they do not follow it elsewhere.
        let ruled = policy.restricts() || policy.wants_signatures();
        for _ in 0..REDIRECTS {
            let document = self.asked_once(&url, kind).await?;
            let location = document.headers.get(LOCATION).filter(|_| !ruled);
            let next = location.and_then(|to| url.join(to.to_str().ok()?).ok());
            // Who may be asked was judged by the host.
            let same = |next: &Url| Authority::of(next) == Authority::of(&url);
            match next.filter(|next| is_redirect(document.status) && same(next)) {
                Some(next) => url = next,
                None => return answered(&url, document),
            }
        }
        let words = format!("{}: redirected without end", shown_url(&url));
        Err(Error::new(ErrorKind::Nonsense, words))
    }

    async fn asked_once(&self, url: &Url, kind: Kind) -> Result<Arc<Document>, Error> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        let wish = Wish {
            url: url.clone(),
            kind,
            headers,
            reload: false,
        };
        match self.metadata.get(&wish).await? {
            Answer::Document(document, _) => Ok(document),
            Answer::TooLarge => {
                let words = format!("{}: larger than max_metadata_size", shown_url(url));
                Err(Error::new(ErrorKind::Nonsense, words))
            }
        }
    }
}

fn answered(url: &Url, document: Arc<Document>) -> Result<Arc<Document>, Error> {
    let status = document.status;
    match status {
        StatusCode::OK => Ok(document),
        StatusCode::NOT_FOUND
        | StatusCode::GONE
        | StatusCode::UNAUTHORIZED
        | StatusCode::FORBIDDEN => Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "{}: the registry answers {} to whoever asks without credentials",
                shown_url(url),
                status.as_u16()
            ),
        )),
        status => Err(Error::new(
            ErrorKind::Incomplete,
            format!(
                "{}: upstream answered {}; try again later",
                shown_url(url),
                status.as_u16()
            ),
        )),
    }
}

impl std::fmt::Display for Provider {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let host = self.host.in_https_url();
        write!(f, "{host}/{}/{}", self.namespace, self.name)
    }
}

fn file_of(provider: &Provider, version: &str, platform: &str) -> Option<ArchiveName> {
    let name = &provider.name;
    ArchiveName::parse(&format!(
        "terraform-provider-{name}_{version}_{platform}.zip"
    ))
}

fn below(service: &Url, reference: &str) -> Result<Url, Error> {
    let url = service.join(reference);
    url.map_err(|_| Error::new(ErrorKind::NotFound, format!("{reference}: no such page")))
}
