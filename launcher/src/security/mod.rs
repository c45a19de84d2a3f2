//! TLS and join token of a run. Each run gets a new certificate authority, a certificate for every process, and a new join token.
//!
//! - LNC-K1: private keys are only in memory, and in files that only this user can read and that are deleted with the launcher. The
//!   exception is `kubernetes render --with-secrets`, which writes the run's Secrets to keep.

pub mod run_secrets;
pub mod secret_folder;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use dyad_proto::Fault;
use dyad_proto::security::client::Access;
use dyad_proto::security::token::JoinToken;
pub use dyad_proto::security::{Material, Proof, TLS_DIR, TOKEN_FILE};
pub use run_secrets::RunSecrets;
use secret_folder::SecretFolder;
use tokio::process::Command;

/// Flags about security.
#[derive(Args, Clone, Copy, Debug)]
pub struct SecurityOptions {
    /// Mutual TLS between the processes: auto is on as soon as another machine can reach them, or `DYAD_TLS_DIR` is set.
    #[arg(long, value_enum, default_value_t = Tls::Auto, value_name = "off|auto|on")]
    pub tls: Tls,
    /// How long certificates and join token of the run are good for, in days.
    #[arg(long, default_value_t = 30, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub tls_valid_days: u32,
}

/// Whether the processes of a run talk over TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tls {
    /// Plain text, even if other machines can reach the run.
    Off,
    /// TLS if another machine can reach the run, or `DYAD_TLS_DIR` is set.
    Auto,
    /// Always.
    On,
}

/// How the processes of one run are secured.
#[derive(Debug)]
pub enum Security {
    /// Plain text with a join token.
    Plain {
        /// Other machines can reach the coordinator; only with `--tls off`.
        exposed: bool,
        /// Join token of every process of the run.
        token: JoinToken,
        /// Folder from which processes on this machine read the token.
        folder: SecretFolder,
    },
    /// Secrets made for this run, and the folder from which its processes on this machine read them.
    Own(Box<RunSecrets>, SecretFolder),
    /// The user's own folder; its certificate is valid for every role.
    Given(PathBuf),
}

impl Security {
    /// Chooses the mode for a coordinator that listens at `listen`, and creates its secrets.
    pub fn new(options: SecurityOptions, listen: &str, given: Option<PathBuf>) -> Result<Self, Fault> {
        match decide(options.tls, listen, given) {
            Choice::Plain { exposed } => {
                Ok(Self::Plain { exposed, token: JoinToken::lasting()?, folder: SecretFolder::create()? })
            }
            Choice::Given(dir) => Material::load(&dir).map(|_| Self::Given(dir)),
            Choice::Own => {
                let days = u64::from(options.tls_valid_days);
                let secrets = RunSecrets::new(Duration::from_secs(days * 24 * 3600))?;
                Ok(Self::Own(Box::new(secrets), SecretFolder::create()?))
            }
        }
    }

    /// Credentials of the launcher for the coordinator at `host:port`.
    pub fn access(&self, address: &str) -> Result<Access, Fault> {
        Access::with(&format!("http://{address}"), Some(self.proof(RunSecrets::launcher)?))
    }

    /// Credentials of the coordinator, on this or another machine.
    pub fn coordinator(&self) -> Result<Proof, Fault> {
        self.proof(RunSecrets::coordinator)
    }

    /// Credentials of the trainer `name`, on this or another machine.
    pub fn trainer(&self, name: &str) -> Result<Proof, Fault> {
        self.proof(|secrets| secrets.trainer(name))
    }

    fn proof(&self, of_own: impl FnOnce(&RunSecrets) -> Result<Material, Fault>) -> Result<Proof, Fault> {
        match self {
            Self::Plain { token, .. } => Ok(Proof::Token(token.text().to_owned())),
            Self::Own(secrets, _) => of_own(secrets).map(Proof::Certificate),
            Self::Given(dir) => Material::load(dir).map(Proof::Certificate),
        }
    }

    /// URL under which trainers reach the coordinator at `host:port`.
    #[must_use]
    pub fn url(&self, address: &str) -> String {
        let scheme = if matches!(self, Self::Plain { .. }) { "http" } else { "https" };
        format!("{scheme}://{address}")
    }

    /// Flags for the coordinator, on this or another machine.
    #[must_use]
    pub fn coordinator_flags(&self) -> &'static [&'static str] {
        if matches!(self, Self::Plain { exposed: true, .. }) { &["--insecure"] } else { &[] }
    }

    /// Writes the credentials of a process on this machine and sets the variable that names them.
    pub fn equip(&self, command: &mut Command, name: &str, proof: &Proof) -> Result<(), Fault> {
        // Do not pass on the launcher's own variables.
        command.env_remove(TLS_DIR).env_remove(TOKEN_FILE);
        let dir = match self {
            Self::Own(_, folder) | Self::Plain { folder, .. } => folder.write(name, proof)?,
            Self::Given(dir) => dir.clone(),
        };
        let (variable, value) = proof.variable(&dir);
        command.env(variable, value);
        Ok(())
    }
}

