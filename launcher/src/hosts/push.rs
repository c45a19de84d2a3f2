//! `--push`: copies binaries and libtorch to a host, into folders of ~/.cache/dyad that are named by a hash of their content. A folder
//! that exists is not sent again, and it gets its name only when it is complete.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use dyad_proto::Fault;
use sha2::{Digest, Sha256};
use tokio::process::Command;

use crate::hosts::hostfile::Host;
use crate::hosts::transport::{Transport, quoted};
use crate::process::os::die_with_me;
use crate::process::programs::{add_file, libtorch_stamp, own_folder, short};

const PROGRAMS: [&str; 3] = ["launcher", "coordinator", "trainer"];

/// Copies everything that the host lacks; returns the folder of the binaries there.
pub async fn to(host: &Host, transport: &Transport) -> Result<PathBuf, Fault> {
    let parcel = tokio::task::spawn_blocking(Parcel::here).await;
    let parcel = parcel.unwrap_or_else(|error| Err(Fault::failed(error.to_string())))?;
    let there = run(host, transport, &parcel.look(), None).await?;
    let mut words = there.lines();
    let home = words.next().filter(|home| home.starts_with('/')).map(str::to_owned).ok_or_else(|| {
        Fault::failed(format!("host {host}: no home folder to copy into")).hint("is HOME set there?")
    })?;
    let has: Vec<&str> = words.collect();
    if !has.contains(&"libtorch") {
        run(host, transport, &parcel.take_libtorch(), Some(parcel.pack_libtorch())).await?;
    }
    if !has.contains(&"programs") {
        run(host, transport, &parcel.take_programs(), Some(parcel.pack_programs())).await?;
    }
    Ok(Path::new(&home).join(".cache/dyad").join(&parcel.programs).join("target/release"))
}

/// Local folders to send, and names of the folders on the host.
#[derive(Clone, Debug)]
struct Parcel {
    folder: PathBuf,
    libtorch: PathBuf,
    /// Folder names on the host.
    programs: String,
    libraries: String,
}

impl Parcel {
    fn here() -> Result<Self, Fault> {
        let folder = own_folder()?;
        let mut hash = Sha256::new();
        for name in PROGRAMS {
            add_file(&mut hash, &folder.join(name))?;
        }
        // The trainer's run path (rpath) points there.
        let libtorch = folder.join("../../.libtorch");
        let libtorch = libtorch.canonicalize().map_err(|error| {
            Fault::input(format!("--push: no libtorch in {}: {error}", libtorch.display()))
                .hint("push from a checkout that was built with `make build`")
        })?;
        let (_, stamp) = libtorch_stamp(&libtorch).ok_or_else(|| {
            Fault::input(format!("--push: {} is not complete", libtorch.display()))
                .hint("run deploy/install-libtorch.sh")
        })?;
        let libraries = format!("libtorch-{}", short(&Sha256::digest(stamp)));
        hash.update(&libraries);
        Ok(Self { folder, libtorch, programs: short(&hash.finalize()), libraries })
    }

    /// Shell command that prints the home folder, then which of the two folders exist.
    fn look(&self) -> String {
        let Self { programs, libraries, .. } = self;
        format!(
            "echo \"$HOME\"; cd \"$HOME/.cache/dyad\" 2>/dev/null || exit 0; \
             test -d {libraries} && echo libtorch; test -d {programs} && echo programs; exit 0"
        )
    }

    fn take_libtorch(&self) -> String {
        take(&self.libraries, "")
    }

    /// The link is two folders above the binaries, where the trainer's run path (rpath) points.
    fn take_programs(&self) -> String {
        take(&self.programs, &format!("ln -s ../{} $new/.libtorch; ", self.libraries))
    }

    fn pack_libtorch(&self) -> Vec<String> {
        let dir = self.libtorch.display().to_string();
        let words =
            ["tar", "-C", &dir, "--exclude=include", "--exclude=share", "-cf", "-", "torch", "nvidia"];
        words.map(str::to_owned).to_vec()
    }

    fn pack_programs(&self) -> Vec<String> {
        let dir = self.folder.display().to_string();
        let words = ["tar", "-C", &dir, "--transform=s,^,target/release/,", "-chf", "-"];
        words.into_iter().chain(PROGRAMS).map(str::to_owned).collect()
    }
}

/// Shell command for the host: unpacks standard input into a temporary folder, runs `then`, renames the folder to `name`.
fn take(name: &str, then: &str) -> String {
    let script = format!(
        "set -e; mkdir -p \"$HOME/.cache/dyad\"; cd \"$HOME/.cache/dyad\"; new=.{name}.$$; \
         trap 'rm -rf $new' EXIT; mkdir $new; tar -xf - -C $new; {then}\
         mv -T $new {name} 2>/dev/null || test -d {name}"
    );
    format!("sh -c {}", quoted(&script))
}

/// Runs a shell command on the host, with the output of local command `input` as its input. Returns what it printed.
async fn run(
    host: &Host,
    transport: &Transport,
    line: &str,
    input: Option<Vec<String>>,
) -> Result<String, Fault> {
    let failed = |what: String| {
        Fault::unavailable(format!("host {host}: cannot copy Dyad there: {what}"))
            .hint("`launcher doctor` looks at all hosts; is there room in ~/.cache?")
    };
    let words = transport.command(host, line);
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    die_with_me(&mut command);
    let mut packing = None;
    if let Some(pack) = input {
        let mut tar = Command::new(&pack[0]);
        tar.args(&pack[1..]).stdin(Stdio::null()).stdout(Stdio::piped());
        die_with_me(&mut tar);
        let mut tar = tar.spawn().map_err(|error| failed(format!("cannot start tar: {error}")))?;
        let pipe = tar.stdout.take().and_then(|pipe| TryInto::<Stdio>::try_into(pipe).ok());
        command.stdin(pipe.ok_or_else(|| failed("tar has no output".into()))?);
        packing = Some(tar);
    }
    let child = command.spawn().map_err(|error| failed(format!("cannot start {}: {error}", words[0])))?;
    // Close this process's end of the pipe, so that tar gets SIGPIPE if ssh ends early.
    drop(command);
    let output = child.wait_with_output().await.map_err(|error| failed(error.to_string()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(failed(said.lines().next_back().unwrap_or("no reason given").to_owned()));
    }
    if let Some(mut tar) = packing
        && !tar.wait().await.is_ok_and(|status| status.success())
    {
        return Err(failed("tar failed".into()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
