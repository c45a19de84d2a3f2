//! Types of `jobset.x-k8s.io/v1alpha2`; only the fields that a run needs.

use k8s_openapi::api::batch::v1::JobTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;

/// Group and version.
pub const API_VERSION: &str = "jobset.x-k8s.io/v1alpha2";

/// Jobs that start, fail and start again together.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct JobSet {
    /// [`API_VERSION`].
    pub api_version: &'static str,
    /// `JobSet`.
    pub kind: &'static str,
    /// Name and labels.
    pub metadata: ObjectMeta,
    /// The specification.
    pub spec: JobSetSpec,
}

/// Specification of a JobSet.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct JobSetSpec {
    /// Pod whose address the controller writes to every pod.
    pub coordinator: Coordinator,
    /// DNS names of pods.
    pub network: Network,
    /// When the set is done.
    pub success_policy: SuccessPolicy,
    /// When it starts again, and when it gives up.
    pub failure_policy: FailurePolicy,
    /// Seconds from its end until it is removed; `None`: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_seconds_after_finished: Option<u32>,
    /// The Jobs.
    pub replicated_jobs: Vec<ReplicatedJob>,
}

/// One pod of the set.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Coordinator {
    /// Name of its replicated Job.
    pub replicated_job: &'static str,
    /// Index of the Job.
    pub job_index: i32,
    /// Index of the pod in the Job.
    pub pod_index: i32,
}

/// DNS names of pods.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// The controller creates a headless Service.
    #[serde(rename = "enableDNSHostnames")]
    pub enable_dns_hostnames: bool,
    /// Name of that Service.
    pub subdomain: String,
    /// Names resolve before pods are ready.
    pub publish_not_ready_addresses: bool,
}

/// When the set is done.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SuccessPolicy {
    /// `All` or `Any`.
    pub operator: &'static str,
    /// Names of the replicated Jobs that must succeed.
    pub target_replicated_jobs: Vec<&'static str>,
}

/// When the set starts again, and when it gives up.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FailurePolicy {
    /// Maximum number of counted restarts.
    pub max_restarts: u16,
    /// The first matching rule decides; without a match the set restarts, which counts.
    pub rules: Vec<FailurePolicyRule>,
}

/// Reaction to a failed Job.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FailurePolicyRule {
    /// Name of the rule, for messages.
    pub name: &'static str,
    /// `FailJobSet`, `RestartJobSet` or `RestartJobSetAndIgnoreMaxRestarts`.
    pub action: &'static str,
    /// Reasons of the Job's `Failed` condition.
    pub on_job_failure_reasons: Vec<&'static str>,
    /// RE2 patterns of the condition's message.
    pub on_job_failure_message_patterns: Vec<&'static str>,
}

/// Jobs of one template.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReplicatedJob {
    /// Part of the pods' names.
    pub name: &'static str,
    /// Number of Jobs.
    pub replicas: i32,
    /// The template.
    pub template: JobTemplateSpec,
}
