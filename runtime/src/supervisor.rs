//! The supervisor: what should run, by the plugin folder, against what runs; and the handle on a running Shadowbox.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use crate::config::{Config, Policy, limits};
use crate::fault;
use crate::log::{self, Behind, EventLog, Forgetting, Head};
use crate::model::{FailureReport, Position, Time};
use crate::plugin::{self, Engine, Folder, Found, Module};
use crate::projection::lifecycle::{Building, Live};
use crate::projection::{self, Activity, Manager, Shared, Snapshot, SnapshotGeneration, Stalls};
use crate::view::{self, Catalogue, GenerationRecord, LetterCounts, Origin, Scratch, Selector};

pub use crate::projection::{LiveView, Outcome, Refusal, Replay, Treatment, made_from, replay};

/// What can go wrong when a runtime starts or is asked for something.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum Error {
    #[error(transparent)]
    Log(#[from] log::Error),
    #[error(transparent)]
    View(#[from] view::Error),
    #[error(transparent)]
    Plugin(#[from] plugin::Error),
    #[error("{path:?}: {error}")]
    File { path: PathBuf, error: std::io::Error },
    #[error(
        "the data directory {data:?} is held by another shadowbox ({holder}); stop it, or choose another with --data"
    )]
    Held { data: PathBuf, holder: String },
    #[error("there is no projection {name:?}; {known}")]
    UnknownProjection { name: String, known: String },
    #[error("{0}")]
    Refused(String),
}

/// Everything that is to know of a running Shadowbox.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The log.
    pub log: LogStatus,
    /// By name.
    pub projections: Vec<ProjectionStatus>,
    /// Module files that are not run.
    pub refused: Vec<Refused>,
}

/// The log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LogStatus {
    /// What tells it from every other.
    pub identity: String,
    /// The position of the newest event; None if there is none.
    pub head: Option<Position>,
    /// When that was appended.
    pub appended: Option<Time>,
    /// How many sources there are.
    pub sources: u64,
    /// How many event types.
    pub types: u64,
    /// Why nobody can tell at present whether there are new events.
    pub error: Option<String>,
}

/// A module file that is not run, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Its name in the plugin folder.
    pub file: String,
    /// A sentence.
    pub reason: String,
}

/// What a projection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProjectionState {
    /// It applies what is in the log already.
    CatchingUp,
    /// It is at the head.
    Live,
    /// A new generation is being built; the live one goes on.
    Rebuilding,
    /// It has lag, and has made no progress for longer than `stall_after_ms`; `error` says what it waits for.
    Stalled,
    /// It stands still, because going on would lose or corrupt data.
    Faulted,
    /// Its module is not in the folder. Its views are readable.
    Stopped,
}

/// One generation of a projection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GenerationStatus {
    /// Its number.
    pub generation: u64,
    /// The projection's version in its module.
    pub version: u32,
    /// SHA-256 of its module.
    pub module_hash: String,
    /// The committed rows are complete to here; None before the first event.
    pub position: Option<Position>,
    /// Events that it wants and has not committed.
    pub lag_events: u64,
    /// Seconds between the first of them and the newest event of the log, by when they were appended.
    pub lag_seconds: f64,
    /// Events applied a second; 0 if none were for some seconds.
    pub rate: f64,
    /// Why it stands still, or what it waits for.
    pub error: Option<String>,
    /// The event at which it stands, with everything that is known about the failure.
    pub fault: Option<FailureReport>,
    /// Events that it has left out.
    pub dead_letters: LetterCounts,
    /// Where its rows are not made from the log as it was appended.
    #[serde(flatten)]
    pub made_from: MadeFrom,
}

/// Where rows are not made from the log as it was appended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeFrom {
    /// The number of the first forgetting whose events may still be in the rows.
    pub forgotten: Option<u64>,
    /// Before this position events came without their content, since their source keeps it no longer.
    pub complete_from: Option<Position>,
    /// First and last positions of stretches that could not be read, and were passed over.
    pub damaged: Vec<(Position, Position)>,
}

impl From<Origin> for MadeFrom {
    fn from(Origin { forgotten, complete_from, damaged, .. }: Origin) -> MadeFrom {
        MadeFrom { forgotten, complete_from, damaged }
    }
}

