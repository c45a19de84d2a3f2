//! Learning rates of whole runs equal those of transformers' schedulers; evaluations come at the configured steps.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use dyad_tests::python::python;
use dyad_tests::{Workspace, number};
use serde_json::{Value, json};

/// Name and parameters of a schedule in transformers, warmup steps, and the same as keys of a run of twelve steps.
const CASES: [(&str, &str, u64, &str); 9] = [
    ("linear", "{}", 3, "lr_scheduler_type=linear warmup_ratio=0.25"),
    ("cosine", "{}", 0, "lr_scheduler_type=cosine"),
    (
        "cosine",
        r#"{"num_cycles":1.5}"#,
        3,
        "lr_scheduler_type=cosine warmup_ratio=0.25 scheduler_num_cycles=1.5",
    ),
    (
        "cosine_with_min_lr",
        r#"{"num_cycles":0.75,"min_lr_rate":0.1}"#,
        3,
        "lr_scheduler_type=cosine warmup_ratio=0.25 scheduler_num_cycles=0.75 min_lr_ratio=0.1",
    ),
    ("cosine_with_restarts", "{}", 0, "lr_scheduler_type=cosine_with_restarts"),
    (
        "cosine_with_restarts",
        r#"{"num_cycles":3}"#,
        3,
        "lr_scheduler_type=cosine_with_restarts warmup_ratio=0.25 scheduler_num_cycles=3",
    ),
    ("inverse_sqrt", "{}", 0, "lr_scheduler_type=inverse_sqrt"),
    ("inverse_sqrt", "{}", 3, "lr_scheduler_type=inverse_sqrt warmup_ratio=0.25"),
    ("constant_with_warmup", "{}", 3, "lr_scheduler_type=constant warmup_ratio=0.25"),
];

fn of_transformers(workspace: &Workspace) -> Vec<Vec<f64>> {
    let cases: Vec<Value> = CASES
        .iter()
        .map(|(name, kwargs, warmup, _)| {
            let kwargs: Value = serde_json::from_str(kwargs).unwrap();
            json!({ "name": name, "kwargs": kwargs, "peak": 1e-3, "warmup": warmup, "steps": 12 })
        })
        .collect();
    let found = python("schedules.py", &[&Value::from(cases).to_string()], workspace);
    serde_json::from_str(&found).unwrap()
}

#[test]
fn learning_rates_equal_those_of_transformers_schedulers() {
    let workspace = Workspace::with_model(8, "max_steps = 12\n");
    let expected = of_transformers(&workspace);
    for (at, ((name, _, _, keys), expected)) in CASES.iter().zip(&expected).enumerate() {
        let args: Vec<&str> = keys.split(' ').flat_map(|key| ["--set", key]).collect();
        let args = [&["--set", "learning_rate=1e-3"], args.as_slice()].concat();
        let rows = workspace.train(1, &format!("out{at}"), &args);
        let rates: Vec<f64> = rows.iter().map(|row| number(row, "learning_rate")).collect();
        assert_eq!(rates.len(), expected.len());
        for (ours, theirs) in rates.iter().zip(expected) {
            // Both compute in float64, with the operations in another order.
            assert!((ours - theirs).abs() <= 1e-15, "{name} ({keys}): {rates:?} and {expected:?}");
        }
    }
}

#[test]
fn evaluations_by_steps_have_rows_at_these_steps() {
    let config = "validation_file = \"pairs.jsonl\"\nmax_steps = 5\neval_steps = 2\neval_on_start = false\n";
    let workspace = Workspace::with_model(8, config);
    workspace.train(2, "out", &[]);
    let steps: Vec<f64> =
        workspace.rows("out/eval_metrics.jsonl").iter().map(|row| number(row, "step")).collect();
    assert_eq!(steps, [2.0, 4.0, 5.0]);
}
