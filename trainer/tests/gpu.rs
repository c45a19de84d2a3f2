//! Tests that need a GPU: `make test-gpu`. Elsewhere they are ignored, except those that find NCCL and compile kernels. `communicator.rs`
//! tests NCCL's collectives; `gpu_path.rs` tests the parts of this path that need no GPU.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]
#![expect(unsafe_code, reason = "loads a library")]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dyad_data::tokenized::Tokenized;
use dyad_proto::RunConfig;
use dyad_proto::run_config::{ActivationCheckpointing, Dtype, Optim, ReferenceLogps};
use dyad_torch::comm::nccl::{Nccl, UniqueId};
use dyad_torch::recorder::{self, ProfilerEvent};
use dyad_torch::transfer::READ;
use support::attention::one_call_equals_segments;
use support::kernels::{the_head_scores_as_float32, work_between_products_equals_its_definition};
use support::steps::{differences, share, two_steps};
use support::{engine, engine_of, new_model, parts_on, widen_vocabulary};
use tch::{Device, Kind};
use trainer::engine::{Engine, StepShare};

/// Must be called first: libtorch looks for CUDA once, at its first computation.
fn device() -> Device {
    dyad_torch::device::open("cuda:0").unwrap()
}

/// Path of NCCL as `make cuda` or `make test` installs it.
fn shipped_nccl() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let python = std::fs::read_dir(root.join(".venv/parity/lib")).into_iter().flatten();
    let python = python.filter_map(|entry| Some(entry.ok()?.path().join("site-packages")));
    let found = [root.join(".libtorch")]
        .into_iter()
        .chain(python)
        .map(|packages| packages.join("nvidia/nccl/lib/libnccl.so.2"));
    let library = found.into_iter().find(|library| library.exists());
    library.unwrap_or_else(|| panic!("no libnccl.so.2: run `make test` or `make cuda`"))
}

/// Wheels install no `libnccl.so` next to it. Making an id needs no GPU.
#[test]
fn nccl_is_found_by_the_name_that_wheels_ship() {
    // SAFETY: NCCL's initialisers touch no state of this test.
    let library = unsafe { libloading::Library::new(shipped_nccl()) }.unwrap();
    std::mem::forget(library);
    let id = UniqueId::new().unwrap().to_bytes();
    assert!(id.len() == 128 && id.iter().any(|&byte| byte != 0), "{id:?}");
}

/// NVRTC compiles them; that needs no GPU.
#[test]
fn kernels_compile_for_the_oldest_supported_gpu() {
    let packages = shipped_nccl().ancestors().nth(3).unwrap().join("cu13/lib/libnvrtc.so.13");
    // SAFETY: NVRTC's initialisers touch no state of this test.
    std::mem::forget(unsafe { libloading::Library::new(packages) }.unwrap());
    let kernels = dyad_torch::gpu::compile().unwrap().to_src();
    assert!(kernels.contains("gpu_head") && kernels.contains(".target sm_80"), "{kernels}");
}

#[test]
#[ignore = "needs a GPU: make test-gpu"]
fn attention_in_one_call_equals_segment_by_segment() {
    one_call_equals_segments(device(), &[16, 64, 128]);
}

/// An engine on the GPU, with a communicator of one rank.
fn engine_there(dir: &Path, change: impl FnOnce(&mut RunConfig)) -> Engine {
    let device = self::device();
    let alone = Nccl::connect(&UniqueId::new().unwrap(), 0, 1, 0).unwrap();
    engine_of(parts_on(device, dir, change), Arc::new(alone))
}

