//! Derives the run's state from the API server's objects. Pure.

use std::fmt::Write;

use dyad_proto::counted;
use k8s_openapi::api::core::v1::{ContainerState, Pod};
use kube::api::DynamicObject;
use serde_json::Value;

use super::meta::{COMPONENT, Component, label};

const COORDINATOR: &str = Component::Coordinator.word();
const TRAINERS: &str = Component::Trainers.word();

/// State of the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// There is no workload.
    Absent,
    /// A queue holds it back.
    Suspended,
    /// It runs, or is about to start.
    Active,
    /// It is done.
    Complete,
    /// It has failed for good, with the controller's reason.
    Failed(String),
}

/// Phase of the run, from its JobSet or Jobs.
#[must_use]
pub fn phase(workloads: &[DynamicObject]) -> Phase {
    let condition = |object: &DynamicObject, names: &[&str]| {
        let conditions = object.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.into_iter().find(|condition| {
            condition["status"] == "True" && names.iter().any(|name| condition["type"] == *name)
        })
    };
    let has = |object: &DynamicObject, names: &[&str]| condition(object, names).is_some();
    if workloads.is_empty() {
        return Phase::Absent;
    }
    if let Some(failed) = workloads.iter().find_map(|object| condition(object, &["Failed"])) {
        return Phase::Failed(failed["message"].as_str().unwrap_or("no reason given").to_owned());
    }
    // The JobSet decides, whatever its name; with plain Jobs the coordinator's Job decides.
    let decisive = |object: &&DynamicObject| {
        object.data["spec"]["replicatedJobs"].is_array()
            || object.metadata.name.as_deref().unwrap_or_default().ends_with("-coordinator")
    };
    if workloads.iter().filter(decisive).any(|object| has(object, &["Completed", "Complete"])) {
        return Phase::Complete;
    }
    if workloads.iter().any(|object| has(object, &["Suspended"])) { Phase::Suspended } else { Phase::Active }
}

/// One line per workload.
#[must_use]
pub fn workload_lines(workloads: &[DynamicObject]) -> String {
    let mut out = String::new();
    for object in workloads {
        let kind = object.types.as_ref().map_or("workload", |types| types.kind.as_str());
        let name = object.metadata.name.as_deref().unwrap_or_default();
        let restarts = object.data["status"]["restarts"].as_u64();
        let most = object.data["spec"]["failurePolicy"]["maxRestarts"].as_u64();
        let _ = write!(out, "workload  {kind} {name}: {}", workload_words(object));
        if let (Some(restarts @ 1..), Some(most)) = (restarts, most) {
            let _ = write!(out, ", restarted {} (at most {most} after failures)", counted(restarts, "time"));
        }
        out.push('\n');
    }
    out
}

fn workload_words(object: &DynamicObject) -> String {
    let count = |pointer: &str| object.data.pointer(pointer).and_then(Value::as_u64);
    match phase(std::slice::from_ref(object)) {
        Phase::Suspended => match label(object.metadata.labels.as_ref(), "kueue.x-k8s.io/queue-name") {
            Some(queue) => format!("waiting in the queue {queue}"),
            None => "suspended".into(),
        },
        Phase::Complete => "complete".into(),
        Phase::Failed(reason) => format!("failed: {reason}"),
        // `phase` ignores the end of the trainers' plain Job; show it as complete all the same.
        Phase::Active
            if count("/spec/completions").is_some_and(|all| count("/status/succeeded") == Some(all)) =>
        {
            "complete".into()
        }
        Phase::Active | Phase::Absent => "active".into(),
    }
}

/// A table of the pods: name, node, and why the pod waits or how it ended.
#[must_use]
pub fn pod_lines(pods: &[Pod]) -> String {
    let rows: Vec<[String; 3]> = pods
        .iter()
        .map(|pod| {
            let name = pod.metadata.name.clone().unwrap_or_default();
            let node =
                pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_else(|| "-".into());
            [name, node, pod_words(pod)]
        })
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let (names, nodes) = (width(0), width(1));
    rows.iter().fold(String::new(), |mut out, [name, node, words]| {
        let _ = writeln!(out, "pod       {name:names$}  {node:nodes$}  {words}");
        out
    })
}

fn pod_words(pod: &Pod) -> String {
    let Some(status) = &pod.status else { return "unknown".into() };
    let state = container_state(pod);
    if let Some(ended) = state.and_then(|state| state.terminated.as_ref()) {
        let oom = ended.reason.as_deref() == Some("OOMKilled");
        return if oom {
            "ended: out of memory".into()
        } else {
            format!("ended: {}", exit_words(ended.exit_code))
        };
    }
    if let Some(waiting) = state.and_then(|state| state.waiting.as_ref()) {
        let message = waiting.message.as_deref().map(|message| format!(": {message}")).unwrap_or_default();
        return format!("{}{message}", waiting.reason.as_deref().unwrap_or("waiting"));
    }
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let unplaced =
        conditions.iter().find(|condition| condition.type_ == "PodScheduled" && condition.status == "False");
    if let Some(message) = unplaced.and_then(|condition| condition.message.as_deref()) {
        return format!("not placed: {message}");
    }
    let ready = conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True");
    match status.phase.as_deref() {
        Some("Running") if !ready => "running, not ready".into(),
        phase => phase.unwrap_or("unknown").to_lowercase(),
    }
}

