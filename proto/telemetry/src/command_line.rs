//! Parses the command line of Dyad's programs.

use std::io::Write;

use clap::Parser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use dyad_proto::called;

/// Like [`Parser::parse`], with hints for frequent mistakes. In the wheel, help and errors use the wheel's command names.
#[must_use]
pub fn command_line<T: Parser>() -> T {
    let refused = match T::try_parse() {
        Ok(line) => return line,
        Err(refused) => refused,
    };
    let hint = word(&refused).and_then(|word| hint(T::command().get_name(), word));
    if hint.is_none() && !called::by_pip() {
        refused.exit();
    }
    let mut text = refused.render().to_string();
    text.extend(hint.map(|hint| format!("\nhint: {hint}\n")));
    let text = called::commands(&text);
    // Ignore errors: there is no other place to report them.
    let _ = match refused.use_stderr() {
        true => std::io::stderr().write_all(text.as_bytes()),
        false => std::io::stdout().write_all(text.as_bytes()),
    };
    std::process::exit(refused.exit_code())
}

/// The argument that clap refused as an unknown or misplaced command or option.
fn word(refused: &clap::Error) -> Option<&str> {
    let kind = match refused.kind() {
        ErrorKind::InvalidSubcommand => ContextKind::InvalidSubcommand,
        ErrorKind::ArgumentConflict => ContextKind::InvalidArg,
        ErrorKind::UnknownArgument => ContextKind::InvalidArg,
        _ => return None,
    };
    match refused.get(kind)? {
        ContextValue::String(word) => Some(word),
        _ => None,
    }
}

fn hint(program: &str, word: &str) -> Option<String> {
    // In a conflict, clap quotes the word.
    let word = word.split('\'').nth(1).unwrap_or(word);
    match word {
        _ if program != "launcher" => None,
        file if file.ends_with(".toml") || file.ends_with(".json") => {
            Some(format!("give the configuration by its option: --config {file}"))
        }
        folder if folder.starts_with("checkpoint-") => {
            Some("--resume takes no value: it goes on from the last checkpoint that is whole".into())
        }
        "generate" | "new-model" | "check" => {
            Some(format!("that is a command of the trainer: `trainer {word}`"))
        }
        "train" | "run" => Some("a run needs no command: `launcher --config run.toml`".into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequent_mistakes_get_a_hint() {
        let hint = |word| hint("launcher", word);
        assert!(hint("run.toml").unwrap().ends_with("--config run.toml"));
        assert!(hint("generate").unwrap().contains("trainer generate"));
        assert!(hint("subcommand 'checkpoint-11'").unwrap().contains("--resume takes no value"));
        assert_eq!(hint("doctor"), None);
    }
}
