//! Ranges and conditions in requests.
#![no_main]

use std::time::{Duration, SystemTime};

use arbitrary::Arbitrary;
use http::header::{
    ETAG, HeaderMap, HeaderName, HeaderValue, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE,
    LAST_MODIFIED, RANGE,
};
use larder::server::conditional::{Part, not_modified, parse_range, part};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    length: u64,
    first: u64,
    last: u64,
    /// Seconds since 1970, up to the year 2106
    modified: u32,
    since: u32,
    tag: Tag,
    asked: Vec<Tag>,
    blanks: bool,
    /// `Range`, and whatever else takes text
    text: String,
}

/// An entity tag as RFC 9110 section 8.8.3 writes it.
#[derive(Arbitrary, Debug)]
struct Tag {
    weak: bool,
    letters: Vec<u8>,
}

impl Tag {
    fn opaque(&self) -> String {
        let letters = self.letters.iter();
        letters
            .map(|b| (0x21 + b % (0x7f - 0x21)) as char)
            .filter(|c| *c != '"')
            .collect()
    }

    fn written(&self) -> String {
        let weak = if self.weak { "W/" } else { "" };
        format!("{weak}\"{}\"", self.opaque())
    }
}

fn headers(lines: &[(HeaderName, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in lines {
        if let Ok(value) = HeaderValue::from_bytes(value.trim().as_bytes()) {
            headers.append(name.clone(), value);
        }
    }
    headers
}

fuzz_target!(|input: Input| {
    ranges(&input);
    conditions(&input);
    nonsense(&input);
});

fn lies_within(part: Part, length: u64) {
    if let Part::Range(first, last) = part {
        assert!(first <= last && last < length, "{first}-{last}/{length}");
    }
}

fn ranges(input: &Input) {
    let length = input.length;
    lies_within(parse_range(&input.text, length), length);
    let beyond = length.saturating_sub(1);
    let whole_file = |first: u64, last: u64| match first < length {
        true => Part::Range(first, last.min(beyond)),
        false => Part::Unsatisfiable,
    };
    let (first, last) = (input.first, input.last);
    let from_to = parse_range(&format!("bytes={first}-{last}"), length);
    match first <= last {
        true => assert_eq!(from_to, whole_file(first, last)),
        false => assert_eq!(from_to, Part::Whole),
    }
    let from = parse_range(&format!("BYTES={first}-"), length);
    assert_eq!(from, whole_file(first, u64::MAX));
    // Numbers of more than 64 bits are beyond every end.
    let from = parse_range(&format!("bytes={first}-9{last:020}"), length);
    assert_eq!(from, whole_file(first, u64::MAX));
    let end = parse_range(&format!("bytes=-{last}"), length);
    match last.min(length) {
        0 => assert_eq!(end, Part::Unsatisfiable),
        n => assert_eq!(end, Part::Range(length - n, beyond)),
    }
}

fn conditions(input: &Input) {
    let time = |seconds: u32| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.into());
    let date = |seconds: u32| httpdate::fmt_http_date(time(seconds));
    let (tag, modified) = (input.tag.written(), date(input.modified));
    let sent = headers(&[(ETAG, &tag), (LAST_MODIFIED, &modified)]);

    let range = format!("bytes={}-", input.first);
    let with = |condition: &str| {
        let asked = headers(&[(RANGE, &range), (IF_RANGE, condition)]);
        part(&asked, &sent, input.length)
    };
    let free = part(&headers(&[(RANGE, &range)]), &sent, input.length);
    assert_eq!(free, parse_range(&range, input.length));
    assert_eq!(part(&HeaderMap::new(), &sent, input.length), Part::Whole);
    for asked in input.asked.iter().chain([&input.tag]) {
        // Strong comparison.
        let same = !asked.weak && !input.tag.weak && asked.opaque() == input.tag.opaque();
        let wanted = if same { &free } else { &Part::Whole };
        assert_eq!(with(&asked.written()), *wanted, "{asked:?}");
    }
    let same = input.modified == input.since;
    let wanted = if same { &free } else { &Part::Whole };
    assert_eq!(with(&date(input.since)), *wanted);

    // Weak comparison, and a tag goes before a date.
    let list: Vec<String> = input.asked.iter().map(Tag::written).collect();
    let since = date(input.since);
    let same = input.asked.iter().any(|t| t.opaque() == input.tag.opaque());
    let one_header = list.join(if input.blanks { " , " } else { "," });
    if !list.is_empty() {
        let asked = headers(&[(IF_NONE_MATCH, &one_header), (IF_MODIFIED_SINCE, &since)]);
        assert_eq!(not_modified(&asked, &sent), same, "{one_header} {tag}");
        let lines: Vec<_> = list.iter().map(|tag| (IF_NONE_MATCH, &tag[..])).collect();
        assert_eq!(not_modified(&headers(&lines), &sent), same);
    }
    assert!(not_modified(&headers(&[(IF_NONE_MATCH, "*")]), &sent));
    let asked = headers(&[(IF_MODIFIED_SINCE, &since)]);
    assert_eq!(not_modified(&asked, &sent), input.modified <= input.since);
    assert!(!not_modified(&HeaderMap::new(), &sent));
}

/// Text of any kind in each place.
fn nonsense(input: &Input) {
    let text = &input.text;
    let sent = headers(&[(ETAG, text), (LAST_MODIFIED, text)]);
    for name in [RANGE, IF_RANGE, IF_NONE_MATCH, IF_MODIFIED_SINCE] {
        let asked = headers(&[(RANGE, "bytes=1-"), (name, text)]);
        for sent in [&sent, &HeaderMap::new()] {
            lies_within(part(&asked, sent, input.length), input.length);
            not_modified(&asked, sent);
        }
    }
    // What upstream did not say cannot be confirmed.
    let asked = headers(&[(IF_NONE_MATCH, text), (IF_MODIFIED_SINCE, text)]);
    assert!(!not_modified(&asked, &HeaderMap::new()));
}
