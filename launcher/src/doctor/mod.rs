//! `launcher doctor`: checks whether machines are fit for a run.
//!
//! An agent collects [`MachineFacts`] on each machine; [`checks`] turns them into a table of [`row`]s.

pub mod checks;
pub mod row;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use dyad_proto::{Fault, RunConfig, agrees, counted};

use crate::agent::facts::Examine;
use crate::agent::facts::MachineFacts;
use crate::agent::protocol::{Answer, Question};
use crate::hosts::connection::Agent;
use crate::hosts::hostfile::{Host, Nodes};
use crate::hosts::options::HostOptions;
use crate::hosts::transport::Transport;
use crate::hosts::{Hosts, address, asked};
use crate::show::console;
use crate::train::options;
use checks::Looked;
use row::{CheckState, DoctorRow};

/// Options of `launcher doctor`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  launcher doctor
  launcher doctor --hostfile hosts --config run.toml

Exit status:
  0  all is well, apart from warnings
  2  a check failed on a machine that is reached
  3  a host or port is not reached")]
pub struct DoctorOptions {
    /// Configuration of the planned run: its model, pairs and output folder are checked as well.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Override one key of the configuration; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Check only the first N hosts.
    #[arg(long, value_name = "N|MIN:MAX")]
    pub nodes: Option<Nodes>,
    /// Hosts to check; without any, this machine.
    #[command(flatten)]
    pub hosts: HostOptions,
}

/// Runs all checks and prints the table; fails if a check fails.
pub async fn run(options: &DoctorOptions) -> Result<(), Fault> {
    let rows = match asked(&options.hosts, options.nodes)? {
        None => {
            let examine = Examine { config_json: config_json(options, false)? };
            let facts = MachineFacts::here(&examine);
            checks::rows(&[Looked { name: facts.hello.host.clone(), facts, skew: (0.0, 0.0) }])
        }
        Some((hosts, transport)) => look(options, &hosts, &transport).await?,
    };
    let (text, code) = row::table(&rows);
    console::print(&text)?;
    code.map_or(Ok(()), |code| Err(Fault::new(code, "not all is well; see the rows marked FAIL")))
}

/// The planned run's configuration as JSON; `None` without `--config`.
fn config_json(options: &DoctorOptions, elsewhere: bool) -> Result<Option<String>, Fault> {
    let Some(config) = &options.config else { return Ok(None) };
    let config = RunConfig::load(config, &options.overrides)?;
    options::absolute(config, elsewhere)?.to_json().map(Some)
}

async fn look(
    options: &DoctorOptions,
    hosts: &[Host],
    transport: &Transport,
) -> Result<Vec<DoctorRow>, Fault> {
    let examine = Examine { config_json: config_json(options, true)? };
    let mut agents = Vec::new();
    let mut missing = Vec::new();
    for found in Hosts::try_connect(hosts, transport, &options.hosts).await {
        match found {
            Ok(agent) => agents.push(agent),
            Err(fault) => missing.push(fault.message),
        }
    }
    let mut rows = vec![reached(transport.name(), hosts.len(), missing)];
    let facts = futures::future::join_all(agents.iter().map(|agent| examined(agent, &examine))).await;
    let looked = facts.into_iter().collect::<Result<Vec<Looked>, Fault>>()?;
    if !looked.is_empty() {
        rows.push(coordinator(&agents, options).await);
        rows.push(each_other(&agents).await);
        rows.extend(checks::rows(&looked));
    }
    futures::future::join_all(agents.iter().map(Agent::close)).await;
    Ok(rows)
}

fn reached(check: &'static str, all: usize, missing: Vec<String>) -> DoctorRow {
    if missing.is_empty() {
        return DoctorRow::ok(
            check,
            format!("{} {}", counted(all, "host"), agrees(all, "answers", "answer")),
        );
    }
    DoctorRow {
        check,
        state: CheckState::Unreachable,
        detail: missing.join("; "),
        hint:
            "log in there once by hand; ssh must ask nothing (BatchMode): it needs a key and a known host key"
                .into(),
    }
}

async fn examined(agent: &Agent, examine: &Examine) -> Result<Looked, Fault> {
    match agent.ask(Question::Examine(examine.clone())).await? {
        Answer::Examined(facts) => {
            Ok(Looked { name: agent.host.name.clone(), facts: *facts, skew: agent.skew })
        }
        other => Err(agent.unexpected(&other)),
    }
}

/// Row with the address that the coordinator would listen on.
async fn coordinator(agents: &[Agent], options: &DoctorOptions) -> DoctorRow {
    match address::of_coordinator(options.hosts.coordinator_on, agents).await {
        Ok(address) => {
            let name = agents[0].hello.addresses.iter().find(|interface| interface.address == address);
            let name = name.map_or_else(String::new, |interface| format!(" ({})", interface.name));
            DoctorRow::ok(
                "coordinator",
                format!(
                    "would listen on {address}{name}, which all reach; Gloo and NCCL take the interface towards it"
                ),
            )
        }
        Err(fault) => DoctorRow {
            check: "coordinator",
            state: CheckState::Unreachable,
            detail: fault.message,
            hint: "open the ports between the hosts, or put a host first that all reach".into(),
        },
    }
}

/// Row that tells whether every host can connect to every other host's first address.
async fn each_other(agents: &[Agent]) -> DoctorRow {
    let targets = futures::future::join_all(agents.iter().map(target)).await;
    let tries = agents.iter().enumerate().map(|(from, agent)| {
        let others = agents.iter().zip(&targets).enumerate().filter(move |(to, _)| *to != from);
        let others = others.filter_map(|(_, (other, target))| Some((other, target.clone().ok()?)));
        blocked(agent, others.collect())
    });
    let blocked = futures::future::join_all(tries).await.into_iter().flatten();
    let blocked: Vec<String> =
        targets.iter().filter_map(|target| target.clone().err()).chain(blocked).collect();
    if blocked.is_empty() {
        return DoctorRow::ok("network", "every host reaches every other".into());
    }
    DoctorRow {
        check: "network",
        state: CheckState::Unreachable,
        detail: blocked.join("; "),
        hint: "trainers connect to each other on any port: open the ports between the hosts".into(),
    }
}

/// Opens a port on the host; returns `address:port`.
async fn target(agent: &Agent) -> Result<String, String> {
    let Some(interface) = agent.hello.addresses.first() else {
        return Err(format!("{} has no address that others could connect to", agent.host));
    };
    match agent.ask(Question::Listen).await {
        Ok(Answer::Listening(port)) => Ok(SocketAddr::new(interface.address, port).to_string()),
        Ok(other) => Err(agent.unexpected(&other).message),
        Err(fault) => Err(format!("{} opened no port: {fault}", agent.host)),
    }
}

/// The other hosts that `agent` cannot connect to, with the reason.
async fn blocked(agent: &Agent, others: Vec<(&Agent, String)>) -> Vec<String> {
    let addresses = others.iter().map(|(_, target)| target.clone()).collect();
    let found = match agent.ask(Question::Reach { addresses }).await {
        Ok(Answer::Reached(found)) => found,
        Ok(other) => return vec![agent.unexpected(&other).message],
        Err(fault) => return vec![format!("{} tried no connection: {fault}", agent.host)],
    };
    let blocked = others.iter().zip(found).filter_map(|((other, target), why)| Some((other, target, why?)));
    blocked
        .map(|(other, target, why)| format!("{} to {} at {target}: {why}", agent.host, other.host))
        .collect()
}
