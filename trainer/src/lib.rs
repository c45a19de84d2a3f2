//! One trainer process.
pub mod ext;
