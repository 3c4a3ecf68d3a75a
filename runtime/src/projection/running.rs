//! A projection at work: tells the lifecycle what has happened, and carries out what that says.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, PoisonError};

use tokio::sync::{mpsc, watch};

use super::Error;
use super::failure::Request;
use super::lifecycle::{Action, Building, Input, Live, ModuleId, State};
use super::manager::{LiveView, Message, Shared, Snapshot, SnapshotGeneration, at_rest, module_id, short};
use super::reached::Reached;
use super::worker::{Before, Command, Fault, Job, Notice, Progress, Worker};
use crate::config::{Policy, limits};
use crate::fault;
use crate::manifest::{Manifest, ViewSchema};
use crate::model::FailureReport;
use crate::plugin::{self, Module};
use crate::view::{self, DeadLetters, GenerationRecord, Origin, ProjectionRecord, Role};

/// Takes over what the catalogue has of a projection, and does what it is told until the handles are gone.
pub(super) fn start(
    name: String,
    record: Option<ProjectionRecord>,
    shared: Arc<Shared>,
    inbox: mpsc::UnboundedReceiver<Message>,
) {
    let (notices, from_workers) = mpsc::unbounded_channel();
    let mut record = record;
    if let Some(record) = &mut record {
        // A build that was interrupted by the conversion of the log begins anew.
        record.generations.retain(|g| g.role != Role::Building || !is_former(&g.file));
    }
    let generation = |role| record.as_ref().and_then(|r| r.role(role).cloned()).map(Slot::new);
    let (live, building) = (generation(Role::Live), generation(Role::Building));
    let state = at_rest(record.as_ref());
    let former = record.iter().flat_map(|r| r.former()).cloned().collect();
    let mut running = Running {
        policy: watch::Sender::new(shared.policy(&name).0),
        name,
        state,
        live,
        building,
        former,
        modules: HashMap::new(),
        file: None,
        wanted: None,
        refused: None,
        cleansed: None,
        notices,
        workers: 0,
        shared,
    };
    running.publish();
    let (name, shared) = (running.name.clone(), running.shared.clone());
    let running = tokio::spawn(running.run(inbox, from_workers));
    tokio::spawn(async move {
        if running.await.is_err_and(|ended| ended.is_panic()) {
            // The panic itself is in the log. A projection that nobody manages must not look healthy.
            let mut snapshots = shared.snapshots.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(snapshot) = snapshots.get_mut(&name) {
                let reason = "a bug in shadowbox has stopped it; report it with the log, and restart";
                snapshot.refused = Some(reason.to_owned());
                if let Some(module) = snapshot.state.live.module().cloned() {
                    snapshot.state.live = Live::Faulted(module, reason.to_owned());
                }
            }
        }
    });
}

/// A generation and whoever follows for it.
struct Slot {
    record: GenerationRecord,
    worker: Option<Worker>,
    progress: Arc<watch::Sender<Arc<Progress>>>,
    reached: Reached,
    /// Its rows were made before the log had one order: readers have them until they are rebuilt, and nobody follows.
    former: bool,
    /// The event at which its last worker has ended.
    fault: Option<Arc<FailureReport>>,
}

impl Slot {
    fn new(record: GenerationRecord) -> Slot {
        // A file that is not there yet has no checkpoint; one that cannot be read shows when it is opened for writing.
        let former = is_former(&record.file);
        let stored = record.file.exists().then(|| view::mark(&record.file));
        let checkpoint = stored.and_then(Result::ok).flatten().map(|mark| mark.position);
        let origin = record.file.exists().then(|| view::origin(&record.file));
        let origin = origin.and_then(Result::ok).flatten().unwrap_or_default();
        let stored = record.file.exists().then(|| DeadLetters::open(&record.file).and_then(|letters| letters.counts()));
        let dead_letters = stored.and_then(Result::ok).unwrap_or_default();
        Slot {
            record,
            worker: None,
            progress: Arc::new(watch::Sender::new(Arc::new(Progress { dead_letters, ..Progress::default() }))),
            reached: Reached::new(checkpoint, origin),
            former,
            fault: None,
        }
    }

    fn id(&self) -> ModuleId {
        module_id(&self.record.module, &self.record.manifest)
    }

    async fn stop(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop().await;
        }
    }

    fn snapshot(&self) -> SnapshotGeneration {
        SnapshotGeneration {
            record: self.record.clone(),
            progress: self.progress.subscribe(),
            reached: self.reached.clone(),
            fault: self.fault.clone(),
            former: self.former,
        }
    }
}

