//! The reports of a rank on its work.

use dyad_proto::wire::{EvaluationReport, PreferenceSums, ReferenceReport, StepReport};

use crate::run::schedule::Work;

/// A rank's report on one work.
#[derive(Clone, Debug)]
pub enum WorkReport {
    /// On an optimizer step.
    Step(StepReport),
    /// On an evaluation.
    Evaluation(EvaluationReport),
    /// On a chunk of reference scores.
    Reference(ReferenceReport),
}

impl WorkReport {
    /// The work that it is about.
    #[must_use]
    pub fn work(&self) -> Work {
        match self {
            Self::Step(report) => Work::Step(report.step),
            Self::Evaluation(report) => Work::Evaluation(report.step),
            Self::Reference(report) => Work::Reference(report.chunk),
        }
    }

    /// The generation that the rank worked in.
    #[must_use]
    pub fn generation(&self) -> u64 {
        match self {
            Self::Step(report) => report.generation,
            Self::Evaluation(report) => report.generation,
            Self::Reference(report) => report.generation,
        }
    }

    /// Sums over the rank's pairs; `None` for reference scores.
    #[must_use]
    pub fn sums(&self) -> Option<&PreferenceSums> {
        match self {
            Self::Step(report) => report.sums.as_ref(),
            Self::Evaluation(report) => report.sums.as_ref(),
            Self::Reference(_) => None,
        }
    }
}
