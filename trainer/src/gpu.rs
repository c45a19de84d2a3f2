//! Kernels for what surrounds matrix products on NVIDIA GPUs (`ext/kernels.cu`), compiled by NVRTC when a GPU is opened.
//! Without them libtorch's operators do the same in more passes over memory.
#![expect(unsafe_code, reason = "foreign functions of the CUDA driver and of the bridge")]

use std::ffi::{CString, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once, PoisonError};

use cudarc::driver::result::{ctx, device, module, primary_ctx};
use cudarc::nvrtc::{CompileOptions, Ptx, compile_ptx_with_opts};
use dyad_proto::Fault;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use crate::backend::{made, takes_gpu_path};
use crate::ext::RawError;

const SOURCE: &str = include_str!("../ext/kernels.cu");
/// In the order of `Kernel` in `ext/gpu.cpp`.
const NAMES: [&str; 5] = ["gpu_swiglu", "gpu_swiglu_backward", "gpu_rotate", "gpu_head", "gpu_fold"];
/// The first generation with bfloat16; the driver translates for later ones.
const GENERATION: (&str, (i32, i32)) = ("compute_80", (8, 0));
/// Values that a thread reads at once: last axes are multiples.
pub const VECTOR: i64 = 8;

unsafe extern "C" {
    fn dyad_gpu_kernels(launcher: *mut c_void, handles: *const *mut c_void);
    fn dyad_gpu_kernels_ready() -> bool;
    fn dyad_gpu_swiglu(gate: *const C_tensor, up: *const C_tensor, y: *mut *mut C_tensor) -> RawError;
    fn dyad_gpu_rotate(
        x: *const C_tensor,
        cosines: *const C_tensor,
        sines: *const C_tensor,
        y: *mut *mut C_tensor,
    ) -> RawError;
}

/// Makes the kernels ready for a GPU, once for the process; says so where they cannot be had.
pub fn prepare(index: usize) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let loaded = crate::panics::caught(|| load(index).map_err(dyad_proto::Fault::failed));
        if let Err(fault) = loaded {
            tracing::warn!("slower than need be: no kernels of our own on this GPU: {}", fault.message);
        }
    });
}

/// The kernels as the driver takes them. Needs NVRTC, and no GPU.
pub fn compile() -> Result<Ptx, String> {
    load_nvrtc()?;
    let options = CompileOptions { arch: Some(GENERATION.0), ..CompileOptions::default() };
    compile_ptx_with_opts(SOURCE, options).map_err(|error| format!("NVRTC: {error}"))
}

/// libtorch's stub pulls NVRTC in from wherever the wheels have put it; cudarc then finds it by its name. NVRTC in turn looks
/// for a companion by name alone, which the wheels have put beside it.
fn load_nvrtc() -> Result<(), String> {
    let stub = open(Path::new("libcaffe2_nvrtc.so"));
    stub.or_else(|error| open(Path::new("libnvrtc.so.13")).map_err(|other| format!("{error}; {other}")))?;
    for companion in beside_nvrtc() {
        open(&companion)?;
    }
    Ok(())
}

/// Loads a library for the life of the process.
fn open(library: &Path) -> Result<(), String> {
    // SAFETY: NVRTC's initialisers touch no state of ours.
    let opened = unsafe { Library::open(Some(library), RTLD_NOW | RTLD_GLOBAL) };
    opened.map(std::mem::forget).map_err(|error| error.to_string())
}

fn beside_nvrtc() -> Vec<PathBuf> {
    let maps = dyad_proto::files::of_kernel("/proc/self/maps").unwrap_or_default();
    let nvrtc = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .find(|path| path.contains("/libnvrtc.so"));
    let folder = nvrtc.and_then(|path| Path::new(path).parent());
    let files = folder.into_iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten();
    let builtins = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libnvrtc-builtins.so"))
    };
    files.map(|file| file.path()).filter(builtins).collect()
}

