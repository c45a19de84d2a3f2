//! Which keys of the objective can be combined. An error names both keys.

use super::{FDivergenceType, LossType, ReferenceLogps, RunConfig, TrainOnInputs, TrainingMethod};
use crate::Fault;

/// The range in which users of the hosted API are advised to stay.
const USUAL_BETA: std::ops::RangeInclusive<f64> = 0.05..=0.9;

/// A key of the objective that is set, and the value that is shown for it.
struct SetKey {
    name: &'static str,
    shown: String,
}

impl RunConfig {
    /// Fails if a key of the objective is set that the objective does not read.
    pub(super) fn check_objective(&self) -> Result<(), Fault> {
        if self.training_method == TrainingMethod::Sft {
            self.check_fine_tuning()?;
        } else if self.train_on_inputs != TrainOnInputs::Auto {
            return Err(Fault::input("train_on_inputs is set, but training_method is not \"sft\"")
                .hint("remove train_on_inputs: preference training trains the outputs alone"));
        }
        self.check_losses()?;
        self.check_labelled()?;
        self.check_label_smoothing()?;
        self.check_divergence()?;
        self.check_normalization()?;
        self.check_likelihood()?;
        self.check_margin()?;
        self.check_weighting()?;
        self.check_moving_reference()?;
        self.check_reference()
    }

    /// Values that are allowed but unusual, one sentence each.
    #[must_use]
    pub fn unusual(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let reads_reference = self.objective().needs_reference();
        let sums = self.pair_losses().iter().all(|term| !term.loss.is_normalized());
        if reads_reference
            && sums
            && !self.dpo_normalize_logratios_by_length
            && !USUAL_BETA.contains(&self.dpo_beta)
        {
            let (low, high) = (USUAL_BETA.start(), USUAL_BETA.end());
            let effect = if self.dpo_beta < *low {
                "a smaller value lets the policy drift far from the reference"
            } else {
                "a larger value holds the policy so close to the reference that it hardly learns"
            };
            notes.push(format!(
                "dpo_beta = {} is unusual ({low} to {high} is usual): {effect}",
                self.dpo_beta
            ));
        }
        notes
    }

    /// Preference keys that differ from their defaults.
    fn preference_keys(&self) -> Vec<SetKey> {
        let default = Self::default();
        let number = |value: Option<f64>| value.map(|value| value.to_string());
        let positive = |value: f64| (value != 0.0).then(|| value.to_string());
        let on = |value: bool| value.then(|| "true".to_owned());
        let all = [
            ("loss_type", (self.loss_type != default.loss_type).then(|| self.loss_type.shown())),
            ("loss_weights", self.loss_weights.as_ref().map(|weights| format!("{weights:?}"))),
            ("label_smoothing", positive(self.label_smoothing)),
            ("dpo_normalize_logratios_by_length", on(self.dpo_normalize_logratios_by_length)),
            ("rpo_alpha", positive(self.rpo_alpha)),
            ("desirable_weight", number(self.desirable_weight)),
            ("undesirable_weight", number(self.undesirable_weight)),
            ("dpo_reference_free", on(self.dpo_reference_free)),
            ("sync_ref_model", on(self.sync_ref_model)),
            ("ref_model_mixup_alpha", number(self.ref_model_mixup_alpha)),
            ("ref_model_sync_steps", self.ref_model_sync_steps.map(|steps| steps.to_string())),
            ("simpo_gamma", number(self.simpo_gamma)),
            ("cpo_alpha", number(self.cpo_alpha)),
            (
                "f_divergence_type",
                (self.f_divergence_type != default.f_divergence_type).then(|| shown(self.f_divergence_type)),
            ),
            ("f_alpha_divergence_coef", number(self.f_alpha_divergence_coef)),
            ("ld_alpha", number(self.ld_alpha)),
            ("discopop_tau", number(self.discopop_tau)),
            ("use_weighting", on(self.use_weighting)),
        ];
        all.into_iter().filter_map(|(name, shown)| shown.map(|shown| SetKey { name, shown })).collect()
    }

    fn check_fine_tuning(&self) -> Result<(), Fault> {
        match self.preference_keys().first() {
            None => Ok(()),
            Some(SetKey { name, shown }) => Err(conflict(
                &format!("{name} = {shown}"),
                "training_method = \"sft\"",
                "supervised fine-tuning has no preference loss",
            )
            .hint(format!("remove {name}, or train with training_method = \"dpo\""))),
        }
    }

