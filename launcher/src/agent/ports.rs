//! Which addresses lead from one machine to another: ports that are opened and knocked at to find out.

use std::io;
use std::time::{Duration, Instant};

use dyad_proto::Fault;
use tokio::net::{TcpListener, TcpStream};

/// How long an address may take to answer.
const REACH: Duration = Duration::from_secs(5);

/// How long "no route to host" is tried again: a link that has just come up answers so until its neighbours have been asked anew.
const SETTLES: Duration = Duration::from_secs(3);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(500);

/// A port on every address of this host.
pub async fn open() -> Result<(TcpListener, u16), Fault> {
    let failed = |error: std::io::Error| {
        Fault::unavailable(format!("cannot open a port: {error}"))
            .hint("does this host allow programs to listen?")
    };
    // A socket for both families, unless the kernel has no IPv6.
    let listener = match TcpListener::bind("[::]:0").await {
        Ok(listener) => listener,
        Err(_) => TcpListener::bind("0.0.0.0:0").await.map_err(failed)?,
    };
    let port = listener.local_addr().map_err(failed)?.port();
    Ok((listener, port))
}

/// What stands between here and each address; nothing where it answers.
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
