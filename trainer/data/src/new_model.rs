//! Small random models in Hugging Face format, for learning and tests: their own byte-level BPE tokenizer, ChatML template,
//! random weights. The same options give the same bytes.

mod weights;

use std::path::{Path, PathBuf};

use dyad_proto::{Fault, counted};
use dyad_sources::open;
use serde_json::json;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, DecoderWrapper, SplitDelimiterBehavior, Tokenizer};

use crate::tokenizer_class::QWEN2_SPLIT;

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
const END_OF_TEXT: &str = "<|endoftext|>";
const TURN_START: &str = "<|im_start|>";
const TURN_END: &str = "<|im_end|>";

/// Shape of a new model.
#[derive(Clone, Debug, clap::Args)]
pub struct NewModelOptions {
    /// Folder to write.
    #[arg(long)]
    pub out: PathBuf,
    /// Preference file (JSON Lines) whose texts the tokenizer is trained on.
    #[arg(long)]
    pub texts: PathBuf,
    /// Entries of the vocabulary, special tokens included.
    #[arg(long, default_value_t = 2048)]
    pub vocab_size: usize,
    /// Width of the residual stream.
    #[arg(long, default_value_t = 128)]
    pub hidden_size: usize,
    /// Decoder layers.
    #[arg(long, default_value_t = 4)]
    pub layers: usize,
    /// Query heads.
    #[arg(long, default_value_t = 4)]
    pub heads: usize,
    /// Key and value heads.
    #[arg(long, default_value_t = 2)]
    pub kv_heads: usize,
    /// Width of the MLP.
    #[arg(long, default_value_t = 512)]
    pub intermediate_size: usize,
    /// Longest sequence.
    #[arg(long, default_value_t = 1024)]
    pub max_positions: usize,
    /// Family: llama or qwen2.
    #[arg(long, default_value = "llama", value_parser = ["llama", "qwen2"])]
    pub model_type: String,
    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Replace the folder's files if it exists.
    #[arg(long)]
    pub overwrite: bool,
}

/// How the weights are stored.
#[derive(Clone, Debug, clap::Args)]
pub struct Storage {
    /// Precision of the stored weights.
    #[arg(long, value_enum, default_value_t = StoredDtype::Float32)]
    pub dtype: StoredDtype,
    /// Store a separate output head instead of using the embedding as head.
    #[arg(long)]
    pub untied_head: bool,
    /// Rows of embedding and head, if more than the tokenizer has entries; the rest is never used.
    #[arg(long, value_name = "ROWS")]
    pub pad_vocab_to: Option<usize>,
    /// Largest weight file in MiB; a model that needs more is written in shards.
    #[arg(long, default_value_t = 4096)]
    pub shard_mib: usize,
}

impl Default for Storage {
    fn default() -> Self {
        Self { dtype: StoredDtype::Float32, untied_head: false, pad_vocab_to: None, shard_mib: 4096 }
    }
}

/// Precision of stored weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum StoredDtype {
    /// Four bytes.
    Float32,
    /// Two bytes.
    Bfloat16,
}

impl StoredDtype {
    fn bytes(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::Bfloat16 => 2,
        }
    }

    /// Name in safetensors.
    fn code(self) -> &'static str {
        match self {
            Self::Float32 => "F32",
            Self::Bfloat16 => "BF16",
        }
    }

    /// Name in config.json.
    fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
        }
    }
}

/// Options of `trainer new-model`.
#[derive(Clone, Debug, clap::Args)]
pub struct NewModelCommand {
    /// Shape of the model.
    #[command(flatten)]
    pub model: NewModelOptions,
    /// Storage of the weights.
    #[command(flatten)]
    pub storage: Storage,
}

/// Writes the model folder, in float32, with the embedding as head.
pub fn create(options: &NewModelOptions) -> Result<(), Fault> {
    create_stored(options, &Storage::default())
}

