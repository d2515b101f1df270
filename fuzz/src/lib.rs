//! What the targets share.

use std::fmt::{Debug, Display};
use std::str::FromStr;

/// What reads must print as something that reads as the same.
pub fn survives_printing<T>(text: &str) -> Option<T>
where
    T: FromStr + Display + PartialEq + Debug,
    T::Err: Debug,
{
    let read: T = text.parse().ok()?;
    let printed = read.to_string();
    let again: T = printed
        .parse()
        .unwrap_or_else(|e| panic!("{text:?} prints as {printed:?}, which does not read: {e:?}"));
    assert_eq!(again, read, "{text:?} prints as {printed:?}");
    Some(read)
}
