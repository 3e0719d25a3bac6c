//! How fast disks are made from others, and how fast they are copied beside `qemu-img convert`.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::time::sleep;

use super::machines::found;
use crate::client::Client;
use crate::lab::Lab;

const MIB: u64 = 1 << 20;
/// The disk that is cloned and snapshotted.
const SPARSE: u64 = 10 << 30;
/// A copy of gigabytes on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What was measured.
#[derive(Clone, Debug, Default)]
pub struct Disks {
    /// Milliseconds of `VDI.clone` of a sparse disk of 10 GiB.
    pub clone: Vec<f64>,
    /// Milliseconds of `VDI.snapshot` of it.
    pub snapshot: Vec<f64>,
    /// Bytes of data in the disk that is copied.
    pub copied: u64,
    /// Seconds of `VDI.copy` into the same SR.
    pub copy: Vec<f64>,
    /// Seconds of `qemu-img convert` of the same image, in the same directory, with a sync of what it made.
    pub convert: Vec<f64>,
}

impl Disks {
    /// Megabytes (10⁶) of data per second, for a number of seconds.
    pub fn rate(&self, seconds: f64) -> f64 {
        self.copied as f64 / 1e6 / seconds
    }
}

/// Measures them in a lab of one host with the `file` driver; `data` bytes are copied.
pub async fn measure(program: &Path, dir: &Path, rounds: usize, data: u64) -> anyhow::Result<Disks> {
    eprintln!("disks: clones and snapshots");
    let lab = Lab::of(program, dir, 1, "qemu").await?;
    let mut client = lab.client().await?.with_call_limit(LIMIT);
    let sr = store(&mut client).await?;
    let mut disks = Disks { copied: data, ..Disks::default() };
    let sparse = made(&mut client, &sr, SPARSE).await?;
    for _ in 0..rounds {
        for (method, times) in [("VDI.clone", &mut disks.clone), ("VDI.snapshot", &mut disks.snapshot)] {
            let (new, took) = timed(&mut client, method, json!([sparse, {}])).await?;
            times.push(took * 1e3);
            client.call("VDI.destroy", json!([new])).await?;
        }
    }

    eprintln!("disks: copies of {} MiB beside qemu-img", data / MIB);
    let full = made(&mut client, &sr, data * 2).await?;
    let uuid = client.call("VDI.get_uuid", json!([full])).await?;
    let name = format!("{}.qcow2", uuid.as_str().context("a VDI without a uuid")?);
    let image = found(lab.dir(), &name).with_context(|| format!("no {name} below {}", lab.dir().display()))?;
    // Half of the disk is data that does not compress, half was never written.
    fill(&image, data, dir).await?;
    let beside = image.with_file_name("converted-by-qemu-img");
    for _ in 0..rounds {
        let started = Instant::now();
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-O", "qcow2"]).arg(&image).arg(&beside);
        run(&mut convert).await?;
        // As the copy, which is told of when it is on the disk.
        std::fs::File::open(&beside)?.sync_all()?;
        disks.convert.push(started.elapsed().as_secs_f64());
        std::fs::remove_file(&beside)?;
        let (copy, took) = timed(&mut client, "VDI.copy", json!([full, sr])).await?;
        disks.copy.push(took);
        client.call("VDI.destroy", json!([copy])).await?;
    }
    Ok(disks)
}

/// The default SR, once it is plugged.
async fn store(client: &mut Client) -> anyhow::Result<Value> {
    let pools = client.call("pool.get_all_records", json!([])).await?;
    let pool = pools.as_object().and_then(|pools| pools.values().next()).context("no pool")?;
    let sr = pool["default_SR"].clone();
    let begun = Instant::now();
    loop {
        let pbds = client.call("PBD.get_all_records", json!([])).await?;
        let all: Vec<_> = pbds.as_object().into_iter().flatten().collect();
        if all.iter().all(|(_, pbd)| pbd["currently_attached"] == true) {
            return Ok(sr);
        }
        if begun.elapsed() > LIMIT {
            bail!("the SRs are not plugged");
        }
        sleep(LOOK_AGAIN).await;
    }
}

async fn made(client: &mut Client, sr: &Value, size: u64) -> anyhow::Result<Value> {
    let record = json!({
        "name_label": "measured", "name_description": "", "SR": sr, "virtual_size": size, "type": "user",
        "sharable": false, "read_only": false, "other_config": {},
    });
    Ok(client.call("VDI.create", json!([record])).await?)
}

/// What a call answers, and its seconds.
async fn timed(client: &mut Client, method: &str, arguments: Value) -> anyhow::Result<(Value, f64)> {
    let started = Instant::now();
    let answer = client.call(method, arguments).await?;
    Ok((answer, started.elapsed().as_secs_f64()))
}

/// Writes so many bytes of noise, less than two gigabytes, to the beginning of an image that nobody has open.
async fn fill(image: &Path, bytes: u64, dir: &Path) -> anyhow::Result<()> {
    let noise = tempfile::NamedTempFile::new_in(dir)?;
    let mut random = std::io::Read::take(std::fs::File::open("/dev/urandom")?, bytes);
    std::io::copy(&mut random, &mut noise.as_file())?;
    let write = format!("write -s {} 0 {bytes}", noise.path().display());
    run(Command::new("qemu-io").args(["-f", "qcow2", "-c", &write]).arg(image)).await?;
    Ok(())
}

async fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.kill_on_drop(true).output().await?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{:?}: {told}", command.as_std());
    Ok(())
}
