//! The certificate authority: what it is, what it may sign, and what it signs.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::time::{SystemTime, UNIX_EPOCH};

use rcgen::{CertificateParams, Issuer, KeyPair};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use x509_parser::prelude::*;

use crate::common::client::handshake;
use crate::common::*;

/// A second host that only some of the tests intercept.
const EXTRA: &str = "tf.corp.example";

#[tokio::test]
async fn the_ca_is_p256_may_sign_leaves_only_and_says_so_critically() {
    let larder = Setup::without_upstream().start().await;
    let der = ca_of(&larder.setup);
    let (_, ca) = X509Certificate::from_der(&der).unwrap();

    let key = &ca.public_key().algorithm;
    assert_eq!(
        key.algorithm.to_id_string(),
        "1.2.840.10045.2.1",
        "an EC key"
    );
    let curve = key.parameters.as_ref().unwrap().as_oid().unwrap();
    assert_eq!(curve.to_id_string(), "1.2.840.10045.3.1.7", "P-256");
    let basic = ca.basic_constraints().unwrap().expect("basic constraints");
    assert!(basic.critical && basic.value.ca);
    assert_eq!(basic.value.path_len_constraint, Some(0));
    let usage = ca.key_usage().unwrap().expect("key usage");
    assert!(usage.critical && usage.value.key_cert_sign());
    assert!(!usage.value.digital_signature() && !usage.value.key_encipherment());
}

#[tokio::test]
async fn the_ca_is_constrained_to_its_hosts_and_loopback() {
    let setup = Setup::without_upstream();
    let setup = setup.args(["--intercept", EXTRA, "--hostname", "larder.corp.example"]);
    let larder = setup.start().await;
    let der = ca_of(&larder.setup);
    let (_, ca) = X509Certificate::from_der(&der).unwrap();

    let constraints = ca.name_constraints().unwrap().expect("name constraints");
    assert!(constraints.critical);
    let permitted = constraints.value.permitted_subtrees.as_ref().unwrap();
    let permitted = permitted.iter().map(|tree| match tree.base {
        GeneralName::DNSName(name) => name.to_owned(),
        GeneralName::IPAddress(bytes) => format!("{bytes:?}"),
        ref other => format!("{other:?}"),
    });
    let mut loopback_v6 = [0; 32];
    loopback_v6[15] = 1;
    loopback_v6[16..].fill(255);
    let expected = [
        TERRAFORM,
        OPENTOFU,
        RELEASES,
        EXTRA,
        "larder.corp.example",
        "localhost",
    ];
    let mut expected: BTreeSet<_> = expected.map(str::to_owned).into();
    expected.insert(format!("{:?}", [127, 0, 0, 1, 255, 255, 255, 255]));
    expected.insert(format!("{loopback_v6:?}"));
    assert_eq!(permitted.collect::<BTreeSet<_>>(), expected);
}

/// The reason for the constraints: what a thief of the key could do with it.
#[tokio::test]
async fn a_stolen_key_signs_for_nobody_else() {
    let larder = Setup::without_upstream().start().await;
    let pem = std::fs::read_to_string(larder.setup.ca_pem()).unwrap();
    let key = std::fs::read_to_string(larder.setup.data_dir().join("ca/ca.key")).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&pem, KeyPair::from_pem(&key).unwrap()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(ca_of(&larder.setup)).unwrap();
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let verifier = WebPkiServerVerifier::builder_with_provider(roots.into(), provider.into());
    let verifier = verifier.build().unwrap();

    for (name, trusted) in [
        (TERRAFORM, true),
        ("127.0.0.1", true),
        ("::1", true),
        (GITHUB, false),
        ("terraform.io", false),
        ("evil.example", false),
        ("10.0.0.1", false),
        ("127.0.0.2", false),
        ("2001:db8::1", false),
    ] {
        let leaf_key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let leaf = leaf.signed_by(&leaf_key, &issuer).unwrap();
        let server = ServerName::try_from(name).unwrap();
        let result = verifier.verify_server_cert(leaf.der(), &[], &server, &[], UnixTime::now());
        assert_eq!(result.is_ok(), trusted, "{name}: {result:?}");
    }
}

#[tokio::test]
async fn the_key_is_for_its_owner_only() {
    let larder = Setup::without_upstream().start().await;
    let mode = |path: &str| {
        let path = larder.setup.data_dir().join(path);
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    };
    assert_eq!(mode("ca"), 0o700);
    assert_eq!(mode("ca/ca.key"), 0o600);
}

#[tokio::test]
async fn the_ca_survives_a_restart() {
    let larder = Setup::without_upstream().start().await;
    let setup = larder.setup.clone();
    let (ca, key) = (
        ca_of(&setup),
        std::fs::read(setup.data_dir().join("ca/ca.key")).unwrap(),
    );
    larder.terminate().await;
    let larder = setup.start().await;
    assert_eq!(ca_of(&larder.setup), ca);
    assert_eq!(
        std::fs::read(setup.data_dir().join("ca/ca.key")).unwrap(),
        key
    );
}

