//! Requests that two parsers may read in two ways, on every way to larder.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Stage, WAYS, Way};
use crate::common::client::handshake;
use crate::common::*;

/// Header lines of a POST, and what follows them.
const NO_FRAMING: &[(&str, &str)] = &[
    ("Content-Length: 0\r\nContent-Length: {len}", "{evil}"),
    ("Content-Length: {len}\r\nContent-Length: 0", "{evil}"),
    ("Content-Length: 0\r\nContent-Length: x", "{evil}"),
    ("Content-Length: {len}, {len}", "{evil}"),
    ("Content-Length: 0, {len}", "{evil}"),
    ("Content-Length: +{len}", "{evil}"),
    ("Content-Length: -1", "{evil}"),
    ("Content-Length: 0 {len}", "{evil}"),
    ("Content-Length:", "{evil}"),
    ("Content-Length: 0x{hex}", "{evil}"),
    ("Content-Length: {len}.0", "{evil}"),
    ("Content-Length: \"{len}\"", "{evil}"),
    ("Content-Length : {len}", "{evil}"),
    ("Content-Length: 18446744073709551615", "{evil}"),
    ("Content-Length: 18446744073709551616", "{evil}"),
    ("Content-Length: 0\r\n Content-Length: {len}", "{evil}"),
    ("Transfer-Encoding: chunked, identity", "0\r\n\r\n{evil}"),
    ("Transfer-Encoding: chunked;q=1", "0\r\n\r\n{evil}"),
    ("Transfer-Encoding: identity\r\nContent-Length: 0", "{evil}"),
    (
        "Transfer-Encoding: xchunked\r\nContent-Length: 5",
        "0\r\n\r\n{evil}",
    ),
    (
        "Transfer-Encoding: \x0bchunked\r\nContent-Length: 5",
        "0\r\n\r\n{evil}",
    ),
    (
        "Transfer-Encoding: chunked\x0c\r\nContent-Length: 5",
        "0\r\n\r\n{evil}",
    ),
    (
        "Transfer-Encoding: chunked\0\r\nContent-Length: 5",
        "0\r\n\r\n{evil}",
    ),
    (
        "Transfer-Encoding: \"chunked\"\r\nContent-Length: 5",
        "0\r\n\r\n{evil}",
    ),
    ("Transfer-Encoding:\r\nContent-Length: 5", "0\r\n\r\n{evil}"),
    (
        "Transfer-Encoding : chunked\r\nContent-Length: 5",
        "0\r\n\r\n{evil}",
    ),
    (
        "Transfer-Encoding:\r\n chunked\r\nContent-Length: 5",
        "0\r\n\r\n{evil}",
    ),
    (
        "Transfer-Encoding\r\n: chunked\r\nContent-Length: 5",
        "0\r\n\r\n{evil}",
    ),
    (
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "0\r\n\r\n{evil}",
    ),
    (
        "Transfer-Encoding: chunked\r\nTransfer-Encoding:",
        "0\r\n\r\n{evil}",
    ),
    (
        "X: y\rTransfer-Encoding: chunked\r\nContent-Length: 5",
        "0\r\n\r\n{evil}",
    ),
    ("Transfer-Encoding: chunked", "-1\r\n\r\n{evil}"),
    ("Transfer-Encoding: chunked", "+0\r\n\r\n{evil}"),
    (
        "Transfer-Encoding: chunked",
        "0x{hex}\r\n{evil}\r\n0\r\n\r\n",
    ),
    (
        "Transfer-Encoding: chunked",
        "10000000000000000\r\n\r\n{evil}",
    ),
    ("Transfer-Encoding: chunked", "\r\n\r\n{evil}"),
    (
        "Transfer-Encoding: chunked",
        " {hex}\r\n{evil}\r\n0\r\n\r\n",
    ),
    ("Transfer-Encoding: chunked", "{hex}\n{evil}\r\n0\r\n\r\n"),
    ("Transfer-Encoding: chunked", "0\n\n{evil}"),
    ("Transfer-Encoding: chunked", "0\r\r{evil}"),
    ("Transfer-Encoding: chunked", "0;a\n\r\n\r\n{evil}"),
    ("Transfer-Encoding: chunked", "0;a\rb\r\n\r\n{evil}"),
    ("Transfer-Encoding: chunked", "{hex}\r\n{evil}0\r\n\r\n"),
    ("Transfer-Encoding: chunked", "{hex}\r\n{evil}\n0\r\n\r\n"),
    ("Transfer-Encoding: chunked", "0\r\nX y: z\r\n\r\n{evil}"),
];

