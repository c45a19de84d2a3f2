//! Checks of names that come from outside and become file names here.

/// Kind of a repository on the hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepoKind {
    /// A model, or an adapter.
    Model,
    /// A data set.
    Dataset,
}

impl RepoKind {
    /// The word in addresses and in the cache.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// Whether a name is a single safe component of a path: no separator, no `.` or `..`, no control character, no white space but a space.
#[must_use]
pub fn is_plain_component(name: &str) -> bool {
    let strange = |c: char| matches!(c, '/' | '\\' | ':') || c.is_control() || c.is_whitespace() && c != ' ';
    !name.is_empty() && name.len() <= 255 && name != "." && name != ".." && !name.chars().any(strange)
}

/// Whether a path consists of plain components with slashes between them.
#[must_use]
pub fn is_plain_path(name: &str) -> bool {
    name.split('/').all(is_plain_component)
}

/// Whether a text is `name` or `org/name` by the hub's rules; any other text is a path.
#[must_use]
pub fn is_repo_id(id: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let part = |part: &str| {
        let bytes = part.as_bytes();
        let plain = bytes.iter().all(|&byte| word(byte) || matches!(byte, b'-' | b'.'));
        let ends =
            bytes.first().is_some_and(|&byte| word(byte)) && bytes.last().is_some_and(|&byte| word(byte));
        plain && ends && bytes.len() <= 96
    };
    id.matches('/').count() <= 1
        && id.split('/').all(part)
        && !["--", ".."].iter().any(|mark| id.contains(mark))
        && !id.ends_with(".git")
}

/// The blob name of an `ETag` header, `"…"` or `W/"…"`; `None` if it is not a safe file name.
pub(super) fn etag(header: &str) -> Option<&str> {
    let tag = header.trim_start_matches(['W', '/']).trim_matches('"');
    is_plain_component(tag).then_some(tag)
}

/// The SHA-256 if the ETag is one, as for large files; `None` for other ETags.
pub(super) fn sha256(etag: &str) -> Option<&str> {
    let hex =
        etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    hex.then_some(etag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_not_plain() {
        for name in [
            "",
            ".",
            "..",
            "/etc/passwd",
            "../x",
            "a/b",
            "a\\b",
            "a\nb",
            "a\0b",
            "\u{1b}[2J",
            "C:x",
            "a\tb",
            &"x".repeat(256),
        ] {
            assert!(!is_plain_component(name), "{name:?}");
        }
        for name in ["config.json", "...", "a b", "ü.json", "-x", ".bash_aliases"] {
            assert!(is_plain_component(name), "{name:?}");
        }
        for path in ["a/../b", "/a", "a/", "a//b", "./a", "a/..", ".."] {
            assert!(!is_plain_path(path), "{path:?}");
        }
        assert!(is_plain_path("onnx/model.onnx") && is_plain_path("config.json"));
    }

    #[test]
    fn etags_are_blob_names_or_refused() {
        assert_eq!(etag("\"abc\""), Some("abc"));
        assert_eq!(etag("W/\"abc\""), Some("abc"));
        assert_eq!(etag("abc"), Some("abc"));
        for evil in ["\"/tmp/x\"", "\"../../x\"", "\"..\"", "\"\"", "", "\"a/b\"", "W/\"/etc/cron.d/x\""] {
            assert_eq!(etag(evil), None, "{evil}");
        }
        let sha = "0123456789abcdef".repeat(4);
        assert_eq!(sha256(&sha), Some(sha.as_str()));
        assert_eq!((sha256(&sha[..63]), sha256(&sha.to_uppercase())), (None, None));
    }

    /// Expected results come from `huggingface_hub.utils.validate_repo_id` 2.4.0.
    #[test]
    fn repo_ids_follow_the_hubs_rules() {
        let long = "x".repeat(97);
        for id in ["gpt2", "org/name", "Foo-BAR_foo.bar123", "123", "a/b.c", "_a/b_"] {
            assert!(is_repo_id(id), "{id}");
        }
        for id in [
            "",
            "a/b/c",
            "./x",
            "/x",
            "x/",
            ".repo",
            "foo--bar",
            "foo.git",
            "a..b",
            "-a",
            "a-",
            "a b",
            "café",
            "a/",
            "~/m",
            "a\nb",
            "org/na:me",
            "org/name\u{1b}",
            &long,
        ] {
            assert!(!is_repo_id(id), "{id:?}");
        }
    }
}
