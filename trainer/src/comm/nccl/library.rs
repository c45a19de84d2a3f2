//! NCCL's library: found at run time, its unique id, its configuration, its errors.

use std::ffi::CStr;

use cudarc::nccl::sys::{self, ncclConfig_t, ncclResult_t, ncclUniqueId};

use crate::comm::CommError;

/// `ncclConfig_t` says so itself: NCCL_CONFIG_INITIALIZER.
const CONFIG_MAGIC: u32 = 0xcafe_beef;
/// Version whose `ncclConfig_t` is filled below, 2.28.0.
const CONFIG_VERSION: u32 = 22800;
/// NCCL_CONFIG_UNDEF_INT.
const UNDEFINED: i32 = i32::MIN;

/// What the ranks of a generation share.
#[derive(Clone, Copy, Debug)]
pub struct UniqueId(pub(super) ncclUniqueId);

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

/// cudarc looks for `libnccl.so`; wheels ship `libnccl.so.2`. Loaded first, it answers to both names.
pub(super) fn load_library() -> Result<(), CommError> {
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

/// Non-blocking, everything else as NCCL decides.
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

/// An error of NCCL's as one of ours; a call that is still being taken in is none.
pub(super) fn checked(operation: &'static str, result: ncclResult_t) -> Result<(), CommError> {
    match result {
        ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress => Ok(()),
        failed => {
            // SAFETY: NCCL hands out a static string.
            let text = unsafe { CStr::from_ptr(sys::ncclGetErrorString(failed)) };
            Err(error(operation, text.to_string_lossy().into_owned()))
        }
    }
}

pub(super) fn error(operation: &'static str, reason: String) -> CommError {
    CommError { operation, reason }
}
