//! The trainers to start, as a pure function of options and machine.

use std::ops::Range;
use std::path::Path;
use std::process::Stdio;

use dyad_proto::{Fault, agrees, counted};
use tokio::process::Command;

use crate::placement::gpus::{self, Gpus, Present};
use crate::placement::numa::Topology;
use crate::process::programs::program;

/// oneDNN compiles about 25 kernels of two MiB for every new number of tokens and caches 1024. Steps rarely have the same number, so
/// a cache for a few steps is enough.
const KERNEL_CACHE: (&str, &str) = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64");

/// CPU cores and GPUs of a machine.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// CPU cores that this process may use.
    pub cores: usize,
    /// Visible GPUs; 0 if unknown.
    pub gpus: u32,
    /// Why the number of visible GPUs is unknown; `None` if it is known.
    pub gpu_trouble: Option<String>,
}

impl Machine {
    /// Reads this machine's cores and GPUs.
    #[must_use]
    pub fn here() -> Self {
        let chosen = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        let seen = Present::read(Path::new("/")).visible(chosen.as_deref());
        Self {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            gpus: seen.clone().unwrap_or(0),
            gpu_trouble: seen.err(),
        }
    }

    /// Fails if the number of GPUs is unknown, unless 0 GPUs are wanted.
    pub fn sure_of_gpus(&self, wanted: Gpus) -> Result<(), Fault> {
        trusted(self.gpu_trouble.as_deref(), wanted)
    }
}

/// Fails with `gpu_trouble`, unless 0 GPUs are wanted.
pub fn trusted(gpu_trouble: Option<&str>, wanted: Gpus) -> Result<(), Fault> {
    match gpu_trouble.filter(|_| wanted != Gpus::Count(0)) {
        None => Ok(()),
        Some(trouble) => Err(Fault::input(trouble).hint(
            "unset CUDA_VISIBLE_DEVICES or name GPUs that nvidia-smi lists; --gpus-per-node 0 trains on the CPU",
        )),
    }
}

/// One trainer process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trainer {
    /// Unique name, e.g. `node0-cpu`.
    pub name: String,
    /// Position among all trainers, from 0. The coordinator assigns ranks in this order.
    pub launch_index: usize,
    /// Index of its node, from 0.
    pub node: usize,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Number of threads of each thread pool.
    pub threads: usize,
    /// Cores that it is pinned to; empty for all.
    pub cores: Vec<usize>,
}

impl Trainer {
    /// Name of its process in messages.
    #[must_use]
    pub fn label(&self) -> String {
        format!("trainer rank {} ({})", self.launch_index, self.name)
    }
}

