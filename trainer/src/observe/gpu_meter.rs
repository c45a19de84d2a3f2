//! Memory, utilisation and power of this trainer's GPU as NVML reports them, for heartbeats.
//!
//! A separate thread reads them, because the driver may be slow or hang, and neither a step nor a heartbeat may wait for it. NVML belongs
//! to the driver and is loaded when a GPU is used. If NVML is missing or does not know the GPU, there are no readings; that is not an
//! error.

use std::convert::Infallible;
use std::ffi::OsStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use dyad_proto::wire::GpuReading;
use nvml_wrapper::{Device, Nvml};

use dyad_torch::device::pci_address;

/// Name under which the driver installs NVML. The name without a number exists only with a development kit.
const LIBRARY: &str = "libnvidia-ml.so.1";
/// Pause between two readings.
const PAUSE: Duration = Duration::from_secs(2);
/// Age from which a reading is too old to report.
const STALE: Duration = Duration::from_secs(15);

static LAST: Mutex<Option<(Instant, GpuReading)>> = Mutex::new(None);

/// The newest reading, unless it is too old.
#[must_use]
pub fn last() -> Option<GpuReading> {
    fresh(&LAST.lock().unwrap_or_else(PoisonError::into_inner))
}

fn fresh(last: &Option<(Instant, GpuReading)>) -> Option<GpuReading> {
    last.as_ref().filter(|(at, _)| at.elapsed() < STALE).map(|(_, reading)| reading.clone())
}

/// Starts a thread that reads this GPU until the process ends. Does nothing for another device.
pub fn watch(device: tch::Device) {
    let tch::Device::Cuda(index) = device else { return };
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
    // CUDA and NVML count GPUs in different orders, and NVML ignores CUDA_VISIBLE_DEVICES.
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

/// Reads the GPU; values that it does not report are `None`.
fn read(device: &Device<'_>, name: &str) -> GpuReading {
    let memory = device.memory_info().ok();
    GpuReading {
        gpu: name.to_owned(),
        memory_used_bytes: memory.as_ref().map(|memory| memory.used),
        memory_total_bytes: memory.as_ref().map(|memory| memory.total),
        utilization_ratio: device.utilization_rates().ok().map(|rates| f64::from(rates.gpu) / 100.0),
        // NVML reports milliwatts.
        power_watts: device.power_usage().ok().map(|power| f64::from(power) / 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_nvml_there_is_no_reading_but_a_reason() {
        // With a GPU, `read_on` never returns.
        if std::fs::metadata("/dev/nvidia0").is_err() {
            let Err(reason) = read_on(0);
            assert!(reason.contains("NVML") || reason.contains("cuda:0"), "{reason}");
            assert_eq!(last(), None);
        }
    }

    #[test]
    fn stale_readings_are_not_reported() {
        let reading = GpuReading { gpu: "GPU-1".into(), ..GpuReading::default() };
        let kept = |at| fresh(&Some((at, reading.clone())));
        assert_eq!(kept(Instant::now()), Some(reading.clone()));
        assert_eq!(kept(Instant::now().checked_sub(STALE).unwrap()), None);
    }
}
