//! HTTP endpoint: `/metrics` in the OpenMetrics text format, and `/status`, the run's status as JSON.
//!
//! The port has no authentication, so its connections are limited to [`MOST`]: a new one closes the oldest. That does no harm, because
//! a scrape takes milliseconds, and a scraper whose idle connection was closed opens another.
//!
//! A scraper would usually miss the moment between the end of the run and the end of the process: its last scrape would show a running
//! run, and its next one a closed port, as after a crash. So the port stays open until the end has been scraped
//! ([`Endpoint::last_scrape`]).

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::serve::Listener;
use axum::{Json, Router};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use super::prometheus::Metrics;
use crate::handle::{RunHandle, RunStatus};

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Most open connections.
pub const MOST: usize = 32;

/// How long open answers may take to reach their clients once the port closes.
const PARTING: Duration = Duration::from_secs(1);

/// A listener that closes its oldest connection when there are [`MOST`].
struct Few {
    listener: TcpListener,
    open: VecDeque<oneshot::Sender<()>>,
}

/// A connection that can be told to close.
struct Scraper {
    stream: TcpStream,
    /// Resolves when it must close; `None` once that was read or the listener is gone.
    leave: Option<oneshot::Receiver<()>>,
}

impl Listener for Few {
    type Io = Scraper;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Scraper, SocketAddr) {
        // axum's accept retries when the process has no free sockets.
        let (stream, address) = Listener::accept(&mut self.listener).await;
        self.open.retain(|guest| !guest.is_closed());
        if self.open.len() >= MOST
            && let Some(oldest) = self.open.pop_front()
        {
            // Fails only if that connection has ended.
            let _ = oldest.send(());
        }
        let (ask, leave) = oneshot::channel();
        self.open.push_back(ask);
        (Scraper { stream, leave: Some(leave) }, address)
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl Scraper {
    /// Fails if the connection must close; otherwise the task is woken when that happens.
    fn stays(&mut self, cx: &mut Context<'_>) -> std::io::Result<()> {
        let Some(leave) = &mut self.leave else { return Ok(()) };
        match Pin::new(leave).poll(cx) {
            Poll::Pending => Ok(()),
            Poll::Ready(Err(_)) => {
                self.leave = None;
                Ok(())
            }
            Poll::Ready(Ok(())) => {
                self.leave = None;
                Err(std::io::ErrorKind::ConnectionAborted.into())
            }
        }
    }
}

impl AsyncRead for Scraper {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        self.stays(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Scraper {
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

/// What scrapers have read so far: any metrics, and those after the end of the run.
#[derive(Clone, Copy, Debug, Default)]
struct Read {
    anything: bool,
    the_end: bool,
}

/// State of the HTTP handlers.
#[derive(Clone)]
struct Served {
    metrics: Arc<Metrics>,
    run: RunHandle,
    read: watch::Sender<Read>,
}

/// The open port, until the process ends.
#[derive(Debug)]
pub struct Endpoint {
    server: JoinHandle<()>,
    /// Dropped when the port is to close.
    stop: oneshot::Sender<()>,
    metrics: Arc<Metrics>,
    read: watch::Receiver<Read>,
}

impl Endpoint {
    /// Starts to serve.
    #[must_use]
    pub fn open(listener: TcpListener, metrics: Arc<Metrics>, run: RunHandle) -> Self {
        let (read, seen) = watch::channel(Read::default());
        let routes = Router::new()
            .route("/", get(|| async { "Dyad coordinator: see /metrics and /status\n" }))
            .route("/metrics", get(scrape))
            .route("/status", get(status))
            .with_state(Served { metrics: metrics.clone(), run, read });
        let (stop, stopped) = oneshot::channel::<()>();
        let stopping = async {
            // Resolves when the sender is dropped.
            let _ = stopped.await;
        };
        let serving = axum::serve(Few { listener, open: VecDeque::new() }, routes);
        let server = tokio::spawn(async move {
            if let Err(error) = serving.with_graceful_shutdown(stopping).await {
                tracing::warn!("metrics are no longer served: {error}");
            }
        });
        Self { server, stop, metrics, read: seen }
    }

    /// Called after the run: closes the port once the end of the run has been scraped, `patience` is over, or `hurry` resolves. Closes it
    /// at once if the metrics were never scraped, or if they do not show the end of the run.
    pub async fn last_scrape(mut self, patience: Duration, hurry: impl Future<Output = ()>) {
        let awaited = self.metrics.has_ended() && self.read.borrow().anything;
        if awaited && !patience.is_zero() {
            tracing::info!(
                "the run has ended; up to {} s for a last scrape of its metrics",
                patience.as_secs()
            );
            tokio::select! {
                in_time = tokio::time::timeout(patience, self.read.wait_for(|read| read.the_end)) => {
                    if in_time.is_err() {
                        tracing::info!("no scrape came after the end of the run");
                    }
                }
                () = hurry => {}
            }
        }
        drop(self.stop);
        let _ = tokio::time::timeout(PARTING, self.server).await;
    }
}

async fn status(State(served): State<Served>) -> Json<RunStatus> {
    Json(served.run.status())
}

async fn scrape(State(served): State<Served>) -> Response {
    // Read before encoding: if the run ends in between, this scrape does not count as one of the end.
    let the_end = served.metrics.has_ended();
    let text = served.metrics.encode();
    served.read.send_modify(|read| {
        read.anything = true;
        read.the_end |= the_end;
    });
    match text {
        Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}
