//! A Job, alone or in a JobSet, with its rules for each exit status of a pod.

use std::collections::BTreeMap;

use k8s_openapi::api::batch::v1::{
    Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement,
    PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule,
};

use super::meta::{Component, metadata};
use super::pods;
use super::spec::Spec;
use dyad_proto::ErrorCode;

/// A Job outside a JobSet; it replaces failed pods itself.
pub(super) fn plain_job(spec: &Spec, component: Component) -> Job {
    let mut metadata = metadata(spec, &spec.named(component.word()));
    metadata.labels.get_or_insert_default().append(&mut queue_labels(spec));
    let lifecycle = &spec.options.lifecycle;
    let rules = vec![
        on_disruption("Ignore"),
        on_exit("FailJob", &[ErrorCode::InvalidInput], component),
        // Replacement pods find the restarted coordinator and continue from its checkpoint.
        on_exit("Ignore", &[ErrorCode::Echo, ErrorCode::Interrupted], component),
    ];
    Job {
        metadata,
        spec: Some(JobSpec {
            backoff_limit: Some(i32::from(lifecycle.max_restarts) * pods_of(spec, component)),
            pod_failure_policy: Some(PodFailurePolicy { rules }),
            ttl_seconds_after_finished: Some(lifecycle.ttl as i32).filter(|ttl| *ttl > 0),
            ..job(spec, component)
        }),
        status: None,
    }
}

fn pods_of(spec: &Spec, component: Component) -> i32 {
    if component == Component::Trainers { spec.options.nodes as i32 } else { 1 }
}

pub(super) fn job(spec: &Spec, component: Component) -> JobSpec {
    let pods = pods_of(spec, component);
    JobSpec {
        completion_mode: Some("Indexed".into()),
        completions: Some(pods),
        parallelism: Some(pods),
        // Replace a pod only after its end: two pods with one index would claim the same place in the run.
        pod_replacement_policy: Some("Failed".into()),
        template: pods::template(spec, component),
        ..Default::default()
    }
}

pub(super) fn on_disruption(action: &str) -> PodFailurePolicyRule {
    let disrupted =
        PodFailurePolicyOnPodConditionsPattern { type_: "DisruptionTarget".into(), status: "True".into() };
    PodFailurePolicyRule {
        action: action.into(),
        on_pod_conditions: Some(vec![disrupted]),
        on_exit_codes: None,
    }
}

pub(super) fn on_exit(action: &str, codes: &[ErrorCode], component: Component) -> PodFailurePolicyRule {
    let requirement = PodFailurePolicyOnExitCodesRequirement {
        container_name: Some(component.word().into()),
        operator: "In".into(),
        values: codes.iter().map(|code| i32::from(code.exit_status())).collect(),
    };
    PodFailurePolicyRule { action: action.into(), on_exit_codes: Some(requirement), on_pod_conditions: None }
}

pub(super) fn queue_labels(spec: &Spec) -> BTreeMap<String, String> {
    let scheduling = &spec.options.scheduling;
    let named = [
        ("kueue.x-k8s.io/queue-name", &scheduling.queue),
        ("kueue.x-k8s.io/priority-class", &scheduling.queue_priority),
    ];
    named.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value.clone()?))).collect()
}
