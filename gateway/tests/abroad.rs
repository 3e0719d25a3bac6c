//! Calls to hosts that are not of this pool: who is believed, and who is not told anything.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use controller::{Abroad, AskError, Trust};
use gateway::HttpsAbroad;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::json;
use support::Running;

async fn tls() -> Running {
    Running::with(|config, _| config.tls = vec!["127.0.0.1:0".parse().unwrap()]).await
}

fn shown_by(running: &Running) -> String {
    std::fs::read_to_string(running.directory.path().join("made/certificate.pem")).unwrap()
}

/// A call at a host; what came of it, and how many calls the host has heard of.
async fn ask(trust: &Trust, running: &Running) -> Result<serde_json::Value, AskError> {
    let address = running.gateway.tls[0].to_string();
    HttpsAbroad::new(443).ask(trust, &address, "echo", vec![json!("a secret")]).await
}

#[tokio::test]
async fn without_an_authority_the_first_certificate_counts_for_as_long_as_the_matter_takes() {
    let (running, other) = (tls().await, tls().await);
    let trust = Trust::default();
    for _ in 0..2 {
        assert_eq!(ask(&trust, &running).await.unwrap(), json!("a secret"));
    }
    // Somebody else is at that address now, as far as the caller can tell.
    let address = running.gateway.tls[0].to_string();
    let trust = Trust::default();
    trust.first(&address, &CertificateDer::from_pem_slice(shown_by(&other).as_bytes()).unwrap());
    assert!(matches!(ask(&trust, &running).await, Err(AskError::Untrusted(_))));
    // Another matter begins anew; another address has a certificate of its own.
    ask(&Trust::default(), &running).await.unwrap();
    ask(&trust, &other).await.unwrap();
}

#[tokio::test]
async fn where_there_are_authorities_one_of_them_must_have_signed() {
    let (running, other) = (tls().await, tls().await);
    for (authorities, believed) in [
        (vec![shown_by(&running)], true),
        (vec![shown_by(&other), shown_by(&running)], true),
        (vec![shown_by(&other)], false),
    ] {
        let trust = Trust::by(authorities, Vec::new());
        let told = ask(&trust, &running).await;
        assert_eq!(told.is_ok(), believed, "{told:?}");
        assert!(believed || matches!(told, Err(AskError::Untrusted(_))), "{told:?}");
    }
}

#[tokio::test]
async fn a_certificate_is_told_as_it_is_shown() {
    let running = tls().await;
    let address = running.gateway.tls[0].to_string();
    let told = HttpsAbroad::new(443).certificate(&Trust::default(), &address).await.unwrap();
    let der = |text: &str| CertificateDer::from_pem_slice(text.as_bytes()).unwrap().to_vec();
    assert_eq!(der(&told), der(&shown_by(&running)));
}
