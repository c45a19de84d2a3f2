//! Class of an operator, and lower bounds of its floating-point operations and bytes, from its name and shapes.

use dyad_torch::recorder::ProfilerEvent;

/// What an operator is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Matrix products.
    Gemm,
    /// Softmax attention, its two products included.
    Attention,
    /// One result per element.
    Elementwise,
    /// Sums, norms, log-sum-exp.
    Reduction,
    /// Copies, casts, gathers, fills.
    Copy,
    /// Views of the same memory, and walking the graph: only the cost of a call.
    Call,
    /// The parameter update.
    Optimizer,
    /// Communication between processes.
    Communication,
}

impl Class {
    /// Every class, in the order of the tables.
    pub const ALL: [Self; 8] = [
        Self::Gemm,
        Self::Attention,
        Self::Elementwise,
        Self::Reduction,
        Self::Copy,
        Self::Call,
        Self::Optimizer,
        Self::Communication,
    ];

    /// Name in the tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gemm => "matrix product",
            Self::Attention => "attention",
            Self::Elementwise => "elementwise",
            Self::Reduction => "reduction",
            Self::Copy => "copy",
            Self::Call => "calls",
            Self::Optimizer => "optimizer",
            Self::Communication => "communication",
        }
    }

    /// Class of an operator or a GPU kernel.
    #[must_use]
    pub fn of(name: &str) -> Self {
        let is = |marks: &[&str]| marks.iter().any(|mark| name.contains(mark));
        let operator = name.strip_prefix("aten::").unwrap_or(name).trim_end_matches('_');
        if let Some(class) = of_runtime(name) {
            class
        } else if is(&["gloo:", "c10d::", "nccl"]) {
            Self::Communication
        } else if is(&["autograd::", "Backward0", "Backward1"]) {
            Self::Call
        } else if is(&["adamw"]) {
            Self::Optimizer
        } else if is(&["dyad::attention", "scaled_dot_product", "flash_", "efficient_attention", "fmha"]) {
            Self::Attention
        } else if matches!(operator, "mm" | "addmm" | "bmm" | "baddbmm" | "matmul" | "linear")
            || is(&["gemm", "cutlass", "nvjet", "dyad::product"])
        {
            Self::Gemm
        } else if matches!(operator, "sum" | "mean" | "logsumexp" | "dot" | "amax" | "max" | "min" | "norm")
            || is(&["reduce_kernel"])
        {
            Self::Reduction
        } else if is(&[
            "copy", "cat", "clone", "index", "gather", "scatter", "fill", "zero", "empty", "to_copy", "Mem",
        ]) || matches!(
            operator,
            "to" | "stack" | "contiguous" | "repeat_interleave" | "arange" | "resize"
        ) {
            Self::Copy
        } else if matches!(
            operator,
            "t" | "view" | "transpose" | "permute" | "reshape" | "expand" | "alias" | "unbind"
        ) || is(&[
            "_view",
            "narrow",
            "slice",
            "select",
            "squeeze",
            "detach",
            "as_strided",
            "reshape",
            "chunk",
            "split",
        ]) {
            Self::Call
        } else {
            Self::Elementwise
        }
    }
}

/// Class of a CUDA runtime call, by which the host launches work on the GPU or waits for it; `None` for other names.
fn of_runtime(name: &str) -> Option<Class> {
    let call = name == "Command Buffer Full" || name.starts_with("cuda") || name.starts_with("cuLaunch");
    call.then(|| if name.contains("Mem") { Class::Copy } else { Class::Call })
}

