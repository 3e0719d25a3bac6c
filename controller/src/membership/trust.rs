//! Whom this pool believes that is not of it.
//!
//! A pool may be given certificates of authorities, and lists of what these have revoked. Where it verifies TLS and has
//! any, whoever is called abroad has to show a certificate of one of them, good for the address. Where it has none there
//! is nothing to verify by: the first certificate that an address shows is taken, and for as long as the matter takes
//! (a join is a login, an application and a farewell) it has to show the same again.

use std::collections::BTreeMap;

use datamodel::enums::CertificateType;
use datamodel::fields::{certificate, host, pool, trusted};
use datamodel::{Certificate, ClassKind, Host, Pool, Ref, Timestamp, Trusted, errors};
use parking_lot::Mutex;
use raft_store::{NewRow, Row, State, Transaction};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use x509_parser::pem::parse_x509_pem;
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::CertificateRevocationList;

use super::persist;
use crate::call::Call;
use crate::controller::Shared;
use crate::failure::{Failure, Served, refuse};

/// What is asked of those who are called, for as long as one matter takes.
#[derive(Debug, Default)]
pub struct Trust {
    authorities: Vec<String>,
    revoked: Vec<String>,
    /// What each address showed when it was first asked: DER.
    shown: Mutex<BTreeMap<String, Vec<u8>>>,
}

impl Trust {
    /// Of a pool, as its rows say.
    pub(crate) fn of(state: &State) -> Self {
        let verifies = state.all::<Pool>().any(|row| row.get(pool::TLS_VERIFICATION_ENABLED));
        if !verifies {
            return Self::default();
        }
        let all = |kind: Kind| state.all::<Trusted>().filter(move |row| row.get(trusted::KIND) == kind.word());
        let texts = |kind| all(kind).map(|row| row.get(trusted::PEM)).collect();
        Self { authorities: texts(Kind::Authority), revoked: texts(Kind::Revocations), shown: Mutex::default() }
    }

    /// By these authorities, PEM texts, and but for what these lists revoke.
    #[must_use]
    pub fn by(authorities: Vec<String>, revoked: Vec<String>) -> Self {
        Self { authorities, revoked, shown: Mutex::default() }
    }

    /// PEM texts; where there are any, one of them must have signed.
    #[must_use]
    pub fn authorities(&self) -> &[String] {
        &self.authorities
    }

    /// Lists of certificates that are not good any more, PEM texts.
    #[must_use]
    pub fn revoked(&self) -> &[String] {
        &self.revoked
    }

    /// What an address showed before, in DER.
    #[must_use]
    pub fn shown_by(&self, address: &str) -> Option<Vec<u8>> {
        self.shown.lock().get(address).cloned()
    }

    /// Whoever is at an address has shown this, and proved to have its key. Only the first one counts.
    pub fn first(&self, address: &str, certificate: &[u8]) {
        self.shown.lock().entry(address.to_owned()).or_insert_with(|| certificate.to_vec());
    }
}

/// What a pool can be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An authority's certificate.
    Authority,
    /// A list of what it has revoked.
    Revocations,
}

impl Kind {
    const fn word(self) -> &'static str {
        match self {
            Self::Authority => "ca",
            Self::Revocations => "crl",
        }
    }

    fn name_invalid(self, name: &str) -> Failure {
        Failure::Api(match self {
            Self::Authority => errors::certificate_name_invalid(name),
            Self::Revocations => errors::crl_name_invalid(name),
        })
    }

    fn exists(self, name: &str) -> Failure {
        Failure::Api(match self {
            Self::Authority => errors::certificate_already_exists(name),
            Self::Revocations => errors::crl_already_exists(name),
        })
    }

    fn missing(self, name: &str) -> Failure {
        Failure::Api(match self {
            Self::Authority => errors::certificate_does_not_exist(name),
            Self::Revocations => errors::crl_does_not_exist(name),
        })
    }

    fn corrupt(self, name: &str) -> Failure {
        Failure::Api(match self {
            Self::Authority => errors::certificate_corrupt(name),
            Self::Revocations => errors::crl_corrupt(name),
        })
    }
}

/// So long names, and so large texts, nobody needs.
const LONGEST_NAME: usize = 255;
const LARGEST: usize = 256 << 10;

/// A name of a file, as it were: no path, and not hidden.
fn is_name(name: &str) -> bool {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "._-".contains(letter);
    !name.is_empty() && name.len() <= LONGEST_NAME && !name.starts_with(['.', '-']) && name.chars().all(plain)
}

/// What clients are shown of a certificate.
pub(super) struct Shown {
    pub not_before: Timestamp,
    pub not_after: Timestamp,
    pub fingerprint: String,
}

pub(super) fn read_certificate(pem: &str) -> Option<Shown> {
    let (_, pem) = parse_x509_pem(pem.as_bytes()).ok()?;
    let certificate = pem.parse_x509().ok()?;
    let validity = certificate.validity();
    let digest = Sha256::digest(&pem.contents);
    let digits: Vec<String> = digest.iter().map(|byte| format!("{byte:02X}")).collect();
    Some(Shown {
        not_before: Timestamp(validity.not_before.timestamp()),
        not_after: Timestamp(validity.not_after.timestamp()),
        fingerprint: digits.join(":"),
    })
}

fn is_revocation_list(pem: &str) -> bool {
    let Ok((_, pem)) = parse_x509_pem(pem.as_bytes()) else { return false };
    CertificateRevocationList::from_der(&pem.contents).is_ok()
}

