//! Certificate authority of one run, the certificates it signs, and the join token.

use std::fmt;
use std::time::{Duration, SystemTime};

use dyad_proto::Fault;
use dyad_proto::security::token::JoinToken;
use dyad_proto::security::{Material, ProcessRole, SERVER_NAME};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};

/// Certificates are valid from this long ago, because clocks of other hosts may be behind.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);

/// Secrets of one run. The authority's key never leaves the memory of this process.
pub struct RunSecrets {
    authority: Issuer<'static, KeyPair>,
    ca_pem: String,
    join_token: JoinToken,
    from: SystemTime,
    until: SystemTime,
}

impl fmt::Debug for RunSecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunSecrets").field("until", &self.until).finish_non_exhaustive()
    }
}

impl RunSecrets {
    /// Creates an authority; its certificates and the join token expire after `valid_for`.
    pub fn new(valid_for: Duration) -> Result<Self, Fault> {
        let now = SystemTime::now();
        let until =
            now.checked_add(valid_for).ok_or_else(|| Fault::input("certificates cannot last that long"))?;
        let from = now - CLOCK_SKEW;
        let mut params = CertificateParams::default();
        (params.not_before, params.not_after) = (from.into(), until.into());
        params.distinguished_name = named("dyad run authority");
        // It may sign certificates of processes, but no further authority.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().map_err(unmade)?;
        let ca_pem = params.self_signed(&key).map_err(unmade)?.pem();
        let join_token = JoinToken::random(until)?;
        Ok(Self { authority: Issuer::new(params, key), ca_pem, join_token, from, until })
    }

    /// Certificate, key and join token of the coordinator.
    pub fn coordinator(&self) -> Result<Material, Fault> {
        self.material("coordinator", SERVER_NAME, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// Certificate, key and join token of the trainer `name`.
    pub fn trainer(&self, name: &str) -> Result<Material, Fault> {
        self.material(name, ProcessRole::Trainer.certificate_name(), ExtendedKeyUsagePurpose::ClientAuth)
    }

    /// Certificate, key and join token of a launcher that follows the run.
    pub fn launcher(&self) -> Result<Material, Fault> {
        self.material(
            "launcher",
            ProcessRole::Launcher.certificate_name(),
            ExtendedKeyUsagePurpose::ClientAuth,
        )
    }

    /// Creates a certificate with the process's name, its role, and the end of a connection that it may be.
    fn material(&self, name: &str, role: &str, end: ExtendedKeyUsagePurpose) -> Result<Material, Fault> {
        let mut params = CertificateParams::new([role.to_owned()]).map_err(unmade)?;
        params.not_before = self.from.into();
        params.not_after = self.until.into();
        params.distinguished_name = named(name);
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![end];
        let key = KeyPair::generate().map_err(unmade)?;
        let certificate = params.signed_by(&key, &self.authority).map_err(unmade)?;
        Ok(Material {
            ca_pem: self.ca_pem.clone(),
            cert_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
            join_token: self.join_token.text().to_owned(),
        })
    }
}

fn named(name: &str) -> DistinguishedName {
    let mut names = DistinguishedName::new();
    names.push(DnType::CommonName, name);
    names
}

fn unmade(error: rcgen::Error) -> Fault {
    Fault::failed(format!("cannot make a certificate: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_share_only_authority_and_token() {
        let secrets = RunSecrets::new(Duration::from_secs(60)).unwrap();
        let (a, b) = (secrets.trainer("node0-cpu").unwrap(), secrets.trainer("node1-cpu").unwrap());
        assert_eq!((&a.ca_pem, &a.join_token), (&b.ca_pem, &b.join_token));
        assert!(a.key_pem != b.key_pem && a.cert_pem != b.cert_pem);
        let other = RunSecrets::new(Duration::from_secs(60)).unwrap().trainer("node0-cpu").unwrap();
        assert!(other.ca_pem != a.ca_pem && other.join_token != a.join_token);
        assert!(!format!("{secrets:?}").contains(&a.join_token));
    }

    #[test]
    fn the_join_token_expires_with_the_certificates() {
        let secrets = RunSecrets::new(Duration::from_secs(3600)).unwrap();
        let token = JoinToken::parse(&secrets.launcher().unwrap().join_token).unwrap();
        let now = SystemTime::now();
        assert!(
            !token.expired(now + Duration::from_secs(3500)) && token.expired(now + Duration::from_secs(3700))
        );
        assert!(RunSecrets::new(Duration::MAX).is_err());
    }
}
