//! Builds the test kernels against the pinned libtorch.

use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    for changed in ["cpp", "../cpp"] {
        println!("cargo:rerun-if-changed={changed}");
    }
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let libtorch =
        PathBuf::from(std::env::var_os("LIBTORCH").ok_or("LIBTORCH is not set; run `make build`")?);
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .includes(["../cpp/gpu", "../cpp/torch"])
        .flag_if_supported("-Wno-unused-parameter")
        .flag("-isystem")
        .flag(libtorch.join("include"))
        .flag("-isystem")
        .flag(libtorch.join("include/torch/csrc/api/include"))
        .files(["cpp/fake_gpu.cpp", "cpp/cuda_kernels_on_host.cpp"])
        .compile("dyad_testing");
    Ok(())
}
