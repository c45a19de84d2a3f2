//! Objects of S3 and Google Cloud Storage, by `s3://BUCKET/KEY` and `gs://BUCKET/KEY`. The last parts of the key may be a pattern, or name
//! a folder. Credentials and endpoints come from the environment variables of the `object_store` crate: `AWS_*` and `GOOGLE_*`.

mod http;

use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use dyad_proto::Fault;
use futures::TryStreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path as Key;
use object_store::{Error, GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt, RetryConfig};

use crate::chosen::{ENDINGS, Fetched, chosen, is_pattern};
use crate::{alive, cache};

/// Bytes of an object that one request asks for.
const PIECE: u64 = 8 << 20;

/// The parts of an address.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Address<'a> {
    scheme: &'a str,
    bucket: &'a str,
    key: &'a str,
}

/// Fails if the address of an object has the wrong form.
pub fn check(address: &str) -> Result<(), Fault> {
    Address::parse(address).map(drop)
}

impl<'a> Address<'a> {
    fn parse(address: &'a str) -> Result<Self, Fault> {
        let parts = address.split_once("://").and_then(|(scheme, rest)| {
            let (bucket, key) = rest.split_once('/')?;
            Some(Self { scheme, bucket, key })
        });
        parts.filter(|parts| !parts.bucket.is_empty() && !parts.key.is_empty()).ok_or_else(|| {
            Fault::input(format!("{address:?} is no address of an object"))
                .hint("it looks like s3://BUCKET/FOLDER/train.jsonl or gs://BUCKET/FOLDER/*.parquet")
        })
    }

    fn store(&self) -> Result<Box<dyn ObjectStore>, Error> {
        let retry =
            RetryConfig { max_retries: 4, retry_timeout: Duration::from_secs(60), ..RetryConfig::default() };
        Ok(match self.scheme {
            "s3" => Box::new(
                AmazonS3Builder::from_env()
                    .with_bucket_name(self.bucket)
                    .with_retry(retry)
                    .with_http_connector(http::UreqConnector)
                    .build()?,
            ),
            _ => Box::new(
                GoogleCloudStorageBuilder::from_env()
                    .with_bucket_name(self.bucket)
                    .with_retry(retry)
                    .with_http_connector(http::UreqConnector)
                    .build()?,
            ),
        })
    }
}

/// Downloads the objects of an address into the cache.
pub(crate) fn fetch(address: &str) -> Result<Vec<Fetched>, Fault> {
    let wanted = Address::parse(address)?;
    let fault = |error: Error| cannot(address, &error);
    let store = wanted.store().map_err(fault)?;
    let found = wait(find(&*store, wanted.key))?.map_err(fault)?;
    if found.is_empty() {
        return Err(Fault::input(format!("{address} names no object of pairs")).hint(format!(
            "give an object, a pattern, or a folder with objects whose names end in {ENDINGS}"
        )));
    }
    found.iter().map(|object| kept(&*store, &wanted, object)).collect()
}

