//! Stand-ins until the crates land.
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
    pub fn make(_name: &str) -> anyhow::Result<Self> {
        Ok(Self { cert: "x".into(), key: "x".into() })
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
    pub fn issue(&self, _host: Uuid, _address: IpAddr) -> anyhow::Result<Issued> {
        Ok(Issued { key_pem: "k".into(), certificate_pem: "c".into() })
    }
}
