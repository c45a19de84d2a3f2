//! The API server: connecting, and the few requests that a run needs.

use dyad_proto::Fault;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PropagationPolicy,
    ValidationDirective,
};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use super::cli::{ClusterOptions, RunName};
use super::meta::{INSTANCE, LAUNCHER, MANAGED_BY};
use super::object::Object;
use super::spec::check_run_name;

/// Field manager of the launcher's server-side apply.
pub const FIELD_MANAGER: &str = "dyad";

/// Every kind that a run may have: group, version, kind, plural. In order of deletion.
const KINDS: [(&str, &str, &str, &str); 8] = [
    ("jobset.x-k8s.io", "v1alpha2", "JobSet", "jobsets"),
    ("batch", "v1", "Job", "jobs"),
    ("", "v1", "Service", "services"),
    ("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies"),
    ("", "v1", "ConfigMap", "configmaps"),
    ("", "v1", "Secret", "secrets"),
    ("", "v1", "ServiceAccount", "serviceaccounts"),
    ("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims"),
];

/// Kinds that run pods.
pub const WORKLOADS: [&str; 2] = ["JobSet", "Job"];

/// One run on one cluster.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    /// Namespace of the run.
    pub namespace: String,
    /// Name of the run.
    pub name: String,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cluster({}/{})", self.namespace, self.name)
    }
}

/// How an object is applied.
#[derive(Clone, Copy, Debug)]
pub struct Applying {
    /// The server only checks.
    pub dry_run: bool,
    /// Take over fields that another manager owns.
    pub force: bool,
}

impl Cluster {
    /// Reads the kubeconfig. Sends no request yet.
    pub async fn connect(options: &ClusterOptions, run: &RunName) -> Result<Self, Fault> {
        check_run_name(&run.name, run.namespace.as_deref())?;
        let config = config(options).await?;
        let namespace = run.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(|error| {
            Fault::input(format!("kubeconfig: {}", chain(&error))).hint("check its certificates")
        })?;
        Ok(Self { client, namespace, name: run.name.clone() })
    }

    fn api(&self, kind: &str) -> Result<Api<DynamicObject>, Fault> {
        let known = KINDS.iter().find(|(_, _, known, _)| *known == kind);
        let Some((group, version, kind, plural)) = known else {
            return Err(Fault::failed(format!("no request is known for the kind {kind}")));
        };
        let api_version = if group.is_empty() { (*version).to_owned() } else { format!("{group}/{version}") };
        let resource = ApiResource {
            group: (*group).to_owned(),
            version: (*version).to_owned(),
            api_version,
            kind: (*kind).to_owned(),
            plural: (*plural).to_owned(),
        };
        Ok(Api::namespaced_with(self.client.clone(), &self.namespace, &resource))
    }

    /// Creates or updates an object by server-side apply; fields that the server does not know are errors.
    pub async fn apply(&self, object: &Object, applying: Applying) -> Result<(), Fault> {
        let parameters = PatchParams {
            dry_run: applying.dry_run,
            force: applying.force,
            field_manager: Some(FIELD_MANAGER.into()),
            field_validation: Some(ValidationDirective::Strict),
        };
        let api = self.api(object.kind())?;
        let applied = api.patch(object.name(), &parameters, &Patch::Apply(&object.0)).await;
        applied.map(drop).map_err(|error| refused(&error, "apply", object.kind(), object.name()))
    }

    /// An object; `None` if it does not exist.
    pub async fn get(&self, kind: &str, name: &str) -> Result<Option<DynamicObject>, Fault> {
        self.api(kind)?.get_opt(name).await.map_err(|error| refused(&error, "get", kind, name))
    }

    /// The run's objects of a kind; empty if the cluster does not know the kind.
    pub async fn list(&self, kind: &str) -> Result<Vec<DynamicObject>, Fault> {
        let ours = format!("{INSTANCE}={},{MANAGED_BY}={LAUNCHER}", self.name);
        match self.api(kind)?.list(&ListParams::default().labels(&ours)).await {
            Ok(list) => Ok(list.items),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(Vec::new()),
            Err(error) => Err(refused(&error, "list", kind, &self.name)),
        }
    }