/// Writes the model folder.
pub fn create_stored(options: &NewModelOptions, storage: &Storage) -> Result<(), Fault> {
    if options.out.exists() && !options.overwrite {
        return Err(Fault::input(format!("{} exists", options.out.display()))
            .hint("choose another --out, or pass --overwrite"));
    }
    if options.heads == 0
        || !options.hidden_size.is_multiple_of(2 * options.heads)
        || !options.heads.is_multiple_of(options.kv_heads.max(1))
    {
        return Err(Fault::input(
            "hidden-size must be a multiple of twice the heads, heads a multiple of kv-heads",
        ));
    }
    let texts = texts(&options.texts)?;
    std::fs::create_dir_all(&options.out).map_err(|error| cannot_write(&options.out, &error))?;
    let tokenizer = train_tokenizer(&texts, options)?;
    let entries = tokenizer.get_vocab_size(true);
    let rows = storage.pad_vocab_to.unwrap_or(entries);
    if rows < entries {
        return Err(Fault::input(format!(
            "--pad-vocab-to {rows} is less than the tokenizer's {}",
            counted(entries, "entry")
        ))
        .hint("raise it, or lower --vocab-size"));
    }
    let path = options.out.join("tokenizer.json");
    tokenizer.save(&path, true).map_err(|error| cannot_write(&path, &error))?;
    write_json(&options.out, "tokenizer_config.json", &tokenizer_config(options))?;
    write_json(&options.out, "config.json", &model_config(options, storage, &tokenizer, rows))?;
    let eos = tokenizer.token_to_id(TURN_END);
    let pad = tokenizer.token_to_id(END_OF_TEXT);
    write_json(&options.out, "generation_config.json", &json!({ "eos_token_id": eos, "pad_token_id": pad }))?;
    weights::write(options, storage, rows)
}

fn cannot_write(path: &Path, error: &dyn std::fmt::Display) -> Fault {
    Fault::input(format!("cannot write {}: {error}", path.display())).hint("check permissions and free space")
}

fn write_json(dir: &Path, name: &str, value: &serde_json::Value) -> Result<(), Fault> {
    let path = dir.join(name);
    std::fs::write(&path, format!("{value:#}\n")).map_err(|error| cannot_write(&path, &error))
}

fn texts(path: &Path) -> Result<Vec<String>, Fault> {
    let source = open::file("--texts", path)?;
    let mut texts = Vec::new();
    for id in 0..source.len() as u64 {
        texts.extend(source.pair(id)?.into_texts());
    }
    // The vocabulary must also cover the role names of the template.
    texts.extend(["system\n", "user\n", "assistant\n"].map(str::to_owned));
    Ok(texts)
}

fn train_tokenizer(texts: &[String], options: &NewModelOptions) -> Result<Tokenizer, Fault> {
    let failed = |error: tokenizers::Error| Fault::failed(format!("training the tokenizer: {error}"));
    let specials: Vec<AddedToken> =
        [END_OF_TEXT, TURN_START, TURN_END].iter().map(|token| AddedToken::from(*token, true)).collect();
    let mut trainer: TrainerWrapper = BpeTrainerBuilder::new()
        .vocab_size(options.vocab_size)
        .special_tokens(specials.clone())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build()
        .into();
    let byte_level = ByteLevel::new(false, true, true);
    let mut tokenizer = Tokenizer::new(BPE::default());
    if options.model_type == "qwen2" {
        let split =
            Split::new(SplitPattern::Regex(QWEN2_SPLIT.into()), SplitDelimiterBehavior::Isolated, false)
                .map_err(failed)?;
        let bytes = ByteLevel::new(false, true, false);
        tokenizer.with_normalizer(Some(NFC));
        tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])));
    } else {
        tokenizer.with_pre_tokenizer(Some(byte_level));
    }
    tokenizer.with_decoder(Some(DecoderWrapper::ByteLevel(byte_level)));
    tokenizer.train(&mut trainer, texts.iter()).map_err(failed)?;
    tokenizer.add_special_tokens(&specials);
    Ok(tokenizer)
}

fn tokenizer_config(options: &NewModelOptions) -> serde_json::Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHATML,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "model_max_length": options.max_positions,
        "clean_up_tokenization_spaces": false,
    })
}

fn model_config(
    options: &NewModelOptions,
    storage: &Storage,
    tokenizer: &Tokenizer,
    rows: usize,
) -> serde_json::Value {
    let architecture = if options.model_type == "qwen2" { "Qwen2ForCausalLM" } else { "LlamaForCausalLM" };
    json!({
        "architectures": [architecture],
        "model_type": options.model_type,
        "vocab_size": rows,
        "hidden_size": options.hidden_size,
        "intermediate_size": options.intermediate_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": options.max_positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": !storage.untied_head,
        "bos_token_id": null,
        "eos_token_id": tokenizer.token_to_id(TURN_END),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "torch_dtype": storage.dtype.name(),
    })
}

#[cfg(test)]
mod tests {
    use dyad_proto::pairs::forms;

    use super::*;
    use crate::tokenize::tokenize;
    use crate::tokenizer::ChatTokenizer;
    use crate::truncation::Rule;

    const LINE: &str = r#"{"input":{"messages":[{"role":"user","content":"Hi there"}]},"preferred_output":[{"role":"assistant","content":"Hello!"}],"non_preferred_output":[{"role":"assistant","content":"No."}]}"#;

