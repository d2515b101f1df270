//! How rules name providers, products and their versions: patterns and ranges.

use std::cmp::Reverse;
use std::fmt;
use std::str::FromStr;

use semver::Version;

/// The host of a pattern that names none, as in Terraform's own addresses.
const DEFAULT_HOST: &str = "registry.terraform.io";
/// The host of a pattern that is a single name: a product.
const PRODUCT_HOST: &str = "releases.hashicorp.com";

/// `HOST/NAMESPACE/TYPE`, where `*` stands for any letters of a part, and as the last part for all
/// that follows. Without a host it is registry.terraform.io; a single name is a product of
/// releases.hashicorp.com.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    parts: Vec<String>,
}

impl Pattern {
    pub fn fits(&self, names: &[&str]) -> bool {
        let open = self.parts.last().is_some_and(|last| last == "*");
        let enough = match open {
            true => names.len() >= self.parts.len(),
            false => names.len() == self.parts.len(),
        };
        enough
            && self
                .parts
                .iter()
                .zip(names)
                .all(|(part, name)| glob(part.as_bytes(), name.to_ascii_lowercase().as_bytes()))
    }

    pub(super) fn fits_in_any_namespace(&self, names: &[&str]) -> bool {
        let namespace = self.parts.get(1).cloned().unwrap_or_default();
        match names {
            [host, _, name] if self.parts.len() == 3 => {
                let open = |part: &str| part.replace('*', "x");
                self.fits(&[host, &open(&namespace), name])
            }
            _ => self.fits(names),
        }
    }

    pub(super) fn names_host(&self, host: &str) -> bool {
        self.parts.first().is_some_and(|part| part == host)
    }

    pub(super) fn specificity(&self) -> (usize, usize, Reverse<String>) {
        let whole = self.parts.iter().filter(|part| !part.contains('*')).count();
        let letters = self.parts.iter().flat_map(|part| part.chars());
        let letters = letters.filter(|c| *c != '*').count();
        (whole, letters, Reverse(self.text.clone()))
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let text = s.trim().to_ascii_lowercase();
        let bad =
            || "not a pattern; write one such as registry.terraform.io/hashicorp/*".to_owned();
        let mut parts: Vec<String> = text.split('/').map(str::to_owned).collect();
        let sound = |part: &String| {
            let known = |c: char| c.is_ascii_alphanumeric() || "-_.*:".contains(c);
            !part.is_empty() && part.chars().all(known)
        };
        if !parts.iter().all(sound) || parts.len() > 3 {
            return Err(bad());
        }
        let is_host = |part: &str| part.contains(['.', ':']) || part == "localhost" || part == "*";
        match parts.len() {
            1 if text != "*" => parts.insert(0, PRODUCT_HOST.into()),
            2 if !is_host(&parts[0]) => parts.insert(0, DEFAULT_HOST.into()),
            _ => {}
        }
        Ok(Self { text, parts })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// `*` stands for any number of bytes.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            star = Some((p, t));
            p += 1;
        } else if pattern.get(p) == Some(&text[t]) {
            p += 1;
            t += 1;
        } else if let Some((at, from)) = star {
            (p, t) = (at + 1, from + 1);
            star = Some((at, from + 1));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|b| *b == b'*')
}

/// A pattern and a range of versions: `registry.terraform.io/acme/* >= 2.0.0, < 3.0.0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector {
    pub pattern: Pattern,
    pub range: Range,
}

impl FromStr for Selector {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let s = s.trim();
        let (pattern, range) = s.split_once(char::is_whitespace).unwrap_or((s, ""));
        Ok(Self {
            pattern: pattern.parse()?,
            range: range.parse()?,
        })
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.pattern.fmt(f)?;
        match self.range.text.is_empty() {
            true => Ok(()),
            false => write!(f, " {}", self.range.text),
        }
    }
}

/// Version constraints in Terraform's syntax (`=`, `!=`, `>`, `>=`, `<`, `<=`, `~>`, by commas),
/// all of which must hold. Pre-releases are ordered as semver.org says, and no exception is made
/// for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    text: String,
    bounds: Vec<(Op, Version)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Equal,
    Unequal,
    Above,
    From,
    Below,
    UpTo,
}

impl Range {
    /// A version that cannot be read is in no range but the open one.
    pub(super) fn allows(&self, version: Option<&str>) -> bool {
        self.bounds.is_empty() || version.and_then(version_of).is_some_and(|v| self.holds(&v))
    }

    /// A version that cannot be read may be any.
    pub(super) fn denies(&self, version: Option<&str>) -> bool {
        match version {
            // A question about no version in particular: only a denial of all is one.
            None => self.bounds.is_empty(),
            Some(version) => version_of(version).is_none_or(|v| self.holds(&v)),
        }
    }

    fn holds(&self, version: &Version) -> bool {
        self.bounds.iter().all(|(op, bound)| {
            let order = version.cmp_precedence(bound);
            match op {
                Op::Equal => order.is_eq(),
                Op::Unequal => order.is_ne(),
                Op::Above => order.is_gt(),
                Op::From => order.is_ge(),
                Op::Below => order.is_lt(),
                Op::UpTo => order.is_le(),
            }
        })
    }
}

