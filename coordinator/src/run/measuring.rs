//! Measuring before training: for every pair, one rank tokenises it and reports its lengths. Pure.
//!
//! The coordinator needs the lengths to share pairs out by cost, and has no tokenizer itself. Chunks go round robin over the ranks.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

use dyad_proto::run_config::Objective;
use dyad_proto::wire::{DataReport, MeasureReport, PairLength, PairVerdict, Split};
use dyad_proto::{Fault, counted, left_out};

use crate::run::dataset::{Dataset, Datasets};
use crate::run::references::PairKey;
use crate::run::sharding::Weighted;

/// Most pairs of one request.
const CHUNK_PAIRS: usize = 512;
/// Most pairs in total if every rank has one request: bounds the copies that wait to be sent.
const REQUESTED_PAIRS: usize = 1 << 15;
/// Lower bound for the pairs of one request: smaller requests are inefficient.
const FEWEST_PAIRS: usize = 16;
/// Most bytes of one request with several pairs; far below the limit of a message.
const CHUNK_BYTES: usize = 8 << 20;
/// Most open requests of a rank: one in work, one waiting.
const WINDOW: usize = 2;

/// A request: contiguous records of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Which file.
    pub split: Split,
    /// Which records.
    pub ids: Range<u64>,
}

/// Lengths and verdicts of all records of a file, by id.
#[derive(Clone, Debug, Default)]
pub struct Lengths {
    pairs: Vec<PairLength>,
    /// The first record that cannot be used, and why.
    refused: Option<(u64, Fault)>,
    /// The tokens that end an answer, as text.
    stop_tokens: String,
    /// Notes for the user about the chat template.
    notes: BTreeSet<String>,
}

impl Lengths {
    /// Ids that are trained or evaluated on, ascending.
    #[must_use]
    pub fn kept(&self) -> Vec<u64> {
        let kept = |verdict| matches!(verdict, PairVerdict::Kept | PairVerdict::Truncated);
        self.pairs.iter().filter(|length| kept(length.verdict())).map(|length| length.id).collect()
    }

    /// Number of records.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.pairs.len() as u64
    }

    /// Number of records with this verdict.
    #[must_use]
    pub fn count(&self, verdict: PairVerdict) -> u64 {
        self.pairs.iter().filter(|length| length.verdict() == verdict).count() as u64
    }

    /// Fails if a record cannot be used, or if no record is kept; `key` is the config key that names the file.
    pub fn check_usable(&self, key: &str, file: &Dataset) -> Result<(), Fault> {
        if let Some((first, fault)) = &self.refused {
            let refused = self.count(PairVerdict::Refused);
            let more = match refused {
                0 | 1 => String::new(),
                _ => format!(" (the first of {} that cannot be used)", counted(refused, "pair")),
            };
            let message = format!("{}: {}{more}", file.place(*first), fault.message);
            return Err(Fault { message, ..fault.clone() });
        }
        if !self.kept().is_empty() {
            return Ok(());
        }
        Err(left_out::none_is_left(key, file.path(), &|verdict| self.count(verdict)))
    }

    /// The tokens that end an answer, if no complete preferred output ends with one (the model would not learn to stop); else empty.
    #[must_use]
    pub fn endless(&self) -> String {
        let whole = || self.pairs.iter().filter(|length| length.verdict() == PairVerdict::Kept);
        if whole().next().is_none() || whole().any(|length| !length.endless) {
            return String::new();
        }
        if self.stop_tokens.is_empty() { "(none is known)".to_owned() } else { self.stop_tokens.clone() }
    }

    /// The key of a record; `None` if there is no such record.
    #[must_use]
    pub fn key(&self, split: Split, id: u64) -> Option<PairKey> {
        let length = self.pairs.get(usize::try_from(id).ok()?)?;
        Some(PairKey { split, id, tokens: (length.tokens_hash_high, length.tokens_hash_low) })
    }

    /// These pairs, each with the cost of computing it.
    #[must_use]
    pub fn weigh(&self, ids: &[u64], objective: Objective) -> Vec<Weighted> {
        let weigh = |&id: &u64| {
            let length = &self.pairs[id as usize];
            let rejected = if objective.scores_both_outputs() { length.rejected_tokens } else { 0 };
            let tokens = [length.prompt_tokens, length.chosen_tokens, rejected];
            let tokens = tokens.into_iter().map(u64::from).sum();
            Weighted { id, cost: if length.cost > 0 { length.cost } else { tokens } }
        };
        ids.iter().map(weigh).collect()
    }

    /// Trained tokens of the chosen sides of these pairs.
    #[must_use]
    pub fn chosen_tokens(&self, ids: &[u64]) -> u64 {
        ids.iter().map(|&id| u64::from(trained(&self.pairs[id as usize]))).sum()
    }
}

