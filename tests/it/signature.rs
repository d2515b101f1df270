//! Signatures over SHA256SUMS: HashiCorp's real ones, those of Terraform's own tests, and keys made
//! with GnuPG for the rest (`short-life`: a key of one year from 2020-01-01, extended in 2025 to ten
//! more; `subkey`: a P-256 key that signs with an RSA subkey).

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use proptest::prelude::*;

use larder::terraform::signature::{Judgement, Keyring, NamedKey, Tier, is_pinned};

const NULL: &[u8] = include_bytes!("../data/terraform-provider-null_3.1.0_SHA256SUMS");
const NULL_SIG: &[u8] =
    include_bytes!("../data/signing/terraform-provider-null_3.1.0_SHA256SUMS.72D7468F.sig");
const PLACEHOLDER: &[u8] = include_bytes!("../data/signing/placeholder_SHA256SUMS");
const PLACEHOLDER_SIG: &[u8] = include_bytes!("../data/signing/placeholder_SHA256SUMS.sig");
const RANDOM: &[u8] = include_bytes!("../data/random_3.4.3_linux_amd64.json");
const HASHICORP: &str = "C874011F0AB405110D02105534365D9472D7468F";
const AUTHOR: &str = "5BFEEC4317E746008621970637A6AB3BCF2C170A";
/// 2026-11-01
const NOW: u64 = 1_793_491_200;

macro_rules! data {
    ($name:literal) => {
        include_str!(concat!("../data/signing/", $name))
    };
}

fn named(armor: &str) -> NamedKey {
    trusted(armor, "")
}

fn trusted(armor: &str, trust: &str) -> NamedKey {
    NamedKey {
        ascii_armor: armor.into(),
        trust_signature: trust.into(),
    }
}

fn judge(document: &[u8], signature: &[u8], keys: &[NamedKey]) -> Judgement {
    Keyring::shipped().judge(document, signature, keys, NOW)
}

/// The tier of null 3.1.0's sums under a signature of ours.
fn tier(signature: &[u8], key: &str) -> Tier {
    judge(NULL, signature, &[named(key)]).tier
}

#[test]
fn hashicorps_real_signature_by_an_expired_subkey_is_hashicorps() {
    let document: serde_json::Value = serde_json::from_slice(RANDOM).unwrap();
    let old_copy = &document["signing_keys"]["gpg_public_keys"][0]["ascii_armor"];
    let old_copy = named(old_copy.as_str().unwrap());
    for keys in [vec![], vec![old_copy], vec![named(data!("author.asc"))]] {
        let judgement = judge(NULL, NULL_SIG, &keys);
        assert_eq!(judgement.tier, Tier::HashiCorp, "{judgement:?}");
        assert_eq!(judgement.key.as_deref(), Some(HASHICORP));
        assert_eq!(judgement.signed, Some(1_619_111_814));
        assert_eq!(judgement.why, None);
    }
}

#[test]
fn the_raw_bytes_are_what_is_signed() {
    let text = String::from_utf8(NULL.to_vec()).unwrap();
    let first = text.lines().next().unwrap();
    for changed in [
        text.replace('\n', "\r\n"),
        text.trim_end().to_owned(),
        format!("{text}\n"),
        format!("{text}{first}\n"),
        format!("\n{text}"),
        text.replacen('a', "b", 1),
    ] {
        let judgement = judge(changed.as_bytes(), NULL_SIG, &[]);
        assert_eq!(judgement.tier, Tier::Bad, "{judgement:?}");
        assert!(!judgement.tier.is_valid());
    }
}

#[test]
fn a_trust_signature_makes_a_partner_and_a_wrong_one_spoils_all() {
    let author = data!("author.asc");
    for (trust, tier) in [
        ("", Tier::SelfSigned),
        (data!("author-trust.asc"), Tier::Partner),
        (data!("other-trust.asc"), Tier::Bad),
        ("nonsense", Tier::Bad),
    ] {
        let judgement = judge(PLACEHOLDER, PLACEHOLDER_SIG, &[trusted(author, trust)]);
        assert_eq!(judgement.tier, tier, "{judgement:?}");
        assert_eq!(judgement.key.as_deref(), Some(AUTHOR));
    }
    // The trust is in one key alone, not in whoever is named beside it.
    let stranger = trusted(data!("author-ecc.asc"), data!("author-trust.asc"));
    let judgement = judge(PLACEHOLDER, PLACEHOLDER_SIG, &[stranger]);
    assert_eq!(judgement.tier, Tier::Bad, "{judgement:?}");
}

