//! `larder run -- CMD` and `larder env`: a command behind larder, and nothing changed on the system.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::common::larder::binary;
use crate::common::*;

/// Printed by `env -0`, so that values may hold anything.
type Variables = HashMap<String, String>;

const BUNDLES: [&str; 5] = [
    "SSL_CERT_FILE",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
];

#[tokio::test]
async fn the_command_finds_the_proxy_and_a_bundle_in_its_environment() {
    let setup = Setup::without_upstream();
    let output = run(&setup, &["env", "-0"]);
    let variables = variables(&output.stdout);

    let proxy = &variables["HTTPS_PROXY"];
    assert!(proxy.starts_with("http://127.0.0.1:"), "{proxy}");
    assert_eq!(&variables["https_proxy"], proxy);
    for name in ["localhost", "127.0.0.1", "::1"] {
        let exempt: Vec<_> = variables["NO_PROXY"].split(',').collect();
        assert!(exempt.contains(&name), "{exempt:?}");
    }
    for name in BUNDLES {
        assert_bundle_has_ca(&variables[name], &setup);
    }
}

#[tokio::test]
async fn inherited_exemptions_and_trust_are_kept() {
    let other = Upstream::start();
    let setup = Setup::trusting(&other);
    let inherited = setup.path("upstream-ca.pem");
    let setup = setup
        .env("NO_PROXY", "corp.example,.internal.example")
        .env("SSL_CERT_FILE", inherited.to_str().unwrap());
    let variables = variables(&run(&setup, &["env", "-0"]).stdout);

    let exempt: Vec<_> = variables["NO_PROXY"].split(',').collect();
    assert!(
        exempt.contains(&"corp.example") && exempt.contains(&".internal.example"),
        "{exempt:?}"
    );
    let theirs = CertificateDer::from_pem_file(&inherited).unwrap();
    assert!(certificates(&variables["SSL_CERT_FILE"]).contains(&theirs));
    assert_bundle_has_ca(&variables["SSL_CERT_FILE"], &setup);
}

#[tokio::test]
async fn it_exits_as_the_command_does() {
    let setup = Setup::without_upstream();
    for (script, code) in [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 42", 42),
        ("exit 255", 255),
        ("kill -TERM $$", 128 + 15),
        ("kill -KILL $$", 128 + 9),
    ] {
        let output = run(&setup, &["sh", "-c", script]);
        assert_eq!(output.status.code(), Some(code), "{script}: {output:?}");
    }
    let output = run(&setup, &["no-such-command-anywhere"]);
    assert_eq!(output.status.code(), Some(127), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("no-such-command-anywhere"), "{said}");
}

#[tokio::test]
async fn it_exits_with_125_where_larder_itself_failed() {
    let setup = Setup::without_upstream();
    std::fs::write(setup.data_dir(), "not a folder").unwrap();
    let output = run(&setup, &["sh", "-c", "echo the command ran"]);
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    assert_eq!(output.stdout, b"");
}

#[tokio::test]
async fn stdin_stdout_stderr_and_arguments_are_the_commands_own() {
    let setup = Setup::without_upstream();
    let script = "cat; printf '%s|' \"$@\"; echo to-stderr >&2";
    let mut command = run_command(
        &setup,
        &["sh", "-c", script, "sh", "--version", "a b", "", "-v"],
    );
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"through stdin\n")
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.stdout, b"through stdin\n--version|a b||-v|");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.starts_with("to-stderr\n"), "{said}");
}

#[tokio::test]
async fn signals_are_the_commands() {
    let setup = Setup::without_upstream();
    for (signal, name) in [
        (Signal::TERM, "TERM"),
        (Signal::HUP, "HUP"),
        (Signal::INT, "INT"),
    ] {
        let script = format!(
            "trap 'echo got-{name}; exit 7' {name}; echo ready; while :; do sleep 0.05; done"
        );
        let mut running = Running::start(&setup, &script);
        assert_eq!(running.line(), "ready");
        kill_process(Pid::from_child(&running.child), signal).unwrap();
        assert_eq!(running.line(), format!("got-{name}"));
        assert_eq!(running.child.wait().unwrap().code(), Some(7), "{name}");
    }
}

#[tokio::test]
async fn a_command_downloads_through_larder_and_one_line_sums_it_up() {
    if no_curl() {
        return;
    }
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let setup = Setup::new(&upstream);
    let curl = ["curl", "-sSf", &product.archive_url()];

    for fetched in 1..=2 {
        let output = run(&setup, &curl);
        assert!(output.status.success(), "{output:?}");
        assert!(output.stdout == product.archive);
        // Only the cold one asks upstream, and both say where the bytes came from.
        assert_eq!(upstream.gets(RELEASES, &product.archive_path()), 1);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(lines.len(), 1, "{fetched}: {said}");
        for word in ["larder", "cache", "upstream", "verified"] {
            assert!(lines[0].contains(word), "{said}");
        }
        setup.holds(1).await;
    }
}