    fn check_losses(&self) -> Result<(), Fault> {
        let losses = self.loss_type.all();
        if let Some(weights) = &self.loss_weights
            && weights.len() != losses.len()
        {
            let (weights, losses) = (
                crate::counted::counted(weights.len() as u64, "number"),
                crate::counted::counted(losses.len() as u64, "loss"),
            );
            return Err(Fault::input(format!("loss_weights has {weights}, but loss_type names {losses}"))
                .hint("write one weight for each loss, in the same order"));
        }
        for (at, loss) in losses.iter().enumerate() {
            let name = loss.name();
            if losses[..at].contains(loss) {
                return Err(Fault::input(format!("loss_type names \"{name}\" twice"))
                    .hint("name it once and give its factor in loss_weights"));
            }
            if losses.len() > 1 && loss.is_labelled() {
                let other = losses.iter().find(|other| *other != loss).copied().unwrap_or(*loss).name();
                return Err(Fault::input(format!(
                    "loss_type \"{name}\" cannot be combined with loss_type \"{other}\""
                ))
                .hint(format!("\"{name}\" is a loss of labelled answers, \"{other}\" one of pairs; train one after the other")));
            }
            if losses.len() > 1 && loss.stands_alone() {
                let other = losses.iter().find(|other| *other != loss).copied().unwrap_or(*loss).name();
                return Err(Fault::input(format!(
                    "loss_type \"{name}\" cannot be combined with loss_type \"{other}\""
                ))
                .hint(format!(
                    "\"{name}\" has no reference model; write it alone, with rpo_alpha for a likelihood term"
                )));
            }
        }
        if losses == [LossType::Sft] {
            return Err(Fault::input("loss_type = \"sft\" alone compares no outputs")
                .hint("write training_method = \"sft\", or combine it: loss_type = [\"sigmoid\", \"sft\"]"));
        }
        Ok(())
    }

    /// Fails if a key is set that has no meaning for answers without another answer beside them.
    fn check_labelled(&self) -> Result<(), Fault> {
        let weights =
            [("desirable_weight", self.desirable_weight), ("undesirable_weight", self.undesirable_weight)];
        let objective = self.objective();
        if !objective.is_labelled() {
            return match weights.into_iter().find_map(|(name, weight)| Some((name, weight?))) {
                None => Ok(()),
                Some((name, weight)) => Err(conflict(
                    &format!("{name} = {weight}"),
                    &self.loss_key(),
                    "only losses of labelled answers read it",
                )
                .hint(format!("remove {name}, or train with loss_type = \"kto\" or \"apo_zero_unpaired\""))),
            };
        }
        let key = |set: bool, key: String| set.then_some(key);
        let reads_pairs = [
            key(self.rpo_alpha != 0.0, format!("rpo_alpha = {}", self.rpo_alpha)),
            self.ld_alpha.map(|alpha| format!("ld_alpha = {alpha}")),
            key(self.use_weighting, "use_weighting = true".into()),
            key(self.dpo_reference_free, "dpo_reference_free = true".into()),
            key(self.dpo_normalize_logratios_by_length, "dpo_normalize_logratios_by_length = true".into()),
            key(self.keeps_references(), format!("reference_logps = {}", shown(self.reference_logps))),
        ];
        if let Some(set) = reads_pairs.into_iter().flatten().next() {
            let name = set.split(' ').next().unwrap_or_default().to_owned();
            return Err(conflict(
                &set,
                &self.loss_key(),
                "it is defined for pairs, not for labelled answers",
            )
            .hint(format!("remove {name}")));
        }
        if objective.estimates_kl() && self.batch_size == 1 {
            return Err(conflict(
                "batch_size = 1",
                &self.loss_key(),
                "the KL divergence is estimated with the answer of another record of the batch",
            )
            .hint("set batch_size to 2 or more; 8 or more is usual"));
        }
        Ok(())
    }