#[tokio::test]
async fn a_body_whose_end_is_not_plain_is_refused() {
    let stage = Stage::new().await;
    for way in WAYS {
        for (lines, body) in NO_FRAMING {
            let trick = "POST {first} HTTP/1.1\r\nHost: {host}\r\n".to_owned() + lines;
            stage.refuses(way, &(trick + "\r\n\r\n" + body)).await;
        }
        let trick = "POST {first} HTTP/1.0\r\nHost: {host}\r\nConnection: keep-alive\r\n";
        let lines = "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{evil}";
        stage.refuses(way, &(trick.to_owned() + lines)).await;
    }
    stage.has_kept_nothing_wrong();
}

#[tokio::test]
async fn a_body_that_has_a_plain_end_is_no_request() {
    let stage = Stage::new().await;
    let chunk = "{hex}\r\n{evil}\r\n0\r\n\r\n";
    for way in WAYS {
        for (lines, body) in [
            ("Content-Length: {len}", "{evil}"),
            ("Content-Length: {len}\r\nContent-Length: {len}", "{evil}"),
            ("Content-Length:  \t{len}\t ", "{evil}"),
            ("Content-Length: 000{len}", "{evil}"),
            (
                "Transfer_Encoding: chunked\r\nContent-Length: {len}",
                "{evil}",
            ),
            (
                "Connection: host, content-length\r\nContent-Length: {len}",
                "{evil}",
            ),
            (
                "Connection: transfer-encoding\r\nTransfer-Encoding: chunked",
                chunk,
            ),
            ("Transfer-Encoding: chunked", chunk),
            ("TRANSFER-ENCODING:\tChunked\t", chunk),
            ("Transfer-Encoding: identity, chunked", chunk),
            (
                "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
                chunk,
            ),
            (
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
                chunk,
            ),
            (
                "Transfer-Encoding: chunked",
                "{hex};a=\"b\"\r\n{evil}\r\n0;c\r\n\r\n",
            ),
            (
                "Transfer-Encoding: chunked",
                "000{hex} \r\n{evil}\r\n00\r\n\r\n",
            ),
            (
                "Transfer-Encoding: chunked",
                "{hex}\r\n{evil}\r\n0\r\nHost: evil.example\r\nContent-Length: 9\r\n\r\n",
            ),
        ] {
            let rest =
                " {first} HTTP/1.1\r\nHost: {host}\r\n".to_owned() + lines + "\r\n\r\n" + body;
            stage.takes(way, &format!("GET{rest}")).await;
            match way {
                Way::Pages => stage.refuses(way, &format!("POST{rest}")).await,
                _ => stage.takes(way, &format!("POST{rest}")).await,
            }
        }
    }
    stage.has_kept_nothing_wrong();
}

