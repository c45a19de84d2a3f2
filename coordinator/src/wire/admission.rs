//! Access control for calls: the certificate's role, and the join token.

use std::time::SystemTime;

use dyad_proto::security::ProcessRole;
use dyad_proto::security::token::JoinToken;
use subtle::ConstantTimeEq;
use tonic::metadata::MetadataMap;
use tonic::{Request, Status};

use super::io::Peer;

/// Admits or refuses calls.
#[derive(Clone, Debug, Default)]
pub struct Admission {
    /// The token that callers must send; `None` for an open port (`--insecure`).
    token: Option<JoinToken>,
    /// Whether callers need a certificate for the call's role.
    certified: bool,
}

impl Admission {
    /// A admission that checks the token, if there is one.
    #[must_use]
    pub fn new(token: Option<JoinToken>, certified: bool) -> Self {
        Self { token, certified }
    }

    /// Whether callers need a token.
    #[must_use]
    pub fn asks(&self) -> bool {
        self.token.is_some()
    }

    /// Checks a call that only `role` may make. A refusal is logged before this returns.
    pub fn admit<T>(&self, request: &Request<T>, role: ProcessRole) -> Result<(), Status> {
        let peer = request.extensions().get::<Peer>();
        let roles = peer.and_then(|peer| peer.roles.as_deref());
        let checked = check_role(roles, role, self.certified)
            .and_then(|()| self.check_token(request.metadata(), SystemTime::now()));
        let Some(peer) = peer else { return checked };
        let admitted = checked.and_then(|()| match peer.admit() {
            true => Ok(()),
            false => Err(Status::resource_exhausted("too many connections are open")),
        });
        if let Err(status) = &admitted {
            peer.refuse(status.message());
        }
        admitted
    }

    fn check_token(&self, metadata: &MetadataMap, now: SystemTime) -> Result<(), Status> {
        let Some(token) = &self.token else { return Ok(()) };
        let value = metadata.get("authorization").and_then(|value| value.to_str().ok());
        let Some(shown) = value.and_then(|value| value.strip_prefix("Bearer ")) else {
            return Err(Status::unauthenticated("no join token"));
        };
        if !bool::from(shown.as_bytes().ct_eq(token.text().as_bytes())) {
            return Err(Status::unauthenticated("the join token is not this run's"));
        }
        if token.expired(now) {
            return Err(Status::unauthenticated("the join token has expired"));
        }
        Ok(())
    }
}

fn check_role(roles: Option<&[ProcessRole]>, needed: ProcessRole, secured: bool) -> Result<(), Status> {
    match roles {
        Some(roles) if roles.contains(&needed) => Ok(()),
        None if !secured => Ok(()),
        _ => {
            let name = needed.certificate_name();
            Err(Status::permission_denied(format!("this call needs a certificate for {name}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tonic::Code;

    use super::*;

    #[test]
    fn only_the_runs_own_unexpired_token_is_accepted() {
        let now = SystemTime::now();
        let token = JoinToken::new([5; 32], now + Duration::from_secs(60));
        let admission = Admission::new(Some(token.clone()), true);
        let check = |value: Option<&str>, now| {
            let mut metadata = MetadataMap::new();
            if let Some(value) = value {
                metadata.insert("authorization", value.parse().unwrap());
            }
            admission.check_token(&metadata, now).map_err(|status| status.message().to_owned())
        };
        let right = format!("Bearer {}", token.text());
        assert_eq!(check(Some(&right), now), Ok(()));
        let later = now + Duration::from_secs(61);
        assert_eq!(check(Some(&right), later), Err("the join token has expired".into()));
        let extended = format!("Bearer {}", JoinToken::new([5; 32], later + Duration::from_secs(60)).text());
        for wrong in [&right[..right.len() - 1], &extended, "Bearer ", "Bearer x"] {
            assert_eq!(check(Some(wrong), now), Err("the join token is not this run's".into()), "{wrong}");
        }
        for none in [None, Some(token.text()), Some("Basic x")] {
            assert_eq!(check(none, now), Err("no join token".into()));
        }
    }

    #[test]
    fn roles_are_not_interchangeable() {
        let code = |roles: Option<&[ProcessRole]>, secured| {
            check_role(roles, ProcessRole::Trainer, secured).map_err(|status| status.code())
        };
        assert_eq!(code(Some(&[ProcessRole::Trainer]), true), Ok(()));
        assert_eq!(code(Some(&ProcessRole::ALL), true), Ok(()));
        assert_eq!(code(Some(&[ProcessRole::Launcher]), true), Err(Code::PermissionDenied));
        assert_eq!(code(Some(&[]), true), Err(Code::PermissionDenied));
        assert_eq!(code(None, true), Err(Code::PermissionDenied));
        assert_eq!(code(None, false), Ok(()));
    }
}
