//! Manifest of a folder that a run wrote: size and checksum of every file.
//!
//! CRC-32C detects every error burst of up to 32 bits, and misses other damage in one of four thousand million cases. CPUs compute it
//! as fast as they read memory, so it does not slow down writing or checking a large checkpoint. It does not protect against deliberate
//! forgery.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::run_folder::{MANIFEST, OPTIMIZER};
use crate::{Fault, counted, files, reading};

/// Bytes that a thread reads at a time.
const CHUNK: u64 = 4 << 20;

/// Size and checksum of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sum {
    /// Size in bytes.
    pub bytes: u64,
    /// CRC-32C over all of it.
    pub crc32c: u32,
}

impl Sum {
    /// Sum of an empty file.
    pub const EMPTY: Self = Self { bytes: 0, crc32c: 0 };

    /// The sum after appending `data`.
    #[must_use]
    pub fn and(self, data: &[u8]) -> Self {
        Self { bytes: self.bytes + data.len() as u64, crc32c: crc32c::crc32c_append(self.crc32c, data) }
    }

    /// The sum after appending data with the sum `next`.
    #[must_use]
    pub fn then(self, next: Self) -> Self {
        Self {
            bytes: self.bytes + next.bytes,
            crc32c: crc32c::crc32c_combine(self.crc32c, next.crc32c, next.bytes as usize),
        }
    }

    /// Computes the sum of a file, on all threads.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        let file = files::open(path)?;
        let bytes = file.metadata()?.len();
        let chunk = |buffer: &mut Vec<u8>, start: u64| {
            let buffer = &mut buffer[..CHUNK.min(bytes - start) as usize];
            file.read_exact_at(buffer, start)?;
            reading::goes_on();
            Ok(Self::EMPTY.and(buffer))
        };
        let chunks = (0..bytes.div_ceil(CHUNK)).into_par_iter();
        let sums = chunks.map_init(|| vec![0; CHUNK as usize], |buffer, index| chunk(buffer, index * CHUNK));
        sums.try_reduce(|| Self::EMPTY, |sum, next| Ok(sum.then(next)))
    }

    /// Describes the damage of a file that should have this sum; `None` if there is none. Without `bytes`, checks only the size.
    fn find_damage(&self, path: &Path, bytes: bool) -> Option<String> {
        let found = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Some("is missing".into()),
            Err(error) => return Some(format!("cannot be read: {error}")),
            Ok(found) => found.len(),
        };
        if found != self.bytes {
            return Some(format!("has {}, not {}", counted(found, "byte"), self.bytes));
        }
        if !bytes {
            return None;
        }
        match Self::of_file(path) {
            Err(error) => Some(format!("cannot be read: {error}")),
            Ok(found) if found != *self => Some("has other bytes than were written".into()),
            Ok(_) => None,
        }
    }
}

/// Compares the model or adapter in a folder with its manifest. Fails if weights are damaged. Users may edit other files on purpose:
/// the returned sentence names those that changed. Returns `None` if nothing changed or if the folder has no manifest. Without `bytes`,
/// compares only the sizes of existing files: a rank that gets its weights from rank 0 does not need the files.
pub fn check_start(dir: &Path, bytes: bool) -> Result<Option<String>, Fault> {
    let unusable = |damage: &Damage| {
        Fault::input(format!("{} is damaged: {damage}", dir.display())).hint(format!(
            "copy it again, or train it again; if it was changed on purpose, remove {MANIFEST} from it"
        ))
    };
    let Some(files) = noted(dir).map_err(|damage| unusable(&damage))? else { return Ok(None) };
    let mut edited = Vec::new();
    for (file, sum) in files.iter().filter(|(file, _)| !OPTIMIZER.eq(*file)) {
        let path = dir.join(file);
        let absent = fs::metadata(&path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        if absent && !bytes {
            continue;
        }
        let damage = match sum.find_damage(&path, bytes) {
            Some(what) => Damage::new(file, what),
            None => continue,
        };
        if file.ends_with(".safetensors") {
            return Err(unusable(&damage));
        }
        edited.push(damage.to_string());
    }
    let path = dir.display();
    Ok((!edited.is_empty()).then(|| format!("{path} is not as the run left it: {}", edited.join(", "))))
}

/// Files of a folder that its own manifest names or, as for `final/merged`, its parent's.
fn noted(dir: &Path) -> Result<Option<BTreeMap<String, Sum>>, Damage> {
    if let Some(manifest) = Manifest::read(dir)? {
        let own = manifest.files.into_iter().filter(|(file, _)| !file.contains('/'));
        return Ok(Some(own.collect()));
    }
    let (Some(around), Some(name)) = (dir.parent(), dir.file_name()) else { return Ok(None) };
    let Some(manifest) = Manifest::read(around)? else { return Ok(None) };
    let prefix = format!("{}/", name.to_string_lossy());
    let own = |(file, sum): (String, Sum)| Some((file.strip_prefix(&prefix)?.to_owned(), sum));
    let own: BTreeMap<String, Sum> = manifest.files.into_iter().filter_map(own).collect();
    Ok((!own.is_empty()).then_some(own))
}

/// All files below a folder except the manifest itself, by relative path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    files: BTreeMap<String, Sum>,
}

