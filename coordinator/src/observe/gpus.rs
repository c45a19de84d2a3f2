//! Metrics of the trainers' GPUs, by rank and GPU, as NVML reports them to the trainers. A missing value is not shown.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use dyad_proto::wire::GpuReading;
use prometheus_client::registry::Registry;

use super::families::{Gauges, Labels, added, label};

/// Longest GPU name that is shown, in characters; NVML's have 40. Bounded here because trainers send it.
const NAME: usize = 64;

pub(super) struct GpuMetrics {
    used: Gauges,
    total: Gauges,
    utilization: Gauges,
    power: Gauges,
    /// The labels of each rank's GPU.
    shown: Mutex<HashMap<u32, Labels>>,
}

impl GpuMetrics {
    pub(super) fn new(r: &mut Registry) -> Self {
        let utilization = "Share of the time in which a kernel ran on a rank's GPU";
        Self {
            used: added(r, "gpu_memory_used_bytes", "Memory of a rank's GPU that all processes use"),
            total: added(r, "gpu_memory_total_bytes", "Total memory of a rank's GPU"),
            utilization: added(r, "gpu_utilization_ratio", utilization),
            power: added(r, "gpu_power_watts", "Power that a rank's GPU draws"),
            shown: Mutex::default(),
        }
    }

    /// Shows the values of a rank's last heartbeat, and removes all others.
    pub(super) fn show(&self, rank: u32, reading: Option<&GpuReading>) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let labels = reading.map(|reading| {
            let name: String = reading.gpu.chars().take(NAME).collect();
            vec![("rank", rank.to_string()), ("gpu", label(&name))]
        });
        if let Some(before) = shown.remove(&rank).filter(|before| Some(before) != labels.as_ref()) {
            self.set(&before, &GpuReading::default());
        }
        if let Some((labels, reading)) = labels.zip(reading) {
            self.set(&labels, reading);
            shown.insert(rank, labels);
        }
    }

    fn set(&self, labels: &Labels, reading: &GpuReading) {
        let bytes = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64);
        let values = [
            (&self.used, bytes(reading.memory_used_bytes)),
            (&self.total, bytes(reading.memory_total_bytes)),
            (&self.utilization, reading.utilization_ratio),
            (&self.power, reading.power_watts),
        ];
        for (gauges, value) in values {
            match value {
                Some(value) => {
                    gauges.get_or_create(labels).set(value);
                }
                None => {
                    gauges.remove(labels);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_nvml_values_are_not_shown_and_a_rank_has_one_gpu() {
        let mut registry = Registry::with_prefix("dyad");
        let gpus = GpuMetrics::new(&mut registry);
        let shown = || {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
            let lines = text.lines().filter(|line| !line.starts_with('#'));
            lines.map(str::to_owned).collect::<std::collections::BTreeSet<_>>()
        };
        let reading = |gpu: &str| GpuReading {
            gpu: gpu.into(),
            memory_used_bytes: Some(1 << 30),
            power_watts: Some(412.5),
            ..GpuReading::default()
        };
        gpus.show(1, Some(&reading("GPU-a")));
        let lines = |gpu: &str| {
            [
                format!("dyad_gpu_memory_used_bytes{{rank=\"1\",gpu=\"{gpu}\"}} 1073741824.0"),
                format!("dyad_gpu_power_watts{{rank=\"1\",gpu=\"{gpu}\"}} 412.5"),
            ]
        };
        assert_eq!(shown(), lines("GPU-a").into());
        for index in 0..1000 {
            gpus.show(1, Some(&reading(&format!("{index}{}", "x".repeat(1000)))));
        }
        assert_eq!(shown().len(), 2);
        gpus.show(1, Some(&reading("GPU-b")));
        assert_eq!(shown(), lines("GPU-b").into());
        gpus.show(1, Some(&GpuReading { gpu: "GPU-b".into(), ..GpuReading::default() }));
        assert!(shown().is_empty(), "{:?}", shown());
        gpus.show(1, Some(&reading("GPU-b")));
        gpus.show(1, None);
        assert!(shown().is_empty(), "{:?}", shown());
    }
}
