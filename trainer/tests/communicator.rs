//! What every communicator must do, whatever its back end: one suite, run over Gloo on CPUs and over NCCL where a GPU is.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::sync::{Arc, Barrier};

use tch::{Device, Kind, Tensor};
use trainer::comm::Communicator;
use trainer::comm::gloo::{Gloo, GlooOptions, Store};
use trainer::comm::nccl::{Nccl, UniqueId};

/// Runs `body` once per rank, each on a thread with its own Gloo communicator.
fn on_gloo(world_size: usize, body: impl Fn(Arc<dyn Communicator>) + Sync) {
    let host = "127.0.0.1";
    let first = Store::serve(host).unwrap();
    let port = first.port();
    let mut stores = vec![first];
    stores.extend((1..world_size).map(|_| Store::join(host, port).unwrap()));
    std::thread::scope(|scope| {
        for (rank, store) in stores.into_iter().enumerate() {
            let body = &body;
            scope.spawn(move || {
                let options = GlooOptions { generation: 1, interface_host: host.into(), rank, world_size };
                body(Arc::new(Gloo::connect(store, &options).unwrap()));
            });
        }
    });
}

/// Values that differ by rank and position and whose sums are exact in every kind.
fn numbers(rank: usize, len: i64, kind: Kind, device: Device) -> Tensor {
    Tensor::arange(len, (Kind::Int64, device)).remainder(7).to_kind(kind) + rank as f64
}

fn equal(a: &Tensor, b: &Tensor) -> bool {
    a.to_kind(Kind::Double).equal(&b.to_kind(Kind::Double))
}

/// Every collective, from one rank's point of view.
fn conforms(comm: &dyn Communicator, device: Device) {
    let (rank, world) = (comm.rank(), comm.world_size());
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
        for len in [1, 7, 100_003] {
            let x = numbers(rank, len, kind, device);
            comm.all_reduce(&x).unwrap().wait().unwrap();
            let sum = (0..world).map(|rank| numbers(rank, len, kind, device)).reduce(|a, b| a + b).unwrap();
            assert!(equal(&x, &sum), "all_reduce of {len} {kind:?} on rank {rank} of {world}");

            for root in 0..world {
                let x = numbers(rank, len, kind, device);
                comm.broadcast(&x, root).unwrap().wait().unwrap();
                assert!(equal(&x, &numbers(root, len, kind, device)), "broadcast from {root} on {rank}");
            }
        }
    }
    slices(comm, device);
    in_flight_together(comm, device);
    comm.barrier().unwrap();
}

fn slices(comm: &dyn Communicator, device: Device) {
    let (rank, world) = (comm.rank(), comm.world_size());
    let (len, kind) = (1000, Kind::Float);
    let all = Tensor::zeros([world as i64 * len], (kind, device));
    comm.all_gather(&all, &numbers(rank, len, kind, device)).unwrap().wait().unwrap();
    let parts: Vec<Tensor> = (0..world).map(|rank| numbers(rank, len, kind, device)).collect();
    assert!(equal(&all, &Tensor::cat(&parts, 0)), "all_gather on rank {rank} of {world}");

    let input = numbers(rank, world as i64 * len, kind, device);
    let output = Tensor::zeros([len], (kind, device));
    comm.reduce_scatter(&output, &input).unwrap().wait().unwrap();
    let sum =
        (0..world).map(|rank| numbers(rank, world as i64 * len, kind, device)).reduce(|a, b| a + b).unwrap();
    assert!(
        equal(&output, &sum.narrow(0, rank as i64 * len, len)),
        "reduce_scatter on rank {rank} of {world}"
    );
}

/// Buckets of different sizes are started one after the other and waited for later, as the engine does.
fn in_flight_together(comm: &dyn Communicator, device: Device) {
    let (rank, world) = (comm.rank(), comm.world_size());
    let lens = [300_000, 5, 70_000];
    let buckets: Vec<Tensor> = lens.iter().map(|&len| numbers(rank, len, Kind::Float, device)).collect();
    let pending: Vec<_> = buckets.iter().map(|bucket| comm.all_reduce(bucket).unwrap()).collect();
    pending.into_iter().for_each(|work| work.wait().unwrap());
    for (bucket, &len) in buckets.iter().zip(&lens) {
        let sum =
            (0..world).map(|rank| numbers(rank, len, Kind::Float, device)).reduce(|a, b| a + b).unwrap();
        assert!(equal(bucket, &sum), "bucket of {len} on rank {rank} of {world}");
    }
}

#[test]
fn gloo_conforms_at_worlds_1_to_4() {
    for world in 1..=4 {
        on_gloo(world, |comm| conforms(comm.as_ref(), Device::Cpu));
    }
}

#[test]
fn an_abort_breaks_a_collective_that_waits_for_a_peer() {
    let both_there = Barrier::new(2);
    on_gloo(2, |comm| {
        both_there.wait();
        if comm.rank() == 1 {
            // Never joins the collective; stays until rank 0 has given up.
            both_there.wait();
            return;
        }
        let x = Tensor::ones([1000], (Kind::Float, Device::Cpu));
        let waiting = comm.all_reduce(&x).unwrap();
        let aborter = Arc::clone(&comm);
        let abort = std::thread::spawn(move || aborter.abort());
        let error = waiting.wait().unwrap_err();
        assert_eq!(error.operation, "all_reduce");
        abort.join().unwrap();
        assert!(comm.all_reduce(&x).and_then(|work| work.wait()).is_err(), "used again after the abort");
        both_there.wait();
    });
}

#[test]
fn a_peer_that_leaves_fails_the_others_collective() {
    on_gloo(2, |comm| {
        comm.barrier().unwrap();
        if comm.rank() == 1 {
            return drop(comm);
        }
        let x = Tensor::ones([1000], (Kind::Float, Device::Cpu));
        assert!(comm.all_reduce(&x).and_then(|work| work.wait()).is_err());
    });
}

/// The NCCL half needs a GPU. Without one, what is asked for fails clearly instead.
#[test]
fn nccl_conforms_where_a_gpu_is_and_says_what_is_missing_elsewhere() {
    match trainer::device::open("cuda:0") {
        Ok(device) => {
            let comm = Nccl::connect(&UniqueId::new().unwrap(), 0, 1, 0).unwrap();
            conforms(&comm, device);
            comm.abort();
            let x = Tensor::ones([1], (Kind::Float, device));
            assert!(comm.all_reduce(&x).is_err(), "used again after the abort");
        }
        Err(no_gpu) => {
            assert!(!no_gpu.hint.is_empty());
            if let Err(error) = UniqueId::new() {
                assert_eq!(error.operation, "loading NCCL");
                assert!(error.reason.contains("deploy/install-libtorch.sh --cuda"), "{error}");
            }
        }
    }
    assert!(UniqueId::from_bytes(&[0; 64]).unwrap_err().reason.contains("expected 128"));
}
