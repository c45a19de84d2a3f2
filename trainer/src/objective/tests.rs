//! Compares every loss with its paper's formula, and every derivative with finite differences.

use dyad_proto::run_config::{FDivergenceType, LossType, LossTypes};

use super::*;

const TOKENS: [i64; 4] = [4, 2, 8, 3];
const POLICY: [f64; 4] = [-3.0, -5.0, -7.0, -2.5];
const REFERENCE: [f64; 4] = [-4.0, -4.5, -6.0, -3.5];

fn config(loss: LossType) -> RunConfig {
    let label_smoothing = if loss.takes_label_smoothing() { 0.1 } else { 0.0 };
    let simpo_gamma = (loss == LossType::Simpo).then_some(0.3);
    RunConfig { loss_type: loss.into(), dpo_beta: 0.5, label_smoothing, simpo_gamma, ..RunConfig::default() }
}

fn objective(config: &RunConfig) -> StepObjective {
    StepObjective::of(config).sized(StepSize { pairs: 4.0, chosen_tokens: 24.0 })
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_kind(Kind::Double).try_into().unwrap()
}

/// The derivative with respect to each log-probability, and the statistics.
fn weighted_score(
    objective: &StepObjective,
    policy: &[f64],
    reference: Option<&[f64]>,
    weights: &[f64],
) -> (Vec<f64>, Vec<f64>) {
    let (policy, lengths) = (Tensor::from_slice(policy), Tensor::from_slice(&TOKENS[..policy.len()]));
    let (reference, weights) = (reference.map(Tensor::from_slice), Tensor::from_slice(weights));
    let reference = reference.as_ref();
    // The last record is undesirable; only losses of labelled answers read it.
    let desirable = weights.ones_like();
    let _ = desirable.select(0, -1).fill_(0.0);
    let sequences = SequenceLogps {
        policy: &policy,
        likelihood: &policy,
        reference,
        lengths: &lengths,
        weights: &weights,
        desirable: &desirable,
        alignment: None,
    };
    let scored = objective.score(&sequences);
    let gradient = match &scored.likelihood_gradient {
        Some(likelihood) => &scored.gradient + likelihood,
        None => scored.gradient.shallow_clone(),
    };
    (values(&gradient), values(scored.statistics().tensor()))
}

fn score(config: &RunConfig, policy: &[f64], reference: Option<&[f64]>) -> (Vec<f64>, Vec<f64>) {
    weighted_score(&objective(config), policy, reference, &vec![1.0; policy.len() / 2])
}

/// The loss of a step: pairs' losses and likelihood, each with its divisor.
fn step_loss(config: &RunConfig, policy: &[f64]) -> f64 {
    let (_, sums) = score(config, policy, Some(&REFERENCE));
    let nll = config.objective().nll_weight() * sums[Statistic::Nll as usize] / 24.0;
    sums[Statistic::Loss as usize] / 4.0 + nll
}

fn close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    let near = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-12;
    assert!(found.iter().zip(expected).all(near), "{found:?} is not {expected:?}");
}

fn at(statistics: &[f64], statistic: Statistic) -> f64 {
    statistics[statistic as usize]
}

