//! What this trainer's GPU is at, as NVML tells it: for heartbeats to carry.
//!
//! A thread of its own asks. The driver may take its time, or hang, and neither a step nor a heartbeat waits for it. NVML belongs to the
//! driver and is loaded when a GPU is used; where it is missing, or does not know the GPU, there are no readings, and that is no failure.

use std::convert::Infallible;
use std::ffi::OsStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use dyad_proto::wire::GpuReading;
use nvml_wrapper::{Device, Nvml};

use dyad_torch::device::pci_address;

/// By this name the driver installs it; the name without a number comes with a kit for developers.
const LIBRARY: &str = "libnvidia-ml.so.1";
/// Between two readings.
const PAUSE: Duration = Duration::from_secs(2);
/// A reading that is older says nothing of now.
const STALE: Duration = Duration::from_secs(15);

static LAST: Mutex<Option<(Instant, GpuReading)>> = Mutex::new(None);

/// The newest reading, where there is one that is new.
#[must_use]
pub fn last() -> Option<GpuReading> {
    fresh(&LAST.lock().unwrap_or_else(PoisonError::into_inner))
}

fn fresh(last: &Option<(Instant, GpuReading)>) -> Option<GpuReading> {
    last.as_ref().filter(|(at, _)| at.elapsed() < STALE).map(|(_, reading)| reading.clone())
}

/// Reads `cuda:index` from now on, as long as the process lives.
pub fn watch(index: usize) {
    let reading = move || {
        let Err(reason) = read_on(index);
        tracing::info!("memory, utilisation and power of the GPU are not reported: {reason}");
    };
    if let Err(error) = std::thread::Builder::new().name("gpu-meter".into()).spawn(reading) {
        tracing::info!("memory, utilisation and power of the GPU are not reported: no thread: {error}");
    }
}

fn read_on(index: usize) -> Result<Infallible, String> {
    let nvml = Nvml::builder().lib_path(OsStr::new(LIBRARY)).init();
    let nvml = nvml.map_err(|error| format!("NVML: {error}"))?;
    // CUDA and NVML count GPUs in different orders, and CUDA_VISIBLE_DEVICES is CUDA's alone.
    let address = pci_address(index).map_err(|error| format!("the address of cuda:{index}: {error}"))?;
    let device = nvml.device_by_pci_bus_id(address.as_str());
    let device = device.map_err(|error| format!("NVML does not know {address}: {error}"))?;
    let name = device.uuid().unwrap_or(address);
    loop {
        let reading = read(&device, &name);
        *LAST.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), reading));
        std::thread::sleep(PAUSE);
    }
}

/// What one GPU does not tell, others do.
fn read(device: &Device<'_>, name: &str) -> GpuReading {
    let memory = device.memory_info().ok();
    GpuReading {
        gpu: name.to_owned(),
        memory_used_bytes: memory.as_ref().map(|memory| memory.used),
        memory_total_bytes: memory.as_ref().map(|memory| memory.total),
        utilization_ratio: device.utilization_rates().ok().map(|rates| f64::from(rates.gpu) / 100.0),
        // In milliwatts.
        power_watts: device.power_usage().ok().map(|power| f64::from(power) / 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_nvml_there_is_no_reading_and_the_reason_is_told() {
        // Where there is a GPU, reading goes on for ever.
        if std::fs::metadata("/dev/nvidia0").is_err() {
            let Err(reason) = read_on(0);
            assert!(reason.contains("NVML") || reason.contains("cuda:0"), "{reason}");
            assert_eq!(last(), None);
        }
    }

    #[test]
    fn a_reading_that_is_old_is_not_told() {
        let reading = GpuReading { gpu: "GPU-1".into(), ..GpuReading::default() };
        let kept = |at| fresh(&Some((at, reading.clone())));
        assert_eq!(kept(Instant::now()), Some(reading.clone()));
        assert_eq!(kept(Instant::now().checked_sub(STALE).unwrap()), None);
    }
}