/// A projection with its generations.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProjectionStatus {
    /// Its name.
    pub name: String,
    /// What it is doing.
    pub state: ProjectionState,
    /// Its module's file name; None if there is none in the folder.
    pub file: Option<String>,
    /// The names of its views.
    pub views: Vec<String>,
    /// What it does about an event that its module cannot apply.
    pub policy: Policy,
    /// The generation that readers see.
    #[serde(flatten)]
    pub live: GenerationStatus,
    /// The generation that is being built.
    pub building: Option<GenerationStatus>,
    /// The hash of the module in the folder, if it is not taken up because a person went back from it.
    pub rolled_back_from: Option<String>,
    /// Why the generation that is being built waits for a person: the live one was made from more.
    pub waits: Option<String>,
}

/// What a request to forget came to.
#[derive(Clone, Debug, Serialize)]
pub struct Forgotten {
    /// None if the log had no such event whose content was still there.
    pub forgetting: Option<Forgetting>,
    /// Projections whose live rows may still have what was forgotten.
    pub projections: Vec<Holding>,
}

/// A projection whose live rows may have what was forgotten.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// Its name.
    pub projection: String,
    /// The live generation's number.
    pub generation: u64,
    /// Its views.
    pub views: Vec<String>,
    /// Whether its module is there to rebuild it.
    pub module: bool,
}

/// Whether the live rows of a projection may have what was forgotten; then `made_from` hears what they are made from. Blocks.
pub fn holding(
    log: &EventLog,
    live: &GenerationRecord,
    has_module: bool,
    made_from: impl FnOnce(Origin),
) -> Option<Holding> {
    if !live.file.exists() {
        return None;
    }
    // Of rows that cannot be read nobody can tell what is in them.
    if let Ok(origin) = projection::made_from(log, live) {
        origin.forgotten?;
        made_from(origin);
    }
    Some(Holding {
        projection: live.projection.clone(),
        generation: live.number,
        views: live.manifest.views.iter().map(|view| view.name.clone()).collect(),
        module: has_module,
    })
}

/// What a projection does about an event that its module cannot apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyStatus {
    /// What it does now.
    pub policy: Policy,
    /// Whether that was set while Shadowbox ran.
    pub set: bool,
    /// What the configuration says.
    pub configured: Policy,
}

/// How long a measured rate is worth showing.
const RATE_FRESH: Duration = Duration::from_secs(5);

/// A running Shadowbox; a handle that is cheap to clone.
#[derive(Clone)]
pub struct Runtime {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    managers: Mutex<BTreeMap<String, Manager>>,
    refused: RwLock<Vec<Refused>>,
    stalls: Mutex<Stalls>,
    /// Locked as long as this runtime lives; other processes read in it where we listen.
    lock: Mutex<File>,
    stopping: tokio::sync::watch::Sender<bool>,
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime").field("data", &self.inner.shared.config.data).finish_non_exhaustive()
    }
}

