//! Sample answers of evaluations: JSON Lines for programs and Markdown for people, one file of each per evaluation.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use dyad_proto::run_folder::sample_file;
use dyad_proto::wire::SampleAnswer;
use dyad_proto::{Fault, counted, files, safe_file};
use serde_json::{Value, json};

use super::rows::unwritten;

/// Answers of the model that the run started from, by the place of their pair: those of the evaluation before the first step.
#[derive(Debug, Default)]
pub(super) struct BaseAnswers(BTreeMap<String, String>);

impl BaseAnswers {
    /// The answers that an earlier part of the run wrote; without them, later ones stand alone.
    pub(super) fn read(dir: &Path) -> Self {
        let text = files::read_to_string(&dir.join(sample_file(0, "jsonl"))).unwrap_or_default();
        let answer = |line: &str| {
            let row: Value = serde_json::from_str(line).ok()?;
            Some((row.get("place")?.as_str()?.to_owned(), row.get("trained")?.as_str()?.to_owned()))
        };
        Self(text.lines().filter_map(answer).collect())
    }

    /// Writes the answers after `step` steps.
    pub(super) fn write(&mut self, dir: &Path, step: u64, answers: &[SampleAnswer]) -> Result<(), Fault> {
        if step == 0 {
            self.0 = answers.iter().map(|answer| (answer.place.clone(), answer.answer.clone())).collect();
        }
        let place = |extension, text: String| {
            let path = dir.join(sample_file(step, extension));
            let written = safe_file::folder(dir).and_then(|()| safe_file::write(&path, text.as_bytes()));
            written.map_err(|error| unwritten(&path, &error))
        };
        place("jsonl", self.lines(step, answers))?;
        place("md", self.page(step, answers))
    }

    fn lines(&self, step: u64, answers: &[SampleAnswer]) -> String {
        let line = |answer: &SampleAnswer| {
            let row = json!({
                "step": step,
                "place": answer.place,
                "prompt": answer.prompt,
                "base": self.0.get(&answer.place),
                "trained": answer.answer,
                "trained_tokens": answer.tokens,
                "trained_ended": answer.ended,
            });
            format!("{row}\n")
        };
        answers.iter().map(line).collect()
    }

    fn page(&self, step: u64, answers: &[SampleAnswer]) -> String {
        let mut page = format!("# Answers after {}\n", counted(step, "step"));
        for answer in answers {
            let cut = if answer.ended { "" } else { " (cut)" };
            let _ = write!(page, "\n## {}\n\nPrompt\n\n{}", answer.place, block(&answer.prompt));
            if let Some(base) = self.0.get(&answer.place).filter(|_| step > 0) {
                let _ = write!(page, "\nBefore training\n\n{}", block(base));
            }
            let when = if step == 0 { "Before training" } else { "Trained" };
            let _ = write!(page, "\n{when}{cut}\n\n{}", block(&answer.answer));
        }
        page
    }
}

/// The text as it is, whatever characters are in it.
fn block(text: &str) -> String {
    let longest = text.split(|letter| letter != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    format!("{fence}text\n{}\n{fence}\n", text.trim_end_matches('\n'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(line: u64, answer: &str) -> SampleAnswer {
        SampleAnswer {
            id: line - 1,
            place: format!("held-out.jsonl line {line}"),
            prompt: "Why?".into(),
            answer: answer.into(),
            ended: true,
            tokens: 3,
        }
    }

    #[test]
    fn later_answers_stand_beside_those_before_training_also_after_a_resume() {
        let dir = tempfile::tempdir().unwrap();
        let samples = dir.path().join("samples");
        let mut first = BaseAnswers::default();
        first.write(&samples, 0, &[answer(1, "no idea"), answer(4, "none")]).unwrap();
        let mut resumed = BaseAnswers::read(&samples);
        for answers in [&mut first, &mut resumed] {
            answers.write(&samples, 6, &[answer(1, "because"), answer(4, "so")]).unwrap();
            let text = std::fs::read_to_string(samples.join("step-6.jsonl")).unwrap();
            let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            assert_eq!((&rows[0]["base"], &rows[0]["trained"]), (&"no idea".into(), &"because".into()));
            assert_eq!(
                (&rows[1]["place"], &rows[1]["base"]),
                (&"held-out.jsonl line 4".into(), &"none".into())
            );
            let page = std::fs::read_to_string(samples.join("step-6.md")).unwrap();
            assert!(page.contains("Before training\n\n```text\nno idea\n```"), "{page}");
        }
    }

    #[test]
    fn no_answer_ends_its_block() {
        assert_eq!(block("a\n```\n# b"), "````text\na\n```\n# b\n````\n");
    }
}
