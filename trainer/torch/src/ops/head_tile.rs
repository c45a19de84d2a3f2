//! Scores one tile of the LM head's logits: by the bridge's kernels for CPUs and GPUs, otherwise by libtorch's operators.
#![expect(unsafe_code, reason = "foreign functions of the bridge")]

use tch::{Kind, Tensor};

use crate::backend::{Backend, GPU_VECTOR, on_gpu_path};
use crate::error::check;
use crate::ffi::dyad_head_score;

/// Scores of one tile of logits.
#[derive(Debug)]
pub struct TileScore {
    /// Log-probability of each row's target, float64. `[rows]`
    pub logps: Tensor,
    /// The same under the reference; `None` without a reference. `[rows]`
    pub reference_logps: Option<Tensor>,
    /// What [`RowFact`] names about each row, float32. `None` unless asked for. `[rows, RowFact::COUNT]`
    pub facts: Option<Tensor>,
    /// `softmax(z) - onehot(target)`, the gradient of minus the log-probability with respect to the logits. `None` unless
    /// kept. `[rows, vocab]`
    pub errors: Option<Tensor>,
}

/// A fact about a row of logits `z` with `p = softmax(z)`, as the bridge's `RowFacts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFact {
    /// KL(p || reference), nats; 0 without a reference.
    Kl,
    /// Mean of `z`.
    MeanLogit,
    /// Entropy of `p`, nats.
    Entropy,
    /// Logarithm of the sum of `p²`.
    LogSumSq,
    /// 1 if the target is the first of the largest logits, else 0.
    IsTop1,
}

impl RowFact {
    /// Number of facts.
    pub const COUNT: i64 = Self::IsTop1 as i64 + 1;
}

/// What is computed beside the log-probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Overwrite the policy's logits with the errors.
    pub errors: bool,
    /// The facts about each row.
    pub facts: bool,
}

/// Scores logits `[rows, vocab]`. It may overwrite them with the errors, which is why it takes ownership.
#[must_use]
pub fn score(policy: Tensor, reference: Option<Tensor>, targets: &Tensor, wanted: Wanted) -> TileScore {
    let all: Vec<&Tensor> = [&policy].into_iter().chain(&reference).collect();
    if Backend::of(&all, GPU_VECTOR) != Backend::Torch {
        fused_score(policy, reference, targets, wanted)
    } else {
        composed_score(policy, reference, targets, wanted)
    }
}

fn fused_score(policy: Tensor, reference: Option<Tensor>, targets: &Tensor, wanted: Wanted) -> TileScore {
    let (policy, reference) = (policy.contiguous(), reference.map(|logits| logits.contiguous()));
    let (rows, device) = (policy.size()[0], policy.device());
    let logps = Tensor::empty([rows], (Kind::Double, device));
    let reference_logps = reference.as_ref().map(|_| logps.empty_like());
    let facts = wanted.facts.then(|| Tensor::empty([rows, RowFact::COUNT], (Kind::Float, device)));
    let pointer =
        |tensor: &Option<Tensor>| tensor.as_ref().map_or(std::ptr::null(), |tensor| tensor.as_ptr());
    // SAFETY: live, contiguous tensors of the kinds and sizes that the bridge expects; both tensors of the reference are either null
    // or live.
    let scored = unsafe {
        check(dyad_head_score(
            policy.as_ptr(),
            pointer(&reference),
            targets.as_ptr(),
            logps.as_ptr(),
            pointer(&reference_logps),
            pointer(&facts),
            wanted.errors,
            on_gpu_path(device),
        ))
    };
    accept(scored);
    TileScore { logps, reference_logps, facts, errors: wanted.errors.then_some(policy) }
}

