//! Size and checksum of every file in a folder that a run wrote, and whether they still hold.
//!
//! CRC-32C finds every burst of up to 32 bits that changed, and misses other damage once in four thousand million times. CPUs compute
//! it at the speed of memory, so that neither writing nor checking a large checkpoint takes longer for it. It is no proof against
//! somebody who forges files on purpose.

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

/// What a thread reads at a time.
const CHUNK: u64 = 4 << 20;

/// What is known of the content of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sum {
    /// Its size.
    pub bytes: u64,
    /// CRC-32C over all of it.
    pub crc32c: u32,
}

impl Sum {
    /// Of nothing yet.
    pub const EMPTY: Self = Self { bytes: 0, crc32c: 0 };

    /// Takes in what follows.
    #[must_use]
    pub fn and(self, data: &[u8]) -> Self {
        Self { bytes: self.bytes + data.len() as u64, crc32c: crc32c::crc32c_append(self.crc32c, data) }
    }

    /// Takes in the sum of what follows.
    #[must_use]
    pub fn then(self, next: Self) -> Self {
        Self {
            bytes: self.bytes + next.bytes,
            crc32c: crc32c::crc32c_combine(self.crc32c, next.crc32c, next.bytes as usize),
        }
    }

    /// Reads a file, on all threads.
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

    /// What is wrong with a file that should have this sum. Without `bytes` only its size is looked at.
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

/// Holds the model or adapter in a folder against what the run that wrote it noted down. Damaged weights are an error. Other files are
/// edited on purpose now and then: what changed is named in the sentence that is returned. A folder of somebody else passes.
/// Without `bytes` only the sizes of files that are there are compared: a rank that gets its weights from rank 0 needs none.
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

/// Files of a folder that its manifest names, or that of the folder around it, as for `final/merged`.
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

/// Every file below a folder but the manifest itself, by its path from there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    files: BTreeMap<String, Sum>,
}

/// The first file that is not what it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Its path from the folder.
    pub file: String,
    /// What is wrong with it.
    pub what: String,
}

impl Damage {
    /// A file that something is wrong with.
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
    /// Of what the folder holds now. Files whose sums are `known`, because they were taken while writing, are not read again.
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

    /// Writes it into the folder.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        fs::write(dir.join(MANIFEST), serde_json::to_string_pretty(self)? + "\n")
    }

    /// The folder's own; none in folders of before there were any.
    pub fn read(dir: &Path) -> Result<Option<Self>, Damage> {
        let text = match files::read_to_string(&dir.join(MANIFEST)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|error| Damage::new(MANIFEST, format!("cannot be read: {error}")))?,
        };
        let manifest = serde_json::from_str(&text);
        manifest.map(Some).map_err(|error| Damage::new(MANIFEST, format!("is torn: {error}")))
    }

    /// Compares the size of every file with what it was, which costs nothing.
    pub fn verify_sizes(&self, dir: &Path) -> Result<(), Damage> {
        self.find_damage(dir, false)
    }

    fn find_damage(&self, dir: &Path, bytes: bool) -> Result<(), Damage> {
        let damage = |(file, sum): (&String, &Sum)| {
            sum.find_damage(&dir.join(file), bytes).map(|what| Damage::new(file, what))
        };
        self.files.iter().find_map(damage).map_or(Ok(()), Err)
    }

    /// Compares every file with what it was: first all sizes, then all bytes.
    pub fn verify(&self, dir: &Path) -> Result<(), Damage> {
        self.verify_sizes(dir)?;
        self.find_damage(dir, true)
    }

    /// Whether the folder holds anything else.
    pub fn has_strangers(&self, dir: &Path) -> io::Result<bool> {
        let own = |path: &PathBuf| {
            let relative = path.strip_prefix(dir).unwrap_or(path).to_string_lossy();
            relative == MANIFEST || self.contains(&relative)
        };
        Ok(!below(dir)?.iter().all(own))
    }

    /// Removes its files and itself from the folder, and leaves the others.
    pub fn remove_files(&self, dir: &Path) -> io::Result<()> {
        for file in self.files.keys().map(String::as_str).chain([MANIFEST]) {
            // A path that leads out of the folder is none that was written.
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

    /// Bytes of all files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.values().map(|sum| sum.bytes).sum()
    }

    /// Whether it has this file.
    #[must_use]
    pub fn contains(&self, file: &str) -> bool {
        self.files.contains_key(file)
    }
}

/// Links are not followed.
fn below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() { found.extend(below(&path)?) } else { found.push(path) }
    }
    Ok(found)
}

/// Folders that hold nothing any more go, but for the outermost.
fn prune(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            prune(&entry.path())?;
            // One that still holds something stays.
            let _ = fs::remove_dir(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Several chunks, and a file in a folder below.
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
    fn sums_are_those_of_rfc_3720_however_they_are_taken() {
        assert_eq!(Sum::EMPTY.and(&[0; 32]).crc32c, 0x8a91_36aa);
        let dir = folder();
        let bytes = fs::read(dir.path().join("large")).unwrap();
        let whole = Sum::EMPTY.and(&bytes);
        assert_eq!(Sum::of_file(&dir.path().join("large")).unwrap(), whole);
        assert_eq!(Sum::EMPTY.and(&bytes[..7]).then(Sum::EMPTY.and(&bytes[7..])), whole);
    }

    #[test]
    fn what_is_untouched_holds_and_new_files_do_not_matter() {
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
    fn a_start_with_damaged_weights_is_refused_and_an_edited_file_is_named() {
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
    fn every_damage_is_named() {
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
