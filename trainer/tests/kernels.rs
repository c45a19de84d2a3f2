//! Memory that remains after steps with other numbers of tokens.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod support;

use dyad_data::tokenized::Tokenized;
use dyad_proto::run_config::Dtype;
use support::{engine, new_model};
use tch::Kind;
use trainer::engine::StepShare;
use trainer::observe::timing::peak_resident_bytes;

fn share(step: u32, length: u32) -> StepShare {
    let tokens = |first: u32| (0..length).map(|at| first + at % 200).collect();
    let pair = Tokenized::new(vec![5, 6, 7], tokens(7), tokens(8));
    StepShare {
        step: step.into(),
        pairs: vec![pair],
        references: vec![None],
        global_pairs: 1,
        global_chosen_tokens: length.into(),
    }
}

/// Libtorch's own products in bfloat16 compile kernels for each number of rows and keep them: hundreds of MiB after these steps, on CPUs
/// without tiles even now. This test has its own process, because it measures the memory of the process.
#[test]
fn memory_does_not_grow_with_every_new_number_of_tokens() {
    // Libtorch's own products serve bfloat16 on CPUs without tiles; float32 is measured on every CPU.
    let bfloat16 = dyad_torch::backend::has_products(Kind::BFloat16).then_some(Dtype::Bfloat16);
    let dir = tempfile::tempdir().unwrap();
    new_model(dir.path(), |options| {
        (options.hidden_size, options.layers, options.intermediate_size) = (128, 2, 320);
    });
    let dtypes = bfloat16.into_iter().chain([Dtype::Float32]);
    for (dtype, lora) in dtypes.flat_map(|dtype| [(dtype, false), (dtype, true)]) {
        let mut engine = engine(dir.path(), |config| (config.dtype, config.lora) = (dtype, lora));
        let mut train = |step, length| {
            assert!(engine.train_step(&share(step, length), 1e-4).unwrap().sums.loss.is_finite());
        };
        // The longest one first, and enough others for every remainder of a block.
        train(1, 400);
        (2..34).for_each(|step| train(step, 398 + step));
        let before = peak_resident_bytes();
        (34..134).for_each(|step| train(step, 264 + step));
        // The kernel keeps this count by thread and sums it only now and then, so a later reading may even be a little lower.
        let grown = peak_resident_bytes().saturating_sub(before) >> 20;
        assert!(grown < 16, "{dtype:?}, lora {lora}: {grown} MiB more after a hundred numbers of tokens");
    }
}
