//! One projection: the handle on it, what all of them share, and how they show themselves.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, RwLock};

use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::failure::{Outcome, Request, Treatment};
use super::lifecycle::{Building, Live, ModuleId, State};
use super::reached::Reached;
use super::running;
use super::worker::Progress;
use crate::config::{Config, Policy};
use crate::log::EventLog;
use crate::manifest::{Manifest, ViewSchema};
use crate::model::FailureReport;
use crate::plugin::{Engine, Module};
use crate::view::{Catalogue, GenerationRecord, ProjectionRecord, Role, Selector};

/// What all projections of a runtime share.
pub struct Shared {
    /// The event log.
    pub log: EventLog,
    /// Which generations there are.
    pub catalogue: Catalogue,
    /// Compiles modules.
    pub engine: Engine,
    /// Where stored modules are.
    pub modules: PathBuf,
    /// Everything that can be set.
    pub config: Config,
    /// Which projection has a view, live or being built, by the view's name. Whoever is not in here shows no rows.
    pub claims: Mutex<BTreeMap<String, String>>,
    /// Told when a view belongs to nobody any more.
    pub released: Notify,
    /// The live views, by name.
    pub views: RwLock<Arc<BTreeMap<String, LiveView>>>,
    /// The policies that were set while Shadowbox ran, by projection.
    pub policies: RwLock<BTreeMap<String, Policy>>,
    /// The projections as they were after their last change, by name.
    pub snapshots: RwLock<BTreeMap<String, Snapshot>>,
}

impl Shared {
    /// What a projection does about bad events now, and whether that was set while Shadowbox ran.
    pub fn policy(&self, projection: &str) -> (Policy, bool) {
        match self.policies.read().expect("no panics while it is held").get(projection) {
            Some(policy) => (*policy, true),
            None => (self.config.policy(projection), false),
        }
    }
}

/// What a reader needs to know of a live view.
#[derive(Clone)]
pub struct LiveView {
    /// Its columns and key.
    pub schema: Arc<ViewSchema>,
    /// The projection that maintains it.
    pub projection: String,
    /// The live generation's number.
    pub generation: u64,
    /// The generation's SQLite file.
    pub file: PathBuf,
    /// To where its rows are complete.
    pub reached: Reached,
}

/// A projection at a moment; what moves all the time is behind the channels.
#[derive(Clone)]
pub struct Snapshot {
    /// The module's file name; None if there is none in the folder.
    pub file: Option<String>,
    /// Where the lifecycle stands.
    pub state: State,
    /// The live generation.
    pub live: Option<SnapshotGeneration>,
    /// The generation being built.
    pub building: Option<SnapshotGeneration>,
    /// Why the module in the folder is not the one that runs.
    pub refused: Option<String>,
}

/// A generation at a moment.
#[derive(Clone)]
pub struct SnapshotGeneration {
    /// What the catalogue says.
    pub record: GenerationRecord,
    /// How far it has come.
    pub progress: watch::Receiver<Arc<Progress>>,
    /// To where its rows are complete.
    pub reached: Reached,
    /// The event at which it stands.
    pub fault: Option<Arc<FailureReport>>,
    /// Its rows were made before the log had one order, and nobody follows for it.
    pub former: bool,
}

pub(super) enum Message {
    Wanted(Option<(String, Box<Module>)>),
    Rebuild(oneshot::Sender<Result<u64, String>>),
    Rollback(oneshot::Sender<Result<u64, String>>),
    /// The generation that is ready takes the live one's place, or, if false, it is discarded.
    Promote(bool, oneshot::Sender<Result<u64, String>>),
    Resume(oneshot::Sender<Result<(), String>>),
    SetPolicy(Option<Policy>, oneshot::Sender<Result<(), String>>),
    Treat(Request),
    Settled(oneshot::Sender<()>),
    Stop(oneshot::Sender<()>),
}

/// A handle on a running projection.
#[derive(Clone)]
pub struct Manager {
    messages: mpsc::UnboundedSender<Message>,
}

