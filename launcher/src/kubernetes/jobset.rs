//! The JobSet: its Jobs start, fail and start again together.

use k8s_openapi::api::batch::v1::{JobSpec, JobTemplateSpec, PodFailurePolicy};

use super::job::{job, on_disruption, on_exit, queue_labels};
use super::jobset_types::{
    API_VERSION, Coordinator, FailurePolicy, FailurePolicyRule, JobSet, JobSetSpec, Network, ReplicatedJob,
    SuccessPolicy,
};
use super::meta::{Component, metadata};
use super::spec::Spec;
use dyad_proto::ErrorCode;

/// The JobSet of a run.
pub fn jobset(spec: &Spec) -> JobSet {
    let mut metadata = metadata(spec, spec.name());
    metadata.labels.get_or_insert_default().append(&mut queue_labels(spec));
    let replicated = |component: Component| ReplicatedJob {
        name: component.word(),
        replicas: 1,
        template: JobTemplateSpec { metadata: None, spec: Some(job_in_set(spec, component)) },
    };
    let lifecycle = &spec.options.lifecycle;
    JobSet {
        api_version: API_VERSION,
        kind: "JobSet",
        metadata,
        spec: JobSetSpec {
            coordinator: Coordinator { replicated_job: "coordinator", job_index: 0, pod_index: 0 },
            network: Network {
                enable_dns_hostnames: true,
                subdomain: spec.name().to_owned(),
                publish_not_ready_addresses: true,
            },
            // Wait for both: when a JobSet is done, its running pods are deleted with their logs.
            success_policy: SuccessPolicy {
                operator: "All",
                target_replicated_jobs: vec!["coordinator", "trainers"],
            },
            failure_policy: FailurePolicy { max_restarts: lifecycle.max_restarts, rules: set_rules() },
            ttl_seconds_after_finished: Some(lifecycle.ttl).filter(|ttl| *ttl > 0),
            replicated_jobs: vec![replicated(Component::Coordinator), replicated(Component::Trainers)],
        },
    }
}

/// Rules that match the message which a Job's `podFailurePolicy` writes when the Job fails.
fn set_rules() -> Vec<FailurePolicyRule> {
    let rule = |name, action, pattern| FailurePolicyRule {
        name,
        action,
        on_job_failure_reasons: vec!["PodFailurePolicy"],
        on_job_failure_message_patterns: vec![pattern],
    };
    vec![
        rule("invalidInput", "FailJobSet", "exit code 2\\b"),
        rule("drained", "RestartJobSetAndIgnoreMaxRestarts", "exit code 130\\b"),
        rule("disrupted", "RestartJobSetAndIgnoreMaxRestarts", "condition DisruptionTarget\\b"),
    ]
}

/// A Job in the JobSet. A failed pod fails its Job at once, and the JobSet decides about the restart.
fn job_in_set(spec: &Spec, component: Component) -> JobSpec {
    let rules = vec![
        on_disruption("FailJob"),
        on_exit("FailJob", &[ErrorCode::InvalidInput, ErrorCode::Interrupted], component),
        // This pod stopped because another pod failed; the other pod's status decides.
        on_exit("Ignore", &[ErrorCode::Echo], component),
    ];
    JobSpec {
        backoff_limit: Some(0),
        pod_failure_policy: Some(PodFailurePolicy { rules }),
        ..job(spec, component)
    }
}
