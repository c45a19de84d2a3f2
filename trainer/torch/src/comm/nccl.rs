//! Collectives by NCCL, loaded at run time with cudarc's types, on a separate stream.
//!
//! A collective waits for libtorch's current stream by a CUDA event, and the current stream waits for the collective by another
//! event. So the host does not block, and reductions overlap with the computation of the next layers. The communicator is
//! non-blocking: its creation is polled until a deadline, and any thread can abort the collectives in flight.
#![expect(unsafe_code, reason = "foreign functions of NCCL and the CUDA driver")]

mod library;
mod stream;

use std::ffi::c_void;
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use cudarc::driver::result::stream as driver_stream;
use cudarc::driver::sys::CUstream;
use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t};
use tch::{Device, Kind, Tensor};

pub use self::library::UniqueId;
use self::library::{Api, api, checked, config, error};
use self::stream::{CudaEvent, current_stream, driver, make_stream};
use super::{CommError, Communicator, Pending};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1800);
/// Sleep between two polls of a call in progress; NCCL sends no notification.
const POLL: Duration = Duration::from_millis(2);
/// Busy-poll for this long before sleeping: NCCL accepts a collective within a fraction of it.
const SOON: Duration = Duration::from_millis(1);
/// How long `abort` waits for NCCL; a slower abort goes on in its thread until the process ends.
const ABORT_TIMEOUT: Duration = Duration::from_secs(10);

/// An NCCL communicator bound to one GPU.
#[derive(Debug)]
pub struct Nccl {
    /// `None` after an abort. The lock keeps an abort from freeing the communicator during a call.
    raw: Mutex<Option<Raw>>,
    api: &'static Api,
    stream: CUstream,
    gpu: usize,
    rank: usize,
    world_size: usize,
}

#[derive(Clone, Copy, Debug)]
struct Raw(ncclComm_t);

// SAFETY: NCCL lets any thread abort a communicator.
unsafe impl Send for Raw {}

// SAFETY: NCCL lets any thread abort a non-blocking communicator; every other call is under the lock.
unsafe impl Send for Nccl {}
// SAFETY: as above.
unsafe impl Sync for Nccl {}

impl Nccl {
    /// Connects to all other ranks; blocks until they are connected or the timeout passes.
    pub fn connect(id: &UniqueId, rank: usize, world_size: usize, gpu: usize) -> Result<Self, CommError> {
        let api = api()?;
        let stream = make_stream(gpu)?;
        let mut config = config();
        let mut raw = std::ptr::null_mut();
        // SAFETY: out-pointer and config live across the call; NCCL copies the config.
        let started = unsafe {
            (api.comm_init_rank_config)(&raw mut raw, world_size as i32, id.0, rank as i32, &raw mut config)
        };
        checked("ncclCommInitRankConfig", started)?;
        let communicator = Self { raw: Mutex::new(Some(Raw(raw))), api, stream, gpu, rank, world_size };
        communicator.settle("ncclCommInitRankConfig", Instant::now() + CONNECT_TIMEOUT)?;
        Ok(communicator)
    }

    /// Waits until NCCL has accepted a call that returned `ncclInProgress`.
    fn settle(&self, operation: &'static str, deadline: Instant) -> Result<(), CommError> {
        let began = Instant::now();
        loop {
            match self.with(operation, |raw| {
                let mut state = ncclResult_t::ncclSuccess;
                // SAFETY: the communicator is live under the lock.
                checked(operation, unsafe { (self.api.comm_get_async_error)(raw, &raw mut state) })?;
                Ok(state)
            })? {
                ncclResult_t::ncclInProgress if began.elapsed() < SOON => std::thread::yield_now(),
                ncclResult_t::ncclInProgress if Instant::now() < deadline => std::thread::sleep(POLL),
                ncclResult_t::ncclInProgress => return Err(error(operation, "timed out".into())),
                state => return checked(operation, state),
            }
        }
    }

    fn with<T>(
        &self,
        operation: &'static str,
        call: impl FnOnce(ncclComm_t) -> Result<T, CommError>,
    ) -> Result<T, CommError> {
        let raw = self.raw.lock().unwrap_or_else(PoisonError::into_inner);
        match *raw {
            Some(Raw(raw)) => call(raw),
            None => Err(error(operation, "the communicator was aborted".into())),
        }
    }

