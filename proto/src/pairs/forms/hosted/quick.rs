//! Fast reader for valid lines: one pass, copying only text that needs unescaping. For other lines it returns `None`, and the full
//! parser reads them again to produce the error.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::pairs::{Content, Conversation, Example, Message, Role};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QuickRecord<'a> {
    #[serde(borrow)]
    input: JsonObject<QuickInput<'a>>,
    preferred_output: [JsonObject<Turn<'a>>; 1],
    non_preferred_output: [JsonObject<Turn<'a>>; 1],
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QuickInput<'a> {
    #[serde(borrow)]
    messages: Vec<JsonObject<Turn<'a>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Turn<'a> {
    #[serde(borrow)]
    role: Cow<'a, str>,
    #[serde(borrow)]
    content: Cow<'a, str>,
}

/// Accepts only a JSON object; serde alone would also read a struct from a list.
struct JsonObject<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for JsonObject<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ObjectVisitor(PhantomData)).map(Self)
    }
}

struct ObjectVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }
}

/// A pair that borrows its text from its line.
pub(super) struct QuickPair<'a> {
    messages: Vec<(Role, Cow<'a, str>)>,
    preferred: Cow<'a, str>,
    non_preferred: Cow<'a, str>,
}

impl<'a> QuickPair<'a> {
    /// Returns the pair, or `None` if the line breaks a rule.
    pub(super) fn read(line: &'a str) -> Option<Self> {
        let JsonObject(record) = serde_json::from_str::<JsonObject<QuickRecord<'a>>>(line).ok()?;
        let messages = record.input.0.messages.into_iter();
        let messages = messages
            .map(|JsonObject(turn)| Some((Role::parse(&turn.role)?, turn.content)))
            .collect::<Option<Vec<_>>>()?;
        if messages.last()?.0 == Role::Assistant {
            return None;
        }
        let ([JsonObject(preferred)], [JsonObject(rejected)]) =
            (record.preferred_output, record.non_preferred_output);
        Some(Self { messages, preferred: answer(preferred)?, non_preferred: answer(rejected)? })
    }
}

fn answer(turn: Turn<'_>) -> Option<Cow<'_, str>> {
    (turn.role == "assistant" && !turn.content.trim().is_empty()).then_some(turn.content)
}

impl From<QuickPair<'_>> for Example {
    fn from(pair: QuickPair<'_>) -> Self {
        let said = |content: Cow<'_, str>| vec![Message::new(Role::Assistant, content)];
        let prompt = pair.messages.into_iter().map(|(role, content)| Message::new(role, content));
        Self::new(Content::Conversation(Conversation {
            prompt: prompt.collect(),
            chosen: said(pair.preferred),
            rejected: said(pair.non_preferred),
            ..Conversation::default()
        }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::FORM;
    use super::*;
    use crate::pairs::RecordError;
    use crate::pairs::columns::PassedOver;

    fn by_the_rules(line: &str) -> Result<Example, RecordError> {
        FORM.by_the_rules(line, &mut PassedOver::new())
    }

    const PIECES: [&str; 34] = [
        r#""input""#,
        r#""messages""#,
        r#""role""#,
        r#""content""#,
        r#""preferred_output""#,
        r#""non_preferred_output""#,
        r#""user""#,
        r#""assistant""#,
        r#""system""#,
        r#""r\u006fle""#,
        r#""\ud800""#,
        r#""\ud83d\ude00\n""#,
        r#"" \t ""#,
        r#""x""#,
        r#"{"role":"user","content":"Hi"}"#,
        r#"{"role":"assistant","content":"Yo\n"}"#,
        r#"["assistant","Yo"]"#,
        r#"{"assistant":null}"#,
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "null",
        "7",
        "true",
        " ",
        "",
        "\n",
        "\u{0}",
        "é",
        r#""content":"b","#,
        r#""role":"tool","#,
    ];

    fn good() -> String {
        [
            r#"{"input":{"messages":[{"role":"system","content":"é"},{"content":"a\nb","role":"user"}]},"#,
            r#""preferred_output":[{"role":"assistant","content":"Hello"}],"#,
            r#""non_preferred_output":[{"role":"assistant","content":"\u00e9"}]}"#,
        ]
        .concat()
    }

    /// Splits a line into JSON tokens, so that replacing one often leaves valid JSON.
    fn tokens(line: &str) -> Vec<String> {
        let mut tokens: Vec<String> = Vec::new();
        let mut quoted = false;
        for letter in line.chars() {
            if quoted && letter != '"' {
                tokens.last_mut().unwrap().push(letter);
            } else if quoted {
                tokens.last_mut().unwrap().push('"');
                quoted = false;
            } else {
                tokens.push(letter.to_string());
                quoted = letter == '"';
            }
        }
        tokens
    }

    #[test]
    fn reads_a_good_line() {
        let line = good();
        assert_eq!(tokens(&line).concat(), line);
        let quick = Example::from(QuickPair::read(&line).unwrap());
        assert_eq!(Ok(quick), by_the_rules(&line));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        /// For every line that the fast reader accepts, the full parser returns the same pair.
        #[test]
        fn accepts_nothing_that_the_full_parser_refuses(
            edits in proptest::collection::vec((any::<prop::sample::Index>(), 0..PIECES.len(), 0..3_u8), 0..4),
        ) {
            let mut tokens = tokens(&good());
            for (place, piece, how) in edits {
                let at = place.index(tokens.len());
                match how {
                    0 => tokens[at] = PIECES[piece].to_owned(),
                    1 => tokens.insert(at, PIECES[piece].to_owned()),
                    _ => drop(tokens.remove(at)),
                }
            }
            let line = tokens.concat();
            if let Some(quick) = QuickPair::read(&line) {
                prop_assert_eq!(Ok(quick.into()), by_the_rules(&line), "{}", line);
            }
        }
    }
}
