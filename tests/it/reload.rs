//! SIGHUP: the configuration is read anew, and no connection ends.

use rustix::process::Signal;

use crate::common::registry::provider_zip;
use crate::common::*;

async fn reloaded(larder: &Larder, times: usize) {
    larder.signal(Signal::HUP);
    let done = || larder.log_with(&["configuration was read anew"]).len() >= times;
    eventually("the configuration to be read anew", done).await;
}

#[tokio::test]
async fn new_rules_hold_for_the_next_request_also_on_old_connections_and_downloads_go_on() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let tap = Tap::at(100_000);
    release.publish_archive(&upstream, Reply::archive(release.archive()).tapped(&tap));
    let setup = Setup::new(&upstream).config("policy_contact = \"nobody\"\n");
    let larder = setup.start().await;
    let client = larder.client();
    assert_eq!(client.get(&release.document_url()).await.status, 200);
    let mut download = client.stream(&release.archive_url()).await;
    let begun = download.at_least(50_000).await;
    let mut old = client.open(TERRAFORM).await;
    old.request("GET", TERRAFORM, &release.versions_path(), &[])
        .await;
    let (body, mut old) = old.answer("GET").await.unwrap().finish_and_keep().await;
    assert!(!body.is_empty());

    setup
        .clone()
        .config("deny = [\"hashicorp/null\"]\npolicy_contact = \"ann\"\n");
    reloaded(&larder, 1).await;

    let path = release.document_path("linux_amd64");
    old.request("GET", TERRAFORM, &path, &[]).await;
    let refused = old.answer("GET").await.unwrap().finish().await;
    assert_eq!(refused.status, 403);
    assert!(refused.text().contains("ask ann"), "{}", refused.text());
    tap.open();
    download
        .finish_after(begun)
        .await
        .assert_is(&release.archive());

    setup.clone().config("");
    reloaded(&larder, 2).await;
    client.get(&release.archive_url()).await.assert_hit();
}

#[tokio::test]
async fn a_configuration_that_is_none_changes_nothing_and_says_so() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let setup = Setup::new(&upstream).config("deny = [\"hashicorp/null\"]\n");
    let larder = setup.start().await;
    for bad in [
        "deny = [\"\n",
        "no_such_key = 1\n",
        "htpasswd = \"/nowhere\"\n",
    ] {
        setup.clone().config(bad);
        let before = larder.log_with(&["nothing has changed"]).len();
        larder.signal(Signal::HUP);
        let told = || larder.log_with(&["nothing has changed"]).len() > before;
        eventually("the refusal to be told", told).await;
        let refused = larder.client().get(&release.document_url()).await;
        assert_eq!(refused.status, 403, "{bad}");
    }
}

#[tokio::test]
async fn what_cannot_change_says_so_and_the_rest_changes() {
    let upstream = Upstream::start();
    let setup = Setup::new(&upstream).config("max_connections = 100\n");
    let larder = setup.start().await;
    let dir = setup.path("releases");
    std::fs::create_dir_all(dir.join("corp/thing")).unwrap();
    let zip = provider_zip("thing", "1.0.0", 20_000);
    let file = "corp/thing/terraform-provider-thing_1.0.0_linux_amd64.zip";
    std::fs::write(dir.join(file), &zip).unwrap();
    let text = format!(
        "max_connections = 7\nmax_archive_size = \"1MiB\"\nmax_size = \"2MiB\"\n[[registry]]\nhost = \"corp.{TERRAFORM}\"\ndir = \"{}\"\n",
        dir.display()
    );
    setup.clone().config(&text);
    reloaded(&larder, 1).await;
    for key in ["max_connections", "max_archive_size"] {
        larder.logs(&[key, "restart larder"]).await;
    }
    assert_eq!(larder.log_with(&["max_tunnels"]).len(), 0);
    // The CA was made for names that cover it.
    let url = format!("https://corp.{TERRAFORM}/v1/providers/corp/thing/versions");
    let list = larder.client().get(&url).await;
    assert!(list.text().contains("1.0.0"), "{}", list.text());
}

#[tokio::test]
async fn users_and_addresses_change_too() {
    let upstream = Upstream::start();
    let setup = Setup::new(&upstream).config("");
    let larder = setup.start().await;
    let client = larder.client();
    let authority = format!("{TERRAFORM}:443");
    assert!(client.connect(&authority).await.is_ok());
    let users = setup.users("ann", "word");
    setup
        .clone()
        .config(&format!("htpasswd = \"{}\"\n", users.display()));
    reloaded(&larder, 1).await;
    assert_eq!(client.connect(&authority).await.unwrap_err().status, 407);
    // `larder env` knows of it.
    let said = String::from_utf8(
        setup
            .command_with_options(&["env"])
            .output()
            .unwrap()
            .stdout,
    )
    .unwrap();
    assert!(said.contains("HTTPS_PROXY='http://larder:"), "{said}");
    setup.clone().config("allow_from = [\"10.0.0.0/8\"]\n");
    reloaded(&larder, 2).await;
    assert_eq!(client.connect(&authority).await.unwrap_err().status, 403);
}

#[tokio::test]
async fn who_never_said_who_they_are_is_asked_when_users_come() {
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let setup = Setup::new(&upstream).config("");
    let larder = setup.start().await;
    let client = larder.client();
    let mut old = client.open(TERRAFORM).await;
    old.request("GET", TERRAFORM, &release.versions_path(), &[])
        .await;
    let (_, mut old) = old.answer("GET").await.unwrap().finish_and_keep().await;
    let users = setup.users("ann", "word");
    setup
        .clone()
        .config(&format!("htpasswd = \"{}\"\n", users.display()));
    reloaded(&larder, 1).await;
    old.request("GET", TERRAFORM, &release.versions_path(), &[])
        .await;
    assert_eq!(old.answer("GET").await.unwrap().status, 403);
}
