//! How soon a waiting client hears of a write.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::pool::{Pool, call};
use super::wire::Wire;
use super::{Operation, description};

/// Until the watcher is sure to wait again.
const SETTLE: Duration = Duration::from_millis(4);
const EVENT_LIMIT: Duration = Duration::from_secs(10);
/// Where these writes' numbers start: beyond those of any load round.
const NUMBERS: u64 = 1 << 60;

/// Milliseconds, one of each for every write.
#[derive(Clone, Debug, Default)]
pub struct Delays {
    /// From the acknowledgement at the writer to the event at the watcher; below zero when the event was first.
    pub after_acknowledgement: Vec<f64>,
    /// From the start of the write to the event.
    pub after_start: Vec<f64>,
}

/// Writes so many times, one at a time, while another client waits in `event.from`.
pub async fn measure(pool: &mut Pool, writes: usize) -> anyhow::Result<Delays> {
    let mut writer = pool.writers(1).await?.pop().context("no writer")?;
    let first = pool.client().call("event.from", json!([["vm"], "", 0.0])).await?;
    let token = first["token"].as_str().context("event.from gave no token")?.to_owned();
    let (heard, mut hears) = mpsc::channel(16);
    let mut watching = JoinSet::new();
    watching.spawn(watch(pool.wire().await?, pool.session().to_owned(), token, heard));

    let mut delays = Delays::default();
    for number in NUMBERS..NUMBERS + writes as u64 {
        sleep(SETTLE).await;
        let started = Instant::now();
        writer.run(number).await?;
        let acknowledged = Instant::now();
        let wanted = description(number);
        let event = timeout(EVENT_LIMIT, async {
            while let Some((text, when)) = hears.recv().await {
                if text == wanted {
                    return Ok(when);
                }
            }
            Err(watching.join_next().await)
        });
        let event: Instant = match event.await.context("an event never came")? {
            Ok(when) => when,
            Err(ended) => {
                ended.context("the watcher is gone")???;
                anyhow::bail!("the watcher ended")
            }
        };
        let signed = if event >= acknowledged {
            (event - acknowledged).as_secs_f64()
        } else {
            -(acknowledged - event).as_secs_f64()
        };
        delays.after_acknowledgement.push(signed * 1e3);
        delays.after_start.push((event - started).as_secs_f64() * 1e3);
    }
    Ok(delays)
}

async fn watch(
    mut wire: Wire,
    session: String,
    mut token: String,
    heard: mpsc::Sender<(String, Instant)>,
) -> anyhow::Result<()> {
    loop {
        let body = call("event.from", &json!([session, ["vm"], token, 30.0]));
        let answer = wire.post(body.as_bytes()).await?.success()?;
        let when = Instant::now();
        ensure!(answer.first.len() == answer.length, "one event is larger than the buffer");
        let answer: Value = serde_json::from_slice(answer.first)?;
        token = answer["result"]["token"].as_str().context("event.from gave no token")?.to_owned();
        for event in answer["result"]["events"].as_array().into_iter().flatten() {
            let text = event["snapshot"]["name_description"].as_str().unwrap_or_default();
            if heard.send((text.to_owned(), when)).await.is_err() {
                return Ok(());
            }
        }
    }
}
