//! Counts of a file's records. Counts of parts are joined, in any order.

use std::collections::BTreeSet;

use dyad_data::tokenize::tokenize;
use dyad_data::tokenized::Tokenized;
use dyad_data::truncation::Rule;
use dyad_proto::pairs::{Content, Example, Message, Role};
use dyad_proto::wire::PairVerdict;

use super::finding::{Problem, Severity};
use super::lengths::Lengths;
use crate::model::KnownModel;

/// Counts of records.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Records, also invalid ones.
    pub records: u64,
    /// Records that are plain text.
    pub plain_text: u64,
    /// Records with a message of the system.
    pub system: u64,
    /// Records with more than one question and answer.
    pub several_turns: u64,
    /// Records with tools.
    pub tools: u64,
    /// Records with calls of tools.
    pub tool_calls: u64,
    /// Records with reasoning.
    pub reasoning: u64,
    /// Records with a weight other than 1.
    pub weights: u64,
    /// Records with a label: desirable and not.
    pub labels: (u64, u64),
    /// Columns that are not read.
    pub passed_over: BTreeSet<String>,
    /// Tokens, with a model.
    pub tokens: Tokens,
}

/// Counts of tokens.
#[derive(Clone, Debug, Default)]
pub struct Tokens {
    /// Lengths of prompts before any cut.
    pub prompt: Lengths,
    /// Lengths of preferred, or only, answers before any cut.
    pub chosen: Lengths,
    /// Lengths of rejected answers before any cut.
    pub rejected: Lengths,
    /// Records of which the end is cut.
    pub cut: u64,
    /// Tokens that are cut.
    pub cut_tokens: u64,
}

impl Counts {
    /// Adds other counts.
    pub fn join(&mut self, other: Self) {
        self.records += other.records;
        self.plain_text += other.plain_text;
        self.system += other.system;
        self.several_turns += other.several_turns;
        self.tools += other.tools;
        self.tool_calls += other.tool_calls;
        self.reasoning += other.reasoning;
        self.weights += other.weights;
        self.labels.0 += other.labels.0;
        self.labels.1 += other.labels.1;
        self.passed_over.extend(other.passed_over);
        self.tokens.join(other.tokens);
    }

    /// Counts what a valid record has.
    pub(super) fn see(&mut self, example: &Example) {
        self.weights += u64::from(example.weight != 1.0);
        self.labels.0 += u64::from(example.label == Some(true));
        self.labels.1 += u64::from(example.label == Some(false));
        let Content::Conversation(said) = &example.content else {
            self.plain_text += 1;
            return;
        };
        let any = |wanted: fn(&Message) -> bool| {
            u64::from([&said.prompt, &said.chosen, &said.rejected].into_iter().flatten().any(wanted))
        };
        self.tools += u64::from(said.tools.is_some());
        self.system += any(|message| message.role == Role::System);
        self.tool_calls += any(|message| !message.tool_calls.is_empty());
        self.reasoning += any(|message| message.reasoning.is_some());
        let by_user =
            |messages: &[Message]| messages.iter().filter(|message| message.role == Role::User).count();
        self.several_turns += u64::from(by_user(&said.prompt) + by_user(&said.chosen) > 1);
    }
}

impl Tokens {
    fn join(&mut self, other: Self) {
        self.prompt.join(other.prompt);
        self.chosen.join(other.chosen);
        self.rejected.join(other.rejected);
        self.cut += other.cut;
        self.cut_tokens += other.cut_tokens;
    }

    /// Tokenises a record, counts its tokens, and says what a run does with it.
    pub(super) fn measure(&mut self, model: &KnownModel, example: &Example) -> Option<Problem> {
        let rule = model.rule_of(example);
        let whole = Rule { max_len: usize::MAX, ..rule };
        let (verdict, tokens) = match tokenize(&model.tokenizer, example, whole) {
            Ok(outcome) => outcome,
            Err(fault) => return Some(Problem::new(Severity::Error, "record", fault.message)),
        };
        if verdict == PairVerdict::DroppedWeight {
            return left_out(verdict, 0, rule);
        }
        let Tokenized { prompt, chosen, rejected, .. } = &tokens;
        self.prompt.add(prompt.len());
        self.chosen.add(chosen.len());
        let paired = !rejected.is_empty();
        if paired {
            self.rejected.add(rejected.len());
        }
        let longest = prompt.len() + chosen.len().max(rejected.len());
        if longest <= rule.max_len || verdict != PairVerdict::Kept {
            return left_out(verdict, prompt.len(), rule);
        }
        // Tokenised again, by the rule of the run: only long records take this way.
        let (verdict, cut) = match tokenize(&model.tokenizer, example, rule) {
            Ok(outcome) => outcome,
            Err(fault) => return Some(Problem::new(Severity::Error, "record", fault.message)),
        };
        if verdict == PairVerdict::Truncated {
            self.cut += 1;
            self.cut_tokens += (chosen.len() - cut.chosen.len() + rejected.len() - cut.rejected.len()) as u64;
        }
        left_out(verdict, prompt.len(), rule)
    }
}

/// Why a run leaves a record out.
fn left_out(verdict: PairVerdict, prompt: usize, rule: Rule) -> Option<Problem> {
    let what = match verdict {
        PairVerdict::DroppedTooLong => format!(
            "the prompt has {prompt} tokens, which leaves no room for a trained token in {} (max_seq_length)",
            rule.max_len
        ),
        PairVerdict::DroppedEmpty => "a side has no tokens to train on".into(),
        PairVerdict::DroppedIdentical => "both outputs are the same tokens, so there is no preference".into(),
        PairVerdict::DroppedWeight => "its weight is 0".into(),
        _ => return None,
    };
    Some(Problem::new(Severity::LeftOut, "record", what))
}
