//! The server side of a connection, and its admission.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use dyad_proto::security::ProcessRole;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Sleep;
use tonic::transport::server::Connected;

use super::refusals::{CONNECTION, Refusals};

/// How long a connection may stay open without an admitted call.
pub const IDLE: Duration = Duration::from_secs(10);

/// A stream that first returns bytes that were read before.
#[derive(Debug)]
pub struct Rewound<S> {
    head: Vec<u8>,
    inner: S,
}

impl<S> Rewound<S> {
    /// Reads return `head` first, then the bytes of `inner`.
    pub fn new(head: Vec<u8>, inner: S) -> Self {
        Self { head, inner }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Rewound<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.head.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let count = self.head.len().min(buf.remaining());
        buf.put_slice(&self.head[..count]);
        self.head.drain(..count);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rewound<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

/// State of a connection: no call could be read so far.
const NO_CALL: u8 = 0;
/// A call was refused.
const REFUSED: u8 = 1;
/// A health check was answered.
const ASKED: u8 = 2;
/// A call was admitted; never changes again.
const ADMITTED: u8 = 3;

/// State of a connection, shared by its calls and by the listener's task.
#[derive(Debug)]
pub struct PeerState {
    reached: AtomicU8,
    /// Places for admitted connections.
    places: Arc<Semaphore>,
    /// Its own place, once it is admitted.
    place: Mutex<Option<OwnedSemaphorePermit>>,
    /// Notified when the connection is admitted or closed.
    pub settled: Notify,
}

/// The peer of a connection; every call of the connection carries it.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// The roles in its certificate; `None` in plain text.
    pub roles: Option<Vec<ProcessRole>>,
    /// State of the connection.
    pub standing: Arc<PeerState>,
    refusals: Refusals,
}

impl Peer {
    /// A peer that has made no call yet.
    #[must_use]
    pub fn new(
        address: SocketAddr,
        roles: Option<Vec<ProcessRole>>,
        refusals: Refusals,
        places: Arc<Semaphore>,
    ) -> Self {
        let (place, settled) = (Mutex::new(None), Notify::new());
        let standing = PeerState { reached: AtomicU8::new(NO_CALL), places, place, settled };
        Self { address, roles, standing: Arc::new(standing), refusals }
    }

    /// Admits the connection because one of its calls is admitted. Returns false if there is no place for it.
    #[must_use]
    pub fn admit(&self) -> bool {
        let mut place = self.standing.place.lock().unwrap_or_else(PoisonError::into_inner);
        if place.is_none() {
            *place = Arc::clone(&self.standing.places).try_acquire_owned().ok();
        }
        if place.is_none() {
            return false;
        }
        self.standing.reached.store(ADMITTED, Ordering::Relaxed);
        self.standing.settled.notify_one();
        true
    }

    /// Records a health check, which any client may make. It admits the connection only if the peer has a certificate.
    pub fn asked(&self) {
        let stays = self.roles.is_some() && self.admit();
        if !stays {
            self.advance(ASKED);
        }
    }

    /// Logs the refusal of one of its calls.
    pub fn refuse(&self, reason: &str) {
        self.note("call refused", reason);
        // An admitted connection stays admitted: it may carry a trainer's stream.
        self.advance(REFUSED);
    }

    /// Logs that something from this peer was refused, or counts it.
    pub fn note(&self, what: &'static str, reason: &str) {
        self.refusals.note(what, Some(self.address), reason);
    }

    fn advance(&self, to: u8) {
        let reached = &self.standing.reached;
        let _ = reached.compare_exchange(NO_CALL, to, Ordering::Relaxed, Ordering::Relaxed);
    }

    fn admitted(&self) -> bool {
        self.standing.reached.load(Ordering::Relaxed) == ADMITTED
    }
}

/// A stream of bytes: TCP, or TLS over TCP.
pub trait ByteStream: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin> ByteStream for S {}

/// An open connection. It closes if no call is admitted within [`IDLE`], or earlier if the listener needs its place.
#[derive(Debug)]
pub struct Connection {
    bytes: Box<dyn ByteStream>,
    peer: Peer,
    deadline: Pin<Box<Sleep>>,
    /// Resolves when the listener's task is aborted to close this connection.
    host: oneshot::Receiver<Infallible>,
    over: bool,
}

impl Connection {
    /// The connection of a peer after its handshake.
    #[must_use]
    pub fn new(bytes: Box<dyn ByteStream>, peer: Peer, host: oneshot::Receiver<Infallible>) -> Self {
        Self { bytes, peer, deadline: Box::pin(tokio::time::sleep(IDLE)), host, over: false }
    }

    /// Whether it must close: no call was admitted, and its time is up or its place is needed.
    fn is_over(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.over && !self.peer.admitted() {
            let late = self.deadline.as_mut().poll(cx).is_ready();
            self.over = late || Pin::new(&mut self.host).poll(cx).is_ready();
        }
        self.over
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let standing = &self.peer.standing;
        if standing.reached.load(Ordering::Relaxed) == NO_CALL {
            self.peer.note(CONNECTION, "it ended without a call that could be read");
        }
        // Calls in progress still hold the standing; the place becomes free now.
        standing.place.lock().unwrap_or_else(PoisonError::into_inner).take();
        standing.settled.notify_one();
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_over(cx) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.bytes).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.bytes).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.bytes).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.bytes).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.bytes).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.bytes.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn rewound_returns_its_head_before_the_rest() {
        let mut stream = Rewound::new(b"abcde".to_vec(), &b"fgh"[..]);
        let mut first = [0; 3];
        stream.read_exact(&mut first).await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!((&first, rest.as_str()), (b"abc", "defgh"));
    }

    #[test]
    fn a_refused_call_does_not_revoke_admission() {
        let peer = stranger(&Arc::new(Semaphore::new(1)));
        peer.refuse("no token");
        assert!(!peer.admitted());
        assert!(peer.admit());
        peer.refuse("no token");
        assert!(peer.admitted());
    }

    fn stranger(places: &Arc<Semaphore>) -> Peer {
        Peer::new("127.0.0.1:1".parse().unwrap(), None, Refusals::default(), Arc::clone(places))
    }

    #[tokio::test]
    async fn only_admitted_connections_take_a_place_and_free_it() {
        let places = Arc::new(Semaphore::new(1));
        let (first, second) = (stranger(&places), stranger(&places));
        first.asked();
        assert!(!first.admitted() && places.available_permits() == 1, "a health check does not admit");
        assert!(first.admit() && first.admit() && !second.admit());
        let (_host, made_way) = oneshot::channel();
        drop(Connection::new(Box::new(tokio::io::empty()), first.clone(), made_way));
        assert!(second.admit(), "the place is free although a call still holds the peer");
        drop(first);
    }

    #[tokio::test]
    async fn a_stranger_can_be_closed_and_an_admitted_connection_cannot() {
        let places = Arc::new(Semaphore::new(1));
        for member in [false, true] {
            let peer = stranger(&places);
            let (host, made_way) = oneshot::channel();
            let (bytes, mut other) = tokio::io::duplex(8);
            let mut connection = Connection::new(Box::new(bytes), peer.clone(), made_way);
            assert!(!member || peer.admit());
            drop(host);
            other.write_all(b"x").await.unwrap();
            assert_eq!(connection.read_u8().await.is_ok(), member);
        }
    }
}
