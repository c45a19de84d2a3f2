//! Weights in flat buffers that are whole only while a pass uses them.
//!
//! The model's tensors are views of [`UnitWeights::whole`]. If a rank keeps only its part of the weights (ZeRO stage 3), or keeps them on
//! the host, the buffer's memory is freed between uses. Views, and autograd graphs that contain them, stay valid and read the weights
//! that are brought back before the next use.
//!
//! - TRN-F1: all ranks gather the same buffers in the same order, whatever pairs they have.

use std::cell::{OnceCell, RefCell};
use std::fmt;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use crate::observe::progress;
use crate::zero::ranges::{Layout, Sharding};
use dyad_torch::comm::{CommError, Communicator, Pending};
use dyad_torch::storage::{allocate_memory, releasable_zeros, release_memory};

/// The communicator, set after the models are loaded.
#[derive(Clone, Debug, Default)]
pub struct Link(Rc<OnceCell<Arc<dyn Communicator>>>);

impl Link {
    /// Sets the communicator; only the first call has an effect.
    pub fn connect(&self, communicator: Arc<dyn Communicator>) {
        let _ = self.0.set(communicator);
    }

    /// Returns the communicator; fails before it is set.
    pub fn communicator(&self) -> Result<&dyn Communicator, CommError> {
        let unconnected = CommError { operation: "all_gather", reason: "the ranks are not connected".into() };
        self.0.get().map(AsRef::as_ref).ok_or(unconnected)
    }
}

/// One buffer of weights in the passes' precision.
pub struct UnitWeights {
    whole: Tensor,
    layout: Layout,
    home: WeightsHome,
    sharding: Sharding,
    link: Link,
    state: RefCell<WeightsState>,
}

/// Where the weights are kept between uses.
#[derive(Debug)]
enum WeightsHome {
    /// In `whole`.
    Here,
    /// This rank's part of them, on the device or on the host.
    Part(Tensor),
    /// All of them, on the host.
    Host(Tensor),
}

#[derive(Default)]
struct WeightsState {
    /// Number of uses that have not ended.
    uses: usize,
    /// True while `whole` has memory.
    here: bool,
    /// The gather that is under way.
    coming: Option<Box<dyn Pending>>,
}

impl fmt::Debug for UnitWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnitWeights")
            .field("len", &self.layout.len)
            .field("home", &self.home)
            .finish_non_exhaustive()
    }
}

/// Where a buffer is kept between uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// On the device.
    Device,
    /// On the host, and copied to the device before each use.
    Host,
}

impl UnitWeights {
    /// Moves tensors into a buffer of kind `kind` and puts views of it in their place.
    pub fn adopt(
        tensors: &mut [&mut Tensor],
        layout: Layout,
        kind: Kind,
        sharding: Sharding,
        link: &Link,
    ) -> Self {
        let device = tensors.first().map_or(Device::Cpu, |tensor| tensor.device());
        let whole = match sharding.of_weights() {
            true => releasable_zeros(layout.len, kind, device),
            false => Tensor::zeros([layout.len], (kind, device)),
        };
        for (tensor, slot) in tensors.iter_mut().zip(&layout.slots) {
            let view = whole.narrow(0, slot.offset, slot.len).view(tensor.size().as_slice());
            tch::no_grad(|| view.shallow_clone().copy_(tensor));
            **tensor = view.detach();
        }
        let home = match sharding.of_weights() {
            true => WeightsHome::Part(part(&whole, sharding.own(layout.len)).copy()),
            false => WeightsHome::Here,
        };
        Self::at_home(whole, home, layout, sharding, link)
    }

    /// A frozen copy of the buffer, for the same tensors of another model.
    #[must_use]
    pub fn copy_for(&self, tensors: &mut [&mut Tensor], keep: Keep) -> Self {
        let mut whole = releasable_zeros(self.layout.len, self.whole.kind(), self.whole.device());
        for (tensor, slot) in tensors.iter_mut().zip(&self.layout.slots) {
            **tensor = whole.narrow(0, slot.offset, slot.len).view(tensor.size().as_slice());
        }
        let place = |tensor: &Tensor| match keep {
            Keep::Device => tensor.copy(),
            Keep::Host => tensor.to_device(Device::Cpu).copy(),
        };
        let home = match (&self.home, keep) {
            (WeightsHome::Part(part), _) => WeightsHome::Part(place(part)),
            (WeightsHome::Host(all), _) => WeightsHome::Host(place(all)),
            (WeightsHome::Here, Keep::Host) => WeightsHome::Host(place(&self.whole)),
            (WeightsHome::Here, Keep::Device) => {
                whole.copy_(&self.whole);
                WeightsHome::Here
            }
        };
        Self::at_home(whole, home, self.layout.clone(), self.sharding, &self.link)
    }

    fn at_home(whole: Tensor, home: WeightsHome, layout: Layout, sharding: Sharding, link: &Link) -> Self {
        let state = RefCell::new(WeightsState { here: true, ..WeightsState::default() });
        let flat = Self { whole, layout, home, sharding, link: link.clone(), state };
        flat.release();
        flat
    }

