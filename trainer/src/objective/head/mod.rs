//! Log-probabilities of completion tokens, their loss and its gradient, without logits of the whole batch.
//!
//! Only completion positions reach the LM head, in tiles of whole pairs. With `z = W h`, `l = z[y] - lse(z)`, `a = dL/dl` (one number per
//! sequence) and errors `e = softmax(z) - onehot(y)`: `dh = -a Wᵀ e`, `dW += e (-a h)ᵀ`. So no tensor of the vocabulary's width has to
//! wait for `a` or be multiplied by it. A pair that fits into a tile is scored and differentiated from the same logits. For a longer
//! pair, a trained head computes the logits again; a frozen head does not. Log-sum-exps are float32 for every precision of the passes,
//! sums over tokens are float64.

use tch::{Device, Kind, Tensor};

use super::logps::OwnedLogps;
use super::statistics::{DeviceSums, Statistic};
use super::{Scored, StepObjective, TokenReading};
use crate::batch::MicroBatch;
use crate::batch::micro_batch::CHOSEN;
use dyad_families::shape::{GPU_TILE_BYTES, TILE_BYTES};
use dyad_torch::backend::Backend;
use dyad_torch::ops::head_tile::{self, RowFact, Wanted};
use dyad_torch::ops::product;

/// One model's side of the head: normed rows and the projection.
#[derive(Clone, Copy, Debug)]
pub struct Scorer<'a> {
    /// `[rows, hidden]`.
    pub rows: &'a Tensor,
    /// `[vocab, hidden]`.
    pub weight: &'a Tensor,
}

impl Scorer<'_> {
    /// `[len, vocab]`, in the precision of the passes.
    fn logits(&self, span: RowSpan) -> Tensor {
        product::project(&self.rows.narrow(0, span.start, span.len), self.weight, None)
    }
}

#[derive(Clone, Copy, Debug)]
struct RowSpan {
    start: i64,
    len: i64,
}

/// Where the gradients of a training pass go.
#[derive(Debug)]
pub struct HeadGradients<'a> {
    /// `[rows, hidden]`, overwritten.
    pub rows: Tensor,
    /// `[vocab, hidden]` float32, added to; `None` if the head is frozen.
    pub weight: Option<&'a Tensor>,
}

