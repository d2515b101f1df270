//! Signatures, keys and trust signatures: real ones, changed ones, and any bytes.
#![no_main]

use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use larder::terraform::signature::{Judgement, Keyring, NamedKey, Tier};
use libfuzzer_sys::fuzz_target;

macro_rules! data {
    ($($name:literal),* $(,)?) => {
        [$(include_bytes!(concat!("../../tests/data/", $name)).as_slice()),*]
    };
}

/// Two documents that are signed, and one that nobody signed.
static DOCUMENTS: [&[u8]; 3] = [
    data!["terraform-provider-null_3.1.0_SHA256SUMS"][0],
    data!["signing/placeholder_SHA256SUMS"][0],
    b"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  x.zip\n",
];

static SIGNATURES: &[&[u8]] = &data![
    "signing/terraform-provider-null_3.1.0_SHA256SUMS.72D7468F.sig",
    "signing/placeholder_SHA256SUMS.sig",
    "signing/short-life.in-time.sig",
    "signing/short-life.late.sig",
    "signing/short-life.text.sig",
    "signing/short-life.armored.sig",
    "signing/short-life.expiring.sig",
    "signing/short-life.sha1.sig",
    "signing/subkey.sig",
    "signing/broken.sig",
];
const REAL: usize = 0;
const TEXT: usize = 4;

static KEYS: &[&[u8]] = &[
    data!["signing/author.asc"][0],
    data!["signing/author-ecc.asc"][0],
    data!["signing/short-life.asc"][0],
    data!["signing/short-life.extended.asc"][0],
    data!["signing/short-life.revoked.asc"][0],
    data!["signing/subkey.asc"][0],
    include_bytes!("../../certs/hashicorp.asc"),
    include_bytes!("../../certs/hashicorp-partners.asc"),
];

static TRUST: &[&[u8]] = &data!["signing/author-trust.asc", "signing/other-trust.asc"];

const HASHICORP: &str = "C874011F0AB405110D02105534365D9472D7468F";
const AUTHOR: &str = "5BFEEC4317E746008621970637A6AB3BCF2C170A";
/// 2026-11-01
const NOW: u64 = 1_793_491_200;

static RING: LazyLock<Keyring> = LazyLock::new(Keyring::shipped);

/// The packets of all real material, to be put together anew.
static PACKETS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let all = KEYS.iter().chain(SIGNATURES).chain(TRUST);
    all.flat_map(|file| packets(&bare(file))).collect()
});

/// An input is a row of records: how (a byte), what (a byte), a length (two bytes, little-endian)
/// and so many bytes. They are the document, the signature, and keys and trust signatures in turn.
struct Records<'a>(&'a [u8]);

impl<'a> Iterator for Records<'a> {
    type Item = Record<'a>;

    fn next(&mut self) -> Option<Record<'a>> {
        let ([how, what, low, high], rest) = self.0.split_first_chunk()?;
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (bytes, rest) = rest.split_at(length);
        self.0 = rest;
        let (how, what) = (*how, usize::from(*what));
        Some(Record { how, what, bytes })
    }
}

struct Record<'a> {
    how: u8,
    what: usize,
    bytes: &'a [u8],
}

impl Record<'_> {
    /// A real thing, one that is changed, or anything.
    fn made(&self, real: &[&[u8]]) -> Vec<u8> {
        let real = real[self.what % real.len()];
        match self.how % 8 {
            0 => real.to_owned(),
            1 => changed(real, self.bytes),
            // Beneath the armor
            2 => armored(&changed(&bare(real), self.bytes)),
            3 => cut(&bare(real), self.bytes),
            4 => armored(&cut(&bare(real), self.bytes)),
            5 => armored(self.bytes),
            6 => {
                let picked = self.bytes.iter();
                let picked = picked.map(|b| &PACKETS[usize::from(*b) % PACKETS.len()][..]);
                armored(&picked.collect::<Vec<_>>().concat())
            }
            _ => self.bytes.to_owned(),
        }
    }
}

/// Three bytes a change: where, and which bits.
fn changed(bytes: &[u8], changes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_owned();
    for change in changes.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % bytes.len();
        bytes[at] ^= change[2];
    }
    bytes
}

/// Four bytes a cut: from where, how much; or, where the length's top bit is set, doubled.
fn cut(bytes: &[u8], cuts: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_owned();
    for cut in cuts.chunks_exact(4).take(8) {
        let at = usize::from(u16::from_le_bytes([cut[0], cut[1]])).min(bytes.len());
        let length = usize::from(u16::from_le_bytes([cut[2], cut[3] & 0x7f]));
        let to = (at + length).min(bytes.len());
        match cut[3] & 0x80 {
            0 => drop(bytes.drain(at..to)),
            _ => bytes.extend_from_within(at..to),
        }
    }
    bytes
}

fn armored(bytes: &[u8]) -> Vec<u8> {
    let text = BASE64.encode(bytes);
    let mut out = b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n".to_vec();
    for line in text.as_bytes().chunks(64) {
        out.extend_from_slice(line);
        out.push(b'\n');
    }
    out.extend_from_slice(b"-----END PGP PUBLIC KEY BLOCK-----\n");
    out
}