#[test]
fn broken_foreign_and_missing_signatures_are_bad_and_without_keys_unsigned() {
    let author = named(data!("author.asc"));
    for broken in [
        &include_bytes!("../data/signing/broken.sig")[..],
        b"",
        b"-----BEGIN PGP SIGNATURE-----\n",
        b"\xc2",
    ] {
        let judgement = judge(PLACEHOLDER, broken, std::slice::from_ref(&author));
        assert_eq!(judgement.tier, Tier::Bad, "{judgement:?}");
    }
    let other = judge(
        PLACEHOLDER,
        PLACEHOLDER_SIG,
        &[named(data!("author-ecc.asc"))],
    );
    assert_eq!(other.tier, Tier::Bad);
    assert!(other.why.unwrap().contains("does not name"));
    assert_eq!(
        judge(PLACEHOLDER, PLACEHOLDER_SIG, &[]).tier,
        Tier::Unsigned
    );
    let unreadable = judge(PLACEHOLDER, PLACEHOLDER_SIG, &[named("no key at all")]);
    assert_eq!(unreadable.tier, Tier::Bad);
    // A signature of HashiCorp's key over other bytes is bad whoever names which key.
    assert_eq!(judge(PLACEHOLDER, NULL_SIG, &[]).tier, Tier::Bad);
    let several = [
        named("no key at all"),
        named(data!("author-ecc.asc")),
        author,
    ];
    assert_eq!(
        judge(PLACEHOLDER, PLACEHOLDER_SIG, &several).tier,
        Tier::SelfSigned
    );
}

#[test]
fn keys_count_by_the_time_of_signing() {
    let in_time = include_bytes!("../data/signing/short-life.in-time.sig");
    let late = include_bytes!("../data/signing/short-life.late.sig");
    let (short, extended) = (data!("short-life.asc"), data!("short-life.extended.asc"));
    assert_eq!(tier(in_time, short), Tier::SelfSigned);
    assert_eq!(tier(in_time, extended), Tier::SelfSigned);
    assert_eq!(tier(late, extended), Tier::SelfSigned);
    let expired = judge(NULL, late, &[named(short)]);
    assert_eq!(expired.tier, Tier::Bad);
    assert!(expired.why.unwrap().contains("expired"));
    // The longest life of all copies counts.
    let both = judge(NULL, late, &[named(short), named(extended)]);
    assert_eq!(both.tier, Tier::SelfSigned, "{both:?}");
    assert_eq!(tier(in_time, data!("short-life.revoked.asc")), Tier::Bad);
}

#[test]
fn curves_subkeys_armor_and_text_signatures_are_read() {
    let extended = data!("short-life.extended.asc");
    let armored = include_bytes!("../data/signing/short-life.armored.sig");
    assert_eq!(tier(armored, extended), Tier::SelfSigned);
    let text = include_bytes!("../data/signing/short-life.text.sig");
    assert_eq!(tier(text, extended), Tier::SelfSigned);
    let by_subkey = include_bytes!("../data/signing/subkey.sig");
    assert_eq!(tier(by_subkey, data!("subkey.asc")), Tier::SelfSigned);
    assert_eq!(tier(by_subkey, extended), Tier::Bad);
}

#[test]
fn weak_and_expired_signatures_are_bad() {
    let extended = data!("short-life.extended.asc");
    let sha1 = include_bytes!("../data/signing/short-life.sha1.sig");
    assert_eq!(tier(sha1, extended), Tier::Bad);
    let expiring = include_bytes!("../data/signing/short-life.expiring.sig");
    assert_eq!(tier(expiring, extended), Tier::Bad);
    let in_its_day =
        Keyring::shipped().judge(NULL, expiring, &[named(extended)], 1_751_328_000 + 60);
    assert_eq!(in_its_day.tier, Tier::SelfSigned);
}