/// Where the reference's log-probabilities come from.
#[derive(Clone, Copy, Debug)]
pub enum Reference<'a> {
    /// The objective has no reference model.
    Absent,
    /// Computed together with the policy's, and with the divergence between the two.
    Model(Scorer<'a>),
    /// Already known. `[sequences]`, float64
    Known(&'a Tensor),
}

/// What decides the gradients of a micro-batch.
#[derive(Clone, Copy, Debug)]
pub enum Scoring<'a> {
    /// The objective, applied to each group of pairs.
    Objective(&'a StepObjective),
    /// Results of the objective that are already known, of the pairs of this micro-batch.
    Known(&'a Scored, TokenReading),
}

impl Scoring<'_> {
    fn reading(&self) -> TokenReading {
        match self {
            Self::Objective(objective) => objective.token_reading(),
            Self::Known(_, reading) => *reading,
        }
    }
}

/// Results of scoring a micro-batch.
#[derive(Debug)]
pub struct Scores {
    /// Sums over the micro-batch.
    pub statistics: DeviceSums,
    /// Log-probabilities under the reference model, if it was run. `[sequences]`, float64
    pub reference_logps: Option<Tensor>,
}

impl Scores {
    /// Scores of an empty micro-batch.
    #[must_use]
    pub fn none(device: Device) -> Self {
        Self { statistics: DeviceSums::zeros(device), reference_logps: None }
    }
}

/// Log-probability of each sequence of a micro-batch under one model, in which tokens beyond the length of the shorter output have
/// weight `tail_weight` of `reading`. `[sequences]`, float64
pub fn sequence_logps(batch: &MicroBatch, scorer: Scorer<'_>, reading: TokenReading) -> Tensor {
    tch::no_grad(|| {
        let tile_rows = tile_rows(scorer.weight);
        let groups = groups(&batch.rows_per_pair, tile_rows).into_iter();
        let logps: Vec<Tensor> = groups
            .map(|span| {
                let reference = Reference::Absent;
                let group = RowGroup { batch, span, tile_rows, policy: scorer, reference, reading };
                group.first_pass(&group.local_sequences(), None, false).logps.policy
            })
            .collect();
        match logps.is_empty() {
            true => Tensor::zeros([0], (Kind::Double, scorer.rows.device())),
            false => Tensor::cat(&logps, 0),
        }
    })
}

/// Scores a micro-batch. In a training pass, fills `gradients`.
pub fn score_batch(
    batch: &MicroBatch,
    scoring: Scoring<'_>,
    policy: Scorer<'_>,
    reference: Reference<'_>,
    mut gradients: Option<&mut HeadGradients<'_>>,
) -> Scores {
    tch::no_grad(|| {
        let mut statistics = DeviceSums::zeros(policy.rows.device());
        let mut reference_logps = Vec::new();
        let tile_rows = tile_rows(policy.weight);
        for group in groups(&batch.rows_per_pair, tile_rows) {
            let reading = scoring.reading();
            let group = RowGroup { batch, span: group, tile_rows, policy, reference, reading };
            let scored = group.run(scoring, gradients.as_deref_mut());
            statistics.add(&scored.statistics);
            reference_logps.extend(scored.reference_logps);
        }
        let reference_logps = (!reference_logps.is_empty()).then(|| Tensor::cat(&reference_logps, 0));
        Scores { statistics, reference_logps }
    })
}

/// Log-probabilities of a micro-batch and the sums over its tokens, without applying an objective.
#[derive(Debug)]
pub struct Collected {
    /// Log-probabilities of each sequence.
    pub logps: OwnedLogps,
    /// Sums over tokens, and the reference model's log-probabilities.
    pub scores: Scores,
}

/// Reads a micro-batch for an objective that is applied later, to all pairs of a step.
pub fn collect_batch(
    batch: &MicroBatch,
    reading: TokenReading,
    policy: Scorer<'_>,
    reference: Reference<'_>,
) -> Collected {
    tch::no_grad(|| {
        let mut scores = Scores::none(policy.rows.device());
        let mut all = Vec::new();
        let tile_rows = tile_rows(policy.weight);
        for span in groups(&batch.rows_per_pair, tile_rows) {
            let group = RowGroup { batch, span, tile_rows, policy, reference, reading };
            let sequences = group.local_sequences();
            let sums = group.first_pass(&sequences, None, true);
            if let Some(facts) = &sums.facts {
                scores.statistics.add(&group.token_sums(facts, &sequences));
            }
            all.push(sums.logps);
        }
        let logps = OwnedLogps::joined(&all, policy.rows.device());
        scores.reference_logps =
            matches!(reference, Reference::Model(_)).then(|| logps.reference.shallow_clone());
        Collected { logps, scores }
    })
}

fn tile_rows(weight: &Tensor) -> i64 {
    // Fused kernels read logits as they are; composed ones widen them to float32 first.
    let width = if Backend::of_logits(weight) != Backend::Torch {
        weight.kind().elt_size_in_bytes() as i64
    } else {
        4
    };
    let bytes = if weight.device().is_cuda() { GPU_TILE_BYTES } else { TILE_BYTES } as i64;
    (bytes / (width * weight.size()[0])).max(1)
}

/// Runs of whole pairs with at most `tile_rows` rows; a longer pair gets its own run.
fn groups(rows_per_pair: &[i64], tile_rows: i64) -> Vec<RowSpan> {
    let mut groups: Vec<RowSpan> = Vec::new();
    let mut start = 0;
    for &rows in rows_per_pair {
        match groups.last_mut() {
            Some(group) if group.len + rows <= tile_rows => group.len += rows,
            _ => groups.push(RowSpan { start, len: rows }),
        }
        start += rows;
    }
    groups
}

struct RowGroup<'a> {
    batch: &'a MicroBatch,
    span: RowSpan,
    tile_rows: i64,
    policy: Scorer<'a>,
    reference: Reference<'a>,
    reading: TokenReading,
}