/// Whether the rows of a file were made before the log had one order.
fn is_former(file: &Path) -> bool {
    file.exists() && matches!(view::mark(file), Err(view::Error::Former { .. }))
}

struct Running {
    name: String,
    state: State,
    live: Option<Slot>,
    building: Option<Slot>,
    /// Former generations; the last one was live last.
    former: Vec<GenerationRecord>,
    modules: HashMap<String, Module>,
    file: Option<String>,
    /// The hash of the module in that file.
    wanted: Option<String>,
    refused: Option<String>,
    /// For which forgetting, as of which epoch, a rebuild has begun.
    cleansed: Option<(u64, u64)>,
    /// What is done about bad events, for the workers to look at.
    policy: watch::Sender<Policy>,
    notices: mpsc::UnboundedSender<(u64, Notice)>,
    workers: u64,
    shared: Arc<Shared>,
}

impl Running {
    async fn run(
        mut self,
        mut inbox: mpsc::UnboundedReceiver<Message>,
        mut from_workers: mpsc::UnboundedReceiver<(u64, Notice)>,
    ) {
        let mut epoch = self.shared.log.epoch();
        if *epoch.borrow_and_update() > 0 {
            self.forget().await;
            self.publish();
        }
        loop {
            tokio::select! {
                // The sender lives as long as the log.
                Ok(()) = epoch.changed() => {
                    epoch.borrow_and_update();
                    self.forget().await;
                }
                message = inbox.recv() => match message {
                    Some(Message::Wanted(module)) => self.wanted(module).await,
                    Some(Message::Rebuild(reply)) => {
                        let answer = self.rebuild().await;
                        // Whoever asked may have gone away.
                        let _ = reply.send(answer);
                    }
                    Some(Message::Rollback(reply)) => {
                        let answer = self.rollback().await;
                        let _ = reply.send(answer);
                    }
                    Some(Message::Promote(promote, reply)) => {
                        let answer = self.decide(promote).await;
                        // Whoever asked may have gone away.
                        let _ = reply.send(answer);
                    }
                    Some(Message::Resume(reply)) => {
                        let answer = self.resume().await;
                        // Whoever asked may have gone away.
                        let _ = reply.send(answer);
                    }
                    Some(Message::SetPolicy(policy, reply)) => {
                        let answer = self.set_policy(policy).await;
                        // Whoever asked may have gone away.
                        let _ = reply.send(answer);
                    }
                    Some(Message::Treat(request)) => self.treat(request).await,
                    Some(Message::Settled(reply)) => {
                        // Whoever asked may have gone away.
                        let _ = reply.send(());
                        continue;
                    }
                    Some(Message::Stop(reply)) => {
                        self.stop_all().await;
                        let _ = reply.send(());
                        return;
                    }
                    None => return self.stop_all().await,
                },
                Some((worker, notice)) = from_workers.recv() => self.noticed(worker, notice).await,
            }
            self.cleanse().await;
            self.publish();
        }
    }

    async fn wanted(&mut self, module: Option<(String, Box<Module>)>) {
        self.refused = None;
        let (file, module) = module.unzip();
        self.file = file;
        self.wanted = module.as_ref().map(|module| module.hash.clone());
        let wanted = module.map(|module| {
            let id = module_id(&module.hash, &module.manifest);
            self.modules.insert(module.hash.clone(), *module);
            id
        });
        let runs = wanted.is_some();
        self.happened(Input::Wanted(wanted)).await;
        // Rows of the former kind are followed by nobody; what runs is the build that takes their place.
        let former = self.live.as_ref().is_some_and(|live| live.former);
        if runs && former {
            if matches!(self.state.live, Live::Proving { .. }) {
                self.happened(Input::LiveProved).await;
            }
            if matches!(self.state.building, Building::None) {
                self.happened(Input::Rebuild).await;
            }
        }
    }

    async fn rebuild(&mut self) -> Result<u64, String> {
        self.check_file()?;
        if self.live.is_none() {
            return Err(format!("projection {:?} has no generation yet; see its error in the status", self.name));
        }
        if self.state.back && !matches!(self.state.building, Building::Faulted(..)) {
            return Err(format!("a rollback of projection {:?} is under way; rebuild when it has ended", self.name));
        }
        self.happened(Input::Rebuild).await;
        self.begun("rebuild")
    }

