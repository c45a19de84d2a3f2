//! Work of a run: pairs, passes and their FLOPs.

use dyad_families::shape::{GPU_TILE_BYTES, PairTokens, PassWork, Shape, TILE_BYTES};

use super::machine::{ATTENTION_BACKWARD, DeviceSpec, Interconnect};

/// Trained parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// All weights.
    Full,
    /// Adapters of this rank on all linear layers.
    Lora(f64),
}

/// Where reference log-probabilities come from; the names of `reference_logps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReferenceSource {
    /// There is none: supervised fine-tuning.
    None,
    /// Every step runs the reference model.
    Compute,
    /// The first epoch runs the reference model; later epochs reuse its log-probabilities.
    Cache,
    /// The reference model runs before the first step and is then freed.
    Precompute,
}

/// A run to predict.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Model.
    pub shape: Shape,
    /// One GPU.
    pub machine: DeviceSpec,
    /// Total number of GPUs.
    pub gpus: f64,
    /// GPUs per node.
    pub gpus_per_node: f64,
    /// Network between nodes.
    pub network: Interconnect,
    /// Mean lengths of a pair.
    pub pair: PairTokens,
    /// The prompt is computed once for both outputs.
    pub sharing: bool,
    /// Pairs per optimizer step, over all GPUs.
    pub batch: f64,
    /// Maximum number of tokens of a micro-batch.
    pub micro_batch_tokens: f64,
    /// Trained parameters.
    pub method: Method,
    /// ZeRO stage: 1 shards optimizer states, 2 gradients as well, 3 weights as well.
    pub zero: u8,
    /// Bytes of a gradient value.
    pub gradient_bytes: f64,
    /// Bytes of a gradient value when it is sent to other ranks.
    pub travelling_bytes: f64,
    /// Bytes of AdamW's two moments per trained value.
    pub moment_bytes: f64,
    /// Master weights and moments are in host memory.
    pub offload_optimizer: bool,
    /// The reference model is in host memory.
    pub offload_reference: bool,
    /// The reference model follows the policy, so it has weights of its own.
    pub moves_reference: bool,
    /// Layers are recomputed in the backward pass.
    pub checkpointing: bool,
    /// Whether the embedding is trained whole beside adapters.
    pub saves_embedding: bool,
    /// Whether the head is.
    pub saves_head: bool,
    /// Where reference log-probabilities come from.
    pub reference: ReferenceSource,
}

impl Setup {
    /// Number of nodes.
    #[must_use]
    pub fn nodes(&self) -> f64 {
        self.gpus / self.gpus_per_node
    }

    /// Work of a forward pass over a pair.
    pub(crate) fn pass(&self, sharing: bool) -> PassWork {
        if sharing { self.pair.shared() } else { self.pair.separate() }
    }

    /// Tokens of a pair that go through the layers.
    #[must_use]
    pub fn tokens(&self) -> f64 {
        self.pass(self.sharing).tokens
    }

    /// Pairs per step of the rank with the most pairs; the others wait for it.
    #[must_use]
    pub fn pairs_per_rank(&self) -> f64 {
        (self.batch / self.gpus).ceil()
    }

    /// Micro-batches of a step.
    #[must_use]
    pub fn micro_batches(&self) -> f64 {
        let pairs = (self.micro_batch_tokens / self.tokens()).floor().max(1.0);
        (self.pairs_per_rank() / pairs).ceil()
    }

    /// Maximum number of pairs of a micro-batch.
    #[must_use]
    pub fn pairs_per_micro_batch(&self) -> f64 {
        (self.pairs_per_rank() / self.micro_batches()).ceil()
    }

    /// Bytes of a weight or activation in the passes.
    #[must_use]
    pub fn compute_bytes(&self) -> f64 {
        if self.machine.gpu { 2.0 } else { 4.0 }
    }

    /// Number of trained values.
    #[must_use]
    pub fn trained(&self) -> f64 {
        match self.method {
            Method::Full => self.shape.parameters(),
            Method::Lora(r) => {
                let matrices = f64::from(u8::from(self.saves_embedding) + u8::from(self.saves_head));
                self.shape.adapters(r) + matrices * self.shape.head()
            }
        }
    }

    /// FLOPs of the adapters' forward pass over a pair.
    #[must_use]
    pub fn adapter_flops(&self) -> f64 {
        match self.method {
            Method::Full => 0.0,
            Method::Lora(r) => 2.0 * self.shape.adapters(r) * self.tokens(),
        }
    }

    /// Whether gradients are sent as rounded copies.
    #[must_use]
    pub fn rounds_gradients(&self) -> bool {
        self.gpus > 1.0 && self.travelling_bytes < self.gradient_bytes
    }

    /// Products of a backward pass, as a multiple of a forward pass; frozen weights need no weight gradient.
    #[must_use]
    pub fn backward_passes(&self) -> f64 {
        if self.method == Method::Full { 2.0 } else { 1.0 }
    }

    /// Maximum bytes of one tile of logits.
    #[must_use]
    pub fn tile_bytes(&self) -> f64 {
        (if self.machine.gpu { GPU_TILE_BYTES } else { TILE_BYTES }) as f64
    }

    /// Products with the head: logits, the input's gradient, for a trained head its own gradient, and the logits again if a pair exceeds a
    /// tile.
    #[must_use]
    pub fn head_passes(&self) -> f64 {
        let tile_rows = (self.tile_bytes() / (self.compute_bytes() * self.shape.vocab)).floor().max(1.0);
        match self.method {
            Method::Lora(_) => 2.0,
            Method::Full if self.pair.rows() > tile_rows => 4.0,
            Method::Full => 3.0,
        }
    }

    /// FLOPs that are executed for a pair; `reference` counts the reference model's pass.
    #[must_use]
    pub fn executed(&self, reference: bool) -> f64 {
        let pass = self.shape.forward(self.pass(self.sharing));
        let extra = f64::from(u8::from(self.checkpointing));
        let adapters = self.adapter_flops() * (3.0 + extra);
        let policy = pass.layers * (1.0 + self.backward_passes() + extra)
            + pass.head * self.head_passes()
            + pass.attention * (1.0 + ATTENTION_BACKWARD + extra);
        policy + adapters + if reference { pass.total() } else { 0.0 }
    }

    /// FLOPs of a pair's forward and backward pass, without prefix sharing, recomputation and reference model.
    #[must_use]
    pub fn model_flops(&self) -> f64 {
        (1.0 + self.backward_passes()) * self.shape.forward(self.pass(false)).total()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// TFLOP of an 8B model per pair, computed independently and rounded to three digits. Tolerance 1.5 %.
    #[test]
    fn flops_of_known_workloads() {
        let shape = crate::predict::shapes::find("8B").unwrap();
        for (prompt, output, unshared, shared, trained) in [
            (140.0, 330.0, 13.9, 12.0, 35.9),
            (130.0, 60.0, 5.5, 3.6, 10.9),
            (1100.0, 350.0, 42.3, 26.7, 79.9),
            (620.0, 90.0, 20.3, 11.5, 34.6),
            (2048.0, 256.0, 67.6, 38.0, 114.0),
        ] {
            let pair = PairTokens { prompt, chosen: output, rejected: output };
            let tera = |work| shape.forward(work).total() / 1e12;
            let (separate, once) = (tera(pair.separate()), tera(pair.shared()));
            for (found, expected) in [(separate, unshared), (once, shared), (3.0 * once, trained)] {
                assert!((found / expected - 1.0).abs() < 0.015, "{prompt}: {found} against {expected}");
            }
        }
    }
}