/// RFC 9112 section 6.3: what came before may have read it otherwise, so nothing may follow.
#[tokio::test]
async fn a_length_beside_chunks_ends_the_connection() {
    let stage = Stage::new().await;
    let (chunked, length) = (
        "Transfer-Encoding: chunked\r\n",
        "Content-Length: {len}\r\n",
    );
    for way in WAYS {
        for lines in [[chunked, length], [length, chunked]] {
            for method in ["GET", "POST"] {
                let head = format!("{method} {{first}} HTTP/1.1\r\nHost: {{host}}\r\n");
                let trick = head + &lines.concat() + "\r\n0\r\n\r\n{evil}";
                let (answers, asked) = stage.plays(way, &trick).await;
                let first = way.body("first");
                let once = matches!(&answers[..], [(200, body)] if *body == first)
                    || matches!(&answers[..], [(400..500, _)]);
                assert!(once, "{way:?} {trick:?}: {answers:?}");
                assert!(asked.len() <= 1, "{way:?} {trick:?}: {asked:?}");
            }
        }
    }
    stage.has_kept_nothing_wrong();
}

/// Nothing that follows is looked at, and the end of the client is the end of it all.
#[tokio::test]
async fn a_chunk_without_an_end_swallows_what_follows() {
    let stage = Stage::new().await;
    for way in [Way::Forward, Way::Absolute] {
        for size in ["ffffffffffffffff", "fffffffffffffff", "100000000{hex}"] {
            let trick =
                "POST {first} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n";
            let trick = way.spell(&format!("{trick}{size}\r\n{{evil}}\r\n0\r\n\r\n{{evil}}"));
            let mut tcp = stage.larder.client().tcp().await;
            tcp.write_all(trick.as_bytes()).await.unwrap();
            tcp.shutdown().await.unwrap();
            let mut said = Vec::new();
            let _ = within("the end", tcp.read_to_end(&mut said)).await;
            assert!(!said.starts_with(b"HTTP/1.1 2"), "{way:?} {size}");
        }
    }
    assert_eq!(stage.upstream.journal().len(), 0);
}

#[tokio::test]
async fn a_head_that_others_read_differently_is_refused() {
    let stage = Stage::new().await;
    for way in WAYS {
        for trick in [
            "GET {first} HTTP/1.1\r\nHost: {host}\r\nX: a\r\n b\r\n\r\n",
            "GET {first} HTTP/1.1\r\nHost: {host}\r\nX: a\r\n\tHost: b\r\n\r\n",
            "GET {first} HTTP/1.1\r\n X: a\r\nHost: {host}\r\n\r\n",
            "GET {first} HTTP/1.1\rHost: {host}\r\r",
            "GET {first} HTTP/1.1\r\nHost: {host}\r\nX: a\rHost: b\r\n\r\n",
            "GET {first} HTTP/1.1\r\nHost: {host}\r\nX: a\r\r\n\r\n",
            "GET {first} HTTP/1.1\r\nHost: {host}\r\nX: a\0b\r\n\r\n",
            "GET {first} HTTP/1.1\r\nHost: {host}\r\nX\0: a\r\n\r\n",
            "GET {first} HTTP/1.1\r\nHost: {host}\r\nX Y: a\r\n\r\n",
            "GET {first} HTTP/1.1\r\nHost : {host}\r\n\r\n",
            "GET {first} HTTP/1.1\r\nHost: {host}\r\nXY\r\n\r\n",
            "GET {first} HTTP/1.1\r\nHost: {host}\r\n: a\r\n\r\n",
            "GET {first} HTTP/1.1\r\n:authority: evil.example\r\nHost: {host}\r\n\r\n",
            "GET {first} HTTP/1.1\r\nHost: {host}\r\n:path: {evil path}\r\n\r\n",
            "GET {first} HTTP/1.1\r\n:method: DELETE\r\nHost: {host}\r\n\r\n",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
            "GET {first} HTTP/2.0\r\nHost: {host}\r\n\r\n",
            "GET {first} HTTP/1.2\r\nHost: {host}\r\n\r\n",
            "GET {first} http/1.1\r\nHost: {host}\r\n\r\n",
            "GET {first}\r\n\r\n",
            "GET\t{first}\tHTTP/1.1\r\nHost: {host}\r\n\r\n",
            "GET  {first} HTTP/1.1\r\nHost: {host}\r\n\r\n",
            "GET {first} HTTP/1.1 \r\nHost: {host}\r\n\r\n",
            "GET {first} {evil path} HTTP/1.1\r\nHost: {host}\r\n\r\n",
            "GET {first}\x01 HTTP/1.1\r\nHost: {host}\r\n\r\n",
            "GET{evil path} {first} HTTP/1.1\r\nHost: {host}\r\n\r\n",
            "GET {first} HTTP/1.1\r\nHost: {host}\r\nHost: {host}\r\n\r\n",
            "GET {first} HTTP/1.1\r\nHost: {host}\r\nhost: evil.example\r\n\r\n",
        ] {
            stage.refuses(way, trick).await;
        }
        // A line may end in LF alone (RFC 9112 section 2.2), and no line may mean to upgrade.
        for trick in [
            "GET {first} HTTP/1.1\nHost: {host}\n\n",
            "GET {first} HTTP/1.1\r\nHost: {host}\nX: y\n\r\n",
            "\r\n\r\nGET {first} HTTP/1.1\r\nHost: {host}\r\n\r\n",
            "GET {first} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\n",
            "GET {first} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
        ] {
            stage.takes(way, trick).await;
        }
    }
    stage.has_kept_nothing_wrong();
}

