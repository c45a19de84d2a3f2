//! Hub settings from the environment: cache folder, address, offline mode and token, as huggingface_hub 2.4.0 reads them.

use std::path::{Path, PathBuf};

use dyad_proto::Fault;

/// Largest token file in bytes.
const MOST_OF_A_TOKEN: u64 = 64 << 10;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Settings from the environment.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Settings {
    /// Folder of the cache.
    pub(super) cache: PathBuf,
    /// Address of the hub, without a slash at the end.
    pub(super) endpoint: String,
    /// The variable that turns on offline mode; `None` if online.
    pub(super) offline: Option<&'static str>,
    /// Access token.
    pub(super) token: Option<String>,
}

impl Settings {
    /// Reads the environment of this process.
    pub(super) fn from_environment() -> Result<Self, Fault> {
        let read = |path: &Path| match dyad_proto::files::read_to_string_or_pipe(path, MOST_OF_A_TOKEN) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => {
                Err(Fault::input(format!("cannot read the hub's token {}: {error}", path.display()))
                    .hint("HF_TOKEN_PATH names the file; HF_TOKEN can hold the token itself"))
            }
        };
        Self::of(&|name| std::env::var(name).ok(), &read)
    }

    fn of(
        variable: &dyn Fn(&str) -> Option<String>,
        read: &dyn Fn(&Path) -> Result<Option<String>, Fault>,
    ) -> Result<Self, Fault> {
        let place = |text: String| expanded(&text, variable);
        let home = variable("HF_HOME").unwrap_or_else(|| {
            let caches = variable("XDG_CACHE_HOME").unwrap_or_else(|| "~/.cache".into());
            join(&caches, "huggingface")
        });
        let home = place(home);
        let cache = variable("HF_HUB_CACHE")
            .or_else(|| variable("HUGGINGFACE_HUB_CACHE"))
            .map_or_else(|| join(&home, "hub"), place);
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.into());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        if !["http://", "https://"].iter().any(|scheme| endpoint.starts_with(scheme)) {
            return Err(Fault::input(format!("HF_ENDPOINT {endpoint:?} is no address of a hub"))
                .hint("it looks like https://huggingface.co; unset it for that one"));
        }
        let token_path = variable("HF_TOKEN_PATH").map_or_else(|| join(&home, "token"), place);
        let token = match is_true(variable("HF_HUB_DISABLE_IMPLICIT_TOKEN").as_deref()) {
            true => None,
            false => token(variable, &|| read(Path::new(&token_path)))?,
        };
        Ok(Self { cache: cache.into(), endpoint, offline: offline(variable), token })
    }
}

/// The first of the two variables that is not empty decides.
fn offline(variable: &dyn Fn(&str) -> Option<String>) -> Option<&'static str> {
    let said =
        |name: &'static str| variable(name).filter(|value| !value.is_empty()).map(|value| (name, value));
    let (name, value) = said("HF_HUB_OFFLINE").or_else(|| said("TRANSFORMERS_OFFLINE"))?;
    is_true(Some(&value)).then_some(name)
}

fn is_true(value: Option<&str>) -> bool {
    value.is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()))
}

/// Reads the token from the environment, else from the file that `hf auth login` writes. Removes line ends, which secrets often have.
fn token(
    variable: &dyn Fn(&str) -> Option<String>,
    file: &dyn Fn() -> Result<Option<String>, Fault>,
) -> Result<Option<String>, Fault> {
    let said = |name: &str| variable(name).filter(|value| !value.is_empty());
    let given = said("HF_TOKEN").or_else(|| said("HUGGING_FACE_HUB_TOKEN"));
    let token = match given.as_deref().and_then(clean) {
        Some(token) => Some(token),
        None => file()?.as_deref().and_then(clean),
    };
    // The token becomes part of an HTTP header line.
    if token.as_ref().is_some_and(|token| !token.bytes().all(|byte| (0x21..0x7f).contains(&byte))) {
        return Err(Fault::input("the hub's token holds a blank or a character that no token has")
            .hint("look at HF_TOKEN, or at the file that HF_TOKEN_PATH names"));
    }
    Ok(token)
}

fn clean(token: &str) -> Option<String> {
    let token = token.replace(['\r', '\n'], "");
    Some(token.trim()).filter(|token| !token.is_empty()).map(str::to_owned)
}

/// Joins paths as Python does.
fn join(folder: &str, name: &str) -> String {
    Path::new(folder).join(name).to_string_lossy().into_owned()
}

