//! Builds the bridge in `cpp/` against the pinned libtorch, and says where programs find libtorch at run time.
#![allow(clippy::print_stdout, reason = "this is how a build script speaks to cargo")]

mod header;

use std::error::Error;
use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    for changed in ["build", "cpp", "src/ffi.rs"] {
        println!("cargo:rerun-if-changed={changed}");
    }
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let libtorch =
        PathBuf::from(std::env::var_os("LIBTORCH").ok_or("LIBTORCH is not set; run `make build`")?);
    let lib = libtorch.join("lib");
    if !lib.join("libtorch_cpu.so").exists() {
        return Err(format!("no libtorch in {}; run deploy/install-libtorch.sh", libtorch.display()).into());
    }
    compile_bridge(&libtorch.join("include"))?;
    compile_loops();
    for library in ["torch_cpu", "c10"] {
        println!("cargo:rustc-link-lib={library}");
    }
    println!("cargo:rustc-link-search=native={}", lib.display());
    let link_args = [
        // libtorch's own OpenMP, whose threads the kernels share: a second one would bring threads of its own.
        lib.join("libgomp.so.1").canonicalize()?.display().to_string(),
        format!("-Wl,-rpath,{}", run_path(&lib.canonicalize()?)?),
    ];
    for argument in &link_args {
        println!("cargo:rustc-link-arg={argument}");
    }
    // Cargo hands arguments to the linker for this package alone: those that depend on it read them in their build scripts.
    println!("cargo:link_args={}", link_args.join(" "));
    Ok(())
}

/// Where the program looks for libtorch when it starts, from its own folder: no path of the machine that built it is left in it.
fn run_path(lib: &Path) -> Result<String, Box<dyn Error>> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?).canonicalize()?;
    // target/release/build/PACKAGE/out
    let programs = out.ancestors().nth(3).ok_or("OUT_DIR is not below a target folder")?;
    let wanted = [
        // The build itself, and its tests.
        relative(programs, lib),
        relative(&programs.join("deps"), lib),
        // The image, and what --push copies.
        PathBuf::from("../../.libtorch/torch/lib"),
        // The wheel, beside PyTorch's.
        PathBuf::from("../../torch/lib"),
    ];
    let mut places: Vec<String> = Vec::new();
    for place in wanted.map(|place| format!("$ORIGIN/{}", place.display())) {
        if !places.contains(&place) {
            places.push(place);
        }
    }
    Ok(places.join(":"))
}

/// The way from one folder to another.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let shared = from.components().zip(to.components()).take_while(|(from, to)| from == to).count();
    let up = from.components().skip(shared).map(|_| Path::new(".."));
    up.chain(to.components().skip(shared).map(|part| Path::new(part.as_os_str()))).collect()
}

fn build() -> cc::Build {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .includes(["cpp/comm", "cpp/cpu", "cpp/gpu", "cpp/torch"])
        // Lets loops with comparisons and square roots become vector code; no result changes by it.
        .flag_if_supported("-fno-trapping-math")
        .flag_if_supported("-fno-math-errno");
    build
}

/// Loops over rows, once for each set of instructions; which is taken is decided at run time.
fn compile_loops() {
    // Whole registers also where the compiler makes vector code by itself; for AVX-512 it would take halves.
    let v4 = [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx2",
        "-mfma",
        "-mprefer-vector-width=512",
    ];
    let sets: [(&str, &[&str]); 3] =
        [("loops_v4", &v4), ("loops_v3", &["-mavx2", "-mfma"]), ("loops_v2", &[])];
    for (name, flags) in sets {
        let mut build = build();
        for flag in flags {
            build.flag(flag);
        }
        build
            .flag("-fopenmp-simd")
            .define("DYAD_LOOPS", name)
            .file("cpp/cpu/rows_loops.cpp")
            .compile(&format!("dyad_{name}"));
    }
}

fn compile_bridge(include: &Path) -> Result<(), Box<dyn Error>> {
    let mut build = bridge(include);
    if let Some(prefix) = precompiled(&build)? {
        build.flag("-include").flag(prefix);
    }
    build.flag("-include").flag(declarations()?);
    build
        .files([
            "cpp/comm/gloo.cpp",
            "cpp/cpu/adamw.cpp",
            "cpp/cpu/attention.cpp",
            "cpp/cpu/eight_bit.cpp",
            "cpp/cpu/head.cpp",
            "cpp/cpu/kernels.cpp",
            "cpp/cpu/linears.cpp",
            "cpp/cpu/pack.cpp",
            "cpp/cpu/product.cpp",
            "cpp/cpu/rows.cpp",
            "cpp/gpu/device.cpp",
            "cpp/gpu/device_ops.cpp",
            "cpp/gpu/gpu.cpp",
            "cpp/gpu/varlen.cpp",
            "cpp/torch/autograd.cpp",
            "cpp/torch/profile.cpp",
            "cpp/torch/storage.cpp",
        ])
        .compile("dyad_bridge");
    Ok(())
}

/// Header of the functions that Rust declares: every definition is compared with it.
fn declarations() -> Result<PathBuf, Box<dyn Error>> {
    let header = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?).join("ffi.h");
    std::fs::write(&header, header::of(&std::fs::read_to_string("src/ffi.rs")?)?)?;
    Ok(header)
}

/// libtorch's headers, which most files begin with, read once for all of them. Compilers other than GCC read them in every file.
fn precompiled(build: &cc::Build) -> Result<Option<PathBuf>, Box<dyn Error>> {
    let compiler = build.try_get_compiler()?;
    if !compiler.is_like_gnu() {
        return Ok(None);
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    // GCC takes the precompiled file where it lies beside the header that is included.
    let header = out.join("precompiled.h");
    std::fs::copy("cpp/torch/precompiled.h", &header)?;
    let mut command = compiler.to_command();
    command.args(["-x", "c++-header"]).arg(&header).arg("-o").arg(out.join("precompiled.h.gch"));
    let status = command.status()?;
    if !status.success() {
        return Err(format!("precompiling cpp/torch/precompiled.h ended with {status}").into());
    }
    Ok(Some(header))
}

fn bridge(include: &Path) -> cc::Build {
    let mut build = build();
    build
        // Errors of libtorch name the header that they come from.
        .flag(format!("-ffile-prefix-map={}=libtorch", include.parent().unwrap_or(include).display()))
        .flag_if_supported("-Wno-unused-parameter")
        // Otherwise loops that clamp or choose (8-bit moments) get a path for each outcome, computed for all lanes.
        .flag_if_supported("-fno-thread-jumps")
        // Vector loops, and at::parallel_for: without OpenMP its loops run on one thread, without a word.
        .flag("-fopenmp")
        .define("USE_C10D_GLOO", None)
        // System headers: their warnings are not ours.
        .flag("-isystem")
        .flag(include)
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include"));
    build
}
