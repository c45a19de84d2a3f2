//! Decides whether every rank reads the model, or one rank reads it for all.

use std::path::Path;
use std::sync::Arc;

use dyad_proto::run_config::ModelLoading;
use dyad_proto::{Fault, RunConfig};
use tch::{Device, Kind, Tensor};

use crate::error::EngineError;
use crate::load::Sources;
use crate::model::weights::relay::Relay;
use crate::model::weights::{Digested, Reading, Weights};
use dyad_torch::comm::{CommError, Communicator};
use dyad_torch::transfer::values;

/// Network file systems, by their names in the kernel's mount table.
const REMOTE: [&str; 14] = [
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "ceph",
    "lustre",
    "beegfs",
    "gpfs",
    "glusterfs",
    "afs",
    "9p",
    "virtiofs",
    "wekafs",
    "orangefs",
];

/// Facts that a rank knows before it loads the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LoadingFacts {
    host: i64,
    /// The model is on a network file system.
    remote: bool,
    /// The model's weights are missing on this host.
    lacks: bool,
}

/// Decides how the ranks get the weights. All ranks get the same answer.
pub fn choose(
    config: &RunConfig,
    sources: &Sources,
    communicator: &Arc<dyn Communicator>,
    device: Device,
) -> Result<Reading, Fault> {
    if communicator.world_size() == 1 {
        return Ok(Reading { digest: Some(Digested::default()), ..Reading::default() });
    }
    let broadcasts = match config.model_loading {
        ModelLoading::Every => false,
        ModelLoading::Broadcast => true,
        ModelLoading::Auto => {
            let own = facts(&sources.base);
            let row = [own.host, own.remote.into(), own.lacks.into()];
            let ranks = gathered(communicator.as_ref(), device, &row).map_err(EngineError::from)?;
            let ranks: Vec<LoadingFacts> = ranks
                .chunks_exact(row.len())
                .map(|row| LoadingFacts { host: row[0], remote: row[1] != 0, lacks: row[2] != 0 })
                .collect();
            one_should_read(&ranks)
        }
    };
    tracing::info!(model_loading = if broadcasts { "broadcast" } else { "every" }, "loading");
    let relay = broadcasts.then(|| Relay { communicator: Arc::clone(communicator), device });
    Ok(Reading { relay, digest: Some(Digested::default()), ..Reading::default() })
}

/// True if one rank should read for all. On one host the page cache already reads each file only once.
fn one_should_read(ranks: &[LoadingFacts]) -> bool {
    ranks.iter().any(|rank| rank.host != ranks[0].host || rank.remote || rank.lacks)
}

fn facts(model: &Path) -> LoadingFacts {
    let mounts = dyad_proto::files::of_kernel("/proc/self/mountinfo").unwrap_or_default();
    let place = std::fs::canonicalize(model).unwrap_or_else(|_| model.to_owned());
    LoadingFacts { host: host(), remote: is_remote(&mounts, &place), lacks: Weights::open(model).is_err() }
}

/// Differs between machines; the same in all containers of one machine.
fn host() -> i64 {
    let id = dyad_proto::files::of_kernel("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = id.chars().filter(char::is_ascii_hexdigit).take(15).collect();
    i64::from_str_radix(&digits, 16).unwrap_or_default()
}

/// Whether a path is on a network file system. The longest mount point above the path decides, and of equal ones the last.
fn is_remote(mounts: &str, path: &Path) -> bool {
    let mount = |line: &str| {
        // `36 35 98:0 /root /mount/point options - type source options`
        let (before, after) = line.split_once(" - ")?;
        let point = before.split(' ').nth(4)?.replace(r"\040", " ");
        let kind = after.split(' ').next()?.to_owned();
        path.starts_with(&point).then_some((point.len(), kind))
    };
    let above = mounts.lines().filter_map(mount).max_by_key(|(length, _)| *length);
    above.is_some_and(|(_, kind)| REMOTE.contains(&kind.as_str()) || kind.starts_with("fuse."))
}

/// Every rank's values, in rank order.
fn gathered(communicator: &dyn Communicator, device: Device, own: &[i64]) -> Result<Vec<i64>, CommError> {
    let input = Tensor::from_slice(own).to_device(device);
    let all = Tensor::zeros([(own.len() * communicator.world_size()) as i64], (Kind::Int64, device));
    communicator.all_gather(&all, &input)?.wait()?;
    Ok(values(&all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rank_reads_for_several_hosts_remote_disks_and_ranks_without_weights() {
        let here = LoadingFacts { host: 1, remote: false, lacks: false };
        assert!(!one_should_read(&[here; 4]));
        assert!(one_should_read(&[here, LoadingFacts { host: 2, ..here }]));
        assert!(one_should_read(&[here, LoadingFacts { remote: true, ..here }]));
        assert!(one_should_read(&[here, here, LoadingFacts { lacks: true, ..here }]));
    }

    #[test]
    fn the_innermost_mount_decides_whether_a_path_is_remote() {
        let mounts = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            30 22 0:40 / /models rw shared:1 - nfs4 server:/models rw\n\
            31 30 8:2 / /models/local rw - xfs /dev/sdb rw\n\
            32 22 0:41 / /my\\040bucket rw - fuse.mount-s3 bucket rw\n";
        for (path, expected) in [
            ("/home/model", false),
            ("/models/qwen", true),
            ("/models/local/qwen", false),
            ("/models-of-mine", false),
            ("/my bucket/qwen", true),
        ] {
            assert_eq!(is_remote(mounts, Path::new(path)), expected, "{path}");
        }
    }
}
