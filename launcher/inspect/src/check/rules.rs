//! Rules that a run does not check, because it trains by any record that a template renders: the order of roles, and tool calls.

use std::collections::BTreeMap;

use dyad_proto::pairs::{Content, Conversation, Example, Message, Role};
use dyad_proto::plain;
use dyad_proto::run_config::DatasetFormat;
use serde_json::Value;

use super::finding::{Problem, Severity};
use super::tools::{KnownTools, Tools};

/// Names of the fields of a form.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields {
    prompt: &'static str,
    chosen: &'static str,
    rejected: &'static str,
    tools: &'static str,
    /// Number of messages of the prompt that stand at the beginning of `chosen` and `rejected` as well.
    shared: usize,
}

impl Fields {
    /// The names in a record of this form. `line` says whether the prompt is a field of its own.
    pub(super) fn of(format: DatasetFormat, said: &Conversation, line: &str) -> Self {
        let own = |name: &str| {
            let record: Option<Value> = serde_json::from_str(line).ok();
            record.as_ref().and_then(|record| record.get(name)).is_some_and(Value::is_array)
        };
        let fields =
            Self { prompt: "prompt", chosen: "chosen", rejected: "rejected", tools: "tools", shared: 0 };
        match format {
            DatasetFormat::PreferenceOpenai => Self {
                prompt: "input.messages",
                chosen: "preferred_output",
                rejected: "non_preferred_output",
                tools: "input.tools",
                ..fields
            },
            DatasetFormat::PromptCompletion | DatasetFormat::UnpairedPreference => {
                Self { chosen: "completion", ..fields }
            }
            DatasetFormat::Messages => Self { chosen: "messages", ..fields },
            _ if own("prompt") => fields,
            _ => Self { prompt: "chosen", shared: said.prompt.len(), ..fields },
        }
    }
}

/// The problems of a valid record. `fields` is asked for only if there is one.
pub(super) fn check(
    example: &Example,
    tools: &mut KnownTools,
    fields: impl Fn(&Conversation) -> Fields,
) -> Vec<Problem> {
    let mut problems = identical(&example.content).into_iter().collect::<Vec<_>>();
    let Content::Conversation(said) = &example.content else { return problems };
    let tools = tools.of(said.tools.as_ref());
    if !suspicious(said, tools) {
        return problems;
    }
    let names = fields(said);
    problems.extend(tools.problems(names.tools));
    let before = said.prompt.len();
    for (output, name, first) in [(&said.chosen, names.chosen, 0), (&said.rejected, names.rejected, before)] {
        if output.is_empty() {
            continue;
        }
        let place = |at: usize| match at.checked_sub(before) {
            None => format!("{}[{at}]", names.prompt),
            Some(at) => format!("{name}[{}]", names.shared + at),
        };
        let messages: Vec<&Message> = said.prompt.iter().chain(output).collect();
        let mut walk =
            Walk { tools, place: &place, problems: Vec::new(), open: BTreeMap::new(), anonymous: 0 };
        messages
            .iter()
            .enumerate()
            .for_each(|(at, message)| walk.step(at, message, at.checked_sub(1).map(|at| messages[at])));
        // The prompt is checked with the first output only.
        problems.extend(walk.problems.into_iter().filter(|(at, _)| *at >= first).map(|(_, problem)| problem));
    }
    problems
}

fn identical(content: &Content) -> Option<Problem> {
    let same = match content {
        Content::Conversation(said) => said.chosen == said.rejected,
        Content::Text(text) => text.rejected.as_ref() == Some(&text.chosen),
    };
    same.then(|| {
        Problem::new(Severity::LeftOut, "record", "both outputs are the same, so there is no preference")
    })
}

