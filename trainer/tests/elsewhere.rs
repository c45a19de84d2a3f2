//! What GPUs run, run here: the path of other devices with plain CPU kernels (`ext/stand_in.cpp`) behind the operators that
//! libtorch has on CUDA alone. Shows which operators are called, with which arguments, how often, and that the numbers are
//! those of the CPU path. It does not show that CUDA's own kernels work.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]
#![expect(unsafe_code, reason = "a foreign function of the bridge")]

mod support;

use std::ffi::c_char;
use std::path::Path;

use dyad_data::tokenize::Tokenized;
use dyad_proto::RunConfig;
use dyad_proto::run_config::{Dtype, ReferenceLogps};
use support::{engine, new_model};
use tch::{Device, Kind, Tensor};
use trainer::batch::{Layout, MicroBatch, Segment};
use trainer::engine::{Engine, Share, StepResult};
use trainer::ext::grad;
use trainer::model::attention::Kernel;
use trainer::model::blocks::composed_attention;
use trainer::model::fused::as_elsewhere;
use trainer::profile::recorder::{self, Event};
use trainer::transfer::READ;

unsafe extern "C" {
    fn dyad_stand_in_kernels() -> *mut c_char;
}

fn stand_in() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // SAFETY: registers kernels; a message is NUL-terminated, and may leak in a test that fails.
        let message = unsafe { dyad_stand_in_kernels() };
        // SAFETY: as above.
        let text = |message| unsafe { std::ffi::CStr::from_ptr(message) }.to_string_lossy().into_owned();
        assert!(message.is_null(), "{}", text(message));
    });
}

/// A llama with two query heads to a key head.
fn model(dir: &Path, layers: usize) {
    new_model(dir, |options| options.layers = layers);
}

fn pairs() -> Vec<Tokenized> {
    let pair = |n: u32, chosen: u32, rejected: u32| Tokenized {
        prompt: (0..3 + n).map(|at| 5 + at).collect(),
        chosen: (0..chosen).map(|at| 70 + n + at).collect(),
        rejected: (0..rejected).map(|at| 90 + n + at).collect(),
    };
    vec![pair(0, 4, 7), pair(5, 1, 1), pair(9, 12, 3), pair(5, 6, 2)]
}

fn share(step: u64) -> Share {
    let pairs = pairs();
    Share {
        step,
        references: vec![None; pairs.len()],
        global_pairs: pairs.len() as u64,
        global_chosen_tokens: 23,
        pairs,
        learning_rate: 1e-3,
    }
}

/// The same steps on both paths; what the second step finds tells whether the first learned the same.
fn two_steps(engine: &mut Engine) -> [StepResult; 2] {
    [1, 2].map(|step| engine.train_step(&share(step)).unwrap())
}

#[test]
fn a_step_gives_the_same_numbers_there() {
    stand_in();
    let dir = tempfile::tempdir().unwrap();
    model(dir.path(), 2);
    // Bfloat16 keeps eight bits of everything.
    for (dtype, lora, tolerance) in
        [(Dtype::Float32, false, 2e-5), (Dtype::Float32, true, 2e-5), (Dtype::Bfloat16, false, 3e-2)]
    {
        let change = |config: &mut RunConfig| {
            (config.dtype, config.lora, config.micro_batch_tokens) = (dtype, lora, 40);
            config.reference_logps = ReferenceLogps::Cache;
        };
        let here = two_steps(&mut engine(dir.path(), change));
        let there = as_elsewhere(|| two_steps(&mut engine(dir.path(), change)));
        for (here, there) in here.iter().zip(&there) {
            let close = |name: &str, here: f64, there: f64| {
                let worst = (here - there).abs() / here.abs().max(1.0);
                assert!(worst < tolerance, "{dtype:?}, lora {lora}, {name}: {here} here, {there} there");
            };
            close("loss", here.sums.loss, there.sums.loss);
            close("gradient norm", here.grad_norm, there.grad_norm);
            close("chosen", here.sums.logps_chosen, there.sums.logps_chosen);
            close("divergence", here.sums.kl, there.sums.kl);
            assert_eq!((here.references.len(), there.references.len()), (4, 4));
            for (here, there) in here.references.iter().zip(&there.references) {
                close("reference", here.unwrap().rejected, there.unwrap().rejected);
            }
        }
    }
}

fn leaf(size: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind).set_requires_grad(true)
}

/// Largest difference, relative to the largest value where that is above one: a query of one key has no gradient.
fn difference(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    ((&a - &b).abs().max() / b.abs().max().clamp_min(1.0)).double_value(&[])
}

fn segment(start: i64, prompt: i64, branches: &[i64]) -> Segment {
    Segment { start, prompt, branches: branches.into() }
}