/// A damaged file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Path relative to the folder.
    pub file: String,
    /// The damage; follows the path in messages.
    pub what: String,
}

impl Damage {
    /// Damage of a file.
    pub fn new(file: impl Into<String>, what: impl Into<String>) -> Self {
        Self { file: file.into(), what: what.into() }
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.file, self.what)
    }
}

impl Manifest {
    /// Makes a manifest of the folder's current content. Files in `known`, whose sums were computed while writing, are not read again.
    pub fn of(dir: &Path, known: &BTreeMap<PathBuf, Sum>) -> io::Result<Self> {
        let mut files = BTreeMap::new();
        for path in below(dir)? {
            let sum = match known.get(&path) {
                Some(sum) => *sum,
                None => Sum::of_file(&path)?,
            };
            let relative = path.strip_prefix(dir).unwrap_or(&path);
            files.insert(relative.to_string_lossy().into_owned(), sum);
        }
        files.remove(MANIFEST);
        Ok(Self { files })
    }

    /// Writes the manifest into the folder.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        fs::write(dir.join(MANIFEST), serde_json::to_string_pretty(self)? + "\n")
    }

    /// Reads the folder's manifest; `None` if it has none, as in folders of earlier versions.
    pub fn read(dir: &Path) -> Result<Option<Self>, Damage> {
        let text = match files::read_to_string(&dir.join(MANIFEST)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|error| Damage::new(MANIFEST, format!("cannot be read: {error}")))?,
        };
        let manifest = serde_json::from_str(&text);
        manifest.map(Some).map_err(|error| Damage::new(MANIFEST, format!("is torn: {error}")))
    }

    /// Compares the size of every file with the manifest, without reading the files.
    pub fn verify_sizes(&self, dir: &Path) -> Result<(), Damage> {
        self.find_damage(dir, false)
    }

    fn find_damage(&self, dir: &Path, bytes: bool) -> Result<(), Damage> {
        let damage = |(file, sum): (&String, &Sum)| {
            sum.find_damage(&dir.join(file), bytes).map(|what| Damage::new(file, what))
        };
        self.files.iter().find_map(damage).map_or(Ok(()), Err)
    }

    /// Compares every file with the manifest: first all sizes, then all bytes.
    pub fn verify(&self, dir: &Path) -> Result<(), Damage> {
        self.verify_sizes(dir)?;
        self.find_damage(dir, true)
    }

    /// Whether the folder holds files that are not in the manifest.
    pub fn has_strangers(&self, dir: &Path) -> io::Result<bool> {
        let own = |path: &PathBuf| {
            let relative = path.strip_prefix(dir).unwrap_or(path).to_string_lossy();
            relative == MANIFEST || self.contains(&relative)
        };
        Ok(!below(dir)?.iter().all(own))
    }

    /// Removes the manifest and its files from the folder; keeps other files.
    pub fn remove_files(&self, dir: &Path) -> io::Result<()> {
        for file in self.files.keys().map(String::as_str).chain([MANIFEST]) {
            // Skip paths that lead out of the folder: Dyad writes no such entry.
            if !Path::new(file).components().all(|part| matches!(part, Component::Normal(_))) {
                continue;
            }
            match fs::remove_file(dir.join(file)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        prune(dir)
    }

    /// Total bytes of all files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.values().map(|sum| sum.bytes).sum()
    }

    /// Whether the manifest names this file.
    #[must_use]
    pub fn contains(&self, file: &str) -> bool {
        self.files.contains_key(file)
    }
}

/// All files below a folder, recursively. Does not follow links.
fn below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() { found.extend(below(&path)?) } else { found.push(path) }
    }
    Ok(found)
}