/// The objects of a key, a pattern or a folder.
async fn find(store: &dyn ObjectStore, wanted: &str) -> Result<Vec<ObjectMeta>, Error> {
    if !is_pattern(wanted) && !wanted.ends_with('/') {
        match store.head(&Key::parse(wanted)?).await {
            Ok(object) => return Ok(vec![object]),
            Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    // A listing is by whole components of keys.
    let fixed: Vec<&str> = match is_pattern(wanted) {
        true => wanted.split('/').take_while(|part| !is_pattern(part)).collect(),
        false => vec![wanted.trim_end_matches('/')],
    };
    let prefix = Key::parse(fixed.join("/"))?;
    let mut objects: Vec<ObjectMeta> = store.list(Some(&prefix)).try_collect().await?;
    let names: Vec<String> = objects.iter().map(|object| object.location.to_string()).collect();
    let chosen = chosen(names.iter().map(String::as_str), wanted);
    objects.retain(|object| chosen.contains(&object.location.as_ref()));
    objects.sort_by(|a, b| a.location.cmp(&b.location));
    Ok(objects)
}

/// The cached copy of an object, named by its address and the version of its content.
fn kept(store: &dyn ObjectStore, wanted: &Address<'_>, object: &ObjectMeta) -> Result<Fetched, Fault> {
    let address = format!("{}://{}/{}", wanted.scheme, wanted.bucket, object.location);
    let version = format!(
        "{address}\n{:?}\n{:?}\n{}\n{}",
        object.e_tag, object.version, object.size, object.last_modified
    );
    let path: PathBuf = cache::file(&format!("object-{}", cache::text_sha256(&version)), |to| {
        tracing::info!(object = address, mib = object.size >> 20, "downloading");
        let mut done = 0;
        while done < object.size {
            let end = (done + PIECE).min(object.size);
            // All pieces are of one version.
            let options = GetOptions { if_match: object.e_tag.clone(), ..GetOptions::default() };
            let piece = async {
                let options = options.with_range(Some(done..end));
                store.get_opts(&object.location, options).await?.bytes().await
            };
            let bytes = wait(piece)?.map_err(|error| cannot(&address, &error))?;
            if bytes.len() as u64 != end - done {
                return Err(Fault::unavailable(format!(
                    "cannot fetch {address}: it sent another part than asked for"
                )));
            }
            to.write_all(&bytes).map_err(|error| Fault::failed(format!("cannot keep {address}: {error}")))?;
            done = end;
            alive::advance();
        }
        Ok(())
    })?;
    Ok(Fetched { address, path })
}

/// Runs requests to their end, on a thread of their own, because the caller may be on a runtime's thread.
fn wait<T: Send>(work: impl Future<Output = T> + Send) -> Result<T, Fault> {
    let failed = |what: String| Fault::failed(format!("cannot start a request: {what}"));
    std::thread::scope(|scope| {
        let running = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
            runtime.map(|runtime| runtime.block_on(work)).map_err(|error| failed(error.to_string()))
        });
        running.join().unwrap_or_else(|_| Err(failed("its thread ended".into())))
    })
}

fn cannot(address: &str, error: &Error) -> Fault {
    let refused = "check the credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS; \
        AWS_SKIP_SIGNATURE=true or GOOGLE_SKIP_SIGNATURE=true for public buckets (docs/data.md)";
    let what = shortest(error);
    match error {
        Error::NotFound { .. } => Fault::input(format!("{address} does not exist"))
            .hint("check bucket and key; a folder is named without a pattern, or with * for its files"),
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
            Fault::input(format!("{address} may not be read: {what}")).hint(refused)
        }
        Error::Precondition { .. } => {
            Fault::unavailable(format!("{address} changed while it was fetched")).hint("try again")
        }
        Error::InvalidPath { .. } | Error::UnknownConfigurationKey { .. } => {
            Fault::input(format!("cannot fetch {address}: {what}"))
                .hint("check the address and the variables AWS_* and GOOGLE_*")
        }
        _ => Fault::unavailable(format!("cannot fetch {address}: {what}")).hint(
            match address.starts_with("gs:") {
                true => "check the network and, if it is set, GOOGLE_BASE_URL",
                false => "check the network, the region (AWS_REGION) and the endpoint (AWS_ENDPOINT_URL)",
            },
        ),
    }
}

/// An error in one line, without the answer's XML.
fn shortest(error: &Error) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    line.split(": <?xml").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_bucket_and_key() {
        let expected = Address { scheme: "s3", bucket: "b", key: "a/*.jsonl" };
        assert_eq!(Address::parse("s3://b/a/*.jsonl"), Ok(expected));
        for address in ["s3://b", "s3://b/", "s3:///k", "gs://"] {
            assert!(check(address).unwrap_err().message.contains("is no address"), "{address}");
        }
    }
}