/// Own pages are for whoever asks; what is fetched is for one host.
#[tokio::test]
async fn a_host_with_more_to_it_is_refused() {
    let stage = Stage::new().await;
    let hosts = "me@{host} me:pw@{host}:{port} {host}@evil.example {host}/evil {host}?evil \
        {host}#evil {host}\\@evil.example {host}:8443 {host}:evil {host}:+{port} {host},evil.example \
        {host};evil {host}%00.evil.example evil.{host} {host}.evil.example {host}.. [::1] 127.0.0.1 \
        localhost http://{host} github.com";
    let blank = [
        "{host} evil.example",
        "{host}\tevil.example",
        "evil.example {host}",
    ];
    for way in WAYS.into_iter().filter(|way| *way != Way::Pages) {
        for host in hosts.split_whitespace().chain(blank) {
            let trick = format!("GET {{first}} HTTP/1.1\r\nHost: {host}\r\n\r\n");
            stage.refuses(way, &trick).await;
        }
        for host in ["{HOST}", "{host}.", "{host}:{port}", "{HOST}.:{port}"] {
            let trick = format!("GET {{first}} HTTP/1.1\r\nHost: {host}\r\n\r\n");
            stage.takes(way, &trick).await;
        }
    }
    stage.has_kept_nothing_wrong();
}

#[tokio::test]
async fn a_target_that_others_read_differently_is_refused() {
    let stage = Stage::new().await;
    let forward = "http:{host}/first http:/{host}/first http:///first http://me@{host}/first \
        http://{host}@evil.example/first http://{host}:80@evil.example/first \
        http://{host}\\@evil.example/first http://elsewhere%2eexample/first \
        http://{host}:99999/first http://releases.hashicorp.com/first \
        http://releases.hashicorp.com:443/first ftp://{host}/first ws://{host}/first \
        https://{host}/first {host}/first";
    let absolute = "https:{host}/first https://me:pw@{host}/first https://{host}@evil.example/first \
        https://registry.terraform.io/first https://releases%2ehashicorp.com/first \
        https://{host}:8443/first https://{host}\\@registry.terraform.io/first https://{host}//first \
        https://{host}/a/../first https://{host}/%66irst https://{host}/%2ffirst *";
    let origin = "* first //first //registry.terraform.io/first /a/../first /./first /\\first \
        /%2ffirst /a/..%2ffirst /%66irst /first%00 /first%0d%0aX:%20y http://{host}/first \
        https://registry.terraform.io/first https://{host}@registry.terraform.io/first \
        https://me@{host}/first https://{host}:8443/first {host}:443";
    let pages = "* healthz //larder/healthz /healthz/ /x/../healthz /%68ealthz /healthz%00 \
        /healthz\\ http://evil.example@{host}/healthz";
    for (way, targets) in [
        (Way::Forward, forward),
        (Way::Absolute, absolute),
        (Way::Connect, origin),
        (Way::Sni, origin),
        (Way::Pages, pages),
    ] {
        for target in targets.split_whitespace() {
            for method in ["GET", "OPTIONS"] {
                let trick = format!("{method} {target} HTTP/1.1\r\nHost: {{host}}\r\n\r\n");
                stage.refuses(way, &trick).await;
            }
        }
    }
    // Spellings of one thing: they are answered, and kept, as that one thing.
    let spellings = "https://{HOST}/first https://{host}./first https://{host}:443/first \
        HTTPS://{host}/first {first}#/../evil {first}#@evil.example";
    for way in [Way::Absolute, Way::Connect, Way::Sni] {
        for target in spellings.split_whitespace() {
            let trick = format!("GET {target} HTTP/1.1\r\nHost: {{host}}\r\n\r\n");
            stage.takes(way, &trick).await;
        }
    }
    stage.has_kept_nothing_wrong();
}

