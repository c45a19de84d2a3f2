//! Which tokenizer transformers 5.23 builds from a folder: tokenizer.json as it is, or a class that takes only its vocabulary and merges
//! and splits text by its own rules (`AutoTokenizer.from_pretrained`,
//! `TokenizersBackend.convert_to_native_format`). [`crate::tokenizer_registry`] says which class a model family has.

use std::path::Path;

use dyad_proto::Fault;
use serde_json::{Map, Value, json};
use tokenizers::{AddedToken, Tokenizer};

use crate::tokenizer_registry::{BACKEND, Family};

/// transformers gives every Qwen2 tokenizer this split, whatever its tokenizer.json says.
pub(crate) const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The split of Qwen3.5: marks belong to words.
const QWEN3_5_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Classes of transformers that do not use tokenizer.json as it is and are not supported here. Without the suffix `Fast`, sorted.
/// `tests/parity/tokenizer_classes.py classes` lists them.
const OTHERS: &[&str] = &[
    "AlbertTokenizer",
    "AutoTokenizer",
    "BartTokenizer",
    "BarthezTokenizer",
    "BartphoTokenizer",
    "BasicTokenizer",
    "BertGenerationTokenizer",
    "BertJapaneseTokenizer",
    "BertTokenizer",
    "BertweetTokenizer",
    "BigBirdTokenizer",
    "BioGptTokenizer",
    "BlenderbotSmallTokenizer",
    "BlenderbotTokenizer",
    "ByT5Tokenizer",
    "CLIPTokenizer",
    "CTRLTokenizer",
    "CamembertTokenizer",
    "CanineTokenizer",
    "CharacterTokenizer",
    "ClvpTokenizer",
    "CodeGenTokenizer",
    "CodeLlamaTokenizer",
    "ConvBertTokenizer",
    "CpmAntTokenizer",
    "CpmTokenizer",
    "DPRContextEncoderTokenizer",
    "DPRQuestionEncoderTokenizer",
    "DPRReaderTokenizer",
    "DebertaTokenizer",
    "DebertaV2Tokenizer",
    "DiaTokenizer",
    "DistilBertTokenizer",
    "EsmTokenizer",
    "EsmcTokenizer",
    "FNetTokenizer",
    "FSMTTokenizer",
    "FastSpeech2ConformerTokenizer",
    "FlaubertTokenizer",
    "FunnelTokenizer",
    "GPTNeoXJapaneseTokenizer",
    "GPTSw3Tokenizer",
    "HerbertTokenizer",
    "LEDTokenizer",
    "LasrTokenizer",
    "LayoutLMv2Tokenizer",
    "LayoutLMv3Tokenizer",
    "LayoutXLMTokenizer",
    "LukeTokenizer",
    "LxmertTokenizer",
    "M2M100Tokenizer",
    "MBart50Tokenizer",
    "MBartTokenizer",
    "MLukeTokenizer",
    "MPNetTokenizer",
    "MarianTokenizer",
    "MarkupLMTokenizer",
    "MecabTokenizer",
    "MgpstrTokenizer",
    "MobileBertTokenizer",
    "MvpTokenizer",
    "MyT5Tokenizer",
    "NllbTokenizer",
    "NougatTokenizer",
    "OpenAIGPTTokenizer",
    "PLBartTokenizer",
    "PegasusTokenizer",
    "PerceiverTokenizer",
    "PhobertTokenizer",
    "Pop2PianoTokenizer",
    "ProphetNetTokenizer",
    "RagTokenizer",
    "ReformerTokenizer",
    "RemBertTokenizer",
    "RoCBertTokenizer",
    "RoFormerTokenizer",
    "RobertaTokenizer",
    "SeamlessM4TTokenizer",
    "Siglip2Tokenizer",
    "SiglipTokenizer",
    "Speech2TextTokenizer",
    "SpeechT5Tokenizer",
    "SplinterTokenizer",
    "SqueezeBertTokenizer",
    "T5Tokenizer",
    "TapasTokenizer",
    "Tipsv2Tokenizer",
    "UdopTokenizer",
    "VideoPrismTokenizer",
    "VitsTokenizer",
    "Wav2Vec2CTCTokenizer",
    "Wav2Vec2PhonemeCTCTokenizer",
    "WhisperTokenizer",
    "WordpieceTokenizer",
    "XGLMTokenizer",
    "XLMRobertaTokenizer",
    "XLMTokenizer",
    "XLNetTokenizer",
];

