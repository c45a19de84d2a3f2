//! Trainers of each host, as a pure function of options and hosts' resources.

use dyad_proto::Fault;

use crate::agent::machine::Hello;
use crate::hosts::hostfile::Host;
use crate::placement::gpus::Gpus;
use crate::placement::trainers::{Node, Trainer, asked_for, trusted};

/// Trainers of all hosts, in the order of the hosts: one per GPU, or `slots` CPU trainers per host (default one). `numa` pins them to
/// NUMA nodes.
pub fn trainers(gpus: Gpus, numa: bool, hosts: &[(Host, Hello)]) -> Result<Vec<Trainer>, Fault> {
    let mut all: Vec<Trainer> = Vec::new();
    for (node, (host, hello)) in hosts.iter().enumerate() {
        let first = all.len();
        all.extend(of_host(gpus, node, first, host, hello)?);
        if numa {
            hello.topology.bind(&mut all[first..]);
        }
    }
    // A run cannot mix GPU and CPU trainers.
    let on_gpus = |trainer: &&Trainer| trainer.device != "cpu";
    if let (Some(with), Some(without)) =
        (all.iter().find(on_gpus), all.iter().find(|trainer| trainer.device == "cpu"))
    {
        let name = |trainer: &Trainer| hosts[trainer.node].0.name.clone();
        let message = format!("host {} has GPUs, host {} has none", name(with), name(without));
        return Err(
            Fault::input(message).hint("leave hosts out, or train on all CPUs with --gpus-per-node 0")
        );
    }
    Ok(all)
}

fn of_host(gpus: Gpus, node: usize, first: usize, host: &Host, hello: &Hello) -> Result<Vec<Trainer>, Fault> {
    trusted(hello.gpu_trouble.as_deref(), gpus)
        .map_err(|fault| Fault { message: format!("host {host}: {}", fault.message), ..fault })?;
    let wanted = match gpus {
        Gpus::Auto if hello.gpus == 0 => 0,
        Gpus::Auto => host.slots.unwrap_or(hello.gpus),
        Gpus::Count(count) => count,
    };
    if wanted > hello.gpus {
        return Err(Fault::input(format!(
            "host {host}: {}, it has {}",
            asked_for(wanted.into()),
            hello.gpus
        ))
        .hint("lower slots or --gpus-per-node; 0 trains on the CPU"));
    }
    let on_cpu = host.slots.unwrap_or(1);
    let threads = hello.cores / if wanted > 0 { wanted } else { on_cpu } as usize;
    Ok(Node { name: &host.name, index: node, threads }.trainers(first, 0..wanted, on_cpu))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, slots: Option<u32>, gpus: u32) -> (Host, Hello) {
        (Host { slots, ..Host::named(name) }, Hello { cores: 8, gpus, ..Hello::default() })
    }

    fn shown(gpus: Gpus, hosts: &[(Host, Hello)]) -> Vec<String> {
        let plan = trainers(gpus, false, hosts).unwrap();
        plan.iter().map(|t| format!("{} {} {} {}", t.launch_index, t.name, t.device, t.threads)).collect()
    }

    #[test]
    fn hosts_may_differ_in_size() {
        let hosts = [host("a", None, 2), host("b", Some(1), 4)];
        assert_eq!(
            shown(Gpus::Auto, &hosts),
            ["0 a-gpu0 cuda:0 4", "1 a-gpu1 cuda:1 4", "2 b-gpu0 cuda:0 8"]
        );
        assert_eq!(shown(Gpus::Count(1), &hosts), ["0 a-gpu0 cuda:0 8", "1 b-gpu0 cuda:0 8"]);
        assert_eq!(shown(Gpus::Count(0), &hosts), ["0 a-cpu cpu 8", "1 b-cpu cpu 8"]);
    }

    #[test]
    fn slots_are_trainers_on_a_host_without_gpus() {
        let hosts = [host("a", Some(2), 0), host("b", None, 0)];
        assert_eq!(shown(Gpus::Auto, &hosts), ["0 a-cpu0 cpu 4", "1 a-cpu1 cpu 4", "2 b-cpu cpu 8"]);
    }

    #[test]
    fn errors_name_the_host() {
        let fault = trainers(Gpus::Auto, false, &[host("a", Some(4), 2)]).unwrap_err();
        assert_eq!(fault.message, "host a: 4 GPUs are asked for, it has 2");
        let (host_a, hello) = host("a", None, 0);
        let unsure = Hello { gpu_trouble: Some("CUDA_VISIBLE_DEVICES=9: no".into()), ..hello };
        let fault = trainers(Gpus::Auto, false, &[(host_a, unsure)]).unwrap_err();
        assert_eq!(fault.message, "host a: CUDA_VISIBLE_DEVICES=9: no");
        let fault = trainers(Gpus::Auto, false, &[host("a", None, 1), host("b", None, 0)]).unwrap_err();
        assert_eq!(fault.message, "host a has GPUs, host b has none");
    }
}
