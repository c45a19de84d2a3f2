//! Credentials of a process. For mutual TLS: four files in the folder that `DYAD_TLS_DIR` names. For plain text: the join token, in the
//! file that `DYAD_TOKEN_FILE` names.
//!
//! - PRO-W1: keys and tokens are in files of mode 0600 in a folder of mode 0700; never in arguments, environment or logs.

pub mod by_hand;
pub mod client;
pub mod token;

use std::fmt;
use std::fs::{DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::Fault;

/// Maximum bytes of a join token file.
const MOST_OF_A_TOKEN: u64 = 64 << 10;

/// The environment variable that names the folder.
pub const TLS_DIR: &str = "DYAD_TLS_DIR";

/// The environment variable that names the file of the join token, without TLS.
pub const TOKEN_FILE: &str = "DYAD_TOKEN_FILE";

/// Name of the join token file in a folder.
const JOIN_TOKEN: &str = "join-token";

/// Name in the coordinator's certificate, on any host.
pub const SERVER_NAME: &str = "coordinator.dyad";

/// Role of a process that calls the coordinator; a DNS name in its certificate shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessRole {
    /// May join the run.
    Trainer,
    /// May follow the run.
    Launcher,
}

impl ProcessRole {
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

/// Credentials that a process shows to the other processes of its run.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proof {
    /// Over TLS: a certificate, and the join token.
    Certificate(Material),
    /// In plain text: the join token alone.
    Token(String),
}

impl fmt::Debug for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Certificate(_) => "Certificate(..)",
            Self::Token(_) => "Token(..)",
        })
    }
}

impl From<Material> for Proof {
    fn from(material: Material) -> Self {
        Self::Certificate(material)
    }
}

impl Proof {
    /// Loads a folder with certificates or else a token file; `None` if neither is given.
    pub fn load(tls_dir: Option<&Path>, token_file: Option<&Path>) -> Result<Option<Self>, Fault> {
        match (tls_dir, token_file) {
            (Some(dir), _) => Material::load(dir).map(|material| Some(Self::Certificate(material))),
            (None, Some(file)) => load_token(file).map(|token| Some(Self::Token(token))),
            (None, None) => Ok(None),
        }
    }

    /// The join token.
    #[must_use]
    pub fn token(&self) -> &str {
        match self {
            Self::Certificate(material) => &material.join_token,
            Self::Token(token) => token,
        }
    }

    /// Writes the credentials into a new folder that only its owner can read; fails if the folder exists.
    pub fn write(&self, dir: &Path) -> Result<(), Fault> {
        match self {
            Self::Certificate(material) => material.write(dir),
            Self::Token(token) => write_files(dir, &[(JOIN_TOKEN, token)]),
        }
    }

    /// Name and value of the environment variable with which a process finds the credentials written into this folder.
    #[must_use]
    pub fn variable(&self, dir: &Path) -> (&'static str, PathBuf) {
        match self {
            Self::Certificate(_) => (TLS_DIR, dir.to_owned()),
            Self::Token(_) => (TOKEN_FILE, dir.join(JOIN_TOKEN)),
        }
    }
}

/// Reads a join token file; fails if other users can read it.
fn load_token(path: &Path) -> Result<String, Fault> {
    let shown = path.display();
    let about = |error: std::io::Error| {
        Fault::input(format!("cannot read the join token {shown}: {error}"))
            .hint(format!("{TOKEN_FILE} or --token-file names it (docs/security.md)"))
    };
    if std::fs::metadata(path).map_err(about)?.mode() & 0o004 != 0 {
        return Err(Fault::input(format!("every user of this machine can read the join token {shown}"))
            .hint(format!("chmod 600 {shown}, and make a new token")));
    }
    let text = crate::files::read_to_string_or_pipe(path, MOST_OF_A_TOKEN).map_err(about)?.trim().to_owned();
    token::JoinToken::parse(&text)
        .map_err(|what| Fault::input(format!("{shown}: {what}")).hint(token::FORM))?;
    Ok(text)
}

