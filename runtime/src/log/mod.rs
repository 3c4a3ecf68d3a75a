//! The log: where events come from, in one order.
//!
//! One SQLite file, `log.sqlite`, holds one sequence of the events of all sources. An event's position is its place in it:
//! 0, 1, 2, ... in the order of commits, decided once and for everybody. The newest events are rows; older stretches are
//! packed into blocks of columns. In reading order:
//!
//! - `file.rs`: the tables; `names.rs`: sources and types by number.
//! - `append.rs`: the one transaction that adds events, and the packing of rows; `turn.rs`: whose turn it is to write;
//!   `ids.rs`: which ids there are in blocks.
//! - `block.rs`: a block; `directory.rs`: what is known of each block without reading it.
//! - `read.rs` and `chunks.rs`: reading, once for all projections that are near each other; `look.rs`: looking for
//!   single events.
//! - `select.rs` and `follow.rs`: what a projection wants, and how much of it waits.
//! - `forget.rs`: how the content of events goes for good.
//! - `interleave.rs`: one order for the archives of several services; `former.rs` and `convert.rs`: logs of the former
//!   format.

mod append;
mod block;
mod chunks;
pub mod cloudevents;
mod convert;
mod directory;
mod file;
mod follow;
mod forget;
mod former;
mod ids;
pub mod interleave;
mod look;
mod names;
mod read;
mod select;
#[cfg(test)]
mod tests;
mod turn;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use sha2::{Digest, Sha256};
use tokio::sync::watch;

use crate::config::limits;
use crate::manifest::Manifest;
use crate::model::{BatchColumn, ColumnSet, Event, NewEvent, Position, Time};

use append::{Appender, Writer};
use chunks::Chunks;
use follow::Followers;
use names::{Kind, Names};
use read::{Failures, Reader, Shared};
use select::Select;

pub use chunks::Chunk;
pub use follow::{Behind, Following, Head, Seen};
pub use forget::{Effect, Forgetting, Request};
pub use look::{Filter, Summary};

/// How many events there are, by the numbers of their source and type.
type Counts = HashMap<(u32, u32), u64>;

