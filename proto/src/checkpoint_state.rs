//! Contents of `dyad_state.json`: progress and identity of the run that wrote a checkpoint. Trainers write it; trainers and the
//! coordinator read it.

use serde::{Deserialize, Serialize};

use crate::fingerprint::Fingerprint;

/// `dyad_state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointState {
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
    /// Size of a gradient bucket in bytes; 0 in checkpoints of earlier versions.
    #[serde(default)]
    pub bucket_bytes: i64,
    /// Tokens trained on; `None` in checkpoints of earlier versions.
    #[serde(default)]
    pub num_tokens: Option<u64>,
    /// Rows of evaluations before this step; `None` in checkpoints of earlier versions.
    #[serde(default)]
    pub evaluations: Option<u64>,
    /// The checkpoint was written because of `save_minutes` or an early end: rotation removes it once there are newer ones.
    #[serde(default)]
    pub rotates: bool,
    /// In `final`: the step whose model this is, if it is not the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_step: Option<u64>,
    /// In `final`: the run ended before its last step, because evaluations no longer improved.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub early_stopped: bool,
    /// Identity of the run.
    #[serde(flatten)]
    pub run: RunIdentity,
}

/// Identifies the run of a checkpoint. A resume compares it with the new configuration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunIdentity {
    /// Seed of the data order.
    pub random_seed: u64,
    /// Pairs per optimizer step.
    pub batch_size: u32,
    /// Number of trainers; 0 in checkpoints of earlier versions.
    #[serde(default)]
    pub world_size: u32,
    /// All other settings and facts that decide the run's numbers; partly empty in checkpoints of earlier versions.
    #[serde(flatten)]
    pub fingerprint: Fingerprint,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_of_earlier_versions_are_read() {
        let text = r#"{"step":4,"total_steps":9,"dataset_sha256":"aa","random_seed":42,"batch_size":8}"#;
        let state: CheckpointState = serde_json::from_str(text).unwrap();
        assert_eq!((state.step, state.num_tokens, state.evaluations, state.rotates), (4, None, None, false));
        assert_eq!((state.run.batch_size, state.run.world_size), (8, 0));
        assert_eq!(state.run.fingerprint.dataset_sha256, "aa");
    }

    #[test]
    fn state_survives_json() {
        let run =
            RunIdentity { random_seed: u64::MAX, batch_size: 8, world_size: 2, ..RunIdentity::default() };
        let state = CheckpointState {
            step: 3,
            total_steps: 9,
            bucket_bytes: 1 << 20,
            num_tokens: Some(1000),
            evaluations: Some(1),
            rotates: true,
            best_step: Some(2),
            early_stopped: true,
            run,
        };
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<CheckpointState>(&text).unwrap(), state);
    }
}
