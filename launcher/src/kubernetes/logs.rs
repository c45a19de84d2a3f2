//! `launcher kubernetes logs`: the log lines of all pods, each prefixed with its pod.

use std::collections::HashSet;
use std::time::Duration;

use dyad_proto::Fault;
use futures::{AsyncBufReadExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, LogParams};
use tokio::task::JoinSet;

use super::cli::LogsOptions;
use super::cluster::Cluster;
use super::events::event;
use super::state::{Phase, container_state, phase, pod_prefix};
use super::{print, status};

/// Time between two looks for new pods.
const AGAIN: Duration = Duration::from_secs(3);

/// Prints logs.
pub async fn act(options: &LogsOptions) -> Result<(), Fault> {
    let cluster = Cluster::connect(&options.cluster, &options.run).await?;
    let mut seen = HashSet::new();
    let mut readers = JoinSet::new();
    loop {
        let here = phase(&cluster.workloads().await?);
        let pods = cluster.run_pods().await?;
        if here == Phase::Absent && pods.is_empty() && seen.is_empty() {
            return Err(status::absent(&cluster));
        }
        for pod in pods.into_iter().filter(has_started) {
            if seen.insert(pod.metadata.uid.clone()) {
                readers.spawn(read(cluster.pods(), pod, options.clone()));
            }
        }
        let over = !matches!(here, Phase::Active | Phase::Suspended);
        if !options.follow || over {
            while readers.join_next().await.is_some() {}
            return Ok(());
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// A pod whose container has not started has no log yet.
fn has_started(pod: &Pod) -> bool {
    container_state(pod).is_some_and(|state| state.running.is_some() || state.terminated.is_some())
}

async fn read(pods: Api<Pod>, pod: Pod, options: LogsOptions) {
    let name = pod.metadata.name.clone().unwrap_or_default();
    let prefix = pod_prefix(&pod);
    let parameters =
        LogParams { follow: options.follow, tail_lines: options.tail.map(i64::from), ..Default::default() };
    let opened = pods.log_stream(&name, &parameters).await;
    let read = async {
        let mut lines = opened.map_err(|error| error.to_string())?.lines();
        while let Some(line) = lines.try_next().await.map_err(|error| error.to_string())? {
            if event(&line).is_none() && print(&format!("[{prefix}] {line}\n")).is_err() {
                break;
            }
        }
        Ok::<(), String>(())
    };
    if let Err(reason) = read.await {
        super::warn(&format!("cannot read the log of pod {name}: {reason}"));
    }
}
