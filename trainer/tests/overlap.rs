//! Timing of the engine's all-reduces: one per bucket and step, each as soon as its layers are done.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod support;

use std::sync::{Arc, Mutex};

use dyad_data::tokenized::Tokenized;
use dyad_torch::comm::{CommError, Communicator, Pending};
use support::{engine_of, new_model, parts};
use tch::{Kind, Tensor};
use trainer::engine::{Engine, StepShare};

/// Stands for a second rank that adds nothing, and records all calls.
#[derive(Debug, Default)]
struct Recorder {
    buckets: Mutex<Vec<Tensor>>,
    /// Bucket of each call, and whether every bucket of lower layers still had no gradient.
    calls: Mutex<Vec<(usize, bool)>>,
    /// Shape of each call's tensor.
    sizes: Mutex<Vec<Vec<i64>>>,
}

struct Done;

impl Pending for Done {
    fn wait(self: Box<Self>) -> Result<(), CommError> {
        Ok(())
    }
}

impl Communicator for Recorder {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        2
    }

    fn all_reduce(&self, tensor: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        let buckets = self.buckets.lock().unwrap();
        // A tensor that is none of the buckets holds the looked-up rows of the embedding.
        let index = buckets.iter().position(|bucket| bucket.data_ptr() == tensor.data_ptr());
        let index = index.unwrap_or(buckets.len());
        self.sizes.lock().unwrap().push(tensor.size());
        // The last bucket is the embedding's, which has the tied head's part of its gradient from the start.
        let lower_layers = buckets.get(index + 1..buckets.len() - 1).unwrap_or_default();
        let rest_is_zero = lower_layers.iter().all(|bucket| bucket.count_nonzero(None).int64_value(&[]) == 0);
        self.calls.lock().unwrap().push((index, rest_is_zero));
        Ok(Box::new(Done))
    }

    fn reduce_scatter(&self, _output: &Tensor, _input: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        unreachable!("not part of this engine's step")
    }

    /// Gathers the rows that ranks look up in the embedding: the other rank looks up the same ones.
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        assert_eq!((input.kind(), output.numel()), (Kind::Int64, 2 * input.numel()));
        output.shallow_clone().copy_(&input.repeat([2]));
        Ok(Box::new(Done))
    }

    fn broadcast(&self, _tensor: &Tensor, _root: usize) -> Result<Box<dyn Pending>, CommError> {
        unreachable!("not part of this engine's step")
    }

    fn barrier(&self) -> Result<(), CommError> {
        Ok(())
    }

    fn abort(&self) {}
}

/// A model whose layers are large enough to be buckets of their own.
fn engine(dir: &std::path::Path, recorder: &Arc<Recorder>) -> Engine {
    new_model(dir, |options| {
        (options.hidden_size, options.layers, options.intermediate_size) = (512, 3, 1408);
        (options.heads, options.kv_heads, options.max_positions) = (8, 8, 64);
    });
    // Every pair is its own micro-batch: only the last one may start reductions.
    let (config, parts) = parts(dir, |config| config.micro_batch_tokens = 1);
    let buckets = parts.parameters.buckets.iter().map(|bucket| bucket.grad.shallow_clone()).collect();
    *recorder.buckets.lock().unwrap() = buckets;
    engine_of((config, parts), recorder.clone())
}

fn share(pairs: usize) -> StepShare {
    let pair = |n: u32| Tokenized::new(vec![5, 6, n], vec![7, n, 9], vec![n, 8]);
    StepShare {
        step: 1,
        pairs: (10..10 + pairs as u32).map(pair).collect(),
        references: vec![None; pairs],
        global_pairs: 4,
        global_chosen_tokens: 12,
    }
}

#[test]
fn a_bucket_is_reduced_before_the_layers_below_it_are_computed() {
    let (dir, recorder) = (tempfile::tempdir().unwrap(), Arc::new(Recorder::default()));
    let mut engine = engine(dir.path(), &recorder);
    let count = recorder.buckets.lock().unwrap().len();
    assert!(count >= 3, "{count} buckets");
    engine.train_step(&share(1), 1e-4).unwrap();
    // After the final norm comes the tied head's part of the embedding; the looked-up rows come last.
    let order = [0, count - 1].into_iter().chain(1..count - 1).chain([count]);
    let expected: Vec<(usize, bool)> = order.map(|bucket| (bucket, true)).collect();
    assert_eq!(*recorder.calls.lock().unwrap(), expected);
}

/// Ids 5 to 10 of a vocabulary of 300. No computation hides this reduction, so it must be small.
#[test]
fn only_looked_up_rows_of_the_embedding_are_reduced_last() {
    let (dir, recorder) = (tempfile::tempdir().unwrap(), Arc::new(Recorder::default()));
    let mut engine = engine(dir.path(), &recorder);
    engine.train_step(&share(1), 1e-4).unwrap();
    assert_eq!(recorder.sizes.lock().unwrap().last().unwrap(), &[6, 512]);
}

#[test]
fn every_bucket_is_reduced_once_for_any_number_of_micro_batches() {
    let (dir, recorder) = (tempfile::tempdir().unwrap(), Arc::new(Recorder::default()));
    let mut engine = engine(dir.path(), &recorder);
    let buckets = recorder.buckets.lock().unwrap().len();
    for pairs in [3, 0] {
        recorder.calls.lock().unwrap().clear();
        engine.train_step(&share(pairs), 1e-4).unwrap();
        let mut called: Vec<usize> =
            recorder.calls.lock().unwrap().iter().map(|(bucket, _)| *bucket).collect();
        called.sort_unstable();
        // Without pairs on any rank no row is looked up, and no rows are reduced.
        let all: Vec<usize> = (0..buckets + usize::from(pairs > 0)).collect();
        assert_eq!(called, all, "{pairs} pairs");
    }
}
