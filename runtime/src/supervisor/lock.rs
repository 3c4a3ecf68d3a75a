//! Who holds a data directory, and where it listens.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Error;

/// Who holds a data directory.
#[derive(Serialize, Deserialize)]
pub(super) struct Holder {
    pub(super) pid: u32,
    pub(super) address: Option<SocketAddr>,
}

pub(super) fn path(data: &Path) -> PathBuf {
    data.join("runtime.lock")
}

/// How often a lock that is held is tried again before it is believed, and how long after.
const LOOKS: u32 = 10;

const LOOK: Duration = Duration::from_millis(10);

/// Locks the data directory. The lock is the operating system's: it goes with the process, however that ends.
pub(super) fn take(data: &Path) -> Result<File, Error> {
    let path = path(data);
    let failed = |error| Error::File { path: path.clone(), error };
    let mut options = File::options();
    let mut lock = options.read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
    let mut locked = lock.try_lock();
    for _ in 0..LOOKS {
        // A command that only looks whether we run holds the lock for a moment.
        if locked.is_ok() {
            break;
        }
        std::thread::sleep(LOOK);
        locked = lock.try_lock();
    }
    match locked {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            let holder = match read(&mut lock) {
                Some(Holder { pid, address: Some(address) }) => format!("process {pid}, http://{address}"),
                Some(Holder { pid, address: None }) => format!("process {pid}"),
                None => "which is just starting".into(),
            };
            return Err(Error::Held { data: data.to_owned(), holder });
        }
        Err(std::fs::TryLockError::Error(error)) => return Err(failed(error)),
    }
    write(&mut lock, &Holder { pid: std::process::id(), address: None }).map_err(failed)?;
    Ok(lock)
}

pub(super) fn write(lock: &mut File, holder: &Holder) -> std::io::Result<()> {
    lock.set_len(0)?;
    lock.rewind()?;
    lock.write_all(&serde_json::to_vec(holder)?)?;
    lock.flush()
}

fn read(lock: &mut File) -> Option<Holder> {
    let mut text = String::new();
    lock.read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

/// The address of the runtime that holds this data directory now, if one does and listens.
pub fn running(data: &Path) -> Option<SocketAddr> {
    let mut lock = File::open(path(data)).ok()?;
    match lock.try_lock_shared() {
        // Nobody holds it; what it says is old.
        Ok(()) => None,
        Err(_) => read(&mut lock)?.address,
    }
}
