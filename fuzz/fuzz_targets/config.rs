//! The config file, and the patterns and ranges in it.
#![no_main]

use std::cmp::Ordering;
use std::net::IpAddr;

use clap::Parser;
use larder::config::access::TunnelPattern;
use larder::config::pattern::{Pattern, Range, Selector, version_of};
use larder::config::policy::{Policy, Rules};
use larder::config::{
    Authority, Cidr, CommonArgs, Config, ConnectTo, DEFAULT_INTERCEPT, File, HostName, ServeArgs,
    Tunnels,
};
use larder_fuzz::survives_printing;
use libfuzzer_sys::fuzz_target;

const PASSWORD: &str = "S3cretPassw0rd";

fuzz_target!(|text: &str| {
    file(text);
    secret(text);
    let mut lines = text.lines();
    let [a, b, c] = std::array::from_fn(|_| lines.next().unwrap_or_default());
    versions(a, b);
    patterns(a, b);
    tunnels(a, b);
    options([a, b, c]);
});

fn settle(text: &str, serve: &ServeArgs) -> Result<Config, String> {
    let common = CommonArgs {
        data_dir: Some("/data".into()),
        ..Default::default()
    };
    let settled = File::parse(text)?.settle(&common, serve);
    settled.map_err(|exit| {
        assert_eq!(exit.code, 2);
        exit.message
    })
}

fn file(text: &str) {
    let Ok(config) = settle(text, &ServeArgs::default()) else {
        return;
    };
    assert_eq!(config.data_dir.to_str(), Some("/data"));
    assert!(!config.listen.is_empty() && !config.allow_from.is_empty());
    // Nobody is let in from elsewhere who was not named.
    let named = text.contains("allow_from") || text.contains('\\');
    assert!(config.loopback_only() || named);
    for (host, held) in DEFAULT_INTERCEPT.iter().zip(&config.intercept) {
        assert_eq!(held.to_string(), format!("{host}:443"));
    }
    for (i, authority) in config.intercept.iter().enumerate() {
        assert!(!config.intercept[..i].contains(authority));
    }
    let limits = &config.limits;
    assert!(limits.connections > 0 && limits.connections_per_address > 0 && limits.fills > 0);
    assert!(limits.requests_per_connection > 0 && limits.header_bytes >= 8 << 10);
    // Tokio's semaphores know no more.
    let most = usize::MAX >> 3;
    for bound in [limits.connections, limits.fills, limits.tunnels] {
        assert!(bound <= most, "{bound} permits");
    }
    let paths = config.trusted_keys.iter().chain(&config.upstream_ca);
    for path in paths.chain(&config.htpasswd).chain(&config.client_ca) {
        assert!(
            path.is_absolute() || path.as_os_str().is_empty(),
            "{path:?}"
        );
    }
    for names in [&["registry.terraform.io", "a", "b"][..], &["h", "p"]] {
        let rule = config.policy.verify(names);
        for key in &rule.keys {
            let digits = key.chars().filter(|c| !c.is_whitespace());
            assert!(matches!(digits.count(), 40 | 64));
        }
        for selector in config.policy.allow.iter().chain(&config.policy.deny) {
            survives_printing::<Selector>(&selector.to_string()).expect("reads");
        }
        let _ = config.policy.judge(names, Some("1.0.0"), false);
    }
    let again = settle(text, &ServeArgs::default()).expect("settles again");
    assert_eq!(format!("{again:?}"), format!("{config:?}"));
}

/// A parent's password is shown by no message and no debug print, whatever else is wrong.
fn secret(text: &str) {
    let (first, rest) = text.split_once('\n').unwrap_or((text, ""));
    if text.contains(PASSWORD) || first.contains(['\'', '\r']) {
        return;
    }
    let text = format!("upstream_proxy = 'http://me:{PASSWORD}@{first}'\n{rest}");
    let shown = match settle(&text, &ServeArgs::default()) {
        Ok(config) => format!("{config:?}"),
        Err(message) => message,
    };
    assert!(!shown.contains(PASSWORD), "{shown}");
}

