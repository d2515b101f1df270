//! A certificate of the operator's own for larder's own names (`--tls-cert`, `--tls-key`).

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use crate::common::client::handshake;
use crate::common::*;
use crate::terraform::{Project, no_terraform, succeeded};

const NAME: &str = "larder.corp.example";

struct Corp {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Corp {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let issuer = CertifiedIssuer::self_signed(params, key).unwrap();
        Self { issuer }
    }

    /// Writes a certificate for `name` and its key; returns its bytes.
    fn issue(&self, setup: &Setup, name: &str) -> Vec<u8> {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(setup.path("corp.key"), key.serialize_pem()).unwrap();
        std::fs::write(setup.path("corp.pem"), leaf.pem()).unwrap();
        leaf.der().to_vec()
    }
}

fn with_certificate(setup: Setup) -> Setup {
    let (cert, key) = (setup.path("corp.pem"), setup.path("corp.key"));
    let (cert, key) = (cert.to_str().unwrap(), key.to_str().unwrap());
    setup.args(["--hostname", NAME, "--tls-cert", cert, "--tls-key", key])
}

/// The certificate that is shown to whoever trusts the company's CA.
async fn shown(larder: &Larder, corp: &Corp, name: &str) -> std::io::Result<Vec<u8>> {
    let client = larder.client().trusting(&corp.issuer.pem());
    let tls = handshake(client.tcp().await, name, client.config()).await?;
    Ok(tls.get_ref().1.peer_certificates().unwrap()[0].to_vec())
}

#[tokio::test]
async fn own_names_bear_the_companys_certificate_and_intercepted_ones_larders() {
    let upstream = Upstream::start();
    upstream.route(TERRAFORM, "/page", Reply::text("a page"));
    let corp = Corp::new();
    let setup = Setup::new(&upstream);
    let first = corp.issue(&setup, NAME);
    let larder = with_certificate(setup).start().await;

    assert_eq!(shown(&larder, &corp, NAME).await.unwrap(), first);
    // It is not good for these.
    assert!(shown(&larder, &corp, "localhost").await.is_err());
    let own = larder.client();
    assert!(own.handshake(own.tcp().await, "localhost").await.is_ok());
    let page = own.get(&format!("https://{TERRAFORM}/page")).await;
    assert_eq!(page.text(), "a page");

    // Renewed: nobody starts anything again.
    let second = corp.issue(&larder.setup, NAME);
    let mut now = first.clone();
    let start = std::time::Instant::now();
    while now == first && start.elapsed() < PATIENCE {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        now = shown(&larder, &corp, NAME).await.unwrap();
    }
    assert_eq!(now, second);
    // Half a renewal changes nothing.
    std::fs::write(larder.setup.path("corp.key"), "nonsense").unwrap();
    std::fs::write(larder.setup.path("corp.pem"), "nonsense").unwrap();
    let start = std::time::Instant::now();
    while larder.log_with(&["cannot be read anew"]).is_empty() && start.elapsed() < PATIENCE {
        assert_eq!(shown(&larder, &corp, NAME).await.unwrap(), second);
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    larder.logs(&["cannot be read anew"]).await;
    assert_eq!(shown(&larder, &corp, NAME).await.unwrap(), second);
}

#[test]
fn a_certificate_without_its_key_is_refused() {
    let corp = Corp::new();
    let setup = Setup::without_upstream();
    corp.issue(&setup, NAME);
    let cert = setup.path("corp.pem");
    let half = setup.clone().args(["--tls-cert", cert.to_str().unwrap()]);
    assert_refuses_to_start(
        half.serve_command("127.0.0.1:0"),
        2,
        &["tls_cert", "--tls-key"],
    );
    let other = KeyPair::generate().unwrap();
    std::fs::write(setup.path("corp.key"), other.serialize_pem()).unwrap();
    let wrong = with_certificate(setup.clone());
    assert_refuses_to_start(wrong.serve_command("127.0.0.1:0"), 2, &["tls_key"]);
    std::fs::remove_file(setup.path("corp.key")).unwrap();
    assert_refuses_to_start(
        with_certificate(setup).serve_command("127.0.0.1:0"),
        2,
        &["tls_key"],
    );
}

#[tokio::test]
async fn terraform_speaks_tls_to_the_proxy_itself() {
    if no_terraform() {
        return;
    }
    let upstream = Upstream::start();
    let release = Release::new("hashicorp", "null", "3.2.1");
    release.publish(&upstream);
    let larder = Setup::new(&upstream).start().await;
    let project = Project::new(&larder, "project", &[release]);
    let proxy = format!("https://localhost:{}", larder.addr.port());
    let ca = larder.setup.ca_pem();
    let variables = [
        ("HTTPS_PROXY", &*proxy),
        ("SSL_CERT_FILE", ca.to_str().unwrap()),
    ];
    succeeded(&project.init_with(&variables));
    larder.setup.holds(1).await;
}
