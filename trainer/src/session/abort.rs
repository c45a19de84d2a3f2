//! Ends this process when the coordinator ends the run: aborts the collectives that other threads wait in, reports the reason, and exits
//! without waiting for other threads.

use std::sync::PoisonError;

use dyad_proto::wire::Abort;
use dyad_proto::{ErrorCode, Fault};
use tonic::Code;

use super::{Handle, LAST_SPANS};
use crate::observe::trace;

/// Why this trainer stops, and the gRPC status with which its call ends. `welcome`: it already takes part in the run.
pub(super) fn reason(abort: Abort, welcome: bool) -> (Fault, Code) {
    let echo = |reason: String| Fault::new(ErrorCode::Echo, reason);
    let cause = abort.cause.map_or_else(|| echo("stopped by the coordinator".into()), Fault::from);
    // A run that is stopped on request ends the call normally.
    let code = if cause.code == ErrorCode::Interrupted { Code::Ok } else { Code::Aborted };
    // Only another trainer's failure is an echo: a refused trainer is itself the cause, and a stop on request concerns all trainers.
    let others = welcome && cause.code != ErrorCode::Interrupted;
    (if others { echo(cause.to_string()) } else { cause }, code)
}

/// Ends the process (TRN-S2), and the call with `code`. Uses `_exit`, because destructors would wait for libtorch's threads, which may be
/// anywhere.
#[expect(unsafe_code, reason = "_exit")]
pub(super) fn leave(handle: &Handle, fault: &Fault, code: Code) -> ! {
    if let Some(communicator) =
        handle.shared.communicator.lock().unwrap_or_else(PoisonError::into_inner).take()
    {
        communicator.abort();
    }
    if fault.code == ErrorCode::Echo {
        tracing::info!(reason = %fault, "stopping");
    } else {
        dyad_telemetry::last_words(fault);
    }
    if let Some(spans) = dyad_telemetry::spans() {
        trace::fail(&fault.to_string());
        handle.end_call(code);
        spans.flush(LAST_SPANS);
    }
    dyad_telemetry::voice::stderr().flush(dyad_telemetry::voice::PATIENCE);
    // SAFETY: ends the process; this trainer has nothing left to flush.
    unsafe { libc::_exit(i32::from(fault.code.exit_status())) }
}
