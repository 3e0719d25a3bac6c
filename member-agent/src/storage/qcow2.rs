//! The head of a qcow2 image: its size and what is below it. Read here, because a scan reads hundreds of them, also
//! of images that guests have open; written only by qemu-img and QEMU.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::step::ImageFormat;

const MAGIC: [u8; 4] = *b"QFI\xfb";
const BACKING_FORMAT: u32 = 0xe279_2aca;
const CORRUPT: u64 = 1 << 1;
const LONGEST_NAME: usize = 1023;

/// What the head says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    pub virtual_size: u64,
    /// Name of the image below, as it is written.
    pub below: Option<String>,
    pub below_format: ImageFormat,
    /// QEMU found it damaged and wrote that down.
    pub corrupt: bool,
}

/// Reads it; `InvalidData` is an image that is none.
pub(super) fn head(path: &Path) -> io::Result<Head> {
    let mut file = File::open(path)?;
    let mut fixed = [0; 104];
    let damaged = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    file.read_exact(&mut fixed[..72]).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => damaged("the file is too short"),
        _ => error,
    })?;
    let word = |at: usize| u32::from_be_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
    let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
    if fixed[..4] != MAGIC {
        return Err(damaged("it does not begin as a qcow2 image does"));
    }
    let version = word(4);
    if !(2..=3).contains(&version) {
        return Err(damaged("it is of a version that is not known"));
    }
    let (at, length, virtual_size) = (long(8), word(16) as usize, long(24));
    if length > LONGEST_NAME {
        return Err(damaged("the name of the image below is too long"));
    }
    let below = if at == 0 || length == 0 {
        None
    } else {
        let mut name = vec![0; length];
        file.read_exact_at(&mut name, at)?;
        Some(String::from_utf8(name).map_err(|_| damaged("the name of the image below is no text"))?)
    };
    let mut head = Head { virtual_size, below, below_format: ImageFormat::Qcow2, corrupt: false };
    let mut extensions = 72;
    if version == 3 {
        file.read_exact_at(&mut fixed[72..], 72)?;
        let word = |at: usize| u32::from_be_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
        head.corrupt = (u64::from(word(72)) << 32 | u64::from(word(76))) & CORRUPT != 0;
        extensions = u64::from(word(100));
    }
    // Extensions: type, length, content filled up to eight bytes; the first of type 0 is the end.
    for _ in 0..64 {
        let mut extension = [0; 8];
        if file.read_exact_at(&mut extension, extensions).is_err() {
            break;
        }
        let (head_of, length) = extension.split_at(4);
        let number = |bytes: &[u8]| bytes.iter().fold(0_u32, |number, byte| number << 8 | u32::from(*byte));
        let (kind, length) = (number(head_of), number(length));
        if kind == 0 {
            break;
        }
        if kind == BACKING_FORMAT && length <= 16 {
            let mut name = vec![0; length as usize];
            file.read_exact_at(&mut name, extensions + 8)?;
            if name == b"raw" {
                head.below_format = ImageFormat::Raw;
            }
        }
        extensions += 8 + u64::from(length).next_multiple_of(8);
    }
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn qemu_img(dir: &Path, arguments: &[&str]) {
        let status = Command::new("qemu-img").args(arguments).current_dir(dir).status().expect("qemu-img runs");
        assert!(status.success(), "qemu-img {arguments:?}");
    }

    #[test]
    fn the_head_says_what_qemu_img_wrote() {
        let dir = tempfile::tempdir().expect("directory");
        qemu_img(dir.path(), &["create", "-q", "-f", "raw", "a.raw", "4M"]);
        qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "a.raw", "b.qcow2", "8M"]);
        qemu_img(
            dir.path(),
            &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "-F", "qcow2", "-b", "b.qcow2", "c.qcow2"],
        );
        let b = head(&dir.path().join("b.qcow2")).expect("head");
        assert_eq!((b.virtual_size, b.below.as_deref(), b.below_format), (8 << 20, Some("a.raw"), ImageFormat::Raw));
        let c = head(&dir.path().join("c.qcow2")).expect("head");
        assert_eq!(
            (c.virtual_size, c.below.as_deref(), c.below_format),
            (8 << 20, Some("b.qcow2"), ImageFormat::Qcow2)
        );
        assert!(!c.corrupt);
    }

    #[test]
    fn what_is_no_image_is_damaged_and_not_a_panic() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("x.qcow2");
        for content in [&b""[..], b"QFI\xfb", &[0xff; 200], &[b"QFI\xfb\0\0\0\x03".as_slice(), &[0xff; 200]].concat()] {
            std::fs::write(&path, content).expect("write");
            assert_eq!(head(&path).expect_err("no image").kind(), io::ErrorKind::InvalidData, "{content:?}");
        }
    }
}
