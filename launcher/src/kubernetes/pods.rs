//! The pods: one for the coordinator, and one per node that starts the node's trainers.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Affinity, Container, ContainerPort, EnvFromSource, EnvVar, GRPCAction, LocalObjectReference, PodAffinity,
    PodAffinityTerm, PodSpec, PodTemplateSpec, Probe, ResourceRequirements, SecretEnvSource, Toleration,
    TopologySpreadConstraint,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::cli::Workload;
use super::confine;
use super::meta::{Component, pod_labels, selecting};
use super::spec::{CONFIG, GRPC_PORT, HEALTH_PORT, METRICS_PORT, Spec, TLS};
use super::values::FileStore;
use super::volumes;
use crate::node::MOST_PATIENCE;

/// Seconds by which the trainers' grace period is shorter than the pod's, so that `launcher node` can end in time.
const LAST_SECONDS: u32 = 10;

/// Template of a component's pods.
#[must_use]
pub fn template(spec: &Spec, component: Component) -> PodTemplateSpec {
    let metadata = ObjectMeta {
        labels: Some(pod_labels(spec, component)),
        annotations: Some(annotations(spec, component)).filter(|annotations| !annotations.is_empty()),
        ..Default::default()
    };
    PodTemplateSpec { metadata: Some(metadata), spec: Some(pod(spec, component)) }
}

fn annotations(spec: &Spec, component: Component) -> BTreeMap<String, String> {
    let mut annotations = volumes::annotations(spec);
    if let (Some(level), Component::Trainers) = (&spec.options.scheduling.queue_topology, component) {
        annotations.insert("kueue.x-k8s.io/podset-required-topology".into(), level.clone());
    }
    annotations
}

fn pod(spec: &Spec, component: Component) -> PodSpec {
    let scheduling = &spec.options.scheduling;
    let trains = component == Component::Trainers;
    let pull = scheduling.image_pull_secret.clone().map(|name| vec![LocalObjectReference { name }]);
    PodSpec {
        service_account_name: Some(spec.name().to_owned()),
        automount_service_account_token: Some(false),
        // Otherwise a Service named like the run sets variables such as DYAD_PORT in every container.
        enable_service_links: Some(false),
        restart_policy: Some("Never".into()),
        termination_grace_period_seconds: Some(i64::from(spec.options.lifecycle.grace_period)),
        subdomain: (spec.options.workload == Workload::Job && trains).then(|| spec.named("trainers")),
        image_pull_secrets: pull,
        priority_class_name: scheduling.priority_class.clone(),
        security_context: Some(confine::pod()),
        node_selector: trains.then(|| node_selector(spec)).filter(|selector| !selector.is_empty()),
        tolerations: trains.then(|| tolerations(spec)).filter(|tolerations| !tolerations.is_empty()),
        topology_spread_constraints: (trains && spec.options.nodes > 1).then(|| vec![spread(spec)]),
        affinity: if trains { None } else { beside_the_trainer(spec) },
        containers: vec![if trains { trainers(spec) } else { coordinator(spec) }],
        volumes: Some(volumes::volumes(spec, component)),
        ..Default::default()
    }
}

fn coordinator(spec: &Spec) -> Container {
    let port = |name: &str, port| ContainerPort {
        name: Some(name.into()),
        container_port: port,
        ..Default::default()
    };
    Container {
        command: Some(vec!["coordinator".into()]),
        args: Some(coordinator_flags(spec)),
        ports: Some(vec![port("grpc", GRPC_PORT), port("metrics", METRICS_PORT)]),
        resources: Some(ResourceRequirements {
            requests: Some(quantities([("cpu", "500m"), ("memory", "512Mi")])),
            limits: Some(quantities([("memory", "4Gi")])),
            claims: None,
        }),
        // Up to 10 minutes: the coordinator reads all pairs before it listens.
        startup_probe: Some(probe(spec, 5, 120)),
        readiness_probe: Some(probe(spec, 10, 3)),
        liveness_probe: Some(probe(spec, 20, 6)),
        ..container(spec, Component::Coordinator)
    }
}

fn coordinator_flags(spec: &Spec) -> Vec<String> {
    let mut args = vec![
        format!("--config={CONFIG}/run.json"),
        format!("--listen=0.0.0.0:{GRPC_PORT}"),
        format!("--metrics-listen=0.0.0.0:{METRICS_PORT}"),
        format!("--world-size={}", spec.world_size()),
        format!("--join-timeout-seconds={}", spec.options.lifecycle.join_timeout),
        "--auto-resume".to_owned(),
        "--tell-trainers".to_owned(),
        "--print-events".to_owned(),
    ];
    // The kubelet's probes have no client certificate, so with TLS they need a plain-text port.
    args.push(if spec.secure() {
        format!("--health-listen=0.0.0.0:{HEALTH_PORT}")
    } else {
        "--insecure".to_owned()
    });
    args
}

fn probe(spec: &Spec, period: i32, failures: i32) -> Probe {
    let port = if spec.secure() { HEALTH_PORT } else { GRPC_PORT };
    Probe {
        grpc: Some(GRPCAction { port, service: None }),
        period_seconds: Some(period),
        failure_threshold: Some(failures),
        timeout_seconds: Some(5),
        ..Default::default()
    }
}

