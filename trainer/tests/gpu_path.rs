//! Runs what GPUs run on this machine (`dyad_torch_testing`): plain CPU kernels behind the operators that libtorch has only on CUDA
//! devices, and the bridge's GPU kernels compiled for the host. Shows which operators are called, with which arguments and how often, and
//! that results equal those of the CPU path. Does not show that CUDA's own kernels work.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod support;

use std::path::Path;

use dyad_data::tokenized::Tokenized;
use dyad_proto::RunConfig;
use dyad_proto::run_config::{Dtype, ReferenceLogps};
use dyad_torch::backend::as_on_gpu;
use dyad_torch::recorder::{self, ProfilerEvent};
use dyad_torch::transfer::READ;
use support::attention::one_call_equals_segments;
use support::kernels::{the_head_scores_as_float32, work_between_products_equals_its_definition};
use support::steps::{differences, pairs, share, two_steps};
use support::{engine, new_model};
use tch::{Device, Kind, Tensor};
use trainer::batch::{MicroBatch, PairLayout};
use trainer::engine::Engine;

/// A llama with two query heads per key head.
fn model(dir: &Path, layers: usize) {
    new_model(dir, |options| options.layers = layers);
}

#[test]
fn a_step_equals_one_on_the_cpu() {
    dyad_torch_testing::install();
    let dir = tempfile::tempdir().unwrap();
    model(dir.path(), 2);
    // Bfloat16 keeps eight bits of everything.
    for (dtype, lora, tolerance) in [
        (Dtype::Float32, false, 2e-5),
        (Dtype::Float32, true, 2e-5),
        (Dtype::Bfloat16, false, 3e-2),
        (Dtype::Bfloat16, true, 3e-2),
    ] {
        let change = |config: &mut RunConfig| {
            (config.dtype, config.lora, config.micro_batch_tokens) = (dtype, lora, 40);
            config.reference_logps = ReferenceLogps::Cache;
        };
        let here = two_steps(&mut engine(dir.path(), change));
        let there = as_on_gpu(|| two_steps(&mut engine(dir.path(), change)));
        let wrong = differences(&here, &there, tolerance);
        assert!(wrong.is_empty(), "{dtype:?}, lora {lora}: {wrong:#?}");
    }
}

/// One call a layer, as on GPUs.
#[test]
fn attention_in_one_call_equals_segment_by_segment() {
    dyad_torch_testing::install();
    one_call_equals_segments(Device::Cpu, &[16]);
}

/// The bridge's GPU kernels, compiled for the host.
#[test]
fn kernels_equal_their_definition() {
    dyad_torch_testing::install();
    as_on_gpu(|| {
        work_between_products_equals_its_definition(Device::Cpu);
        the_head_scores_as_float32(Device::Cpu);
        assert!(dyad_torch::backend::has_gpu_kernels(Kind::BFloat16));
    });
}

/// The lists that a micro-batch sends in one copy are those of its runs.
#[test]
fn a_micro_batch_contains_the_lists_of_its_runs() {
    let pairs = pairs();
    let pairs: Vec<&Tokenized> = pairs.iter().collect();
    let batch = as_on_gpu(|| MicroBatch::pack(&pairs, PairLayout::SharedPairs, Device::Cpu));
    let (sent, runs) = (batch.varlen.unwrap(), dyad_torch::ops::flash_attention::Runs::of(&batch.segments));
    let list = |tensor: &Tensor| Vec::<i64>::try_from(&tensor.to_kind(Kind::Int64)).unwrap();
    assert_eq!(sent.queries.kind(), Kind::Int);
    assert_eq!(list(&sent.queries), runs.queries.iter().map(|&at| i64::from(at)).collect::<Vec<_>>());
    assert_eq!(list(&sent.keys), runs.keys.iter().map(|&at| i64::from(at)).collect::<Vec<_>>());
    let (gathered, copies) = (sent.gathered.unwrap(), runs.copies());
    let wide = |list: &[i32]| list.iter().map(|&at| i64::from(at)).collect::<Vec<_>>();
    assert_eq!(list(&gathered.rows), runs.gather);
    assert_eq!(
        (list(&gathered.starts), list(&gathered.places)),
        (wide(&copies.starts), wide(&copies.places))
    );
    assert!(
        MicroBatch::pack(&pairs, PairLayout::SharedPairs, Device::Cpu).varlen.is_none(),
        "the CPU has kernels of its own"
    );
}

