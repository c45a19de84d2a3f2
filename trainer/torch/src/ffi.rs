//! Declarations of every function of the C++ bridge (`cpp/`), and of every struct that is passed to it.
//!
//! `build/header.rs` makes a C header from this file, and the bridge includes it. So the C++ compiler rejects a definition whose
//! parameters differ from its declaration here, and both sides use the same structs.
//!
//! Functions that can fail return null on success, else a message that the caller frees. Tensor arguments are borrowed; a
//! `*mut *mut C_tensor` receives a new tensor that the caller owns. The requirements on arguments are documented at each definition.
#![expect(unsafe_code, reason = "foreign functions of the bridge")]

use std::ffi::{c_char, c_int, c_void};

use torch_sys::C_tensor;

/// Null on success, else a message that the caller frees.
pub(crate) type RawError = *mut c_char;

/// A linear layer. `bias`, `onto` (a tensor to add the result to), `a` and `b` (the adapter) may be null.
#[repr(C)]
pub(crate) struct RawLinear {
    pub(crate) weight: *const C_tensor,
    pub(crate) bias: *const C_tensor,
    pub(crate) onto: *const C_tensor,
    pub(crate) a: *const C_tensor,
    pub(crate) b: *const C_tensor,
    pub(crate) scale: f64,
}

/// Runs of queries and keys; see `Varlen`. Either all of `gather`, `starts` and `places` are null, or none is.
#[repr(C)]
pub(crate) struct RawRuns {
    pub(crate) queries: *const C_tensor,
    pub(crate) keys: *const C_tensor,
    pub(crate) gather: *const C_tensor,
    pub(crate) starts: *const C_tensor,
    pub(crate) places: *const C_tensor,
    pub(crate) max_queries: i64,
    pub(crate) max_keys: i64,
    pub(crate) pairs: f64,
}

/// One event of the profiler. Pointers are valid until the sink returns.
#[repr(C)]
pub(crate) struct RawEvent {
    pub(crate) name: *const c_char,
    pub(crate) thread: u64,
    pub(crate) start_ns: u64,
    pub(crate) duration_ns: u64,
    pub(crate) bytes: i64,
    pub(crate) shapes: *const i64,
    pub(crate) n_shapes: usize,
    pub(crate) kinds: *const c_char,
    pub(crate) is_span: bool,
    pub(crate) on_device: bool,
}

/// Bytes that are borrowed for the duration of a call.
#[repr(C)]
pub(crate) struct RawBytes {
    pub(crate) data: *const u8,
    pub(crate) len: usize,
}

/// A board (`comm/board.rs`) and the callbacks by which the bridge uses it.
#[repr(C)]
pub(crate) struct RawBoard {
    pub(crate) board: *mut c_void,
    pub(crate) post: extern "C" fn(*mut c_void, RawBytes, RawBytes),
    pub(crate) read:
        extern "C" fn(*mut c_void, RawBytes, i64, *mut c_void, extern "C" fn(*mut c_void, RawBytes)) -> bool,
    pub(crate) free: extern "C" fn(*mut c_void),
}

