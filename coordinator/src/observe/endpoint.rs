//! `/metrics` over HTTP, in the OpenMetrics text format.
//!
//! The port asks nobody who they are, so what it takes is bounded: [`MOST`] connections, of which the oldest makes way for whoever
//! comes. A scrape takes milliseconds, and a scraper whose idle connection went opens another.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

use super::metrics::Metrics;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Open connections.
pub const MOST: usize = 32;

/// A port whose oldest connection makes way.
struct Few {
    listener: TcpListener,
    open: VecDeque<oneshot::Sender<()>>,
}

/// A connection that ends when it is to make way.
struct Guest {
    stream: TcpStream,
    /// Resolves then.
    leave: oneshot::Receiver<()>,
}

impl Listener for Few {
    type Io = Guest;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Guest, SocketAddr) {
        // This accept waits out a machine without sockets.
        let (stream, address) = Listener::accept(&mut self.listener).await;
        self.open.retain(|guest| !guest.is_closed());
        if self.open.len() >= MOST {
            self.open.pop_front();
        }
        let (stay, leave) = oneshot::channel();
        self.open.push_back(stay);
        (Guest { stream, leave }, address)
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl Guest {
    /// Whether it may stay; whoever asks is woken when it may not.
    fn stays(&mut self, cx: &mut Context<'_>) -> std::io::Result<()> {
        match Pin::new(&mut self.leave).poll(cx) {
            Poll::Pending => Ok(()),
            Poll::Ready(_) => Err(std::io::ErrorKind::ConnectionAborted.into()),
        }
    }
}

impl AsyncRead for Guest {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        self.stays(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Guest {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        self.stays(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Serves until the process ends.
pub async fn serve(listener: TcpListener, metrics: Arc<Metrics>) {
    let routes = Router::new()
        .route("/", get(|| async { "Dyad coordinator: see /metrics\n" }))
        .route("/metrics", get(scrape))
        .with_state(metrics);
    if let Err(error) = axum::serve(Few { listener, open: VecDeque::new() }, routes).await {
        tracing::warn!("metrics are no longer served: {error}");
    }
}

async fn scrape(State(metrics): State<Arc<Metrics>>) -> Response {
    match metrics.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}
