//! The checked input of rendering: options and the run's configuration.

use std::path::Path;

use dyad_proto::run_config::DataFiles;
use dyad_proto::{Fault, RunConfig};

use super::cli::{RunOptions, TlsSource};
use super::values::FileStore;
use crate::hosts::environment::is_name;

/// Where the output volume is mounted.
pub const OUTPUT: &str = "/output";
/// Where preference files and models are mounted.
pub const DATA: &str = "/data";
/// Where the image has a small model and pairs for trying out a cluster.
pub const EXAMPLE: &str = "/opt/dyad/example";
/// Where the run configuration is mounted.
pub const CONFIG: &str = "/etc/dyad/run";
/// Where certificates and join token are mounted.
pub const TLS: &str = "/etc/dyad/tls";
/// Port of the coordinator.
pub const GRPC_PORT: i32 = 29400;
/// Port for plain-text probes of the coordinator if [`GRPC_PORT`] uses TLS.
pub const HEALTH_PORT: i32 = 29401;
/// Port of the coordinator's metrics.
pub const METRICS_PORT: i32 = 9464;
/// Maximum length of a run's name: a pod's name appends up to 22 characters and has at most 63.
const LONGEST_NAME: usize = 40;

/// A run that can be rendered.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Options of the command line.
    pub options: RunOptions,
    /// The configuration, with paths inside the pods.
    pub config: RunConfig,
}

impl Spec {
    /// Reads the configuration and checks everything that needs no cluster.
    pub fn new(options: &RunOptions) -> Result<Self, Fault> {
        let config = RunConfig::load(&options.config, &options.overrides)?;
        Self::with_config(options, config)
    }

    /// Like [`Self::new`], with a configuration that was read already.
    pub fn with_config(options: &RunOptions, mut config: RunConfig) -> Result<Self, Fault> {
        check_names(options)?;
        check_places(options)?;
        move_paths(&mut config, options.storage.data.is_some())?;
        Ok(Self { options: options.clone(), config })
    }

    /// Name of the run.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.options.run.name
    }

    /// Name of an object of the run: `<run>-<suffix>`.
    #[must_use]
    pub fn named(&self, suffix: &str) -> String {
        format!("{}-{suffix}", self.name())
    }

    /// Number of trainer processes.
    #[must_use]
    pub fn world_size(&self) -> u32 {
        self.options.nodes * self.options.gpus_per_node.max(1)
    }

    /// Whether a model is fetched from the hub.
    #[must_use]
    pub fn needs_hub(&self) -> bool {
        let remote = |model: &str| !model.is_empty() && !Path::new(model).is_absolute();
        remote(&self.config.model) || self.config.from_checkpoint.as_deref().is_some_and(remote)
    }

    /// Whether the processes use TLS.
    #[must_use]
    pub fn secure(&self) -> bool {
        self.options.tls != TlsSource::Off
    }

    /// URL of the coordinator.
    #[must_use]
    pub fn coordinator_url(&self) -> String {
        let scheme = if self.secure() { "https" } else { "http" };
        format!("{scheme}://{}:{GRPC_PORT}", self.named("coordinator"))
    }
}

/// Whether `text` can name every kind of object: at most 63 lower-case letters, digits and `-`, first a letter, not `-` at the end.
#[must_use]
pub fn is_label(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    text.len() <= 63
        && text.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase())
        && text.bytes().all(inner)
        && !text.ends_with('-')
}

/// Whether `text` can name most kinds of objects: parts like [`is_label`], separated by dots, which may also start with a digit.
fn is_subdomain(text: &str) -> bool {
    let part = |part: &str| is_label(&format!("a{part}")) && !part.starts_with('-') && !part.is_empty();
    text.len() <= 253 && text.split('.').all(part)
}

/// Checks the name of a run and its namespace.
pub fn check_run_name(name: &str, namespace: Option<&str>) -> Result<(), Fault> {
    if !is_label(name) || name.len() > LONGEST_NAME {
        return Err(Fault::input(format!("--name {name} cannot name Kubernetes objects")).hint(format!(
            "use at most {LONGEST_NAME} lower-case letters, digits and '-', beginning with a letter"
        )));
    }
    match namespace {
        Some(namespace) if !is_label(namespace) => {
            Err(Fault::input(format!("--namespace {namespace} is no name of a namespace"))
                .hint("use at most 63 lower-case letters, digits and '-'"))
        }
        _ => Ok(()),
    }
}

fn check_names(options: &RunOptions) -> Result<(), Fault> {
    check_run_name(&options.run.name, options.run.namespace.as_deref())?;
    if options.image.is_empty() || options.image.contains(char::is_whitespace) {
        return Err(Fault::input(format!("--image {:?} is no image", options.image))
            .hint("build one from deploy/Dockerfile, push it, and give its name here"));
    }
    let scheduling = &options.scheduling;
    let named = [
        ("--queue", scheduling.queue.as_deref()),
        ("--queue-priority", scheduling.queue_priority.as_deref()),
        ("--priority-class", scheduling.priority_class.as_deref()),
        ("--image-pull-secret", scheduling.image_pull_secret.as_deref()),
        ("--storage-class", options.storage.storage_class.as_deref()),
        ("--env-from-secret", options.network.env_from_secret.as_deref()),
        ("--metrics-namespace", Some(options.network.metrics_namespace.as_str())),
    ];
    for (flag, name) in named {
        if let Some(name) = name.filter(|name| !is_subdomain(name)) {
            return Err(Fault::input(format!("{flag} {name} is no name of a Kubernetes object"))
                .hint("use lower-case letters, digits, '-' and '.'"));
        }
    }
    check_variables(options)
}