    async fn rollback(&mut self) -> Result<u64, String> {
        let name = &self.name;
        let Some(folder) = self.wanted.clone() else {
            return Err(format!("projection {name:?} has no module in the plugin folder; put it back, then roll back"));
        };
        if let Building::Ready(_) = self.state.building {
            return Err(format!(
                "a generation of projection {name:?} waits for a person; first shadowbox promote {name}, with --discard or \
                 without"
            ));
        }
        if self.state.building.is_followed() || matches!(self.state.building, Building::Stopped(_)) {
            let what = if self.state.back { "a rollback" } else { "a rebuild" };
            return Err(format!("{what} of projection {name:?} is under way; see shadowbox status"));
        }
        let back = self.building.as_ref().filter(|_| self.state.back).map(|slot| &slot.record);
        let Some(former) = back.or(self.former.last()).cloned() else {
            return Err(format!(
                "projection {name:?} has no former generation to go back to; keep_generations says how many are kept \
                 after a rebuild or a new version; put the former module into the plugin folder instead"
            ));
        };
        let to = module_id(&former.module, &former.manifest);
        let cannot = |error: Error| format!("cannot go back to generation {} of {name:?}: {error}", former.number);
        self.claim(&former.manifest).map_err(cannot)?;
        let (log, file) = (self.shared.log.clone(), former.file.clone());
        let check = tokio::task::spawn_blocking(move || super::session::check_file(&log, &file)).await;
        check.map_err(|e| Error::Host(e.to_string())).flatten().map_err(cannot)?;
        if let Err(error) = self.stored(&to.hash).await {
            return Err(cannot(error));
        }
        tracing::info!(projection = self.name, generation = former.number, "rolling back");
        self.happened(Input::Rollback { to, folder }).await;
        self.begun("rollback")
    }

    /// The number of the generation that is being built now.
    fn begun(&self, what: &str) -> Result<u64, String> {
        match (&self.building, &self.state.building) {
            (_, Building::Faulted(_, reason)) => Err(format!("the {what} cannot begin: {reason}")),
            (Some(building), _) => Ok(building.record.number),
            (None, _) => Err(format!("projection {:?} could not begin a {what}", self.name)),
        }
    }

    async fn decide(&mut self, promote: bool) -> Result<u64, String> {
        let (Building::Ready(_), Some(building)) = (&self.state.building, &self.building) else {
            return Err(format!("projection {:?} has no generation that waits for a person", self.name));
        };
        let number = building.record.number;
        let forgotten = self.live.as_ref().and_then(|live| live.reached.origin().forgotten);
        if let Some(forgotten) = forgotten.filter(|_| !promote) {
            return Err(format!(
                "the live generation of projection {:?} may have what was forgotten (forgetting {forgotten}), so \
                 generation {number} is not dropped; promote it",
                self.name
            ));
        }
        self.happened(if promote { Input::Promote } else { Input::Discard }).await;
        Ok(number)
    }

    /// Something was forgotten: it must not be read in former generations, and those that nobody follows for are looked
    /// at. Workers look for themselves.
    async fn forget(&mut self) {
        self.remove_forgotten().await;
        for role in [Role::Live, Role::Building] {
            let slot = if role == Role::Live { &self.live } else { &self.building };
            let Some(record) = slot.as_ref().filter(|slot| slot.worker.is_none()).map(|slot| slot.record.clone())
            else {
                continue;
            };
            let Some(origin) = self.made_from(&record).await else { continue };
            let holds = origin.forgotten.is_some() && !self.state.building.is_followed();
            let slot = if role == Role::Live { &self.live } else { &self.building };
            slot.as_ref().expect("as above").reached.made_from(origin);
            if holds && role == Role::Building {
                // Nobody follows for it, so what comes of it begins anew.
                self.drop_build().await;
            }
        }
        let mut forgotten = false;
        for slot in [&mut self.live, &mut self.building].into_iter().flatten() {
            let Some(position) = slot.fault.as_ref().map(|fault| fault.event.position) else { continue };
            let log = self.shared.log.clone();
            let event = tokio::task::spawn_blocking(move || log.event(position)).await;
            if event.is_ok_and(|event| event.is_ok_and(|event| event.is_some_and(|(event, _)| event.forgotten))) {
                // What the plugin said of it is forgotten, too.
                slot.fault = None;
                forgotten = true;
            }
        }
        if forgotten && self.file.is_some() {
            self.happened(Input::Resume).await;
        }
    }

    /// A build that stands still has something in it that is forgotten.
    async fn drop_build(&mut self) {
        let Some(building) = self.building.take() else { return };
        let number = building.record.number;
        self.remove(number).await;
        (self.state.building, self.state.back) = (Building::None, false);
        tracing::info!(projection = self.name, generation = number, "removed a build: it has what was forgotten");
    }

