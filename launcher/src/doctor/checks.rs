//! Turns the facts of all machines into rows: one per check, with a hint if it fails. Pure.

use std::collections::BTreeMap;

use super::row::{CheckState, DoctorRow};
use crate::agent::facts::MachineFacts;

/// An examined machine.
#[derive(Clone, Debug)]
pub struct Looked {
    /// Host name.
    pub name: String,
    /// Facts that its agent found.
    pub facts: MachineFacts,
    /// Seconds that its clock is ahead of this machine's, and the uncertainty of that.
    pub skew: (f64, f64),
}

/// All checks, of each machine alone and of the machines against each other. The coordinator and rank 0 would run on the first.
#[must_use]
pub fn rows(hosts: &[Looked]) -> Vec<DoctorRow> {
    let mut rows = vec![clocks(hosts), programs(hosts), libtorch(hosts)];
    rows.extend(gpus(hosts));
    rows.push(shared_memory(hosts));
    rows.extend(files(hosts));
    rows
}

type Found = (CheckState, String);

/// Runs a check on every host. Hosts with equal details are grouped; the row has the worst state.
fn gather(
    check: &'static str,
    hint: &'static str,
    hosts: &[Looked],
    look: impl Fn(&Looked) -> Found,
) -> DoctorRow {
    let mut groups: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    let mut worst = CheckState::Ok;
    for host in hosts {
        let (state, detail) = look(host);
        worst = if state as u8 > worst as u8 { state } else { worst };
        groups.entry(detail).or_default().push(&host.name);
    }
    let detail = match groups.len() {
        1 => groups.into_keys().next().unwrap_or_default(),
        _ => groups
            .iter()
            .map(|(detail, names)| format!("{}: {detail}", names.join(",")))
            .collect::<Vec<_>>()
            .join("; "),
    };
    DoctorRow { check, state: worst, detail, hint: if worst == CheckState::Ok { "" } else { hint }.into() }
}

/// Like [`gather`], but also fails if the hosts differ or a host has nothing.
fn equal(
    check: &'static str,
    hint: &'static str,
    hosts: &[Looked],
    look: impl Fn(&Looked) -> Option<String>,
) -> DoctorRow {
    let missing = || "missing".to_owned();
    let mut row = gather(check, hint, hosts, |host| {
        look(host).map_or_else(|| (CheckState::Fail, missing()), |found| (CheckState::Ok, found))
    });
    if hosts.iter().any(|host| look(host) != look(&hosts[0])) {
        (row.state, row.hint) = (CheckState::Fail, hint.into());
    }
    row
}

fn clocks(hosts: &[Looked]) -> DoctorRow {
    gather("clocks", "start a time service (chrony, systemd-timesyncd) on every host", hosts, |host| {
        let (ahead, doubt) = host.skew;
        let off = (ahead.abs() - doubt).max(0.0);
        let state = match off {
            // Certificate validity and trace timestamps are off by the same amount.
            off if off > 60.0 => CheckState::Fail,
            off if off > 2.0 => CheckState::Warn,
            _ => return (CheckState::Ok, "within 2 s".into()),
        };
        let direction = if ahead > 0.0 { "ahead" } else { "behind" };
        (state, format!("{off:.0} s {direction}"))
    })
}

fn programs(hosts: &[Looked]) -> DoctorRow {
    let hint = "install one build everywhere under one path, or copy this one with --push";
    equal("programs", hint, hosts, |host| {
        let hashes: Option<Vec<String>> = host.facts.programs.iter().map(|(_, hash)| hash.clone()).collect();
        hashes.map(|hashes| format!("{} {}", host.facts.hello.version, hashes.join(" ")))
    })
}

fn libtorch(hosts: &[Looked]) -> DoctorRow {
    let hint = "install one libtorch everywhere: `make build`, with GPUs `make cuda`, or copy it with --push";
    let row = equal("libtorch", hint, hosts, |host| host.facts.libtorch.clone());
    let broken: Vec<String> = hosts
        .iter()
        .filter_map(|host| {
            Some(format!(
                "{}: the trainer does not start: {}",
                host.name,
                host.facts.trainer_starts.as_ref().err()?
            ))
        })
        .collect();
    if broken.is_empty() {
        // Every trainer starts, so each has found a libtorch outside of the known folder.
        let nobody_knows = hosts.iter().all(|host| host.facts.libtorch.is_none());
        return if nobody_knows { DoctorRow::ok("libtorch", "the trainer finds it".into()) } else { row };
    }
    DoctorRow { state: CheckState::Fail, detail: broken.join("; "), hint: hint.into(), ..row }
}

/// Bytes in use up to which a GPU counts as free.
const IDLE: u64 = 512 << 20;

