//! Command names in messages and help. Programs installed with pip are called `dyad`, `dyad-coordinator` and `dyad-trainer`.

use std::borrow::Cow;
use std::sync::OnceLock;

/// Environment variable that the commands of the Python wheel set.
pub const INSTALLED: &str = "DYAD_INSTALLED_BY_PIP";
/// Names of the programs in a build, and in the wheel.
const NAMES: [(&str, &str); 3] =
    [("launcher", "dyad"), ("coordinator", "dyad-coordinator"), ("trainer", "dyad-trainer")];
/// Texts that precede a command in messages and help.
const BEFORE: [&str; 5] = ["`", "$ ", "Usage: ", "\n  ", "\n"];

/// Whether a command of the wheel started this process, directly or through another Dyad process.
pub fn by_pip() -> bool {
    static BY_PIP: OnceLock<bool> = OnceLock::new();
    *BY_PIP.get_or_init(|| std::env::var_os(INSTALLED).is_some_and(|value| !value.is_empty()))
}

/// Replaces command names in a message or help text by those of the wheel, if the wheel is in use.
#[must_use]
pub fn commands(text: &str) -> Cow<'_, str> {
    if by_pip() { as_installed(text).into() } else { text.into() }
}

fn as_installed(text: &str) -> String {
    NAMES.iter().fold(text.to_owned(), |text, (name, command)| renamed(&text, name, command))
}

fn renamed(text: &str, name: &str, command: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(name) {
        let (before, after) = (&rest[..at], &rest[at + name.len()..]);
        out.push_str(before);
        let begins = out.is_empty() || BEFORE.iter().any(|start| out.ends_with(start));
        let ends = after.starts_with([' ', '`']) || after.is_empty();
        // A sentence may begin with the word as well. A command is followed by an option, a subcommand or nothing.
        out.push_str(if begins && ends && !prose(&out, after) { command } else { name });
        rest = after;
    }
    out + rest
}

/// Whether the word begins a sentence, such as "launcher and trainers", and not a command.
fn prose(before: &str, after: &str) -> bool {
    let quoted = before.ends_with('`') || before.ends_with("$ ") || before.ends_with("Usage: ");
    let word: String = after.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '-').collect();
    !quoted && matches!(word.as_str(), "and" | "or" | "is" | "in" | "of" | "has" | "that" | "says" | "said")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_renamed_and_prose_is_not() {
        for (text, expected) in [
            ("run `launcher --profile` once", "run `dyad --profile` once"),
            ("all lines: `launcher kubernetes logs`", "all lines: `dyad kubernetes logs`"),
            ("`trainer generate` answers", "`dyad-trainer generate` answers"),
            ("see `coordinator`", "see `dyad-coordinator`"),
            ("Usage: launcher [OPTIONS]", "Usage: dyad [OPTIONS]"),
            ("Examples:\n  launcher plan --gpus 8\n", "Examples:\n  dyad plan --gpus 8\n"),
            ("$ launcher --nodes 2", "$ dyad --nodes 2"),
            ("the launcher in the job", "the launcher in the job"),
            ("1 trainer and 2 trainers", "1 trainer and 2 trainers"),
            ("trainers leave", "trainers leave"),
            ("cannot read /a/launcher/trainer: no", "cannot read /a/launcher/trainer: no"),
            ("error:\nlauncher and trainer differ", "error:\nlauncher and trainer differ"),
        ] {
            assert_eq!(as_installed(text), expected);
        }
    }
}
