//! Memory that a pass keeps for its backward pass, and how many layers can keep theirs.

use dyad_families::Activation;
use dyad_families::shape::{GPU_TILE_BYTES, MOST_TILES, Shape, TILE_BYTES};
use dyad_proto::run_config::ActivationCheckpointing;
use tch::Device;

use dyad_families::ModelConfig;
use dyad_torch::backend::has_gpu_kernels;
use dyad_torch::device::cuda_free_bytes;
use dyad_torch::place::Place;

/// Share of the free memory that activations may take; the rest is for memory that is not counted here.
const SHARE: f64 = 0.8;
/// Bytes of the head's tiles of logits on the CPU.
const HEAD_BYTES: u64 = MOST_TILES * TILE_BYTES;
/// The same on a GPU.
const GPU_HEAD_BYTES: u64 = MOST_TILES * GPU_TILE_BYTES;

/// Bytes that one layer keeps and those that it needs temporarily; and bytes that the head needs once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerBytes {
    /// Everything between the layer's input and output, with its input.
    pub kept: u64,
    /// Its input alone.
    pub input: u64,
    /// Gradients at the widest moment of its backward pass.
    pub transient: u64,
    /// Tiles of logits.
    pub head: u64,
}

impl LayerBytes {
    /// Bytes of a layer for `tokens` tokens.
    #[must_use]
    pub fn new(config: &ModelConfig, place: Place, tokens: u64) -> Self {
        let (shape, on_gpu) = (Shape::from(config), place.device.is_cuda());
        let fused = config.activation == Activation::Silu && (!on_gpu || has_gpu_kernels(place.kind));
        // On a GPU attention keeps copies of keys and values.
        let values = shape.kept_values(on_gpu, fused) as u64;
        let token = tokens * place.kind.elt_size_in_bytes() as u64;
        Self {
            kept: token * values,
            input: token * shape.hidden as u64,
            transient: token * shape.transient_values() as u64,
            head: if on_gpu { GPU_HEAD_BYTES } else { HEAD_BYTES },
        }
    }
}

/// Number of layers, counted from the top, that keep their activations; the others recompute them in the backward pass. The top ones,
/// because the backward pass frees them first.
#[must_use]
pub fn kept_layers(
    mode: ActivationCheckpointing,
    layers: usize,
    layer: LayerBytes,
    free: Option<u64>,
) -> usize {
    match (mode, free) {
        (ActivationCheckpointing::Full, _) => 0,
        (ActivationCheckpointing::Selective, _) => layers / 2,
        (ActivationCheckpointing::None, _) | (ActivationCheckpointing::Auto, None) => layers,
        (ActivationCheckpointing::Auto, Some(free)) => {
            let budget = (free as f64 * SHARE) as u64;
            // The layer whose backward pass is running is always kept whole.
            let fixed = layer.head + layers as u64 * layer.input + layer.kept + layer.transient;
            let room = budget.saturating_sub(fixed);
            let more = (layer.kept - layer.input).max(1);
            layers.min((room / more) as usize)
        }
    }
}

/// Bytes that this rank may still allocate; `None` if the system does not report them.
#[must_use]
pub fn free_bytes(device: Device, ranks_here: u64) -> Option<u64> {
    match device {
        Device::Cuda(index) => cuda_free_bytes(index).ok(),
        _ => Some(dyad_proto::host_memory::free()? / ranks_here.max(1)),
    }
}

/// Ranks on this host, from torchrun's `LOCAL_WORLD_SIZE`; the world size if it is not set.
#[must_use]
pub fn ranks_here(world_size: usize) -> u64 {
    let told = std::env::var("LOCAL_WORLD_SIZE").ok().and_then(|text| text.parse().ok());
    told.unwrap_or(world_size as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYER: LayerBytes = LayerBytes { kept: 100 << 20, input: 10 << 20, transient: 0, head: HEAD_BYTES };

    #[test]
    fn auto_keeps_what_fits() {
        let kept = |free_mib: u64| kept_layers(ActivationCheckpointing::Auto, 8, LAYER, Some(free_mib << 20));
        assert_eq!(kept(100_000), 8);
        assert_eq!(kept(0), 0);
        // 0.8 * 1000 - 384 - 80 - 100 = 236 MiB for 90 MiB each.
        assert_eq!(kept(1000), 2);
        assert_eq!(kept_layers(ActivationCheckpointing::Auto, 8, LAYER, None), 8);
    }

    #[test]
    fn fixed_modes_ignore_free_memory() {
        let kept = |mode| kept_layers(mode, 5, LAYER, Some(0));
        assert_eq!(kept(ActivationCheckpointing::None), 5);
        assert_eq!(kept(ActivationCheckpointing::Selective), 2);
        assert_eq!(kept(ActivationCheckpointing::Full), 0);
    }

    #[test]
    fn free_bytes_divides_host_memory_between_ranks() {
        let free = || dyad_proto::host_memory::free().unwrap();
        let (before, found, after) = (free(), free_bytes(Device::Cpu, 2).unwrap(), free());
        // Other tests allocate and free memory meanwhile.
        assert!(found > before.min(after) / 2 / 10 * 8, "{found} of {before} bytes for two ranks");
        assert!(found < before.max(after) / 2 / 10 * 12, "{found} of {before} bytes for two ranks");
    }
}
