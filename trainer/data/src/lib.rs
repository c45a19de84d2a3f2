//! Turns preference pairs into token ids. Uses no device and no libtorch.
//!
//! - [`adapter`]: configuration of a PEFT adapter folder, and the layers that it adapts.
//! - [`tokenizer`]: tokenizer and chat template of a model folder.
//! - [`rendered`]: a conversation with all that a template can read, and its text with the parts that the model writes.
//! - [`tokenize`]: turns one pair into prompt, chosen and rejected ids, by TRL's rule.
//! - [`truncation`]: cuts or drops pairs that are too long. [`pair_tokenizer`]: tokenises many pairs, each once.
//! - [`reference_key`]: cache key of a reference model.
//! - [`new_model`]: writes small random models for learning and tests.
// Tests may read their own files directly; all other code goes through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

pub mod adapter;
mod assistant;
mod chat_template;
mod dialogue;
pub mod files;
pub mod new_model;
pub mod pair_tokenizer;
mod plain_text;
mod quick;
pub mod reference_key;
pub mod rendered;
mod special;
mod template;
mod template_reads;
pub mod tokenize;
pub mod tokenized;
pub mod tokenizer;
mod tokenizer_class;
mod tokenizer_registry;
pub mod truncation;
