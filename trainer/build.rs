//! Tells the linker where the program finds libtorch: arguments that `torch/build/main.rs` has worked out.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    let arguments = std::env::var("DEP_DYAD_BRIDGE_LINK_ARGS")?;
    for argument in arguments.split(' ') {
        println!("cargo:rustc-link-arg={argument}");
    }
    Ok(())
}