    /// Removes former generations with something in them that is forgotten.
    async fn remove_forgotten(&mut self) {
        let mut kept = Vec::new();
        for record in std::mem::take(&mut self.former) {
            let holds = self.made_from(&record).await.is_some_and(|origin| origin.forgotten.is_some());
            if holds && self.remove(record.number).await {
                let (projection, generation) = (&self.name, record.number);
                tracing::info!(projection, generation, "removed a former generation: it has what was forgotten");
            } else {
                kept.push(record);
            }
        }
        self.former = kept;
    }

    /// If there may be something in the live rows that is forgotten, they are rebuilt, unless a build is under way. One that
    /// has failed is tried again for what is forgotten later.
    async fn cleanse(&mut self) {
        let Some((number, forgotten)) = self.live.as_ref().and_then(|live| {
            let origin = live.reached.origin();
            origin.forgotten.map(|forgotten| (live.record.number, (forgotten, origin.epoch)))
        }) else {
            return;
        };
        let is_new = self.cleansed < Some(forgotten);
        match (&self.file, &self.state.live, &self.state.building) {
            (None, ..) | (_, Live::None | Live::Stopped(_), _) => {}
            (Some(_), _, Building::None) => {
                tracing::info!(projection = self.name, generation = number, "rebuilding without what was forgotten");
                self.happened(Input::Rebuild).await;
            }
            (Some(_), _, Building::Faulted(..)) if is_new => self.happened(Input::Rebuild).await,
            (Some(_), ..) => {}
        }
        self.cleansed = Some(forgotten);
    }

    /// What a generation's rows are made from, as of now; None if that cannot be told.
    async fn made_from(&self, record: &GenerationRecord) -> Option<Origin> {
        let (log, record) = (self.shared.log.clone(), record.clone());
        let look = tokio::task::spawn_blocking(move || super::session::made_from(&log, &record));
        match look.await {
            Ok(Ok(origin)) => Some(origin),
            Ok(Err(error)) => {
                tracing::warn!(projection = self.name, %error, "cannot tell whether something in it is forgotten");
                None
            }
            // Everything stops.
            Err(_) => None,
        }
    }

    async fn resume(&mut self) -> Result<(), String> {
        if !matches!((&self.state.live, &self.state.building), (Live::Faulted(..), _) | (_, Building::Faulted(..))) {
            return Err(format!("projection {:?} is not faulted; there is nothing to resume", self.name));
        }
        self.check_file()?;
        self.happened(Input::Resume).await;
        Ok(())
    }

    /// Without a module in the folder, nobody wants the projection to run.
    fn check_file(&self) -> Result<(), String> {
        match &self.file {
            Some(_) => Ok(()),
            None => Err(format!("projection {:?} has no module in the plugin folder; put it back first", self.name)),
        }
    }

    async fn set_policy(&mut self, policy: Option<Policy>) -> Result<(), String> {
        self.shared.catalogue.set_policy(&self.name, policy).await.map_err(|error| error.to_string())?;
        {
            let mut policies = self.shared.policies.write().expect("no panics while it is held");
            match policy {
                Some(policy) => policies.insert(self.name.clone(), policy),
                None => policies.remove(&self.name),
            };
        }
        let (policy, _) = self.shared.policy(&self.name);
        tracing::info!(projection = self.name, %policy, "the policy for bad events is set");
        self.policy.send_replace(policy);
        let faulted = |slot: &Option<Slot>| slot.as_ref().is_some_and(|slot| slot.fault.is_some());
        if policy != Policy::Pause
            && self.file.is_some()
            && (matches!(self.state.live, Live::Faulted(..)) && faulted(&self.live)
                || matches!(self.state.building, Building::Faulted(..)) && faulted(&self.building))
        {
            self.happened(Input::Resume).await;
        }
        Ok(())
    }

    async fn treat(&mut self, request: Request) {
        let refusal = match (&self.state.live, &self.state.building) {
            (_, Building::Finishing(_)) => Some(format!(
                "projection {:?} is about to take over a new generation, which has dead letters of its own; try again",
                self.name
            )),
            _ => self.check_file().err(),
        };
        if refusal.is_none() && matches!(self.state.live, Live::Faulted(..)) {
            self.happened(Input::Resume).await;
        }
        let worker = self.live.as_ref().and_then(|slot| slot.worker.as_ref());
        match (refusal, worker) {
            (None, Some(worker)) => worker.tell(Command::Treat(request)),
            (refusal, _) => {
                let not_running = || format!("projection {:?} does not run; see shadowbox status", self.name);
                // Whoever asked may have gone away.
                let _ = request.reply.send(Err(refusal.unwrap_or_else(not_running)));
            }
        }
    }

