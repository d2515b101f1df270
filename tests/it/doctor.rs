//! `larder doctor`: what is well is said to be, what is broken is named with its mend, and nothing
//! is changed by looking.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, GeneralSubtree, IsCa, KeyPair, NameConstraints,
};
use rustix::process::Signal;
use serde_json::Value;
use time::OffsetDateTime;

use crate::common::larder::binary;
use crate::common::*;
use crate::store::mounts_are_possible;

/// What `larder doctor --json` said.
struct Report {
    code: Option<i32>,
    said: String,
    findings: Vec<Value>,
}

impl Report {
    #[track_caller]
    fn of(mut command: Command) -> Self {
        let output = command.arg("--json").output().unwrap();
        let said = String::from_utf8(output.stdout.clone()).unwrap();
        let report: Value =
            serde_json::from_str(&said).unwrap_or_else(|_| panic!("no JSON: {output:?}"));
        let findings = report["findings"].as_array().unwrap().clone();
        let fails = findings.iter().any(|f| f["level"] == "fail");
        assert_eq!(report["healthy"], !fails);
        assert_eq!(output.status.code(), Some(i32::from(fails)), "{said}");
        Self {
            code: output.status.code(),
            said,
            findings,
        }
    }

    fn about(&self, check: &str) -> Vec<&Value> {
        let found = self.findings.iter();
        found.filter(|f| f["check"] == check).collect()
    }

    /// There is a finding of that level with those words, and with those in its mend.
    #[track_caller]
    fn assert_finds(&self, level: &str, check: &str, found: &str, mend: &str) {
        let about = self.about(check);
        let holds = |value: &Value, words: &str| value.as_str().unwrap_or("").contains(words);
        let fits = about.iter().any(|finding| {
            finding["level"] == level
                && holds(&finding["found"], found)
                && holds(&finding["mend"], mend)
        });
        assert!(fits, "no {level} {found:?} with {mend:?} in {about:#?}");
    }

    #[track_caller]
    fn assert_level(&self, check: &str, level: &str) {
        let about = self.about(check);
        let all = about.iter().all(|finding| finding["level"] == level);
        assert!(all && !about.is_empty(), "{check}: {about:#?}");
    }
}

/// `larder doctor` with the options of the server, on a system that trusts nobody.
fn doctor(setup: &Setup) -> Command {
    let system = setup.path("system/etc/ssl/certs");
    fs::create_dir_all(&system).unwrap();
    let bundle = system.join("ca-certificates.crt");
    if !bundle.exists() {
        fs::write(&bundle, "").unwrap();
    }
    let mut command = setup.command_with_options(&["doctor"]);
    command.arg("--root").arg(setup.path("system"));
    command
}

/// The same in a shell that `larder env` has set up.
fn doctor_in_shell(setup: &Setup) -> Command {
    let mut command = doctor(setup);
    let settings = setup.says(&["env", "--shell", "dotenv"]);
    command.envs(settings.lines().map(|line| line.split_once('=').unwrap()));
    command
}

fn report(setup: &Setup) -> Report {
    Report::of(doctor(setup))
}

/// A data dir with a CA, and no network.
fn with_ca() -> Setup {
    let setup = Setup::without_upstream();
    setup.says(&["ca", "show"]);
    setup.arg("--offline")
}

