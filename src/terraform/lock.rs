//! Dependency lock files, `.terraform.lock.hcl`: which version of each provider was chosen, and
//! the hashes that its archives may have.

use crate::digest::Digest;

/// Bytes of a lock file; a real one has some kilobytes.
const LIMIT: usize = 4 << 20;

/// What a lock file says of one provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locked {
    /// `registry.terraform.io/hashicorp/aws`
    pub provider: String,
    pub version: String,
    /// `h1:…` and `zh:…`, as they stand there
    pub hashes: Vec<String>,
}

impl Locked {
    /// The SHA-256 of the archives of all platforms (`zh:`).
    pub fn digests(&self) -> impl Iterator<Item = Digest> {
        self.hashes
            .iter()
            .filter_map(|hash| hash.strip_prefix("zh:")?.parse().ok())
    }
}

/// Reads a lock file, of whose language (HCL) it uses little: `provider` blocks of attributes whose
/// values are strings or lists of strings. Anything else is an error with its line.
pub fn parse(text: &str) -> Result<Vec<Locked>, String> {
    if text.len() > LIMIT {
        return Err("is too large for a lock file".into());
    }
    let mut reader = Reader {
        rest: text,
        line: 1,
    };
    let mut all = Vec::new();
    while let Some(token) = reader.next()? {
        if token != Token::Word("provider") {
            return Err(reader.unexpected(&token));
        }
        all.push(reader.provider()?);
    }
    Ok(all)
}

#[derive(Debug, PartialEq)]
enum Token<'a> {
    Word(&'a str),
    Text(String),
    Mark(char),
}

struct Reader<'a> {
    rest: &'a str,
    line: usize,
}

impl<'a> Reader<'a> {
    fn provider(&mut self) -> Result<Locked, String> {
        let mut locked = Locked {
            provider: self.text()?,
            version: String::new(),
            hashes: Vec::new(),
        };
        self.mark('{')?;
        loop {
            match self.some()? {
                Token::Mark('}') => break,
                Token::Word(name) => {
                    self.mark('=')?;
                    let values = self.values()?;
                    match name {
                        "version" => locked.version = values.into_iter().next().unwrap_or_default(),
                        "hashes" => locked.hashes = values,
                        _ => {}
                    }
                }
                other => return Err(self.unexpected(&other)),
            }
        }
        match locked.version.is_empty() {
            true => Err(format!(
                "line {}: {} has no version",
                self.line, locked.provider
            )),
            false => Ok(locked),
        }
    }

    /// A string, or a list of strings.
    fn values(&mut self) -> Result<Vec<String>, String> {
        match self.some()? {
            Token::Text(text) => return Ok(vec![text]),
            Token::Mark('[') => {}
            other => return Err(self.unexpected(&other)),
        }
        let mut values = Vec::new();
        loop {
            match self.some()? {
                Token::Text(text) => values.push(text),
                Token::Mark(']') => return Ok(values),
                other => return Err(self.unexpected(&other)),
            }
            match self.some()? {
                Token::Mark(',') => {}
                Token::Mark(']') => return Ok(values),
                other => return Err(self.unexpected(&other)),
            }
        }
    }

    fn text(&mut self) -> Result<String, String> {
        match self.some()? {
            Token::Text(text) => Ok(text),
            other => Err(self.unexpected(&other)),
        }
    }

    fn mark(&mut self, mark: char) -> Result<(), String> {
        match self.some()? {
            Token::Mark(found) if found == mark => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    fn some(&mut self) -> Result<Token<'a>, String> {
        let token = self.next()?;
        token.ok_or_else(|| format!("line {}: ends too early", self.line))
    }

    fn unexpected(&self, token: &Token<'_>) -> String {
        let shown = match token {
            Token::Word(word) => (*word).to_owned(),
            Token::Text(text) => format!("{text:?}"),
            Token::Mark(mark) => mark.to_string(),
        };
        format!("line {}: `{shown}` is not expected there", self.line)
    }

    fn next(&mut self) -> Result<Option<Token<'a>>, String> {
        self.skip_blanks()?;
        let Some(first) = self.rest.chars().next() else {
            return Ok(None);
        };
        if first == '"' {
            return self.quoted().map(Some);
        }
        let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
        let end = self.rest.find(|c| !is_word(c)).unwrap_or(self.rest.len());
        if end == 0 {
            self.advance(first.len_utf8());
            return Ok(Some(Token::Mark(first)));
        }
        let word = &self.rest[..end];
        self.advance(end);
        Ok(Some(Token::Word(word)))
    }

