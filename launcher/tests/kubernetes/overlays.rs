//! Checks `deploy/kubernetes`: the Kustomize base is a rendered run, and the overlays are JSON patches that turn it into other rendered
//! runs.

use std::collections::BTreeMap;

use launcher::kubernetes::object::{Object, yaml};
use launcher::kubernetes::render::files;
use serde_json::{Value, json};

use crate::schema::Schemas;
use crate::{deploy, render};

/// Arguments that each overlay is rendered from. `single-node` is also the base.
const OVERLAYS: [(&str, &str); 5] = [
    ("single-node", "--nodes 1 --gpus-per-node 8 --data claim:dyad-data --tls existing"),
    ("multi-node", "--nodes 4 --gpus-per-node 8 --data claim:dyad-data --tls existing"),
    (
        "kueue",
        "--nodes 4 --gpus-per-node 8 --data claim:dyad-data --tls existing --queue training --spread kubernetes.io/hostname=required",
    ),
    (
        "rdma",
        "--nodes 4 --gpus-per-node 8 --data claim:dyad-data --tls existing --rdma rdma/hca_shared_devices_a=1",
    ),
    (
        "cpu-test",
        "--nodes 1 --gpus-per-node 0 --output new:1Gi --workload job --tls off --shm-size 1Gi --scratch-size 1Gi",
    ),
];

fn rendered(name: &str, arguments: &str) -> Vec<Object> {
    let config = match name {
        "cpu-test" => format!("--config {}", deploy().join("run-cpu-test.toml").display()),
        _ => String::new(),
    };
    render(&format!("--image dyad --name dyad {arguments} {config}"))
}

/// Expected files: path below `deploy/kubernetes`, and text.
fn expected() -> BTreeMap<String, String> {
    let base = rendered(OVERLAYS[0].0, OVERLAYS[0].1);
    let mut out = BTreeMap::new();
    for (name, text) in files("dyad", &base).unwrap() {
        out.insert(format!("base/{name}"), text);
    }
    for (overlay, arguments) in OVERLAYS {
        for (name, text) in patches(&base, &rendered(overlay, arguments)) {
            out.insert(format!("overlays/{overlay}/{name}"), text);
        }
    }
    out
}

fn patches(base: &[Object], wanted: &[Object]) -> Vec<(String, String)> {
    let same = |a: &Object, b: &Object| (a.kind(), a.name()) == (b.kind(), b.name());
    let mut files = Vec::new();
    let (mut resources, mut patches) = (vec![json!("../../base")], Vec::new());
    for old in base {
        let file = old.file_name("dyad");
        let patch = match wanted.iter().find(|new| same(old, new)) {
            Some(new) => {
                let mut operations = Vec::new();
                difference(&old.0, &new.0, "", &mut operations);
                if operations.is_empty() {
                    continue;
                }
                Value::Array(operations)
            }
            None => json!({ "$patch": "delete", "apiVersion": old.api_version(), "kind": old.kind(),
                "metadata": { "name": old.name() } }),
        };
        let path = file.replace(".yaml", ".patch.yaml");
        patches.push(json!({ "path": path, "target": { "kind": old.kind(), "name": old.name() } }));
        files.push((path, yaml(&patch).unwrap()));
    }
    for new in wanted.iter().filter(|new| !base.iter().any(|old| same(old, new))) {
        resources.push(json!(new.file_name("dyad")));
        files.push((new.file_name("dyad"), yaml(&new.0).unwrap()));
    }
    let mut kustomization = json!({ "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": resources });
    if !patches.is_empty() {
        kustomization["patches"] = Value::Array(patches);
    }
    files.push(("kustomization.yaml".into(), yaml(&kustomization).unwrap()));
    files
}

/// RFC 6902 operations that turn one value into the other.
fn difference(old: &Value, new: &Value, at: &str, out: &mut Vec<Value>) {
    match (old, new) {
        (a, b) if a == b => {}
        (Value::Object(a), Value::Object(b)) => {
            let path = |key: &str| format!("{at}/{}", key.replace('~', "~0").replace('/', "~1"));
            for key in a.keys().filter(|key| !b.contains_key(*key)) {
                out.push(json!({ "op": "remove", "path": path(key) }));
            }
            for (key, value) in b {
                match a.get(key) {
                    Some(before) => difference(before, value, &path(key), out),
                    None => out.push(json!({ "op": "add", "path": path(key), "value": value })),
                }
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (index, (before, after)) in a.iter().zip(b).enumerate() {
                difference(before, after, &format!("{at}/{index}"), out);
            }
        }
        (_, new) => out.push(json!({ "op": "replace", "path": at, "value": new })),
    }
}

fn found() -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    let folders = ["base".to_owned()].into_iter().chain(OVERLAYS.map(|(name, _)| format!("overlays/{name}")));
    for folder in folders {
        for entry in std::fs::read_dir(deploy().join(&folder)).into_iter().flatten() {
            let path = entry.unwrap().path();
            let name = format!("{folder}/{}", path.file_name().unwrap().to_string_lossy());
            out.insert(name, std::fs::read_to_string(path).unwrap());
        }
    }
    out
}

#[test]
fn base_and_overlays_equal_rendered_objects() {
    let expected = expected();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        for folder in ["base", "overlays"] {
            let _ = std::fs::remove_dir_all(deploy().join(folder));
        }
        for (name, text) in &expected {
            let path = deploy().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
    }
    let found = found();
    let names = |files: &BTreeMap<String, String>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&found), names(&expected), "run `make render-kubernetes`");
    for (name, text) in expected {
        assert_eq!(
            found[&name], text,
            "{name} is not what the launcher renders: run `make render-kubernetes`"
        );
    }
}

#[test]
fn roles_are_valid_by_the_api_schemas() {
    let schemas = Schemas::load(&deploy());
    for entry in std::fs::read_dir(deploy().join("rbac")).unwrap() {
        let path = entry.unwrap().path();
        for part in std::fs::read_to_string(&path).unwrap().split("\n---\n") {
            let object: Value = serde_saphyr::from_str(part).unwrap();
            if object["kind"] != "Kustomization" {
                assert_eq!(schemas.errors(&object), Vec::<String>::new(), "{}", path.display());
            }
        }
    }
}