fn versions(a: &str, b: &str) {
    let (Some(v), Some(w)) = (version_of(a), version_of(b)) else {
        return;
    };
    assert_eq!(version_of(&v.to_string()), Some(v.clone()));
    assert_eq!(version_of(&format!(" v{v}")), Some(v.clone()));
    let order = w.cmp_precedence(&v);
    assert_eq!(v.cmp_precedence(&w), order.reverse());
    let holds = |range: &str| {
        let names = ["h.example", "a", "b"];
        let selector: Selector = format!("* {range}").parse().expect(range);
        let allowing = Policy {
            allow: vec![selector.clone()],
            ..Default::default()
        };
        let denying = Policy {
            deny: vec![selector],
            ..Default::default()
        };
        let allowed = allowing.judge(&names, Some(b), false).is_ok();
        // What can be read is either in a range or not.
        assert_eq!(denying.judge(&names, Some(b), false).is_err(), allowed, "{range}");
        allowed
    };
    let a = a.trim();
    for (op, wanted) in [
        ("", order == Ordering::Equal),
        ("=", order == Ordering::Equal),
        ("!=", order != Ordering::Equal),
        (">", order == Ordering::Greater),
        (">=", order != Ordering::Less),
        ("<", order == Ordering::Less),
        ("<=", order != Ordering::Greater),
    ] {
        assert_eq!(holds(&format!("{op} {a}")), wanted, "{b} {op} {a}");
        assert_eq!(holds(&format!("{op}{a},{op}{a}")), wanted);
    }
    // The last part that was written may grow, no other.
    let number = a.strip_prefix('v').unwrap_or(a);
    let number = number.split(['-', '+']).next().unwrap_or_default();
    let kept = match number.split('.').count() {
        1 => true,
        2 => v.major == w.major,
        _ => (v.major, v.minor) == (w.major, w.minor),
    };
    let wanted = kept && order != Ordering::Less;
    assert_eq!(holds(&format!("~> {a}")), wanted, "{b} ~> {a}");
}

fn patterns(a: &str, b: &str) {
    survives_printing::<Selector>(a);
    let _ = a.parse::<Range>();
    let Some(pattern) = survives_printing::<Pattern>(a) else {
        return;
    };
    let names: Vec<&str> = b.split('/').collect();
    let text = pattern.to_string();
    let mut parts: Vec<&str> = text.split('/').collect();
    let is_host = |part: &str| part.contains(['.', ':']) || part == "localhost" || part == "*";
    match parts.len() {
        1 if text != "*" => parts.insert(0, "releases.hashicorp.com"),
        2 if !is_host(parts[0]) => parts.insert(0, "registry.terraform.io"),
        _ => {}
    }
    let open = parts.last() == Some(&"*");
    let enough = match open {
        true => names.len() >= parts.len(),
        false => names.len() == parts.len(),
    };
    let lower = |name: &str| name.to_ascii_lowercase().into_bytes();
    // Short names alone: the plain way to match takes long.
    if names.iter().all(|name| name.len() < 20) && text.len() < 30 {
        let all = parts.iter().zip(&names);
        let wanted = enough && all.fold(true, |fit, (p, n)| fit & glob(p.as_bytes(), &lower(n)));
        assert_eq!(pattern.fits(&names), wanted, "{text} {names:?}");
    }
    let fits = pattern.fits(&names);
    let star: Pattern = "*".parse().expect("a pattern");
    let rules = Rules::new(vec![(star, 0), (pattern.clone(), 1)]);
    let found = rules.find(&names).map(|(_, rule)| *rule);
    assert_eq!(found, Some(if fits && text != "*" { 1 } else { 0 }));
    let selector: Selector = text.parse().expect("a selector");
    let denying = Policy {
        deny: vec![selector],
        ..Default::default()
    };
    for version in [None, Some("1.0.0"), Some("nightly")] {
        assert_eq!(denying.judge(&names, version, false).is_err(), fits);
    }
}

