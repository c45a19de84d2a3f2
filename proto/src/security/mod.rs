//! What a process needs to talk to the others over mutual TLS: four files in one folder, which `DYAD_TLS_DIR` names.
//!
//! - W-1: keys and tokens lie in files of mode 0600 in a folder of mode 0700; never in arguments, environment or logs.

pub mod client;
pub mod token;

use std::fmt;
use std::fs::{DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::Fault;

/// The environment variable that names the folder.
pub const TLS_DIR: &str = "DYAD_TLS_DIR";

/// What the coordinator's certificate is for, wherever the coordinator runs.
pub const SERVER_NAME: &str = "coordinator.dyad";

/// As whom a process calls the coordinator; a DNS name in its certificate says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// May join the run.
    Trainer,
    /// May follow the run.
    Launcher,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 2] = [Self::Trainer, Self::Launcher];

    /// The name that a certificate of this role carries as subject alternative name.
    #[must_use]
    pub fn certificate_name(self) -> &'static str {
        match self {
            Self::Trainer => "trainer.dyad",
            Self::Launcher => "launcher.dyad",
        }
    }
}

/// The contents of the four files of one process.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Material {
    /// `ca.pem`: whose certificates this process believes.
    pub ca_pem: String,
    /// `cert.pem`: who this process is.
    pub cert_pem: String,
    /// `key.pem`: the private key to that.
    pub key_pem: String,
    /// `join-token`: what every process of the run knows.
    pub join_token: String,
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Material").finish_non_exhaustive()
    }
}

impl Material {
    /// Reads a folder.
    pub fn load(dir: &Path) -> Result<Self, Fault> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read_to_string(&path).map_err(|error| {
                Fault::input(format!("cannot read {}: {error}", path.display())).hint(format!(
                    "{TLS_DIR} names a folder with ca.pem, cert.pem, key.pem and join-token (docs/security.md)"
                ))
            })
        };
        let join_token = read("join-token")?.trim().to_owned();
        token::JoinToken::parse(&join_token).map_err(|what| {
            Fault::input(format!("{}: {what}", dir.join("join-token").display())).hint(token::FORM)
        })?;
        Ok(Self {
            ca_pem: read("ca.pem")?,
            cert_pem: read("cert.pem")?,
            key_pem: read("key.pem")?,
            join_token,
        })
    }

    /// Writes a new folder that only its owner can read; fails where there is one already.
    pub fn write(&self, dir: &Path) -> Result<(), Fault> {
        let failed = |path: &Path, error: std::io::Error| {
            Fault::failed(format!("cannot write {}: {error}", path.display()))
                .hint("TMPDIR names another place for the run's keys")
        };
        DirBuilder::new().mode(0o700).create(dir).map_err(|error| failed(dir, error))?;
        for (name, text) in self.files() {
            let path = dir.join(name);
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
            file.and_then(|mut file| file.write_all(text.as_bytes()))
                .map_err(|error| failed(&path, error))?;
        }
        Ok(())
    }

    /// Names and contents of the files.
    #[must_use]
    pub fn files(&self) -> [(&'static str, &str); 4] {
        [
            ("ca.pem", &self.ca_pem),
            ("cert.pem", &self.cert_pem),
            ("key.pem", &self.key_pem),
            ("join-token", &self.join_token),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn material() -> Material {
        let text = |what: &str| what.to_owned();
        Material {
            ca_pem: text("authority"),
            cert_pem: text("certificate"),
            key_pem: text("secret key"),
            join_token: token::JoinToken::new([7; 32], std::time::SystemTime::now()).text().to_owned(),
        }
    }

    #[test]
    fn files_are_for_their_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("tls");
        material().write(&folder).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&folder), 0o700);
        for (name, _) in material().files() {
            assert_eq!(mode(&folder.join(name)), 0o600, "{name}");
        }
        assert_eq!(Material::load(&folder).unwrap().key_pem, "secret key");
        assert!(material().write(&folder).is_err(), "an existing folder may be somebody else's");
    }

    #[test]
    fn what_is_missing_or_no_token_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("tls");
        Material { join_token: "hello".into(), ..material() }.write(&folder).unwrap();
        assert!(Material::load(&folder).unwrap_err().message.ends_with("tls/join-token: not a join token"));
        std::fs::remove_file(folder.join("join-token")).unwrap();
        let fault = Material::load(&folder).unwrap_err();
        assert!(fault.message.contains("tls/join-token: ") && fault.hint.contains(TLS_DIR), "{fault}");
    }

    #[test]
    fn secrets_do_not_reach_a_log() {
        let shown = format!("{:?}", material());
        assert!(!shown.contains("secret") && !shown.contains("0707"), "{shown}");
    }
}