fn ca_file(setup: &Setup, name: &str) -> std::path::PathBuf {
    setup.data_dir().join("ca").join(name)
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[tokio::test]
async fn a_healthy_larder_is_said_to_be_healthy_and_stays_as_it_is() {
    let upstream = Upstream::start();
    let setup = Setup::new(&upstream);
    let _larder = setup.start().await;
    let command = doctor_in_shell(&setup);
    let state = || {
        let files = files_below(&setup.data_dir()).into_iter();
        let dated = files.map(|file| (fs::metadata(&file).unwrap().modified().unwrap(), file));
        dated.collect::<Vec<_>>()
    };
    let before = state();
    let report = Report::of(command);
    for check in [
        "config",
        "data dir",
        "proxy",
        "environment",
        "ca",
        "name constraints",
        "system trust",
        "shell trust",
        "upstream registry.terraform.io",
        "upstream releases.hashicorp.com",
        "upstream registry.opentofu.org",
        "clock",
    ] {
        report.assert_level(check, "ok");
    }
    // These are the machine's.
    for check in ["disk", "open files"] {
        assert_eq!(report.about(check).len(), 1);
    }
    assert_eq!(report.code, Some(0));
    assert_eq!(state(), before);
    assert!(upstream.journal().len() >= 3);

    // For people it is a line each.
    let output = doctor_in_shell(&setup).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count(), report.findings.len());
    for (line, finding) in text.lines().zip(&report.findings) {
        let check = finding["check"].as_str().unwrap();
        let level = match finding["level"].as_str().unwrap() {
            "ok" => "ok  ",
            level => level,
        };
        assert!(line.starts_with(&format!("{level}  {check}: ")), "{line}");
    }
}

#[test]
fn an_absent_data_dir_is_no_failure_and_is_not_made() {
    let setup = Setup::without_upstream().arg("--offline");
    let report = report(&setup);
    let folder = setup.data_dir();
    let folder = folder.to_str().unwrap();
    report.assert_finds("warn", "data dir", folder, "larder serve");
    report.assert_finds("warn", "ca", folder, "larder serve");
    report.assert_finds("warn", "proxy", "nobody serves", "larder serve");
    report.assert_finds("ok", "upstream", "offline", "");
    assert_eq!(report.code, Some(0));
    assert!(!setup.data_dir().exists());
}

#[test]
fn a_data_dir_that_cannot_be_written_is_named() {
    let file = Setup::without_upstream().arg("--offline");
    fs::write(file.data_dir(), "").unwrap();
    report(&file).assert_finds("fail", "data dir", "no folder", "--data-dir");

    let setup = with_ca();
    chmod(&setup.data_dir(), 0o777);
    report(&setup).assert_finds("warn", "data dir", "777", "chmod go-w");
    if !mounts_are_possible() {
        return;
    }
    chmod(&setup.data_dir(), 0o755);
    let script = "mount --bind $1 $1 && mount -o remount,bind,ro $1 && shift && exec \"$@\"";
    let mut wrapped = Command::new("unshare");
    setup.cleanse(&mut wrapped);
    wrapped.args(["-rm", "sh", "-c", script, "sh"]);
    wrapped.arg(setup.data_dir()).arg(binary());
    wrapped.args(doctor(&setup).get_args());
    let report = Report::of(wrapped);
    report.assert_finds("fail", "data dir", "Read-only file system", "--data-dir");
    report.assert_finds("fail", "disk", "mounted read-only", "--data-dir");
}

/// Signs a certificate with the CA's own key, after `change`.
fn reissue(setup: &Setup, change: impl FnOnce(&mut CertificateParams)) {
    let key = fs::read_to_string(ca_file(setup, "ca.key")).unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let names = [TERRAFORM, RELEASES, OPENTOFU].map(|name| GeneralSubtree::DnsName(name.into()));
    let loopback = CidrSubnet::from_addr_prefix([127, 0, 0, 1].into(), 32);
    params.name_constraints = Some(NameConstraints {
        permitted_subtrees: [&names[..], &[GeneralSubtree::IpAddress(loopback)]].concat(),
        excluded_subtrees: vec![],
    });
    change(&mut params);
    let cert = params.self_signed(&KeyPair::from_pem(&key).unwrap());
    fs::write(setup.ca_pem(), cert.unwrap().pem()).unwrap();
}