    /// Place of each tensor in the buffer.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Precision of the buffer.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.whole.kind()
    }

    /// The values that this rank's optimizer updates: its part, or everything.
    pub fn own(&self) -> Tensor {
        match &self.home {
            WeightsHome::Part(part) => part.shallow_clone(),
            WeightsHome::Here | WeightsHome::Host(_) => part(&self.whole, self.sharding.own(self.layout.len)),
        }
    }

    /// To be called when this rank has changed its own values: sends them to the other ranks and starts to receive theirs.
    pub fn scatter(&self) -> Result<(), CommError> {
        self.wait()?;
        if !self.sharding.of_states() || matches!(self.home, WeightsHome::Part(_)) {
            return Ok(());
        }
        let coming = self.link.communicator()?.all_gather(&self.whole.data(), &self.own().data())?;
        self.state.borrow_mut().coming = Some(coming);
        Ok(())
    }

    /// Starts to bring the weights into `whole`.
    pub fn fetch(&self) -> Result<(), CommError> {
        let mut state = self.state.borrow_mut();
        if state.here {
            return Ok(());
        }
        allocate_memory(&self.whole);
        state.here = true;
        // Through an alias with its own version counter, so that autograd does not notice the change.
        let mut whole = self.whole.data();
        match &self.home {
            WeightsHome::Here => {}
            WeightsHome::Host(all) => whole.copy_(all),
            WeightsHome::Part(part) => {
                let part = part.to_device(whole.device());
                state.coming = Some(self.link.communicator()?.all_gather(&whole, &part)?);
            }
        }
        Ok(())
    }

    /// Waits for a gather that is under way.
    pub fn wait(&self) -> Result<(), CommError> {
        let coming = self.state.borrow_mut().coming.take();
        coming.map_or(Ok(()), Pending::wait)
    }

    /// To be called when the gathered weights have been changed: keeps this rank's part of them.
    pub fn keep(&self) {
        tch::no_grad(|| match &self.home {
            WeightsHome::Here => {}
            WeightsHome::Host(all) => all.shallow_clone().copy_(&self.whole),
            WeightsHome::Part(own) => {
                own.shallow_clone().copy_(&part(&self.whole, self.sharding.own(self.layout.len)));
            }
        });
    }

    /// Frees the memory, unless the weights are in use or are kept nowhere else.
    fn release(&self) {
        let mut state = self.state.borrow_mut();
        if state.uses == 0 && state.here && !matches!(self.home, WeightsHome::Here) {
            release_memory(&self.whole);
            state.here = false;
        }
    }

    /// Bytes that this rank keeps between uses.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        let bytes = |tensor: &Tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        match &self.home {
            WeightsHome::Here => bytes(&self.whole),
            WeightsHome::Part(kept) | WeightsHome::Host(kept) => bytes(kept),
        }
    }
}

/// A range of a buffer.
pub fn part(flat: &Tensor, range: Range<i64>) -> Tensor {
    flat.narrow(0, range.start, range.end - range.start)
}

/// Keeps buffers whole until it is dropped.
#[derive(Debug, Default)]
pub struct GatheredWeights(Vec<Rc<UnitWeights>>);

impl Drop for GatheredWeights {
    fn drop(&mut self) {
        for flat in &self.0 {
            flat.state.borrow_mut().uses -= 1;
            flat.release();
        }
    }
}

/// The buffers of each unit of a model. A unit without buffers always has its weights.
#[derive(Clone, Debug, Default)]
pub struct Residence(Vec<Vec<Rc<UnitWeights>>>);

impl Residence {
    /// No buffers, for `units` units.
    #[must_use]
    pub fn of_units(units: usize) -> Self {
        Self(vec![Vec::new(); units])
    }

    /// Adds a buffer to a unit.
    pub fn add(&mut self, unit: usize, flat: &Rc<UnitWeights>) {
        self.0[unit].push(Rc::clone(flat));
    }

    /// The buffers of a unit.
    #[must_use]
    pub fn unit(&self, unit: usize) -> &[Rc<UnitWeights>] {
        self.0.get(unit).map_or(&[], Vec::as_slice)
    }

    /// Every buffer once, with the units that use it.
    #[must_use]
    pub fn flats(&self) -> Vec<(Rc<UnitWeights>, Vec<usize>)> {
        let mut flats: Vec<(Rc<UnitWeights>, Vec<usize>)> = Vec::new();
        for (unit, flat) in
            self.0.iter().enumerate().flat_map(|(unit, flats)| flats.iter().map(move |flat| (unit, flat)))
        {
            match flats.iter_mut().find(|(known, _)| Rc::ptr_eq(known, flat)) {
                Some((_, units)) => units.push(unit),
                None => flats.push((Rc::clone(flat), vec![unit])),
            }
        }
        flats
    }

    /// Gathers a unit's weights and waits for them; they stay until the result is dropped. Starts to gather those of `next`.
    pub fn gather_unit(&self, unit: usize, next: Option<usize>) -> Result<GatheredWeights, CommError> {
        // Every pass calls this for every unit, so it counts as progress.
        progress::advance();
        let mut gathered = GatheredWeights::default();
        for flat in self.unit(unit) {
            flat.fetch()?;
            flat.state.borrow_mut().uses += 1;
            gathered.0.push(Rc::clone(flat));
        }
        for flat in next.into_iter().flat_map(|next| self.unit(next)) {
            flat.fetch()?;
        }
        gathered.0.iter().try_for_each(|flat| flat.wait())?;
        Ok(gathered)
    }
}
