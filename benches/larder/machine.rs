//! What the kernel says of a process and its descendants (proc(5)).

use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Bytes of page cache: several times what one miss takes
const TOUCHED: usize = 256 << 20;

/// The process and all that descends from it.
pub fn tree(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let mut at = 0;
    while at < all.len() {
        all.extend(children(all[at]));
        at += 1;
    }
    all
}

fn children(pid: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| pids(&list).collect::<Vec<_>>())
        .collect()
}

fn pids(list: &str) -> impl Iterator<Item = u32> {
    list.split_ascii_whitespace()
        .filter_map(|pid| pid.parse().ok())
}

/// Seconds of user and system time, of ended children too. In ticks of 10 ms.
pub fn cpu(pid: u32) -> f64 {
    tree(pid).into_iter().map(|pid| ticks(pid, 4)).sum::<u64>() as f64 / 100.0
}

/// Seconds of user and system time of this process alone.
pub fn own_cpu() -> f64 {
    // Without the last two: those are of children that have ended.
    ticks(std::process::id(), 2) as f64 / 100.0
}

fn ticks(pid: u32, of: usize) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    // utime, stime, cutime, cstime
    fields
        .skip(11)
        .take(of)
        .filter_map(|f| f.parse::<u64>().ok())
        .sum()
}

/// Resident now, in KiB; pages that processes share count for each.
pub fn rss(pid: u32) -> u64 {
    total(pid, "VmRSS:")
}

/// The most that was resident since `forget_peak`, in KiB.
pub fn peak(pid: u32) -> u64 {
    total(pid, "VmHWM:")
}

pub fn forget_peak(pid: u32) {
    for pid in tree(pid) {
        let _ = std::fs::write(format!("/proc/{pid}/clear_refs"), "5");
    }
}

fn total(pid: u32, what: &str) -> u64 {
    tree(pid).into_iter().map(|pid| status(pid, what)).sum()
}

fn status(pid: u32, what: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(what));
    let kib = line.and_then(|line| line.split_ascii_whitespace().next()?.parse().ok());
    kib.unwrap_or(0)
}

/// Waits until the process has nothing more to do: what it does after its answers (a commit, a
/// late write) belongs to its own CPU time, and would disturb who is measured next.
pub async fn settle(pid: u32) {
    for _ in 0..100 {
        let before = cpu(pid);
        tokio::time::sleep(Duration::from_millis(40)).await;
        if cpu(pid) <= before {
            return;
        }
    }
}

/// Writes a file and removes it, that the memory which the next files get is some that this machine has used: a virtual
/// one may give free memory back to its host, and then the first touch of each page costs ten times the write.
pub fn touch_page_cache() {
    use std::io::Write as _;
    let mut file = tempfile::tempfile().unwrap();
    let piece = vec![1; 2 << 20];
    (0..TOUCHED / piece.len()).for_each(|_| file.write_all(&piece).unwrap());
}

/// Has the kernel forget what it read from disk, as after a boot; whether it did, which takes privilege.
pub fn forget_files() -> bool {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").is_ok()
}

/// CPU seconds of the whole machine so far but for this process and its descendants, with what a host took away.
pub fn others() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields = stat.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = fields
        .split_ascii_whitespace()
        .filter_map(|f| f.parse().ok())
        .collect();
    // user, nice, system, idle, iowait, irq, softirq, steal
    let busy: u64 = [0, 1, 2, 5, 6, 7]
        .iter()
        .filter_map(|n| ticks.get(*n))
        .sum();
    busy as f64 / 100.0 - cpu(std::process::id())
}

/// As many open files as may be: children inherit it.
pub fn allow_files() {
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: limit.maximum,
        ..limit
    };
    let _ = setrlimit(Resource::Nofile, all);
}

pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}
