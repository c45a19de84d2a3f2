//! Tests that every communicator must pass: one suite, run over Gloo on CPUs, and over NCCL if there is a GPU.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

use dyad_torch::comm::board::LocalBoard;
use dyad_torch::comm::gloo::{Gloo, GlooOptions};
use dyad_torch::comm::measure::measure;
use dyad_torch::comm::nccl::{Nccl, UniqueId};
use dyad_torch::comm::{CommError, Communicator, narrow};
use tch::{Device, Kind, Tensor};

/// A collective that has not ended after this time counts as hung.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `body` once per rank, each on a thread with its own Gloo communicator; fails when a rank hangs.
fn on_gloo(world_size: usize, body: impl Fn(Arc<dyn Communicator>) + Send + Sync + 'static) {
    let host = "127.0.0.1";
    let board: Arc<LocalBoard> = Arc::default();
    let (body, (done, finished)) = (Arc::new(body), channel());
    let ranks: Vec<_> = (0..world_size)
        .map(|rank| {
            let (board, body, done) = (Arc::clone(&board), Arc::clone(&body), done.clone());
            std::thread::spawn(move || {
                let options = GlooOptions { generation: 1, interface_host: host.into(), rank, world_size };
                body(Arc::new(Gloo::connect(board, &options).unwrap()));
                done.send(()).unwrap();
            })
        })
        .collect();
    drop(done);
    for _ in 0..world_size {
        // Disconnected means that a rank has panicked; joining it below reports the panic.
        assert_ne!(finished.recv_timeout(PATIENCE), Err(RecvTimeoutError::Timeout), "a rank hangs");
    }
    ranks.into_iter().for_each(|rank| rank.join().unwrap());
}

/// Values that differ by rank and position and whose sums are exact in every kind.
fn numbers(rank: usize, len: i64, kind: Kind, device: Device) -> Tensor {
    (Tensor::arange(len, (Kind::Int64, device)).remainder(7) + rank as i64).to_kind(kind)
}

/// The sum of [`numbers`] over all ranks.
fn sum(world: usize, len: i64, kind: Kind, device: Device) -> Tensor {
    (0..world).map(|rank| numbers(rank, len, kind, device)).reduce(|a, b| a + b).unwrap()
}

fn equal(a: &Tensor, b: &Tensor) -> bool {
    a.to_kind(Kind::Double).equal(&b.to_kind(Kind::Double))
}

fn all_reduce(comm: &dyn Communicator, tensor: &Tensor) -> Result<(), CommError> {
    comm.all_reduce(tensor).and_then(|work| work.wait())
}

/// Every collective, from one rank's point of view.
fn conforms(comm: &dyn Communicator, device: Device) {
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
        // No value, one value, and odd numbers of values.
        for len in [0, 1, 7, 30_003] {
            whole(comm, len, kind, device);
            slices(comm, len, kind, device);
        }
    }
    // Codes of 8-bit moments are gathered, never summed.
    let codes = numbers(comm.rank(), 1000, Kind::Uint8, device);
    let all = Tensor::zeros([1000 * comm.world_size() as i64], (Kind::Uint8, device));
    comm.all_gather(&all, &codes).unwrap().wait().unwrap();
    assert!(equal(&all.narrow(0, 1000 * comm.rank() as i64, 1000), &codes));
    // More than one network buffer of any back end.
    whole(comm, 1 << 20, Kind::Float, device);
    slices(comm, 1 << 20, Kind::Float, device);
    in_flight_together(comm, device);
    narrowed(comm, device);
    comm.barrier().unwrap();
}

fn whole(comm: &dyn Communicator, len: i64, kind: Kind, device: Device) {
    let (rank, world) = (comm.rank(), comm.world_size());
    let x = numbers(rank, len, kind, device);
    all_reduce(comm, &x).unwrap();
    assert!(equal(&x, &sum(world, len, kind, device)), "all_reduce of {len} {kind:?} on {rank} of {world}");
    for root in 0..world {
        let x = numbers(rank, len, kind, device);
        comm.broadcast(&x, root).unwrap().wait().unwrap();
        assert!(equal(&x, &numbers(root, len, kind, device)), "broadcast of {len} {kind:?} from {root}");
    }
}

