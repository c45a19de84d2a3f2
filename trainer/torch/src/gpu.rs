//! Loads the bridge's kernels for NVIDIA GPUs (`cpp/gpu/kernels.cu`): operators between matrix products. NVRTC compiles them when a
//! GPU is opened. Without them libtorch's operators do the same work with more passes over memory.
#![expect(unsafe_code, reason = "foreign functions of the CUDA driver and of the bridge")]

use std::ffi::{CString, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once, PoisonError};

use cudarc::driver::result::{ctx, device, module, primary_ctx};
use cudarc::nvrtc::{CompileOptions, Ptx, compile_ptx_with_opts};
use dyad_proto::Fault;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::ffi::{dyad_gpu_kernels, dyad_gpu_kernels_ready};

const SOURCE: &str = include_str!("../cpp/gpu/kernels.cu");
/// In the order of `Kernel` in `cpp/gpu/gpu.cpp`.
const NAMES: [&str; 5] = ["gpu_swiglu", "gpu_swiglu_backward", "gpu_rotate", "gpu_head", "gpu_fold"];
/// The first GPU generation with bfloat16; the driver compiles this code for later generations.
const GENERATION: (&str, (i32, i32)) = ("compute_80", (8, 0));
/// Loads the kernels on a GPU, once per process; logs a warning if that fails.
pub fn prepare(index: usize) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let loaded = crate::panics::caught(|| load(index).map_err(dyad_proto::Fault::failed));
        if let Err(fault) = loaded {
            tracing::warn!("training runs slower: cannot load Dyad's kernels on this GPU: {}", fault.message);
        }
    });
}

/// Compiles the kernels to PTX. Needs NVRTC, but no GPU.
pub fn compile() -> Result<Ptx, String> {
    load_nvrtc()?;
    let options = CompileOptions { arch: Some(GENERATION.0), ..CompileOptions::default() };
    compile_ptx_with_opts(SOURCE, options).map_err(|error| format!("NVRTC: {error}"))
}

/// Loads NVRTC and its builtins library. libtorch's stub is linked to NVRTC and finds it in the wheels; once loaded,
/// cudarc finds it by name. NVRTC loads its builtins library by name only, so load it here from NVRTC's folder.
fn load_nvrtc() -> Result<(), String> {
    let stub = open(Path::new("libcaffe2_nvrtc.so"));
    stub.or_else(|error| open(Path::new("libnvrtc.so.13")).map_err(|other| format!("{error}; {other}")))?;
    for companion in beside_nvrtc() {
        open(&companion)?;
    }
    Ok(())
}

/// Loads a library and never unloads it.
fn open(library: &Path) -> Result<(), String> {
    // SAFETY: NVRTC's initialisers touch none of this program's state.
    let opened = unsafe { Library::open(Some(library), RTLD_NOW | RTLD_GLOBAL) };
    opened.map(std::mem::forget).map_err(|error| error.to_string())
}

/// Paths of the `libnvrtc-builtins` libraries in the folder of the loaded NVRTC.
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
    // SAFETY: the primary context is the one that libtorch uses and is never released; the image ends in NUL; the module is never
    // unloaded, so its functions stay valid until the process ends.
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

/// Whether the kernels are loaded.
pub(crate) fn kernels_are_loaded() -> bool {
    // SAFETY: reads a pointer that is set once, before anything is computed.
    unsafe { dyad_gpu_kernels_ready() }
}

/// Compute capability of a GPU, e.g. (9, 0). The driver is asked once per GPU.
pub fn capability(index: usize) -> Result<(i32, i32), Fault> {
    static KNOWN: Mutex<Vec<(usize, (i32, i32))>> = Mutex::new(Vec::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(&(_, capability)) = known.iter().find(|(known, _)| *known == index) {
        return Ok(capability);
    }
    let capability = ask_capability(index).map_err(|error| {
        Fault::failed(format!("cannot read the compute capability of cuda:{index}: {error}"))
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
    // SAFETY: the driver has just returned this device.
    let ask = |attribute| unsafe { device::get_attribute(gpu, attribute) };
    Ok((
        ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}
