//! Cores for trainers on a machine with several NUMA nodes. The kernel allocates memory on the node of the thread that first touches it,
//! so pinning a trainer's threads to one node keeps its memory near.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::placement::gpus::Present;

/// Cores of each NUMA node, and cores near each GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Cores of each node that this process may use; nodes without such cores are left out.
    pub(super) nodes: Vec<Vec<usize>>,
    /// Cores near each visible GPU, by its CUDA number if CUDA numbers GPUs by PCI bus id, as it does with equal GPUs; empty if unknown.
    pub(super) gpus: Vec<Vec<usize>>,
}

impl Topology {
    /// Topology of this machine as this process may use it.
    #[must_use]
    pub fn here() -> Self {
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        Self::read(Path::new("/"), &allowed_cores(), visible.as_deref())
    }

    /// Reads `/sys` and `/proc` below `root`; keeps only cores in `allowed`, and GPUs that `CUDA_VISIBLE_DEVICES` = `visible` leaves.
    #[must_use]
    pub fn read(root: &Path, allowed: &[usize], visible: Option<&str>) -> Self {
        let cores = |node: usize| -> Vec<usize> {
            let path = root.join(format!("sys/devices/system/node/node{node}/cpulist"));
            let list = dyad_proto::files::of_kernel(path).unwrap_or_default();
            parse_list(&list).into_iter().filter(|core| allowed.contains(core)).collect()
        };
        let online =
            dyad_proto::files::of_kernel(root.join("sys/devices/system/node/online")).unwrap_or_default();
        let nodes = parse_list(&online).into_iter().map(cores).filter(|cores| !cores.is_empty()).collect();
        let mut buses: Vec<String> = std::fs::read_dir(root.join("proc/driver/nvidia/gpus"))
            .map(|entries| {
                entries.flatten().map(|entry| entry.file_name().to_string_lossy().into()).collect()
            })
            .unwrap_or_default();
        buses.sort_unstable();
        let near = |bus: &String| {
            let path = root.join(format!("sys/bus/pci/devices/{bus}/numa_node"));
            // -1, which does not parse, if the firmware does not tell the node.
            let node = dyad_proto::files::of_kernel(path).ok().and_then(|text| text.trim().parse().ok());
            node.map_or_else(Vec::new, cores)
        };
        let visible = Present::read(root).places(visible).unwrap_or_default();
        let gpus = visible.iter().map(|&place| buses.get(place).map(near).unwrap_or_default()).collect();
        Self { gpus, nodes }
    }
}

/// Cores that this process may use.
#[must_use]
#[expect(unsafe_code, reason = "sched_getaffinity")]
pub fn allowed_cores() -> Vec<usize> {
    // SAFETY: zeroes are a valid set, and the kernel writes at most its size.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set);
        set
    };
    // SAFETY: indices are below the set's size.
    (0..libc::CPU_SETSIZE as usize).filter(|&core| unsafe { libc::CPU_ISSET(core, &set) }).collect()
}

/// Parses a list such as `0-3,8,10-11`.
fn parse_list(text: &str) -> Vec<usize> {
    let range = |item: &str| {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    };
    text.split(',').filter_map(range).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::gpus::Gpus;
    use crate::placement::trainers::{Machine, trainers};

    fn bound(nodes: &[&[usize]], count: u32) -> Vec<Vec<usize>> {
        let topology =
            Topology { nodes: nodes.iter().map(|cores| cores.to_vec()).collect(), gpus: Vec::new() };
        let mut plan = trainers(count, Gpus::Count(0), &Machine { cores: 8, ..Machine::default() }).unwrap();
        topology.bind(&mut plan);
        plan.into_iter().map(|trainer| trainer.cores).collect()
    }

    #[test]
    fn trainers_get_equal_shares_of_the_nodes() {
        let two: [&[usize]; 2] = [&[0, 1], &[2, 3]];
        assert_eq!(bound(&two, 1), [vec![0, 1, 2, 3]]);
        assert_eq!(bound(&two, 2), [vec![0, 1], vec![2, 3]]);
        assert_eq!(bound(&two, 4), [vec![0, 1], vec![0, 1], vec![2, 3], vec![2, 3]]);
        assert!(bound(&[&[0, 1]], 2).iter().all(Vec::is_empty));
    }

    #[test]
    fn topology_is_read_and_has_only_allowed_cores() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("sys/devices/system/node/online", "0-2\n");
        write("sys/devices/system/node/node0/cpulist", "0-2,8\n");
        write("sys/devices/system/node/node1/cpulist", "3-5\n");
        // A node with memory but no cores.
        write("sys/devices/system/node/node2/cpulist", "\n");
        write("proc/driver/nvidia/gpus/0000:41:00.0/information", "");
        write("proc/driver/nvidia/gpus/0000:01:00.0/information", "");
        write("sys/bus/pci/devices/0000:01:00.0/numa_node", "1\n");
        write("sys/bus/pci/devices/0000:41:00.0/numa_node", "-1\n");
        let topology = Topology::read(root.path(), &[0, 1, 3, 4, 8], None);
        assert_eq!(topology.nodes, [vec![0, 1, 8], vec![3, 4]]);
        assert_eq!(topology.gpus, [vec![3, 4], vec![]]);
        let mut plan =
            trainers(1, Gpus::Count(2), &Machine { cores: 5, gpus: 2, gpu_trouble: None }).unwrap();
        topology.bind(&mut plan);
        assert_eq!(plan[0].cores, [3, 4]);
        assert!(plan[1].cores.is_empty());
        let visible = |list| Topology::read(root.path(), &[0, 1, 3, 4, 8], Some(list)).gpus;
        assert_eq!(visible("1,0"), [vec![], vec![3, 4]]);
        assert_eq!(visible("0"), [vec![3, 4]]);
        assert!(visible("MIG-1").is_empty());
    }

    #[tokio::test]
    async fn a_process_is_pinned_to_its_cores() {
        let core = *allowed_cores().last().unwrap();
        let mut command = tokio::process::Command::new("cat");
        command.arg("/proc/self/status");
        crate::process::os::keep_to(&mut command, &[core]);
        let status = command.output().await.unwrap().stdout;
        let status = String::from_utf8_lossy(&status).into_owned();
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
        assert_eq!(parse_list(list), [core]);
    }
}
