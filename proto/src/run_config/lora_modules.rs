//! Parses a text that chooses layers: `lora_trainable_modules` and `exclude_modules`. The trainer checks later whether the names match
//! layers of the model.

use crate::Fault;

/// Which layers get adapters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoraModules {
    /// Every linear layer except the head.
    AllLinear,
    /// Full names of layers, or their endings.
    Names(Vec<String>),
    /// A regular expression that must match the full name, as in PEFT.
    Pattern(String),
}

const ALL: &str = "all-linear";

impl LoraModules {
    /// Parses the value of a key.
    pub fn parse(key: &str, text: &str) -> Result<Self, Fault> {
        let bad = |what: &str| {
            let all = if key == "lora_trainable_modules" { "\"all-linear\", or " } else { "" };
            Err(Fault::input(format!("config key `{key}`: {what}, found {text:?}"))
                .hint(format!("write {key} = {all}names with commas between them: \"q_proj,v_proj\"")))
        };
        let text = text.trim();
        if text.is_empty() {
            return bad("expected names of layers");
        }
        if text.eq_ignore_ascii_case(ALL) {
            return Ok(Self::AllLinear);
        }
        if text.starts_with(['[', '{', '"', '\'']) {
            return bad("expected names with commas between them, without brackets and quotes");
        }
        if text.contains(['\\', '^', '$', '*', '+', '?', '(', ')', '[', ']', '{', '}', '|']) {
            return Ok(Self::Pattern(text.to_owned()));
        }
        let names: Vec<&str> = text.split(',').map(str::trim).collect();
        if names.iter().any(|name| name.is_empty()) {
            return bad("expected a name on each side of every comma");
        }
        if names.iter().any(|name| name.eq_ignore_ascii_case(ALL)) {
            return bad("all-linear stands alone");
        }
        let odd =
            |name: &str| !name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'));
        if names.iter().any(|name| odd(name)) {
            return bad("expected names with commas between them");
        }
        Ok(Self::Names(names.into_iter().map(str::to_owned).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<LoraModules, Fault> {
        LoraModules::parse("lora_trainable_modules", text)
    }

    #[test]
    fn names_patterns_and_all_linear_are_told_apart() {
        let names =
            |names: &[&str]| Ok(LoraModules::Names(names.iter().map(|name| (*name).into()).collect()));
        assert_eq!(parse("all-linear"), Ok(LoraModules::AllLinear));
        assert_eq!(parse("ALL-LINEAR"), Ok(LoraModules::AllLinear), "as PEFT reads it");
        assert_eq!(parse("q_proj, self_attn.v_proj"), names(&["q_proj", "self_attn.v_proj"]));
        assert_eq!(parse("all_linear"), names(&["all_linear"]));
        assert_eq!(parse(".*_proj"), Ok(LoraModules::Pattern(".*_proj".into())));
    }

    #[test]
    fn malformed_lists_are_refused_with_an_example() {
        for text in [
            "",
            " ",
            "q_proj v_proj",
            "q_proj;v_proj",
            "q_proj,,v_proj",
            "q_proj,",
            "['q_proj','v_proj']",
            "\"q_proj\"",
            "all-linear,lm_head",
            "q_proj/v_proj",
        ] {
            let fault = parse(text).unwrap_err();
            assert!(fault.message.contains("`lora_trainable_modules`"), "{fault}");
            assert!(fault.hint.contains("\"q_proj,v_proj\""), "{}", fault.hint);
        }
    }
}
