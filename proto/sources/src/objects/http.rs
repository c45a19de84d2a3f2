//! Sends the requests of the object stores' client with ureq, the HTTP client of the hub too. One request at a time: the calls block.

use std::time::Duration;

use async_trait::async_trait;
use object_store::client::{
    ClientConfigKey, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService,
};
use object_store::{ClientOptions, Error};
use ureq::Agent;

/// Timeout for the connection, the answer, and each read of a body.
const PATIENCE: Duration = Duration::from_secs(15);
/// Longest answer in bytes: a listing, or one piece of an object.
const ANSWER: u64 = 64 << 20;

/// Makes clients that use ureq.
#[derive(Debug)]
pub(super) struct UreqConnector;

impl HttpConnector for UreqConnector {
    fn connect(&self, options: &ClientOptions) -> Result<HttpClient, Error> {
        let plain = options.get_config_value(&ClientConfigKey::AllowHttp);
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .https_only(plain.as_deref() != Some("true"))
            .timeout_resolve(Some(PATIENCE))
            .timeout_connect(Some(PATIENCE))
            .timeout_recv_response(Some(PATIENCE))
            .timeout_per_read(Some(PATIENCE))
            .accept_encoding("identity")
            .user_agent(concat!("dyad/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(HttpClient::new(UreqService(config.into())))
    }
}

#[derive(Debug)]
struct UreqService(Agent);

#[async_trait]
impl HttpService for UreqService {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        // Only uploads have bodies in several parts.
        let body = body.as_bytes().map(|bytes| bytes.to_vec()).unwrap_or_default();
        let answer = match body.is_empty() {
            true => self.0.run(ureq::http::Request::from_parts(parts, ())),
            false => self.0.run(ureq::http::Request::from_parts(parts, body)),
        };
        let (parts, mut body) = answer.map_err(error)?.into_parts();
        let bytes = body.with_config().limit(ANSWER).read_to_vec().map_err(error)?;
        Ok(HttpResponse::from_parts(parts, HttpResponseBody::from(bytes)))
    }
}

fn error(error: ureq::Error) -> HttpError {
    let kind = match &error {
        ureq::Error::Timeout(_) => HttpErrorKind::Timeout,
        ureq::Error::HostNotFound | ureq::Error::ConnectionFailed => HttpErrorKind::Connect,
        ureq::Error::Io(_) => HttpErrorKind::Interrupted,
        _ => HttpErrorKind::Unknown,
    };
    HttpError::new(kind, error)
}
