//! The certificate that a host shows its clients: one that its operator gives it, or one that it signs itself.
//!
//! It has nothing to do with the pool's own authority, and no row holds its key: the master looks at both and hands them
//! to the host over the peers' connection. What clients see of it is a row.

use datamodel::enums::CertificateType;
use datamodel::fields::{certificate, member};
use datamodel::{Certificate, Host, Ref, Timestamp, errors};
use raft_store::{NewRow, State};
use rcgen::{KeyPair, PublicKeyData};
use std::sync::Arc;
use x509_parser::oid_registry::{
    OID_PKCS1_RSAENCRYPTION, OID_PKCS1_SHA256WITHRSA, OID_PKCS1_SHA384WITHRSA, OID_PKCS1_SHA512WITHRSA,
    OID_SIG_ECDSA_WITH_SHA256, OID_SIG_ECDSA_WITH_SHA384, OID_SIG_ECDSA_WITH_SHA512,
};
use x509_parser::pem::Pem;
use x509_parser::public_key::PublicKey;

use super::{member_of, persist, trust};
use crate::call::Call;
use crate::certificates::Issued;
use crate::controller::Shared;
use crate::failure::{Failure, Served, refuse};
use crate::membership::ExchangeError;

/// Bits that a key has. Old clients know no other kind than RSA.
const KEY_BITS: std::ops::RangeInclusive<usize> = 2048..=4096;
/// No chain is as large as this.
const LARGEST: usize = 256 << 10;
const NAME: &str = "API";

/// `host.install_server_certificate`: connections that begin from now on see this certificate.
pub(crate) async fn install(cx: &Call, this: Ref<Host>, pem: &str, key: String, chain: &str) -> Served<()> {
    cx.row(this)?;
    let certificate = checked(pem, &key, chain, cx.now())?;
    exchange(cx, this, Some(Issued { certificate, key })).await
}

/// `host.reset_server_certificate`: connections that begin from now on see a certificate that the host signs itself.
pub(crate) async fn reset(cx: &Call, this: Ref<Host>) -> Served<()> {
    cx.row(this)?;
    exchange(cx, this, None).await
}

/// `host.emergency_reset_server_certificate`: the same for the host that is asked, master or not. Its row says so when
/// there is a master and it is asked again.
pub(crate) async fn reset_here(shared: &Shared) -> Served<()> {
    let around = shared.surroundings()?;
    let exchanged = around.peers.exchange(&around.this.peer_address, None).await;
    exchanged.map(drop).map_err(|error| Failure::Api(errors::internal_error(format!("{error:?}"))))
}

async fn exchange(cx: &Call, this: Ref<Host>, given: Option<Issued>) -> Served<()> {
    let row = member_of(&cx.state, this).cloned().ok_or_else(|| errors::host_offline(this))?;
    if !row.get(member::REPLICA) {
        return refuse(errors::operation_not_allowed("The host has no controller, and shows clients nothing"));
    }
    let peers = &cx.shared.surroundings()?.peers;
    let shown = peers.exchange(&row.get(member::PEER_ADDRESS), given).await.map_err(|error| match error {
        ExchangeError::Silent => errors::host_offline(this),
        ExchangeError::Refused(why) => errors::internal_error(why),
    })?;
    let shown =
        trust::read_certificate(&shown).ok_or_else(|| errors::internal_error("the host shows no certificate"))?;
    persist(cx, |state, change| {
        let reference = match of(state, this) {
            Some(row) => row.typed::<Certificate>(),
            None => {
                let reference = Ref::new(cx.shared.uuid());
                change.insert(
                    NewRow::new(reference, cx.shared.uuid())
                        .with(certificate::HOST, this)
                        .with(certificate::TYPE, CertificateType::Host)
                        .with(certificate::NAME, NAME.to_owned()),
                );
                reference
            }
        };
        change
            .set(reference, certificate::NOT_BEFORE, shown.not_before)
            .set(reference, certificate::NOT_AFTER, shown.not_after)
            .set(reference, certificate::FINGERPRINT, shown.fingerprint.clone());
        Ok(())
    })
    .await
}

/// What clients see of the certificate that a host shows them.
fn of(state: &State, this: Ref<Host>) -> Option<&Arc<raft_store::Row>> {
    state
        .all::<Certificate>()
        .find(|row| row.get(certificate::HOST) == this && row.get(certificate::TYPE) == CertificateType::Host)
}

