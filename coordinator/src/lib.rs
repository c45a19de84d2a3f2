//! The coordinator: owns one run, holds no tensor.
//!
//! Decisions are pure and know neither clock nor network: [`sharding`] (which pairs, which rank), [`schedule`] (how many
//! steps), [`saving`] (when a checkpoint is due), [`measuring`] and [`training`] (who does what next), [`references`] (what the reference model has said), [`metrics`] (sums to rows), [`membership`], [`stalls`] and [`failure`]
//! (who takes part, who stands still, who is to blame), and [`run`], which puts them together: events in, commands out.
//! I/O surrounds them: [`dataset`], [`output_dir`] and [`reference_store`] (files), [`wire`] (who may connect and call), [`server`],
//! [`service`], [`health`] and [`watch`] (gRPC), [`print`] (events to a log), [`engine`] (carries the commands out), [`complete`] (instead of it, where
//! nothing is left to do), [`cli`] (flags).
//! [`observe`] and [`tensorboard`] show what happens to others.
// Tests read what they wrote; all else goes through `dyad_proto::files`.
#![cfg_attr(not(test), warn(clippy::disallowed_methods))]

pub mod cli;
pub mod complete;
pub mod dataset;
pub mod engine;
pub mod facts;
pub mod failure;
pub mod health;
pub mod measuring;
pub mod membership;
pub mod metrics;
pub mod observe;
pub mod output_dir;
pub mod print;
pub mod reference_store;
pub mod references;
pub mod run;
pub mod same_run;
pub mod saving;
pub mod schedule;
pub mod server;
pub mod service;
pub mod sharding;
pub mod stalls;
pub mod tensorboard;
pub mod training;
pub mod watch;
pub mod wire;
