//! Turns panics into errors, in one place: tch panics when a libtorch operation fails. The panic's payload is a text and nothing else, so
//! libtorch's errors are told from other panics, and memory that ran out from other errors, by its words.

use std::panic::{AssertUnwindSafe, catch_unwind};

use dyad_proto::Fault;

/// Logs panics at debug level only, because [`caught`] reports them as errors.
pub fn silence() {
    std::panic::set_hook(Box::new(|info| tracing::debug!("{info}")));
}

/// Runs `body` and returns a panic inside it as a [`Fault`].
pub fn caught<T>(body: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    // Unwind safety: the program does not use the values that `body` changed after an error.
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        Err(fault(text.or(payload.downcast_ref::<&str>().copied()).unwrap_or("unknown panic")))
    })
}

fn fault(panic: &str) -> Fault {
    let torch = panic.split_once("Torch(\"").map(|(_, rest)| rest);
    let text = torch.unwrap_or(panic);
    // The first line is the message; the rest is libtorch's C++ backtrace.
    let line = text.split("\\n").next().unwrap_or(text).lines().next().unwrap_or_default();
    let line = line.trim_end_matches("\")");
    if text.contains("out of memory") || text.contains("can't allocate memory") {
        return Fault::failed(format!("out of memory: {line}"))
            .hint("lower micro_batch_tokens or max_seq_length, set zero_stage or optim = \"adamw_8bit\" (docs/memory.md), or use lora = true");
    }
    let origin = if torch.is_some() { "libtorch" } else { "internal error" };
    Fault::failed(format!("{origin}: {line}"))
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    #[test]
    fn libtorch_errors_are_reported_in_one_line() {
        let result = caught(|| {
            let x = Tensor::ones([2, 3], (Kind::Float, Device::Cpu));
            Ok(x.matmul(&x))
        });
        let message = result.unwrap_err().message;
        assert!(message.starts_with("libtorch: mat1 and mat2 shapes cannot be multiplied"), "{message}");
        assert!(!message.contains('\n') && !message.contains("\\n"), "{message}");
    }

    #[test]
    fn running_out_of_memory_says_what_to_lower() {
        let fault = fault(
            "called `Result::unwrap()` on an `Err` value: Torch(\"CUDA out of memory. Tried to allocate 2 GiB\\nx\")",
        );
        assert_eq!(fault.message, "out of memory: CUDA out of memory. Tried to allocate 2 GiB");
        assert!(fault.hint.contains("micro_batch_tokens"));
    }
}
