//! Memory of one GPU by part, and changes that make a run fit.

use dyad_proto::RunConfig;

use super::EIGHT_BIT;
use super::machine::{CPU_BYTES, CUDA_BYTES, GIB, NCCL_BYTES, USABLE};
use super::work::{Method, ReferenceSource, Setup};

/// Memory of one GPU in bytes, by part.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Weights in the compute precision.
    pub weights: f64,
    /// Gradients of a step.
    pub gradients: f64,
    /// Master weights, if they are separate, and AdamW's moments.
    pub optimizer: f64,
    /// The reference model.
    pub reference: f64,
    /// Activations that a micro-batch keeps for its backward pass, and that pass's peak of temporaries.
    pub activations: f64,
    /// Tiles of logits and the rows that reach the head.
    pub head: f64,
    /// Buffers of collectives, gathered weights.
    pub communication: f64,
    /// CUDA context, libraries.
    pub runtime: f64,
}

impl Memory {
    /// Name and bytes of each part, in the order of display.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, f64); 8] {
        [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("reference model", self.reference),
            ("activations", self.activations),
            ("head tiles", self.head),
            ("communication buffers", self.communication),
            ("runtime", self.runtime),
        ]
    }

    /// Sum of all parts in bytes.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }
}

/// Predicts the memory of one GPU.
#[must_use]
pub fn memory(setup: &Setup) -> Memory {
    let (shape, trained, width) = (&setup.shape, setup.trained(), setup.compute_bytes());
    let sharded = |stage: u8| if setup.zero >= stage { setup.gpus } else { 1.0 };
    let frozen = if setup.method == Method::Full { 0.0 } else { shape.parameters() };
    // In float32 the weights are the master weights.
    let masters = if setup.machine.gpu { 4.0 } else { 0.0 };
    let state = if setup.offload_optimizer { 0.0 } else { masters + setup.moment_bytes };
    let second_model = has_reference_model(setup) && !setup.offload_reference;
    let gathered = if setup.zero == 3 && setup.gpus > 1.0 { 2.0 * shape.layer() * width } else { 0.0 };
    let buffers = if setup.gpus > 1.0 && setup.machine.gpu { NCCL_BYTES } else { 0.0 };
    Memory {
        weights: width * (trained + frozen) / sharded(3),
        gradients: setup.gradient_bytes * trained / sharded(2),
        optimizer: state * trained / sharded(1),
        reference: if second_model { width * shape.parameters() / sharded(3) } else { 0.0 },
        activations: activations(setup),
        head: head(setup),
        communication: buffers + gathered + rounded(setup),
        runtime: if setup.machine.gpu { CUDA_BYTES } else { CPU_BYTES },
    }
}

/// Whether a separate reference model stays in memory. With adapters, the frozen base is the reference model, unless it moves.
fn has_reference_model(setup: &Setup) -> bool {
    (setup.method == Method::Full || setup.moves_reference)
        && matches!(setup.reference, ReferenceSource::Compute | ReferenceSource::Cache)
}

/// Bytes of rounded copies of gradients during reduction: of all gradients, or of a few layers if gradients are sharded.
fn rounded(setup: &Setup) -> f64 {
    if !setup.rounds_gradients() {
        return 0.0;
    }
    let trained = setup.trained();
    let values = if setup.zero >= 2 { trained.min(3.0 * setup.shape.layer()) } else { trained };
    setup.travelling_bytes * values
}

/// Values that one layer keeps per token for its backward pass.
#[must_use]
pub fn saved_per_token(setup: &Setup) -> f64 {
    setup.shape.kept_values(setup.machine.gpu, true)
}

fn activations(setup: &Setup) -> f64 {
    let (shape, width) = (&setup.shape, setup.compute_bytes());
    let tokens = setup.pairs_per_micro_batch() * setup.tokens();
    let layers = if setup.checkpointing {
        shape.layers * shape.hidden + saved_per_token(setup)
    } else {
        shape.layers * saved_per_token(setup)
    };
    // Peak of temporaries in a backward pass: gradients of gate, up, their product and its input, and of one layer's weights.
    let transient = tokens * shape.transient_values() * width;
    let weight_gradients = if setup.method == Method::Full { shape.layer() * width } else { 0.0 };
    tokens * layers * width + transient + weight_gradients
}

