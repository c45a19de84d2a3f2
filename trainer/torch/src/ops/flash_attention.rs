//! Attention over packed segments in one call per layer, by libtorch's variable-length kernels on CUDA devices.
//! [`super::layer::segmented_attention`] computes the same on CPUs.
//!
//! A *run* is a range of queries and the range of keys that they see: the last query sees all of them, each query before it one
//! key less. A prompt and its first branch are one run, which sees itself; each further branch is a run that sees the prompt and
//! itself. Queries stay in packed order. Keys and values of a prompt are copied once for each further branch.
#![expect(unsafe_code, reason = "foreign functions of the bridge")]

use tch::Tensor;

use super::attention_kernel::Kernel;
use super::segment::Segment;
use crate::error::check;
use crate::ffi::{RawRuns, dyad_varlen_attention};

/// Runs of a packed row, as the lists that the kernels take.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Runs {
    /// First query of each run, then the number of queries. `[runs + 1]`
    pub queries: Vec<i32>,
    /// First key of each run, then the number of keys. `[runs + 1]`
    pub keys: Vec<i32>,
    /// Row of each key; empty if the keys are the rows in packed order. `[keys]`
    pub gather: Vec<i64>,
    /// Longest run of queries.
    pub max_queries: i64,
    /// Longest run of keys.
    pub max_keys: i64,
    /// Number of (query, key) pairs where the query sees the key.
    pub pairs: f64,
}

/// For each row, the keys that are copies of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Copies {
    /// Start of each row's list in `places`, then the length of `places`. `[rows + 1]`
    pub starts: Vec<i32>,
    /// Indices of the keys that are copies of a row, row after row. `[keys]`
    pub places: Vec<i32>,
}

impl Runs {
    /// Runs of consecutive segments.
    #[must_use]
    pub fn of(segments: &[Segment]) -> Self {
        let mut runs = Self { queries: vec![0], keys: vec![0], ..Self::default() };
        let copies = segments.iter().any(|segment| segment.prompt > 0 && segment.branches.len() > 1);
        for segment in segments {
            let trunk = segment.prompt + segment.branches.first().copied().unwrap_or(0);
            runs.add(0, trunk);
            let mut rows: Vec<i64> = (segment.start..segment.start + trunk).collect();
            let mut start = segment.start + trunk;
            for &branch in segment.branches.iter().skip(1).filter(|&&branch| branch > 0) {
                runs.add(segment.prompt, branch);
                rows.extend((segment.start..segment.start + segment.prompt).chain(start..start + branch));
                start += branch;
            }
            if copies {
                runs.gather.extend(rows);
            }
        }
        runs
    }

    /// The keys that are copies of each row; empty if the keys are the rows in packed order.
    #[must_use]
    pub fn copies(&self) -> Copies {
        if self.gather.is_empty() {
            return Copies::default();
        }
        let rows = self.queries.last().map_or(0, |&rows| rows as usize);
        let mut starts = vec![0; rows + 1];
        self.gather.iter().for_each(|&row| starts[row as usize + 1] += 1);
        (0..rows).for_each(|row| starts[row + 1] += starts[row]);
        let (mut next, mut places) = (starts.clone(), vec![0; self.gather.len()]);
        for (key, &row) in self.gather.iter().enumerate() {
            places[next[row as usize] as usize] = key as i32;
            next[row as usize] += 1;
        }
        Copies { starts, places }
    }

    /// Adds a run of `queries` queries that see themselves and `before` keys before them.
    fn add(&mut self, before: i64, queries: i64) {
        if queries == 0 {
            return;
        }
        let last = |list: &[i32]| list.last().copied().unwrap_or(0);
        self.queries.push(last(&self.queries) + queries as i32);
        self.keys.push(last(&self.keys) + (before + queries) as i32);
        self.max_queries = self.max_queries.max(queries);
        self.max_keys = self.max_keys.max(before + queries);
        self.pairs += (queries * before) as f64 + (queries * (queries + 1)) as f64 / 2.0;
    }
}

/// [`Runs`] whose lists are on the device: made once per micro-batch, used by every layer.
#[derive(Debug)]
pub struct Varlen {
    /// As [`Runs::queries`], int32. `[runs + 1]`
    pub queries: Tensor,
    /// As [`Runs::keys`], int32. `[runs + 1]`
    pub keys: Tensor,
    /// How keys are copied; `None` if they are the rows in packed order.
    pub gathered: Option<Gathered>,
    /// Longest run of queries.
    pub max_queries: i64,
    /// Longest run of keys.
    pub max_keys: i64,
    /// As [`Runs::pairs`].
    pub pairs: f64,
}

/// Copies of rows as keys; the lists are on the device.
#[derive(Debug)]
pub struct Gathered {
    /// Row of each key, int64. `[keys]`
    pub rows: Tensor,
    /// As [`Copies::starts`], int32.
    pub starts: Tensor,
    /// As [`Copies::places`], int32.
    pub places: Tensor,
}