/// Floating-point operations of a matrix product or an attention, two to a multiply-accumulate; 0 for everything else.
#[must_use]
pub fn flops(event: &ProfilerEvent) -> f64 {
    if let Some((_, operations)) = counted(&event.name) {
        return operations;
    }
    let shape = |index: usize| event.shapes.get(index).map_or(&[] as &[i64], Vec::as_slice);
    match event.name.strip_prefix("aten::").unwrap_or(&event.name).trim_end_matches('_') {
        // Also a sum over rows, `[t, m]ᵀ × [t, n]`: the formula reads only the width of the second shape.
        "mm" | "dyad::product" | "dyad::product_added" => product(shape(0), shape(1)),
        "dyad::product_turned" => turned(shape(0), shape(1)),
        "addmm" => product(shape(1), shape(2)),
        "bmm" => product(shape(0), shape(1)),
        "baddbmm" => product(shape(1), shape(2)),
        // The bridge's attention has as second shape the number of token pairs that attend.
        "dyad::attention" => visible(shape(0), shape(1)),
        "dyad::attention_backward" => 2.5 * visible(shape(0), shape(1)),
        name if name.contains("scaled_dot_product") && name.contains("attention") => {
            let backward = name.ends_with("backward");
            // The backward pass takes the output's gradient first, and does five products where the forward pass does two.
            let (first, times) = if backward { (1, 2.5) } else { (0, 1.0) };
            times * attention(shape(first), shape(first + 1))
        }
        _ => 0.0,
    }
}

/// Name of an operator in tables: for attention over runs, without the operation count that its name carries.
#[must_use]
pub fn plain_name(name: &str) -> &str {
    counted(name).map_or(name, |(plain, _)| plain)
}

/// Attention over runs carries its operation count in its name (`cpp/gpu/varlen.cpp`), because no shape tells it.
fn counted(name: &str) -> Option<(&str, f64)> {
    let (plain, operations) = name.strip_prefix("dyad::").and(name.rsplit_once(' '))?;
    Some((plain, operations.parse().ok()?))
}

/// `[…, m, k] × […, k, n]`.
fn product(a: &[i64], b: &[i64]) -> f64 {
    match (a, b) {
        ([.., _, _], [.., n]) => 2.0 * numel(a) * *n as f64,
        _ => 0.0,
    }
}

/// `[m, k] × [n, k]`.
fn turned(a: &[i64], b: &[i64]) -> f64 {
    b.first().map_or(0.0, |&n| 2.0 * numel(a) * n as f64)
}

/// `[batch, heads, queries, width]` and keys alike. Square attention counts as causal: half of the pairs.
fn attention(q: &[i64], k: &[i64]) -> f64 {
    match (q, k) {
        ([.., queries, _], [.., keys, _]) => {
            let share = if queries == keys { 0.5 } else { 1.0 };
            4.0 * share * numel(q) * *keys as f64
        }
        _ => 0.0,
    }
}

/// Queries `[tokens, heads, width]`, and `[pairs, 0]`.
fn visible(q: &[i64], pairs: &[i64]) -> f64 {
    match (q, pairs) {
        ([_, heads, width], [pairs, ..]) => 4.0 * (heads * width * pairs) as f64,
        _ => 0.0,
    }
}

/// Lower bound of the bytes that the operator moves: its inputs, and an output as large as its largest input (none for a reduction).
#[must_use]
pub fn bytes(event: &ProfilerEvent) -> f64 {
    let sizes = event.shapes.iter().zip(&event.kinds).filter(|(_, kind)| !kind.is_empty());
    let bytes: Vec<f64> = sizes.map(|(shape, kind)| numel(shape) * width(kind)).collect();
    let output = match Class::of(&event.name) {
        Class::Reduction => 0.0,
        _ => bytes.iter().copied().fold(0.0, f64::max),
    };
    bytes.iter().sum::<f64>() + output
}

fn numel(shape: &[i64]) -> f64 {
    shape.iter().map(|&size| size as f64).product()
}