fn head(setup: &Setup) -> f64 {
    let rows = setup.pairs_per_micro_batch() * setup.pair.rows();
    // Three copies of the rows: the policy's, their gradient, and the reference's.
    2.0 * setup.tile_bytes() + 3.0 * rows * setup.shape.hidden * setup.compute_bytes()
}

/// Whether the run fits; true if the machine's memory is unknown.
#[must_use]
pub fn fits(setup: &Setup) -> bool {
    setup.machine.memory.is_none_or(|bytes| memory(setup).total() <= USABLE * bytes)
}

/// Changes of the configuration that make the run fit; `None` if no change does. Returns the cheapest single change that suffices, else
/// the first changes that suffice together, without the unnecessary ones.
#[must_use]
pub fn remedy(setup: &Setup) -> Option<Vec<Key>> {
    let changes = changes(setup);
    let suffice = |chosen: &[&Change]| {
        let mut changed = setup.clone();
        chosen.iter().for_each(|(_, change)| change(&mut changed));
        fits(&changed)
    };
    let mut chosen: Vec<&Change> = match changes.iter().find(|change| suffice(&[change])) {
        Some(alone) => vec![alone],
        None => (1..=changes.len())
            .map(|count| changes[..count].iter().collect::<Vec<_>>())
            .find(|first| suffice(first))?,
    };
    for index in (0..chosen.len().saturating_sub(1)).rev() {
        let without: Vec<&Change> =
            chosen.iter().enumerate().filter(|(at, _)| *at != index).map(|(_, change)| *change).collect();
        if suffice(&without) {
            chosen = without;
        }
    }
    Some(chosen.iter().map(|(key, _)| key.clone()).collect())
}

