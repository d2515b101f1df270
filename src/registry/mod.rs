//! Private registries: a folder of releases as an origin that speaks the provider and module
//! registry protocols. It is asked like any other origin, over a connection within the process, so
//! that its archives are verified, kept, listed and ruled like all others.

pub mod add;
mod documents;
pub mod folder;
pub mod key;
pub mod layout;
mod protocol;
pub mod releases;

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use moka::sync::Cache;
use tokio::io::DuplexStream;
use tokio::sync::Semaphore;

use crate::config::{Authority, PrivateRegistry};
use crate::digest::Digest;
use crate::error::Exit;
use crate::sync::lock;
use crate::terraform::signature::Keyring;
use crate::upstream::Local;
use folder::{Folder, Problem};
use key::KeyHolder;

/// How often everything is looked at without being asked for.
const SURVEY: Duration = Duration::from_secs(30);
/// Requests that look at new files at once.
const LOOKS: usize = 4;
/// Of one connection within the process
const BUFFER: usize = 256 << 10;
/// Bytes of sums and signatures that documents named, and are remembered.
const REMEMBERED: u64 = 64 << 20;

/// One private registry.
pub struct Registry {
    pub host: Authority,
    pub folder: Folder,
    key: Arc<KeyHolder>,
    /// One signature a document, whoever asks how often
    signatures: Cache<Digest, Bytes>,
    /// Sums and signatures that documents named, by the mark and the name in their URL
    sums: Cache<String, (Bytes, Option<Bytes>)>,
    looks: Arc<Semaphore>,
    /// Tells who watches that nobody needs it any more
    end: Arc<(Mutex<bool>, Condvar)>,
}

/// What is in a private registry, and what is wrong with it.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Survey {
    pub host: String,
    pub dir: PathBuf,
    pub problems: Vec<Problem>,
}

impl Registry {
    /// What is found of files is kept in `data_dir`, if it is given.
    ///
    /// # Errors
    /// When its folder cannot be found.
    pub fn open(
        registry: &PrivateRegistry,
        data_dir: Option<&Path>,
        key: Arc<KeyHolder>,
        keyring: Arc<Keyring>,
    ) -> Result<Arc<Self>, Exit> {
        let memory = data_dir.map(|data_dir| {
            let host = registry.host.to_string().replace(':', "_");
            data_dir.join("registry").join(format!("{host}.json"))
        });
        let folder = Folder::open(&registry.dir, memory, keyring).map_err(|e| {
            Exit::usage(format!(
                "registry: {}: {e}; make that folder, or name another one",
                registry.dir.display()
            ))
        })?;
        let weight = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        Ok(Arc::new(Self {
            host: registry.host.clone(),
            folder,
            key,
            signatures: Cache::new(10_000),
            sums: Cache::builder()
                .weigher(move |_, (sums, signature): &(Bytes, Option<Bytes>)| {
                    weight(sums.len() + signature.as_ref().map_or(0, Bytes::len) + 256)
                })
                .max_capacity(REMEMBERED)
                .build(),
            looks: Arc::new(Semaphore::new(LOOKS)),
            end: Arc::default(),
        }))
    }

    /// Starts to look at what is there, now and then, for as long as the registry lives.
    pub fn watch(this: &Arc<Self>) {
        let (registry, end) = (Arc::downgrade(this), this.end.clone());
        let worker = std::thread::Builder::new().name("registry".into());
        if let Err(error) = worker.spawn(move || look_around(&registry, &end)) {
            tracing::error!(%error, "no thread to look at a private registry's files");
        }
    }

    /// Whether it is the same folder for the same host.
    pub fn is_same(&self, other: &Self) -> bool {
        self.host == other.host && self.folder.root() == other.folder.root()
    }

    /// What is wrong with it, as far as it was looked at.
    pub fn survey(&self) -> Survey {
        Survey {
            host: self.host.in_https_url(),
            dir: self.folder.root().to_owned(),
            problems: self.folder.problems(),
        }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        *lock(&self.end.0) = true;
        self.end.1.notify_all();
    }
}

impl Local for Arc<Registry> {
    fn open(&self) -> DuplexStream {
        let (near, far) = tokio::io::duplex(BUFFER);
        let registry = self.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let registry = registry.clone();
                async move { Ok::<_, Infallible>(protocol::answer(registry, request).await) }
            });
            let served = http1::Builder::new().serve_connection(TokioIo::new(far), service);
            if let Err(error) = served.await {
                tracing::debug!(%error, "a connection to a private registry ended");
            }
        });
        near
    }
}

fn look_around(registry: &Weak<Registry>, (ended, end): &(Mutex<bool>, Condvar)) {
    loop {
        let Some(one) = registry.upgrade() else {
            return;
        };
        one.folder.survey(&one.host);
        drop(one);
        let ended = lock(ended);
        let waited = end.wait_timeout_while(ended, SURVEY, |ended| !*ended);
        let (ended, _) = waited.unwrap_or_else(|e| e.into_inner());
        if *ended {
            return;
        }
    }
}
