//! From preference pairs to token ids. Knows no device and no libtorch.
//!
//! - [`alive`]: signs that long work gets on.
//! - [`adapter`]: what a PEFT adapter folder says, and which layers it adapts.
//! - [`hub`]: a folder or a hub id becomes a local model folder.
//! - [`tokenizer`]: tokenizer and chat template of a model folder.
//! - [`tokenize`]: one pair becomes prompt, chosen and rejected ids, by TRL's rule.
//! - [`truncation`]: pairs that are too long. [`pair_tokenizer`]: many pairs, each tokenised once.
//! - [`reference_key`]: names a reference model.
//! - [`new_model`]: small random models to learn and test with.
// Tests read what they wrote; all else goes through `dyad_proto::files`.
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
