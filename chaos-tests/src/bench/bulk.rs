//! How fast a pool tells all it knows: `VM.get_all_records`.

use std::time::Instant;

use serde_json::json;

use super::load::median;
use super::pool::{Pool, call};

/// What one size of pool gave.
#[derive(Clone, Copy, Debug)]
pub struct Bulk {
    /// VMs that were asked for.
    pub vms: usize,
    /// Bytes of one answer.
    pub bytes: usize,
    /// Median over the calls.
    pub milliseconds: f64,
}

impl Bulk {
    /// Megabytes (10⁶) per second of the median call.
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / 1e6 / (self.milliseconds / 1e3)
    }
}

/// Makes so many VMs and reads them all, so many times, over one connection.
pub async fn measure(pool: &mut Pool, vms: usize, calls: usize) -> anyhow::Result<Bulk> {
    pool.make_vms(vms).await?;
    let body = call("VM.get_all_records", &json!([pool.session()]));
    let mut wire = pool.wire().await?;
    let mut times = Vec::with_capacity(calls);
    // The first answer is not counted: encodings are made then, and kept.
    let mut bytes = wire.post(body.as_bytes()).await?.success()?.length;
    for _ in 0..calls {
        let started = Instant::now();
        bytes = wire.post(body.as_bytes()).await?.success()?.length;
        times.push(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok(Bulk { vms, bytes, milliseconds: median(times) })
}
