//! Objects that the pods need: account, configuration, claim, certificates.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{
    ConfigMap, PersistentVolumeClaim, PersistentVolumeClaimSpec, Secret, ServiceAccount,
    VolumeResourceRequirements,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use dyad_proto::Fault;

use super::meta::{Component, metadata};
use super::object::{Object, object};
use super::spec::Spec;
use super::values::FileStore;
use super::volumes::tls_suffix;
use crate::security::{Material, RunSecrets};

/// A service account without rights: the pods send no requests to the API server and get no token.
pub fn account(spec: &Spec) -> Result<Object, Fault> {
    object(&ServiceAccount {
        metadata: metadata(spec, spec.name()),
        automount_service_account_token: Some(false),
        ..Default::default()
    })
}

/// ConfigMap with the checked configuration as JSON, for the coordinator.
pub fn configuration(spec: &Spec) -> Result<Object, Fault> {
    let text = serde_json::to_string_pretty(&spec.config)
        .map_err(|error| Fault::failed(format!("cannot serialise the run config: {error}")))?;
    object(&ConfigMap {
        metadata: metadata(spec, &spec.named("config")),
        data: Some(BTreeMap::from([("run.json".to_owned(), text + "\n")])),
        ..Default::default()
    })
}

/// The run's own claim; `None` unless `--output new:SIZE`.
pub fn claim(spec: &Spec) -> Result<Option<Object>, Fault> {
    let FileStore::New(size) = &spec.options.storage.output else { return Ok(None) };
    // Rank 0 writes checkpoints and the coordinator writes metrics, possibly on different nodes.
    let mode = if spec.options.nodes > 1 { "ReadWriteMany" } else { "ReadWriteOnce" };
    let requests = BTreeMap::from([("storage".to_owned(), Quantity(size.0.clone()))]);
    object(&PersistentVolumeClaim {
        metadata: metadata(spec, &spec.named("output")),
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec![mode.into()]),
            storage_class_name: spec.options.storage.storage_class.clone(),
            resources: Some(VolumeResourceRequirements { requests: Some(requests), limits: None }),
            ..Default::default()
        }),
        status: None,
    })
    .map(Some)
}

/// One Secret per role. They are immutable, because running processes would not notice a change.
pub fn secrets(spec: &Spec, secrets: &RunSecrets) -> Result<Vec<Object>, Fault> {
    let trainers = Component::Trainers;
    [(Component::Coordinator, secrets.coordinator()?), (trainers, secrets.trainer(trainers.word())?)]
        .into_iter()
        .map(|(component, material)| object(&secret(spec, tls_suffix(component), material)))
        .collect()
}

fn secret(spec: &Spec, suffix: &str, material: Material) -> Secret {
    let files = [
        ("ca.pem", material.ca_pem),
        ("cert.pem", material.cert_pem),
        ("key.pem", material.key_pem),
        ("join-token", material.join_token),
    ];
    Secret {
        metadata: metadata(spec, &spec.named(suffix)),
        type_: Some("Opaque".into()),
        immutable: Some(true),
        data: Some(
            files.into_iter().map(|(key, text)| (key.to_owned(), ByteString(text.into_bytes()))).collect(),
        ),
        ..Default::default()
    }
}
