//! Memory that a step allocates, as libtorch's profiler sees it.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod support;

use std::path::Path;

use dyad_data::tokenized::Tokenized;
use dyad_torch::recorder;
use support::{engine, new_model, widen_vocabulary};
use trainer::engine::{Engine, StepShare};

const VOCAB: i64 = 256_000;
const HIDDEN: usize = 16;
/// One tile of logits, the head's limit.
const TILE_BYTES: i64 = dyad_families::shape::TILE_BYTES as i64;

/// A small model with a very large vocabulary.
fn model(dir: &Path) {
    new_model(dir, |options| {
        (options.hidden_size, options.heads, options.kv_heads, options.intermediate_size) =
            (HIDDEN, 2, 2, 32);
    });
    widen_vocabulary(dir, VOCAB);
}

/// Pairs with this many completion tokens a side.
fn share(length: u32) -> StepShare {
    let pair = |n: u32| {
        Tokenized::new(
            vec![5, 6, n],
            (0..length).map(|at| 7 + at % 200).collect(),
            (0..length).map(|at| 8 + at % 150).collect(),
        )
    };
    StepShare {
        step: 1,
        pairs: (10..12).map(pair).collect(),
        references: vec![None; 2],
        global_pairs: 2,
        global_chosen_tokens: 2 * u64::from(length),
    }
}

/// Largest allocation of a step, and the peak of allocated memory above that at its start, in bytes.
fn allocations(engine: &mut Engine, share: &StepShare) -> (i64, i64) {
    recorder::start(false, true).unwrap();
    let loss = engine.train_step(share, 1e-4).unwrap().sums.loss;
    let events = recorder::stop(None).unwrap();
    assert!(loss.is_finite());
    let mut memory: Vec<_> = events.iter().filter(|event| event.name == "[memory]").collect();
    memory.sort_by_key(|event| event.start_ns);
    let (mut live, mut peak) = (0, 0);
    for event in &memory {
        live += event.bytes;
        peak = peak.max(live);
    }
    (memory.iter().map(|event| event.bytes).max().unwrap(), peak)
}

/// Two pairs of 150 + 150 tokens have 600 rows: their float32 logits would take 586 MiB, and each pair alone is more than a tile.
#[test]
fn no_tensor_has_the_size_of_tokens_times_vocabulary() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    for lora in [false, true] {
        let mut engine = engine(dir.path(), |config| config.lora = lora);
        let (largest, short) = allocations(&mut engine, &share(75));
        assert!(largest <= TILE_BYTES, "lora {lora}: one tensor of {} MiB", largest >> 20);
        let (largest, long) = allocations(&mut engine, &share(150));
        assert!(largest <= TILE_BYTES, "lora {lora}: one tensor of {} MiB", largest >> 20);
        // Twice the rows add a few hundred rows of hidden states, but no logits.
        assert!(long - short < 4 << 20, "lora {lora}: {} MiB, then {} MiB", short >> 20, long >> 20);
    }
}
