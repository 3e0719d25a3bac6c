//! The lead is handed over, again and again.

use chaos_tests::lab::Lab;

use crate::support::{HANDOVER, hand_overs};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "of a machine that does other things it says nothing; `make soak` runs it"]
async fn no_write_waits_for_long_in_any_of_twenty_hand_overs() {
    let pauses = hand_overs(&Lab::sim().await.unwrap(), 20).await;
    eprintln!("pauses: {pauses:?}");
    assert!(pauses.iter().all(|pause| *pause < HANDOVER), "{pauses:?}");
}