/// Replaces a leading `~` by the home folder, and `$NAME` and `${NAME}` by variables that are set.
fn expanded(text: &str, variable: &dyn Fn(&str) -> Option<String>) -> String {
    let home = variable("HOME").unwrap_or_else(|| "~".into());
    let text = match text.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => {
            format!("{}{rest}", home.trim_end_matches('/'))
        }
        _ => text.to_owned(),
    };
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let (name, end) = match after.strip_prefix('{').and_then(|inner| Some((inner, inner.find('}')?))) {
            Some((inner, close)) => (&inner[..close], close + 2),
            None => {
                let plain = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
                let end = after.find(plain).unwrap_or(after.len());
                (&after[..end], end)
            }
        };
        match variable(name).filter(|_| !name.is_empty()) {
            Some(value) => out.push_str(&value),
            None => out.push_str(&rest[at..at + 1 + end]),
        }
        rest = &after[end..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)], file: Option<(&str, &str)>) -> Result<Settings, Fault> {
        let variable = |name: &str| {
            let own =
                variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
            own.or_else(|| (name == "HOME").then(|| "/home/me".into()))
        };
        let read =
            |path: &Path| Ok(file.filter(|(at, _)| Path::new(at) == path).map(|(_, text)| text.to_owned()));
        Settings::of(&variable, &read)
    }

    /// Expected results come from huggingface_hub 2.4.0 (`constants.HF_HUB_CACHE`).
    #[test]
    fn the_cache_folder_matches_huggingface_hub() {
        for (variables, cache) in [
            (&[][..], "/home/me/.cache/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h")], "/h/hub"),
            (&[("HF_HOME", "~/h")], "/home/me/h/hub"),
            (&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")], "/c"),
            (&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HOME", "/h")], "/old"),
            (&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")], "/new"),
            (&[("HF_HUB_CACHE", "$DISK/a/${DISK}$NONE"), ("DISK", "/d")], "/d/a//d$NONE"),
            (&[("HF_HOME", "")], "hub"),
        ] {
            assert_eq!(settings(variables, None).unwrap().cache, Path::new(cache), "{variables:?}");
        }
    }

    #[test]
    fn offline_values_match_huggingface_hub() {
        let offline = |variables: &[(&str, &str)]| settings(variables, None).unwrap().offline;
        for word in ["1", "YES", "yes", "on", "True", "TRUE"] {
            assert_eq!(offline(&[("HF_HUB_OFFLINE", word)]), Some("HF_HUB_OFFLINE"), "{word}");
            assert_eq!(offline(&[("TRANSFORMERS_OFFLINE", word)]), Some("TRANSFORMERS_OFFLINE"), "{word}");
        }
        for word in ["", "0", "no", "2", " 1", "y", "enabled"] {
            assert_eq!(offline(&[("HF_HUB_OFFLINE", word)]), None, "{word}");
        }
        assert_eq!(offline(&[("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")]), None);
        assert_eq!(
            offline(&[("HF_HUB_OFFLINE", ""), ("TRANSFORMERS_OFFLINE", "1")]),
            Some("TRANSFORMERS_OFFLINE")
        );
    }

    #[test]
    fn tokens_are_trimmed_and_empty_ones_ignored() {
        let file = Some(("/home/me/.cache/huggingface/token", "hf_file\n"));
        let token = |variables: &[(&str, &str)]| settings(variables, file).unwrap().token;
        for (variables, expected) in [
            (&[("HF_TOKEN", "hf_abc\n")][..], Some("hf_abc")),
            (&[("HF_TOKEN", " hf_abc\r\n")], Some("hf_abc")),
            (&[("HF_TOKEN", "hf_\nabc")], Some("hf_abc")),
            (&[("HF_TOKEN", "")], Some("hf_file")),
            (&[("HF_TOKEN", " \n")], Some("hf_file")),
            (&[("HF_TOKEN", ""), ("HUGGING_FACE_HUB_TOKEN", "hf_old")], Some("hf_old")),
            (&[("HF_TOKEN", "hf_new"), ("HUGGING_FACE_HUB_TOKEN", "hf_old")], Some("hf_new")),
            (&[("HF_TOKEN", "\n"), ("HUGGING_FACE_HUB_TOKEN", "hf_old")], Some("hf_file")),
            (&[("HF_TOKEN_PATH", "/elsewhere")], None),
            (&[("HF_HOME", "/h")], None),
            (&[("HF_TOKEN", "hf_abc"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")], None),
        ] {
            assert_eq!(token(variables).as_deref(), expected, "{variables:?}");
        }
        for bad in ["hf_a\u{1b}[31m", "hf a", "hf_ä"] {
            let fault = settings(&[("HF_TOKEN", bad)], None).err().unwrap();
            assert!(fault.message.contains("no token has") && !fault.message.contains("hf"), "{fault}");
        }
    }

    #[test]
    fn an_endpoint_must_be_an_http_address() {
        let endpoint =
            |value: &str| settings(&[("HF_ENDPOINT", value)], None).map(|settings| settings.endpoint);
        assert_eq!(endpoint("https://mirror.example//").unwrap(), "https://mirror.example");
        assert!(endpoint("").is_err() && endpoint("ftp://x").is_err());
    }
}
