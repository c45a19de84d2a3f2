//! Paths and builds of Dyad's programs and of libtorch.

use std::io::Read;
use std::path::{Path, PathBuf};

use dyad_proto::{Fault, called};
use sha2::{Digest, Sha256};

/// Folder of the running program.
pub fn own_folder() -> Result<PathBuf, Fault> {
    let own = std::env::current_exe()
        .map_err(|error| Fault::failed(format!("cannot find this program's path: {error}")))?;
    Ok(own.parent().unwrap_or(Path::new("/")).to_owned())
}

/// Path of a Dyad program: in `DYAD_BIN_DIR`, or without that variable in this program's folder. Fails if it is missing.
pub fn program(name: &str) -> Result<PathBuf, Fault> {
    let dir = std::env::var_os("DYAD_BIN_DIR").map_or_else(own_folder, |dir| Ok(dir.into()))?;
    let path = dir.join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(Fault::failed(format!("no program {}", path.display())).hint(missing_hint()))
}

/// Hint for a missing or unusable program; depends on how Dyad was installed.
pub fn missing_hint() -> &'static str {
    if std::env::var_os("DYAD_BIN_DIR").is_some() {
        return "DYAD_BIN_DIR names the folder that holds launcher, coordinator and trainer of one build";
    }
    if called::by_pip() {
        return "install it anew: pip install --force-reinstall --no-deps dyad";
    }
    match own_folder() {
        Ok(folder) if is_checkout(&folder) => "run `make build` first",
        _ => "put launcher, coordinator and trainer of one build into one folder",
    }
}

/// Whether `make build` builds into this folder.
fn is_checkout(folder: &Path) -> bool {
    let root = folder.join("../..");
    folder.ends_with("target/release") && root.join("Makefile").is_file() && root.join("Cargo.toml").is_file()
}

/// Adds a file's bytes to a hash.
pub fn add_file(hash: &mut Sha256, path: &Path) -> Result<(), Fault> {
    let failed = |error: std::io::Error| {
        Fault::failed(format!("cannot read {}: {error}", path.display())).hint(missing_hint())
    };
    let mut file = dyad_proto::files::open(path).map_err(failed)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(()),
            read => hash.update(&buffer[..read]),
        }
    }
}

/// The first twelve hex digits of a hash.
#[must_use]
pub fn short(digest: &[u8]) -> String {
    digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

/// Variant of libtorch in a folder (`cuda` or `cpu`) and the stamp that its installation wrote; `None` without a stamp.
#[must_use]
pub fn libtorch_stamp(folder: &Path) -> Option<(&'static str, String)> {
    let stamp =
        |set| Some((set, dyad_proto::files::read_to_string(&folder.join(format!(".installed-{set}"))).ok()?));
    ["cuda", "cpu"].into_iter().find_map(stamp)
}

/// Shortened SHA-256 of a program in `folder`; `None` if it cannot be read.
#[must_use]
pub fn program_hash(folder: &Path, name: &str) -> Option<String> {
    let mut hash = Sha256::new();
    add_file(&mut hash, &folder.join(name)).ok()?;
    Some(short(&hash.finalize()))
}
