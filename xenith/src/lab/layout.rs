//! Where a lab keeps its things.
//!
//! ```text
//! DIR/lab.json  DIR/lab.lock  DIR/root-password  DIR/ca/{ca.pem,ca.key}  DIR/storage/
//! DIR/host1/{controller.toml,agent.toml,controller.log,agent.log,boot-id,socket,controller/,agent/,tls/}
//! DIR/host1/storage/{local/,shared -> ../../storage}
//! ```

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// How long one lab command waits for another on the same directory.
const LOCK_LIMIT: Duration = Duration::from_secs(60);
/// The kernel takes no longer path for a Unix socket.
const LONGEST_SOCKET: usize = 107;
const DEEPEST_SOCKET: &str = "/host64/socket";

/// The directory of a lab, as an absolute path without links: daemons and domains are found by it.
#[derive(Clone, Debug)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// A lab that is there already.
    pub fn existing(dir: &Path) -> anyhow::Result<Self> {
        let root = dir.canonicalize().with_context(|| {
            format!("there is no lab in {}; make one with: xenith lab up --dir {}", dir.display(), dir.display())
        })?;
        Ok(Self { root })
    }

    /// A lab that may have to be made.
    pub fn make(dir: &Path) -> anyhow::Result<Self> {
        private_dir(dir)?;
        let layout = Self::existing(dir)?;
        let owner = std::fs::metadata(&layout.root).with_context(|| format!("cannot look at {}", dir.display()))?.uid();
        if owner != rustix::process::getuid().as_raw() {
            bail!("{} belongs to another user; choose another --dir", layout.root.display());
        }
        let deepest = layout.root.as_os_str().len() + DEEPEST_SOCKET.len();
        if deepest > LONGEST_SOCKET {
            bail!(
                "{} is too long a path: the sockets in it would exceed the kernel's {LONGEST_SOCKET} characters by {}; choose a shorter --dir",
                layout.root.display(),
                deepest - LONGEST_SOCKET
            );
        }
        Ok(layout)
    }

    /// One lab command at a time changes a directory; held until the file is dropped.
    pub fn lock(&self) -> anyhow::Result<File> {
        let path = self.root.join("lab.lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        let limit = Instant::now() + LOCK_LIMIT;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if Instant::now() < limit => {
                    std::thread::sleep(Duration::from_millis(20))
                }
                Err(TryLockError::WouldBlock) => {
                    bail!("another lab command has been at work in {} for over a minute", self.root.display())
                }
                Err(TryLockError::Error(error)) => {
                    return Err(error).with_context(|| format!("cannot lock {}", path.display()));
                }
            }
        }
    }

    /// The lab's own directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What the lab was made of.
    pub fn plan(&self) -> PathBuf {
        self.root.join("lab.json")
    }

    /// The first password of root.
    pub fn root_password(&self) -> PathBuf {
        self.root.join("root-password")
    }

    /// The pool's CA.
    pub fn ca(&self) -> PathBuf {
        self.root.join("ca")
    }

    /// Storage that all hosts reach.
    pub fn shared_storage(&self) -> PathBuf {
        self.root.join("storage")
    }

    /// A host of the lab.
    pub fn host(&self, name: &str) -> HostLayout {
        HostLayout { root: self.root.join(name) }
    }
}

/// The directory of one host.
#[derive(Clone, Debug)]
pub struct HostLayout {
    root: PathBuf,
}

impl HostLayout {
    /// The host's own directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The controller's configuration.
    pub fn controller_config(&self) -> PathBuf {
        self.root.join("controller.toml")
    }

    /// The agent's configuration.
    pub fn agent_config(&self) -> PathBuf {
        self.root.join("agent.toml")
    }

    /// The controller's log.
    pub fn controller_log(&self) -> PathBuf {
        self.root.join("controller.log")
    }

    /// The agent's log.
    pub fn agent_log(&self) -> PathBuf {
        self.root.join("agent.log")
    }

    /// The replicated database.
    pub fn controller_data(&self) -> PathBuf {
        self.root.join("controller")
    }

    /// The agent's state; every domain's command line names it.
    pub fn agent_state(&self) -> PathBuf {
        self.root.join("agent")
    }

    /// Where the host's stores are: its own, and a link to what all share.
    pub fn storage(&self) -> PathBuf {
        self.root.join("storage")
    }

    /// What tells one boot of the host from the next.
    pub fn boot_id(&self) -> PathBuf {
        self.root.join("boot-id")
    }

    /// Certificates and keys.
    pub fn tls(&self) -> PathBuf {
        self.root.join("tls")
    }

    /// The Unix socket of the API.
    pub fn socket(&self) -> PathBuf {
        self.root.join("socket")
    }
}

/// Makes a directory that only its owner can enter.
pub fn private_dir(path: &Path) -> anyhow::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make the directory {}", path.display()))
}

/// Writes a file that only its owner can read, in one step: a reader sees the old file or the new one.
pub fn private_file(path: &Path, text: &str) -> anyhow::Result<()> {
    let fresh = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&fresh, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
