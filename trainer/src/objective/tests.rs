//! Compares every loss with its paper's formula, and every derivative with finite differences.

use super::*;

const TOKENS: [i64; 4] = [4, 2, 8, 3];
const POLICY: [f64; 4] = [-3.0, -5.0, -7.0, -2.5];
const REFERENCE: [f64; 4] = [-4.0, -4.5, -6.0, -3.5];

fn objective(loss: LossType) -> StepObjective {
    let options = LossOptions { beta: 0.5, simpo_gamma: 0.3 };
    StepObjective { objective: Objective::Preference(loss), options, divisor: 4.0 }
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_kind(Kind::Double).try_into().unwrap()
}

fn score(objective: StepObjective, policy: &[f64], reference: Option<&[f64]>) -> (Vec<f64>, Vec<f64>) {
    let (policy, lengths) = (Tensor::from_slice(policy), Tensor::from_slice(&TOKENS[..policy.len()]));
    let reference = reference.map(Tensor::from_slice);
    let sequences = SequenceLogps { policy: &policy, reference: reference.as_ref(), lengths: &lengths };
    let scored = objective.score(&sequences);
    (values(&scored.gradient), values(scored.statistics.tensor()))
}

fn close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    let near = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-12;
    assert!(found.iter().zip(expected).all(near), "{found:?} is not {expected:?}");
}

#[test]
fn equal_models_lose_ln_2_and_have_no_reward() {
    let (_, statistics) = score(objective(LossType::Sigmoid), &POLICY, Some(&POLICY));
    close(&statistics, &[2.0 * std::f64::consts::LN_2, 0.0, 0.0, 0.0, -10.0, -7.5, 1.0, 0.0, 0.0]);
}

/// Each paper's formula, computed by hand in float64.
#[test]
fn losses_and_rewards_match_the_papers() {
    let softplus = |x: f64| x.exp().ln_1p();
    // Log-ratios 1, -0.5 and -1, 1.
    let expected = [
        (LossType::Sigmoid, softplus(-0.75) + softplus(1.0), [0.0, 0.25]),
        (
            LossType::Ipo,
            (1.0 / 4.0 + 0.5 / 2.0 - 1.0f64).powi(2) + (-1.0 / 8.0 - 1.0 / 3.0 - 1.0f64).powi(2),
            [0.0, 0.25],
        ),
        (
            LossType::Simpo,
            softplus(-(0.5 * (-3.0 / 4.0 + 5.0 / 2.0) - 0.3))
                + softplus(-(0.5 * (-7.0 / 8.0 + 2.5 / 3.0) - 0.3)),
            [0.5 * (-3.0 / 4.0 - 7.0 / 8.0), 0.5 * (-5.0 / 2.0 - 2.5 / 3.0)],
        ),
    ];
    for (loss, sum, rewards) in expected {
        let (_, statistics) = score(objective(loss), &POLICY, Some(&REFERENCE));
        close(&statistics[..3], &[sum, rewards[0], rewards[1]]);
        assert_eq!(statistics[Statistic::RewardsCorrect as usize], 1.0, "{loss:?}");
    }
}

#[test]
fn derivatives_match_finite_differences() {
    for loss in [LossType::Sigmoid, LossType::Ipo, LossType::Simpo] {
        let (gradient, _) = score(objective(loss), &POLICY, Some(&REFERENCE));
        for at in 0..POLICY.len() {
            let moved = |by: f64| {
                let mut policy = POLICY;
                policy[at] += by;
                score(objective(loss), &policy, Some(&REFERENCE)).1[Statistic::Loss as usize]
            };
            let expected = (moved(1e-5) - moved(-1e-5)) / 2e-5 / 4.0;
            assert!(
                (gradient[at] - expected).abs() < 1e-8,
                "{loss:?}, {at}: {} is not {expected}",
                gradient[at]
            );
        }
    }
}

#[test]
fn a_missing_reference_counts_as_zeros() {
    let zeros = [0.0; 4];
    for loss in [LossType::Sigmoid, LossType::Ipo, LossType::Simpo] {
        assert_eq!(
            score(objective(loss), &POLICY, None),
            score(objective(loss), &POLICY, Some(&zeros)),
            "{loss:?}"
        );
    }
}

/// dL/dc = -beta sigmoid(-margin) / pairs, dL/dr its negative.
#[test]
fn the_gradient_of_dpo_has_the_closed_form() {
    let (gradient, _) = score(objective(LossType::Sigmoid), &POLICY[..2], Some(&REFERENCE[..2]));
    let expected = -0.5 / (1.0 + 0.75f64.exp()) / 4.0;
    close(&gradient, &[expected, -expected]);
}

#[test]
fn likelihood_is_a_token_mean() {
    let objective =
        StepObjective { objective: Objective::Likelihood, divisor: 8.0, ..objective(LossType::Sigmoid) };
    let (gradient, statistics) = score(objective, &[-3.0, -5.0], None);
    assert_eq!((gradient, statistics[Statistic::Loss as usize]), (vec![-0.125, -0.125], 8.0));
}
