//! Removes old checkpoints once a newer one is complete and on disk.

use std::fs;
use std::path::Path;

use dyad_proto::files::read_to_string;
use dyad_proto::removal::remove;
use dyad_proto::run_folder::{checkpoint_step, unfinished};

use dyad_proto::checkpoint_state::CheckpointState;

use super::STATE_FILE;

/// Number of rotating checkpoints that are kept: two, so that one is left if the newest gets damaged.
const ROTATING: usize = 2;

/// A checkpoint in the output folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Saved {
    step: u64,
    rotates: bool,
}

/// Which checkpoints stay.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kept {
    /// Step of the checkpoint that always stays: that of the best evaluation.
    pub best: u64,
    /// Most checkpoints.
    pub limit: Option<u32>,
}

/// Removes the checkpoints that a completed one makes superfluous. A failure to remove one is only logged.
pub fn rotate(output_dir: &Path, newest: u64, kept: Kept) {
    for step in expired(&saved(output_dir, newest), kept) {
        let path = output_dir.join(format!("checkpoint-{step}"));
        // Rename it first: a half-removed folder must not look like a checkpoint.
        let out_of_sight = unfinished(&path);
        let name = format!("checkpoint-{step}");
        let removed = remove(&out_of_sight, &name)
            .and_then(|()| fs::rename(&path, &out_of_sight))
            .and_then(|()| remove(&out_of_sight, &name));
        match removed {
            Ok(()) => tracing::info!("removed {}, there are newer ones", path.display()),
            Err(error) => tracing::warn!("cannot remove {}: {error}", path.display()),
        }
    }
}

/// Checkpoints up to the newest, in order. Skips those whose state cannot be read, and those of a later step: an earlier run left them.
fn saved(output_dir: &Path, newest: u64) -> Vec<Saved> {
    let folders = fs::read_dir(output_dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut saved: Vec<Saved> = folders
        .filter_map(|path| {
            let step = checkpoint_step(&path).filter(|step| *step <= newest)?;
            let text = read_to_string(&path.join(STATE_FILE)).ok()?;
            let state =
                serde_json::from_str::<CheckpointState>(&text).ok().filter(|state| state.step == step)?;
            Some(Saved { step, rotates: state.rotates })
        })
        .collect();
    saved.sort();
    saved
}

/// Steps of all rotating checkpoints except the last [`ROTATING`], then of the oldest of all kinds beyond `limit`, as `save_total_limit`
/// in transformers: the newest and the best one stay, and count.
fn expired(saved: &[Saved], Kept { best, limit }: Kept) -> Vec<u64> {
    let rotates = |saved: &&Saved| saved.rotates && saved.step != best;
    let rotating: Vec<u64> = saved.iter().filter(rotates).map(|saved| saved.step).collect();
    let mut expired = rotating[..rotating.len().saturating_sub(ROTATING)].to_vec();
    let rest: Vec<u64> =
        saved.iter().map(|saved| saved.step).filter(|step| !expired.contains(step)).collect();
    let limit = limit.map_or(usize::MAX, |limit| limit as usize);
    let removable = rest.iter().take(rest.len().saturating_sub(1)).filter(|step| **step != best);
    expired.extend(removable.take(rest.len().saturating_sub(limit)));
    expired.sort_unstable();
    expired
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(steps: &[(u64, bool)], limit: Option<u32>) -> Vec<u64> {
        let saved: Vec<Saved> = steps.iter().map(|&(step, rotates)| Saved { step, rotates }).collect();
        expired(&saved, Kept { best: 0, limit })
    }

    #[test]
    fn the_last_two_rotating_checkpoints_and_all_others_stay() {
        assert_eq!(of(&[], None), [] as [u64; 0]);
        assert_eq!(of(&[(3, true), (5, true)], None), [] as [u64; 0]);
        assert_eq!(of(&[(1, false), (3, true), (4, false), (5, true), (6, false), (7, true)], None), [3]);
    }

    #[test]
    fn the_limit_counts_all_checkpoints_and_spares_the_newest() {
        let all = [(1, false), (3, true), (5, true), (7, true), (9, false)];
        assert_eq!(of(&all, Some(4)), [3]);
        assert_eq!(of(&all, Some(3)), [1, 3]);
        assert_eq!(of(&all, Some(1)), [1, 3, 5, 7]);
        assert_eq!(of(&all, Some(9)), [3]);
    }

    #[test]
    fn the_best_checkpoint_stays_and_counts() {
        let all = [(3, true), (5, true), (7, true), (9, true)];
        let saved: Vec<Saved> = all.iter().map(|&(step, rotates)| Saved { step, rotates }).collect();
        let of = |best, limit| expired(&saved, Kept { best, limit });
        assert_eq!(of(3, None), [5]);
        assert_eq!(of(5, None), [3]);
        assert_eq!(of(9, None), [3]);
        assert_eq!(of(3, Some(1)), [5, 7]);
        assert_eq!(of(3, Some(2)), [5, 7]);
        assert_eq!(of(9, Some(1)), [3, 5, 7]);
    }

    #[test]
    fn unreadable_and_later_checkpoints_stay() {
        let dir = tempfile::tempdir().unwrap();
        let state = |step: u64| {
            format!(
                r#"{{"step":{step},"total_steps":9,"dataset_sha256":"a","random_seed":4,"batch_size":8,"world_size":1}}"#
            )
        };
        for step in [1, 2, 3, 4, 8] {
            let path = dir.path().join(format!("checkpoint-{step}"));
            fs::create_dir(&path).unwrap();
            fs::write(path.join(STATE_FILE), if step == 2 { "{".into() } else { state(step) }).unwrap();
        }
        fs::create_dir(dir.path().join("checkpoint-best")).unwrap();
        rotate(dir.path(), 4, Kept { best: 0, limit: Some(1) });
        let mut left: Vec<String> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["checkpoint-2", "checkpoint-4", "checkpoint-8", "checkpoint-best"]);
    }
}
