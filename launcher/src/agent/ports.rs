//! Reachability test: one machine opens a port, the others try to connect to it.

use std::io;
use std::time::{Duration, Instant};

use dyad_proto::Fault;
use tokio::net::{TcpListener, TcpStream};

/// Time limit of a connection attempt.
const REACH: Duration = Duration::from_secs(5);

/// How long to retry after "no route to host": the kernel returns it for a moment after a link comes up.
const SETTLES: Duration = Duration::from_secs(3);
/// Time between two retries.
const PAUSE: Duration = Duration::from_millis(500);

/// Opens a port on all addresses of this host; returns listener and port.
pub async fn open() -> Result<(TcpListener, u16), Fault> {
    let failed = |error: std::io::Error| {
        Fault::unavailable(format!("cannot open a port: {error}"))
            .hint("does this host allow programs to listen?")
    };
    // One socket for IPv6 and IPv4; only IPv4 if the kernel has no IPv6.
    let listener = match TcpListener::bind("[::]:0").await {
        Ok(listener) => listener,
        Err(_) => TcpListener::bind("0.0.0.0:0").await.map_err(failed)?,
    };
    let port = listener.local_addr().map_err(failed)?.port();
    Ok((listener, port))
}

/// Connects to each `host:port`. Returns the error for each, `None` if it answers.
pub async fn reach(addresses: &[String]) -> Vec<Option<String>> {
    let tries = addresses.iter().map(|address| async move {
        match tokio::time::timeout(REACH, connect(address)).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("no answer within {} s", REACH.as_secs())),
        }
    });
    futures::future::join_all(tries).await
}

async fn connect(address: &str) -> io::Result<()> {
    let began = Instant::now();
    loop {
        match TcpStream::connect(address).await {
            Err(error) if error.kind() == io::ErrorKind::HostUnreachable && began.elapsed() < SETTLES => {
                tokio::time::sleep(PAUSE).await;
            }
            other => return other.map(drop),
        }
    }
}