/// Trained tokens of the chosen side.
fn trained(length: &PairLength) -> u32 {
    length.chosen_tokens.saturating_sub(length.chosen_untrained_tokens)
}

/// The report on the training and validation pairs; the caller fills in the numbers of the schedule.
#[must_use]
pub fn data_report(SplitLengths { train, validation }: &SplitLengths) -> DataReport {
    DataReport {
        pairs: train.records(),
        truncated: train.count(PairVerdict::Truncated),
        dropped_too_long: train.count(PairVerdict::DroppedTooLong),
        dropped_empty: train.count(PairVerdict::DroppedEmpty),
        dropped_identical: train.count(PairVerdict::DroppedIdentical),
        dropped_weight: train.count(PairVerdict::DroppedWeight),
        validation_pairs: validation.records(),
        validation_truncated: validation.count(PairVerdict::Truncated),
        validation_dropped_too_long: validation.count(PairVerdict::DroppedTooLong),
        validation_dropped_empty: validation.count(PairVerdict::DroppedEmpty),
        validation_dropped_identical: validation.count(PairVerdict::DroppedIdentical),
        validation_dropped_weight: validation.count(PairVerdict::DroppedWeight),
        endless: train.endless(),
        notes: train.notes.union(&validation.notes).cloned().collect(),
        ..DataReport::default()
    }
}

/// Lengths of both files.
#[derive(Debug)]
pub struct SplitLengths {
    /// Of the training file.
    pub train: Lengths,
    /// Of the validation file; empty without one.
    pub validation: Lengths,
}

/// State of the measuring.
#[derive(Debug)]
pub struct Measuring {
    /// By rank: chunks that are not requested yet.
    queued: Vec<VecDeque<Chunk>>,
    /// By rank: chunks that are requested and not answered.
    asked: Vec<VecDeque<Chunk>>,
    /// Number of all chunks that are not answered.
    open: usize,
    train: Lengths,
    validation: Lengths,
}

impl Measuring {
    /// Shares all chunks of all files out over the ranks.
    #[must_use]
    pub fn new(data: &Datasets, world_size: usize) -> Self {
        let most = (REQUESTED_PAIRS / world_size).clamp(FEWEST_PAIRS, CHUNK_PAIRS) as u64;
        let mut chunks = chunk(Split::Train, data.train.record_bytes(), most);
        if let Some(validation) = &data.validation {
            chunks.extend(chunk(Split::Validation, validation.record_bytes(), most));
        }
        let open = chunks.len();
        let mut queued = vec![VecDeque::new(); world_size];
        for (at, chunk) in chunks.into_iter().enumerate() {
            queued[at % world_size].push_back(chunk);
        }
        let unknown = |records| Lengths { pairs: vec![PairLength::default(); records], ..Lengths::default() };
        Self {
            queued,
            asked: vec![VecDeque::new(); world_size],
            open,
            train: unknown(data.train.records()),
            validation: unknown(data.validation.as_ref().map_or(0, |data| data.records())),
        }
    }

    /// The next request to a rank; `None` if its window is full or nothing is left.
    pub fn next_request(&mut self, rank: usize) -> Option<Chunk> {
        if self.asked[rank].len() >= WINDOW {
            return None;
        }
        let chunk = self.queued[rank].pop_front()?;
        self.asked[rank].push_back(chunk.clone());
        Some(chunk)
    }

