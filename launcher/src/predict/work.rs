//! What is to be computed: pairs, passes and their FLOPs.

use dyad_families::shape::{GPU_TILE_BYTES, PairTokens, PassWork, Shape, TILE_BYTES};

use super::machine::{ATTENTION_BACKWARD, DeviceSpec, Interconnect};

/// What is trained.
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
    /// The first epoch runs the reference model, later ones reuse what it said.
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
    /// GPUs in all.
    pub gpus: f64,
    /// GPUs per node.
    pub gpus_per_node: f64,
    /// Between nodes.
    pub network: Interconnect,
    /// Mean pair.
    pub pair: PairTokens,
    /// The prompt is computed once for both outputs.
    pub sharing: bool,
    /// Pairs per optimizer step, over all GPUs.
    pub batch: f64,
    /// Most tokens computed at once.
    pub micro_batch_tokens: f64,
    /// What is trained.
    pub method: Method,
    /// ZeRO stage: 1 shards optimizer states, 2 gradients as well, 3 weights as well.
    pub zero: u8,
    /// Bytes of a gradient value.
    pub gradient_bytes: f64,
    /// Bytes of it on its way to other ranks.
    pub travelling_bytes: f64,
    /// Bytes of AdamW's two moments of a value.
    pub moment_bytes: f64,
    /// Masters and moments are on the host.
    pub offload_optimizer: bool,
    /// The reference model is on the host.
    pub offload_reference: bool,
    /// Layers are computed again in the backward pass.
    pub checkpointing: bool,
    /// Where reference log-probabilities come from.
    pub reference: ReferenceSource,
}

impl Setup {
    /// Nodes in all.
    #[must_use]
    pub fn nodes(&self) -> f64 {
        self.gpus / self.gpus_per_node
    }

    /// What a forward pass over a pair goes through.
    pub(crate) fn pass(&self, sharing: bool) -> PassWork {
        if sharing { self.pair.shared() } else { self.pair.separate() }
    }

    /// Tokens of a pair that go through the layers.
    #[must_use]
    pub fn tokens(&self) -> f64 {
        self.pass(self.sharing).tokens
    }

    /// Pairs of the rank that has most; the others wait for it.
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

    /// Most pairs of one micro-batch.
    #[must_use]
    pub fn pairs_per_micro_batch(&self) -> f64 {
        (self.pairs_per_rank() / self.micro_batches()).ceil()
    }

    /// Bytes of a value in the passes.
    #[must_use]
    pub fn compute_bytes(&self) -> f64 {
        if self.machine.gpu { 2.0 } else { 4.0 }
    }

    /// Values that are trained.
    #[must_use]
    pub fn trained(&self) -> f64 {
        match self.method {
            Method::Full => self.shape.parameters(),
            Method::Lora(r) => self.shape.adapters(r),
        }
    }

    /// FLOPs of the adapters for a pair, forward.
    #[must_use]
    pub fn adapter_flops(&self) -> f64 {
        if self.method == Method::Full { 0.0 } else { 2.0 * self.trained() * self.tokens() }
    }

    /// Gradients travel as rounded copies.
    #[must_use]
    pub fn rounds_gradients(&self) -> bool {
        self.gpus > 1.0 && self.travelling_bytes < self.gradient_bytes
    }

    /// Backward passes over the layers' products, in forward passes; frozen weights have no gradient of their own.
    #[must_use]
    pub fn backward_passes(&self) -> f64 {
        if self.method == Method::Full { 2.0 } else { 1.0 }
    }

    /// Most bytes of one tile of logits.
    #[must_use]
    pub fn tile_bytes(&self) -> f64 {
        (if self.machine.gpu { GPU_TILE_BYTES } else { TILE_BYTES }) as f64
    }

    /// Passes over the head: logits, both gradients, and the logits again where a trained head's pair outgrows a tile.
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

    /// FLOPs of a pair that every trainer must account for: nothing shared, recomputed or referred to.
    #[must_use]
    pub fn model_flops(&self) -> f64 {
        (1.0 + self.backward_passes()) * self.shape.forward(self.pass(false)).total()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An 8B model's TFLOP per pair, computed independently and quoted to three digits: 1 %.
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
