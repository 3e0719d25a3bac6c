//! The pool's certificate authority and the certificates of its hosts.
//!
//! Peers and agents show one another certificates of this authority; clients see another one, which
//! the gateway makes for itself.

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};

/// Every member's certificate is good for this name.
pub const PEER_NAME: &str = "xenith-peer";

/// A certificate could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a certificate: {0}")]
pub struct CertificateError(#[from] rcgen::Error);

/// A certificate and its key, as PEM texts.
#[derive(Clone)]
pub struct Issued {
    /// The certificate.
    pub certificate: String,
    /// Its key: for root's eyes only.
    pub key: String,
}

/// Makes the authority of a new pool.
///
/// # Errors
/// When the system has no randomness.
pub fn create_authority(pool: &str) -> Result<Issued, CertificateError> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::<String>::new())?;
    params.distinguished_name.push(DnType::CommonName, format!("Xenith pool {pool}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key)?;
    Ok(Issued { certificate: certificate.pem(), key: key.serialize_pem() })
}

/// Makes a host's certificate, good for its addresses and for the name that peers ask for.
///
/// # Errors
/// When the authority's texts cannot be read, or an address is no address.
pub fn issue(authority: &Issued, host: &str, addresses: &[std::net::IpAddr]) -> Result<Issued, CertificateError> {
    let issuer = Issuer::from_ca_cert_pem(&authority.certificate, KeyPair::from_pem(&authority.key)?)?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![PEER_NAME.to_owned()])?;
    params.distinguished_name.push(DnType::CommonName, host.to_owned());
    params.subject_alt_names.extend(addresses.iter().map(|address| SanType::IpAddress(*address)));
    let certificate = params.signed_by(&key, &issuer)?;
    Ok(Issued { certificate: certificate.pem(), key: key.serialize_pem() })
}