    /// Takes an answer. The error says how the rank broke the protocol.
    pub fn record(&mut self, rank: usize, report: MeasureReport) -> Result<(), String> {
        let answers = |chunk: &Chunk| {
            chunk.split == report.split()
                && chunk.ids.clone().eq(report.lengths.iter().map(|length| length.id))
        };
        let Some(at) = self.asked[rank].iter().position(answers) else {
            let first = report.lengths.first().map_or(0, |length| length.id);
            return Err(format!("measured pairs from id {first} on, which it was not asked for"));
        };
        self.asked[rank].remove(at);
        self.open -= 1;
        let lengths = if report.split() == Split::Train { &mut self.train } else { &mut self.validation };
        let refused = report.lengths.iter().find(|length| length.verdict() == PairVerdict::Refused);
        match (refused.map(|length| length.id), report.refusal) {
            (Some(id), Some(why)) if lengths.refused.as_ref().is_none_or(|(first, _)| id < *first) => {
                lengths.refused = Some((id, why.into()));
            }
            (Some(_), Some(_)) | (None, None) => {}
            (Some(id), None) => return Err(format!("refused pair {id} without a reason")),
            (None, Some(_)) => return Err("gave a reason for refusing no pair".into()),
        }
        lengths.stop_tokens = report.stop_tokens;
        lengths.notes.extend(report.notes);
        for length in report.lengths {
            match length.verdict() {
                PairVerdict::Unspecified => return Err(format!("gave no verdict on pair {}", length.id)),
                PairVerdict::Kept | PairVerdict::Truncated if trained(&length) == 0 => {
                    return Err(format!(
                        "kept pair {} although no token of its preferred output is trained",
                        length.id
                    ));
                }
                _ => lengths.pairs[length.id as usize] = length,
            }
        }
        Ok(())
    }

    /// The lengths of the training and the validation file, once everything is measured.
    #[must_use]
    pub fn finished(&mut self) -> Option<SplitLengths> {
        (self.open == 0).then(|| SplitLengths {
            train: std::mem::take(&mut self.train),
            validation: std::mem::take(&mut self.validation),
        })
    }
}