impl Runtime {
    /// Takes the data directory, starts everything, and returns once the modules that are in the folder have been
    /// looked at. Must be called in a tokio runtime.
    pub async fn start(config: Config) -> Result<Runtime, Error> {
        let data = config.data.clone();
        let file = |path: &Path, error| Error::File { path: path.to_owned(), error };
        std::fs::create_dir_all(&data).map_err(|e| file(&data, e))?;
        let lock = take(&data)?;
        if let Err(error) = Scratch::sweep(&data) {
            // It costs space, and nothing else.
            tracing::warn!(%error, "cannot remove what proofs have left");
        }
        let modules = data.join("modules");
        std::fs::create_dir_all(&modules).map_err(|e| file(&modules, e))?;
        let log = if config.skip_damaged { EventLog::open_past_damage(&data)? } else { EventLog::open(&data)? };
        log.seal_in_background();
        let catalogue = Catalogue::open(&data).await?;
        catalogue.remove_strays().await?;
        let engine = Engine::new(Some(&data.join("cache")), config.sandbox)?;
        let folder = Folder::new(&config.plugins, &modules, engine.clone()).map_err(|e| file(&config.plugins, e))?;
        let records = catalogue.projections().await?;
        let policies = catalogue.policies().await?;
        let used: Vec<_> = records.iter().flat_map(|p| &p.generations).map(|g| g.module.as_str()).collect();
        sweep(&modules, &used).map_err(|e| file(&modules, e))?;
        let shared = Arc::new(Shared {
            log,
            catalogue,
            engine,
            modules,
            config,
            views: RwLock::default(),
            policies: RwLock::new(policies),
            snapshots: RwLock::default(),
        });
        let managers = records.into_iter().map(|record| {
            let name = record.name.clone();
            (name.clone(), Manager::start(&name, Some(record), shared.clone()))
        });
        let inner = Arc::new(Inner {
            managers: Mutex::new(managers.collect()),
            shared,
            refused: RwLock::default(),
            stalls: Mutex::default(),
            lock: Mutex::new(lock),
            stopping: tokio::sync::watch::Sender::new(false),
        });
        let (looked, first_look) = oneshot::channel();
        watch_folder(inner.clone(), folder, looked);
        // The sender is dropped without a word only if everything stops.
        let _ = first_look.await;
        tokio::spawn(watch_stalls(inner.clone()));
        let log = inner.shared.log.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = log.resume_forgetting() {
                tracing::warn!(%error, "cannot go on with a forgetting that was interrupted; the next one tries again");
            }
        });
        watch_retention(&inner);
        Ok(Runtime { inner })
    }

    /// The configuration it was started with.
    pub fn config(&self) -> &Config {
        &self.inner.shared.config
    }

    /// The event log.
    pub fn log(&self) -> &EventLog {
        &self.inner.shared.log
    }

    /// All live views, by name; those of stopped and faulted projections, too.
    pub fn views(&self) -> Arc<BTreeMap<String, LiveView>> {
        self.inner.shared.views.read().expect("no panics while it is held").clone()
    }

    /// Everything there is to know, as of now.
    pub fn status(&self) -> Status {
        let log = &self.inner.shared.log;
        let head = log.head_now();
        let snapshots = self.inner.shared.snapshots.read().expect("no panics while it is held").clone();
        let mut refused = self.inner.refused.read().expect("no panics while it is held").clone();
        // A projection whose first generation could not be entered is not one yet, but must not be silent either.
        let failed = snapshots.iter().filter(|(_, s)| s.live.is_none());
        refused.extend(failed.filter_map(|(name, s)| {
            Some(Refused { file: s.file.clone().unwrap_or_else(|| name.clone()), reason: s.refused.clone()? })
        }));
        let stalls = self.inner.stalls.lock().expect("no panics while it is held");
        let look =
            Look { head, log: log.trouble(), stalls: &stalls, stall_after: self.inner.shared.config.stall_after };
        let policy = |name: &str| self.inner.shared.policy(name).0;
        let projections =
            snapshots.into_iter().filter_map(|(name, s)| projection_status(policy(&name), name, &s, &look));
        Status {
            projections: projections.collect(),
            log: LogStatus {
                identity: log.identity().to_owned(),
                head: head.last(),
                appended: head.last().map(|_| head.appended),
                sources: log.sources() as u64,
                types: log.types() as u64,
                error: log.trouble(),
            },
            refused,
        }
    }

    /// Begins a rebuild, unless one is running; answers the new generation's number.
    pub async fn rebuild(&self, projection: &str) -> Result<u64, Error> {
        self.manager(projection)?.rebuild().await.map_err(Error::Refused)
    }

    /// Begins to go back to the former generation that is kept: it catches up and is promoted. Answers its number.
    pub async fn rollback(&self, projection: &str) -> Result<u64, Error> {
        self.manager(projection)?.rollback().await.map_err(Error::Refused)
    }

    /// Has the generation that waits for a person take the place of the live one, or, with `promote` false, discards it.
    /// Answers its number.
    pub async fn promote(&self, projection: &str, promote: bool) -> Result<u64, Error> {
        self.manager(projection)?.promote(promote).await.map_err(Error::Refused)
    }

    /// Forgets events for good. Projections that may have taken some of them are rebuilt from now on, if their modules are
    /// there.
    pub async fn forget(&self, request: log::Request) -> Result<Forgotten, Error> {
        let shared = self.inner.shared.clone();
        let done = tokio::task::spawn_blocking(move || {
            let forgetting = shared.log.forget(&request)?;
            let snapshots = shared.snapshots.read().expect("no panics while it is held").clone();
            let live =
                snapshots.values().filter_map(|snapshot| Some((snapshot.live.as_ref()?, snapshot.file.is_some())));
            let mut projections = Vec::new();
            for (live, has_module) in live {
                let made_from = |origin| live.reached.made_from(origin);
                // So that the status says it before anybody has had time to act.
                projections.extend(holding(&shared.log, &live.record, has_module, made_from));
            }
            Ok(Forgotten { forgetting, projections })
        });
        done.await.map_err(|ended| Error::Refused(format!("it did not end: {ended}")))?
    }

    /// Starts a faulted projection again, from its last commit; its build as well, if that is faulted.
    pub async fn resume(&self, projection: &str) -> Result<(), Error> {
        self.manager(projection)?.resume().await.map_err(Error::Refused)
    }

    /// What a projection does about bad events, and where that comes from.
    pub fn policy(&self, projection: &str) -> Result<PolicyStatus, Error> {
        self.manager(projection)?;
        let (policy, set) = self.inner.shared.policy(projection);
        Ok(PolicyStatus { policy, set, configured: self.inner.shared.config.policy(projection) })
    }

    /// Sets what a projection does about bad events, and keeps it beyond a restart; None goes back to the
    /// configuration. A projection that stands at a bad event goes on, if the policy is not to stop there.
    pub async fn set_policy(&self, projection: &str, policy: Option<Policy>) -> Result<PolicyStatus, Error> {
        self.manager(projection)?.set_policy(policy).await.map_err(Error::Refused)?;
        self.policy(projection)
    }

    /// Retries or discards dead letters of the live generation, between two of its batches.
    pub async fn treat(&self, projection: &str, treatment: Treatment, selector: Selector) -> Result<Outcome, Error> {
        self.manager(projection)?.treat(treatment, selector).await.map_err(Error::Refused)
    }

    /// The live generation of a projection, as the catalogue has it.
    pub fn live(&self, projection: &str) -> Result<GenerationRecord, Error> {
        self.manager(projection)?;
        let snapshots = self.inner.shared.snapshots.read().expect("no panics while it is held");
        let live = snapshots.get(projection).and_then(|snapshot| snapshot.live.as_ref());
        let none = || Error::Refused(format!("projection {projection:?} has no generation yet; see shadowbox status"));
        live.map(|live| live.record.clone()).ok_or_else(none)
    }

    fn manager(&self, projection: &str) -> Result<Manager, Error> {
        let manager = self.inner.managers.lock().expect("no panics while it is held").get(projection).cloned();
        manager.ok_or_else(|| {
            let names: Vec<_> = self.status().projections.into_iter().map(|p| p.name).collect();
            let known =
                if names.is_empty() { "there are none yet".into() } else { format!("there are: {}", names.join(", ")) };
            Error::UnknownProjection { name: projection.to_owned(), known }
        })
    }

    /// Says in the data directory where HTTP listens, for the command line.
    pub fn announce(&self, address: SocketAddr) -> Result<(), Error> {
        let mut lock = self.inner.lock.lock().expect("no panics while it is held");
        let holder = Holder { pid: std::process::id(), address: Some(address) };
        write_holder(&mut lock, &holder)
            .map_err(|error| Error::File { path: lock_path(&self.inner.shared.config.data), error })
    }

    /// Stops all projections after their running batch; returns when all have committed and stopped.
    pub async fn shutdown(&self) {
        self.inner.stopping.send_replace(true);
        let managers: Vec<_> =
            self.inner.managers.lock().expect("no panics while it is held").values().cloned().collect();
        futures_util::future::join_all(managers.iter().map(Manager::stop)).await;
        self.inner.shared.catalogue.close().await;
        self.inner.shared.log.tidy();
    }
}

