//! A step's gradients: added up in buckets, reduced over the ranks as buckets complete, freed if a rank keeps only a part.

use tch::{Device, Kind, Tensor};

use super::{Bucket, Parameters};
use crate::observe::trace;
use crate::zero::unit_weights::part;
use dyad_torch::comm::{CommError, Pending, narrow};
use dyad_torch::storage::{allocate_memory, release_memory};

/// Most whole gradients that may wait for their reduction at once, if ranks keep only parts.
const IN_FLIGHT: usize = 2;

impl Bucket {
    fn open(&mut self) {
        if !self.open {
            allocate_memory(&self.grad);
            let _ = self.grad.zero_();
            self.open = true;
        }
    }

    pub(super) fn close(&mut self) {
        release_memory(&self.grad);
        self.open = false;
    }
}

impl Parameters {
    /// Clears the gradients of the last step.
    pub fn begin_step(&mut self) {
        for bucket in &mut self.buckets {
            if !std::mem::take(&mut bucket.cleared) {
                let _ = bucket.total.as_mut().unwrap_or(&mut bucket.grad).zero_();
            }
        }
    }

    /// Prepares a unit's gradients for adding to them.
    pub fn open(&mut self, unit: usize) -> Result<(), CommError> {
        for index in 0..self.buckets.len() {
            if !self.buckets[index].units.contains(&unit) {
                continue;
            }
            if self.buckets[index].reduction.is_some() {
                self.land(index)?;
            }
            self.buckets[index].open();
        }
        Ok(())
    }

    /// To be called when a unit's gradients are complete in this micro-batch. Reduces the bucket that is now complete: after the step's
    /// last micro-batch, or after each one if no rank keeps whole gradients.
    pub fn complete(&mut self, unit: usize, last: bool) -> Result<(), CommError> {
        match unit == 0 && self.lookup_travels_apart() {
            true if last => self.reduce_rows(),
            true => Ok(()),
            false => self.complete_bucket(unit, last),
        }
    }

    /// To be called when a tied head has added its part of the embedding's gradient in this micro-batch. Only the lookup's part is then
    /// missing.
    pub fn complete_tied_head(&mut self, last: bool) -> Result<(), CommError> {
        if self.lookup_travels_apart() { self.complete_bucket(0, last) } else { Ok(()) }
    }

    fn complete_bucket(&mut self, unit: usize, last: bool) -> Result<(), CommError> {
        if !last && !self.keeping.sharding.of_gradients() {
            return Ok(());
        }
        (0..self.buckets.len())
            .filter(|&index| self.buckets[index].units.start == unit)
            .collect::<Vec<_>>()
            .into_iter()
            .try_for_each(|index| self.reduce(index))
    }

    fn reduce(&mut self, index: usize) -> Result<(), CommError> {
        let link = self.keeping.link.clone();
        let communicator = link.communicator()?;
        if communicator.world_size() == 1 {
            return Ok(());
        }
        let (sharding, travels_as) = (self.keeping.sharding, self.keeping.travels_as);
        // A unit that got no gradient has not been opened.
        self.buckets[index].open();
        let grad = &self.buckets[index].grad;
        let operation = if sharding.of_states() { "reduce_scatter" } else { "all_reduce" };
        trace::reduction(operation, index, grad.numel() * travels_as.elt_size_in_bytes());
        let reduction = match sharding.of_states() {
            true => {
                let own = part(grad, sharding.own(self.buckets[index].weights.layout().len));
                narrow::reduce_scatter(communicator, travels_as, &own, grad)?
            }
            false => narrow::all_reduce(communicator, travels_as, grad)?,
        };
        self.buckets[index].reduction = Some(reduction);
        if sharding.of_gradients() {
            self.in_flight.push_back(index);
            while self.in_flight.len() > IN_FLIGHT {
                self.land(self.in_flight[0])?;
            }
        }
        Ok(())
    }

    /// Waits for a bucket's reduction. If ranks keep only parts, adds this rank's part to its total and frees the whole.
    fn land(&mut self, index: usize) -> Result<(), CommError> {
        self.in_flight.retain(|&other| other != index);
        let own = self.keeping.sharding.own(self.buckets[index].weights.layout().len);
        let bucket = &mut self.buckets[index];
        bucket.reduction.take().map_or(Ok(()), Pending::wait)?;
        trace::reduced(index);
        if let Some(total) = &mut bucket.total {
            *total += part(&bucket.grad, own);
            bucket.close();
        }
        Ok(())
    }

    /// Waits until all gradients are reduced.
    pub fn finish_step(&mut self) -> Result<(), CommError> {
        (0..self.buckets.len())
            .filter(|&index| self.buckets[index].reduction.is_some())
            .collect::<Vec<_>>()
            .into_iter()
            .try_for_each(|index| self.land(index))?;
        self.settle_rows()
    }

    /// This rank's own part of a bucket's gradient.
    pub fn own_grad(&self, bucket: &Bucket) -> Tensor {
        let own = self.keeping.sharding.own(bucket.weights.layout().len);
        bucket.total.as_ref().map_or_else(|| part(&bucket.grad, own), Tensor::shallow_clone)
    }

    /// L2 norm over all gradients of all ranks, float64, on the gradients' device. The caller decides when to read it. `[1]`
    pub fn grad_norm(&self) -> Result<Tensor, CommError> {
        let square = |bucket| {
            let grad = self.own_grad(bucket);
            grad.dot(&grad).to_kind(Kind::Double)
        };
        let squares: Vec<Tensor> = self.buckets.iter().map(square).collect();
        if squares.is_empty() {
            return Ok(Tensor::zeros([1], (Kind::Double, Device::Cpu)));
        }
        let total = Tensor::stack(&squares, 0).sum(Kind::Double).view([1]);
        if self.keeping.sharding.of_states() {
            self.keeping.link.communicator()?.all_reduce(&total)?.wait()?;
        }
        Ok(total.sqrt())
    }
}
