//! The certificate that clients see, and TLS as old clients need it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{CertificateParams, DnType, KeyPair, PKCS_RSA_SHA256, SanType};
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// Where certificate and key are; made at the first start where they are missing.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// PEM.
    pub certificate: PathBuf,
    /// PEM, readable by its owner only.
    pub key: PathBuf,
    /// Addresses the certificate is made for.
    pub addresses: Vec<std::net::IpAddr>,
    /// The host's name.
    pub hostname: String,
}

/// TLS cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file.
    #[error("{path}: {source}")]
    File {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// The files do not hold what they should.
    #[error("certificate or key is unusable: {0}")]
    Unusable(String),
}

impl TlsFiles {
    /// Makes a self-signed certificate where there is none. RSA, because one of the published clients knows
    /// no other key under TLS 1.2.
    fn ensure(&self) -> Result<(), TlsError> {
        if self.certificate.exists() && self.key.exists() {
            return Ok(());
        }
        let key = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048)?;
        let mut params = CertificateParams::new(vec![self.hostname.clone()])?;
        params.distinguished_name.push(DnType::CommonName, self.hostname.clone());
        params.subject_alt_names.extend(self.addresses.iter().map(|address| SanType::IpAddress(*address)));
        let certificate = params.self_signed(&key)?;
        write(&self.key, &key.serialize_pem(), 0o600)?;
        write(&self.certificate, &certificate.pem(), 0o644)?;
        tracing::info!(certificate = %self.certificate.display(), "made a self-signed certificate");
        Ok(())
    }

    /// The server's side: TLS 1.2 and 1.3, no client certificates.
    pub(crate) fn server(&self) -> Result<Arc<ServerConfig>, TlsError> {
        self.ensure()?;
        let unusable = |error: &dyn std::fmt::Display| TlsError::Unusable(error.to_string());
        let chain: Vec<_> = CertificateDer::pem_file_iter(&self.certificate)
            .map_err(|error| unusable(&error))?
            .collect::<Result<_, _>>()
            .map_err(|error| unusable(&error))?;
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|error| unusable(&error))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(|error| unusable(&error))?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|error| unusable(&error))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec(), b"http/1.0".to_vec()];
        Ok(Arc::new(config))
    }
}

/// Whole or not at all: a start that is cut off leaves nothing half-written that would stop the next one.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), TlsError> {
    use std::io::Write as _;
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
    let failed = |source| TlsError::File { path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let put = || {
        let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&new)?;
        // The mode above is that of a new file only.
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, path)
    };
    put().map_err(failed)
}
