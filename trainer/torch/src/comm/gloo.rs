//! Collectives by the Gloo inside libtorch; ranks exchange their addresses through a [`Board`].
//!
//! - TRN-G1: a rank listens only on the address that it was given, and accepts no connection once all ranks are connected (on kernels
//!   without socket filters its ports stay open, with a warning).
#![expect(unsafe_code, reason = "foreign functions of the bridge")]

use std::ffi::{CString, c_int, c_void};
use std::sync::Arc;
use std::time::Duration;

use tch::Tensor;

use super::board::Board;
use super::sockets;
use super::{CommError, Communicator, Copied, Pending};
use crate::error::{TorchError, check};
use crate::ffi::{
    RawBoard, RawBytes, RawError, dyad_gloo_abort, dyad_gloo_all_gather, dyad_gloo_all_reduce,
    dyad_gloo_barrier, dyad_gloo_broadcast, dyad_gloo_free, dyad_gloo_new, dyad_store_free, dyad_store_new,
    dyad_work_free, dyad_work_wait,
};

/// Timeout of a collective: in effect none, because a peer may compute or load for an hour. A dead peer is noticed at once by its
/// closed connection, and the coordinator notices a peer that hangs; both end the other ranks.
const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(7 * 24 * 3600);

/// Bytes of one collective. Larger tensors are split, so that one piece is on the wire while another waits for its peers: Gloo
/// sends a peer at most two segments of 1 MiB at a time, which with 5 ms of delay gives a third of a TCP stream's rate. Gloo also
/// works on a copy, whose size this limits.
const PIECE_BYTES: i64 = 4 << 20;

/// How long ranks wait for each other when they connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(120);

impl RawBytes {
    fn to_vec(&self) -> Vec<u8> {
        if self.len == 0 {
            return Vec::new();
        }
        // SAFETY: the caller lends `len` bytes for the duration of the call.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }.to_vec()
    }

    fn to_text(&self) -> String {
        String::from_utf8_lossy(&self.to_vec()).into_owned()
    }
}

type Shared = Arc<dyn Board>;

extern "C" fn post(board: *mut c_void, key: RawBytes, value: RawBytes) {
    // SAFETY: made by Store::new, freed by `free` only.
    let board = unsafe { &*board.cast::<Shared>() };
    board.post(&key.to_text(), value.to_vec());
}

extern "C" fn read(
    board: *mut c_void,
    key: RawBytes,
    patience_ms: i64,
    to: *mut c_void,
    deliver: extern "C" fn(*mut c_void, RawBytes),
) -> bool {
    // SAFETY: as above.
    let board = unsafe { &*board.cast::<Shared>() };
    let patience = Duration::from_millis(u64::try_from(patience_ms).unwrap_or_default());
    let Some(value) = board.read(&key.to_text(), patience) else { return false };
    deliver(to, RawBytes { data: value.as_ptr(), len: value.len() });
    true
}

extern "C" fn free(board: *mut c_void) {
    // SAFETY: made by Store::new; the bridge calls this once, after the last reference to the store is gone.
    drop(unsafe { Box::from_raw(board.cast::<Shared>()) });
}

/// A board as the store that Gloo takes.
struct Store(*mut c_void);

impl Store {
    fn new(board: Shared) -> Result<Self, CommError> {
        let board = Box::into_raw(Box::new(board)).cast();
        let calls = RawBoard { board, post, read, free };
        let mut store = std::ptr::null_mut();
        // SAFETY: the bridge copies `calls` and frees the board with the store; the out-pointer lives across the call.
        let made =
            unsafe { dyad_store_new(&raw const calls, CONNECT_TIMEOUT.as_millis() as i64, &raw mut store) };
        checked("creating the rendezvous store", made)?;
        Ok(Self(store))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: made by dyad_store_new, freed here only.
        unsafe { dyad_store_free(self.0) }
    }
}

/// This rank and how it connects to the others.
#[derive(Clone, Debug)]
pub struct GlooOptions {
    /// Separates the keys of this generation from those of earlier ones.
    pub generation: u64,
    /// Address of this host that peers can reach.
    pub interface_host: String,
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
}

/// A Gloo communicator.
#[derive(Debug)]
pub struct Gloo {
    raw: *mut c_void,
    rank: usize,
    world_size: usize,
}

// SAFETY: ProcessGroupGloo queues work under its own mutex and abort only closes sockets; TRN-C1 keeps issuing to one thread.
unsafe impl Send for Gloo {}
// SAFETY: as above.
unsafe impl Sync for Gloo {}

impl Gloo {
    /// Connects to all other ranks; blocks until they are connected or the timeout passes.
    pub fn connect(board: Arc<dyn Board>, options: &GlooOptions) -> Result<Self, CommError> {
        let operation = "connecting the ranks";
        let store = Store::new(board)?;
        let (before, mut open_ports) = (sockets::own(), 0);
        let prefix = c_string(&format!("generation-{}", options.generation), operation)?;
        let host = c_string(&options.interface_host, operation)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a live store, two NUL-terminated strings and an out-pointer.
        let result = unsafe {
            dyad_gloo_new(
                store.0,
                prefix.as_ptr(),
                host.as_ptr(),
                options.rank as c_int,
                options.world_size as c_int,
                COLLECTIVE_TIMEOUT.as_millis() as i64,
                &raw mut open_ports,
                &raw mut raw,
            )
        };
        checked(operation, result)?;
        if open_ports > 0 {
            tracing::warn!(open_ports, "this kernel has no socket filters: the ports of the ranks stay open");
        }
        let connected = Self { raw, rank: options.rank, world_size: options.world_size };
        match sockets::of_another_user(&before) {
            None => Ok(connected),
            Some(user) => Err(CommError {
                operation,
                reason: format!("a process of user id {user} connected in place of a rank"),
            }),
        }
    }

