//! `larder ca install|uninstall|renew`: the system's trust store. All but one of these tests have a
//! folder for a system, with tools that only play; that one has the system's own folders in a mount
//! namespace. The machine's trust store is never touched.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::common::larder::binary;
use crate::common::*;
use crate::store::mounts_are_possible;

/// A system that larder knows, and how its tool is called.
struct Kind {
    name: &'static str,
    anchors: &'static str,
    tool: &'static str,
    arguments: &'static str,
    bundle: &'static str,
}

const DEBIAN: Kind = Kind {
    name: "debian",
    anchors: "usr/local/share/ca-certificates",
    tool: "usr/sbin/update-ca-certificates",
    arguments: "",
    bundle: "etc/ssl/certs/ca-certificates.crt",
};

const KINDS: [Kind; 4] = [
    DEBIAN,
    Kind {
        name: "fedora",
        anchors: "etc/pki/ca-trust/source/anchors",
        tool: "usr/bin/update-ca-trust",
        arguments: "extract",
        bundle: "etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    },
    Kind {
        name: "suse",
        anchors: "etc/pki/trust/anchors",
        tool: "usr/sbin/update-ca-certificates",
        arguments: "",
        bundle: "var/lib/ca-certificates/ca-bundle.pem",
    },
    Kind {
        name: "arch",
        anchors: "etc/ca-certificates/trust-source/anchors",
        tool: "usr/bin/update-ca-trust",
        arguments: "",
        bundle: "etc/ca-certificates/extracted/tls-ca-bundle.pem",
    },
];

/// What the tools do that work: note how they are called, and make the bundle.
const WORKS: &str = "echo $* >> $root/calls; cat $root/roots.pem $root/$anchors/* > $root/$bundle 2>/dev/null; true";

/// A folder that plays a system.
struct System {
    root: PathBuf,
    kind: &'static Kind,
}

impl System {
    fn new(setup: &Setup, kind: &'static Kind) -> Self {
        let root = setup.path(kind.name);
        for file in [kind.tool, kind.bundle] {
            fs::create_dir_all(root.join(file).parent().unwrap()).unwrap();
        }
        fs::create_dir_all(root.join(kind.anchors)).unwrap();
        fs::write(root.join("roots.pem"), &Upstream::start().ca_pem).unwrap();
        fs::copy(root.join("roots.pem"), root.join(kind.bundle)).unwrap();
        let system = Self { root, kind };
        system.tool(WORKS);
        system
    }

    /// From now on that is what the tool does.
    fn tool(&self, script: &str) {
        let Kind {
            anchors, bundle, ..
        } = self.kind;
        let root = self.root.display();
        let text = format!("#!/bin/sh\nroot={root} anchors={anchors} bundle={bundle}\n{script}\n");
        let path = self.root.join(self.kind.tool);
        // Under another name first: what is being written cannot be run.
        let new = path.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(new, path).unwrap();
    }

    fn anchors(&self) -> Vec<PathBuf> {
        files_below(&self.root.join(self.kind.anchors))
    }

    fn put(&self, name: &str, text: &str) -> PathBuf {
        let path = self.root.join(self.kind.anchors).join(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn bundle(&self) -> Vec<CertificateDer<'static>> {
        let bytes = fs::read(self.root.join(self.kind.bundle)).unwrap();
        let certificates = CertificateDer::pem_slice_iter(&bytes);
        certificates.map(Result::unwrap).collect()
    }

    /// How often the tool was called, and with what.
    fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.root.join("calls")).unwrap_or_default();
        calls.lines().map(str::to_owned).collect()
    }

    fn command(&self, setup: &Setup, action: &str) -> Command {
        let mut command = setup.command(&["ca", action]);
        command.arg("--root").arg(&self.root);
        command
    }

    #[track_caller]
    fn does(&self, setup: &Setup, action: &str) -> String {
        let output = self.command(setup, action).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What it says on stderr, which must be exit code 1.
    #[track_caller]
    fn fails(&self, setup: &Setup, action: &str) -> String {
        failure(self.command(setup, action).output().unwrap())
    }
}

#[track_caller]
fn failure(output: Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with("larder: ") && !said.contains("panicked"));
    said
}

