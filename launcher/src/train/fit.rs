//! Checks with the estimate of [`crate::predict`] whether a run fits the memory of its devices. The decision is pure.

use std::path::Path;

use dyad_proto::{Fault, RunConfig};

use crate::agent::machine::Hello;
use crate::placement::trainers::Trainer;
use crate::predict::machine::{DeviceSpec, H100, Interconnect, cpu};
use crate::predict::memory::{Key, fits, gib, memory, remedy};
use crate::predict::work::Setup;
use crate::predict::{self, Hardware, USUAL_PAIR, shapes};
use crate::show::console::warn;
use crate::train::options::Options;
use dyad_families::shape::Shape;

/// Fails if the run cannot fit its GPUs; warns if it probably does not fit the RAM. Does nothing if the model's sizes or the memory are
/// unknown on this machine.
pub fn check(
    options: &Options,
    config: &RunConfig,
    trainers: &[Trainer],
    hosts: &[Hello],
) -> Result<(), Fault> {
    if options.no_memory_check || !Path::new(&config.model).join("config.json").is_file() {
        return Ok(());
    }
    let Ok(shape) = shapes::find(&config.model) else { return Ok(()) };
    let devices = devices(trainers, hosts);
    match judge(config, &shape, &devices) {
        Fit::Fits => Ok(()),
        Fit::Tight(warning) => {
            warn(&warning);
            Ok(())
        }
        Fit::TooLarge(fault) => Err(fault),
    }
}

/// Number and memory of the trainers' devices.
#[derive(Clone, Copy, Debug)]
pub struct Devices {
    /// Number of all trainers.
    pub trainers: usize,
    /// Largest number of trainers on one host.
    pub per_host: usize,
    /// Whether the devices are GPUs.
    pub gpu: bool,
    /// Bytes of the smallest GPU, or without GPUs the smallest free memory of a host in bytes; `None` if unknown.
    pub bytes: Option<u64>,
}

fn devices(trainers: &[Trainer], hosts: &[Hello]) -> Devices {
    let gpu = trainers.iter().any(|trainer| trainer.device != "cpu");
    let of = |node: usize| trainers.iter().filter(|trainer| hosts.len() == 1 || trainer.node == node).count();
    let bytes = match gpu {
        true => hosts.iter().flat_map(|hello| hello.gpu_memory.iter().copied()).min(),
        false => hosts.iter().map(|hello| hello.free_memory).filter(|free| *free > 0).min(),
    };
    let per_host = (0..hosts.len()).map(of).max().unwrap_or(1).max(1);
    Devices { trainers: trainers.len(), per_host, gpu, bytes }
}

/// Result of the memory check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fit {
    /// The run fits, or the memory is unknown.
    Fits,
    /// The run may not fit the RAM; with the warning.
    Tight(String),
    /// The run cannot fit its GPUs.
    TooLarge(Fault),
}

/// Judges a run by its configuration, its model's sizes and its devices.
#[must_use]
pub fn judge(config: &RunConfig, shape: &Shape, devices: &Devices) -> Fit {
    let Some(bytes) = devices.bytes else { return Fit::Fits };
    // Trainers of a host share its RAM.
    let share = if devices.gpu { bytes as f64 } else { bytes as f64 / devices.per_host as f64 };
    let setup = setup(config, shape, devices, share);
    if fits(&setup) {
        return Fit::Fits;
    }
    let parts = memory(&setup).parts();
    let named = parts.iter().filter(|(_, bytes)| *bytes >= 0.5 * (1u64 << 30) as f64);
    let parts = named.map(|(name, bytes)| format!("{name} {}", gib(*bytes))).collect::<Vec<_>>().join(", ");
    let what = if devices.gpu { "the smallest GPU has" } else { "free for each are" };
    let message = format!(
        "the run does not fit: a trainer needs about {}, {what} {}{}",
        gib(memory(&setup).total()),
        gib(share),
        if parts.is_empty() { String::new() } else { format!(" ({parts})") }
    );
    if !devices.gpu {
        return Fit::Tight(message);
    }
    let hint = match remedy(&setup) {
        Some(keys) => format!("what makes it fit: {}", as_configuration(&keys)),
        None => "use more or larger GPUs, or a smaller model; `launcher plan` says what fits".into(),
    };
    Fit::TooLarge(Fault::input(message).hint(hint + " (--no-memory-check starts it all the same)"))
}