/// Mode of [`Security`], before its secrets are created.
#[derive(Debug, PartialEq, Eq)]
enum Choice {
    Plain { exposed: bool },
    Own,
    Given(PathBuf),
}

fn decide(tls: Tls, listen: &str, given: Option<PathBuf>) -> Choice {
    let exposed = is_reachable(listen);
    match (tls, given) {
        (Tls::Off, _) => Choice::Plain { exposed },
        (_, Some(dir)) => Choice::Given(dir),
        (Tls::Auto, None) if !exposed => Choice::Plain { exposed },
        (Tls::Auto | Tls::On, None) => Choice::Own,
    }
}

/// Says whether a run would use TLS and why. Creates nothing, but checks the user's folder.
pub fn describe(options: SecurityOptions, listen: &str, given: Option<PathBuf>) -> Result<String, Fault> {
    let choice = decide(options.tls, listen, given);
    let auto = options.tls == Tls::Auto;
    Ok(match choice {
        Choice::Given(dir) => {
            Material::load(&dir)?;
            format!("on, with the folder in {TLS_DIR}: {}", dir.display())
        }
        Choice::Own if auto => format!("on: other machines can reach the coordinator at {listen}"),
        Choice::Own => "on: --tls on".into(),
        Choice::Plain { exposed: true } => {
            format!("off: --tls off, although other machines can reach the coordinator at {listen}")
        }
        Choice::Plain { exposed: false } if auto => {
            format!("off: no other machine reaches the coordinator at {listen}")
        }
        Choice::Plain { exposed: false } => "off: --tls off".into(),
    })
}

/// Whether other machines can reach a coordinator that listens at `listen`. A host name other than `localhost` counts as reachable.
fn is_reachable(listen: &str) -> bool {
    let host = listen.rsplit_once(':').map_or(listen, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host != "localhost" && !host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The user's own folder, from `DYAD_TLS_DIR`.
#[must_use]
pub fn given() -> Option<PathBuf> {
    std::env::var_os(TLS_DIR).filter(|dir| !dir.is_empty()).map(|dir| Path::new(&dir).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const AUTO: SecurityOptions = SecurityOptions { tls: Tls::Auto, tls_valid_days: 30 };

    const HERE: &str = "127.0.0.1:0";
    const OUTSIDE: &str = "0.0.0.0:0";

    #[test]
    fn auto_is_on_when_others_can_reach_the_run() {
        for (tls, listen, choice, words) in [
            (
                Tls::Auto,
                HERE,
                Choice::Plain { exposed: false },
                "off: no other machine reaches the coordinator at 127.0.0.1:0",
            ),
            (Tls::Auto, OUTSIDE, Choice::Own, "on: other machines can reach the coordinator at 0.0.0.0:0"),
            (Tls::On, HERE, Choice::Own, "on: --tls on"),
            (Tls::Off, HERE, Choice::Plain { exposed: false }, "off: --tls off"),
            (
                Tls::Off,
                OUTSIDE,
                Choice::Plain { exposed: true },
                "off: --tls off, although other machines can reach the coordinator at 0.0.0.0:0",
            ),
        ] {
            assert_eq!(decide(tls, listen, None), choice, "{words}");
            assert_eq!(describe(SecurityOptions { tls, ..AUTO }, listen, None).unwrap(), words);
        }
        assert!(matches!(Security::new(AUTO, OUTSIDE, None).unwrap(), Security::Own(..)));
    }

    #[test]
    fn the_users_own_folder_is_checked_and_used() {
        let dir = tempfile::tempdir().unwrap();
        let none = Some(dir.path().join("none"));
        let missing = Security::new(AUTO, HERE, none.clone()).unwrap_err();
        assert!(missing.message.contains("none/join-token"), "{missing}");
        assert_eq!(describe(AUTO, HERE, none).unwrap_err(), missing);
        let folder = dir.path().join("tls");
        RunSecrets::new(Duration::from_secs(60)).unwrap().launcher().unwrap().write(&folder).unwrap();
        assert!(
            describe(AUTO, HERE, Some(folder.clone()))
                .unwrap()
                .starts_with("on, with the folder in DYAD_TLS_DIR: /")
        );
        assert!(matches!(Security::new(AUTO, HERE, Some(folder)).unwrap(), Security::Given(_)));
    }

    #[test]
    fn only_loopback_addresses_are_unreachable_from_outside() {
        for here in ["127.0.0.1:0", "127.9.9.9:5", "[::1]:0", "localhost:29400"] {
            assert!(!is_reachable(here), "{here}");
        }
        for outside in ["0.0.0.0:0", "10.0.0.1:29400", "[::]:0", "node1:29400"] {
            assert!(is_reachable(outside), "{outside}");
        }
    }
}
