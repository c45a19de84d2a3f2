//! Reference log-probabilities that are cached instead of recomputed: the same run with less work.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use dyad_tests::{CURVE, Row, Workspace, assert_same_curve, number, text};

/// Micro-batches with other pairs round differently.
const TOLERANCE: f64 = 1e-5;

/// All metrics except two. The divergence needs the reference model. The accuracy is noise in the first step: rewards are zero
/// except for rounding.
fn curve() -> Vec<&'static str> {
    CURVE.into_iter().filter(|name| !["kl", "rewards/accuracies"].contains(name)).collect()
}

fn workspace(extra: &str) -> Workspace {
    Workspace::with_model(
        40,
        &format!(
            "n_epochs = 2\nvalidation_file = \"pairs.jsonl\"\nn_evals = 2\nreference_cache = \"kept/scores.sqlite\"\n{extra}"
        ),
    )
}

fn train(workspace: &Workspace, world: usize, out: &str, mode: &str) -> Vec<Row> {
    workspace.train(world, out, &["--set", &format!("reference_logps={mode}")])
}

fn measured(rows: &[Row], key: &str) -> Vec<bool> {
    rows.iter().map(|row| row.contains_key(key)).collect()
}

/// Returns the loss of the last evaluation, and whether each evaluation measured the divergence.
fn evaluations(workspace: &Workspace, out: &str) -> (f64, Vec<bool>) {
    let rows = workspace.rows(&format!("{out}/eval_metrics.jsonl"));
    (number(rows.last().unwrap(), "eval_loss"), measured(&rows, "eval_kl"))
}

#[test]
fn the_second_epoch_and_the_next_run_reuse_reference_scores() {
    let workspace = workspace("");
    let computed = train(&workspace, 2, "computed", "compute");
    assert!(!workspace.path("kept").exists(), "nothing is kept unless asked for");
    let cached = train(&workspace, 2, "cached", "cache");
    assert_same_curve(&computed, &cached, &curve(), TOLERANCE);
    assert_eq!(measured(&computed, "kl"), [true; 10]);
    // Steps are assigned four ahead, so the scores of the first epoch's last steps may arrive after the second epoch's first assignments.
    assert_eq!(measured(&cached, "kl")[..5], [true; 5]);
    let again = train(&workspace, 1, "again", "cache");
    assert_same_curve(&computed, &again, &curve(), TOLERANCE);
    assert_eq!(measured(&again, "kl"), [false; 10]);
    let (loss, kl) = evaluations(&workspace, "again");
    assert!((loss - evaluations(&workspace, "computed").0).abs() < TOLERANCE);
    assert_eq!(kl, [true; 3], "evaluations still hold the policy against the reference");
}

#[test]
fn scores_of_another_model_precision_or_other_tokens_are_not_reused() {
    let workspace = workspace("max_steps = 2\nshuffle = false\n");
    train(&workspace, 1, "first", "cache");
    let kl = |out: &str, args: &[&str]| {
        measured(&workspace.train(1, out, &[&["--set", "reference_logps=cache"], args].concat()), "kl")
    };
    assert_eq!(kl("same", &[]), [false; 2]);
    assert_eq!(kl("narrow", &["--set", "dtype=bfloat16"]), [true; 2]);
    // A longer limit that cuts no pair changes no number.
    assert_eq!(kl("longer", &["--set", "max_seq_length=200"]), [false; 2]);
    assert!(kl("shorter", &["--set", "max_seq_length=40", "--set", "batch_size=40"])[0]);
    workspace.new_model("other", &["--seed", "7"]);
    assert_eq!(kl("other-model", &["--set", "model=other"]), [true; 2]);
}

/// Prepends text to the template, as a template does that writes today's date.
fn write_into_the_prompt(workspace: &Workspace, words: &str) {
    let path = workspace.path("model/tokenizer_config.json");
    let mut config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let template = config["chat_template"].as_str().unwrap();
    config["chat_template"] = format!("{words}{template}").into();
    std::fs::write(&path, config.to_string()).unwrap();
}

#[test]
fn scores_are_cached_by_the_tokens_of_a_pair() {
    let workspace = workspace("max_steps = 2\nshuffle = false\nreference_logps = \"cache\"\n");
    let kl = |out: &str, file: &str| {
        let rows = workspace.train(1, out, &["--set", &format!("training_file={file}")]);
        // Before its first update the policy equals the reference, so the loss is ln 2.
        assert!((number(&rows[0], "loss") - std::f64::consts::LN_2).abs() < 1e-6, "{out}: {:?}", rows[0]);
        measured(&rows, "kl")
    };
    assert_eq!(kl("first", "pairs.jsonl"), [true; 2]);
    write_into_the_prompt(&workspace, "{# a remark that renders to nothing #}");
    let spaced = std::fs::read_to_string(workspace.path("pairs.jsonl")).unwrap().replace("\":", "\" : ");
    workspace.write("spaced.jsonl", &spaced);
    assert_eq!(kl("same-tokens", "spaced.jsonl"), [false; 2]);
    write_into_the_prompt(&workspace, "Today is the 29th.");
    assert_eq!(kl("another-day", "pairs.jsonl"), [true; 2]);
}

#[test]
fn precomputed_scores_train_the_same_model_without_the_reference() {
    let workspace = workspace("");
    let computed = train(&workspace, 2, "computed", "compute");
    let output = workspace.launch(2, &["--set", "output_dir=pre", "--set", "reference_logps=precompute"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("scored   80 pairs with the reference model"), "{}", text(&output));
    let precomputed = workspace.rows("pre/metrics.jsonl");
    assert_same_curve(&computed, &precomputed, &curve(), TOLERANCE);
    assert_eq!(measured(&precomputed, "kl"), [false; 10]);
    let (loss, kl) = evaluations(&workspace, "pre");
    assert!((loss - evaluations(&workspace, "computed").0).abs() < TOLERANCE);
    assert_eq!(kl, [false; 3]);
}

#[test]
fn adapters_precompute_too() {
    let workspace = workspace("lora = true\nlora_r = 4\n");
    let computed = train(&workspace, 1, "computed", "compute");
    assert_same_curve(&computed, &train(&workspace, 2, "pre", "precompute"), &curve(), TOLERANCE);
}

#[test]
fn a_cache_that_cannot_be_used_is_named_before_training() {
    let workspace = workspace("reference_logps = \"cache\"\n");
    workspace.write("kept", "a file where a folder should be");
    let output = workspace.launch(1, &[]);
    let error = text(&output);
    assert_eq!(output.status.code(), Some(2), "{error}");
    let told = |mark: &str, words: &str| {
        error.lines().filter(|line| line.starts_with(mark) && line.contains(words)).count()
    };
    assert_eq!(told("error: ", "cannot use the reference cache kept/scores.sqlite"), 1, "{error}");
    assert_eq!(told("hint: ", "`reference_cache`"), 1, "{error}");
    assert!(!workspace.path("out/metrics.jsonl").exists() || workspace.rows("out/metrics.jsonl").is_empty());
}