/// Who holds a data directory.
#[derive(Serialize, Deserialize)]
struct Holder {
    pid: u32,
    address: Option<SocketAddr>,
}

fn lock_path(data: &Path) -> PathBuf {
    data.join("runtime.lock")
}

/// How often a lock that is held is tried again before it is believed, and how long after.
const LOOKS: u32 = 10;
const LOOK: Duration = Duration::from_millis(10);

/// Locks the data directory. The lock is the operating system's: it goes with the process, however that ends.
fn take(data: &Path) -> Result<File, Error> {
    let path = lock_path(data);
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
            let holder = match read_holder(&mut lock) {
                Some(Holder { pid, address: Some(address) }) => format!("process {pid}, http://{address}"),
                Some(Holder { pid, address: None }) => format!("process {pid}"),
                None => "which is just starting".into(),
            };
            return Err(Error::Held { data: data.to_owned(), holder });
        }
        Err(std::fs::TryLockError::Error(error)) => return Err(failed(error)),
    }
    write_holder(&mut lock, &Holder { pid: std::process::id(), address: None }).map_err(failed)?;
    Ok(lock)
}

/// Removes stored modules that no generation is built by any more. Those in the folder are stored again when they are
/// looked at.
fn sweep(modules: &Path, used: &[&str]) -> std::io::Result<()> {
    for entry in std::fs::read_dir(modules)? {
        let path = entry?.path();
        let hash = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        if !used.contains(&hash) {
            fault::point("start.sweep", &path.to_string_lossy());
            std::fs::remove_file(&path)?;
        }
    }
    Ok(())
}

fn write_holder(lock: &mut File, holder: &Holder) -> std::io::Result<()> {
    lock.set_len(0)?;
    lock.rewind()?;
    lock.write_all(&serde_json::to_vec(holder)?)?;
    lock.flush()
}