/// One, two and three branches, no prompt, no branch; keys shared by groups of queries; in one call a layer.
#[test]
fn attention_in_one_call_equals_segment_by_segment() {
    stand_in();
    tch::manual_seed(4);
    let mixed = [
        segment(0, 40, &[7, 50]),
        segment(97, 5, &[1]),
        segment(103, 3, &[2, 1, 4]),
        segment(113, 0, &[3, 2]),
        segment(118, 6, &[]),
    ];
    let plain = [segment(0, 60, &[4]), segment(64, 60, &[])];
    let single = [segment(0, 1, &[]), segment(1, 0, &[1, 1]), segment(3, 0, &[1])];
    for (segments, tokens) in [(&mixed[..], 124), (&plain[..], 124), (&single[..], 4)] {
        let varlen = varlen_of(segments);
        for (kind, kernel, tolerance) in [
            (Kind::Float, Kernel::Efficient, 2e-6),
            (Kind::BFloat16, Kernel::Flash, 2e-2),
            (Kind::BFloat16, Kernel::Efficient, 2e-2),
        ] {
            for kv_heads in [4, 2, 1] {
                let inputs = [
                    leaf(&[tokens, 4, 16], kind),
                    leaf(&[tokens, kv_heads, 16], kind),
                    leaf(&[tokens, kv_heads, 16], kind),
                ];
                let [q, k, v] = &inputs;
                let ours = varlen.attention(q, k, v, kernel).unwrap();
                let theirs = composed_attention(q, k, v, segments);
                assert_eq!((ours.kind(), ours.size()), (theirs.kind(), theirs.size()));
                assert!(difference(&ours, &theirs) < tolerance, "{kernel:?} {kind:?} {kv_heads} key heads");
                let output_grad = Tensor::randn_like(&ours);
                let inputs: Vec<&Tensor> = inputs.iter().collect();
                let ours = grad(&[&ours], &[&output_grad], &inputs).unwrap();
                let theirs = grad(&[&theirs], &[&output_grad], &inputs).unwrap();
                for (index, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                    let worst = difference(ours.as_ref().unwrap(), theirs.as_ref().unwrap());
                    assert!(
                        worst < tolerance,
                        "{kernel:?} {kind:?} {kv_heads} key heads, gradient {index}: {worst}"
                    );
                }
            }
        }
    }
}

/// Lists as a micro-batch sends them.
fn varlen_of(segments: &[Segment]) -> trainer::model::varlen::Varlen {
    let runs = trainer::model::varlen::Runs::of(segments);
    trainer::model::varlen::Varlen {
        queries: Tensor::from_slice(&runs.queries),
        keys: Tensor::from_slice(&runs.keys),
        gather: (!runs.gather.is_empty()).then(|| Tensor::from_slice(&runs.gather)),
        max_queries: runs.max_queries,
        max_keys: runs.max_keys,
        pairs: runs.pairs,
    }
}

/// What a micro-batch sends in one copy comes apart as what its runs say.
#[test]
fn a_micro_batch_brings_its_runs_along() {
    let pairs = pairs();
    let pairs: Vec<&Tokenized> = pairs.iter().collect();
    let batch = as_elsewhere(|| MicroBatch::pack(&pairs, Layout::SharedPairs, Device::Cpu));
    let (sent, runs) = (batch.varlen.unwrap(), trainer::model::varlen::Runs::of(&batch.segments));
    let list = |tensor: &Tensor| Vec::<i64>::try_from(&tensor.to_kind(Kind::Int64)).unwrap();
    assert_eq!(sent.queries.kind(), Kind::Int);
    assert_eq!(list(&sent.queries), runs.queries.iter().map(|&at| i64::from(at)).collect::<Vec<_>>());
    assert_eq!(list(&sent.keys), runs.keys.iter().map(|&at| i64::from(at)).collect::<Vec<_>>());
    assert_eq!(list(&sent.gather.unwrap()), runs.gather);
    assert!(
        MicroBatch::pack(&pairs, Layout::SharedPairs, Device::Cpu).varlen.is_none(),
        "the CPU has kernels of its own"
    );
}

/// Events of the second step, which has two micro-batches.
fn recorded(engine: &mut Engine) -> Vec<Event> {
    as_elsewhere(|| {
        engine.train_step(&share(1)).unwrap();
        recorder::start(false, false).unwrap();
        engine.train_step(&share(2)).unwrap();
        let mut events = recorder::stop(None).unwrap();
        events.sort_by_key(|event| (event.start_ns, std::cmp::Reverse(event.duration_ns)));
        events
    })
}

/// Operators that make the host wait for a GPU.
const WAITS: [&str; 7] = [
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::unique_dim",
];

