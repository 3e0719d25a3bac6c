//! Does KVM work here? Only a guest can tell.
//!
//! `/dev/kvm` may be there, open, and make a virtual machine, and yet the guest is of no use: it stands at its first
//! instruction, or, where KVM itself runs in a virtual machine, its kernel mode is interpreted at a few hundred
//! thousand instructions a second and a Linux kernel never gets to unpack itself. So a guest of 512 bytes is booted
//! that does what a kernel does first: it goes to long mode with paging, works through a hundred million turns of a
//! loop (a tenth of a second on a processor, a second in emulation, minutes where kernel mode is interpreted), and
//! writes to a port that ends QEMU with a status nobody else gives. If that does not happen in time, guests are
//! emulated. The verdict holds for one boot of the kernel and one version of QEMU and is kept, so that only the
//! first start waits for it.

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
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned();
    let path = state_dir.join("accelerator.json");
    let kept = fs::read(&path).ok().and_then(|content| serde_json::from_slice::<Verdict>(&content).ok());
    let verdict = match kept {
        Some(verdict) if verdict.boot_id == boot_id && verdict.qemu == qemu => verdict,
        _ => {
            let answer = prove(binary, Accelerator::Kvm, state_dir, LIMIT).await;
            let why = answer.as_ref().err().cloned().unwrap_or_default();
            let verdict = Verdict { boot_id, qemu: qemu.to_owned(), kvm: answer.is_ok(), why };
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
        tracing::info!(why = verdict.why, "guests are emulated: KVM does not work here");
        Accelerator::Tcg
    }
}

/// Boots the probe guest; says why it did not answer.
async fn prove(binary: &Path, accelerator: Accelerator, dir: &Path, limit: Duration) -> Result<(), String> {
    if accelerator == Accelerator::Kvm
        && let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm")
    {
        return Err(format!("/dev/kvm: {error}"));
    }
    let image = dir.join("probe.img");
    files::replace(&image, &boot_sector(), Durability::Process).map_err(|error| error.to_string())?;
    let child = Command::new(binary)
        .args(["-machine", "pc", "-m", "16M", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(accelerator.arguments())
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-snapshot", "-drive", "format=raw,file=probe.img"])
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
        Err(_) => Err(format!("the probe guest did not answer within {} ms", limit.as_millis())),
    }
}

/// The guest, at 0x7c00 where firmware puts it. Its page tables are at 0x1000, 0x2000 and 0x3000.
#[rustfmt::skip]
const PROGRAM: &[u8] = &[
    // 16 bits. cli; xor ax,ax; mov ds,ax; mov es,ax; mov ss,ax; mov sp,0x7000; cld
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x70, 0xfc,
    // mov di,0x1000; xor eax,eax; mov cx,0xc00; rep stosd: three empty page tables
    0xbf, 0x00, 0x10, 0x66, 0x31, 0xc0, 0xb9, 0x00, 0x0c, 0x66, 0xf3, 0xab,
    // mov word [0x1000],0x2003; mov word [0x2000],0x3003; mov word [0x3000],0x83: the first 2 MiB as they are
    0xc7, 0x06, 0x00, 0x10, 0x03, 0x20, 0xc7, 0x06, 0x00, 0x20, 0x03, 0x30, 0xc7, 0x06, 0x00, 0x30, 0x83, 0x00,
    // lgdt [0x7c90]
    0x0f, 0x01, 0x16, 0x90, 0x7c,
    // mov eax,cr4; or al,0x20; mov cr4,eax: PAE
    0x0f, 0x20, 0xe0, 0x0c, 0x20, 0x0f, 0x22, 0xe0,
    // mov eax,0x1000; mov cr3,eax
    0x66, 0xb8, 0x00, 0x10, 0x00, 0x00, 0x0f, 0x22, 0xd8,
    // mov ecx,0xc0000080; rdmsr; or ax,0x100; wrmsr: EFER.LME
    0x66, 0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32, 0x0d, 0x00, 0x01, 0x0f, 0x30,
    // mov eax,cr0; or eax,0x80000001; mov cr0,eax: protection and paging
    0x0f, 0x20, 0xc0, 0x66, 0x0d, 0x01, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0,
    // jmp 8:0x7c5f
    0xea, 0x5f, 0x7c, 0x08, 0x00,
    // 64 bits. mov ecx,100_000_000; turn: dec ecx; jnz turn
    0xb9, 0x00, 0xe1, 0xf5, 0x05, 0xff, 0xc9, 0x75, 0xfc,
    // mov al,WORD; out 0xf4,al; stop: hlt; jmp stop
    0xb0, WORD, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd,
];
/// Where the program expects the pointer to its segments; they follow.
const SEGMENTS: usize = 0x90;

fn boot_sector() -> [u8; 512] {
    let mut sector = [0; 512];
    sector[..PROGRAM.len()].copy_from_slice(PROGRAM);
    sector[SEGMENTS..SEGMENTS + 6].copy_from_slice(&[15, 0, 0x98, 0x7c, 0, 0]);
    // The null segment stays zero; the second is 64-bit code.
    sector[SEGMENTS + 16..SEGMENTS + 24].copy_from_slice(&0x00af_9a00_0000_ffff_u64.to_le_bytes());
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
        let answer = prove(&qemu, Accelerator::Tcg, dir.path(), Duration::from_millis(200)).await;
        assert!(answer.expect_err("hangs").contains("did not answer"));
        assert!(began.elapsed() < Duration::from_secs(10));
    }

    #[tokio::test]
    async fn only_the_first_start_of_a_boot_pays_for_the_probe() {
        let dir = tempfile::tempdir().expect("directory");
        let qemu = program(dir.path(), "echo run >>\"$0.runs\"; exit 1");
        for _start in 0..3 {
            assert_eq!(accelerator(&qemu, "7.2", dir.path()).await, Accelerator::Tcg);
        }
        // Without /dev/kvm there is nothing to run at all.
        let runs = fs::read_to_string(dir.path().join("qemu.runs")).unwrap_or_default();
        assert!(runs.lines().count() <= 1, "probed more than once");
        let verdict = fs::read_to_string(dir.path().join("accelerator.json")).expect("kept");
        assert!(verdict.contains("\"kvm\":false"));
        accelerator(&qemu, "8.0", dir.path()).await;
        assert!(fs::read_to_string(dir.path().join("accelerator.json")).expect("kept").contains("8.0"));
    }
}
