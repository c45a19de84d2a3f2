//! Turns preference pairs into token ids. Uses no device and no libtorch.
//!
//! - [`alive`]: progress signals of long work.
//! - [`adapter`]: configuration of a PEFT adapter folder, and the layers that it adapts.
//! - [`hub`]: finds the local folder of a model, or downloads it by its hub id.
//! - [`tokenizer`]: tokenizer and chat template of a model folder.
//! - [`tokenize`]: turns one pair into prompt, chosen and rejected ids, by TRL's rule.
//! - [`truncation`]: cuts or drops pairs that are too long. [`pair_tokenizer`]: tokenises many pairs, each once.
//! - [`reference_key`]: cache key of a reference model.
//! - [`new_model`]: writes small random models for learning and tests.
// Tests may read their own files directly; all other code goes through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

pub mod adapter;
pub mod alive;
mod chat_template;
pub mod files;
pub mod hub;
pub mod new_model;
pub mod pair_tokenizer;
mod plain_text;
mod quick;
pub mod reference_key;
mod special;
mod template;
pub mod tokenize;
pub mod tokenized;
pub mod tokenizer;
mod tokenizer_class;
pub mod truncation;