/// Each copy could be checked by what all copies say: a thousand of them are a million checks.
#[test]
fn a_key_in_many_copies_and_keys_without_end_take_little_time() {
    let bare = |armor: &str| {
        let body = armor.split_once("\n\n").unwrap().1;
        let lines = body
            .lines()
            .take_while(|line| !line.starts_with(['=', '-']));
        BASE64.decode(lines.collect::<String>()).unwrap()
    };
    let armored = |bytes: &[u8]| {
        let text = BASE64.encode(bytes);
        format!(
            "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n{text}\n-----END PGP PUBLIC KEY BLOCK-----\n"
        )
    };
    let start = Instant::now();
    let late = include_bytes!("../data/signing/short-life.late.sig");
    let copies = named(&armored(&bare(data!("short-life.extended.asc")).repeat(32)));
    assert_eq!(judge(NULL, late, &vec![copies; 20]).tier, Tier::SelfSigned);
    // Beyond the bound in bytes no key is read, and what goes before it is.
    let large = named(&armored(&bare(data!("subkey.asc")).repeat(140)));
    let key = named(data!("short-life.extended.asc"));
    let before = [vec![key.clone()], vec![large.clone(); 31]].concat();
    assert_eq!(judge(NULL, late, &before).tier, Tier::SelfSigned);
    let by_subkey = include_bytes!("../data/signing/subkey.sig");
    assert_eq!(judge(NULL, by_subkey, &before).tier, Tier::SelfSigned);
    assert_eq!(judge(NULL, NULL_SIG, &before).tier, Tier::HashiCorp);
    let huge = named(&armored(&bare(data!("subkey.asc")).repeat(280)));
    let unread = judge(NULL, by_subkey, &[huge]);
    assert_eq!(unread.tier, Tier::Bad);
    assert!(unread.why.unwrap().contains("cannot"));
    assert!(
        start.elapsed() < Duration::from_secs(30),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn trusted_keys_take_the_place_of_the_shipped_ones() {
    let mut ring = Keyring::default();
    ring.trust(include_bytes!("../data/signing/author.asc"))
        .unwrap();
    assert_eq!(
        ring.judge(PLACEHOLDER, PLACEHOLDER_SIG, &[], NOW).tier,
        Tier::HashiCorp
    );
    assert_eq!(ring.judge(NULL, NULL_SIG, &[], NOW).tier, Tier::Unsigned);
    let bad = ring.trust(include_bytes!("../data/random_versions.json"));
    assert!(bad.unwrap_err().contains("public key"));
}

#[test]
fn pins_are_fingerprints_however_they_are_spaced() {
    assert!(is_pinned(
        AUTHOR,
        "5bfe ec43 17e7 4600 8621  9706 37a6 ab3b cf2c 170a"
    ));
    assert!(!is_pinned(AUTHOR, "37A6AB3BCF2C170A"));
    assert!(!is_pinned(AUTHOR, HASHICORP));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_other_bytes_are_ever_hashicorps(at in 0..NULL.len(), bit in 0u8..8, cut in 0..NULL.len()) {
        let mut flipped = NULL.to_vec();
        flipped[at] ^= 1 << bit;
        for document in [&flipped[..], &NULL[..cut]] {
            prop_assert_eq!(judge(document, NULL_SIG, &[]).tier, Tier::Bad);
        }
    }

    #[test]
    fn any_signature_and_any_key_is_survived(
        at in 0..NULL_SIG.len(), byte: u8,
        noise in proptest::collection::vec(any::<u8>(), 0..200), text in "\\PC{0,80}",
    ) {
        let mut spoilt = NULL_SIG.to_vec();
        spoilt[at] = byte;
        let armored = format!("-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n{text}\n-----END PGP PUBLIC KEY BLOCK-----\n");
        let keys = [trusted(&armored, &text), trusted(data!("author.asc"), &armored)];
        for signature in [&spoilt[..], &noise] {
            let judgement = judge(NULL, signature, &keys);
            prop_assert!(judgement.tier != Tier::SelfSigned && judgement.tier != Tier::Partner);
        }
        let mut key = data!("author.asc").as_bytes().to_vec();
        let at = at % key.len();
        key[at] = byte & 0x7f;
        let key = named(&String::from_utf8_lossy(&key));
        judge(PLACEHOLDER, PLACEHOLDER_SIG, &[key]);
    }
}
