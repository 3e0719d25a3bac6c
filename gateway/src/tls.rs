//! The certificate that clients see, and TLS as old clients need it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
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
    /// A self-signed certificate and its key. RSA, because one of the published clients knows no other key under TLS 1.2.
    fn make(&self) -> Result<Pair, TlsError> {
        let key = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048)?;
        let mut params = CertificateParams::new(vec![self.hostname.clone()])?;
        params.distinguished_name.push(DnType::CommonName, self.hostname.clone());
        params.subject_alt_names.extend(self.addresses.iter().map(|address| SanType::IpAddress(*address)));
        let certificate = params.self_signed(&key)?;
        Ok(Pair { certificate: certificate.pem(), key: key.serialize_pem() })
    }

    /// What was to take the place of both files when it was written: the key, then the certificates.
    fn next(&self) -> PathBuf {
        let mut path = self.key.as_os_str().to_owned();
        path.push(".next");
        path.into()
    }

    /// Puts certificate and key on disk. Two files cannot change at once, so both are in a third one first: whoever
    /// starts after a crash in between goes on from there.
    fn put(&self, pair: &Pair) -> Result<(), TlsError> {
        let next = self.next();
        write(&next, &format!("{}\n{}", pair.key.trim_end(), pair.certificate), 0o600)?;
        write(&self.key, &pair.key, 0o600)?;
        write(&self.certificate, &pair.certificate, 0o644)?;
        std::fs::remove_file(&next).map_err(|source| TlsError::File { path: next, source })
    }

    /// What is on disk; made where there is nothing.
    fn read(&self) -> Result<Pair, TlsError> {
        let next = self.next();
        let text = |path: &Path| {
            std::fs::read_to_string(path).map_err(|source| TlsError::File { path: path.to_owned(), source })
        };
        if next.exists() {
            let both = text(&next)?;
            let begin = both.find(CERTIFICATE).unwrap_or(both.len());
            let (key, certificate) = both.split_at(begin);
            self.put(&Pair { certificate: certificate.to_owned(), key: key.to_owned() })?;
        }
        if !self.certificate.exists() || !self.key.exists() {
            self.put(&self.make()?)?;
            tracing::info!(certificate = %self.certificate.display(), "made a self-signed certificate");
        }
        Ok(Pair { certificate: text(&self.certificate)?, key: text(&self.key)? })
    }
}

const CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----";

/// A certificate, those of its issuers after it, and its key, as PEM texts.
struct Pair {
    certificate: String,
    key: String,
}

impl Pair {
    /// The server's side: TLS 1.2 and 1.3, no client certificates.
    fn server(&self) -> Result<ServerConfig, TlsError> {
        let unusable = |error: &dyn std::fmt::Display| TlsError::Unusable(error.to_string());
        let chain: Vec<_> = CertificateDer::pem_slice_iter(self.certificate.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(|error| unusable(&error))?;
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).map_err(|error| unusable(&error))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(|error| unusable(&error))?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|error| unusable(&error))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec(), b"http/1.0".to_vec()];
        Ok(config)
    }
}

/// The certificate that clients see. It can be exchanged at any time: connections that are there keep the one they began
/// with, the next one sees the other.
#[derive(Clone)]
pub struct ApiCertificate(Arc<Served>);

struct Served {
    files: TlsFiles,
    /// Read, or made, when it is first needed.
    server: ArcSwapOption<ServerConfig>,
    /// One change at a time.
    exchange: Mutex<()>,
}

impl ApiCertificate {
    /// That of these files.
    #[must_use]
    pub fn of(files: TlsFiles) -> Self {
        Self(Arc::new(Served { files, server: ArcSwapOption::empty(), exchange: Mutex::new(()) }))
    }

    /// How the next connection is served. The certificate is made where there is none.
    pub(crate) fn server(&self) -> Result<Arc<ServerConfig>, TlsError> {
        if let Some(server) = self.0.server.load_full() {
            return Ok(server);
        }
        let _alone = self.0.exchange.lock();
        let server = Arc::new(self.0.files.read()?.server()?);
        self.0.server.store(Some(Arc::clone(&server)));
        Ok(server)
    }

    /// Shows another one from now on, on disk too: this one with its key, or one that is made anew and signed by itself.
    /// Returns what is shown, as a PEM text. Takes as long as a disk, and a key, may take.
    ///
    /// # Errors
    /// [`TlsError`]; then nothing has changed, but where a file could not be written: that is done at the next start.
    pub fn exchange(&self, given: Option<(String, String)>) -> Result<String, TlsError> {
        let _alone = self.0.exchange.lock();
        let pair = match given {
            Some((certificate, key)) => Pair { certificate, key },
            None => self.0.files.make()?,
        };
        let server = pair.server()?;
        self.0.files.put(&pair)?;
        self.0.server.store(Some(Arc::new(server)));
        tracing::info!("clients see another certificate from now on");
        Ok(pair.certificate)
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn files(directory: &Path) -> TlsFiles {
        let (certificate, key) = (directory.join("tls/api.pem"), directory.join("tls/api.key"));
        TlsFiles { certificate, key, addresses: Vec::new(), hostname: "host".to_owned() }
    }

    #[test]
    fn an_exchange_of_certificate_and_key_that_was_cut_off_is_finished_at_the_next_start() {
        let directory = tempfile::tempdir().unwrap();
        let files = files(directory.path());
        let (old, new) = (files.make().unwrap(), files.make().unwrap());
        let both = format!("{}{}", new.key, new.certificate);
        // Killed before, between and after the two files.
        for (key, certificate) in
            [(&old.key, &old.certificate), (&new.key, &old.certificate), (&new.key, &new.certificate)]
        {
            write(&files.key, key, 0o600).unwrap();
            write(&files.certificate, certificate, 0o644).unwrap();
            write(&files.next(), &both, 0o600).unwrap();
            ApiCertificate::of(files.clone()).server().unwrap();
            let read = files.read().unwrap();
            assert_eq!((read.key.trim(), read.certificate.trim()), (new.key.trim(), new.certificate.trim()));
            assert!(!files.next().exists());
        }
    }

    #[test]
    fn what_cannot_be_served_is_not_taken() {
        let directory = tempfile::tempdir().unwrap();
        let files = files(directory.path());
        let shown = ApiCertificate::of(files.clone());
        shown.server().unwrap();
        let before = files.read().unwrap();
        let (one, other) = (files.make().unwrap(), files.make().unwrap());
        for (certificate, key) in [(one.certificate.clone(), other.key), (String::new(), one.key.clone())] {
            shown.exchange(Some((certificate, key))).unwrap_err();
            assert_eq!(files.read().unwrap().certificate, before.certificate);
        }
        assert_eq!(shown.exchange(Some((one.certificate.clone(), one.key))).unwrap(), one.certificate);
        assert_eq!(files.read().unwrap().certificate, one.certificate);
    }
}
