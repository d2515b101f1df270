//! Whether users may have a version, by the lists `allow` and `deny` and by its age: for version
//! lists, download documents and archives alike.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt as _};
use hyper::header::{ACCEPT, HeaderMap, HeaderValue, LAST_MODIFIED};
use tokio::time::{Instant, timeout_at};
use url::Url;

use super::metadata::{Answer, Wish};
use super::sightings::{Book, Flight, Seen};
use super::{Cache, HeadOnly, url_key};
use crate::config::pattern::version_of;
use crate::error::{Error, Kind as ErrorKind};
use crate::sync::lock;
use crate::telemetry::METRICS;
use crate::terraform::address::Subject;
use crate::terraform::route::Kind;
use crate::terraform::versions::Listed;

/// Versions of one list that are asked about at once, and at most for one client.
const AT_ONCE: usize = 4;
const ASKED: usize = 12;
/// For all of them together: the client waits.
const PATIENCE: Duration = Duration::from_secs(4);

/// What came of asking for a version's date.
enum Asked {
    Date(u64),
    /// Upstream's answer bears none
    NoDate,
    InVain,
}

/// What a version list must not show, and why.
pub struct Hidden {
    pub versions: HashSet<String>,
    /// Whether nothing is left
    pub all: bool,
    /// For the user
    pub warning: String,
}

impl Cache {
    /// Which of the versions that a list names users may not have; none where they may have all. Of
    /// a `private` list, which a client's credentials brought, nothing is written down.
    pub async fn hidden(
        self: &Arc<Self>,
        list: &Url,
        kind: Kind,
        listed: Vec<Listed>,
        private: bool,
    ) -> Option<Hidden> {
        let policy = &self.sources().judge.policy;
        let subject = Subject::of(list, kind).filter(|_| policy.restricts())?;
        let names = subject.names();
        let mut reasons: HashMap<String, usize> = HashMap::new();
        let mut versions = HashSet::new();
        let mut left = Vec::new();
        let all = listed.len();
        for one in listed {
            match policy.judge(&names, Some(&one.version), subject.any_namespace) {
                Ok(()) => left.push(one),
                Err(rule) => {
                    *reasons.entry(rule).or_default() += 1;
                    versions.insert(one.version);
                }
            }
        }
        if let Some((age, pattern)) = policy.min_age(&names) {
            let young = self.young(list, kind, &subject, left, (age, private)).await;
            if !young.is_empty() {
                let rule = format!("the rule min_age = {} of \"{pattern}\"", shown(age));
                reasons.insert(rule, young.len());
                versions.extend(young);
            }
        }
        let mut reasons: Vec<String> = reasons
            .into_iter()
            .map(|(rule, count)| format!("{count} by {rule}"))
            .collect();
        reasons.sort();
        (!versions.is_empty()).then(|| Hidden {
            all: versions.len() >= all,
            versions,
            warning: format!(
                "larder hides versions of {}: {}{}",
                subject.address(),
                reasons.join(", "),
                policy.whom_to_ask()
            ),
        })
    }

    /// Whether users may have what `subject` names, a version of which the archive bears the date
    /// `modified` (seconds since 1970), if that is known.
    ///
    /// # Errors
    /// `Policy`, with the rule and whom to ask.
    pub async fn admit(&self, subject: &Subject, modified: Option<u64>) -> Result<(), Error> {
        let policy = &self.sources().judge.policy;
        if !policy.restricts() {
            return Ok(());
        }
        let names = subject.names();
        policy
            .judge(&names, subject.version.as_deref(), subject.any_namespace)
            .map_err(|rule| self.refusal(subject, &rule))?;
        let (Some((age, pattern)), Some(version)) = (policy.min_age(&names), &subject.version)
        else {
            return Ok(());
        };
        let now = now();
        let book = self.sightings.book(&subject.address()).await;
        let mut book = book.lock().await;
        let known = book.versions.contains_key(version);
        let seen = book.see(version, now);
        if let (Some(date), Some(seen)) = (modified, book.versions.get_mut(version))
            && seen.presumed_old
        {
            // Now it is known, for the list too.
            (seen.modified, seen.presumed_old) = (Some(date), false);
            self.sightings.keep(&book).await;
        } else if !known {
            self.sightings.keep(&book).await;
        }
        let old = now.saturating_sub(seen.born(modified));
        if old >= age.as_secs() {
            return Ok(());
        }
        let rule = format!(
            "the rule min_age = {} of \"{pattern}\" (it is {} old)",
            shown(age),
            shown(Duration::from_secs(old))
        );
        Err(self.refusal(subject, &rule))
    }

