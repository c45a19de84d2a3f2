//! Tokenizer and limits of a model, without its weights.

use dyad_data::tokenizer::ChatTokenizer;
use dyad_data::truncation::Rule;
use dyad_families::ModelConfig;
use dyad_proto::pairs::{Content, Example};
use dyad_proto::{Fault, RunConfig};
use dyad_sources::hub;

/// What decides the tokens of a record.
#[derive(Debug)]
pub struct KnownModel {
    /// Tokenizer and chat template.
    pub tokenizer: ChatTokenizer,
    /// Limits of a sequence, and what is trained of it.
    pub rule: Rule,
}

impl KnownModel {
    /// Reads a model folder, or fetches the tokenizer of a hub id. `config` has the settings of a run that decide the tokens.
    pub fn load(config: &RunConfig) -> Result<Self, Fault> {
        let revision = config.model_revision.as_deref().unwrap_or(hub::MAIN);
        let folder = hub::tokenizer_folder(&config.model, revision)?;
        let about = ModelConfig::load(&folder)?;
        let mut config = config.clone();
        config.fill_template_date();
        let tokenizer = ChatTokenizer::load(&folder, &folder, config.template_date()?)?;
        let limit = usize::try_from(about.max_position_embeddings).unwrap_or(1).max(1);
        let most = config.max_seq_length.map_or(limit, |length| length as usize);
        let rule = Rule::of(&config, most, u32::try_from(about.vocab_size).unwrap_or(0));
        Ok(Self { tokenizer, rule })
    }

    /// The rule for a record: one with a single answer has no rejected side.
    #[must_use]
    pub fn rule_of(&self, example: &Example) -> Rule {
        let paired = match &example.content {
            Content::Conversation(said) => !said.rejected.is_empty(),
            Content::Text(text) => text.rejected.is_some(),
        };
        Rule { preferred_only: self.rule.preferred_only || !paired, ..self.rule }
    }
}
