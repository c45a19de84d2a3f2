//! The JobSet, or the two plain Jobs.
//!
//! Pods never restart by themselves (`restartPolicy: Never`): only the JobSet or the Jobs decide about restarts.

use super::cli::Workload;
use super::job::plain_job;
use super::jobset::jobset;
use super::meta::Component;
use super::object::{Object, object};
use super::spec::Spec;
use dyad_proto::Fault;

/// All objects that run pods.
pub fn render(spec: &Spec) -> Result<Vec<Object>, Fault> {
    match spec.options.workload {
        Workload::Jobset => Ok(vec![object(&jobset(spec))?]),
        Workload::Job => [Component::Coordinator, Component::Trainers]
            .into_iter()
            .map(|component| object(&plain_job(spec, component)))
            .collect(),
    }
}
