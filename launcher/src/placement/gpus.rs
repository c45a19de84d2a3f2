//! GPUs that a process started here would see: those of the driver, restricted by `CUDA_VISIBLE_DEVICES`.
//!
//! CUDA silently ignores an invalid entry of that list and all entries after it. Here such an entry is an error, so that no run silently
//! uses fewer GPUs than the user asked for, or none.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use dyad_proto::counted;

/// GPUs of a machine, from the kernel driver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Present {
    /// Number of GPUs.
    pub count: u32,
    /// UUIDs of all GPUs, in the order of PCI bus ids; empty if the driver does not tell.
    pub uuids: Vec<String>,
}

impl Present {
    /// Reads the driver's list in `/proc` below `root`. Some sandboxes hide it; then counts the device files in `/dev`.
    #[must_use]
    pub fn read(root: &Path) -> Self {
        let mut folders: Vec<_> = std::fs::read_dir(root.join("proc/driver/nvidia/gpus"))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect();
        // By PCI bus id.
        folders.sort_unstable();
        let information = |folder: &PathBuf| dyad_proto::files::of_kernel(folder.join("information"));
        let listed: Vec<_> = folders.iter().map(|folder| information(folder).unwrap_or_default()).collect();
        if listed.is_empty() {
            return Self { count: device_files(&root.join("dev")), uuids: Vec::new() };
        }
        let uuid = |text: &String| {
            let line = text.lines().find_map(|line| line.strip_prefix("GPU UUID:"))?;
            // The driver writes question marks until a GPU is first used.
            Some(line.trim().to_owned()).filter(|uuid| uuid.starts_with("GPU-") && !uuid.contains('?'))
        };
        let uuids: Vec<String> = listed.iter().filter_map(uuid).collect();
        let known = uuids.len() == listed.len();
        Self { count: listed.len() as u32, uuids: if known { uuids } else { Vec::new() } }
    }

    /// Number of GPUs that remain visible with this value of `CUDA_VISIBLE_DEVICES`, or what is wrong with the value.
    pub fn visible(&self, chosen: Option<&str>) -> Result<u32, String> {
        let Some(list) = chosen else { return Ok(self.count) };
        let seen = self.entries(list)?;
        // A process sees only one MIG slice, even if the list names several.
        let slices = seen.iter().filter(|entry| matches!(entry, VisibleGpu::Slice(_))).count();
        Ok(if slices > 0 { 1 } else { seen.len() as u32 })
    }

    /// Places of the visible GPUs in the order of PCI bus ids, as `cuda:0`, `cuda:1`, … name them; `None` if they are unknown.
    #[must_use]
    pub fn places(&self, chosen: Option<&str>) -> Option<Vec<usize>> {
        let Some(list) = chosen else { return Some((0..self.count as usize).collect()) };
        let place = |entry: &VisibleGpu<'_>| match entry {
            VisibleGpu::Index(index) => Some(*index as usize),
            VisibleGpu::Uuid(start) => self.uuids.iter().position(|uuid| uuid.starts_with(start)),
            VisibleGpu::Slice(_) | VisibleGpu::End => None,
        };
        self.entries(list).ok()?.iter().map(place).collect()
    }

    /// The list's entries up to the first that ends it.
    fn entries<'a>(&self, list: &'a str) -> Result<Vec<VisibleGpu<'a>>, String> {
        let mut seen: Vec<VisibleGpu<'_>> = Vec::new();
        for text in list.split(',').map(str::trim) {
            let entry = match self.entry(text, list)? {
                // CUDA ignores the rest.
                VisibleGpu::End => break,
                entry => entry,
            };
            if seen.contains(&entry) {
                return Err(format!(
                    "CUDA_VISIBLE_DEVICES={list} names {text} twice, and CUDA then shows no GPU"
                ));
            }
            seen.push(entry);
        }
        Ok(seen)
    }

    fn entry<'a>(&self, text: &'a str, list: &str) -> Result<VisibleGpu<'a>, String> {
        let unknown = |why: String| Err(format!("CUDA_VISIBLE_DEVICES={list}: {why}"));
        // Slurm sets NoDevFiles for no GPU, NVIDIA's container toolkit none or void.
        if text.is_empty()
            || text == "-1"
            || ["nodevfiles", "none", "void"].contains(&text.to_ascii_lowercase().as_str())
        {
            return Ok(VisibleGpu::End);
        }
        if self.count == 0 {
            return unknown(format!("it names GPU {text}, and this machine shows none"));
        }
        if text.starts_with("MIG-") {
            return Ok(VisibleGpu::Slice(text));
        }
        if text.starts_with("GPU-") {
            let matching = self.uuids.iter().filter(|uuid| uuid.starts_with(text)).count();
            return match (self.uuids.is_empty(), matching) {
                (true, _) | (_, 1) => Ok(VisibleGpu::Uuid(text)),
                (_, 0) => unknown(format!("this machine has no GPU {text}")),
                _ => unknown(format!("{text} begins the name of {}", counted(matching, "GPU"))),
            };
        }
        match text.parse::<u32>() {
            Ok(index) if index < self.count => Ok(VisibleGpu::Index(index)),
            Ok(index) => unknown(format!("this machine has no GPU {index}, it has {}", count(self.count))),
            Err(_) => unknown(format!("\"{text}\" is no GPU")),
        }
    }
}

