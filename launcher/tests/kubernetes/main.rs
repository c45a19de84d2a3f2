//! Checks that the rendered manifests are valid by the API's schemas, equal to `deploy/kubernetes`, and as documented.
//!
//! `UPDATE_GOLDEN=1 cargo test --release -p dyad-launcher --test kubernetes` rewrites `deploy/kubernetes/{base,overlays}`.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod overlays;
mod schema;

use std::path::{Path, PathBuf};

use clap::Parser;
use launcher::cli::{CommandLine, LauncherCommand};
use launcher::kubernetes::cli::{KubernetesCommand, RenderOptions};
use launcher::kubernetes::object::{Object, stream};
use launcher::kubernetes::render;
use launcher::kubernetes::spec::Spec;
use serde_json::Value;

use schema::Schemas;

/// Folder of the manifests.
pub(crate) fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes")
}

fn options(arguments: &str) -> RenderOptions {
    let config = format!("--config {}", deploy().join("run.toml").display());
    let config = if arguments.contains("--config") { "" } else { &config };
    let line = format!("launcher kubernetes render {config} {arguments}");
    let line = CommandLine::try_parse_from(line.split_whitespace()).unwrap();
    match line.command {
        Some(LauncherCommand::Kubernetes(options)) => match options.command {
            KubernetesCommand::Render(options) => options,
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    }
}

fn spec(arguments: &str) -> Spec {
    Spec::new(&options(arguments).run).unwrap()
}

/// Everything that `launcher kubernetes render` prints.
fn render(arguments: &str) -> Vec<Object> {
    let spec = spec(arguments);
    let mut objects = render::secrets(&spec).unwrap();
    objects.extend(render::objects(&spec).unwrap());
    objects
}

fn refusal(arguments: &str) -> String {
    Spec::new(&options(arguments).run).unwrap_err().report()
}

const RUN: &str = "--nodes 4 --gpus-per-node 8 --image dyad:1 --data claim:data";

/// Command lines that together use every option that changes an object.
const VARIANTS: [&str; 7] = [
    RUN,
    "--nodes 1 --gpus-per-node 0 --image dyad:1 --data configmap:pairs --output scratch:1Gi --tls off --ttl 0 --set model=org/model",
    "--nodes 2 --gpus-per-node 0 --image dyad:1 --data claim:data/folder --output claim:runs/me --workload job --cpus 8 --memory 32Gi",
    "--nodes 4 --gpus-per-node 8 --image dyad:1 --data gs://bucket/data --output gs://bucket/runs -n training --rdma rdma/hca=8",
    "--nodes 4 --gpus-per-node 8 --image dyad:1 --data claim:data --queue gpus --queue-priority high --queue-topology cloud/block \
     --priority-class high --image-pull-secret pull --storage-class fast --spread topology.kubernetes.io/zone=required",
    "--nodes 4 --gpus-per-node 8 --image dyad:1 --data claim:data --node-selector a=b --toleration a=b:NoSchedule --toleration c \
     --env NCCL_DEBUG=INFO --env-from-secret hub --otlp-endpoint http://otel.observability:4317 --workload job --set zero_stage=3",
    "--nodes 4 --gpus-per-node 8 --image dyad:1 --data claim:data --no-network-policy --tls existing --set from_checkpoint=org/start",
];

#[test]
fn rendered_objects_are_valid_by_the_api_schemas() {
    let schemas = Schemas::load(&deploy());
    for arguments in VARIANTS {
        for object in render(arguments) {
            let errors = schemas.errors(&object.0);
            assert!(errors.is_empty(), "{arguments}: {} {}: {errors:#?}", object.kind(), object.name());
        }
    }
}

#[test]
fn the_schemas_refuse_invalid_objects() {
    let schemas = Schemas::load(&deploy());
    let jobset = render(RUN).pop().unwrap().0;
    let broken = |pointer: &str, key: &str, value: Value| {
        let mut jobset = jobset.clone();
        jobset.pointer_mut(pointer).unwrap()[key] = value;
        schemas.errors(&jobset).join("\n")
    };
    let pod = "/spec/replicatedJobs/0/template/spec/template/spec";
    assert!(broken(pod, "restartPolice", "Never".into()).contains("restartPolice: unknown field"));
    assert!(broken(pod, "terminationGracePeriodSeconds", "300".into()).contains("is no \"integer\""));
    assert!(broken("/spec/failurePolicy/rules/0", "action", "Restart".into()).contains("is none of"));
    assert!(broken("/spec/network", "enableDnsHostnames", true.into()).contains("unknown field"));
    let mut nameless = jobset.clone();
    nameless.pointer_mut("/spec/replicatedJobs/0").unwrap().as_object_mut().unwrap().remove("name");
    assert!(schemas.errors(&nameless).join("\n").contains("no name"));
}

#[test]
fn yaml_parses_to_the_rendered_objects() {
    for arguments in VARIANTS {
        let objects = render(arguments);
        let text = stream(&objects).unwrap();
        let read: Vec<Value> =
            text.split("\n---\n").map(|part| serde_saphyr::from_str(part).unwrap()).collect();
        let rendered: Vec<Value> = objects.into_iter().map(|object| object.0).collect();
        assert_eq!(read, rendered, "{arguments}");
    }
}

#[test]
fn pods_get_no_api_token_and_only_rdma_adds_capabilities() {
    for arguments in VARIANTS {
        let text = stream(&render(arguments)).unwrap();
        assert_eq!(text.matches("add:\n").count(), usize::from(arguments.contains("--rdma")), "{arguments}");
        for (needed, count) in
            [("automountServiceAccountToken: false", 3), ("readOnlyRootFilesystem: true", 2)]
        {
            assert_eq!(text.matches(needed).count(), count, "{arguments}: {needed}");
        }
        assert!(!text.contains("hostPath") && !text.contains("hostNetwork"), "{arguments}");
    }
}

#[test]
fn rendering_again_changes_nothing_but_the_secrets() {
    let (first, second) = (render(RUN), render(RUN));
    let differing: Vec<&str> =
        first.iter().zip(&second).filter(|(a, b)| a != b).map(|(object, _)| object.kind()).collect();
    assert_eq!(differing, ["Secret", "Secret"]);
    let of = |key: &str| first[0].0["data"][key].as_str().unwrap().to_owned();
    assert!(["ca.pem", "cert.pem", "key.pem", "join-token"].map(of).iter().all(|text| text.len() > 40));
    assert_eq!(first[0].0["data"]["ca.pem"], first[1].0["data"]["ca.pem"]);
    assert_ne!(first[0].0["data"]["key.pem"], first[1].0["data"]["key.pem"]);
}

#[test]
fn only_several_nodes_need_a_shared_claim() {
    let claim = |arguments: &str| {
        let objects = render(arguments);
        let claim = objects.iter().find(|object| object.kind() == "PersistentVolumeClaim").unwrap();
        claim.0["spec"]["accessModes"][0].as_str().unwrap().to_owned()
    };
    assert_eq!(claim(RUN), "ReadWriteMany");
    let alone = "--nodes 1 --gpus-per-node 8 --image dyad:1 --data claim:data";
    assert_eq!(claim(alone), "ReadWriteOnce");
    let text = stream(&render(alone)).unwrap();
    assert!(text.contains("podAffinity") && !stream(&render(RUN)).unwrap().contains("podAffinity"));
}

#[test]
fn paths_outside_the_volumes_are_refused() {
    let cases = [
        ("output_dir=/home/me/run", "config key `output_dir`: /home/me/run is not inside a volume"),
        ("output_dir=../run", "config key `output_dir`: ../run is not inside a volume"),
        ("training_file=/home/me/pairs.jsonl", "config key `training_file`"),
        ("model=./model", "config key `model`"),
        ("model=.cache/model", "config key `model`"),
        ("model=/models/llama", "config key `model`"),
        ("from_checkpoint=~/model", "config key `from_checkpoint`"),
        ("reference_cache=/var/cache/r.sqlite", "config key `reference_cache`"),
    ];
    for (set, message) in cases {
        let refusal = refusal(&format!("{RUN} --set {set}"));
        assert!(
            refusal.starts_with(&format!("error: {message}")) && refusal.contains("hint: give a path below"),
            "{refusal}"
        );
    }
    let unmounted = refusal("--nodes 1 --gpus-per-node 8 --image dyad:1");
    assert!(
        unmounted.contains("nothing is mounted at /data") && unmounted.contains("--data claim:NAME"),
        "{unmounted}"
    );
    assert_eq!(spec(&format!("{RUN} --set output_dir=/output/a/b")).config.output_dir, "/output/a/b");
}

#[test]
fn bad_options_are_refused_with_a_hint() {
    let cases = [
        ("--name Dyad", "--name Dyad cannot name Kubernetes objects"),
        ("--name a-name-that-leaves-too-little-room-for-pods", "cannot name"),
        ("--namespace team/a", "--namespace team/a is no name"),
        ("--queue GPUs", "--queue GPUs is no name"),
        ("--env 1X=2", "--env 1X: no name of an environment variable"),
        ("--output scratch:1Gi", "--output scratch:SIZE is lost with the pod"),
        ("--output configmap:x", "--output cannot be a ConfigMap"),
    ];
    for (flag, message) in cases {
        let refusal = refusal(&format!("{RUN} {flag}"));
        assert!(refusal.contains(message) && refusal.contains("hint: "), "{flag}: {refusal}");
    }
}

/// Rendered folders are committed to repositories and lie on shared disks.
#[test]
fn secrets_are_written_only_on_request_and_readable_only_by_the_user() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let write = |more: &str| {
        let out = dir.path().display();
        render::act(&options(&format!("{RUN} --output-dir {out} {more}"))).unwrap();
        let mut secrets: Vec<(String, u32)> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| {
                (
                    entry.file_name().into_string().unwrap(),
                    entry.metadata().unwrap().permissions().mode() & 0o777,
                )
            })
            .filter(|(name, _)| name.starts_with("secret"))
            .collect();
        secrets.sort();
        secrets
    };
    assert_eq!(write(""), []);
    let kustomization = || std::fs::read_to_string(dir.path().join("kustomization.yaml")).unwrap();
    assert!(!kustomization().contains("secret"), "{}", kustomization());
    let names = |secrets: &[(String, u32)]| secrets.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    let expected = ["secret-coordinator-tls.yaml", "secret-trainer-tls.yaml"];
    let written = write("--with-secrets");
    assert_eq!(names(&written), expected);
    assert!(written.iter().all(|(_, mode)| *mode == 0o600), "{written:?}");
    assert!(kustomization().contains("secret-trainer-tls.yaml"));
    // Also if the file existed and was readable by all.
    let open = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(dir.path().join(expected[0]), open).unwrap();
    assert!(write("--part secrets").iter().all(|(_, mode)| *mode == 0o600));
}