fn softplus(x: f64) -> f64 {
    x.exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Conservative form of `-log sigmoid(x)` with smoothing 0.1.
fn smooth(x: f64) -> f64 {
    0.9 * softplus(-x) + 0.1 * softplus(x)
}

#[test]
fn equal_models_lose_ln_2_and_have_no_reward() {
    let plain = RunConfig { label_smoothing: 0.0, ..config(LossType::Sigmoid) };
    let (_, sums) = score(&plain, &POLICY, Some(&POLICY));
    let found =
        [Statistic::Loss, Statistic::RewardsChosen, Statistic::RewardsRejected, Statistic::RewardsCorrect];
    close(&found.map(|name| at(&sums, name)), &[2.0 * std::f64::consts::LN_2, 0.0, 0.0, 0.0]);
    let found = [Statistic::LogpsChosen, Statistic::LogpsRejected, Statistic::LogpsCorrect];
    close(&found.map(|name| at(&sums, name)), &[-10.0, -7.5, 1.0]);
}

/// Loss of one pair with log-ratios `a` and `b`, log-probabilities `c` and `r`, and token counts, from the papers.
fn formula(loss: LossType, [a, b]: [f64; 2], [c, r]: [f64; 2], [m, n]: [f64; 2]) -> f64 {
    let (beta, e): (f64, f64) = (0.5, 0.1);
    let x = beta * (a - b);
    let log_odds = |logp: f64| logp - (1.0 - logp.exp()).ln();
    match loss {
        LossType::Sigmoid => smooth(x),
        LossType::SigmoidNorm => softplus(-beta * (a / m - b / n)),
        LossType::Hinge => (1.0 - x).max(0.0),
        LossType::Ipo => (a / m - b / n - 1.0 / (2.0 * beta)).powi(2),
        LossType::ExoPair => {
            sigmoid(x) * (-softplus(-x) - (1.0 - e).ln()) + sigmoid(-x) * (-softplus(x) - e.ln())
        }
        LossType::NcaPair => softplus(-beta * a) + 0.5 * softplus(beta * a) + 0.5 * softplus(beta * b),
        LossType::Robust => ((1.0 - e) * softplus(-x) - e * softplus(x)) / (1.0 - 2.0 * e),
        LossType::BcoPair => softplus(-beta * a) + softplus(beta * b),
        LossType::SppoHard => (a - 0.5 / beta).powi(2) + (b + 0.5 / beta).powi(2),
        LossType::ApoZero => 1.0 - sigmoid(beta * a) + sigmoid(beta * b),
        LossType::ApoDown => sigmoid(beta * a) + 1.0 - sigmoid(x),
        LossType::Discopop => {
            let k = sigmoid(x / 0.05);
            (1.0 - k) * softplus(-x) + k * (-x).exp()
        }
        LossType::Simpo => smooth(beta * (c / m - r / n) - 0.3),
        LossType::Cpo => smooth(beta * (c - r)),
        LossType::Orpo => beta * softplus(-(log_odds(c / m) - log_odds(r / n))),
        LossType::Sft => 0.0,
        LossType::Aot | LossType::AotUnpaired | LossType::Kto | LossType::ApoZeroUnpaired => {
            unreachable!("not a loss of single pairs")
        }
    }
}

#[test]
fn losses_match_the_papers() {
    // Log-ratios 1, -0.5 and -1, 1.
    let pairs = [([1.0, -0.5], [-3.0, -5.0], [4.0, 2.0]), ([-1.0, 1.0], [-7.0, -2.5], [8.0, 3.0])];
    for loss in LossType::ALL.into_iter().filter(|loss| !loss.couples_pairs() && !loss.is_labelled()) {
        let expected: f64 =
            pairs.iter().map(|&(ratios, logps, tokens)| formula(loss, ratios, logps, tokens)).sum();
        let reference = loss.needs_reference().then_some(&REFERENCE[..]);
        let (_, sums) = score(&config(loss), &POLICY, reference);
        assert!((at(&sums, Statistic::Loss) - expected).abs() < 1e-12, "{loss:?}: {expected} {sums:?}");
    }
}

/// The differences of policy log-probabilities are 2 and -4.5, those of the reference 0.5 and -2.5: sorted they pair up in another way.
#[test]
fn optimal_transport_compares_sorted_lists() {
    let (_, sums) = score(&config(LossType::Aot), &POLICY, Some(&REFERENCE));
    close(&[at(&sums, Statistic::Loss)], &[smooth(0.5 * (-4.5 + 2.5)) + smooth(0.5 * (2.0 - 0.5))]);
    let (_, sums) = score(&config(LossType::AotUnpaired), &POLICY, Some(&REFERENCE));
    close(&[at(&sums, Statistic::Loss)], &[smooth(0.5 * (-1.0 + 0.5)) + smooth(0.5 * (1.0 - 1.0))]);
}

#[test]
fn divergences_replace_the_log_ratio() {
    type Score = (FDivergenceType, fn(f64) -> f64);
    let scores: [Score; 4] = [
        (FDivergenceType::ReverseKl, |x| x),
        (FDivergenceType::ForwardKl, |x| 1.0 - (-x).exp()),
        (FDivergenceType::JsDivergence, |x| std::f64::consts::LN_2 - softplus(-x)),
        (FDivergenceType::AlphaDivergence, |x| ((0.3f64 - 1.0) * x).exp_m1() / (0.3 - 1.0)),
    ];
    for (f_divergence_type, s) in scores {
        let alpha = (f_divergence_type == FDivergenceType::AlphaDivergence).then_some(0.3);
        let config =
            RunConfig { f_divergence_type, f_alpha_divergence_coef: alpha, ..config(LossType::Hinge) };
        let (_, sums) = score(&config, &POLICY, Some(&REFERENCE));
        let loss = |a: f64, b: f64| (1.0 - 0.5 * (s(a) - s(b))).max(0.0);
        close(&[at(&sums, Statistic::Loss)], &[loss(1.0, -0.5) + loss(-1.0, 1.0)]);
        // Rewards keep the log-ratios, as in TRL.
        close(&[at(&sums, Statistic::RewardsChosen)], &[0.0]);
    }
}

#[test]
fn length_normalization_divides_each_log_ratio() {
    for loss in [LossType::Sigmoid, LossType::Hinge, LossType::NcaPair, LossType::SppoHard, LossType::ApoZero]
    {
        let config = RunConfig { dpo_normalize_logratios_by_length: true, ..config(loss) };
        let (_, sums) = score(&config, &POLICY, Some(&REFERENCE));
        let none = [0.0; 2];
        let expected =
            formula(loss, [0.25, -0.25], none, none) + formula(loss, [-0.125, 1.0 / 3.0], none, none);
        assert!((at(&sums, Statistic::Loss) - expected).abs() < 1e-12, "{loss:?}");
    }
}

#[test]
fn a_list_of_losses_is_their_weighted_sum() {
    let loss_type: LossTypes = serde_json::from_str(r#"["bco_pair", "sft", "apo_zero"]"#).unwrap();
    let both = RunConfig { loss_type, loss_weights: Some(vec![2.0, 0.25, 0.5]), ..config(LossType::BcoPair) };
    let (_, sums) = score(&both, &POLICY, Some(&REFERENCE));
    let one = |loss| at(&score(&config(loss), &POLICY, Some(&REFERENCE)).1, Statistic::Loss);
    let expected = 2.0 * one(LossType::BcoPair) + 0.5 * one(LossType::ApoZero);
    close(&[at(&sums, Statistic::Loss), at(&sums, Statistic::Nll)], &[expected, 10.0]);
    assert_eq!(both.objective().nll_weight(), 0.25);
}

/// Every loss with every key that it reads.
fn variants() -> Vec<RunConfig> {
    let of_pairs = LossType::ALL.into_iter().filter(|loss| !loss.is_labelled());
    let mut all: Vec<RunConfig> = of_pairs.map(config).collect();
    for divergence in
        [FDivergenceType::ForwardKl, FDivergenceType::JsDivergence, FDivergenceType::AlphaDivergence]
    {
        let coupled = LossType::ALL.into_iter().filter(|loss| loss.takes_f_divergence());
        all.extend(coupled.map(|loss| RunConfig { f_divergence_type: divergence, ..config(loss) }));
    }
    all.push(RunConfig { dpo_normalize_logratios_by_length: true, ..config(LossType::BcoPair) });
    all.push(RunConfig { rpo_alpha: 0.7, ..config(LossType::Sigmoid) });
    all
}

#[test]
fn derivatives_match_finite_differences() {
    for config in variants() {
        let (gradient, _) = score(&config, &POLICY, Some(&REFERENCE));
        for at in 0..POLICY.len() {
            let moved = |by: f64| {
                let mut policy = POLICY;
                policy[at] += by;
                step_loss(&config, &policy)
            };
            let expected = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            let (loss, found) = (config.loss_type.shown(), gradient[at]);
            assert!((found - expected).abs() < 1e-9, "{loss} at {at}: {found} is not {expected}");
        }
    }
}

/// Log-probabilities of 0 (a certain token) and far below any that occur give finite losses and derivatives, and so do equal outputs.
#[test]
fn extreme_log_probabilities_give_finite_derivatives() {
    for config in variants() {
        // SPPO, IPO and the exponentials of forward KL and DiscoPOP grow without bound; there the loss may be large, but is a number.
        for policy in [[0.0, 0.0, 0.0, 0.0], [-1e3, -1.0, -1.0, -1e3], [-4.0, -4.0, -2.0, -2.0]] {
            let (gradient, sums) = score(&config, &policy, Some(&[-1.0, -1.0, -1.0, -1.0]));
            let what = config.loss_type.shown();
            let divergence = config.f_divergence_type;
            let grows =
                divergence == FDivergenceType::ForwardKl || config.loss_type.contains(LossType::Discopop);
            let finite = gradient.iter().chain(&sums).all(|value| value.is_finite());
            assert!(finite || grows, "{what} {divergence:?} {policy:?}: {gradient:?} {sums:?}");
            assert!(gradient.iter().chain(&sums).all(|value| !value.is_nan()) || grows, "{what} {policy:?}");
        }
    }
}

#[test]
fn a_missing_reference_counts_as_zeros() {
    let zeros = [0.0; 4];
    for loss in LossType::ALL.into_iter().filter(|loss| !loss.is_labelled()) {
        let config = config(loss);
        assert_eq!(score(&config, &POLICY, None), score(&config, &POLICY, Some(&zeros)), "{loss:?}");
    }
}

/// Weights multiply loss and derivative of a pair; a pair of weight 0 changes nothing.
#[test]
fn weights_multiply_the_loss_of_a_pair() {
    for loss in LossType::ALL.into_iter().filter(|loss| !loss.couples_pairs() && !loss.is_labelled()) {
        let objective = objective(&config(loss));
        let weighted = |weights: &[f64]| weighted_score(&objective, &POLICY, Some(&REFERENCE), weights);
        let ((gradient, sums), (one, first)) = (weighted(&[0.0, 2.5]), weighted(&[0.0, 1.0]));
        assert_eq!(gradient[..2], [0.0, 0.0], "{loss:?}");
        close(&gradient[2..], &[2.5 * one[2], 2.5 * one[3]]);
        for statistic in [Statistic::Loss, Statistic::Nll] {
            assert!((at(&sums, statistic) - 2.5 * at(&first, statistic)).abs() < 1e-12, "{loss:?}");
        }
        if !loss.logs_per_token() {
            assert_eq!(at(&sums, Statistic::LogpsChosen), -10.0, "{loss:?}");
        }
    }
}

/// dL/dc = -beta sigmoid(-margin) / pairs, dL/dr its negative.
#[test]
fn the_gradient_of_dpo_has_the_closed_form() {
    let plain = RunConfig { label_smoothing: 0.0, ..config(LossType::Sigmoid) };
    let (gradient, _) = score(&plain, &POLICY[..2], Some(&REFERENCE[..2]));
    let expected = -0.5 / (1.0 + 0.75f64.exp()) / 4.0;
    close(&gradient, &[expected, -expected]);
}

#[test]
fn likelihood_is_a_token_mean() {
    let config =
        RunConfig { training_method: dyad_proto::run_config::TrainingMethod::Sft, ..RunConfig::default() };
    let objective = StepObjective::of(&config).sized(StepSize { pairs: 2.0, chosen_tokens: 8.0 });
    let (gradient, statistics) = weighted_score(&objective, &[-3.0, -5.0], None, &[1.0, 0.5]);
    assert_eq!((gradient, at(&statistics, Statistic::Nll)), (vec![-0.125, -0.0625], 5.5));
}

/// Two records, each followed by its partner's answer: log-ratios 1 and -1, those of the partners -0.5 and 1, so `z` is 0.25. The first is
/// desirable.
#[test]
fn kto_and_apo_zero_of_labelled_answers_match_the_papers() {
    let share = |x: f64| 1.0 / (1.0 + (-x).exp());
    let config = |loss| RunConfig {
        desirable_weight: Some(1.5),
        undesirable_weight: Some(0.75),
        label_smoothing: 0.0,
        ..config(loss)
    };
    let (kto, z) = (config(LossType::Kto), 0.25);
    let (gradient, sums) = score(&kto, &POLICY, Some(&REFERENCE));
    let (first, second) = (share(0.5 * (1.0 - z)), share(0.5 * (z + 1.0)));
    let loss = 1.5 * (1.0 - first) + 0.75 * (1.0 - second);
    assert!((at(&sums, Statistic::Loss) - loss).abs() < 1e-12);
    let slope = |share: f64, weight: f64| 0.5 * weight * share * (1.0 - share) / 4.0;
    close(&gradient, &[-slope(first, 1.5), slope(second, 0.75)]);
    let of = |statistic| at(&sums, statistic);
    assert_eq!((of(Statistic::RewardsChosen), of(Statistic::RewardsRejected)), (0.5, -0.5));
    assert_eq!((of(Statistic::LogpsChosen), of(Statistic::LogpsRejected)), (-3.0, -7.0));
    assert_eq!((of(Statistic::Desirable), of(Statistic::KlEstimate)), (1.0, 2.0 * z));

    // Without partners every sequence is a record: the same answers, and z = 0.
    let apo = objective(&config(LossType::ApoZeroUnpaired));
    let (gradient, sums) = weighted_score(&apo, &[-3.0, -7.0], Some(&[-4.0, -6.0]), &[1.0, 2.0]);
    let (first, second) = (share(0.5), share(0.5));
    let loss = 1.5 * (1.0 - first) + 2.0 * 0.75 * (1.0 - second);
    assert!((at(&sums, Statistic::Loss) - loss).abs() < 1e-12);
    close(&gradient, &[-slope(first, 1.5), 2.0 * slope(second, 0.75)]);
}

/// The estimate is a constant of the step: never below 0, without a gradient.
#[test]
fn the_kl_estimate_of_kto_is_not_negative() {
    let kto = config(LossType::Kto);
    let (gradient, sums) = score(&kto, &POLICY, Some(&[-4.0, -4.0, -6.0, -2.0]));
    assert_eq!((at(&sums, Statistic::KlEstimate), gradient.len()), (0.0, 2));
}
