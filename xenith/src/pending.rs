//! Stand-ins until the crates land.
use rcgen::*;
use std::net::IpAddr;
use uuid::Uuid;
pub struct PoolAuthority {
    cert: String,
    key: String,
}
pub struct Issued {
    pub key_pem: String,
    pub certificate_pem: String,
}
impl PoolAuthority {
    pub fn make(name: &str) -> anyhow::Result<Self> {
        let mut params = CertificateParams::new(vec![])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate()?;
        Ok(Self { cert: params.self_signed(&key)?.pem(), key: key.serialize_pem() })
    }
    pub fn load(cert: &str, key: &str) -> anyhow::Result<Self> {
        Ok(Self { cert: cert.into(), key: key.into() })
    }
    pub fn key_pem(&self) -> &str {
        &self.key
    }
    pub fn certificate_pem(&self) -> &str {
        &self.cert
    }
    pub fn issue(&self, host: Uuid, address: IpAddr) -> anyhow::Result<Issued> {
        let issuer = Issuer::from_ca_cert_pem(&self.cert, KeyPair::from_pem(&self.key)?)?;
        let key = KeyPair::generate()?;
        let params = CertificateParams::new(vec![address.to_string(), host.to_string()])?;
        Ok(Issued { certificate_pem: params.signed_by(&key, &issuer)?.pem(), key_pem: key.serialize_pem() })
    }
}
