//! The communicator's stream, and the events that order it relative to libtorch's stream. The host never waits for a device here.

use cudarc::driver::result::{ctx, device, event, primary_ctx, stream};
use cudarc::driver::sys::{CUevent, CUevent_flags, CUevent_wait_flags, CUstream};

use super::library::error;
use crate::comm::CommError;
use crate::device::cuda_current_stream;

/// The stream on which libtorch queues its work now.
pub(super) fn current_stream(gpu: usize) -> Result<CUstream, CommError> {
    let stream = cuda_current_stream(gpu).map_err(|reason| error("the current stream", reason.0))?;
    Ok(stream.cast())
}

/// Makes a stream on a GPU, and makes the GPU's context current on this thread.
pub(super) fn make_stream(gpu: usize) -> Result<CUstream, CommError> {
    let device = driver("cuDeviceGet", device::get(gpu as i32))?;
    // SAFETY: the primary context is the one libtorch uses; it is never released, like libtorch's own reference.
    driver("cuCtxSetCurrent", unsafe {
        primary_ctx::retain(device).and_then(|context| ctx::set_current(context))
    })?;
    driver("cuStreamCreate", stream::create(stream::StreamKind::NonBlocking))
}

/// A CUDA event.
pub(super) struct CudaEvent(CUevent);

impl CudaEvent {
    /// Records an event after all work queued on a stream so far.
    pub(super) fn record(stream: CUstream) -> Result<Self, CommError> {
        let made = Self(driver("cuEventCreate", event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING))?);
        // SAFETY: event and stream are live.
        driver("cuEventRecord", unsafe { event::record(made.0, stream) })?;
        Ok(made)
    }

    /// Makes later work on a stream wait for the event.
    pub(super) fn block(&self, stream: CUstream) -> Result<(), CommError> {
        let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: event and stream are live.
        driver("cuStreamWaitEvent", unsafe { stream::wait_event(stream, self.0, flags) })
    }
}

impl Drop for CudaEvent {
    fn drop(&mut self) {
        // SAFETY: made by `record`, destroyed here only; the driver defers it until the event has passed.
        let _ = unsafe { event::destroy(self.0) };
    }
}

/// Converts an error of the CUDA driver.
pub(super) fn driver<T>(
    operation: &'static str,
    result: Result<T, cudarc::driver::DriverError>,
) -> Result<T, CommError> {
    result.map_err(|reason| error(operation, reason.to_string()))
}