#[tokio::test]
async fn connect_takes_a_host_and_a_port_and_nothing_else() {
    let stage = Stage::new().await;
    let targets = "/evil {host}:443/evil {host}:443?evil {host}:443#evil me@{host}:443 \
        {host}:443@evil.example:443 https://{host}:443 {host}:443,evil.example:443 {host}\\:443 \
        {host}%3a443:443 {host} *";
    for way in WAYS {
        for target in targets.split_whitespace() {
            let trick = format!("CONNECT {target} HTTP/1.1\r\nHost: {{host}}\r\n\r\n");
            stage.refuses(way, &trick).await;
        }
    }
    for way in [Way::Connect, Way::Sni] {
        let trick = "CONNECT {host}:443 HTTP/1.1\r\nHost: {host}\r\n\r\n";
        stage.refuses(way, trick).await;
    }
}

/// CONNECT, SNI, the request's URL and its Host: one that disagrees is one too many.
#[tokio::test]
async fn all_names_of_a_host_must_agree() {
    let stage = Stage::new().await;
    let client = stage.larder.client();
    let names = [RELEASES, TERRAFORM, ELSEWHERE];
    for connect in [Some(RELEASES), Some(TERRAFORM), None] {
        for (sni, host) in names.iter().flat_map(|sni| names.map(|host| (*sni, host))) {
            for url in [None, Some(RELEASES), Some(TERRAFORM), Some(ELSEWHERE)] {
                let what = format!("CONNECT {connect:?}, SNI {sni}, Host {host}, URL {url:?}");
                let agree = sni != ELSEWHERE
                    && host == sni
                    && [connect, url].into_iter().flatten().all(|name| name == sni);
                let before = stage.upstream.journal().len();
                let tcp = match connect {
                    Some(name) => client.connect(&format!("{name}:443")).await.unwrap(),
                    None => client.tcp().await,
                };
                let Ok(tls) = client.handshake(tcp, sni).await else {
                    assert!(!agree, "{what}: no handshake");
                    continue;
                };
                let mut conn = Conn::new(tls);
                let target = url.map_or("/first".to_owned(), |url| format!("https://{url}/first"));
                conn.request("GET", host, &target, &[]).await;
                let got = conn.answer("GET").await.unwrap().finish().await;
                match agree {
                    true => assert_eq!(got.text(), format!("https://{sni}/first"), "{what}"),
                    false => assert!((400..500).contains(&got.status), "{what}: {}", got.text()),
                }
                let asked = stage.upstream.journal().len() - before;
                assert_eq!(asked, usize::from(agree), "{what}");
            }
        }
    }
    stage.has_kept_nothing_wrong();
}

