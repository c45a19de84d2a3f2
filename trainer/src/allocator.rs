//! Memory of the whole process, tensors on the CPU included: jemalloc, which stands in for malloc in libtorch too.
//!
//! A step's tensors come and go with every step. glibc gives a large one's pages back and faults them in again, or, told to keep
//! them, lets what is small and stays settle in the holes, so that the next large one needs new pages. jemalloc keeps large
//! and small apart.
#![expect(unsafe_code, reason = "the name under which jemalloc looks for its settings")]

use tikv_jemallocator::Jemalloc;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// What jemalloc reads before its first allocation.
#[repr(transparent)]
struct AllocatorSettings(*const std::ffi::c_char);

// SAFETY: points to a constant.
unsafe impl Sync for AllocatorSettings {}

/// One arena, because one thread allocates nearly everything; what is freed is kept for the next step, whatever its size, in huge
/// pages, whose first touch is cheaper. `MALLOC_CONF` in the environment wins.
// SAFETY: no other symbol has this name but jemalloc's own weak one, which it is meant to replace.
#[unsafe(export_name = "malloc_conf")]
static SETTINGS: AllocatorSettings = AllocatorSettings(
    c"narenas:1,dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0,lg_extent_max_active_fit:16,thp:always"
        .as_ptr(),
);

#[cfg(test)]
mod tests {
    use std::ffi::CStr;
    use std::ptr;

    use tch::{Device, Kind, Tensor};
    use tikv_jemalloc_sys::mallctl;

    /// One of jemalloc's values; `given` is what it asks for, if anything.
    fn value<T: Default>(name: &CStr, given: Option<&mut usize>) -> Result<T, i32> {
        let (mut value, mut length) = (T::default(), size_of::<T>());
        let given_length = given.as_ref().map_or(0, |_| size_of::<usize>());
        let given = given.map_or(ptr::null_mut(), |given| ptr::from_mut(given).cast());
        // SAFETY: a name that ends in NUL, and places as large as said.
        let status =
            unsafe { mallctl(name.as_ptr(), (&raw mut value).cast(), &raw mut length, given, given_length) };
        if status == 0 { Ok(value) } else { Err(status) }
    }

    fn arena(mut address: usize) -> Result<u32, i32> {
        value(c"arenas.lookup", Some(&mut address))
    }

    /// Were the symbols not exported, libtorch would go on with glibc's, and a step would fault its pages in again.
    #[test]
    fn tensors_lie_where_freed_memory_is_kept() {
        let tensor = Tensor::zeros([1 << 20], (Kind::Float, Device::Cpu));
        assert_eq!(arena(tensor.data_ptr() as usize), Ok(0));
        let constant = &raw const super::SETTINGS;
        assert!(arena(constant as usize).is_err());
        assert_eq!(value::<isize>(c"opt.dirty_decay_ms", None), Ok(-1));
    }
}
