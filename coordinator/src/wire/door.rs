//! TCP and TLS listener: accepts connections and completes their handshakes.
//!
//! - CRD-D1: no connection waits for another: each handshake has a task of its own, which gives up after [`GREETING`].
//! - CRD-D2: admitted connections (with at least one admitted call) and all others ("strangers") have separate limits. A stranger takes
//!   no place from an admitted connection; if there are too many strangers, a new one closes the oldest.
//! - CRD-D3: every refused connection is in the log, with address and reason, or in a count there ([`refusals`](super::refusals)).

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dyad_proto::security::ProcessRole;
use futures::{Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::client::verify_server_name;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::server::ParsedCertificate;
use tokio_stream::wrappers::ReceiverStream;

use super::io::{ByteStream, Connection, Peer, Rewound};
use super::refusals::{CONNECTION, PERIOD, Refusals};

/// How long a peer may take to send the HTTP/2 preface, including its TLS handshake.
pub const GREETING: Duration = Duration::from_secs(10);
/// How long to wait after a failed accept, for example without free sockets.
const PAUSE: Duration = Duration::from_secs(1);
/// How long, and how many bytes, to read from a refused peer: closing at once could discard the answer to it.
const LINGER: (Duration, u64) = (Duration::from_secs(1), 1 << 16);
/// The HTTP/2 preface, which every client sends first.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// HTTP/2 for "this port speaks TLS": empty settings, and a GOAWAY for inadequate security.
const GO_AWAY: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12];
/// TLS for "this port does not speak TLS": the fatal alert `protocol_version`.
const ALERT: &[u8] = &[0x15, 3, 3, 0, 2, 2, 70];

/// An open port.
#[derive(Debug)]
pub struct Door {
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    /// Most admitted connections, and also most strangers.
    most: usize,
    refusals: Refusals,
}

impl Door {
    /// A listener with at most `most` admitted connections, and as many strangers.
    #[must_use]
    pub fn new(listener: TcpListener, tls: Option<Arc<ServerConfig>>, most: usize) -> Self {
        Self { listener, tls, most, refusals: Refusals::default() }
    }

    /// The log of refusals; to be closed when the port is closed.
    #[must_use]
    pub fn refusals(&self) -> Refusals {
        self.refusals.clone()
    }

