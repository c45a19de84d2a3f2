//! Random weights of a new model. They are written tensor by tensor, so that memory holds only a few chunks for any model size.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use dyad_proto::Fault;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::{NewModelOptions, Storage, StoredDtype, cannot_write, write_json};

/// Values that one thread generates at a time.
const CHUNK: usize = 1 << 18;
/// Most chunks in memory.
const CHUNKS: usize = 64;
/// Generator words (32 bits each) per value.
const WORDS: u128 = 4;

/// A tensor to write.
#[derive(Clone, Debug)]
struct Planned {
    name: String,
    shape: Vec<usize>,
    /// Number of values drawn before this tensor's first. So its values do not depend on the order of writing.
    drawn: u128,
}

impl Planned {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// One for norms, zero for biases; `None` for matrices, which are normal with deviation 0.02.
    fn constant(&self) -> Option<f32> {
        match self.name.as_str() {
            name if name.contains("norm") => Some(1.0),
            name if name.ends_with("bias") => Some(0.0),
            _ => None,
        }
    }
}

/// Writes `model.safetensors`, or shards and their index if one file would be larger than a shard may be.
pub(super) fn write(options: &NewModelOptions, storage: &Storage, vocab: usize) -> Result<(), Fault> {
    let shards = shards(planned(options, storage, vocab), storage);
    let total: usize = shards.iter().flatten().map(|tensor| tensor.len() * storage.dtype.bytes()).sum();
    let count = shards.len();
    remove_old(&options.out)?;
    let mut index = Map::new();
    for (number, tensors) in shards.iter().enumerate() {
        let file = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let path = options.out.join(&file);
        write_shard(&path, tensors, storage.dtype, options.seed)
            .map_err(|error| cannot_write(&path, &error))?;
        index.extend(tensors.iter().map(|tensor| (tensor.name.clone(), Value::from(file.as_str()))));
    }
    match count {
        1 => Ok(()),
        _ => {
            let index = json!({ "metadata": { "total_size": total }, "weight_map": index });
            write_json(&options.out, "model.safetensors.index.json", &index)
        }
    }
}

/// Removes weight files of the replaced model: readers would take them for files of the new one.
fn remove_old(dir: &Path) -> Result<(), Fault> {
    let files = std::fs::read_dir(dir).map_err(|error| cannot_write(dir, &error))?;
    for path in files.filter_map(|file| Some(file.ok()?.path())) {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("model") && name.contains(".safetensors") {
            std::fs::remove_file(&path).map_err(|error| cannot_write(&path, &error))?;
        }
    }
    Ok(())
}

/// All tensors, in the order in which their values are drawn.
fn planned(options: &NewModelOptions, storage: &Storage, vocab: usize) -> Vec<Planned> {
    let mut drawn = 0;
    tensors(options, storage, vocab)
        .into_iter()
        .map(|(name, shape)| {
            let tensor = Planned { name, shape, drawn };
            if tensor.constant().is_none() {
                drawn += tensor.len() as u128;
            }
            tensor
        })
        .collect()
}

/// Names and shapes of all tensors of the model.
fn tensors(options: &NewModelOptions, storage: &Storage, vocab: usize) -> Vec<(String, Vec<usize>)> {
    let (hidden, inner) = (options.hidden_size, options.intermediate_size);
    let keys = hidden / options.heads * options.kv_heads;
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
    for layer in 0..options.layers {
        let mut add = |name: &str, shape: &[usize]| {
            tensors.push((format!("model.layers.{layer}.{name}"), shape.to_vec()))
        };
        add("input_layernorm.weight", &[hidden]);
        for (name, outputs) in [("q", hidden), ("k", keys), ("v", keys)] {
            add(&format!("self_attn.{name}_proj.weight"), &[outputs, hidden]);
            if options.model_type == "qwen2" {
                add(&format!("self_attn.{name}_proj.bias"), &[outputs]);
            }
        }
        add("self_attn.o_proj.weight", &[hidden, hidden]);
        add("post_attention_layernorm.weight", &[hidden]);
        add("mlp.gate_proj.weight", &[inner, hidden]);
        add("mlp.up_proj.weight", &[inner, hidden]);
        add("mlp.down_proj.weight", &[hidden, inner]);
    }
    tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
    if storage.untied_head {
        tensors.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
    }
    tensors
}