/// What can go wrong with a log.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database refused: full disk, no permission, held by somebody else for too long.
    #[error("the event log {path:?}: {error}{}", if is_damage(error) { "; it is damaged, restore it from a copy" } else { "" })]
    Sqlite {
        /// The log's file.
        path: PathBuf,
        /// What SQLite said.
        error: rusqlite::Error,
    },
    /// The file is not where it was opened: what is appended to it, nobody would see again.
    #[error("the event log {path:?} was removed or replaced while it was open; put it back, and restart shadowbox")]
    Removed {
        /// The log's file.
        path: PathBuf,
    },
    /// The directory of the log cannot be made.
    #[error("cannot create the directory {path:?}: {error}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// A file beside the log, which says whose turn it is, cannot be opened or locked; or the log cannot be renamed.
    #[error("{path:?}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The file is an SQLite database, but not a log that this version can read.
    #[error("{path:?} is not an event log of this version of shadowbox (format {found}, expected {expected})")]
    Format {
        /// The file.
        path: PathBuf,
        /// The format number in it.
        found: i64,
        /// The format number that this version writes.
        expected: i64,
    },
    /// A block cannot be read as what was written.
    #[error(
        "the event log {path:?} is damaged: events {first} to {} cannot be read: {what}; restore the log from a copy",
        last.map_or_else(|| "?".to_owned(), |last| last.to_string())
    )]
    Damaged {
        /// The log's file.
        path: PathBuf,
        /// The position of the block's first event.
        first: Position,
        /// That of its last one, if it is known.
        last: Option<Position>,
        /// How it was noticed.
        what: String,
    },
    /// The index of ids cannot be read as what was written.
    #[error(
        "the event log {path:?}: its index of ids is damaged: {what}; the next append makes it anew, nothing is lost"
    )]
    Index {
        /// The log's file.
        path: PathBuf,
        /// How it was noticed.
        what: String,
    },
    /// What is looked for is not a glob.
    #[error("{pattern:?} is not a glob: {reason}")]
    Pattern {
        /// What was given.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// More waits to be appended than there is room for.
    #[error("{bytes} bytes of events wait to be appended already; try again")]
    Busy {
        /// How much waits.
        bytes: usize,
    },
    /// A name is one too many.
    #[error(
        "{name:?} is not appended: the log has {limit} {what} already, as many as it can have; put what differs from event \
         to event into the subject or the data"
    )]
    Names {
        /// Sources or types.
        what: &'static str,
        /// The name.
        name: String,
        /// How many there may be.
        limit: usize,
    },
    /// What somebody asks to be forgotten cannot be, or not so.
    #[error("{reason}")]
    Request {
        /// A sentence about why not, and what to do.
        reason: String,
    },
    /// What was forgotten may still be read in the write-ahead log, since somebody has a reading transaction open.
    #[error(
        "{path:?}: the events are forgotten, but their content may be in the write-ahead log until those who read the file \
         now have ended; look who has it open, end that, and ask again"
    )]
    Uncleared {
        /// The log's file.
        path: PathBuf,
    },
    /// A log of the former format cannot be converted.
    #[error("the event log {path:?} cannot be converted: {what}; it is as it was, restore it from a copy")]
    Conversion {
        /// The log's file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// An event is beyond a limit; nothing of its batch was appended.
    #[error("event {id:?}: {what} has {bytes} bytes; the limit is {limit}")]
    TooLarge {
        /// The event's id, shortened.
        id: String,
        /// Which part of it.
        what: &'static str,
        /// The part's size.
        bytes: usize,
        /// The limit, see [`crate::config::limits`].
        limit: usize,
    },
}

impl Error {
    /// True for what may go away by itself or by an operator's hand: a lock, a full disk, a missing permission.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Sqlite { error, .. } => !is_damage(error),
            Error::Directory { .. } | Error::File { .. } | Error::Busy { .. } => true,
            _ => false,
        }
    }
}

/// True if SQLite says that the file is not what it was, or what it holds cannot be read as what was stored.
fn is_damage(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    error.sqlite_error_code().is_none_or(|code| matches!(code, DatabaseCorrupt | NotADatabase))
}

/// What an append did with one event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// Where it stands.
    pub position: Position,
    /// False if the log had an event of this source and id already; then nothing was appended.
    pub new: bool,
}

/// The log's file in a data directory.
const FILE: &str = "log.sqlite";

/// The log of a data directory: a handle that is cheap to clone. Its methods block.
#[derive(Clone)]
pub struct EventLog {
    inner: Arc<Inner>,
}

/// What threads of the log are told.
#[derive(Default)]
struct Signals {
    stop: bool,
    /// There are rows to be packed.
    seal: bool,
}

struct Inner {
    data: PathBuf,
    identity: String,
    /// Of the index of ids.
    key: [u8; 16],
    /// Device and inode of the file.
    file: (u64, u64),
    /// Why the last look for new events failed, if it did.
    trouble: Mutex<Option<String>>,
    appender: Appender,
    shared: Arc<Shared>,
    /// By the number of a source: before which time everything is forgotten that its retention does not keep.
    retained: Mutex<HashMap<u32, Time>>,
    followers: Arc<Followers>,
    chunks: Arc<Chunks>,
    signals: Arc<(Mutex<Signals>, Condvar)>,
    threads: Mutex<Vec<(&'static str, JoinHandle<()>)>>,
}

impl Inner {
    /// What is appended to a file that is not there any more, nobody would see again.
    fn check_place(&self) -> Result<(), Error> {
        if file_identity(self.shared.path()) == Some(self.file) {
            return Ok(());
        }
        Err(Error::Removed { path: self.shared.path().to_owned() })
    }

