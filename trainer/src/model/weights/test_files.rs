//! Small safetensors files for tests.

use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// A tensor to write.
pub(super) struct File<'a> {
    name: std::borrow::Cow<'a, str>,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl<'a> File<'a> {
    pub(super) fn f32(name: &'a str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.into(), dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }

    pub(super) fn named(name: String, shape: &[usize], values: &[f32]) -> Self {
        Self { name: name.into(), ..Self::f32("", shape, values) }
    }

    pub(super) fn bytes(name: &'a str, shape: &[usize], values: &[u8]) -> Self {
        Self { name: name.into(), dtype: Dtype::U8, shape: shape.to_vec(), bytes: values.to_vec() }
    }
}

pub(super) fn write(path: &Path, files: &[File<'_>]) {
    let views = files.iter().map(|file| {
        (file.name.as_ref(), TensorView::new(file.dtype, file.shape.clone(), &file.bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}
