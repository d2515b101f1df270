//! The store by itself; through the socket it is tested in `tests/it/store.rs`.

use bytes::Bytes;

use std::time::Duration;

use super::*;

fn stage(store: &Arc<Store>, bytes: &[u8]) -> Verified {
    let mut staged = store.stage(Some(bytes.len() as u64)).unwrap();
    staged.append(&[Bytes::copy_from_slice(bytes)]).unwrap();
    staged.verify(Digest::of(bytes)).ok().unwrap()
}

fn put(store: &Arc<Store>, key: &str, bytes: &[u8]) -> Digest {
    let verified = stage(store, bytes);
    store.commit(verified, key, &Arc::default()).unwrap();
    Digest::of(bytes)
}

#[test]
fn cacache_reads_what_was_committed() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Some(1 << 20), u64::MAX).unwrap();
    let digest = put(&store, "https://h/a.zip", b"archive");
    let cache = dir.path().join("cache");
    assert_eq!(
        cacache::read_sync(&cache, "https://h/a.zip").unwrap(),
        b"archive"
    );
    assert_eq!(
        cacache::read_hash_sync(&cache, &digest.to_integrity()).unwrap(),
        b"archive"
    );
}

#[test]
fn wrong_bytes_get_no_name_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Some(1 << 20), u64::MAX).unwrap();
    let mut staged = store.stage(Some(3)).unwrap();
    staged.append(&[Bytes::from_static(b"bad")]).unwrap();
    let found = staged.verify(Digest::of(b"good")).err().unwrap();
    assert_eq!(found, Digest::of(b"bad"));
    assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    assert_eq!(store.lock().reserved, 0);
}

#[test]
fn reserved_and_stored_stay_within_the_budget_and_the_least_used_goes_first() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Some(10), u64::MAX).unwrap();
    let a = put(&store, "a", b"aaaa");
    let b = put(&store, "b", b"bbbb");
    assert!(store.open_blob(a).is_some());
    let c = put(&store, "c", b"cccc");
    assert!(store.open_blob(b).is_none() && store.find("b").is_none());
    assert!(store.open_blob(a).is_some() && store.open_blob(c).is_some());
    let staged = store.stage(Some(8)).unwrap();
    assert!(matches!(store.stage(Some(8)), Err(Full::NoRoom)));
    {
        let inner = store.lock();
        assert!(inner.stored + inner.reserved <= 10);
    }
    drop(staged);
    assert!(matches!(store.stage(Some(11)), Err(Full::NoRoom)));
}

#[test]
fn what_cannot_be_appended_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Some(17 << 20), u64::MAX).unwrap();
    let mut staged = store.stage(None).unwrap();
    let chunks = [Bytes::from(vec![7; 200_000]), Bytes::from_static(b"end")];
    staged.append(&chunks).unwrap();
    // There is no room for a second step of the reservation.
    let too_much = Bytes::from(vec![9; 16 << 20]);
    assert!(matches!(staged.append(&[too_much]), Err(Full::NoRoom)));
    let all = chunks.concat();
    assert_eq!(staged.len(), all.len() as u64);
    let verified = staged.verify(Digest::of(&all)).ok().unwrap();
    store.commit(verified, "k", &Arc::default()).unwrap();
    let kept = cacache::read_sync(dir.path().join("cache"), "k").unwrap();
    assert!(kept == all);
    assert_eq!(store.lock().reserved, 0);
}

#[test]
fn an_unannounced_length_is_reserved_as_it_grows() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Some(20 << 20), u64::MAX).unwrap();
    let mut staged = store.stage(None).unwrap();
    let chunk = Bytes::from(vec![0; 1 << 20]);
    for _ in 0..16 {
        staged.append(std::slice::from_ref(&chunk)).unwrap();
    }
    assert!(matches!(
        staged.append(std::slice::from_ref(&chunk)),
        Err(Full::NoRoom)
    ));
    assert_eq!(staged.len(), 16 << 20);
}

#[test]
fn a_reader_outlives_the_removal() {
    use std::os::unix::fs::FileExt as _;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Some(10), u64::MAX).unwrap();
    let a = put(&store, "a", b"aaaa");
    let held = store.open_blob(a).unwrap();
    assert_eq!(
        store.gc(Some(0), None),
        Freed {
            blobs: 1,
            bytes: 4,
            held: 0
        }
    );
    let mut buffer = [0; 4];
    held.file.read_exact_at(&mut buffer, 0).unwrap();
    assert_eq!(&buffer, b"aaaa");
}

