//! NCCL through cudarc, loaded at run time, on a stream of its own.
//!
//! Collectives wait for libtorch's default stream by an event and the default stream waits for them by another, so that the
//! host never blocks and reductions run beside the layers still to come. The communicator is non-blocking: creation is
//! polled against a deadline, and an abort from any thread breaks what is in flight.
#![expect(unsafe_code, reason = "foreign functions of NCCL and the CUDA driver")]

use std::ffi::{CStr, c_void};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::result::{ctx, device, event, primary_ctx, stream};
use cudarc::driver::sys::{CUevent, CUevent_flags, CUevent_wait_flags, CUstream};
use cudarc::nccl::sys::{
    self, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId,
};
use tch::{Device, Kind, Tensor};

use super::{CommError, Communicator, Pending};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1800);
/// Between two looks at a communicator that is being made; NCCL offers no way to be told.
const POLL: Duration = Duration::from_millis(2);
/// `ncclConfig_t` says so itself: NCCL_CONFIG_INITIALIZER.
const CONFIG_MAGIC: u32 = 0xcafe_beef;
/// Version whose `ncclConfig_t` is filled below, 2.28.0.
const CONFIG_VERSION: u32 = 22800;
/// NCCL_CONFIG_UNDEF_INT.
const UNDEFINED: i32 = i32::MIN;

/// What the ranks of a generation share.
#[derive(Clone, Copy, Debug)]
pub struct UniqueId(ncclUniqueId);

impl UniqueId {
    /// A new id; rank 0 makes it.
    pub fn new() -> Result<Self, CommError> {
        load_library()?;
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: writes 128 bytes.
        checked("ncclGetUniqueId", unsafe { sys::ncclGetUniqueId(&raw mut id) })?;
        Ok(Self(id))
    }

    /// As it travels.
    #[must_use]
    pub fn to_bytes(self) -> Vec<u8> {
        self.0.internal.iter().map(|&byte| byte as u8).collect()
    }

    /// As it arrives.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CommError> {
        let bytes: &[u8; 128] = bytes.try_into().map_err(|_| {
            error("ncclCommInitRank", format!("the unique id has {} bytes, expected 128", bytes.len()))
        })?;
        Ok(Self(ncclUniqueId { internal: bytes.map(|byte| byte as _) }))
    }
}

/// An NCCL communicator bound to one GPU.
#[derive(Debug)]
pub struct Nccl {
    /// Gone after an abort. The lock keeps an abort from freeing it under a call.
    raw: Mutex<Option<Raw>>,
    stream: CUstream,
    gpu: usize,
    rank: usize,
    world_size: usize,
}

#[derive(Clone, Copy, Debug)]
struct Raw(ncclComm_t);

// SAFETY: NCCL lets any thread abort a non-blocking communicator; every other call is under the lock.
unsafe impl Send for Nccl {}
// SAFETY: as above.
unsafe impl Sync for Nccl {}

impl Nccl {
    /// Connects to all other ranks; blocks until they are there or the deadline passes.
    pub fn connect(id: &UniqueId, rank: usize, world_size: usize, gpu: usize) -> Result<Self, CommError> {
        load_library()?;
        let stream = make_stream(gpu)?;
        let mut config = config();
        let mut raw = std::ptr::null_mut();
        // SAFETY: out-pointer and config live across the call; NCCL copies the config.
        let started = unsafe {
            sys::ncclCommInitRankConfig(&raw mut raw, world_size as i32, id.0, rank as i32, &raw mut config)
        };
        checked("ncclCommInitRankConfig", started)?;
        let communicator = Self { raw: Mutex::new(Some(Raw(raw))), stream, gpu, rank, world_size };
        communicator.settle("ncclCommInitRankConfig", Instant::now() + CONNECT_TIMEOUT)?;
        Ok(communicator)
    }

