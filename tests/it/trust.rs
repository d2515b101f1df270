//! Signatures over SHA256SUMS through the socket: who vouches is told and kept, a bad signature is
//! marked, and where a rule wants a valid one, nothing else passes.

use serde_json::Value;

use crate::common::registry::sums_line;
use crate::common::*;

const AUTHORIZATION: [(&str, &str); 1] = [("Authorization", "Bearer token")];
const BAD_ON_MISS: &str = "larder; fwd=miss; stored; detail=bad-signature";
const BAD_ON_HIT: &str = "larder; hit; detail=bad-signature";

// --- Tiers ---

#[tokio::test]
async fn who_stands_behind_a_provider_is_told_by_tier() {
    let upstream = Upstream::start();
    let (trusted, author, other) = (Signer::new(), Signer::new(), Signer::new());
    let release = |name: &str| Release::new("acme", name, "1.2.3");
    let partner = |trust: String| {
        let mut key = author.public();
        key.trust = trust;
        [key]
    };
    let by_author = |name: &str| release(name).signed_by(&author);
    let releases = [
        (
            release("a").signed_by(&trusted),
            "signed by HashiCorp",
            Some(&trusted),
        ),
        (
            by_author("b").naming(&partner(trusted.vouches_for(&author))),
            "signed by a partner",
            Some(&author),
        ),
        (by_author("c"), "self-signed", Some(&author)),
        (release("d").unsigned(), "unsigned", None),
        (release("e").naming(&[]), "unsigned", None),
        (release("f").badly_signed_by(&author), "bad", Some(&author)),
        (by_author("g").naming(&[other.public()]), "bad", None),
        (
            by_author("h").naming(&partner(other.vouches_for(&author))),
            "bad",
            Some(&author),
        ),
    ];
    let setup = trusting(&Setup::new(&upstream), &trusted);
    let larder = setup.start().await;
    for (release, tier, _) in &releases {
        release.publish(&upstream);
        println!("{} is {tier}", release.name);
        let got = install(&larder.client(), release).await;
        got.assert_is(&release.archive());
        let marked = got.cache_status().contains("bad-signature");
        assert_eq!(marked, *tier == "bad", "{}", got.cache_status());
    }
    setup.holds(releases.len()).await;
    // Told once the archive is kept.
    let told = async || larder.metric("larder_bad_signatures_total").await;
    let start = std::time::Instant::now();
    while told().await < 3.0 && start.elapsed() < PATIENCE {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(told().await, 3.0);

    for (release, tier, key) in &releases {
        let listed = listed(&setup, &release.name);
        let verified = &listed["verified"];
        assert_eq!(verified["tier"], *tier, "{listed:#}");
        let key = key.map(Signer::fingerprint);
        assert_eq!(verified["key"].as_str(), key.as_deref(), "{listed:#}");
    }
}

#[tokio::test]
async fn a_product_is_vouched_for_by_the_signature_beside_its_sums() {
    let upstream = Upstream::start();
    let (trusted, other) = (Signer::new(), Signer::new());
    let setup = trusting(&Setup::new(&upstream), &trusted);
    let larder = setup.start().await;
    let products = ["good", "bad", "foreign", "bare"].map(|name| Product::new(name, "1.9.0"));
    for product in &products {
        product.publish(&upstream);
        let signature = match product.name.as_str() {
            "good" => trusted.sign(&product.sums),
            "bad" => trusted.sign(b"other bytes"),
            "foreign" => other.sign(&product.sums),
            _ => continue,
        };
        let path = format!("{}.72D7468F.sig", product.sums_path());
        upstream.route(RELEASES, &path, Reply::file("x/y", signature));
    }
    for product in &products {
        let got = larder.client().get(&product.archive_url()).await;
        got.assert_is(&product.archive);
    }
    setup.holds(4).await;
    let tiers = ["signed by HashiCorp", "bad", "unsigned", "unsigned"];
    for (product, tier) in products.iter().zip(tiers) {
        let listed = listed(&setup, &product.name);
        assert_eq!(listed["verified"]["tier"], tier, "{listed:#}");
    }
    larder.terminate().await;

    let larder = setup.args(["--verify", "signature"]).start().await;
    for (product, tier) in products.iter().zip(tiers) {
        let got = larder.client().get(&product.archive_url()).await;
        match tier {
            "signed by HashiCorp" => got.assert_is(&product.archive),
            tier => assert!(got.assert_refused(502).contains(tier)),
        }
    }
}

// --- verify = checksum ---

#[tokio::test]
async fn a_bad_signature_is_an_alarm_and_its_archive_is_served_and_marked() {
    let upstream = Upstream::start();
    let release = Release::new("acme", "thing", "1.2.3").badly_signed_by(&Signer::new());
    release.publish(&upstream);
    let setup = Setup::new(&upstream);
    let larder = setup.start().await;

    let got = install(&larder.client(), &release).await;
    got.assert_is(&release.archive());
    assert_eq!(got.cache_status(), BAD_ON_MISS);
    setup.holds(1).await;
    larder
        .logs(&[
            "ERROR",
            "BAD SIGNATURE",
            &release.archive_url(),
            "acme/thing 1.2.3",
        ])
        .await;
    assert_eq!(larder.metric("larder_bad_signatures_total").await, 1.0);
    let hit = larder.client().get(&release.archive_url()).await;
    hit.assert_is(&release.archive());
    assert_eq!(hit.cache_status(), BAD_ON_HIT);
    larder.terminate().await;

    let larder = setup.start().await;
    let hit = larder.client().get(&release.archive_url()).await;
    hit.assert_is(&release.archive());
    assert_eq!(hit.cache_status(), BAD_ON_HIT);
    let head = larder.client().head(&release.archive_url()).await;
    assert_eq!(head.cache_status(), BAD_ON_HIT);
}

#[tokio::test]
async fn a_signature_saves_nothing_whose_checksum_is_wrong() {
    let upstream = Upstream::start();
    for verify in ["checksum", "signature"] {
        let release = Release::new("acme", verify, "1.2.3");
        release.publish(&upstream);
        let corrupt = Reply::archive(release.archive()).corrupt_at(150_000);
        release.publish_archive(&upstream, corrupt);
        let larder = Setup::new(&upstream)
            .args(["--verify", verify])
            .start()
            .await;
        let got = install(&larder.client(), &release).await;
        assert!(!got.succeeded(), "{verify}");
        larder.setup.holds(0).await;
    }
}

// --- verify = signature ---

#[tokio::test]
async fn without_a_valid_signature_nothing_passes_where_one_is_wanted() {
    let upstream = Upstream::start();
    let signer = Signer::new();
    let release = |name: &str| Release::new("acme", name, "1.2.3").signed_by(&signer);
    let setup = Setup::new(&upstream).args(["--verify", "signature"]);
    let larder = setup.start().await;
    let client = larder.client();
    for (release, why) in [
        (release("bad").badly_signed_by(&signer), "it is bad"),
        (
            release("foreign").naming(&[Signer::new().public()]),
            "does not name",
        ),
        (release("unsigned").unsigned(), "404"),
        (release("nameless").naming(&[]), "no key is named"),
    ] {
        release.publish(&upstream);
        let got = install(&client, &release).await;
        let words = got.assert_refused(502);
        for word in [why, "acme/", "1.2.3", "verify = \"signature\""] {
            assert!(words.contains(word), "{word}: {words}");
        }
        assert_eq!(got.reason, words);
        let head = client.head(&release.archive_url()).await;
        assert_eq!(head.status, 502, "{}", release.name);
        let range = [("Range", "bytes=0-9")];
        let part = client.get_with(&release.archive_url(), &range).await;
        part.assert_refused(502);
        let private = client
            .get_with(&release.archive_url(), &AUTHORIZATION)
            .await;
        assert!(!private.succeeded());
        let (host, path) = release.archive_path();
        assert_eq!(upstream.gets(host, &path), 0, "{}", release.name);
    }
    assert!(larder.metric("larder_unsigned_refused_total").await >= 12.0);

    for name in ["good", "private"] {
        let release = release(name);
        release.publish(&upstream);
        if name == "private" {
            // All of it known from public documents alone.
            client.get(&release.document_url()).await;
            let got = client
                .get_with(&release.archive_url(), &AUTHORIZATION)
                .await;
            got.assert_is(&release.archive());
            continue;
        }
        install(&client, &release)
            .await
            .assert_is(&release.archive());
        setup.holds(1).await;
    }
    setup.holds(1).await;
}

/// Upstream names them only when the archive is asked for.
#[tokio::test]
async fn what_is_needed_to_judge_is_fetched_before_the_archive() {
    let upstream = Upstream::start();
    let release = Release::new("acme", "thing", "1.2.3").on(TERRAFORM, Home::GitHub);
    release.publish(&upstream);
    let setup = Setup::new(&upstream).args(["--verify", "signature"]);
    let larder = setup.start().await;
    let document = larder.client().get(&release.document_url()).await.json();
    let url = document["download_url"].as_str().unwrap();
    larder.client().get(url).await.assert_is(&release.archive());
    setup.holds(1).await;
    assert_eq!(listed(&setup, "thing")["verified"]["tier"], "self-signed");
}

#[tokio::test]
async fn what_was_kept_under_an_easier_rule_is_judged_anew() {
    let upstream = Upstream::start();
    let signer = Signer::new();
    let good = Release::new("acme", "good", "1.2.3").signed_by(&signer);
    let bad = Release::new("acme", "bad", "1.2.3").badly_signed_by(&signer);
    let unsigned = Release::new("acme", "unsigned", "1.2.3").unsigned();
    let setup = Setup::new(&upstream);
    let larder = setup.start().await;
    for release in [&good, &bad, &unsigned] {
        release.publish(&upstream);
        install(&larder.client(), release).await;
    }
    setup.holds(3).await;
    larder.terminate().await;

    let strict = setup.clone().args(["--verify", "signature"]);
    let offline = strict.clone().arg("--offline");
    for (setup, forgets) in [(strict, false), (offline.clone(), false), (offline, true)] {
        if forgets {
            // What is on record beside the archives is enough.
            std::fs::remove_dir_all(setup.data_dir().join("metadata")).unwrap();
        }
        let larder = setup.start().await;
        let client = larder.client();
        for release in [&bad, &unsigned] {
            client.get(&release.archive_url()).await.assert_refused(502);
            assert_eq!(client.head(&release.archive_url()).await.status, 502);
        }
        let got = client.get(&good.archive_url()).await;
        got.assert_is(&good.archive());
        got.assert_hit();
        larder.terminate().await;
    }
    // Nor is anything thrown away.
    setup.holds(3).await;
}

#[tokio::test]
async fn the_raw_bytes_of_the_sums_are_what_is_signed() {
    let upstream = Upstream::start();
    let signer = Signer::new();
    let spoilers: [fn(&str) -> String; 5] = [
        |text| text.replace('\n', "\r\n"),
        |text| text.trim_end().to_owned(),
        |text| format!("{text}{text}"),
        |text| format!("\n\n{}\n\n", text.replace('\n', "\n\n")),
        |text| format!("{text}{}", sums_line("another_file.zip", b"")),
    ];
    let setup = Setup::new(&upstream).args(["--verify", "signature"]);
    let larder = setup.start().await;
    for (i, spoiler) in spoilers.iter().enumerate() {
        let written = |name: &str| {
            let mut release = Release::new("acme", &format!("{name}{i}"), "1.2.3");
            let text = String::from_utf8(release.sums.to_vec()).unwrap();
            release.sums = spoiler(&text).into();
            release
        };
        let signed = written("signed").signed_by(&signer);
        signed.publish(&upstream);
        install(&larder.client(), &signed)
            .await
            .assert_is(&signed.archive());

        // The same text, where another was signed.
        let touched = written("touched");
        touched.publish(&upstream);
        let words = install(&larder.client(), &touched)
            .await
            .assert_refused(502);
        assert!(words.contains("it is bad"), "{i}: {words}");
    }
    setup.holds(spoilers.len()).await;
}

// --- Rules ---

#[tokio::test]
async fn the_most_specific_rule_decides_and_keys_are_pinned() {
    let upstream = Upstream::start();
    let (signer, other) = (Signer::new(), Signer::new());
    let spaced: Vec<_> = signer.fingerprint().chars().map(String::from).collect();
    let spaced: Vec<_> = spaced.chunks(4).map(|four| four.concat()).collect();
    let text = format!(
        "policy_contact = \"the platform team\"\n[verify]\n\
         \"*\" = \"signature\"\n\
         \"registry.terraform.io/acme/*\" = \"checksum\"\n\
         \"registry.terraform.io/acme/strict\" = \"signature\"\n\
         \"pinned/right\" = {{ keys = [\"{}\"] }}\n\
         \"pinned/*\" = {{ keys = [\"{}\", \"{}\"] }}\n",
        spaced.join(" ").to_lowercase(),
        other.fingerprint(),
        Signer::new().fingerprint(),
    );
    let larder = Setup::new(&upstream).config(&text).start().await;
    let client = larder.client();
    for (namespace, name, passes) in [
        ("acme", "thing", true),
        ("acme", "strict", false),
        ("someone", "thing", false),
    ] {
        let release = Release::new(namespace, name, "1.2.3").unsigned();
        release.publish(&upstream);
        let got = install(&client, &release).await;
        match passes {
            true => got.assert_is(&release.archive()),
            false => assert!(got.assert_refused(502).contains("the platform team")),
        }
    }
    let pinned = |name: &str, by: &Signer| Release::new("pinned", name, "1.2.3").signed_by(by);
    for (release, passes) in [
        (pinned("right", &signer), true),
        (pinned("wrong", &signer), false),
        (pinned("either", &other), true),
    ] {
        release.publish(&upstream);
        let got = install(&client, &release).await;
        match passes {
            true => got.assert_is(&release.archive()),
            false => {
                let words = got.assert_refused(502);
                assert!(words.contains("none of the pinned keys"), "{words}");
                assert!(words.contains(&signer.fingerprint()), "{words}");
            }
        }
    }
    larder.setup.holds(3).await;
}

#[tokio::test]
async fn a_pin_holds_for_what_is_on_record_too() {
    let upstream = Upstream::start();
    let signer = Signer::new();
    let release = Release::new("acme", "thing", "1.2.3").signed_by(&signer);
    release.publish(&upstream);
    let setup = Setup::new(&upstream);
    let larder = setup.start().await;
    install(&larder.client(), &release).await;
    setup.holds(1).await;
    larder.terminate().await;

    std::fs::remove_dir_all(setup.data_dir().join("metadata")).unwrap();
    let offline = setup.arg("--offline");
    for (pin, passes) in [(Signer::new(), false), (signer, true)] {
        let pin = pin.fingerprint();
        let rule = format!("[verify]\n\"*\" = {{ keys = [\"{pin}\"] }}\n");
        let larder = offline.clone().config(&rule).start().await;
        let got = larder.client().get(&release.archive_url()).await;
        assert_eq!(got.succeeded(), passes, "{}", got.status);
        larder.terminate().await;
    }
}

/// With that key in place of HashiCorp's.
fn trusting(setup: &Setup, key: &Signer) -> Setup {
    let file = setup.path("trusted.asc");
    std::fs::write(&file, key.public().armored).unwrap();
    setup
        .clone()
        .args(["--trusted-key", file.to_str().unwrap()])
}

/// What `larder list --json` says of the only archive of that provider or product.
fn listed(setup: &Setup, name: &str) -> Value {
    let all = setup.says_json(&["list"]);
    let ending = format!("/{name}");
    let is_it = |listed: &&Value| listed["address"].as_str().unwrap().ends_with(&ending);
    let all: Vec<_> = all.as_array().unwrap().iter().filter(is_it).collect();
    assert_eq!(all.len(), 1, "{name}: {all:?}");
    all[0].clone()
}