#[test]
fn what_is_wrong_with_the_ca_is_named_with_its_mend() {
    let now = OffsetDateTime::now_utc();
    let day = Duration::from_secs(24 * 3600);
    type Break = Box<dyn Fn(&Setup)>;
    let renew = "larder ca renew";
    let cases: [(&str, &str, &str, &str, Break); 11] = [
        (
            "fail",
            "ca",
            "expired",
            renew,
            Box::new(move |s| reissue(s, |p| p.not_after = now - day)),
        ),
        (
            "warn",
            "ca",
            "expires soon",
            renew,
            Box::new(move |s| reissue(s, |p| p.not_after = now + day * 59)),
        ),
        (
            "ok",
            "ca",
            "valid until",
            "",
            Box::new(move |s| reissue(s, |p| p.not_after = now + day * 61)),
        ),
        (
            "fail",
            "clock",
            "before the CA was made",
            "clock",
            Box::new(move |s| reissue(s, |p| p.not_before = now + day)),
        ),
        (
            "fail",
            "name constraints",
            "any host",
            renew,
            Box::new(|s| reissue(s, |p| p.name_constraints = None)),
        ),
        (
            "fail",
            "ca",
            "does not belong",
            renew,
            Box::new(|s| {
                fs::copy(with_ca().ca_pem(), s.ca_pem()).unwrap();
            }),
        ),
        (
            "fail",
            "ca",
            "ca.pem",
            renew,
            Box::new(|s| fs::write(s.ca_pem(), "nonsense").unwrap()),
        ),
        (
            "fail",
            "ca",
            "missing",
            renew,
            Box::new(|s| fs::remove_file(s.ca_pem()).unwrap()),
        ),
        (
            "fail",
            "ca",
            "ca.key",
            "copy",
            Box::new(|s| fs::remove_file(ca_file(s, "ca.key")).unwrap()),
        ),
        (
            "fail",
            "ca",
            "644",
            "chmod 600",
            Box::new(|s| chmod(&ca_file(s, "ca.key"), 0o644)),
        ),
        (
            "fail",
            "ca",
            "755",
            "chmod 700",
            Box::new(|s| chmod(&ca_file(s, ""), 0o755)),
        ),
    ];
    for (level, check, found, mend, breaks) in cases {
        let setup = with_ca();
        report(&setup).assert_level("ca", "ok");
        breaks(&setup);
        report(&setup).assert_finds(level, check, found, mend);
    }
}

#[test]
fn a_host_that_the_ca_does_not_cover_is_named() {
    let setup = with_ca();
    report(&setup).assert_level("name constraints", "ok");
    let more = [
        "--intercept",
        "tf.corp.example",
        "--hostname",
        "larder.corp.example",
    ];
    let more = setup.clone().args(more);
    let found = report(&more);
    for host in ["tf.corp.example", "larder.corp.example"] {
        found.assert_finds("fail", "name constraints", host, "larder ca renew");
    }
    assert!(
        !found.about("name constraints")[0]
            .to_string()
            .contains(TERRAFORM)
    );
}

#[test]
fn what_upstream_does_wrong_is_named_host_by_host() {
    let mut upstream = Upstream::start();
    let setup = Setup::new(&upstream);
    upstream.route(TERRAFORM, "/.well-known/terraform.json", Reply::status(503));
    upstream.route(OPENTOFU, "/.well-known/terraform.json", Reply::status(403));
    upstream.route(RELEASES, "/", Reply::text("listing"));
    let found = report(&setup);
    found.assert_finds("fail", "upstream registry.terraform.io", "503", "later");
    found.assert_finds("warn", "upstream registry.opentofu.org", "403", "refuses");
    found.assert_finds("ok", "upstream releases.hashicorp.com", "200", "");

    upstream.line(Line::Deaf);
    let check = "upstream releases.hashicorp.com";
    // It ends, which is what matters.
    report(&setup).assert_level(check, "fail");
    upstream.stop();
    report(&setup).assert_finds("fail", check, "refused", "network");
}

#[test]
fn an_upstream_with_a_strange_certificate_is_named() {
    let upstream = Upstream::start();
    let target = format!("::127.0.0.1:{}", upstream.addr.port());
    let setup = Setup::without_upstream().args(["--connect-to", &target]);
    let check = "upstream registry.terraform.io";
    report(&setup).assert_finds("fail", check, "UnknownIssuer", "--upstream-ca");
}