fn glob(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern, text) {
        ([], _) => text.is_empty(),
        ([b'*', rest @ ..], _) => (0..=text.len()).any(|n| glob(rest, &text[n..])),
        ([p, pattern @ ..], [t, text @ ..]) => p == t && glob(pattern, text),
        _ => false,
    }
}

fn tunnels(a: &str, b: &str) {
    if let Some(range) = survives_printing::<Cidr>(a) {
        let first = range.to_string();
        let first: IpAddr = first.split('/').next().unwrap().parse().expect("an IP");
        assert!(range.contains(first), "{range} {first}");
        if let IpAddr::V4(first) = first {
            assert!(range.contains(first.to_ipv6_mapped().into()));
        }
    }
    let Some(pattern) = survives_printing::<TunnelPattern>(a) else {
        return;
    };
    let tunnels = Tunnels::new(vec![pattern.clone()]).expect("one pattern");
    let Ok(asked) = b.parse::<Authority>() else {
        return;
    };
    let permitted = tunnels.permits(&asked);
    match &pattern {
        TunnelPattern::Allow => assert!(permitted),
        TunnelPattern::Deny => assert!(!permitted),
        TunnelPattern::Host(host, _) => assert!(!permitted || *host == asked.host),
        TunnelPattern::Below(domain, _) => {
            assert!(!permitted || asked.host.as_str().ends_with(&format!(".{domain}")));
        }
        TunnelPattern::Range(range, _) => {
            let ip = asked.host.ip();
            assert!(!permitted || ip.is_some_and(|ip| range.contains(ip)));
        }
    }
    // A host that is listed as it is asked for is permitted.
    let listed: TunnelPattern = asked.to_string().parse().expect("a pattern");
    let tunnels = Tunnels::new(vec![listed]).expect("one pattern");
    assert!(tunnels.permits(&asked), "{asked}");
    assert!(tunnels.lists_port(&asked), "{asked}");
    let other = Authority::new(asked.host.clone(), asked.port ^ 1);
    assert!(!tunnels.permits(&other), "{other}");
}

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    serve: ServeArgs,
}

/// What `larder run` hands on to the proxy that it starts is what it was told, and a proxy that was
/// told so fulfils it.
fn options(lines: [&str; 3]) {
    let mut serve = ServeArgs::default();
    for line in lines {
        let Some((name, value)) = line.split_once('=') else {
            continue;
        };
        match name.trim() {
            "tunnel" => serve.tunnel.extend(value.parse::<TunnelPattern>()),
            "intercept" => serve.intercept.extend(value.parse::<Authority>()),
            "connect_to" => serve.connect_to.extend(value.parse::<ConnectTo>()),
            "hostname" => serve.hostname.extend(value.parse::<HostName>()),
            "max_size" => serve.max_size = value.parse().ok(),
            "drain_timeout" => serve.drain_timeout = value.parse().ok(),
            "offline" => serve.offline = value.parse().ok(),
            "verify" => serve.verify = value.parse().ok(),
            "republished" => serve.republished = value.parse().ok(),
            "third_party" => serve.third_party = value.parse().ok(),
            _ => {}
        }
    }
    let wishes = serve.wishes();
    if wishes.is_empty() {
        return;
    }
    let args = serve.to_args();
    let line = Line::try_parse_from([&["larder".into()], &args[..]].concat());
    let line = line.unwrap_or_else(|e| panic!("{args:?}: {e}"));
    assert_eq!(line.serve.wishes(), wishes);
    assert_eq!(line.serve.drain_timeout, serve.drain_timeout);
    // `allow` and `deny` beside others are refused.
    if let Ok(config) = settle("", &serve) {
        for wish in &wishes {
            assert!(config.fulfils(wish), "{wish:?}");
        }
    }
}
