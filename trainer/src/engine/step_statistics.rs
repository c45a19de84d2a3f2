//! Sums over the micro-batches of a step.

use dyad_data::tokenized::Tokenized;
use dyad_proto::run_config::Objective;
use dyad_proto::wire::{PreferenceSums, ReferenceLogps};
use tch::{Kind, Tensor};

use super::reference::{ReferenceSide, by_pair};
use crate::batch::TokenCounts;
use crate::objective::head::Scores;
use crate::objective::statistics::{DeviceSums, HostSums, Statistic};
use dyad_torch::transfer::read;

/// Sums over the micro-batches of a step.
#[derive(Debug)]
pub(super) struct StepStatistics {
    pub(super) sums: DeviceSums,
    /// Completion tokens that the reference model was run on, and those of chosen outputs among them.
    pub(super) kl_tokens: u64,
    pub(super) kl_chosen_tokens: u64,
    pub(super) tokens: TokenCounts,
    /// Number of pairs of each micro-batch, and their reference log-probabilities if the reference model was asked.
    pub(super) references: Vec<(usize, Option<Tensor>)>,
}

impl StepStatistics {
    pub(super) fn add(&mut self, scores: &Scores, reference: &ReferenceSide, pairs: &[&Tokenized]) {
        // Adds on the device: a step waits for the device only once, at its end.
        self.sums.add(&scores.statistics);
        if matches!(reference, ReferenceSide::Rows(_)) {
            let chosen: usize = pairs.iter().map(|pair| pair.side_tokens().0).sum();
            let rejected: usize = pairs.iter().map(|pair| pair.side_tokens().1).sum();
            self.kl_chosen_tokens += chosen as u64;
            self.kl_tokens += (chosen + rejected) as u64;
        }
    }

    /// Keeps the reference log-probabilities of a micro-batch.
    pub(super) fn keep_references(&mut self, logps: Option<Tensor>, pairs: usize) {
        self.references.push((pairs, logps));
    }

    /// Waits for the device, once, and reads all sums.
    pub(super) fn read(&self, grad_norm: &Tensor) -> StepResults {
        let sums = self.sums.tensor();
        let device = sums.device();
        let grad_norm = grad_norm.to_device(device).to_kind(Kind::Double).view([1]);
        let logps = self.references.iter().filter_map(|(_, logps)| logps.as_ref());
        let everything: Vec<&Tensor> = [sums, &grad_norm].into_iter().chain(logps).collect();
        let mut values = read(&Tensor::cat(&everything, 0)).into_iter();
        let sums: Vec<f64> = values.by_ref().take(Statistic::COUNT).collect();
        let grad_norm = values.next().unwrap_or(f64::NAN);
        let mut said = by_pair(&values.collect::<Vec<f64>>()).into_iter();
        let of_batch = |(pairs, logps): &(usize, Option<Tensor>)| -> Vec<Option<ReferenceLogps>> {
            (0..*pairs).map(|_| logps.as_ref().and_then(|_| said.next())).collect()
        };
        StepResults {
            sums: HostSums::of(&sums),
            grad_norm,
            references: self.references.iter().flat_map(of_batch).collect(),
        }
    }
}

/// Results of a step's passes, on the host.
#[derive(Debug)]
pub(super) struct StepResults {
    pub(super) sums: HostSums,
    pub(super) grad_norm: f64,
    /// Reference log-probabilities by pair; `None` where the reference model was not asked.
    pub(super) references: Vec<Option<ReferenceLogps>>,
}

/// Combines the sums from the device with counts that the host knows.
pub(super) fn sums(
    totals: &StepStatistics,
    values: &HostSums,
    pairs: &[Tokenized],
    objective: Objective,
) -> PreferenceSums {
    let count = |lengths: &dyn Fn(&Tokenized) -> usize| pairs.iter().map(lengths).sum::<usize>() as u64;
    let chosen_tokens = count(&|pair| pair.side_tokens().0);
    let rejected_tokens = count(&|pair| pair.side_tokens().1);
    let one_answer = || count(&|pair| pair.prompt.len() + pair.chosen.len());
    let (completion_tokens, tokens) = match (objective.scores_both_outputs(), objective.is_labelled()) {
        (true, _) => (
            chosen_tokens + rejected_tokens,
            count(&|pair| 2 * pair.prompt.len() + pair.chosen.len() + pair.rejected.len()),
        ),
        (_, true) => (chosen_tokens + rejected_tokens, one_answer()),
        (_, false) => (chosen_tokens, one_answer()),
    };
    PreferenceSums {
        pairs: pairs.len() as u64,
        loss: values.get(Statistic::Loss),
        nll: values.get(Statistic::Nll),
        rewards_chosen: values.get(Statistic::RewardsChosen),
        rewards_rejected: values.get(Statistic::RewardsRejected),
        rewards_correct: values.get(Statistic::RewardsCorrect) as u64,
        logps_chosen: values.get(Statistic::LogpsChosen),
        logps_rejected: values.get(Statistic::LogpsRejected),
        logps_correct: values.get(Statistic::LogpsCorrect) as u64,
        kl_chosen: values.get(Statistic::KlChosen),
        kl_rejected: values.get(Statistic::KlRejected),
        logits_chosen: values.get(Statistic::LogitsChosen),
        logits_rejected: values.get(Statistic::LogitsRejected),
        entropy: values.get(Statistic::Entropy),
        chosen_tokens_correct: values.get(Statistic::ChosenTokensCorrect) as u64,
        aux_loss: values.get(Statistic::AuxLoss),
        desirable: values.get(Statistic::Desirable) as u64,
        kl_estimate: values.get(Statistic::KlEstimate),
        completion_tokens,
        chosen_tokens,
        tokens,
        kl_tokens: totals.kl_tokens,
        kl_chosen_tokens: totals.kl_chosen_tokens,
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use dyad_torch::transfer::upload;

    use super::*;

    /// One read returns everything in order, also if only some micro-batches asked the reference.
    #[test]
    fn step_results_come_in_one_read() {
        let values = |values: &[f64]| upload(values, Device::Cpu);
        let mut totals = StepStatistics {
            sums: DeviceSums::of(&[(Statistic::Entropy, Tensor::from(7.0))], Device::Cpu),
            kl_tokens: 0,
            kl_chosen_tokens: 0,
            tokens: TokenCounts::default(),
            references: Vec::new(),
        };
        totals.keep_references(Some(values(&[-1.0, -2.0, -3.0, -4.0])), 2);
        totals.keep_references(None, 1);
        totals.keep_references(Some(values(&[-5.0, -6.0])), 1);
        let found = totals.read(&values(&[9.0]));
        assert_eq!((found.sums.get(Statistic::Entropy), found.grad_norm), (7.0, 9.0));
        let logps = |chosen, rejected| Some(ReferenceLogps { chosen, rejected });
        assert_eq!(found.references, [logps(-1.0, -2.0), logps(-3.0, -4.0), None, logps(-5.0, -6.0)]);
    }
}
