//! Names and labels of the run's objects.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};

use super::spec::Spec;

/// Label with the run's name, on every object of the run.
pub const INSTANCE: &str = "app.kubernetes.io/instance";
/// Label of objects that the launcher created.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// The value of [`MANAGED_BY`].
pub const LAUNCHER: &str = "dyad-launcher";

/// Label of a pod with its component.
pub const COMPONENT: &str = "app.kubernetes.io/component";

/// Value of the label `key`.
#[must_use]
pub fn label<'a>(labels: Option<&'a BTreeMap<String, String>>, key: &str) -> Option<&'a str> {
    labels.and_then(|labels| labels.get(key)).map(String::as_str)
}

/// Kind of process in a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Component {
    /// The coordinator.
    Coordinator,
    /// The trainers of one node.
    Trainers,
}

impl Component {
    /// Its name in object names and labels.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Trainers => "trainers",
        }
    }
}

/// Builds a map of strings for Kubernetes' types.
#[must_use]
pub fn map<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<String, String> {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

/// Labels of every object.
#[must_use]
pub fn labels(spec: &Spec) -> BTreeMap<String, String> {
    map([("app.kubernetes.io/name", "dyad"), (INSTANCE, spec.name()), (MANAGED_BY, LAUNCHER)])
}

/// Labels of a pod.
#[must_use]
pub fn pod_labels(spec: &Spec, component: Component) -> BTreeMap<String, String> {
    let mut labels = labels(spec);
    labels.insert(COMPONENT.into(), component.word().into());
    labels
}

/// Labels that select a component's pods; they never change.
#[must_use]
pub fn pod_selector(spec: &Spec, component: Component) -> BTreeMap<String, String> {
    map([(INSTANCE, spec.name()), (COMPONENT, component.word())])
}

/// [`pod_selector`] as a label selector.
#[must_use]
pub fn selecting(spec: &Spec, component: Component) -> LabelSelector {
    LabelSelector { match_labels: Some(pod_selector(spec, component)), ..Default::default() }
}

/// Metadata of an object of the run.
#[must_use]
pub fn metadata(spec: &Spec, name: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: spec.options.run.namespace.clone(),
        labels: Some(labels(spec)),
        ..Default::default()
    }
}
