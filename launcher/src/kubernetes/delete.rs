//! `launcher kubernetes delete`: lists the run's objects, asks, and deletes them.

use std::io::{BufRead, IsTerminal};

use dyad_proto::{ErrorCode, Fault};

use super::cli::DeleteOptions;
use super::cluster::Cluster;
use super::{print, status};

/// Deletes the run.
pub async fn act(options: &DeleteOptions) -> Result<(), Fault> {
    let cluster = Cluster::connect(&options.cluster, &options.run).await?;
    let mut objects = cluster.everything().await?;
    if options.keep_checkpoints {
        objects.retain(|(kind, _)| *kind != "PersistentVolumeClaim");
    }
    if objects.is_empty() {
        return Err(status::absent(&cluster));
    }
    let names: Vec<(&str, String)> =
        objects.into_iter().map(|(kind, object)| (kind, object.metadata.name.unwrap_or_default())).collect();
    if !options.yes {
        confirm(&cluster, &names)?;
    }
    for (kind, name) in names {
        cluster.delete(kind, &name).await?;
        print(&format!("deleted  {kind} {name}\n"))?;
    }
    Ok(())
}

fn confirm(cluster: &Cluster, names: &[(&str, String)]) -> Result<(), Fault> {
    let mut text = format!("in namespace {} this deletes:\n", cluster.namespace);
    for (kind, name) in names {
        let what = if *kind == "PersistentVolumeClaim" {
            "  (checkpoints and model; --keep-checkpoints keeps it)"
        } else {
            ""
        };
        text += &format!("  {kind} {name}{what}\n");
    }
    print(&text)?;
    if !std::io::stdin().is_terminal() {
        return Err(Fault::input("standard input is no terminal, so nobody can be asked")
            .hint("add --yes to delete these objects"));
    }
    print("delete them? [y/N] ")?;
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer);
    match (read, answer.trim()) {
        (Ok(_), "y" | "Y" | "yes") => Ok(()),
        _ => Err(Fault::new(ErrorCode::Interrupted, "stopped before anything was deleted")
            .hint("answer y, or add --yes")),
    }
}