    fn model() -> (tempfile::TempDir, NewModelOptions) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("pairs.jsonl"), LINE).unwrap();
        let options = NewModelOptions {
            out: dir.path().join("model"),
            texts: dir.path().join("pairs.jsonl"),
            vocab_size: 300,
            hidden_size: 16,
            layers: 1,
            heads: 2,
            kv_heads: 1,
            intermediate_size: 32,
            max_positions: 64,
            model_type: "qwen2".into(),
            seed: 1,
            overwrite: false,
        };
        (dir, options)
    }

    #[test]
    fn a_new_models_tokenizer_splits_pairs_at_the_assistants_turn() {
        let (_dir, options) = model();
        create(&options).unwrap();
        let tokenizer =
            ChatTokenizer::load(&options.out, &options.out, chrono::NaiveDateTime::default()).unwrap();
        let pair = forms::parse(LINE).unwrap();
        let (_, tokens) = tokenize(
            &tokenizer,
            &pair,
            Rule {
                max_len: 64,
                preferred_only: false,
                embedding_rows: u32::MAX,
                train_on_inputs: false,
                assistant_only: true,
            },
        )
        .unwrap();
        let text = |ids: &[u32]| tokenizer.decode(ids).unwrap();
        assert_eq!(text(&tokens.prompt), "user\nHi there\nassistant\n");
        assert_eq!((text(&tokens.chosen), text(&tokens.rejected)), ("Hello!\n".into(), "No.\n".into()));
        assert_eq!(tokenizer.stop_ids(), [tokens.chosen[tokens.chosen.len() - 2]]);
    }

    #[test]
    fn same_options_give_same_bytes_and_an_existing_folder_is_kept() {
        let (_dir, options) = model();
        create(&options).unwrap();
        let first = std::fs::read(options.out.join("model.safetensors")).unwrap();
        assert!(create(&options).unwrap_err().message.ends_with("exists"));
        create(&NewModelOptions { overwrite: true, ..options.clone() }).unwrap();
        assert_eq!(std::fs::read(options.out.join("model.safetensors")).unwrap(), first);
    }

    /// With shards, an untied head, padded rows and bfloat16, every tensor is written once and has finite values.
    #[test]
    fn a_large_model_is_written_in_shards() {
        let (_dir, options) = model();
        let mut storage = Storage {
            dtype: StoredDtype::Bfloat16,
            untied_head: true,
            pad_vocab_to: Some(70_000),
            shard_mib: 1,
        };
        create(&options).unwrap();
        create_stored(&NewModelOptions { overwrite: true, ..options.clone() }, &storage).unwrap();
        assert!(!options.out.join("model.safetensors").exists());
        let read = |name: &str| std::fs::read(options.out.join(name)).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&read("model.safetensors.index.json")).unwrap();
        let map = index["weight_map"].as_object().unwrap();
        let mut bytes = 0;
        for (name, file) in map {
            let file = read(file.as_str().unwrap());
            let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
            let tensor = tensors.tensor(name).unwrap();
            assert_eq!(tensor.dtype(), safetensors::Dtype::BF16);
            let values =
                tensor.data().chunks(2).map(|b| f32::from_bits(u32::from_le_bytes([0, 0, b[0], b[1]])));
            assert!(values.clone().all(|value| value.is_finite() && value.abs() < 1.1), "{name}");
            bytes += tensor.data().len();
        }
        assert_eq!(map["lm_head.weight"], "model-00003-of-00003.safetensors");
        assert_eq!(index["metadata"]["total_size"], bytes);
        let config: serde_json::Value = serde_json::from_slice(&read("config.json")).unwrap();
        assert_eq!((&config["vocab_size"], &config["torch_dtype"]), (&70_000.into(), &"bfloat16".into()));
        storage.pad_vocab_to = Some(10);
        let again = NewModelOptions { overwrite: true, ..options };
        assert!(
            create_stored(&again, &storage).unwrap_err().message.contains("--pad-vocab-to 10 is less than")
        );
    }

    #[test]
    fn a_tokenizer_without_template_is_refused_with_a_hint() {
        let (_dir, options) = model();
        create(&options).unwrap();
        std::fs::write(options.out.join("tokenizer_config.json"), "{}").unwrap();
        let fault =
            ChatTokenizer::load(&options.out, &options.out, chrono::NaiveDateTime::default()).unwrap_err();
        assert!(
            fault.message.ends_with("has no chat template") && fault.hint.contains("chat_template.jinja")
        );
        std::fs::remove_file(options.out.join("tokenizer.json")).unwrap();
        assert!(
            ChatTokenizer::load(&options.out, &options.out, chrono::NaiveDateTime::default())
                .unwrap_err()
                .message
                .starts_with("no tokenizer.json in")
        );
    }
}