/// An entry of `CUDA_VISIBLE_DEVICES`.
#[derive(Debug, PartialEq, Eq)]
enum VisibleGpu<'a> {
    Index(u32),
    Uuid(&'a str),
    Slice(&'a str),
    End,
}

/// `1 GPU`, `8 GPUs`.
#[must_use]
pub fn count(gpus: u32) -> String {
    counted(gpus, "GPU")
}

/// Number of device files `nvidia0`, `nvidia1`, …
fn device_files(folder: &Path) -> u32 {
    let names = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let of_a_gpu =
        |name: &String| name.strip_prefix("nvidia").is_some_and(|number| number.parse::<u32>().is_ok());
    names.filter(of_a_gpu).count() as u32
}

/// GPUs per node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gpus {
    /// All GPUs of the machine, divided among its nodes.
    Auto,
    /// Exactly this many.
    Count(u32),
}

impl FromStr for Gpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            number => number.parse().map(Self::Count).map_err(|_| "expected a number or auto".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, name: &str, text: &str) {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    /// Some sandboxes hide the driver's list in /proc.
    #[test]
    fn device_files_are_counted_if_the_driver_lists_no_gpus() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(Present::read(root.path()), Present::default());
        for name in ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"] {
            write(root.path(), &format!("dev/{name}"), "");
        }
        assert_eq!(Present::read(root.path()), Present { count: 2, uuids: Vec::new() });
    }

    #[test]
    fn driver_list_has_priority_over_device_files_and_has_uuids() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "dev/nvidia0", "");
        for (bus, uuid) in [("0000:01:00.0", "GPU-aa11"), ("0000:02:00.0", "GPU-ab22")] {
            let text = format!("Model: \t X\nGPU UUID: \t {uuid}\n");
            write(root.path(), &format!("proc/driver/nvidia/gpus/{bus}/information"), &text);
        }
        let present = Present::read(root.path());
        assert_eq!(present, Present { count: 2, uuids: vec!["GPU-aa11".into(), "GPU-ab22".into()] });
        write(root.path(), "proc/driver/nvidia/gpus/0000:03:00.0/information", "GPU UUID: \t GPU-????????\n");
        assert_eq!(Present::read(root.path()), Present { count: 3, uuids: Vec::new() });
    }

    #[test]
    fn visible_devices_are_counted_as_cuda_counts_them() {
        let four = Present {
            count: 4,
            uuids: ["GPU-aa11", "GPU-ab22", "GPU-cc", "GPU-dd"].map(str::to_owned).into(),
        };
        let hidden = Present { count: 4, uuids: Vec::new() };
        for (chosen, left) in [
            (None, 4),
            (Some(""), 0),
            (Some("-1"), 0),
            (Some("NoDevFiles"), 0),
            (Some("2"), 1),
            (Some(" 3, 0 "), 2),
            (Some("0,-1,2"), 1),
            (Some("GPU-aa,GPU-ab22"), 2),
            (Some("MIG-1,MIG-2"), 1),
        ] {
            assert_eq!(four.visible(chosen), Ok(left), "{chosen:?}");
        }
        assert_eq!(hidden.visible(Some("GPU-ffff")), Ok(1));
        for (chosen, places) in [
            (None, Some(vec![0, 1, 2, 3])),
            (Some("3,1"), Some(vec![3, 1])),
            (Some("GPU-cc,0"), Some(vec![2, 0])),
            (Some("2,-1,0"), Some(vec![2])),
            (Some("MIG-1"), None),
        ] {
            assert_eq!(four.places(chosen), places, "{chosen:?}");
        }
        assert_eq!(hidden.places(Some("GPU-ffff")), None);
        assert_eq!(Present::default().visible(Some("")), Ok(0));
    }

    #[test]
    fn errors_name_the_invalid_visible_device() {
        let two = Present { count: 2, uuids: vec!["GPU-aa11".into(), "GPU-ab22".into()] };
        for (chosen, words) in [
            ("0,9", "has no GPU 9, it has 2 GPUs"),
            ("1,1", "names 1 twice"),
            ("GPU-ff", "has no GPU GPU-ff"),
            ("GPU-a", "begins the name of 2 GPUs"),
            ("first", "\"first\" is no GPU"),
        ] {
            let said = two.visible(Some(chosen)).unwrap_err();
            assert!(said.contains(words) && said.contains(chosen), "{said}");
        }
        assert!(Present::default().visible(Some("0")).unwrap_err().contains("this machine shows none"));
    }
}
