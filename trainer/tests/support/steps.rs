//! Two optimizer steps on a few pairs, and the comparison of their results on two devices.

use dyad_data::tokenized::Tokenized;
use trainer::engine::{Engine, StepResult, StepShare};

/// Pairs of different lengths, more than one micro-batch of 40 tokens.
pub(crate) fn pairs() -> Vec<Tokenized> {
    let pair = |n: u32, chosen: u32, rejected: u32| {
        Tokenized::new(
            (0..3 + n).map(|at| 5 + at).collect(),
            (0..chosen).map(|at| 70 + n + at).collect(),
            (0..rejected).map(|at| 90 + n + at).collect(),
        )
    };
    vec![pair(0, 4, 7), pair(5, 1, 1), pair(9, 12, 3), pair(5, 6, 2)]
}

/// All of these pairs, as one rank's share of a step.
pub(crate) fn share(step: u64) -> StepShare {
    let pairs = pairs();
    StepShare {
        step,
        references: vec![None; pairs.len()],
        global_pairs: pairs.len() as u64,
        global_chosen_tokens: 23,
        pairs,
    }
}

/// Two steps: the results of the second show whether the first learned the same.
pub(crate) fn two_steps(engine: &mut Engine) -> [StepResult; 2] {
    [1, 2].map(|step| engine.train_step(&share(step), 1e-3).unwrap())
}

/// Differences beyond the tolerance, relative to the first device's value if that is above one.
pub(crate) fn differences(here: &[StepResult], there: &[StepResult], tolerance: f64) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut close = |name: &str, here: f64, there: f64| {
        let worst = (here - there).abs() / here.abs().max(1.0);
        if worst.is_nan() || worst >= tolerance {
            wrong.push(format!("{name}: {here} here, {there} there"));
        }
    };
    for (here, there) in here.iter().zip(there) {
        close("loss", here.sums.loss, there.sums.loss);
        close("gradient norm", here.grad_norm, there.grad_norm);
        close("chosen", here.sums.logps_chosen, there.sums.logps_chosen);
        close("divergence", here.sums.kl_chosen, there.sums.kl_chosen);
        close("divergence of the others", here.sums.kl_rejected, there.sums.kl_rejected);
        close("entropy", here.sums.entropy, there.sums.entropy);
        close("mean logits", here.sums.logits_chosen, there.sums.logits_chosen);
        assert_eq!(here.references.len(), there.references.len());
        for (here, there) in here.references.iter().zip(&there.references) {
            close("reference", here.unwrap().rejected, there.unwrap().rejected);
        }
    }
    wrong
}