/// Bytes of one element, by libtorch's names for kinds; 0 if the argument is no tensor.
fn width(kind: &str) -> f64 {
    match kind {
        "double" | "long int" | "int64_t" | "long" => 8.0,
        "float" | "int" => 4.0,
        "c10::BFloat16" | "c10::Half" | "short" => 2.0,
        "bool" | "unsigned char" | "signed char" => 1.0,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, shapes: &[&[i64]]) -> ProfilerEvent {
        ProfilerEvent {
            name: name.into(),
            shapes: shapes.iter().map(|shape| shape.to_vec()).collect(),
            kinds: shapes.iter().map(|_| "float".to_owned()).collect(),
            ..ProfilerEvent::default()
        }
    }

    #[test]
    fn products_cost_two_operations_a_multiply_accumulate() {
        assert_eq!(flops(&event("aten::mm", &[&[3, 4], &[4, 5]])), 120.0);
        assert_eq!(flops(&event("aten::addmm_", &[&[3, 5], &[3, 4], &[4, 5]])), 120.0);
        assert_eq!(flops(&event("aten::bmm", &[&[2, 3, 4], &[2, 4, 5]])), 240.0);
        assert_eq!(flops(&event("dyad::product", &[&[3, 4], &[4, 5]])), 120.0);
        assert_eq!(flops(&event("dyad::product_turned", &[&[3, 4], &[5, 4]])), 120.0);
        assert_eq!(flops(&event("dyad::product_added", &[&[4, 3], &[4, 5]])), 120.0);
        assert_eq!(flops(&event("aten::mul", &[&[3, 4], &[3, 4]])), 0.0);
    }

    #[test]
    fn attention_counts_the_pairs_that_see_each_other() {
        let name = "aten::_scaled_dot_product_flash_attention_for_cpu";
        let (q, k): (&[i64], &[i64]) = (&[1, 2, 6, 8], &[1, 2, 9, 8]);
        assert_eq!(flops(&event(name, &[q, k, k])), 4.0 * 2.0 * 6.0 * 9.0 * 8.0);
        assert_eq!(flops(&event(name, &[q, q, q])), 2.0 * 2.0 * 6.0 * 6.0 * 8.0);
        let backward = event(&format!("{name}_backward"), &[q, q, k, k]);
        assert_eq!(flops(&backward), 2.5 * 4.0 * 2.0 * 6.0 * 9.0 * 8.0);
        let own = event("dyad::attention", &[&[6, 2, 8], &[21, 0]]);
        assert_eq!(flops(&own), 4.0 * 2.0 * 8.0 * 21.0);
    }

    #[test]
    fn attention_over_runs_gets_its_operations_from_its_name() {
        let named = event("dyad::attention flash backward 12500", &[]);
        assert_eq!((flops(&named), plain_name(&named.name)), (12_500.0, "dyad::attention flash backward"));
        assert_eq!(Class::of(&named.name), Class::Attention);
        assert_eq!((plain_name("aten::mm"), flops(&event("dyad::attention", &[]))), ("aten::mm", 0.0));
    }

    #[test]
    fn bytes_are_inputs_and_an_output() {
        assert_eq!(bytes(&event("aten::add", &[&[10], &[1]])), 4.0 * 21.0);
        assert_eq!(bytes(&event("aten::sum", &[&[10]])), 40.0);
    }

    #[test]
    fn every_operator_of_a_step_has_its_class() {
        let classes = [
            ("aten::addmm_", Class::Gemm),
            ("dyad::product_added", Class::Gemm),
            ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", Class::Attention),
            ("aten::silu_backward", Class::Elementwise),
            ("aten::logsumexp", Class::Reduction),
            ("aten::copy_", Class::Copy),
            ("aten::index_select", Class::Copy),
            ("aten::as_strided", Class::Call),
            ("autograd::engine::evaluate_function: MmBackward0", Class::Call),
            ("aten::add", Class::Elementwise),
            ("aten::_fused_adamw_", Class::Optimizer),
            ("gloo:all_reduce", Class::Communication),
            ("sm90_xmma_gemm_bf16bf16_bf16f32", Class::Gemm),
            ("nvjet_sm90_tst_256x160_64x4_2x1_v_bz_coopA_TNT", Class::Gemm),
            ("gpu_swiglu_backward", Class::Elementwise),
            ("cudaLaunchKernel", Class::Call),
            ("Command Buffer Full", Class::Call),
            ("cudaMemcpyAsync", Class::Copy),
        ];
        for (name, class) in classes {
            assert_eq!(Class::of(name), class, "{name}");
        }
    }
}