    fn check_label_smoothing(&self) -> Result<(), Fault> {
        let smoothed: Vec<LossType> = self
            .pair_losses()
            .iter()
            .map(|term| term.loss)
            .filter(|loss| loss.takes_label_smoothing())
            .collect();
        if self.label_smoothing == 0.0 {
            return match self.loss_type.contains(LossType::ExoPair) {
                true => Err(Fault::input("loss_type \"exo_pair\" needs label_smoothing above 0")
                    .hint("its formula has the logarithm of label_smoothing; TRL's examples use 1e-3")),
                false => Ok(()),
            };
        }
        let set = format!("label_smoothing = {}", self.label_smoothing);
        match smoothed.as_slice() {
            [] => Err(conflict(&set, &self.loss_key(), "that loss does not read it")
                .hint("remove label_smoothing, or train with \"sigmoid\", \"robust\", \"exo_pair\", \"aot\" or \"aot_unpaired\"")),
            [_] => Ok(()),
            [first, second, ..] => Err(conflict(
                &set,
                &self.loss_key(),
                &format!("both \"{}\" and \"{}\" would read it, with different meanings", first.name(), second.name()),
            )
            .hint("keep one of these losses")),
        }
    }

    fn check_divergence(&self) -> Result<(), Fault> {
        let divergence = format!("f_divergence_type = {}", shown(self.f_divergence_type));
        if let Some(coef) = self.f_alpha_divergence_coef
            && self.f_divergence_type != FDivergenceType::AlphaDivergence
        {
            return Err(conflict(
                &format!("f_alpha_divergence_coef = {coef}"),
                &divergence,
                "only the alpha-divergence reads it",
            )
            .hint("set f_divergence_type = \"alpha_divergence\", or remove f_alpha_divergence_coef"));
        }
        if self.f_divergence_type == FDivergenceType::ReverseKl {
            return Ok(());
        }
        let refused = self.pair_losses().into_iter().find(|term| !term.loss.takes_f_divergence());
        if refused.is_some() {
            return Err(conflict(&divergence, &self.loss_key(), "that loss is not a function of the difference of scores")
                .hint("other divergences go with \"sigmoid\", \"sigmoid_norm\", \"hinge\", \"ipo\", \"exo_pair\", \"robust\" and \"discopop\""));
        }
        if self.dpo_reference_free {
            return Err(conflict(
                &divergence,
                "dpo_reference_free = true",
                "a divergence needs a reference model",
            )
            .hint("remove one of them"));
        }
        Ok(())
    }

    fn check_normalization(&self) -> Result<(), Fault> {
        if !self.dpo_normalize_logratios_by_length {
            return Ok(());
        }
        let set = "dpo_normalize_logratios_by_length = true";
        let losses = self.pair_losses();
        // The hosted API's SimPO is this key together with a margin.
        let clashes = |loss: LossType| {
            loss != LossType::Simpo && (loss.is_normalized() || loss.couples_pairs() || loss.stands_alone())
        };
        match losses.iter().find(|term| clashes(term.loss)) {
            None => Ok(()),
            Some(term) => {
                let why = if term.loss.is_normalized() {
                    "that loss divides by the number of tokens by itself"
                } else {
                    "that loss is defined for sums over tokens"
                };
                Err(conflict(set, &self.loss_key(), why).hint("remove dpo_normalize_logratios_by_length"))
            }
        }
    }

    fn check_likelihood(&self) -> Result<(), Fault> {
        let cpo = self.loss_type.contains(LossType::Cpo);
        if let (Some(alpha), false) = (self.cpo_alpha, cpo) {
            return Err(conflict(
                &format!("cpo_alpha = {alpha}"),
                &self.loss_key(),
                "only the loss \"cpo\" reads it",
            )
            .hint("rpo_alpha adds the likelihood of the chosen outputs to the other losses"));
        }
        let adds = [LossType::Sft, LossType::Cpo, LossType::Orpo];
        if self.rpo_alpha != 0.0 && adds.into_iter().any(|loss| self.loss_type.contains(loss)) {
            return Err(conflict(
                &format!("rpo_alpha = {}", self.rpo_alpha),
                &self.loss_key(),
                "both add the likelihood of the chosen outputs",
            )
            .hint("remove rpo_alpha; loss_weights and cpo_alpha weigh that term"));
        }
        Ok(())
    }

    fn check_margin(&self) -> Result<(), Fault> {
        let Some(gamma) = self.simpo_gamma else { return Ok(()) };
        let dpo = self.loss_type.all() == [LossType::Sigmoid] && gamma >= 0.0;
        if dpo || self.loss_type.contains(LossType::Simpo) {
            return Ok(());
        }
        Err(conflict(&format!("simpo_gamma = {gamma}"), &self.loss_key(), "only SimPO has a target margin")
            .hint("set loss_type = \"simpo\", or remove simpo_gamma"))
    }

