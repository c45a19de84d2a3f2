//! Compares attention in one call a layer with its definition in float64.

use dyad_torch::autograd::grad;
use dyad_torch::ops::attention_kernel::Kernel;
use dyad_torch::ops::flash_attention::{Gathered, Runs, Varlen};
use dyad_torch::ops::segment::Segment;
use tch::{Device, Kind, Tensor};
use trainer::model::attention::composed_attention;

/// A segment whose branches follow its prompt.
fn segment(start: i64, prompt: i64, branches: &[i64]) -> Segment {
    Segment { start, prompt, branches: branches.into() }
}

/// One, two and three branches, no prompt, no branch; keys shared by groups of queries; output and gradients.
pub(crate) fn one_call_equals_segments(device: Device, widths: &[i64]) {
    tch::manual_seed(4);
    let mixed = [
        segment(0, 40, &[7, 50]),
        segment(97, 5, &[1]),
        segment(103, 3, &[2, 1, 4]),
        segment(113, 0, &[3, 2]),
        segment(118, 6, &[]),
    ];
    let plain = [segment(0, 60, &[4]), segment(64, 60, &[])];
    let single = [segment(0, 1, &[]), segment(1, 0, &[1, 1]), segment(3, 0, &[1])];
    let mut wrong = Vec::new();
    for (segments, tokens) in [(&mixed[..], 124), (&plain[..], 124), (&single[..], 4)] {
        let varlen = varlen_of(segments, device);
        // Float32 sums of 124 terms; bfloat16 rounds attention weights and results to eight bits.
        for (kind, kernel, tolerance) in [
            (Kind::Float, Kernel::Efficient, 4e-6),
            (Kind::BFloat16, Kernel::Flash, 2e-2),
            (Kind::BFloat16, Kernel::Efficient, 2e-2),
        ] {
            for (kv_heads, width) in
                [4, 2, 1].into_iter().flat_map(|heads| widths.iter().map(move |&w| (heads, w)))
            {
                let worst = differences(&varlen, segments, [tokens, kv_heads, width], kind, kernel);
                let case = format!(
                    "{kernel:?} {kind:?} {kv_heads} key heads of {width}, {tokens} tokens: {worst:?}"
                );
                if worst.iter().any(|&worst| worst.is_nan() || worst > tolerance) {
                    wrong.push(case);
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Largest differences of output and of the gradients of queries, keys and values from those of the definition in float64.
fn differences(
    varlen: &Varlen,
    segments: &[Segment],
    [tokens, kv_heads, width]: [i64; 3],
    kind: Kind,
    kernel: Kernel,
) -> [f64; 4] {
    let host = [4, kv_heads, kv_heads]
        .map(|heads| Tensor::randn([tokens, heads, width], (Kind::Float, Device::Cpu)).to_kind(kind));
    let of = |device, kind| {
        host.each_ref().map(|x| x.to_device(device).to_kind(kind).detach().set_requires_grad(true))
    };
    let (there, here) = (of(varlen.queries.device(), kind), of(Device::Cpu, Kind::Double));
    let ours = varlen.attention(&there[0], &there[1], &there[2], kernel).unwrap();
    let theirs = composed_attention(&here[0], &here[1], &here[2], segments, None);
    assert_eq!((ours.kind(), ours.size()), (kind, theirs.size()));
    let output_grad = Tensor::randn_like(&host[0]);
    let back = |output: &Tensor, inputs: &[Tensor; 3]| {
        let output_grad = output_grad.to_device(output.device()).to_kind(output.kind());
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        grad(&[output], &[&output_grad], &inputs).unwrap().into_iter().map(Option::unwrap).collect::<Vec<_>>()
    };
    let (our_gradients, their_gradients) = (back(&ours, &there), back(&theirs, &here));
    let gradient = |index: usize| difference(&our_gradients[index], &their_gradients[index]);
    [difference(&ours, &theirs), gradient(0), gradient(1), gradient(2)]
}

/// Largest difference, relative to the largest value if that is above one, because a query with one key has no gradient.
fn difference(a: &Tensor, b: &Tensor) -> f64 {
    let host = |x: &Tensor| x.to_device(Device::Cpu).to_kind(Kind::Double);
    let (a, b) = (host(a), host(b));
    ((&a - &b).abs().max() / b.abs().max().clamp_min(1.0)).double_value(&[])
}

/// The lists of these segments, as a micro-batch sends them.
fn varlen_of(segments: &[Segment], device: Device) -> Varlen {
    let (runs, copies) = (Runs::of(segments), Runs::of(segments).copies());
    let gathered = || Gathered {
        rows: Tensor::from_slice(&runs.gather).to_device(device),
        starts: Tensor::from_slice(&copies.starts).to_device(device),
        places: Tensor::from_slice(&copies.places).to_device(device),
    };
    Varlen {
        queries: Tensor::from_slice(&runs.queries).to_device(device),
        keys: Tensor::from_slice(&runs.keys).to_device(device),
        gathered: (!runs.gather.is_empty()).then(gathered),
        max_queries: runs.max_queries,
        max_keys: runs.max_keys,
        pairs: runs.pairs,
    }
}
