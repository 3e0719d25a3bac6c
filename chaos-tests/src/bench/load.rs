//! The load generator: clients that wait for nothing but their own last answer.

use std::time::{Duration, Instant};

use anyhow::Context;
use hdrhistogram::Histogram;
use tokio::task::JoinSet;

use super::Operation;

/// How long one operation may take before the run is given up.
const OPERATION_LIMIT: Duration = Duration::from_secs(30);
/// Where a round's numbers start, so that no two rounds write the same value.
const NUMBERS_OF_ROUND: u64 = 1 << 32;

/// What one round gave.
#[derive(Clone, Debug)]
pub struct Round {
    /// Operations that were acknowledged within the measured time.
    pub operations: u64,
    /// How long was measured.
    pub seconds: f64,
    /// Microseconds from the start of an operation to its acknowledgement.
    pub latency: Histogram<u64>,
}

impl Round {
    /// Acknowledged operations per second.
    pub fn rate(&self) -> f64 {
        self.operations as f64 / self.seconds
    }
}

/// Microseconds up to a minute, to three digits.
fn latencies() -> anyhow::Result<Histogram<u64>> {
    Ok(Histogram::new_with_max(60_000_000, 3)?)
}

/// Lets all clients work for `warm` and then counts for `measured`. The clients come back, to be used again.
pub async fn round<O: Operation>(
    clients: Vec<O>,
    round: u64,
    warm: Duration,
    measured: Duration,
) -> anyhow::Result<(Round, Vec<O>)> {
    let counting = Instant::now() + warm;
    let end = counting + measured;
    let mut tasks = JoinSet::new();
    for (position, mut client) in clients.into_iter().enumerate() {
        let mut number = round * NUMBERS_OF_ROUND + ((position as u64) << 24);
        tasks.spawn(async move {
            let mut latency = latencies()?;
            loop {
                let started = Instant::now();
                if started >= end {
                    return anyhow::Ok((client, latency));
                }
                number += 1;
                tokio::time::timeout(OPERATION_LIMIT, client.run(number))
                    .await
                    .context("an operation never ended")??;
                let done = Instant::now();
                if started >= counting && done <= end {
                    latency.saturating_record((done - started).as_micros() as u64);
                }
            }
        });
    }
    let mut all = latencies()?;
    let mut clients = Vec::new();
    while let Some(ended) = tasks.join_next().await {
        let (client, latency) = ended??;
        all.add(&latency)?;
        clients.push(client);
    }
    Ok((Round { operations: all.len(), seconds: measured.as_secs_f64(), latency: all }, clients))
}

/// Several rounds of one thing.
#[derive(Clone, Debug, Default)]
pub struct Rounds(Vec<Round>);

impl Rounds {
    /// One more.
    pub fn add(&mut self, round: Round) {
        self.0.push(round);
    }

    /// The median round's operations per second.
    pub fn rate(&self) -> f64 {
        median(self.0.iter().map(Round::rate))
    }

    /// How many operations there were for each of the peer's: the median over the rounds, each beside the peer's of the
    /// same turn. What else the machine does changes from one minute to the next, and meets both of a turn.
    pub fn beside(&self, peer: &Self) -> f64 {
        median(self.0.iter().zip(&peer.0).map(|(own, other)| own.rate() / other.rate()))
    }

    /// Milliseconds that this share of all operations of all rounds did not exceed.
    pub fn latency(&self, share: f64) -> f64 {
        let mut rounds = self.0.iter();
        let Some(first) = rounds.next() else { return f64::NAN };
        let mut all = first.latency.clone();
        for round in rounds {
            // Only a histogram of another shape could fail to be added; all are made alike.
            let _ = all.add(&round.latency);
        }
        all.value_at_quantile(share) as f64 / 1000.0
    }
}

/// The middle value; of an even number of values the mean of the two in the middle.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => values[odd / 2],
        even => f64::midpoint(values[even / 2 - 1], values[even / 2]),
    }
}

/// The value that this share of the values does not exceed (nearest rank).
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let rank = (share * values.len() as f64).ceil() as usize;
    values.get(rank.clamp(1, values.len().max(1)) - 1).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Paced(Duration);

    impl Operation for Paced {
        async fn run(&mut self, _number: u64) -> anyhow::Result<()> {
            tokio::time::sleep(self.0).await;
            Ok(())
        }
    }

    #[tokio::test]
    async fn only_what_is_acknowledged_within_the_measured_time_counts() {
        let clients = vec![Paced(Duration::from_millis(10)), Paced(Duration::from_millis(10))];
        let (result, clients) = round(clients, 1, Duration::ZERO, Duration::from_millis(1)).await.unwrap();
        assert_eq!((result.operations, clients.len()), (0, 2));
    }

    #[test]
    fn medians_and_quantiles_are_those_of_the_sorted_values() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median([]).is_nan());
        let hundred: Vec<_> = (1..=100).rev().map(f64::from).collect();
        assert_eq!((quantile(&hundred, 0.5), quantile(&hundred, 0.99), quantile(&hundred, 1.0)), (50.0, 99.0, 100.0));
        assert_eq!(quantile(&[7.0], 0.99), 7.0);
        assert!(quantile(&[], 0.5).is_nan());
    }
}