    /// Queues a collective on the communicator's stream, after all work that libtorch has queued so far.
    fn start(
        &self,
        operation: &'static str,
        call: impl FnOnce(ncclComm_t, CUstream) -> ncclResult_t,
    ) -> Result<Box<dyn Pending>, CommError> {
        let before = CudaEvent::record(current_stream(self.gpu)?)?;
        before.block(self.stream)?;
        self.with(operation, |raw| checked(operation, call(raw, self.stream)))?;
        self.settle(operation, Instant::now() + CONNECT_TIMEOUT)?;
        Ok(Box::new(NcclWork { done: CudaEvent::record(self.stream)?, gpu: self.gpu }))
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.abort();
        // SAFETY: made by `make_stream`, destroyed here only.
        let _ = unsafe { driver_stream::destroy(self.stream) };
    }
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce(&self, tensor: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        let buffer = Buffer::of("ncclAllReduce", tensor)?;
        // SAFETY: the buffer lives until the work is waited for (TRN-C2); in place is allowed.
        self.start("ncclAllReduce", |raw, stream| unsafe {
            (self.api.all_reduce)(
                buffer.data,
                buffer.data,
                buffer.count,
                buffer.kind,
                ncclRedOp_t::ncclSum,
                raw,
                stream,
            )
        })
    }

    fn reduce_scatter(&self, output: &Tensor, input: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        let (out, input) =
            (Buffer::of("ncclReduceScatter", output)?, Buffer::of("ncclReduceScatter", input)?);
        // SAFETY: as in all_reduce; the input holds `world_size` times the output's elements.
        self.start("ncclReduceScatter", |raw, stream| unsafe {
            (self.api.reduce_scatter)(
                input.data,
                out.data,
                out.count,
                out.kind,
                ncclRedOp_t::ncclSum,
                raw,
                stream,
            )
        })
    }

    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        let (out, input) = (Buffer::of("ncclAllGather", output)?, Buffer::of("ncclAllGather", input)?);
        // SAFETY: as in all_reduce; the output holds `world_size` times the input's elements.
        self.start("ncclAllGather", |raw, stream| unsafe {
            (self.api.all_gather)(input.data, out.data, input.count, input.kind, raw, stream)
        })
    }

    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Box<dyn Pending>, CommError> {
        let buffer = Buffer::of("ncclBroadcast", tensor)?;
        // SAFETY: as in all_reduce.
        self.start("ncclBroadcast", |raw, stream| unsafe {
            (self.api.broadcast)(
                buffer.data,
                buffer.data,
                buffer.count,
                buffer.kind,
                root as i32,
                raw,
                stream,
            )
        })
    }

    fn barrier(&self) -> Result<(), CommError> {
        let one = Tensor::ones([1], (Kind::Float, Device::Cuda(self.gpu)));
        self.all_reduce(&one)?.wait()?;
        // SAFETY: the stream is live.
        driver("barrier", unsafe { driver_stream::synchronize(self.stream) })
    }

    fn abort(&self) {
        let Some(raw) = self.raw.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        // NCCL may block on a kernel that waits for a dead peer: abort in a thread, and wait for it only until a timeout.
        let (done, aborted) = mpsc::channel();
        let comm_abort = self.api.comm_abort;
        let spawned = std::thread::Builder::new().name("nccl-abort".into()).spawn(move || {
            let Raw(raw) = { raw };
            // SAFETY: taken out under the lock, so no other call uses or frees it.
            let _ = unsafe { comm_abort(raw) };
            let _ = done.send(());
        });
        if spawned.is_ok() && aborted.recv_timeout(ABORT_TIMEOUT).is_err() {
            tracing::warn!("NCCL did not abort within {} s", ABORT_TIMEOUT.as_secs());
        }
    }
}

struct NcclWork {
    done: CudaEvent,
    gpu: usize,
}

impl Pending for NcclWork {
    fn wait(self: Box<Self>) -> Result<(), CommError> {
        self.done.block(current_stream(self.gpu)?)
    }
}

struct Buffer {
    data: *mut c_void,
    count: usize,
    kind: ncclDataType_t,
}

impl Buffer {
    fn of(operation: &'static str, tensor: &Tensor) -> Result<Self, CommError> {
        let kind = match tensor.kind() {
            Kind::Float => ncclDataType_t::ncclFloat32,
            Kind::Double => ncclDataType_t::ncclFloat64,
            Kind::BFloat16 => ncclDataType_t::ncclBfloat16,
            Kind::Half => ncclDataType_t::ncclFloat16,
            Kind::Int64 => ncclDataType_t::ncclInt64,
            Kind::Uint8 => ncclDataType_t::ncclUint8,
            other => return Err(error(operation, format!("unsupported kind {other:?}"))),
        };
        if !tensor.device().is_cuda() || !tensor.is_contiguous() {
            return Err(error(operation, "expected a contiguous tensor on the GPU".into()));
        }
        Ok(Self { data: tensor.data_ptr(), count: tensor.numel(), kind })
    }
}