fn named<'a>(state: &'a State, kind: Kind, name: &str) -> Option<&'a Arc<Row>> {
    state.all::<Trusted>().find(|row| row.get(trusted::KIND) == kind.word() && row.get(trusted::NAME) == name)
}

/// Writes one down, and, of an authority, what clients see of it. False where it is none.
fn insert(shared: &Shared, change: &mut Transaction, kind: Kind, name: &str, pem: &str) -> bool {
    let mut visible: Ref<Certificate> = Ref::NULL;
    match kind {
        Kind::Authority => {
            let Some(shown) = read_certificate(pem) else { return false };
            visible = Ref::new(shared.uuid());
            change.insert(
                NewRow::new(visible, shared.uuid())
                    .with(certificate::NAME, name.to_owned())
                    .with(certificate::TYPE, CertificateType::Ca)
                    .with(certificate::NOT_BEFORE, shown.not_before)
                    .with(certificate::NOT_AFTER, shown.not_after)
                    .with(certificate::FINGERPRINT, shown.fingerprint),
            );
        }
        Kind::Revocations if !is_revocation_list(pem) => return false,
        Kind::Revocations => {}
    }
    change.insert(
        NewRow::new(Ref::<Trusted>::new(shared.uuid()), shared.uuid())
            .with(trusted::KIND, kind.word().to_owned())
            .with(trusted::NAME, name.to_owned())
            .with(trusted::PEM, pem.to_owned())
            .with(trusted::CERTIFICATE, visible),
    );
    true
}

/// `pool.install_ca_certificate`, `pool.crl_install`: from now on it counts wherever this pool calls another one.
pub(crate) async fn install(cx: &Call, kind: Kind, name: String, pem: String) -> Served<()> {
    if !is_name(&name) {
        return Err(kind.name_invalid(&name));
    }
    persist(cx, |state, change| {
        if named(state, kind, &name).is_some() {
            return Err(kind.exists(&name));
        }
        // Whoever installs another one meanwhile may use the same name.
        change.expect_class_unchanged(Trusted::ID, state.applied);
        if pem.len() <= LARGEST && insert(&cx.shared, change, kind, &name, &pem) {
            Ok(())
        } else {
            Err(kind.corrupt(&name))
        }
    })
    .await
}

/// `pool.uninstall_ca_certificate`, `pool.crl_uninstall`.
pub(crate) async fn uninstall(cx: &Call, kind: Kind, name: String) -> Served<()> {
    if !is_name(&name) {
        return Err(kind.name_invalid(&name));
    }
    persist(cx, |state, change| {
        let row = named(state, kind, &name).ok_or_else(|| kind.missing(&name))?;
        change.expect_row(row).delete(row.get(trusted::CERTIFICATE)).delete(row.typed::<Trusted>());
        Ok(())
    })
    .await
}

/// `pool.certificate_list`, `pool.crl_list`.
pub(crate) fn list(state: &State, kind: Kind) -> Vec<String> {
    let all = state.all::<Trusted>().filter(|row| row.get(trusted::KIND) == kind.word());
    let mut names: Vec<String> = all.map(|row| row.get(trusted::NAME)).collect();
    names.sort();
    names
}

/// What a joining host was given, and this pool was not.
pub(super) fn adopt(shared: &Shared, ours: &State, theirs: &State, change: &mut Transaction) {
    for kind in [Kind::Authority, Kind::Revocations] {
        for row in theirs.all::<Trusted>().filter(|row| row.get(trusted::KIND) == kind.word()) {
            let name = row.get(trusted::NAME);
            if named(ours, kind, &name).is_none() && !insert(shared, change, kind, &name, &row.get(trusted::PEM)) {
                tracing::warn!(name, "what a joining host was given to trust cannot be read");
            }
        }
    }
}

/// `pool.enable_tls_verification`: there is no way back but a host's emergency.
pub(crate) async fn enable_verification(cx: &Call) -> Served<()> {
    persist(cx, |state, change| {
        for row in state.all::<Pool>().filter(|row| !row.get(pool::TLS_VERIFICATION_ENABLED)) {
            change.set(row.typed::<Pool>(), pool::TLS_VERIFICATION_ENABLED, true);
        }
        for row in state.all::<Host>().filter(|row| !row.get(host::TLS_VERIFICATION_ENABLED)) {
            change.set(row.typed::<Host>(), host::TLS_VERIFICATION_ENABLED, true);
        }
        Ok(())
    })
    .await
}

/// `host.get_server_certificate`: what the host shows its clients.
pub(crate) async fn server_certificate(cx: &Call, this: Ref<Host>) -> Served<String> {
    let row = cx.row(this)?;
    let abroad = &cx.shared.surroundings()?.abroad;
    match abroad.certificate(&Trust::default(), &row.get(host::ADDRESS)).await {
        Ok(pem) => Ok(pem),
        Err(error) => {
            tracing::info!(?error, "a host does not show its certificate");
            refuse(errors::host_offline(this))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_no_path_and_not_hidden() {
        for good in ["a", "ca.pem", "Our_CA-2.crt"] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", ".", "..", ".hidden", "-f", "a/b", "a b", "a\0", &"a".repeat(256)] {
            assert!(!is_name(bad), "{bad}");
        }
    }

    #[test]
    fn the_first_certificate_of_an_address_is_the_one_that_counts() {
        let trust = Trust::default();
        assert_eq!(trust.shown_by("one"), None);
        trust.first("one", b"first");
        trust.first("one", b"second");
        trust.first("other", b"third");
        assert_eq!(trust.shown_by("one").as_deref(), Some(&b"first"[..]));
        assert_eq!(trust.shown_by("other").as_deref(), Some(&b"third"[..]));
    }
}