/// Results of the first pass over a group.
struct Sums {
    /// Of each sequence of the group.
    logps: OwnedLogps,
    /// Facts about each row of the group; `None` if only log-probabilities were asked for. `[rows, RowFact::COUNT]`, float64
    facts: Option<Tensor>,
    /// Errors of the only tile, kept for the second pass.
    kept: Option<Tensor>,
}

impl RowGroup<'_> {
    fn run(&self, scoring: Scoring<'_>, mut gradients: Option<&mut HeadGradients<'_>>) -> Scores {
        let sequences = self.local_sequences();
        let describes = matches!(scoring, Scoring::Objective(_));
        let mut sums = self.first_pass(&sequences, gradients.as_deref_mut(), describes);
        let scored = match scoring {
            Scoring::Objective(objective) => tch::with_grad(|| objective.score(&sums.logps.read())),
            Scoring::Known(scored, _) => {
                let per_pair = self.batch.sequences_per_pair;
                scored.narrow(self.first_sequence() / per_pair, self.sequence_count() / per_pair)
            }
        };
        if let Some(gradients) = gradients {
            let coefficients = self.coefficients(&scored, &sequences);
            match gradients.weight {
                Some(weight) => self.second_pass(&coefficients, sums.kept, &gradients.rows, weight),
                None => {
                    let mut rows = gradients.rows.narrow(0, self.span.start, self.span.len);
                    rows.copy_(&scaled(&rows, &coefficients));
                }
            }
        }
        let mut statistics = DeviceSums::zeros(self.policy.rows.device());
        if let Some(facts) = sums.facts.take() {
            statistics = scored.statistics();
            statistics.add(&self.token_sums(&facts, &sequences));
        }
        let reference_logps = self.reference_model().map(|_| sums.logps.reference.shallow_clone());
        Scores { statistics, reference_logps }
    }

    /// Sums over the tokens of each output.
    fn token_sums(&self, facts: &Tensor, sequences: &Tensor) -> DeviceSums {
        // Answers of partners have a side of their own, which no metric reads.
        let sides = Tensor::zeros([3, RowFact::COUNT], (facts.kind(), facts.device()));
        let side_of_row = self.of_sequences(&self.batch.sides).index_select(0, sequences);
        let sides = sides.index_add(0, &side_of_row, facts);
        let at = |side: i64, fact: RowFact| sides.select(0, side).select(0, fact as i64);
        let sums = [
            (Statistic::KlChosen, at(0, RowFact::Kl)),
            (Statistic::KlRejected, at(1, RowFact::Kl)),
            (Statistic::LogitsChosen, at(0, RowFact::MeanLogit)),
            (Statistic::LogitsRejected, at(1, RowFact::MeanLogit)),
            (Statistic::Entropy, at(0, RowFact::Entropy) + at(1, RowFact::Entropy)),
            (Statistic::ChosenTokensCorrect, at(0, RowFact::IsTop1)),
        ];
        DeviceSums::of(&sums, facts.device())
    }

    /// `dL/d(log-probability)` of each row. `[rows]`
    fn coefficients(&self, scored: &Scored, sequences: &Tensor) -> Tensor {
        let of_rows = |gradient: &Tensor| gradient.index_select(0, sequences);
        let mut all = of_rows(&scored.gradient);
        if let Some(weights) = self.row_weights() {
            all *= weights;
        }
        if let Some(gradient) = &scored.likelihood_gradient {
            all += of_rows(gradient);
        }
        all
    }

    /// Weight of each row in its sequence's log-probability; `None` if all are 1. `[rows]`
    fn row_weights(&self) -> Option<Tensor> {
        self.reading.tail_weight.map(|weight| {
            let tails = self.batch.tails.narrow(0, self.span.start, self.span.len);
            tails.to_kind(Kind::Double) * (weight - 1.0) + 1.0
        })
    }

    /// Factors of the pairs' losses. `[pairs]`
    fn weights(&self) -> Tensor {
        let per_pair = self.batch.sequences_per_pair;
        self.batch.weights.narrow(0, self.first_sequence() / per_pair, self.sequence_count() / per_pair)
    }

    /// 1 for pairs whose first output is preferred or desirable. `[pairs]`
    fn desirable(&self) -> Tensor {
        let sides = self.of_sequences(&self.batch.sides).view([-1, self.batch.sequences_per_pair]);
        sides.select(1, 0).eq(CHOSEN).to_kind(Kind::Double)
    }

    /// Sequence of each row, counted from the group's first.
    fn local_sequences(&self) -> Tensor {
        let sequences = self.batch.sequences.narrow(0, self.span.start, self.span.len);
        &sequences - sequences.min()
    }

    fn tiles(&self) -> Vec<RowSpan> {
        let end = self.span.start + self.span.len;
        (self.span.start..end)
            .step_by(self.tile_rows as usize)
            .map(|start| RowSpan { start, len: self.tile_rows.min(end - start) })
            .collect()
    }

    fn targets(&self, tile: RowSpan) -> Tensor {
        self.batch.targets.narrow(0, tile.start, tile.len)
    }

    fn first_pass(&self, sequences: &Tensor, gradients: Option<&mut HeadGradients<'_>>, facts: bool) -> Sums {
        let tiles = self.tiles();
        let frozen = gradients.as_ref().is_some_and(|gradients| gradients.weight.is_none());
        let keep = gradients.is_some() && (frozen || tiles.len() == 1);
        let (mut logps, mut reference_logps, mut all_facts) = (Vec::new(), Vec::new(), Vec::new());
        let (wanted, mut kept) = (Wanted { errors: keep, facts }, None);
        for tile in tiles {
            let targets = self.targets(tile);
            let reference = self.reference_model().map(|reference| reference.logits(tile));
            let scored = head_tile::score(self.policy.logits(tile), reference, &targets, wanted);
            logps.push(scored.logps);
            reference_logps.extend(scored.reference_logps);
            all_facts.extend(scored.facts);
            match (scored.errors, &gradients) {
                (Some(errors), Some(gradients)) if frozen => {
                    gradients.rows.narrow(0, tile.start, tile.len).copy_(&self.directions(errors));
                }
                (errors, _) => kept = errors,
            }
        }
        let facts = facts.then(|| Tensor::cat(&all_facts, 0).to_kind(Kind::Double));
        let reference = self.reference_model().map(|_| Tensor::cat(&reference_logps, 0));
        let logps = self.of_rows(sequences, &Tensor::cat(&logps, 0), reference.as_ref(), facts.as_ref());
        Sums { logps, facts, kept }
    }

    /// Log-probabilities of the group's sequences from those of its rows.
    fn of_rows(
        &self,
        sequences: &Tensor,
        logps: &Tensor,
        reference: Option<&Tensor>,
        facts: Option<&Tensor>,
    ) -> OwnedLogps {
        // Rows of a sequence are contiguous and few: the order of this sum does not depend on how rows were tiled.
        let options = (Kind::Double, logps.device());
        let count = self.sequence_count();
        let per_sequence = |rows: &Tensor| Tensor::zeros([count], options).index_add(0, sequences, rows);
        let weights = self.row_weights();
        let weighted = |rows: &Tensor| match &weights {
            Some(weights) => per_sequence(&(rows * weights)),
            None => per_sequence(rows),
        };
        let known = match self.reference {
            Reference::Known(logps) => Some(self.of_sequences(logps)),
            Reference::Absent | Reference::Model(_) => None,
        };
        let lengths = self.of_sequences(&self.batch.lengths);
        let alignment = facts.filter(|_| self.reading.alignment).map(|facts| {
            let aligned = logps - facts.select(1, RowFact::LogSumSq as i64);
            per_sequence(&aligned) / lengths.to_kind(Kind::Double).clamp_min(1.0)
        });
        OwnedLogps {
            policy: weighted(logps),
            likelihood: per_sequence(logps),
            reference: reference.map(weighted).or(known).unwrap_or_else(|| Tensor::zeros([count], options)),
            lengths,
            weights: self.weights(),
            desirable: self.desirable(),
            alignment,
        }
    }

    /// `-dh / a = Wᵀ e`.
    fn directions(&self, errors: Tensor) -> Tensor {
        let weight = self.policy.weight;
        product::times(&errors.to_kind(weight.kind()), weight)
    }

    fn reference_model(&self) -> Option<Scorer<'_>> {
        match self.reference {
            Reference::Model(scorer) => Some(scorer),
            Reference::Absent | Reference::Known(_) => None,
        }
    }

    /// This group's part of a list with one entry per sequence of the batch.
    fn of_sequences(&self, all: &Tensor) -> Tensor {
        all.narrow(0, self.first_sequence(), self.sequence_count())
    }

    /// Number of sequences in the group, computed on the host without waiting for the device.
    fn sequence_count(&self) -> i64 {
        self.sequences_before(self.span.start + self.span.len) - self.first_sequence()
    }

    fn first_sequence(&self) -> i64 {
        self.sequences_before(self.span.start)
    }

    /// Number of sequences of the pairs that begin before a row of the batch.
    fn sequences_before(&self, row: i64) -> i64 {
        let (mut start, mut pairs) = (0, 0);
        for &rows in self.batch.rows_per_pair.iter() {
            pairs += i64::from(start < row);
            start += rows;
        }
        pairs * self.batch.sequences_per_pair
    }

    fn second_pass(&self, coefficients: &Tensor, mut kept: Option<Tensor>, rows: &Tensor, weight: &Tensor) {
        for tile in self.tiles() {
            let errors = kept.take().or_else(|| {
                // Computes the logits a second time, for the errors alone.
                let wanted = Wanted { errors: true, facts: false };
                head_tile::score(self.policy.logits(tile), None, &self.targets(tile), wanted).errors
            });
            let Some(errors) = errors.map(|errors| errors.to_kind(self.policy.weight.kind())) else {
                continue;
            };
            let a = coefficients.narrow(0, tile.start - self.span.start, tile.len);
            let inputs = scaled(&self.policy.rows.narrow(0, tile.start, tile.len), &a);
            product::add_outer(weight, &errors, &inputs);
            rows.narrow(0, tile.start, tile.len).copy_(&scaled(&self.directions(errors), &a));
        }
    }
}

