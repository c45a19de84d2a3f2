//! Greedy completions of a few prompts, to look at what a model says.

use std::path::{Path, PathBuf};

use dyad_data::adapter::{self, Base, base};
use dyad_data::tokenizer::ChatTokenizer;
use dyad_proto::pairs::Message;
use dyad_proto::{Fault, lfs, manifest};
use dyad_sources::hub;
use tch::Tensor;

use crate::model::Model;
use crate::model::lora;
use crate::model::pass::Pass;
use dyad_torch::ops::segment::Segment;
use dyad_torch::place::Place;
use dyad_torch::transfer::values;

/// The text to complete.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// A conversation; the chat template renders it and opens the answer.
    Messages(Vec<Message>),
    /// Text that is used as it is.
    Text(String),
}

/// Token ids of a prompt. Fails if the model does not know one of them.
pub fn prompt(tokenizer: &ChatTokenizer, prompt: &Prompt, model: &Model) -> Result<Vec<u32>, Fault> {
    let ids = match prompt {
        Prompt::Messages(conversation) => tokenizer.encode(&tokenizer.render(conversation, true)?)?,
        Prompt::Text(text) => tokenizer.encode_plain(text)?,
    };
    tokenizer.check_known(ids.iter().copied(), u32::try_from(model.config.vocab_size).unwrap_or(0))?;
    Ok(ids)
}

/// Greedy answers to some prompts. Each pass is packed and computes one token of all of them.
pub fn complete(
    model: &Model,
    tokenizer: &ChatTokenizer,
    prompts: Vec<Vec<u32>>,
    max_new_tokens: usize,
) -> Result<Vec<String>, Fault> {
    let mut open: Vec<GeneratedAnswer> =
        prompts.into_iter().map(|ids| GeneratedAnswer { prompt_len: ids.len(), ids, done: false }).collect();
    for _ in 0..max_new_tokens {
        let mut growing: Vec<&mut GeneratedAnswer> = open.iter_mut().filter(|answer| !answer.done).collect();
        if growing.is_empty() {
            break;
        }
        let next = next_tokens(model, &growing)?;
        for (answer, token) in growing.iter_mut().zip(next) {
            answer.done = tokenizer.stop_ids().contains(&token);
            if !answer.done {
                answer.ids.push(token);
            }
        }
    }
    open.iter()
        .map(|answer| Ok(tokenizer.decode(&answer.ids[answer.prompt_len..])?.trim().to_owned()))
        .collect()
}

struct GeneratedAnswer {
    ids: Vec<u32>,
    prompt_len: usize,
    done: bool,
}

fn next_tokens(model: &Model, answers: &[&mut GeneratedAnswer]) -> Result<Vec<u32>, Fault> {
    let (mut tokens, mut positions, mut segments, mut rows) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for answer in answers {
        let start = tokens.len() as i64;
        segments.push(Segment { start, prompt: answer.ids.len() as i64, branches: Vec::new() });
        tokens.extend(answer.ids.iter().map(|&id| i64::from(id)));
        positions.extend(0..answer.ids.len() as i64);
        rows.push(tokens.len() as i64 - 1);
    }
    let on_device = |values: &[i64]| Tensor::from_slice(values).to_device(model.place.device);
    let rotary = model.rotary(&on_device(&positions));
    let pass = Pass { segments: &segments, varlen: None, rotary: &rotary, training: false };
    let hidden =
        model.hidden_states(&on_device(&tokens), &pass).map_err(|error| Fault::failed(error.to_string()))?;
    let logits = tch::no_grad(|| model.normed_rows(&hidden, &on_device(&rows)).matmul(&model.head().tr()));
    Ok(values::<i64>(&logits.argmax(-1, false)).into_iter().map(|id| id as u32).collect())
}

/// Compares a folder with its manifest. Fails if weights are damaged; logs a warning that names other changed files.
fn check_sums(dir: &Path) -> Result<(), Fault> {
    manifest::check_start(dir, true)?.iter().for_each(|line| tracing::warn!("{line}"));
    Ok(())
}

/// Loads a whole model, or an adapter with the base that it names. Also returns the folder of the whole model.
pub fn load(dir: &Path, place: Place) -> Result<(Model, PathBuf), Fault> {
    lfs::refuse_pointers_in(dir)?;
    check_sums(dir)?;
    if !adapter::is_adapter(dir) {
        return Ok((Model::load(dir, place)?, dir.to_owned()));
    }
    let Base { name: base, revision } = Base::required(dir)?;
    let base_dir = hub::resolve_at(&base, revision.as_deref().unwrap_or(hub::MAIN))?;
    lfs::refuse_pointers_in(&base_dir)?;
    check_sums(&base_dir)?;
    let mut model = Model::load(&base_dir, place)?;
    let adapters = lora::attach_folder(&mut model, dir)?;
    if let Some(warning) = base::mismatch(adapters.base(), &base, &base_dir) {
        tracing::warn!("{warning}");
    }
    lora::cast(&mut model);
    Ok((model, base_dir))
}