/// Container of the trainers. It has no probes: a collective or a checkpoint may take long, and the coordinator watches heartbeats.
fn trainers(spec: &Spec) -> Container {
    let lifecycle = &spec.options.lifecycle;
    let grace = lifecycle.grace_period.saturating_sub(LAST_SECONDS).max(1);
    let args = vec![
        format!("--coordinator={}", spec.coordinator_url()),
        format!("--gpus={}", spec.options.gpus_per_node),
        format!("--logs={}/logs", spec.config.output_dir),
        format!("--wait-for-coordinator={}", u64::from(lifecycle.join_timeout).min(MOST_PATIENCE)),
        format!("--grace-period={grace}"),
    ];
    Container {
        command: Some(vec!["launcher".into(), "node".into()]),
        args: Some(args),
        env_from: spec.options.network.env_from_secret.clone().map(|name| {
            let secret_ref = Some(SecretEnvSource { name, optional: None });
            vec![EnvFromSource { secret_ref, ..Default::default() }]
        }),
        resources: resources(spec),
        security_context: Some(confine::container(spec.options.scheduling.rdma.is_some())),
        ..container(spec, Component::Trainers)
    }
}

/// Fields that both containers have.
fn container(spec: &Spec, component: Component) -> Container {
    Container {
        name: component.word().into(),
        image: Some(spec.options.image.clone()),
        env: Some(environment(spec, component)),
        security_context: Some(confine::container(false)),
        volume_mounts: Some(volumes::mounts(spec, component)),
        // Keep the last log lines of a failed container in the pod's status, also after its log is gone.
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        ..Default::default()
    }
}

fn environment(spec: &Spec, component: Component) -> Vec<EnvVar> {
    let mut pairs = vec![("HOME".to_owned(), "/tmp".to_owned())];
    if spec.secure() {
        pairs.push(("DYAD_TLS_DIR".into(), TLS.into()));
    }
    if component == Component::Trainers && spec.options.gpus_per_node > 0 {
        pairs.push(("NCCL_DEBUG".into(), "WARN".into()));
    }
    if let Some(endpoint) = &spec.options.network.otlp_endpoint {
        pairs.push(("OTEL_EXPORTER_OTLP_ENDPOINT".into(), endpoint.clone()));
        pairs.push(("OTEL_RESOURCE_ATTRIBUTES".into(), format!("service.namespace={}", spec.name())));
    }
    for given in &spec.options.network.env {
        pairs.retain(|(key, _)| *key != given.key);
        pairs.push((given.key.clone(), given.value.clone()));
    }
    pairs.into_iter().map(|(name, value)| EnvVar { name, value: Some(value), value_from: None }).collect()
}

fn resources(spec: &Spec) -> Option<ResourceRequirements> {
    let scheduling = &spec.options.scheduling;
    let mut limits = BTreeMap::new();
    let mut requests = BTreeMap::new();
    if spec.options.gpus_per_node > 0 {
        limits.insert(scheduling.gpu_resource.clone(), Quantity(spec.options.gpus_per_node.to_string()));
    }
    if let Some(rdma) = &scheduling.rdma {
        limits.insert(rdma.resource.clone(), Quantity(rdma.count.to_string()));
    }
    if let Some(cpus) = &scheduling.cpus {
        requests.insert("cpu".to_owned(), Quantity(cpus.0.clone()));
    }
    if let Some(memory) = &scheduling.memory {
        requests.insert("memory".to_owned(), Quantity(memory.0.clone()));
        limits.insert("memory".to_owned(), Quantity(memory.0.clone()));
    }
    let some = |map: BTreeMap<String, Quantity>| Some(map).filter(|map| !map.is_empty());
    let (limits, requests) = (some(limits), some(requests));
    (limits.is_some() || requests.is_some()).then_some(ResourceRequirements {
        limits,
        requests,
        claims: None,
    })
}

/// A map of quantities, such as `cpu: 500m`.
fn quantities<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<String, Quantity> {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), Quantity(value.to_owned()))).collect()
}

fn node_selector(spec: &Spec) -> BTreeMap<String, String> {
    spec.options
        .scheduling
        .node_selector
        .iter()
        .map(|label| (label.key.clone(), label.value.clone()))
        .collect()
}

fn tolerations(spec: &Spec) -> Vec<Toleration> {
    let scheduling = &spec.options.scheduling;
    let gpu = (spec.options.gpus_per_node > 0).then(|| Toleration {
        key: Some(scheduling.gpu_resource.clone()),
        operator: Some("Exists".into()),
        effect: Some("NoSchedule".into()),
        ..Default::default()
    });
    let given = scheduling.toleration.iter().map(|toleration| Toleration {
        key: Some(toleration.key.clone()),
        operator: Some(if toleration.value.is_some() { "Equal" } else { "Exists" }.into()),
        value: toleration.value.clone(),
        effect: toleration.effect.clone(),
        toleration_seconds: None,
    });
    gpu.into_iter().chain(given).collect()
}

fn spread(spec: &Spec) -> TopologySpreadConstraint {
    let spread = &spec.options.scheduling.spread;
    TopologySpreadConstraint {
        topology_key: spread.key.clone(),
        max_skew: 1,
        when_unsatisfiable: if spread.required { "DoNotSchedule" } else { "ScheduleAnyway" }.into(),
        label_selector: Some(selecting(spec, Component::Trainers)),
        ..Default::default()
    }
}

/// With one node, the new claim is `ReadWriteOnce`: the coordinator must run on the trainers' node to mount it.
fn beside_the_trainer(spec: &Spec) -> Option<Affinity> {
    let shared = spec.options.nodes > 1 || !matches!(spec.options.storage.output, FileStore::New(_));
    let term = PodAffinityTerm {
        label_selector: Some(selecting(spec, Component::Trainers)),
        topology_key: "kubernetes.io/hostname".into(),
        ..Default::default()
    };
    let required_during_scheduling_ignored_during_execution = Some(vec![term]);
    (!shared).then(|| Affinity {
        pod_affinity: Some(PodAffinity {
            required_during_scheduling_ignored_during_execution,
            ..Default::default()
        }),
        ..Default::default()
    })
}
