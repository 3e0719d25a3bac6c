//! Small files that are whole or absent, whatever happens while they are written.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

/// Whether a file must survive the loss of power, or only the death of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durability {
    /// Page cache is enough: when the host loses power, what the file tells is gone as well.
    Process,
    /// Synced, and its name too.
    Power,
}

/// Replaces the file in one step; readable by its owner alone. Of one file only one at a time may be replaced.
pub(crate) fn replace(path: &Path, content: &[u8], durability: Durability) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".new");
    let fresh = path.with_file_name(name);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    file.write_all(content)?;
    if durability == Durability::Power {
        file.sync_all()?;
    }
    fs::rename(&fresh, path)?;
    if durability == Durability::Power {
        sync_directory(path)?;
    }
    Ok(())
}

/// Makes the names in the directory of `path` durable.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

/// The last `limit` bytes of a file as text, in lines; empty when it cannot be read.
pub(crate) fn tail(path: &Path, limit: usize) -> String {
    let content = fs::read(path).unwrap_or_default();
    let start = content.len().saturating_sub(limit);
    String::from_utf8_lossy(&content[start..]).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_holds_the_new_content_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("a.json");
        replace(&path, b"one", Durability::Process).expect("write");
        replace(&path, b"two", Durability::Power).expect("write");
        assert_eq!(tail(&path, 10), "two");
        assert_eq!(tail(&path, 2), "wo");
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1);
    }
}
