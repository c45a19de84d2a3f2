//! `trainer check`: checks a run's inputs with the code that loads them. Reads no weights.

use std::path::Path;

use dyad_data::adapter;
use dyad_data::tokenize::tokenize;
use dyad_data::tokenizer::ChatTokenizer;
use dyad_data::truncation::{Rule, is_trainable};
use dyad_families::{FirstPairs, ModelFindings, Sizes};
use dyad_proto::pairs::notes;
use dyad_proto::pairs::wanted::Wanted;
use dyad_proto::wire::PairVerdict;
use dyad_proto::{Fault, RunConfig, left_out};
use dyad_sources::hub::{self, Found};
use dyad_sources::open::{self, Beginning};
use dyad_sources::places;
use tch::{Device, Kind};

use crate::load::Sources;
use crate::model::Model;
use crate::model::lora;
use crate::model::weights::Reading;
use dyad_families::ModelConfig;
use dyad_torch::place::Place;

/// Number of pairs to tokenise: enough to exercise template and vocabulary, few enough to be fast.
const PAIRS: usize = 16;
/// Most bytes to read for these pairs.
const BYTES: u64 = 64 << 20;

/// Sizes of a model: of a folder, or of a hub id, of which only `config.json` is downloaded.
pub fn model(name: &str) -> Result<Sizes, Fault> {
    let config = match hub::find(name, hub::MAIN)? {
        Found::Here(dir) => ModelConfig::load(&dir)?,
        Found::Remote { config_json } => of_hub(name, &config_json)?,
    };
    config.refuse_dropout()?;
    Ok(Sizes::from(&config))
}

fn of_hub(name: &str, config_json: &str) -> Result<ModelConfig, Fault> {
    ModelConfig::parse(config_json)
        .map_err(|fault| Fault { message: format!("config.json of {name}: {}", fault.message), ..fault })
}

/// Checks everything that a run starts from. Fails with the error with which the run's trainers would fail.
pub fn run(config: &RunConfig) -> Result<ModelFindings, Fault> {
    let mut remote = Vec::new();
    for (name, revision) in named(config)? {
        if let Found::Remote { config_json } = hub::find(&name, &revision)? {
            // An adapter on the hub has no config.json; its base has one.
            let read = config_json.is_empty().then_some(Ok(None));
            let read: Result<Option<ModelConfig>, Fault> =
                read.unwrap_or_else(|| of_hub(&name, &config_json).map(Some));
            remote.push((name, read?));
        }
    }
    if remote.is_empty() {
        return local(config);
    }
    let to_download: Vec<String> = remote.iter().map(|(name, _)| name.clone()).collect();
    let parsed = remote.into_iter().find_map(|(_, config)| config);
    let sizes = match parsed {
        Some(parsed) => {
            parsed.refuse_dropout()?;
            Sizes::from(&parsed)
        }
        None => model(&config.model)?,
    };
    Ok(ModelFindings {
        model: sizes,
        parameters: None,
        trainable: None,
        to_download,
        max_seq_length: None,
        pairs: None,
    })
}

/// Models and adapters that the configuration starts from, with their revisions. Includes the base that an adapter names.
fn named(config: &RunConfig) -> Result<Vec<(String, String)>, Fault> {
    let main = || hub::MAIN.to_owned();
    let mut names: Vec<(String, String)> =
        config.from_checkpoint.iter().map(|start| (start.clone(), main())).collect();
    if !config.model.is_empty() {
        names.push((config.model.clone(), config.model_revision.clone().unwrap_or_else(main)));
    } else if let Some(start) = config.from_checkpoint.as_deref().map(Path::new)
        && adapter::is_adapter(start)
    {
        let base = adapter::Base::required(start)?;
        names.push((base.name, base.revision.unwrap_or_else(main)));
    }
    Ok(names)
}