/// What is within the armor of a real file.
fn bare(file: &[u8]) -> Vec<u8> {
    let Some(text) = std::str::from_utf8(file)
        .ok()
        .filter(|t| t.starts_with("-----"))
    else {
        return file.to_owned();
    };
    let text = text.replace('\r', "");
    let (_, body) = text.split_once("\n\n").expect("a blank line");
    let lines = body
        .lines()
        .take_while(|line| !line.starts_with(['-', '=']));
    BASE64.decode(lines.collect::<String>()).expect("base64")
}

fn packets(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    while let [tag, rest @ ..] = bytes {
        let big = |bytes: &[u8]| bytes.iter().fold(0, |n, b| n << 8 | usize::from(*b));
        let (head, length) = match (tag & 0x40, tag & 3, rest) {
            (0, 0, [..]) => (1, big(&rest[..1])),
            (0, 1, [..]) => (2, big(&rest[..2])),
            (0, ..) => (4, big(&rest[..4])),
            (_, _, [n @ ..192, ..]) => (1, usize::from(*n)),
            (_, _, [n @ ..224, m, ..]) => (2, (usize::from(*n) - 192 << 8) + usize::from(*m) + 192),
            _ => break,
        };
        let (packet, rest) = bytes.split_at((1 + head + length).min(bytes.len()));
        all.push(packet.to_owned());
        bytes = rest;
    }
    all
}

fuzz_target!(|data: &[u8]| {
    let mut records = Records(data);
    let document = records
        .next()
        .map_or(DOCUMENTS[0].to_owned(), |r| r.made(&DOCUMENTS));
    let signature = records
        .next()
        .map_or(SIGNATURES[0].to_owned(), |r| r.made(SIGNATURES));
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let mut named = Vec::new();
    while let Some(key) = records.next().filter(|_| named.len() < 8) {
        let trust = records.next().filter(|trust| trust.how != 0xff);
        named.push(NamedKey {
            ascii_armor: text(key.made(KEYS)),
            trust_signature: trust
                .map(|trust| text(trust.made(TRUST)))
                .unwrap_or_default(),
        });
    }
    let judgement = RING.judge(&document, &signature, &named, NOW);
    holds(&judgement, &document, &named);

    // One of two further questions, since each takes its time.
    if data.len() % 2 == 0 {
        official(&named);
    } else {
        partner(&document, &signature, named);
    }
});

/// Whatever else the registry names takes nothing from HashiCorp's own signature.
fn official(named: &[NamedKey]) {
    let judgement = RING.judge(DOCUMENTS[0], SIGNATURES[REAL], named, NOW);
    assert_eq!(judgement.tier, Tier::HashiCorp, "{judgement:?}");
    assert_eq!(judgement.key.as_deref(), Some(HASHICORP));
    assert_eq!(judgement.signed, Some(1_619_111_814));
}

/// A trust signature speaks for the very bytes of its key, whatever is named before it.
fn partner(document: &[u8], signature: &[u8], mut named: Vec<NamedKey>) {
    named.push(NamedKey {
        ascii_armor: String::from_utf8_lossy(KEYS[0]).into_owned(),
        trust_signature: String::from_utf8_lossy(TRUST[0]).into_owned(),
    });
    let judgement = RING.judge(document, signature, &named, NOW);
    holds(&judgement, document, &named);
}

fn holds(judgement: &Judgement, document: &[u8], named: &[NamedKey]) {
    let written = serde_json::to_string(judgement).expect("is written");
    let read: Judgement = serde_json::from_str(&written).expect("is read");
    assert_eq!(read, *judgement);
    assert!(judgement.tier != Tier::Unsigned || named.is_empty());
    if !judgement.tier.is_valid() {
        assert!(judgement.why.is_some());
        return;
    }
    let key = judgement.key.as_deref().expect("a key vouches");
    assert_eq!(judgement.why, None);
    assert!(judgement.signed.is_some());
    // The fuzzer has no private key: whatever is vouched for was signed by its owner.
    if document == DOCUMENTS[1] {
        assert_eq!(key, AUTHOR);
    } else if document != DOCUMENTS[0] {
        // A text signature is over lines: how they are ended is not part of it.
        let lines = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace("\r\n", "\n");
        assert_eq!(lines(document), lines(DOCUMENTS[0]));
        let by = RING.judge(document, SIGNATURES[TEXT], &[extended()], NOW);
        assert_eq!(judgement.tier, Tier::SelfSigned);
        assert_eq!((&by.key, by.tier), (&judgement.key, Tier::SelfSigned));
    }
    match judgement.tier {
        Tier::HashiCorp => {
            assert_eq!(document, DOCUMENTS[0]);
            assert_eq!(key, HASHICORP);
        }
        Tier::Partner => {
            assert_eq!(key, AUTHOR);
            assert!(
                named
                    .iter()
                    .any(|named| !named.trust_signature.trim().is_empty())
            );
        }
        _ => assert_ne!(key, HASHICORP),
    }
}

fn extended() -> NamedKey {
    NamedKey {
        ascii_armor: String::from_utf8_lossy(KEYS[3]).into_owned(),
        trust_signature: String::new(),
    }
}