    /// Tells everybody that the log goes on to `head`. `known` says what is in the last transaction, and where that
    /// began; what others have appended is looked up.
    fn publish(&self, head: Head, known: Option<(u64, &Counts)>) -> Result<(), Error> {
        let names = &self.shared.names;
        self.followers.publish(head, names, |told| match known {
            Some((before, counts)) if before == told && counts.keys().all(|(s, t)| names.knows(*s, *t)) => {
                Ok(counts.clone())
            }
            _ => self.chunks.with_reader(|reader| reader.counts(told, head.next)),
        })
    }

    fn signal(&self, set: impl FnOnce(&mut Signals)) {
        set(&mut self.signals.0.lock().expect("no panics while it is held"));
        self.signals.1.notify_all();
    }
}

fn file_identity(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

/// Once it is dropped, no thread of it is left, and its files are closed.
impl Drop for Inner {
    fn drop(&mut self) {
        self.signal(|signals| signals.stop = true);
        self.chunks.stop();
        let threads = std::mem::take(&mut *self.threads.lock().expect("no panics while it is held"));
        let here = std::thread::current().id();
        // One of them may hold the last handle.
        for (_, thread) in threads.into_iter().filter(|(_, thread)| thread.thread().id() != here) {
            // A panic in it was reported where it happened.
            let _ = thread.join();
        }
    }
}

impl EventLog {
    /// Opens the log of a data directory (`log.sqlite`); directory and file are created if they are not there. A log of
    /// the former format is converted first, which takes some seconds a million events.
    pub fn open(data: &Path) -> Result<EventLog, Error> {
        EventLog::open_as(data, false)
    }

    /// The same; but projections pass over blocks that cannot be read, and note that they did. The last block of a log
    /// without rows must be readable all the same, or nobody would know where the log ends.
    pub fn open_past_damage(data: &Path) -> Result<EventLog, Error> {
        EventLog::open_as(data, true)
    }

    fn open_as(data: &Path, skips: bool) -> Result<EventLog, Error> {
        std::fs::create_dir_all(data).map_err(|error| Error::Directory { path: data.to_owned(), error })?;
        // Nobody opens a file that is about to have another name.
        let _lock = convert::lock(data)?;
        convert::resume(data)?;
        match EventLog::open_file(data, FILE, skips) {
            Err(Error::Format { found: convert::FORMER_FORMAT, .. }) => {
                convert::convert(data)?;
                EventLog::open_file(data, FILE, skips)
            }
            opened => opened,
        }
    }

    fn open_file(data: &Path, name: &str, skips: bool) -> Result<EventLog, Error> {
        let path = data.join(name);
        let failures = Failures(path.clone());
        let mut writer = file::connect_writer(&path).map_err(|error| failures.sqlite(error))?;
        let (format, identity) = file::prepare(&mut writer).map_err(|error| failures.sqlite(error))?;
        let Some(file::Identity { identity, key }) = identity else {
            return Err(Error::Format { path, found: format, expected: file::FORMAT });
        };
        let file = file_identity(&path).ok_or_else(|| Error::Removed { path: path.clone() })?;
        let directory = directory::Directory::new(skips);
        let shared = Arc::new(Shared { failures, names: Names::default(), directory, epoch: watch::Sender::new(0) });
        let mut reader = Reader::open(shared.clone())?;
        let head = reader.snapshot(|reader| {
            reader.refresh()?;
            reader.refresh_names()?;
            shared.epoch.send_replace(reader.epoch()?);
            reader.head()
        })?;
        Ok(EventLog {
            inner: Arc::new(Inner {
                data: data.to_owned(),
                identity,
                key,
                file,
                trouble: Mutex::default(),
                appender: Appender::new(Writer::new(shared.clone(), writer, data, key)?),
                followers: Arc::new(Followers::new(head)),
                chunks: Chunks::new(shared.clone()),
                shared,
                retained: Mutex::default(),
                signals: Arc::default(),
                threads: Mutex::default(),
            }),
        })
    }

    /// How many forgettings have begun and ended. What was read before it changed is to be read again.
    pub fn epoch(&self) -> watch::Receiver<u64> {
        self.inner.shared.epoch.subscribe()
    }

    /// What tells this log from every other: given once, when the file was created.
    pub fn identity(&self) -> &str {
        &self.inner.identity
    }

    /// Appends events in one durable transaction, in order; what others append at the same time may be in the same one.
    /// An event whose source and id are there already appends nothing. After an error of the database either all or none
    /// of them are there: append them again.
    pub fn append(&self, events: impl Into<Vec<NewEvent>>) -> Result<Vec<Appended>, Error> {
        let events = events.into();
        events.iter().try_for_each(append::check_bounds)?;
        let inner = &self.inner;
        inner.check_place()?;
        inner.appender.append(events, |done| {
            // What is committed is appended, whatever comes after; the next look finds it.
            let _ = inner.publish(done.head, Some((done.before, &done.counts)));
            if done.rows >= limits::SEAL_ROWS {
                inner.signal(|signals| signals.seal = true);
            }
        })
    }

    /// Packs the oldest rows into blocks, one block a transaction, as long as more than `keep` rows are left. Another
    /// process that does this just now is left to it.
    pub fn seal(&self, keep: u64) -> Result<(), Error> {
        let path = self.inner.data.join("log.seal");
        let failed = |error| Error::File { path: path.clone(), error };
        let lock = std::fs::File::options().write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Ok(()),
            Err(std::fs::TryLockError::Error(error)) => return Err(failed(error)),
        }
        let stopped = || self.inner.signals.0.lock().expect("no panics while it is held").stop;
        while !stopped() {
            self.inner.check_place()?;
            let stretch = self.inner.chunks.with_reader(|reader| reader.oldest_rows(keep))?;
            let Some(stretch) = stretch else { break };
            stretch.check(&self.inner.shared.failures)?;
            // Appends go on meanwhile.
            let blocks = stretch.pack();
            if !self.inner.appender.with_writer(|writer| writer.seal(&stretch, &blocks))? {
                break;
            }
        }
        Ok(())
    }

    /// Packs rows from now on whenever there are [`limits::SEAL_ROWS`].
    pub fn seal_in_background(&self) {
        self.thread("log-seal", |inner, signals| {
            loop {
                {
                    let guard = signals.0.lock().expect("no panics while it is held");
                    let wanted = |s: &mut Signals| !s.stop && !s.seal;
                    let mut guard = signals.1.wait_while(guard, wanted).expect("no panics while it is held");
                    if guard.stop {
                        return;
                    }
                    guard.seal = false;
                }
                let Some(inner) = inner.upgrade() else { return };
                if let Err(error) = (EventLog { inner }).seal(limits::SEAL_ROWS / 2) {
                    // The next append asks again; until then rows are as good as blocks.
                    tracing::warn!(%error, "cannot pack events");
                }
            }
        });
        self.inner.signal(|signals| signals.seal = true);
    }

    fn thread(
        &self,
        name: &'static str,
        run: impl FnOnce(Weak<Inner>, Arc<(Mutex<Signals>, Condvar)>) + Send + 'static,
    ) {
        let mut threads = self.inner.threads.lock().expect("no panics while it is held");
        if threads.iter().any(|(known, _)| *known == name) {
            return;
        }
        let (inner, signals) = (Arc::downgrade(&self.inner), self.inner.signals.clone());
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || run(inner, signals));
        threads.push((name, thread.expect("a thread can be started")));
    }

