//! Builds the bridge in `ext/` against the pinned libtorch and tells the binary where to find it at run time.

use std::error::Error;
use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=ext");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let libtorch =
        PathBuf::from(std::env::var_os("LIBTORCH").ok_or("LIBTORCH is not set; run `make build`")?);
    let lib = libtorch.join("lib");
    if !lib.join("libtorch_cpu.so").exists() {
        return Err(format!("no libtorch in {}; run deploy/install-libtorch.sh", libtorch.display()).into());
    }
    compile_bridge(&libtorch.join("include"));
    compile_loops();
    for library in ["torch_cpu", "c10"] {
        println!("cargo:rustc-link-lib={library}");
    }
    println!("cargo:rustc-link-search=native={}", lib.display());
    // libtorch's own OpenMP, whose threads the kernels share: a second one would bring threads of its own.
    println!("cargo:rustc-link-arg={}", lib.join("libgomp.so.1").canonicalize()?.display());
    // The absolute path serves `cargo run` and the binary wherever it is called from; the relative one a moved checkout.
    let absolute = lib.canonicalize()?;
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../../.libtorch/torch/lib:{}", absolute.display());
    Ok(())
}

fn build() -> cc::Build {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .include("ext")
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
            .file("ext/rows_loops.cpp")
            .compile(&format!("dyad_{name}"));
    }
}

fn compile_bridge(include: &Path) {
    build()
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
        .flag(include.join("torch/csrc/api/include"))
        .files([
            "ext/adamw.cpp",
            "ext/autograd.cpp",
            "ext/device.cpp",
            "ext/device_ops.cpp",
            "ext/eight_bit.cpp",
            "ext/gloo.cpp",
            "ext/gpu.cpp",
            "ext/head.cpp",
            "ext/kernels.cpp",
            "ext/kernels_host.cpp",
            "ext/linears.cpp",
            "ext/pack.cpp",
            "ext/product.cpp",
            "ext/attention.cpp",
            "ext/profile.cpp",
            "ext/stand_in.cpp",
            "ext/rows.cpp",
            "ext/storage.cpp",
            "ext/varlen.cpp",
        ])
        .compile("dyad_ext");
}
