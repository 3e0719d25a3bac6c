//! Where a database lives, and what is kept beside it: a folder, or what a simulation has in its place.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::damage::is_of_a_database;
use super::engine::Engine;
use super::open::OpenError;
use super::promises::{self, Promise};
use super::rocks::Rocks;

/// The fence's record, beside the database's own files.
pub(super) const FENCE: &str = "fence";
/// Where a damaged database is kept, for who wants to look at it; the next one takes its place.
const ASIDE: &str = "damaged";

/// A place for one database. What is damaged in it is moved aside; the fence that is raised then stands beside it.
pub trait Place: Send + Sync + 'static {
    /// The database there is, or an empty one; and what was promised by it. What is found in it is synced: a process that was
    /// killed may have written without that, and the next one tells its peers what it has.
    ///
    /// # Errors
    /// [`OpenError`], of damage where that is why.
    fn open(&self) -> Result<(Arc<dyn Engine>, Promise), OpenError>;

    /// Moves the database out of the way, and what it promised. Broken off, it goes on where it was.
    ///
    /// # Errors
    /// What the disk says.
    fn put_aside(&self) -> io::Result<()>;

    /// The fence's record, if one stands.
    ///
    /// # Errors
    /// What the disk says.
    fn fence(&self) -> io::Result<Option<Vec<u8>>>;

    /// Replaces the fence's record, or removes it; what crashes leave is the one or the other.
    ///
    /// # Errors
    /// What the disk says.
    fn keep_fence(&self, record: Option<Vec<u8>>) -> io::Result<()>;

    /// How it is called in what is told of it.
    fn name(&self) -> String;
}

/// A folder of files.
pub struct Folder(PathBuf);

impl Folder {
    /// The folder there; it has to exist.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.0)?.sync_all()
    }
}

impl Place for Folder {
    fn open(&self) -> Result<(Arc<dyn Engine>, Promise), OpenError> {
        let rocks = Rocks::open(&self.0)?;
        let promise = rocks.promise();
        Ok((Arc::new(rocks), promise))
    }

    fn put_aside(&self) -> io::Result<()> {
        let aside = self.0.join(ASIDE);
        let files: Vec<_> = std::fs::read_dir(&self.0)?.collect::<Result<_, _>>()?;
        let ours = |name: std::ffi::OsString| name != FENCE && name.to_str().is_some_and(is_of_a_database);
        let files: Vec<_> = files.into_iter().filter(|file| ours(file.file_name())).collect();
        // Of a database that is being moved already, more than the rest is there.
        if files.iter().any(|file| file.file_name() == promises::FILE) && aside.exists() {
            std::fs::remove_dir_all(&aside)?;
        }
        std::fs::create_dir_all(&aside)?;
        let (promises, rest): (Vec<_>, Vec<_>) = files.into_iter().partition(|file| file.file_name() == promises::FILE);
        for file in promises.into_iter().chain(rest) {
            std::fs::rename(file.path(), aside.join(file.file_name()))?;
        }
        self.sync()
    }

    fn fence(&self) -> io::Result<Option<Vec<u8>>> {
        match std::fs::read(self.0.join(FENCE)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn keep_fence(&self, record: Option<Vec<u8>>) -> io::Result<()> {
        let path = self.0.join(FENCE);
        let Some(record) = record else {
            std::fs::remove_file(path)?;
            return self.sync();
        };
        let fresh = path.with_extension("new");
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
        file.write_all(&record)?;
        file.sync_all()?;
        std::fs::rename(&fresh, path)?;
        self.sync()
    }

    fn name(&self) -> String {
        self.0.display().to_string()
    }
}