/// The class that builds a tokenizer from tokenizer.json.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenizerClass {
    /// Uses tokenizer.json unchanged.
    AsItIs,
    Llama,
    Gemma,
    Qwen2,
    Qwen3_5,
    Gpt2,
    GptNeoX,
    Cohere,
}

use TokenizerClass::{AsItIs, Cohere, Gemma, Gpt2, GptNeoX, Llama, Qwen2, Qwen3_5};

/// The files that decide the class.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Declared<'d> {
    /// Folder of the tokenizer, for errors.
    pub(crate) dir: &'d Path,
    /// tokenizer_config.json.
    pub(crate) config: &'d Map<String, Value>,
    /// config.json of the same folder.
    pub(crate) model: &'d Map<String, Value>,
    /// tokenizer.json.
    pub(crate) text: &'d str,
}

impl Declared<'_> {
    /// The class that `AutoTokenizer` chooses; fails if it is not supported.
    pub(crate) fn class(&self) -> Result<TokenizerClass, Fault> {
        let word = |map: &Map<String, Value>, name: &str| Some(map.get(name)?.as_str()?.to_owned());
        let declared = word(self.config, "tokenizer_class").or_else(|| word(self.model, "tokenizer_class"));
        let declared = declared.as_deref().map(|name| name.strip_suffix("Fast").unwrap_or(name));
        let family = word(self.model, "model_type").map(|family| Family::of(&family)).unwrap_or_default();
        // If `auto_map` names custom code, the family does not replace a declared class. Custom code is never run here.
        let own_code = match self.config.get("auto_map") {
            Some(Value::Array(_)) => true,
            Some(map) => map.get("AutoTokenizer").is_some_and(|code| !code.is_null()),
            None => false,
        };
        match (declared, family.registered) {
            (Some("LlamaTokenizer"), _)
                if !own_code
                    && !family.overrides
                    && !family.is_mistral
                    && self.text.contains("\"ByteLevel\"") =>
            {
                Ok(AsItIs)
            }
            (Some(declared), Some(registered)) if !own_code && declared != registered => {
                if registered == BACKEND {
                    return Ok(AsItIs);
                }
                self.named(if family.overrides { registered } else { declared })
            }
            (Some(declared), _) => self.named(declared),
            (None, Some(registered)) => self.named(registered),
            (None, None) => Ok(AsItIs),
        }
    }

    /// The class of this name; names that transformers does not know mean tokenizer.json as it is.
    fn named(&self, name: &str) -> Result<TokenizerClass, Fault> {
        let all = [Llama, Gemma, Qwen2, Qwen3_5, Gpt2, GptNeoX, Cohere];
        if let Some(class) = all.into_iter().find(|class| class.name() == name) {
            return Ok(class);
        }
        match OTHERS.binary_search(&name) {
            Ok(_) => Err(Fault::input(format!(
                "{}: tokenizer_class {name} is not supported",
                self.dir.join("tokenizer_config.json").display()
            ))
            .hint("TokenizersBackend takes tokenizer.json as it is: say so if that is what the model was trained with")),
            Err(_) => Ok(AsItIs),
        }
    }

    /// Builds the tokenizer, and returns a warning if part of the file is ignored. `json` is tokenizer.json; `unknown` is the text of
    /// `unk_token`.
    pub(crate) fn build(
        &self,
        class: TokenizerClass,
        json: &Value,
        unknown: Option<&str>,
    ) -> Result<(Tokenizer, Option<String>), Fault> {
        let path = self.dir.join("tokenizer.json");
        let broken = |error: tokenizers::Error| broken(&path, &error);
        if class == AsItIs {
            self.refuse_dropout(json)?;
            return Ok((self.text.parse().map_err(broken)?, None));
        }
        let frame = self.frame(class)?;
        let warning = passed_over(class, json, &frame).map(|part| {
            format!(
                "{}: its {part} is passed over, as in transformers, which makes a {} of every such folder",
                path.display(),
                class.name()
            )
        });
        // GPT-NeoX's class adds no tokens around a text, whatever the file says.
        let around = json.get("post_processor").filter(|_| class != GptNeoX).cloned().unwrap_or_default();
        let rebuilt = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "post_processor": around,
            "model": self.model(class, json, unknown)?,
            "normalizer": frame.normalizer, "pre_tokenizer": frame.pre_tokenizer, "decoder": frame.decoder,
        });
        Ok((serde_json::from_value(rebuilt).map_err(|error| broken(Box::new(error)))?, warning))
    }

    /// Refuses dropout: the same text would get other ids each time.
    fn refuse_dropout(&self, json: &Value) -> Result<(), Fault> {
        match json.pointer("/model/dropout").and_then(Value::as_f64) {
            Some(dropout) if dropout > 0.0 => Err(Fault::input(format!(
                "{}: model.dropout = {dropout} is not supported: ids would be drawn at random",
                self.dir.join("tokenizer.json").display()
            ))
            .hint("set it to null; it belongs to the training of the vocabulary")),
            _ => Ok(()),
        }
    }

    /// A BPE model with the file's vocabulary and merges, and nothing else of it.
    fn model(&self, class: TokenizerClass, json: &Value, unknown: Option<&str>) -> Result<Value, Fault> {
        let vocab = json.pointer("/model/vocab").filter(|vocab| vocab.is_object());
        let merges = json.pointer("/model/merges").filter(|merges| merges.is_array());
        let (Some(vocab), Some(merges)) = (vocab, merges) else {
            let kind = json.pointer("/model/type").and_then(Value::as_str).unwrap_or("unknown");
            return Err(Fault::input(format!(
                "{}: a {} needs a vocabulary with merges (BPE), and its model is {kind}",
                self.dir.join("tokenizer.json").display(),
                class.name()
            ))
            .hint("tokenizer_class TokenizersBackend takes tokenizer.json as it is"));
        };
        let characters = matches!(class, Llama | Gemma);
        // Python writes `None` for a missing token.
        let unknown = (class == Gemma).then(|| unknown.unwrap_or("None"));
        Ok(json!({
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": characters, "byte_fallback": characters, "ignore_merges": false,
            "vocab": vocab, "merges": merges,
        }))
    }

    fn frame(&self, class: TokenizerClass) -> Result<ClassFrame, Fault> {
        let bytes = |prefix: bool, regex: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": regex});
        let prefix = self.flag("add_prefix_space")?;
        let nfc = || json!({"type": "NFC"});
        let spaces = || json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let split = |regex: &str| {
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
                bytes(prefix.unwrap_or(false), false),
            ]})
        };
        Ok(match class {
            AsItIs | Gpt2 => ClassFrame {
                normalizer: Value::Null,
                pre_tokenizer: bytes(prefix.unwrap_or(false), true),
                decoder: bytes(true, true),
            },
            GptNeoX => ClassFrame {
                normalizer: nfc(),
                pre_tokenizer: bytes(prefix.unwrap_or(false), true),
                decoder: bytes(true, true),
            },
            Cohere => ClassFrame {
                normalizer: nfc(),
                pre_tokenizer: json!({"type": "Sequence", "pretokenizers": [
                    {"type": "Digits", "individual_digits": true},
                    bytes(prefix.unwrap_or(false), true),
                ]}),
                decoder: bytes(true, true),
            },
            Qwen2 => ClassFrame {
                normalizer: nfc(),
                pre_tokenizer: split(QWEN2_SPLIT),
                decoder: bytes(true, true),
            },
            Qwen3_5 => ClassFrame {
                normalizer: nfc(),
                pre_tokenizer: split(QWEN3_5_SPLIT),
                decoder: bytes(true, true),
            },
            Gemma => ClassFrame {
                normalizer: json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}),
                pre_tokenizer: json!({
                    "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false,
                }),
                decoder: json!({
                    "type": "Sequence", "decoders": [spaces(), {"type": "ByteFallback"}, {"type": "Fuse"}],
                }),
            },
            Llama => {
                let prefix = prefix.unwrap_or(true);
                let scheme = match (prefix, self.flag("legacy")?.unwrap_or(false)) {
                    (false, _) => "never",
                    (true, true) => "always",
                    (true, false) => "first",
                };
                let mut decoders = vec![spaces(), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
                if prefix {
                    decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
                }
                ClassFrame {
                    normalizer: Value::Null,
                    pre_tokenizer: json!({
                        "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false,
                    }),
                    decoder: json!({"type": "Sequence", "decoders": decoders}),
                }
            }
        })
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, Fault> {
        match self.config.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(Fault::input(format!(
                "{}: {name}: expected true or false",
                self.dir.join("tokenizer_config.json").display()
            ))
            .hint("save the tokenizer again with transformers' save_pretrained")),
        }
    }
}

