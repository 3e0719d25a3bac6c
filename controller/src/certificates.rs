//! The pool's certificate authority and the certificates of its hosts.
//!
//! Peers and agents show one another certificates of this authority; clients see another one, which
//! the gateway makes for itself.

use std::net::IpAddr;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
    SubjectPublicKeyInfo,
};
use x509_parser::pem::parse_x509_pem;

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

/// A key pair whose certificate somebody else signs, as PEM texts.
pub struct NewKey {
    /// To be shown.
    pub public: String,
    /// To be kept.
    pub private: String,
}

/// Makes a key pair.
///
/// # Errors
/// When the system has no randomness.
pub fn new_key() -> Result<NewKey, CertificateError> {
    let key = KeyPair::generate()?;
    Ok(NewKey { public: key.public_key_pem(), private: key.serialize_pem() })
}

/// Makes a host's certificate, good for its addresses and for the name that peers ask for.
///
/// # Errors
/// When the authority's texts cannot be read, or an address is no address.
pub fn issue(authority: &Issued, host: &str, addresses: &[IpAddr]) -> Result<Issued, CertificateError> {
    let key = KeyPair::generate()?;
    Ok(Issued { certificate: certify(authority, &key, host, addresses)?, key: key.serialize_pem() })
}

/// Makes the certificate of a host that keeps its key to itself.
///
/// # Errors
/// When the authority's texts or the public key cannot be read.
pub fn sign(
    authority: &Issued,
    public_key: &str,
    host: &str,
    addresses: &[IpAddr],
) -> Result<String, CertificateError> {
    certify(authority, &SubjectPublicKeyInfo::from_pem(public_key)?, host, addresses)
}

/// Makes another certificate for the key of one there is.
///
/// # Errors
/// When the authority's texts or the certificate cannot be read.
pub fn renew(
    authority: &Issued,
    certificate: &str,
    host: &str,
    addresses: &[IpAddr],
) -> Result<String, CertificateError> {
    let unreadable = |error: &dyn std::fmt::Display| CertificateError(rcgen::Error::X509(error.to_string()));
    let (_, pem) = parse_x509_pem(certificate.as_bytes()).map_err(|error| unreadable(&error))?;
    let parsed = pem.parse_x509().map_err(|error| unreadable(&error))?;
    let key = SubjectPublicKeyInfo::from_der(parsed.public_key().raw)?;
    certify(authority, &key, host, addresses)
}

/// The last of several certificates in one text: the authority that signs.
#[must_use]
pub fn newest(bundle: &str) -> &str {
    bundle.rfind("-----BEGIN CERTIFICATE-----").map_or(bundle, |start| &bundle[start..])
}

fn certify(
    authority: &Issued,
    key: &impl PublicKeyData,
    host: &str,
    addresses: &[IpAddr],
) -> Result<String, CertificateError> {
    let issuer = Issuer::from_ca_cert_pem(&authority.certificate, KeyPair::from_pem(&authority.key)?)?;
    let mut params = CertificateParams::new(vec![PEER_NAME.to_owned()])?;
    params.distinguished_name.push(DnType::CommonName, host.to_owned());
    params.subject_alt_names.extend(addresses.iter().map(|address| SanType::IpAddress(*address)));
    Ok(params.signed_by(key, &issuer)?.pem())
}
