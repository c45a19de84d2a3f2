//! JSON values that chat templates read: tools, tool calls and further variables. They travel as text.

use serde_json::Value;

use super::RecordError;

/// Compact JSON text of one value, with the keys of objects in the file's order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Json(String);

impl Json {
    /// The text of a value.
    #[must_use]
    pub fn of(value: &Value) -> Self {
        Self(value.to_string())
    }

    /// Reads text from the wire; `None` if it is not JSON.
    #[must_use]
    pub fn parse(text: String) -> Option<Self> {
        serde_json::from_str::<serde::de::IgnoredAny>(&text).ok().map(|_| Self(text))
    }

    /// The text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.0
    }

    /// The value.
    #[must_use]
    pub fn value(&self) -> Value {
        // The text was a value when it was made.
        serde_json::from_str(&self.0).unwrap_or_default()
    }
}

/// Fails if a JSON text has a number that Python reads differently: a whole number beyond 64 bits, or `-0`. `field` is for the error.
pub(super) fn refuse_numbers(text: &str, field: &str) -> Result<(), RecordError> {
    let number = |at: &u8| matches!(at, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E');
    let bytes = text.as_bytes();
    let (mut at, mut quoted) = (0, false);
    while at < bytes.len() {
        match bytes[at] {
            b'\\' if quoted => at += 1,
            b'"' => quoted = !quoted,
            b'-' | b'0'..=b'9' if !quoted => {
                let length = bytes[at..].iter().take_while(|byte| number(byte)).count();
                let word = &text[at..at + length];
                let whole = !word.contains(['.', 'e', 'E']);
                if whole && (word == "-0" || word.parse::<i64>().is_err()) {
                    return super::broken(
                        field,
                        format!(
                            "the number {} is not supported: whole numbers have at most 64 bits",
                            crate::plain::quoted(word)
                        ),
                    );
                }
                at += length - 1;
            }
            _ => {}
        }
        at += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_keeps_the_order_of_keys() {
        let text = r#"{"b":1,"a":[1.5,"é\n",null],"0":{}}"#;
        assert_eq!(Json::of(&serde_json::from_str(text).unwrap()).text(), text);
        assert_eq!(Json::parse("{".into()), None);
    }

    #[test]
    fn numbers_that_python_reads_differently_are_refused() {
        for good in ["[-1, 9223372036854775807, 1e400, -0.0, -0e1]", r#"{"a": "18446744073709551616 \" -0"}"#]
        {
            assert_eq!(refuse_numbers(good, "tools"), Ok(()), "{good}");
        }
        for bad in ["[-0]", "9223372036854775808", "{\"a\":-18446744073709551616}"] {
            assert!(refuse_numbers(bad, "tools").unwrap_err().problem.contains("64 bits"), "{bad}");
        }
    }
}