/// Rows `[rows, width]` times `-a` `[rows]`: multiplied in float32, rounded once.
fn scaled(rows: &Tensor, a: &Tensor) -> Tensor {
    (rows * (-a).to_kind(Kind::Float).unsqueeze(1)).to_kind(rows.kind())
}

#[cfg(test)]
mod tests {
    use dyad_data::tokenized::Tokenized;
    use dyad_proto::RunConfig;

    use super::*;
    use crate::batch::PairLayout;
    use crate::objective::StepSize;

    const VOCAB: i64 = 11;

    fn batch() -> MicroBatch {
        let pair = |n: u32| Tokenized::new(vec![1, 2], vec![n, 4, 5], vec![6, n]);
        MicroBatch::pack(&[&pair(3), &pair(7), &pair(9)], PairLayout::SharedPairs, Device::Cpu)
    }

    fn dpo(dpo_beta: f64, pairs: f64) -> StepObjective {
        let config = RunConfig { dpo_beta, ..RunConfig::default() };
        StepObjective::of(&config).sized(StepSize { pairs, chosen_tokens: 9.0 })
    }

    fn close(a: &Tensor, b: &Tensor) {
        let worst = (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[]);
        assert!(worst < 1e-5, "differs by {worst}");
    }

    /// Compares the closed form with autograd through full logits, for one tile and for tiles smaller than a pair.
    #[test]
    fn gradients_equal_those_through_full_logits() {
        tch::manual_seed(0);
        let batch = batch();
        let options = (Kind::Float, Device::Cpu);
        let rows = Tensor::randn([batch.rows.size()[0], 4], options);
        let (weight, other) = (Tensor::randn([VOCAB, 4], options), Tensor::randn([VOCAB, 4], options));
        let objective = dpo(0.3, 5.0);

        let (leaf_rows, leaf_weight) =
            (rows.copy().set_requires_grad(true), weight.copy().set_requires_grad(true));
        let token = |rows: &Tensor, weight: &Tensor| {
            rows.matmul(&weight.tr())
                .log_softmax(-1, Kind::Float)
                .gather(1, &batch.targets.unsqueeze(1), false)
                .squeeze_dim(1)
        };
        let sequence = |tokens: &Tensor| Tensor::zeros([6], options).index_add(0, &batch.sequences, tokens);
        let policy = sequence(&token(&leaf_rows, &leaf_weight));
        let margin = (policy - sequence(&token(&rows, &other))).view([3, 2]);
        let loss = -((margin.select(1, 0) - margin.select(1, 1)) * 0.3).log_sigmoid().sum(Kind::Float);
        let expected = Tensor::run_backward(&[&loss / 5.0], &[&leaf_rows, &leaf_weight], false, false);

        for (tile_rows, frozen) in [(100, false), (7, false), (2, false), (100, true), (2, true)] {
            let weight_gradient = Tensor::zeros([VOCAB, 4], options);
            let weight_target = (!frozen).then_some(&weight_gradient);
            let mut gradients = HeadGradients { rows: rows.zeros_like(), weight: weight_target };
            let mut statistics = DeviceSums::zeros(Device::Cpu);
            tch::no_grad(|| {
                for span in groups(&batch.rows_per_pair, tile_rows) {
                    let policy = Scorer { rows: &rows, weight: &weight };
                    let reference = Reference::Model(Scorer { rows: &rows, weight: &other });
                    let group = RowGroup {
                        batch: &batch,
                        span,
                        tile_rows,
                        policy,
                        reference,
                        reading: TokenReading::default(),
                    };
                    statistics
                        .add(&group.run(Scoring::Objective(&objective), Some(&mut gradients)).statistics);
                }
            });
            close(&gradients.rows, &expected[0]);
            if !frozen {
                close(&weight_gradient, &expected[1]);
            }
            close(&statistics.tensor().select(0, Statistic::Loss as i64), &loss);
        }
    }

