//! A domain at rest: what precedes its memory in the image that it was suspended to.
//!
//! The first 64 KiB are a record of what was suspended, padded with zeros; the rest is the hypervisor's own. The record
//! is taken away before a suspend begins and written, durably, when all the rest is: an image without one is none,
//! however it came about. It says what the machine was like at the end, which after vCPUs have come and gone is not what
//! the spec of its start says.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::domain::{MIB, Reason, Refusal};

/// Where the hypervisor's own part begins.
const RECORD: usize = 64 * 1024;
const FORMAT: u32 = 1;
/// What a machine has to keep besides its memory: its screen, its firmware, its devices.
const BESIDES: u64 = 32 * MIB;

/// What was suspended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Saved {
    pub format: u32,
    /// Driver and version of what wrote it.
    pub driver: String,
    pub version: String,
    /// The kind of machine, in the driver's words.
    pub machine: String,
    pub vm: Uuid,
    /// The operation that suspended it.
    pub by: String,
    /// Bytes of memory it was built with, and vCPUs it had at the end.
    pub memory: u64,
    pub memory_actual: u64,
    pub memory_target: u64,
    pub vcpus: u32,
}

impl Saved {
    /// A record of a domain as it is, by one driver.
    pub fn new(driver: &str, version: &str, vm: Uuid, by: &str) -> Self {
        let (driver, version) = (driver.to_owned(), version.to_owned());
        let (machine, by) = (String::new(), by.to_owned());
        Self {
            format: FORMAT,
            driver,
            version,
            machine,
            vm,
            by,
            memory: 0,
            memory_actual: 0,
            memory_target: 0,
            vcpus: 0,
        }
    }

    /// Opens an image to suspend a domain of so many bytes to. From here on it holds none. It stands where the
    /// hypervisor's own part begins.
    pub fn begin(image: &Path, memory: u64) -> Result<File, Refusal> {
        let mut file = OpenOptions::new().read(true).write(true).open(image).map_err(|error| refusal(image, &error))?;
        let kind = file.metadata().map_err(Refusal::failed)?.file_type();
        // Anything else has no size of its own.
        if kind.is_file() || kind.is_block_device() {
            let size = file.seek(SeekFrom::End(0)).map_err(Refusal::failed)?;
            let needed = RECORD as u64 + memory + BESIDES;
            if size < needed {
                return Err(Refusal::space(needed, size));
            }
            file.rewind().map_err(Refusal::failed)?;
            let cleared = file.write_all(&vec![0; RECORD]).and_then(|()| file.sync_data());
            cleared.map_err(|error| refusal(image, &error))?;
            file.seek(SeekFrom::Start(RECORD as u64)).map_err(Refusal::failed)?;
        }
        Ok(file)
    }

    /// The rest is written: now it is an image of a domain.
    pub fn finish(&self, mut file: &File) -> io::Result<()> {
        let mut record = serde_json::to_vec(self)?;
        record.resize(RECORD, 0);
        file.sync_data()?;
        file.rewind()?;
        file.write_all(&record)?;
        file.sync_data()
    }

    /// Reads the record of an image, and leaves it standing where the hypervisor's own part begins.
    pub fn open(image: &Path) -> Result<(Self, File), Refusal> {
        let mut file = File::open(image).map_err(|error| refusal(image, &error))?;
        let none = |why: &str| Refusal::new(Reason::Damaged, format!("{}: {why}", image.display()));
        let mut record = vec![0; RECORD];
        file.read_exact(&mut record).map_err(|_| none("too short for a suspended domain"))?;
        let end = record.iter().position(|byte| *byte == 0).unwrap_or(RECORD);
        let saved: Self = serde_json::from_slice(&record[..end]).map_err(|_| none("holds no suspended domain"))?;
        if saved.format > FORMAT {
            return Err(none(&format!("has the newer format {}", saved.format)));
        }
        Ok((saved, file))
    }

    /// Whether the image is what this operation made of this VM.
    pub fn is_of(image: &Path, vm: Uuid, by: &str) -> bool {
        Self::open(image).is_ok_and(|(saved, _)| saved.vm == vm && saved.by == by)
    }
}

/// What is wrong with an image that does not open or takes no more.
fn refusal(image: &Path, error: &io::Error) -> Refusal {
    let reason = match error.kind() {
        io::ErrorKind::NotFound => Reason::NoSuchVolume,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Reason::NoSpace,
        _ => Reason::Failed,
    };
    Refusal::new(reason, format!("{}: {error}", image.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn an_image_is_one_only_after_all_of_it_is_written() {
        let dir = tempfile::tempdir().expect("directory");
        let image = dir.path().join("image");
        assert_eq!(Saved::begin(&image, MIB).expect_err("not there").reason, Reason::NoSuchVolume);
        File::create(&image).expect("create").set_len(40 * MIB).expect("size");
        let saved = Saved::new("sim", "1", Uuid::from_u128(1), "op");
        for _again in 0..2 {
            let mut file = Saved::begin(&image, MIB).expect("begin");
            assert_eq!(Saved::open(&image).expect_err("not yet").reason, Reason::Damaged);
            file.write_all(b"memory").expect("write");
            saved.finish(&file).expect("finish");
            let (read, mut rest) = Saved::open(&image).expect("whole");
            assert_eq!(read, saved);
            let mut memory = [0; 6];
            rest.read_exact(&mut memory).expect("read");
            assert_eq!(&memory, b"memory");
        }
        assert!(Saved::is_of(&image, saved.vm, "op") && !Saved::is_of(&image, saved.vm, "another"));
    }

    #[test]
    fn an_image_too_small_for_the_domain_is_said_so_before_anything_is_written() {
        let dir = tempfile::tempdir().expect("directory");
        let image = dir.path().join("image");
        fs::write(&image, vec![7; 4096]).expect("write");
        let refusal = Saved::begin(&image, MIB).expect_err("too small");
        assert_eq!((refusal.reason, refusal.available), (Reason::NoSpace, 4096));
        assert!(fs::read(&image).expect("read").iter().all(|byte| *byte == 7));
    }
}