fn read_holder(lock: &mut File) -> Option<Holder> {
    let mut text = String::new();
    lock.read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

/// The address of the runtime that holds this data directory now, if one does and listens.
pub fn running(data: &Path) -> Option<SocketAddr> {
    let mut lock = File::open(lock_path(data)).ok()?;
    match lock.try_lock_shared() {
        // Nobody holds it; what it says is old.
        Ok(()) => None,
        Err(_) => read_holder(&mut lock)?.address,
    }
}

/// Reconciles whenever the folder has changed, until the runtime stops.
fn watch_folder(inner: Arc<Inner>, folder: Folder, looked: oneshot::Sender<()>) {
    let (sender, mut found) = mpsc::unbounded_channel::<Vec<Found>>();
    std::thread::Builder::new()
        .name("plugin-folder".into())
        .spawn(move || folder.watch(&sender))
        .expect("a thread can be started");
    let mut stopping = inner.stopping.subscribe();
    tokio::spawn(async move {
        let mut looked = Some(looked);
        let mut wanted = BTreeMap::new();
        loop {
            let found = tokio::select! {
                found = found.recv() => found,
                _ = stopping.wait_for(|stopping| *stopping) => None,
            };
            let Some(found) = found else { return };
            let owners = inner.shared.views.read().expect("no panics while it is held").clone();
            let plan = Plan::make(&wanted, &found, &|view| owners.get(view).map(|v| v.projection.clone()));
            tracing::debug!(%plan, "the plugin folder has changed");
            inner.carry_out(&plan);
            wanted = plan.wanted;
            if let Some(looked) = looked.take() {
                if wanted.is_empty() {
                    let folder = &inner.shared.config.plugins;
                    tracing::info!(?folder, "there is no module to run; drop one into the folder");
                }
                // Whoever starts a runtime on data that is there can ask for its views at once.
                let managers: Vec<_> =
                    inner.managers.lock().expect("no panics while it is held").values().cloned().collect();
                futures_util::future::join_all(managers.iter().map(Manager::settled)).await;
                // The starter may have been dropped.
                let _ = looked.send(());
            }
        }
    });
}

/// Which projection is to be run by which file.
type Wanted = BTreeMap<String, (String, Module)>;

/// What changes from what is wanted now to what the folder holds.
struct Plan {
    /// What is wanted from now on.
    wanted: Wanted,
    /// Projections whose module is new, another one, or in another file.
    start: Vec<String>,
    /// Projections whose module is gone.
    stop: Vec<String>,
    refused: Vec<Refused>,
}

impl Plan {
    /// `owner` says which projection a live view belongs to. Where two files claim the same thing, the one that runs
    /// already keeps it, else the first by name.
    fn make(now: &Wanted, found: &[Found], owner: &dyn Fn(&str) -> Option<String>) -> Plan {
        let mut refused = Vec::new();
        let mut modules: Vec<(&str, &Module)> = Vec::new();
        for Found { file, module } in found {
            match module {
                Ok(module) => modules.push((file, module)),
                Err(reason) => refused.push(Refused { file: file.clone(), reason: reason.clone() }),
            }
        }
        let runs = |file: &str, module: &Module| now.get(&module.manifest.projection).is_some_and(|(f, _)| f == file);
        modules.sort_by_key(|(file, module)| (!runs(file, module), file.to_string()));
        let mut wanted = Wanted::new();
        let mut views: BTreeMap<&str, &str> = BTreeMap::new();
        for (file, module) in modules {
            match clash(module, &wanted, &views, owner) {
                Some(reason) => {
                    refused.push(Refused { file: file.to_owned(), reason });
                    let name = &module.manifest.projection;
                    // A module that cannot replace the one that runs leaves it running.
                    if let Some((former, standing)) = now.get(name).filter(|(f, _)| f == file)
                        && !wanted.contains_key(name)
                    {
                        views.extend(standing.manifest.views.iter().map(|v| (v.name.as_str(), name.as_str())));
                        wanted.insert(name.clone(), (former.clone(), standing.clone()));
                    }
                }
                None => {
                    let name = &module.manifest.projection;
                    views.extend(module.manifest.views.iter().map(|v| (v.name.as_str(), name.as_str())));
                    wanted.insert(name.clone(), (file.to_owned(), module.clone()));
                }
            }
        }
        // So does a file that is broken: the module that it had goes on, unless another file has it by now.
        for (name, (file, standing)) in now {
            let broken = found.iter().any(|found| found.file == *file && found.module.is_err());
            let taken = standing.manifest.views.iter().any(|v| views.contains_key(v.name.as_str()));
            if broken && !taken && !wanted.contains_key(name) {
                wanted.insert(name.clone(), (file.clone(), standing.clone()));
            }
        }
        let same = |name: &str, file: &str, hash: &str| now.get(name).is_some_and(|(f, m)| f == file && m.hash == hash);
        let start = wanted.iter().filter(|(name, (file, module))| !same(name, file, &module.hash));
        let start = start.map(|(name, _)| name.clone());
        let stop: BTreeSet<_> = now.keys().filter(|name| !wanted.contains_key(*name)).cloned().collect();
        refused.sort_by(|a, b| a.file.cmp(&b.file));
        Plan { start: start.collect(), stop: stop.into_iter().collect(), wanted, refused }
    }
}

/// What dropping `module` into the folder would come to, by the rules that the runtime goes by: the file that it would
/// be, and why it would be refused. It takes the place of the file that runs its projection, if there is one, else it is
/// `file`. `folder` is what is there now.
pub fn would_refuse(
    module: &Module,
    file: &str,
    folder: &[Found],
    owner: &dyn Fn(&str) -> Option<String>,
) -> (String, Option<String>) {
    let now = Plan::make(&Wanted::new(), folder, owner).wanted;
    let file = now.get(&module.manifest.projection).map_or(file, |(file, _)| file).to_owned();
    let mut then: Vec<Found> = folder.iter().filter(|found| found.file != file).cloned().collect();
    then.push(Found { file: file.clone(), module: Ok(module.clone()) });
    let refused = Plan::make(&now, &then, owner).refused.into_iter().find(|refused| refused.file == file);
    (file, refused.map(|refused| refused.reason))
}

fn clash(
    module: &Module,
    wanted: &Wanted,
    views: &BTreeMap<&str, &str>,
    owner: &dyn Fn(&str) -> Option<String>,
) -> Option<String> {
    let name = &module.manifest.projection;
    if let Some((file, _)) = wanted.get(name) {
        return Some(format!(
            "projection {name:?} is already run by {file:?}; remove one of the files, or rename the projection"
        ));
    }
    module.manifest.views.iter().find_map(|view| {
        let other = views.get(view.name.as_str()).map(|p| p.to_string()).or_else(|| owner(&view.name));
        other.filter(|other| other != name).map(|other| {
            format!(
                "view {:?} belongs to projection {other:?} already; rename the view, and build the module again",
                view.name
            )
        })
    })
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "start [{}], stop [{}]", self.start.join(", "), self.stop.join(", "))?;
        self.refused.iter().try_for_each(|r| write!(f, ", refuse {}", r.file))
    }
}

