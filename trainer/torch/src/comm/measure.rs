//! Measures latency and bandwidth between the ranks, and derives the bucket size from them.

use std::fmt;
use std::time::Instant;

use tch::{Device, Kind, Tensor};

use super::{CommError, Communicator};

/// Largest share of a bucket's transfer time that the latency of the all-reduce may take.
const LATENCY_SHARE: f64 = 0.05;
const MIN_BUCKET: i64 = 1 << 20;
/// A bucket is sent after its last gradient is computed, so a larger one would start too late.
const MAX_BUCKET: i64 = 64 << 20;
/// Bucket size in bytes without a valid measurement.
pub const USUAL_BUCKET: i64 = 8 << 20;

/// All-reduces for each size. The fastest counts, because other load on the machine only adds time.
const ROUNDS: usize = 5;
/// All-reduces of one value: more rounds, because other load may delay one by more than it takes.
const SHORT_ROUNDS: usize = 20;
/// Sizes to measure, in float32 values. The first that takes [`PAST_LATENCY`] times as long as one value counts, else the last.
const SIZES: [i64; 4] = [1 << 18, 1 << 20, 1 << 22, 1 << 24];
const PAST_LATENCY: f64 = 8.0;

/// An all-reduce of `bytes` takes `latency_seconds + bytes / bytes_per_second`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkSpeed {
    /// Seconds of an all-reduce of one value.
    pub latency_seconds: f64,
    /// Bytes of the reduced tensor per second; the bytes on the wire differ.
    pub bytes_per_second: f64,
}

impl LinkSpeed {
    /// Size in bytes of a bucket of float32 values that are sent as `kind`, in pieces of `piece` bytes.
    #[must_use]
    pub fn bucket_bytes(self, piece: Option<i64>, kind: Kind) -> i64 {
        let travelling = bucket_bytes(self.latency_seconds, self.bytes_per_second);
        // Pieces of several small buckets fill the link as well as pieces of a large one, and start earlier.
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

/// Bytes of a bucket: the smallest power of two, from 1 to 64 MiB, for which latency is at most a twentieth of the transfer time.
/// A power of two, so that two measurements of a link mostly agree: the grouping of gradients decides how their sums are rounded.
#[must_use]
pub fn bucket_bytes(latency_seconds: f64, bytes_per_second: f64) -> i64 {
    let bytes = latency_seconds * bytes_per_second / LATENCY_SHARE;
    if !bytes.is_finite() || bytes <= 0.0 {
        return USUAL_BUCKET;
    }
    (bytes.log2().ceil().exp2() as i64).clamp(MIN_BUCKET, MAX_BUCKET)
}

/// Times a few all-reduces. All ranks must call it at the same point; all get rank 0's result.
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

/// Seconds of an all-reduce of `values` float32 values: the fastest of `rounds` on rank 0.
fn seconds(comm: &dyn Communicator, device: Device, values: i64, rounds: usize) -> Result<f64, CommError> {
    let tensor = Tensor::zeros([values], (Kind::Float, device));
    let mut fastest = f64::INFINITY;
    for _ in 0..rounds {
        comm.barrier()?;
        let start = Instant::now();
        comm.all_reduce(&tensor)?.wait()?;
        // Reading a value also waits for the device.
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
    fn bucket_size_follows_from_latency_and_bandwidth() {
        // 0.1 ms at 2 GB/s is 0.2 MB; twenty times that is 4 MB.
        assert_eq!(bucket_bytes(0.1e-3, 2e9), 4 * MIB);
        // 2 ms at 400 MB/s is 0.8 MB; twenty times that is 16 MB.
        assert_eq!(bucket_bytes(2e-3, 400e6), 16 * MIB);
        // NVLink: 20 us at 200 GB/s is 4 MB; twenty times that is over the limit.
        assert_eq!(bucket_bytes(20e-6, 200e9), 64 * MIB);
    }

    #[test]
    fn latency_is_at_most_a_twentieth_of_the_transfer_time_unless_a_limit_is_hit() {
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
    fn buckets_stay_within_limits_and_invalid_speeds_give_the_usual_size() {
        assert_eq!(bucket_bytes(1e-6, 1e8), MIN_BUCKET);
        assert_eq!(bucket_bytes(1.0, 1e10), MAX_BUCKET);
        for (latency, rate) in
            [(0.0, f64::INFINITY), (0.0, 1e9), (1e-3, f64::INFINITY), (1e-3, -1e9), (f64::NAN, 1.0)]
        {
            assert_eq!(bucket_bytes(latency, rate), USUAL_BUCKET, "{latency} s, {rate} B/s");
        }
    }

    #[test]
    fn a_bucket_is_at_most_one_piece() {
        let far = LinkSpeed { latency_seconds: 10e-3, bytes_per_second: 0.3e9 };
        assert_eq!(far.bucket_bytes(None, Kind::Float), 64 * MIB);
        assert_eq!(far.bucket_bytes(Some(4 * MIB), Kind::Float), 4 * MIB);
        // bfloat16 sends twice as many values in the same bytes.
        assert_eq!(far.bucket_bytes(Some(4 * MIB), Kind::BFloat16), 8 * MIB);
        let near = LinkSpeed { latency_seconds: 0.1e-3, bytes_per_second: 0.1e9 };
        assert_eq!(near.bucket_bytes(Some(4 * MIB), Kind::Float), MIB);
    }

    #[test]
    fn link_speed_is_displayed_on_one_line() {
        let speed = LinkSpeed { latency_seconds: 0.12e-3, bytes_per_second: 1.9e9 };
        assert_eq!(speed.to_string(), "0.12 ms, 1.90 GB/s");
    }
}
