//! Connections as the server sees them.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use dyad_proto::security::Role;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
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
const ADMITTED: u8 = 2;

/// Who is at the other end; every call of a connection carries it.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Where it calls from.
    pub address: SocketAddr,
    /// What its certificate says it is; nothing is known in plain text.
    pub roles: Option<Vec<Role>>,
    standing: Arc<AtomicU8>,
    refusals: Refusals,
}

impl Peer {
    /// Somebody who has made no call yet.
    #[must_use]
    pub fn new(address: SocketAddr, roles: Option<Vec<Role>>, refusals: Refusals) -> Self {
        Self { address, roles, standing: Arc::new(AtomicU8::new(NO_CALL)), refusals }
    }

    /// One of its calls is let in: the connection may stay.
    pub fn admit(&self) {
        self.standing.store(ADMITTED, Ordering::Relaxed);
    }

    /// One of its calls is turned away, and the log says why.
    pub fn refuse(&self, reason: &str) {
        self.note("call refused", reason);
        // A connection that was admitted once stays so: its stream is a trainer's life.
        let _ = self.standing.compare_exchange(NO_CALL, REFUSED, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Puts into the log, or a count there, what was not taken from it.
    pub fn note(&self, what: &'static str, reason: &str) {
        self.refusals.note(what, Some(self.address), reason);
    }

    fn admitted(&self) -> bool {
        self.standing.load(Ordering::Relaxed) == ADMITTED
    }
}

/// What bytes come and go by: TCP, or TLS over it.
pub trait Bytes: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin> Bytes for S {}

/// An open connection. Ends by itself when no call is let in within [`IDLE`].
#[derive(Debug)]
pub struct Connection {
    bytes: Box<dyn Bytes>,
    peer: Peer,
    deadline: Pin<Box<Sleep>>,
    /// Its place among the open connections.
    _place: OwnedSemaphorePermit,
}

impl Connection {
    /// Of a peer that has been greeted.
    #[must_use]
    pub fn new(bytes: Box<dyn Bytes>, peer: Peer, place: OwnedSemaphorePermit) -> Self {
        Self { bytes, peer, deadline: Box::pin(tokio::time::sleep(IDLE)), _place: place }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.peer.standing.load(Ordering::Relaxed) == NO_CALL {
            self.peer.note(CONNECTION, "it ended without a call that could be read");
        }
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
        if !self.peer.admitted() && self.deadline.as_mut().poll(cx).is_ready() {
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
    use tokio::io::AsyncReadExt;

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
        let peer = Peer::new("127.0.0.1:1".parse().unwrap(), None, Refusals::default());
        peer.refuse("no token");
        assert!(!peer.admitted());
        peer.admit();
        peer.refuse("no token");
        assert!(peer.admitted());
    }
}