/// The trainers of a run on this machine only.
pub fn trainers(nodes: u32, gpus: Gpus, machine: &Machine) -> Result<Vec<Trainer>, Fault> {
    machine.sure_of_gpus(gpus)?;
    let per_node = match gpus {
        Gpus::Auto if machine.gpus == 0 => 0,
        Gpus::Auto => machine.gpus / nodes,
        Gpus::Count(count) => count,
    };
    if per_node > 0 && machine.gpus == 0 {
        return Err(Fault::input("this machine has no CUDA device, but --gpus-per-node asks for some")
            .hint("train on the CPU with --gpus-per-node 0, or check nvidia-smi and CUDA_VISIBLE_DEVICES"));
    }
    if gpus == Gpus::Auto && per_node == 0 && machine.gpus > 0 {
        let here = gpus::count(machine.gpus);
        return Err(Fault::input(format!("--nodes {nodes}: this machine has {here}, and every node needs one"))
            .hint("without --nodes every GPU of this machine is used; --gpus-per-node 0 trains on the CPU; --hosts names other machines"));
    }
    // Do not multiply user input: it may overflow.
    if per_node > machine.gpus / nodes {
        let wanted = u64::from(nodes) * u64::from(per_node);
        return Err(Fault::input(format!("{}, this machine has {}", asked_for(wanted), machine.gpus))
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

/// Start of an error message: `8 GPUs are asked for`.
pub(crate) fn asked_for(gpus: u64) -> String {
    format!("{} {} asked for", counted(gpus, "GPU"), agrees(gpus, "is", "are"))
}

/// A line about the trainers' devices, and a line about idle GPUs if there are any. `here` has the name and GPUs of each node's machine,
/// or one entry if all nodes are on this machine.
#[must_use]
pub fn devices(trainers: &[Trainer], gpus: Gpus, here: &[(String, u32)]) -> (String, Option<String>) {
    let count = trainers.len();
    let trainers_are = counted(count, "trainer");
    let used = |place: usize| {
        let of_place = |trainer: &&Trainer| here.len() == 1 || trainer.node == place;
        trainers.iter().filter(of_place).filter(|trainer| trainer.device != "cpu").count() as u32
    };
    let present: u32 = here.iter().map(|(_, gpus)| gpus).sum();
    let on_gpus: u32 = (0..here.len()).map(used).sum();
    if on_gpus == 0 {
        let why = match (gpus, present) {
            (Gpus::Count(0), 1..) => "as --gpus-per-node 0 asks",
            _ => "no GPU is visible",
        };
        return (format!("{trainers_are} on the CPU: {why}"), None);
    }
    let idle = here.iter().enumerate().filter_map(|(place, (name, present))| {
        let idle = present.saturating_sub(used(place));
        let at = if name.is_empty() { String::new() } else { format!("host {name}: ") };
        (idle > 0).then(|| format!("{at}{idle} of {}", gpus::count(*present)))
    });
    let idle = idle.collect::<Vec<_>>().join(", ");
    let idle = (!idle.is_empty())
        .then(|| format!("idle GPUs: {idle}; --nodes, --gpus-per-node and slots decide how many are used"));
    (format!("{trainers_are} on {}", gpus::count(on_gpus)), idle)
}

/// One node of a run.
#[derive(Clone, Copy, Debug)]
pub struct Node<'a> {
    /// Prefix of its trainers' names.
    pub name: &'a str,
    /// Index of the node in the run, from 0.
    pub index: usize,
    /// Threads of each trainer; 0 becomes 1.
    pub threads: usize,
}

impl Node<'_> {
    /// Its trainers: one per GPU in `gpus`, or `on_cpu` CPU trainers if `gpus` is empty. `first` is the first launch index.
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

/// Command line and environment of a trainer. `beside` is the number of trainers on its machine, itself included.
pub fn command(
    trainer: &Trainer,
    coordinator: &str,
    connect_timeout: u64,
    beside: usize,
) -> Result<Command, Fault> {
    let mut command = Command::new(program("trainer")?);
    command.args(["run", "--coordinator", coordinator, "--name", &trainer.name]);
    command.args(["--launch-index", &trainer.launch_index.to_string(), "--device", &trainer.device]);
    command.args(["--connect-timeout", &connect_timeout.to_string()]);
    let threads = trainer.threads.to_string();
    // All thread pools of the process must use only its share of the cores.
    command.args(["--threads", &threads]).env("OMP_NUM_THREADS", &threads).env("RAYON_NUM_THREADS", &threads);
    if std::env::var_os(KERNEL_CACHE.0).is_none() {
        command.env(KERNEL_CACHE.0, KERNEL_CACHE.1);
    }
    // The variable has the same name as in torchrun.
    command.env("LOCAL_WORLD_SIZE", beside.to_string()).stdout(Stdio::null());
    Ok(command)
}

impl Topology {
    /// Sets each trainer's cores: those near its GPU, or for CPU trainers the cores of an equal share of the NUMA nodes. Does nothing
    /// with fewer than two nodes.
    pub fn bind(&self, trainers: &mut [Trainer]) {
        let (nodes, count) = (self.nodes.len(), trainers.len());
        if nodes < 2 {
            return;
        }
        for (index, trainer) in trainers.iter_mut().enumerate() {
            let gpu = trainer.device.strip_prefix("cuda:").and_then(|gpu| gpu.parse::<usize>().ok());
            trainer.cores = match gpu {
                Some(gpu) => self.gpus.get(gpu).cloned().unwrap_or_default(),
                None => {
                    let first = index * nodes / count;
                    let end = ((index + 1) * nodes / count).max(first + 1);
                    self.nodes[first..end].concat()
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(gpus: u32) -> Machine {
        Machine { cores: 8, gpus, gpu_trouble: None }
    }

    #[test]
    fn cpu_trainers_share_the_cores() {
        let plan = trainers(3, Gpus::Auto, &machine(0)).unwrap();
        let names: Vec<&str> = plan.iter().map(|trainer| trainer.name.as_str()).collect();
        assert_eq!(names, ["node0-cpu", "node1-cpu", "node2-cpu"]);
        assert!(plan.iter().all(|trainer| trainer.threads == 2 && trainer.device == "cpu"));
        assert_eq!(trainers(9, Gpus::Auto, &machine(0)).unwrap()[8].threads, 1);
    }

    #[test]
    fn every_gpu_gets_one_trainer() {
        let plan = trainers(2, Gpus::Count(2), &machine(4)).unwrap();
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
        assert_eq!(trainers(1, Gpus::Auto, &machine(4)).unwrap().len(), 4);
        assert_eq!(trainers(2, Gpus::Count(0), &machine(4)).unwrap()[1].device, "cpu");
    }

    /// Three nodes with eight GPUs train on six. Fewer GPUs than nodes is an error, not a fallback to the CPU.
    #[test]
    fn fewer_gpus_than_nodes_are_refused_and_idle_gpus_are_reported() {
        for (nodes, gpus, here) in [(2, 1, "has 1 GPU,"), (9, 8, "has 8 GPUs,")] {
            let fault = trainers(nodes, Gpus::Auto, &machine(gpus)).unwrap_err();
            assert!(
                fault.message.starts_with(&format!("--nodes {nodes}: ")) && fault.message.contains(here),
                "{fault}"
            );
            assert!(fault.hint.contains("--gpus-per-node 0"));
            assert_eq!(trainers(nodes, Gpus::Count(0), &machine(gpus)).unwrap().len(), nodes as usize);
        }
        let said = |nodes, gpus, present: u32| {
            devices(&trainers(nodes, gpus, &machine(present)).unwrap(), gpus, &[(String::new(), present)])
        };
        let (line, idle) = said(3, Gpus::Auto, 8);
        assert_eq!(line, "6 trainers on 6 GPUs");
        assert!(idle.unwrap().starts_with("idle GPUs: 2 of 8 GPUs;"));
        assert_eq!(said(1, Gpus::Auto, 8), ("8 trainers on 8 GPUs".into(), None));
        assert_eq!(said(1, Gpus::Auto, 1), ("1 trainer on 1 GPU".into(), None));
        assert_eq!(said(2, Gpus::Auto, 0), ("2 trainers on the CPU: no GPU is visible".into(), None));
        assert_eq!(
            said(2, Gpus::Count(0), 8),
            ("2 trainers on the CPU: as --gpus-per-node 0 asks".into(), None)
        );
    }

    #[test]
    fn an_unknown_number_of_gpus_is_refused_unless_zero_is_wanted() {
        let unsure = Machine { gpu_trouble: Some("CUDA_VISIBLE_DEVICES=9: no".into()), ..machine(0) };
        let fault = trainers(1, Gpus::Auto, &unsure).unwrap_err();
        assert!(fault.message.contains("CUDA_VISIBLE_DEVICES=9") && fault.hint.contains("--gpus-per-node 0"));
        assert_eq!(trainers(1, Gpus::Count(0), &unsure).unwrap()[0].device, "cpu");
    }

    #[test]
    fn too_many_gpus_are_refused_with_a_hint() {
        let fault = trainers(1, Gpus::Count(1), &machine(0)).unwrap_err();
        assert!(fault.message.contains("no CUDA device") && fault.hint.contains("--gpus-per-node 0"));
        assert!(
            trainers(3, Gpus::Count(2), &machine(4)).unwrap_err().message.starts_with("6 GPUs are asked for")
        );
        let absurd = trainers(2, Gpus::Count(1 << 31), &machine(4)).unwrap_err();
        assert!(absurd.message.starts_with("4294967296 GPUs are asked for"), "{absurd}");
    }
}
