//! Loads NCCL's library at run time; its unique id, configuration and errors.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::CUstream;
use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId};
use libloading::Library;

use dyad_proto::counted;

use crate::comm::CommError;

/// `magic` of an `ncclConfig_t`, as NCCL_CONFIG_INITIALIZER sets it.
const CONFIG_MAGIC: u32 = 0xcafe_beef;
/// NCCL version of the `ncclConfig_t` that `config` fills: 2.28.0.
const CONFIG_VERSION: u32 = 22800;
/// NCCL_CONFIG_UNDEF_INT.
const UNDEFINED: i32 = i32::MIN;

/// NCCL's unique id, which all ranks of a generation share.
#[derive(Clone, Copy, Debug)]
pub struct UniqueId(pub(super) ncclUniqueId);

impl UniqueId {
    /// Makes a new id; only rank 0 calls it.
    pub fn new() -> Result<Self, CommError> {
        let api = api()?;
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: writes 128 bytes.
        checked("ncclGetUniqueId", unsafe { (api.get_unique_id)(&raw mut id) })?;
        Ok(Self(id))
    }

    /// The 128 bytes that rank 0 sends to the other ranks.
    #[must_use]
    pub fn to_bytes(self) -> Vec<u8> {
        self.0.internal.iter().map(|&byte| byte as u8).collect()
    }

    /// Reads the bytes of [`UniqueId::to_bytes`]; fails unless there are 128.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CommError> {
        let bytes: &[u8; 128] = bytes.try_into().map_err(|_| {
            error(
                "ncclCommInitRank",
                format!("the unique id has {}, expected 128", counted(bytes.len(), "byte")),
            )
        })?;
        Ok(Self(ncclUniqueId { internal: bytes.map(|byte| byte as _) }))
    }
}

/// Arguments: input, output, number of values, their kind, operator or root, communicator, stream.
type Collective<R> = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    ncclDataType_t,
    R,
    ncclComm_t,
    CUstream,
) -> ncclResult_t;

/// NCCL's functions. cudarc's own loader looks for `libnccl.so`, but wheels contain only `libnccl.so.2`.
#[derive(Debug)]
pub(super) struct Api {
    pub(super) get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> ncclResult_t,
    pub(super) comm_init_rank_config:
        unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> ncclResult_t,
    pub(super) comm_get_async_error: unsafe extern "C" fn(ncclComm_t, *mut ncclResult_t) -> ncclResult_t,
    pub(super) comm_abort: unsafe extern "C" fn(ncclComm_t) -> ncclResult_t,
    pub(super) all_reduce: Collective<ncclRedOp_t>,
    pub(super) reduce_scatter: Collective<ncclRedOp_t>,
    pub(super) broadcast: Collective<c_int>,
    pub(super) all_gather: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        ncclDataType_t,
        ncclComm_t,
        CUstream,
    ) -> ncclResult_t,
    get_error_string: unsafe extern "C" fn(ncclResult_t) -> *const c_char,
}

impl Api {
    fn load() -> Result<Self, libloading::Error> {
        // SAFETY: NCCL's initialisers touch none of this program's state; every symbol has its type from nccl.h.
        unsafe {
            let library = Library::new("libnccl.so.2").or_else(|_| Library::new("libnccl.so"))?;
            let api = Self {
                get_unique_id: *library.get(b"ncclGetUniqueId")?,
                comm_init_rank_config: *library.get(b"ncclCommInitRankConfig")?,
                comm_get_async_error: *library.get(b"ncclCommGetAsyncError")?,
                comm_abort: *library.get(b"ncclCommAbort")?,
                all_reduce: *library.get(b"ncclAllReduce")?,
                reduce_scatter: *library.get(b"ncclReduceScatter")?,
                broadcast: *library.get(b"ncclBroadcast")?,
                all_gather: *library.get(b"ncclAllGather")?,
                get_error_string: *library.get(b"ncclGetErrorString")?,
            };
            // Never unload it: the functions must stay valid until the process ends.
            std::mem::forget(library);
            Ok(api)
        }
    }
}

/// NCCL's functions; the first call loads the library.
pub(super) fn api() -> Result<&'static Api, CommError> {
    static API: OnceLock<Api> = OnceLock::new();
    if let Some(api) = API.get() {
        return Ok(api);
    }
    match Api::load() {
        Ok(api) => Ok(API.get_or_init(|| api)),
        Err(reason) => {
            Err(error("loading NCCL", format!("{reason}; install it with deploy/install-libtorch.sh --cuda")))
        }
    }
}

/// Configuration of a non-blocking communicator; NCCL chooses all other settings.
pub(super) fn config() -> ncclConfig_t {
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

/// Converts an NCCL status. `ncclInProgress` is not an error.
pub(super) fn checked(operation: &'static str, result: ncclResult_t) -> Result<(), CommError> {
    match result {
        ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress => Ok(()),
        failed => {
            // SAFETY: NCCL returns a static string.
            let text = unsafe { CStr::from_ptr((api()?.get_error_string)(failed)) };
            Err(error(operation, text.to_string_lossy().into_owned()))
        }
    }
}

pub(super) fn error(operation: &'static str, reason: String) -> CommError {
    CommError { operation, reason }
}
