//! How the ranks of a generation find each other: rank 0 makes the meeting place, the coordinator tells the others.

use std::net::{IpAddr, UdpSocket};
use std::sync::Arc;

use dyad_proto::wire::{Assignment, CommunicatorReady};
use dyad_proto::{ErrorCode, Fault};
use tch::Device;

use crate::comm::gloo::{Gloo, GlooOptions, Store};
use crate::comm::nccl::{Nccl, UniqueId};
use crate::comm::{CommError, Communicator};

/// This rank's side of the rendezvous.
#[derive(Debug)]
pub struct Rendezvous {
    device: Device,
    place: Assignment,
    interface: String,
    /// Rank 0's store, served from the moment it is offered.
    store: Option<Store>,
}

impl Rendezvous {
    /// For one generation; `coordinator` decides which of this host's addresses peers are told.
    pub fn new(device: Device, place: Assignment, coordinator: &str) -> Result<Self, Fault> {
        Ok(Self { device, place, interface: local_address(coordinator)?.to_string(), store: None })
    }

    /// Which meeting of the ranks it is.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.place.generation
    }

    /// What rank 0 offers the others: the address of a store for Gloo, a unique id for NCCL.
    pub fn offer(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        if self.place.rank > 0 {
            return Ok(None);
        }
        if self.device.is_cuda() {
            return Ok(Some(UniqueId::new().map_err(broken)?.to_bytes()));
        }
        let store = Store::serve(&self.interface).map_err(broken)?;
        let address = format!("{}:{}", self.interface, store.port());
        self.store = Some(store);
        Ok(Some(address.into_bytes()))
    }

    /// Connects to all other ranks.
    pub fn connect(mut self, ready: &CommunicatorReady) -> Result<Arc<dyn Communicator>, Fault> {
        let (rank, world_size) = (self.place.rank as usize, self.place.world_size as usize);
        if let Device::Cuda(device) = self.device {
            let id = UniqueId::from_bytes(&ready.payload).map_err(broken)?;
            return Ok(Arc::new(Nccl::connect(&id, rank, world_size, device).map_err(broken)?));
        }
        let store = match self.store.take() {
            Some(store) => store,
            None => join(&ready.payload)?,
        };
        let options =
            GlooOptions { generation: ready.generation, interface_host: self.interface, rank, world_size };
        Ok(Arc::new(Gloo::connect(store, &options).map_err(broken)?))
    }
}

fn join(payload: &[u8]) -> Result<Store, Fault> {
    let address = String::from_utf8_lossy(payload);
    let parsed = address.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    let (host, port) =
        parsed.ok_or_else(|| Fault::failed(format!("bad rendezvous address \"{address}\"")))?;
    Store::join(host, port).map_err(broken)
}

/// A rendezvous most likely breaks because a peer died on its way there.
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
