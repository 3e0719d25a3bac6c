//! Where this host's place in a pool is kept, and how it takes another.
//!
//! ```text
//! DATA_DIR/current -> seat-3          the host's only seat; replaced by rename
//! DATA_DIR/seat-3/{seat.json, tls/{ca.pem,host.pem,host.key}, db/}
//! ```
//!
//! A host that never changed pools has none of this: its database is in DATA_DIR itself and the configuration says the
//! rest. A new seat is written whole, with its certificates, before `current` points at it. A crash before that leaves
//! the old seat, a crash after it the new one; what is left over goes at the next start. The agent of this host reads
//! its certificates through `current`, so that both daemons change pools in that one step.

use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, bail};
use async_trait::async_trait;
use controller::certificates::Issued;
use controller::{Alone, Home, Seat};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

const CURRENT: &str = "current";
const PREFIX: &str = "seat-";
const VERSION: u32 = 1;

/// The directory of seats.
#[derive(Clone)]
pub struct Seats {
    root: PathBuf,
    /// What the configuration says, where no seat was ever taken.
    first: Arc<OnceLock<Seat>>,
    /// Cancelled when this life is to end and the next to begin.
    again: CancellationToken,
}

/// What of a seat is no certificate.
#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    node_id: u64,
    alone: Option<Founding>,
}

#[derive(Serialize, Deserialize)]
struct Founding {
    ca_key: String,
    password_hash: String,
}

impl Seats {
    /// Those in this directory.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), first: Arc::default(), again: CancellationToken::new() }
    }

    /// Told when the controller is to start anew.
    pub fn again(&self) -> &CancellationToken {
        &self.again
    }

    /// The host is what its configuration says.
    pub fn has(&self, seat: &Seat) {
        let _ = self.first.set(seat.clone());
    }

    /// The seat that was taken last, with the place of its database; none where the configuration says it all. What
    /// other seats left behind goes.
    pub fn current(&self) -> anyhow::Result<Option<(PathBuf, Seat)>> {
        let link = self.root.join(CURRENT);
        let place = match std::fs::read_link(&link) {
            Ok(target) => self.root.join(target),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.sweep(None);
                return Ok(None);
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", link.display())),
        };
        let read = |name: &str| {
            let path = place.join(name);
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let record: Record = serde_json::from_str(&read("seat.json")?).context("seat.json is damaged")?;
        if record.version > VERSION {
            bail!("{} is of version {}, this program knows {VERSION}", place.display(), record.version);
        }
        let seat = Seat {
            node_id: record.node_id,
            ca: read("tls/ca.pem")?,
            identity: Issued { certificate: read("tls/host.pem")?, key: read("tls/host.key")? },
            alone: record
                .alone
                .map(|founding| Alone { ca_key: founding.ca_key, password_hash: founding.password_hash }),
        };
        self.sweep(Some(&place));
        Ok(Some((place.join("db"), seat)))
    }

    /// Seats that were never taken or have been left, and the first database once there is a seat. What cannot be
    /// removed now is removed next time.
    fn sweep(&self, taken: Option<&Path>) {
        let Ok(entries) = std::fs::read_dir(&self.root) else { return };
        for entry in entries.flatten() {
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            let left = if name.starts_with(PREFIX) {
                taken != Some(path.as_path())
            } else {
                // A first seat whose certificates were replaced keeps its database where it is.
                taken.is_some_and(|place| !place.join("db").is_symlink()) && raft_store::is_of_a_database(&name)
            };
            if !left {
                continue;
            }
            let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            match removed {
                Ok(()) => tracing::info!(path = %path.display(), "an old seat is cleared"),
                Err(error) => tracing::warn!(path = %path.display(), %error, "an old seat is not cleared yet"),
            }
        }
    }

    fn make(&self) -> io::Result<PathBuf> {
        let numbers = std::fs::read_dir(&self.root)?
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.strip_prefix(PREFIX)?.parse::<u64>().ok());
        let place = self.root.join(format!("{PREFIX}{}", numbers.max().unwrap_or(0) + 1));
        private_dir(&place)?;
        Ok(place)
    }

    /// Replaces the certificates of the seat there is. A host without one takes its first: the same, in a place where
    /// they can be replaced.
    fn replace(&self, ca: &str, certificate: &str) -> io::Result<()> {
        let tls = self.root.join(CURRENT).join("tls");
        if tls.is_dir() {
            for (name, text) in [("ca.pem", ca), ("host.pem", certificate)] {
                let fresh = tls.join(format!("{name}.new"));
                match std::fs::remove_file(&fresh) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
                private_file(&fresh, text)?;
                std::fs::rename(&fresh, tls.join(name))?;
            }
            return sync_dir(&tls);
        }
        let first = self.first.get().ok_or_else(|| io::Error::other("this host has no seat"))?;
        let mut seat = first.clone();
        (seat.ca, seat.identity.certificate) = (ca.to_owned(), certificate.to_owned());
        let place = self.make()?;
        std::os::unix::fs::symlink("..", place.join("db"))?;
        self.furnish(&place, &seat)
    }

    fn furnish(&self, place: &Path, seat: &Seat) -> io::Result<()> {
        let record = Record {
            version: VERSION,
            node_id: seat.node_id,
            alone: seat
                .alone
                .as_ref()
                .map(|alone| Founding { ca_key: alone.ca_key.clone(), password_hash: alone.password_hash.clone() }),
        };
        let tls = place.join("tls");
        private_dir(&tls)?;
        private_file(&tls.join("ca.pem"), &seat.ca)?;
        private_file(&tls.join("host.pem"), &seat.identity.certificate)?;
        private_file(&tls.join("host.key"), &seat.identity.key)?;
        private_file(&place.join("seat.json"), &serde_json::to_string_pretty(&record)?)?;
        for dir in [&tls, place, &self.root] {
            sync_dir(dir)?;
        }
        let name = place.file_name().ok_or_else(|| io::Error::other("a seat without a name"))?;
        let fresh = self.root.join("current.new");
        match std::fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::os::unix::fs::symlink(name, &fresh)?;
        // From here on the host is of the other pool.
        std::fs::rename(&fresh, self.root.join(CURRENT))?;
        sync_dir(&self.root)
    }
}

