//! Room for files that are of no use once their maker has gone: copies and replays.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use super::Error;

/// A directory below the data directory that goes when it is dropped. What a killed process leaves is swept by the next
/// one that makes or looks for such a directory.
#[derive(Debug)]
pub struct Scratch {
    directory: tempfile::TempDir,
    /// Locked as long as this process lives: whoever sweeps tells by it that the directory is in use.
    _lock: File,
}

impl Scratch {
    /// Makes one.
    pub fn new(data: &Path) -> Result<Scratch, Error> {
        let all = data.join(DIRECTORY);
        let failed = |error| Error::File { path: all.clone(), error };
        std::fs::create_dir_all(&all).map_err(failed)?;
        // Nobody sweeps between the making of a directory and the locking of it.
        let _one = lock(&all.join(LOCK)).map_err(failed)?;
        sweep(&all).map_err(failed)?;
        let make = || {
            let directory = tempfile::TempDir::new_in(&all)?;
            let held = lock(&directory.path().join(LOCK))?;
            Ok(Scratch { directory, _lock: held })
        };
        make().map_err(failed)
    }

    /// Removes what killed processes have left in a data directory.
    pub fn sweep(data: &Path) -> Result<(), Error> {
        let all = data.join(DIRECTORY);
        if !all.exists() {
            return Ok(());
        }
        let clean = || {
            let _one = lock(&all.join(LOCK))?;
            sweep(&all)
        };
        clean().map_err(|error| Error::File { path: all.clone(), error })
    }

    /// Where a file of this name can be.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

const DIRECTORY: &str = "shadow";
const LOCK: &str = "lock";

/// Waits for whoever has it.
fn lock(path: &Path) -> std::io::Result<File> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    file.lock()?;
    Ok(file)
}

fn sweep(all: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(all)? {
        let directory = entry?.path();
        if !directory.is_dir() {
            continue;
        }
        let in_use = File::open(directory.join(LOCK))
            .is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)));
        if !in_use {
            std::fs::remove_dir_all(directory)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_stays_and_what_is_left_goes() {
        let data = tempfile::tempdir().unwrap();
        Scratch::sweep(data.path()).unwrap();
        let used = Scratch::new(data.path()).unwrap();
        std::fs::write(used.file("rows"), "x").unwrap();
        // As a killed process leaves it: the file is there, the lock is not.
        let left = data.path().join(DIRECTORY).join("left");
        std::fs::create_dir(&left).unwrap();
        std::fs::write(left.join(LOCK), "").unwrap();
        let second = Scratch::new(data.path()).unwrap();
        assert!(used.file("rows").exists() && !left.exists());
        let path = second.file("");
        drop(second);
        assert!(!path.exists());
        std::fs::create_dir(&left).unwrap();
        Scratch::sweep(data.path()).unwrap();
        assert!(used.file("rows").exists() && !left.exists());
    }
}
