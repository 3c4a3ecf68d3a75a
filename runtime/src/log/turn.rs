//! Whose turn it is to write.
//!
//! SQLite lets whoever looks at the right moment have the lock, and others wait longer between their looks each time: a
//! command that appends a file would keep a runtime from appending for seconds. So writers of all processes take turns:
//! who wants one waits for `log.next`, then for `log.turn`, and gives `log.next` back. Whoever has just had a turn finds
//! the next one waiting there.

use std::fs::File;
use std::io;
use std::path::Path;

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

    /// Waits for a turn. The locks are the operating system's: they go with their process, however that ends.
    pub(super) fn take(&mut self) -> io::Result<Turn<'_>> {
        self.next.lock()?;
        let taken = self.turn.lock();
        self.next.unlock()?;
        taken.map(|()| Turn(&self.turn))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        // What cannot be unlocked is unlocked when the file is closed.
        let _ = self.0.unlock();
    }
}
