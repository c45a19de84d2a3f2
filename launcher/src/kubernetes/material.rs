//! Certificates and join token of a run: one authority, one certificate per role.

use std::time::Duration;

use dyad_proto::Fault;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// The name by which every client knows the coordinator, wherever it runs.
const SERVER_NAME: &str = "coordinator.dyad";

/// Contents of the four files of one process.
#[derive(Clone)]
pub struct Material {
    /// Certificate of the run's authority.
    pub ca_pem: String,
    /// The process's own certificate.
    pub cert_pem: String,
    /// Its private key.
    pub key_pem: String,
    /// What it shows to be let in.
    pub join_token: String,
}

impl std::fmt::Debug for Material {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Material").finish_non_exhaustive()
    }
}

/// The run's authority.
pub struct RunSecrets {
    issuer: Issuer<'static, KeyPair>,
    ca_pem: String,
    join_token: String,
    valid_for: Duration,
}

impl std::fmt::Debug for RunSecrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunSecrets").field("valid_for", &self.valid_for).finish_non_exhaustive()
    }
}

impl RunSecrets {
    /// A new authority and token.
    pub fn new(valid_for: Duration) -> Result<Self, Fault> {
        let mut params = params("dyad run CA", valid_for);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().map_err(unmade)?;
        let ca_pem = params.self_signed(&key).map_err(unmade)?.pem();
        // A fresh key's bytes are as good a secret as any: 256 bits from the system's source.
        let token = KeyPair::generate().map_err(unmade)?.serialize_der();
        let join_token = token.iter().rev().take(32).map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { issuer: Issuer::new(params, key), ca_pem, join_token, valid_for })
    }

    /// For the coordinator.
    pub fn coordinator(&self) -> Result<Material, Fault> {
        self.leaf(SERVER_NAME, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// For trainers.
    pub fn trainer(&self, name: &str) -> Result<Material, Fault> {
        self.leaf(name, ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn leaf(&self, name: &str, purpose: ExtendedKeyUsagePurpose) -> Result<Material, Fault> {
        let mut params = params(name, self.valid_for);
        params.subject_alt_names =
            vec![rcgen::SanType::DnsName(name.try_into().map_err(|_| Fault::failed("no such DNS name"))?)];
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().map_err(unmade)?;
        let cert_pem = params.signed_by(&key, &self.issuer).map_err(unmade)?.pem();
        Ok(Material {
            ca_pem: self.ca_pem.clone(),
            cert_pem,
            key_pem: key.serialize_pem(),
            join_token: self.join_token.clone(),
        })
    }
}

fn params(name: &str, valid_for: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    let now = std::time::SystemTime::now();
    // Clocks of hosts differ.
    params.not_before = (now - Duration::from_secs(300)).into();
    params.not_after = (now + valid_for).into();
    params
}

fn unmade(error: rcgen::Error) -> Fault {
    Fault::failed(format!("cannot make the run's certificates: {error}"))
}
