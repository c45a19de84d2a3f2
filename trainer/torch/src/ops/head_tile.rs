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
    /// Sum over the rows of KL(policy || reference), float64; 0 without a reference. `[]`
    pub kl: Tensor,
    /// `softmax(z) - onehot(target)`, the gradient of minus the log-probability with respect to the logits. `None` unless
    /// kept. `[rows, vocab]`
    pub errors: Option<Tensor>,
}

/// Scores logits `[rows, vocab]`. With `keep` it overwrites them with the errors, which is why it takes ownership.
#[must_use]
pub fn score(policy: Tensor, reference: Option<Tensor>, targets: &Tensor, keep: bool) -> TileScore {
    let all: Vec<&Tensor> = [&policy].into_iter().chain(&reference).collect();
    if Backend::of(&all, GPU_VECTOR) != Backend::Torch {
        fused_score(policy, reference, targets, keep)
    } else {
        composed_score(policy, reference, targets, keep)
    }
}

fn fused_score(policy: Tensor, reference: Option<Tensor>, targets: &Tensor, keep: bool) -> TileScore {
    let (policy, reference) = (policy.contiguous(), reference.map(|logits| logits.contiguous()));
    let rows = |kind| Tensor::empty([policy.size()[0]], (kind, policy.device()));
    let logps = rows(Kind::Double);
    let of_reference = reference.as_ref().map(|logits| (logits, rows(Kind::Double), rows(Kind::Float)));
    let null = std::ptr::null();
    let (logits, reference_logps, kl) = match &of_reference {
        Some((logits, logps, kl)) => (logits.as_ptr(), logps.as_ptr(), kl.as_ptr()),
        None => (null, null, null),
    };
    // SAFETY: live, contiguous tensors of the kinds and sizes that the bridge expects; the three tensors of the reference are
    // either all null or all live.
    let scored = unsafe {
        check(dyad_head_score(
            policy.as_ptr(),
            logits.cast(),
            targets.as_ptr(),
            logps.as_ptr(),
            reference_logps.cast(),
            kl.cast(),
            keep,
            on_gpu_path(policy.device()),
        ))
    };
    accept(scored);
    let kl = match &of_reference {
        Some((_, _, kl)) => kl.sum(Kind::Double),
        None => Tensor::zeros([], (Kind::Double, policy.device())),
    };
    let reference_logps = of_reference.map(|(_, logps, _)| logps);
    TileScore { logps, reference_logps, kl, errors: keep.then_some(policy) }
}

fn composed_score(policy: Tensor, reference: Option<Tensor>, targets: &Tensor, keep: bool) -> TileScore {
    let targets = targets.unsqueeze(1);
    let at_targets = |log_probabilities: &Tensor| {
        log_probabilities.gather(1, &targets, false).squeeze_dim(1).to_kind(Kind::Double)
    };
    let mut log_p = policy.log_softmax(-1, Kind::Float);
    drop(policy);
    let logps = at_targets(&log_p);
    let mut kl = Tensor::zeros([], (Kind::Double, logps.device()));
    if !keep && reference.is_none() {
        return TileScore { logps, reference_logps: None, kl, errors: None };
    }
    let mut p = log_p.exp();
    let reference_logps = reference.map(|logits| {
        let log_q = logits.log_softmax(-1, Kind::Float);
        let logps = at_targets(&log_q);
        log_p -= &log_q;
        kl += log_p.view([-1]).dot(&p.view([-1])).to_kind(Kind::Double);
        logps
    });
    let errors =
        keep.then(|| p.scatter_add_(1, &targets, &Tensor::full_like(&targets, -1).to_kind(p.kind())));
    TileScore { logps, reference_logps, kl, errors }
}

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

    /// Equal up to rounding in float32; in bfloat16 each probability keeps eight bits.
    #[test]
    fn fused_head_equals_its_composition() {
        tch::manual_seed(5);
        for (kind, vocab) in [(Kind::Float, 13), (Kind::Float, 1000), (Kind::BFloat16, 1000)] {
            let tolerance = if kind == Kind::Float { 1e-5 } else { 1e-2 };
            let logits = || (Tensor::randn([ROWS, vocab], (Kind::Float, Device::Cpu)) * 4.0).to_kind(kind);
            let (policy, reference) = (logits(), logits());
            let targets = Tensor::randint(vocab, [ROWS], (Kind::Int64, Device::Cpu));
            for reference in [None, Some(reference)] {
                let ours = fused_score(policy.copy(), reference.as_ref().map(Tensor::copy), &targets, true);
                let theirs = composed_score(policy.copy(), reference, &targets, true);
                let close = |a: &Tensor, b: &Tensor| {
                    let worst =
                        (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[]);
                    assert!(worst < tolerance, "{kind:?} {vocab}: differ by {worst}");
                };
                close(&ours.logps, &theirs.logps);
                close(&(&ours.kl / ROWS), &(&theirs.kl / ROWS));
                assert_eq!(ours.reference_logps.is_some(), theirs.reference_logps.is_some());
                if let (Some(ours), Some(theirs)) = (&ours.reference_logps, &theirs.reference_logps) {
                    close(ours, theirs);
                }
                close(&ours.errors.unwrap(), &theirs.errors.unwrap());
            }
        }
    }

    /// The KL is exactly zero, so that the first step of a run reports no divergence.
    #[test]
    fn equal_logits_do_not_diverge() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let logits = (Tensor::randn([ROWS, 1003], (Kind::Float, Device::Cpu)) * 4.0).to_kind(kind);
            let targets = Tensor::zeros([ROWS], (Kind::Int64, Device::Cpu));
            for keep in [false, true] {
                let scored = fused_score(logits.copy(), Some(logits.copy()), &targets, keep);
                assert_eq!(scored.kl.double_value(&[]), 0.0);
            }
        }
    }

    /// Float32 sums as large as the shift would round away a smaller divergence.
    #[test]
    fn shifting_all_logits_gives_no_divergence() {
        let logits = Tensor::randn([ROWS, 1003], (Kind::Float, Device::Cpu)) * 4.0;
        let targets = Tensor::zeros([ROWS], (Kind::Int64, Device::Cpu));
        let kl = fused_score(&logits + 60.0, Some(logits), &targets, false).kl.double_value(&[]);
        assert!(kl.abs() < 1e-6, "{kl}");
    }

    #[test]
    fn nan_logits_give_nan_log_probabilities() {
        let logits = Tensor::zeros([1, 40], (Kind::Float, Device::Cpu));
        let _ = logits.narrow(1, 7, 1).fill_(f64::NAN);
        let targets = Tensor::zeros([1], (Kind::Int64, Device::Cpu));
        assert!(fused_score(logits, None, &targets, false).logps.double_value(&[0]).is_nan());
    }
}