/// A configuration key, and its value in TOML.
pub type Key = (&'static str, String);

/// Keys as `--set` options of `launcher plan` and of a run.
#[must_use]
pub fn as_flags(keys: &[Key]) -> String {
    let flag = |(key, value): &Key| format!("--set {key}={}", value.trim_matches('"'));
    keys.iter().map(flag).collect::<Vec<_>>().join(" ")
}

type Change = (Key, Box<dyn Fn(&mut Setup)>);

/// Possible changes, cheapest first: first those that cost almost no time, then communication, then compute, then the method.
fn changes(setup: &Setup) -> Vec<Change> {
    let mut changes: Vec<Change> = Vec::new();
    if has_reference_model(setup) {
        changes.push((
            ("reference_logps", "\"precompute\"".into()),
            Box::new(|setup| setup.reference = ReferenceSource::Precompute),
        ));
    }
    let mut tokens = setup.micro_batch_tokens / 2.0;
    while tokens >= setup.tokens().max(1024.0) {
        let tokens_here = tokens.floor();
        changes.push((
            ("micro_batch_tokens", tokens_here.to_string()),
            Box::new(move |setup| setup.micro_batch_tokens = tokens_here),
        ));
        tokens /= 2.0;
    }
    if setup.gpus > 1.0 {
        for stage in setup.zero + 1..=3 {
            let key = ("zero_stage", stage.to_string());
            changes.push((key, Box::new(move |setup| setup.zero = stage)));
        }
    }
    if setup.moment_bytes > 4.0 {
        let key = ("optim", "\"adamw_8bit\"".into());
        changes.push((key, Box::new(|setup| setup.moment_bytes = 2.0 * EIGHT_BIT)));
    }
    if !setup.checkpointing {
        let key = ("activation_checkpointing", "\"full\"".into());
        changes.push((key, Box::new(|setup| setup.checkpointing = true)));
    }
    if setup.method == Method::Full {
        let r = f64::from(RunConfig::default().lora_r());
        changes.push((("lora", "true".into()), Box::new(move |setup| setup.method = Method::Lora(r))));
    }
    changes
}

/// Bytes as text, such as `12.3 GiB`.
#[must_use]
pub fn gib(bytes: f64) -> String {
    format!("{:.1} GiB", bytes / GIB)
}

#[cfg(test)]
mod tests {
    use super::super::tests::setup;
    use super::*;
    use dyad_families::shape::PairTokens;

    /// Bytes per parameter with bfloat16 gradients, as the ZeRO paper counts them (arXiv 1910.02054): 16, 4 + 12/N,
    /// 2 + 14/N, 16/N. Exact.
    #[test]
    fn bytes_per_parameter_follow_the_zero_stages() {
        for (zero, expected) in [(0, 16.0), (1, 4.0 + 12.0 / 8.0), (2, 2.0 + 14.0 / 8.0), (3, 16.0 / 8.0)] {
            let mut setup = setup("8B", 8.0);
            (setup.zero, setup.gradient_bytes) = (zero, 2.0);
            let memory = memory(&setup);
            let states = memory.weights + memory.gradients + memory.optimizer;
            let per_parameter = states / setup.shape.parameters();
            assert!((per_parameter - expected).abs() < 1e-9, "stage {zero}: {per_parameter}");
        }
        let mut setup = setup("8B", 8.0);
        let wide = memory(&setup).optimizer;
        setup.moment_bytes = 2.0 * EIGHT_BIT;
        // 4 + 8 against 4 + 2.03.
        assert!((memory(&setup).optimizer / wide - 6.03125 / 12.0).abs() < 1e-9);
        (setup.moment_bytes, setup.method, setup.gradient_bytes) = (8.0, Method::Lora(16.0), 2.0);
        let memory = memory(&setup);
        // 2 B per frozen weight and 16 on the adapters: 16.7 GB. Tolerance 1 %.
        let states = memory.weights + memory.gradients + memory.optimizer;
        assert!((states / 16.7e9 - 1.0).abs() < 0.01 && memory.reference == 0.0, "{states:e}");
    }

    /// The copies take two bytes for each of 8.03 billion gradients; one GPU sends nothing and needs none.
    #[test]
    fn rounded_gradients_need_a_second_copy() {
        let more = |gpus: f64| {
            let mut setup = setup("8B", gpus);
            let wide = memory(&setup).total();
            setup.travelling_bytes = 2.0;
            (memory(&setup).total() - wide) / setup.shape.parameters()
        };
        assert_eq!(more(1.0), 0.0);
        assert!((more(8.0) - 2.0).abs() < 1e-9);
    }

    /// Peaks of libtorch's allocator on an H200 (docs/lab/benchmarks.md), 8B, LoRA, without and with activation checkpointing. Tolerance
    /// 6 %, because pairs differ in length. The allocator does not count the CUDA context.
    #[test]
    fn peaks_on_a_gpu_are_predicted() {
        let pair = |prompt, output| PairTokens { prompt, chosen: output, rejected: output };
        let cases = [
            (pair(768.0, 256.0), 16.0, 8192.0, false, 47.92),
            (pair(140.0, 330.0), 20.0, 16384.0, false, 84.82),
            (pair(140.0, 330.0), 20.0, 16384.0, true, 23.03),
        ];
        for (pair, batch, tokens, checkpointing, measured) in cases {
            let mut setup = setup("8B", 1.0);
            (setup.method, setup.pair, setup.batch) = (Method::Lora(16.0), pair, batch);
            (setup.micro_batch_tokens, setup.checkpointing) = (tokens, checkpointing);
            let memory = memory(&setup);
            let gib = (memory.total() - memory.runtime) / GIB;
            assert!((gib / measured - 1.0).abs() < 0.06, "{gib} against {measured}");
        }
    }

    #[test]
    fn the_first_change_that_suffices_is_named() {
        let mut setup = setup("8B", 8.0);
        setup.micro_batch_tokens = 4096.0;
        assert!(!fits(&setup));
        let remedy = |setup: &Setup| remedy(setup).map(|keys| as_flags(&keys));
        assert_eq!(remedy(&setup).as_deref(), Some("--set zero_stage=1"));
        setup.zero = 1;
        assert!(fits(&setup));
        setup.shape = super::super::shapes::find("70B").unwrap();
        assert_eq!(
            remedy(&setup).as_deref(),
            Some(
                "--set reference_logps=precompute --set micro_batch_tokens=1024 --set zero_stage=3 --set optim=adamw_8bit"
            )
        );
        (setup.gpus, setup.gpus_per_node) = (1.0, 1.0);
        assert_eq!(remedy(&setup), None);
    }
}