#[track_caller]
fn assert_says(said: &str, all: &[&str]) {
    for words in all {
        assert!(said.contains(words), "no {words:?} in {said}");
    }
}

fn ca_of(setup: &Setup) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(setup.ca_pem()).unwrap()
}

/// A data dir with a CA.
fn with_ca() -> Setup {
    let setup = Setup::without_upstream();
    setup.says(&["ca", "show"]);
    setup
}

#[test]
fn it_is_put_in_once_and_taken_out_again_on_each_kind_of_system() {
    let setup = with_ca();
    for kind in &KINDS {
        let system = System::new(&setup, kind);
        let before = system.bundle();
        let said = system.does(&setup, "install");
        let [file] = &system.anchors()[..] else {
            panic!("{}: {:?}", kind.name, system.anchors());
        };
        let name = file.file_name().unwrap().to_str().unwrap();
        let fingerprint = name.strip_prefix("larder-ca-").unwrap();
        let fingerprint = fingerprint.strip_suffix(".crt").unwrap();
        assert_eq!(fingerprint.len(), 16, "{name}");
        assert_eq!(fs::read(file).unwrap(), fs::read(setup.ca_pem()).unwrap());
        let bundle = system.root.join(kind.bundle);
        let tool = system.root.join(kind.tool);
        let shown = [file, &bundle, &tool].map(|path| path.to_str().unwrap());
        assert_says(&said, &shown);
        assert!(system.bundle().contains(&ca_of(&setup)), "{}", kind.name);
        assert_eq!(system.calls(), [kind.arguments], "{}", kind.name);

        system.does(&setup, "install");
        assert_eq!(system.calls().len(), 1, "{}: in place already", kind.name);

        let said = system.does(&setup, "uninstall");
        assert_says(&said, &shown);
        assert!(system.anchors().is_empty(), "{}", kind.name);
        assert_eq!(system.bundle(), before, "{}", kind.name);
        assert_eq!(system.calls(), [kind.arguments; 2], "{}", kind.name);
        system.does(&setup, "uninstall");
        assert_eq!(system.calls().len(), 2, "{}: out already", kind.name);
    }
}

#[test]
fn a_renewed_certificate_takes_the_place_of_the_old_one_and_others_stay() {
    let (setup, other) = (with_ca(), with_ca());
    let system = System::new(&setup, &DEBIAN);
    system.does(&other, "install");
    // As somebody did it by hand once: clients could take the older one of the two.
    let old = fs::read_to_string(setup.ca_pem()).unwrap();
    let by_hand = system.put("by-hand.crt", &old);
    let mixed = [old.as_str(), &Upstream::start().ca_pem].concat();
    system.does(&setup, "install");
    assert!(!by_hand.exists());

    let renew = system.command(&setup, "renew").output().unwrap();
    assert_eq!(renew.status.code(), Some(0), "{renew:?}");
    let said = String::from_utf8(renew.stderr).unwrap();
    let next = format!("ca install --data-dir {}", setup.data_dir().display());
    assert_says(&said, &["sudo ", &next, "larder env"]);
    assert_ne!(fs::read_to_string(setup.ca_pem()).unwrap(), old);
    assert!(!system.bundle().contains(&ca_of(&setup)));

    let said = system.does(&setup, "install");
    assert_says(&said, &["replaced "]);
    assert_eq!(system.anchors().len(), 2);
    let bundle = system.bundle();
    assert_eq!(bundle.len(), 3, "the root, and a certificate of each CA");
    assert!(bundle.contains(&ca_of(&setup)) && bundle.contains(&ca_of(&other)));

    // What holds others too is not larder's to change.
    let mixed = system.put("corp.crt", &mixed);
    let said = system.fails(&setup, "uninstall");
    assert_says(&said, &[mixed.to_str().unwrap(), "by hand", "put back"]);
    assert!(system.bundle().contains(&ca_of(&setup)));
    fs::remove_file(&mixed).unwrap();
    // By its key, also where the certificate was renewed meanwhile.
    system.does(&setup, "renew");
    system.does(&setup, "uninstall");
    assert_eq!(system.anchors().len(), 1);
    assert!(system.bundle().contains(&ca_of(&other)) && system.bundle().len() == 2);
}

