//! Client side of connections to the coordinator: plain text or mutual TLS, with the join token in every call.

use std::error::Error;
use std::path::Path;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status};

use super::{Proof, SERVER_NAME, TLS_DIR, TOKEN_FILE, by_hand};
use crate::Fault;

/// Address of the coordinator, and the credentials for it.
#[derive(Clone, Debug)]
pub struct Access {
    address: String,
    /// If `None`, uses the token of a coordinator that the same user started by hand on this machine, if there is one.
    proof: Option<Proof>,
}

impl Access {
    /// Access to `http(s)://host:port`. With `tls_dir` the connection uses TLS, even if the address begins with `http://`.
    pub fn new(address: &str, tls_dir: Option<&Path>, token_file: Option<&Path>) -> Result<Self, Fault> {
        Self::with(address, Proof::load(tls_dir, token_file)?)
    }

    /// Like [`Access::new`], with credentials from memory.
    pub fn with(address: &str, proof: Option<Proof>) -> Result<Self, Fault> {
        let address = match (address.split_once("://"), &proof) {
            (Some(("http" | "https", rest)), Some(Proof::Certificate(_))) => format!("https://{rest}"),
            (Some(("https", _)), _) => {
                return Err(Fault::input(format!(
                    "{address} asks for TLS, but there is no certificate to show"
                ))
                .hint(format!(
                    "{TLS_DIR} names the folder that the run's launcher made (docs/security.md)"
                )));
            }
            (Some(("http", _)), _) => address.to_owned(),
            _ => return Err(Fault::input(format!("--coordinator {address}: expected http://host:port"))),
        };
        Ok(Self { address, proof })
    }

    /// Address of the coordinator.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The endpoint to connect to, with TLS settings.
    pub fn endpoint(&self) -> Result<Endpoint, Fault> {
        let endpoint = Endpoint::from_shared(self.address.clone()).map_err(|_| {
            Fault::input(format!("--coordinator {}: expected http://host:port", self.address))
        })?;
        let Some(Proof::Certificate(material)) = &self.proof else { return Ok(endpoint) };
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&material.ca_pem))
            .identity(Identity::from_pem(&material.cert_pem, &material.key_pem))
            .domain_name(SERVER_NAME);
        endpoint.tls_config(tls).map_err(|error| {
            Fault::input(format!("the certificates in {TLS_DIR} cannot be used: {}", root_cause(&error)))
                .hint("ca.pem, cert.pem and key.pem are PEM files; key.pem belongs to cert.pem")
        })
    }

    /// Makes a request with the join token in its metadata.
    pub fn request<T>(&self, message: T) -> Result<Request<T>, Fault> {
        let mut request = Request::new(message);
        let by_hand = || by_hand::find(&self.address);
        if let Some(token) = self.proof.as_ref().map(|proof| proof.token().to_owned()).or_else(by_hand) {
            let mut value: MetadataValue<Ascii> = format!("Bearer {token}")
                .parse()
                .map_err(|_| Fault::input("the join token holds characters that no join token has"))?;
            value.set_sensitive(true);
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }

    /// Returns an error if the coordinator refuses this process, so that retries cannot help; `None` if it is only unreachable (yet).
    #[must_use]
    pub fn refusal(&self, error: &(dyn Error + 'static)) -> Option<Fault> {
        // Check the connection's error first: tonic converts some connection failures to statuses.
        let why = chain(error);
        if let Some((_, what, hint)) = REASONS.iter().find(|(mark, ..)| why.contains(mark)) {
            return Some(self.refused(what).hint(*hint));
        }
        let status = error.downcast_ref::<Status>()?;
        matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied).then(|| {
            let variable = if self.address.starts_with("https") { TLS_DIR } else { TOKEN_FILE };
            self.refused(status.message()).hint(format!(
                "a process needs the {variable} that this run's launcher made for it (docs/security.md)"
            ))
        })
    }

    fn refused(&self, what: &str) -> Fault {
        Fault::input(format!("cannot join the coordinator at {}: {what}", self.address))
    }
}