/// Tests every way of keeping weights, states and activations.
#[test]
#[ignore = "needs a GPU: make test-gpu"]
fn a_step_equals_one_on_the_cpu() {
    device();
    let dir = tempfile::tempdir().unwrap();
    new_model(dir.path(), |options| options.layers = 2);
    type Change = fn(&mut RunConfig);
    // Float32 sums in another order; bfloat16 keeps eight bits of everything.
    let cases: [(&str, f64, Change); 8] = [
        ("float32", 1e-4, |_| {}),
        ("float32, LoRA", 1e-4, |config| config.lora = true),
        ("float32, recomputed", 1e-4, |config| {
            config.activation_checkpointing = ActivationCheckpointing::Full
        }),
        ("bfloat16", 3e-2, |config| config.dtype = Dtype::Bfloat16),
        ("bfloat16, LoRA", 3e-2, |config| (config.dtype, config.lora) = (Dtype::Bfloat16, true)),
        ("bfloat16, 8-bit moments", 3e-2, |config| {
            (config.dtype, config.optim) = (Dtype::Bfloat16, Optim::Adamw8bit)
        }),
        ("bfloat16, optimizer on the host", 3e-2, |config| {
            (config.dtype, config.offload_optimizer) = (Dtype::Bfloat16, true);
        }),
        ("bfloat16, reference on the host", 3e-2, |config| {
            (config.dtype, config.offload_reference) = (Dtype::Bfloat16, true);
        }),
    ];
    let mut wrong = Vec::new();
    for (name, tolerance, change) in cases {
        let change = |config: &mut RunConfig| {
            (config.dtype, config.micro_batch_tokens) = (Dtype::Float32, 40);
            config.reference_logps = ReferenceLogps::Cache;
            change(config);
        };
        let here = two_steps(&mut engine(dir.path(), change));
        let there = two_steps(&mut engine_there(dir.path(), change));
        println!("{name}: loss {} here, {} there", here[1].sums.loss, there[1].sums.loss);
        wrong.extend(differences(&here, &there, tolerance).into_iter().map(|what| format!("{name}: {what}")));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
#[ignore = "needs a GPU: make test-gpu"]
fn kernels_equal_their_definition() {
    let device = device();
    work_between_products_equals_its_definition(device);
    the_head_scores_as_float32(device);
    assert!(dyad_torch::backend::has_gpu_kernels(Kind::BFloat16), "our own kernels are not there");
}

/// One test for both cases, because a process has one profiler. Records the second step, with all that the GPU does.
#[test]
#[ignore = "needs a GPU: make test-gpu"]
fn a_step_uses_flash_attention_and_waits_once() {
    device();
    let dir = tempfile::tempdir().unwrap();
    new_model(dir.path(), |options| options.layers = 2);
    for lora in [false, true] {
        let mut engine =
            engine_there(dir.path(), |config| (config.dtype, config.lora) = (Dtype::Bfloat16, lora));
        engine.train_step(&share(1), 1e-3).unwrap();
        recorder::start(true, false).unwrap();
        engine.train_step(&share(2), 1e-3).unwrap();
        let events = recorder::stop(None).unwrap();
        let kernels = names(events.iter().filter(|event| event.on_device));
        println!("lora {lora}: {} kernels\n{kernels:#?}", kernels.values().sum::<usize>());
        let count = |part: &str| {
            kernels.iter().filter(|(name, _)| name.contains(part)).map(|(_, count)| count).sum::<usize>()
        };
        assert!(
            count("flash_fwd") >= 4 && count("flash_bwd") >= 2,
            "policy and reference forward, policy back"
        );
        waits_once(&events);
    }
}

fn names<'a>(events: impl Iterator<Item = &'a ProfilerEvent>) -> BTreeMap<&'a str, usize> {
    let mut counts = BTreeMap::new();
    events.for_each(|event| *counts.entry(&event.name[..event.name.len().min(80)]).or_default() += 1);
    counts
}

/// Asserts that the host waits for the GPU only where it reads the step's report.
fn waits_once(events: &[ProfilerEvent]) {
    let read = events.iter().find(|event| event.is_span && event.name == READ).unwrap();
    let step = events.iter().find(|event| event.is_span && event.name == "step").unwrap();
    let within = |event: &ProfilerEvent, outer: &ProfilerEvent| {
        (outer.start_ns..outer.start_ns + outer.duration_ns).contains(&event.start_ns)
    };
    let waits: Vec<&ProfilerEvent> = events
        .iter()
        .filter(|event| event.name.contains("Synchronize") && !event.on_device && within(event, step))
        .collect();
    assert!(
        !waits.is_empty(),
        "the recording has no call that waits, not even the one that reads the report"
    );
    let elsewhere: Vec<&&ProfilerEvent> = waits.iter().filter(|event| !within(event, read)).collect();
    assert!(elsewhere.is_empty(), "{elsewhere:#?}");
}

/// Logits of two pairs of 600 completion tokens a side would take 1.1 GiB in bfloat16.
#[test]
#[ignore = "needs a GPU: make test-gpu"]
fn memory_does_not_grow_by_tokens_times_vocabulary() {
    device();
    let dir = tempfile::tempdir().unwrap();
    new_model(dir.path(), |options| {
        (options.hidden_size, options.heads, options.kv_heads, options.intermediate_size) = (64, 2, 2, 64);
    });
    widen_vocabulary(dir.path(), 256_000);
    let mut peaks = Vec::new();
    for length in [300, 600] {
        let mut engine =
            engine_there(dir.path(), |config| (config.lora, config.dtype) = (true, Dtype::Bfloat16));
        let pair = |n: u32| {
            Tokenized::new(
                vec![5, 6, n],
                (0..length).map(|at| 7 + at % 200).collect(),
                (0..length).map(|at| 8 + at % 150).collect(),
            )
        };
        let step = StepShare { pairs: (10..12).map(pair).collect(), references: vec![None; 2], ..share(1) };
        recorder::start(true, true).unwrap();
        engine.train_step(&step, 1e-3).unwrap();
        let events = recorder::stop(None).unwrap();
        peaks.push(
            events.iter().filter(|event| event.name == "[memory]").map(|event| event.bytes).max().unwrap(),
        );
    }
    println!("largest allocations: {peaks:?}");
    assert!(peaks.iter().all(|&bytes| bytes <= 256 << 20), "{peaks:?}");
}
