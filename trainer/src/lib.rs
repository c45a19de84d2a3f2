//! Libraries of the trainer process: model families, layer-wise engine, communicators, checkpoints, session.

pub mod batch;
pub mod comm;
pub mod device;
pub mod engine;
pub mod ext;
pub mod head;
pub mod lora;
pub mod loss;
pub mod model;
pub mod optimizer;
pub mod parameters;
pub mod schedule;
pub mod timing;