/// The coordinator's newest pod; `pods` must be sorted oldest first.
#[must_use]
pub fn coordinator(pods: &[Pod]) -> Option<&Pod> {
    let component = |pod: &Pod| label(pod.metadata.labels.as_ref(), COMPONENT) == Some(COORDINATOR);
    pods.iter().rfind(|pod| component(pod))
}

/// State of a pod's only container.
#[must_use]
pub fn container_state(pod: &Pod) -> Option<&ContainerState> {
    pod.status.as_ref()?.container_statuses.as_ref()?.first()?.state.as_ref()
}

/// Meaning of an exit status of Dyad's programs.
#[must_use]
pub fn exit_words(code: i32) -> String {
    match code {
        0 => "done".into(),
        1 => "failed (1)".into(),
        2 => "invalid input (2)".into(),
        3 => "could not reach a process or port (3)".into(),
        4 => "stopped because another failed (4)".into(),
        130 => "drained (130)".into(),
        137 => "killed (137), for example when memory ran out".into(),
        other => format!("exit status {other}"),
    }
}

/// Prefix of a pod's log lines: `coordinator`, or e.g. `node 3`.
#[must_use]
pub fn pod_prefix(pod: &Pod) -> String {
    let labels = pod.metadata.labels.as_ref();
    let index = label(labels, "batch.kubernetes.io/job-completion-index");
    match (label(labels, COMPONENT), index) {
        (Some(TRAINERS), Some(index)) => format!("node {index}"),
        (Some(COORDINATOR), _) => COORDINATOR.into(),
        _ => pod.metadata.name.clone().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parsed(value: Value) -> DynamicObject {
        serde_json::from_value(value).unwrap()
    }

    fn jobset(status: Value) -> DynamicObject {
        parsed(json!({
            "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet",
            "metadata": { "name": "dyad", "labels": { "kueue.x-k8s.io/queue-name": "gpus" } },
            "spec": { "failurePolicy": { "maxRestarts": 3 }, "replicatedJobs": [] }, "status": status,
        }))
    }

    fn condition(kind: &str) -> Value {
        json!({ "conditions": [{ "type": kind, "status": "True", "message": "why" }] })
    }

    #[test]
    fn a_jobset_decides_the_phase() {
        let of = |status| phase(&[jobset(status)]);
        assert_eq!((phase(&[]), of(json!({}))), (Phase::Absent, Phase::Active));
        assert_eq!(
            (of(condition("Completed")), of(condition("Suspended"))),
            (Phase::Complete, Phase::Suspended)
        );
        assert_eq!(of(condition("Failed")), Phase::Failed("why".into()));
        let mut named_like_a_job = jobset(condition("Completed"));
        named_like_a_job.metadata.name = Some("my-trainers".into());
        assert_eq!(phase(&[named_like_a_job]), Phase::Complete);
        let waiting = workload_lines(&[jobset(condition("Suspended"))]);
        assert_eq!(waiting, "workload  JobSet dyad: waiting in the queue gpus\n");
        let again = workload_lines(&[jobset(json!({ "restarts": 2 }))]);
        assert!(again.contains("active, restarted 2 times (at most 3"), "{again}");
    }

    #[test]
    fn with_plain_jobs_the_coordinators_job_decides_the_phase() {
        let job = |name: &str, status: Value| {
            parsed(
                json!({ "apiVersion": "batch/v1", "kind": "Job", "metadata": { "name": name }, "status": status }),
            )
        };
        let (done, open) = (condition("Complete"), json!({}));
        assert_eq!(
            phase(&[job("dyad-coordinator", open.clone()), job("dyad-trainers", done.clone())]),
            Phase::Active
        );
        assert_eq!(
            phase(&[job("dyad-coordinator", done), job("dyad-trainers", open.clone())]),
            Phase::Complete
        );
        let failed = phase(&[job("dyad-coordinator", open), job("dyad-trainers", condition("Failed"))]);
        assert_eq!(failed, Phase::Failed("why".into()));
    }

    #[test]
    fn pod_words_say_why_a_pod_waits_or_ended() {
        let words = |status: Value| {
            let pod: Pod =
                serde_json::from_value(json!({ "metadata": { "name": "p" }, "status": status })).unwrap();
            pod_words(&pod)
        };
        let unplaced = json!({ "phase": "Pending", "conditions": [
            { "type": "PodScheduled", "status": "False", "message": "0/4 nodes: insufficient nvidia.com/gpu" }] });
        assert_eq!(words(unplaced), "not placed: 0/4 nodes: insufficient nvidia.com/gpu");
        let container = |state: Value| json!({ "containerStatuses": [{ "name": "trainers", "image": "i", "imageID": "", "ready": false, "restartCount": 0, "state": state }] });
        let pull = json!({ "waiting": { "reason": "ErrImagePull", "message": "denied" } });
        assert_eq!(words(container(pull)), "ErrImagePull: denied");
        assert_eq!(
            words(container(json!({ "terminated": { "exitCode": 4 } }))),
            "ended: stopped because another failed (4)"
        );
        let oom = json!({ "terminated": { "exitCode": 137, "reason": "OOMKilled" } });
        assert_eq!(words(container(oom)), "ended: out of memory");
        assert_eq!(words(json!({ "phase": "Running" })), "running, not ready");
    }
}