fn composed_score(policy: Tensor, reference: Option<Tensor>, targets: &Tensor, wanted: Wanted) -> TileScore {
    let targets = targets.unsqueeze(1);
    let at_targets = |log_probabilities: &Tensor| {
        log_probabilities.gather(1, &targets, false).squeeze_dim(1).to_kind(Kind::Double)
    };
    let log_p = policy.log_softmax(-1, Kind::Float);
    let of_logits = wanted.facts.then(|| {
        let top = policy.argmax(1, true).eq_tensor(&targets).to_kind(Kind::Float).squeeze_dim(1);
        (policy.mean_dim(1, false, Kind::Float), top)
    });
    drop(policy);
    let logps = at_targets(&log_p);
    let log_q = reference.map(|logits| logits.log_softmax(-1, Kind::Float));
    let reference_logps = log_q.as_ref().map(at_targets);
    if !wanted.errors && !wanted.facts {
        return TileScore { logps, reference_logps, facts: None, errors: None };
    }
    let mut p = log_p.exp();
    let facts = of_logits.map(|(mean_logit, top)| {
        // A probability of 0 times the logarithm of 0 counts as 0.
        let finite = |log: &Tensor| log.clamp_min(LOWEST);
        let under_p = |values: &Tensor| (values * &p).sum_dim_intlist(1, false, Kind::Float);
        let log_p = finite(&log_p);
        let kl = log_q
            .as_ref()
            .map_or_else(|| mean_logit.zeros_like(), |log_q| under_p(&(&log_p - finite(log_q))));
        Tensor::stack(&[&kl, &mean_logit, &-under_p(&log_p), &under_p(&p).log(), &top], 1)
    });
    let errors = wanted
        .errors
        .then(|| p.scatter_add_(1, &targets, &Tensor::full_like(&targets, -1).to_kind(p.kind())));
    TileScore { logps, reference_logps, facts, errors }
}

/// Takes the place of minus infinity where it is multiplied by a probability of 0, which would give NaN.
const LOWEST: f64 = -1e30;

