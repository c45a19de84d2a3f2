//! Binds TCP ports.

use std::io;

use dyad_proto::{ErrorCode, Fault};
use tokio::net::TcpListener;

/// Binds the address that the option `flag` gives.
pub async fn bind(address: &str, flag: &str) -> Result<TcpListener, Fault> {
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => {
            Fault::unavailable(format!("cannot listen on {address}: address already in use")).hint(format!(
                "another process holds that port; give {flag} another one, or port 0 for any that is free"
            ))
        }
        kind => {
            let code = match kind {
                io::ErrorKind::InvalidInput => ErrorCode::InvalidInput,
                _ => ErrorCode::Unavailable,
            };
            Fault::new(code, format!("cannot listen on {address}: {error}"))
                .hint(format!("{flag} takes an address of this machine and a port, such as 127.0.0.1:0"))
        }
    })
}