    /// The same for a version's document. A version of which nothing is known yet passes: its
    /// archive bears a date.
    pub async fn admit_document(&self, subject: &Subject) -> Result<(), Error> {
        let policy = &self.sources().judge.policy;
        policy
            .judge(
                &subject.names(),
                subject.version.as_deref(),
                subject.any_namespace,
            )
            .map_err(|rule| self.refusal(subject, &rule))?;
        let (Some(_), Some(version)) = (policy.min_age(&subject.names()), &subject.version) else {
            return Ok(());
        };
        let book = self.sightings.book(&subject.address()).await;
        let known = book.lock().await.versions.contains_key(version);
        match known {
            true => self.admit(subject, None).await,
            false => Ok(()),
        }
    }

    /// The same for an archive, by everything that is known to be in it.
    pub async fn admit_archive(
        &self,
        archive: &Url,
        headers: Option<&HeaderMap>,
    ) -> Result<(), Error> {
        if !self.sources().judge.policy.restricts() {
            return Ok(());
        }
        let modified = headers.and_then(modified);
        let mut subjects = self.sources().claimed_subjects(archive);
        let claimed = !subjects.is_empty();
        if !claimed {
            subjects = self.sources().subjects(archive);
        }
        // Several registries may name the same archive: it may be had as whatever one of them calls
        // it, since by the other names nobody gets so far.
        let mut outcome = Ok(());
        for subject in subjects {
            outcome = match headers {
                Some(_) => self.admit(&subject, modified).await,
                // Its date comes with its bytes: until then the lists alone count.
                None => self.admit_by_lists(&subject),
            };
            if outcome.is_ok() {
                break;
            }
        }
        let here = Subject::of_release(archive);
        // Nobody else's name makes good what is denied where it lies.
        if let (true, Some(here)) = (claimed, &here) {
            let policy = &self.sources().judge.policy;
            let judged = policy.judge_denials(&here.names(), here.version.as_deref(), false);
            judged.map_err(|rule| self.refusal(here, &rule))?;
        }
        outcome
    }

    fn admit_by_lists(&self, subject: &Subject) -> Result<(), Error> {
        let policy = &self.sources().judge.policy;
        let (names, version) = (subject.names(), subject.version.as_deref());
        let judged = policy.judge(&names, version, subject.any_namespace);
        judged.map_err(|rule| self.refusal(subject, &rule))
    }

    fn refusal(&self, subject: &Subject, rule: &str) -> Error {
        METRICS.policy_refusals.inc();
        tracing::warn!(%subject, rule, "refused by policy");
        Error::new(
            ErrorKind::Policy,
            format!(
                "{subject} is refused by {rule}{}",
                self.sources().judge.policy.whom_to_ask()
            ),
        )
    }

