//! Builds the bridge in `cpp/` against the pinned libtorch, and sets the run path by which programs find libtorch.
#![allow(clippy::print_stdout, reason = "cargo reads the standard output of build scripts")]

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
        // libtorch's own OpenMP library, so that kernels share its threads: a second library would start more threads.
        lib.join("libgomp.so.1").canonicalize()?.display().to_string(),
        format!("-Wl,-rpath,{}", run_path(&lib.canonicalize()?)?),
    ];
    for argument in &link_args {
        println!("cargo:rustc-link-arg={argument}");
    }
    // Cargo applies link arguments to this package only: the build scripts of packages that depend on it read them from here.
    println!("cargo:link_args={}", link_args.join(" "));
    Ok(())
}

/// The run path by which a program finds libtorch, relative to the program: the binary contains no path of the build machine.
fn run_path(lib: &Path) -> Result<String, Box<dyn Error>> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?).canonicalize()?;
    // target/release/build/PACKAGE/out
    let programs = out.ancestors().nth(3).ok_or("OUT_DIR is not below a target folder")?;
    let wanted = [
        // Programs and tests in the build folder.
        relative(programs, lib),
        relative(&programs.join("deps"), lib),
        // The container image, and the folder that --push copies.
        PathBuf::from("../../.libtorch/torch/lib"),
        // The Python wheel, installed next to PyTorch's.
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

/// The relative path from one folder to another.
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
        // Lets the compiler vectorise loops with comparisons and square roots; results stay the same.
        .flag_if_supported("-fno-trapping-math")
        .flag_if_supported("-fno-math-errno");
    build
}

/// Compiles the loops over rows once for each instruction set; the program picks one at run time.
fn compile_loops() {
    // Use 512-bit registers in auto-vectorised code too; by default the compiler uses 256 bits for AVX-512.
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

/// Writes the header of the functions that Rust declares; the C++ compiler checks every definition against it.
fn declarations() -> Result<PathBuf, Box<dyn Error>> {
    let header = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?).join("ffi.h");
    std::fs::write(&header, header::of(&std::fs::read_to_string("src/ffi.rs")?)?)?;
    Ok(header)
}

/// Precompiles the libtorch headers that most files include. Returns `None` if the compiler is not GCC; then every file parses them.
fn precompiled(build: &cc::Build) -> Result<Option<PathBuf>, Box<dyn Error>> {
    let compiler = build.try_get_compiler()?;
    if !compiler.is_like_gnu() {
        return Ok(None);
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    // GCC uses the precompiled file if it is in the same folder as the included header.
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
        // libtorch's error messages contain header paths: keep the build machine's folder out of them.
        .flag(format!("-ffile-prefix-map={}=libtorch", include.parent().unwrap_or(include).display()))
        .flag_if_supported("-Wno-unused-parameter")
        // Without this flag, loops that clamp or select (8-bit moments) get one code path per outcome, each computed for all lanes.
        .flag_if_supported("-fno-thread-jumps")
        // For vector loops and at::parallel_for: without OpenMP its loops silently run on one thread.
        .flag("-fopenmp")
        .define("USE_C10D_GLOO", None)
        // As system headers, so that they give no warnings.
        .flag("-isystem")
        .flag(include)
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include"));
    build
}
