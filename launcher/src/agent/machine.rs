//! Resources of a host, as its agent sees them.

use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::placement::numa::Topology;
use crate::placement::trainers::Machine;

/// The agent's first message: resources of its host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// Version of the launcher package; must be the same on both ends.
    pub version: String,
    /// Host name.
    pub host: String,
    /// CPU cores that the agent may use.
    pub cores: usize,
    /// Visible GPUs.
    pub gpus: u32,
    /// Why the number of visible GPUs is unknown; `None` if it is known.
    pub gpu_trouble: Option<String>,
    /// Memory of each GPU in bytes; empty if nvidia-smi does not tell.
    pub gpu_memory: Vec<u64>,
    /// Free memory of the host in bytes.
    pub free_memory: u64,
    /// NUMA nodes and their cores.
    pub topology: Topology,
    /// Addresses at which others may reach this host, likeliest first, loopback last.
    pub addresses: Vec<Interface>,
    /// Address of the launching machine, from `SSH_CONNECTION`; `None` without ssh.
    pub launcher_address: Option<IpAddr>,
    /// Seconds since 1970 by this host's clock.
    pub clock: f64,
}

/// An address of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Such as `eth0`.
    pub name: String,
    /// Its address.
    pub address: IpAddr,
}

/// One GPU, as nvidia-smi lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// nvidia-smi's index.
    pub index: String,
    /// Its name.
    pub name: String,
    /// Bytes of memory.
    pub total: u64,
    /// Bytes in use.
    pub used: u64,
}

impl Hello {
    /// The greeting for this host.
    #[must_use]
    pub fn of_this_machine() -> Self {
        let Machine { cores, gpus, gpu_trouble } = Machine::here();
        let ssh = std::env::var("SSH_CONNECTION").unwrap_or_default();
        let (client, server) = ssh_ends(&ssh);
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            host: host_name(),
            cores,
            gpus,
            gpu_trouble,
            gpu_memory: if gpus > 0 {
                nvidia_smi().iter().map(|gpu| gpu.total).collect()
            } else {
                Vec::new()
            },
            free_memory: dyad_proto::host_memory::free().unwrap_or(0),
            topology: Topology::here(),
            addresses: likeliest_first(interfaces(), server),
            launcher_address: client,
            clock: clock(),
        }
    }
}

/// Name of this host.
#[must_use]
pub fn host_name() -> String {
    dyad_proto::files::of_kernel("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// Seconds since 1970.
#[must_use]
pub fn clock() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// All addresses of this host.
#[must_use]
pub fn interfaces() -> Vec<Interface> {
    let all = if_addrs::get_if_addrs().unwrap_or_default();
    all.into_iter().map(|found| Interface { address: found.ip(), name: found.name }).collect()
}

/// All GPUs of this host; empty if nvidia-smi is missing.
#[must_use]
pub fn nvidia_smi() -> Vec<Gpu> {
    let query = ["--query-gpu=index,name,memory.total,memory.used", "--format=csv,noheader,nounits"];
    let output = std::process::Command::new("nvidia-smi").args(query).output();
    output.map(|output| parse_gpus(&String::from_utf8_lossy(&output.stdout))).unwrap_or_default()
}

/// Parses lines such as `0, NVIDIA H100, 81559, 4`: index, name, total and used MiB.
fn parse_gpus(text: &str) -> Vec<Gpu> {
    let gpu = |line: &str| {
        let words: Vec<&str> = line.split(',').map(str::trim).collect();
        let [index, name, total, used] = words[..] else { return None };
        let bytes = |text: &str| text.parse::<u64>().ok().map(|mib| mib << 20);
        Some(Gpu { index: index.into(), name: name.into(), total: bytes(total)?, used: bytes(used)? })
    };
    text.lines().filter_map(gpu).collect()
}

/// Client and server address from `SSH_CONNECTION`, which holds client address and port, then server address and port.
fn ssh_ends(connection: &str) -> (Option<IpAddr>, Option<IpAddr>) {
    let words: Vec<&str> = connection.split_whitespace().collect();
    let parse = |index: usize| words.get(index).and_then(|word| word.parse().ok());
    (parse(0), parse(2))
}

/// Sorts addresses. First the one that ssh connected to: at least one other host reaches it. Container bridges come late: no other host
/// reaches them.
fn likeliest_first(mut interfaces: Vec<Interface>, ssh: Option<IpAddr>) -> Vec<Interface> {
    interfaces.retain(|interface| !is_link_local(interface.address));
    interfaces.sort_by_key(|Interface { name, address }| {
        let inner = ["docker", "virbr", "veth", "br-", "cni"].iter().any(|prefix| name.starts_with(prefix));
        (address.is_loopback(), Some(*address) != ssh, inner, address.is_ipv6())
    });
    interfaces
}

/// Link-local addresses only work together with an interface name.
fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.segments()[0] & 0xffc0 == 0xfe80,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_of_the_ssh_connection_comes_first_and_loopback_last() {
        let interface =
            |name: &str, address: &str| Interface { name: name.into(), address: address.parse().unwrap() };
        let found = vec![
            interface("lo", "127.0.0.1"),
            interface("eth0", "fe80::1"),
            interface("docker0", "172.17.0.1"),
            interface("eth0", "2001:db8::7"),
            interface("eth0", "192.168.1.7"),
            interface("ib0", "10.0.0.7"),
        ];
        let (client, server) = ssh_ends("10.0.0.1 50000 10.0.0.7 22");
        assert_eq!(client, Some("10.0.0.1".parse().unwrap()));
        let order: Vec<String> =
            likeliest_first(found, server).iter().map(|found| found.address.to_string()).collect();
        assert_eq!(order, ["10.0.0.7", "192.168.1.7", "2001:db8::7", "172.17.0.1", "127.0.0.1"]);
        assert_eq!(ssh_ends(""), (None, None));
    }

    #[test]
    fn nvidia_smi_output_is_parsed() {
        let gpus = parse_gpus(
            "0, NVIDIA H100 80GB HBM3, 81559, 4\n1, NVIDIA H100 80GB HBM3, 81559, 20000\nNo devices\n",
        );
        assert_eq!(gpus.len(), 2);
        assert_eq!((gpus[1].index.as_str(), gpus[1].used >> 20), ("1", 20000));
    }
}
