//! Logs and metrics. No query string, credential or key ever comes here: callers pass redacted text.

use std::io::IsTerminal;
use std::sync::LazyLock;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tracing_subscriber::EnvFilter;

use crate::config::{CommonArgs, LogFormat};

/// Starts logging to stderr: text on a terminal, JSON lines otherwise, unless `format` says.
pub fn start_logs(common: &CommonArgs, format: Option<LogFormat>) {
    let level = match i16::from(common.verbose) - i16::from(common.quiet) {
        ..=-2 => "error",
        -1 => "warn",
        0 => "larder=info,warn",
        1 => "larder=debug,info",
        _ => "trace",
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(level))
        .with_writer(std::io::stderr);
    let terminal = std::io::stderr().is_terminal();
    let json = match format {
        Some(format) => format == LogFormat::Json,
        None => !terminal,
    };
    // A second start (in a test, say) keeps the first.
    let _ = if json {
        builder.json().flatten_event(true).try_init()
    } else {
        builder.with_ansi(terminal).with_target(false).try_init()
    };
}

/// The process's metrics.
pub static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

/// Counters and gauges, as `/metrics` names them.
pub struct Metrics {
    registry: Registry,
    pub requests: Family<Outcome, Counter>,
    pub cache_bytes: Counter,
    pub upstream_bytes: Counter,
    pub upstream_requests: Family<Why, Counter>,
    pub archives_verified: Counter,
    pub digest_mismatch: Family<Source, Counter>,
    pub unverified_archives: Counter,
    pub bad_signatures: Counter,
    pub unsigned_refused: Counter,
    pub republished: Counter,
    pub policy_refusals: Counter,
    pub evictions: Counter,
    pub rotten_blobs: Counter,
    pub resumes: Counter,
    pub stale_answers: Counter,
    pub fills: Gauge,
    pub tunnels: Gauge,
    pub connections: Gauge,
    pub connections_refused: Counter,
    pub failed_logins: Counter,
    pub stored_bytes: Gauge,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Outcome {
    pub cache: &'static str,
    pub status: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Why {
    pub purpose: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Source {
    pub source: &'static str,
}

impl Metrics {
    fn new() -> Self {
        let mut this = Self {
            registry: Registry::with_prefix("larder"),
            requests: Family::default(),
            cache_bytes: Counter::default(),
            upstream_bytes: Counter::default(),
            upstream_requests: Family::default(),
            archives_verified: Counter::default(),
            digest_mismatch: Family::default(),
            unverified_archives: Counter::default(),
            bad_signatures: Counter::default(),
            unsigned_refused: Counter::default(),
            republished: Counter::default(),
            policy_refusals: Counter::default(),
            evictions: Counter::default(),
            rotten_blobs: Counter::default(),
            resumes: Counter::default(),
            stale_answers: Counter::default(),
            fills: Gauge::default(),
            tunnels: Gauge::default(),
            connections: Gauge::default(),
            connections_refused: Counter::default(),
            failed_logins: Counter::default(),
            stored_bytes: Gauge::default(),
        };
        let r = &mut this.registry;
        r.register(
            "requests",
            "Requests by cache outcome and status",
            this.requests.clone(),
        );
        r.register(
            "cache_bytes",
            "Archive bytes sent to clients from the store",
            this.cache_bytes.clone(),
        );
        r.register(
            "upstream_bytes",
            "Archive bytes received from upstream",
            this.upstream_bytes.clone(),
        );
        r.register(
            "upstream_requests",
            "Requests sent upstream, by purpose",
            this.upstream_requests.clone(),
        );
        r.register(
            "archives_verified",
            "Archives fetched whose SHA-256 was verified",
            this.archives_verified.clone(),
        );
        r.register(
            "digest_mismatch",
            "Archives refused, by the source that contradicted",
            this.digest_mismatch.clone(),
        );
        r.register(
            "unverified_archives",
            "Archives passed through for want of any digest",
            this.unverified_archives.clone(),
        );
        r.register(
            "bad_signatures",
            "Archives whose SHA256SUMS bear a signature that does not hold",
            this.bad_signatures.clone(),
        );
        r.register(
            "unsigned_refused",
            "Archives refused for want of a valid signature",
            this.unsigned_refused.clone(),
        );
        r.register(
            "republished",
            "Archives that came with another digest than before",
            this.republished.clone(),
        );
        r.register(
            "policy_refusals",
            "Requests refused by allow, deny or min_age",
            this.policy_refusals.clone(),
        );
        r.register("evictions", "Blobs evicted", this.evictions.clone());
        r.register(
            "rotten_blobs",
            "Blobs whose bytes no longer had their digest",
            this.rotten_blobs.clone(),
        );
        r.register(
            "resumes",
            "Archive downloads resumed behind the client",
            this.resumes.clone(),
        );
        r.register(
            "stale_answers",
            "Last good documents served because upstream failed",
            this.stale_answers.clone(),
        );
        r.register("fills_running", "Fills running", this.fills.clone());
        r.register("tunnels_open", "Blind tunnels open", this.tunnels.clone());
        r.register(
            "connections_open",
            "Client connections open",
            this.connections.clone(),
        );
        r.register(
            "connections_refused",
            "Connections closed since their address has too many",
            this.connections_refused.clone(),
        );
        r.register(
            "failed_logins",
            "Wrong credentials given to the proxy",
            this.failed_logins.clone(),
        );
        r.register(
            "stored_bytes",
            "Bytes of blobs held",
            this.stored_bytes.clone(),
        );
        this
    }

    /// The OpenMetrics text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_carry_the_documented_names() {
        let metrics = Metrics::new();
        metrics
            .digest_mismatch
            .get_or_create(&Source { source: "sums" })
            .inc();
        let text = metrics.text();
        assert!(
            text.contains("larder_digest_mismatch_total{source=\"sums\"} 1"),
            "{text}"
        );
        assert!(text.contains("larder_stored_bytes 0"), "{text}");
    }
}
