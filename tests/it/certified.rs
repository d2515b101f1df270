//! Who may use larder, by certificate.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::access::assert_turned_away;
use crate::common::client::handshake;
use crate::common::*;

#[tokio::test]
async fn where_certificates_are_asked_for_plain_and_nameless_clients_get_pages_alone() {
    let upstream = Upstream::start();
    let (setup, _ca) = with_client_ca(Setup::new(&upstream));
    let larder = setup.start().await;
    let client = larder.client();

    let refusal = client
        .connect(&format!("{TERRAFORM}:443"))
        .await
        .unwrap_err();
    assert_words(&refusal, 403);
    assert!(refusal.reason.contains("certificate"), "{}", refusal.reason);
    assert_turned_away(&client).await;
    assert_alive(&larder).await;

    let tls = client
        .handshake(client.tcp().await, "localhost")
        .await
        .unwrap();
    let (_, head) = connect_over(tls, &format!("{TERRAFORM}:443")).await;
    assert!(head.starts_with("HTTP/1.1 403"), "{head}");
    let mut conn = Conn::new(
        client
            .handshake(client.tcp().await, "localhost")
            .await
            .unwrap(),
    );
    conn.request("GET", "localhost", "/readyz", &[]).await;
    assert_eq!(conn.answer("GET").await.unwrap().status, 200);
    assert_eq!(upstream.connections(), 0);
}

#[tokio::test]
async fn a_certificate_of_the_clients_ca_opens_the_proxy() {
    let upstream = Upstream::start();
    upstream.route(RELEASES, "/page", Reply::text("a page"));
    upstream.route(ELSEWHERE, "/", Reply::text("beyond"));
    let (setup, ca) = with_client_ca(Setup::new(&upstream));
    let larder = setup.start().await;
    let client = larder.client();
    let (certificate, key) = certificate_of(&ca, ExtendedKeyUsagePurpose::ClientAuth);
    let config = client.certified_config(certificate, key);
    let blind = client.trusting(&upstream.ca_pem);
    for (host, path, body, trust) in [
        (RELEASES, "/page", &b"a page"[..], client.config()),
        (ELSEWHERE, "/", b"beyond", blind.config()),
    ] {
        let tls = handshake(client.tcp().await, "localhost", config.clone());
        let (tls, head) = connect_over(tls.await.unwrap(), &format!("{host}:443")).await;
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        let mut conn = Conn::new(handshake(tls, host, trust).await.unwrap());
        conn.request("GET", host, path, &[]).await;
        let got = conn.answer("GET").await.unwrap().finish().await;
        got.assert_is(body);
    }
    // Who intercepts by name has no certificate asked for.
    let refused = handshake(client.tcp().await, RELEASES, config).await;
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("UnrecognisedName"), "{error}");
}

#[tokio::test]
async fn certificates_of_others_end_the_handshake() {
    let upstream = Upstream::start();
    let (setup, ca) = with_client_ca(Setup::new(&upstream));
    let larder = setup.start().await;
    let client = larder.client();
    for (what, (certificate, key)) in [
        (
            "another CA",
            certificate_of(&client_ca(), ExtendedKeyUsagePurpose::ClientAuth),
        ),
        (
            "for servers",
            certificate_of(&ca, ExtendedKeyUsagePurpose::ServerAuth),
        ),
    ] {
        let config = client.certified_config(certificate, key);
        // In TLS 1.3 the client hears of it when it reads.
        let Ok(tls) = handshake(client.tcp().await, "localhost", config).await else {
            continue;
        };
        let mut conn = Conn::new(tls);
        conn.request("GET", "localhost", "/healthz", &[]).await;
        assert!(conn.answer("GET").await.is_err(), "{what}");
    }
    assert_alive(&larder).await;
}

#[tokio::test]
async fn a_client_ca_that_is_none_stops_the_start() {
    let setup = Setup::without_upstream();
    let file = setup.path("clients.pem");
    let setup = setup.args(["--client-ca", file.to_str().unwrap()]);
    let refused = || {
        let command = setup.serve_command("127.0.0.1:0");
        assert_refuses_to_start(command, 2, &["client_ca", "clients.pem"])
    };
    refused();
    std::fs::write(&file, "no certificate").unwrap();
    refused();
}

type ClientCa = CertifiedIssuer<'static, KeyPair>;

fn client_ca() -> ClientCa {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
        .distinguished_name
        .push(DnType::CommonName, "clients");
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn with_client_ca(setup: Setup) -> (Setup, ClientCa) {
    let ca = client_ca();
    let file = setup.path("clients.pem");
    std::fs::write(&file, ca.pem()).unwrap();
    (setup.args(["--client-ca", file.to_str().unwrap()]), ca)
}

fn certificate_of(
    ca: &ClientCa,
    usage: ExtendedKeyUsagePurpose,
) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["client.example".into()]).unwrap();
    params.extended_key_usages = vec![usage];
    let certificate = params.signed_by(&key, ca).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    (certificate.der().clone(), key)
}

/// CONNECT on a connection to the proxy that is TLS itself; the head of the answer.
async fn connect_over(
    mut tls: TlsStream<TcpStream>,
    authority: &str,
) -> (TlsStream<TcpStream>, String) {
    let head = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n");
    tls.write_all(head.as_bytes()).await.unwrap();
    tls.flush().await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(within("answer to CONNECT", tls.read_u8()).await.unwrap());
    }
    (tls, String::from_utf8(head).unwrap())
}
