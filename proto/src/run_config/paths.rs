//! Paths in a configuration: expands `~/`; refuses shell variables, control characters and URLs. Pure.

use super::{DataFiles, RunConfig, SCHEMES, is_address};
use crate::Fault;

impl RunConfig {
    /// Every key that may name a file or folder. `model` and `from_checkpoint` may be ids on the hub instead.
    pub(super) fn paths(&mut self) -> Vec<(&'static str, &mut String)> {
        let Self {
            model, training_file, validation_file, output_dir, from_checkpoint, reference_cache, ..
        } = self;
        let mut all = vec![("model", model)];
        all.extend(training_file.iter_mut().map(|file| ("training_file", &mut file.path)));
        all.push(("output_dir", output_dir));
        let validation = validation_file.iter_mut().flat_map(DataFiles::iter_mut);
        all.extend(validation.map(|file| ("validation_file", &mut file.path)));
        let sometimes =
            [("from_checkpoint", from_checkpoint.as_mut()), ("reference_cache", reference_cache.as_mut())];
        all.extend(sometimes.into_iter().filter_map(|(key, path)| Some((key, path?))));
        all
    }

    /// Replaces `~` by the home folder in all paths.
    pub(super) fn expand_paths(&mut self, home: Option<&str>) -> Result<(), Fault> {
        for (key, path) in self.paths() {
            *path = expand(path, home).map_err(|fault| in_key(key, fault))?;
        }
        Ok(())
    }

    /// Fails if a path holds a control character or is a URL, or if an optional one is empty.
    pub(super) fn check_paths(&self) -> Result<(), Fault> {
        let mut config = self.clone();
        for (key, path) in config.paths() {
            let fetched = key.ends_with("_file");
            check(path, fetched).map_err(|fault| in_key(key, fault))?;
        }
        let empty = |path: &Option<String>| path.as_ref().is_some_and(String::is_empty);
        let optional = [
            ("validation_file", self.validation_file.as_ref().is_some_and(DataFiles::is_empty)),
            ("from_checkpoint", empty(&self.from_checkpoint)),
            ("reference_cache", empty(&self.reference_cache)),
        ];
        match optional.into_iter().find(|(_, empty)| *empty) {
            Some((key, _)) => Err(Fault::input(format!("config key `{key}` is empty"))
                .hint(format!("give `{key}` a path, or remove the key"))),
            None => Ok(()),
        }
    }
}

fn in_key(key: &str, fault: Fault) -> Fault {
    Fault { message: format!("config key `{key}`: {}", fault.message), ..fault }
}

/// Expands `~` and `~/…` like a shell. Fails for other paths that start with `~`, and for paths that hold a variable.
pub fn expand(path: &str, home: Option<&str>) -> Result<String, Fault> {
    if let Some(variable) = variable(path) {
        return Err(Fault::input(format!("{path:?} holds {variable}, which nothing replaces here"))
            .hint("write the path in full, or begin it with ~/ for the home folder; a shell replaces variables outside of single quotes only"));
    }
    let Some(rest) = path.strip_prefix('~') else { return Ok(path.to_owned()) };
    if !rest.is_empty() && !rest.starts_with('/') {
        return Err(Fault::input(format!("{path:?} begins with `~`, but not with `~/`"))
            .hint("only ~/, the own home folder, is understood; write another one in full, or ./~… for a name that begins so"));
    }
    match home.filter(|home| home.starts_with('/')) {
        Some(home) if rest.is_empty() => Ok(home.to_owned()),
        Some(home) => Ok(format!("{}{rest}", home.trim_end_matches('/'))),
        None => Err(Fault::input(format!("{path:?} is in the home folder, but HOME names none"))
            .hint("write the path in full")),
    }
}