/// Operators that a GPU needs no kernel for: other shapes of the same memory, memory itself, and calls of others.
fn is_call(name: &str) -> bool {
    const CALLS: [&str; 38] = [
        "aten::t",
        "aten::transpose",
        "aten::view",
        "aten::_unsafe_view",
        "aten::reshape",
        "aten::narrow",
        "aten::slice",
        "aten::select",
        "aten::unsqueeze",
        "aten::squeeze",
        "aten::expand",
        "aten::as_strided",
        "aten::permute",
        "aten::detach",
        "detach",
        "aten::detach_",
        "detach_",
        "aten::alias",
        "aten::empty",
        "aten::empty_like",
        "aten::empty_strided",
        "aten::linear",
        "aten::matmul",
        "aten::to",
        "aten::_to_copy",
        "aten::contiguous",
        "aten::clone",
        "aten::zeros",
        "aten::zeros_like",
        "aten::new_zeros",
        "aten::full",
        "aten::ones_like",
        "aten::split_with_sizes",
        "aten::index_select_backward",
        "aten::result_type",
        "aten::resolve_conj",
        "aten::chunk",
        "aten::numpy_T",
    ];
    CALLS.contains(&name)
        || name.contains("Backward0")
        || name.contains("autograd::")
        || name.starts_with("dyad::")
        || name.contains("VarlenAttention")
        || name.contains("Rotation")
}

/// Kernels that a GPU would be told to run, by name: the outermost operators that are more than a call. One operator of this
/// list is one kernel there, give or take a reduction's second.
fn launches(events: &[Event]) -> std::collections::BTreeMap<&str, usize> {
    let mut counts = std::collections::BTreeMap::new();
    let mut covered = 0;
    for event in events.iter().filter(|event| !event.is_span && event.name != "[memory]") {
        if event.start_ns >= covered && !is_call(&event.name) {
            *counts.entry(event.name.as_str()).or_default() += 1;
            covered = event.start_ns + event.duration_ns;
        }
    }
    counts
}

/// One test, because the profiler is one for the process.
#[test]
fn a_step_is_launched_in_few_kernels_and_waited_for_once() {
    stand_in();
    // (LoRA, kernels of one layer forward, in the reference and backward)
    for (lora, ceiling) in [(false, 88), (true, 149)] {
        let mut counts = Vec::new();
        for layers in [2, 3] {
            let dir = tempfile::tempdir().unwrap();
            model(dir.path(), layers);
            let mut engine = engine(dir.path(), |config| {
                (config.dtype, config.lora, config.micro_batch_tokens) = (Dtype::Bfloat16, lora, 4096);
            });
            let events = recorded(&mut engine);
            waits_once(&events);
            let attention =
                events.iter().filter(|event| event.name.starts_with("dyad::attention flash")).count();
            assert_eq!(
                attention,
                3 * layers,
                "a call forward, one in the reference and one backward, for each layer"
            );
            let launched = launches(&events);
            counts.push((launched.values().sum::<usize>(), format!("{launched:?}")));
        }
        let a_layer = counts[1].0 - counts[0].0;
        println!("lora {lora}: {a_layer} kernels a layer\n{}\n{}", counts[0].1, counts[1].1);
        assert!(a_layer <= ceiling, "lora {lora}: {a_layer} kernels a layer");
    }
}

fn waits_once(events: &[Event]) {
    // On the CPU the fused AdamW reads its step counter as a number, on a GPU by its address.
    let adamw: Vec<&Event> = events.iter().filter(|event| event.name == "aten::_fused_adamw_").collect();
    let within = |event: &Event, outer: &Event| {
        (outer.start_ns..outer.start_ns + outer.duration_ns).contains(&event.start_ns)
    };
    let waits: Vec<&str> = events
        .iter()
        .filter(|event| {
            WAITS.contains(&event.name.as_str()) && !adamw.iter().any(|outer| within(event, outer))
        })
        .map(|event| event.name.as_str())
        .collect();
    assert!(!adamw.is_empty() && waits.is_empty(), "{waits:?}");
    let reads: Vec<&Event> = events.iter().filter(|event| event.is_span && event.name == READ).collect();
    assert_eq!(reads.len(), 1, "{reads:?}");
    let after = events.iter().filter(|event| event.start_ns > reads[0].start_ns + reads[0].duration_ns);
    assert!(
        after.into_iter().all(|event| !event.name.starts_with("aten::")),
        "work after the report was read"
    );
}

/// T-1: copies between host and device are not visible as operators on a machine without a device, so the step's sources
/// are held to the functions of `transfer.rs`.
#[test]
fn nothing_in_the_step_copies_past_transfer() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let step = [
        "batch.rs",
        "loss.rs",
        "engine/mod.rs",
        "engine/passes.rs",
        "engine/tally.rs",
        "engine/turns.rs",
        "head/mod.rs",
        "head/tile.rs",
        "model/blocks.rs",
        "model/llama.rs",
        "model/varlen.rs",
        "model/fused.rs",
        "parameters/gradients.rs",
    ];
    for file in step {
        let text = std::fs::read_to_string(sources.join(file)).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        for copy in [
            "from_slice(",
            "to_device(Device::Cpu)",
            "double_value(",
            "int64_value(",
            "values::<",
            "values(&",
            ".item(",
        ] {
            assert!(!code.contains(copy), "{file} has {copy}…): use transfer.rs");
        }
    }
}