    /// Waits until a call that returned "in progress" has been taken in.
    fn settle(&self, operation: &'static str, deadline: Instant) -> Result<(), CommError> {
        loop {
            match self.with(operation, |raw| {
                let mut state = ncclResult_t::ncclSuccess;
                // SAFETY: the communicator is live under the lock.
                checked(operation, unsafe { sys::ncclCommGetAsyncError(raw, &raw mut state) })?;
                Ok(state)
            })? {
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

    /// Puts a collective on the communicator's stream, after everything libtorch has queued so far.
    fn start(
        &self,
        operation: &'static str,
        call: impl FnOnce(ncclComm_t, CUstream) -> ncclResult_t,
    ) -> Result<Box<dyn Pending>, CommError> {
        let before = Event::record(std::ptr::null_mut())?;
        before.block(self.stream)?;
        self.with(operation, |raw| checked(operation, call(raw, self.stream)))?;
        self.settle(operation, Instant::now() + CONNECT_TIMEOUT)?;
        Ok(Box::new(NcclWork(Event::record(self.stream)?)))
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.abort();
        // SAFETY: made by `make_stream`, destroyed here only.
        let _ = unsafe { stream::destroy(self.stream) };
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
        // SAFETY: the buffer lives until the work is waited for (C-2); in place is allowed.
        self.start("ncclAllReduce", |raw, stream| unsafe {
            sys::ncclAllReduce(
                buffer.data,
                buffer.data,
                buffer.count,
                buffer.kind,
                ncclRedOp_t::ncclSum,
                raw,
                stream.cast(),
            )
        })
    }

    fn reduce_scatter(&self, output: &Tensor, input: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        let (out, input) =
            (Buffer::of("ncclReduceScatter", output)?, Buffer::of("ncclReduceScatter", input)?);
        // SAFETY: as in all_reduce; the input holds `world_size` times the output's elements.
        self.start("ncclReduceScatter", |raw, stream| unsafe {
            sys::ncclReduceScatter(
                input.data,
                out.data,
                out.count,
                out.kind,
                ncclRedOp_t::ncclSum,
                raw,
                stream.cast(),
            )
        })
    }

    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        let (out, input) = (Buffer::of("ncclAllGather", output)?, Buffer::of("ncclAllGather", input)?);
        // SAFETY: as in all_reduce; the output holds `world_size` times the input's elements.
        self.start("ncclAllGather", |raw, stream| unsafe {
            sys::ncclAllGather(input.data, out.data, input.count, input.kind, raw, stream.cast())
        })
    }

    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Box<dyn Pending>, CommError> {
        let buffer = Buffer::of("ncclBroadcast", tensor)?;
        // SAFETY: as in all_reduce.
        self.start("ncclBroadcast", |raw, stream| unsafe {
            sys::ncclBroadcast(
                buffer.data,
                buffer.data,
                buffer.count,
                buffer.kind,
                root as i32,
                raw,
                stream.cast(),
            )
        })
    }

    fn barrier(&self) -> Result<(), CommError> {
        let one = Tensor::ones([1], (Kind::Float, Device::Cuda(self.gpu)));
        self.all_reduce(&one)?.wait()?;
        // SAFETY: the stream is live.
        driver("barrier", unsafe { stream::synchronize(self.stream) })
    }

    fn abort(&self) {
        if let Some(Raw(raw)) = self.raw.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // SAFETY: taken out under the lock, so nobody else uses it and nobody frees it again.
            let _ = unsafe { sys::ncclCommAbort(raw) };
        }
    }
}

struct NcclWork(Event);

impl Pending for NcclWork {
    fn wait(self: Box<Self>) -> Result<(), CommError> {
        self.0.block(std::ptr::null_mut())
    }
}

struct Event(CUevent);

impl Event {
    /// Marks what is queued on a stream so far; null is libtorch's default stream.
    fn record(stream: CUstream) -> Result<Self, CommError> {
        let made = Self(driver("cuEventCreate", event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING))?);
        // SAFETY: event and stream are live.
        driver("cuEventRecord", unsafe { event::record(made.0, stream) })?;
        Ok(made)
    }

    /// Makes later work on a stream wait for the mark.
    fn block(&self, stream: CUstream) -> Result<(), CommError> {
        let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: event and stream are live.
        driver("cuStreamWaitEvent", unsafe { stream::wait_event(stream, self.0, flags) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `record`, destroyed here only; the driver defers it until the event has passed.
        let _ = unsafe { event::destroy(self.0) };
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

/// cudarc looks for `libnccl.so`; wheels ship `libnccl.so.2`. Loaded first, it answers to both names.
fn load_library() -> Result<(), CommError> {
    // SAFETY: NCCL's initialisers touch no state of ours.
    let library = unsafe {
        libloading::Library::new("libnccl.so.2").or_else(|_| libloading::Library::new("libnccl.so"))
    };
    match library {
        Ok(library) => {
            std::mem::forget(library);
            Ok(())
        }
        Err(reason) => {
            Err(error("loading NCCL", format!("{reason}; install it with deploy/install-libtorch.sh --cuda")))
        }
    }
}

fn make_stream(gpu: usize) -> Result<CUstream, CommError> {
    let device = driver("cuDeviceGet", device::get(gpu as i32))?;
    // SAFETY: the primary context is the one libtorch uses; it is never released, like libtorch's own reference.
    driver("cuCtxSetCurrent", unsafe {
        primary_ctx::retain(device).and_then(|context| ctx::set_current(context))
    })?;
    driver("cuStreamCreate", stream::create(stream::StreamKind::NonBlocking))
}

fn config() -> ncclConfig_t {
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: CONFIG_MAGIC,
        version: CONFIG_VERSION,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: std::ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: std::ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

fn checked(operation: &'static str, result: ncclResult_t) -> Result<(), CommError> {
    match result {
        ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress => Ok(()),
        failed => {
            // SAFETY: NCCL hands out a static string.
            let text = unsafe { CStr::from_ptr(sys::ncclGetErrorString(failed)) };
            Err(error(operation, text.to_string_lossy().into_owned()))
        }
    }
}

fn driver<T>(
    operation: &'static str,
    result: Result<T, cudarc::driver::DriverError>,
) -> Result<T, CommError> {
    result.map_err(|reason| error(operation, reason.to_string()))
}

fn error(operation: &'static str, reason: String) -> CommError {
    CommError { operation, reason }
}
