//! SHA-256 digests: the names of archives.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

/// The SHA-256 of some bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first `n` characters (64 at most) of the hexadecimal form.
    pub fn short(&self, n: usize) -> String {
        let mut hex = self.to_string();
        hex.truncate(n);
        hex
    }

    /// The form in which cacache's index names content (W3C Subresource Integrity).
    pub fn to_integrity(self) -> cacache::Integrity {
        cacache::Integrity::from_hex(self.to_string(), cacache::Algorithm::Sha256)
            .expect("64 hexadecimal digits are a SHA-256 integrity")
    }

    /// The SHA-256 among the hashes of an integrity string, if it has one.
    pub fn from_integrity(integrity: &cacache::Integrity) -> Option<Self> {
        let (algorithm, hex) = integrity.to_hex();
        (algorithm == cacache::Algorithm::Sha256).then(|| hex.parse().ok())?
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = NotADigest;

    fn from_str(s: &str) -> Result<Self, NotADigest> {
        let s = s.as_bytes();
        if s.len() != 64 {
            return Err(NotADigest);
        }
        let mut out = [0u8; 32];
        for (byte, pair) in out.iter_mut().zip(s.chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Self(out))
    }
}

/// Not 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotADigest;

impl fmt::Display for NotADigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a SHA-256 (64 hexadecimal digits)")
    }
}

/// SHA-256 in progress. A clone goes on from the same bytes.
#[derive(Clone, Default)]
pub struct Hasher(Sha256);

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }

    /// The digest of what has been hashed so far.
    pub fn so_far(&self) -> Digest {
        self.clone().finish()
    }
}

fn nibble(c: u8) -> Result<u8, NotADigest> {
    (c as char).to_digit(16).map(|n| n as u8).ok_or(NotADigest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_digest_reads_back_in_every_form() {
        let empty = Digest::of(b"");
        assert_eq!(
            empty.to_string(),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        assert_eq!(empty.to_string().to_uppercase().parse(), Ok(empty));
        assert_eq!(Digest::from_integrity(&empty.to_integrity()), Some(empty));
    }

    #[test]
    fn wrong_forms_are_refused() {
        for bad in ["", "e3", &"g".repeat(64), &"é".repeat(32), &"0".repeat(65)] {
            assert_eq!(bad.parse::<Digest>(), Err(NotADigest), "{bad}");
        }
    }
}