fn local(config: &RunConfig) -> Result<ModelFindings, Fault> {
    // Use only what is already cached; download nothing.
    let sources = Sources::resolve_by(config, &|name, revision| match hub::find(name, revision)? {
        Found::Here(dir) => Ok(dir),
        Found::Remote { .. } => Err(Fault::failed(format!("{name} is not here"))),
    })?;
    sources.check_sums(false)?;
    let model_config = ModelConfig::load(&sources.base)?;
    model_config.refuse_dropout()?;
    let tokenizer = ChatTokenizer::load(sources.tokenizer(), &sources.base, config.template_date()?)?;
    let embedding_rows = u32::try_from(model_config.vocab_size).unwrap_or(0);
    let rule = Rule::of(config, sources.max_seq_length(config)?, embedding_rows);
    let (parameters, trainable) = weights(config, &sources)?;
    // Only the coordinator's host has the pairs.
    let pairs = if places::are_here(&config.training_file) { pairs(config, &tokenizer, rule)? } else { None };
    Ok(ModelFindings {
        model: Sizes::from(&model_config),
        parameters: Some(parameters),
        trainable: Some(trainable),
        to_download: Vec::new(),
        max_seq_length: Some(rule.max_len),
        pairs,
    })
}

/// Finds every tensor of model and adapter and checks its shape against the configuration. Returns the number of weights, and of those
/// that the run trains.
fn weights(config: &RunConfig, sources: &Sources) -> Result<(u64, u64), Fault> {
    let place = Place { device: Device::Cpu, kind: Kind::Float };
    let reading = Reading { shapes_alone: true, ..Reading::default() };
    let mut model = Model::load_units(&sources.base, place, &reading, &mut |_, _| {})?;
    let all = model.parameter_count();
    if !config.lora {
        return Ok((all, all));
    }
    let adapters = lora::Adapters::of_run(config, sources.adapter.as_deref(), &mut model)?;
    lora::attach(&mut model, &adapters, 0, &reading, None)?;
    let layers = lora::named_tensors(&mut model);
    Ok((all, layers.iter().flatten().map(|(_, tensor)| tensor.numel() as u64).sum()))
}

/// The first pairs; `None` if they were not fetched yet.
fn pairs(config: &RunConfig, tokenizer: &ChatTokenizer, rule: Rule) -> Result<Option<FirstPairs>, Fault> {
    let beginning =
        open::beginning("training_file", &config.training_file, Wanted::of(config), (PAIRS, BYTES))?;
    let Some(Beginning { source, whole }) = beginning else { return Ok(None) };
    let mut looked = FirstPairs::default();
    let mut verdicts = Vec::new();
    for id in 0..source.len() as u64 {
        let at =
            |fault: Fault| Fault { message: format!("{}: {}", source.place(id), fault.message), ..fault };
        let (verdict, tokens) = tokenize(tokenizer, &source.pair(id)?, rule).map_err(at)?;
        verdicts.push(verdict);
        looked.pairs += 1;
        looked.truncated += usize::from(verdict == PairVerdict::Truncated);
        if !is_trainable(verdict) {
            looked.dropped += 1;
            continue;
        }
        let longest = tokens.prompt.len() + tokens.chosen.len().max(tokens.rejected.len());
        looked.longest = looked.longest.max(longest);
        looked.prompt += tokens.prompt.len() as f64;
        looked.chosen += tokens.chosen.len() as f64;
        looked.rejected += tokens.rejected.len() as f64;
    }
    looked.notes = notes::of("training_file", &*source);
    if whole && looked.dropped == looked.pairs {
        let count = |one| verdicts.iter().filter(|verdict| **verdict == one).count() as u64;
        return Err(left_out::none_is_left("training_file", &config.training_file.to_string(), &count));
    }
    let kept = looked.pairs.saturating_sub(looked.dropped).max(1) as f64;
    let FirstPairs { prompt, chosen, rejected, .. } = looked;
    Ok(Some(FirstPairs { prompt: prompt / kept, chosen: chosen / kept, rejected: rejected / kept, ..looked }))
}