impl TokenizerClass {
    pub(crate) fn name(self) -> &'static str {
        match self {
            AsItIs => BACKEND,
            Llama => "LlamaTokenizer",
            Gemma => "GemmaTokenizer",
            Qwen2 => "Qwen2Tokenizer",
            Qwen3_5 => "Qwen3_5Tokenizer",
            Gpt2 => "GPT2Tokenizer",
            GptNeoX => "GPTNeoXTokenizer",
            Cohere => "CohereTokenizer",
        }
    }

    /// Default special tokens of the class; `None` means that the class has no such token by default.
    pub(crate) fn defaults(self) -> &'static [(&'static str, Option<&'static str>)] {
        const END: Option<&str> = Some("<|endoftext|>");
        match self {
            AsItIs => &[],
            Llama => &[("bos_token", Some("<s>")), ("eos_token", Some("</s>")), ("unk_token", Some("<unk>"))],
            Gemma => &[
                ("bos_token", Some("<bos>")),
                ("eos_token", Some("<eos>")),
                ("unk_token", Some("<unk>")),
                ("pad_token", Some("<pad>")),
                ("mask_token", Some("<mask>")),
            ],
            Cohere => &[
                ("bos_token", Some("<BOS_TOKEN>")),
                ("eos_token", Some("<|END_OF_TURN_TOKEN|>")),
                ("unk_token", Some("<UNK>")),
                ("sep_token", Some("<SEP>")),
                ("pad_token", Some("<PAD>")),
                ("cls_token", Some("<CLS>")),
                ("mask_token", Some("<MASK_TOKEN>")),
            ],
            GptNeoX => &[
                ("bos_token", END),
                ("eos_token", END),
                ("unk_token", END),
                ("pad_token", Some("<|padding|>")),
            ],
            Qwen2 | Qwen3_5 => {
                &[("bos_token", None), ("eos_token", END), ("unk_token", END), ("pad_token", END)]
            }
            Gpt2 => &[("bos_token", END), ("eos_token", END), ("unk_token", END), ("pad_token", None)],
        }
    }

    /// How a named token is added once more at the end, as a special token; `None` if the class does not do that.
    pub(crate) fn added_again(self, token: &AddedToken) -> Option<AddedToken> {
        match self {
            // Without the token's own flags.
            Qwen2 => Some(AddedToken::from(token.content.clone(), true)),
            Cohere => Some(AddedToken { special: true, ..token.clone() }),
            _ => None,
        }
    }
}

