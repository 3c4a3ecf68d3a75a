//! Whose turn it is to write.
//!
//! SQLite lets whoever looks at the right moment have the lock, and others wait longer between their looks each time: a
//! command that appends a file would keep a runtime from appending for seconds. So writers of all processes take turns:
//! who wants one waits for `log.next`, then for `log.turn`, and gives `log.next` back. Whoever has just had a turn finds
//! the next one waiting there.

use std::fs::{File, TryLockError};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::config::limits;

/// The two lock files of a log.
pub(super) struct Turns {
    next: File,
    turn: File,
}

/// A turn; dropping it ends it.
pub(super) struct Turn<'a>(&'a File);

impl Turns {
    pub(super) fn open(data: &Path) -> io::Result<Turns> {
        let open = |name| File::options().read(true).write(true).create(true).truncate(false).open(data.join(name));
        Ok(Turns { next: open("log.next")?, turn: open("log.turn")? })
    }

    /// Waits for a turn, as long as for a lock of the database. The locks are the operating system's: they go with their
    /// process, however that ends; but a process that was halted keeps them.
    pub(super) fn take(&mut self) -> io::Result<Turn<'_>> {
        let end = Instant::now() + limits::DATABASE_BUSY;
        lock(&self.next, end)?;
        let taken = lock(&self.turn, end).map(|()| Turn(&self.turn));
        self.next.unlock()?;
        taken
    }
}

/// How often is looked at a lock that somebody has. A transaction takes a millisecond or two.
const LOOK: Duration = Duration::from_millis(1);

/// Waits for a lock, but not beyond `end`.
pub(super) fn lock(file: &File, end: Instant) -> io::Result<()> {
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if Instant::now() >= end => {
                let message = "another process has had its turn to write for too long; look whether it was halted";
                return Err(io::Error::new(io::ErrorKind::TimedOut, message));
            }
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOOK),
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        // What cannot be unlocked is unlocked when the file is closed.
        let _ = self.0.unlock();
    }
}