unsafe extern "C" {
    // cpp/torch/autograd.cpp
    pub(crate) fn dyad_autograd_grad(
        outputs: *const *const C_tensor,
        output_grads: *const *const C_tensor,
        n_outputs: usize,
        inputs: *const *const C_tensor,
        n_inputs: usize,
        sinks: *const *const C_tensor,
        gradients: *mut *mut C_tensor,
    ) -> RawError;
    pub(crate) fn dyad_fused_adamw(
        parameters: *const *const C_tensor,
        gradients: *const *const C_tensor,
        exp_avgs: *const *const C_tensor,
        exp_avg_sqs: *const *const C_tensor,
        steps: *const *const C_tensor,
        count: usize,
        divisor: *const C_tensor,
        hyper: *const f64,
    ) -> RawError;

    // cpp/torch/storage.cpp
    pub(crate) fn dyad_storage_bare(
        like: *const C_tensor,
        length: i64,
        tensor: *mut *mut C_tensor,
    ) -> RawError;
    pub(crate) fn dyad_storage_release(tensor: *const C_tensor) -> RawError;
    pub(crate) fn dyad_storage_allocate(tensor: *const C_tensor) -> RawError;

    // cpp/torch/profile.cpp
    pub(crate) fn dyad_profile_start(cuda: bool, memory: bool) -> RawError;
    pub(crate) fn dyad_profile_stop(
        path: *const c_char,
        sink: extern "C" fn(*mut c_void, *const RawEvent),
        context: *mut c_void,
    ) -> RawError;
    pub(crate) fn dyad_span_begin(name: *const c_char, length: usize) -> *mut c_void;
    pub(crate) fn dyad_span_end(span: *mut c_void);

    // cpp/cpu/{adamw,eight_bit}.cpp
    pub(crate) fn dyad_adamw(
        parameter: *const C_tensor,
        gradient: *const C_tensor,
        exp_avg: *const C_tensor,
        exp_avg_sq: *const C_tensor,
        published: *const C_tensor,
        clear: bool,
        hyper: *const f64,
    ) -> RawError;
    pub(crate) fn dyad_adamw_8bit(
        parameter: *const C_tensor,
        gradient: *const C_tensor,
        moments: *const *const C_tensor,
        hyper: *const f64,
    ) -> RawError;

    // cpp/cpu/kernels.cpp
    pub(crate) fn dyad_rms_norm(
        x: *const C_tensor,
        weight: *const C_tensor,
        eps: f64,
        y: *mut *mut C_tensor,
        residual: *mut *mut C_tensor,
    ) -> RawError;
    pub(crate) fn dyad_rotate(
        x: *const C_tensor,
        cos: *const C_tensor,
        sin: *const C_tensor,
        y: *mut *mut C_tensor,
    ) -> RawError;
    pub(crate) fn dyad_swiglu(gate: *const C_tensor, up: *const C_tensor, y: *mut *mut C_tensor) -> RawError;
    pub(crate) fn dyad_accumulate(total: *const C_tensor, part: *const C_tensor) -> RawError;
    pub(crate) fn dyad_kernel_threads(threads: *mut usize) -> RawError;
    #[cfg_attr(not(test), expect(dead_code, reason = "only tests ask which instruction set was chosen"))]
    pub(crate) fn dyad_kernel_lanes() -> i64;

    // cpp/cpu/{attention,head,linears,product}.cpp
    pub(crate) fn dyad_segmented_attention(
        query: *const C_tensor,
        key: *const C_tensor,
        value: *const C_tensor,
        layout: *const i64,
        count: usize,
        out: *mut *mut C_tensor,
    ) -> RawError;
    pub(crate) fn dyad_head_score(
        policy: *const C_tensor,
        reference: *const C_tensor,
        targets: *const C_tensor,
        logps: *const C_tensor,
        reference_logps: *const C_tensor,
        facts: *const C_tensor,
        keep: bool,
        gpu_path: bool,
    ) -> RawError;
    pub(crate) fn dyad_linears(
        x: *const C_tensor,
        linears: *const RawLinear,
        count: usize,
        own_products: bool,
        ys: *mut *mut C_tensor,
    ) -> RawError;
    pub(crate) fn dyad_add_outer_wide(
        sum: *const C_tensor,
        a: *const C_tensor,
        b: *const C_tensor,
        done: *mut bool,
    ) -> RawError;
    pub(crate) fn dyad_products_serve(bfloat16: bool) -> bool;
    pub(crate) fn dyad_product(a: *const C_tensor, b: *const C_tensor, y: *mut *mut C_tensor) -> RawError;
    pub(crate) fn dyad_add_outer(sum: *const C_tensor, a: *const C_tensor, b: *const C_tensor) -> RawError;

    // cpp/gpu/
    pub(crate) fn dyad_pinned(host: *const C_tensor, pinned: *mut *mut C_tensor) -> RawError;
    pub(crate) fn dyad_cuda_free_bytes(device: c_int, bytes: *mut i64) -> RawError;
    pub(crate) fn dyad_cuda_current_stream(device: c_int, stream: *mut *mut c_void) -> RawError;
    pub(crate) fn dyad_cuda_peak_bytes(device: c_int, bytes: *mut i64) -> RawError;
    pub(crate) fn dyad_rotate_half(
        x: *const C_tensor,
        cos: *const C_tensor,
        sin: *const C_tensor,
        y: *mut *mut C_tensor,
    ) -> RawError;
    pub(crate) fn dyad_varlen_attention(
        query: *const C_tensor,
        key: *const C_tensor,
        value: *const C_tensor,
        runs: *const RawRuns,
        kernel: i64,
        out: *mut *mut C_tensor,
    ) -> RawError;
    pub(crate) fn dyad_gpu_kernels(launcher: *mut c_void, handles: *const *mut c_void);
    pub(crate) fn dyad_gpu_kernels_ready() -> bool;
    pub(crate) fn dyad_gpu_swiglu(
        gate: *const C_tensor,
        up: *const C_tensor,
        y: *mut *mut C_tensor,
    ) -> RawError;
    pub(crate) fn dyad_gpu_rotate(
        x: *const C_tensor,
        cosines: *const C_tensor,
        sines: *const C_tensor,
        y: *mut *mut C_tensor,
    ) -> RawError;

    // cpp/comm/gloo.cpp
    pub(crate) fn dyad_store_new(
        board: *const RawBoard,
        timeout_ms: i64,
        store: *mut *mut c_void,
    ) -> RawError;
    pub(crate) fn dyad_store_free(store: *mut c_void);
    pub(crate) fn dyad_gloo_new(
        store: *mut c_void,
        prefix: *const c_char,
        interface_host: *const c_char,
        rank: c_int,
        world_size: c_int,
        timeout_ms: i64,
        open_ports: *mut c_int,
        group: *mut *mut c_void,
    ) -> RawError;
    pub(crate) fn dyad_gloo_abort(group: *mut c_void) -> RawError;
    pub(crate) fn dyad_gloo_free(group: *mut c_void);
    pub(crate) fn dyad_gloo_all_reduce(
        group: *mut c_void,
        tensor: *const C_tensor,
        work: *mut *mut c_void,
    ) -> RawError;
    pub(crate) fn dyad_gloo_all_gather(
        group: *mut c_void,
        output: *const C_tensor,
        input: *const C_tensor,
        from: i64,
        count: i64,
        work: *mut *mut c_void,
    ) -> RawError;
    pub(crate) fn dyad_gloo_broadcast(
        group: *mut c_void,
        tensor: *const C_tensor,
        root: c_int,
        work: *mut *mut c_void,
    ) -> RawError;
    pub(crate) fn dyad_gloo_barrier(group: *mut c_void, work: *mut *mut c_void) -> RawError;
    pub(crate) fn dyad_work_wait(work: *mut c_void) -> RawError;
    pub(crate) fn dyad_work_free(work: *mut c_void);

    // The C library.
    pub(crate) fn free(pointer: *mut c_void);
}
