//! Gradient of the embedding for the rows that a step looks up. All other rows are zero and are not sent.
//!
//! The lookup's gradient is the last one of a backward pass, so no computation hides its reduction; and a step looks up few rows of a
//! vocabulary of many thousands. Before the passes, ranks tell each other which rows they look up, one bit each. Later they sum only
//! these rows. A tied head's gradient for all rows is complete when the backward pass begins, and is reduced like every bucket.

use tch::{Device, Kind, Tensor};

use super::{Bucket, Parameters};
use crate::zero::unit_weights::part;
use dyad_torch::comm::{CommError, Communicator, Pending, narrow};
use dyad_torch::transfer::{read, upload};

/// Rows per value of a packed set.
const BITS: usize = i64::BITS as usize;

/// Rows of the embedding that some rank looks up in this step.
pub(super) enum LookedUpRows {
    /// Every rank's set, which is being gathered.
    Coming { own: Tensor, all: Tensor, pending: Box<dyn Pending> },
    /// The rows of all ranks, with their gradient.
    Here(Gradient),
}

/// Gradient of some rows.
pub(super) struct Gradient {
    /// The rows, ascending. `[rows]`
    ids: Tensor,
    /// Index in `ids` of each row of the embedding; 0 for rows that are not looked up. `[vocabulary]`
    places: Tensor,
    /// Float32. `[rows, hidden]`
    sums: Tensor,
    reduction: Option<Box<dyn Pending>>,
}

impl std::fmt::Debug for LookedUpRows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Coming { own, .. } => f.debug_struct("Coming").field("own", own).finish_non_exhaustive(),
            Self::Here(gradient) => {
                f.debug_struct("Here").field("ids", &gradient.ids).finish_non_exhaustive()
            }
        }
    }
}

/// Packs a set of rows into bits, 64 per value.
fn packed(rows: impl Iterator<Item = u32>, vocabulary: i64) -> Vec<i64> {
    let mut words = vec![0_i64; (vocabulary as usize).div_ceil(BITS)];
    for row in rows {
        if let Some(word) = words.get_mut(row as usize / BITS) {
            *word |= 1 << (row as usize % BITS);
        }
    }
    words
}

/// The union of several sets of rows, ascending.
fn united(sets: &[i64], words: usize) -> Vec<i64> {
    let mut union = vec![0_i64; words];
    for set in sets.chunks_exact(words.max(1)) {
        union.iter_mut().zip(set).for_each(|(all, word)| *all |= word);
    }
    let rows = |(index, word): (usize, i64)| {
        (0..BITS).filter(move |bit| word >> bit & 1 == 1).map(move |bit| (index * BITS + bit) as i64)
    };
    union.into_iter().enumerate().flat_map(rows).collect()
}

impl Gradient {
    /// Zero gradient of these rows of an embedding of this shape.
    fn new(ids: &[i64], shape: &[i64], device: Device) -> Self {
        let mut places = vec![0_i64; shape[0] as usize];
        ids.iter().enumerate().for_each(|(place, &id)| places[id as usize] = place as i64);
        Self {
            ids: upload(ids, device),
            places: upload(&places, device),
            sums: Tensor::zeros([ids.len() as i64, shape[1]], (Kind::Float, device)),
            reduction: None,
        }
    }
}

impl LookedUpRows {
    fn here(self, shape: &[i64], device: Device) -> Result<Gradient, CommError> {
        match self {
            Self::Here(gradient) => Ok(gradient),
            Self::Coming { own, all, pending } => {
                pending.wait()?;
                Ok(Gradient::new(&united(&read::<i64>(&all), own.numel()), shape, device))
            }
        }
    }
}

impl Parameters {
    /// Index of the embedding's bucket; `None` if it shares a bucket, or with a single rank.
    fn embedding_bucket(&self, communicator: &dyn Communicator) -> Option<usize> {
        let alone = |bucket: &Bucket| bucket.units == (0..1);
        if communicator.world_size() == 1 { None } else { self.buckets.iter().position(alone) }
    }

