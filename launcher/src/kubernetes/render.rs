//! `launcher kubernetes render`: turns options and configuration into a list of objects.

use std::path::Path;
use std::time::Duration;

use dyad_proto::{Fault, safe_file};

use super::cli::{ManifestPart, RenderOptions, TlsSource};
use super::object::{Object, stream, yaml};
use super::spec::Spec;
use super::{network, support, workload};
use crate::security::RunSecrets;

/// Validity of a run's certificates; a longer run must be rendered again and resumed.
pub const VALID_FOR: Duration = Duration::from_secs(90 * 24 * 3600);

/// All objects except the Secrets, in order of creation.
pub fn objects(spec: &Spec) -> Result<Vec<Object>, Fault> {
    let mut objects = vec![support::account(spec)?, support::configuration(spec)?];
    objects.extend(support::claim(spec)?);
    objects.extend(network::services(spec)?);
    objects.extend(network::policies(spec)?);
    objects.extend(workload::render(spec)?);
    Ok(objects)
}

/// New Secrets with `--tls generate`; otherwise empty.
pub fn secrets(spec: &Spec) -> Result<Vec<Object>, Fault> {
    match spec.options.tls {
        TlsSource::Generate => support::secrets(spec, &RunSecrets::new(VALID_FOR)?),
        TlsSource::Existing | TlsSource::Off => Ok(Vec::new()),
    }
}

/// Prints or writes the objects.
pub fn act(options: &RenderOptions) -> Result<(), Fault> {
    let spec = Spec::new(&options.run)?;
    let mut all = match options.part {
        ManifestPart::All => objects(&spec)?,
        ManifestPart::Secrets => Vec::new(),
    };
    let wanted =
        options.output_dir.is_none() || options.with_secrets || options.part == ManifestPart::Secrets;
    let makes_secrets = spec.options.tls == TlsSource::Generate;
    if wanted {
        all.splice(0..0, secrets(&spec)?);
    }
    if all.is_empty() {
        return Err(
            Fault::input("there are no Secrets to render").hint("--part secrets needs --tls generate")
        );
    }
    if spec.options.scheduling.rdma.is_some() {
        super::warn(
            "--rdma adds the capability IPC_LOCK: the namespace cannot enforce the pod security standard `restricted`",
        );
    }
    match &options.output_dir {
        None => super::print(&stream(&all)?),
        Some(dir) => {
            write(dir, spec.name(), &all)?;
            if makes_secrets && !wanted {
                super::warn(
                    "the Secrets with the run's private keys are not written: `launcher kubernetes render --part secrets` with the same \
                     options prints them for kubectl, --with-secrets writes them into files that only you can read",
                );
            }
            Ok(())
        }
    }
}

fn write(dir: &Path, run: &str, objects: &[Object]) -> Result<(), Fault> {
    let unwritable = |error: std::io::Error| {
        Fault::input(format!("cannot write {}: {error}", dir.display()))
            .hint("give a folder that you may write to")
    };
    std::fs::create_dir_all(dir).map_err(unwritable)?;
    let private: Vec<String> = objects
        .iter()
        .filter(|object| object.kind() == "Secret")
        .map(|object| object.file_name(run))
        .collect();
    for (name, text) in files(run, objects)? {
        let write = if private.contains(&name) { safe_file::write_private } else { safe_file::write };
        write(&dir.join(&name), text.as_bytes()).map_err(unwritable)?;
    }
    Ok(())
}

/// One file per object, and a `kustomization.yaml` that names them.
pub fn files(run: &str, objects: &[Object]) -> Result<Vec<(String, String)>, Fault> {
    let mut files = Vec::new();
    for object in objects {
        files.push((object.file_name(run), yaml(&object.0)?));
    }
    let names: Vec<&String> = files.iter().map(|(name, _)| name).collect();
    let kustomization = serde_json::json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": names,
    });
    files.push(("kustomization.yaml".into(), yaml(&kustomization)?));
    Ok(files)
}