impl FromStr for Range {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let text = s.trim().to_owned();
        let mut bounds = Vec::new();
        for bound in text.split(',').filter(|_| !text.is_empty()) {
            let bound = bound.trim();
            let end = bound
                .find(|c: char| !"=!<>~".contains(c))
                .unwrap_or(bound.len());
            let (op, version) = (&bound[..end], bound[end..].trim());
            let bad = || {
                format!("`{bound}` is no version constraint; write one such as >= 1.2.0 or ~> 3.1")
            };
            let number = version_of(version).ok_or_else(bad)?;
            match op {
                "" | "=" => bounds.push((Op::Equal, number)),
                "!=" => bounds.push((Op::Unequal, number)),
                ">" => bounds.push((Op::Above, number)),
                ">=" => bounds.push((Op::From, number)),
                "<" => bounds.push((Op::Below, number)),
                "<=" => bounds.push((Op::UpTo, number)),
                "~>" => {
                    // The last part that was written may grow.
                    let written = version.split(['-', '+']).next().unwrap_or_default();
                    let next = match written.split('.').count() {
                        0 | 1 => None,
                        2 => number.major.checked_add(1).map(|major| (major, 0)),
                        _ => match number.minor.checked_add(1) {
                            Some(minor) => Some((number.major, minor)),
                            None => number.major.checked_add(1).map(|major| (major, 0)),
                        },
                    };
                    bounds.push((Op::From, number));
                    // Not even the first pre-release of what is next.
                    bounds.extend(next.map(|(major, minor)| (Op::Below, first(major, minor))));
                }
                _ => return Err(bad()),
            }
        }
        Ok(Self { text, bounds })
    }
}

/// `MAJOR.MINOR.0-0`: no version of that number goes before it.
fn first(major: u64, minor: u64) -> Version {
    Version {
        pre: semver::Prerelease::new("0").expect("a literal pre-release"),
        ..Version::new(major, minor, 0)
    }
}

/// A version as registries write it: `1.2.3-beta1`, and also `v1.2` and `1`.
pub fn version_of(text: &str) -> Option<Version> {
    let text = text.trim();
    let text = text.strip_prefix('v').unwrap_or(text);
    if text.len() > 128 {
        return None;
    }
    if let Ok(version) = text.parse() {
        return Some(version);
    }
    let end = text.find(['-', '+']).unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    let padded = match number.split('.').count() {
        1 => format!("{number}.0.0{rest}"),
        2 => format!("{number}.0{rest}"),
        _ => return None,
    };
    padded.parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const AWS: [&str; 3] = ["registry.terraform.io", "hashicorp", "aws"];
    const TERRAFORM: [&str; 2] = ["releases.hashicorp.com", "terraform"];

    fn fits(pattern: &str, names: &[&str]) -> bool {
        pattern.parse::<Pattern>().unwrap().fits(names)
    }

    #[test]
    fn patterns_fit_by_parts() {
        for fitting in [
            "registry.terraform.io/hashicorp/aws",
            "hashicorp/aws",
            "HashiCorp/*",
            "registry.terraform.io/*",
            "*",
            "*/hashicorp/*",
            "*/*/a*s",
            "registry.terraform.io/*/aws",
        ] {
            assert!(fits(fitting, &AWS), "{fitting}");
        }
        for other in [
            "hashicorp/aw",
            "registry.opentofu.org/*",
            "terraform",
            "*/aws/*",
            "registry.terraform.io/hashicorp",
        ] {
            assert!(!fits(other, &AWS), "{other}");
        }
        assert!(fits("terraform", &TERRAFORM) && fits("releases.hashicorp.com/terr*", &TERRAFORM));
        assert!(!fits("hashicorp/*", &TERRAFORM));
        for bad in ["", "a//b", "a/b/c/d", "a b", "a/\u{e9}"] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ranges_are_terraforms() {
        for (range, version, holds) in [
            (">= 1.0, < 2.0.0", "1.9.9", true),
            (">= 1.0, < 2.0.0", "2.0.0", false),
            ("~> 1.2", "1.9.0", true),
            ("~> 1.2", "2.0.0", false),
            ("~> 1.2.3", "1.2.9", true),
            ("~> 1.2.3", "1.3.0", false),
            ("~> 1.2.3", "1.3.0-beta1", false),
            ("~> 1.2", "2.0.0-0", false),
            ("~> 1.2", "1.3.0-beta1", true),
            (
                "~> 18446744073709551615.1",
                "18446744073709551615.2.0",
                true,
            ),
            (
                "~> 1.18446744073709551615.1",
                "1.18446744073709551615.2",
                true,
            ),
            ("1.2.3", "1.2.3", true),
            ("= 1.2", "v1.2.0", true),
            ("!= 1.2.3", "1.2.3", false),
            ("< 2.0.0", "2.0.0-beta1", true),
            ("<= 2", "2.0.0", true),
            ("> 2", "2.0.1", true),
        ] {
            let range: Range = range.parse().unwrap();
            assert_eq!(range.allows(Some(version)), holds, "{range:?} {version}");
            assert_eq!(range.denies(Some(version)), holds, "{range:?} {version}");
        }
        for bad in [">", ">= x", "=> 1", "1.0,", "1 2"] {
            assert!(bad.parse::<Range>().is_err(), "{bad}");
        }
        let range: Range = "< 2".parse().unwrap();
        assert!(!range.allows(Some("nightly")) && range.denies(Some("nightly")));
    }

    proptest! {
        #[test]
        fn no_version_panics(text in "\\PC{0,12}") {
            version_of(&text);
        }

        #[test]
        fn a_pattern_fits_itself(parts in proptest::collection::vec("[a-z][a-z-]{0,8}", 3)) {
            let names: Vec<&str> = parts.iter().map(String::as_str).collect();
            prop_assert!(fits(&parts.join("/"), &names));
            let open = format!("{}/{}/*", parts[0], parts[1]);
            prop_assert!(fits(&open, &names));
        }
    }
}