    fn check_weighting(&self) -> Result<(), Fault> {
        let losses = self.pair_losses();
        if self.discopop_tau.is_some() && !self.loss_type.contains(LossType::Discopop) {
            return Err(conflict("discopop_tau", &self.loss_key(), "only the loss \"discopop\" reads it")
                .hint("remove discopop_tau"));
        }
        if let (Some(alpha), Some(_)) = (self.ld_alpha, losses.iter().find(|term| term.loss.stands_alone())) {
            return Err(conflict(
                &format!("ld_alpha = {alpha}"),
                &self.loss_key(),
                "that loss has no log-ratios to weigh",
            )
            .hint("remove ld_alpha, or train with a loss that has a reference model"));
        }
        if !self.use_weighting {
            return Ok(());
        }
        let set = "use_weighting = true";
        if losses.iter().any(|term| term.loss.couples_pairs() || term.loss.stands_alone()) {
            return Err(conflict(set, &self.loss_key(), "that loss has no weighted form")
                .hint("remove use_weighting"));
        }
        if self.objective().nll_weight() != 0.0 {
            let other = if self.rpo_alpha != 0.0 {
                format!("rpo_alpha = {}", self.rpo_alpha)
            } else {
                self.loss_key()
            };
            return Err(conflict(
                set,
                &other,
                "the weights are those of pairs, the likelihood is a mean over tokens",
            )
            .hint("remove one of them"));
        }
        Ok(())
    }

    fn check_moving_reference(&self) -> Result<(), Fault> {
        if !self.sync_ref_model {
            let keys = [
                ("ref_model_mixup_alpha", self.ref_model_mixup_alpha.is_some()),
                ("ref_model_sync_steps", self.ref_model_sync_steps.is_some()),
            ];
            return match keys.into_iter().find(|(_, set)| *set) {
                None => Ok(()),
                Some((name, _)) => Err(Fault::input(format!("{name} is set, but sync_ref_model is false"))
                    .hint(format!("set sync_ref_model = true, or remove {name}"))),
            };
        }
        let set = "sync_ref_model = true";
        if !self.objective().needs_reference() {
            return Err(Fault::input(format!("{set}, but {}", self.why_no_reference()))
                .hint("remove sync_ref_model, or train with a loss that has a reference model"));
        }
        if self.keeps_references() {
            return Err(conflict(
                set,
                &format!("reference_logps = {}", shown(self.reference_logps)),
                "scores of a reference model that moves are soon out of date",
            )
            .hint("remove reference_logps"));
        }
        if self.lora && self.modules_to_save.is_some() {
            return Err(conflict(
                set,
                "modules_to_save",
                "with adapters, only adapters can be merged into the moving reference",
            )
            .hint("remove one of them, or train all weights"));
        }
        Ok(())
    }

    fn check_reference(&self) -> Result<(), Fault> {
        let objective = self.objective();
        if self.keeps_references() && !objective.needs_reference() {
            let why = self.why_no_reference();
            return Err(Fault::input(format!("reference_logps is set, but {why}")).hint(
                "remove reference_logps, or train with training_method = \"dpo\" and a loss that has a reference model",
            ));
        }
        if !self.offload_reference {
            return Ok(());
        }
        let why = match (objective.needs_reference(), self.reference_logps, self.lora) {
            (false, ..) => self.why_no_reference(),
            (_, ReferenceLogps::Precompute, _) => {
                "reference_logps = \"precompute\" frees the reference model".into()
            }
            (_, _, true) => "with lora the reference is the base model itself".into(),
            _ => return Ok(()),
        };
        Err(Fault::input(format!("offload_reference is set, but {why}")).hint("remove offload_reference"))
    }

    /// Reason for an error message; follows "reference_logps is set, but".
    fn why_no_reference(&self) -> String {
        if self.training_method == TrainingMethod::Sft {
            "supervised fine-tuning has no reference model".into()
        } else if self.dpo_reference_free {
            "dpo_reference_free = true trains without a reference model".into()
        } else if self.simpo_gamma.is_some_and(|gamma| gamma > 0.0)
            && self.loss_type.contains(LossType::Sigmoid)
        {
            "simpo_gamma above 0 is SimPO, which has no reference model".into()
        } else {
            format!("{} has no reference model", self.loss_key())
        }
    }

    fn loss_key(&self) -> String {
        format!("loss_type = {}", self.loss_type.shown())
    }
}

fn conflict(one: &str, other: &str, why: &str) -> Fault {
    Fault::input(format!("{one} cannot be combined with {other}: {why}"))
}

