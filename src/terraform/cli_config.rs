//! Terraform's CLI configuration (`.terraformrc`, `*.tfrc`, `*.tfrc.json`): carried over as its user
//! wrote it, but for hosts that are to be reached otherwise. Its language is that of HCL 1, of
//! which no parser is to be had: what is needed is where each setting begins and ends.

use std::collections::HashSet;
use std::fmt::Write as _;

use serde_json::{Map, Value};

/// Blocks whose first label says what they are of.
const LABELLED: [&str; 3] = ["credentials", "credentials_helper", "host"];

/// The text without the blocks that `instead` names by their word (`host`) and label, and without
/// attributes that an earlier file has `set` already, as Terraform has it. JSON becomes HCL.
///
/// # Errors
/// The words say in which line what does not end.
pub fn carried(
    text: &str,
    set: &mut HashSet<String>,
    instead: impl Fn(&str, &str) -> bool,
) -> Result<String, String> {
    if text.trim_start().starts_with('{') {
        let settings: Map<String, Value> =
            serde_json::from_str(text).map_err(|e| format!("is no JSON: {e}"))?;
        return Ok(from_json(settings, set, instead));
    }
    let before = set.clone();
    let mut kept = String::new();
    let mut scanner = Scanner { text, at: 0 };
    while let Some(setting) = scanner.setting()? {
        let dropped = match &setting.words[..] {
            [word] if word == "host" && setting.block => {
                return Err(format!(
                    "line {}: write host \"NAME\" {{ … }}",
                    scanner.line()
                ));
            }
            [word] if !setting.block => {
                set.insert(word.clone());
                before.contains(word)
            }
            [word, label] => instead(word, label),
            _ => false,
        };
        if !dropped {
            kept.push_str(setting.text.trim_start_matches('\n'));
            kept.push('\n');
        }
    }
    Ok(kept)
}

/// A block by which Terraform sends a host's token.
pub fn credentials_block(host: &str, token: &str) -> String {
    let (host, token) = (quoted(host), quoted(token));
    format!("credentials {host} {{\n  token = {token}\n}}\n")
}

/// A block that has a host's services lie where `services` says.
pub fn host_block(host: &str, services: &Map<String, Value>) -> String {
    let mut text = format!("host {} {{\n  services = {{\n", quoted(host));
    for (id, value) in services {
        let _ = writeln!(text, "    {} = {}", quoted(id), hcl(value));
    }
    text.push_str("  }\n}\n");
    text
}

struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

/// One block or attribute, with the comments before it.
struct Setting<'a> {
    /// `host`, `registry.terraform.io`
    words: Vec<String>,
    /// Whether braces follow, not a value
    block: bool,
    text: &'a str,
}

