//! Export of spans to the collector: a queue, a thread that empties it, and a separate runtime for gRPC.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry::trace::TracerProvider;
use opentelemetry::{Context, InstrumentationScope, KeyValue};
use opentelemetry_otlp::SpanExporter as OtlpExporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{
    BatchSpanProcessor, Config, SdkTracer, SdkTracerProvider, Span, SpanData, SpanExporter, SpanProcessor,
};
use tokio::runtime::{Builder, Handle, Runtime};

use crate::deadline::within;
use crate::record::Spans;

/// Name of the instrumentation scope.
const SCOPE: &str = "dyad";

/// The exporter of a process's spans.
#[derive(Debug)]
pub(crate) struct Pipeline {
    runtime: Runtime,
    provider: SdkTracerProvider,
    processor: Arc<BatchSpanProcessor>,
}

impl Pipeline {
    /// Starts the pipeline. It connects lazily: an unreachable collector is noticed with the first export.
    pub(crate) fn start(service: &'static str, endpoint: String) -> Result<Self, String> {
        let runtime =
            Builder::new_multi_thread().worker_threads(1).thread_name("telemetry").enable_all().build();
        let runtime = runtime.map_err(|error| error.to_string())?;
        let exporter = {
            let _inside = runtime.enter();
            OtlpExporter::builder().with_tonic().build()
        };
        let exporter = match exporter {
            Ok(exporter) => exporter,
            Err(error) => {
                // Do not drop the runtime: dropping it inside another runtime panics.
                runtime.shutdown_background();
                return Err(format!("{endpoint}: {error}"));
            }
        };
        let exporter = Watched {
            inner: Arc::new(exporter),
            runtime: runtime.handle().clone(),
            endpoint,
            failing: AtomicBool::new(false),
        };
        let resource = resource(service);
        // OTEL_BSP_* set sizes and delays.
        let mut processor = BatchSpanProcessor::builder(exporter).build();
        processor.set_resource(&resource);
        let processor = Arc::new(processor);
        let provider = SdkTracerProvider::builder().with_resource(resource);
        let provider = provider.with_span_processor(ExporterState(Arc::clone(&processor))).build();
        Ok(Self { runtime, provider, processor })
    }

    pub(crate) fn tracer(&self) -> SdkTracer {
        self.provider.tracer(SCOPE)
    }

    pub(crate) fn spans(&self) -> Spans {
        Spans {
            processor: Arc::clone(&self.processor),
            // Reads OTEL_TRACES_SAMPLER and its argument.
            sampler: Config::default().sampler,
            scope: InstrumentationScope::builder(SCOPE).with_version(env!("CARGO_PKG_VERSION")).build(),
        }
    }

    /// Exports the remaining spans, within `limit`.
    pub(crate) fn finish(self, limit: Duration) {
        let provider = self.provider;
        within(limit, move || {
            let _ = provider.shutdown_with_timeout(limit);
        });
        self.runtime.shutdown_background();
    }
}

/// Attributes of this process. `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` take precedence.
fn resource(service: &'static str) -> Resource {
    let set = Resource::builder().build();
    let unknown = |value: &opentelemetry::Value| value.as_str().starts_with("unknown_service");
    let named = set.get(&"service.name".into()).is_some_and(|value| !unknown(&value));
    let host =
        dyad_proto::files::of_kernel("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
    let pid = std::process::id();
    let own = [
        ("service.namespace", SCOPE.into()),
        ("service.version", env!("CARGO_PKG_VERSION").into()),
        ("service.instance.id", format!("{host}:{pid}").into()),
        ("host.name", host.into()),
        ("process.pid", i64::from(pid).into()),
    ];
    let own =
        own.into_iter().filter(|(key, _): &(&str, opentelemetry::Value)| set.get(&(*key).into()).is_none());
    let own = own.map(|(key, value)| KeyValue::new(key, value)).collect::<Vec<_>>();
    let resource = Resource::builder().with_attributes(own);
    if named { resource.build() } else { resource.with_service_name(service).build() }
}

/// Puts spans of `tracing` into the same queue as finished records.
#[derive(Debug)]
struct ExporterState(Arc<BatchSpanProcessor>);

impl SpanProcessor for ExporterState {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        self.0.on_end(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }
}

/// Exports on the runtime; logs once when that fails and once when it works again.
#[derive(Debug)]
struct Watched {
    inner: Arc<OtlpExporter>,
    runtime: Handle,
    endpoint: String,
    failing: AtomicBool,
}

impl SpanExporter for Watched {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let inner = Arc::clone(&self.inner);
        // gRPC and its timers need a runtime thread; the queue's thread is not one.
        let sent = self.runtime.spawn(async move { inner.export(batch).await }).await;
        let result = sent.unwrap_or_else(|error| Err(OTelSdkError::InternalFailure(error.to_string())));
        let endpoint = &self.endpoint;
        match &result {
            Err(error) if !self.failing.swap(true, Ordering::Relaxed) => {
                tracing::warn!("traces do not reach {endpoint}, the run goes on without them: {error}");
            }
            Ok(()) if self.failing.swap(false, Ordering::Relaxed) => {
                tracing::info!("traces reach {endpoint} again");
            }
            _ => {}
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.set_resource(resource);
        }
    }
}
