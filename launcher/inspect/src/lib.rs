//! Looks at files of pairs without a run: `launcher check`, `launcher preview` and `launcher convert`.
//!
//! - [`check`]: every problem of every record in one pass, counts and lengths; writes what is clean and what is not.
//! - [`preview`]: the text that a model sees, with the trained tokens marked.
//! - [`convert`]: writes records in another form.
//! - [`records`]: reads the records of any place, in windows, on all cores.
//! - [`model`]: tokenizer and limits of a model, without its weights.
// Tests may read their own files directly; all other code goes through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

pub mod check;
pub mod convert;
pub mod model;
pub mod preview;
pub mod records;
