//! What a run wants of a data file: a form, and records that its objective can be trained on.

use std::path::Path;

use super::Kind;
use super::forms::Form;
use crate::run_config::{DatasetFormat, Objective};
use crate::{Fault, RunConfig};

/// What a run wants of its data files.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// The configured form; `auto` lets the first record decide.
    pub format: DatasetFormat,
    /// What is minimised; `None` takes every kind of record.
    pub objective: Option<Objective>,
}

impl Wanted {
    /// What the configuration wants.
    #[must_use]
    pub fn of(config: &RunConfig) -> Self {
        Self { format: config.dataset_format, objective: Some(config.objective()) }
    }

    /// Fails if the run cannot be trained on records of this form. `key` is the configuration key of the file.
    pub fn check(&self, key: &str, path: &Path, form: &Form) -> Result<(), Fault> {
        let Some(objective) = self.objective.filter(|objective| !takes(*objective, form.kind)) else {
            return Ok(());
        };
        let holds = match form.kind {
            Kind::Pair => "pairs",
            Kind::Labelled => "labelled answers",
            Kind::Answer => "answers without a rejected one",
        };
        let (wants, hint) = match (objective.is_labelled(), objective.scores_both_outputs()) {
            (true, _) => (
                "this loss_type is trained on labelled answers",
                "give `prompt`, `completion` and `label` (docs/data.md); launcher convert --to unpaired_preference makes two labelled answers of each pair",
            ),
            (_, true) if matches!(form.kind, Kind::Labelled) => (
                "this loss_type is trained on pairs",
                "set loss_type = \"kto\" or \"apo_zero_unpaired\", which are trained on labelled answers",
            ),
            (_, true) => (
                "training_method = \"dpo\" is trained on pairs",
                "give pairs (docs/data.md), or set training_method = \"sft\"; dataset_format names the form",
            ),
            (_, false) => (
                "training_method = \"sft\" is trained on answers that are all desirable",
                "set dataset_format = \"prompt_completion\" to train on all of them, whatever their label",
            ),
        };
        let (path, fields, name) = (path.display(), form.fields, form.name);
        Err(Fault::input(format!("{key} {path} holds {holds} ({fields}: {name} form), but {wants}"))
            .hint(hint))
    }
}

/// Whether an objective can be trained on records of a kind.
const fn takes(objective: Objective, kind: Kind) -> bool {
    match kind {
        Kind::Pair => !objective.is_labelled(),
        Kind::Labelled => objective.is_labelled(),
        Kind::Answer => !objective.is_labelled() && !objective.scores_both_outputs(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run_config::LossType;

    #[test]
    fn every_objective_refuses_records_that_it_cannot_use() {
        let check = |objective, line: &str| {
            let wanted = Wanted { objective: Some(objective), ..Wanted::default() };
            wanted.check("training_file", Path::new("t.jsonl"), Form::of(line)).map_err(|fault| fault.message)
        };
        let (dpo, sft) = (Objective::of_loss(LossType::Sigmoid), Objective::LIKELIHOOD);
        let pair = r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#;
        let (text, labelled) = (r#"{"text": "a"}"#, r#"{"prompt": "a", "completion": "b", "label": true}"#);
        assert_eq!((check(dpo, pair), check(sft, pair), check(sft, text)), (Ok(()), Ok(()), Ok(())));
        assert_eq!(
            check(dpo, text).unwrap_err(),
            "training_file t.jsonl holds answers without a rejected one (`text`: text form), but training_method = \"dpo\" is trained on pairs"
        );
        assert!(check(sft, labelled).unwrap_err().contains("holds labelled answers"));
        let kto = Objective::of_loss(LossType::Kto);
        assert_eq!(check(kto, labelled), Ok(()));
        assert!(check(kto, pair).unwrap_err().ends_with("but this loss_type is trained on labelled answers"));
        assert!(check(dpo, labelled).unwrap_err().ends_with("but this loss_type is trained on pairs"));
    }
}
