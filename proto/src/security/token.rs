//! The join token: 256 random bits that the processes of a run share, and an expiry time.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ring::rand::{SecureRandom, SystemRandom};

use crate::Fault;

/// Validity of a token for a run on one machine: ten years.
const LASTING: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Description of a token's format, for hints.
pub const FORM: &str = "a join token is 64 hexadecimal digits, a dot, and the Unix second of its expiry";

/// `<64 hexadecimal digits>.<Unix second of its expiry>`. The coordinator checks the expiry of its own copy, so a client cannot extend it.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    text: String,
    expires: SystemTime,
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("expires", &self.expires).finish_non_exhaustive()
    }
}

impl JoinToken {
    /// Makes a token from the system's random numbers.
    pub fn random(expires: SystemTime) -> Result<Self, Fault> {
        let mut secret = [0; 32];
        SystemRandom::new()
            .fill(&mut secret)
            .map_err(|_| Fault::failed("the system gives no random numbers for a join token"))?;
        Ok(Self::new(secret, expires))
    }

    /// Makes a random token for a run on one machine, valid for ten years.
    pub fn lasting() -> Result<Self, Fault> {
        Self::random(SystemTime::now() + LASTING)
    }

    /// Makes a token from random bytes.
    #[must_use]
    pub fn new(secret: [u8; 32], expires: SystemTime) -> Self {
        let seconds = expires.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut text: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        text.push_str(&format!(".{seconds}"));
        Self { text, expires }
    }

    /// Parses a token. The error never quotes the text, which may be a secret.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        const NOT: &str = "not a join token";
        let (secret, seconds) = text.split_once('.').ok_or(NOT)?;
        if secret.len() != 64 || !secret.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(NOT);
        }
        let seconds: u64 = seconds.parse().map_err(|_| NOT)?;
        let expires = UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).ok_or(NOT)?;
        Ok(Self { text: text.to_owned(), expires })
    }

    /// The token as text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether the token has expired.
    #[must_use]
    pub fn expired(&self, now: SystemTime) -> bool {
        now >= self.expires
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn tokens_expire_on_time() {
        let end = UNIX_EPOCH + Duration::from_secs(2_000_000_000);
        let token = JoinToken::parse(JoinToken::new([0xab; 32], end).text()).unwrap();
        assert!(token.text().starts_with("abab") && token.text().ends_with("ab.2000000000"));
        assert!(!token.expired(end - Duration::from_secs(1)) && token.expired(end));
    }

    #[test]
    fn malformed_tokens_are_refused() {
        let hex = "ab".repeat(32);
        for text in ["", ".", &hex, &format!("{hex}."), &format!("{hex}.-1"), &format!("x{hex}.1"), "ab.1"] {
            assert!(JoinToken::parse(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".{0,90}", digits in "[0-9a-f]{64}\\.[0-9]{1,25}") {
            let _ = (JoinToken::parse(&text), JoinToken::parse(&digits));
        }
    }
}