    fn quoted(&mut self) -> Result<Token<'a>, String> {
        let mut text = String::new();
        let mut letters = self.rest.char_indices().skip(1);
        while let Some((at, letter)) = letters.next() {
            match letter {
                '"' => {
                    self.advance(at + 1);
                    return Ok(Token::Text(text));
                }
                '\\' => match letters.next() {
                    Some((_, escaped @ ('"' | '\\'))) => text.push(escaped),
                    _ => break,
                },
                '\n' => break,
                letter => text.push(letter),
            }
        }
        Err(format!("line {}: a string without an end", self.line))
    }

    fn skip_blanks(&mut self) -> Result<(), String> {
        loop {
            let blank = self
                .rest
                .find(|c: char| !c.is_whitespace() && c != '\u{feff}')
                .unwrap_or(self.rest.len());
            self.advance(blank);
            let end = if self.rest.starts_with('#') || self.rest.starts_with("//") {
                self.rest.find('\n').unwrap_or(self.rest.len())
            } else if self.rest.starts_with("/*") {
                let end = self.rest.find("*/").map(|end| end + 2);
                end.ok_or_else(|| format!("line {}: a comment without an end", self.line))?
            } else {
                return Ok(());
            };
            self.advance(end);
        }
    }

    fn advance(&mut self, bytes: usize) {
        let (passed, rest) = self.rest.split_at(bytes);
        self.line += passed.matches('\n').count();
        self.rest = rest;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_real_lock_file_reads() {
        let all = parse(include_str!(
            "../../tests/data/null_random.terraform.lock.hcl"
        ))
        .unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(all[1].provider, "registry.terraform.io/hashicorp/random");
        assert_eq!(all[1].version, "3.4.3");
        let digest = "59d98081c4475f2ad77d881c4412c5129c56214892f490adf11c7e7a5a47de9b";
        assert!(all[1].digests().any(|d| d.to_string() == digest));
        assert!(all[1].hashes[0].starts_with("h1:"));
    }

    #[test]
    fn comments_and_escapes_are_read_and_errors_have_their_line() {
        let text = "/* a\n b */ provider \"a/b/c\" { // x\n version = \"1\" # y\n hashes = []\n other = [\"q\\\"\\\\\"]\n}";
        assert_eq!(
            parse(text).unwrap(),
            [Locked {
                provider: "a/b/c".into(),
                version: "1".into(),
                hashes: vec![]
            }]
        );
        for (bad, line) in [
            ("module \"x\" {}", "line 1"),
            ("provider \"x\" {\n version = 1\n}", "line 2"),
            ("provider \"x\" {\n", "line 2"),
            ("provider \"x\" {}", "no version"),
            ("provider \"x", "without an end"),
            ("/* x", "comment"),
            (
                "\n\nprovider \"x\" { version = \"1\" hashes = [\"a\" \"b\"] }",
                "line 3",
            ),
        ] {
            let why = parse(bad).unwrap_err();
            assert!(why.contains(line), "{bad}: {why}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "\\PC{0,80}", inner in "[\\PC\n]{0,40}") {
            let _ = parse(&text);
            let _ = parse(&format!("provider \"{inner}\" {{ version = \"{inner}\" hashes = [{inner}] }}"));
        }

        #[test]
        fn what_is_written_is_read(names in proptest::collection::vec("[a-z./-]{1,20}", 0..5), hash in "[a-zA-Z0-9:+/=]{0,50}") {
            let text: String = names.iter()
                .map(|name| format!("provider \"{name}\" {{\n  version = \"1.0\"\n  hashes = [\n    \"{hash}\",\n  ]\n}}\n"))
                .collect();
            let read: Vec<_> = parse(&text).unwrap().into_iter().map(|locked| locked.provider).collect();
            prop_assert_eq!(read, names);
        }
    }
}