fn shown<T: serde::Serialize>(value: T) -> String {
    serde_json::to_string(&value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(keys: &str) -> Result<RunConfig, Fault> {
        let good = "model = \"m\"\ntraining_file = \"t\"\noutput_dir = \"o\"\n";
        RunConfig::from_toml(&format!("{good}{keys}\n"), "run.toml", &[])
    }

    /// Keys, and what the error must name.
    const REFUSED: [(&str, &[&str]); 44] = [
        ("training_method = \"sft\"\nrpo_alpha = 1", &["rpo_alpha = 1", "training_method = \"sft\""]),
        ("training_method = \"sft\"\nsimpo_gamma = 1", &["simpo_gamma = 1", "training_method = \"sft\""]),
        (
            "training_method = \"sft\"\nloss_type = \"ipo\"",
            &["loss_type = \"ipo\"", "training_method = \"sft\""],
        ),
        (
            "training_method = \"sft\"\nuse_weighting = true",
            &["use_weighting = true", "training_method = \"sft\""],
        ),
        ("loss_type = \"sft\"", &["loss_type = \"sft\""]),
        ("loss_type = [\"sigmoid\", \"sigmoid\"]", &["\"sigmoid\" twice"]),
        ("loss_type = [\"sigmoid\", \"simpo\"]", &["\"simpo\"", "\"sigmoid\""]),
        ("loss_type = [\"orpo\", \"sft\"]", &["\"orpo\"", "\"sft\""]),
        ("loss_weights = [1, 2]", &["loss_weights has 2 numbers", "loss_type names 1 loss"]),
        ("loss_type = [\"sigmoid\", \"sft\"]\nloss_weights = [1]", &["1 number", "2 losses"]),
        ("loss_type = \"exo_pair\"", &["\"exo_pair\"", "label_smoothing"]),
        ("loss_type = \"hinge\"\nlabel_smoothing = 0.1", &["label_smoothing = 0.1", "loss_type = \"hinge\""]),
        (
            "loss_type = [\"sigmoid\", \"robust\"]\nlabel_smoothing = 0.1",
            &["label_smoothing = 0.1", "\"sigmoid\"", "\"robust\""],
        ),
        (
            "f_alpha_divergence_coef = 0.3",
            &["f_alpha_divergence_coef = 0.3", "f_divergence_type = \"reverse_kl\""],
        ),
        (
            "f_divergence_type = \"forward_kl\"\nloss_type = \"bco_pair\"",
            &["f_divergence_type = \"forward_kl\"", "loss_type = \"bco_pair\""],
        ),
        (
            "f_divergence_type = \"js_divergence\"\nsimpo_gamma = 0.5",
            &["f_divergence_type = \"js_divergence\"", "loss_type"],
        ),
        (
            "f_divergence_type = \"js_divergence\"\ndpo_reference_free = true",
            &["f_divergence_type = \"js_divergence\"", "dpo_reference_free = true"],
        ),
        (
            "dpo_normalize_logratios_by_length = true\nloss_type = \"ipo\"",
            &["dpo_normalize_logratios_by_length = true", "loss_type = \"ipo\""],
        ),
        (
            "dpo_normalize_logratios_by_length = true\nloss_type = \"aot\"",
            &["dpo_normalize_logratios_by_length = true", "loss_type = \"aot\""],
        ),
        ("cpo_alpha = 1", &["cpo_alpha = 1", "loss_type = \"sigmoid\""]),
        ("loss_type = \"cpo\"\nrpo_alpha = 1", &["rpo_alpha = 1", "loss_type = \"cpo\""]),
        (
            "loss_type = [\"sigmoid\", \"sft\"]\nrpo_alpha = 1",
            &["rpo_alpha = 1", "loss_type = [\"sigmoid\", \"sft\"]"],
        ),
        ("loss_type = \"ipo\"\nsimpo_gamma = 1", &["simpo_gamma = 1", "loss_type = \"ipo\""]),
        ("discopop_tau = 0.1", &["discopop_tau", "loss_type = \"sigmoid\""]),
        ("ld_alpha = 0.5\nloss_type = \"cpo\"", &["ld_alpha = 0.5", "loss_type = \"cpo\""]),
        ("use_weighting = true\nloss_type = \"aot\"", &["use_weighting = true", "loss_type = \"aot\""]),
        ("use_weighting = true\nrpo_alpha = 0.5", &["use_weighting = true", "rpo_alpha = 0.5"]),
        ("ref_model_sync_steps = 8", &["ref_model_sync_steps is set", "sync_ref_model is false"]),
        ("sync_ref_model = true\nloss_type = \"orpo\"", &["sync_ref_model = true", "loss_type = \"orpo\""]),
        (
            "sync_ref_model = true\nreference_logps = \"cache\"",
            &["sync_ref_model = true", "reference_logps = \"cache\""],
        ),
        (
            "sync_ref_model = true\nlora = true\nmodules_to_save = [\"embed_tokens\"]",
            &["sync_ref_model = true", "modules_to_save"],
        ),
        ("desirable_weight = 1.5", &["desirable_weight = 1.5", "loss_type = \"sigmoid\""]),
        ("undesirable_weight = 1", &["undesirable_weight = 1", "loss_type = \"sigmoid\""]),
        (
            "training_method = \"sft\"\ndesirable_weight = 2",
            &["desirable_weight = 2", "training_method = \"sft\""],
        ),
        ("loss_type = [\"kto\", \"sigmoid\"]", &["\"kto\"", "\"sigmoid\""]),
        ("loss_type = \"kto\"\nrpo_alpha = 1", &["rpo_alpha = 1", "loss_type = \"kto\""]),
        ("loss_type = \"kto\"\nuse_weighting = true", &["use_weighting = true", "loss_type = \"kto\""]),
        ("loss_type = \"kto\"\nbatch_size = 1", &["batch_size = 1", "loss_type = \"kto\""]),
        (
            "loss_type = \"kto\"\nreference_logps = \"precompute\"",
            &["reference_logps = \"precompute\"", "loss_type = \"kto\""],
        ),
        (
            "loss_type = \"apo_zero_unpaired\"\ndpo_reference_free = true",
            &["dpo_reference_free = true", "loss_type = \"apo_zero_unpaired\""],
        ),
        (
            "reference_logps = \"precompute\"\ndpo_reference_free = true",
            &["reference_logps is set", "dpo_reference_free = true"],
        ),
        ("reference_logps = \"cache\"\nsimpo_gamma = 0.5", &["reference_logps is set", "simpo_gamma"]),
        (
            "reference_logps = \"cache\"\nloss_type = \"orpo\"",
            &["reference_logps is set", "loss_type = \"orpo\""],
        ),
        (
            "offload_reference = true\ntraining_method = \"sft\"",
            &["offload_reference is set", "no reference model"],
        ),
    ];

    #[test]
    fn keys_that_contradict_each_other_are_both_named() {
        for (keys, names) in REFUSED {
            let fault = checked(keys).expect_err(keys);
            assert!(names.iter().all(|name| fault.message.contains(name)), "{keys}: {fault}");
            assert!(!fault.hint.is_empty(), "{keys}");
        }
    }

    #[test]
    fn keys_that_belong_together_are_accepted() {
        for keys in [
            "label_smoothing = 0.1",
            "simpo_gamma = 0.0",
            "simpo_gamma = 0.5\ndpo_reference_free = true\ndpo_normalize_logratios_by_length = true",
            "loss_type = [\"sigmoid\", \"bco_pair\", \"sft\"]\nloss_weights = [0.8, 0.2, 1]",
            "loss_type = \"aot\"\nlabel_smoothing = 0.1\nrpo_alpha = 0.5",
            "loss_type = \"simpo\"\nlabel_smoothing = 0.1\nrpo_alpha = 0.5",
            "f_divergence_type = \"alpha_divergence\"\nf_alpha_divergence_coef = 0.7\nrpo_alpha = 0.1",
            "ld_alpha = 0\nreference_logps = \"precompute\"",
            "use_weighting = true\nloss_type = \"hinge\"",
        ] {
            assert!(checked(keys).is_ok(), "{keys}: {}", checked(keys).unwrap_err());
        }
    }

    #[test]
    fn an_unusual_beta_is_noted_and_the_usual_ones_are_not() {
        let notes = |keys: &str| checked(keys).unwrap().unusual();
        for keys in ["dpo_beta = 0.01", "dpo_beta = 2"] {
            assert!(notes(keys)[0].contains("0.05 to 0.9 is usual"), "{keys}");
        }
        for keys in [
            "",
            "dpo_beta = 0.05",
            "dpo_beta = 0.9",
            "dpo_beta = 2\nloss_type = \"simpo\"",
            "dpo_beta = 5\nloss_type = \"sigmoid_norm\"",
            "dpo_beta = 5\ndpo_normalize_logratios_by_length = true",
        ] {
            assert!(notes(keys).is_empty(), "{keys}");
        }
    }
}
