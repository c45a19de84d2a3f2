//! Cuts pairs that are longer than the run's sequences, or drops them.

use dyad_proto::RunConfig;
use dyad_proto::run_config::TrainOnInputs;
use dyad_proto::wire::PairVerdict;

use crate::tokenized::Tokenized;

/// Limits of a run's sequences, and what is trained of them.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Most tokens of prompt plus completion.
    pub max_len: usize,
    /// Supervised fine-tuning: the rejected answer is ignored.
    pub preferred_only: bool,
    /// Rows of the model's embedding: ids must be less than this.
    pub embedding_rows: u32,
    /// All tokens of a sequence are trained.
    pub train_on_inputs: bool,
    /// Of an output with several messages, the assistant's tokens alone are trained.
    pub assistant_only: bool,
}

impl Rule {
    /// The rule of a run.
    #[must_use]
    pub fn of(config: &RunConfig, max_len: usize, embedding_rows: u32) -> Self {
        Self {
            max_len,
            preferred_only: !config.objective().scores_both_outputs(),
            embedding_rows,
            train_on_inputs: config.train_on_inputs == TrainOnInputs::Yes,
            assistant_only: config.assistant_only_loss,
        }
    }
}

/// Whether pairs with this verdict are trained on.
#[must_use]
pub fn is_trainable(verdict: PairVerdict) -> bool {
    matches!(verdict, PairVerdict::Kept | PairVerdict::Truncated)
}

/// Cuts the end of each sequence; drops the pair if a side has no tokens left to train on, or if both sides are equal.
pub(crate) fn truncate(mut pair: Tokenized, rule: Rule) -> (PairVerdict, Tokenized) {
    let nothing_trained =
        |pair: &Tokenized| pair.chosen_trained() == 0 || !rule.preferred_only && pair.rejected_trained() == 0;
    if pair.prompt.is_empty() || nothing_trained(&pair) {
        return (PairVerdict::DroppedEmpty, pair);
    }
    let Some(room) = rule.max_len.checked_sub(pair.prompt.len()).filter(|&room| room > 0) else {
        return (PairVerdict::DroppedTooLong, pair);
    };
    let cut = pair.chosen.len() > room || pair.rejected.len() > room;
    pair.truncate(room);
    if nothing_trained(&pair) {
        return (PairVerdict::DroppedTooLong, pair);
    }
    // A supervised run does not use the rejected side, so it may equal the chosen one.
    let same = (&pair.chosen, &pair.chosen_untrained) == (&pair.rejected, &pair.rejected_untrained);
    if !rule.preferred_only && same {
        return (PairVerdict::DroppedIdentical, pair);
    }
    (if cut { PairVerdict::Truncated } else { PairVerdict::Kept }, pair)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tokenized::Untrained;

    const RULE: Rule = Rule {
        max_len: 10,
        preferred_only: false,
        embedding_rows: u32::MAX,
        train_on_inputs: false,
        assistant_only: true,
    };

    fn pair(prompt: &[u32], chosen: &[u32], rejected: &[u32]) -> Tokenized {
        Tokenized::new(prompt.to_vec(), chosen.to_vec(), rejected.to_vec())
    }

    #[test]
    fn a_pair_without_a_trained_token_within_the_limit_is_dropped() {
        let masked = |rejected: &[bool]| Tokenized {
            rejected_untrained: Untrained::of(rejected),
            ..pair(&[1; 7], &[2, 3, 4, 5], &[6, 7, 8, 9])
        };
        assert_eq!(truncate(masked(&[false; 4]), RULE).0, PairVerdict::DroppedEmpty);
        assert_eq!(truncate(masked(&[false, false, false, true]), RULE).0, PairVerdict::DroppedTooLong);
        let (verdict, cut) = truncate(masked(&[false, true, false, true]), RULE);
        assert_eq!((verdict, cut.rejected_trained()), (PairVerdict::Truncated, 1));
        assert_eq!(
            truncate(masked(&[false; 4]), Rule { preferred_only: true, ..RULE }).0,
            PairVerdict::Truncated
        );
    }

    #[test]
    fn pairs_with_equal_sides_are_dropped_also_after_truncation() {
        let verdict = |pair, rule| truncate(pair, rule).0;
        assert_eq!(verdict(pair(&[1], &[2, 3], &[2, 3]), RULE), PairVerdict::DroppedIdentical);
        let late = || pair(&[1; 8], &[2, 3, 4], &[2, 3, 5]);
        assert_eq!(verdict(late(), RULE), PairVerdict::DroppedIdentical);
        assert_eq!(verdict(late(), Rule { max_len: 11, ..RULE }), PairVerdict::Kept);
        let cut_to_a_prefix = pair(&[1; 8], &[2, 3], &[2, 3, 5]);
        assert_eq!(verdict(cut_to_a_prefix, RULE), PairVerdict::DroppedIdentical);
        let sft = Rule { preferred_only: true, ..RULE };
        assert_eq!(verdict(pair(&[1], &[2], &[2]), sft), PairVerdict::Kept);
    }

    proptest! {
        #[test]
        fn a_kept_pair_fits_and_has_something_to_train_on(p in 0usize..20, c in 0usize..20, r in 0usize..20, max in 1usize..30) {
            let pair = Tokenized::new(vec![1; p], vec![2; c], vec![3; r]);
            let (verdict, cut) = truncate(pair.clone(), Rule { max_len: max, ..RULE });
            match verdict {
                PairVerdict::Kept => prop_assert_eq!(&cut, &pair),
                PairVerdict::Truncated => prop_assert!(p + c.max(r) > max),
                PairVerdict::DroppedTooLong => prop_assert!(p >= max),
                PairVerdict::DroppedEmpty => prop_assert!(p == 0 || c == 0 || r == 0),
                _ => prop_assert!(false),
            }
            if is_trainable(verdict) {
                prop_assert!(!cut.chosen.is_empty() && !cut.rejected.is_empty());
                prop_assert!(cut.prompt.len() + cut.chosen.len().max(cut.rejected.len()) <= max);
            }
        }
    }
}
