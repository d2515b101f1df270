//! SHA256SUMS.
#![no_main]

use larder::digest::Digest;
use larder::terraform::sums::Sums;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        assert!(Sums::parse(data).is_err());
        return;
    };
    // All that could be a name, and some that should not be.
    let names: Vec<&str> = text
        .lines()
        .flat_map(|line| {
            let tail = line.split_once([' ', '\t']).map(|(_, tail)| tail);
            let last = line.rsplit([' ', '\t', '*']).next();
            let bare = tail.map(|tail| tail.trim_start_matches([' ', '\t', '*']));
            let ends = |name: &'_ str| -> usize { name.trim_end_matches('\r').len() };
            [tail, last, bare]
                .into_iter()
                .flatten()
                .map(move |name| &name[..ends(name)])
        })
        .chain(["", "*", "x.zip"])
        .collect();
    let answers = |text: &str| -> Option<Vec<Option<Digest>>> {
        let sums = Sums::parse(text.as_bytes()).ok()?;
        Some(names.iter().map(|name| sums.digest_of(name)).collect())
    };
    let given = answers(text);

    // How the lines are ended, parted and ordered does not matter, nor how often they stand there.
    let reversed: Vec<&str> = text.lines().rev().collect();
    for same in [
        text.replace('\n', "\r\n"),
        text.replace('\n', "\n\n"),
        format!("\n\r\n{text}\n \n"),
        format!("{text}\n{text}"),
        reversed.join("\n"),
    ] {
        assert_eq!(answers(&same), given, "{same:?}");
    }
    let Some(given) = given else {
        return;
    };
    for (name, digest) in names.iter().zip(&given) {
        let Some(digest) = digest else { continue };
        assert!(!name.is_empty());
        // The answer stands there, in a line with the name.
        let hex = digest.to_string();
        let stands = text.lines().any(|line| {
            line.get(..64)
                .is_some_and(|first| first.eq_ignore_ascii_case(&hex))
                && line.trim_end_matches('\r').ends_with(name)
        });
        assert!(stands, "{name:?}: {hex}");
        // A line that contradicts takes the answer away, wherever it is, and no other answer.
        let other = Digest::of(hex.as_bytes());
        let line = format!("{other}  {name}");
        // A leading blank or mark would be read as part of what parts the columns.
        if name.starts_with([' ', '\t', '*']) {
            continue;
        }
        for torn in [format!("{text}\n{line}"), format!("{line}\n{text}")] {
            let torn = Sums::parse(torn.as_bytes()).expect("still has lines");
            assert_eq!(torn.digest_of(name), None);
            for (others, answer) in names.iter().zip(&given) {
                assert!(others == name || torn.digest_of(others) == *answer);
            }
        }
    }
});
