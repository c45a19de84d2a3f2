//! Checks, by name, that an adapter is used with the model that it was trained over.

use std::path::Path;

use serde_json::Value;

/// The model that an adapter was trained over, as its folder names it.
#[derive(Clone, Copy, Debug)]
pub struct NamedBase<'a> {
    /// Folder or hub id.
    pub name: Option<&'a str>,
    /// Branch, tag or commit.
    pub revision: Option<&'a str>,
}

/// Returns a warning if the adapter's base seems to be another model than the run's. `run`: the model's name as the user wrote it;
/// `dir`: its folder.
#[must_use]
pub fn mismatch(base: NamedBase<'_>, run: &str, dir: &Path) -> Option<String> {
    let NamedBase { name: named, revision } = base;
    let named = named?;
    if !same(named, run, dir) {
        return Some(format!(
            "the adapter was trained over {named}, but goes on top of {run} ({}): unless they are the same model, it computes nonsense",
            dir.display()
        ));
    }
    let revision = revision.filter(|revision| *revision != "main")?;
    let taken = dir.components().any(|part| part.as_os_str() == revision);
    (!taken).then(|| {
        format!("the adapter was trained over revision {revision} of {named}; whether {} is that one is not known", dir.display())
    })
}

fn same(named: &str, run: &str, dir: &Path) -> bool {
    let (there, here) = (std::fs::canonicalize(named), std::fs::canonicalize(dir));
    if let (Ok(there), Ok(here)) = (&there, &here)
        && there.is_dir()
    {
        return there == here;
    }
    let here = here.unwrap_or_else(|_| dir.to_owned());
    let ids = [Some(run.to_owned()), hub_id(&here), original(dir)];
    let mut known = ids.iter().flatten().map(String::as_str).chain(here.to_str());
    match (is_hub_id(named), hub_id(Path::new(named))) {
        // For a copy of a hub model, only the folder's name can be compared.
        (true, _) => known.any(|id| is_same_id(named, id)),
        (false, Some(id)) => known.any(|other| is_same_id(&id, other)),
        // A folder on another machine: compare the last part of the path.
        (false, None) => known.any(|id| last(id).eq_ignore_ascii_case(last(named))),
    }
}

fn is_same_id(a: &str, b: &str) -> bool {
    match is_hub_id(b) {
        true => a.eq_ignore_ascii_case(b),
        false => last(a).eq_ignore_ascii_case(last(b)),
    }
}

fn last(name: &str) -> &str {
    name.trim_end_matches('/').rsplit('/').next().unwrap_or(name)
}

/// Whether the name looks like `org/name` and not like a path.
fn is_hub_id(name: &str) -> bool {
    name.matches('/').count() == 1 && !name.starts_with(['.', '/', '~']) && !name.ends_with('/')
}

/// The hub id of a folder in the hub's cache, `…/models--org--name/snapshots/…`.
fn hub_id(path: &Path) -> Option<String> {
    let folder = path.components().find_map(|part| part.as_os_str().to_str()?.strip_prefix("models--"))?;
    Some(folder.replacen("--", "/", 1))
}

/// The hub id in `_name_or_path` of the model's config.json.
fn original(dir: &Path) -> Option<String> {
    let text = dyad_proto::files::read_to_string(&dir.join("config.json")).ok()?;
    let json: Value = serde_json::from_str(&text).ok()?;
    json.get("_name_or_path")?.as_str().filter(|name| is_hub_id(name)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_different_base_warns_with_both_names() {
        let root = tempfile::tempdir().unwrap();
        let dir = |name: &str| {
            let path = root.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        let (one, other) = (dir("one/final"), dir("other/final"));
        let said = |named: &str, run: &str, dir: &Path| {
            mismatch(NamedBase { name: Some(named), revision: None }, run, dir)
        };
        assert_eq!(said(one.to_str().unwrap(), "x", &one), None);
        let text = said(other.to_str().unwrap(), "one/final", &one).unwrap();
        assert!(text.contains("other/final") && text.contains("one/final"), "{text}");
        // The folder does not exist here, as on another machine: only the last part of the path counts.
        assert_eq!(said("/elsewhere/final", "one/final", &one), None);
        assert!(said("/elsewhere/llama", "one/final", &one).is_some());
        // Hub ids.
        assert_eq!(said("org/final", "one/final/", &one), None);
        assert_eq!(said("Org/Name", "org/name", &one), None);
        assert!(said("org/base", "org/instruct", &one).is_some());
        let cached = dir("hub/models--org--base/snapshots/abc");
        assert_eq!(said("org/base", cached.to_str().unwrap(), &cached), None);
        assert_eq!(said("/other/models--org--base/snapshots/def", "org/base", &cached), None);
        assert_eq!(mismatch(NamedBase { name: None, revision: None }, "x", &one), None);
    }

    #[test]
    fn a_possibly_different_revision_warns() {
        let root = tempfile::tempdir().unwrap();
        let cached = root.path().join("models--org--base/snapshots/abc");
        std::fs::create_dir_all(&cached).unwrap();
        let said = |revision: &str| {
            mismatch(NamedBase { name: Some("org/base"), revision: Some(revision) }, "org/base", &cached)
        };
        assert_eq!((said("main"), said("abc")), (None, None));
        assert!(said("v2").unwrap().contains("revision v2 of org/base"));
    }
}