impl<'a> Scanner<'a> {
    fn setting(&mut self) -> Result<Option<Setting<'a>>, String> {
        let begin = self.at;
        let mut words = Vec::new();
        let mut block = false;
        loop {
            self.skip_blank()?;
            let Some(c) = self.rest().chars().next() else {
                let left = self.text[begin..].trim();
                // Comments at the end are nobody's.
                return match words.is_empty() {
                    true => Ok((!left.is_empty()).then_some(Setting {
                        words,
                        block,
                        text: left,
                    })),
                    false => Err(self.unended("a setting")),
                };
            };
            match c {
                '"' => words.push(self.string()?),
                '{' => {
                    block = true;
                    self.nested()?;
                    break;
                }
                '=' => {
                    self.at += 1;
                    self.value()?;
                    break;
                }
                '}' | ']' => return Err(format!("line {}: {c} closes nothing", self.line())),
                ';' | ',' => self.at += 1,
                _ => words.push(self.word()),
            }
        }
        let text = &self.text[begin..self.at];
        Ok(Some(Setting { words, block, text }))
    }

    /// What stands right of an equals sign.
    fn value(&mut self) -> Result<(), String> {
        self.skip_blank()?;
        match self.rest().chars().next() {
            Some('"') => self.string().map(|_| ()),
            Some('{' | '[') => self.nested(),
            Some('<') if self.rest().starts_with("<<") => self.heredoc(),
            Some(_) => {
                self.word();
                Ok(())
            }
            None => Err(self.unended("a value")),
        }
    }

    /// From an opening bracket to the one that closes it.
    fn nested(&mut self) -> Result<(), String> {
        let line = self.line();
        let mut open = 0;
        loop {
            self.skip_blank()?;
            match self.rest().chars().next() {
                Some('"') => {
                    self.string()?;
                }
                Some('<') if self.rest().starts_with("<<") => self.heredoc()?,
                Some('{' | '[') => {
                    open += 1;
                    self.at += 1;
                }
                Some('}' | ']') => {
                    open -= 1;
                    self.at += 1;
                    if open == 0 {
                        return Ok(());
                    }
                }
                Some(c) => self.at += c.len_utf8(),
                None => return Err(format!("line {line}: this block does not end")),
            }
        }
    }

    fn string(&mut self) -> Result<String, String> {
        let begin = self.at;
        let mut escaped = false;
        for (i, c) in self.rest().char_indices().skip(1) {
            match c {
                '\n' => break,
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => {
                    self.at += i + 1;
                    let raw = &self.text[begin..self.at];
                    let inner = || raw.trim_matches('"').to_owned();
                    return Ok(serde_json::from_str(raw).unwrap_or_else(|_| inner()));
                }
                _ => {}
            }
        }
        Err(self.unended("a string"))
    }

    fn heredoc(&mut self) -> Result<(), String> {
        let rest = self.rest();
        let (first, _) = rest.split_once('\n').ok_or_else(|| self.unended("text"))?;
        let mark = first.trim_start_matches(['<', '-']).trim().to_owned();
        let mut at = first.len() + 1;
        for line in rest[at..].split_inclusive('\n') {
            at += line.len();
            if line.trim() == mark {
                self.at += at;
                return Ok(());
            }
        }
        Err(self.unended("text"))
    }

    fn word(&mut self) -> String {
        let ends = |c: char| c.is_whitespace() || "{}[]=\",;#".contains(c);
        let rest = self.rest();
        let end = rest.find(ends).unwrap_or(rest.len());
        // Whatever it is, it is passed.
        let end = end.max(rest.chars().next().map_or(0, char::len_utf8));
        self.at += end;
        rest[..end].to_owned()
    }

    /// Blanks and comments.
    fn skip_blank(&mut self) -> Result<(), String> {
        loop {
            let rest = self.rest();
            let blank = rest.len() - rest.trim_start().len();
            self.at += blank;
            let rest = self.rest();
            if rest.starts_with('#') || rest.starts_with("//") {
                self.at += rest.find('\n').unwrap_or(rest.len());
            } else if rest.starts_with("/*") {
                let end = rest.find("*/").ok_or_else(|| self.unended("a comment"))?;
                self.at += end + 2;
            } else {
                return Ok(());
            }
        }
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn line(&self) -> usize {
        self.text[..self.at].matches('\n').count() + 1
    }

    fn unended(&self, what: &str) -> String {
        format!("line {}: {what} does not end", self.line())
    }
}

fn from_json(
    settings: Map<String, Value>,
    set: &mut HashSet<String>,
    instead: impl Fn(&str, &str) -> bool,
) -> String {
    let mut text = String::new();
    for (name, value) in settings {
        match value {
            Value::Object(_) | Value::Array(_) if LABELLED.contains(&name.as_str()) => {
                // HCL's JSON may have a list of what stands once.
                let all = match value {
                    Value::Array(all) => all,
                    one => vec![one],
                };
                let labelled = all.into_iter().filter_map(|one| match one {
                    Value::Object(labelled) => Some(labelled),
                    _ => None,
                });
                for (label, body) in labelled.flatten() {
                    if instead(&name, &label) {
                        continue;
                    }
                    let _ = writeln!(text, "{name} {} {}", quoted(&label), body_of(&body));
                }
            }
            value if name == "provider_installation" => {
                let _ = writeln!(text, "{name} {{");
                methods(&value, &mut text);
                text.push_str("}\n");
            }
            value => {
                if set.insert(name.clone()) {
                    let _ = writeln!(text, "{} = {}", word(&name), hcl(&value));
                }
            }
        }
    }
    text
}

/// Installation methods, whose order counts.
fn methods(value: &Value, text: &mut String) {
    match value {
        Value::Array(all) => all.iter().for_each(|one| methods(one, text)),
        Value::Object(all) => {
            for (method, body) in all {
                let bodies = match body {
                    Value::Array(bodies) => &bodies[..],
                    body => std::slice::from_ref(body),
                };
                for body in bodies {
                    let _ = writeln!(text, "  {} {}", word(method), body_of(body));
                }
            }
        }
        _ => {}
    }
}

fn body_of(body: &Value) -> String {
    match body {
        Value::Object(_) => hcl(body),
        Value::Array(all) => all.first().map_or("{}".into(), body_of),
        _ => "{}".into(),
    }
}

fn hcl(value: &Value) -> String {
    match value {
        Value::Object(fields) => {
            let fields = fields
                .iter()
                .map(|(name, value)| format!("{} = {}", quoted(name), hcl(value)));
            format!("{{\n{}\n}}", fields.collect::<Vec<_>>().join("\n"))
        }
        Value::Array(values) => {
            let values: Vec<_> = values.iter().map(hcl).collect();
            format!("[{}]", values.join(", "))
        }
        Value::String(text) => quoted(text),
        Value::Null => "\"\"".into(),
        value => value.to_string(),
    }
}

