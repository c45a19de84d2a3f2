//! Connections as the server sees them.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use dyad_proto::security::Role;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Sleep;
use tonic::transport::server::Connected;

use super::refusals::{CONNECTION, Refusals};

/// How long a connection may stay open before one of its calls is let in.
pub const IDLE: Duration = Duration::from_secs(10);

/// A stream some of whose bytes were read already.
#[derive(Debug)]
pub struct Rewound<S> {
    head: Vec<u8>,
    inner: S,
}

impl<S> Rewound<S> {
    /// Gives `head` back before what follows.
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

/// How far a connection has come.
const NO_CALL: u8 = 0;
const REFUSED: u8 = 1;
/// Somebody asked what anybody may ask.
const ASKED: u8 = 2;
const ADMITTED: u8 = 3;

/// How a connection stands; shared by its calls and by whoever greeted it.
#[derive(Debug)]
pub struct Standing {
    reached: AtomicU8,
    /// Places for connections that have proven to be of the run.
    places: Arc<Semaphore>,
    /// Its own place there.
    place: Mutex<Option<OwnedSemaphorePermit>>,
    /// It is admitted or gone: no stranger any more.
    pub settled: Notify,
}

/// Who is at the other end; every call of a connection carries it.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Where it calls from.
    pub address: SocketAddr,
    /// What its certificate says it is; nothing is known in plain text.
    pub roles: Option<Vec<Role>>,
    /// How it stands.
    pub standing: Arc<Standing>,
    refusals: Refusals,
}

impl Peer {
    /// Somebody who has made no call yet.
    #[must_use]
    pub fn new(
        address: SocketAddr,
        roles: Option<Vec<Role>>,
        refusals: Refusals,
        places: Arc<Semaphore>,
    ) -> Self {
        let (place, settled) = (Mutex::new(None), Notify::new());
        let standing = Standing { reached: AtomicU8::new(NO_CALL), places, place, settled };
        Self { address, roles, standing: Arc::new(standing), refusals }
    }

    /// One of its calls is let in: the connection may stay, if there is a place for it.
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

    /// It has asked what anybody may ask. Only a certificate makes it more than a stranger.
    pub fn asked(&self) {
        let stays = self.roles.is_some() && self.admit();
        if !stays {
            self.advance(ASKED);
        }
    }

    /// One of its calls is turned away, and the log says why.
    pub fn refuse(&self, reason: &str) {
        self.note("call refused", reason);
        // A connection that was admitted once stays so: its stream is a trainer's life.
        self.advance(REFUSED);
    }

    /// Puts into the log, or a count there, what was not taken from it.
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

/// What bytes come and go by: TCP, or TLS over it.
pub trait Bytes: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin> Bytes for S {}

/// An open connection. Ends by itself when no call is let in within [`IDLE`], or when it has to make way before.
#[derive(Debug)]
pub struct Connection {
    bytes: Box<dyn Bytes>,
    peer: Peer,
    deadline: Pin<Box<Sleep>>,
    /// Ends when whoever greeted it wants it to make way.
    host: oneshot::Receiver<Infallible>,
    over: bool,
}

impl Connection {
    /// Of a peer that has been greeted.
    #[must_use]
    pub fn new(bytes: Box<dyn Bytes>, peer: Peer, host: oneshot::Receiver<Infallible>) -> Self {
        Self { bytes, peer, deadline: Box::pin(tokio::time::sleep(IDLE)), host, over: false }
    }

    /// No call of it was let in, and its time is up.
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
        // Calls that are still being answered hold the standing, but no place.
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
    async fn what_was_read_comes_again_before_the_rest() {
        let mut stream = Rewound::new(b"abcde".to_vec(), &b"fgh"[..]);
        let mut first = [0; 3];
        stream.read_exact(&mut first).await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!((&first, rest.as_str()), (b"abc", "defgh"));
    }

    #[test]
    fn a_refused_call_does_not_take_an_admission_back() {
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
    async fn only_those_who_are_let_in_take_a_place_and_give_it_back() {
        let places = Arc::new(Semaphore::new(1));
        let (first, second) = (stranger(&places), stranger(&places));
        first.asked();
        assert!(!first.admitted() && places.available_permits() == 1, "a question proves nothing");
        assert!(first.admit() && first.admit() && !second.admit());
        let (_host, made_way) = oneshot::channel();
        drop(Connection::new(Box::new(tokio::io::empty()), first.clone(), made_way));
        assert!(second.admit(), "the place is free although a call still knows of the connection");
        drop(first);
    }

    #[tokio::test]
    async fn a_stranger_makes_way_and_a_member_does_not() {
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