impl Manager {
    /// Takes over what the catalogue has of a projection; nothing is followed before a module is wanted.
    pub fn start(name: &str, record: Option<ProjectionRecord>, shared: Arc<Shared>) -> Manager {
        let (messages, inbox) = mpsc::unbounded_channel();
        running::start(name.to_owned(), record, shared, inbox);
        Manager { messages }
    }

    /// The folder has this file with this module for the projection now, or none any more.
    pub fn want(&self, module: Option<(String, Module)>) {
        // A manager ends only when everything stops.
        let _ = self.messages.send(Message::Wanted(module.map(|(file, module)| (file, Box::new(module)))));
    }

    /// Returns when everything that was asked before is done: generations are entered and followed, not caught up.
    pub async fn settled(&self) {
        let (reply, done) = oneshot::channel();
        if self.messages.send(Message::Settled(reply)).is_ok() {
            // An error means that everything stops.
            let _ = done.await;
        }
    }

    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<Result<T, String>>) -> Message) -> Result<T, String> {
        let (reply, answer) = oneshot::channel();
        let stopping = || "the projection has stopped before it could answer; see shadowbox status".to_owned();
        self.messages.send(message(reply)).map_err(|_| stopping())?;
        answer.await.unwrap_or_else(|_| Err(stopping()))
    }

    /// Begins a rebuild, unless one is running; answers its generation's number, or why there cannot be one.
    pub async fn rebuild(&self) -> Result<u64, String> {
        self.ask(Message::Rebuild).await
    }

    /// Begins to go back to the newest former generation; answers its number, or why one cannot.
    pub async fn rollback(&self) -> Result<u64, String> {
        self.ask(Message::Rollback).await
    }

    /// Has the generation that is ready take the place of the live one, or discards it; answers its number.
    pub async fn promote(&self, promote: bool) -> Result<u64, String> {
        self.ask(|reply| Message::Promote(promote, reply)).await
    }

    /// Starts again what is faulted, or says why not.
    pub async fn resume(&self) -> Result<(), String> {
        self.ask(Message::Resume).await
    }

    /// Sets what is done about bad events, and keeps it; None goes back to the configuration. A projection that stands
    /// at a bad event goes on, if the policy is not to stop there.
    pub async fn set_policy(&self, policy: Option<Policy>) -> Result<(), String> {
        self.ask(|reply| Message::SetPolicy(policy, reply)).await
    }

    /// Retries or discards dead letters of the live generation between two of its batches. One that is faulted is
    /// resumed for it.
    pub async fn treat(&self, treatment: Treatment, selector: Selector) -> Result<Outcome, String> {
        self.ask(|reply| Message::Treat(Request { treatment, selector, reply })).await
    }

    /// Stops all workers after their running batch.
    pub async fn stop(&self) {
        let (reply, done) = oneshot::channel();
        if self.messages.send(Message::Stop(reply)).is_ok() {
            let _ = done.await;
        }
    }
}

/// A module as the lifecycle sees it.
pub fn module_id(hash: &str, manifest: &Manifest) -> ModuleId {
    ModuleId { hash: hash.to_owned(), version: manifest.version, schema: manifest.schema_digest() }
}

/// What the catalogue has of a projection, as a state in which nobody follows for it.
pub fn at_rest(record: Option<&ProjectionRecord>) -> State {
    let of = |role| record.and_then(|r| r.role(role));
    let module = |g: &GenerationRecord| module_id(&g.module, &g.manifest);
    State {
        live: of(Role::Live).map_or(Live::None, |g| Live::Stopped(module(g))),
        building: of(Role::Building).map_or(Building::None, |g| Building::Stopped(module(g))),
        // Only a generation that was live once has been promoted.
        back: of(Role::Building).is_some_and(|g| g.promoted.is_some()),
        held: record.and_then(|r| r.held.clone()),
    }
}

/// Enough of a hash for people.
pub(crate) fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}
