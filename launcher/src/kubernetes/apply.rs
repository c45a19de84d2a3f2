//! `launcher kubernetes apply`: server-side apply of all of the run's objects.

use dyad_proto::Fault;

use super::cli::{ApplyOptions, DryRun, WaitOptions};
use super::cluster::{Applying, Cluster};
use super::meta::{LAUNCHER, MANAGED_BY, label};
use super::object::Object;
use super::spec::Spec;
use super::{print, render, wait};

/// Applies the run.
pub async fn act(options: &ApplyOptions) -> Result<(), Fault> {
    let spec = Spec::new(&options.run)?;
    let mut objects = render::objects(&spec)?;
    let cluster = Cluster::connect(&options.cluster, &options.run.run).await?;
    let applying = Applying { dry_run: options.dry_run == DryRun::Server, force: options.force_conflicts };
    objects.splice(0..0, secrets(&spec, &cluster, applying).await?);
    let how = if applying.dry_run { "checked (nothing is kept)" } else { "applied" };
    for object in &objects {
        cluster.apply(object, applying).await?;
        print(&format!("{how}  {} {}\n", object.kind(), object.name()))?;
    }
    if applying.dry_run {
        return Ok(());
    }
    if options.wait {
        let wait = WaitOptions {
            run: options.run.run.clone(),
            cluster: options.cluster.clone(),
            timeout: None,
            verbose: false,
        };
        return wait::act(&wait).await;
    }
    let place = format!("--name {} --namespace {}", cluster.name, cluster.namespace);
    print(&format!("\nfollow it with: launcher kubernetes wait {place}\n"))
}

/// Secrets to apply. A run that exists keeps its Secrets, because its processes have read them; otherwise old ones are replaced.
async fn secrets(spec: &Spec, cluster: &Cluster, applying: Applying) -> Result<Vec<Object>, Fault> {
    let secrets = render::secrets(spec)?;
    let goes_on = !secrets.is_empty() && !cluster.workloads().await?.is_empty();
    let mut new = Vec::new();
    for secret in secrets {
        let Some(old) = cluster.get("Secret", secret.name()).await? else {
            new.push(secret);
            continue;
        };
        if label(old.metadata.labels.as_ref(), MANAGED_BY) != Some(LAUNCHER) {
            return Err(Fault::input(format!(
                "Secret {} is there already and is not the launcher's",
                secret.name()
            ))
            .hint("--tls existing uses it; or choose another --name"));
        }
        if !goes_on && !applying.dry_run {
            cluster.delete("Secret", secret.name()).await?;
            new.push(secret);
        }
    }
    Ok(new)
}
