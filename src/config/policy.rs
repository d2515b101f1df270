//! Which providers and products users may have, how old they must be, and what their archives must
//! pass: rules by pattern, the most specific one first.

use std::cmp::Reverse;
use std::time::Duration;

use super::args::Verify;
use super::pattern::{Pattern, Selector};

/// The rules of the config file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    pub verify: Verify,
    pub verify_rules: Rules<VerifyRule>,
    pub min_age: Rules<Duration>,
    pub allow: Vec<Selector>,
    pub deny: Vec<Selector>,
    /// Whom users may ask
    pub contact: Option<String>,
}

impl Policy {
    /// What archives of `names` (HOST, NAMESPACE, TYPE; or HOST, PRODUCT) must pass.
    pub fn verify(&self, names: &[&str]) -> VerifyRule {
        match self.verify_rules.find(names) {
            Some((_, rule)) => rule.clone(),
            None => VerifyRule {
                how: self.verify,
                keys: Vec::new(),
            },
        }
    }

    /// Whether any archive must bear a signature.
    pub fn wants_signatures(&self) -> bool {
        self.verify == Verify::Signature
            || self
                .verify_rules
                .0
                .iter()
                .any(|(_, rule)| rule.how == Verify::Signature)
    }

    /// Whether versions are ever kept from users.
    pub fn restricts(&self) -> bool {
        !self.allow.is_empty() || !self.deny.is_empty() || !self.min_age.0.is_empty()
    }

    /// How old versions of `names` must be, and by which rule.
    pub fn min_age(&self, names: &[&str]) -> Option<(Duration, &Pattern)> {
        let (pattern, age) = self.min_age.find(names)?;
        (!age.is_zero()).then_some((*age, pattern))
    }

    /// Whether users may have that version of `names`; none: an unknown one. The words say which
    /// rule forbids it.
    ///
    /// With `any_namespace` (Terraform 0.12 asks for providers without one) a denial in any of
    /// them counts.
    pub fn judge(
        &self,
        names: &[&str],
        version: Option<&str>,
        any_namespace: bool,
    ) -> Result<(), String> {
        self.judge_denials(names, version, any_namespace)?;
        let host = names.first().copied().unwrap_or_default();
        let product = names.len() == 2;
        // Lists that speak of providers alone say nothing of products.
        let speaks = !product || self.allow.iter().any(|s| s.pattern.names_host(host));
        let allowed = self
            .allow
            .iter()
            .any(|selector| selector.pattern.fits(names) && selector.range.allows(version));
        match self.allow.is_empty() || !speaks || allowed {
            true => Ok(()),
            false => Err("the list `allow`, in which it is not".into()),
        }
    }

    /// The same by the list `deny` alone.
    pub fn judge_denials(
        &self,
        names: &[&str],
        version: Option<&str>,
        any_namespace: bool,
    ) -> Result<(), String> {
        let fits = |pattern: &Pattern| match any_namespace {
            true => pattern.fits_in_any_namespace(names),
            false => pattern.fits(names),
        };
        let denied = self
            .deny
            .iter()
            .find(|selector| fits(&selector.pattern) && selector.range.denies(version));
        match denied {
            Some(selector) => Err(format!("the rule deny = \"{selector}\"")),
            None => Ok(()),
        }
    }

    /// `; ask CONTACT`, or nothing.
    pub fn whom_to_ask(&self) -> String {
        match &self.contact {
            Some(contact) => format!("; ask {contact}"),
            None => "; ask whoever runs this larder".into(),
        }
    }
}

/// What an archive must pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyRule {
    pub how: Verify,
    /// Fingerprints, one of which must be the signing key's; empty: any key will do
    pub keys: Vec<String>,
}

/// Values by pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules<T>(Vec<(Pattern, T)>);

impl<T> Default for Rules<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Rules<T> {
    pub fn new(mut rules: Vec<(Pattern, T)>) -> Self {
        rules.sort_by_cached_key(|(pattern, _)| Reverse(pattern.specificity()));
        Self(rules)
    }

    /// The rule of the most specific pattern that fits.
    pub fn find(&self, names: &[&str]) -> Option<(&Pattern, &T)> {
        let (pattern, value) = self.0.iter().find(|(pattern, _)| pattern.fits(names))?;
        Some((pattern, value))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const AWS: [&str; 3] = ["registry.terraform.io", "hashicorp", "aws"];
    const TERRAFORM: [&str; 2] = ["releases.hashicorp.com", "terraform"];

    #[test]
    fn the_most_specific_rule_is_found_in_whatever_order() {
        let rule = |text: &str| (text.parse::<Pattern>().unwrap(), text.to_owned());
        let texts = [
            "*",
            "registry.terraform.io/*",
            "hashicorp/*",
            "hashicorp/a*",
            "hashicorp/aws",
        ];
        for turn in 0..texts.len() {
            let mut turned = texts;
            turned.rotate_left(turn);
            let rules = Rules::new(turned.iter().map(|text| rule(text)).collect());
            let found = |names: &[&str]| rules.find(names).unwrap().1.clone();
            assert_eq!(found(&AWS), "hashicorp/aws");
            assert_eq!(found(&[AWS[0], AWS[1], "azurerm"]), "hashicorp/a*");
            assert_eq!(found(&[AWS[0], AWS[1], "null"]), "hashicorp/*");
            assert_eq!(found(&[AWS[0], "acme", "x"]), "registry.terraform.io/*");
            assert_eq!(found(&TERRAFORM), "*");
        }
    }

    #[test]
    fn denials_come_before_permissions_and_say_which_rule() {
        let selectors = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect();
        let policy = Policy {
            allow: selectors(&["hashicorp/*", "acme/* >= 2.0.0"]),
            deny: selectors(&["hashicorp/aws = 3.0.0"]),
            ..Default::default()
        };
        assert_eq!(policy.judge(&AWS, Some("3.1.0"), false), Ok(()));
        let denied = policy.judge(&AWS, Some("3.0.0"), false).unwrap_err();
        assert!(denied.contains("hashicorp/aws = 3.0.0"), "{denied}");
        let acme = [AWS[0], "acme", "x"];
        assert!(
            policy
                .judge(&acme, Some("1.0.0"), false)
                .unwrap_err()
                .contains("allow")
        );
        assert_eq!(policy.judge(&acme, Some("2.0.0"), false), Ok(()));
        assert!(
            policy
                .judge(&[AWS[0], "evil", "x"], Some("1.0.0"), false)
                .is_err()
        );
        // Nothing was said of products.
        assert_eq!(policy.judge(&TERRAFORM, Some("1.0.0"), false), Ok(()));
        assert_eq!(Policy::default().judge(&AWS, None, false), Ok(()));
        let policy = Policy {
            deny: selectors(&["DataDog/*"]),
            ..Default::default()
        };
        assert_eq!(policy.judge(&AWS, None, false), Ok(()));
        assert!(policy.judge(&AWS, None, true).is_err());
    }

    proptest! {
        #[test]
        fn nothing_panics(pattern in "\\PC{0,30}", names in proptest::collection::vec("[a-z.*-]{0,9}", 0..4), version in "\\PC{0,12}") {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            if let Ok(selector) = pattern.parse::<Selector>() {
                let policy = Policy { deny: vec![selector.clone()], allow: vec![selector], ..Default::default() };
                let _ = policy.judge(&names, Some(&version), false);
                let _ = policy.judge(&names, Some(&version), true);
            }
        }
    }
}
