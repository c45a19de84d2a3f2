//! Layout of parameters in flat buffers, and the part of a buffer that each rank owns. Pure functions.

use std::ops::Range;

use dyad_proto::RunConfig;

/// Every parameter, and every rank's part of a buffer, begins at a multiple of this many values. So no block of the 8-bit optimizer
/// states straddles two of them.
pub const ALIGN: i64 = 256;

/// What is sharded over the ranks: the stages of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharding {
    stage: u8,
    rank: i64,
    world: i64,
}

impl Sharding {
    /// Every rank has everything.
    pub const NONE: Self = Self { stage: 0, rank: 0, world: 1 };

    /// The sharding that a run asks for; none with a single rank.
    #[must_use]
    pub fn new(config: &RunConfig, rank: usize, world: usize) -> Self {
        let stage = if world > 1 { config.zero_stage } else { 0 };
        Self { stage, rank: rank as i64, world: world as i64 }
    }

    /// True if optimizer states are sharded (from stage 1).
    #[must_use]
    pub fn of_states(self) -> bool {
        self.stage >= 1
    }

    /// True if gradients are sharded (from stage 2).
    #[must_use]
    pub fn of_gradients(self) -> bool {
        self.stage >= 2
    }

    /// True if weights are sharded (stage 3).
    #[must_use]
    pub fn of_weights(self) -> bool {
        self.stage >= 3
    }

    /// The same, but with whole weights on every rank.
    #[must_use]
    pub fn whole_weights(self) -> Self {
        Self { stage: self.stage.min(2), ..self }
    }

    /// Range of a buffer that this rank owns: all of it, or one of equal parts.
    #[must_use]
    pub fn own(self, len: i64) -> Range<i64> {
        if !self.of_states() {
            return 0..len;
        }
        let part = len / self.world;
        self.rank * part..(self.rank + 1) * part
    }
}

/// Place of one parameter in its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// First value.
    pub offset: i64,
    /// Number of values.
    pub len: i64,
}

impl Slot {
    /// Overlap of the parameter with a part of the buffer, counted from the parameter's start and from the part's start.
    #[must_use]
    pub fn overlap(self, part: &Range<i64>) -> Option<(Range<i64>, Range<i64>)> {
        let (start, end) = (self.offset.max(part.start), (self.offset + self.len).min(part.end));
        let from = |origin: i64| start - origin..end - origin;
        (start < end).then(|| (from(self.offset), from(part.start)))
    }
}

/// Layout of a buffer: parameters with weight decay, then those without, then padding to equal parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Place of each parameter, in the order in which they were given.
    pub slots: Vec<Slot>,
    /// Number of values, with padding.
    pub len: i64,
    /// Weight decay applies to the values before this index.
    pub decaying: i64,
}

impl Layout {
    /// Lays out parameters, given how many values each has and whether it gets weight decay.
    #[must_use]
    pub fn new(parameters: &[(i64, bool)], sharding: Sharding) -> Self {
        let mut slots = vec![Slot { offset: 0, len: 0 }; parameters.len()];
        let (mut end, mut decaying) = (0, 0);
        for turn in [true, false] {
            for (slot, &(len, decays)) in slots.iter_mut().zip(parameters) {
                if decays == turn {
                    *slot = Slot { offset: end, len };
                    end += up(len, ALIGN);
                }
            }
            if turn {
                decaying = end;
            }
        }
        Self { slots, len: up(end, ALIGN * sharding.world), decaying }
    }
}

fn up(value: i64, multiple: i64) -> i64 {
    (value + multiple - 1) / multiple * multiple
}

/// Splits units of these sizes into buckets of at least `limit` bytes, from the last unit down: the order in which the gradients of a
/// backward pass complete. A unit of at least half of `limit` begins a new bucket, so that units that completed before need not wait for
/// it. This matters most for the embedding, which completes last.
#[must_use]
pub fn bucket_ranges(bytes: &[i64], limit: i64) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let (mut end, mut filled) = (bytes.len(), 0);
    for unit in (0..bytes.len()).rev() {
        if 2 * bytes[unit] >= limit && filled > 0 {
            ranges.push(unit + 1..end);
            (end, filled) = (unit + 1, 0);
        }
        filled += bytes[unit];
        if filled >= limit || unit == 0 {
            if filled > 0 {
                ranges.push(unit..end);
            }
            (end, filled) = (unit, 0);
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sharding(stage: u8, rank: usize, world: usize) -> Sharding {
        Sharding::new(&RunConfig { zero_stage: stage, ..RunConfig::default() }, rank, world)
    }

    #[test]
    fn buckets_cover_every_unit_once_from_the_top() {
        let ranges = |sizes: &[i64]| -> Vec<(usize, usize)> {
            bucket_ranges(sizes, 100).into_iter().map(|range| (range.start, range.end)).collect()
        };
        assert_eq!(ranges(&[10, 1, 1, 5]), [(0, 4)]);
        assert_eq!(ranges(&[100, 1, 100, 5]), [(3, 4), (2, 3), (1, 2), (0, 1)]);
        assert_eq!(ranges(&[1, 49, 49, 49, 5]), [(2, 5), (0, 2)]);
        assert_eq!(ranges(&[50, 1, 5]), [(1, 3), (0, 1)]);
        assert_eq!(ranges(&[0, 1, 1, 0]), [(0, 4)]);
        assert_eq!(ranges(&[0, 0]), []);
    }

    #[test]
    fn decaying_parameters_come_first_and_all_are_aligned() {
        let layout = Layout::new(&[(3, false), (1000, true), (256, true), (5, false)], Sharding::NONE);
        let offsets: Vec<i64> = layout.slots.iter().map(|slot| slot.offset).collect();
        assert_eq!(offsets, [1280, 0, 1024, 1536]);
        assert_eq!((layout.decaying, layout.len), (1280, 1792));
    }

    #[test]
    fn ranks_own_equal_parts_that_cover_the_buffer() {
        for world in 1..=8 {
            let layout = Layout::new(&[(700, true), (3, false)], sharding(1, 0, world));
            let parts: Vec<Range<i64>> =
                (0..world).map(|rank| sharding(1, rank, world).own(layout.len)).collect();
            assert!(
                parts.iter().all(|part| part.end - part.start == parts[0].end && part.start % ALIGN == 0)
            );
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert_eq!(parts.last().unwrap().end, layout.len);
            // Each value of each parameter is found in exactly one part.
            for slot in &layout.slots {
                let found = parts.iter().filter_map(|part| slot.overlap(part));
                assert_eq!(found.map(|(here, _)| here.end - here.start).sum::<i64>(), slot.len);
            }
        }
        assert_eq!(sharding(0, 1, 2).own(512), 0..512);
    }

    #[test]
    fn an_overlap_is_counted_from_both_starts() {
        let slot = Slot { offset: 256, len: 300 };
        assert_eq!(slot.overlap(&(0..512)), Some((0..256, 256..512)));
        assert_eq!(slot.overlap(&(512..1024)), Some((256..300, 0..44)));
        assert_eq!(slot.overlap(&(1024..1536)), None);
    }

    #[test]
    fn a_single_rank_shards_nothing() {
        assert!(!sharding(3, 0, 1).of_states() && sharding(3, 0, 2).of_weights());
        assert!(!sharding(3, 0, 2).whole_weights().of_weights());
    }
}
