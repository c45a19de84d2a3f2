//! Device and precision of the passes.

use std::ffi::{c_int, c_void};

use dyad_proto::run_config::Dtype;
use dyad_proto::{Fault, agrees, counted};
use tch::{Cuda, Device, Kind};

use crate::error::{TorchError, check};
use crate::ffi::{dyad_cuda_current_stream, dyad_cuda_free_bytes, dyad_cuda_peak_bytes};

/// Turns `cpu` or `cuda:N` into a usable device. For CUDA it loads libtorch's CUDA back end; call it before anything is computed,
/// because libtorch looks for that back end only once.
pub fn open(name: &str) -> Result<Device, Fault> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let index =
        name.strip_prefix("cuda:").and_then(|index| index.parse::<usize>().ok()).ok_or_else(|| {
            Fault::input(format!("unknown device \"{name}\""))
                .hint("expected cpu or cuda:N, for example cuda:0")
        })?;
    load_cuda_back_end()?;
    let count = Cuda::device_count().max(0) as usize;
    if index >= count {
        let (devices, are) = (counted(count, "CUDA device"), agrees(count, "is", "are"));
        return Err(Fault::input(format!("device {name} does not exist: {devices} {are} visible"))
            .hint("check nvidia-smi and CUDA_VISIBLE_DEVICES"));
    }
    crate::gpu::prepare(index);
    Ok(Device::Cuda(index))
}

/// Loads libtorch_cuda, which registers the CUDA back end. The binary is not linked to it, so that one binary runs with and
/// without CUDA.
#[expect(unsafe_code, reason = "dlopen")]
fn load_cuda_back_end() -> Result<(), Fault> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    // SAFETY: libtorch_cuda's initialisers only register kernels and touch none of this program's state.
    let library = unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) };
    match library {
        Ok(library) => {
            // Never unload it: its kernels stay registered until the process ends.
            std::mem::forget(library);
            Ok(())
        }
        Err(error) => Err(Fault::input(format!("cannot load libtorch's CUDA back end: {error}"))
            .hint("install it with deploy/install-libtorch.sh --cuda, or train on the CPU")),
    }
}

/// PCI address of a GPU in NVML's format: domain, bus, device and function.
#[expect(unsafe_code, reason = "foreign functions of the CUDA driver")]
pub fn pci_address(index: usize) -> Result<String, cudarc::driver::DriverError> {
    use cudarc::driver::result::{device, init};
    use cudarc::driver::sys::CUdevice_attribute as Attribute;
    init()?;
    let gpu = device::get(index as i32)?;
    // SAFETY: the driver has just returned this device.
    let ask = |attribute| unsafe { device::get_attribute(gpu, attribute) };
    let domain = ask(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?;
    let bus = ask(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?;
    let slot = ask(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?;
    Ok(format!("{domain:08X}:{bus:02X}:{slot:02X}.0"))
}

/// Waits until the device has finished all queued work.
pub fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

/// Precision of the passes. `auto` means bfloat16 on CUDA devices and on CPUs where a bfloat16 step is faster.
#[must_use]
pub fn compute_kind(dtype: Dtype, device: Device) -> Kind {
    match dtype {
        Dtype::Float32 => Kind::Float,
        Dtype::Bfloat16 => Kind::BFloat16,
        Dtype::Auto if device.is_cuda() || cpu_is_faster_in_bfloat16(&cpu_info()) => Kind::BFloat16,
        Dtype::Auto => Kind::Float,
    }
}

/// The configuration's name for a precision.
#[must_use]
pub fn precision(kind: Kind) -> &'static str {
    if kind == Kind::BFloat16 { "bfloat16" } else { "float32" }
}

fn cpu_info() -> String {
    dyad_proto::files::of_kernel("/proc/cpuinfo").unwrap_or_default()
}

/// Whether a training step is faster in bfloat16, by the text of `/proc/cpuinfo`. AMX multiplies tiles of bfloat16 many times faster
/// than float32. On AMD's cores (Zen 4 and later) `vdpbf16ps` (AVX512_BF16) does two bfloat16 products in the time of one float32
/// product: a step was 1.5 times as fast. Intel's cores start one `vdpbf16ps` but two float32 products per cycle, so conversions make
/// the step slower: 1.6 times on a Xeon.
fn cpu_is_faster_in_bfloat16(cpu_info: &str) -> bool {
    let field = |name: &str| {
        let mut fields = cpu_info.lines().filter_map(|line| line.split_once(':'));
        fields.find(|(key, _)| key.trim() == name).map_or("", |(_, value)| value.trim())
    };
    let has = |flag: &str| field("flags").split_whitespace().any(|found| found == flag);
    has("amx_bf16") || (has("avx512_bf16") && field("vendor_id") == "AuthenticAMD")
}

/// Free bytes of a CUDA device, with the bytes that libtorch has cached but does not use.
#[expect(unsafe_code, reason = "foreign functions of the bridge")]
pub fn cuda_free_bytes(device: usize) -> Result<u64, TorchError> {
    let mut bytes = 0;
    // SAFETY: writes one integer.
    unsafe { check(dyad_cuda_free_bytes(device as c_int, &raw mut bytes))? };
    Ok(bytes.max(0) as u64)
}

/// The driver's handle for libtorch's current stream on a CUDA device; null means the default stream.
#[expect(unsafe_code, reason = "foreign functions of the bridge")]
pub fn cuda_current_stream(device: usize) -> Result<*mut c_void, TorchError> {
    let mut stream = std::ptr::null_mut();
    // SAFETY: writes one pointer.
    unsafe { check(dyad_cuda_current_stream(device as c_int, &raw mut stream))? };
    Ok(stream)
}

/// Peak bytes that libtorch has allocated for tensors on a CUDA device.
#[expect(unsafe_code, reason = "foreign functions of the bridge")]
pub fn cuda_peak_bytes(device: usize) -> Result<u64, TorchError> {
    let mut bytes = 0;
    // SAFETY: writes one integer.
    unsafe { check(dyad_cuda_peak_bytes(device as c_int, &raw mut bytes))? };
    Ok(bytes.max(0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unavailable_devices_fail_with_a_hint() {
        assert!(open("tpu").unwrap_err().message.contains("unknown device"));
        // Without a GPU, or without the CUDA set, this fails before anything is computed.
        if std::fs::metadata("/dev/nvidia0").is_err() {
            assert!(!open("cuda:0").unwrap_err().hint.is_empty());
        }
    }

    #[test]
    fn explicit_dtypes_are_used_unchanged() {
        assert_eq!(compute_kind(Dtype::Float32, Device::Cpu), Kind::Float);
        assert_eq!(compute_kind(Dtype::Bfloat16, Device::Cpu), Kind::BFloat16);
    }

    #[test]
    fn auto_dtype_is_bfloat16_on_cpus_where_it_is_faster() {
        let cpu = |vendor: &str, flags: &str| {
            format!("processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu avx2 {flags}\n\n")
        };
        let faster = |vendor, flags| cpu_is_faster_in_bfloat16(&cpu(vendor, flags));
        assert!(faster("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile"));
        assert!(!faster("GenuineIntel", "avx512f avx512_bf16"));
        assert!(faster("AuthenticAMD", "avx512f avx512_bf16"));
        assert!(!faster("AuthenticAMD", "avx512f"));
        // Linux on Arm lists neither a vendor nor flags.
        assert!(!cpu_is_faster_in_bfloat16("processor\t: 0\nFeatures\t: fp asimd bf16\n"));
    }
}
