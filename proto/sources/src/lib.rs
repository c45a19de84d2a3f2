//! Where models and files of pairs come from. Whatever the kind and place, pairs are read from a file of lines on this machine.
//!
//! - [`open`]: opens all places that a configuration key names, as one source of pairs. [`places`] finds their files.
//! - [`lines`]: turns compressed files, JSON arrays and Parquet files into files of lines, once.
//! - [`remote`]: fetches files from the hub ([`hub`]) and object stores ([`objects`]), once.
//! - [`chosen`]: which names a place means.
//! - [`cache`]: the folder of fetched and unpacked files.
//! - [`hub`]: finds the local folder of a model, or downloads it by its hub id; downloads files of data sets.
//! - [`alive`]: progress signals of long work.
// Tests may read their own files directly; all other code goes through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

pub mod alive;
pub mod cache;
pub mod chosen;
pub mod hub;
pub mod lines;
mod mixture;
pub mod objects;
pub mod open;
pub mod places;
pub mod remote;

pub use mixture::FileShare;