/// A lower bound: assumes the most memory-saving choice for every automatic setting, and pairs of usual length.
fn setup(config: &RunConfig, shape: &Shape, devices: &Devices, bytes: f64) -> Setup {
    let on = if devices.gpu { H100 } else { cpu(1e11) };
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let place = Hardware {
        machine: DeviceSpec { memory: Some(bytes), ..on },
        gpus: count(devices.trainers),
        gpus_per_node: count(devices.per_host),
        network: Interconnect::Ndr,
    };
    predict::setup(config, shape, &place, USUAL_PAIR)
}

/// Keys in the format of a configuration file.
fn as_configuration(keys: &[Key]) -> String {
    keys.iter().map(|(key, value)| format!("{key} = {value}")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_gpus(trainers: usize, gib: u64) -> Devices {
        Devices { trainers, per_host: trainers.min(8), gpu: true, bytes: Some(gib << 30) }
    }

    #[test]
    fn a_model_that_cannot_fit_is_refused_with_a_remedy() {
        let shape = shapes::find("8B").unwrap();
        let config = RunConfig::default();
        let Fit::TooLarge(fault) = judge(&config, &shape, &on_gpus(8, 80)) else { panic!() };
        assert!(fault.message.starts_with("the run does not fit: a trainer needs about "), "{fault}");
        assert!(fault.message.contains("the smallest GPU has 80.0 GiB (weights "), "{fault}");
        assert!(
            fault.hint.starts_with("what makes it fit: ") && !fault.hint.contains("--zero"),
            "{}",
            fault.hint
        );
        // The proposed remedy is enough.
        let cured = RunConfig { lora: true, ..config.clone() };
        assert_eq!(judge(&cured, &shape, &on_gpus(8, 80)), Fit::Fits);
        let sharded = RunConfig { zero_stage: 3, ..config };
        assert_eq!(judge(&sharded, &shape, &on_gpus(16, 80)), Fit::Fits);
    }

    #[test]
    fn the_remedy_is_formatted_as_configuration_keys() {
        let keys = [("zero_stage", "3".to_owned()), ("optim", "\"adamw_8bit\"".to_owned())];
        assert_eq!(as_configuration(&keys), "zero_stage = 3, optim = \"adamw_8bit\"");
    }

    #[test]
    fn too_little_ram_is_a_warning_and_trainers_of_a_host_share_it() {
        let (shape, config) = (shapes::find("135M").unwrap(), RunConfig::default());
        let on_cpu =
            |per_host, gib: u64| Devices { trainers: per_host, per_host, gpu: false, bytes: Some(gib << 30) };
        assert_eq!(judge(&config, &shape, &on_cpu(1, 16)), Fit::Fits);
        assert!(
            matches!(judge(&config, &shape, &on_cpu(16, 16)), Fit::Tight(warning) if warning.contains("free for each"))
        );
        assert_eq!(judge(&config, &shape, &Devices { bytes: None, ..on_cpu(16, 16) }), Fit::Fits);
    }

    #[test]
    fn devices_take_the_smallest_gpu_and_most_trainers_per_host() {
        let trainer = |node: usize, device: &str| Trainer {
            name: String::new(),
            launch_index: 0,
            node,
            device: device.into(),
            threads: 1,
            cores: Vec::new(),
        };
        let hello =
            |gpus: &[u64], free| Hello { gpu_memory: gpus.to_vec(), free_memory: free, ..Hello::default() };
        let gpus = [trainer(0, "cuda:0"), trainer(0, "cuda:1"), trainer(1, "cuda:0")];
        let found = devices(&gpus, &[hello(&[80, 80], 9), hello(&[40], 9)]);
        assert_eq!((found.trainers, found.per_host, found.gpu, found.bytes), (3, 2, true, Some(40)));
        let found = devices(&[trainer(0, "cpu"), trainer(1, "cpu")], &[hello(&[], 7)]);
        assert_eq!(
            (found.per_host, found.gpu, found.bytes),
            (2, false, Some(7)),
            "all nodes are one machine"
        );
    }
}
