//! jemalloc as the allocator of the whole process. It replaces malloc in libtorch too, so CPU tensors use it.
//!
//! Every step allocates and frees the same tensors. glibc returns the pages of a large freed block to the kernel and faults them in
//! again. If told to keep them, it puts small long-lived blocks into the holes, so that the next large block needs new pages. jemalloc
//! keeps large and small blocks apart.
#![expect(unsafe_code, reason = "the name under which jemalloc looks for its settings")]

use tikv_jemallocator::Jemalloc;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// Pointer to the settings that jemalloc reads before its first allocation.
#[repr(transparent)]
struct AllocatorSettings(*const std::ffi::c_char);

// SAFETY: points to a constant.
unsafe impl Sync for AllocatorSettings {}

/// One arena, because one thread does nearly all allocations. Freed memory of any size is kept for the next step. Huge pages, because
/// their first touch is cheaper. `MALLOC_CONF` in the environment overrides these settings.
// SAFETY: the only other symbol of this name is jemalloc's weak one, which this one is meant to replace.
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

    /// Reads one of jemalloc's values; `given` is the query's input, if it takes one.
    fn value<T: Default>(name: &CStr, given: Option<&mut usize>) -> Result<T, i32> {
        let (mut value, mut length) = (T::default(), size_of::<T>());
        let given_length = given.as_ref().map_or(0, |_| size_of::<usize>());
        let given = given.map_or(ptr::null_mut(), |given| ptr::from_mut(given).cast());
        // SAFETY: the name ends in NUL, and both buffers have the stated lengths.
        let status =
            unsafe { mallctl(name.as_ptr(), (&raw mut value).cast(), &raw mut length, given, given_length) };
        if status == 0 { Ok(value) } else { Err(status) }
    }

    fn arena(mut address: usize) -> Result<u32, i32> {
        value(c"arenas.lookup", Some(&mut address))
    }

    /// Without the exported symbols libtorch would use glibc's malloc, and every step would fault its pages in again.
    #[test]
    fn cpu_tensors_lie_in_jemallocs_arena() {
        let tensor = Tensor::zeros([1 << 20], (Kind::Float, Device::Cpu));
        assert_eq!(arena(tensor.data_ptr() as usize), Ok(0));
        let constant = &raw const super::SETTINGS;
        assert!(arena(constant as usize).is_err());
        assert_eq!(value::<isize>(c"opt.dirty_decay_ms", None), Ok(-1));
    }
}
