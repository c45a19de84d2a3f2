//! Chooses the attention kernel by precision, head width and GPU generation, and logs the choice at the start.

use dyad_proto::Fault;
use tch::{Device, Kind};

use crate::place::Place;

/// A kernel for attention over packed segments on devices other than the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// FlashAttention-2, one call for all runs of a micro-batch.
    Flash,
    /// The memory-efficient kernel (CUTLASS), one call for all runs; key heads are copied, one for each query head.
    Efficient,
    /// One call per segment and branch, with a mask for branches.
    Segments,
}

impl Kernel {
    /// Name in logs and profiles.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Flash => "flash, all segments in one call",
            Self::Efficient => "memory-efficient, all segments in one call",
            Self::Segments => "a call per segment",
        }
    }
}

/// Compute capability of a GPU, e.g. (9, 0) for Hopper.
pub type Capability = (i32, i32);

/// The best kernel for this precision, head width and GPU. The conditions are those of libtorch 2.11's kernels.
#[must_use]
pub fn choose(kind: Kind, head_dim: i64, capability: Capability) -> Kernel {
    let ampere = capability >= (8, 0);
    let half = matches!(kind, Kind::BFloat16 | Kind::Half);
    // FlashAttention has no backward pass for these widths on generations with less shared memory.
    let narrow = matches!(capability, (8, 6..=9) | (12, _)) && (193..=224).contains(&head_dim);
    if half && ampere && head_dim % 8 == 0 && head_dim <= 256 && !narrow {
        return Kernel::Flash;
    }
    let bytes = head_dim * kind.elt_size_in_bytes() as i64;
    let serves = matches!(kind, Kind::Float | Kind::Half) || kind == Kind::BFloat16 && ampere;
    if serves && bytes % 16 == 0 && capability >= (5, 0) { Kernel::Efficient } else { Kernel::Segments }
}

/// Result of [`judge`], before the first step of a run.
#[derive(Clone, Debug, PartialEq)]
pub enum KernelNotice {
    /// The fast kernel for this precision.
    Fine(Kernel),
    /// A slow kernel, and the reason.
    Slow(Kernel, String),
}

/// Checks the chosen kernel before anything is computed. Fails if the GPU has no bfloat16; gives the reason for a slow kernel.
pub fn judge(kind: Kind, head_dim: i64, capability: Capability) -> Result<KernelNotice, Fault> {
    let kernel = choose(kind, head_dim, capability);
    let (major, minor) = capability;
    match (kind, kernel) {
        (Kind::BFloat16, _) if capability < (8, 0) => {
            Err(Fault::input(format!("this GPU (compute capability {major}.{minor}) has no bfloat16"))
                .hint("set dtype = \"float32\", or use a GPU of compute capability 8.0 or newer (A100, H100, RTX 30 and later)"))
        }
        (Kind::BFloat16 | Kind::Half, Kernel::Efficient | Kernel::Segments) => Ok(KernelNotice::Slow(
            kernel,
            format!(
                "FlashAttention does not take heads of width {head_dim} on compute capability {major}.{minor}; \
                 it takes multiples of 8 up to 256"
            ),
        )),
        (_, Kernel::Segments) => {
            Ok(KernelNotice::Slow(kernel, format!("no variable-length kernel takes heads of width {head_dim}")))
        }
        _ => Ok(KernelNotice::Fine(kernel)),
    }
}

/// Logs which kernel the passes will use, with a warning if it is slow; logs nothing on the CPU.
pub fn announce(head_dim: i64, place: Place) -> Result<(), Fault> {
    let Device::Cuda(index) = place.device else { return Ok(()) };
    let capability = crate::gpu::capability(index)?;
    match judge(place.kind, head_dim, capability)? {
        KernelNotice::Fine(kernel) => tracing::info!(kernel = kernel.name(), ?capability, "attention"),
        KernelNotice::Slow(kernel, why) => {
            tracing::warn!(kernel = kernel.name(), ?capability, "slow attention: {why}")
        }
    }
    Ok(())
}

/// The kernel for tensors of this kind and head width on a device.
#[must_use]
pub fn kernel_on(device: Device, kind: Kind, head_dim: i64) -> Kernel {
    // `announce` has already failed for a GPU of unknown generation. Only tests pass the CPU.
    let capability = match device {
        Device::Cuda(index) => crate::gpu::capability(index).unwrap_or_default(),
        _ => (9, 0),
    };
    choose(kind, head_dim, capability)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A100: Capability = (8, 0);
    const RTX_4090: Capability = (8, 9);
    const H100: Capability = (9, 0);
    const T4: Capability = (7, 5);

    #[test]
    fn bfloat16_takes_flash_wherever_it_can() {
        for (head_dim, capability) in
            [(64, A100), (128, H100), (256, H100), (80, RTX_4090), (256, RTX_4090), (128, (12, 0))]
        {
            assert_eq!(
                choose(Kind::BFloat16, head_dim, capability),
                Kernel::Flash,
                "{head_dim} {capability:?}"
            );
        }
    }

    #[test]
    fn inputs_that_flash_refuses_take_the_next_best_kernel() {
        assert_eq!(choose(Kind::Float, 128, H100), Kernel::Efficient);
        assert_eq!(choose(Kind::BFloat16, 264, H100), Kernel::Efficient);
        assert_eq!(choose(Kind::BFloat16, 200, RTX_4090), Kernel::Efficient);
        assert_eq!(choose(Kind::Half, 64, T4), Kernel::Efficient);
        assert_eq!(choose(Kind::BFloat16, 100, H100), Kernel::Segments);
        assert_eq!(choose(Kind::Float, 6, H100), Kernel::Segments);
        assert_eq!(choose(Kind::Double, 64, H100), Kernel::Segments);
    }

    #[test]
    fn slow_kernels_give_a_reason_and_missing_precisions_fail() {
        assert_eq!(judge(Kind::BFloat16, 128, H100).unwrap(), KernelNotice::Fine(Kernel::Flash));
        assert_eq!(judge(Kind::Float, 64, T4).unwrap(), KernelNotice::Fine(Kernel::Efficient));
        let KernelNotice::Slow(Kernel::Segments, why) = judge(Kind::BFloat16, 100, H100).unwrap() else {
            panic!()
        };
        assert!(why.contains("heads of width 100 on compute capability 9.0"), "{why}");
        let fault = judge(Kind::BFloat16, 128, T4).unwrap_err();
        assert!(fault.message.contains("7.5") && fault.hint.contains("float32"));
    }
}