    /// Moves everything that is in the write-ahead log into the file itself, so that the file alone is all of the log.
    /// Readers may be in the way; then some of it stays where it is, which is no loss.
    pub fn tidy(&self) {
        self.inner.appender.with_writer(|writer| writer.tidy());
    }

    /// Follows the head. Appends of this process show at once, those of others after [`limits::LOG_POLL`].
    pub fn head(&self) -> watch::Receiver<Head> {
        self.thread("log-poller", |inner, signals| poll(&inner, &signals));
        self.inner.followers.subscribe()
    }

    /// The head as of the last look; after an append of this process it includes that.
    pub fn head_now(&self) -> Head {
        self.inner.followers.head()
    }

    /// How many sources there are.
    pub fn sources(&self) -> usize {
        self.inner.shared.names.len(Kind::Source)
    }

    /// How many event types there are.
    pub fn types(&self) -> usize {
        self.inner.shared.names.len(Kind::Type)
    }

    /// How many events between two positions, the second one excluded, a projection wants.
    pub fn count(&self, manifest: &Manifest, begin: u64, end: u64) -> Result<u64, Error> {
        let counts = self.inner.chunks.with_reader(|reader| reader.counts(begin, end))?;
        Ok(Select::new(manifest).count(&counts, &self.inner.shared.names))
    }

