//! Safe interface to libtorch's profiler (`cpp/torch/profile.cpp`).
#![expect(unsafe_code, reason = "foreign functions of the bridge")]

use std::ffi::{CStr, CString, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{TorchError, check};
use crate::ffi::{RawEvent, dyad_profile_start, dyad_profile_stop, dyad_span_begin, dyad_span_end};

/// One event of the profiler.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProfilerEvent {
    /// Name of the operator (`aten::mm`), span or kernel.
    pub name: String,
    /// Id of the thread on which it started.
    pub thread: u64,
    /// Start in nanoseconds, on the profiler's clock.
    pub start_ns: u64,
    /// Duration in nanoseconds.
    pub duration_ns: u64,
    /// Allocated (positive) or freed (negative) bytes of a `[memory]` event.
    pub bytes: i64,
    /// Shape of each input; empty if the input is not a tensor.
    pub shapes: Vec<Vec<i64>>,
    /// Kind of each input in C++ terms, e.g. `float`.
    pub kinds: Vec<String>,
    /// Whether it is a [`Span`] and not an operator.
    pub is_span: bool,
    /// Whether it ran on an accelerator and not on the host.
    pub on_device: bool,
}

/// Starts to record this thread; with `cuda` also the GPU, with `memory` also every allocation.
pub fn start(cuda: bool, memory: bool) -> Result<(), TorchError> {
    // SAFETY: takes two flags.
    unsafe { check(dyad_profile_start(cuda, memory)) }
}

/// Stops recording, writes a Chrome trace if a path is given, and returns every event.
pub fn stop(trace: Option<&Path>) -> Result<Vec<ProfilerEvent>, TorchError> {
    let path = trace.map(|path| CString::new(path.as_os_str().as_bytes())).transpose();
    let path = path.map_err(|_| TorchError("a path cannot hold a NUL byte".into()))?;
    let mut events: Vec<ProfilerEvent> = Vec::new();
    // SAFETY: the path is null or NUL-terminated; the bridge passes the vector to the sink only, and it outlives the call.
    unsafe {
        let path = path.as_ref().map_or(std::ptr::null(), |path| path.as_ptr());
        check(dyad_profile_stop(path, take, (&raw mut events).cast()))?;
    }
    Ok(events)
}

extern "C" fn take(context: *mut c_void, event: *const RawEvent) {
    // SAFETY: `context` is the vector of `stop`; the bridge passes a live event with NUL-terminated strings and `n_shapes` sizes.
    unsafe {
        let events = &mut *context.cast::<Vec<ProfilerEvent>>();
        let raw = &*event;
        let text = |pointer| CStr::from_ptr(pointer).to_string_lossy().into_owned();
        let sizes = match raw.n_shapes {
            0 => &[],
            count => std::slice::from_raw_parts(raw.shapes, count),
        };
        events.push(ProfilerEvent {
            name: text(raw.name),
            thread: raw.thread,
            start_ns: raw.start_ns,
            duration_ns: raw.duration_ns,
            bytes: raw.bytes,
            shapes: unpacked(sizes),
            kinds: text(raw.kinds).lines().map(str::to_owned).collect(),
            is_span: raw.is_span,
            on_device: raw.on_device,
        });
    }
}

/// Splits `[rank, sizes…, rank, sizes…]` into shapes.
fn unpacked(mut sizes: &[i64]) -> Vec<Vec<i64>> {
    let mut shapes = Vec::new();
    while let Some((&rank, rest)) = sizes.split_first() {
        let (shape, rest) = rest.split_at((rank.max(0) as usize).min(rest.len()));
        shapes.push(shape.to_vec());
        sizes = rest;
    }
    shapes
}

/// A named part of the program, which the profiler records from `enter` until drop.
#[derive(Debug)]
pub struct Span(*mut c_void);

impl Span {
    /// Begins the span on this thread.
    #[must_use]
    pub fn enter(name: &str) -> Self {
        // SAFETY: pointer and length are of a live string, which the bridge copies.
        Self(unsafe { dyad_span_begin(name.as_ptr().cast(), name.len()) })
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        // SAFETY: made by `enter`, ended here only.
        unsafe { dyad_span_end(self.0) }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    /// One test for everything, because a process has only one profiler.
    #[test]
    fn operators_spans_shapes_and_allocations_are_recorded() {
        let x = Tensor::ones([30, 20], (Kind::Float, Device::Cpu));
        start(false, true).unwrap();
        {
            let _span = Span::enter("part");
            let _ = x.matmul(&x.tr());
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        let events = stop(Some(&path)).unwrap();
        let find =
            |name: &str| events.iter().find(|event| event.name == name).unwrap_or_else(|| panic!("{name}"));
        let (part, product) = (find("part"), find("aten::mm"));
        assert!(part.is_span && !product.is_span && !product.on_device);
        assert_eq!(product.shapes, [[30, 20], [20, 30]]);
        assert_eq!(product.kinds, ["float", "float"]);
        assert!(part.start_ns <= product.start_ns && product.duration_ns <= part.duration_ns);
        assert!(events.iter().any(|event| event.name == "[memory]" && event.bytes == 30 * 30 * 4));
        let trace: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert!(trace["traceEvents"].as_array().unwrap().iter().any(|event| event["name"] == "aten::mm"));
    }

    #[test]
    fn shapes_are_unpacked() {
        assert_eq!(unpacked(&[2, 30, 20, 0, 1, 7]), vec![vec![30, 20], vec![], vec![7]]);
        assert!(unpacked(&[]).is_empty());
    }
}