#[test]
fn a_start_finds_blobs_names_and_order_and_empties_tmp() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = {
        let store = Store::open(dir.path(), Some(100), u64::MAX).unwrap();
        (put(&store, "a", b"aaaa"), put(&store, "b", b"bbbb"))
    };
    let old = SystemTime::now() - Duration::from_secs(3600);
    let path = content_path(&dir.path().join("cache"), &b);
    let file = File::options().write(true).open(path).unwrap();
    file.set_times(fs::FileTimes::new().set_accessed(old))
        .unwrap();
    fs::write(dir.path().join("tmp/fill-0"), "partial").unwrap();
    let store = Store::open(dir.path(), Some(100), u64::MAX).unwrap();
    assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    assert_eq!((store.find("a"), store.find("b")), (Some(a), Some(b)));
    assert!(!store.open_blob(a).unwrap().checked);
    let freed = store.gc(None, Some(Duration::from_secs(1800)));
    assert_eq!((freed.blobs, store.find("b")), (1, None));
}

#[test]
fn a_changed_file_is_noticed_and_a_rotten_one_removed() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Some(100), u64::MAX).unwrap();
    let a = put(&store, "a", b"aaaa");
    let held = store.open_blob(a).unwrap();
    assert!(held.checked && store.recheck(&held));
    let path = content_path(&dir.path().join("cache"), &a);
    fs::write(&path, b"aaab").unwrap();
    let later = SystemTime::now() + Duration::from_secs(5);
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_modified(later)
        .unwrap();
    let held = store.open_blob(a).unwrap();
    assert!(!held.checked && !store.recheck(&held));
    assert!(store.open_blob(a).is_none() && !path.exists());
}

#[test]
fn torn_index_lines_are_dropped_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let digest = put(
        &Store::open(dir.path(), Some(100), u64::MAX).unwrap(),
        "a",
        b"aaaa",
    );
    let cache = dir.path().join("cache");
    let bucket = index::buckets(&cache).next().unwrap().unwrap().path;
    let mut text = fs::read_to_string(&bucket).unwrap();
    text.push_str("\n0123\t{\"key\":");
    fs::write(&bucket, text).unwrap();
    assert_eq!(check_all(dir.path()).unwrap().len(), 1);
    assert_eq!(
        Store::open(dir.path(), Some(100), u64::MAX)
            .unwrap()
            .find("a"),
        Some(digest)
    );
    assert_eq!(check_all(dir.path()).unwrap().len(), 0);
    assert_eq!(cacache::read_sync(&cache, "a").unwrap(), b"aaaa");
}

/// A store as it is after a start, before it was looked through.
fn unscanned(dir: &Path, budget: u64) -> Arc<Store> {
    Store::unscanned(dir, Some(budget), u64::MAX).unwrap().0
}

#[test]
fn what_is_held_is_found_before_it_was_looked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = {
        let store = Store::open(dir.path(), Some(1000), u64::MAX).unwrap();
        let (a, b) = (put(&store, "a", b"aaaa"), put(&store, "b", b"bbbb"));
        let record = Record {
            sources: vec!["somebody".into()],
            ..Record::default()
        };
        store.name("also a", a, &Arc::new(record)).unwrap();
        (a, b)
    };
    let store = unscanned(dir.path(), 1000);
    assert_eq!(store.find("also a"), Some(a));
    assert_eq!(store.record("also a").unwrap().sources, ["somebody"]);
    assert_eq!(store.open_blob(b).unwrap().size, 4);
    assert_eq!((store.find("b"), store.find("c")), (Some(b), None));
    scan::scan(&Arc::downgrade(&store)).unwrap();
    {
        let inner = store.lock();
        assert_eq!((inner.blobs.len(), inner.stored), (2, 8));
        assert_eq!(inner.blobs[&a].names.len(), 2);
    }
    // What was asked for meanwhile was used last, by whatever name.
    let freed = store.gc(Some(4), None);
    assert_eq!(
        (freed.blobs, store.find("a"), store.find("also a")),
        (1, None, None)
    );
    assert_eq!(store.find("b"), Some(b));
    assert_eq!(index::buckets(&dir.path().join("cache")).count(), 1);
}

#[test]
fn before_all_is_known_nothing_is_evicted_and_little_is_added() {
    let dir = tempfile::tempdir().unwrap();
    let old = put(
        &Store::open(dir.path(), Some(1600), u64::MAX).unwrap(),
        "old",
        &[0; 1000],
    );
    let store = unscanned(dir.path(), 1600);
    assert!(matches!(store.stage(Some(101)), Err(Full::NoRoom)));
    let new = put(&store, "new", &[1; 60]);
    assert!(matches!(store.stage(Some(41)), Err(Full::NoRoom)));
    let more = put(&store, "more", &[2; 40]);
    for (key, digest) in [("old", old), ("new", new), ("more", more)] {
        assert_eq!(store.find(key), Some(digest));
    }
    scan::scan(&Arc::downgrade(&store)).unwrap();
    assert_eq!(store.lock().stored, 1100);
    put(&store, "large", &[3; 1000]);
    assert_eq!(store.find("old"), None);
}