    /// Why nobody can tell at present whether there are new events; None while all is well, and before the first look.
    pub fn trouble(&self) -> Option<String> {
        self.inner.trouble.lock().expect("no panics while it is held").clone()
    }

    /// Follows what a projection wants after its checkpoint.
    pub fn follow(&self, manifest: &Manifest, checkpoint: Option<Position>) -> Result<Following, Error> {
        drop(self.head());
        let inner = &self.inner;
        inner.followers.follow(Select::new(manifest), checkpoint, &inner.shared.names, |begin, end| {
            inner.chunks.with_reader(|reader| reader.counts(begin, end))
        })
    }

    /// Reads what a projection wants.
    pub fn reading(&self, manifest: &Manifest, columns: ColumnSet) -> Reading {
        Reading { log: self.clone(), select: Select::new(manifest), columns }
    }

    /// The event at a position, if there is one, and when it was appended.
    pub fn event(&self, position: Position) -> Result<Option<(Event, Time)>, Error> {
        match self.inner.chunks.block_at(position)? {
            Some(block) => Ok(Some(block.at(position))),
            None => self.inner.chunks.with_reader(|reader| reader.event(position, ColumnSet::ALL)),
        }
    }

    /// What a checkpoint keeps of the event at a position, so that a log which was replaced or rolled back is noticed; None
    /// if there is no such event.
    pub fn fingerprint(&self, position: Position) -> Result<Option<Fingerprint>, Error> {
        let set = ColumnSet::from_iter([BatchColumn::Ids, BatchColumn::Streams]);
        let event = match self.inner.chunks.with_reader(|reader| reader.event(position, set)) {
            Err(Error::Damaged { .. }) if self.inner.shared.directory.skips() => {
                return Ok(Some(Fingerprint { digest: Fingerprint::UNKNOWN, appended: Time::EPOCH, nameless: true }));
            }
            event => event?,
        };
        Ok(event.map(|(Event { event: e, forgotten, .. }, appended)| {
            let mut hash = Sha256::new();
            for part in [&e.source, &e.id, &e.event_type, &e.stream] {
                hash.update((part.len() as u64).to_le_bytes());
                hash.update(part.as_bytes());
            }
            hash.update(e.time.microseconds().to_le_bytes());
            let digest = hash.finalize();
            let digest = i64::from_le_bytes(digest[..8].try_into().expect("eight bytes"));
            Fingerprint { digest, appended, nameless: forgotten && e.stream.is_empty() }
        }))
    }
}

/// What a checkpoint keeps of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    /// Of its source, id, type, stream and time. Metadata and payload are not in it: they can be forgotten.
    pub digest: i64,
    /// When it was appended; [`Time::EPOCH`] if that cannot be read.
    pub appended: Time,
    /// The stream's name may be forgotten, or the event cannot be read: the digest may have been another one.
    nameless: bool,
}