#[tokio::test]
async fn leaves_are_what_strict_clients_want() {
    let larder = Setup::without_upstream().start().await;
    let ca_der = ca_of(&larder.setup);
    let (_, ca) = X509Certificate::from_der(&ca_der).unwrap();
    let der = leaf(&larder.client(), RELEASES).await;
    let (_, leaf) = X509Certificate::from_der(&der).unwrap();

    let names = leaf.subject_alternative_name().unwrap().expect("SAN");
    assert_eq!(names.value.general_names, [GeneralName::DNSName(RELEASES)]);
    let usage = leaf.extended_key_usage().unwrap().expect("EKU");
    assert!(usage.value.server_auth && !usage.value.client_auth && !usage.value.any);
    let authority =
        leaf.iter_extensions()
            .find_map(|extension| match extension.parsed_extension() {
                ParsedExtension::AuthorityKeyIdentifier(id) => id.key_identifier.clone(),
                _ => None,
            });
    let subject = ca
        .iter_extensions()
        .find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(id.clone()),
            _ => None,
        });
    assert!(
        authority.is_some() && authority == subject,
        "{authority:?} {subject:?}"
    );
    assert_eq!(leaf.issuer(), ca.subject());
    assert!(!leaf.is_ca());

    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs() as i64;
    let validity = leaf.validity();
    let (from, until) = (
        validity.not_before.timestamp(),
        validity.not_after.timestamp(),
    );
    assert!(
        (55 * 60..2 * 3600).contains(&(now - from)),
        "backdated by {} s",
        now - from
    );
    assert!(
        until > now && until - from <= 90 * 86400,
        "valid for {} s",
        until - from
    );
    let serial = leaf.raw_serial();
    assert!(
        (8..=20).contains(&serial.len()) && serial[0] < 128,
        "{serial:?}"
    );
}

#[tokio::test]
async fn leaves_are_minted_per_name_once_with_random_serials() {
    let larder = Setup::without_upstream().start().await;
    let client = larder.client();
    let (first, again) = (leaf(&client, RELEASES).await, leaf(&client, RELEASES).await);
    assert_eq!(first, again, "cached");
    let other = leaf(&client, TERRAFORM).await;
    let setup = larder.setup.clone();
    larder.terminate().await;
    let restarted = setup.start().await;
    let later = leaf(&restarted.client(), RELEASES).await;

    let serial = |der: &CertificateDer<'_>| {
        let (_, leaf) = X509Certificate::from_der(der).unwrap();
        leaf.raw_serial().to_vec()
    };
    let serials = BTreeSet::from([serial(&first), serial(&other), serial(&later)]);
    assert_eq!(serials.len(), 3);
}

/// terraform 0.12 knows no TLS 1.3; and nothing here speaks HTTP/2.
#[tokio::test]
async fn tls_1_2_and_1_3_are_spoken_and_http_2_is_not_chosen() {
    let larder = Setup::without_upstream().start().await;
    let client = larder.client();
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let tcp = client.connect(&format!("{RELEASES}:443")).await.unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(ca_of(&larder.setup)).unwrap();
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let mut config = rustls::ClientConfig::builder_with_provider(provider.into())
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let tls = handshake(tcp, RELEASES, config).await.unwrap();
        let session = tls.get_ref().1;
        assert_eq!(session.protocol_version(), Some(version.version));
        assert_ne!(session.alpn_protocol(), Some(&b"h2"[..]));
    }
}

/// The CA was made before the host was wanted: interception is impossible, and a tunnel would
/// be one past the verification.
#[tokio::test]
async fn a_host_the_ca_does_not_permit_is_403_until_renewed() {
    let upstream = Upstream::start();
    Product::new("terraform", "1.9.0").publish(&upstream);
    let setup = Setup::new(&upstream);
    let larder = setup.start().await;
    let old = ca_of(&setup);
    larder.terminate().await;
    let target = format!("{EXTRA}:443:127.0.0.1:{}", upstream.addr.port());
    let setup = setup.args(["--intercept", EXTRA, "--connect-to", &target]);

    let larder = setup.start().await;
    let refusal = larder
        .client()
        .connect(&format!("{EXTRA}:443"))
        .await
        .unwrap_err();
    let words = refusal.assert_refused(403);
    assert!(words.contains("larder ca renew"), "{words}");
    assert_eq!(refusal.reason, words);
    assert_eq!(upstream.connections(), 0);
    // The others are served as before.
    let got = larder
        .client()
        .get(&format!("https://{RELEASES}/terraform/"))
        .await;
    assert_eq!(got.status, 200);
    assert_eq!(ca_of(&setup), old);
    larder.terminate().await;

    let output = setup
        .command(&["ca", "renew"])
        .args(["--intercept", EXTRA])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let new = ca_of(&setup);
    let key_of = |der: &CertificateDer<'_>| {
        let (_, certificate) = X509Certificate::from_der(der).unwrap();
        certificate.public_key().raw.to_vec()
    };
    assert_eq!(key_of(&new), key_of(&old), "the same key");
    let larder = setup.start().await;
    leaf(&larder.client(), EXTRA).await;
}

#[tokio::test]
async fn ca_show_and_bundle_print_it() {
    let larder = Setup::without_upstream().start().await;
    let pem = std::fs::read_to_string(larder.setup.ca_pem()).unwrap();
    let show = larder.setup.command(&["ca", "show"]).output().unwrap();
    assert!(show.status.success(), "{show:?}");
    assert_eq!(String::from_utf8(show.stdout).unwrap(), pem);

    let bundle = larder.setup.command(&["ca", "bundle"]).output().unwrap();
    assert!(bundle.status.success(), "{bundle:?}");
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&bundle.stdout)
        .map(Result::unwrap)
        .collect();
    assert!(certificates.contains(&ca_of(&larder.setup)));
    let system = rustls_native_certs::load_native_certs().certs.len();
    assert!(
        certificates.len() > system.min(10),
        "{} certificates",
        certificates.len()
    );
}

fn ca_of(setup: &Setup) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(setup.ca_pem()).unwrap()
}

async fn leaf(client: &Client, host: &str) -> CertificateDer<'static> {
    let tls = client.tls(host, host).await.unwrap();
    tls.get_ref().1.peer_certificates().unwrap()[0].clone()
}