fn slices(comm: &dyn Communicator, len: i64, kind: Kind, device: Device) {
    let (rank, world) = (comm.rank(), comm.world_size());
    let all_len = world as i64 * len;
    let all = Tensor::zeros([all_len], (kind, device));
    comm.all_gather(&all, &numbers(rank, len, kind, device)).unwrap().wait().unwrap();
    let parts: Vec<Tensor> = (0..world).map(|rank| numbers(rank, len, kind, device)).collect();
    assert!(equal(&all, &Tensor::cat(&parts, 0)), "all_gather of {len} {kind:?} on {rank} of {world}");

    let input = numbers(rank, all_len, kind, device);
    let output = Tensor::zeros([len], (kind, device));
    comm.reduce_scatter(&output, &input).unwrap().wait().unwrap();
    let expected = sum(world, all_len, kind, device).narrow(0, rank as i64 * len, len);
    assert!(equal(&output, &expected), "reduce_scatter of {len} {kind:?} on {rank} of {world}");

    // In place: each rank's slice of its own buffer, as sharded gradients and weights do it.
    let buffer = numbers(rank, all_len, kind, device);
    let own = buffer.narrow(0, rank as i64 * len, len);
    comm.reduce_scatter(&own, &buffer).unwrap().wait().unwrap();
    assert!(equal(&own, &expected), "reduce_scatter in place of {len} {kind:?} on {rank} of {world}");
    comm.all_gather(&buffer, &own).unwrap().wait().unwrap();
    let whole = sum(world, all_len, kind, device);
    assert!(equal(&buffer, &whole), "all_gather in place of {len} {kind:?} on {rank} of {world}");
}

/// Sums of values that bfloat16 represents exactly, and of values that it rounds: each addend and each sum is rounded by at most 2^-9 of
/// itself.
fn narrowed(comm: &dyn Communicator, device: Device) {
    let (rank, world) = (comm.rank(), comm.world_size());
    for (scale, roundings) in [(1.0, 0), (1.001, 2 * world)] {
        let len = 5_000_000 / world as i64;
        let all_len = world as i64 * len;
        let expected = sum(world, all_len, Kind::Float, device) * scale;
        let within = expected.abs() * (roundings as f64 / 512.0);
        let check = |found: &Tensor, from: i64| {
            let len = found.size()[0];
            assert_eq!(found.kind(), Kind::Float);
            let worst = (found - expected.narrow(0, from, len)).abs() - within.narrow(0, from, len);
            assert!(worst.max().double_value(&[]) <= 0.0, "{scale} on {rank} of {world}");
        };
        let whole = numbers(rank, all_len, Kind::Float, device) * scale;
        let output = Tensor::zeros([len], (Kind::Float, device));
        narrow::reduce_scatter(comm, Kind::BFloat16, &output, &whole).unwrap().wait().unwrap();
        check(&output, rank as i64 * len);
        narrow::all_reduce(comm, Kind::BFloat16, &whole).unwrap().wait().unwrap();
        check(&whole, 0);
    }
}

/// Buckets of different sizes are started one after the other and waited for later, as the engine does.
fn in_flight_together(comm: &dyn Communicator, device: Device) {
    let (rank, world) = (comm.rank(), comm.world_size());
    // The last one is sent in pieces, of which the last is short.
    let lens = [300_000, 5, 70_000, 5_000_003];
    let buckets: Vec<Tensor> = lens.iter().map(|&len| numbers(rank, len, Kind::Float, device)).collect();
    let pending: Vec<_> = buckets.iter().map(|bucket| comm.all_reduce(bucket).unwrap()).collect();
    pending.into_iter().for_each(|work| work.wait().unwrap());
    for (bucket, &len) in buckets.iter().zip(&lens) {
        let expected = sum(world, len, Kind::Float, device);
        assert!(equal(bucket, &expected), "bucket of {len} on rank {rank} of {world}");
    }
}

#[test]
fn gloo_conforms_at_worlds_1_to_4() {
    for world in 1..=4 {
        on_gloo(world, |comm| conforms(comm.as_ref(), Device::Cpu));
    }
}

