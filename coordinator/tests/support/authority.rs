//! Certificate authorities, and valid and invalid certificates.

use std::time::{Duration, SystemTime};

use dyad_proto::security::Material;
use dyad_proto::security::token::JoinToken;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

const HOUR: Duration = Duration::from_secs(3600);

/// A certificate authority with a join token.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    ca_pem: String,
    pub token: JoinToken,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let ca_pem = params.self_signed(&key).unwrap().pem();
        let token = JoinToken::new(rand_bytes(), SystemTime::now() + HOUR);
        Self { issuer: Issuer::new(params, key), ca_pem, token }
    }

    /// Valid material for a process with the role `name`, such as `trainer.dyad`.
    pub fn material(&self, name: &str) -> Material {
        let now = SystemTime::now();
        self.signed(name, now - HOUR, now + HOUR)
    }

    /// The same with an expired certificate.
    pub fn expired(&self, name: &str) -> Material {
        let now = SystemTime::now();
        self.signed(name, now - 2 * HOUR, now - HOUR)
    }

    fn signed(&self, name: &str, from: SystemTime, until: SystemTime) -> Material {
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        (params.not_before, params.not_after) = (from.into(), until.into());
        params.extended_key_usages = match name {
            dyad_proto::security::SERVER_NAME => vec![ExtendedKeyUsagePurpose::ServerAuth],
            _ => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        let key = KeyPair::generate().unwrap();
        Material {
            ca_pem: self.ca_pem.clone(),
            cert_pem: params.signed_by(&key, &self.issuer).unwrap().pem(),
            key_pem: key.serialize_pem(),
            join_token: self.token.text().to_owned(),
        }
    }
}

/// Random bytes.
fn rand_bytes() -> [u8; 32] {
    let key = KeyPair::generate().unwrap();
    key.public_key_raw()[..32].try_into().unwrap()
}
