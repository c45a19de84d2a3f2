//! What to start, as a pure function of the options and the machine.

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

/// `CUDA_VISIBLE_DEVICES` where it is set, else the kernel driver's list.
fn visible_gpus() -> u32 {
    let present = std::fs::read_dir("/proc/driver/nvidia/gpus").map_or(0, Iterator::count) as u32;
    match std::env::var("CUDA_VISIBLE_DEVICES") {
        Ok(list) => {
            let named =
                list.split(',').filter(|item| !item.trim().is_empty() && item.trim() != "-1").count() as u32;
            named.min(present)
        }
        Err(_) => present,
    }
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
    if nodes * per_node > machine.gpus {
        let wanted = nodes * per_node;
        return Err(Fault::input(format!("{wanted} GPUs are asked for, this machine has {}", machine.gpus))
            .hint("lower --nodes or --gpus-per-node; all nodes of one launcher share this machine"));
    }
    let count = (nodes * per_node.max(1)) as usize;
    let threads = (machine.cores / count).max(1);
    let trainer = |index: usize| {
        let (node, place) = (index as u32 / per_node.max(1), index as u32 % per_node.max(1));
        let (name, device) = match per_node {
            0 => (format!("node{node}-cpu"), "cpu".to_owned()),
            _ => (format!("node{node}-gpu{place}"), format!("cuda:{index}")),
        };
        Trainer { name, launch_index: index, node: node as usize, device, threads, cores: Vec::new() }
    };
    Ok((0..count).map(trainer).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_GPU: Machine = Machine { cores: 8, gpus: 0 };
    const FOUR_GPUS: Machine = Machine { cores: 8, gpus: 4 };

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
    }
}