impl Varlen {
    /// Attention of all runs: queries `[tokens, heads, width]`, keys and values `[tokens, kv heads, width]`. `None` if `kernel`
    /// is [`Kernel::Segments`], which takes no runs.
    #[must_use]
    pub fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, kernel: Kernel) -> Option<Tensor> {
        let code = match kernel {
            Kernel::Flash => 0,
            Kernel::Efficient => 1,
            Kernel::Segments => return None,
        };
        let of = |list: fn(&Gathered) -> &Tensor| {
            self.gathered.as_ref().map_or(std::ptr::null(), |gathered| list(gathered).as_ptr())
        };
        let runs = RawRuns {
            queries: self.queries.as_ptr(),
            keys: self.keys.as_ptr(),
            gather: of(|gathered| &gathered.rows),
            starts: of(|gathered| &gathered.starts),
            places: of(|gathered| &gathered.places),
            max_queries: self.max_queries,
            max_keys: self.max_keys,
            pairs: self.pairs,
        };
        let mut raw = std::ptr::null_mut();
        // SAFETY: all pointers are null or to live tensors, and there is a place for the result.
        let made = unsafe {
            check(dyad_varlen_attention(
                q.as_ptr(),
                k.as_ptr(),
                v.as_ptr(),
                &raw const runs,
                code,
                &raw mut raw,
            ))
        };
        if let Err(error) = made {
            // The kernel was chosen for these tensors (`attention_kernel.rs`), so an error is a bug: panic as tch's operators do.
            panic!("variable-length attention: {error}");
        }
        // SAFETY: on success the bridge has left a fresh tensor that we own.
        Some(unsafe { Tensor::from_ptr(raw) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(start: i64, prompt: i64, branches: &[i64]) -> Segment {
        Segment { start, prompt, branches: branches.into() }
    }

    /// Computed by hand: a prompt of 3 with branches of 2 and 1, then a prompt of 2 with a branch of 2.
    #[test]
    fn a_further_branch_sees_the_prompt_and_itself() {
        let runs = Runs::of(&[segment(0, 3, &[2, 1]), segment(6, 2, &[2])]);
        assert_eq!(runs.queries, [0, 5, 6, 10]);
        assert_eq!(runs.keys, [0, 5, 9, 13]);
        assert_eq!(runs.gather, [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9]);
        assert_eq!((runs.max_queries, runs.max_keys), (5, 5));
        assert_eq!(runs.pairs, 15.0 + 4.0 + 10.0);
    }

    /// A deterministic pseudo-random generator.
    struct Draw(u64);

    impl Draw {
        fn below(&mut self, limit: u64) -> i64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((self.0 >> 33) % limit) as i64
        }
    }

    fn segments(draw: &mut Draw) -> Vec<Segment> {
        let mut start = 0;
        (0..1 + draw.below(5))
            .map(|_| {
                let branches: Vec<i64> = (0..draw.below(4)).map(|_| draw.below(5)).collect();
                let new = Segment { start, prompt: draw.below(6), branches };
                start += new.prompt + new.branches.iter().sum::<i64>();
                new
            })
            .collect()
    }

    /// The keys that each query sees, by the definition of a segment.
    fn seen_by_definition(segments: &[Segment]) -> Vec<Vec<i64>> {
        let mut seen = Vec::new();
        for Segment { start, prompt, branches } in segments {
            let prompts: Vec<i64> = (*start..start + prompt).collect();
            seen.extend((0..prompts.len()).map(|last| prompts[..=last].to_vec()));
            let mut first = start + prompt;
            for &branch in branches {
                seen.extend(
                    (first..first + branch).map(|last| prompts.iter().copied().chain(first..=last).collect()),
                );
                first += branch;
            }
        }
        seen
    }

    /// The keys that each query sees, by the runs with a causal mask aligned to the end of each.
    fn seen_by_runs(runs: &Runs, tokens: usize) -> Vec<Vec<i64>> {
        let mut seen = vec![Vec::new(); tokens];
        for (queries, keys) in runs.queries.windows(2).zip(runs.keys.windows(2)) {
            assert!(i64::from(queries[1] - queries[0]) <= runs.max_queries);
            assert!(i64::from(keys[1] - keys[0]) <= runs.max_keys);
            for query in queries[0]..queries[1] {
                let last = keys[1] - (queries[1] - query - 1);
                let row = |key: i32| runs.gather.get(key as usize).copied().unwrap_or(i64::from(key));
                seen[query as usize] = (keys[0]..last).map(row).collect();
            }
        }
        seen
    }

    #[test]
    fn runs_give_each_query_the_keys_of_its_segment() {
        let mut draw = Draw(7);
        for _ in 0..500 {
            let segments = segments(&mut draw);
            let expected = seen_by_definition(&segments);
            let runs = Runs::of(&segments);
            assert_eq!(seen_by_runs(&runs, expected.len()), expected, "{segments:?}");
            assert_eq!(runs.pairs, expected.iter().map(Vec::len).sum::<usize>() as f64);
            assert_eq!(runs.queries.last().copied(), Some(expected.len() as i32));
            let copies = runs.copies();
            for (row, list) in copies.starts.windows(2).enumerate() {
                let keys = &copies.places[list[0] as usize..list[1] as usize];
                assert!(!keys.is_empty() && keys.iter().all(|&key| runs.gather[key as usize] == row as i64));
            }
            assert_eq!(copies.places.len(), runs.gather.len());
        }
    }

    #[test]
    fn keys_are_copied_only_where_a_prompt_has_further_branches() {
        assert!(
            Runs::of(&[segment(0, 3, &[2]), segment(5, 4, &[]), segment(9, 0, &[1, 2])]).gather.is_empty()
        );
        assert_eq!(Runs::of(&[]).queries, [0]);
    }

    #[test]
    fn runs_without_queries_are_left_out() {
        let runs = Runs::of(&[segment(0, 2, &[0, 0, 1]), segment(3, 0, &[])]);
        assert_eq!((runs.queries, runs.keys), (vec![0, 2, 3], vec![0, 2, 5]));
    }
}
