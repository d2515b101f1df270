//! Conditions and ranges (RFC 9110 sections 13 and 14): pure functions on headers.

use std::time::SystemTime;

use hyper::header::{
    ETAG, HeaderMap, HeaderName, HeaderValue, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE,
    LAST_MODIFIED, RANGE,
};

/// Whether the client holds what would be sent: then 304 is what it asked for.
pub fn not_modified(asked: &HeaderMap, sent: &HeaderMap) -> bool {
    if asked.contains_key(IF_NONE_MATCH) {
        let Some(etag) = sent.get(ETAG).and_then(|etag| etag.to_str().ok()) else {
            return false;
        };
        let opaque = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
        return asked
            .get_all(IF_NONE_MATCH)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(tags)
            .any(|tag| tag.trim() == "*" || opaque(tag) == opaque(etag));
    }
    match (date(asked, IF_MODIFIED_SINCE), date(sent, LAST_MODIFIED)) {
        (Some(since), Some(modified)) => modified <= since,
        _ => false,
    }
}

/// The members of a list, at whose commas it is parted but for those within quotes.
fn tags(list: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    list.split(move |c| {
        quoted ^= c == '"';
        c == ',' && !quoted
    })
}

/// What part of `length` bytes is asked for.
#[derive(Debug, PartialEq, Eq)]
pub enum Part {
    Whole,
    /// First and last byte
    Range(u64, u64),
    Unsatisfiable,
}

/// Reads `Range` and `If-Range` for an answer that would carry `sent`. Several ranges, and what is
/// no range of bytes, are answered with the whole, as RFC 9110 section 14.2 allows.
pub fn part(asked: &HeaderMap, sent: &HeaderMap, length: u64) -> Part {
    let Some(range) = asked.get(RANGE).and_then(|value| value.to_str().ok()) else {
        return Part::Whole;
    };
    if let Some(condition) = asked.get(IF_RANGE)
        && !range_holds(condition, sent)
    {
        return Part::Whole;
    }
    parse_range(range, length)
}

fn range_holds(condition: &HeaderValue, sent: &HeaderMap) -> bool {
    if condition.as_bytes().starts_with(b"\"") {
        // Strong comparison: a weak tag never matches.
        return sent.get(ETAG) == Some(condition);
    }
    sent.get(LAST_MODIFIED) == Some(condition)
}

/// One range of `bytes=…` (RFC 9110 section 14.1.2).
pub fn parse_range(range: &str, length: u64) -> Part {
    let Some((unit, spec)) = range.split_once('=') else {
        return Part::Whole;
    };
    if !unit.trim().eq_ignore_ascii_case("bytes") || spec.contains(',') {
        return Part::Whole;
    }
    let Some((first, last)) = spec.trim().split_once('-') else {
        return Part::Whole;
    };
    let number = |text: &str| -> Option<u64> {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        // A number too large to read is beyond any archive's end.
        digits.then(|| text.parse().unwrap_or(u64::MAX))
    };
    match (number(first), number(last)) {
        (None, Some(suffix)) if first.is_empty() => match suffix.min(length) {
            0 => Part::Unsatisfiable,
            suffix => Part::Range(length - suffix, length - 1),
        },
        (Some(first), _) if last.is_empty() => match first < length {
            true => Part::Range(first, length - 1),
            false => Part::Unsatisfiable,
        },
        (Some(first), Some(last)) if first <= last => match first < length {
            true => Part::Range(first, last.min(length - 1)),
            false => Part::Unsatisfiable,
        },
        _ => Part::Whole,
    }
}

fn date(headers: &HeaderMap, name: HeaderName) -> Option<SystemTime> {
    httpdate::parse_http_date(headers.get(name)?.to_str().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::document::headers_from_text;
    use proptest::prelude::*;

    fn headers(lines: &[(&str, &str)]) -> HeaderMap {
        let text: Vec<_> = lines
            .iter()
            .map(|(n, v)| (n.to_string(), v.to_string()))
            .collect();
        headers_from_text(&text)
    }

    #[test]
    fn ranges_read_as_the_rfc_says() {
        for (range, part) in [
            ("bytes=0-", Part::Range(0, 99)),
            ("bytes=0-0", Part::Range(0, 0)),
            ("bytes=90-200", Part::Range(90, 99)),
            ("bytes=-5", Part::Range(95, 99)),
            ("bytes=-500", Part::Range(0, 99)),
            ("bytes=99-", Part::Range(99, 99)),
            ("bytes=100-", Part::Unsatisfiable),
            ("bytes=-0", Part::Unsatisfiable),
            ("bytes=99999999999999999999999-", Part::Unsatisfiable),
            ("bytes=5-4", Part::Whole),
            ("bytes=0-1,5-6", Part::Whole),
            ("bytes=a-b", Part::Whole),
            ("bytes=--5", Part::Whole),
            ("bytes=+1-5", Part::Whole),
            ("items=0-5", Part::Whole),
            ("bytes", Part::Whole),
        ] {
            assert_eq!(parse_range(range, 100), part, "{range}");
        }
    }

    #[test]
    fn a_changed_archive_is_sent_whole() {
        let sent = headers(&[
            ("etag", "\"1\""),
            ("last-modified", "Mon, 01 Jan 2024 00:00:00 GMT"),
        ]);
        let with = |condition: &str| {
            part(
                &headers(&[("range", "bytes=5-"), ("if-range", condition)]),
                &sent,
                9,
            )
        };
        assert_eq!(with("\"1\""), Part::Range(5, 8));
        assert_eq!(with("Mon, 01 Jan 2024 00:00:00 GMT"), Part::Range(5, 8));
        for other in ["\"2\"", "W/\"1\"", "Mon, 01 Jan 2024 00:00:01 GMT"] {
            assert_eq!(with(other), Part::Whole, "{other}");
        }
    }

    #[test]
    fn conditions_hold_weakly_and_tags_go_before_dates() {
        let sent = headers(&[
            ("etag", "W/\"1\""),
            ("last-modified", "Mon, 01 Jan 2024 00:00:00 GMT"),
        ]);
        let asked = |lines: &[(&str, &str)]| not_modified(&headers(lines), &sent);
        assert!(asked(&[("if-none-match", "\"0\", \"1\"")]));
        assert!(asked(&[("if-none-match", "*")]));
        assert!(asked(&[(
            "if-modified-since",
            "Mon, 01 Jan 2024 00:00:00 GMT"
        )]));
        assert!(!asked(&[(
            "if-modified-since",
            "Sun, 31 Dec 2023 00:00:00 GMT"
        )]));
        assert!(!asked(&[
            ("if-none-match", "\"2\""),
            ("if-modified-since", "Mon, 01 Jan 2024 00:00:00 GMT")
        ]));
        assert!(!asked(&[]));
        let commas = headers(&[("etag", "\"a,b\"")]);
        for (list, held) in [
            ("\"a,b\"", true),
            ("\"x\", W/\"a,b\"", true),
            ("\"a\", \"b\"", false),
        ] {
            assert_eq!(
                not_modified(&headers(&[("if-none-match", list)]), &commas),
                held,
                "{list}"
            );
        }
    }

    proptest! {
        #[test]
        fn a_range_lies_within(range in "bytes=[0-9]{0,4}-[0-9]{0,4}", length in 0u64..500) {
            if let Part::Range(first, last) = parse_range(&range, length) {
                prop_assert!(first <= last && last < length);
            }
        }

        #[test]
        fn any_range_is_survived(range in "\\PC{0,30}", length: u64) {
            parse_range(&range, length);
        }
    }
}
