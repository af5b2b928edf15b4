//! How much memory this process may use: the least of the machine's, and of the limits of its
//! control groups (containers, `MemoryMax=` of systemd).

use std::path::{Path, PathBuf};

/// Returns the number of bytes, `None` where the system does not say.
pub fn memory_bytes() -> Option<u64> {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    let of_machine = read(Path::new("/proc/meminfo")).and_then(|text| total(&text));
    let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    let of_groups = limit_files(&groups).into_iter().filter_map(|file| limit(&read(&file)?));
    of_machine.into_iter().chain(of_groups).min()
}

/// Returns `MemTotal` of `/proc/meminfo`.
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1_024)
}

/// A control group without a limit says `max`, or with version 1 a number that no machine has.
fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// Returns the files with the limits of the groups in `/proc/self/cgroup` and of the groups above
/// them. In a container its own group often looks like the root.
fn limit_files(groups: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, name) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|it| it == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let path = Path::new(path.trim_start_matches('/'));
        files.extend(path.ancestors().map(|group| Path::new(root).join(group).join(name)));
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_control_group_and_those_above_it_may_limit_the_memory() {
        let names = |groups: &str| -> Vec<String> {
            limit_files(groups).iter().map(|file| file.display().to_string()).collect()
        };
        let of_systemd = ["system.slice/headworks.service/", "system.slice/", ""];
        let wanted = of_systemd.map(|group| format!("/sys/fs/cgroup/{group}memory.max"));
        assert_eq!(names("0::/system.slice/headworks.service\n"), wanted);
        assert_eq!(names("0::/\n"), ["/sys/fs/cgroup/memory.max"]);
        let of_version_1 = "3:cpu,cpuacct:/a\n2:memory:/docker/x\n1:name=systemd:/a\n";
        let wanted = ["docker/x/", "docker/", ""]
            .map(|group| format!("/sys/fs/cgroup/memory/{group}memory.limit_in_bytes"));
        assert_eq!(names(of_version_1), wanted);
        assert!(names("nonsense\n:\n").is_empty());
    }

    #[test]
    fn a_limit_is_a_number_and_anything_else_is_none() {
        assert_eq!((limit("536870912\n"), limit("max\n"), limit("")), (Some(512 << 20), None, None));
        assert_eq!(total("MemFree: 3 kB\nMemTotal:       16384 kB\n"), Some(16 << 20));
        assert_eq!(total("MemTotal: many kB\n"), None);
    }
}
