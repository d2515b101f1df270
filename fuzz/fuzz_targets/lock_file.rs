//! Dependency lock files.
#![no_main]

use larder::terraform::lock::{Locked, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let all = match parse(text) {
        Ok(all) => all,
        Err(why) => {
            let line = why.strip_prefix("line ").expect("names the line");
            let line = line.split(':').next().and_then(|n| n.parse::<usize>().ok());
            let line = line.expect("a number");
            assert!((1..=text.split('\n').count()).contains(&line), "{why}");
            return;
        }
    };
    // Written plainly it reads as the same.
    assert_eq!(parse(&write(&all)).as_ref(), Ok(&all));
    // Line ends and comments do not matter. (No string goes beyond its line.)
    for same in [
        text.replace('\n', "\r\n"),
        text.replace('\n', "\n# \"x\" { [\n"),
        text.replace('\n', "\n// }\n\n"),
        format!("\u{feff}/* \" */{text}\n#"),
    ] {
        assert_eq!(parse(&same).as_ref(), Ok(&all), "{same:?}");
    }
    // Files may be joined.
    let twice = [&all[..], &all[..]].concat();
    assert_eq!(parse(&format!("{text}\n{text}")), Ok(twice));
    for locked in &all {
        assert!(!locked.version.is_empty());
        let lower = text.to_ascii_lowercase();
        for digest in locked.digests() {
            assert!(lower.contains(&format!("zh:{digest}")), "{digest}");
        }
    }
});

fn write(all: &[Locked]) -> String {
    let quoted = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
    let mut out = String::new();
    for locked in all {
        let hashes: Vec<String> = locked.hashes.iter().map(|hash| quoted(hash)).collect();
        out += &format!(
            "provider {} {{\n  version = {}\n  hashes = [{}]\n}}\n",
            quoted(&locked.provider),
            quoted(&locked.version),
            hashes.join(", ")
        );
    }
    out
}
