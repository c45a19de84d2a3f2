//! Reductions that send values in a narrower kind than they are stored in.
//!
//! Each rank's addend and each addition is rounded: with `N` ranks `2 N - 1` times, in bfloat16 by at most 1 part in 512 each. torch's
//! `bf16_compress_hook` does the same. Every rank gets the same sum.

use dyad_proto::run_config::ReduceDtype;
use tch::{Kind, Tensor};

use super::{CommError, Communicator, Copied, Pending};

/// libtorch's kind for a configured dtype.
#[must_use]
pub fn kind(dtype: ReduceDtype) -> Kind {
    match dtype {
        ReduceDtype::Float32 => Kind::Float,
        ReduceDtype::Bfloat16 => Kind::BFloat16,
    }
}

/// Sums `tensor` over all ranks, in place; values are sent as `kind`.
pub fn all_reduce(
    comm: &dyn Communicator,
    kind: Kind,
    tensor: &Tensor,
) -> Result<Box<dyn Pending>, CommError> {
    if tensor.kind() == kind {
        return comm.all_reduce(tensor);
    }
    let travels = tensor.to_kind(kind);
    let pending = comm.all_reduce(&travels)?;
    Ok(Box::new(Copied { pending, from: travels, to: tensor.shallow_clone() }))
}

/// Sums `input` over all ranks and leaves this rank's slice in `output`, as [`Communicator::reduce_scatter`]; values are sent as `kind`.
pub fn reduce_scatter(
    comm: &dyn Communicator,
    kind: Kind,
    output: &Tensor,
    input: &Tensor,
) -> Result<Box<dyn Pending>, CommError> {
    if input.kind() == kind {
        return comm.reduce_scatter(output, input);
    }
    let travels = input.to_kind(kind);
    let len = output.size()[0];
    let own = travels.narrow(0, comm.rank() as i64 * len, len);
    let pending = comm.reduce_scatter(&own, &travels)?;
    Ok(Box::new(Copied { pending, from: own, to: output.shallow_clone() }))
}
