//! Self-attention over packed segments: `[tokens, width]` without batch axis or padding. A [`Segment`] says which tokens attend to which.

use dyad_families::AttentionSpan;
use dyad_torch::backend::Backend;
use dyad_torch::ops::attention_kernel::kernel_on;
use dyad_torch::ops::layer;
use dyad_torch::ops::segment::Segment;
use tch::{Device, Kind, Tensor};

use super::linear::Linear;
use super::pass::Pass;

/// Self-attention with rotary positions and grouped key/value heads.
#[derive(Debug)]
pub struct Attention {
    /// Query projection.
    pub q_proj: Linear,
    /// Key projection.
    pub k_proj: Linear,
    /// Value projection.
    pub v_proj: Linear,
    /// Output projection.
    pub o_proj: Linear,
    /// Query heads.
    pub heads: i64,
    /// Key and value heads.
    pub kv_heads: i64,
    /// Width of one head.
    pub head_dim: i64,
    /// Which earlier tokens a token attends to.
    pub span: AttentionSpan,
}

impl Attention {
    /// `hidden + attention(x)`, where `x` is the normed `hidden`. All are `[tokens, hidden]`.
    pub fn forward_onto(&self, hidden: &Tensor, x: &Tensor, pass: &Pass<'_>) -> Tensor {
        let split = |projected: Tensor, heads: i64| projected.view([-1, heads, self.head_dim]);
        let [q, k, v] = Linear::forward_all([&self.q_proj, &self.k_proj, &self.v_proj], x, pass);
        let q = pass.rotary.apply(&split(q, self.heads));
        let k = pass.rotary.apply(&split(k, self.kv_heads));
        let v = split(v, self.kv_heads);
        let context = segmented_attention(&q, &k, &v, pass, self.span);
        self.o_proj.forward_onto(hidden, &context.reshape([-1, self.heads * self.head_dim]), pass)
    }
}

/// Causal attention inside each segment: the first branch follows the prompt; every further branch sees the prompt and
/// itself, not its siblings. `[tokens, heads, head_dim]` throughout.
fn segmented_attention(q: &Tensor, k: &Tensor, v: &Tensor, pass: &Pass<'_>, span: AttentionSpan) -> Tensor {
    // A window as long as the longest sequence hides nothing, so kernels without a window can be used.
    if let AttentionSpan::Window(window) = span
        && pass.segments.iter().any(|segment| segment.longest() > window)
    {
        return composed_attention(q, k, v, pass.segments, Some(window));
    }
    if Backend::of(&[q, k, v], 1) == Backend::Cpu {
        return layer::segmented_attention(q, k, v, pass.segments);
    }
    let kernel = || kernel_on(q.device(), q.kind(), q.size()[2]);
    let in_one_call = pass.varlen.and_then(|varlen| varlen.attention(q, k, v, kernel()));
    in_one_call.unwrap_or_else(|| composed_attention(q, k, v, pass.segments, None))
}

/// The same segment by segment: the reference in tests of the kernels, and the fallback where there is no kernel. With a window, a token
/// sees the last `window` tokens by position, itself included.
pub fn composed_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    segments: &[Segment],
    window: Option<i64>,
) -> Tensor {
    let mut outputs = Vec::with_capacity(2 * segments.len());
    for segment in segments {
        let trunk = segment.prompt + segment.branches.first().copied().unwrap_or(0);
        let take = |x: &Tensor, start: i64, len: i64| x.narrow(0, segment.start + start, len);
        let windowed = window.filter(|window| *window < trunk).map(|_| {
            let mask = Mask { before: 0, len: trunk, window };
            mask.tensor(q.kind(), q.device())
        });
        outputs.push(attend(&take(q, 0, trunk), &take(k, 0, trunk), &take(v, 0, trunk), windowed.as_ref()));
        let mut start = trunk;
        for &len in segment.branches.iter().skip(1) {
            let seen = |x: &Tensor| Tensor::cat(&[take(x, 0, segment.prompt), take(x, start, len)], 0);
            let mask = Mask { before: segment.prompt, len, window }.tensor(q.kind(), q.device());
            outputs.push(attend(&take(q, start, len), &seen(k), &seen(v), Some(&mask)));
            start += len;
        }
    }
    Tensor::cat(&outputs, 0)
}

/// Mask for `len` queries over `before + len` keys.
#[derive(Clone, Copy, Debug)]
struct Mask {
    before: i64,
    len: i64,
    window: Option<i64>,
}

impl Mask {
    /// 0 where query i may see key j, else -inf: `[len, before + len]`. Key j is at position j, query i at position `before + i`.
    fn tensor(self, kind: Kind, device: Device) -> Tensor {
        let hidden =
            |kind| Tensor::full([self.len, self.before + self.len], f64::NEG_INFINITY, (kind, device));
        let later = hidden(kind).triu(self.before + 1);
        match self.window {
            // Each is 0 or -inf, and so is their sum.
            Some(window) => later + hidden(kind).tril(self.before - window),
            None => later,
        }
    }
}

