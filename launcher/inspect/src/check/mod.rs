//! `launcher check`: every problem of every record of files, in one pass and in bounded memory.

mod counts;
mod duplicates;
mod finding;
mod fix;
mod lengths;
mod report;
mod rules;
mod tools;

use std::path::PathBuf;

use dyad_proto::pairs::forms::Form;
use dyad_proto::pairs::json_lines;
use dyad_proto::pairs::source::Located;
use dyad_proto::run_config::DataFiles;
use dyad_proto::{Fault, RunConfig};
use rayon::prelude::*;

pub use self::counts::{Counts, Tokens};
pub use self::finding::{Finding, Problem, Severity};
pub use self::fix::Written;
pub use self::lengths::{Lengths, Summary};
pub use self::report::{json, table};

use self::duplicates::{Digest, Seen};
use self::fix::Fixed;
use self::rules::Fields;
use self::tools::KnownTools;
use crate::model::KnownModel;
use crate::records::{Line, Records, Window, files};

/// What to check.
#[derive(Clone, Debug, Default)]
pub struct CheckOptions {
    /// Files of pairs to train on.
    pub training: DataFiles,
    /// Files of pairs to evaluate on: none of them may be in the files before.
    pub validation: Option<DataFiles>,
    /// Model, form and limits of a run; `model` may be empty.
    pub config: RunConfig,
    /// Most findings to keep; the others are counted.
    pub limit: usize,
    /// Folder for clean records and rejects.
    pub fix: Option<PathBuf>,
}

/// What was found.
#[derive(Debug, Default)]
pub struct CheckReport {
    /// By file, in order.
    pub files: Vec<CheckedFile>,
    /// The first findings, in order.
    pub findings: Vec<Finding>,
    /// Number of all findings: errors, left out, warnings.
    pub found: [u64; 3],
    /// Most tokens of a sequence; `None` without a model.
    pub max_len: Option<usize>,
}

/// One file.
#[derive(Debug)]
pub struct CheckedFile {
    /// Its name.
    pub path: String,
    /// What is counted in it: line, row or item.
    pub unit: String,
    /// Its form; `None` without a record.
    pub form: Option<&'static Form>,
    /// Counts of its records.
    pub counts: Counts,
    /// Records with a finding: errors, left out, warnings. A record counts once, for the worst.
    pub records: [u64; 3],
    /// What was written.
    pub written: Option<Written>,
}

/// Checks files.
pub fn run(options: &CheckOptions) -> Result<CheckReport, Fault> {
    let model = match options.config.model.is_empty() {
        true => None,
        false => Some(KnownModel::load(&options.config)?),
    };
    let mut located = files("FILE", &options.training)?;
    if let Some(validation) = &options.validation {
        located.extend(files("--validation", validation)?);
    }
    let report =
        CheckReport { max_len: model.as_ref().map(|model| model.rule.max_len), ..CheckReport::default() };
    let mut checking =
        Checking { options, model: model.as_ref(), seen: Seen::default(), located: &located, report };
    for at in 0..located.len() {
        checking.file(at)?;
    }
    Ok(checking.report)
}

/// Files being checked.
struct Checking<'c> {
    options: &'c CheckOptions,
    model: Option<&'c KnownModel>,
    seen: Seen,
    located: &'c [Located],
    report: CheckReport,
}

/// What was found about one record.
#[derive(Default)]
struct Looked {
    problems: Vec<Problem>,
    /// `None` for a record that cannot be read.
    digest: Option<Digest>,
}

impl Checking<'_> {
    fn file(&mut self, at: usize) -> Result<(), Fault> {
        let file = &self.located[at];
        let mut records = Records::open("FILE", file, self.options.config.dataset_format)?;
        let mut fixed = self.options.fix.as_ref().map(|folder| Fixed::create(folder, file)).transpose()?;
        let mut checked = CheckedFile {
            path: file.shown.clone(),
            unit: file.unit.to_string(),
            form: None,
            counts: Counts::default(),
            records: [0; 3],
            written: None,
        };
        while let Some(window) = records.next()? {
            let Some(form) = records.form() else { continue };
            checked.form = Some(form);
            let parts: Vec<(Counts, Vec<Looked>)> =
                window.parts().map(|lines| part(self.model, form, &window, lines)).collect();
            let mut lines = window.lines.iter();
            for (counts, looked) in parts {
                checked.counts.join(counts);
                // In this order: the end of a part takes no line of the next one.
                for (looked, line) in looked.into_iter().zip(lines.by_ref()) {
                    let problems = self.note(at, &mut checked, line, looked);
                    if let Some(fixed) = &mut fixed {
                        fixed.put(line.number, window.record(line), &problems)?;
                    }
                }
            }
        }
        if checked.counts.records == 0 {
            return Err(
                Fault::input(format!("{} holds no records", file.shown)).hint("docs/data.md has all forms")
            );
        }
        checked.written = fixed.map(Fixed::finish).transpose()?;
        self.report.files.push(checked);
        Ok(())
    }

    /// Adds what was found about a record; returns all of its problems.
    fn note(&mut self, at: usize, checked: &mut CheckedFile, line: &Line, looked: Looked) -> Vec<Problem> {
        let Looked { mut problems, digest } = looked;
        let place = |file: u32, line: u64| {
            let Located { shown, unit, .. } = &self.located[file as usize];
            if file as usize == at { format!("{unit} {line}") } else { format!("{shown} {unit} {line}") }
        };
        let twice = digest.and_then(|digest| self.seen.add(digest, at as u32, line.number, place));
        problems.extend(twice);
        let worst = problems.iter().map(|problem| problem.severity).min();
        if let Some(worst) = worst {
            checked.records[worst as usize] += 1;
        }
        for problem in &problems {
            self.report.found[problem.severity as usize] += 1;
            if self.report.findings.len() < self.options.limit {
                let (file, line) = (checked.path.clone(), line.number);
                self.report.findings.push(Finding { file, line, problem: problem.clone() });
            }
        }
        problems
    }
}

/// Looks at some lines.
fn part(
    model: Option<&KnownModel>,
    form: &'static Form,
    window: &Window,
    lines: &[Line],
) -> (Counts, Vec<Looked>) {
    let mut counts = Counts::default();
    let mut tools = KnownTools::default();
    let looked =
        lines.iter().map(|line| look(model, form, window.record(line), &mut counts, &mut tools)).collect();
    (counts, looked)
}

fn look(
    model: Option<&KnownModel>,
    form: &'static Form,
    record: &str,
    counts: &mut Counts,
    tools: &mut KnownTools,
) -> Looked {
    counts.records += 1;
    let example = match json_lines::examine(form, record, &mut counts.passed_over) {
        Ok(example) => example,
        Err(error) => {
            let mut problem = error.problem;
            if let Some(other) = Form::recognised(record).filter(|other| other.name != form.name) {
                problem += &format!(
                    "; it has {} ({} form), the first record {} ({} form)",
                    other.fields, other.name, form.fields, form.name
                );
            }
            return Looked {
                problems: vec![Problem::new(Severity::Error, error.field, problem)],
                digest: None,
            };
        }
    };
    counts.see(&example);
    let mut problems = rules::check(&example, tools, |said| Fields::of(form.format, said, record));
    let measured = model.and_then(|model| counts.tokens.measure(model, &example));
    // Equal texts are equal tokens: one finding is enough.
    let known = |problem: &Problem| problems.iter().any(|other| other.severity == problem.severity);
    let measured = measured.filter(|problem| !(problem.severity == Severity::LeftOut && known(problem)));
    problems.extend(measured);
    Looked { problems, digest: Some(Digest::of(&example)) }
}
