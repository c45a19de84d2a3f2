//! `jobset.x-k8s.io/v1alpha2` as far as a run needs it.

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
    /// What runs.
    pub spec: JobSetSpec,
}

/// What runs.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct JobSetSpec {
    /// Whose address every pod is told.
    pub coordinator: Coordinator,
    /// DNS names of pods.
    pub network: Network,
    /// When the set is done.
    pub success_policy: SuccessPolicy,
    /// When it starts again, and when it gives up.
    pub failure_policy: FailurePolicy,
    /// When it is removed after its end; absent: never.
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
    /// Which of the Jobs.
    pub job_index: i32,
    /// Which of its pods.
    pub pod_index: i32,
}

/// DNS names of pods.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// The controller makes a headless Service.
    #[serde(rename = "enableDNSHostnames")]
    pub enable_dns_hostnames: bool,
    /// Its name.
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
    /// Of these Jobs.
    pub target_replicated_jobs: Vec<&'static str>,
}

/// When the set starts again, and when it gives up.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FailurePolicy {
    /// Restarts that count, at most.
    pub max_restarts: u16,
    /// The first rule that matches decides; without one the set starts again, which counts.
    pub rules: Vec<FailurePolicyRule>,
}

/// What follows from a failed Job.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FailurePolicyRule {
    /// For messages.
    pub name: &'static str,
    /// `FailJobSet`, `RestartJobSet` or `RestartJobSetAndIgnoreMaxRestarts`.
    pub action: &'static str,
    /// Reasons of the Job's `Failed` condition.
    pub on_job_failure_reasons: Vec<&'static str>,
    /// RE2 patterns of its message.
    pub on_job_failure_message_patterns: Vec<&'static str>,
}

/// Jobs of one template.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReplicatedJob {
    /// Part of the pods' names.
    pub name: &'static str,
    /// How many Jobs.
    pub replicas: i32,
    /// The template.
    pub template: JobTemplateSpec,
}