fn gpus(hosts: &[Looked]) -> Vec<DoctorRow> {
    if hosts.iter().all(|host| host.facts.hello.gpus == 0) {
        return vec![DoctorRow::ok("GPUs", "none: trainers compute on CPUs".into())];
    }
    let visible = gather("GPUs", "give every host of a run GPUs, or none", hosts, |host| {
        let hello = &host.facts.hello;
        match (hello.gpus, host.facts.gpus.first()) {
            (0, _) => (CheckState::Fail, "none".into()),
            (count, Some(gpu)) => (CheckState::Ok, format!("{count} {}", gpu.name)),
            (count, None) => (CheckState::Warn, format!("{count}, but nvidia-smi does not answer")),
        }
    });
    let free = gather("GPU memory", "end what runs there: nvidia-smi names the processes", hosts, |host| {
        let used: Vec<String> = host
            .facts
            .gpus
            .iter()
            .filter(|gpu| gpu.used > IDLE)
            .map(|gpu| format!("GPU {} has {} MiB in use", gpu.index, gpu.used >> 20))
            .collect();
        if used.is_empty() { (CheckState::Ok, "free".into()) } else { (CheckState::Warn, used.join(", ")) }
    });
    let driver =
        equal("driver", "install one driver version on all hosts", hosts, |host| host.facts.driver.clone());
    vec![visible, free, driver]
}

/// Bytes of /dev/shm that NCCL needs for the GPUs of a node, with a margin.
const SHARED_MEMORY: u64 = 1 << 30;

fn shared_memory(hosts: &[Looked]) -> DoctorRow {
    let hint = "in a container give --shm-size=8g or an emptyDir of medium Memory; NCCL needs it between GPUs of a host";
    gather("/dev/shm", hint, hosts, |host| match host.facts.shared_memory {
        None => (CheckState::Warn, "missing".into()),
        Some((all, _)) if all < SHARED_MEMORY => {
            let state = if host.facts.hello.gpus > 1 { CheckState::Fail } else { CheckState::Ok };
            (state, format!("{} MiB", all >> 20))
        }
        Some((all, _)) => (CheckState::Ok, format!("{} GiB", all >> 30)),
    })
}

/// Free bytes below which the check fails: a checkpoint of a small model, with a margin.
const DISK: u64 = 1 << 30;
/// Free bytes below which the check warns.
const ROOMY: u64 = 20 << 30;

fn files(hosts: &[Looked]) -> Vec<DoctorRow> {
    let mut rows = Vec::new();
    // Only the coordinator and rank 0 use these files, both on the first host.
    let first = &hosts[..hosts.len().min(1)];
    if first.iter().any(|host| host.facts.output.is_some()) {
        rows.push(gather(
            "output_dir",
            "choose a folder on a disk with room that you may write to",
            first,
            |host| match &host.facts.output {
                Some((_, Some(error))) => (CheckState::Fail, format!("cannot be written: {error}")),
                Some((free, None)) => {
                    let state = if *free < DISK {
                        CheckState::Fail
                    } else if *free < ROOMY {
                        CheckState::Warn
                    } else {
                        CheckState::Ok
                    };
                    (state, format!("{} GiB free", free >> 30))
                }
                None => (CheckState::Ok, String::new()),
            },
        ));
        rows.push(model(hosts));
        let hint = "the coordinator's host reads the pairs: the first, unless --coordinator-on here";
        rows.push(gather("pairs", hint, first, |host| match &host.facts.pairs {
            Some(Ok(path)) => (CheckState::Ok, path.clone()),
            Some(Err(why)) => (CheckState::Fail, why.clone()),
            None => (CheckState::Ok, String::new()),
        }));
    }
    rows
}

/// If only some hosts fail to load the model, they lack a copy. If all fail, the model itself is wrong: show the trainer's hint.
fn model(hosts: &[Looked]) -> DoctorRow {
    let copy = "every host reads the model from the same path: copy it there, or use a shared file system";
    let row = gather("model", copy, hosts, |host| match &host.facts.model {
        Some(Ok(found)) => (CheckState::Ok, found.clone()),
        Some(Err(wrong)) => (CheckState::Fail, wrong.message.clone()),
        None => (CheckState::Ok, String::new()),
    });
    let wrong: Vec<_> = hosts.iter().filter_map(|host| host.facts.model.as_ref()?.as_ref().err()).collect();
    match wrong.first() {
        Some(first) if wrong.len() == hosts.len() => DoctorRow { hint: first.hint.clone().into(), ..row },
        _ => row,
    }
}

#[cfg(test)]
mod tests {
    use dyad_proto::ErrorCode;