    /// Tells the other ranks which rows of the embedding this rank looks up in the step that begins.
    pub fn announce_rows(&mut self, tokens: impl Iterator<Item = u32>) -> Result<(), CommError> {
        let link = self.keeping.link.clone();
        let communicator = link.communicator()?;
        if self.embedding_bucket(communicator).is_none() {
            return Ok(());
        }
        let embedding = &self.units[0][0].leaf;
        let device = embedding.device();
        let own = upload(&packed(tokens, embedding.size()[0]), device);
        let all = Tensor::zeros([communicator.world_size() as i64 * own.size()[0]], (Kind::Int64, device));
        let pending = communicator.all_gather(&all, &own)?;
        let coming = LookedUpRows::Coming { own, all, pending };
        // Wait for a GPU now, while it is idle, and not during the passes.
        self.rows = Some(match device.is_cuda() {
            true => LookedUpRows::Here(coming.here(&embedding.size(), device)?),
            false => coming,
        });
        Ok(())
    }

    /// Waits for the rows of this step; `None` if all rows are reduced together.
    fn rows_here(&mut self) -> Result<Option<&mut Gradient>, CommError> {
        let Some(rows) = self.rows.take() else { return Ok(None) };
        let embedding = &self.units[0][0].leaf;
        let gradient = rows.here(&embedding.size(), embedding.device())?;
        match self.rows.insert(LookedUpRows::Here(gradient)) {
            LookedUpRows::Here(gradient) => Ok(Some(gradient)),
            LookedUpRows::Coming { .. } => Ok(None),
        }
    }

    /// Adds the gradient of looked-up rows. `tokens` is `[tokens]`, `gradient` is `[tokens, hidden]`.
    pub fn add_looked_up(&mut self, tokens: &Tensor, gradient: &Tensor) -> Result<(), CommError> {
        let gradient = gradient.to_kind(Kind::Float);
        if let Some(rows) = self.rows_here()? {
            let places = rows.places.index_select(0, tokens);
            let _ = tch::no_grad(|| rows.sums.index_add_(0, &places, &gradient));
        } else {
            self.open(0)?;
            if let Some(embedding) = self.units[0].first() {
                let mut total = embedding.grad.shallow_clone();
                let _ = tch::no_grad(|| total.index_add_(0, tokens, &gradient));
            }
        }
        Ok(())
    }

    /// True if the lookup's gradient is reduced separately from a tied head's.
    pub(super) fn lookup_travels_apart(&self) -> bool {
        self.rows.is_some()
    }

    /// Starts to sum the looked-up rows over the ranks. Their gradients must be complete.
    pub(super) fn reduce_rows(&mut self) -> Result<(), CommError> {
        let (link, travels_as) = (self.keeping.link.clone(), self.keeping.travels_as);
        let Some(rows) = self.rows_here()? else { return Ok(()) };
        if rows.sums.numel() > 0 {
            rows.reduction = Some(narrow::all_reduce(link.communicator()?, travels_as, &rows.sums)?);
        }
        Ok(())
    }

    /// Waits for the rows' sums and adds them to the embedding's gradient.
    pub(super) fn settle_rows(&mut self) -> Result<(), CommError> {
        let Some(LookedUpRows::Here(mut rows)) = self.rows.take() else { return Ok(()) };
        rows.reduction.take().map_or(Ok(()), Pending::wait)?;
        let Some(index) = self.buckets.iter().position(|bucket| bucket.units == (0..1)) else {
            return Ok(());
        };
        self.open(0)?;
        let mut total = self.units[0][0].grad.shallow_clone();
        let _ = tch::no_grad(|| total.index_add_(0, &rows.ids, &rows.sums));
        let own = self.keeping.sharding.own(self.buckets[index].weights.layout().len);
        let bucket = &mut self.buckets[index];
        if let Some(total) = &mut bucket.total {
            *total += part(&bucket.grad, own);
            bucket.close();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_rows_survive_packing_and_unite() {
        let (a, b) = ([0_u32, 63, 64, 129], [1_u32, 64, 130]);
        let mut sets = packed(a.into_iter(), 131);
        assert_eq!(sets.len(), 3);
        assert_eq!(united(&sets, 3), [0, 63, 64, 129]);
        sets.extend(packed(b.into_iter(), 131));
        assert_eq!(united(&sets, 3), [0, 1, 63, 64, 129, 130]);
        assert_eq!(united(&packed(std::iter::empty(), 131), 3), Vec::<i64>::new());
    }
}
