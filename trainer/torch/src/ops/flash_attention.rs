//! Attention over packed segments in one call a layer: what libtorch's variable-length kernels are told on CUDA devices, and
//! the call. [`super::blocks`] has the same for other devices.
//!
//! A *run* is a stretch of queries that sees one stretch of keys, causally from its end: a prompt with its first branch sees
//! itself, each further branch sees the prompt and itself. Queries lie in the packed row as they come; keys and values of
//! prompts with further branches are copied, once for each of these.
#![expect(unsafe_code, reason = "foreign functions of the bridge")]

use tch::Tensor;

use super::attention_kernel::Kernel;
use super::segment::Segment;
use crate::error::check;
use crate::ffi::{RawRuns, dyad_varlen_attention};

/// Runs of a packed row, by where they begin.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Runs {
    /// First query of each run, and one past the last run's last. `[runs + 1]`
    pub queries: Vec<i32>,
    /// The same of its keys.
    pub keys: Vec<i32>,
    /// Row of each key; empty where keys are the rows as they come.
    pub gather: Vec<i64>,
    /// Longest run of queries.
    pub max_queries: i64,
    /// Longest run of keys.
    pub max_keys: i64,
    /// Pairs of a query and a key that see each other.
    pub pairs: f64,
}

/// The way back from gathered keys to their rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Copies {
    /// Where each row's list of places begins, and one past the last. `[rows + 1]`
    pub starts: Vec<i32>,
    /// Keys that a row has become, row by row. `[keys]`
    pub places: Vec<i32>,
}

impl Runs {
    /// Of segments that lie one after the other.
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

    /// Which keys each of so many rows has become; nothing where keys are the rows as they come.
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

    /// So many queries that see themselves and so many keys before them.
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

/// Runs whose lists are on the device: made once a micro-batch, used by every layer.
#[derive(Debug)]
pub struct Varlen {
    /// Int32. `[runs + 1]`
    pub queries: Tensor,
    /// Int32. `[runs + 1]`
    pub keys: Tensor,
    /// Where keys are gathered.
    pub gathered: Option<Gathered>,
    /// Longest run of queries.
    pub max_queries: i64,
    /// Longest run of keys.
    pub max_keys: i64,
    /// Pairs of a query and a key that see each other.
    pub pairs: f64,
}

/// Keys that are copies of rows.
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
    /// Attention of all runs: `[tokens, heads, width]`, and `[tokens, kv heads, width]` keys and values. `None` where the
    /// kernel for such tensors takes no runs.
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
        // SAFETY: live tensors all through, and a place for the result.
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
            // Kernels are chosen by what they take (`attention.rs`): a refusal is a bug, as with tch's own operators.
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

    /// By hand: a prompt of 3 with branches of 2 and 1, then one of 2 with one branch of 2.
    #[test]
    fn a_further_branch_sees_the_prompt_and_itself() {
        let runs = Runs::of(&[segment(0, 3, &[2, 1]), segment(6, 2, &[2])]);
        assert_eq!(runs.queries, [0, 5, 6, 10]);
        assert_eq!(runs.keys, [0, 5, 9, 13]);
        assert_eq!(runs.gather, [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9]);
        assert_eq!((runs.max_queries, runs.max_keys), (5, 5));
        assert_eq!(runs.pairs, 15.0 + 4.0 + 10.0);
    }

    /// Numbers that differ from case to case and are the same in every run.
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

    /// By the definition of a segment: the keys that each query sees.
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

    /// By the runs, under a causal mask from the end of each.
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
    fn runs_show_each_query_what_its_segment_does() {
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
    fn a_run_of_no_queries_is_left_out() {
        let runs = Runs::of(&[segment(0, 2, &[0, 0, 1]), segment(3, 0, &[])]);
        assert_eq!((runs.queries, runs.keys), (vec![0, 2, 3], vec![0, 2, 5]));
    }
}