    /// The versions that are younger than `age`.
    async fn young(
        self: &Arc<Self>,
        list: &Url,
        kind: Kind,
        subject: &Subject,
        mut listed: Vec<Listed>,
        (age, private): (Duration, bool),
    ) -> HashSet<String> {
        let (now, address) = (now(), subject.address());
        // The newest first: those are the ones that may be young.
        listed.sort_by_cached_key(|one| std::cmp::Reverse(version_of(&one.version)));
        let public = self.sightings.book(&address).await;
        let book = match private {
            true => self.sightings.private_book(&address).await,
            false => public.clone(),
        };
        let offline = self.upstream.is_offline(list);
        let undated: Vec<Listed> = {
            let mut book = book.lock().await;
            let before = book.versions.len();
            for one in &listed {
                book.see(&one.version, now);
            }
            if book.versions.len() != before && !private {
                self.sightings.keep(&book).await;
            }
            let unknown = |one: &&Listed| {
                let seen = book.versions.get(&one.version);
                seen.is_some_and(|seen| is_young(seen, now, age) && seen.modified.is_none())
                    && !self.sightings.is_undated(&address, &one.version)
            };
            listed.iter().filter(unknown).take(ASKED).cloned().collect()
        };
        if !undated.is_empty() && !offline && !private {
            let flight = self.ask_for_dates(list, kind, subject, &listed, undated, age);
            let _ = timeout_at(Instant::now() + PATIENCE, flight).await;
        }
        let book = book.lock().await;
        if offline && !book.presumed {
            // Nobody can be asked, and the list was held before: what it names is not news.
            return HashSet::new();
        }
        let public = match private {
            true => Some(public.lock().await),
            false => None,
        };
        let young = |one: &&Listed| {
            let known = public
                .as_ref()
                .and_then(|book| book.versions.get(&one.version));
            let seen = known.or_else(|| book.versions.get(&one.version));
            seen.is_none_or(|seen| is_young(seen, now, age))
        };
        let young = listed.iter().filter(young);
        young.map(|one| one.version.clone()).collect()
    }

    /// Joins the flight that asks for the dates of an address's versions, or starts it. It goes on
    /// whoever leaves.
    fn ask_for_dates(
        self: &Arc<Self>,
        list: &Url,
        kind: Kind,
        subject: &Subject,
        listed: &[Listed],
        undated: Vec<Listed>,
        age: Duration,
    ) -> Flight {
        let address = subject.address();
        let mut flights = lock(&self.sightings.flights);
        if let Some(flight) = flights.get(&address) {
            return flight.clone();
        }
        let (this, list, subject) = (self.clone(), list.clone(), subject.clone());
        let order: Vec<String> = listed.iter().map(|one| one.version.clone()).collect();
        let (table, landing) = (self.clone(), address.clone());
        let task = tokio::spawn(async move {
            let _landing = Landing(table, landing);
            this.find_dates(&list, kind, &subject, (order, undated), age)
                .await;
        });
        let flight = task.map(|_| ()).boxed().shared();
        flights.insert(address, flight.clone());
        flight
    }

    async fn find_dates(
        self: &Arc<Self>,
        list: &Url,
        kind: Kind,
        subject: &Subject,
        (newest_first, undated): (Vec<String>, Vec<Listed>),
        age: Duration,
    ) {
        let address = subject.address();
        let deadline = Instant::now() + PATIENCE;
        let asked: Vec<BoxFuture<'static, (String, Asked)>> = undated
            .into_iter()
            .map(|one| {
                let (this, list, subject) = (self.clone(), list.clone(), subject.clone());
                let asking = async move {
                    let asking = this.modified_of(&list, kind, &subject, &one);
                    let date = timeout_at(deadline, asking).await;
                    (one.version, date.unwrap_or(Asked::InVain))
                };
                asking.boxed()
            })
            .collect();
        let book = self.sightings.book(&address).await;
        let presumed = book.lock().await.presumed;
        let mut dates = stream::iter(asked).buffered(AT_ONCE);
        let mut reached_old = false;
        while let Some((version, date)) = dates.next().await {
            let date = match date {
                Asked::Date(date) => date,
                Asked::NoDate => {
                    self.sightings.note_undated(&address, &version).await;
                    continue;
                }
                Asked::InVain => continue,
            };
            let mut book = book.lock().await;
            if let Some(seen) = book.versions.get_mut(&version) {
                seen.modified = Some(date);
                reached_old |= !is_young(seen, now(), age);
            }
            if !presumed && reached_old {
                break;
            }
        }
        drop(dates);
        let mut book = book.lock().await;
        if !presumed && reached_old {
            presume_the_rest(&mut book, &newest_first, |seen| is_young(seen, now(), age));
        }
        self.sightings.keep(&book).await;
    }