/// Softmax attention of one segment, causal unless a mask is given.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Tensor {
    let heads_first = |x: &Tensor| x.transpose(0, 1).unsqueeze(0);
    let groups = q.size()[1] / k.size()[1];
    let widen = |x: &Tensor| {
        if groups == 1 { x.shallow_clone() } else { x.repeat_interleave_self_int(groups, 1, None) }
    };
    let (q, k, v) = (heads_first(q), heads_first(&widen(k)), heads_first(&widen(v)));
    Tensor::scaled_dot_product_attention(&q, &k, &v, mask, 0.0, mask.is_none(), None, false)
        .squeeze_dim(0)
        .transpose(0, 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::kernels_agree::{KINDS, agree, difference, leaf};

    #[test]
    fn nan_in_a_query_stays_in_its_row() {
        let segments = [Segment { start: 0, prompt: 60, branches: [10, 20].into() }];
        for (kind, none) in KINDS.into_iter().flat_map(|kind| [(kind, f64::NAN), (kind, -f64::NAN)]) {
            let tensor = || Tensor::randn([90, 2, 16], (Kind::Float, Device::Cpu)).to_kind(kind);
            let (q, k, v) = (tensor(), tensor(), tensor());
            let _ = q.narrow(0, 65, 1).fill_(none);
            let out =
                layer::segmented_attention(&q, &k, &v, &segments).flatten(1, -1).isnan().any_dim(1, false);
            let rows: Vec<i64> = out.nonzero().view([-1]).try_into().unwrap();
            assert_eq!(rows, [65], "{kind:?}");
        }
    }

    /// One, two and three branches, no prompt, no branch, an empty branch, several tiles; keys shared by groups of queries; heads
    /// narrower and wider than a panel.
    #[test]
    fn fused_attention_equals_its_composition() {
        tch::manual_seed(4);
        let segment = |start, prompt, branches: &[i64]| Segment { start, prompt, branches: branches.into() };
        let segments = [
            segment(0, 40, &[7, 50]),
            segment(97, 5, &[1]),
            segment(103, 3, &[2, 1, 4]),
            segment(113, 0, &[3, 2]),
            segment(118, 6, &[]),
            segment(124, 130, &[70, 100]),
            segment(424, 4, &[0, 3]),
            segment(431, 4, &[3, 0]),
        ];
        let heads = [(4, 16), (2, 16), (1, 16), (2, 7), (4, 80), (2, 128)];
        for (kind, (kv_heads, width)) in KINDS.into_iter().flat_map(|kind| heads.map(|heads| (kind, heads))) {
            let inputs = [
                leaf(&[438, 4, width], kind),
                leaf(&[438, kv_heads, width], kind),
                leaf(&[438, kv_heads, width], kind),
            ];
            let [q, k, v] = &inputs;
            agree(
                &inputs,
                || layer::segmented_attention(q, k, v, &segments),
                || composed_attention(q, k, v, &segments, None),
            );
        }
    }

    /// Compares with a mask that is built position by position, in shared prompts too.
    #[test]
    fn a_window_hides_tokens_by_position() {
        let segments = [
            Segment { start: 0, prompt: 5, branches: vec![4, 3] },
            Segment { start: 12, prompt: 2, branches: vec![6] },
        ];
        let options = (Kind::Double, Device::Cpu);
        let [q, k, v] = [2, 1, 1].map(|heads| Tensor::randn([20, heads, 4], options));
        // Segment, position and branch of each token; tokens of a prompt have no branch.
        let mut places: Vec<(usize, i64, Option<usize>)> = Vec::new();
        for (index, segment) in segments.iter().enumerate() {
            places.extend((0..segment.prompt).map(|position| (index, position, None)));
            for (branch, &len) in segment.branches.iter().enumerate() {
                places.extend((0..len).map(|offset| (index, segment.prompt + offset, Some(branch))));
            }
        }
        for window in [1, 3, 6, 100] {
            let sees = |query: usize, key: usize| {
                let ((a, at, branch), (b, before, other)) = (places[query], places[key]);
                let together = a == b && (other.is_none() || other == branch);
                together && before <= at && at - before < window
            };
            let mask: Vec<f64> = (0..400)
                .map(|index| if sees(index / 20, index % 20) { 0.0 } else { f64::NEG_INFINITY })
                .collect();
            let mask = Tensor::from_slice(&mask).view([20, 20]);
            let expected = attend(&q, &k, &v, Some(&mask));
            let found = composed_attention(&q, &k, &v, &segments, Some(window));
            assert!(difference(&found, &expected) < 1e-12, "window {window}");
        }
    }
}
