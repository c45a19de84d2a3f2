//! How a run's end reaches this trainer from the coordinator, and how the process then ends: the collectives that other threads wait in
//! are aborted, the reason is told, and nothing is waited for.

use std::sync::PoisonError;

use dyad_proto::wire::Abort;
use dyad_proto::{ErrorCode, Fault};
use tonic::Code;

use super::{Handle, LAST_SPANS};
use crate::observe::trace;

/// Why this trainer stops, and how its call ends. `welcome`: it takes part in the run already.
pub(super) fn reason(abort: Abort, welcome: bool) -> (Fault, Code) {
    let echo = |reason: String| Fault::new(ErrorCode::Echo, reason);
    let cause = abort.cause.map_or_else(|| echo("stopped by the coordinator".into()), Fault::from);
    // A run that is stopped on request breaks no call.
    let code = if cause.code == ErrorCode::Interrupted { Code::Ok } else { Code::Aborted };
    // Turned away at the door, the cause is this trainer's own; a stop that was asked for is everybody's.
    let others = welcome && cause.code != ErrorCode::Interrupted;
    (if others { echo(cause.to_string()) } else { cause }, code)
}

/// TRN-S2, with what is to be said of the call. `_exit`, because libtorch's threads may be anywhere and destructors would wait for them.
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
    // SAFETY: ends the process; nothing of ours needs flushing any more.
    unsafe { libc::_exit(i32::from(fault.code.exit_status())) }
}
