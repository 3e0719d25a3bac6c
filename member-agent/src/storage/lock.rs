//! The lock that QEMU and qemu-img keep on an image while they have it open: byte ranges of the file itself, which
//! belong to the open file and so end with the process.
//!
//! Byte 100 + n says "I use permission n", byte 200 + n says "I do not let others use it"; 1 is the permission to write.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

const WRITES: i64 = 101;
const LETS_NOBODY_WRITE: i64 = 201;

fn range(kind: libc::c_int, byte: i64) -> io::Result<libc::flock> {
    let narrow = |value: libc::c_int| libc::c_short::try_from(value).map_err(io::Error::other);
    Ok(libc::flock { l_type: narrow(kind)?, l_whence: narrow(libc::SEEK_SET)?, l_start: byte, l_len: 1, l_pid: 0 })
}

fn is_written(file: &File) -> io::Result<bool> {
    let mut lock = range(libc::F_WRLCK, WRITES)?;
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}

/// Whether somebody has the image open to write.
pub(super) fn written(path: &Path) -> io::Result<bool> {
    is_written(&File::open(path)?)
}

/// Nobody begins to write to the image while this is held.
#[derive(Debug)]
pub(super) struct Still {
    _file: File,
}

/// Keeps writers away from an image; none: there is one.
pub(super) fn still(path: &Path) -> io::Result<Option<Still>> {
    let file = File::open(path)?;
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, LETS_NOBODY_WRITE)?))?;
    Ok(if is_written(&file)? { None } else { Some(Still { _file: file }) })
}
