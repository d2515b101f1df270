//! Terraform's CLI configuration, carried over: nothing is lost but what is named, nothing is made up,
//! and what was carried over once is carried over again as it is.

#![no_main]

use std::collections::HashSet;

use larder::terraform::cli_config;
use libfuzzer_sys::fuzz_target;

fn carried(text: &str, instead: impl Fn(&str, &str) -> bool) -> Result<String, String> {
    cli_config::carried(text, &mut HashSet::new(), instead)
}

fuzz_target!(|text: &str| {
    let is_json = text.trim_start().starts_with('{');
    let Ok(all) = carried(text, |_, _| false) else {
        return;
    };
    if !is_json {
        let letters = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<String>();
        assert_eq!(letters(&all), letters(text));
    }
    let again = carried(&all, |_, _| false).expect("what was written is read");
    assert_eq!(carried(&again, |_, _| false).as_deref(), Ok(&*again));
    let less = carried(text, |word, _| word == "host").expect("it was read before");
    assert!(is_json || less.len() <= all.len());
});