    /// When a version's archive was last modified, as far as upstream tells.
    async fn modified_of(
        self: &Arc<Self>,
        list: &Url,
        kind: Kind,
        subject: &Subject,
        listed: &Listed,
    ) -> Asked {
        let file = match kind {
            Kind::VersionList => self.archive_of(list, listed).await,
            _ => {
                let product = subject.names.last().filter(|_| subject.names.len() == 2);
                let version = &listed.version;
                product.and_then(|product| {
                    let path = format!("/{product}/{version}/{product}_{version}_SHA256SUMS");
                    list.join(&path).ok()
                })
            }
        };
        let Some(file) = file else {
            return Asked::InVain;
        };
        let dated = |headers: &HeaderMap| modified(headers).map_or(Asked::NoDate, Asked::Date);
        let digest = self.store.find(&url_key(&file));
        if let Some(held) = digest.and_then(|digest| self.store.open_blob(digest)) {
            return dated(&super::document::headers_from_text(&held.record.headers));
        }
        let deadline = Instant::now() + PATIENCE;
        match self.ask_head(&file, HeaderMap::new(), deadline).await {
            Ok(HeadOnly::Upstream {
                status, headers, ..
            }) if status.is_success() => dated(&headers),
            _ => Asked::InVain,
        }
    }

    /// The archive of one of the version's platforms.
    async fn archive_of(&self, list: &Url, listed: &Listed) -> Option<Url> {
        let usual = listed.platforms.iter().find(|p| *p == "linux_amd64");
        let (os, arch) = usual.or(listed.platforms.first())?.split_once('_')?;
        let mut url = list.clone();
        url.path_segments_mut()
            .ok()?
            .pop()
            .extend([&listed.version, "download", os, arch]);
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        let wish = Wish {
            url: url.clone(),
            kind: Kind::Download,
            headers,
            reload: false,
        };
        match self.metadata.get(&wish).await.ok()? {
            Answer::Document(document, _) => {
                let archive = &document.download.as_ref()?.archive;
                Some(self.named_archive(&url, archive))
            }
            Answer::TooLarge => None,
        }
    }
}

/// Of a list that is new to larder, what is older than an old version is not asked about.
fn presume_the_rest(book: &mut Book, newest_first: &[String], is_young: impl Fn(&Seen) -> bool) {
    let mut past_an_old_one = false;
    for version in newest_first {
        let Some(seen) = book.versions.get_mut(version) else {
            continue;
        };
        if seen.modified.is_some() {
            past_an_old_one |= !is_young(seen);
        } else if past_an_old_one {
            seen.presumed_old = true;
        }
    }
    book.presumed = true;
}

fn is_young(seen: &Seen, now: u64, age: Duration) -> bool {
    now.saturating_sub(seen.born(None)) < age.as_secs()
}

/// Takes a flight out of the table.
struct Landing(Arc<Cache>, String);

impl Drop for Landing {
    fn drop(&mut self) {
        lock(&self.0.sightings.flights).remove(&self.1);
    }
}

fn modified(headers: &HeaderMap) -> Option<u64> {
    let date = headers.get(LAST_MODIFIED)?.to_str().ok()?;
    let date = httpdate::parse_http_date(date).ok()?;
    let since = date.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some(since.as_secs())
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

/// `72h`, `90m`, `5s`: the largest unit that says it in whole numbers, or hours.
fn shown(time: Duration) -> String {
    match time.as_secs() {
        s if s >= 3600 => format!("{}h", s / 3600),
        s if s >= 60 => format!("{}m", s / 60),
        s => format!("{s}s"),
    }
}
