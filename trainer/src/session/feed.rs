//! Turns the coordinator's messages into work that is ready to compute, on its own thread: answers measure requests, and tokenises the
//! pairs of coming steps while the current step runs.

use std::sync::mpsc;

use dyad_data::pair_tokenizer::{Measured, PairTokenizer};
use dyad_data::tokenized::Tokenized;
use dyad_proto::Fault;
use dyad_proto::wire::coordinator_message::Body as Received;
use dyad_proto::wire::trainer_message::Body as Sent;
use dyad_proto::wire::{
    CommunicatorReady, Finish, MeasureReport, MeasureRequest, Pair, ReferenceLogps, RunPlan, Split,
};

use crate::cost::flops::PassCost;
use crate::engine::StepShare;
use crate::observe::progress;
use crate::session::Handle;

/// The next piece of work, ready to compute.
#[derive(Debug)]
pub enum ReadyWork {
    /// Connect the ranks.
    Connect(CommunicatorReady),
    /// The plan of the run.
    Plan(RunPlan),
    /// One optimizer step.
    Step(AssignedStep),
    /// An evaluation.
    Evaluate {
        /// Optimizer steps done.
        step: u64,
        /// This rank's share of the validation pairs.
        pairs: Vec<Tokenized>,
        /// Reference log-probabilities of each pair, where they are known.
        references: Vec<Option<ReferenceLogps>>,
        /// Prompts that this rank answers.
        samples: SampledPrompts,
    },
    /// Score pairs with the reference model alone.
    Reference {
        /// Number of the chunk of pairs.
        chunk: u64,
        /// Ids of the pairs.
        ids: Vec<u64>,
        /// The pairs, tokenised.
        pairs: Vec<Tokenized>,
    },
    /// Save the model and leave.
    Finish(Finish),
    /// The run ends early, and all work before its end has been handed out.
    Drain,
}

/// Prompts that a rank answers at an evaluation.
#[derive(Debug)]
pub struct SampledPrompts {
    /// Id and place of each pair, and the ids of its prompt.
    pub prompts: Vec<(u64, String, Vec<u32>)>,
    /// Number of prompts of the rank that has most.
    pub slots: usize,
}

/// An optimizer step that the coordinator has assigned, with this rank's share of it.
#[derive(Debug)]
pub struct AssignedStep {
    /// Generation of the run.
    pub generation: u64,
    /// Ids of this rank's pairs.
    pub ids: Vec<u64>,
    /// What this rank computes.
    pub share: StepShare,
    /// Save a checkpoint after the step.
    pub checkpoint: bool,
    /// Remove that checkpoint once there are newer ones.
    pub rotates: bool,
    /// With early stopping: the step of the best evaluation so far, whose checkpoint stays; 0 if there is none.
    pub best_step: u64,
    /// Trace context of the step; empty if the step is not traced.
    pub traceparent: String,
}

/// Starts the thread; it ends with the session, or with the first error.
pub fn start(
    received: mpsc::Receiver<Received>,
    tokenizer: PairTokenizer,
    cost: PassCost,
    handle: Handle,
) -> Result<mpsc::Receiver<Result<ReadyWork, Fault>>, Fault> {
    let (deliver, work) = mpsc::channel();
    let mut feed = Feed { tokenizer, cost, handle };
    std::thread::Builder::new()
        .name("feed".into())
        .spawn(move || {
            for body in received {
                let prepared = progress::feeding(|| feed.prepare(body));
                let Some(result) = prepared.transpose() else { continue };
                let failed = result.is_err();
                if deliver.send(result).is_err() || failed {
                    return;
                }
            }
        })
        .map_err(|error| Fault::failed(format!("cannot start a thread: {error}")))?;
    Ok(work)
}

fn ids(pairs: &[Pair]) -> Vec<u64> {
    pairs.iter().map(|pair| pair.id).collect()
}

fn references(pairs: &[Pair]) -> Vec<Option<ReferenceLogps>> {
    pairs.iter().map(|pair| pair.reference).collect()
}

struct Feed {
    tokenizer: PairTokenizer,
    cost: PassCost,
    handle: Handle,
}

impl Feed {
    fn prepare(&mut self, body: Received) -> Result<Option<ReadyWork>, Fault> {
        Ok(Some(match body {
            Received::MeasureRequest(request) => return self.answer(&request).map(|()| None),
            Received::CommunicatorReady(ready) => ReadyWork::Connect(ready),
            Received::RunPlan(plan) => ReadyWork::Plan(plan),
            Received::Step(step) => ReadyWork::Step(AssignedStep {
                generation: step.generation,
                ids: ids(&step.pairs),
                share: StepShare {
                    step: step.step,
                    pairs: self.tokenizer.tokenize_with_partners(
                        Split::Train,
                        &step.pairs,
                        &step.partners,
                    )?,
                    references: references(&step.pairs),
                    global_pairs: step.global_pairs,
                    global_chosen_tokens: step.global_chosen_tokens,
                },
                checkpoint: step.checkpoint,
                rotates: step.rotates,
                best_step: step.best_step,
                traceparent: step.traceparent,
            }),
            Received::Evaluation(evaluation) => {
                let references = references(&evaluation.pairs);
                let (pairs, partners) = (&evaluation.pairs, &evaluation.partners);
                let pairs = self.tokenizer.tokenize_with_partners(Split::Validation, pairs, partners)?;
                let asked = self.tokenize(Split::Validation, &evaluation.samples)?;
                let prompts = evaluation.samples.iter().zip(asked);
                let samples = SampledPrompts {
                    prompts: prompts.map(|(pair, ids)| (pair.id, pair.place.clone(), ids.prompt)).collect(),
                    slots: evaluation.sample_slots as usize,
                };
                ReadyWork::Evaluate { step: evaluation.step, pairs, references, samples }
            }
            Received::Reference(reference) => ReadyWork::Reference {
                chunk: reference.chunk,
                ids: ids(&reference.pairs),
                pairs: self.tokenize(reference.split(), &reference.pairs)?,
            },
            Received::Finish(finish) => ReadyWork::Finish(finish),
            Received::Drain(_) => ReadyWork::Drain,
            // Handled by the session, or before this thread starts.
            Received::Abort(_)
            | Received::Hold(_)
            | Received::Welcome(_)
            | Received::Assignment(_)
            | Received::Recorded(_)
            | Received::Posting(_)
            | Received::KeepTrace(_)
            | Received::Beat(_) => {
                return Ok(None);
            }
        }))
    }

    fn answer(&mut self, request: &MeasureRequest) -> Result<(), Fault> {
        let Measured { mut lengths, refusal, notes } =
            self.tokenizer.measure(request.split(), &request.pairs)?;
        for length in &mut lengths {
            length.cost = self.cost.of(length);
        }
        let refusal = refusal.map(Into::into);
        let stop_tokens = self.tokenizer.stop_tokens().join(", ");
        let notes = notes.into_iter().map(str::to_owned).collect();
        let report = MeasureReport { split: request.split, lengths, refusal, stop_tokens, notes };
        self.handle.send(Sent::MeasureReport(report));
        Ok(())
    }

    fn tokenize(&mut self, split: Split, pairs: &[Pair]) -> Result<Vec<Tokenized>, Fault> {
        self.tokenizer.tokenize(split, pairs)
    }
}
