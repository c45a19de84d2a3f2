//! Access to the coordinator's port: the listener ([`door`]), access control for calls ([`admission`]), and the log of refusals
//! ([`refusals`]).

pub mod admission;
pub mod door;
pub mod io;
pub mod listen;
pub mod refusals;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use dyad_proto::Fault;
use dyad_proto::security::by_hand::{self, Published};
use dyad_proto::security::token::JoinToken;
use dyad_proto::security::{Material, Proof, TLS_DIR};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig, version};

use admission::Admission;

/// The access rules of the port.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    /// Mutual TLS; plain text if `None`.
    pub tls: Option<Arc<ServerConfig>>,
    /// Who may call what.
    pub admission: Admission,
}

impl Guard {
    /// Loads the folder with the coordinator's certificate, or the file with the join token.
    pub fn load(tls_dir: Option<&Path>, token_file: Option<&Path>) -> Result<Self, Fault> {
        let Some(proof) = Proof::load(tls_dir, token_file)? else { return Ok(Self::default()) };
        let place = tls_dir.or(token_file).unwrap_or(Path::new("")).display();
        let unusable = |what: &str| {
            Fault::input(format!("the certificates in {place} cannot be used: {what}"))
                .hint("ca.pem, cert.pem and key.pem are PEM files; key.pem belongs to cert.pem")
        };
        let token = JoinToken::parse(proof.token()).map_err(unusable)?;
        let tls = match proof {
            Proof::Certificate(material) => Some(server_config(&material).map_err(|what| unusable(&what))?),
            Proof::Token(_) => None,
        };
        let admission = Admission::new(Some(token), tls.is_some());
        Ok(Self { tls: tls.map(Arc::new), admission })
    }

    /// Fails for plain text on an address that other machines reach, unless `insecure` is set.
    pub fn allows(&self, address: SocketAddr, insecure: bool) -> Result<(), Fault> {
        if self.tls.is_some() || address.ip().is_loopback() {
            return Ok(());
        }
        if insecure {
            match self.admission.asks() {
                true => tracing::warn!(%address, "anybody on the way can read the run and the join token"),
                false => tracing::warn!(%address, "anybody who reaches this port can read and join the run"),
            }
            return Ok(());
        }
        Err(Fault::input(format!("refusing to listen on {address} without TLS"))
            .hint(format!("set {TLS_DIR} (docs/security.md), or accept plain text with --insecure")))
    }

    /// On a loopback address without a token: makes a token, because other users of this machine must not join, and publishes it where
    /// trainers of this user find it by the port.
    pub fn complete(&mut self, address: SocketAddr) -> Result<Option<Published>, Fault> {
        if self.admission.asks() || !address.ip().is_loopback() {
            return Ok(None);
        }
        let token = JoinToken::lasting()?;
        let published = by_hand::publish(address.port(), &token)?;
        self.admission = Admission::new(Some(token), false);
        Ok(Some(published))
    }
}

/// TLS 1.3 with certificates on both sides, signed by the run's authority.
fn server_config(material: &Material) -> Result<ServerConfig, String> {
    let certificates = |pem: &str, file: &str| -> Result<Vec<CertificateDer<'static>>, String> {
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
        match found {
            Ok(found) if !found.is_empty() => Ok(found),
            Ok(_) => Err(format!("{file} holds no certificate")),
            Err(error) => Err(format!("{file}: {error}")),
        }
    };
    let provider = Arc::new(ring::default_provider());
    let mut roots = RootCertStore::empty();
    for root in certificates(&material.ca_pem, "ca.pem")? {
        roots.add(root).map_err(|error| format!("ca.pem: {error}"))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|error| format!("ca.pem: {error}"))?;
    let own = certificates(&material.cert_pem, "cert.pem")?;
    let key = PrivateKeyDer::from_pem_slice(material.key_pem.as_bytes())
        .map_err(|error| format!("key.pem: {error}"))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])
        .map_err(|error| error.to_string())?
        .with_client_cert_verifier(verifier)
        .with_single_cert(own, key)
        .map_err(|error| format!("cert.pem and key.pem: {error}"))?;
    config.alpn_protocols.push(b"h2".to_vec());
    // No resumption: every connection must show its certificate.
    config.send_tls13_tickets = 0;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_needs_loopback_or_insecure() {
        let guard = Guard::default();
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert!(guard.allows(address("127.0.0.1:1"), false).is_ok());
        assert!(guard.allows(address("[::1]:1"), false).is_ok());
        for outside in ["0.0.0.0:1", "10.0.0.1:1", "[::]:1"] {
            let fault = guard.allows(address(outside), false).unwrap_err();
            assert!(fault.message.contains(outside) && fault.hint.contains("--insecure"), "{fault}");
            assert!(guard.allows(address(outside), true).is_ok());
        }
    }
}
