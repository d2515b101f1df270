//! Another key in place of the one that a running program has compiled in. The file is no place to do
//! that: the programs are packed.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

const BEGIN: &[u8] = b"-----BEGIN PGP PUBLIC KEY BLOCK-----";
const END: &[u8] = b"-----END PGP PUBLIC KEY BLOCK-----";
/// No key is longer.
const LONGEST: usize = 16 * 1024;

/// Replaces every armored key in the memory of the process and of its children.
pub fn replace_keys(pid: u32, armored: &str) {
    let replaced: usize = family(pid)
        .into_iter()
        .map(|pid| replace_in(pid, armored))
        .sum();
    assert!(replaced > 0, "no key in the memory of {pid}");
}

fn family(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let mut at = 0;
    while let Some(parent) = all.get(at).copied() {
        let tasks = std::fs::read_dir(format!("/proc/{parent}/task")).unwrap();
        for task in tasks.flatten() {
            let children =
                std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            all.extend(
                children
                    .split_whitespace()
                    .map(|child| child.parse::<u32>().unwrap()),
            );
        }
        at += 1;
    }
    all
}

fn replace_in(pid: u32, armored: &str) -> usize {
    let memory = OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/mem"));
    let memory = memory.expect("the memory of a child can be written");
    let mut replaced = 0;
    for (start, length) in readable(pid) {
        let mut bytes = vec![0; length];
        if memory.read_exact_at(&mut bytes, start).is_err() {
            continue; // Not backed by anything
        }
        for (at, length) in keys(&bytes) {
            assert!(
                armored.len() <= length,
                "the key in {pid} has {length} bytes"
            );
            let mut key = armored.as_bytes().to_vec();
            key.resize(length, b'\n');
            memory.write_all_at(&key, start + at as u64).unwrap();
            replaced += 1;
        }
    }
    replaced
}

/// Start and length of what can be read.
fn readable(pid: u32) -> Vec<(u64, usize)> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let region = |line: &str| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let readable = words.next()?.starts_with('r');
        let [start, end] = [start, end].map(|hex| u64::from_str_radix(hex, 16).unwrap());
        readable.then_some((start, (end - start) as usize))
    };
    maps.lines().filter_map(region).collect()
}

/// Place and length of each armored key.
fn keys(bytes: &[u8]) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    // One of every five bytes is enough to meet five dashes.
    for dash in (0..bytes.len()).step_by(5).filter(|at| bytes[*at] == b'-') {
        let near = dash.saturating_sub(4)..=dash;
        let Some(start) = near.into_iter().find(|at| bytes[*at..].starts_with(BEGIN)) else {
            continue;
        };
        let rest = &bytes[start..bytes.len().min(start + LONGEST)];
        if let Some(end) = rest.windows(END.len()).position(|window| window == END) {
            found.push((start, end + END.len()));
        }
    }
    found
}