impl Inner {
    fn carry_out(self: &Arc<Self>, plan: &Plan) {
        let poisoned = "no panics while it is held";
        let mut managers = self.managers.lock().expect(poisoned);
        for name in &plan.stop {
            tracing::info!(projection = name, "the module is gone; the projection stops, its views stay readable");
            managers.get(name).expect("it was started").want(None);
        }
        for name in &plan.start {
            let (file, module) = plan.wanted[name].clone();
            let manager =
                managers.entry(name.clone()).or_insert_with(|| Manager::start(name, None, self.shared.clone()));
            manager.want(Some((file, module)));
        }
        let mut refused = self.refused.write().expect(poisoned);
        for new in plan.refused.iter().filter(|r| !refused.contains(r)) {
            tracing::warn!(file = new.file, reason = new.reason, "refused a module; everything else goes on");
        }
        refused.clone_from(&plan.refused);
    }
}

/// Looks again and again which generations have something to do and do not move, until the runtime stops.
async fn watch_stalls(inner: Arc<Inner>) {
    let stall_after = inner.shared.config.stall_after;
    let mut looks = tokio::time::interval((stall_after / 4).min(limits::STALL_LOOK));
    let mut stopping = inner.stopping.subscribe();
    let mut known = BTreeSet::new();
    loop {
        tokio::select! {
            _ = looks.tick() => {}
            _ = stopping.wait_for(|stopping| *stopping) => return,
        }
        let now = Instant::now();
        let log = inner.shared.log.trouble();
        let snapshots = inner.shared.snapshots.read().expect("no panics while it is held").clone();
        let mut stalled = BTreeMap::new();
        {
            let mut stalls = inner.stalls.lock().expect("no panics while it is held");
            for (name, snapshot) in &snapshots {
                for (generation, follows) in generations(snapshot) {
                    let checkpoint = generation.reached.checkpoint();
                    // Nobody knows the lag behind a log that cannot be read, nor that of a worker which has not begun.
                    let lags = || generation.reached.behind().is_none_or(|behind| behind.events > 0);
                    let behind = follows && (log.is_some() || lags());
                    let key = (name.as_str(), generation.record.number);
                    stalls.look(key, behind, checkpoint, now);
                    if stalls.quiet(key, checkpoint, now) >= stall_after {
                        let reason = waits_for(generation, log.as_deref(), stalls.quiet(key, checkpoint, now));
                        stalled.insert((name.clone(), generation.record.number), reason);
                    }
                }
            }
            stalls.forget_others(now);
        }
        for ((projection, generation), reason) in stalled.iter().filter(|(key, _)| !known.contains(*key)) {
            tracing::warn!(projection, generation, reason, "stalled");
        }
        for (projection, generation) in known.iter().filter(|key| !stalled.contains_key(*key)) {
            tracing::info!(projection, generation, "not stalled any more");
        }
        known = stalled.into_keys().collect();
    }
}

