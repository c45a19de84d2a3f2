//! Compares the GPU's work between matrix products with its definition in wider numbers on the CPU.

use dyad_torch::autograd::grad;
use dyad_torch::ops::head_tile::{self, Wanted};
use dyad_torch::ops::layer::{self, rms_norm, rotate_half};
use tch::{Device, Kind, Tensor};

fn random(size: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind)
}

/// Largest difference, relative to the largest value.
fn difference(there: &Tensor, here: &Tensor) -> f64 {
    let (there, here) = (there.to_device(Device::Cpu).to_kind(Kind::Double), here.to_kind(Kind::Double));
    ((there - &here).abs().max() / here.abs().max()).double_value(&[])
}

/// Asserts that a function's output and gradients on `device` equal those in float64 on the CPU.
fn equal_there(
    device: Device,
    name: &str,
    inputs: &[Tensor],
    tolerance: f64,
    function: impl Fn(&[Tensor]) -> Tensor,
) {
    let on = |device, kind| -> Vec<Tensor> {
        inputs.iter().map(|x| x.to_device(device).to_kind(kind).detach().set_requires_grad(true)).collect()
    };
    let (there, here) = (on(device, inputs[0].kind()), on(Device::Cpu, Kind::Double));
    let (ours, exact) = (function(&there), function(&here));
    assert!(difference(&ours, &exact) < tolerance, "{name}: {}", difference(&ours, &exact));
    let output_grad = random(&ours.size(), ours.kind());
    let back = |output: &Tensor, inputs: &[Tensor]| {
        let output_grad = output_grad.to_device(output.device()).to_kind(output.kind());
        grad(&[output], &[&output_grad], &inputs.iter().collect::<Vec<_>>()).unwrap()
    };
    for (index, (ours, exact)) in back(&ours, &there).iter().zip(back(&exact, &here)).enumerate() {
        let (Some(ours), Some(exact)) = (ours, exact) else { continue };
        let worst = difference(ours, &exact);
        assert!(worst < tolerance, "{name}, gradient {index}: {worst}");
    }
}

/// Values and gradients of norm, rotation and SwiGLU: by libtorch's operators, and in bfloat16 by the bridge's own kernels where there
/// are any.
pub(crate) fn work_between_products_equals_its_definition(device: Device) {
    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 2e-2)] {
        let norm = |x: &[Tensor]| match x[0].kind() {
            Kind::Double => {
                &x[0] * (x[0].square().mean_dim(-1i64, true, Kind::Double) + 1e-5).rsqrt() * &x[1]
            }
            _ => rms_norm(&x[0], &x[1], 1e-5),
        };
        equal_there(device, "norm", &[random(&[37, 256], kind), random(&[256], kind)], tolerance, norm);
        // As `Rotary` makes them: the same angles in both halves, sines negative in the first.
        let (cos, sin) = (random(&[9, 1, 32], kind), random(&[9, 1, 32], kind));
        let (cos, sin) = (Tensor::cat(&[&cos, &cos], -1), Tensor::cat(&[&-&sin, &sin], -1));
        let turned = |x: &Tensor, kernel: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Tensor| {
            let there = |angles: &Tensor| angles.to_device(x.device()).to_kind(x.kind());
            match x.kind() {
                Kind::Double => x * there(&cos) + x.roll([32], [-1]) * there(&sin),
                _ => kernel(x, &there(&cos), &there(&sin)),
            }
        };
        let own = |x: &Tensor, cos: &Tensor, sin: &Tensor| layer::rotate_signed(x, cos, sin);
        let x = || [random(&[9, 4, 64], kind)];
        equal_there(device, "rotation", &x(), tolerance, |x| turned(&x[0], &rotate_half));
        equal_there(device, "own rotation", &x(), tolerance, |x| turned(&x[0], &own));
        let swiglu = |x: &[Tensor]| layer::swiglu(&x[0], &x[1]);
        equal_there(
            device,
            "SwiGLU",
            &[random(&[37, 256], kind), random(&[37, 256], kind)],
            tolerance,
            swiglu,
        );
    }
}

/// Compares log-probabilities, facts and errors of a tile of logits with those in float32 on the CPU.
pub(crate) fn the_head_scores_as_float32(device: Device) {
    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)] {
        let (policy, reference) = (random(&[19, 1008], kind) * 4.0, random(&[19, 1008], kind) * 4.0);
        let targets = Tensor::randint(1008, [19], (Kind::Int64, Device::Cpu));
        let wanted = Wanted { errors: true, facts: true };
        // Errors overwrite the policy's logits.
        let (policy_here, reference_here) =
            (policy.to_kind(Kind::Float).copy(), Some(reference.to_kind(Kind::Float)));
        let here = head_tile::score(policy_here, reference_here, &targets, wanted);
        let there = head_tile::score(
            policy.to_device(device),
            Some(reference.to_device(device)),
            &targets.to_device(device),
            wanted,
        );
        let close = |name: &str, there: &Tensor, here: &Tensor| {
            let worst = difference(there, here);
            assert!(worst < tolerance, "{kind:?} {name}: {worst}");
        };
        close("log-probabilities", &there.logps, &here.logps);
        close("reference's", &there.reference_logps.unwrap(), &here.reference_logps.unwrap());
        close("facts", &there.facts.unwrap(), &here.facts.unwrap());
        close("errors", &there.errors.unwrap(), &here.errors.unwrap());
    }
}