/// Panics on an error, which is a bug in the caller, as tch's operators do.
fn accept(result: Result<(), crate::error::TorchError>) {
    if let Err(error) = result {
        panic!("fused head: {error}");
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    const ROWS: i64 = 9;

    const ALL: Wanted = Wanted { errors: true, facts: true };

    /// Equal relative to 1 plus the value: sums of float32 round relative to their size, and loops of each instruction set add in their
    /// own order.
    fn close(a: &Tensor, b: &Tensor, tolerance: f64) {
        let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
        let worst = ((&a - &b).abs() / (b.abs() + 1.0)).max().double_value(&[]);
        assert!(worst < tolerance, "differ by {worst}: {a} {b}");
    }

    /// Equal up to rounding in float32; in bfloat16 each probability keeps eight bits.
    #[test]
    fn fused_head_equals_its_composition() {
        tch::manual_seed(5);
        for (kind, vocab) in [(Kind::Float, 13), (Kind::Float, 1000), (Kind::BFloat16, 1000)] {
            let tolerance = if kind == Kind::Float { 1e-5 } else { 1e-2 };
            let logits = || (Tensor::randn([ROWS, vocab], (Kind::Float, Device::Cpu)) * 4.0).to_kind(kind);
            let (policy, reference) = (logits(), logits());
            // Every other target is the largest logit.
            let random = Tensor::randint(vocab, [ROWS], (Kind::Int64, Device::Cpu));
            let even = Tensor::arange(ROWS, (Kind::Int64, Device::Cpu)).remainder(2).eq(0);
            let targets = policy.argmax(1, false).where_self(&even, &random);
            for reference in [None, Some(reference)] {
                let ours = fused_score(policy.copy(), reference.as_ref().map(Tensor::copy), &targets, ALL);
                let theirs = composed_score(policy.copy(), reference, &targets, ALL);
                close(&ours.logps, &theirs.logps, tolerance);
                let (our_facts, their_facts) = (ours.facts.unwrap(), theirs.facts.unwrap());
                close(&our_facts, &their_facts, tolerance);
                let top = our_facts.select(1, RowFact::IsTop1 as i64).sum(Kind::Float).double_value(&[]);
                assert!(top >= ROWS as f64 / 2.0, "{top}");
                assert_eq!(ours.reference_logps.is_some(), theirs.reference_logps.is_some());
                if let (Some(ours), Some(theirs)) = (&ours.reference_logps, &theirs.reference_logps) {
                    close(ours, theirs, tolerance);
                }
                close(&ours.errors.unwrap(), &theirs.errors.unwrap(), tolerance);
            }
        }
    }

    /// By hand: p = (1/2, 1/4, 1/4), and a reference of (1/4, 1/4, 1/2).
    #[test]
    fn facts_of_a_row_are_those_of_its_distribution() {
        let row = |p: [f32; 3]| Tensor::from_slice(&p).log().view([1, 3]) + 2.0;
        let targets = Tensor::from_slice(&[0_i64]);
        let (policy, reference) = (row([0.5, 0.25, 0.25]), row([0.25, 0.25, 0.5]));
        let ln2 = std::f64::consts::LN_2;
        let expected = [0.5 * ln2 - 0.25 * ln2, 2.0 - 5.0 / 3.0 * ln2, 1.5 * ln2, f64::ln(0.375), 1.0];
        for score in [fused_score, composed_score] {
            let facts = score(policy.copy(), Some(reference.copy()), &targets, ALL).facts.unwrap();
            close(&facts.view([-1]), &Tensor::from_slice(&expected), 1e-6);
        }
    }

    /// The first of equal logits is the one that greedy decoding takes.
    #[test]
    fn only_the_first_of_the_largest_logits_is_top_1() {
        let logits = Tensor::from_slice(&[1.0f32, 3.0, 3.0, 0.0]).view([1, 4]);
        for (target, expected) in [(0, 0.0), (1, 1.0), (2, 0.0)] {
            let targets = Tensor::from_slice(&[target as i64]);
            for score in [fused_score, composed_score] {
                let facts = score(logits.copy(), None, &targets, ALL).facts.unwrap();
                assert_eq!(facts.double_value(&[0, RowFact::IsTop1 as i64]), expected, "{target}");
            }
        }
    }

    /// Models mask tokens with minus infinity.
    #[test]
    fn impossible_tokens_add_nothing_to_divergence_and_entropy() {
        let row = |values: [f32; 4]| Tensor::from_slice(&values).view([1, 4]);
        let none = f32::NEG_INFINITY;
        let targets = Tensor::from_slice(&[0_i64]);
        for score in [fused_score, composed_score] {
            let scored = score(row([0.0, 0.0, none, none]), Some(row([0.0, 0.0, none, 0.0])), &targets, ALL);
            let facts = scored.facts.unwrap();
            let at = |fact: RowFact| facts.double_value(&[0, fact as i64]);
            assert!((at(RowFact::Kl) - f64::ln(1.5)).abs() < 1e-6, "{facts}");
            assert!((at(RowFact::Entropy) - f64::ln(2.0)).abs() < 1e-6, "{facts}");
        }
    }

    fn kl(scored: &TileScore) -> f64 {
        scored.facts.as_ref().unwrap().select(1, RowFact::Kl as i64).sum(Kind::Double).double_value(&[])
    }

    /// The KL is exactly zero, so that the first step of a run reports no divergence.
    #[test]
    fn equal_logits_do_not_diverge() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let logits = (Tensor::randn([ROWS, 1003], (Kind::Float, Device::Cpu)) * 4.0).to_kind(kind);
            let targets = Tensor::zeros([ROWS], (Kind::Int64, Device::Cpu));
            for errors in [false, true] {
                let wanted = Wanted { errors, facts: true };
                assert_eq!(kl(&fused_score(logits.copy(), Some(logits.copy()), &targets, wanted)), 0.0);
            }
        }
    }

    /// Float32 sums as large as the shift would round away a smaller divergence.
    #[test]
    fn shifting_all_logits_gives_no_divergence() {
        let logits = Tensor::randn([ROWS, 1003], (Kind::Float, Device::Cpu)) * 4.0;
        let targets = Tensor::zeros([ROWS], (Kind::Int64, Device::Cpu));
        let wanted = Wanted { errors: false, facts: true };
        let kl = kl(&fused_score(&logits + 60.0, Some(logits), &targets, wanted));
        assert!(kl.abs() < 1e-6, "{kl}");
    }

    #[test]
    fn nan_logits_give_nan_log_probabilities() {
        let logits = Tensor::zeros([1, 40], (Kind::Float, Device::Cpu));
        let _ = logits.narrow(1, 7, 1).fill_(f64::NAN);
        let targets = Tensor::zeros([1], (Kind::Int64, Device::Cpu));
        let scored = fused_score(logits, None, &targets, ALL);
        assert!(scored.logps.double_value(&[0]).is_nan());
        assert!(scored.facts.unwrap().double_value(&[0, RowFact::Entropy as i64]).is_nan());
    }
}
