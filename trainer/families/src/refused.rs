//! Refuses fields of `config.json` that describe a model which is not supported: quantised weights, experts, caps and scales of other
//! families. Each is allowed at its neutral value.

use dyad_proto::Fault;
use serde_json::Value;

use super::fields::Fields;

/// Refused unless null, false, zero or empty.
const ADDED: [&str; 34] = [
    "add_cross_attention",
    "alibi",
    "attention_chunk_size",
    "attention_multiplier",
    "attn_logit_softcapping",
    "attn_output_gate",
    "attn_temperature_tuning",
    "clip_qkv",
    "cross_attention_layers",
    "dim_model_base",
    "final_logit_softcapping",
    "logits_soft_cap",
    "mlp_layer_types",
    "moe_intermediate_size",
    "moe_layer_freq",
    "mrope_section",
    "n_routed_experts",
    "n_shared_experts",
    "no_rope_layer_interval",
    "no_rope_layers",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "num_shared_experts",
    "per_layer_config",
    "qk_layernorm",
    "qk_norm",
    "query_pre_attn_scalar",
    "rope_interleave",
    "rope_interleaved",
    "use_alibi",
    "use_bidirectional_attention",
    "use_mrope",
    "use_qk_norm",
];

/// Refused unless null or one.
const FACTORS: [&str; 10] = [
    "embed_scale",
    "embedding_multiplier",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "partial_rotary_factor",
    "residual_multiplier",
    "rotary_pct",
    "scale_depth",
    "scale_emb",
];

/// Fields in which tools describe how they quantised the weights.
const QUANTISED: [&str; 3] = ["quantization_config", "compression_config", "quantization"];

/// Fields that are read or do not affect the computation.
const KNOWN: [&str; 91] = [
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attention_bias",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cls_token_id",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "id2label",
    "initializer_range",
    "intermediate_size",
    "is_causal",
    "is_decoder",
    "is_encoder_decoder",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "layer_types",
    "length_penalty",
    "max_length",
    "max_position_embeddings",
    "max_window_layers",
    "min_length",
    "mlp_bias",
    "model_type",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_attention_heads",
    "num_beam_groups",
    "num_beams",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_labels",
    "num_return_sequences",
    "original_max_position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sep_token_id",
    "sliding_window",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_word_embeddings",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
];

/// Fails at a field that is not supported; returns a warning with the names of ignored fields.
pub(super) fn check(fields: Fields<'_>, family: &str, windows: bool) -> Result<Vec<String>, Fault> {
    refuse_quantised(fields)?;
    if let Some(file) = fields.0.get("transformers_weights").filter(|file| !file.is_null()) {
        return Err(unsupported("transformers_weights", file)
            .hint("call that file model.safetensors, and remove the field"));
    }
    let mut ignored = Vec::new();
    for (name, value) in fields.0 {
        let name = name.as_str();
        let neutral = match name {
            "is_causal" => value.is_null() || value.as_bool() == Some(true),
            _ if FACTORS.contains(&name) => value.is_null() || value.as_f64() == Some(1.0),
            _ if ADDED.contains(&name) => is_nothing(value),
            _ => true,
        };
        if !neutral {
            return Err(unsupported(name, value).hint(format!(
                "{family} in transformers does not know it: the weights are of another kind of model, or the field does not belong here"
            )));
        }
        let windowless = name == "sliding_window" && !windows;
        let known = !windowless && KNOWN.contains(&name) || ADDED.contains(&name) || FACTORS.contains(&name);
        if !known && !QUANTISED.contains(&name) && !name.starts_with("unsloth_") && !is_nothing(value) {
            ignored.push(name);
        }
    }
    let warning =
        || format!("config.json: fields that {family} does not know are ignored: {}", ignored.join(", "));
    Ok(if ignored.is_empty() { Vec::new() } else { vec![warning()] })
}

fn refuse_quantised(fields: Fields<'_>) -> Result<(), Fault> {
    let Some((name, value)) = QUANTISED.iter().find_map(|name| Some((name, fields.get(name)?))) else {
        return Ok(());
    };
    let method = ["quant_method", "quant_algo", "format", "mode"]
        .iter()
        .find_map(|key| value.get(*key)?.as_str())
        .map_or_else(|| "an unnamed method".to_owned(), |method| format!("\"{method}\""));
    Err(Fault::input(format!("the weights are quantised by {method} ({name}), which is not supported"))
        .hint("name the model that they were made from; an adapter over quantised weights can go on top of that one"))
}

fn unsupported(name: &str, value: &Value) -> Fault {
    Fault::input(format!("{name} = {value} is not supported"))
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(true) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(json: &str) -> Result<Vec<String>, Fault> {
        check(Fields(&serde_json::from_str(json).unwrap()), "llama", false)
    }

    #[test]
    fn fields_that_change_the_model_are_refused_with_their_value() {
        for (json, message) in [
            (r#"{"final_logit_softcapping":30.0}"#, "final_logit_softcapping = 30.0 is not supported"),
            (r#"{"qk_norm":true}"#, "qk_norm = true is not supported"),
            (r#"{"num_local_experts":8}"#, "num_local_experts = 8 is not supported"),
            (r#"{"residual_multiplier":0.2}"#, "residual_multiplier = 0.2 is not supported"),
            (r#"{"partial_rotary_factor":0.5}"#, "partial_rotary_factor = 0.5 is not supported"),
            (r#"{"is_causal":false}"#, "is_causal = false is not supported"),
            (
                r#"{"quantization_config":{"quant_method":"gptq","bits":4}}"#,
                "the weights are quantised by \"gptq\" (quantization_config), which is not supported",
            ),
            (
                r#"{"quantization":{"bits":4}}"#,
                "the weights are quantised by an unnamed method (quantization)",
            ),
            (
                r#"{"compression_config":{"format":"pack-quantized"}}"#,
                "the weights are quantised by \"pack-quantized\"",
            ),
        ] {
            let fault = checked(json).unwrap_err();
            assert!(fault.message.starts_with(message) && !fault.hint.is_empty(), "{json}: {fault}");
        }
    }

    #[test]
    fn neutral_values_are_silent_and_unknown_fields_are_listed() {
        let neutral = r#"{"final_logit_softcapping":null,"qk_norm":false,"num_experts":0,"residual_multiplier":1,
            "logit_scale":1.0,"is_causal":true,"quantization_config":null,"pretraining_tp":2,"unsloth_fixed":true,"strange":null}"#;
        assert_eq!(checked(neutral).unwrap(), Vec::<String>::new());
        let strange = checked(r#"{"strange":1,"queer":"a"}"#).unwrap();
        assert_eq!(strange, ["config.json: fields that llama does not know are ignored: strange, queer"]);
    }

    #[test]
    fn every_list_is_sorted() {
        assert!(ADDED.is_sorted() && KNOWN.is_sorted());
    }
}
