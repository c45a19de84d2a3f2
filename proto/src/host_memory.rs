//! Free host memory for this process: the minimum of the kernel's available memory and of what its control groups (containers, Slurm,
//! systemd) leave.

use std::path::{Path, PathBuf};

use crate::files;

/// Limits from here on count as unlimited: cgroup v1 writes "no limit" as a number near 2^63.
const NO_LIMIT: u64 = 1 << 60;

/// Bytes that this process can still allocate without swapping; `None` if the system does not report it.
#[must_use]
pub fn free() -> Option<u64> {
    free_below(Path::new("/"))
}

/// Like [`free`], with `/proc` and `/sys` below `root`.
fn free_below(root: &Path) -> Option<u64> {
    let info = files::of_kernel(root.join("proc/meminfo")).ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let available = line.split_whitespace().next()?.parse::<u64>().ok()? << 10;
    let groups = groups(root).into_iter().filter_map(|group| group.free());
    Some(groups.fold(available, u64::min))
}

/// A memory control group of version 1 or 2: its folder and the names of its files.
struct ControlGroup {
    folder: PathBuf,
    limit: &'static str,
    usage: &'static str,
    cache: &'static str,
}

impl ControlGroup {
    /// The limit minus the memory in use. The page cache does not count as used: the kernel drops it first.
    fn free(&self) -> Option<u64> {
        let read = |name: &str| files::of_kernel(self.folder.join(name)).ok();
        let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
        let limit = number(self.limit).filter(|limit| *limit < NO_LIMIT)?;
        let stat = read("memory.stat").unwrap_or_default();
        let cache = stat.lines().find_map(|line| line.strip_prefix(self.cache)?.trim().parse::<u64>().ok());
        let used = number(self.usage)?.saturating_sub(cache.unwrap_or(0));
        Some(limit.saturating_sub(used))
    }
}

/// The process's control groups and their ancestors. In a container the innermost group is the root of the mount.
fn groups(root: &Path) -> Vec<ControlGroup> {
    let own = files::of_kernel(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut groups = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (mount, limit, usage, cache) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "),
            list if list.split(',').any(|name| name == "memory") => (
                "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file ",
            ),
            _ => continue,
        };
        let mount = root.join(mount);
        let inner = mount.join(path.trim_start_matches('/'));
        let around = inner.ancestors().take_while(|folder| folder.starts_with(&mount));
        groups.extend(around.map(|folder| ControlGroup { folder: folder.to_owned(), limit, usage, cache }));
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let meminfo = ("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:    8388608 kB\n");
        for (name, text) in files.iter().chain([&meminfo]) {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn without_limits_the_kernels_available_memory_counts() {
        let root = host(&[
            ("proc/self/cgroup", "0::/user.slice\n"),
            ("sys/fs/cgroup/user.slice/memory.max", "max\n"),
        ]);
        assert_eq!(free_below(root.path()), Some(8 << 30));
        // The machine's own memory is not above what the kernel has in all.
        let info = std::fs::read_to_string("/proc/meminfo").unwrap();
        let total: u64 = info.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(free().is_some_and(|bytes| (1 << 20..=total << 10).contains(&bytes)));
        assert_eq!(free_below(Path::new("/nowhere")), None);
    }

    #[test]
    fn a_container_has_its_limit_minus_usage_and_cache_counts_as_free() {
        let root = host(&[
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.max", "4294967296\n"),
            ("sys/fs/cgroup/memory.current", "3221225472\n"),
            ("sys/fs/cgroup/memory.stat", "anon 5\ninactive_file 1073741824\n"),
        ]);
        assert_eq!(free_below(root.path()), Some(2 << 30));
    }

    #[test]
    fn the_tightest_enclosing_group_counts() {
        let job = "sys/fs/cgroup/memory/slurm/job_5/memory.limit_in_bytes";
        let root = host(&[
            ("proc/self/cgroup", "5:cpuset:/x\n4:memory:/slurm/job_5/step_0\n0::/\n"),
            ("sys/fs/cgroup/memory/slurm/job_5/step_0/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/slurm/job_5/step_0/memory.usage_in_bytes", "0\n"),
            (job, "2147483648\n"),
            ("sys/fs/cgroup/memory/slurm/job_5/memory.usage_in_bytes", "1073741824\n"),
        ]);
        assert_eq!(free_below(root.path()), Some(1 << 30));
    }
}