/// A name as it is, or quoted where it has other letters than names have.
fn word(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    match !name.is_empty() && name.chars().all(plain) {
        true => name.to_owned(),
        false => quoted(name),
    }
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OWN: &str = r#"
# where plugins are kept
plugin_cache_dir   = "$HOME/.terraform.d/plugin-cache"
disable_checkpoint = true // quiet

credentials "app.terraform.io" {
  token = "a}\"{b"
}
/* the public one: } */
host "registry.terraform.io" {
  services = { "providers.v1" = "https://elsewhere/" }
}
"host" "other.example" { services = {} }
provider_installation {
  network_mirror { url = "https://m/" }
  direct { exclude = ["a/*/*", "b/*/*"] }
}
text = <<END
host "registry.terraform.io" {
END
"#;

    #[test]
    fn all_but_the_named_hosts_is_carried_over() {
        let kept = carried(OWN, &mut HashSet::new(), |word, host| {
            (word, host) == ("host", "registry.terraform.io")
        })
        .unwrap();
        assert!(!kept.contains("elsewhere"), "{kept}");
        for part in [
            "plugin_cache_dir   = \"$HOME/",
            "token = \"a}\\\"{b\"",
            "other.example",
            "direct { exclude",
            "END\n",
        ] {
            assert!(kept.contains(part), "{part}: {kept}");
        }
        assert_eq!(carried("", &mut HashSet::new(), |_, _| true).unwrap(), "");
        assert_eq!(
            carried("# nothing", &mut HashSet::new(), |_, _| true).unwrap(),
            "# nothing\n"
        );
    }

    #[test]
    fn json_becomes_hcl() {
        let json = r#"{"credentials":{"a.example":{"token":"t\"1"}},"host":{"gone.example":{},"b.example":{"services":{"x.v1":"https://x/"}}},
            "disable_checkpoint":true,"provider_installation":[{"filesystem_mirror":[{"path":"/m"}]},{"direct":[{}]}]}"#;
        let kept = carried(json, &mut HashSet::new(), |_, host| host == "gone.example").unwrap();
        for part in [
            "credentials \"a.example\" {\n\"token\" = \"t\\\"1\"\n}",
            "\"x.v1\" = \"https://x/\"",
            "disable_checkpoint = true",
            "filesystem_mirror {\n\"path\" = \"/m\"\n}\n  direct {",
        ] {
            assert!(kept.contains(part), "{part}: {kept}");
        }
        assert!(!kept.contains("gone"), "{kept}");
        let odd = r#"{"a/*b":1,"provider_installation":{"x } y":{}}}"#;
        let odd = carried(odd, &mut HashSet::new(), |_, _| false).unwrap();
        let again = carried(&odd, &mut HashSet::new(), |_, _| false);
        assert_eq!(again.as_deref(), Ok(&*odd));
    }

    #[test]
    fn an_earlier_file_has_the_say_and_lists_of_blocks_are_read() {
        let mut set = HashSet::new();
        let first = carried("a = 1\nb {}\na = 2\n", &mut set, |_, _| false).unwrap();
        assert_eq!(first, "a = 1\nb {}\na = 2\n");
        let second = carried("a = 3\nc = 4\nb {}\n", &mut set, |_, _| false).unwrap();
        assert_eq!(second, "c = 4\nb {}\n");
        let json = r#"{"a":1,"credentials":[{"h.example":[{"token":"t"}]}]}"#;
        let third = carried(json, &mut set, |_, _| false).unwrap();
        assert!(
            third.starts_with("credentials \"h.example\" {\n\"token\""),
            "{third}"
        );
    }

    #[test]
    fn what_does_not_end_is_told() {
        for bad in [
            "host \"a\" {",
            "a = \"b",
            "/* x",
            "a",
            "}",
            "a = <<E\nx\n",
            "{\"a\":",
            "host { \"a\" {} }",
        ] {
            assert!(
                carried(bad, &mut HashSet::new(), |_, _| true).is_err(),
                "{bad}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "\\PC{0,80}", more in "[a{}\\[\\]=\"\\\\#/*<\n ]{0,40}") {
            let _ = carried(&text, &mut HashSet::new(), |_, _| true);
            let _ = carried(&more, &mut HashSet::new(), |_, _| true);
        }

        #[test]
        fn what_names_no_host_stays(name in "[a-z_]{1,8}", value in "[ -~]{0,20}") {
            let line = format!("x{name} = {}\n", quoted(&value));
            prop_assert_eq!(carried(&line, &mut HashSet::new(), |_, _| true), Ok(line.clone()));
        }
    }
}