/// Has each source that keeps content for a time only forget what is older, again and again until the runtime stops.
fn watch_retention(inner: &Arc<Inner>) {
    let sources = inner.shared.config.sources.clone();
    let Some(shortest) = sources.values().filter_map(|source| source.keep).min() else { return };
    let (log, mut stopping) = (inner.shared.log.clone(), inner.stopping.subscribe());
    tokio::spawn(async move {
        let mut looks = tokio::time::interval((shortest / 10).clamp(limits::RETENTION_SOONEST, limits::RETENTION_LOOK));
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = looks.tick() => {}
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
            let rules: Vec<_> = sources.iter().map(|(glob, source)| (glob.clone(), source.keep)).collect();
            let log = log.clone();
            let done = tokio::task::spawn_blocking(move || log.retain(&rules)).await;
            match done {
                Ok(Ok(None)) => {}
                Ok(Ok(Some(Forgetting { number, source, events, .. }))) => {
                    tracing::info!(number, source, events, "forgot the content of events that is kept no longer");
                }
                Ok(Err(error)) => tracing::warn!(%error, "cannot forget what is kept no longer; trying again later"),
                // Everything stops.
                Err(_) => return,
            }
        }
    });
}

/// The generations of a projection, and whether somebody is to follow the log for them.
fn generations(snapshot: &Snapshot) -> impl Iterator<Item = (&SnapshotGeneration, bool)> {
    let live = matches!(snapshot.state.live, Live::Running(_) | Live::Proving { .. } | Live::Waiting(_));
    let building = snapshot.state.building.is_followed();
    snapshot
        .live
        .iter()
        .map(move |g| (g, live && !g.former))
        .chain(snapshot.building.iter().map(move |g| (g, building)))
}

/// What a generation waits for that does not move.
fn waits_for(generation: &SnapshotGeneration, log: Option<&str>, quiet: Duration) -> String {
    let progress = generation.progress.borrow();
    let why = match (&progress.activity, &progress.task, log) {
        (_, _, Some(trouble)) => trouble.to_owned(),
        (Activity::Retrying(error), _, _) => format!("{error}; retrying"),
        (_, Some((task, since)), _) => format!("{task} has taken {:.1} s so far", since.elapsed().as_secs_f64()),
        (_, None, _) => "it has not begun".to_owned(),
    };
    format!("no progress for {:.1} s: {why}", quiet.as_secs_f64())
}

/// What the status of generations is made from besides themselves.
struct Look<'a> {
    head: Head,
    /// Why the log cannot be read.
    log: Option<String>,
    stalls: &'a Stalls,
    stall_after: Duration,
}

impl Look<'_> {
    /// What a generation waits for, if it is stalled.
    fn stalled(&self, name: &str, generation: &SnapshotGeneration, follows: bool) -> Option<String> {
        let key = (name, generation.record.number);
        let quiet = self.stalls.quiet(key, generation.reached.checkpoint(), Instant::now());
        (follows && quiet >= self.stall_after).then(|| waits_for(generation, self.log.as_deref(), quiet))
    }
}

