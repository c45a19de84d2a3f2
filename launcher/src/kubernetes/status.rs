//! `launcher kubernetes status`: prints workload, pods and progress once.

use dyad_proto::wire::run_event::Body;
use dyad_proto::{ErrorCode, Fault, counted};
use k8s_openapi::api::core::v1::Pod;
use kube::api::LogParams;

use super::cli::StatusOptions;
use super::cluster::Cluster;
use super::events::event;
use super::print;
use super::state::{Phase, coordinator, phase, pod_lines, workload_lines};
use crate::show::progress::step_line;

/// Lines read from the end of the coordinator's log; the last step is among them.
const TAIL: i64 = 200;

/// Prints the status.
pub async fn act(options: &StatusOptions) -> Result<(), Fault> {
    let cluster = Cluster::connect(&options.cluster, &options.run).await?;
    let workloads = cluster.workloads().await?;
    if phase(&workloads) == Phase::Absent {
        return Err(absent(&cluster));
    }
    let pods = cluster.run_pods().await?;
    print(&format!("run       {} in namespace {}\n", cluster.name, cluster.namespace))?;
    print(&workload_lines(&workloads))?;
    print(&pod_lines(&pods))?;
    match coordinator(&pods) {
        Some(pod) => print(&format!("progress  {}\n", progress(&cluster, pod).await)),
        None => Ok(()),
    }
}

/// The error for a run that does not exist.
pub fn absent(cluster: &Cluster) -> Fault {
    Fault::input(format!("no run {} in namespace {}", cluster.name, cluster.namespace))
        .hint("check --name, --namespace and --context; `launcher kubernetes apply` starts a run")
}

async fn progress(cluster: &Cluster, pod: &Pod) -> String {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let parameters = LogParams { tail_lines: Some(TAIL), ..Default::default() };
    match cluster.pods().logs(name, &parameters).await {
        Ok(text) => last_word(text.lines().filter_map(event)),
        Err(error) => format!("unknown: no log of {name} ({error})"),
    }
}

fn last_word(events: impl Iterator<Item = Body>) -> String {
    let mut total = None;
    let mut word = "nothing yet".to_owned();
    for event in events {
        match event {
            Body::Started(started) => {
                word = format!("waiting for {}", counted(started.world_size, "trainer"))
            }
            Body::Data(data) => total = Some(data.total_steps),
            Body::Step(step) => {
                let of = total.map(|total| format!("/{total}")).unwrap_or_default();
                word = format!("step {}{of}  {}", step.step, step_line(&step.values));
            }
            Body::Ended(ended) => {
                word = ended.failure.map_or_else(|| "complete".to_owned(), |failure| end(&failure.into()));
            }
            _ => {}
        }
    }
    word
}

fn end(fault: &Fault) -> String {
    match fault.code {
        ErrorCode::Interrupted => fault.to_string(),
        _ => format!("failed: {fault}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use dyad_proto::wire::{DataReport, RunEnded, RunStarted, StepMetrics};

    use super::*;

    #[test]
    fn progress_is_the_last_relevant_event() {
        let data = Body::Data(DataReport { total_steps: 9, ..Default::default() });
        let step = Body::Step(StepMetrics { step: 3, values: HashMap::from([("loss".into(), 0.25)]) });
        assert_eq!(last_word([].into_iter()), "nothing yet");
        assert_eq!(last_word([data.clone(), step.clone()].into_iter()), "step 3/9  loss 0.2500");
        assert_eq!(last_word([step.clone()].into_iter()), "step 3  loss 0.2500");
        let ended = Body::Ended(RunEnded { failure: Some(Fault::failed("gone").into()) });
        assert_eq!(last_word([data, step.clone(), ended].into_iter()), "failed: gone");
        let stop = Fault::new(ErrorCode::Interrupted, "stopped by SIGTERM after step 3");
        let ended = Body::Ended(RunEnded { failure: Some(stop.into()) });
        assert_eq!(last_word([step, ended].into_iter()), "stopped by SIGTERM after step 3");
        let started = |trainers| Body::Started(RunStarted { world_size: trainers, ..Default::default() });
        assert_eq!(last_word([started(1)].into_iter()), "waiting for 1 trainer");
        assert_eq!(last_word([started(2)].into_iter()), "waiting for 2 trainers");
    }
}