fn check_variables(options: &RunOptions) -> Result<(), Fault> {
    for variable in &options.network.env {
        if !is_name(&variable.key) {
            return Err(Fault::input(format!("--env {}: no name of an environment variable", variable.key))
                .hint("use letters, digits and '_'"));
        }
    }
    Ok(())
}

fn check_places(options: &RunOptions) -> Result<(), Fault> {
    let refuse = |message: &str, hint: &str| Err(Fault::input(message).hint(hint));
    match &options.storage.output {
        FileStore::ConfigMap(_) => {
            refuse("--output cannot be a ConfigMap: nothing can be written there", "use new:SIZE")
        }
        FileStore::Scratch(_) if options.nodes > 1 => refuse(
            "--output scratch:SIZE is lost with the pod, and no two pods share it",
            "use new:SIZE or claim:NAME with more than one node",
        ),
        FileStore::Claim(name, _) if !is_subdomain(name) => {
            refuse("--output claim: no such name is possible", "claim:NAME[/FOLDER]")
        }
        _ => match &options.storage.data {
            Some(FileStore::New(_) | FileStore::Scratch(_)) => {
                refuse("--data must be there already", "use claim:NAME, configmap:NAME or gs://BUCKET")
            }
            Some(FileStore::Claim(name, _) | FileStore::ConfigMap(name)) if !is_subdomain(name) => {
                refuse("--data: no such name is possible", "claim:NAME[/FOLDER] or configmap:NAME")
            }
            _ => Ok(()),
        },
    }
}

/// Makes paths absolute inside the pods and checks them: results below /output, data below /data, models below /data or on the hub.
fn move_paths(config: &mut RunConfig, has_data: bool) -> Result<(), Fault> {
    config.output_dir = inside("output_dir", &config.output_dir, OUTPUT, &[OUTPUT])?;
    let training = config.training_file.iter_mut().map(|place| ("training_file", place));
    let validation = config.validation_file.iter_mut().flat_map(DataFiles::iter_mut);
    for (key, place) in training.chain(validation.map(|place| ("validation_file", place))) {
        if !place.is_remote() {
            place.path = inside(key, &place.path, DATA, &[DATA, OUTPUT, EXAMPLE])?;
        }
    }
    if let Some(path) = &mut config.reference_cache {
        *path = inside("reference_cache", path, OUTPUT, &[OUTPUT, "/tmp"])?;
    }
    for (key, model) in [("model", Some(&config.model)), ("from_checkpoint", config.from_checkpoint.as_ref())]
    {
        // Anything else counts as a hub id, because a relative path looks the same.
        match model.map_or("", String::as_str) {
            path if path.starts_with('/') => drop(inside(key, path, DATA, &[DATA, OUTPUT, EXAMPLE])?),
            path if path.starts_with(['.', '~']) => return Err(outside(key, path, &[DATA, OUTPUT, EXAMPLE])),
            _ => {}
        }
    }
    let pairs = config.training_file.iter().chain(config.validation_file.iter().flat_map(DataFiles::iter));
    let models = [Some(&config.model), config.from_checkpoint.as_ref()];
    let mut named = pairs.map(|place| &place.path).chain(models.into_iter().flatten());
    if let Some(path) = named.find(|path| below(path, DATA) && !has_data) {
        return Err(Fault::input(format!(
            "the configuration names {path}, but nothing is mounted at {DATA}"
        ))
        .hint("say where the files are: --data claim:NAME, configmap:NAME or gs://BUCKET"));
    }
    Ok(())
}

fn inside(key: &str, path: &str, home: &str, allowed: &[&str]) -> Result<String, Fault> {
    let dotted = path.split('/').any(|part| part == ".." || part == "~");
    let absolute = if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("{home}/{}", path.trim_start_matches("./"))
    };
    if dotted || !allowed.iter().any(|root| below(&absolute, root)) {
        let fault = outside(key, path, allowed);
        let hint = format!("{} (relative paths are below {home})", fault.hint);
        return Err(fault.hint(hint));
    }
    Ok(absolute)
}

fn outside(key: &str, path: &str, allowed: &[&str]) -> Fault {
    Fault::input(format!("config key `{key}`: {path} is not inside a volume of the pods"))
        .hint(format!("give a path below {}", allowed.join(" or ")))
}

fn below(path: &str, root: &str) -> bool {
    path.strip_prefix(root).is_some_and(|rest| rest.starts_with('/') || rest.is_empty())
}
