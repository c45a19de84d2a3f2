//! Sums that a step reports, by name.

use tch::{Device, Kind, Tensor};

/// A sum over sequences, pairs or tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statistic {
    /// Loss of each pair, without the likelihood term.
    Loss,
    /// Negative log-likelihood of each token of the chosen outputs, if the loss has this term.
    Nll,
    /// Rewards of the chosen outputs.
    RewardsChosen,
    /// Rewards of the rejected outputs.
    RewardsRejected,
    /// Pairs whose chosen output has the larger reward.
    RewardsCorrect,
    /// Log-probabilities of the chosen outputs.
    LogpsChosen,
    /// Log-probabilities of the rejected outputs.
    LogpsRejected,
    /// Pairs whose chosen output has the larger log-probability.
    LogpsCorrect,
    /// KL divergence of policy and reference, of each token of the chosen outputs.
    KlChosen,
    /// The same, of the rejected outputs.
    KlRejected,
    /// Mean of the logits, of each token of the chosen outputs.
    LogitsChosen,
    /// The same, of the rejected outputs.
    LogitsRejected,
    /// Entropy of the policy's distribution, of each completion token.
    Entropy,
    /// Tokens of the chosen outputs that are the policy's most likely ones.
    ChosenTokensCorrect,
    /// Labelled answers that are desirable.
    Desirable,
    /// Of each labelled answer, the step's estimate of the KL divergence of policy and reference.
    KlEstimate,
    /// Terms of the loss that layers add, already divided as the step's loss is.
    AuxLoss,
}

impl Statistic {
    /// Number of statistics.
    pub const COUNT: usize = Self::AuxLoss as usize + 1;
}

/// All statistics, on the device that computes them. `[Statistic::COUNT]`, float64
#[derive(Debug)]
pub struct DeviceSums(Tensor);

impl DeviceSums {
    /// All zero.
    #[must_use]
    pub fn zeros(device: Device) -> Self {
        Self(Tensor::zeros([Statistic::COUNT as i64], (Kind::Double, device)))
    }

    /// These sums; all others are zero.
    #[must_use]
    pub fn of(sums: &[(Statistic, Tensor)], device: Device) -> Self {
        let zero = Tensor::zeros([], (Kind::Double, device));
        let mut all = [&zero; Statistic::COUNT];
        for (statistic, sum) in sums {
            all[*statistic as usize] = sum;
        }
        Self(Tensor::stack(&all, 0))
    }

    /// Adds others, without waiting for the device.
    pub fn add(&mut self, other: &Self) {
        self.0 += &other.0;
    }

    /// The sums as a tensor on the device.
    pub fn tensor(&self) -> &Tensor {
        &self.0
    }
}

/// All statistics, on the host.
#[derive(Clone, Debug)]
pub struct HostSums([f64; Statistic::COUNT]);

impl HostSums {
    /// From the values of [`DeviceSums::tensor`]; NaN for missing ones.
    #[must_use]
    pub fn of(values: &[f64]) -> Self {
        Self(std::array::from_fn(|index| values.get(index).copied().unwrap_or(f64::NAN)))
    }

    /// Returns one sum.
    #[must_use]
    pub fn get(&self, statistic: Statistic) -> f64 {
        self.0[statistic as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_found_by_their_names() {
        let one = |value: f64| Tensor::from(value);
        let mut sums =
            DeviceSums::of(&[(Statistic::LogpsChosen, one(-3.0)), (Statistic::Loss, one(2.0))], Device::Cpu);
        sums.add(&DeviceSums::of(
            &[(Statistic::Loss, one(0.5)), (Statistic::Entropy, one(7.0))],
            Device::Cpu,
        ));
        let values: Vec<f64> = sums.tensor().try_into().unwrap();
        let sums = HostSums::of(&values);
        let found = [Statistic::Loss, Statistic::LogpsChosen, Statistic::Entropy, Statistic::RewardsChosen];
        assert_eq!(found.map(|statistic| sums.get(statistic)), [2.5, -3.0, 7.0, 0.0]);
        assert!(HostSums::of(&values[..3]).get(Statistic::Entropy).is_nan());
    }
}
