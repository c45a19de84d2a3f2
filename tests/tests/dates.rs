//! The date that templates see: local, chosen once at the start of a run, and kept when it resumes.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fs;
use std::path::PathBuf;

use dyad_tests::{CURVE, Row, Workspace, assert_same_curve, clock, number, text};

const DAY: i64 = 86_400;

/// Starts every prompt with the date.
const TEMPLATE: &str = "{{ strftime_now('%d %B %Y') }}|{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                        {% if add_generation_prompt %}assistant: {% endif %}";

struct Calendar {
    workspace: Workspace,
    shim: PathBuf,
}

impl Calendar {
    fn new(config: &str) -> Self {
        let workspace = Workspace::with_model(16, config);
        fs::write(workspace.path("model/chat_template.jinja"), TEMPLATE).unwrap();
        Self { shim: clock::shim(&workspace), workspace }
    }

    /// Trains with the clock `later` seconds ahead, and returns the rows of its metrics.
    fn train(&self, later: i64, output_dir: &str, args: &[&str]) -> Vec<Row> {
        let target = format!("output_dir={output_dir}");
        let mut command = self.workspace.launcher(2, &[&["--set", target.as_str()], args].concat());
        clock::later(&mut command, &self.shim, later);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        self.workspace.rows(&format!("{output_dir}/metrics.jsonl"))
    }

    /// Returns the date in a run's `run.json`.
    fn recorded(&self, output_dir: &str) -> String {
        let json = fs::read_to_string(self.workspace.path(output_dir).join("run.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        json["template_date"].as_str().unwrap().to_owned()
    }
}

#[test]
fn a_resume_on_another_day_keeps_the_date_and_is_the_same_run() {
    let calendar = Calendar::new("max_steps = 4\nn_checkpoints = 2\n");
    let whole = calendar.train(0, "whole", &[]);
    let date = calendar.recorded("whole");
    let date = format!("template_date={date}");
    // An interrupted run that resumes 40 days later.
    calendar.train(0, "out", &["--set", &date]);
    fs::remove_dir_all(calendar.workspace.path("out/final")).unwrap();
    let resumed = calendar.train(40 * DAY, "out", &["--resume"]);
    assert_same_curve(&whole, &resumed, &CURVE, 0.0);
    assert_eq!(calendar.recorded("out"), calendar.recorded("whole"));
    // A new run on another day gets another date and other numbers, so the comparison above can fail.
    let later = calendar.train(40 * DAY, "later", &[]);
    assert_ne!(calendar.recorded("later")[..10], calendar.recorded("whole")[..10]);
    assert_ne!(number(&later[0], "logps/chosen"), number(&whole[0], "logps/chosen"));
}

#[test]
fn reference_scores_of_another_day_are_not_used_for_todays_tokens() {
    let config = "max_steps = 1\nreference_logps = \"cache\"\nreference_cache = \"cache.sqlite\"\n";
    let calendar = Calendar::new(config);
    for (day, folder) in [(0, "first"), (DAY, "second")] {
        let rows = calendar.train(day, folder, &[]);
        // In the first step policy and reference are the same model, so the loss is ln 2.
        let difference = number(&rows[0], "loss") - std::f64::consts::LN_2;
        assert!(difference.abs() < 1e-6, "{folder}: {rows:?}");
    }
}

#[test]
fn the_date_is_in_the_local_time_zone() {
    let calendar = Calendar::new("max_steps = 1\n");
    let mut dates = Vec::new();
    // UTC+14 and UTC-12 never have the same date.
    for (zone, folder) in [("XXX-14", "east"), ("XXX12", "west")] {
        let target = format!("output_dir={folder}");
        let output =
            calendar.workspace.launcher(1, &["--set", target.as_str()]).env("TZ", zone).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        dates.push(calendar.recorded(folder)[..10].to_owned());
    }
    assert_ne!(dates[0], dates[1]);
}
