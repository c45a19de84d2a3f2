//! Files of data sets on the hub, by addresses as huggingface_hub writes them: `hf://datasets/OWNER/NAME[@REVISION]/PATH`.

use dyad_proto::Fault;

use super::cache::Repository;
use super::client::{Client, HubError};
use super::names::{RepoKind, is_plain_path, is_repo_id};
use super::settings::Settings;
use super::{MAIN, wrong_answer};
use crate::alive;
use crate::chosen::{Fetched, chosen, is_data_file};

/// The parts of an address.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Address {
    repository: String,
    revision: String,
    path: String,
}

/// Fails if an address of the hub has the wrong form.
pub fn check(address: &str) -> Result<(), Fault> {
    Address::parse(address).map(drop)
}

impl Address {
    fn parse(address: &str) -> Result<Self, Fault> {
        let wrong = || {
            Fault::input(format!("{address:?} is no address of a data set's file"))
                .hint("it looks like hf://datasets/OWNER/NAME/data/train.parquet, or OWNER/NAME@REVISION; the last part may be a pattern")
        };
        let rest = address.strip_prefix("hf://datasets/").ok_or_else(wrong)?;
        let mut parts = rest.splitn(3, '/');
        let (owner, name) = (parts.next().unwrap_or_default(), parts.next().ok_or_else(wrong)?);
        let path = parts.next().unwrap_or_default();
        let (name, revision, path) = match name.split_once('@') {
            None => (name, MAIN.to_owned(), path),
            // Two kinds of revision hold slashes: refs/convert/parquet and refs/pr/1.
            Some((name, "refs")) => {
                let mut more = path.splitn(3, '/');
                let (kind, which) = (more.next().unwrap_or_default(), more.next().ok_or_else(wrong)?);
                (name, format!("refs/{kind}/{which}"), more.next().unwrap_or_default())
            }
            Some((name, revision)) => (name, revision.replace("%2F", "/"), path),
        };
        let repository = format!("{owner}/{name}");
        if !is_repo_id(&repository) || !is_plain_path(&revision) || path.split('/').any(|part| part == "..") {
            return Err(wrong());
        }
        Ok(Self { repository, revision, path: path.to_owned() })
    }
}

/// Downloads the files of an address into the Hugging Face cache.
pub(crate) fn fetch(address: &str) -> Result<Vec<Fetched>, Fault> {
    let wanted = Address::parse(address)?;
    let settings = Settings::from_environment()?;
    let Address { repository: name, revision, .. } = &wanted;
    if let Some(variable) = settings.offline {
        return Err(Fault::unavailable(format!("{address} cannot be fetched: {variable} is set"))
            .hint(format!("fetch it once without {variable}, or give a local file")));
    }
    let repository = Repository::new(&settings.cache, RepoKind::Dataset, name, revision);
    let client = Client::new(&settings)?;
    let taken = take(address, &wanted, &client, &repository);
    taken.unwrap_or_else(|trouble| {
        Err(match trouble {
            HubError::Unanswered(why) | HubError::Slow(why) => unreachable(address, &why),
            HubError::Beyond => unreachable(address, "a file is shorter than announced"),
            HubError::Wrong(what) => wrong_answer(address, &what),
        })
    })
}

fn take(
    address: &str,
    wanted: &Address,
    client: &Client<'_>,
    repository: &Repository,
) -> Result<Result<Vec<Fetched>, Fault>, HubError> {
    let Address { repository: name, revision, path } = wanted;
    let listing = client.list(RepoKind::Dataset, name, revision)?;
    let found = chosen(listing.files(), path);
    if found.is_empty() {
        return Ok(Err(nothing(address, listing.files())));
    }
    if let Some(name) = found.iter().find(|name| !is_plain_path(name)) {
        return Err(HubError::Wrong(format!("it lists a file {name:?}, which is no name of a file")));
    }
    for file in &found {
        alive::advance();
        if !repository.has(&listing.sha, file) {
            let about = client.describe((RepoKind::Dataset, name), revision, &listing.sha, file)?;
            repository.keep(&listing.sha, file, &about, &mut |to, kept| client.fetch(&about, to, kept))?;
        }
    }
    let folder = repository.point_to(&listing.sha)?;
    let at = if revision == MAIN { String::new() } else { format!("@{revision}") };
    let fetched = |file: &&str| Fetched {
        address: format!("hf://datasets/{name}{at}/{file}"),
        path: folder.join(file),
    };
    Ok(Ok(found.iter().map(fetched).collect()))
}

/// Number of file names in a hint.
const SHOWN: usize = 8;

fn nothing<'n>(address: &str, names: impl Iterator<Item = &'n str>) -> Fault {
    let mut data: Vec<&str> =
        names.filter(|name| is_data_file(name.rsplit('/').next().unwrap_or_default())).collect();
    data.sort_unstable();
    let more = if data.len() > SHOWN { ", …" } else { "" };
    data.truncate(SHOWN);
    Fault::input(format!("{address} names no file of pairs")).hint(match data.is_empty() {
        true => "the data set has no JSON Lines or Parquet files; @refs/convert/parquet is the revision into which the hub converts others".into(),
        false => format!("give a file, a folder or a pattern; the data set has {}{more}", data.join(", ")),
    })
}

fn unreachable(address: &str, why: &str) -> Fault {
    Fault::unavailable(format!("cannot fetch {address}: {why}"))
        .hint("check the address, the network, and HF_TOKEN for gated data sets; or give a local file")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_repository_revision_and_path() {
        for (address, repository, revision, path) in [
            ("hf://datasets/a/b/train.jsonl", "a/b", "main", "train.jsonl"),
            ("hf://datasets/a/b", "a/b", "main", ""),
            ("hf://datasets/a/b@v1/data/*.parquet", "a/b", "v1", "data/*.parquet"),
            ("hf://datasets/a/b@refs/convert/parquet/default/x", "a/b", "refs/convert/parquet", "default/x"),
            ("hf://datasets/a/b@refs%2Fpr%2F1/x", "a/b", "refs/pr/1", "x"),
        ] {
            let expected =
                Address { repository: repository.into(), revision: revision.into(), path: path.into() };
            assert_eq!(Address::parse(address), Ok(expected), "{address}");
        }
        for address in [
            "hf://a/b/c",
            "hf://datasets/a",
            "hf://datasets/a/b/../c",
            "hf://datasets/../b/c",
            "hf://datasets/a/b@/x",
        ] {
            assert!(check(address).unwrap_err().message.contains("is no address"), "{address}");
        }
    }
}