#[tokio::test]
async fn terraform_init_is_one_line() {
    if Command::new("terraform").arg("version").output().is_err() {
        println!("skipped: no terraform on PATH");
        return;
    }
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let setup = Setup::new(&upstream).env("CHECKPOINT_DISABLE", "1");
    let mut locks = Vec::new();
    for project in ["first", "second"] {
        let folder = setup.path(project);
        std::fs::create_dir(&folder).unwrap();
        let main = "terraform {\n  required_providers {\n    null = { source = \"hashicorp/null\" }\n  }\n}\n";
        std::fs::write(folder.join("main.tf"), main).unwrap();
        let mut command = run_command(&setup, &["terraform", "init", "-no-color"]);
        let output = command.current_dir(&folder).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        setup.holds(1).await;
        locks.push(std::fs::read_to_string(folder.join(".terraform.lock.hcl")).unwrap());
    }
    assert_eq!(locks[0], locks[1]);
    let (host, path) = release.archive_path();
    assert_eq!(upstream.gets(host, &path), 1);
}

#[tokio::test]
async fn concurrent_runs_share_a_proxy_that_ends_with_the_last() {
    let setup = Setup::without_upstream();
    let mut first = Running::waiting(&setup);
    let mut second = Running::waiting(&setup);
    let proxy = writer_of(&setup).expect("a process serves the data dir");
    for run in [&first, &second] {
        assert!(run.proxy_answers());
    }

    // The one that started it ends first: the other must not lose its proxy.
    first.finish();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(second.proxy_answers());
    let mut third = Running::waiting(&setup);
    second.finish();
    assert!(third.proxy_answers());
    assert_eq!(
        writer_of(&setup),
        Some(proxy),
        "one process for all of them"
    );
    third.finish();

    let gone = || !Path::new("/proc").join(proxy.to_string()).exists();
    eventually("the proxy ends with the last run", gone).await;
    assert!(!third.proxy_answers());
}

/// Nothing of a killed run must keep the proxy alive.
#[tokio::test]
async fn a_killed_run_lets_go_of_the_proxy() {
    let setup = Setup::without_upstream();
    let mut only = Running::waiting(&setup);
    let proxy = writer_of(&setup).expect("a process serves the data dir");
    only.child.kill().unwrap();
    only.child.wait().unwrap();
    only.stdin = None;
    let gone = || !Path::new("/proc").join(proxy.to_string()).exists();
    eventually("the proxy ends", gone).await;
}

#[tokio::test]
async fn a_run_uses_the_larder_that_serves_its_data_dir() {
    let upstream = Upstream::start();
    Product::new("terraform", "1.9.0").publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let mut running = Running::waiting(&larder.setup);

    // Whatever address the command was given, it is that larder which answers there.
    let ca = std::fs::read(larder.setup.ca_pem()).unwrap();
    let url = format!("https://{RELEASES}/terraform/");
    let got = Client::new(running.proxy, &ca).get(&url).await;

    assert_eq!(got.status, 200);
    larder.logs(&["\"INFO\"", "GET", &url]).await;
    running.finish();
    // And it goes on when the run has ended.
    assert_eq!(larder.client().page("/healthz").await.status, 200);
}

