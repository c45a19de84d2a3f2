//! Time of collectives, and the part of it that the backward pass hides.

use super::machine::{BUCKET_BYTES, COLLECTIVE_LATENCY};
use super::work::{Method, Setup};

/// Seconds of one all-reduce: `2 (N-1)/N bytes / bandwidth`; across nodes the faster of one ring and a hierarchical all-reduce.
#[must_use]
pub fn all_reduce(setup: &Setup, bytes: f64) -> f64 {
    let share = |ranks: f64| 2.0 * (ranks - 1.0) / ranks;
    let (nodes, inside) = (setup.nodes(), setup.machine.node_bandwidth);
    if setup.gpus <= 1.0 {
        return 0.0;
    }
    let latency = COLLECTIVE_LATENCY * (1.0 + nodes.log2().max(0.0));
    if nodes <= 1.0 {
        return latency + share(setup.gpus) * bytes / inside;
    }
    let between = setup.network.bandwidth(setup.gpus_per_node);
    let ring = share(setup.gpus) * bytes / between.min(inside);
    let by_node = share(setup.gpus_per_node) * bytes / inside + share(nodes) * bytes / between;
    latency + ring.min(by_node)
}

/// Seconds of a reduce-scatter or an all-gather of `bytes` in total: half an all-reduce.
#[must_use]
pub fn half(setup: &Setup, bytes: f64) -> f64 {
    all_reduce(setup, bytes) / 2.0
}

/// Communication of a rank in a step.
#[derive(Clone, Copy, Debug)]
pub struct Traffic {
    /// Seconds of all collectives.
    pub total: f64,
    /// Seconds of them that are not hidden behind computation.
    pub exposed: f64,
}

/// Seconds of one micro-batch that can hide communication.
#[derive(Clone, Copy, Debug)]
pub struct Hiding {
    /// Everything up to and including the head's gradient.
    pub forward: f64,
    /// The layers' backward pass.
    pub backward: f64,
    /// Number of forward passes of the reference model.
    pub references: f64,
}

/// Communication of a step.
///
/// Stages 0 and 1 reduce gradients in the last micro-batch, stages 2 and 3 in each; the embedding's looked-up rows are reduced only in the
/// last. Stages 1 and 2 gather the updated weights after the optimizer, which nothing hides. Stage 3 gathers layers before each pass.
#[must_use]
pub fn traffic(setup: &Setup, hiding: Hiding) -> Traffic {
    let (micro_batches, sharded) = (setup.micro_batches(), setup.zero > 0);
    let reduce = |bytes: f64| if sharded { half(setup, bytes) } else { all_reduce(setup, bytes) };
    let last = reduction(setup, hiding.backward, true, &reduce);
    let others = if setup.zero >= 2 { micro_batches - 1.0 } else { 0.0 };
    let other = reduction(setup, hiding.backward, false, &reduce);
    let mut traffic =
        Traffic { total: last.total + others * other.total, exposed: last.exposed + others * other.exposed };
    let weights = setup.compute_bytes() * setup.trained();
    if setup.zero == 3 {
        let layer = half(setup, setup.compute_bytes() * setup.shape.layer());
        let passes = 2.0 + hiding.references;
        let gathers = passes * (setup.shape.layers * layer + head_gather(setup));
        let hidden = hiding.forward + hiding.backward;
        // The first layer's weights are always waited for; the other gathers share the wire with the reductions.
        let late =
            |reduction: Traffic| (gathers + reduction.total - hidden).max(layer).max(reduction.exposed);
        traffic.total += gathers * micro_batches;
        traffic.exposed = late(last) + others * late(other);
    } else if sharded && setup.gpus > 1.0 {
        traffic.total += half(setup, weights);
        traffic.exposed += half(setup, weights);
    }
    if setup.gpus > 1.0 { traffic } else { Traffic { total: 0.0, exposed: 0.0 } }
}

/// Seconds to gather embedding and head of a sharded model.
fn head_gather(setup: &Setup) -> f64 {
    let matrices = if setup.shape.tied { 1.0 } else { 2.0 };
    half(setup, matrices * setup.compute_bytes() * setup.shape.head())
}

/// Reductions of one backward pass. Gradients are ready from the head down, and buckets travel one after another; the time after the
/// backward pass's end is exposed.
fn reduction(setup: &Setup, backward: f64, with_rows: bool, seconds: &dyn Fn(f64) -> f64) -> Traffic {
    let (mut clock, mut wire, mut total, mut bucket) = (0.0, 0.0_f64, 0.0, 0.0);
    let mut units = units(setup, backward);
    if !with_rows {
        units.pop();
    }
    let last = units.len() - 1;
    for (index, (compute, values)) in units.into_iter().enumerate() {
        clock += compute;
        bucket += values * setup.travelling_bytes;
        if bucket >= BUCKET_BYTES || (index == last && bucket > 0.0) {
            let busy = seconds(bucket);
            wire = wire.max(clock) + busy;
            total += busy;
            bucket = 0.0;
        }
    }
    Traffic { total, exposed: (wire - clock).max(0.0) }
}