#[test]
fn what_comes_and_goes_during_a_scan_is_neither_lost_nor_counted_twice() {
    let dir = tempfile::tempdir().unwrap();
    let a = put(
        &Store::open(dir.path(), Some(1600), u64::MAX).unwrap(),
        "a",
        b"aaaa",
    );
    let store = unscanned(dir.path(), 1600);
    // The scan saw both, and enters them after this.
    let found: Vec<_> = index::contents(&dir.path().join("cache")).collect();
    assert_eq!(found.len(), 1);
    let b = put(&store, "b", b"bbbb");
    assert_eq!(store.find("a"), Some(a));
    {
        let mut inner = store.lock();
        store.remove(&mut inner, a);
        inner.find_blob(a, 4, SystemTime::now(), 0);
        inner.find_blob(b, 4, SystemTime::now(), 1);
        assert_eq!((inner.blobs.len(), inner.stored), (1, 4));
        assert!(!inner.blobs[&b].found);
    }
    scan::scan(&Arc::downgrade(&store)).unwrap();
    assert_eq!((store.find("a"), store.find("b")), (None, Some(b)));
}

#[test]
fn a_blob_without_a_name_and_a_name_without_a_blob_go_with_the_scan() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = {
        let store = Store::open(dir.path(), Some(1000), u64::MAX).unwrap();
        (put(&store, "a", b"aaaa"), put(&store, "b", b"bbbb"))
    };
    let cache = dir.path().join("cache");
    fs::remove_file(index::BucketName::of("a").path(&cache)).unwrap();
    fs::remove_file(content_path(&cache, &b)).unwrap();
    let store = Store::open(dir.path(), Some(1000), u64::MAX).unwrap();
    assert_eq!((store.find("a"), store.find("b")), (None, None));
    assert!(store.open_blob(a).is_none() && !content_path(&cache, &a).exists());
    assert_eq!(index::buckets(&cache).count(), 0);
    assert_eq!(store.lock().stored, 0);
}

#[test]
fn what_cannot_be_read_is_not_taken_for_gone() {
    let dir = tempfile::tempdir().unwrap();
    let a = put(
        &Store::open(dir.path(), Some(1000), u64::MAX).unwrap(),
        "a",
        b"aaaa",
    );
    let cache = dir.path().join("cache");
    for part in ["index-v5", "content-v2/sha256"] {
        let (folder, aside) = (cache.join(part), cache.join("aside"));
        fs::rename(&folder, &aside).unwrap();
        // A folder that is none: reading it fails, and not because it is absent.
        fs::write(&folder, "").unwrap();
        let store = Store::open(dir.path(), Some(1000), u64::MAX).unwrap();
        store.settle();
        assert_eq!(store.find("a"), None);
        drop(store);
        fs::remove_file(&folder).unwrap();
        fs::rename(&aside, &folder).unwrap();
    }
    let store = Store::open(dir.path(), Some(1000), u64::MAX).unwrap();
    assert_eq!(store.find("a"), Some(a));
    assert!(store.open_blob(a).is_some());
}

#[test]
fn what_is_reserved_counts_when_the_scan_ends() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = Store::open(dir.path(), Some(1600), u64::MAX).unwrap();
        put(&store, "a", &[0; 800]);
        put(&store, "b", &[1; 800]);
    }
    let store = unscanned(dir.path(), 1600);
    let staged = store.stage(Some(100)).unwrap();
    scan::scan(&Arc::downgrade(&store)).unwrap();
    let inner = store.lock();
    assert_eq!((inner.stored, inner.reserved), (800, 100));
    drop(inner);
    drop(staged);
}

#[test]
fn a_budget_that_is_given_later_holds() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), None, u64::MAX).unwrap();
    put(&store, "a", &[0; 800]);
    put(&store, "b", &[1; 800]);
    store.set_budget(1000);
    assert_eq!((store.budget(), store.lock().stored), (1000, 800));
}

#[test]
fn a_blob_whose_names_are_not_known_yet_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let a = put(
        &Store::open(dir.path(), Some(1000), u64::MAX).unwrap(),
        "a",
        b"aaaa",
    );
    let store = unscanned(dir.path(), 1000);
    let on_record = || store.open_named(a, "a").unwrap().on_record;
    assert_eq!(store.open_blob(a).unwrap().on_record, OnRecord::Nothing);
    assert_eq!(store.find("a"), Some(a));
    assert_eq!(on_record(), OnRecord::Own);
    let other = store.open_named(a, "b").unwrap();
    assert_eq!(other.on_record, OnRecord::Another);
}

#[test]
fn who_lost_its_name_to_other_bytes_keeps_one_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = {
        let store = Store::open(dir.path(), Some(1000), u64::MAX).unwrap();
        let a = put(&store, "key", b"aaaa");
        (a, put(&store, "key", b"bbbb"))
    };
    let store = Store::open(dir.path(), Some(1000), u64::MAX).unwrap();
    assert_eq!(store.find("key"), Some(b));
    for digest in [a, b] {
        assert_eq!(
            store.open_blob(digest).unwrap().on_record,
            OnRecord::Another
        );
    }
}