const OTHER_RUN: &str =
    "use the DYAD_TLS_DIR that this run's launcher made: every run has an authority of its own";
const NEW_CERTIFICATES: &str =
    "check this host's clock; certificates last as long as the launcher's --tls-valid-days says";

const PLAIN: &str = "unset DYAD_TLS_DIR here, or set it for the coordinator (the launcher's --tls on)";

/// Part of a rustls error text, its meaning, and a hint. (A refusal by the peer arrives as an alert.)
const REASONS: [(&str, &str, &str); 14] = [
    ("alert: CertificateRequired", "it wants a certificate, and this process shows none", OTHER_RUN),
    ("alert: CertificateExpired", "this process's certificate has expired", NEW_CERTIFICATES),
    ("alert: UnknownCA", "this process's certificate is of another authority", OTHER_RUN),
    ("alert: DecryptError", "this process's certificate is of another authority", OTHER_RUN),
    ("alert: UnsupportedCertificate", "it refuses this process's certificate", OTHER_RUN),
    ("alert: BadCertificate", "it refuses this process's certificate", OTHER_RUN),
    ("peer certificate: Expired", "the coordinator's certificate has expired", NEW_CERTIFICATES),
    ("certificate expired", "the coordinator's certificate has expired", NEW_CERTIFICATES),
    ("peer certificate: UnknownIssuer", "the coordinator's certificate is of another authority", OTHER_RUN),
    // The authorities of all runs have the same name but different keys.
    ("peer certificate: BadSignature", "the coordinator's certificate is of another authority", OTHER_RUN),
    ("peer certificate", "the coordinator's certificate is not one of a coordinator", OTHER_RUN),
    ("alert: ProtocolVersion", "it does not speak TLS", PLAIN),
    ("InvalidContentType", "it does not speak TLS", PLAIN),
    ("minimum requirements", "it asks for TLS", OTHER_RUN),
];

/// Message of the innermost cause.
#[must_use]
pub fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::security::Material;
    use crate::security::token::JoinToken;

    fn token() -> String {
        JoinToken::new([1; 32], SystemTime::now()).text().to_owned()
    }

    fn certificate() -> Proof {
        Proof::Certificate(Material {
            ca_pem: String::new(),
            cert_pem: String::new(),
            key_pem: String::new(),
            join_token: token(),
        })
    }

    #[test]
    fn scheme_follows_the_proof() {
        let address = |text: &str, proof| Access::with(text, proof).map(|access| access.address);
        assert_eq!(address("http://h:1", None).unwrap(), "http://h:1");
        assert_eq!(address("http://h:1", Some(Proof::Token(token()))).unwrap(), "http://h:1");
        assert!(address("https://h:1", Some(Proof::Token(token()))).is_err());
        assert_eq!(address("http://h:1", Some(certificate())).unwrap(), "https://h:1");
        assert_eq!(address("https://h:1", Some(certificate())).unwrap(), "https://h:1");
        let fault = address("https://h:1", None).unwrap_err();
        assert!(fault.message.contains("no certificate") && fault.hint.contains(TLS_DIR), "{fault}");
        assert!(address("h:1", None).unwrap_err().message.contains("expected http://host:port"));
    }

    #[test]
    fn token_travels_as_a_sensitive_header() {
        for proof in [certificate(), Proof::Token(token())] {
            let request = Access::with("http://h:1", Some(proof)).unwrap().request(()).unwrap();
            let value = request.metadata().get("authorization").unwrap();
            assert!(value.is_sensitive() && value.to_str().unwrap().starts_with("Bearer 0101"));
        }
        let request = Access::with("http://h:1", None).unwrap().request(()).unwrap();
        assert!(request.metadata().get("authorization").is_none());
    }

    #[test]
    fn invalid_certificates_are_refused() {
        let fault = Access::with("http://h:1", Some(certificate())).unwrap().endpoint().unwrap_err();
        assert!(fault.message.contains("cannot be used"), "{fault}");
    }
}
