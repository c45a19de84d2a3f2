//! What the way between the ranks can do, and how large a bucket it wants.

use std::fmt;
use std::time::Instant;

use tch::{Device, Kind, Tensor};

use super::{CommError, Communicator};

/// A bucket may lose this share of its time on the wire to the all-reduce's latency.
const LATENCY_SHARE: f64 = 0.05;
const MIN_BUCKET: i64 = 1 << 20;
/// Larger ones would begin too late: nothing of a bucket travels before its last gradient is there.
const MAX_BUCKET: i64 = 64 << 20;
/// Where nothing could be measured.
pub const USUAL_BUCKET: i64 = 8 << 20;

/// The fastest of so many counts: what else the machine does only ever adds time.
const ROUNDS: usize = 5;
/// Of next to nothing, which other load delays more than it takes.
const SHORT_ROUNDS: usize = 20;
/// Sizes that are tried, in values of four bytes: the first that takes [`PAST_LATENCY`] times as long as one value, or the last.
const SIZES: [i64; 4] = [1 << 18, 1 << 20, 1 << 22, 1 << 24];
const PAST_LATENCY: f64 = 8.0;

/// An all-reduce of `bytes` takes `latency_seconds + bytes / bytes_per_second`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkSpeed {
    /// Seconds of an all-reduce of next to nothing.
    pub latency_seconds: f64,
    /// Bytes of the tensor, not of what travels for it.
    pub bytes_per_second: f64,
}

impl LinkSpeed {
    /// Bytes that a bucket of float32 values should have which travel as `kind`, pieces of so many bytes at once.
    #[must_use]
    pub fn bucket_bytes(self, piece: Option<i64>, kind: Kind) -> i64 {
        let travelling = bucket_bytes(self.latency_seconds, self.bytes_per_second);
        // Pieces of several buckets fill the wire as those of a large one do, and begin earlier.
        let travelling = piece.map_or(travelling, |piece| travelling.min(piece));
        travelling * (Kind::Float.elt_size_in_bytes() / kind.elt_size_in_bytes()) as i64
    }
}

impl fmt::Display for LinkSpeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (milliseconds, gigabytes) = (self.latency_seconds * 1e3, self.bytes_per_second * 1e-9);
        write!(f, "{milliseconds:.2} ms, {gigabytes:.2} GB/s")
    }
}

/// The smallest power of two that keeps latency below a twentieth of the time on the wire, from 1 to 64 MiB. A power of two,
/// so that two measurements of one link mostly agree: how gradients are grouped decides how their sums are rounded.
#[must_use]
pub fn bucket_bytes(latency_seconds: f64, bytes_per_second: f64) -> i64 {
    let bytes = latency_seconds * bytes_per_second / LATENCY_SHARE;
    if !bytes.is_finite() || bytes <= 0.0 {
        return USUAL_BUCKET;
    }
    (bytes.log2().ceil().exp2() as i64).clamp(MIN_BUCKET, MAX_BUCKET)
}

/// Times a few all-reduces. Every rank must call it at the same point, and every rank gets rank 0's answer.
pub fn measure(comm: &dyn Communicator, device: Device) -> Result<LinkSpeed, CommError> {
    if comm.world_size() == 1 {
        return Ok(LinkSpeed { latency_seconds: 0.0, bytes_per_second: f64::INFINITY });
    }
    let latency_seconds = seconds(comm, device, 1, SHORT_ROUNDS)?;
    let mut bytes_per_second = f64::INFINITY;
    for values in SIZES {
        let taken = seconds(comm, device, values, ROUNDS)?;
        bytes_per_second = 4.0 * values as f64 / (taken - latency_seconds);
        if taken >= PAST_LATENCY * latency_seconds {
            break;
        }
    }
    Ok(LinkSpeed { latency_seconds, bytes_per_second })
}

/// Seconds of an all-reduce of so many float32 values, on rank 0.
fn seconds(comm: &dyn Communicator, device: Device, values: i64, rounds: usize) -> Result<f64, CommError> {
    let tensor = Tensor::zeros([values], (Kind::Float, device));
    let mut fastest = f64::INFINITY;
    for _ in 0..rounds {
        comm.barrier()?;
        let start = Instant::now();
        comm.all_reduce(&tensor)?.wait()?;
        // Reading a value waits for the device, too.
        let _ = tensor.double_value(&[0]);
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    let answer = Tensor::from_slice(&[fastest]).to_device(device);
    comm.broadcast(&answer, 0)?.wait()?;
    Ok(answer.double_value(&[0]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: i64 = 1 << 20;

    #[test]
    fn a_bucket_is_as_large_as_latency_asks_for() {
        // 0.1 ms at 2 GB/s is 0.2 MB on the wire; twenty times that, and the next power of two.
        assert_eq!(bucket_bytes(0.1e-3, 2e9), 4 * MIB);
        // 2 ms at 400 MB/s: 0.8 MB, sixteen of them.
        assert_eq!(bucket_bytes(2e-3, 400e6), 16 * MIB);
        // NVLink: 20 us at 200 GB/s.
        assert_eq!(bucket_bytes(20e-6, 200e9), 64 * MIB);
    }

    #[test]
    fn latency_is_a_twentieth_of_the_time_on_the_wire_unless_a_limit_is_hit() {
        for latency in [1e-5, 1e-4, 1e-3, 1e-2] {
            for rate in [1e8, 1e9, 1e10] {
                let bytes = bucket_bytes(latency, rate);
                let share = latency / (bytes as f64 / rate);
                assert!(bytes == MAX_BUCKET || share <= LATENCY_SHARE, "{latency} s, {rate} B/s: {share}");
                assert!(bytes == MIN_BUCKET || share > LATENCY_SHARE / 2.0 || bytes == MAX_BUCKET);
            }
        }
    }

    #[test]
    fn limits_hold_and_nonsense_gets_the_usual_size() {
        assert_eq!(bucket_bytes(1e-6, 1e8), MIN_BUCKET);
        assert_eq!(bucket_bytes(1.0, 1e10), MAX_BUCKET);
        for (latency, rate) in
            [(0.0, f64::INFINITY), (0.0, 1e9), (1e-3, f64::INFINITY), (1e-3, -1e9), (f64::NAN, 1.0)]
        {
            assert_eq!(bucket_bytes(latency, rate), USUAL_BUCKET, "{latency} s, {rate} B/s");
        }
    }

    #[test]
    fn a_bucket_is_no_larger_than_what_travels_at_once() {
        let far = LinkSpeed { latency_seconds: 10e-3, bytes_per_second: 0.3e9 };
        assert_eq!(far.bucket_bytes(None, Kind::Float), 64 * MIB);
        assert_eq!(far.bucket_bytes(Some(4 * MIB), Kind::Float), 4 * MIB);
        // Twice as many values in the same bytes.
        assert_eq!(far.bucket_bytes(Some(4 * MIB), Kind::BFloat16), 8 * MIB);
        let near = LinkSpeed { latency_seconds: 0.1e-3, bytes_per_second: 0.1e9 };
        assert_eq!(near.bucket_bytes(Some(4 * MIB), Kind::Float), MIB);
    }

    #[test]
    fn it_reads_as_a_line() {
        let speed = LinkSpeed { latency_seconds: 0.12e-3, bytes_per_second: 1.9e9 };
        assert_eq!(speed.to_string(), "0.12 ms, 1.90 GB/s");
    }
}