/// Neither larder nor what it sees of upstream speaks it: were it chosen, nobody would understand.
#[tokio::test]
async fn http_2_is_never_chosen() {
    let stage = Stage::new().await;
    let client = stage.larder.client();
    for offer in [&["h2", "http/1.1"][..], &["http/1.1", "h2"], &["h2"]] {
        for (connect, sni) in [(true, RELEASES), (false, RELEASES), (false, "localhost")] {
            let tcp = match connect {
                true => client.connect(&format!("{sni}:443")).await.unwrap(),
                false => client.tcp().await,
            };
            let mut config = client.config();
            config.alpn_protocols = offer.iter().map(|name| name.as_bytes().to_vec()).collect();
            // Who speaks nothing else is told so (RFC 7301 section 3.2), or spoken to in HTTP/1.1.
            let Ok(tls) = handshake(tcp, sni, config).await else {
                assert_eq!(offer, ["h2"], "{sni}");
                continue;
            };
            let chosen = tls.get_ref().1.alpn_protocol();
            assert!(matches!(chosen, None | Some(b"http/1.1")), "{chosen:?}");
        }
    }
}

/// Only what larder itself looks at may choose an answer that all will share.
#[tokio::test]
async fn headers_that_name_another_thing_change_nothing_that_is_kept() {
    let stage = Stage::new().await;
    // An upstream that any header can talk into anything.
    for host in [RELEASES, ELSEWHERE] {
        let own = ["host", "accept", "user-agent", "accept-encoding", "via"];
        stage.upstream.route_fn(host, "/first", move |seen| {
            let mut others = seen.headers.clone();
            others.retain(|(name, _)| !own.contains(&name.to_ascii_lowercase().as_str()));
            let scheme = if host == RELEASES { "https" } else { "http" };
            match &others[..] {
                [] => Reply::text(format!("{scheme}://{host}/first")),
                others => Reply::text(format!("{others:?}")),
            }
        });
    }
    for way in [Way::Absolute, Way::Connect, Way::Sni] {
        for line in [
            "X-Forwarded-Host: evil.example",
            "Forwarded: host=evil.example;proto=http",
            "X-HTTP-Method-Override: DELETE",
            "X-HTTP-Method: PUT",
            "X-Original-URL: /evil",
            "X-Rewrite-URL: /evil",
            "X-Forwarded-Proto: http",
            "X-Forwarded-For: 127.0.0.1\r\nX-Real-IP: 127.0.0.1",
            "Range: bytes=0-3\r\nIf-Range: \"x\"",
            "Accept-Language: evil\r\nOrigin: https://evil.example",
            "Content-Encoding: gzip\r\nContent-Type: evil/evil",
            "Expect: evil",
            "Connection: host",
            "Connection: host, accept, via, cache-control, range, x-y\r\nX-Y: z",
            "Connection: keep-alive\r\nKeep-Alive: timeout=1\r\nProxy-Connection: evil",
            "Proxy-Authorization: Basic ZXZpbA==",
            "TE: trailers\r\nTrailer: Host",
            // Whoever strips it is left with a request for all.
            "Authorization: Bearer evil\r\nConnection: authorization",
            "Cookie: a=evil\r\nConnection: cookie, close-not",
        ] {
            let trick = format!("GET {{first}} HTTP/1.1\r\nHost: {{host}}\r\n{line}\r\n\r\n");
            stage.takes(way, &trick).await;
        }
        // One client's own: upstream sees it, and nobody else what upstream says to it.
        let own = "GET {first} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer evil\r\nConnection: host\r\n\r\n";
        let (answers, asked) = stage.plays(way, own).await;
        assert!(answers[0].1.contains("Bearer evil"), "{way:?}: {answers:?}");
        assert_eq!(asked.len(), 2, "{way:?}: {asked:?}");
        stage
            .takes(way, "GET {first} HTTP/1.1\r\nHost: {host}\r\n\r\n")
            .await;
    }
    stage.has_kept_nothing_wrong();
}