    fn start(
        &self,
        operation: &'static str,
        call: impl FnOnce(*mut c_void, *mut *mut c_void) -> RawError,
    ) -> Result<Box<dyn Pending>, CommError> {
        let mut work = std::ptr::null_mut();
        checked(operation, call(self.raw, &raw mut work))?;
        Ok(Box::new(GlooWork { raw: work, operation }))
    }
}

impl Drop for Gloo {
    fn drop(&mut self) {
        // SAFETY: made by dyad_gloo_new, freed here only.
        unsafe { dyad_gloo_free(self.raw) }
    }
}

impl Communicator for Gloo {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn piece_bytes(&self) -> Option<i64> {
        Some(PIECE_BYTES)
    }

    fn all_reduce(&self, tensor: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        let flat = tensor.view([-1]);
        in_pieces(flat.size()[0], values_of_a_piece(&flat), |from, count| {
            let piece = flat.narrow(0, from, count);
            // SAFETY: group and tensor are live; c10d keeps its own reference to the tensor until the work ends.
            self.start("all_reduce", |group, work| unsafe {
                dyad_gloo_all_reduce(group, piece.as_ptr(), work)
            })
        })
    }

    /// An all-reduce of the whole input, from which each rank keeps its slice.
    fn reduce_scatter(&self, output: &Tensor, input: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        let (pending, len) = (self.all_reduce(input)?, output.size()[0]);
        let own = input.narrow(0, self.rank as i64 * len, len);
        if own.data_ptr() == output.data_ptr() {
            return Ok(pending);
        }
        Ok(Box::new(Copied { pending, from: own, to: output.shallow_clone() }))
    }

    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Box<dyn Pending>, CommError> {
        let most = values_of_a_piece(input) / self.world_size as i64;
        in_pieces(input.size()[0], most.max(1), |from, count| {
            // SAFETY: as above.
            self.start("all_gather", |group, work| unsafe {
                dyad_gloo_all_gather(group, output.as_ptr(), input.as_ptr(), from, count, work)
            })
        })
    }

    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Box<dyn Pending>, CommError> {
        // SAFETY: as in all_reduce.
        self.start("broadcast", |group, work| unsafe {
            dyad_gloo_broadcast(group, tensor.as_ptr(), root as c_int, work)
        })
    }

    fn barrier(&self) -> Result<(), CommError> {
        // SAFETY: the group is live.
        self.start("barrier", |group, work| unsafe { dyad_gloo_barrier(group, work) })?.wait()
    }

    fn abort(&self) {
        // SAFETY: the group is live; its connections may be closed while a collective is in flight.
        if let Err(error) = check(unsafe { dyad_gloo_abort(self.raw) }) {
            tracing::warn!(%error, "gloo could not close its connections");
        }
    }
}

fn values_of_a_piece(tensor: &Tensor) -> i64 {
    PIECE_BYTES / tensor.kind().elt_size_in_bytes() as i64
}

/// Starts a collective for each piece of at most `most` values; `start` takes the offset and length of a piece.
fn in_pieces(
    values: i64,
    most: i64,
    start: impl Fn(i64, i64) -> Result<Box<dyn Pending>, CommError>,
) -> Result<Box<dyn Pending>, CommError> {
    if values <= most {
        return start(0, values);
    }
    let pieces = (0..values).step_by(most as usize).map(|from| start(from, most.min(values - from)));
    Ok(Box::new(Together(pieces.collect::<Result<_, _>>()?)))
}

/// Several collectives with one `wait`.
struct Together(Vec<Box<dyn Pending>>);

impl Pending for Together {
    fn wait(self: Box<Self>) -> Result<(), CommError> {
        self.0.into_iter().try_for_each(Pending::wait)
    }
}

struct GlooWork {
    raw: *mut c_void,
    operation: &'static str,
}

impl Pending for GlooWork {
    fn wait(self: Box<Self>) -> Result<(), CommError> {
        // SAFETY: made by a dyad_gloo_* call, freed by Drop only.
        checked(self.operation, unsafe { dyad_work_wait(self.raw) })
    }
}

impl Drop for GlooWork {
    fn drop(&mut self) {
        // SAFETY: as in wait.
        unsafe { dyad_work_free(self.raw) }
    }
}

fn checked(operation: &'static str, raw: RawError) -> Result<(), CommError> {
    check(raw).map_err(|TorchError(reason)| CommError { operation, reason: first_line(&reason) })
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

fn c_string(text: &str, operation: &'static str) -> Result<CString, CommError> {
    CString::new(text).map_err(|error| CommError { operation, reason: error.to_string() })
}