#[test]
fn renewing_what_is_not_installed_speaks_of_no_store() {
    let setup = with_ca();
    let system = System::new(&setup, &DEBIAN);
    let renew = system.command(&setup, "renew").output().unwrap();
    let said = String::from_utf8(renew.stderr).unwrap();
    assert!(!said.contains("ca install"), "{said}");
    assert!(!said.contains("process"), "nobody serves: {said}");
}

#[tokio::test]
async fn renewing_under_a_running_server_says_that_it_goes_on_with_the_old_one() {
    let larder = Setup::without_upstream().start().await;
    let old = larder.client().page("/ca.pem").await.body;
    let client = larder.client();
    let system = System::new(&larder.setup, &DEBIAN);
    let renew = system.command(&larder.setup, "renew").output().unwrap();
    let said = String::from_utf8(renew.stderr).unwrap();
    assert_says(&said, &[&format!("process {}", larder.pid()), "start"]);
    assert_eq!(larder.client().page("/ca.pem").await.body, old);
    // The key is the same: who has either certificate is served.
    for client in [client, larder.client()] {
        client.tls(RELEASES, RELEASES).await.unwrap();
    }
}

#[test]
fn where_the_tool_fails_its_words_are_shown_and_all_is_put_back() {
    let setup = with_ca();
    let system = System::new(&setup, &DEBIAN);
    let fails = "echo the disk is on fire >&2; exit 3";
    system.tool(fails);
    let said = system.fails(&setup, "install");
    let tool = system.root.join(DEBIAN.tool);
    let tool = tool.to_str().unwrap();
    assert_says(&said, &["the disk is on fire", "3", tool, "put back"]);
    assert!(system.anchors().is_empty());

    system.tool(WORKS);
    system.does(&setup, "install");
    let installed = |system: &System| {
        let files = system.anchors();
        let texts = files.iter().map(|file| fs::read_to_string(file).unwrap());
        texts.collect::<Vec<_>>()
    };
    let before = installed(&system);
    system.does(&setup, "renew");
    system.tool(fails);
    for action in ["install", "uninstall"] {
        assert_says(&system.fails(&setup, action), &["the disk is on fire"]);
        assert_eq!(installed(&system), before, "{action}");
    }
}

#[test]
fn a_tool_that_only_says_so_is_not_believed() {
    let setup = with_ca();
    let system = System::new(&setup, &DEBIAN);
    system.tool("exit 0");
    let said = system.fails(&setup, "install");
    let bundle = system.root.join(DEBIAN.bundle);
    assert_says(&said, &[bundle.to_str().unwrap(), "does not hold"]);
    assert!(system.anchors().is_empty());

    system.tool(WORKS);
    system.does(&setup, "install");
    system.tool("exit 0");
    assert_says(&system.fails(&setup, "uninstall"), &["still holds"]);
    assert_eq!(system.anchors().len(), 1);
}

/// Debian's tool, when nothing is new, leaves the links to what is gone.
#[test]
fn links_to_what_was_taken_out_do_not_stay() {
    let setup = with_ca();
    let system = System::new(&setup, &DEBIAN);
    let links =
        "for f in $root/$anchors/*; do ln -sf $f $root/etc/ssl/certs/$(basename $f .crt).pem; done";
    system.tool(&format!("{WORKS}; {links}"));
    system.does(&setup, "install");
    let links = || {
        let entries = fs::read_dir(system.root.join("etc/ssl/certs")).unwrap();
        let links = entries.filter(|entry| entry.as_ref().unwrap().path().is_symlink());
        links.count()
    };
    assert_eq!(links(), 1);
    system.tool(&format!(
        "[ \"$1\" = --fresh ] && rm -f $root/etc/ssl/certs/larder-*; {WORKS}"
    ));
    system.does(&setup, "uninstall");
    assert_eq!(links(), 0);
}