    /// Keeps the event at which a worker has ended, and answers the reason with what to do about it.
    fn fault(&mut self, role: Role, fault: Fault) -> String {
        let slot = if role == Role::Live { &mut self.live } else { &mut self.building };
        if matches!((role, &self.state.live), (Role::Live, Live::Proving { .. })) {
            // Another module goes on, for which this is no fault.
            return fault.reason;
        }
        let next = match &fault.report {
            Some(_) => format!(
                "put a mended module into the plugin folder, or let such events be set aside: shadowbox policy {} park",
                self.name
            ),
            None => format!("once the cause is gone: shadowbox resume {}", self.name),
        };
        slot.as_mut().expect("it had a worker").fault = fault.report.map(Arc::from);
        format!("{}; {next}", fault.reason)
    }

    async fn noticed(&mut self, worker: u64, notice: Notice) {
        let is = |slot: &Option<Slot>| slot.as_ref().and_then(|s| s.worker.as_ref()).is_some_and(|w| w.id == worker);
        let (of_live, of_building) = (is(&self.live), is(&self.building));
        if let Notice::Faulted(_) = &notice {
            // It has ended.
            let slots = [(of_live, &mut self.live), (of_building, &mut self.building)];
            slots.into_iter().filter(|(is, _)| *is).filter_map(|(_, slot)| slot.as_mut()).for_each(|s| s.worker = None);
        }
        let at_event = matches!(&notice, Notice::Faulted(Fault { report: Some(_), .. }));
        let input = match (notice, of_live, of_building) {
            (Notice::Proved, true, _) => Input::LiveProved,
            (Notice::Faulted(fault), true, _) => Input::LiveFaulted(self.fault(Role::Live, fault)),
            // What is to be done about it, is done after everything that happens.
            (Notice::Forgotten, true, _) => return,
            (Notice::Forgotten, _, true) => {
                // Who is on the way without what was forgotten first is let arrive; the rest follows.
                let first = |slot: &Option<Slot>| slot.as_ref().and_then(|slot| slot.reached.origin().forgotten);
                if first(&self.live).is_some_and(|live| Some(live) < first(&self.building)) {
                    return;
                }
                Input::BuildForgotten
            }
            (Notice::Ready, _, true) => {
                let origin = |slot: &Option<Slot>| slot.as_ref().map(|slot| slot.reached.origin()).unwrap_or_default();
                let thinner = origin(&self.live).is_fuller_than(&origin(&self.building));
                if thinner { Input::BuildThinner } else { Input::BuildReady }
            }
            (Notice::Passed, _, true) => Input::BuildPassed,
            (Notice::Faulted(fault), _, true) => Input::BuildFaulted(self.fault(Role::Building, fault)),
            // From a worker that has been stopped meanwhile, or of no interest.
            _ => return,
        };
        self.happened(input).await;
        if let Building::Ready(_) = self.state.building {
            tracing::warn!(projection = self.name, "a generation waits for a person, see shadowbox status");
        }
        if at_event && *self.policy.borrow() != Policy::Pause {
            // The policy was changed while the worker stopped by the former one.
            self.happened(Input::Resume).await;
        }
    }