#[test]
fn a_barrier_waits_for_all_ranks() {
    const ROUNDS: usize = 50;
    let arrived = AtomicUsize::new(0);
    on_gloo(3, move |comm| {
        for round in 1..=ROUNDS {
            arrived.fetch_add(1, Ordering::SeqCst);
            comm.barrier().unwrap();
            let count = arrived.load(Ordering::SeqCst);
            assert!(count >= round * comm.world_size(), "{count} arrivals in round {round}");
            comm.barrier().unwrap();
        }
    });
}

/// Ranks with different buckets would add up different tensors.
#[test]
fn every_rank_measures_the_same_link() {
    for world in 1..=4 {
        let answers = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&answers);
        on_gloo(world, move |comm| {
            let answer = measure(comm.as_ref(), Device::Cpu).unwrap();
            all.lock().unwrap().push(answer);
        });
        let answers = answers.lock().unwrap();
        assert_eq!(answers.len(), world);
        assert!(answers.iter().all(|answer| answer == &answers[0]), "{answers:?}");
        assert_eq!(answers[0].latency_seconds > 0.0, world > 1, "{answers:?}");
        assert!(answers[0].bytes_per_second > 0.0, "{answers:?}");
    }
}

/// Rank 0 waits in a collective that rank 1 never joins, until another thread aborts it.
#[test]
fn an_abort_breaks_a_collective_that_waits_for_a_peer() {
    let both_there = Barrier::new(2);
    on_gloo(2, move |comm| {
        both_there.wait();
        if comm.rank() == 1 {
            // Stays until rank 0 has failed, so that the abort ends the collective and not this rank's exit.
            both_there.wait();
            return;
        }
        let x = Tensor::ones([1000], (Kind::Float, Device::Cpu));
        let waiting = comm.all_reduce(&x).unwrap();
        let aborter = Arc::clone(&comm);
        let abort = std::thread::spawn(move || aborter.abort());
        let error = waiting.wait().unwrap_err();
        assert_eq!(error.operation, "all_reduce");
        assert!(!error.reason.is_empty());
        abort.join().unwrap();
        assert!(all_reduce(comm.as_ref(), &x).is_err(), "used again after the abort");
        assert!(comm.barrier().is_err(), "used again after the abort");
        both_there.wait();
    });
}

/// An abort on one rank also fails the ranks that wait for it.
#[test]
fn an_abort_reaches_the_peers() {
    on_gloo(3, |comm| {
        comm.barrier().unwrap();
        if comm.rank() == 1 {
            return comm.abort();
        }
        let x = Tensor::ones([1000], (Kind::Float, Device::Cpu));
        assert!(all_reduce(comm.as_ref(), &x).is_err());
    });
}

/// Any rank may leave; rank 0 also removes the store.
#[test]
fn a_peer_that_leaves_fails_the_others_collective() {
    for (world, leaver) in [(2, 0), (2, 1), (3, 0), (3, 2)] {
        on_gloo(world, move |comm| {
            comm.barrier().unwrap();
            if comm.rank() == leaver {
                return drop(comm);
            }
            let x = Tensor::ones([1000], (Kind::Float, Device::Cpu));
            assert!(all_reduce(comm.as_ref(), &x).is_err(), "{leaver} of {world} left");
        });
    }
}

/// NCCL needs a GPU. Without one, the error must say what is missing.
#[test]
fn nccl_conforms_with_a_gpu_and_reports_what_is_missing_without() {
    match dyad_torch::device::open("cuda:0") {
        Ok(device) => {
            let comm = Nccl::connect(&UniqueId::new().unwrap(), 0, 1, 0).unwrap();
            conforms(&comm, device);
            comm.abort();
            let x = Tensor::ones([1], (Kind::Float, device));
            assert!(comm.all_reduce(&x).is_err(), "used again after the abort");
        }
        Err(no_gpu) => {
            assert!(!no_gpu.hint.is_empty());
            let id = UniqueId::new();
            // The full CUDA set may be installed without a GPU.
            let loaded = std::fs::read_to_string("/proc/self/maps").unwrap().contains("libnccl.so");
            match id {
                Err(error) if error.operation == "loading NCCL" => {
                    assert!(!loaded, "{error}");
                    assert!(
                        error.reason.contains("install it with deploy/install-libtorch.sh --cuda"),
                        "{error}"
                    );
                }
                other => assert!(loaded, "{other:?} without the library"),
            }
        }
    }
    assert!(UniqueId::from_bytes(&[0; 64]).unwrap_err().reason.contains("expected 128"));
}