fn chunk(split: Split, record_bytes: impl Iterator<Item = usize>, most_pairs: u64) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = Vec::new();
    let mut bytes_in_last = 0;
    for (id, bytes) in (0..).zip(record_bytes) {
        match chunks.last_mut() {
            Some(last) if id - last.ids.start < most_pairs && bytes_in_last + bytes <= CHUNK_BYTES => {
                last.ids.end = id + 1;
                bytes_in_last += bytes;
            }
            _ => {
                chunks.push(Chunk { split, ids: id..id + 1 });
                bytes_in_last = bytes;
            }
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use dyad_proto::pairs::wanted::Wanted;
    use dyad_proto::run_config::LossType;

    use super::*;

    fn measuring(chunks: Vec<Vec<Chunk>>, records: usize) -> Measuring {
        Measuring {
            asked: vec![VecDeque::new(); chunks.len()],
            open: chunks.iter().map(Vec::len).sum(),
            queued: chunks.into_iter().map(VecDeque::from).collect(),
            train: Lengths { pairs: vec![PairLength::default(); records], ..Lengths::default() },
            validation: Lengths::default(),
        }
    }

    fn train(ids: Range<u64>) -> Chunk {
        Chunk { split: Split::Train, ids }
    }

    fn answer(ids: Range<u64>, verdict: PairVerdict) -> MeasureReport {
        let length = |id| PairLength {
            id,
            verdict: verdict.into(),
            prompt_tokens: 10,
            chosen_tokens: 5,
            rejected_tokens: 3 + id as u32,
            ..PairLength::default()
        };
        MeasureReport {
            split: Split::Train.into(),
            lengths: ids.map(length).collect(),
            refusal: None,
            ..MeasureReport::default()
        }
    }

    #[test]
    fn outputs_without_a_stop_token_are_reported_with_the_stop_tokens() {
        let mut measuring = measuring(vec![vec![train(0..2)]], 2);
        measuring.next_request(0);
        let mut report = answer(0..2, PairVerdict::Kept);
        report.stop_tokens = "<|end|>".to_owned();
        report.lengths.iter_mut().for_each(|length| length.endless = true);
        measuring.record(0, report).unwrap();
        let mut lengths = measuring.finished().unwrap();
        assert_eq!(data_report(&lengths).endless, "<|end|>");
        lengths.train.pairs[1].endless = false;
        assert_eq!(data_report(&lengths).endless, "");
    }

    #[test]
    fn chunks_are_limited_by_pairs_and_bytes() {
        let ranges = |sizes: Vec<usize>| -> Vec<Range<u64>> {
            chunk(Split::Train, sizes.into_iter(), 512).into_iter().map(|chunk| chunk.ids).collect()
        };
        assert_eq!(ranges(vec![10; 1030]), [0..512, 512..1024, 1024..1030]);
        let big = CHUNK_BYTES / 2;
        assert_eq!(ranges(vec![big, big, 1, 3 * big, 1]), [0..2, 2..3, 3..4, 4..5]);
    }

    #[test]
    fn requests_keep_to_the_window_and_finish_when_all_are_answered() {
        let mut measuring =
            measuring(vec![vec![train(0..2), train(4..6), train(6..7)], vec![train(2..4)]], 7);
        assert_eq!(measuring.next_request(0), Some(train(0..2)));
        assert_eq!(measuring.next_request(0), Some(train(4..6)));
        assert_eq!(measuring.next_request(0), None, "the window is full");
        assert_eq!(measuring.next_request(1), Some(train(2..4)));
        measuring.record(0, answer(4..6, PairVerdict::Truncated)).unwrap();
        assert_eq!(measuring.next_request(0), Some(train(6..7)));
        measuring.record(0, answer(0..2, PairVerdict::Kept)).unwrap();
        measuring.record(1, answer(2..4, PairVerdict::DroppedTooLong)).unwrap();
        assert!(measuring.finished().is_none());
        measuring.record(0, answer(6..7, PairVerdict::DroppedEmpty)).unwrap();
        let lengths = measuring.finished().unwrap().train;
        assert_eq!(lengths.kept(), [0, 1, 4, 5]);
        assert_eq!((lengths.records(), lengths.count(PairVerdict::DroppedTooLong)), (7, 2));
        assert_eq!(lengths.chosen_tokens(&[0, 4]), 10);
        let tokens = |objective| lengths.weigh(&[4], objective)[0].cost;
        let dpo = Objective::of_loss(LossType::Sigmoid);
        assert_eq!((tokens(dpo), tokens(Objective::LIKELIHOOD)), (22, 15));
    }

    /// Reports arrive in any order, but the message names the first bad line of the file.
    #[test]
    fn the_first_refused_pair_is_named_by_line_and_the_others_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pairs.jsonl");
        let line = r#"{"input":{"messages":[{"role":"user","content":"Hi"}]},"preferred_output":[{"role":"assistant","content":"Hello"}],"non_preferred_output":[{"role":"assistant","content":"No"}]}"#;
        std::fs::write(&path, format!("\n{line}\n{line}\n\n{line}\n{line}\n")).unwrap();
        let path_text = path.display().to_string();
        let data = Dataset::load("training_file", &path_text.into(), Wanted::default()).unwrap();
        let mut measuring = measuring(vec![vec![train(0..2)], vec![train(2..4)]], 4);
        let refusal = |ids: Range<u64>, id: u64| {
            let mut report = answer(ids.clone(), PairVerdict::Kept);
            report.lengths[(id - ids.start) as usize].set_verdict(PairVerdict::Refused);
            report.refusal = Some(Fault::input(format!("why {id}")).hint("mend it").into());
            report
        };
        let _ = measuring.next_request(0);
        let _ = measuring.next_request(1);
        measuring.record(1, refusal(2..4, 2)).unwrap();
        measuring.record(0, refusal(0..2, 1)).unwrap();
        let lengths = measuring.finished().unwrap().train;
        let fault = lengths.check_usable("training_file", &data).unwrap_err();
        let expected = format!("{} line 3: why 1 (the first of 2 pairs that cannot be used)", path.display());
        assert_eq!((fault.message, fault.hint), (expected, "mend it".into()));
    }

    #[test]
    fn wrong_answers_are_named() {
        let mut measuring = measuring(vec![vec![train(0..2)]], 2);
        assert!(measuring.record(0, answer(0..2, PairVerdict::Kept)).unwrap_err().contains("not asked for"));
        measuring.next_request(0);
        assert!(measuring.record(0, answer(0..1, PairVerdict::Kept)).unwrap_err().contains("not asked for"));
        assert!(
            measuring
                .record(0, answer(0..2, PairVerdict::Unspecified))
                .unwrap_err()
                .contains("no verdict on pair 0")
        );
    }
}
