//! Does KVM work here? Only a guest can tell.
//!
//! `/dev/kvm` may be there, open, and make a virtual machine, and yet the guest stands for ever at its first
//! instruction. So a guest of 512 bytes is booted: firmware loads it, and it writes to a port that ends QEMU with
//! a status nobody else gives. If that does not happen in time, guests are emulated. The verdict holds for one boot
//! of the kernel and one version of QEMU and is kept, so that only the first start waits for it.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use std::{fs, io};

use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::time::timeout;

use super::launch::Accelerator;
use crate::files::{self, Durability};

const LIMIT: Duration = Duration::from_secs(3);
/// What the guest says; QEMU ends with twice that plus one.
const WORD: u8 = 0x2a;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Verdict {
    boot_id: String,
    qemu: String,
    kvm: bool,
    why: String,
}

/// The accelerator that works here, from the kept verdict or from a new probe.
pub(super) async fn accelerator(binary: &Path, qemu: &str, state_dir: &Path) -> Accelerator {
    // The machine's own boot counts, also where several hosts of a lab share it.
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned();
    let path = state_dir.join("accelerator.json");
    let kept = fs::read(&path)
        .ok()
        .and_then(|content| serde_json::from_slice::<Verdict>(&content).ok());
    let verdict = match kept {
        Some(verdict) if verdict.boot_id == boot_id && verdict.qemu == qemu => verdict,
        _ => {
            let answer = prove(binary, Accelerator::Kvm, state_dir, LIMIT).await;
            let why = answer.as_ref().err().cloned().unwrap_or_default();
            let verdict = Verdict {
                boot_id,
                qemu: qemu.to_owned(),
                kvm: answer.is_ok(),
                why,
            };
            let kept = serde_json::to_vec(&verdict)
                .map_err(io::Error::other)
                .and_then(|content| files::replace(&path, &content, Durability::Process));
            if let Err(error) = kept {
                tracing::warn!(%error, "the verdict on KVM is not kept: the next start will probe again");
            }
            verdict
        }
    };
    if verdict.kvm {
        Accelerator::Kvm
    } else {
        tracing::info!(
            why = verdict.why,
            "guests are emulated: KVM does not work here"
        );
        Accelerator::Tcg
    }
}

/// Boots the probe guest; says why it did not answer.
async fn prove(
    binary: &Path,
    accelerator: Accelerator,
    dir: &Path,
    limit: Duration,
) -> Result<(), String> {
    if accelerator == Accelerator::Kvm
        && let Err(error) = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
    {
        return Err(format!("/dev/kvm: {error}"));
    }
    let image = dir.join("probe.img");
    files::replace(&image, &boot_sector(), Durability::Process)
        .map_err(|error| error.to_string())?;
    let child = Command::new(binary)
        .args([
            "-machine",
            "pc",
            "-m",
            "16M",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args(accelerator.arguments())
        .args([
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=1",
            "-snapshot",
            "-drive",
            "format=raw,file=probe.img",
        ])
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    let mut child = child.map_err(|error| error.to_string())?;
    let ended = timeout(limit, child.wait()).await;
    if ended.is_err() {
        // A guest that hangs in the kernel may take its time to die; nobody waits for that.
        let _ = child.start_kill();
    }
    let _ = fs::remove_file(&image);
    match ended {
        Ok(Ok(status)) if status.code() == Some(2 * i32::from(WORD) + 1) => Ok(()),
        Ok(Ok(status)) => Err(format!("the probe guest ended with {status}")),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!(
            "the probe guest did not answer within {} ms",
            limit.as_millis()
        )),
    }
}

/// `mov al, WORD; out 0xf4, al; cli; hlt`, where firmware looks for it.
fn boot_sector() -> [u8; 512] {
    let mut sector = [0; 512];
    sector[..6].copy_from_slice(&[0xb0, WORD, 0xe6, 0xf4, 0xfa, 0xf4]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Instant;

    /// A program in QEMU's place.
    fn program(dir: &Path, script: &str) -> std::path::PathBuf {
        let path = dir.join("qemu");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
        path
    }

    #[tokio::test]
    async fn the_probe_guest_answers_where_guests_run() {
        let dir = tempfile::tempdir().expect("directory");
        let qemu = Path::new("qemu-system-x86_64");
        let answer = prove(qemu, Accelerator::Tcg, dir.path(), Duration::from_secs(30)).await;
        assert_eq!(answer, Ok(()));
    }

    #[tokio::test]
    async fn a_guest_that_hangs_is_given_up_in_time() {
        let dir = tempfile::tempdir().expect("directory");
        let qemu = program(dir.path(), "exec sleep 600");
        let began = Instant::now();
        let answer = prove(
            &qemu,
            Accelerator::Tcg,
            dir.path(),
            Duration::from_millis(200),
        )
        .await;
        assert!(answer.expect_err("hangs").contains("did not answer"));
        assert!(began.elapsed() < Duration::from_secs(10));
    }

    #[tokio::test]
    async fn only_the_first_start_of_a_boot_pays_for_the_probe() {
        let dir = tempfile::tempdir().expect("directory");
        let qemu = program(dir.path(), "echo run >>\"$0.runs\"; exit 1");
        for _start in 0..3 {
            assert_eq!(
                accelerator(&qemu, "7.2", dir.path()).await,
                Accelerator::Tcg
            );
        }
        // Without /dev/kvm there is nothing to run at all.
        let runs = fs::read_to_string(dir.path().join("qemu.runs")).unwrap_or_default();
        assert!(runs.lines().count() <= 1, "probed more than once");
        let verdict = fs::read_to_string(dir.path().join("accelerator.json")).expect("kept");
        assert!(verdict.contains("\"kvm\":false"));
        accelerator(&qemu, "8.0", dir.path()).await;
        assert!(
            fs::read_to_string(dir.path().join("accelerator.json"))
                .expect("kept")
                .contains("8.0")
        );
    }
}
