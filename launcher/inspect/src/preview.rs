//! `launcher preview`: the text that a model sees of a record, with the trained tokens marked.

use dyad_data::tokenize::tokenize;
use dyad_data::tokenized::{Tokenized, Untrained};
use dyad_data::tokenizer::ChatTokenizer;
use dyad_data::truncation::is_trainable;
use dyad_proto::pairs::source::Located;
use dyad_proto::run_config::DataFiles;
use dyad_proto::{Fault, RunConfig, counted, plain};

use crate::model::KnownModel;
use crate::records::{Records, files};

/// How trained tokens are marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marks {
    /// With colours, for a terminal.
    Colours,
    /// With ⟦ and ⟧.
    Brackets,
}

impl Marks {
    const fn pair(self) -> (&'static str, &'static str) {
        match self {
            Self::Colours => ("\u{1b}[32m", "\u{1b}[0m"),
            Self::Brackets => ("⟦", "⟧"),
        }
    }
}

/// The first `most` records of some places, as text.
pub fn show(places: &DataFiles, config: &RunConfig, most: usize, marks: Marks) -> Result<String, Fault> {
    let model = KnownModel::load(config)?;
    let mut out = String::new();
    let mut left = most;
    for file in files("FILE", places)? {
        let mut records = Records::open("FILE", &file, config.dataset_format)?;
        while let Some(window) = records.next()?.filter(|_| left > 0) {
            let Some(form) = records.form() else { continue };
            for line in window.lines.iter().take(left) {
                let Located { shown, unit, .. } = &file;
                let place = format!("{shown} {unit} {}", line.number);
                let named = |message: String| {
                    Fault::input(format!("{place}: {message}"))
                        .hint("launcher check shows every problem of a file")
                };
                let example = form.parse(window.record(line)).map_err(|error| named(error.to_string()))?;
                let outcome = tokenize(&model.tokenizer, &example, model.rule_of(&example));
                let (verdict, tokens) = outcome.map_err(|fault| named(fault.message))?;
                let fate = if is_trainable(verdict) { "" } else { " (a run leaves it out)" };
                out += &format!("== {}{fate}\n", plain::line(&place));
                out += &sides(&model.tokenizer, &tokens, marks)?;
                left -= 1;
            }
        }
    }
    Ok(out)
}

fn sides(tokenizer: &ChatTokenizer, tokens: &Tokenized, marks: Marks) -> Result<String, Fault> {
    let Tokenized { prompt, chosen, rejected, chosen_untrained, rejected_untrained, weight, label } = tokens;
    let mut out = String::new();
    let answers = [("chosen", chosen, chosen_untrained), ("rejected", rejected, rejected_untrained)];
    for (name, ids, untrained) in answers.into_iter().filter(|(_, ids, _)| !ids.is_empty()) {
        let trained = untrained.trained(ids.len()).count();
        let weighed = if *weight == 1.0 { String::new() } else { format!(", weight {weight}") };
        let labelled = label.map_or_else(String::new, |label| format!(", label {label}"));
        out += &format!(
            "-- {name}: {}, {trained} of them trained{weighed}{labelled}\n",
            counted((prompt.len() + ids.len()) as u64, "token")
        );
        out += &marked(tokenizer, prompt, ids, untrained, marks)?;
        out.push('\n');
    }
    Ok(out)
}

/// The text of a whole sequence. Parts are the differences of longer and longer decoded beginnings, because tokenizers decode the first
/// token of a text in another way than the same token inside.
fn marked(
    tokenizer: &ChatTokenizer,
    prompt: &[u32],
    answer: &[u32],
    untrained: &Untrained,
    marks: Marks,
) -> Result<String, Fault> {
    let all = [prompt, answer].concat();
    let mut trained = vec![false; all.len()];
    untrained.trained(answer.len()).for_each(|at| trained[prompt.len() + at] = true);
    let (begin, end) = marks.pair();
    let (mut out, mut done, mut start) = (String::new(), String::new(), 0);
    while start < all.len() {
        let length = trained[start..].iter().take_while(|is| **is == trained[start]).count();
        let whole = tokenizer.decode_all(&all[..start + length])?;
        let part = whole
            .strip_prefix(done.as_str())
            .map_or_else(|| tokenizer.decode_all(&all[start..start + length]), |part| Ok(part.to_owned()))?;
        let part = plain::lines(&part).into_owned();
        out += &if trained[start] { format!("{begin}{part}{end}") } else { part };
        (done, start) = (whole, start + length);
    }
    Ok(out)
}
