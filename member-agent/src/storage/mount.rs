//! File systems that a store brings with it, mounted below the agent's own directory.

use std::fs;
use std::path::{Path, PathBuf};

use super::Place;
use super::program::{SHORT, apart, trouble};
use crate::step::{Reason, Refusal};

/// Where a store's file system is mounted.
pub(super) fn point(place: &Place) -> PathBuf {
    place.site.state_dir.join("mounts").join(place.spec.sr.to_string())
}

/// What is mounted there, as the kernel says it.
pub(super) fn mounted(point: &Path) -> Option<String> {
    let point = fs::canonicalize(point).ok()?;
    let table = fs::read_to_string("/proc/self/mounts").ok()?;
    table.lines().rev().find_map(|line| {
        let mut words = line.split(' ');
        let (source, at) = (words.next()?, words.next()?);
        (Path::new(&plain(at)) == point).then(|| plain(source))
    })
}

/// Whether a device is mounted anywhere.
pub(super) fn device_mounted(device: &Path) -> bool {
    let Ok(device) = fs::canonicalize(device) else { return false };
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    table.lines().filter_map(|line| line.split(' ').next()).any(|source| Path::new(&plain(source)) == device)
}

/// The kernel writes spaces and their like as `\040`.
fn plain(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// Mounts, if it is not.
pub(super) async fn mount(place: &Place, arguments: &[String]) -> Result<PathBuf, Refusal> {
    let point = point(place);
    let at = point.clone();
    let already = apart(move || {
        fs::create_dir_all(&at).map_err(|error| trouble(&at, &error))?;
        Ok(mounted(&at).is_some())
    })
    .await?;
    if already {
        return Ok(point);
    }
    let arguments: Vec<_> = arguments.iter().cloned().chain([point.display().to_string()]).collect();
    let outcome = place.site.programs.run(Path::new("/"), "mount", &arguments, SHORT).await;
    match outcome {
        Ok(_) => Ok(point),
        Err(refusal) => {
            // Only an empty directory goes.
            let _ = fs::remove_dir(&point);
            Err(Refusal::new(Reason::NoSuchStore, refusal.detail))
        }
    }
}

/// Ends a mount; one that is not there is a success.
pub(super) async fn unmount(place: &Place) -> Result<(), Refusal> {
    let point = point(place);
    let at = point.clone();
    if apart(move || Ok(mounted(&at).is_some())).await? {
        place.site.programs.run(Path::new("/"), "umount", &[point.display().to_string()], SHORT).await?;
    }
    let _ = fs::remove_dir(&point);
    Ok(())
}