#[tokio::test]
async fn a_run_changes_nothing_but_its_data_dir() {
    let setup = Setup::without_upstream();
    let output = run(&setup, &["true"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(files_below(&setup.home()), Vec::<std::path::PathBuf>::new());
}

// --- larder env ---

#[tokio::test]
async fn env_for_sh_survives_eval_whatever_it_inherits() {
    let nasty = "it's.example,$(echo pwned).example,`id`.example,a b";
    let larder = Setup::without_upstream()
        .env("NO_PROXY", nasty)
        .start()
        .await;
    let output = env(&larder.setup, "sh");
    let mut shell = Command::new("sh");
    larder.setup.cleanse(&mut shell);
    shell
        .arg("-c")
        .arg("eval \"$1\"; env -0")
        .arg("sh")
        .arg(&output);
    let variables = variables(&shell.output().unwrap().stdout);

    assert_eq!(variables["HTTPS_PROXY"], format!("http://{}", larder.addr));
    assert_eq!(variables["https_proxy"], variables["HTTPS_PROXY"]);
    assert!(
        variables["NO_PROXY"].contains("$(echo pwned).example"),
        "{variables:?}"
    );
    assert!(
        variables["NO_PROXY"].contains("it's.example"),
        "{variables:?}"
    );
    for name in BUNDLES {
        assert_bundle_has_ca(&variables[name], &larder.setup);
    }
}

#[tokio::test]
async fn env_speaks_each_shell() {
    let larder = Setup::without_upstream().start().await;
    let proxy = format!("http://{}", larder.addr);
    for (shell, setting) in [
        ("sh", "export HTTPS_PROXY="),
        ("fish", "set -gx HTTPS_PROXY "),
        ("powershell", "$env:HTTPS_PROXY = "),
        ("dotenv", "HTTPS_PROXY="),
        ("github", "HTTPS_PROXY="),
    ] {
        let said = env(&larder.setup, shell);
        let line = said.lines().find(|line| line.starts_with(setting));
        let line = line.unwrap_or_else(|| panic!("{shell}: {said}"));
        assert!(line.contains(&proxy), "{shell}: {line}");
        for name in BUNDLES {
            assert!(said.contains(name), "{shell}: no {name}: {said}");
        }
    }
}

/// A wish that the serving larder does not fulfil must not be dropped in silence.
#[tokio::test]
async fn a_run_with_other_options_than_the_serving_larder_is_refused() {
    let upstream = Upstream::start();
    let larder = Setup::new(&upstream).start().await;
    for options in [
        &["--offline"][..],
        &["--intercept", "other.example"],
        &["--max-size", "1KB"],
    ] {
        let mut command = larder.setup.command_with_options(&["run"]);
        let output = command.args(options).args(["--", "true"]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{said}");
        assert!(said.contains(options[0]), "{said}");
    }
    // The same options as the server's are fine.
    assert!(run(&larder.setup, &["true"]).status.success());
}

/// Nor must one run's `--offline` befall another.
#[tokio::test]
async fn a_run_does_not_join_an_offline_one_unasked() {
    let setup = Setup::without_upstream();
    let mut offline = Running::start(&setup.clone().arg("--offline"), "echo started; read wait");
    offline.line();
    let output = run(&setup, &["true"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("--offline"), "{said}");
    offline.finish();
    offline.child.wait().unwrap();
}

#[tokio::test]
async fn wrong_usage_of_run_is_larders_failure() {
    let setup = Setup::without_upstream();
    let mut typo = setup.command(&["run", "--ofline", "--", "true"]);
    let mut variable = run_command(&setup, &["true"]);
    variable.env("LARDER_MAX_SIZE", "abc");
    for command in [&mut typo, &mut variable] {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(125), "{output:?}");
    }
}

#[tokio::test]
async fn empty_variables_are_as_good_as_none() {
    let setup = Setup::without_upstream();
    let mut command = run_command(&setup, &["true"]);
    for name in [
        "LISTEN",
        "OFFLINE",
        "MAX_SIZE",
        "INTERCEPT",
        "UPSTREAM_PROXY",
        "LOG_FORMAT",
    ] {
        command.env(format!("LARDER_{name}"), "");
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[tokio::test]
async fn a_password_is_not_told_in_an_error() {
    let setup = Setup::without_upstream();
    let mut command = run_command(&setup, &["true"]);
    command.env(
        "LARDER_UPSTREAM_PROXY",
        "gopher://joe:PWSECRET@p.example:3128",
    );
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(
        said.contains("upstream_proxy") && !said.contains("PWSECRET"),
        "{said}"
    );
}

/// Those who wait for a pipe or a lock must not wait for the proxy; the command gets what it is given.
#[tokio::test]
async fn descriptors_go_to_the_command_and_not_to_the_proxy() {
    let setup = Setup::without_upstream();
    let given = setup.path("given");
    std::fs::write(&given, "for the command").unwrap();
    let mut keeps_proxy = Running::start(&setup, "echo started; read wait");
    // Another data dir, whose proxy this run starts itself.
    let other = Setup::without_upstream();
    let script = format!(
        "exec 9<{}; {} run --data-dir {} -- sh -c 'cat <&9; pid=$(sed -E \"s/.*pid.:([0-9]+).*/\\1/\" {}/lock); ls -l /proc/$pid/fd'",
        given.display(),
        binary().display(),
        other.data_dir().display(),
        other.data_dir().display(),
    );
    let mut shell = Command::new("sh");
    other.cleanse(&mut shell);
    let output = shell.args(["-c", &script]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.starts_with("for the command"), "{output:?}");
    assert!(said.contains("run.log"), "{said}");
    assert!(!said.contains("/given"), "{said}");
    keeps_proxy.finish();
    keeps_proxy.child.wait().unwrap();
}

/// Even a command that is over in no time, or that cleared its environment.
#[tokio::test]
async fn the_summary_counts_short_commands_too() {
    if no_curl() {
        return;
    }
    let upstream = Upstream::start();
    let product = Product::new("terraform", "1.9.0");
    product.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let ca = larder.setup.ca_pem();
    let proxy = format!("http://{}", larder.addr);
    let url = product.archive_url();
    let curl = ["curl", "-sSf", "-o", "/dev/null", &url];
    let bare = [
        &[
            "env",
            "-i",
            "curl",
            "--proxy",
            &proxy,
            "--cacert",
            ca.to_str().unwrap(),
        ],
        &curl[1..],
    ];
    let bare = bare.concat();
    for command in [&curl[..], &bare, &curl, &curl, &curl] {
        let output = run(&larder.setup, command);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("1 archives verified"), "{command:?}: {said}");
    }
}

#[tokio::test]
async fn env_does_not_hand_out_the_proxy_of_a_run() {
    let setup = Setup::without_upstream();
    let mut running = Running::start(&setup, "echo $HTTPS_PROXY; read wait");
    let private = running.line();
    let settings = env(&setup, "sh");
    assert!(!settings.contains(&private), "{settings}");
    assert!(settings.contains("127.0.0.1:3128"), "{settings}");
    running.finish();
    running.child.wait().unwrap();
}

/// `larder serve &` in one line, `larder env` in the next.
#[tokio::test]
async fn env_waits_for_a_server_that_is_just_starting() {
    let setup = Setup::without_upstream();
    let mut command = setup.command(&["env"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let asking = command.spawn().unwrap();
    let larder = setup.start().await;
    let output = asking.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        said.contains(&format!("'http://{}'", larder.addr)),
        "{said}"
    );
}

fn run(setup: &Setup, command: &[&str]) -> Output {
    run_command(setup, command).output().unwrap()
}

fn run_command(setup: &Setup, command: &[&str]) -> Command {
    let mut run = setup.command_with_options(&["run"]);
    run.arg("--").args(command);
    run
}

fn env(setup: &Setup, shell: &str) -> String {
    let output = setup.command(&["env", "--shell", shell]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn variables(printed: &[u8]) -> Variables {
    let printed = String::from_utf8(printed.to_vec()).unwrap();
    let pairs = printed.split('\0').filter_map(|pair| pair.split_once('='));
    pairs
        .map(|(name, value)| (name.into(), value.into()))
        .collect()
}

fn certificates(bundle: &str) -> Vec<CertificateDer<'static>> {
    let pem = std::fs::read(bundle).unwrap_or_else(|error| panic!("{bundle}: {error}"));
    CertificateDer::pem_slice_iter(&pem)
        .map(Result::unwrap)
        .collect()
}

#[track_caller]
fn assert_bundle_has_ca(bundle: &str, setup: &Setup) {
    let ca = CertificateDer::from_pem_file(setup.ca_pem()).unwrap();
    let certificates = certificates(bundle);
    assert!(certificates.contains(&ca), "{bundle}");
    assert!(certificates.len() > 1, "{bundle} holds larder's CA alone");
}

fn no_curl() -> bool {
    let found = Command::new("curl").arg("--version").output().is_ok();
    if !found {
        println!("skipped: no curl on PATH");
    }
    !found
}

/// The larder that holds a data dir, as another that wants it is told.
fn writer_of(setup: &Setup) -> Option<u32> {
    let output = setup.serve_command("127.0.0.1:0").output().unwrap();
    assert!(!output.status.success(), "the data dir is free");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let numbers = said.split(|letter: char| !letter.is_ascii_digit());
    let binary = std::fs::canonicalize(larder::binary()).unwrap();
    let is_larder = |pid: &u32| {
        let executable = std::fs::read_link(format!("/proc/{pid}/exe"));
        executable.is_ok_and(|executable| executable == binary)
    };
    numbers
        .filter_map(|number| number.parse().ok())
        .find(is_larder)
}

/// A run whose command waits until its stdin is closed.
struct Running {
    child: Child,
    proxy: SocketAddr,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Running {
    fn waiting(setup: &Setup) -> Self {
        let mut running = Self::start(setup, "echo $HTTPS_PROXY; read wait");
        let proxy = running.line();
        running.proxy = proxy.strip_prefix("http://").unwrap().parse().unwrap();
        running
    }

    fn start(setup: &Setup, script: &str) -> Self {
        let mut command = run_command(setup, &["sh", "-c", script]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        Self {
            stdin: child.stdin.take(),
            stdout: BufReader::new(child.stdout.take().unwrap()),
            child,
            proxy: SocketAddr::from(([0, 0, 0, 0], 0)),
        }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn proxy_answers(&self) -> bool {
        TcpStream::connect_timeout(&self.proxy, PATIENCE).is_ok()
    }

    /// Closes the stdin that the command waits for.
    fn finish(&mut self) {
        self.stdin = None;
        // `read` fails at the end of its input.
        assert_eq!(self.child.wait().unwrap().code(), Some(1));
    }
}