    /// The connections after their handshakes. Dropping the stream closes the port.
    pub fn open(self) -> impl Stream<Item = std::io::Result<Connection>> + Send + 'static {
        let (deliver, arrived) = mpsc::channel(1);
        tokio::spawn(self.attend(deliver));
        ReceiverStream::new(arrived).map(Ok)
    }

    async fn attend(self, deliver: mpsc::Sender<Connection>) {
        let open = Arc::new(Semaphore::new(self.most));
        let mut strangers = VecDeque::new();
        let mut ticks = tokio::time::interval(PERIOD);
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                _ = ticks.tick() => {
                    self.refusals.sum_up(Instant::now());
                    continue;
                }
                () = deliver.closed() => return,
            };
            match accepted {
                Ok((stream, address)) => {
                    self.make_room(&mut strangers);
                    let (refusals, open) = (self.refusals.clone(), Arc::clone(&open));
                    let guest = TlsGuest { address, refusals, open, deliver: deliver.clone() };
                    let task = tokio::spawn(guest.receive(stream, self.tls.clone()));
                    strangers.push_back((task.abort_handle(), address));
                }
                Err(error) => {
                    // Too many open files, for example. The open connections must stay open.
                    self.refusals.note("cannot accept a connection", None, &error.to_string());
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// Closes the oldest stranger if there are too many.
    fn make_room(&self, strangers: &mut VecDeque<(AbortHandle, SocketAddr)>) {
        strangers.retain(|(task, _)| !task.is_finished());
        if strangers.len() >= self.most
            && let Some((task, address)) = strangers.pop_front()
        {
            task.abort();
            let reason = format!("no call of it was admitted before {} others came", self.most);
            self.refusals.note(CONNECTION, Some(address), &reason);
        }
    }
}

/// A new connection.
struct TlsGuest {
    address: SocketAddr,
    refusals: Refusals,
    /// Places for admitted connections.
    open: Arc<Semaphore>,
    deliver: mpsc::Sender<Connection>,
}

impl TlsGuest {
    /// Runs as long as the connection is a stranger. Aborting this task closes the connection.
    async fn receive(self, stream: TcpStream, tls: Option<Arc<ServerConfig>>) {
        let greeting = tokio::time::timeout(GREETING, greet(stream, tls)).await;
        let greeting =
            greeting.unwrap_or_else(|_| Err(format!("no handshake within {} s", GREETING.as_secs())));
        let (bytes, roles) = match greeting {
            Ok(greeted) => greeted,
            Err(reason) => return self.refusals.note(CONNECTION, Some(self.address), &reason),
        };
        let peer = Peer::new(self.address, roles, self.refusals, self.open);
        let (_host, makes_way) = oneshot::channel();
        let standing = Arc::clone(&peer.standing);
        // Fails only if the run has ended; the connection is then dropped, which settles it.
        let _ = self.deliver.send(Connection::new(bytes, peer, makes_way)).await;
        standing.settled.notified().await;
    }
}

type Greeted = (Box<dyn ByteStream>, Option<Vec<ProcessRole>>);

/// Reads until the peer has sent the HTTP/2 preface; the error says what it sent instead.
async fn greet(mut stream: TcpStream, tls: Option<Arc<ServerConfig>>) -> Result<Greeted, String> {
    let _ = stream.set_nodelay(true);
    let mut head = [0; 3];
    stream.read_exact(&mut head).await.map_err(|error| format!("it said nothing: {error}"))?;
    let (wrong, answer): (_, &[u8]) = match (&head, &tls) {
        ([0x16, 3, _], Some(config)) => return shake_hands(stream, head, config).await,
        (b"PRI", None) => {
            let head = preface(&mut stream, &head).await?;
            return Ok((Box::new(Rewound::new(head, stream)), None));
        }
        (b"PRI", Some(_)) => ("it speaks plain text, and this port TLS", GO_AWAY),
        ([0x16, 3, _], None) => ("it speaks TLS, and this port plain text", ALERT),
        _ => ("it speaks neither TLS nor HTTP/2", &[]),
    };
    let _ = stream.write_all(answer).await;
    linger(stream).await;
    Err(wrong.into())
}

async fn shake_hands(
    stream: TcpStream,
    head: [u8; 3],
    config: &Arc<ServerConfig>,
) -> Result<Greeted, String> {
    let stream = Rewound::new(head.to_vec(), stream);
    let accept = TlsAcceptor::from(Arc::clone(config)).accept(stream).into_fallible();
    let mut stream = match accept.await {
        Ok(stream) => stream,
        Err((error, stream)) => {
            linger(stream).await;
            return Err(plainly(error.to_string()));
        }
    };
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let roles = certificates.first().map(roles).unwrap_or_default();
    let head = preface(&mut stream, &[]).await?;
    Ok((Box::new(Rewound::new(head, stream)), Some(roles)))
}

/// Makes a TLS error readable. A certificate of another run's authority, which has the same name and another key, gets its own message.
fn plainly(error: String) -> String {
    match ["UnknownIssuer", "BadSignature"].iter().any(|mark| error.contains(mark)) {
        true => format!("its certificate is of another authority ({error})"),
        false => error,
    }
}

/// The roles that a verified certificate names.
fn roles(certificate: &CertificateDer<'static>) -> Vec<ProcessRole> {
    let Ok(parsed) = ParsedCertificate::try_from(certificate) else { return Vec::new() };
    let is = |role: &ProcessRole| {
        ServerName::try_from(role.certificate_name())
            .is_ok_and(|name| verify_server_name(&parsed, &name).is_ok())
    };
    ProcessRole::ALL.into_iter().filter(is).collect()
}

/// Reads the rest of the HTTP/2 preface after `head`, and returns all of it.
async fn preface(stream: &mut (impl AsyncRead + Unpin), head: &[u8]) -> Result<Vec<u8>, String> {
    let mut said = head.to_vec();
    said.resize(PREFACE.len(), 0);
    stream
        .read_exact(&mut said[head.len()..])
        .await
        .map_err(|error| format!("it broke off before it spoke HTTP/2: {error}"))?;
    if said == PREFACE { Ok(said) } else { Err("it does not speak HTTP/2".into()) }
}

/// Lets the peer read the answer before the connection closes: unread bytes at the close would make the kernel reset the connection.
async fn linger(mut stream: impl AsyncRead + tokio::io::AsyncWrite + Unpin) {
    let (time, bytes) = LINGER;
    let _ = stream.shutdown().await;
    let _ =
        tokio::time::timeout(time, tokio::io::copy(&mut stream.take(bytes), &mut tokio::io::sink())).await;
}
