//! World size, micro-batches, prompt sharing and recomputation do not change a run's numbers.

use dyad_tests::{CURVE, Workspace, assert_same_curve, number};

/// Sums over ranks are added in another order, so float32 results may differ in the last digits.
const TOLERANCE: f64 = 1e-5;

#[test]
fn step_0_is_ln_2_with_no_rewards() {
    let workspace = Workspace::with_model(8, "max_steps = 1\n");
    let rows = workspace.train(2, "out", &[]);
    assert!((number(&rows[0], "loss") - std::f64::consts::LN_2).abs() < 1e-5);
    for name in ["rewards/chosen", "rewards/rejected", "rewards/margins", "kl"] {
        assert_eq!(number(&rows[0], name), 0.0, "{name}");
    }
}

#[test]
fn world_size_does_not_change_the_curve() {
    let workspace = Workspace::with_model(40, "n_epochs = 2\n");
    let one = workspace.train(1, "one", &[]);
    assert_eq!(one.len(), 10);
    for world in [2, 3] {
        let other = workspace.train(world, &format!("w{world}"), &[]);
        assert_same_curve(&one, &other, &CURVE, TOLERANCE);
    }
}

#[test]
fn eight_micro_batches_on_one_rank_equal_eight_ranks_with_one() {
    let workspace = Workspace::with_model(24, "max_steps = 3\n");
    // A budget of one token puts every pair into a micro-batch of its own.
    let micro = workspace.train(1, "micro", &["--set", "micro_batch_tokens=1"]);
    let ranks = workspace.train(8, "ranks", &[]);
    assert_same_curve(&micro, &ranks, &CURVE, TOLERANCE);
}

#[test]
fn a_rank_without_pairs_takes_part_in_every_step() {
    let workspace = Workspace::with_model(4, "max_steps = 4\n");
    let small = ["--set", "batch_size=2"];
    let one = workspace.train(1, "one", &small);
    let three = workspace.train(3, "three", &small);
    assert_same_curve(&one, &three, &CURVE, TOLERANCE);
}

#[test]
fn sharing_prompts_and_recomputing_activations_change_nothing() {
    let workspace = Workspace::with_model(24, "n_epochs = 2\n");
    let plain = workspace.train(1, "plain", &[]);
    let separate = workspace.train(1, "separate", &["--set", "prefix_sharing=false"]);
    // Attention over other shapes rounds differently in every layer, and six steps at a high learning rate amplify that.
    assert_same_curve(&plain, &separate, &CURVE, 10.0 * TOLERANCE);
    let recomputed = workspace.train(1, "recomputed", &["--set", "activation_checkpointing=true"]);
    assert_same_curve(&plain, &recomputed, &CURVE, 0.0);
}

/// A recomputed layer must drop the same values as the first time.
#[test]
fn recomputed_layers_draw_the_same_dropout_masks() {
    let workspace = Workspace::with_model(16, "n_epochs = 2\nlora = true\nlora_r = 4\nlora_dropout = 0.3\n");
    let kept = workspace.train(1, "kept", &["--set", "activation_checkpointing=none"]);
    for mode in ["selective", "full"] {
        let set = format!("activation_checkpointing={mode}");
        assert_same_curve(&kept, &workspace.train(1, mode, &["--set", &set]), &CURVE, 0.0);
    }
}

#[test]
fn lora_and_sft_do_not_depend_on_the_world_size_either() {
    let workspace = Workspace::with_model(24, "n_epochs = 1\nlora_r = 4\n");
    let lora = |world, name: &str| workspace.train(world, name, &["--set", "lora=true"]);
    assert_same_curve(&lora(1, "l1"), &lora(2, "l2"), &CURVE, TOLERANCE);
    let sft = |world, name: &str| workspace.train(world, name, &["--set", "training_method=sft"]);
    assert_same_curve(&sft(1, "s1"), &sft(3, "s3"), &["loss", "grad_norm", "logps/chosen"], TOLERANCE);
}

/// The estimate of the KL divergence is that of the whole batch, in steps and evaluations; partners may be another rank's records.
#[test]
fn kto_does_not_depend_on_the_world_size() {
    let workspace = Workspace::with_model(24, "loss_type = \"kto\"\nn_epochs = 2\n");
    let labelled = |pair: &str| {
        let pair: serde_json::Value = serde_json::from_str(pair).unwrap();
        let prompt = &pair["input"]["messages"];
        let row = |output: &str, label: bool| {
            serde_json::json!({ "prompt": prompt, "completion": pair[output], "label": label }).to_string()
        };
        [row("preferred_output", true), row("non_preferred_output", false)].join("\n")
    };
    let lines: Vec<String> = dyad_tests::pair_lines(12).lines().map(labelled).collect();
    workspace.write("pairs.jsonl", &(lines.join("\n") + "\n"));
    let names =
        ["loss", "grad_norm", "kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logits/rejected"];
    let train = |world, name: &str, more: &[&str]| {
        let args = [&["--set", "validation_file=pairs.jsonl"], more].concat();
        let rows = workspace.train(world, name, &args);
        (rows, workspace.rows(&format!("{name}/eval_metrics.jsonl")))
    };
    let (one, evaluated) = train(1, "one", &[]);
    assert!(
        one.iter().skip(1).any(|row| number(row, "kl") > 0.0) && !one[0].contains_key("rewards/accuracies")
    );
    let (three, evaluated_by_three) =
        train(3, "three", &["--set", "micro_batch_tokens=1", "--set", "zero_stage=2"]);
    assert_same_curve(&one, &three, &names, 10.0 * TOLERANCE);
    let evaluations = names.map(|name| format!("eval_{name}"));
    let evaluations: Vec<&str> =
        evaluations.iter().map(String::as_str).filter(|name| *name != "eval_grad_norm").collect();
    assert_same_curve(&evaluated, &evaluated_by_three, &evaluations, 10.0 * TOLERANCE);
    // With dropout the second pass computes the partners' answers again, so that it draws the masks of the first.
    let dropout = ["--set", "lora=true", "--set", "lora_r=4", "--set", "lora_dropout=0.2"];
    let (rows, _) = train(2, "dropout", &dropout);
    assert!(rows.iter().all(|row| number(row, "loss").is_finite()));
}

/// bfloat16 has 8 bits of mantissa: the first loss is exact, later ones follow float32 within a few per cent.
#[test]
fn bfloat16_follows_float32() {
    let workspace = Workspace::with_model(24, "max_steps = 6\n");
    let slow = ["--set", "learning_rate=1e-3"];
    let wide = workspace.train(1, "wide", &slow);
    let narrow = workspace.train(1, "narrow", &[&slow[..], &["--set", "dtype=bfloat16"]].concat());
    assert!((number(&narrow[0], "loss") - std::f64::consts::LN_2).abs() < 1e-5);
    assert_same_curve(&wide, &narrow, &["loss"], 0.05);
}