#[test]
fn a_clock_that_is_wrong_is_told_by_the_hosts_asked() {
    let upstream = Upstream::start();
    let setup = Setup::new(&upstream);
    let hour = Duration::from_secs(3600);
    let dated = |host: &str, time: SystemTime| {
        let path = match host {
            RELEASES => "/",
            _ => "/.well-known/terraform.json",
        };
        let date = httpdate::fmt_http_date(time);
        upstream.route(host, path, Reply::json("{}").header("Date", &date));
    };
    let now = SystemTime::now();
    for (time, way) in [(now + hour, "behind"), (now - hour, "ahead")] {
        dated(TERRAFORM, time);
        report(&setup).assert_finds("fail", "clock", way, "clock");
    }
    // Another agrees with this machine: then it is that host that is wrong.
    dated(RELEASES, now);
    report(&setup).assert_level("clock", "ok");
}

#[tokio::test]
async fn a_server_that_is_gone_or_stopped_is_told_apart() {
    let setup = Setup::without_upstream().arg("--offline");
    let larder = setup.start().await;
    let process = format!("process {}", larder.pid());
    report(&setup).assert_finds("ok", "proxy", &process, "");
    larder.signal(Signal::STOP);
    report(&setup).assert_finds("fail", "proxy", &process, "stop it");
    larder.signal(Signal::CONT);
    // Its lock is gone with it, whatever the file still says.
    larder.kill().await;
    assert!(
        fs::read_to_string(setup.data_dir().join("lock"))
            .unwrap()
            .contains("pid")
    );
    report(&setup).assert_finds("warn", "proxy", "nobody serves", "larder serve");
}

#[tokio::test]
async fn a_server_of_another_version_or_with_an_older_ca_is_to_be_started_again() {
    let setup = Setup::without_upstream().arg("--offline");
    let _larder = setup.start().await;
    report(&setup).assert_level("proxy", "ok");
    setup.says(&["ca", "renew"]);
    report(&setup).assert_finds("warn", "proxy", "older CA certificate", "again");

    let lock = setup.data_dir().join("lock");
    let mut running: Value = serde_json::from_slice(&fs::read(&lock).unwrap()).unwrap();
    running["version"] = "0.0.1".into();
    fs::write(&lock, running.to_string()).unwrap();
    report(&setup).assert_finds("warn", "proxy", "larder 0.0.1", "again");
}

#[test]
fn an_address_that_another_program_has_is_named() {
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = other.local_addr().unwrap().to_string();
    let setup = with_ca().args(["--listen", &addr]);
    report(&setup).assert_finds("warn", "proxy", &addr, "--listen");
}

#[tokio::test]
async fn a_shell_that_does_not_lead_to_larder_is_told_how_it_will() {
    let setup = Setup::without_upstream().arg("--offline");
    let larder = setup.start().await;
    let check = "environment";
    report(&setup).assert_finds("warn", check, "not set", "larder env");
    for (name, value, found) in [
        (
            "HTTPS_PROXY",
            "http://ann:hunter2@127.0.0.1:9",
            "HTTPS_PROXY leads to 127.0.0.1:9",
        ),
        (
            "https_proxy",
            "proxy.corp.example:8080",
            "https_proxy leads to proxy.corp.example:8080",
        ),
        ("HTTPS_PROXY", "ann:hunter2@[", "nothing that is an address"),
    ] {
        let mut command = doctor_in_shell(&setup);
        command.env(name, value);
        let report = Report::of(command);
        report.assert_finds("warn", check, found, "larder env");
        assert!(!report.said.contains("hunter2"), "{}", report.said);
    }
    let mut command = doctor_in_shell(&setup);
    command.env("NO_PROXY", "corp.example,.terraform.io");
    Report::of(command).assert_finds("warn", check, TERRAFORM, "NO_PROXY");

    let left = doctor_in_shell(&setup);
    let addr = larder.addr.to_string();
    larder.terminate().await;
    let settings: Vec<_> = left.get_envs().collect();
    let mut command = doctor(&setup);
    command.args(["--listen", &addr]);
    let settings = settings
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)));
    command.envs(settings);
    Report::of(command).assert_finds("fail", check, "no larder serves", "unset HTTPS_PROXY");
}

