//! `make bench-gpu` without a GPU: the error, and its script end to end on the CPU.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::path::PathBuf;
use std::process::Command;

use dyad_families::Sizes;
use dyad_families::shape::{PairTokens, Shape};
use dyad_tests::{Workspace, root, text};

fn bench(options: &[&str]) -> Command {
    let python: PathBuf = root().join(".venv/parity/bin/python");
    assert!(python.is_file(), "{} is missing; run `make test`", python.display());
    let mut command = Command::new(&python);
    command.arg(root().join("tests/bench/bench_gpu.py")).args(options);
    command
}

#[test]
fn bench_gpu_without_a_gpu_fails_with_a_hint() {
    // Hide all GPUs.
    let output = bench(&[]).env("CUDA_VISIBLE_DEVICES", "").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with("bench-gpu: no CUDA device") && said.contains("\n  hint: "), "{said}");
    assert_eq!(said.lines().count(), 2, "{said}");
}

/// Trainer, `plan` and benchmarks report the same FLOPs: those of `dyad_families::shape`.
#[test]
fn benchmarks_count_the_same_flops_as_trainer_and_plan() {
    let script = "\
import json
from flops import SHAPES, Pair, forward
pair = Pair(150, 310, 290)
print(json.dumps({name: [s.hidden, s.inner, s.layers, s.heads, s.kv_heads, s.vocabulary, s.untied_head, s.parameters()]
    + [forward(s, [pair], shared) for shared in (True, False)] for name, s in SHAPES.items()}))";
    let output = Command::new("python3")
        .args(["-c", script])
        .env("PYTHONPATH", root().join("tests/bench"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let shapes: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let pair = PairTokens { prompt: 150.0, chosen: 310.0, rejected: 290.0 };
    let shapes = shapes.as_object().unwrap();
    assert!(shapes.len() >= 3);
    for (name, found) in shapes {
        let size = |at: usize| found[at].as_i64().unwrap();
        let shape = Shape::of(
            name,
            &Sizes {
                hidden: size(0),
                ffn: size(1),
                layers: size(2) as usize,
                query: size(0),
                key: size(0) / size(3) * size(4),
                vocab: size(5),
                tied: !found[6].as_bool().unwrap(),
                max_position_embeddings: 0,
                model_type: String::new(),
            },
        );
        assert_eq!(shape.parameters(), found[7].as_f64().unwrap(), "{name}");
        for (at, work) in [(8, pair.shared()), (9, pair.separate())] {
            let ours = shape.forward(work);
            for (part, ours) in [ours.layers, ours.head, ours.attention].into_iter().enumerate() {
                let theirs = found[at][part].as_f64().unwrap();
                assert!((ours / theirs - 1.0).abs() < 1e-12, "{name}: {ours} in Rust, {theirs} in Python");
            }
        }
    }
}

/// Small enough for a CPU; every column of Dyad's row is filled. TRL takes too long for a test, and so does bfloat16 on CPUs without
/// instructions for it.
#[test]
fn the_whole_script_runs_on_a_cpu() {
    let workspace = Workspace::empty();
    let work = workspace.path("work").display().to_string();
    let output = bench(&[
        "--device=cpu",
        "--shapes=tiny",
        "--modes=lora,full",
        "--workloads=2k",
        "--skip-trl",
        "--dtype=float32",
        "--work",
        &work,
    ])
    .output()
    .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let table = String::from_utf8(output.stdout).unwrap();
    for training in ["LoRA", "full"] {
        let start = format!("| tiny | {training} | 2k | Dyad |");
        let row = table.lines().find(|line| line.starts_with(&start)).unwrap_or_else(|| panic!("{table}"));
        let columns: Vec<&str> = row.split('|').map(str::trim).collect();
        for column in [5, 7] {
            assert!(columns[column].replace(',', "").parse::<f64>().unwrap() > 0.0, "{row}");
        }
        for share in [8, 9, 10] {
            let percent: f64 = columns[share].strip_suffix(" %").unwrap().parse().unwrap();
            assert!(percent > 0.0 && percent < 200.0, "{row}");
        }
        assert!(columns[11].parse::<f64>().unwrap() > 0.01 && columns[12].contains("attention"), "{row}");
    }
}

/// 84.64 TFLOP (see below) and 2,900 tokens a step in 2 s, on a device of 84.64 TFLOP/s.
#[test]
fn the_tables_numbers_follow_from_seconds_and_flops() {
    let code = "from bench_gpu import *; p = Pair(1100, 350, 350); w = WORKLOADS['2k']._replace(batch=1); \
                cell = Cell('8b', SHAPES['8b'], False, '2k', w, [p]); flops = model_flops(cell.shape, [p], False); \
                args = argparse.Namespace(peak=flops); row = Row('Dyad', 2.0, 3.5, 'flash', flops * 1.5, 0.625, 'x'); \
                print(line(args, cell, row, Row('TRL', 5.0)))";
    let output = Command::new(root().join(".venv/parity/bin/python"))
        .args(["-c", code])
        .current_dir(root().join("tests/bench"))
        .output()
        .unwrap();
    assert_eq!(
        text(&output).trim(),
        "| 8b | full | 2k | Dyad | 0.50 | 2.50x | 1,450 | 50.0 % | 75.0 % | 62.5 % | 3.50 | flash | x |"
    );
}

/// TFLOP of one pair at 8 B: full fine-tuning and LoRA, with forward passes unshared and shared. The expected values were computed by
/// hand.
#[test]
fn flops_formulas_match_values_computed_by_hand() {
    let code = "from flops import *; s = SHAPES['8b']; p = [Pair(1100, 350, 350)]; \
                print(sum(forward(s, p, False)), sum(forward(s, p, True)), model_flops(s, p, True), \
                executed_flops(s, p, False, True), peak('NVIDIA H200'), peak('NVIDIA H100 PCIe'), peak('Tesla T4'))";
    let output =
        Command::new("python3").args(["-c", code]).current_dir(root().join("tests/bench")).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let words: Vec<&str> = said.split_whitespace().collect();
    let tera = |index: usize| words[index].parse::<f64>().unwrap() / 1e12;
    for (index, expected) in [(0, 42.32), (1, 26.65), (2, 84.64)] {
        assert!((tera(index) - expected).abs() < 0.01, "{said}");
    }
    // Two forward passes and a backward pass of two products each; flash attention's backward pass costs 2.5 times its forward pass.
    let attention = 4.0 * 4096.0 * 32.0 * (1100.0 * 550.0 + 2.0 * 350.0 * 1275.0) / 1e12;
    assert!((tera(3) - (4.0 * tera(1) + 0.5 * attention)).abs() < 0.01, "{said}");
    assert_eq!(words[4..], ["989000000000000.0", "756000000000000.0", "None"]);
}
