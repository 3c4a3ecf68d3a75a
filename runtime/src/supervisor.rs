//! The supervisor: the handle on a running Shadowbox.
//!
//! `lock.rs` says who holds the data directory; `plan.rs` what should run, by the plugin folder, against what runs;
//! `watch.rs` looks again and again and has it done; `status.rs` is what is told of it.

mod lock;
mod plan;
mod status;
mod watch;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};

use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, oneshot};

use crate::config::{Config, Policy};
use crate::fault;
use crate::log::{self, EventLog, Forgetting};
use crate::plugin::{self, Engine, Folder};
use crate::projection::{self, Manager, Shared, Stalls};
use crate::view::{self, Catalogue, GenerationRecord, Origin, Scratch, Selector};

pub use lock::running;
pub use plan::{Known, would_refuse};
pub use status::{GenerationStatus, LogStatus, MadeFrom, ProjectionState, ProjectionStatus, Refused, Status};

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
        let lock = lock::take(&data)?;
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
        let generations: Vec<_> = records.iter().flat_map(|p| &p.generations).collect();
        // A proof replays what each module has made of the rows.
        let origins = generations.iter().filter_map(|g| view::origin(&g.file).ok().flatten());
        let made: Vec<_> = origins.flat_map(|origin| origin.modules).map(|(_, module)| module).collect();
        let used = generations.iter().map(|g| g.module.as_str()).chain(made.iter().map(String::as_str));
        sweep(&modules, &used.collect::<Vec<_>>()).map_err(|e| file(&modules, e))?;
        let shared = Arc::new(Shared {
            log,
            catalogue,
            engine,
            modules,
            config,
            views: RwLock::default(),
            claims: Mutex::default(),
            released: Notify::new(),
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
        watch::folder(inner.clone(), folder, looked);
        // The sender is dropped without a word only if everything stops.
        let _ = first_look.await;
        tokio::spawn(watch::stalls(inner.clone()));
        let log = inner.shared.log.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = log.resume_forgetting() {
                tracing::warn!(%error, "cannot go on with a forgetting that was interrupted; the next one tries again");
            }
        });
        watch::retention(&inner);
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
        let look = status::Look {
            head,
            log: log.trouble(),
            stalls: &stalls,
            stall_after: self.inner.shared.config.stall_after,
        };
        let policy = |name: &str| self.inner.shared.policy(name).0;
        let projections =
            snapshots.into_iter().filter_map(|(name, s)| status::projection(policy(&name), name, &s, &look));
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
        let holder = lock::Holder { pid: std::process::id(), address: Some(address) };
        lock::write(&mut lock, &holder)
            .map_err(|error| Error::File { path: lock::path(&self.inner.shared.config.data), error })
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
