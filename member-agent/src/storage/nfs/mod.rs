//! Images in a directory of an NFS server. Below the exported path each store has a directory of the SR's uuid.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;

use super::file::{Directory, Ground, probe_below};
use super::program::{apart, trouble};
use super::words::Probed;
use super::{Place, Store, mount};
use crate::step::{Reason, Refusal};

/// A server that does not answer makes a request fail after a while instead of holding its process for ever; what
/// hosts tell each other by names of files must not be hidden by a cache of directories.
const OPTIONS: &str = "soft,timeo=133,retrans=12,acdirmin=0,acdirmax=0,lookupcache=none,noatime";

struct Export {
    place: Place,
    what: String,
    options: String,
}

impl Export {
    fn new(place: Place) -> Result<Self, Refusal> {
        let spec = &place.spec;
        let (server, path) = (spec.needed("server")?, spec.needed("serverpath")?);
        if !path.starts_with('/') {
            return Err(Refusal::new(Reason::BadConfig, "serverpath: must be an absolute path"));
        }
        // Both become part of a command line.
        if server.starts_with('-') || server.contains(['/', ' ', ',']) {
            return Err(Refusal::new(Reason::BadConfig, "server: is no name of a server"));
        }
        let server = if server.contains(':') { format!("[{server}]") } else { server.to_owned() };
        let what = format!("{server}:{path}");
        let mut options = OPTIONS.to_owned();
        if let Some(version) = spec.said("nfsversion") {
            if !matches!(version, "3" | "4" | "4.0" | "4.1" | "4.2") {
                return Err(Refusal::new(Reason::BadConfig, format!("nfsversion: {version:?} is none")));
            }
            options = format!("{options},vers={version}");
        }
        Ok(Self { what, options, place })
    }

    async fn mounted(&self) -> Result<PathBuf, Refusal> {
        let arguments = ["-t", "nfs", "-o", &self.options, &self.what].map(str::to_owned);
        mount::mount(&self.place, &arguments).await
    }
}

#[async_trait]
impl Ground for Export {
    async fn up(&self, make: bool) -> Result<PathBuf, Refusal> {
        let dir = self.mounted().await?.join(self.place.spec.sr.to_string());
        let what = self.what.clone();
        let found = apart(move || {
            if make {
                fs::create_dir_all(&dir).map_err(|error| trouble(&dir, &error))?;
            }
            let none = || Refusal::new(Reason::NoSuchStore, format!("serverpath: {what} has no such store"));
            fs::canonicalize(&dir).ok().filter(|dir| dir.is_dir()).ok_or_else(none)
        })
        .await;
        if found.is_err() {
            mount::unmount(&self.place).await?;
        }
        found
    }

    async fn down(&self) -> Result<(), Refusal> {
        mount::unmount(&self.place).await
    }

    async fn probe(&self) -> Result<Vec<Probed>, Refusal> {
        let (dir, config) = (self.mounted().await?, self.place.spec.device_config.clone());
        let probed = apart(move || probe_below(&dir, &config)).await;
        mount::unmount(&self.place).await?;
        probed
    }
}

/// A store on a server.
pub(super) fn open(place: Place) -> Result<Arc<dyn Store>, Refusal> {
    let ground = Export::new(place.clone())?;
    Ok(Directory::open(place, Box::new(ground)))
}