    /// The run's own objects of every kind, in order of deletion. Objects that a controller created are left out: Kubernetes deletes them
    /// with their owners. So are objects that are being deleted already.
    pub async fn everything(&self) -> Result<Vec<(&'static str, DynamicObject)>, Fault> {
        let mut found = Vec::new();
        for (_, _, kind, _) in KINDS {
            let objects = self.list(kind).await?;
            let own = objects.into_iter().map(|object| (kind, object)).filter(|(_, object)| {
                object.metadata.owner_references.is_none() && object.metadata.deletion_timestamp.is_none()
            });
            found.extend(own);
        }
        Ok(found)
    }

    /// Deletes an object; succeeds if it does not exist.
    pub async fn delete(&self, kind: &str, name: &str) -> Result<(), Fault> {
        let parameters =
            DeleteParams { propagation_policy: Some(PropagationPolicy::Background), ..Default::default() };
        match self.api(kind)?.delete(name, &parameters).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(refused(&error, "delete", kind, name)),
        }
    }

    /// API of the namespace's pods.
    #[must_use]
    pub fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// The run's pods, oldest first.
    pub async fn run_pods(&self) -> Result<Vec<Pod>, Fault> {
        let ours = format!("{INSTANCE}={}", self.name);
        let list = self.pods().list(&ListParams::default().labels(&ours)).await;
        let mut pods = list.map_err(|error| refused(&error, "list", "Pod", &self.name))?.items;
        pods.sort_by_key(|pod| (pod.metadata.creation_timestamp.clone(), pod.metadata.name.clone()));
        Ok(pods)
    }

    /// The run's JobSet or Jobs.
    pub async fn workloads(&self) -> Result<Vec<DynamicObject>, Fault> {
        let mut found = Vec::new();
        for kind in WORKLOADS {
            let own = self
                .list(kind)
                .await?
                .into_iter()
                .filter(|object| object.metadata.owner_references.is_none());
            found.extend(own);
        }
        Ok(found)
    }
}

async fn config(options: &ClusterOptions) -> Result<Config, Fault> {
    let chosen = KubeConfigOptions { context: options.context.clone(), ..Default::default() };
    let config = match &options.kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path).map_err(|error| unreadable(&error))?;
            Config::from_custom_kubeconfig(file, &chosen).await.map_err(|error| unreadable(&error))?
        }
        None if options.context.is_some() => {
            Config::from_kubeconfig(&chosen).await.map_err(|error| unreadable(&error))?
        }
        None => Config::infer().await.map_err(|error| unreadable(&error))?,
    };
    Ok(config)
}

fn unreadable(error: &(dyn std::error::Error + 'static)) -> Fault {
    Fault::input(format!("cannot read the kubeconfig: {}", chain(error)))
        .hint("give --kubeconfig FILE and --context NAME, or set KUBECONFIG; `kubectl config get-contexts` lists contexts")
}

/// An error with its causes, on one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text += &format!(": {next}");
        }
        cause = error.source();
    }
    text.replace('\n', " ")
}

/// Converts the server's answer to an error with a hint for the user.
fn refused(error: &kube::Error, verb: &str, kind: &str, name: &str) -> Fault {
    let kube::Error::Api(status) = error else {
        return Fault::unavailable(format!("cannot {verb} {kind} {name}: {}", chain(error)))
            .hint("check --context and that the API server can be reached: `kubectl version`");
    };
    let message = format!("cannot {verb} {kind} {name}: {}", status.message.replace('\n', " "));
    let hint = match status.code {
        401 => "log in to the cluster again",
        403 => "ask the cluster's admin for the role in deploy/kubernetes/rbac (docs/kubernetes.md)",
        404 if kind == "JobSet" => "the cluster has no JobSet controller: install it, or use --workload job",
        404 => "check --namespace and --name",
        409 => "another tool owns these fields; --force-conflicts takes them over",
        422 => {
            "a run's objects cannot be changed once they are there: choose another --name, or delete the run first"
        }
        _ => "see the API server's words above",
    };
    match status.code {
        400 | 401 | 403 | 404 | 409 | 422 => Fault::input(message).hint(hint),
        _ => Fault::failed(message).hint(hint),
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn refused_requests_have_hints() {
        let answer = |code: u16, kind: &str| {
            let status = Status { code, message: "no".into(), ..Default::default() };
            refused(&kube::Error::Api(Box::new(status)), "apply", kind, "dyad")
        };
        assert!(answer(404, "JobSet").hint.contains("--workload job"));
        assert!(answer(403, "Secret").hint.contains("rbac"));
        assert!(answer(422, "Job").hint.contains("another --name"));
        assert_eq!(answer(422, "Job").code.exit_status(), 2);
        assert_eq!(answer(500, "Job").code.exit_status(), 1);
    }
}