/// Creates a folder with these files, which only the owner can read.
fn write_files(dir: &Path, files: &[(&str, &str)]) -> Result<(), Fault> {
    let failed = |path: &Path, error: std::io::Error| {
        Fault::failed(format!("cannot write {}: {error}", path.display()))
            .hint("TMPDIR names another place for the run's keys")
    };
    DirBuilder::new().mode(0o700).create(dir).map_err(|error| failed(dir, error))?;
    for (name, text) in files {
        let path = dir.join(name);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(|error| failed(&path, error))?;
    }
    Ok(())
}

/// Contents of the four credential files of one process.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Material {
    /// `ca.pem`: certificate of the run's authority.
    pub ca_pem: String,
    /// `cert.pem`: certificate of this process.
    pub cert_pem: String,
    /// `key.pem`: private key of that certificate.
    pub key_pem: String,
    /// `join-token`: the secret that all processes of the run share.
    pub join_token: String,
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Material").finish_non_exhaustive()
    }
}

impl Material {
    /// Reads the four files from a folder.
    pub fn load(dir: &Path) -> Result<Self, Fault> {
        let read = |name: &str| {
            let path = dir.join(name);
            crate::files::read_to_string(&path).map_err(|error| {
                Fault::input(format!("cannot read {}: {error}", path.display())).hint(format!(
                    "{TLS_DIR} names a folder with ca.pem, cert.pem, key.pem and join-token (docs/security.md)"
                ))
            })
        };
        let join_token = read(JOIN_TOKEN)?.trim().to_owned();
        token::JoinToken::parse(&join_token).map_err(|what| {
            Fault::input(format!("{}: {what}", dir.join(JOIN_TOKEN).display())).hint(token::FORM)
        })?;
        Ok(Self {
            ca_pem: read("ca.pem")?,
            cert_pem: read("cert.pem")?,
            key_pem: read("key.pem")?,
            join_token,
        })
    }

    /// Writes the files into a new folder that only its owner can read; fails if the folder exists.
    pub fn write(&self, dir: &Path) -> Result<(), Fault> {
        write_files(dir, &self.files())
    }

    /// Names and contents of the files.
    #[must_use]
    pub fn files(&self) -> [(&'static str, &str); 4] {
        [
            ("ca.pem", &self.ca_pem),
            ("cert.pem", &self.cert_pem),
            ("key.pem", &self.key_pem),
            (JOIN_TOKEN, &self.join_token),
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
    fn only_the_owner_can_read_the_files() {
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
    fn missing_files_and_invalid_tokens_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("tls");
        Material { join_token: "hello".into(), ..material() }.write(&folder).unwrap();
        assert!(Material::load(&folder).unwrap_err().message.ends_with("tls/join-token: not a join token"));
        std::fs::remove_file(folder.join("join-token")).unwrap();
        let fault = Material::load(&folder).unwrap_err();
        assert!(fault.message.contains("tls/join-token: ") && fault.hint.contains(TLS_DIR), "{fault}");
    }

    #[test]
    fn a_token_file_must_not_be_readable_by_others() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("proof");
        let proof = Proof::Token(material().join_token);
        proof.write(&folder).unwrap();
        let (variable, file) = proof.variable(&folder);
        assert_eq!((variable, std::fs::metadata(&file).unwrap().mode() & 0o777), (TOKEN_FILE, 0o600));
        assert_eq!(Proof::load(None, Some(&file)).unwrap(), Some(proof));
        assert_eq!(Proof::load(None, None).unwrap(), None);
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        let fault = Proof::load(None, Some(&file)).unwrap_err();
        assert!(fault.message.starts_with("every user of this machine can read"), "{fault}");
        let fault = Proof::load(None, Some(&folder.join("none"))).unwrap_err();
        assert!(fault.message.contains("none: ") && fault.hint.contains(TOKEN_FILE), "{fault}");
    }

    #[test]
    fn secrets_do_not_reach_a_log() {
        let proofs = [Proof::Certificate(material()), Proof::Token(material().join_token)];
        let shown = format!("{:?} {proofs:?}", material());
        assert!(!shown.contains("secret") && !shown.contains("0707"), "{shown}");
    }
}
