//! What to start, as a pure function of the options and the machine.

use std::ops::Range;
use std::path::Path;

use dyad_proto::Fault;

use crate::cli::Gpus;

/// What the machine offers.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// CPU cores that this process may use.
    pub cores: usize,
    /// GPUs that are visible.
    pub gpus: u32,
}

impl Machine {
    /// Looks at this machine.
    #[must_use]
    pub fn here() -> Self {
        Self { cores: std::thread::available_parallelism().map_or(1, usize::from), gpus: visible_gpus() }
    }
}

/// `CUDA_VISIBLE_DEVICES` where it is set, else the kernel driver's list, or what some sandboxes show in its stead: the devices.
fn visible_gpus() -> u32 {
    let listed = std::fs::read_dir("/proc/driver/nvidia/gpus").map_or(0, Iterator::count) as u32;
    let present = if listed > 0 { listed } else { device_files(Path::new("/dev")) };
    match std::env::var("CUDA_VISIBLE_DEVICES") {
        Ok(list) => {
            let named =
                list.split(',').filter(|item| !item.trim().is_empty() && item.trim() != "-1").count() as u32;
            named.min(present)
        }
        Err(_) => present,
    }
}

/// `nvidia0`, `nvidia1` …
fn device_files(folder: &Path) -> u32 {
    let names = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let of_a_gpu =
        |name: &String| name.strip_prefix("nvidia").is_some_and(|number| number.parse::<u32>().is_ok());
    names.filter(of_a_gpu).count() as u32
}

/// One trainer process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trainer {
    /// Unique name, e.g. `node0-cpu`.
    pub name: String,
    /// Ranks are given in this order.
    pub launch_index: usize,
    /// Which node it belongs to, from 0.
    pub node: usize,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Threads of its CPU passes.
    pub threads: usize,
    /// Cores that it keeps to; empty for all.
    pub cores: Vec<usize>,
}

impl Trainer {
    /// How its process is called in messages.
    #[must_use]
    pub fn label(&self) -> String {
        format!("trainer rank {} ({})", self.launch_index, self.name)
    }
}

/// The trainers of a run, all on this machine.
pub fn trainers(nodes: u32, gpus: Gpus, machine: Machine) -> Result<Vec<Trainer>, Fault> {
    let per_node = match gpus {
        Gpus::Auto => machine.gpus / nodes,
        Gpus::Count(count) => count,
    };
    if per_node > 0 && machine.gpus == 0 {
        return Err(Fault::input("this machine has no CUDA device, but --gpus-per-node asks for some")
            .hint("train on the CPU with --gpus-per-node 0, or check nvidia-smi and CUDA_VISIBLE_DEVICES"));
    }
    // No product of what was asked for: it may be larger than any number here.
    if per_node > machine.gpus / nodes {
        let wanted = u64::from(nodes) * u64::from(per_node);
        return Err(Fault::input(format!("{wanted} GPUs are asked for, this machine has {}", machine.gpus))
            .hint("lower --nodes or --gpus-per-node; all nodes of one launcher share this machine"));
    }
    let threads = machine.cores / (nodes * per_node.max(1)) as usize;
    let node = |node: u32| {
        let place = Node { name: &format!("node{node}"), index: node as usize, threads };
        let first = (node * per_node.max(1)) as usize;
        place.trainers(first, node * per_node..(node + 1) * per_node, 1)
    };
    Ok((0..nodes).flat_map(node).collect())
}

/// Where trainers run, whoever has found it out.
#[derive(Clone, Copy, Debug)]
pub struct Node<'a> {
    /// Begins the names of its trainers.
    pub name: &'a str,
    /// Which of the run's nodes it is, from 0.
    pub index: usize,
    /// Cores for each trainer; none leaves one.
    pub threads: usize,
}

impl Node<'_> {
    /// Its trainers: one on each of these GPUs, or so many on the CPU where it uses none.
    #[must_use]
    pub fn trainers(&self, first: usize, gpus: Range<u32>, on_cpu: u32) -> Vec<Trainer> {
        let name = self.name;
        let places: Vec<(String, String)> = match (gpus.is_empty(), on_cpu) {
            (true, 1) => vec![(format!("{name}-cpu"), "cpu".into())],
            (true, _) => (0..on_cpu).map(|place| (format!("{name}-cpu{place}"), "cpu".into())).collect(),
            (false, _) => gpus
                .enumerate()
                .map(|(place, gpu)| (format!("{name}-gpu{place}"), format!("cuda:{gpu}")))
                .collect(),
        };
        let trainer = |(place, (name, device))| Trainer {
            name,
            launch_index: first + place,
            node: self.index,
            device,
            threads: self.threads.max(1),
            cores: Vec::new(),
        };
        places.into_iter().enumerate().map(trainer).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_GPU: Machine = Machine { cores: 8, gpus: 0 };
    const FOUR_GPUS: Machine = Machine { cores: 8, gpus: 4 };

    /// Some sandboxes hide the driver's list in /proc.
    #[test]
    fn gpus_are_counted_by_their_device_files_too() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!((device_files(folder.path()), device_files(Path::new("/nowhere"))), (2, 0));
    }

    #[test]
    fn cpu_trainers_share_the_cores() {
        let plan = trainers(3, Gpus::Auto, NO_GPU).unwrap();
        let names: Vec<&str> = plan.iter().map(|trainer| trainer.name.as_str()).collect();
        assert_eq!(names, ["node0-cpu", "node1-cpu", "node2-cpu"]);
        assert!(plan.iter().all(|trainer| trainer.threads == 2 && trainer.device == "cpu"));
        assert_eq!(trainers(9, Gpus::Auto, NO_GPU).unwrap()[8].threads, 1);
    }

    #[test]
    fn every_gpu_gets_one_trainer() {
        let plan = trainers(2, Gpus::Count(2), FOUR_GPUS).unwrap();
        let places: Vec<(&str, &str)> =
            plan.iter().map(|trainer| (trainer.name.as_str(), trainer.device.as_str())).collect();
        assert_eq!(
            places,
            [
                ("node0-gpu0", "cuda:0"),
                ("node0-gpu1", "cuda:1"),
                ("node1-gpu0", "cuda:2"),
                ("node1-gpu1", "cuda:3")
            ]
        );
        assert_eq!(trainers(1, Gpus::Auto, FOUR_GPUS).unwrap().len(), 4);
        assert_eq!(trainers(2, Gpus::Count(0), FOUR_GPUS).unwrap()[1].device, "cpu");
    }

    #[test]
    fn gpus_that_are_not_there_are_refused_with_a_hint() {
        let fault = trainers(1, Gpus::Count(1), NO_GPU).unwrap_err();
        assert!(fault.message.contains("no CUDA device") && fault.hint.contains("--gpus-per-node 0"));
        assert!(
            trainers(3, Gpus::Count(2), FOUR_GPUS).unwrap_err().message.starts_with("6 GPUs are asked for")
        );
        let absurd = trainers(2, Gpus::Count(1 << 31), FOUR_GPUS).unwrap_err();
        assert!(absurd.message.starts_with("4294967296 GPUs are asked for"), "{absurd}");
    }
}