/// The first `$NAME` or `${…` of a path.
fn variable(path: &str) -> Option<&str> {
    path.match_indices('$').find_map(|(at, _)| {
        let rest = &path[at + 1..];
        if let Some(inner) = rest.strip_prefix('{') {
            return Some(&path[at..at + 2 + inner.find('}').map_or(inner.len(), |end| end + 1)]);
        }
        let ends = rest.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
        let name = &rest[..ends.unwrap_or(rest.len())];
        (name.starts_with(|letter: char| letter.is_ascii_alphabetic() || letter == '_'))
            .then(|| &path[at..at + 1 + name.len()])
    })
}

/// Checks a path; `fetched` says whether it may be an address that pairs are fetched from.
fn check(path: &str, fetched: bool) -> Result<(), Fault> {
    // Line and paragraph separators are not control characters, but also end lines.
    let invisible = |letter: &char| letter.is_control() || ['\u{2028}', '\u{2029}'].contains(letter);
    if let Some(letter) = path.chars().find(invisible) {
        return Err(Fault::input(format!("{path:?} holds the control character {letter:?}"))
            .hint("rename the file or folder; was a quotation mark forgotten?"));
    }
    if fetched && is_address(path) {
        return Ok(());
    }
    let scheme = path.split_once("://").map_or("", |(scheme, _)| scheme);
    let plain = |letter: char| letter.is_ascii_alphanumeric() || ['+', '-', '.'].contains(&letter);
    if !scheme.is_empty() && scheme.chars().all(plain) {
        let hint = match fetched {
            true => format!("fetch it first and give the path on this machine; addresses begin with {}", SCHEMES.join(", ")),
            false => "fetch it first, or mount it, and give the path on this machine; a model on the hub is named org/name".into(),
        };
        return Err(Fault::input(format!("{path:?} is an address, not a path")).hint(hint));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOME: Option<&str> = Some("/home/ada");

    #[test]
    fn only_a_leading_tilde_and_slash_mean_the_home_folder() {
        for (path, expected) in [
            ("~", "/home/ada"),
            ("~/runs/1", "/home/ada/runs/1"),
            ("a/~/b", "a/~/b"),
            ("./~x", "./~x"),
            ("org/name", "org/name"),
            ("100$", "100$"),
            ("a$5b", "a$5b"),
        ] {
            assert_eq!(expand(path, HOME).unwrap(), expected, "{path}");
        }
        assert_eq!(expand("~/x", Some("/root/")).unwrap(), "/root/x");
        assert_eq!(expand("~", Some("/")).unwrap(), "/");
        for (path, words) in [
            ("~bob/x", "begins with `~`"),
            ("~~", "begins with `~`"),
            ("$HOME/run", "holds $HOME,"),
            ("/data/${USER}/x", "holds ${USER},"),
            ("/data/${USER", "holds ${USER,"),
            ("a/$_x", "holds $_x,"),
        ] {
            let fault = expand(path, HOME).unwrap_err();
            assert!(fault.message.contains(words) && !fault.hint.is_empty(), "{fault}");
        }
        for home in [None, Some(""), Some("relative")] {
            assert!(expand("~/x", home).unwrap_err().message.contains("HOME names none"));
        }
    }

    #[test]
    fn control_characters_and_urls_are_refused_and_shown_escaped() {
        let fault = check("a\nb", false).unwrap_err();
        assert_eq!(fault.message, "\"a\\nb\" holds the control character '\\n'");
        for path in ["a\u{1b}[2Jb", "a\0", "a\tb", "a\u{2028}b", "a\u{85}b", "s3://bucket/x", "file:///x"] {
            let fault = check(path, false).unwrap_err();
            assert!(!fault.message.contains(|letter: char| letter.is_control()), "{fault:?}");
        }
        for path in ["mein Lauf ü 漢/1 🙂", "a:b", "://", "a//b"] {
            check(path, false).unwrap();
        }
        for (path, fetched) in [
            ("s3://bucket/x", true),
            ("hf://datasets/a/b/c", true),
            ("https://x/y", false),
            ("file:///x", false),
        ] {
            assert_eq!(check(path, true).is_ok(), fetched, "{path}");
        }
    }
}
