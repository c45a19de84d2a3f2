//! Join token of a coordinator that is started by hand. Trainers on the same machine find it in a folder that only this user can read.

use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::TOKEN_FILE;
use super::token::JoinToken;
use crate::{Fault, files};

/// The token file of a running coordinator; dropping it removes the file.
#[derive(Debug)]
pub struct Published {
    path: PathBuf,
    text: String,
}

impl Drop for Published {
    fn drop(&mut self) {
        // Another coordinator may use the port now and may have replaced the file.
        if files::read_to_string(&self.path).is_ok_and(|text| text == self.text) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Writes the token file of the coordinator at this port of the loopback interface.
pub fn publish(port: u16, token: &JoinToken) -> Result<Published, Fault> {
    publish_in(&std::env::temp_dir(), port, token)
}

/// The token of the coordinator at `http://host:port`, if it runs on this machine under this user.
#[must_use]
pub fn find(address: &str) -> Option<String> {
    find_in(&std::env::temp_dir(), address)
}

fn publish_in(parent: &Path, port: u16, token: &JoinToken) -> Result<Published, Fault> {
    let dir = folder(parent);
    let failed = |error: io::Error| {
        Fault::input(format!("cannot write the join token into {}: {error}", dir.display())).hint(format!(
            "{TOKEN_FILE} or --token-file names a file with a token; TMPDIR names another place"
        ))
    };
    match DirBuilder::new().mode(0o700).create(&dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => own(&dir).map_err(failed)?,
    }
    let path = dir.join(name(port));
    let _ = fs::remove_file(&path);
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    file.and_then(|mut file| file.write_all(token.text().as_bytes())).map_err(failed)?;
    Ok(Published { path, text: token.text().to_owned() })
}

fn find_in(parent: &Path, address: &str) -> Option<String> {
    let place = address.rsplit("//").next()?.trim_end_matches('/');
    let (host, port) = place.rsplit_once(':')?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let here = host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
    let dir = folder(parent);
    if !here || own(&dir).is_err() {
        return None;
    }
    files::read_to_string(&dir.join(name(port.parse().ok()?))).ok().map(|text| text.trim().to_owned())
}

/// Fails unless the folder belongs to this user and no other user has access.
fn own(dir: &Path) -> io::Result<()> {
    let about = fs::symlink_metadata(dir)?;
    if about.is_dir() && about.uid() == own_user() && about.mode() & 0o077 == 0 {
        return Ok(());
    }
    Err(io::Error::other("it is not a folder of this user alone"))
}

fn folder(parent: &Path) -> PathBuf {
    parent.join(format!("dyad-tokens-{}", own_user()))
}

/// File name of a port's token. Includes the network namespace, because each has its own ports.
fn name(port: u16) -> String {
    let namespace = fs::metadata("/proc/self/ns/net").map_or(0, |about| about.ino());
    format!("{namespace}-{port}")
}

#[expect(unsafe_code, reason = "geteuid")]
fn own_user() -> u32 {
    // SAFETY: geteuid takes no arguments and cannot fail.
    unsafe { libc::geteuid() }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn a_token_is_found_by_its_port_until_the_coordinator_ends() {
        let dir = tempfile::tempdir().unwrap();
        let token = JoinToken::new([3; 32], SystemTime::now());
        let published = publish_in(dir.path(), 29400, &token).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&folder(dir.path())), mode(&published.path)), (0o700, 0o600));
        for here in ["http://127.0.0.1:29400", "http://localhost:29400/", "http://[::1]:29400"] {
            assert_eq!(find_in(dir.path(), here).as_deref(), Some(token.text()), "{here}");
        }
        for elsewhere in ["http://127.0.0.1:29401", "http://10.0.0.1:29400", "http://node1:29400", "x"] {
            assert_eq!(find_in(dir.path(), elsewhere), None, "{elsewhere}");
        }
        let other = JoinToken::new([4; 32], SystemTime::now());
        let second = publish_in(dir.path(), 29400, &other).unwrap();
        drop(published);
        assert_eq!(find_in(dir.path(), "http://127.0.0.1:29400").as_deref(), Some(other.text()));
        drop(second);
        assert_eq!(find_in(dir.path(), "http://127.0.0.1:29400"), None);
    }

    #[test]
    fn readable_and_linked_token_folders_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let token = JoinToken::new([3; 32], SystemTime::now());
        fs::create_dir(folder(dir.path())).unwrap();
        fs::set_permissions(folder(dir.path()), fs::Permissions::from_mode(0o755)).unwrap();
        let fault = publish_in(dir.path(), 1, &token).unwrap_err();
        assert!(fault.message.contains("not a folder of this user alone"), "{fault}");
        fs::write(folder(dir.path()).join(name(1)), "planted").unwrap();
        assert_eq!(find_in(dir.path(), "http://127.0.0.1:1"), None);
        fs::rename(folder(dir.path()), dir.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), folder(dir.path())).unwrap();
        assert!(publish_in(dir.path(), 1, &token).is_err());
    }
}