/// `(seconds of backward, values to reduce)` of the head, each layer and the embedding. The embedding reduces at most one row per token of
/// the step. A tied head's gradient is reduced like a head's.
fn units(setup: &Setup, backward: f64) -> Vec<(f64, f64)> {
    let shape = &setup.shape;
    let matrix = |trained: bool| if trained { shape.head() } else { 0.0 };
    let (layer, head, embedding) = match setup.method {
        Method::Full => (shape.layer(), shape.head(), shape.head()),
        Method::Lora(r) => {
            (shape.adapters(r) / shape.layers, matrix(setup.saves_head), matrix(setup.saves_embedding))
        }
    };
    let rows = setup.batch * setup.pair.shared().tokens;
    let mut units = vec![(0.0, head)];
    units.extend(std::iter::repeat_n((backward / shape.layers, layer), shape.layers as usize));
    units.push((0.0, embedding.min(rows * shape.hidden)));
    units
}

#[cfg(test)]
mod tests {
    use super::super::machine::Interconnect;
    use super::super::tests::setup;
    use super::*;

    /// Times by hand for 8B in bfloat16 (16.06 GB) and its rank-16 adapters in float32 (168 MB), without latency. Tolerance 8 %, because
    /// the hand calculation ignores the traffic inside a node.
    #[test]
    fn all_reduce_times_of_known_clusters() {
        let cases = [
            (8.0, Interconnect::Ndr, 59e-3, 0.6e-3),
            (64.0, Interconnect::Ndr, 86e-3, 0.9e-3),
            (16.0, Interconnect::HundredGbe, 1.5, 15e-3),
            (16.0, Interconnect::TenGbe, 14.6, 153e-3),
        ];
        for (gpus, network, full, lora) in cases {
            let mut setup = setup("8B", gpus);
            setup.network = network;
            let latency = COLLECTIVE_LATENCY * (1.0 + setup.nodes().log2());
            for (bytes, expected) in [(16.06e9, full), (41.9e6 * 4.0, lora)] {
                let found = all_reduce(&setup, bytes) - latency;
                assert!(
                    (found / expected - 1.0).abs() < 0.08,
                    "{gpus} {network:?}: {found} against {expected}"
                );
            }
        }
        assert_eq!(all_reduce(&setup("8B", 1.0), 1e9), 0.0);
    }

    #[test]
    fn communication_that_the_backward_pass_cannot_hide_is_exposed() {
        let setup = Setup { batch: 16.0, ..setup("8B", 8.0) };
        let hiding = |backward: f64| Hiding { forward: 1.0, backward, references: 1.0 };
        let (slow, fast) = (traffic(&setup, hiding(10.0)), traffic(&setup, hiding(0.0)));
        assert!((fast.exposed / fast.total - 1.0).abs() < 1e-9);
        // The gradients of the first layer and of the looked-up rows are the last: nothing hides their reduction.
        let rows = setup.batch * setup.pair.shared().tokens * setup.shape.hidden;
        assert!(rows < setup.shape.head());
        let last = all_reduce(&setup, 4.0 * setup.shape.layer()) + all_reduce(&setup, 4.0 * rows);
        assert!((slow.exposed - last).abs() < 1e-9, "{} {last}", slow.exposed);
        assert_eq!(slow.total, fast.total);
    }

    /// In stage 2 each micro-batch reduces the layers' gradients; the step's looked-up rows are reduced once.
    #[test]
    fn looked_up_rows_are_reduced_once_a_step() {
        let setup = Setup { zero: 2, batch: 64.0, micro_batch_tokens: 4096.0, ..setup("8B", 8.0) };
        let hiding = Hiding { forward: 1.0, backward: 1.0, references: 1.0 };
        let reduce = |bytes: f64| half(&setup, bytes);
        let (with, without) =
            (reduction(&setup, 1.0, true, &reduce).total, reduction(&setup, 1.0, false, &reduce).total);
        assert!(with > without && setup.micro_batches() > 1.0);
        let weights = half(&setup, setup.compute_bytes() * setup.trained());
        let expected = with + (setup.micro_batches() - 1.0) * without + weights;
        assert!((traffic(&setup, hiding).total / expected - 1.0).abs() < 1e-9);
    }
}