/// Events of the second step, which has two micro-batches.
fn recorded(engine: &mut Engine) -> Vec<ProfilerEvent> {
    as_on_gpu(|| {
        engine.train_step(&share(1), 1e-3).unwrap();
        recorder::start(false, false).unwrap();
        engine.train_step(&share(2), 1e-3).unwrap();
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

/// Operators that need no kernel on a GPU: views, memory allocation, and operators that only call others.
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
        || name.starts_with("dyad::attention")
        || name.contains("VarlenAttention")
        || name.contains("Rotation")
}

/// Kernels that a GPU would launch, by name: the outermost operators that are more than a call. Each is one kernel on a GPU; some
/// reductions are two.
fn launches(events: &[ProfilerEvent]) -> std::collections::BTreeMap<&str, usize> {
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

/// One test for all cases, because a process has one profiler.
#[test]
fn a_step_launches_few_kernels_and_waits_once() {
    dyad_torch_testing::install();
    // (LoRA, kernels of one layer forward, in the reference and backward)
    for (lora, ceiling) in [(false, 69), (true, 123)] {
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

fn waits_once(events: &[ProfilerEvent]) {
    // On the CPU the fused AdamW reads its step counter as a number, on a GPU by its address.
    let adamw: Vec<&ProfilerEvent> =
        events.iter().filter(|event| event.name == "aten::_fused_adamw_").collect();
    let within = |event: &ProfilerEvent, outer: &ProfilerEvent| {
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
    let reads: Vec<&ProfilerEvent> =
        events.iter().filter(|event| event.is_span && event.name == READ).collect();
    assert_eq!(reads.len(), 1, "{reads:?}");
    let after = events.iter().filter(|event| event.start_ns > reads[0].start_ns + reads[0].duration_ns);
    assert!(
        after.into_iter().all(|event| !event.name.starts_with("aten::")),
        "work after the report was read"
    );
}

/// Calls that wait for the device, or copy from pageable memory.
const COPIES: [&str; 7] = [
    "from_slice(",
    "to_device(Device::Cpu)",
    "double_value(",
    "int64_value(",
    "values::<",
    "values(&",
    ".item(",
];
/// Files and calls outside of steps, with the reason. A folder ends with a slash.
const OUTSIDE_STEPS: [(&str, &str); 16] = [
    ("checkpoint/", "writes and restores checkpoints"),
    ("torch/comm/measure.rs", "times the link before the first step"),
    ("zero/unit_weights.rs to_device(Device::Cpu)", "adopts weights when they are loaded"),
    ("engine/generation.rs values::<", "answers prompts at evaluations"),
    ("generate.rs", "generates text"),
    ("load/reading_ranks.rs", "decides at the start who reads the weights"),
    ("model/kernels_agree.rs", "unit tests"),
    ("model/moving_reference.rs to_device(Device::Cpu)", "copies the reference for a checkpoint"),
    ("model/weights/relay.rs", "loads weights"),
    ("model/weights/mod.rs", "loads weights"),
    ("objective/tests.rs", "unit tests"),
    ("optimizer/eight_bit.rs from_slice(", "makes the optimizer's states before the first step"),
    ("optimizer/update.rs double_value(", "the branch for CPUs"),
    ("zero/parameters/checkpoint_view.rs to_device(Device::Cpu)", "copies states for a checkpoint"),
    ("start.rs", "agrees on bucket sizes before the first step"),
    ("torch/transfer.rs", "holds the copies that steps make"),
];
/// Allowed reads of the device: the file, and the number of calls.
const READS: [(&str, usize); 6] = [
    // Between the first pass of a coupled objective and the passes: how many pairs other ranks have.
    ("engine/coupled.rs", 1),
    // Before the passes: how many micro-batches other ranks have.
    ("engine/micro_steps.rs", 1),
    // Evaluations, not an optimizer step.
    ("engine/mod.rs", 2),
    // Scoring with the reference model alone, not an optimizer step.
    ("engine/reference.rs", 1),
    // The report, at the step's end.
    ("engine/step_statistics.rs", 1),
    // Before the passes on several GPUs: which rows of the embedding other ranks look up.
    ("zero/parameters/embedding_rows.rs", 1),
];

fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = sources_below(&root.join("src"), "");
    files.extend(sources_below(&root.join("torch/src"), "torch/"));
    files
}

fn sources_below(root: &Path, prefix: &str) -> Vec<(String, String)> {
    let mut folders = vec![root.to_owned()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let code = before_tests(&text).to_owned();
                let name = path.strip_prefix(root).unwrap().display().to_string();
                files.push((format!("{prefix}{name}"), code));
            }
        }
    }
    files
}

/// A file's text without its unit tests, which stand at its end.
fn before_tests(text: &str) -> &str {
    let mut marks = text.match_indices("\n#[cfg(test)]\n");
    let tests = marks.find(|(at, mark)| {
        let line = text[at + mark.len()..].lines().next().unwrap_or_default();
        line.contains("mod ") && line.ends_with('{')
    });
    &text[..tests.map_or(text.len(), |(at, _)| at)]
}

fn is_import_of_transfer(line: &str) -> bool {
    ["use dyad_torch::transfer::", "use crate::transfer::"].iter().any(|start| line.starts_with(start))
}

/// Number of calls of a function by its bare name.
fn calls(code: &str, name: &str) -> usize {
    let bare =
        |at: usize| !code[..at].ends_with(|before: char| before.is_alphanumeric() || "_.:".contains(before));
    let called = |at: usize| code[at + name.len()..].starts_with(['(', ':']);
    let definitions = code.matches(&format!("fn {name}")).count();
    code.match_indices(name).filter(|(at, _)| bare(*at) && called(*at)).count() - definitions
}

/// Copies between host and device do not show as operators on a machine without a device. So this test searches the sources: inside
/// steps, every file of the trainer must use the functions of `transfer.rs` (TRN-T1).
#[test]
fn steps_copy_and_wait_only_through_transfer() {
    let (mut wrong, mut met) = (Vec::new(), Vec::new());
    let mut reads = Vec::new();
    for (file, code) in sources() {
        for copy in COPIES.into_iter().filter(|copy| code.contains(copy)) {
            let call = format!("{file} {copy}");
            match OUTSIDE_STEPS.iter().find(|(outside, _)| call.starts_with(outside)) {
                Some((outside, _)) => met.push(*outside),
                None => wrong.push(call),
            }
        }
        let imports = code.lines().any(|line| is_import_of_transfer(line) && line.contains("read"));
        if imports {
            reads.push((file, calls(&code, "read")));
        }
    }
    assert!(wrong.is_empty(), "use transfer.rs: {wrong:#?}");
    let stale: Vec<_> = OUTSIDE_STEPS.iter().filter(|(outside, _)| !met.contains(outside)).collect();
    assert!(stale.is_empty(), "no longer needed: {stale:#?}");
    reads.sort();
    assert_eq!(reads, READS.map(|(file, calls)| (file.to_owned(), calls)));
}
