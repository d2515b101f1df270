//! The config file's rules for what users may have, and its limits.

use std::time::Duration;

use tokio::sync::Semaphore;

use super::{File, PerPattern, VerifyValue};
use crate::config::args::Verify;
use crate::config::limits::Limits;
use crate::config::pattern::Pattern;
use crate::config::policy::{Policy, Rules, VerifyRule};
use crate::config::values::{Period, Size};
use crate::error::Exit;

impl File {
    pub(super) fn policy(&self, given: Option<Verify>) -> Result<Policy, Exit> {
        let mut verify = Verify::default();
        let mut verify_rules = Vec::new();
        match &self.verify {
            None => {}
            Some(PerPattern::One(how)) => verify = self.value("verify", how)?,
            Some(PerPattern::Each(rules)) => {
                for (pattern, rule) in rules {
                    let rule = match rule {
                        VerifyValue::How(how) => VerifyRule {
                            how: self.value("verify", how)?,
                            keys: Vec::new(),
                        },
                        VerifyValue::Pinned(pinned) => VerifyRule {
                            how: Verify::Signature,
                            keys: self.fingerprints(&pinned.keys)?,
                        },
                    };
                    verify_rules.push((self.value("verify", pattern)?, rule));
                }
            }
        }
        let mut min_age = Vec::new();
        match &self.min_age {
            None => {}
            Some(PerPattern::One(age)) => {
                let age: Period = self.value("min_age", age)?;
                min_age.push((self.value("min_age", "*")?, age.0));
            }
            Some(PerPattern::Each(rules)) => {
                for (pattern, age) in rules {
                    let age: Period = self.value("min_age", age)?;
                    min_age.push((self.value("min_age", pattern)?, age.0));
                }
            }
        }
        if given.is_some() {
            // The flag is over the file, and what is for all there is the same thing.
            verify_rules.retain(|(pattern, _): &(Pattern, VerifyRule)| pattern.to_string() != "*");
        }
        Ok(Policy {
            verify: given.unwrap_or(verify),
            verify_rules: Rules::new(verify_rules),
            min_age: Rules::new(min_age),
            allow: self.many("allow", &[], &self.allow)?,
            deny: self.many("deny", &[], &self.deny)?,
            contact: self.policy_contact.clone(),
        })
    }

    /// Whole fingerprints alone: what is shorter can be forged.
    fn fingerprints(&self, keys: &[String]) -> Result<Vec<String>, Exit> {
        let is_whole = |key: &&String| {
            let digits: String = key.chars().filter(|c| !c.is_whitespace()).collect();
            matches!(digits.len(), 40 | 64) && digits.chars().all(|c| c.is_ascii_hexdigit())
        };
        let bad = keys.iter().find(|key| !is_whole(key));
        let bad = bad.map(String::as_str).or(keys.is_empty().then_some(""));
        match bad {
            None => Ok(keys.to_vec()),
            Some(bad) => Err(Exit::usage(format!(
                "config file {}: key `verify`: value `{bad}`: not the fingerprint of a key; write all of its 40 hexadecimal digits, as `gpg --fingerprint` shows them",
                self.path.display()
            ))),
        }
    }

    pub(super) fn limits(&self) -> Result<Limits, Exit> {
        let default = Limits::default();
        let size = |key, value, default: u64| -> Result<u64, Exit> {
            let size: Option<Size> = self.one(key, value)?;
            Ok(size.map_or(default, |size| size.0))
        };
        let time = |key, value, default: Duration| -> Result<Duration, Exit> {
            Ok(self.period(key, value)?.unwrap_or(default))
        };
        // As many as a semaphore can count.
        let bound = |value: Option<usize>, default: usize| {
            value.unwrap_or(default).min(Semaphore::MAX_PERMITS)
        };
        let some = |value, default| bound(value, default).max(1);
        let whole = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let header_bytes = size(
            "max_header_size",
            &self.max_header_size,
            default.header_bytes as u64,
        )?;
        Ok(Limits {
            connections: some(self.max_connections, default.connections),
            connections_per_address: some(
                self.max_connections_per_address,
                default.connections_per_address,
            ),
            requests_per_connection: self
                .max_requests_per_connection
                .unwrap_or(default.requests_per_connection)
                .max(1),
            // hyper knows no smaller buffer.
            header_bytes: whole(header_bytes).max(8 << 10),
            metadata_bytes: whole(size(
                "max_metadata_size",
                &self.max_metadata_size,
                default.metadata_bytes as u64,
            )?),
            archive_bytes: size(
                "max_archive_size",
                &self.max_archive_size,
                default.archive_bytes,
            )?,
            fills: some(self.max_fills, default.fills),
            handshake: time(
                "handshake_timeout",
                &self.handshake_timeout,
                default.handshake,
            )?,
            idle: time("idle_timeout", &self.idle_timeout, default.idle)?,
            tunnels: bound(self.max_tunnels, default.tunnels),
            tunnel_idle: time(
                "tunnel_idle_timeout",
                &self.tunnel_idle_timeout,
                default.tunnel_idle,
            )?,
            tunnel_lifetime: time(
                "tunnel_lifetime",
                &self.tunnel_lifetime,
                default.tunnel_lifetime,
            )?,
        })
    }
}
