//! Services and NetworkPolicies: all traffic from and to the run's pods is denied, except for the connections listed here.

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort,
    NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use dyad_proto::Fault;

use super::cli::Workload;
use super::meta::{Component, INSTANCE, map, metadata, pod_selector, selecting};
use super::object::{Object, object};
use super::spec::{GRPC_PORT, METRICS_PORT, Spec};
use super::volumes;

/// Headless Services: one for the coordinator's DNS name; plain Jobs need another for the trainers' DNS names.
pub fn services(spec: &Spec) -> Result<Vec<Object>, Fault> {
    let port = |name: &str, port: i32, protocol: Option<&str>| ServicePort {
        name: Some(name.into()),
        port,
        target_port: Some(IntOrString::String(name.into())),
        app_protocol: protocol.map(Into::into),
        ..Default::default()
    };
    let grpc = port("grpc", GRPC_PORT, (!spec.secure()).then_some("kubernetes.io/h2c"));
    let metrics = port("metrics", METRICS_PORT, None);
    let mut services = vec![object(&headless(spec, Component::Coordinator, Some(vec![grpc, metrics])))?];
    if spec.options.workload == Workload::Job {
        services.push(object(&headless(spec, Component::Trainers, None))?);
    }
    Ok(services)
}

fn headless(spec: &Spec, component: Component, ports: Option<Vec<ServicePort>>) -> Service {
    Service {
        metadata: metadata(spec, &spec.named(component.word())),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".into()),
            // Trainers resolve the coordinator's name while it still reads its data.
            publish_not_ready_addresses: Some(true),
            selector: Some(pod_selector(spec, component)),
            ports,
            ..Default::default()
        }),
        status: None,
    }
}

/// Denies all traffic of the run's pods by default, then allows what each component needs.
pub fn policies(spec: &Spec) -> Result<Vec<Object>, Fault> {
    if spec.options.network.no_network_policy {
        return Ok(Vec::new());
    }
    let all = LabelSelector { match_labels: Some(map([(INSTANCE, spec.name())])), ..Default::default() };
    let deny = policy(spec, "default-deny", all, Vec::new(), Vec::new());
    let trainers = vec![pods(spec, Component::Trainers)];
    let scrape = vec![namespace(&spec.options.network.metrics_namespace)];
    let coordinator = policy(
        spec,
        "coordinator",
        selecting(spec, Component::Coordinator),
        vec![ingress(trainers.clone(), Some(GRPC_PORT)), ingress(scrape, Some(METRICS_PORT))],
        outward(spec),
    );
    let between = policy(
        spec,
        "trainers",
        selecting(spec, Component::Trainers),
        vec![ingress(trainers, None)],
        from_trainers(spec),
    );
    [deny, coordinator, between].iter().map(object).collect()
}

fn from_trainers(spec: &Spec) -> Vec<NetworkPolicyEgressRule> {
    let trainers = vec![pods(spec, Component::Trainers)];
    // All ports: Gloo and NCCL listen on ports that the kernel chooses.
    let mut out = vec![
        NetworkPolicyEgressRule { to: Some(trainers), ports: None },
        NetworkPolicyEgressRule {
            to: Some(vec![pods(spec, Component::Coordinator)]),
            ports: Some(vec![tcp(GRPC_PORT)]),
        },
    ];
    out.extend(outward(spec));
    if spec.needs_hub() {
        out.push(NetworkPolicyEgressRule { to: None, ports: Some(vec![tcp(443)]) });
    }
    out
}

fn policy(
    spec: &Spec,
    suffix: &str,
    pod_selector: LabelSelector,
    ingress: Vec<NetworkPolicyIngressRule>,
    egress: Vec<NetworkPolicyEgressRule>,
) -> NetworkPolicy {
    NetworkPolicy {
        metadata: metadata(spec, &spec.named(suffix)),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(pod_selector),
            policy_types: Some(vec!["Ingress".into(), "Egress".into()]),
            ingress: Some(ingress).filter(|rules| !rules.is_empty()),
            egress: Some(egress).filter(|rules| !rules.is_empty()),
        }),
    }
}

/// Connections that every pod may open outside the run: DNS, the trace collector, and buckets if one is mounted.
fn outward(spec: &Spec) -> Vec<NetworkPolicyEgressRule> {
    // Any destination: a node-local DNS cache is in no namespace.
    let dns = NetworkPolicyPort { protocol: Some("UDP".into()), ..tcp(53) };
    let mut rules = vec![NetworkPolicyEgressRule { to: None, ports: Some(vec![dns, tcp(53)]) }];
    if let Some(endpoint) = &spec.options.network.otlp_endpoint {
        let (peer, port) = collector(endpoint);
        rules.push(NetworkPolicyEgressRule { to: peer.map(|peer| vec![peer]), ports: Some(vec![tcp(port)]) });
    }
    if volumes::uses_gcs(spec) {
        rules.push(NetworkPolicyEgressRule { to: None, ports: Some(vec![tcp(443)]) });
    }
    rules
}

/// Peer and port of an OTLP endpoint. `http://otel-collector.observability:4317` is port 4317 of pods in the namespace `observability`; a
/// host without a namespace may be anywhere (`None`).
fn collector(endpoint: &str) -> (Option<NetworkPolicyPeer>, i32) {
    let (scheme, rest) = endpoint.split_once("://").unwrap_or(("http", endpoint));
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let (host, port) = authority.rsplit_once(':').unwrap_or((authority, ""));
    let default = if scheme == "https" { 443 } else { 4317 };
    let mut parts = host.split('.').skip(1);
    let in_cluster = parts.next().filter(|_| matches!(parts.next(), None | Some("svc")));
    let by_name = in_cluster.filter(|name| super::spec::is_label(name)).map(namespace);
    (by_name, port.parse().unwrap_or(default))
}

fn ingress(from: Vec<NetworkPolicyPeer>, port: Option<i32>) -> NetworkPolicyIngressRule {
    NetworkPolicyIngressRule { from: Some(from), ports: port.map(|port| vec![tcp(port)]) }
}

fn tcp(port: i32) -> NetworkPolicyPort {
    NetworkPolicyPort { port: Some(IntOrString::Int(port)), protocol: Some("TCP".into()), end_port: None }
}

fn pods(spec: &Spec, component: Component) -> NetworkPolicyPeer {
    NetworkPolicyPeer { pod_selector: Some(selecting(spec, component)), ..Default::default() }
}

fn namespace(name: &str) -> NetworkPolicyPeer {
    let labels = Some(map([("kubernetes.io/metadata.name", name)]));
    let namespace_selector = Some(LabelSelector { match_labels: labels, ..Default::default() });
    NetworkPolicyPeer { namespace_selector, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_in_the_cluster_is_selected_by_its_namespace() {
        let namespace_of = |endpoint: &str| {
            let (peer, port) = collector(endpoint);
            let selector = peer.and_then(|peer| peer.namespace_selector?.match_labels);
            (selector.map(|labels| labels["kubernetes.io/metadata.name"].clone()), port)
        };
        let observability = Some("observability".to_owned());
        assert_eq!(namespace_of("http://otel.observability:4317"), (observability.clone(), 4317));
        assert_eq!(
            namespace_of("http://otel.observability.svc.cluster.local:4318/v1"),
            (observability, 4318)
        );
        assert_eq!(namespace_of("https://otel.example.com"), (None, 443));
        assert_eq!(namespace_of("http://10.0.0.7:4317"), (None, 4317));
        assert_eq!(namespace_of("collector"), (None, 4317));
    }
}
