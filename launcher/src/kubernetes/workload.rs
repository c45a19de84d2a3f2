//! The JobSet, or the two plain Jobs, and what follows from each way that a pod can end.
//!
//! Pods never restart by themselves (`restartPolicy: Never`): one owner decides over restarts, the JobSet or the Jobs.

use k8s_openapi::api::batch::v1::{
    Job, JobSpec, JobTemplateSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement,
    PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule,
};

use super::cli::Workload;
use super::jobset::{
    API_VERSION, Coordinator, FailurePolicy, FailurePolicyRule, JobSet, JobSetSpec, Network, ReplicatedJob,
    SuccessPolicy,
};
use super::meta::{Component, metadata};
use super::object::{Object, object};
use super::pods;
use super::spec::Spec;
use dyad_proto::{ErrorCode, Fault};

/// Every object that runs pods.
pub fn render(spec: &Spec) -> Result<Vec<Object>, Fault> {
    match spec.options.workload {
        Workload::Jobset => Ok(vec![object(&jobset(spec))?]),
        Workload::Job => [Component::Coordinator, Component::Trainers]
            .into_iter()
            .map(|component| object(&plain_job(spec, component)))
            .collect(),
    }
}

fn jobset(spec: &Spec) -> JobSet {
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
            // Of both: pods that still run when a set is done are deleted, and their logs with them.
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

/// Reads how a Job ended from the message that its `podFailurePolicy` leaves.
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

/// In a set every end of a pod that matters fails its Job at once, and the set decides.
fn job_in_set(spec: &Spec, component: Component) -> JobSpec {
    let rules = vec![
        on_disruption("FailJob"),
        on_exit("FailJob", &[ErrorCode::InvalidInput, ErrorCode::Interrupted], component),
        // Stopped because another failed: that one decides.
        on_exit("Ignore", &[ErrorCode::Echo], component),
    ];
    JobSpec {
        backoff_limit: Some(0),
        pod_failure_policy: Some(PodFailurePolicy { rules }),
        ..job(spec, component)
    }
}

/// Alone, a Job replaces its pods itself.
fn plain_job(spec: &Spec, component: Component) -> Job {
    let mut metadata = metadata(spec, &spec.named(component.word()));
    metadata.labels.get_or_insert_default().append(&mut queue_labels(spec));
    let lifecycle = &spec.options.lifecycle;
    let rules = vec![
        on_disruption("Ignore"),
        on_exit("FailJob", &[ErrorCode::InvalidInput], component),
        // These pods come back, find the coordinator that was started again, and continue from its checkpoint.
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

fn job(spec: &Spec, component: Component) -> JobSpec {
    let pods = pods_of(spec, component);
    JobSpec {
        completion_mode: Some("Indexed".into()),
        completions: Some(pods),
        parallelism: Some(pods),
        // Two pods of one index would both claim its place in the run.
        pod_replacement_policy: Some("Failed".into()),
        template: pods::template(spec, component),
        ..Default::default()
    }
}

fn on_disruption(action: &str) -> PodFailurePolicyRule {
    let disrupted =
        PodFailurePolicyOnPodConditionsPattern { type_: "DisruptionTarget".into(), status: "True".into() };
    PodFailurePolicyRule {
        action: action.into(),
        on_pod_conditions: Some(vec![disrupted]),
        on_exit_codes: None,
    }
}

fn on_exit(action: &str, codes: &[ErrorCode], component: Component) -> PodFailurePolicyRule {
    let requirement = PodFailurePolicyOnExitCodesRequirement {
        container_name: Some(component.word().into()),
        operator: "In".into(),
        values: codes.iter().map(|code| i32::from(code.exit_status())).collect(),
    };
    PodFailurePolicyRule { action: action.into(), on_exit_codes: Some(requirement), on_pod_conditions: None }
}

fn queue_labels(spec: &Spec) -> std::collections::BTreeMap<String, String> {
    let scheduling = &spec.options.scheduling;
    let named = [
        ("kueue.x-k8s.io/queue-name", &scheduling.queue),
        ("kueue.x-k8s.io/priority-class", &scheduling.queue_priority),
    ];
    named.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value.clone()?))).collect()
}