    #[test]
    fn kl_of_a_model_with_itself_is_zero_and_positive_otherwise() {
        tch::manual_seed(0);
        let batch = batch();
        let rows = Tensor::randn([batch.rows.size()[0], 4], (Kind::Float, Device::Cpu));
        let weight = Tensor::randn([VOCAB, 4], (Kind::Float, Device::Cpu));
        let objective = dpo(0.1, 3.0);
        let policy = Scorer { rows: &rows, weight: &weight };
        let kl = |reference: &Tensor| {
            let reference = Reference::Model(Scorer { rows: &rows, weight: reference });
            score_batch(&batch, Scoring::Objective(&objective), policy, reference, None)
                .statistics
                .tensor()
                .double_value(&[Statistic::KlChosen as i64])
        };
        assert_eq!(kl(&weight), 0.0);
        assert!(kl(&(&weight * 1.5)) > 0.0);
    }

    /// Known log-probabilities give the same scores as the model that computed them, except that the divergence is zero.
    #[test]
    fn known_reference_scores_stand_in_for_their_model() {
        tch::manual_seed(6);
        let batch = batch();
        let options = (Kind::Float, Device::Cpu);
        let rows = Tensor::randn([batch.rows.size()[0], 4], options);
        let (weight, other) = (Tensor::randn([VOCAB, 4], options), Tensor::randn([VOCAB, 4], options));
        let objective = dpo(0.3, 3.0);
        let (policy, model) =
            (Scorer { rows: &rows, weight: &weight }, Scorer { rows: &rows, weight: &other });
        let computed =
            score_batch(&batch, Scoring::Objective(&objective), policy, Reference::Model(model), None);
        let known = sequence_logps(&batch, model, TokenReading::default());
        close(&known, computed.reference_logps.as_ref().unwrap());
        let recalled =
            score_batch(&batch, Scoring::Objective(&objective), policy, Reference::Known(&known), None);
        assert!(recalled.reference_logps.is_none());
        let sums = |scores: &Scores| scores.statistics.tensor().copy();
        let (recalled, computed) = (sums(&recalled), sums(&computed));
        for kl in [Statistic::KlChosen, Statistic::KlRejected] {
            assert_eq!(recalled.double_value(&[kl as i64]), 0.0);
            let _ = computed.get(kl as i64).zero_();
        }
        close(&recalled, &computed);
    }
}
