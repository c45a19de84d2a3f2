//! A run on several hosts: an agent on each, reached over ssh or srun.
//!
//! - [`hostfile`], [`slurm_allocation`], [`options`], [`environment`]: the user's choices. [`plan`]: trainers of each host.
//! - [`transport`], [`connection`], [`push`]: connections to hosts. [`child`]: processes of the run.
//! - [`address`]: the coordinator's address.

pub mod address;
pub mod child;
pub mod connection;
pub mod environment;
mod greeting;
pub mod hostfile;
pub mod options;
pub mod plan;
pub mod push;
pub mod slurm_allocation;
pub mod slurm_nodelist;
pub mod transport;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dyad_proto::ownership::Ownership;
use dyad_proto::{Fault, RunConfig, counted};

use crate::agent::machine::Hello;
use crate::agent::protocol::{Answer, Prepare, Question};
use crate::hosts::slurm_allocation::Allocation;
use crate::process::programs::own_folder;
use connection::Agent;
use hostfile::{Host, Nodes};
use options::{CoordinatorOn, HostOptions};
use transport::{Ssh, Transport, agent_line};

/// Hosts of the run from options or Slurm, and the transport to them; `None` for a run on this machine only.
pub fn asked(options: &HostOptions, nodes: Option<Nodes>) -> Result<Option<(Vec<Host>, Transport)>, Fault> {
    let named = match (&options.hosts, &options.hostfile) {
        (Some(list), _) => Some(hostfile::parse_list(list)?),
        (None, Some(file)) => Some(hostfile::read(file)?),
        (None, None) => None,
    };
    let (mut hosts, transport) = match named {
        Some(hosts) => (hosts, Transport::Ssh(Ssh::new(&options.ssh, options.push)?)),
        None => match Allocation::here()? {
            // An allocation of one node is this machine.
            Some(allocation) if allocation.nodes.len() > 1 => {
                (allocation.nodes.iter().map(|node| Host::named(node)).collect(), Transport::Srun)
            }
            _ => return Ok(None),
        },
    };
    if let Some(nodes) = nodes {
        hosts.truncate(nodes.of(hosts.len() as u32)? as usize);
    }
    Ok(Some((hosts, transport)))
}

/// Agents on all hosts of a run.
#[derive(Debug)]
pub struct Hosts {
    agents: Vec<Agent>,
    coordinator_on: CoordinatorOn,
    /// Keeps the folder with ssh's shared sockets alive.
    _transport: Arc<Transport>,
}

impl Hosts {
    /// Connects to all hosts in parallel. The error names every host that fails.
    pub async fn connect(
        hosts: &[Host],
        transport: &Arc<Transport>,
        options: &HostOptions,
    ) -> Result<Self, Fault> {
        let found = Self::try_connect(hosts, transport, options).await;
        let mut agents = Vec::new();
        let mut faults = Vec::new();
        for agent in found {
            match agent {
                Ok(agent) => agents.push(agent),
                Err(fault) => faults.push(fault),
            }
        }
        if let Some(fault) = together(faults, hosts.len()) {
            return Err(fault);
        }
        Ok(Self { agents, coordinator_on: options.coordinator_on, _transport: Arc::clone(transport) })
    }

    /// Connects to all hosts in parallel; returns one result per host.
    pub async fn try_connect(
        hosts: &[Host],
        transport: &Transport,
        options: &HostOptions,
    ) -> Vec<Result<Agent, Fault>> {
        let silence = Duration::from_secs(options.host_timeout);
        let connects = hosts.iter().map(|host| async move {
            let folder = match options.push {
                true => push::to(host, transport).await?,
                false => own_folder()?,
            };
            let line = agent_line(&folder, options.host_timeout);
            Agent::connect(host, transport, &line, silence).await
        });
        futures::future::join_all(connects).await
    }

    /// The agent of a node.
    #[must_use]
    pub fn agent(&self, node: usize) -> &Agent {
        &self.agents[node]
    }

    /// All agents.
    #[must_use]
    pub fn agents(&self) -> &[Agent] {
        &self.agents
    }

    /// Hosts and their resources.
    #[must_use]
    pub fn found(&self) -> Vec<(Host, Hello)> {
        self.agents.iter().map(|agent| (agent.host.clone(), agent.hello.clone())).collect()
    }

    /// The coordinator's node; `None` if it runs on this machine.
    #[must_use]
    pub fn coordinator_node(&self) -> Option<usize> {
        (self.coordinator_on == CoordinatorOn::First).then_some(0)
    }

    /// Address for the coordinator: `asked`, or one that all hosts reach, with port 0.
    pub async fn listen(&self, asked: Option<&str>) -> Result<String, Fault> {
        if let Some(asked) = asked {
            return Ok(asked.to_owned());
        }
        let address = address::of_coordinator(self.coordinator_on, &self.agents).await?;
        Ok(SocketAddr::new(address, 0).to_string())
    }

    /// Checks the run's files on every host, then locks the output folder on the coordinator's machine and writes the configuration there.
    /// Returns the configuration's path, and the lock if the coordinator runs here; otherwise its agent holds the lock.
    pub async fn prepare(
        &self,
        config: &RunConfig,
        fresh: bool,
    ) -> Result<(PathBuf, Option<Ownership>), Fault> {
        let config_json = config.to_json()?;
        let ask = |node: usize, coordinator: bool| {
            let prepare = Prepare { config_json: config_json.clone(), coordinator, fresh };
            self.agents[node].ask(Question::Prepare(prepare))
        };
        let first = self.coordinator_node();
        let others = (0..self.agents.len()).filter(|node| Some(*node) != first);
        let found = futures::future::join_all(others.map(|node| ask(node, false))).await;
        let faults = found.into_iter().filter_map(Result::err).collect();
        if let Some(fault) = together(faults, self.agents.len()) {
            return Err(fault);
        }
        match first {
            Some(node) => match ask(node, true).await? {
                Answer::Written(path) => Ok((path.into(), None)),
                other => Err(self.agents[node].unexpected(&other)),
            },
            None => {
                let owner = crate::agent::run_files::take(config, fresh)?;
                Ok((crate::agent::run_files::write_config(config)?, Some(owner)))
            }
        }
    }

    /// Ends all agents, which kill their processes.
    pub async fn close(&self) {
        futures::future::join_all(self.agents.iter().map(Agent::close)).await;
    }
}

/// Combines faults of several hosts: the first one's code and hint, all messages. `None` if there are no faults.
fn together(faults: Vec<Fault>, of: usize) -> Option<Fault> {
    let count = faults.len();
    let first = faults.first()?.clone();
    if count == 1 {
        return Some(first);
    }
    let messages: Vec<&str> = faults.iter().map(|fault| fault.message.as_str()).collect();
    Some(Fault {
        message: format!("{count} of {} cannot be used: {}", counted(of, "host"), messages.join("; ")),
        ..first
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_host_that_fails_is_named() {
        let fault = |name: &str| Fault::unavailable(format!("host {name}: no")).hint("look");
        assert_eq!(together(Vec::new(), 4), None);
        assert_eq!(together(vec![fault("a")], 4), Some(fault("a")));
        let both = together(vec![fault("a"), fault("b")], 4).unwrap();
        assert_eq!(both.report(), "error: 2 of 4 hosts cannot be used: host a: no; host b: no\n\nhint: look");
    }
}
