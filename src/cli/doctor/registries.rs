//! Private registries: whether everything in their folders is served.

use std::sync::Arc;
use std::time::Duration;

use hyper::Method;
use serde_json::Value;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::super::{api, keyring};
use super::{Case, Finding};
use crate::config::Config;
use crate::instance::Running;
use crate::registry::folder::shown;
use crate::registry::key::KeyHolder;
use crate::registry::{Registry, Survey};

const CHECK: &str = "registry";
/// For reading what is new in all folders.
const PATIENCE: Duration = Duration::from_secs(4);
/// Lines of one registry.
const LINES: usize = 50;

/// What is wrong in the configured folders: by the running larder, which has read them already, or
/// else by reading them.
pub async fn survey(config: &Config, running: Option<&Running>) -> Vec<Result<Survey, String>> {
    if config.registries.is_empty() {
        return Vec::new();
    }
    let known = match running {
        Some(running) => {
            let asked = api::ask(running, Method::GET, "/api/v1/registries", &Value::Null);
            let known: Result<Vec<Survey>, String> =
                timeout(PATIENCE, asked).await.unwrap_or(Ok(Vec::new()));
            known.unwrap_or_default()
        }
        None => Vec::new(),
    };
    let keyring = keyring(config).map(Arc::new);
    let mut all = Vec::new();
    for registry in &config.registries {
        let host = registry.host.in_https_url();
        let of_running = known.iter().find(|survey| survey.host == host);
        if let Some(survey) = of_running {
            all.push(Ok(survey.clone()));
            continue;
        }
        let opened = match &keyring {
            // Nothing is written down, and nothing signed.
            Ok(keyring) => {
                let key = KeyHolder::new(&config.data_dir);
                Registry::open(registry, None, key, keyring.clone())
            }
            // Told of under another name.
            Err(_) => continue,
        };
        let read = match opened {
            Ok(opened) => {
                let reading = spawn_blocking(move || {
                    opened.folder.survey(&opened.host);
                    opened.survey()
                });
                timeout(PATIENCE, reading).await
            }
            Err(exit) => {
                all.push(Err(exit.message));
                continue;
            }
        };
        all.push(match read {
            Ok(Ok(survey)) => Ok(survey),
            _ => Err(format!(
                "{host}: {} is not read within {} s; start larder, which reads it once, and ask again",
                registry.dir.display(),
                PATIENCE.as_secs()
            )),
        });
    }
    all
}

pub fn check(case: &Case) -> Vec<Finding> {
    let mut findings = Vec::new();
    for survey in &case.registries {
        let survey = match survey {
            Ok(survey) => survey,
            Err(words) => {
                findings.push(Finding::from_words(CHECK, words));
                continue;
            }
        };
        let dir = survey.dir.display();
        if survey.problems.is_empty() {
            let found = format!("{}: all that is in {dir} is served", survey.host);
            findings.push(Finding::ok(CHECK, found));
        }
        for problem in survey.problems.iter().take(LINES) {
            let path = survey.dir.join(&problem.path);
            findings.push(Finding::fail(
                CHECK,
                format!("{}: {}: {}", survey.host, shown(&path), problem.why),
                "mend or remove it (`larder registry add` checks before it places)",
            ));
        }
        let more = survey.problems.len().saturating_sub(LINES);
        if more > 0 {
            let found = format!("{}: {more} more files in {dir}", survey.host);
            findings.push(Finding::fail(CHECK, found, "the log names each of them"));
        }
    }
    findings
}
