//! The coordinator's address: the first address of its machine that every other machine of the run reaches.

use std::net::{IpAddr, SocketAddr};

use dyad_proto::Fault;

use crate::agent::machine::{Hello, interfaces};
use crate::agent::ports::{open, reach};
use crate::agent::protocol::{Answer, Question};
use crate::hosts::connection::Agent;
use crate::hosts::options::CoordinatorOn;

/// A machine's name, and for each candidate address the connection error, or `None` if it was reached.
pub type Verdicts = (String, Vec<Option<String>>);

/// Finds an address of the coordinator's machine that all others reach.
pub async fn of_coordinator(on: CoordinatorOn, agents: &[Agent]) -> Result<IpAddr, Fault> {
    match on {
        CoordinatorOn::First => on_first(agents).await,
        CoordinatorOn::Here => here(agents).await,
    }
}

/// An address on the first host.
async fn on_first(agents: &[Agent]) -> Result<IpAddr, Fault> {
    let Some((first, others)) = agents.split_first() else { return Err(Fault::input("no hosts")) };
    let port = match first.ask(Question::Listen).await? {
        Answer::Listening(port) => port,
        other => return Err(first.unexpected(&other)),
    };
    let candidates = candidates(&first.hello, agents.len() > 1);
    let addresses = with_port(&candidates, port);
    let mut verdicts = ask_all(others, &addresses).await?;
    // The launcher connects too, to follow the progress.
    verdicts.push(("this machine".into(), reach(&addresses).await));
    first.ask(Question::StopListening).await?;
    choose(&format!("host {}", first.host), &candidates, &verdicts)
}

/// An address of this machine.
async fn here(agents: &[Agent]) -> Result<IpAddr, Fault> {
    let (_listener, port) = open().await?;
    let own = interfaces();
    let mine = |address: &IpAddr| own.iter().any(|interface| interface.address == *address);
    let seen = agents.iter().filter_map(|agent| agent.hello.launcher_address).filter(mine);
    let others = own.iter().map(|interface| interface.address).filter(|address| !address.is_loopback());
    let mut candidates: Vec<IpAddr> = Vec::new();
    for address in seen.chain(others) {
        if !candidates.contains(&address) {
            candidates.push(address);
        }
    }
    let verdicts = ask_all(agents, &with_port(&candidates, port)).await?;
    choose("this machine", &candidates, &verdicts)
}

async fn ask_all(agents: &[Agent], addresses: &[String]) -> Result<Vec<Verdicts>, Fault> {
    let asks = agents.iter().map(|agent| async move {
        match agent.ask(Question::Reach { addresses: addresses.to_vec() }).await? {
            Answer::Reached(verdicts) => Ok((format!("host {}", agent.host), verdicts)),
            other => Err(agent.unexpected(&other)),
        }
    });
    futures::future::try_join_all(asks).await
}

/// Addresses of a host; loopback only if it is the only host.
fn candidates(hello: &Hello, several: bool) -> Vec<IpAddr> {
    let usable = hello.addresses.iter().filter(|interface| !several || !interface.address.is_loopback());
    usable.map(|interface| interface.address).collect()
}

fn with_port(candidates: &[IpAddr], port: u16) -> Vec<String> {
    candidates.iter().map(|address| SocketAddr::new(*address, port).to_string()).collect()
}

/// Returns the first address that all machines reach. Otherwise the error names a machine that reaches none, if there is one.
pub fn choose(owner: &str, candidates: &[IpAddr], verdicts: &[Verdicts]) -> Result<IpAddr, Fault> {
    let all_reach = |index: &usize| verdicts.iter().all(|(_, found)| matches!(found.get(*index), Some(None)));
    if let Some(index) = (0..candidates.len()).find(all_reach) {
        return Ok(candidates[index]);
    }
    let hint = "open the ports between the hosts, or name a host that all reach as the first; --listen sets an address by hand";
    let blind = verdicts.iter().find(|(_, found)| found.iter().all(Option::is_some));
    let message = match (candidates.first(), blind) {
        (None, _) => format!("{owner} has no address that others could reach"),
        (Some(first), Some((who, found))) => {
            let why = found.first().cloned().flatten().unwrap_or_default();
            format!("{who} does not reach {owner} at {first}: {why}")
        }
        (Some(_), None) => format!("no address of {owner} is reached by all"),
    };
    Err(Fault::unavailable(message).hint(hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_address_that_all_machines_reach_is_chosen() {
        let candidates: Vec<IpAddr> =
            ["192.168.0.1", "10.0.0.1"].iter().map(|address| address.parse().unwrap()).collect();
        let refused = || Some("no route to host".to_owned());
        let choose = |verdicts: &[Verdicts]| choose("host a", &candidates, verdicts);
        let (b, c) = ("host b".to_owned(), "host c".to_owned());
        assert_eq!(choose(&[(b.clone(), vec![None, None])]).unwrap(), candidates[0]);
        assert_eq!(
            choose(&[(b.clone(), vec![refused(), None]), (c.clone(), vec![None, None])]).unwrap(),
            candidates[1]
        );
        let fault =
            choose(&[(b.clone(), vec![None, None]), (c.clone(), vec![refused(), refused()])]).unwrap_err();
        assert_eq!(fault.message, "host c does not reach host a at 192.168.0.1: no route to host");
        let fault = choose(&[(b, vec![None, refused()]), (c, vec![refused(), None])]).unwrap_err();
        assert_eq!(fault.message, "no address of host a is reached by all");
        assert!(super::choose("host a", &[], &[]).unwrap_err().message.contains("has no address"));
    }
}