impl Fingerprint {
    /// The digest of an event that could not be read, and was passed over.
    const UNKNOWN: i64 = 0;

    /// Whether the event can be the one of which a checkpoint has this digest.
    pub fn is_of(self, digest: i64) -> bool {
        self.digest == digest || self.nameless || digest == Fingerprint::UNKNOWN
    }
}

/// Reads the log for one projection.
pub struct Reading {
    log: EventLog,
    select: Select,
    columns: ColumnSet,
}

impl Reading {
    /// The events from position `begin` on as a chunk, which may begin before, and the position from which on they count:
    /// stretches without anything that is wanted are passed over, without being read. At the head there is no chunk.
    ///
    /// Readers of a stretch share what is read for the first of them, and what comes next is read meanwhile.
    pub fn chunk(&mut self, begin: u64) -> Result<(u64, Option<Arc<Chunk>>), Error> {
        self.log.inner.chunks.get(begin, self.columns, &mut self.select)
    }

    /// Whether what cannot be read is to be passed over; how many of the events between two positions, the second one
    /// excluded, are wanted then.
    pub fn passes_over(&mut self, begin: u64, end: u64) -> Result<Option<u64>, Error> {
        let inner = &self.log.inner;
        if !inner.shared.directory.skips() {
            return Ok(None);
        }
        let counts = inner.chunks.with_reader(|reader| reader.counts(begin, end))?;
        Ok(Some(self.select.count(&counts, &inner.shared.names)))
    }

    /// For the sources and the types of a chunk, which of the subscriptions they match, a bit each: an event is wanted if
    /// its source and its type have one in common.
    pub fn masks(&mut self, chunk: &Chunk, sources: &mut Vec<u64>, types: &mut Vec<u64>) {
        let names = &self.log.inner.shared.names;
        sources.clear();
        types.clear();
        sources.extend(chunk.sources().iter().map(|(number, _)| self.select.source(*number, names)));
        types.extend(chunk.types().iter().map(|(number, _)| self.select.event_type(*number, names)));
    }
}

/// Looks for appends of other processes until the log is dropped.
fn poll(inner: &Weak<Inner>, signals: &(Mutex<Signals>, Condvar)) {
    let mut reader = None;
    let mut seen = -1;
    let mut moved = Instant::now();
    loop {
        {
            let Some(inner) = inner.upgrade() else { return };
            let mut look = || -> Result<bool, Error> {
                inner.check_place()?;
                let reader = match &mut reader {
                    Some(reader) => reader,
                    none => none.insert(Reader::open(inner.shared.clone())?),
                };
                let version = reader.data_version()?;
                if std::mem::replace(&mut seen, version) == version {
                    return Ok(false);
                }
                let (head, epoch) = (reader.head()?, reader.epoch()?);
                inner.chunks.saw(epoch);
                inner.publish(head, None)?;
                Ok(true)
            };
            let result = look();
            match &result {
                Ok(true) => moved = Instant::now(),
                Ok(false) => {}
                Err(_) => (reader, seen) = (None, -1),
            }
            let trouble = result.err().map(|error| error.to_string());
            let mut known = inner.trouble.lock().expect("no panics while it is held");
            if *known != trouble {
                // Once, not at each of the looks that go on until it is over.
                match &trouble {
                    Some(error) => tracing::warn!(error, "cannot look for new events"),
                    None => tracing::info!("new events can be seen again"),
                }
                *known = trouble;
            }
        }
        let guard = signals.0.lock().expect("no panics while it is held");
        let rest = if moved.elapsed() < limits::LOG_QUIET { limits::LOG_POLL } else { limits::LOG_POLL_QUIET };
        let waited = signals.1.wait_timeout_while(guard, rest, |signals| !signals.stop);
        let (guard, _) = waited.expect("no panics while it is held");
        if guard.stop {
            return;
        }
    }
}
