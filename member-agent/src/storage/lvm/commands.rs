//! What is said to LVM, and what it answers.

use std::path::PathBuf;

use serde::Deserialize;

use super::is_volume;
use crate::step::Refusal;
use crate::storage::words::VolumeState;

/// The thin pool that all volumes are in.
pub(super) const POOL: &str = "pool";
/// Before the name of a volume that is to take another's place, and of the one whose place it takes.
pub(super) const NEW: &str = "new-";
pub(super) const OLD: &str = "old-";

/// A volume group.
#[derive(Debug, Clone)]
pub(super) struct Group {
    pub name: String,
    pub devices: Vec<String>,
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

impl Group {
    /// Where the kernel shows a volume.
    pub fn path(&self, volume: &str) -> PathBuf {
        PathBuf::from("/dev").join(&self.name).join(volume)
    }

    fn one(&self, volume: &str) -> String {
        format!("{}/{volume}", self.name)
    }

    /// What makes the group and its pool.
    pub fn create(&self) -> Vec<Vec<String>> {
        let devices = self.devices.clone();
        let pool = ["lvcreate", "-q", "-y", "--type", "thin-pool", "-l", "95%FREE", "-n", POOL, &self.name];
        vec![
            [words(&["pvcreate", "-q", "-y", "-ff"]), devices.clone()].concat(),
            [words(&["vgcreate", "-q", &self.name]), devices].concat(),
            words(&pool),
        ]
    }

    /// What removes them.
    pub fn destroy(&self) -> Vec<Vec<String>> {
        let devices = self.devices.clone();
        vec![words(&["vgremove", "-q", "-f", "-y", &self.name]), [words(&["pvremove", "-q", "-y"]), devices].concat()]
    }

    /// Volumes become block devices, or cease to be.
    pub fn activate(&self, active: bool) -> Vec<String> {
        words(&["vgchange", "-q", if active { "-ay" } else { "-an" }, &self.name])
    }

    /// A single one becomes a block device, also a snapshot.
    pub fn activate_one(&self, volume: &str) -> Vec<String> {
        words(&["lvchange", "-q", "-ay", "-K", &self.one(volume)])
    }

    /// An empty volume.
    pub fn make(&self, volume: &str, size: u64) -> Vec<String> {
        let size = format!("{size}b");
        words(&["lvcreate", "-q", "-y", "-V", &size, "-n", volume, "--thinpool", &self.one(POOL)])
    }

    /// A volume as of now under another name.
    pub fn branch(&self, volume: &str, into: &str, read_only: bool) -> Vec<String> {
        let permission = if read_only { "r" } else { "rw" };
        words(&["lvcreate", "-q", "-y", "-s", "-kn", "-p", permission, "-n", into, &self.one(volume)])
    }

    /// A larger one.
    pub fn resize(&self, volume: &str, size: u64) -> Vec<String> {
        words(&["lvresize", "-q", "-L", &format!("{size}b"), &self.one(volume)])
    }

    /// Another name.
    pub fn rename(&self, from: &str, to: &str) -> Vec<String> {
        words(&["lvrename", "-q", &self.name, from, to])
    }

    /// None any more.
    pub fn remove(&self, volume: &str) -> Vec<String> {
        words(&["lvremove", "-q", "-f", "-y", &self.one(volume)])
    }

    /// All there is to know of the volumes.
    pub fn report(&self) -> Vec<String> {
        let columns = "lv_name,lv_size,lv_attr,data_percent,origin";
        let format = ["lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", columns];
        [words(&format), vec![self.name.clone()]].concat()
    }

    /// Whose the devices are.
    pub fn probe(&self) -> Vec<String> {
        [words(&["pvs", "--noheadings", "-o", "vg_name"]), self.devices.clone()].concat()
    }
}

/// One logical volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Logical {
    pub name: String,
    pub size: u64,
    pub used: u64,
    pub read_only: bool,
    pub open: bool,
    pub origin: String,
}

impl Logical {
    /// As the master is told; none: it is none that the master knows.
    pub fn state(&self) -> Option<VolumeState> {
        Some(VolumeState {
            vdi: Some(self.name.parse().ok()?),
            location: self.name.clone(),
            virtual_size: self.size,
            physical_utilisation: self.used,
            read_only: self.read_only,
            parent: self.origin.clone(),
            name: String::new(),
            kind: "user".to_owned(),
        })
    }
}

/// What LVM says of a group.
#[derive(Debug, PartialEq, Eq, Default)]
pub(super) struct Report {
    pub pool_size: u64,
    pub pool_used: u64,
    pub volumes: Vec<Logical>,
}

#[derive(Deserialize)]
struct Said {
    report: Vec<Part>,
}

#[derive(Deserialize)]
struct Part {
    lv: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    lv_name: String,
    lv_size: String,
    lv_attr: String,
    #[serde(default)]
    data_percent: String,
    #[serde(default)]
    origin: String,
}

impl Report {
    /// Reads the answer to [`Group::report`].
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        let said: Said = serde_json::from_str(text).map_err(|error| Refusal::failed(format!("lvs: {error}")))?;
        let mut report = Self::default();
        for row in said.report.into_iter().flat_map(|part| part.lv) {
            let size: u64 = row.lv_size.parse().unwrap_or_default();
            let used = part_of(size, &row.data_percent);
            if !is_volume(&row.lv_name) {
                (report.pool_size, report.pool_used) = (size, used);
                continue;
            }
            let attribute = |at: usize| row.lv_attr.as_bytes().get(at).copied().unwrap_or(b'-');
            report.volumes.push(Logical {
                name: row.lv_name,
                size,
                used,
                read_only: matches!(attribute(1), b'r' | b'R'),
                open: attribute(5) == b'o',
                origin: row.origin,
            });
        }
        Ok(report)
    }
}

/// "12.34" per cent of a size, without going through floating point.
fn part_of(size: u64, percent: &str) -> u64 {
    let (whole, part) = percent.split_once('.').unwrap_or((percent, "0"));
    let hundredths = format!("{whole}{part:0<2.2}").parse::<u128>().unwrap_or_default();
    u64::try_from(u128::from(size) * hundredths / 10_000).unwrap_or(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn what_lvs_says_is_understood() {
        let vdi = Uuid::from_u128(7);
        let text = format!(
            r#"{{"report":[{{"lv":[
                {{"lv_name":"pool","lv_size":"1000000","lv_attr":"twi-aotz--","data_percent":"12.34","origin":""}},
                {{"lv_name":"{vdi}","lv_size":"8192","lv_attr":"Vri-aotz--","data_percent":"50.00","origin":"x"}}
            ]}}]}}"#
        );
        let report = Report::parse(&text).expect("parses");
        assert_eq!((report.pool_size, report.pool_used), (1_000_000, 123_400));
        let [volume] = report.volumes.as_slice() else { panic!("one volume") };
        assert_eq!((volume.used, volume.read_only, volume.open), (4096, true, true));
        assert_eq!(volume.state().expect("a VDI").vdi, Some(vdi));
        assert!(Report::parse("junk").is_err());
    }

    #[test]
    fn shares_of_a_size_are_whole_bytes() {
        assert_eq!((part_of(10_000, "0.05"), part_of(10_000, "100.00"), part_of(10_000, "7")), (5, 10_000, 700));
        assert_eq!(part_of(10_000, ""), 0);
    }
}