fn load(index: usize) -> Result<(), String> {
    let (major, minor) = capability(index).map_err(|fault| fault.message)?;
    if (major, minor) < GENERATION.1 {
        return Err(format!("compute capability {major}.{minor}"));
    }
    let image = CString::new(compile()?.to_src()).map_err(|error| error.to_string())?;
    let driver = |error: cudarc::driver::DriverError| format!("CUDA driver: {error}");
    let gpu = device::get(index as i32).map_err(driver)?;
    // SAFETY: the primary context is the one libtorch uses and is never released; the image ends in NUL; the module is never
    // unloaded, so that its functions are there for the life of the process.
    unsafe {
        primary_ctx::retain(gpu).and_then(|context| ctx::set_current(context)).map_err(driver)?;
        let module = module::load_data(image.as_ptr().cast()).map_err(driver)?;
        let mut handles = [std::ptr::null_mut(); NAMES.len()];
        for (handle, name) in handles.iter_mut().zip(NAMES) {
            let name = CString::new(name).map_err(|error| error.to_string())?;
            *handle = module::get_function(module, name).map_err(driver)?.cast();
        }
        let library = Library::new("libcuda.so.1").map_err(|error| error.to_string())?;
        let launcher = library.get::<*mut c_void>(b"cuLaunchKernel").map_err(|error| error.to_string())?;
        dyad_gpu_kernels(*launcher, handles.as_ptr());
        std::mem::forget(library);
    }
    Ok(())
}

/// Whether the kernels serve passes of this kind on the GPU that was opened.
#[must_use]
pub fn serves_kind(kind: Kind) -> bool {
    // SAFETY: reads a pointer that is set once, before anything is computed.
    kind == Kind::BFloat16 && unsafe { dyad_gpu_kernels_ready() }
}

/// Whether the kernels serve such tensors, whose last axis comes in runs of so many values.
#[must_use]
pub fn serves(tensors: &[&Tensor], run: i64) -> bool {
    let fits = |tensor: &&Tensor| {
        takes_gpu_path(tensor.device())
            && serves_kind(tensor.kind())
            && tensor.size().last().is_some_and(|width| width % run == 0)
    };
    tensors.iter().all(fits)
}

/// Whether the head's kernel serves logits of this projection, `[vocab, hidden]`.
#[must_use]
pub fn serves_logits_of(weight: &Tensor) -> bool {
    takes_gpu_path(weight.device()) && serves_kind(weight.kind()) && weight.size()[0] % VECTOR == 0
}

/// `silu(gate) * up`, where the kernels serve.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Option<Tensor> {
    if gate.size() != up.size() || !serves(&[gate, up], VECTOR) {
        return None;
    }
    // SAFETY: two live tensors of the same size that are served, and a place for the result.
    Some(made(|out| unsafe { dyad_gpu_swiglu(gate.as_ptr(), up.as_ptr(), out) }))
}

/// Rotates `[tokens, heads, width]` by angles with contiguous cosines and sines `[tokens, 1, width]`, where the kernels serve;
/// sines are negative in their first half.
pub fn rotate(x: &Tensor, cosines: &Tensor, sines: &Tensor) -> Option<Tensor> {
    let (size, angles) = (x.size(), cosines.size());
    let contiguous = cosines.is_contiguous() && sines.is_contiguous();
    if size[0] != angles[0]
        || size[2] != angles[2]
        || !contiguous
        || !serves(&[x, cosines, sines], 2 * VECTOR)
    {
        return None;
    }
    // SAFETY: three live tensors of matching sizes that are served, and a place for the result.
    Some(made(|out| unsafe { dyad_gpu_rotate(x.as_ptr(), cosines.as_ptr(), sines.as_ptr(), out) }))
}

/// Compute capability of a GPU, e.g. (9, 0); asked of the driver once.
pub fn capability(index: usize) -> Result<(i32, i32), Fault> {
    static KNOWN: Mutex<Vec<(usize, (i32, i32))>> = Mutex::new(Vec::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(&(_, capability)) = known.iter().find(|(known, _)| *known == index) {
        return Ok(capability);
    }
    let capability = ask_capability(index).map_err(|error| {
        Fault::failed(format!("cannot tell the generation of cuda:{index}: {error}"))
            .hint("check nvidia-smi and the driver")
    })?;
    known.push((index, capability));
    Ok(capability)
}

#[expect(unsafe_code, reason = "foreign functions of the CUDA driver")]
fn ask_capability(index: usize) -> Result<(i32, i32), cudarc::driver::DriverError> {
    use cudarc::driver::result::{device, init};
    use cudarc::driver::sys::CUdevice_attribute as Attribute;
    init()?;
    let gpu = device::get(index as i32)?;
    // SAFETY: the device is one that the driver has just named.
    let ask = |attribute| unsafe { device::get_attribute(gpu, attribute) };
    Ok((
        ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}