    /// Tells the lifecycle and does what it says. What goes wrong on the way is the next thing that has happened.
    async fn happened(&mut self, input: Input) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            tracing::debug!(projection = self.name, ?input, "happened");
            let before = self.state.clone();
            for action in self.state.next(input) {
                tracing::debug!(projection = self.name, ?action, "doing");
                let live = matches!(action, Action::StartLive(_));
                let build = matches!(action, Action::CreateBuilding(_) | Action::Revive | Action::StartBuilding(_));
                let promotion = action == Action::Promote;
                match self.perform(action).await {
                    Ok(()) => {}
                    Err(error) if live => inputs.push_back(Input::LiveFaulted(error.to_string())),
                    Err(error) if build => {
                        tracing::error!(projection = self.name, %error, "cannot rebuild; the live generation goes on");
                        inputs.push_back(Input::BuildFaulted(error.to_string()));
                        // Nothing but the rest of this build comes after it.
                        break;
                    }
                    Err(error) if promotion && self.live.is_some() => {
                        tracing::error!(projection = self.name, %error, "cannot promote; the live generation goes on");
                        if let Some(building) = &mut self.building {
                            building.stop().await;
                        }
                        // The build has not passed, but failed at the last moment.
                        self.state = before;
                        inputs.push_back(Input::BuildFaulted(error.to_string()));
                        break;
                    }
                    Err(error) => {
                        self.give_up(error).await;
                        return;
                    }
                }
            }
        }
        // Compiled code is large; what is needed after all is loaded from where it is stored.
        self.modules.retain(|hash, _| self.state.uses(hash));
    }

    /// The catalogue or the disk refused in the middle: everything stands still where the catalogue has it.
    async fn give_up(&mut self, error: Error) {
        tracing::error!(projection = self.name, %error, "the projection is faulted");
        self.stop_all().await;
        self.reload().await;
        self.state.live = match &self.live {
            Some(live) => Live::Faulted(live.id(), error.to_string()),
            // There is nothing to be faulted; the next look at the module begins anew.
            None => {
                self.refused = Some(error.to_string());
                Live::None
            }
        };
        self.state.building = match &self.building {
            Some(building) => Building::Faulted(building.id(), error.to_string()),
            None => Building::None,
        };
        // Only a generation that was live once has been promoted.
        self.state.back = self.building.as_ref().is_some_and(|building| building.record.promoted.is_some());
    }

    /// After an error of the catalogue nobody knows what is in it, and what is there counts. If it cannot be read either,
    /// everything stays as it was.
    async fn reload(&mut self) {
        let Ok(records) = self.shared.catalogue.projections().await else { return };
        let record = records.into_iter().find(|record| record.name == self.name);
        let mut slots: Vec<_> = [self.live.take(), self.building.take()].into_iter().flatten().collect();
        let mut slot = |role| {
            let stored = record.as_ref()?.role(role)?.clone();
            Some(match slots.iter().position(|slot| slot.record.number == stored.number) {
                // Readers follow its checkpoint.
                Some(at) => Slot { record: stored, ..slots.remove(at) },
                None => Slot::new(stored),
            })
        };
        (self.live, self.building) = (slot(Role::Live), slot(Role::Building));
        self.former = record.iter().flat_map(|record| record.former()).cloned().collect();
    }

    async fn perform(&mut self, action: Action) -> Result<(), Error> {
        match action {
            Action::CreateLive(id) => {
                let module = self.module(&id).await?;
                self.claim(&module.manifest)?;
                self.live = Some(self.create(Role::Live, &id.hash, &module).await?);
            }
            Action::StartLive(id) => {
                self.follow(Role::Live, &id).await?;
                tracing::info!(projection = self.name, module = short(&id.hash), "following the log");
            }
            Action::StopLive => {
                self.live.as_mut().expect("it runs").stop().await;
                fault::point("swap.stopped", &self.name);
            }
            Action::KeepModule(id) => {
                let manifest = self.module(&id).await?.manifest;
                let live = self.live.as_mut().expect("it runs");
                live.record.module = id.hash;
                live.record.manifest = manifest;
                fault::point("swap.proved", &self.name);
                let mut patience = Patience::default();
                while let Err(error) = self.shared.catalogue.set_module(&live.record).await {
                    if let Err(error) = patience.wait(error).await {
                        // After a restart it has to prove itself once more, and that is all.
                        tracing::warn!(projection = self.name, %error, "cannot note the new module");
                        break;
                    }
                }
                fault::point("swap.done", &self.name);
            }
            Action::CreateBuilding(id) => {
                let module = self.module(&id).await?;
                self.claim(&module.manifest)?;
                let building = self.create(Role::Building, &id.hash, &module).await?;
                tracing::info!(projection = self.name, generation = building.record.number, "rebuilding in the shadow");
                self.building = Some(building);
            }
            Action::StartBuilding(id) => {
                if self.building.is_none() {
                    // It could not be entered before.
                    let module = self.module(&id).await?;
                    self.claim(&module.manifest)?;
                    self.building = Some(self.create(Role::Building, &id.hash, &module).await?);
                }
                self.follow(Role::Building, &id).await?;
            }
            Action::Revive => {
                if self.building.is_none() {
                    let mut record = self.former.last().expect("asked for only if there is one").clone();
                    self.claim(&record.manifest)?;
                    self.shared.catalogue.set_role(&record, Role::Building).await?;
                    self.former.pop();
                    record.role = Role::Building;
                    self.building = Some(Slot::new(record));
                }
            }
            Action::Shelve => {
                if let Some(building) = &mut self.building {
                    building.stop().await;
                    self.shared.catalogue.set_role(&building.record, Role::Former).await?;
                    building.record.role = Role::Former;
                    self.former.extend(self.building.take().map(|slot| slot.record));
                    if *self.shared.log.epoch().borrow() > 0 {
                        self.remove_forgotten().await;
                    }
                }
            }
            Action::Hold(module) => self.shared.catalogue.set_held(&self.name, module.as_deref()).await?,
            Action::StopBuilding => {
                if let Some(building) = &mut self.building {
                    building.stop().await;
                }
            }
            Action::DropBuilding => {
                if let Some(mut building) = self.building.take() {
                    building.stop().await;
                    self.remove(building.record.number).await;
                }
            }
            Action::Finish => {
                let live = self.live.as_ref().expect("it has stopped");
                // Its last commit may have happened although its worker heard of an error; readers have seen it then.
                let stored = view::mark(&live.record.file).ok().flatten().map(|mark| mark.position);
                let target = live.reached.now().max(stored);
                let building = self.building.as_ref().and_then(|b| b.worker.as_ref()).expect("it runs");
                building.tell(Command::Finish(target));
            }
            Action::Promote => self.promote().await?,
            Action::Refuse(hash, reason) => {
                let hash = short(&hash).to_owned();
                tracing::warn!(projection = self.name, module = hash, reason, "refused; the former module goes on");
                self.refused = Some(format!("module {hash} is refused: {reason}; the former module goes on"));
            }
        }
        Ok(())
    }

    /// Readers see the old generation until the catalogue has committed, and the new one from then on.
    async fn promote(&mut self) -> Result<(), Error> {
        let number = self.building.as_ref().expect("it has passed").record.number;
        let mut patience = Patience::default();
        loop {
            match self.shared.catalogue.promote(&self.name, number).await {
                Ok(now) => {
                    let mut promoted = self.building.take().expect("as above");
                    (promoted.record.role, promoted.record.promoted) = (Role::Live, Some(now));
                    let former = self.live.replace(promoted).expect("there was a live one");
                    self.former.push(GenerationRecord { role: Role::Former, ..former.record });
                    break;
                }
                Err(error) => {
                    let Err(error) = patience.wait(error).await else { continue };
                    self.reload().await;
                    if self.live.as_ref().is_none_or(|live| live.record.number != number) {
                        return Err(error.into());
                    }
                    // It has happened all the same.
                    break;
                }
            }
        }
        self.publish();
        fault::point("promote.shown", &self.name);
        let live = self.live.as_ref().expect("just put there");
        live.worker.as_ref().expect("it has passed").tell(Command::Lead);
        tracing::info!(projection = self.name, generation = number, "promoted");
        self.refused = None;
        if *self.shared.log.epoch().borrow() > 0 {
            self.remove_forgotten().await;
        }
        while self.former.len() > self.shared.config.keep_generations && self.remove(self.former[0].number).await {
            self.former.remove(0);
        }
        Ok(())
    }

    /// Removes a generation that nobody needs. What is left of it after an error costs only space; answers whether there
    /// was none.
    async fn remove(&self, number: u64) -> bool {
        let removed = self.shared.catalogue.remove(&self.name, number).await;
        if let Err(error) = &removed {
            tracing::warn!(projection = self.name, generation = number, %error, "cannot remove a generation");
        }
        removed.is_ok()
    }

    async fn create(&self, role: Role, module: &str, of: &Module) -> Result<Slot, Error> {
        let mut patience = Patience::default();
        loop {
            match self.shared.catalogue.create(role, module, &of.manifest).await {
                Ok(record) => return Ok(Slot::new(record)),
                Err(error) => patience.wait(error).await?,
            }
        }
    }

    /// Starts a worker for a generation.
    async fn follow(&mut self, role: Role, id: &ModuleId) -> Result<(), Error> {
        let module = self.module(id).await?;
        let before = |live: &Slot| Before { file: live.record.file.clone(), reached: live.reached.clone() };
        let live =
            (role == Role::Building).then(|| before(self.live.as_ref().expect("one is live before one is built")));
        self.workers += 1;
        let slot = if role == Role::Live { &mut self.live } else { &mut self.building };
        let slot = slot.as_mut().expect("it was created");
        slot.fault = None;
        if slot.former {
            return Ok(());
        }
        slot.worker = Some(Worker::start(Job {
            module,
            file: slot.record.file.clone(),
            live,
            log: self.shared.log.clone(),
            limits: self.shared.config.batch,
            progress: slot.progress.clone(),
            reached: slot.reached.clone(),
            notices: self.notices.clone(),
            id: self.workers,
            proving: role == Role::Live && matches!(self.state.live, Live::Proving { .. }),
            policy: self.policy.subscribe(),
            max_dead_letters: self.shared.config.failures.max_dead_letters,
        }));
        Ok(())
    }

    async fn module(&mut self, id: &ModuleId) -> Result<Module, Error> {
        if !self.modules.contains_key(&id.hash) {
            let module = self.stored(&id.hash).await?;
            self.modules.insert(id.hash.clone(), module);
        }
        Ok(self.modules[&id.hash].clone())
    }

    /// A module that is not in the folder any more, from where it was stored when it was admitted.
    async fn stored(&self, hash: &str) -> Result<Module, Error> {
        let path = self.shared.modules.join(format!("{hash}.wasm"));
        let engine = self.shared.engine.clone();
        let admit = move || plugin::read(&path).and_then(|bytes| engine.admit(&bytes));
        let module = tokio::task::spawn_blocking(admit).await.map_err(|e| Error::Host(e.to_string()))??;
        if module.hash != hash {
            let short = short(hash);
            return Err(Error::Host(format!(
                "the stored module {short} is damaged; drop its file into the folder again"
            )));
        }
        Ok(module)
    }

    async fn stop_all(&mut self) {
        // Both at once: each may have a batch to finish.
        let (live, building) = (self.live.as_mut(), self.building.as_mut());
        let stop = async |slot: Option<&mut Slot>| {
            if let Some(slot) = slot {
                slot.stop().await;
            }
        };
        tokio::join!(stop(live), stop(building));
    }

    /// Takes the views of a generation that is to be built, before anybody sees them.
    fn claim(&self, manifest: &Manifest) -> Result<(), Error> {
        let mut claims = self.shared.claims.lock().expect("no panics while it is held");
        let other = |view: &ViewSchema| claims.get(&view.name).filter(|owner| **owner != self.name).cloned();
        if let Some((view, owner)) = manifest.views.iter().find_map(|view| Some((view.name.clone(), other(view)?))) {
            return Err(Error::Taken { view, owner });
        }
        claims.extend(manifest.views.iter().map(|view| (view.name.clone(), self.name.clone())));
        Ok(())
    }

    /// Keeps the views of the live generation and of the one that is being built, as far as they are free, and no others.
    fn keep_claims(&self) {
        let mut claims = self.shared.claims.lock().expect("no panics while it is held");
        let before = claims.len();
        let slots = [&self.live, &self.building].into_iter().flatten();
        let mine: Vec<_> = slots.flat_map(|slot| &slot.record.manifest.views).map(|view| &view.name).collect();
        claims.retain(|view, owner| *owner != self.name || mine.contains(&view));
        if claims.len() < before {
            self.shared.released.notify_one();
        }
        for view in mine {
            claims.entry(view.clone()).or_insert_with(|| self.name.clone());
        }
    }

    /// Shows the present state to readers and in the status.
    fn publish(&mut self) {
        let snapshot = Snapshot {
            file: self.file.clone(),
            state: self.state.clone(),
            live: self.live.as_ref().map(Slot::snapshot),
            building: self.building.as_ref().map(Slot::snapshot),
            refused: self.refused.clone(),
        };
        let poisoned = "no panics while it is held";
        self.shared.snapshots.write().expect(poisoned).insert(self.name.clone(), snapshot);
        self.keep_claims();
        let Some(live) = &self.live else { return };
        let mut views = self.shared.views.write().expect(poisoned);
        let number = live.record.number;
        let mine = |v: &LiveView| v.projection == self.name;
        if views.values().any(|v| mine(v) && v.generation == number) {
            return;
        }
        let views = Arc::make_mut(&mut views);
        views.retain(|_, view| !mine(view));
        let claims = self.shared.claims.lock().expect(poisoned);
        let claimed = |view: &&ViewSchema| claims.get(&view.name) == Some(&self.name);
        for schema in live.record.manifest.views.iter().filter(claimed) {
            views.insert(
                schema.name.clone(),
                LiveView {
                    schema: Arc::new(schema.clone()),
                    projection: self.name.clone(),
                    generation: number,
                    file: live.record.file.clone(),
                    reached: live.reached.clone(),
                },
            );
        }
    }
}

/// What the catalogue or the disk refuses is done again as long as a worker would do it: a disk that is full for a moment
/// must not stop a projection for good. Only for what may be done again after an error of unknown outcome.
#[derive(Default)]
struct Patience {
    retries: u32,
}

impl Patience {
    /// Waits for the next try; gives the error back if there is none left.
    async fn wait(&mut self, error: view::Error) -> Result<(), view::Error> {
        if self.retries == limits::RETRIES {
            return Err(error);
        }
        let wait = limits::RETRY_FIRST * 2_u32.pow(self.retries);
        tracing::warn!(%error, ?wait, "trying again");
        self.retries += 1;
        tokio::time::sleep(wait).await;
        Ok(())
    }
}