    use super::super::row::table;
    use super::*;
    use crate::agent::facts::Unusable;
    use crate::agent::machine::{Gpu, Hello};

    fn host(name: &str, gpus: u32) -> Looked {
        let gpu = |index: u32| Gpu {
            index: index.to_string(),
            name: "H100".into(),
            total: 80 << 30,
            used: 4 << 20,
        };
        let facts = MachineFacts {
            hello: Hello { version: "1.0.0".into(), gpus, ..Hello::default() },
            programs: vec![("launcher".into(), Some("aa".into())), ("trainer".into(), Some("bb".into()))],
            libtorch: Some("cuda 1234".into()),
            trainer_starts: Ok(()),
            driver: (gpus > 0).then(|| "570.1".into()),
            gpus: (0..gpus).map(gpu).collect(),
            shared_memory: Some((8 << 30, 8 << 30)),
            output: Some((500 << 30, None)),
            model: Some(Ok("/m".into())),
            pairs: Some(Ok("/p".into())),
        };
        Looked { name: name.into(), facts, skew: (0.1, 0.2) }
    }

    fn unusable(message: &str) -> Unusable {
        Unusable { message: message.into(), hint: "take another model".into() }
    }

    fn failing(hosts: &[Looked]) -> Vec<String> {
        let bad = rows(hosts).into_iter().filter(|row| row.state != CheckState::Ok);
        bad.map(|row| {
            assert!(!row.hint.is_empty(), "{row:?}");
            format!("{} {:?}: {}", row.check, row.state, row.detail)
        })
        .collect()
    }

    #[test]
    fn equal_machines_share_one_row_per_check() {
        let hosts = [host("a", 2), host("b", 2)];
        assert_eq!(failing(&hosts), [] as [String; 0]);
        let (text, code) = table(&rows(&hosts));
        assert_eq!(code, None);
        assert!(
            text.contains("driver      ok    570.1\n") && text.contains("GPUs        ok    2 H100\n"),
            "{text}"
        );
        assert_eq!(failing(&[host("a", 0)]), [] as [String; 0]);
    }

    #[test]
    fn every_difference_names_its_host() {
        let mut hosts = [host("a", 2), host("b", 2), host("c", 2)];
        hosts[1].facts.programs[1].1 = None;
        hosts[1].facts.libtorch = Some("cpu 99".into());
        hosts[1].facts.driver = Some("560.2".into());
        hosts[1].facts.gpus[1].used = 20 << 30;
        hosts[1].facts.shared_memory = Some((64 << 20, 0));
        hosts[1].facts.model = Some(Err(unusable("/m holds no config.json that can be read")));
        hosts[1].skew = (-5.5, 0.5);
        hosts[0].facts.output = Some((3 << 30, None));
        hosts[0].facts.pairs = Some(Err("/p: gone".into()));
        // Only the first host reads the pairs.
        hosts[2].facts.pairs = Some(Err("/p: gone".into()));
        assert_eq!(
            failing(&hosts),
            [
                "clocks Warn: b: 5 s behind; a,c: within 2 s",
                "programs Fail: a,c: 1.0.0 aa bb; b: missing",
                "libtorch Fail: b: cpu 99; a,c: cuda 1234",
                "GPU memory Warn: b: GPU 1 has 20480 MiB in use; a,c: free",
                "driver Fail: b: 560.2; a,c: 570.1",
                "/dev/shm Fail: b: 64 MiB; a,c: 8 GiB",
                "output_dir Warn: 3 GiB free",
                "model Fail: a,c: /m; b: /m holds no config.json that can be read",
                "pairs Fail: /p: gone"
            ]
        );
        assert_eq!(table(&rows(&hosts)).1, Some(ErrorCode::InvalidInput));
    }

    #[test]
    fn model_row_hints_to_copy_unless_every_host_fails() {
        let mut hosts = [host("a", 0), host("b", 0)];
        hosts[0].facts.model = Some(Err(unusable("model_type gemma is unknown")));
        assert!(model(&hosts).hint.contains("copy it there"));
        hosts[1].facts.model = hosts[0].facts.model.clone();
        let row = model(&hosts);
        assert_eq!(
            (row.hint.as_ref(), row.detail.as_str()),
            ("take another model", "model_type gemma is unknown")
        );
        assert_eq!(model(&hosts[..1]).hint, "take another model");
    }

    #[test]
    fn a_trainer_that_does_not_start_says_why() {
        let mut hosts = [host("a", 0)];
        hosts[0].facts.trainer_starts = Err("libtorch_cpu.so: cannot open".into());
        assert_eq!(
            failing(&hosts),
            ["libtorch Fail: a: the trainer does not start: libtorch_cpu.so: cannot open"]
        );
    }
}