/// Groups consecutive tensors into files of at most `shard_mib`; a larger tensor gets its own file. Sorted by name in each file, as
/// readers expect.
fn shards(tensors: Vec<Planned>, storage: &Storage) -> Vec<Vec<Planned>> {
    let limit = storage.shard_mib.max(1) << 20;
    let mut shards: Vec<Vec<Planned>> = vec![Vec::new()];
    let mut filled = 0;
    for tensor in tensors {
        let bytes = tensor.len() * storage.dtype.bytes();
        if filled > 0 && filled + bytes > limit {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    shards.iter_mut().for_each(|shard| shard.sort_by(|a, b| a.name.cmp(&b.name)));
    shards
}

fn write_shard(path: &Path, tensors: &[Planned], dtype: StoredDtype, seed: u64) -> std::io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    let header = header(tensors, dtype);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    for tensor in tensors {
        let starts: Vec<usize> = (0..tensor.len()).step_by(CHUNK).collect();
        for starts in starts.chunks(CHUNKS) {
            let made: Vec<Vec<u8>> =
                starts.par_iter().map(|&start| chunk(tensor, start, dtype, seed)).collect();
            made.iter().try_for_each(|bytes| file.write_all(bytes))?;
        }
    }
    file.flush()
}

/// The safetensors header, padded so that the values are aligned.
fn header(tensors: &[Planned], dtype: StoredDtype) -> String {
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({ "format": "pt" }))]);
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.len() * dtype.bytes();
        let entry = json!({ "dtype": dtype.code(), "shape": tensor.shape, "data_offsets": [start, end] });
        header.insert(tensor.name.clone(), entry);
        start = end;
    }
    let text = Value::Object(header).to_string();
    let padded = text.len().next_multiple_of(8);
    format!("{text:padded$}")
}

fn chunk(tensor: &Planned, start: usize, dtype: StoredDtype, seed: u64) -> Vec<u8> {
    let count = CHUNK.min(tensor.len() - start);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_word_pos(WORDS * (tensor.drawn + start as u128));
    let constant = tensor.constant();
    let mut value = || constant.unwrap_or_else(|| 0.02 * normal(&mut rng));
    match dtype {
        StoredDtype::Float32 => (0..count).flat_map(|_| value().to_le_bytes()).collect(),
        StoredDtype::Bfloat16 => (0..count).flat_map(|_| bfloat16(value()).to_le_bytes()).collect(),
    }
}

/// Rounds a finite float32 to bfloat16, to nearest, ties to even.
fn bfloat16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// A standard normal value, by the Box-Muller transform.
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let (u, v): (f64, f64) = (rng.random::<f64>().max(f64::MIN_POSITIVE), rng.random());
    ((-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seeking the generator to a value gives the same value as drawing up to it.
    #[test]
    fn values_do_not_depend_on_chunks() {
        let mut one = ChaCha8Rng::seed_from_u64(3);
        let passed: Vec<f32> = (0..1000).map(|_| normal(&mut one)).collect();
        for at in [0u128, 1, 7, 16, 500, 999] {
            let mut other = ChaCha8Rng::seed_from_u64(3);
            other.set_word_pos(WORDS * at);
            assert_eq!(normal(&mut other), passed[at as usize]);
        }
    }

    #[test]
    fn bfloat16_rounds_to_the_nearest_even() {
        assert_eq!(bfloat16(1.0), 0x3f80);
        assert_eq!(bfloat16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(bfloat16(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(bfloat16(f32::from_bits(0xbf80_8001)), 0xbf81);
    }
}