/// Parts of a class that split a text and join it again.
struct ClassFrame {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
}

/// Returns the part of tokenizer.json that splits text differently from the class. For Llama, the three spellings of SentencePiece's
/// spaces (`Prepend`, `Replace`, `Metaspace`) count as equal.
fn passed_over(class: TokenizerClass, json: &Value, frame: &ClassFrame) -> Option<&'static str> {
    let part = |name: &str| json.get(name).cloned().unwrap_or_default();
    let (normalizer, pre_tokenizer) = (part("normalizer"), part("pre_tokenizer"));
    if class == Llama {
        let parts = normalizer.get("normalizers").and_then(Value::as_array).cloned().unwrap_or_default();
        let of_spaces = |part: &Value| part["type"] == "Prepend" || part["type"] == "Replace";
        let plain = normalizer.is_null()
            || of_spaces(&normalizer)
            || !parts.is_empty() && parts.iter().all(of_spaces);
        let spaces = pre_tokenizer.is_null() || pre_tokenizer["type"] == "Metaspace";
        return if !plain { Some("normalizer") } else { (!spaces).then_some("pre_tokenizer") };
    }
    if normalizer != frame.normalizer {
        return Some("normalizer");
    }
    (pre_tokenizer != frame.pre_tokenizer).then_some("pre_tokenizer")
}
/// The error for a `tokenizer.json` that cannot be read.
pub(crate) fn broken(path: &Path, error: &dyn std::fmt::Display) -> Fault {
    Fault::input(format!("{}: {error}", path.display())).hint(
        "the file is damaged, or not a fast tokenizer's; save the tokenizer anew with transformers' save_pretrained",
    )
}
