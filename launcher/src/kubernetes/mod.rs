//! `launcher kubernetes`: renders a run as Kubernetes objects, and applies, follows and deletes them on a cluster.
//!
//! - [`spec`]: options and configuration, checked together. Everything up to [`render`] is pure.
//! - [`workload`], [`job`], [`jobset`], [`jobset_types`], [`pods`], [`confine`], [`volumes`], [`network`], [`support`]: the objects.
//! - [`object`], [`meta`], [`values`], [`cli`]: serialisation of objects, their names and labels, option values, command line.
//! - [`cluster`]: requests to the API server; [`state`] and [`events`] (pure) interpret its answers and the log.
//! - [`apply`], [`status`], [`logs`], [`wait`], [`delete`]: one file per command.

pub mod apply;
pub mod cli;
pub mod cluster;
pub mod confine;
pub mod delete;
pub mod events;
pub mod job;
pub mod jobset;
pub mod jobset_types;
pub mod logs;
pub mod meta;
pub mod network;
pub mod object;
pub mod pods;
pub mod render;
pub mod spec;
pub mod state;
pub mod status;
pub mod support;
pub mod values;
pub mod volumes;
pub mod wait;
pub mod workload;

use dyad_proto::Fault;

use crate::show::console::{print, warn};
use cli::KubernetesCommand;

/// Runs a `launcher kubernetes` command.
pub async fn act(command: KubernetesCommand) -> Result<(), Fault> {
    match command {
        KubernetesCommand::Render(options) => render::act(&options),
        KubernetesCommand::Apply(options) => Box::pin(apply::act(&options)).await,
        KubernetesCommand::Status(options) => Box::pin(status::act(&options)).await,
        KubernetesCommand::Logs(options) => Box::pin(logs::act(&options)).await,
        KubernetesCommand::Wait(options) => Box::pin(wait::act(&options)).await,
        KubernetesCommand::Delete(options) => Box::pin(delete::act(&options)).await,
    }
}