#[test]
fn who_is_not_root_is_told_what_root_has_to_run() {
    let setup = with_ca();
    let system = System::new(&setup, &DEBIAN);
    let anchors = system.root.join(DEBIAN.anchors);
    let mode = |mode| fs::set_permissions(&anchors, fs::Permissions::from_mode(mode)).unwrap();
    let root = rustix::process::geteuid().is_root();
    if root && !mounts_are_possible() {
        return;
    }
    let as_user = |action: &str| {
        let command = system.command(&setup, action);
        let mut wrapped = match root {
            true => Command::new("unshare"),
            false => Command::new("env"),
        };
        setup.cleanse(&mut wrapped);
        if root {
            wrapped.args(["-U", "--map-user=1000"]);
        }
        wrapped.arg(binary()).args(command.get_args());
        wrapped.output().unwrap()
    };
    let told = |said: &str, action: &str| {
        let command = format!(
            "sudo {} ca {action} --data-dir {} --root {}",
            binary().display(),
            setup.data_dir().display(),
            system.root.display()
        );
        assert_says(said, &[&command, anchors.to_str().unwrap(), "denied"]);
    };
    mode(0o555);
    told(&failure(as_user("install")), "install");
    assert!(system.anchors().is_empty() && system.calls().is_empty());
    mode(0o755);
    system.does(&setup, "install");
    mode(0o555);
    // What changes nothing takes no rights.
    assert_eq!(as_user("install").status.code(), Some(0));
    told(&failure(as_user("uninstall")), "uninstall");
    mode(0o755);
    assert_eq!(system.anchors().len(), 1);
}

