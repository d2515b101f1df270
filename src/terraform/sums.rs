//! SHA256SUMS as `sha256sum` writes them: a digest, blanks, a file name, a line each.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::digest::Digest;

/// The lines of a SHA256SUMS document.
#[derive(Debug, PartialEq)]
pub struct Sums(HashMap<String, Line>);

#[derive(Debug, PartialEq)]
enum Line {
    One(Digest),
    /// Two lines name the file with different digests.
    Torn,
}

impl Sums {
    /// Reads a document. Blank lines and `\r\n` are fine, lines of another form are passed over;
    /// a document without a single good line is none.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "is not text".to_owned())?;
        let mut files = HashMap::new();
        for (digest, name) in text.lines().filter_map(parse_line) {
            match files.entry(name.to_owned()) {
                Entry::Vacant(slot) => {
                    slot.insert(Line::One(digest));
                }
                Entry::Occupied(mut slot) if *slot.get() != Line::One(digest) => {
                    slot.insert(Line::Torn);
                }
                Entry::Occupied(_) => {}
            }
        }
        if files.is_empty() {
            return Err("holds no line of a digest and a file name".into());
        }
        Ok(Self(files))
    }

    /// The digest of the file with exactly that name; none too where two lines contradict.
    pub fn digest_of(&self, name: &str) -> Option<Digest> {
        match self.0.get(name)? {
            Line::One(digest) => Some(*digest),
            Line::Torn => None,
        }
    }
}

fn parse_line(line: &str) -> Option<(Digest, &str)> {
    let line = line.trim_end_matches('\r');
    let (digest, rest) = line.split_once([' ', '\t'])?;
    let name = rest.trim_start_matches([' ', '\t']);
    let name = name.strip_prefix('*').unwrap_or(name);
    (!name.is_empty()).then(|| Some((digest.parse().ok()?, name)))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const REAL: &[u8] = include_bytes!("../../tests/data/terraform-provider-null_3.1.0_SHA256SUMS");

    #[test]
    fn a_real_document_reads() {
        let sums = Sums::parse(REAL).expect("parses");
        assert_eq!(
            sums.digest_of("terraform-provider-null_3.1.0_darwin_amd64.zip"),
            "fea4227271ebf7d9e2b61b89ce2328c7262acd9fd190e1fd6d15a591abfa848e"
                .parse()
                .ok()
        );
        assert_eq!(
            sums.digest_of("terraform-provider-null_3.1.0_darwin_amd64"),
            None
        );
    }

    #[test]
    fn line_ends_blanks_and_marks_do_not_matter_and_torn_lines_name_nothing() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let text =
            format!("\r\n{a}  x.zip\r\n\n{a} *y.zip\nnonsense\n{a}  z.zip\n{b}  z.zip\n{b}  w.zip");
        let sums = Sums::parse(text.as_bytes()).expect("parses");
        assert_eq!(sums.digest_of("x.zip"), Some(a));
        assert_eq!(sums.digest_of("y.zip"), Some(a));
        assert_eq!(sums.digest_of("z.zip"), None);
        assert_eq!(sums.digest_of("w.zip"), Some(b));
    }

    #[test]
    fn pages_that_are_no_sums_are_refused() {
        for bad in [&b""[..], b"<html>not found</html>", b"{}", b"\xff\xfe"] {
            assert!(Sums::parse(bad).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Sums::parse(&bytes);
        }

        #[test]
        fn what_is_written_is_read(names in proptest::collection::hash_set("[a-z0-9_.-]{1,20}", 1..8)) {
            let text: String = names.iter()
                .map(|name| format!("{}  {name}\n", Digest::of(name.as_bytes())))
                .collect();
            let sums = Sums::parse(text.as_bytes()).expect("parses");
            for name in &names {
                prop_assert_eq!(sums.digest_of(name), Some(Digest::of(name.as_bytes())));
            }
        }
    }
}
