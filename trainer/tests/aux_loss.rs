//! Training with layers that add their own term to the loss, as a router of experts does.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod support;

use std::f64::consts::LN_2;
use std::mem;
use std::path::Path;

use dyad_proto::run_config::ActivationCheckpointing;
use dyad_torch::autograd::grad;
use support::steps::{pairs, share};
use support::{engine, new_model};
use tch::{Device, Kind, Tensor};
use trainer::batch::{MicroBatch, PairLayout};
use trainer::engine::Engine;
use trainer::model::layer::{DecoderLayer, LayerOutput, Part};
use trainer::model::pass::Pass;

const COEFFICIENT: f64 = 0.5;

/// A layer of a family, with the mean square of its output as its own term.
#[derive(Debug)]
struct WithAuxLoss(Box<dyn DecoderLayer>);

impl DecoderLayer for WithAuxLoss {
    fn forward(&self, hidden: &Tensor, pass: &Pass<'_>) -> LayerOutput {
        let hidden = self.0.forward(hidden, pass).hidden;
        let aux_loss = hidden.square().mean(Kind::Float) * COEFFICIENT;
        LayerOutput { hidden, aux_loss: Some(aux_loss) }
    }

    fn parts(&mut self) -> Vec<(&'static str, Part<'_>)> {
        self.0.parts()
    }

    fn share(&self) -> Box<dyn DecoderLayer> {
        Box::new(Self(self.0.share()))
    }
}

/// With `dpo_beta` 0 the preference loss is ln 2 and has no gradient, so all gradients come from the layers' own terms.
fn engine_with_aux_loss(dir: &Path, lora: bool, checkpointing: ActivationCheckpointing) -> Engine {
    let mut engine = engine(dir, |config| {
        (config.dpo_beta, config.lora, config.activation_checkpointing) = (0.0, lora, checkpointing);
    });
    let layers = mem::take(&mut engine.policy.layers);
    engine.policy.layers =
        layers.into_iter().map(|layer| Box::new(WithAuxLoss(layer)) as Box<dyn DecoderLayer>).collect();
    engine
}

/// The sum of the terms, and the norm of its gradient, from one graph over all layers.
fn from_one_graph(engine: &Engine) -> (f64, f64) {
    let pairs = pairs();
    let batch = MicroBatch::pack(&pairs.iter().collect::<Vec<_>>(), PairLayout::SharedPairs, Device::Cpu);
    let embedded = engine.policy.embed(&batch.tokens).set_requires_grad(true);
    let pass = engine.policy.pass(&batch, true);
    let (mut hidden, mut total) = (embedded.shallow_clone(), Tensor::from(0.0));
    for layer in &engine.policy.layers {
        let output = layer.forward(&hidden, &pass);
        total += output.aux_loss.unwrap();
        hidden = output.hidden;
    }
    let layers = 1..=engine.policy.layers.len();
    let trained: Vec<&Tensor> =
        engine.parameters.units[layers].iter().flatten().map(|parameter| &parameter.leaf).collect();
    assert!(!trained.is_empty());
    let wanted: Vec<&Tensor> = [&embedded].into_iter().chain(trained).collect();
    let mut gradients = grad(&[&total], &[&Tensor::ones_like(&total)], &wanted).unwrap().into_iter();
    let embedded = gradients.next().unwrap().unwrap();
    let rows = engine.policy.embedding.zeros_like().index_add(0, &batch.tokens, &embedded);
    let embedding = if engine.parameters.units[0].is_empty() { 0.0 } else { square(&rows) };
    let squares = gradients.flatten().map(|gradient| square(&gradient)).sum::<f64>() + embedding;
    (total.double_value(&[]), squares.sqrt())
}

fn square(gradient: &Tensor) -> f64 {
    gradient.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[])
}

#[test]
fn gradients_of_aux_losses_equal_those_of_one_graph() {
    let dir = tempfile::tempdir().unwrap();
    new_model(dir.path(), |options| options.layers = 3);
    for lora in [false, true] {
        for checkpointing in [ActivationCheckpointing::Full, ActivationCheckpointing::None] {
            let mut engine = engine_with_aux_loss(dir.path(), lora, checkpointing);
            let (expected_loss, expected_norm) = from_one_graph(&engine);
            assert!(expected_loss > 1e-4 && expected_norm > 1e-4, "{expected_loss}, {expected_norm}");
            let share = share(1);
            let found = engine.train_step(&share, 1e-3).unwrap();
            // Float32, summed in another order.
            let close = |found: f64, expected: f64| (found / expected - 1.0).abs() < 1e-5;
            let case = format!("lora {lora}, {checkpointing:?}");
            assert!(close(found.sums.aux_loss, expected_loss), "{case}: {}", found.sums.aux_loss);
            assert!(close(found.grad_norm, expected_norm), "{case}: {} for {expected_norm}", found.grad_norm);
            let mean = found.sums.loss / share.pairs.len() as f64;
            assert!(close(mean, LN_2), "{case}: the preference loss is apart, {mean}");
        }
    }
}