/// Removes empty folders below `dir`, but not `dir` itself.
fn prune(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            prune(&entry.path())?;
            // Fails for a folder that is not empty; it stays.
            let _ = fs::remove_dir(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with a file of several chunks, a file in a subfolder, and an empty file.
    fn folder() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let large: Vec<u8> = (0..2 * CHUNK + 5).map(|index| (index % 251) as u8).collect();
        fs::write(dir.path().join("large"), large).unwrap();
        fs::create_dir(dir.path().join("below")).unwrap();
        fs::write(dir.path().join("below/small"), "text").unwrap();
        fs::write(dir.path().join("empty"), "").unwrap();
        dir
    }

    #[test]
    fn sums_match_rfc_3720_in_one_piece_and_in_parts() {
        assert_eq!(Sum::EMPTY.and(&[0; 32]).crc32c, 0x8a91_36aa);
        let dir = folder();
        let bytes = fs::read(dir.path().join("large")).unwrap();
        let whole = Sum::EMPTY.and(&bytes);
        assert_eq!(Sum::of_file(&dir.path().join("large")).unwrap(), whole);
        assert_eq!(Sum::EMPTY.and(&bytes[..7]).then(Sum::EMPTY.and(&bytes[7..])), whole);
    }

    #[test]
    fn unchanged_files_verify_and_new_files_are_ignored() {
        let dir = folder();
        assert_eq!(Manifest::read(dir.path()), Ok(None));
        let manifest = Manifest::of(dir.path(), &BTreeMap::new()).unwrap();
        manifest.write(dir.path()).unwrap();
        fs::write(dir.path().join("notes.txt"), "of the user").unwrap();
        let read = Manifest::read(dir.path()).unwrap().unwrap();
        assert_eq!((read.verify(dir.path()), &read), (Ok(()), &manifest));
        assert_eq!(read.bytes(), 2 * CHUNK + 9);
        assert!(read.contains("below/small") && !read.contains(MANIFEST));
    }

    #[test]
    fn damaged_weights_are_refused_and_edited_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("final");
        fs::create_dir_all(model.join("merged")).unwrap();
        for file in ["model.safetensors", "merged/model.safetensors", "config.json", OPTIMIZER] {
            fs::write(model.join(file), "12345678").unwrap();
        }
        assert_eq!(check_start(&model, true), Ok(None), "a folder of somebody else");
        Manifest::of(&model, &BTreeMap::new()).unwrap().write(&model).unwrap();
        let merged = model.join("merged");
        fs::remove_file(model.join(OPTIMIZER)).unwrap();
        assert_eq!((check_start(&model, true), check_start(&merged, true)), (Ok(None), Ok(None)));
        fs::write(model.join("config.json"), "edited").unwrap();
        let said = check_start(&model, true).unwrap().unwrap();
        assert!(said.ends_with("is not as the run left it: config.json has 6 bytes, not 8"), "{said}");
        for (folder, file) in [(&model, "final"), (&merged, "merged")] {
            fs::write(folder.join("model.safetensors"), "12345679").unwrap();
            assert!(check_start(folder, false).is_ok());
            let fault = check_start(folder, true).unwrap_err();
            assert!(
                fault.message.contains(&format!("{file} is damaged: model.safetensors has other bytes")),
                "{fault}"
            );
            fs::write(folder.join("model.safetensors"), "short").unwrap();
            assert!(check_start(folder, false).is_err());
            fs::remove_file(folder.join("model.safetensors")).unwrap();
            assert_eq!(
                check_start(folder, false).map(|_| ()),
                Ok(()),
                "a rank that gets its weights from rank 0"
            );
            assert!(check_start(folder, true).unwrap_err().message.contains("model.safetensors is missing"));
        }
    }

    #[test]
    fn each_kind_of_damage_is_named() {
        let flip = |path: &Path| {
            let mut bytes = fs::read(path).unwrap();
            bytes[CHUNK as usize + 3] ^= 4;
            fs::write(path, bytes).unwrap();
        };
        type Damaging<'a> = (&'a str, &'a dyn Fn(&Path), &'a str);
        let cases: [Damaging<'_>; 5] = [
            ("large", &flip, "has other bytes than were written"),
            ("large", &|path| fs::write(path, "short").unwrap(), "has 5 bytes, not 8388613"),
            ("below/small", &|path| fs::remove_file(path).unwrap(), "is missing"),
            ("below/small", &|path| fs::write(path, "TEXT").unwrap(), "has other bytes than were written"),
            ("empty", &|path| fs::write(path, "x").unwrap(), "has 1 byte, not 0"),
        ];
        for (file, damage, what) in cases {
            let dir = folder();
            let manifest = Manifest::of(dir.path(), &BTreeMap::new()).unwrap();
            damage(&dir.path().join(file));
            assert_eq!(manifest.verify(dir.path()), Err(Damage::new(file, what)));
        }
        let dir = folder();
        fs::write(dir.path().join(MANIFEST), "{\"files\":").unwrap();
        assert!(
            Manifest::read(dir.path()).unwrap_err().to_string().starts_with("dyad_manifest.json is torn")
        );
    }
}
