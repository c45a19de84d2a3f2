//! How the ranks of a generation connect: rank 0 makes an offer, and the coordinator passes it to the others.

use std::net::{IpAddr, UdpSocket};
use std::sync::Arc;

use dyad_proto::wire::{Assignment, CommunicatorReady};
use dyad_proto::{ErrorCode, Fault};
use tch::Device;

use crate::observe::progress::{self, Counted};
use dyad_torch::comm::board::Board;
use dyad_torch::comm::gloo::{Gloo, GlooOptions};
use dyad_torch::comm::nccl::{Nccl, UniqueId};
use dyad_torch::comm::{CommError, Communicator};

/// This rank's side of the rendezvous.
#[derive(Debug)]
pub struct Rendezvous {
    device: Device,
    place: Assignment,
    interface: IpAddr,
    board: Arc<dyn Board>,
}

impl Rendezvous {
    /// For one generation. The route to `coordinator` decides which of this host's addresses the peers get.
    pub fn new(
        device: Device,
        place: Assignment,
        coordinator: &str,
        board: Arc<dyn Board>,
    ) -> Result<Self, Fault> {
        let interface = local_address(coordinator)?;
        if device.is_cuda() {
            keep_nccl_to(interface);
        }
        Ok(Self { device, place, interface, board })
    }

    /// Generation of the run that connects.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.place.generation
    }

    /// What rank 0 offers the others: a unique id for NCCL, empty for Gloo, as a start signal. `None` on other ranks.
    pub fn offer(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        match (self.place.rank, self.device.is_cuda()) {
            (0, true) => Ok(Some(UniqueId::new().map_err(broken)?.to_bytes())),
            (0, false) => Ok(Some(Vec::new())),
            _ => Ok(None),
        }
    }

    /// Connects to all other ranks.
    pub fn connect(self, ready: &CommunicatorReady) -> Result<Arc<dyn Communicator>, Fault> {
        let communicator = progress::meeting(|| self.meet(ready))?;
        Ok(Arc::new(Counted(communicator)))
    }

    fn meet(self, ready: &CommunicatorReady) -> Result<Arc<dyn Communicator>, Fault> {
        let (rank, world_size) = (self.place.rank as usize, self.place.world_size as usize);
        if let Device::Cuda(device) = self.device {
            let id = UniqueId::from_bytes(&ready.payload).map_err(broken)?;
            return Ok(Arc::new(Nccl::connect(&id, rank, world_size, device).map_err(broken)?));
        }
        let interface_host = self.interface.to_string();
        let options = GlooOptions { generation: ready.generation, interface_host, rank, world_size };
        Ok(Arc::new(Gloo::connect(self.board, &options).map_err(broken)?))
    }
}

/// Sets the interface that leads to the coordinator for NCCL, unless the user has set one. By itself NCCL chooses any interface, and
/// takes the loopback device only if there is no other.
#[expect(unsafe_code, reason = "NCCL takes the interface from an environment variable")]
fn keep_nccl_to(address: IpAddr) {
    const NAME: &str = "NCCL_SOCKET_IFNAME";
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let Some(interface) = interfaces.into_iter().find(|interface| interface.ip() == address) else { return };
    if std::env::var_os(NAME).is_none() {
        // SAFETY: other code of this process reads the environment through the standard library; NCCL does not, but is not loaded yet.
        unsafe { std::env::set_var(NAME, format!("={}", interface.name)) };
    }
}

/// A rendezvous fails most likely because a peer died before it connected.
fn broken(error: CommError) -> Fault {
    Fault::new(ErrorCode::Echo, error.to_string()).hint("check that all hosts reach each other on every port")
}

/// The address that this host uses towards the coordinator. Connecting a UDP socket sends nothing.
fn local_address(coordinator: &str) -> Result<IpAddr, Fault> {
    let target = coordinator.rsplit("//").next().unwrap_or(coordinator).trim_end_matches('/');
    let bind = if target.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
    let address = UdpSocket::bind(bind).and_then(|socket| {
        socket.connect(target)?;
        socket.local_addr()
    });
    address
        .map(|address| address.ip())
        .map_err(|error| Fault::unavailable(format!("no route to {coordinator}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_on_one_machine_meet_on_loopback() {
        assert!(local_address("http://127.0.0.1:29400").unwrap().is_loopback());
    }
}