fn private_dir(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().mode(0o700).create(path)
}

fn private_file(path: &Path, text: &str) -> io::Result<()> {
    use std::io::Write as _;
    let mut file = std::fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

fn sync_dir(path: &Path) -> io::Result<()> {
    std::fs::File::open(path)?.sync_all()
}

#[async_trait]
impl Home for Seats {
    async fn begin(&self) -> io::Result<PathBuf> {
        let this = self.clone();
        tokio::task::spawn_blocking(move || this.make()).await.map_err(io::Error::other)?
    }

    async fn take(&self, place: &Path, seat: &Seat) -> io::Result<()> {
        let (this, place, seat) = (self.clone(), place.to_owned(), seat.clone());
        tokio::task::spawn_blocking(move || this.furnish(&place, &seat)).await.map_err(io::Error::other)?
    }

    async fn renew(&self, ca: &str, certificate: &str) -> io::Result<()> {
        let (this, ca, certificate) = (self.clone(), ca.to_owned(), certificate.to_owned());
        tokio::task::spawn_blocking(move || this.replace(&ca, &certificate)).await.map_err(io::Error::other)?
    }

    fn restart(&self) {
        self.again.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seat(node_id: u64) -> Seat {
        Seat {
            node_id,
            ca: format!("ca of {node_id}"),
            identity: Issued { certificate: "certificate".into(), key: "key".into() },
            alone: None,
        }
    }

    #[test]
    fn certificates_are_replaced_where_the_host_is_and_its_database_stays() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("CURRENT"), "the database").unwrap();
        let seats = Seats::new(dir.path());
        seats.has(&seat(7));
        for round in 0..3 {
            seats.replace(&format!("ca {round}"), &format!("certificate {round}")).unwrap();
            let (database, now) = Seats::new(dir.path()).current().unwrap().unwrap();
            assert_eq!((now.node_id, now.ca), (7, format!("ca {round}")));
            assert_eq!((now.identity.certificate, now.identity.key.as_str()), (format!("certificate {round}"), "key"));
            assert_eq!(std::fs::read_to_string(database.join("CURRENT")).unwrap(), "the database");
        }
        // Another seat leaves that database behind.
        let place = seats.make().unwrap();
        seats.furnish(&place, &seat(9)).unwrap();
        seats.current().unwrap();
        assert!(!dir.path().join("CURRENT").exists());
    }

    #[test]
    fn a_seat_counts_from_the_moment_it_is_taken_and_what_was_left_is_cleared() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["CURRENT", "000004.log", "something of the operator's"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let seats = Seats::new(dir.path());
        assert!(seats.current().unwrap().is_none());
        // A crash before it is taken leaves nothing.
        let place = seats.make().unwrap();
        std::fs::write(place.join("seat.json"), "half").unwrap();
        assert!(seats.current().unwrap().is_none());
        assert!(!place.exists() && dir.path().join("CURRENT").exists());

        for node_id in [7, 9] {
            let place = seats.make().unwrap();
            seats.furnish(&place, &seat(node_id)).unwrap();
            let (database, taken) = seats.current().unwrap().unwrap();
            assert_eq!((taken.node_id, database), (node_id, place.join("db")));
        }
        let mut left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["current", "seat-2", "something of the operator's"]);
    }
}
