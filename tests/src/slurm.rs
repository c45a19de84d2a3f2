//! A Slurm cluster of two nodes on this machine: Debian's slurmctld and slurmd on free ports, with state and logs in a temporary folder.
//! Needs root.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::binary;
use crate::processes::{die_with_me, wait_for};

/// Running daemons; dropping this stops them.
#[derive(Debug)]
pub struct Slurm {
    dir: tempfile::TempDir,
    root: PathBuf,
    daemons: Vec<Child>,
}

impl Slurm {
    /// Starts the daemons. Returns once both nodes accept jobs.
    pub fn start() -> Self {
        let root = binary("launcher").parent().and_then(std::path::Path::parent).unwrap().join("slurm");
        assert!(
            root.is_dir(),
            "no Slurm in {}: run tests/install-tools.sh, as `make test` does",
            root.display()
        );
        let mut slurm = Self { dir: tempfile::tempdir().unwrap(), root, daemons: Vec::new() };
        slurm.configure();
        slurm.daemons.push(slurm.daemon("slurmctld-wlm", &[]));
        let stepd = slurm.root.join("usr/sbin/slurmstepd-wlm").display().to_string();
        for node in ["n1", "n2"] {
            slurm.daemons.push(slurm.daemon("slurmd-wlm", &["-N", node, "-d", &stepd]));
        }
        wait_for("two idle nodes", || {
            let output = slurm.command("sinfo").args(["--noheader", "--format=%D %t"]).output().unwrap();
            (String::from_utf8_lossy(&output.stdout).trim() == "2 idle").then_some(())
        });
        slurm
    }

    fn configure(&self) {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim().to_owned();
        // Hold all listeners until all ports are known, so that the ports differ.
        let ports: Vec<_> = (0..3).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let port = |index: usize| ports[index].local_addr().unwrap().port();
        let (dir, root) = (self.dir.path().display(), self.root.display());
        std::fs::create_dir(self.dir.path().join("state")).unwrap();
        let text = format!(
            "ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={}\nSlurmUser=root\nSlurmdUser=root\n\
             AuthType=auth/none\nCredType=cred/none\nProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\n\
             SelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nMpiDefault=none\nReturnToService=2\n\
             PluginDir={root}/usr/lib/x86_64-linux-gnu/slurm-wlm\nStateSaveLocation={dir}/state\n\
             SlurmdSpoolDir={dir}/spool-%n\nSlurmctldPidFile={dir}/slurmctld.pid\nSlurmdPidFile={dir}/slurmd-%n.pid\n\
             SlurmctldLogFile={dir}/slurmctld.log\nSlurmdLogFile={dir}/slurmd-%n.log\n\
             NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={} CPUs=1 State=UNKNOWN\n\
             NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={} CPUs=1 State=UNKNOWN\n\
             PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP\n",
            port(0),
            port(1),
            port(2)
        );
        std::fs::write(self.dir.path().join("slurm.conf"), text).unwrap();
    }

    fn daemon(&self, name: &str, args: &[&str]) -> Child {
        let mut command = self.prepared(Command::new(self.root.join("usr/sbin").join(name)));
        command.arg("-D").args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        die_with_me(&mut command);
        command.spawn().unwrap()
    }

    /// Returns the daemons' logs.
    pub fn logs(&self) -> String {
        let log = |name: &str| std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default();
        ["slurmctld.log", "slurmd-n1.log", "slurmd-n2.log"].map(log).join("\n")
    }

    /// Returns one of Slurm's commands, or any other command with Slurm's folder on PATH.
    pub fn command(&self, name: &str) -> Command {
        let own = self.root.join("usr/bin").join(name);
        self.prepared(Command::new(if own.is_file() { own } else { PathBuf::from(name) }))
    }

    fn prepared(&self, mut command: Command) -> Command {
        let libraries = self.root.join("usr/lib/x86_64-linux-gnu");
        let path = format!("{}:{}", self.root.join("usr/bin").display(), std::env::var("PATH").unwrap());
        command.env("SLURM_CONF", self.dir.path().join("slurm.conf")).env("PATH", path);
        command.env("LD_LIBRARY_PATH", format!("{0}:{0}/slurm-wlm", libraries.display()));
        command
    }

    /// Returns the state of a job, such as RUNNING or COMPLETED.
    pub fn state(&self, job: &str) -> String {
        let output = self
            .command("squeue")
            .args(["--noheader", "--states=all", "--format=%T", "--jobs", job])
            .output()
            .unwrap();
        // A busy controller does not answer.
        let known = output.status.success();
        if known { String::from_utf8_lossy(&output.stdout).trim().to_owned() } else { "UNKNOWN".to_owned() }
    }

    /// Returns a job's final state; `None` while it is queued again or its processes may still run.
    pub fn end(&self, job: &str) -> Option<String> {
        let state = self.state(job);
        ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"].contains(&state.as_str()).then_some(state)
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        let _ = self.command("scancel").args(["--full", "--signal=KILL", "--user=root"]).output();
        for daemon in &mut self.daemons {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}