fn projection_status(policy: Policy, name: String, snapshot: &Snapshot, look: &Look<'_>) -> Option<ProjectionStatus> {
    let (live, building) = (snapshot.live.as_ref()?, snapshot.building.as_ref());
    let stalled = |generation: &SnapshotGeneration| {
        let found = generations(snapshot).find(|(g, _)| g.record.number == generation.record.number);
        look.stalled(&name, generation, found.is_some_and(|(_, follows)| follows))
    };
    let live_stalled = stalled(live);
    let is_stalled = live_stalled.is_some();
    let fault = match &snapshot.state.live {
        Live::Faulted(_, reason) => Some(reason.clone()),
        _ => None,
    };
    let build_fault = match &snapshot.state.building {
        Building::Faulted(_, reason) => Some(reason.clone()),
        _ => None,
    };
    let refused = || snapshot.refused.clone();
    let build = if snapshot.state.back { "rollback" } else { "rebuild" };
    let build_failed =
        || build_fault.as_ref().map(|r| format!("the {build} failed: {r}; the former generation goes on"));
    let error = fault.or(live_stalled).or_else(refused).or_else(build_failed);
    let mut live_status = generation_status(live, look.head, error);
    if let Some(module) = snapshot.state.live.module() {
        live_status.module_hash.clone_from(&module.hash);
    }
    let runs = |hash: &String| snapshot.state.live.module().is_some_and(|m| m.hash == *hash);
    // By positions in the first place: what a worker says of itself may be a moment old.
    let at_head = live_status.lag_events == 0 || live.progress.borrow().activity == Activity::AtHead;
    let waits = match (&snapshot.state.building, building) {
        (Building::Ready(_), Some(build)) => Some(format!(
            "generation {} is as far as the live one, which was made from more: {}; {}",
            build.record.number,
            lacks(&live.reached.origin(), &build.reached.origin()),
            match live.reached.origin().forgotten {
                Some(number) => format!(
                    "but that may have what was forgotten (forgetting {number}), until a person says: shadowbox promote {name}"
                ),
                None => format!("say which is to stay: shadowbox promote {name}, or with --discard"),
            }
        )),
        _ => None,
    };
    let build_error = build_fault.or_else(|| building.and_then(stalled));
    let building = building.map(|b| generation_status(b, look.head, build_error));
    let state = match (&snapshot.state.live, &snapshot.state.building) {
        _ if is_stalled => ProjectionState::Stalled,
        (_, building) if building.is_followed() => ProjectionState::Rebuilding,
        (Live::Faulted(..), _) => ProjectionState::Faulted,
        (Live::None | Live::Stopped(_), _) => ProjectionState::Stopped,
        _ if at_head => ProjectionState::Live,
        _ => ProjectionState::CatchingUp,
    };
    Some(ProjectionStatus {
        name,
        state,
        file: snapshot.file.clone(),
        views: live.record.manifest.views.iter().map(|v| v.name.clone()).collect(),
        policy,
        live: live_status,
        building,
        rolled_back_from: snapshot.state.held.clone().filter(|held| !runs(held)),
        waits,
    })
}

/// What a generation was not made from that another one was.
fn lacks(fuller: &Origin, thinner: &Origin) -> String {
    let mut lacks = Vec::new();
    if let Some(from) = thinner.complete_from.filter(|_| fuller.complete_from < thinner.complete_from) {
        lacks.push(format!("content of events before position {from}, which is not kept any more"));
    }
    let stretches = thinner.damaged.iter().filter(|stretch| !fuller.damaged.contains(stretch));
    lacks.extend(stretches.map(|(first, last)| format!("events {first} to {last}, which could not be read")));
    lacks.join("; ")
}

fn generation_status(generation: &SnapshotGeneration, head: Head, fault: Option<String>) -> GenerationStatus {
    let progress = generation.progress.borrow().clone();
    let position = generation.reached.now();
    // Without a worker nobody counts what is wanted; then everything counts.
    let unseen = || {
        let events = head.next - position.map_or(0, |p| p.0 + 1).min(head.next);
        Behind { events, since: (events > 0).then_some(Time::EPOCH) }
    };
    let behind = generation.reached.behind().unwrap_or_else(unseen);
    let lag_seconds = behind.since.map_or(0.0, |since| {
        let since = progress.appended.map_or(since, |appended| since.max(appended));
        let since = if since == Time::EPOCH { head.first } else { since };
        ((head.appended.microseconds() - since.microseconds()) as f64 / 1e6).max(0.0)
    });
    let fresh = progress.measured.is_some_and(|at| at.elapsed() < RATE_FRESH);
    let retrying = match &progress.activity {
        Activity::Retrying(error) => Some(format!("{error}; retrying")),
        Activity::AtHead | Activity::CatchingUp => None,
    };
    GenerationStatus {
        generation: generation.record.number,
        version: generation.record.manifest.version,
        module_hash: generation.record.module.clone(),
        position,
        lag_events: behind.events,
        lag_seconds,
        rate: if fresh { progress.rate } else { 0.0 },
        error: fault.or(retrying),
        fault: generation.fault.as_deref().cloned(),
        dead_letters: progress.dead_letters,
        made_from: generation.reached.origin().into(),
    }
}
