//! Small random models in Hugging Face format, to learn and test with: own byte-level BPE tokenizer, ChatML template,
//! random weights. The same options give the same bytes.

use std::path::{Path, PathBuf};

use dyad_proto::{Fault, pair_file};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};
use serde_json::json;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, DecoderWrapper, SplitDelimiterBehavior, Tokenizer};

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

/// Writes the model folder.
pub fn create(options: &NewModelOptions) -> Result<(), Fault> {
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
    let path = options.out.join("tokenizer.json");
    tokenizer.save(&path, true).map_err(|error| cannot_write(&path, &error))?;
    write_json(&options.out, "tokenizer_config.json", &tokenizer_config(options))?;
    write_json(&options.out, "config.json", &model_config(options, &tokenizer))?;
    let eos = tokenizer.token_to_id(TURN_END);
    let pad = tokenizer.token_to_id(END_OF_TEXT);
    write_json(&options.out, "generation_config.json", &json!({ "eos_token_id": eos, "pad_token_id": pad }))?;
    write_weights(options, tokenizer.get_vocab_size(true))
}

fn cannot_write(path: &Path, error: &dyn std::fmt::Display) -> Fault {
    Fault::input(format!("cannot write {}: {error}", path.display())).hint("check permissions and free space")
}

fn write_json(dir: &Path, name: &str, value: &serde_json::Value) -> Result<(), Fault> {
    let path = dir.join(name);
    std::fs::write(&path, format!("{value:#}\n")).map_err(|error| cannot_write(&path, &error))
}

fn texts(path: &Path) -> Result<Vec<String>, Fault> {
    let pairs = pair_file::pairs("--texts", path)?;
    let messages = pairs
        .into_iter()
        .flat_map(|pair| pair.messages.into_iter().chain([pair.preferred, pair.non_preferred]));
    let contents = messages.map(|message| message.content);
    // The template's own words must be in the vocabulary too.
    Ok(contents.chain(["system\n", "user\n", "assistant\n"].map(str::to_owned)).collect())
}

/// transformers gives every qwen2 folder this split, whatever its tokenizer.json says.
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

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

fn model_config(options: &NewModelOptions, tokenizer: &Tokenizer) -> serde_json::Value {
    let architecture = if options.model_type == "qwen2" { "Qwen2ForCausalLM" } else { "LlamaForCausalLM" };
    json!({
        "architectures": [architecture],
        "model_type": options.model_type,
        "vocab_size": tokenizer.get_vocab_size(true),
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
        "tie_word_embeddings": true,
        "bos_token_id": null,
        "eos_token_id": tokenizer.token_to_id(TURN_END),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "torch_dtype": "float32",
    })
}

/// Name and shape of every tensor of the model.
fn tensors(options: &NewModelOptions, vocab: usize) -> Vec<(String, Vec<usize>)> {
    let (hidden, inner) = (options.hidden_size, options.intermediate_size);
    let keys = hidden / options.heads * options.kv_heads;
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
    for layer in 0..options.layers {
        let mut add = |name: &str, shape: &[usize]| {
            tensors.push((format!("model.layers.{layer}.{name}"), shape.to_vec()))
        };
        add("input_layernorm.weight", &[hidden]);
        for (name, outputs) in [("q", hidden), ("k", keys), ("v", keys)] {
            add(&format!("self_attn.{name}_proj.weight"), &[outputs, hidden]);
            if options.model_type == "qwen2" {
                add(&format!("self_attn.{name}_proj.bias"), &[outputs]);
            }
        }
        add("self_attn.o_proj.weight", &[hidden, hidden]);
        add("post_attention_layernorm.weight", &[hidden]);
        add("mlp.gate_proj.weight", &[inner, hidden]);
        add("mlp.up_proj.weight", &[inner, hidden]);
        add("mlp.down_proj.weight", &[hidden, inner]);
    }
    tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
    tensors
}

fn write_weights(options: &NewModelOptions, vocab: usize) -> Result<(), Fault> {
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let filled: Vec<(String, Vec<usize>, Vec<u8>)> = tensors(options, vocab)
        .into_iter()
        .map(|(name, shape)| {
            let bytes = values(&name, shape.iter().product(), &mut rng);
            (name, shape, bytes)
        })
        .collect();
    let path = options.out.join("model.safetensors");
    let views: Result<Vec<_>, _> = filled
        .iter()
        .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect();
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    views
        .and_then(|views| serialize_to_file(views, Some(metadata), &path))
        .map_err(|error: safetensors::SafeTensorError| cannot_write(&path, &error))
}

/// Norms start at one, biases at zero, matrices normal with deviation 0.02.
fn values(name: &str, count: usize, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut value = || match name {
        _ if name.contains("norm") => 1.0,
        _ if name.ends_with("bias") => 0.0,
        _ => 0.02 * normal(rng),
    };
    (0..count).flat_map(|_| value().to_le_bytes()).collect()
}

/// Box-Muller.
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let (u, v): (f64, f64) = (rng.random::<f64>().max(f64::MIN_POSITIVE), rng.random());
    ((-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()) as f32
}

#[cfg(test)]
mod tests {
    use dyad_proto::preference::PreferencePair;

    use super::*;
    use crate::tokenize::{Rule, tokenize};
    use crate::tokenizer::ChatTokenizer;

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
        let tokenizer = ChatTokenizer::load(&options.out).unwrap();
        let pair = PreferencePair::parse(LINE).unwrap();
        let (_, tokens) = tokenize(&tokenizer, &pair, Rule { max_len: 64, preferred_only: false }).unwrap();
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

    #[test]
    fn a_tokenizer_without_template_is_refused_with_a_hint() {
        let (_dir, options) = model();
        create(&options).unwrap();
        std::fs::write(options.out.join("tokenizer_config.json"), "{}").unwrap();
        let fault = ChatTokenizer::load(&options.out).unwrap_err();
        assert!(
            fault.message.ends_with("has no chat template") && fault.hint.contains("chat_template.jinja")
        );
        std::fs::remove_file(options.out.join("tokenizer.json")).unwrap();
        assert!(ChatTokenizer::load(&options.out).unwrap_err().message.starts_with("no tokenizer.json in"));
    }
}
