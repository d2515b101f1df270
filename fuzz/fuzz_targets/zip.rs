//! Providers' archives: any bytes are read to an end, and the same bytes have the same hash.

#![no_main]

use std::io::Cursor;

use larder::terraform::dirhash::h1;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let first = h1(Cursor::new(bytes));
    assert_eq!(first, h1(Cursor::new(bytes)));
    if let Ok(hash) = first {
        assert!(hash.starts_with("h1:") && hash.len() == 47, "{hash}");
        // Something before it is no archive of a publisher's.
        let moved = [b"x", bytes].concat();
        assert!(h1(Cursor::new(moved)).is_err());
    }
});
