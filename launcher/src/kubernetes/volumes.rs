//! Volumes of the pods: configuration, certificates, results, data, shared memory, scratch.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    CSIVolumeSource, ConfigMapVolumeSource, EmptyDirVolumeSource, PersistentVolumeClaimVolumeSource,
    SecretVolumeSource, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::meta::{Component, map};
use super::spec::{CONFIG, DATA, OUTPUT, Spec, TLS};
use super::values::FileStore;

/// GKE's CSI driver for Cloud Storage.
const GCS_DRIVER: &str = "gcsfuse.csi.storage.gke.io";

/// Volumes of a component's pod.
#[must_use]
pub fn volumes(spec: &Spec, component: Component) -> Vec<Volume> {
    let storage = &spec.options.storage;
    let mut volumes = Vec::new();
    if component == Component::Coordinator {
        volumes.push(Volume {
            name: "config".into(),
            config_map: Some(ConfigMapVolumeSource { name: spec.named("config"), ..Default::default() }),
            ..Default::default()
        });
    }
    if spec.secure() {
        let secret = SecretVolumeSource {
            secret_name: Some(spec.named(tls_suffix(component))),
            // Group-readable: the files belong to root, and the process does not run as root.
            default_mode: Some(0o440),
            ..Default::default()
        };
        volumes.push(Volume { name: "tls".into(), secret: Some(secret), ..Default::default() });
    }
    volumes.push(volume("output", &storage.output, &spec.named("output")));
    volumes.extend(storage.data.as_ref().map(|place| volume("data", place, "")));
    volumes.push(empty("tmp", &storage.scratch_size.0, None));
    if component == Component::Trainers {
        volumes.push(empty("shm", &storage.shm_size.0, Some("Memory")));
    }
    volumes
}

/// Mount points of a component's container.
#[must_use]
pub fn mounts(spec: &Spec, component: Component) -> Vec<VolumeMount> {
    let storage = &spec.options.storage;
    let mount = |name: &str, path: &str, place: Option<&FileStore>, read_only: bool| VolumeMount {
        name: name.into(),
        mount_path: path.into(),
        read_only: read_only.then_some(true),
        sub_path: place.and_then(folder),
        ..Default::default()
    };
    let mut mounts = Vec::new();
    if component == Component::Coordinator {
        mounts.push(mount("config", CONFIG, None, true));
    }
    if spec.secure() {
        mounts.push(mount("tls", TLS, None, true));
    }
    mounts.push(mount("output", OUTPUT, Some(&storage.output), false));
    mounts.extend(storage.data.as_ref().map(|place| mount("data", DATA, Some(place), true)));
    mounts.push(mount("tmp", "/tmp", None, false));
    if component == Component::Trainers {
        mounts.push(mount("shm", "/dev/shm", None, false));
    }
    mounts
}

/// Suffix of the name of a component's Secret.
#[must_use]
pub fn tls_suffix(component: Component) -> &'static str {
    match component {
        Component::Coordinator => "coordinator-tls",
        Component::Trainers => "trainer-tls",
    }
}

/// Annotations that the volumes' drivers need.
#[must_use]
pub fn annotations(spec: &Spec) -> BTreeMap<String, String> {
    if uses_gcs(spec) { map([("gke-gcsfuse/volumes", "true")]) } else { BTreeMap::new() }
}

/// Whether a volume is a bucket; the pod itself then connects to Cloud Storage.
#[must_use]
pub fn uses_gcs(spec: &Spec) -> bool {
    let storage = &spec.options.storage;
    [Some(&storage.output), storage.data.as_ref()]
        .into_iter()
        .flatten()
        .any(|place| matches!(place, FileStore::Gcs(..)))
}

fn folder(place: &FileStore) -> Option<String> {
    match place {
        FileStore::Claim(_, folder) => folder.clone(),
        _ => None,
    }
}

fn volume(name: &str, place: &FileStore, own_claim: &str) -> Volume {
    let claim = |claim: &str| PersistentVolumeClaimVolumeSource { claim_name: claim.into(), read_only: None };
    let mut volume = Volume { name: name.into(), ..Default::default() };
    match place {
        FileStore::New(_) => volume.persistent_volume_claim = Some(claim(own_claim)),
        FileStore::Claim(name, _) => volume.persistent_volume_claim = Some(claim(name)),
        FileStore::ConfigMap(name) => {
            volume.config_map = Some(ConfigMapVolumeSource { name: name.clone(), ..Default::default() });
        }
        FileStore::Scratch(size) => return empty(name, &size.0, None),
        FileStore::Gcs(bucket, folder) => {
            volume.csi = Some(bucket_volume(bucket, folder.as_deref(), name == "data"))
        }
    }
    volume
}

/// Volume of a bucket. Only in a bucket with a hierarchical namespace are folders real, and renaming one a single operation.
fn bucket_volume(bucket: &str, folder: Option<&str>, read_only: bool) -> CSIVolumeSource {
    let mut options = vec!["implicit-dirs".to_owned(), format!("uid={0},gid={0}", super::confine::USER)];
    options.extend(folder.map(|folder| format!("only-dir={folder}")));
    CSIVolumeSource {
        driver: GCS_DRIVER.into(),
        read_only: read_only.then_some(true),
        volume_attributes: Some(map([("bucketName", bucket), ("mountOptions", &options.join(","))])),
        ..Default::default()
    }
}

fn empty(name: &str, size: &str, medium: Option<&str>) -> Volume {
    let empty =
        EmptyDirVolumeSource { size_limit: Some(Quantity(size.into())), medium: medium.map(Into::into) };
    Volume { name: name.into(), empty_dir: Some(empty), ..Default::default() }
}