/// Whether the walk can find anything: most records are one question and two answers.
fn suspicious(said: &Conversation, tools: &Tools) -> bool {
    let simple = |messages: &[Message], roles: &[Role]| {
        messages.len() == roles.len()
            && messages
                .iter()
                .zip(roles)
                .all(|(message, role)| message.role == *role && message.tool_calls.is_empty())
    };
    let prompt = simple(&said.prompt, &[Role::User]) || simple(&said.prompt, &[Role::System, Role::User]);
    let answers = [&said.chosen, &said.rejected];
    let answers = answers.iter().all(|output| output.is_empty() || simple(output, &[Role::Assistant]));
    !(prompt && answers) || tools.problems("").next().is_some()
}

/// A walk over the messages of a conversation.
struct Walk<'w> {
    tools: &'w Tools,
    place: &'w dyn Fn(usize) -> String,
    problems: Vec<(usize, Problem)>,
    /// Ids of calls without an answer, each with the message of the call.
    open: BTreeMap<String, usize>,
    /// Number of calls without an id that have no answer.
    anonymous: usize,
}

impl Walk<'_> {
    fn warn(&mut self, at: usize, field: &str, what: impl Into<String>) {
        let field = format!("{}{field}", (self.place)(at));
        self.problems.push((at, Problem::new(Severity::Warning, field, what)));
    }

    fn step(&mut self, at: usize, message: &Message, before: Option<&Message>) {
        self.order(at, message, before);
        if message.role == Role::Tool {
            self.answer(at, message);
            return;
        }
        self.unanswered(at);
        let mut seen: Vec<String> = Vec::new();
        for (number, call) in message.tool_calls.iter().enumerate() {
            let call = call.value();
            let field = format!(".tool_calls[{number}]");
            let found = self.tools.check(&call, &format!("{}{field}", (self.place)(at)));
            self.problems.extend(found.into_iter().map(|problem| (at, problem)));
            match call.get("id").and_then(Value::as_str) {
                Some(id) if seen.iter().any(|other| other == id) => {
                    self.warn(
                        at,
                        &format!("{field}.id"),
                        format!("the id \"{}\" is there twice", plain::quoted(id)),
                    );
                }
                Some(id) => {
                    seen.push(id.to_owned());
                    self.open.insert(id.to_owned(), at);
                }
                None => self.anonymous += 1,
            }
        }
    }

    fn order(&mut self, at: usize, message: &Message, before: Option<&Message>) {
        match (message.role, before.map(|before| before.role)) {
            (Role::System, Some(_)) => {
                self.warn(at, ".role", "a message of the system that is not the first")
            }
            (Role::Assistant, None | Some(Role::System)) => {
                self.warn(at, ".role", "the assistant speaks before the user");
            }
            (Role::User, Some(Role::User)) => self.warn(at, ".role", "two messages of the user in a row"),
            (Role::Assistant, Some(Role::Assistant)) => {
                self.warn(at, ".role", "two messages of the assistant in a row");
            }
            _ => {}
        }
    }

    fn answer(&mut self, at: usize, message: &Message) {
        match &message.tool_call_id {
            Some(id) if self.open.remove(id).is_some() => {}
            Some(id) => {
                let expected: Vec<&str> = self.open.keys().map(String::as_str).collect();
                let expected = match expected.as_slice() {
                    [] => "no call is left to answer".to_owned(),
                    ids => format!("expected one of {}", ids.join(", ")),
                };
                let what = format!("no call before it has the id \"{}\" ({expected})", plain::quoted(id));
                self.warn(at, ".tool_call_id", plain::line(&what).into_owned());
            }
            None if self.anonymous > 0 => self.anonymous -= 1,
            None if !self.open.is_empty() => {
                self.warn(at, ".tool_call_id", "missing; the calls before it have ids");
                self.open.pop_first();
            }
            None => self.warn(at, "", "a tool's message, but no call before it is left to answer"),
        }
    }

    /// Calls are answered before anybody else speaks.
    fn unanswered(&mut self, at: usize) {
        let open: Vec<(String, usize)> = std::mem::take(&mut self.open).into_iter().collect();
        for (id, call) in open {
            let what =
                format!("the call \"{}\" has no answer before {}", plain::quoted(&id), (self.place)(at));
            self.warn(call, ".tool_calls", what);
        }
        self.anonymous = 0;
    }
}