/// Under sudo the home is root's: a CA made there is none that anybody's larder uses.
#[test]
fn sudo_makes_no_ca() {
    let setup = Setup::without_upstream();
    let system = System::new(&setup, &DEBIAN);
    let mut command = system.command(&setup, "install");
    let said = failure(command.env("SUDO_UID", "1000").output().unwrap());
    let data_dir = setup.data_dir();
    assert_says(&said, &[data_dir.to_str().unwrap(), "without sudo"]);
    assert!(!data_dir.exists() && system.anchors().is_empty());
    setup.says(&["ca", "show"]);
    let mut command = system.command(&setup, "install");
    let output = command.env("SUDO_UID", "1000").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn who_has_no_ca_takes_none_out_and_is_told_which_are_in() {
    let (setup, other) = (Setup::without_upstream(), with_ca());
    let system = System::new(&setup, &DEBIAN);
    system.does(&other, "install");
    let said = system.fails(&setup, "uninstall");
    let file = &system.anchors()[0];
    let words = [
        file.to_str().unwrap(),
        "--data-dir",
        "update-ca-certificates",
    ];
    assert_says(&said, &words);
    assert!(!setup.data_dir().exists() && file.exists());
}

/// What can no longer be served from can still be taken out.
#[test]
fn a_ca_is_taken_out_by_whichever_of_its_files_is_left() {
    for broken in ["ca.pem", "ca.key"] {
        let setup = with_ca();
        let system = System::new(&setup, &DEBIAN);
        system.does(&setup, "install");
        fs::write(setup.data_dir().join("ca").join(broken), "nonsense").unwrap();
        system.does(&setup, "uninstall");
        assert!(system.anchors().is_empty(), "{broken}");
    }
}

#[test]
fn on_other_systems_the_commands_are_printed_and_the_exit_code_says_that_nothing_was_done() {
    let setup = with_ca();
    // A tool without its folder, and a folder without its tool.
    let system = System::new(&setup, &DEBIAN);
    fs::remove_dir(system.root.join(DEBIAN.anchors)).unwrap();
    fs::create_dir_all(system.root.join(KINDS[1].anchors)).unwrap();
    for (action, commands) in [
        (
            "install",
            ["security add-trusted-cert", "certutil -addstore"],
        ),
        (
            "uninstall",
            ["security delete-certificate", "certutil -delstore"],
        ),
    ] {
        let output = system.command(&setup, action).output().unwrap();
        assert_says(std::str::from_utf8(&output.stdout).unwrap(), &commands);
        assert_says(&failure(output), &["nothing was", "ca-certificates"]);
    }
    assert!(system.calls().is_empty());
}

#[test]
fn everybody_can_read_what_was_installed() {
    let setup = with_ca();
    let system = System::new(&setup, &DEBIAN);
    let install = system.command(&setup, "install");
    let mut strict = Command::new("sh");
    setup.cleanse(&mut strict);
    strict
        .args(["-c", "umask 077; exec \"$@\"", "sh"])
        .arg(binary());
    let output = strict.args(install.get_args()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let mode = fs::metadata(&system.anchors()[0]).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o644);
}

/// Debian's own tool, on copies of the system's folders in a mount namespace; and curl, which asks
/// the system's store alone.
const THROWAWAY: &str = r#"
set -eu
larder=$1 data=$2 scratch=$3 proxy=$4
for folder in /etc/ssl/certs /usr/local/share/ca-certificates; do
    mkdir -p "$scratch$folder"
    cp -dR "$folder/." "$scratch$folder"
    mount --bind "$scratch$folder" "$folder"
done
mount -t tmpfs none /etc/ca-certificates/update.d
touch /etc/ssl/certs/throwaway "$scratch/apart"
test -e "$scratch/etc/ssl/certs/throwaway"

list() { ls -l --time-style=+ /etc/ssl/certs /usr/local/share/ca-certificates; }
trusted() {
    openssl verify -CApath /etc/ssl/certs "$data/ca/ca.pem" >/dev/null 2>&1 && echo by openssl || echo no
    command -v curl >/dev/null || return 0
    curl -sS -o /dev/null -w '%{http_code}\n' -x "http://$proxy" https://releases.hashicorp.com/ 2>/dev/null || echo no
}
update-ca-certificates --fresh >/dev/null 2>&1
list > "$scratch/before"
echo before: && trusted
"$larder" ca install --data-dir "$data"
echo installed: && trusted
"$larder" ca renew --data-dir "$data" > /dev/null
"$larder" ca install --data-dir "$data"
echo renewed: && trusted
"$larder" ca uninstall --data-dir "$data"
echo after: && trusted
list > "$scratch/after"
diff "$scratch/before" "$scratch/after"
"#;

#[tokio::test]
async fn debians_own_tool_and_its_clients_agree() {
    let tool = Path::new("/usr/sbin/update-ca-certificates");
    let folder = Path::new("/usr/local/share/ca-certificates");
    if !tool.exists() || !folder.exists() || !Path::new("/usr/bin/openssl").exists() {
        println!("skipped: this is no Debian");
        return;
    }
    if !mounts_are_possible() {
        return;
    }
    let real = || {
        let files = ["/etc/ssl/certs/ca-certificates.crt"].map(|file| fs::read(file).unwrap());
        (
            files,
            files_below(folder),
            files_below(Path::new("/etc/ssl/certs")),
        )
    };
    let before = real();
    let upstream = Upstream::start();
    upstream.route(RELEASES, "/", Reply::text("listing"));
    let larder = Setup::new(&upstream).start().await;
    let mut command = Command::new("timeout");
    larder.setup.cleanse(&mut command);
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command.args(["100", "unshare", "-rm", "sh", "-c", THROWAWAY, "sh"]);
    command.arg(binary()).arg(larder.setup.data_dir());
    fs::create_dir(larder.setup.path("scratch")).unwrap();
    command.arg(larder.setup.path("scratch"));
    let output = command.arg(larder.addr.to_string()).output().unwrap();
    assert!(real() == before, "the machine's own store has changed");
    assert!(!Path::new("/etc/ssl/certs/throwaway").exists());
    assert!(output.status.success(), "{output:?}");

    let said = String::from_utf8(output.stdout).unwrap();
    let after = |label: &str, answer: &str| {
        let rest = said.split(&format!("{label}\n")).nth(1).unwrap();
        assert!(rest.starts_with(answer), "{label} {said}");
    };
    let curl = Path::new("/usr/bin/curl").exists();
    let [yes, no] = match curl {
        true => ["by openssl\n200\n", "no\n000\nno\n"],
        false => ["by openssl\n", "no\n"],
    };
    after("before:", no);
    after("installed:", yes);
    after("renewed:", yes);
    after("after:", no);
}
