//! The watched folder: which modules are wanted.
//!
//! Level-triggered: a notification only says "look again", and a look compares what is there with what was. A file that
//! is not valid is not there yet: what it was before stands until it has been invalid for a while. The same goes for
//! one that is missing. So writers may truncate, unlink and rename as they like.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecursiveMode, Watcher};
use tokio::sync::mpsc::UnboundedSender;

use super::{Engine, Error, Module, read};
use crate::config::limits;
use crate::fault;

/// A module file and what became of it.
#[derive(Clone)]
pub struct Found {
    /// The file's name in the folder.
    pub file: String,
    /// The module, or why it is refused.
    pub module: Result<Module, String>,
}

/// Everything that tells one content of a file from another, without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Signature(u64, u64, u64, i64, i64, i64, i64);

impl Signature {
    fn of(m: &Metadata) -> Signature {
        Signature(m.dev(), m.ino(), m.len(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec())
    }
}

struct Known {
    /// What stands for this file now.
    stands: Option<Result<Module, String>>,
    /// The content that was looked at last; None if the file was missing.
    signature: Option<Signature>,
    /// Since when that content is there and does not stand: it is invalid, or missing.
    unsettled: Option<(Instant, String)>,
    /// When to look at the same content again: it was not the file's fault.
    again: Option<Instant>,
}

/// The watched folder.
pub struct Folder {
    path: PathBuf,
    store: PathBuf,
    engine: Engine,
    files: BTreeMap<String, Known>,
    unreadable: bool,
}

impl Folder {
    /// A folder that has not been looked at yet. It is created if it is not there. Modules that are admitted are copied
    /// to the directory `store`, under their hash: a generation can go on with its module after the file has changed.
    pub fn new(path: &Path, store: &Path, engine: Engine) -> std::io::Result<Folder> {
        std::fs::create_dir_all(path)?;
        Ok(Folder { path: path.to_owned(), store: store.to_owned(), engine, files: BTreeMap::new(), unreadable: false })
    }

    /// Looks until nobody receives any more: at once, after each notification, and now and then. Everything that stands
    /// is sent whenever it has changed, by file name. Blocks.
    pub fn watch(mut self, report: &UnboundedSender<Vec<Found>>) {
        let (sender, notifications) = channel();
        // Before the first look, so that nothing falls in between.
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Our own looks open and read files; only a writer's closing is of interest.
            let ours = |event: &notify::Event| match event.kind {
                EventKind::Access(kind) => kind != AccessKind::Close(AccessMode::Write),
                _ => false,
            };
            if !event.as_ref().is_ok_and(ours) {
                // The receiver is gone only when the loop below is.
                let _ = sender.send(());
            }
        })
        .and_then(|mut watcher| watcher.watch(&self.path, RecursiveMode::NonRecursive).map(|()| watcher));
        if let Err(error) = &watcher {
            tracing::warn!(folder = ?self.path, %error, "no notifications; looking every second instead");
        }
        let mut first = true;
        while !report.is_closed() {
            let (changed, unsettled) = self.look();
            if changed || std::mem::take(&mut first) {
                let standing = self.files.iter().filter_map(|(file, known)| Some((file, known.stands.clone()?)));
                // If nobody receives it, the loop ends next.
                let _ = report.send(standing.map(|(file, module)| Found { file: file.clone(), module }).collect());
            }
            let longest = if unsettled { limits::FOLDER_SETTLE / 4 } else { limits::FOLDER_RESCAN };
            if !wait(&notifications, longest) {
                std::thread::sleep(longest);
            }
        }
    }

    /// Compares what is there with what was; answers whether what stands has changed, and whether to look again soon.
    fn look(&mut self) -> (bool, bool) {
        let present = match list(&self.path) {
            Ok(present) => present,
            Err(error) => {
                // A folder that cannot be read says nothing about its files.
                if !std::mem::replace(&mut self.unreadable, true) {
                    tracing::warn!(folder = ?self.path, %error, "cannot read the plugin folder; everything goes on as it is");
                }
                return (false, false);
            }
        };
        self.unreadable = false;
        for file in present.keys() {
            let new = || Known { stands: None, signature: None, unsettled: None, again: None };
            self.files.entry(file.clone()).or_insert_with(new);
        }
        let mut changed = false;
        for (file, known) in &mut self.files {
            let admit = |path: &Path| admit(&self.engine, &self.store, path);
            changed |= look_at(admit, &self.path.join(file), present.get(file), known);
        }
        self.files.retain(|_, known| known.stands.is_some() || known.unsettled.is_some());
        (changed, self.files.values().any(|known| known.unsettled.is_some()))
    }
}