#[tokio::test]
async fn bundles_without_the_ca_or_with_an_older_one_are_named() {
    let setup = Setup::without_upstream().arg("--offline");
    let _larder = setup.start().await;
    let check = "shell trust";
    report(&setup).assert_finds("warn", check, "SSL_CERT_FILE", "larder env");
    let strange = setup.path("strange.pem");
    fs::write(&strange, &Upstream::start().ca_pem).unwrap();
    let mut command = doctor_in_shell(&setup);
    command.env("CURL_CA_BUNDLE", &strange);
    let found = Report::of(command);
    let path = strange.to_str().unwrap();
    found.assert_finds("warn", check, "CURL_CA_BUNDLE", "larder env");
    found.assert_finds("warn", check, path, "larder env");

    // The shell was set up, and then the CA was renewed.
    let command = doctor_in_shell(&setup);
    setup.says(&["ca", "renew"]);
    Report::of(command).assert_finds("warn", check, "an older certificate", "larder env");
    // Or the system got another root.
    let command = doctor_in_shell(&setup);
    let system = setup.path("system/etc/ssl/certs/ca-certificates.crt");
    let roots = fs::read_to_string(&system).unwrap();
    fs::write(&system, roots + &Upstream::start().ca_pem).unwrap();
    Report::of(command).assert_finds("warn", check, "lacks", "larder env");
}

#[test]
fn the_systems_trust_is_told_and_an_older_certificate_there_is_named() {
    let setup = with_ca();
    let check = "system trust";
    report(&setup).assert_finds("ok", check, "does not hold the CA", "");
    let system = setup.path("system/etc/ssl/certs/ca-certificates.crt");
    fs::copy(setup.ca_pem(), &system).unwrap();
    let found = report(&setup);
    found.assert_finds("ok", check, "holds the CA", "");
    found.assert_finds("ok", "shell trust", "system", "");
    setup.says(&["ca", "renew"]);
    report(&setup).assert_finds("warn", check, "an older certificate", "larder ca install");
}

#[test]
fn configuration_that_no_server_would_start_with_is_named_without_secrets() {
    let setup = with_ca().config("listen = [\"127.0.0.1:3128\"]\nmax_size = \"50 bananas\"");
    report(&setup).assert_finds("fail", "config", "50 bananas", "GiB");
    let setup = setup.config("upstream_proxy = \"http://ann:hunter2@\nx");
    let found = report(&setup);
    found.assert_level("config", "fail");
    assert!(!found.said.contains("hunter2"), "{}", found.said);

    let setup = setup.config("");
    let file = setup.path("larder.toml");
    report(&setup).assert_finds("ok", "config", file.to_str().unwrap(), "");
    for option in [
        "--upstream-ca",
        "--trusted-key",
        "--htpasswd",
        "--client-ca",
    ] {
        let setup = setup.clone().args([option, "/nonexistent/file"]);
        report(&setup).assert_finds("fail", "config", "/nonexistent/file", "name");
    }
    let mut command = doctor(&setup);
    command.env("LARDER_UPSTREAM_PROXY", "http://ann:hunter2@127.0.0.1:9");
    let found = Report::of(command);
    found.assert_finds("ok", "config", "LARDER_UPSTREAM_PROXY", "");
    assert!(!found.said.contains("hunter2"), "{}", found.said);
}

#[test]
fn a_budget_beyond_the_disk_is_named() {
    let setup = with_ca();
    let more = setup.clone().args(["--max-size", "90000TB"]);
    report(&more).assert_finds("warn", "disk", "90000.0 TB", "--max-size");
    let few = "max_connections = 100000000";
    report(&setup.config(few)).assert_finds("warn", "open files", "100000000", "max_connections");
}
