//! Reads the command line of one of Dyad's programs.

use std::io::Write;

use clap::Parser;
use dyad_proto::called;

/// As [`Parser::parse`]; help and errors call commands as they are called here.
#[must_use]
pub fn command_line<T: Parser>() -> T {
    let refused = match T::try_parse() {
        Ok(line) => return line,
        Err(refused) if called::by_pip() => refused,
        Err(refused) => refused.exit(),
    };
    let text = refused.render().to_string();
    let text = called::commands(&text);
    // Nothing is left to do when nobody reads it.
    let _ = match refused.use_stderr() {
        true => std::io::stderr().write_all(text.as_bytes()),
        false => std::io::stdout().write_all(text.as_bytes()),
    };
    std::process::exit(refused.exit_code())
}