/// What is in a folder now, by file name; nothing of it is kept. A folder that is not there is empty.
pub fn look(folder: &Path, engine: &Engine) -> Vec<Found> {
    let files = list(folder).unwrap_or_default();
    let admit = |file: &str| read(&folder.join(file)).and_then(|bytes| engine.admit(&bytes));
    let found = |file: String| Found { module: admit(&file).map_err(|error| error.to_string()), file };
    files.into_keys().map(found).collect()
}

/// The file is read once: what is admitted is what is stored.
fn admit(engine: &Engine, store: &Path, file: &Path) -> Result<Module, Error> {
    let bytes = read(file)?;
    let module = engine.admit(&bytes)?;
    let stored = store.join(format!("{}.wasm", module.hash));
    // One that is damaged is replaced.
    if !std::fs::read(&stored).is_ok_and(|kept| kept == bytes) {
        // Appears whole or not at all.
        let keep = || {
            let mut copy = tempfile::NamedTempFile::new_in(store)?;
            copy.write_all(&bytes)?;
            fault::fail("module.written", &stored.to_string_lossy())?;
            // The catalogue names it soon, and survives a power cut.
            copy.as_file().sync_all()?;
            copy.persist(&stored).map_err(|error| error.error)?;
            fault::point("module.stored", &stored.to_string_lossy());
            Ok(())
        };
        keep().map_err(|error| Error::Store(stored.clone(), error))?;
    }
    Ok(module)
}

/// True if what stands has changed.
fn look_at(
    admit: impl Fn(&Path) -> Result<Module, Error>,
    path: &Path,
    signature: Option<&Signature>,
    known: &mut Known,
) -> bool {
    let again = known.again.take_if(|at| *at <= Instant::now()).is_some();
    if known.signature.as_ref() != signature || again {
        known.signature = signature.cloned();
        known.again = None;
        let result = match signature {
            None => Err("the file is gone".to_owned()),
            Some(_) => admit(path).map_err(|error| {
                if matches!(error, Error::Read(..) | Error::Store(..)) {
                    known.again = Some(Instant::now() + limits::FOLDER_RESCAN);
                }
                error.to_string()
            }),
        };
        match result {
            Ok(module) => {
                known.unsettled = None;
                let same = matches!(&known.stands, Some(Ok(standing)) if standing.hash == module.hash);
                known.stands = Some(Ok(module));
                return !same;
            }
            // The same again.
            Err(reason) if matches!(&known.stands, Some(Err(standing)) if *standing == reason) => {
                known.unsettled = None
            }
            Err(reason) => {
                let since = known.unsettled.take().map_or_else(Instant::now, |(since, _)| since);
                // Whoever writes slowly is not refused in the middle: each new content gets its time.
                let since = if signature.is_some() { Instant::now() } else { since };
                known.unsettled = Some((since, reason));
            }
        }
    }
    match known.unsettled.take_if(|(since, _)| since.elapsed() >= limits::FOLDER_SETTLE) {
        None => false,
        Some((_, reason)) => {
            known.stands = known.signature.is_some().then_some(Err(reason));
            true
        }
    }
}

/// The files that look like modules. Hidden files and editors' temporary files (`.x.wasm.swp`, `x.wasm~`) do not.
fn list(folder: &Path) -> std::io::Result<BTreeMap<String, Signature>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name.starts_with('.') || !name.ends_with(".wasm") {
            continue;
        }
        // Follows symlinks: a switched link is another file. One that points nowhere is not there.
        match std::fs::metadata(entry.path()) {
            Ok(metadata) if metadata.is_file() => files.insert(name, Signature::of(&metadata)),
            _ => None,
        };
    }
    Ok(files)
}

/// Waits for notifications and takes all there are; false if there will never be any.
fn wait(notifications: &Receiver<()>, longest: Duration) -> bool {
    match notifications.recv_timeout(longest) {
        Ok(()) => {
            while notifications.try_recv().is_ok() {}
            true
        }
        Err(RecvTimeoutError::Timeout) => true,
        Err(RecvTimeoutError::Disconnected) => false,
    }
}
