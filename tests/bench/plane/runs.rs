//! Whole runs of a real coordinator with trainers that compute nothing.

use std::path::Path;
use std::time::{Duration, Instant};

use dyad_proto::security::client::Access;
use dyad_proto::wire::WatchRunRequest;
use dyad_proto::wire::coordinator_client::CoordinatorClient;
use dyad_proto::wire::run_event::Body as Happening;
use tokio::task::JoinHandle;

use crate::coordinator::Coordinator;
use crate::trainers::{self, Stages};

/// Sizes of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) trainers: usize,
    pub(crate) batch: usize,
    pub(crate) steps: usize,
    /// Seconds with only heartbeats before the first step.
    pub(crate) beats: u32,
}

type Rows = Vec<(String, String)>;

/// Runs the phases join, measure, rest and train. Returns the coordinator's cost of each.
pub(crate) fn measure(dir: &Path, data: &Path, shape: Shape) -> Rows {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(whole_run(dir, data, shape))
}

/// Processor and wall time since the last reading.
struct Meter<'a> {
    coordinator: &'a Coordinator,
    cpu: f64,
    wall: Instant,
}

impl<'a> Meter<'a> {
    fn new(coordinator: &'a Coordinator) -> Self {
        Self { coordinator, cpu: coordinator.cpu_seconds(), wall: Instant::now() }
    }

    fn lap(&mut self) -> (f64, f64) {
        let before = std::mem::replace(self, Self::new(self.coordinator));
        (self.wall.duration_since(before.wall).as_secs_f64(), self.cpu - before.cpu)
    }
}

async fn whole_run(dir: &Path, data: &Path, shape: Shape) -> Rows {
    let Shape { trainers, batch, steps, beats } = shape;
    let config = format!("batch_size = {batch}\nmax_steps = {steps}");
    let coordinator = Coordinator::start(dir, data, trainers, &config);
    let stages = Stages::new(trainers, beats);
    let rows = watch(&coordinator.url);
    let mut meter = Meter::new(&coordinator);
    let runs: Vec<_> = (0..trainers)
        .map(|index| tokio::spawn(trainers::run(coordinator.url.clone(), index, stages.clone())))
        .collect();
    let took = |(wall, cpu): (f64, f64)| format!("{wall:.2} s, coordinator's processor time {cpu:.2} s");
    let mut report: Rows = Vec::new();
    stages.assigned.wait().await;
    report.push((format!("{trainers} trainers join"), took(meter.lap())));
    stages.planned.wait().await;
    report.push(("all pairs measured, the run planned".into(), took(meter.lap())));
    report.push(("peak memory until then".into(), format!("{:.0} MiB", coordinator.peak_memory())));
    stages.rested.wait().await;
    let (wall, cpu) = meter.lap();
    report.push((format!("heartbeats of {wall:.1} s"), format!("{:.2} % of a core", 100.0 * cpu / wall)));
    stages.trained.wait().await;
    let (wall, cpu) = meter.lap();
    let each = |seconds: f64| 1e3 * seconds / steps as f64;
    report.push((
        format!("a step of {batch} pairs, trainers that compute nothing on the same cores"),
        format!("{:.1} ms, coordinator's processor time {:.1} ms", each(wall), each(cpu)),
    ));
    let reported = futures::future::join_all(runs).await.into_iter().map(Result::unwrap).collect::<Vec<_>>();
    let rows = rows.await.unwrap();
    report.push(("from a step's last report to its row, median".into(), latency(&reported, &rows)));
    report.push(("peak memory".into(), format!("{:.0} MiB", coordinator.peak_memory())));
    coordinator.end();
    report
}

/// Watches the run and returns when each step's row arrived.
fn watch(url: &str) -> JoinHandle<Vec<Instant>> {
    let url = url.to_owned();
    tokio::spawn(async move {
        let access = Access::new(&url, None, None).unwrap();
        let channel = access.endpoint().unwrap().connect().await.unwrap();
        let mut client = CoordinatorClient::new(channel);
        let call = access.request(WatchRunRequest {}).unwrap();
        let mut events = client.watch_run(call).await.unwrap().into_inner();
        let mut rows = Vec::new();
        while let Some(event) = events.message().await.unwrap() {
            if let Some(Happening::Step(_)) = event.body {
                rows.push(Instant::now());
            }
        }
        rows
    })
}

fn latency(reported: &[Vec<Instant>], rows: &[Instant]) -> String {
    let last = |step: usize| reported.iter().map(|times| times[step]).max().unwrap();
    let mut late: Vec<Duration> =
        rows.iter().enumerate().map(|(step, row)| row.duration_since(last(step))).collect();
    late.sort_unstable();
    format!("{:.1} ms", 1e3 * late[late.len() / 2].as_secs_f64())
}