/// The certificate with those of its issuers after it, if clients can do with it and the key is its own.
fn checked(pem: &str, key: &str, chain: &str, now: Timestamp) -> Served<String> {
    let invalid = errors::server_certificate_invalid;
    if pem.len() + chain.len() > LARGEST {
        return refuse(invalid());
    }
    // A key and nothing beside it: what stands in its file is told from certificates by their first line.
    let key =
        Some(key).filter(|key| key.matches("-----BEGIN").count() == 1).and_then(|key| KeyPair::from_pem(key).ok());
    let first = certificates(pem).into_iter().flatten().next().ok_or_else(invalid)?;
    let parsed = first.parse_x509().map_err(|_| invalid())?;
    let public = parsed.public_key();
    if public.algorithm.algorithm != OID_PKCS1_RSAENCRYPTION {
        return refuse(errors::server_certificate_key_algorithm_not_supported(
            public.algorithm.algorithm.to_id_string(),
        ));
    }
    let bits = match public.parsed() {
        Ok(PublicKey::RSA(key)) => key.key_size(),
        _ => return refuse(invalid()),
    };
    if !KEY_BITS.contains(&bits) {
        return refuse(errors::server_certificate_key_rsa_length_not_supported(bits.to_string()));
    }
    let Some(key) = key else { return refuse(errors::server_certificate_key_invalid()) };
    if key.subject_public_key_info() != public.raw {
        return refuse(errors::server_certificate_key_mismatch());
    }
    let validity = parsed.validity();
    let (begins, ends) = (Timestamp(validity.not_before.timestamp()), Timestamp(validity.not_after.timestamp()));
    if now < begins {
        return refuse(errors::server_certificate_not_valid_yet(now.to_string(), begins.to_string()));
    }
    if now > ends {
        return refuse(errors::server_certificate_expired(now.to_string(), ends.to_string()));
    }
    let signatures = [
        OID_PKCS1_SHA256WITHRSA,
        OID_PKCS1_SHA384WITHRSA,
        OID_PKCS1_SHA512WITHRSA,
        OID_SIG_ECDSA_WITH_SHA256,
        OID_SIG_ECDSA_WITH_SHA384,
        OID_SIG_ECDSA_WITH_SHA512,
    ];
    if !signatures.contains(&parsed.signature_algorithm.algorithm) {
        return refuse(errors::server_certificate_signature_not_supported());
    }
    let issuers = match chain.trim() {
        "" => Vec::new(),
        chain => certificates(chain).ok_or_else(errors::server_certificate_chain_invalid)?,
    };
    if issuers.iter().any(|issuer| issuer.parse_x509().is_err()) {
        return refuse(errors::server_certificate_chain_invalid());
    }
    Ok(format!("{}\n{}", pem.trim(), chain.trim()))
}

/// The certificates of a PEM text; none where it is not made of certificates, or of nothing.
fn certificates(text: &str) -> Option<Vec<Pem>> {
    let all: Vec<Pem> = Pem::iter_from_buffer(text.as_bytes()).collect::<Result<_, _>>().ok()?;
    (!all.is_empty() && all.iter().all(|pem| pem.label == "CERTIFICATE")).then_some(all)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use rcgen::{CertificateParams, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256, RsaKeySize, date_time_ymd};

    use super::*;

    const NOW: Timestamp = Timestamp(1_800_000_000);

    fn signed(key: &KeyPair, years: (i32, i32)) -> String {
        let mut params = CertificateParams::new(vec!["host".to_owned()]).unwrap();
        (params.not_before, params.not_after) = (date_time_ymd(years.0, 1, 1), date_time_ymd(years.1, 1, 1));
        params.self_signed(key).unwrap().pem()
    }

    fn code(outcome: Served<String>) -> &'static str {
        let Err(Failure::Api(error)) = outcome else { panic!("not refused") };
        error.code
    }

    #[test]
    fn a_certificate_that_clients_could_not_use_is_refused_by_what_is_wrong_with_it() {
        let rsa = || KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap();
        let (mine, other) = (rsa(), rsa());
        let ecdsa = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let (good, key) = (signed(&mine, (2020, 2100)), mine.serialize_pem());
        let junk = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";

        assert_eq!(checked(&good, &key, "", NOW).unwrap().trim(), good.trim());
        let both = checked(&good, &key, &signed(&other, (2020, 2100)), NOW).unwrap();
        assert_eq!(both.matches("BEGIN CERTIFICATE").count(), 2);

        let cases = [
            ("", key.as_str(), "", "SERVER_CERTIFICATE_INVALID"),
            (junk, &key, "", "SERVER_CERTIFICATE_INVALID"),
            (&key, &key, "", "SERVER_CERTIFICATE_INVALID"),
            (&good, "no key", "", "SERVER_CERTIFICATE_KEY_INVALID"),
            (&good, &format!("{key}{good}"), "", "SERVER_CERTIFICATE_KEY_INVALID"),
            (&good, &other.serialize_pem(), "", "SERVER_CERTIFICATE_KEY_MISMATCH"),
            (&good, &ecdsa.serialize_pem(), "", "SERVER_CERTIFICATE_KEY_MISMATCH"),
            (
                &signed(&ecdsa, (2020, 2100)),
                &ecdsa.serialize_pem(),
                "",
                "SERVER_CERTIFICATE_KEY_ALGORITHM_NOT_SUPPORTED",
            ),
            (&signed(&mine, (2050, 2100)), &key, "", "SERVER_CERTIFICATE_NOT_VALID_YET"),
            (&signed(&mine, (2020, 2021)), &key, "", "SERVER_CERTIFICATE_EXPIRED"),
            (&good, &key, junk, "SERVER_CERTIFICATE_CHAIN_INVALID"),
            (&good, &key, "nothing of the kind", "SERVER_CERTIFICATE_CHAIN_INVALID"),
        ];
        for (certificate, key, chain, refusal) in cases {
            assert_eq!(code(checked(certificate, key, chain, NOW)), refusal);
        }
    }
}
