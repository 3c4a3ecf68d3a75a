//! `plan`: what would dropping this module do?

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use super::schema::{Change, changes};
use super::{
    Cost, Error, Progress, Tell, blocking, catalogue, complete, engine, module_of, process_memory, rows, snapshot,
};
use crate::config::{Config, limits};
use crate::log::EventLog;
use crate::manifest::ViewSchema;
use crate::model::Position;
use crate::plugin::{self, Engine, Module};
use crate::projection::lifecycle::{self, Input, ModuleId, State};
use crate::projection::{self, Fold, Shadow, at_rest, check_file, module_id};
use crate::supervisor::{Known, would_refuse};
use crate::view::compare::{Comparison, Side, Snapshot, compare};
use crate::view::{self, GenerationRecord, ProjectionRecord, Role, Scratch};

/// What is to be planned.
#[derive(Clone, Debug)]
pub struct Request {
    /// The module.
    pub file: PathBuf,
    /// Only the last so many events of the log, by the live module and by this one, both from empty views.
    pub last: Option<u64>,
}

/// What the runtime would do with a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// A projection that there is not yet.
    New,
    /// It goes on from the live generation's rows.
    HotSwap,
    /// A new generation from offset zero.
    Rebuild,
    /// It is what runs, or what a person has rolled back from.
    Nothing,
    /// It is not taken.
    Refused,
}

/// The generation that is live now.
#[derive(Clone, Debug, Serialize)]
pub struct Live {
    /// Its number.
    pub generation: u64,
    /// The hash of the module that made its last commit.
    pub module: String,
    /// The projection's version in that module.
    pub version: u32,
    /// Its checkpoint; None before the first event.
    pub position: Option<Position>,
}

/// What came of it.
#[derive(Debug, Serialize)]
pub struct Planned {
    /// The file that it would be in the plugin folder.
    pub file: String,
    /// The module's hash; None if it cannot be read as one.
    pub module: Option<String>,
    /// The projection; None likewise.
    pub projection: Option<String>,
    /// What would be done.
    pub action: Action,
    /// Why.
    pub reasons: Vec<String>,
    /// What it would follow; None if the projection is new.
    pub live: Option<Live>,
    /// What differs in what the modules declare.
    pub schema: Vec<Change>,
    /// What running it in the shadow came to; None where there is nothing to run.
    pub run: Option<Run>,
}

/// What a run in the shadow came to.
#[derive(Debug, Serialize)]
pub struct Run {
    /// How many events of the log the module wants.
    pub wanted: u64,
    /// How many events the log has.
    pub log: u64,
    /// It ran over the last so many events only, wanted or not; None for all.
    pub last: Option<u64>,
    /// Up to here: as far as the live generation, or to the head of the log; None for no events at all.
    pub until: Option<Position>,
    /// Before this position events come without their content, since their source keeps it no longer. If the live rows
    /// were made from more, a person has to say that the new ones take their place.
    pub complete_from: Option<Position>,
    /// What it took.
    #[serde(flatten)]
    pub cost: Cost,
    /// The event that a module could not apply; no rows are compared then.
    pub failed: Option<Failed>,
    /// View by view, as far as one of the modules has it.
    pub views: Vec<View>,
}

/// An event that a module could not apply.
#[derive(Debug, Serialize)]
pub struct Failed {
    /// True for the live module, which was run over the last events, too.
    pub by_live: bool,
    /// Which event, and how it failed.
    pub error: String,
}

/// What would become of the rows of one view.
#[derive(Debug, Serialize)]
pub struct View {
    /// Its name.
    pub view: String,
    /// Counts and samples.
    #[serde(flatten)]
    pub found: Comparison,
}

/// Says what dropping a module would do, by the functions that the runtime decides with, and runs it over the log in the
/// shadow. Nothing is promoted or kept.
///
/// # Errors
///
/// If it cannot be told. That the module would be refused, or fails at an event, is no error.
pub async fn plan(config: &Config, request: Request, mut tell: Tell) -> Result<Planned, Error> {
    let records = catalogue(config).await?;
    let (shared, file) = (config.clone(), request.file.clone());
    let (mut planned, module) = blocking(move || decide(&shared, &file, &records)).await?;
    let Some((module, engine)) = module.filter(|_| !matches!(planned.action, Action::Nothing | Action::Refused)) else {
        return Ok(planned);
    };
    let data = config.data.clone();
    let scratch = blocking(move || Ok(Scratch::new(&data)?)).await?;
    let live = match &planned.live {
        Some(_) => Some(snapshot(config, &module.manifest.projection, &scratch).await?),
        None => None,
    };
    let config = config.clone();
    blocking(move || {
        let log = EventLog::open(&config.data)?;
        let trial = Trial { config: &config, engine, log, module, live, last: request.last, scratch };
        let (run, live) = trial.run(&mut tell)?;
        (planned.run, planned.live) = (Some(run), live);
        Ok(planned)
    })
    .await
}

/// A module and the sandbox that it was admitted in.
type Admitted = (Module, Engine);

/// What would be done, and the module if it is one.
fn decide(config: &Config, path: &Path, records: &[ProjectionRecord]) -> Result<(Planned, Option<Admitted>), Error> {
    let file = path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned());
    let mut planned = Planned {
        file: file.clone(),
        module: None,
        projection: None,
        action: Action::Refused,
        reasons: Vec::new(),
        live: None,
        schema: Vec::new(),
        run: None,
    };
    let engine = engine(config)?;
    let bytes = plugin::read(path)?;
    let module = match engine.admit(&bytes) {
        Ok(module) => module,
        Err(error) => {
            planned.reasons.push(error.to_string());
            return Ok((planned, None));
        }
    };
    let name = &module.manifest.projection;
    (planned.module, planned.projection) = (Some(module.hash.clone()), Some(name.clone()));
    let owner = |view: &str| {
        let live = records.iter().filter_map(|p| p.role(Role::Live));
        live.into_iter().find(|g| g.manifest.views.iter().any(|v| v.name == view)).map(|g| g.projection.clone())
    };
    let live = |name: &str| records.iter().find(|p| p.name == name).and_then(|p| p.role(Role::Live));
    let ran = |name: &str| Some(live(name)?.module.clone());
    let (place, refused) =
        would_refuse(&module, &file, &plugin::look(&config.plugins, &engine), Known { owner: &owner, ran: &ran });
    if place != file {
        planned.reasons.push(format!(
            "it takes the place of {place:?} in the plugin folder; as {file:?} beside it, it would be refused"
        ));
        planned.file = place;
    }
    if let Some(reason) = refused {
        planned.reasons = vec![reason];
        return Ok((planned, Some((module, engine))));
    }
    let record = records.iter().find(|p| p.name == *name);
    let live = record.and_then(|p| p.role(Role::Live));
    planned.schema = live.map_or_else(Vec::new, |live| changes(&live.manifest, &module.manifest));
    planned.live = live.map(|live| Live {
        generation: live.number,
        module: live.module.clone(),
        version: live.manifest.version,
        // A file that cannot be read is told by whoever copies it.
        position: view::mark(&live.file).ok().flatten().map(|mark| mark.position),
    });
    let (action, why) = classify(at_rest(record), &module_id(&module.hash, &module.manifest));
    planned.action = action;
    planned.reasons.splice(0..0, why);
    if action == Action::Rebuild {
        planned.reasons.extend(planned.schema.iter().map(Change::to_string));
    }
    Ok((planned, Some((module, engine))))
}

/// Asks the lifecycle what it would do.
fn classify(mut state: State, module: &ModuleId) -> (Action, Vec<String>) {
    let before = state.clone();
    let actions = state.next(Input::Wanted(Some(module.clone())));
    let mut why = Vec::new();
    let given_up = |a: &lifecycle::Action| matches!(a, lifecycle::Action::DropBuilding | lifecycle::Action::Shelve);
    if actions.iter().any(given_up) {
        let what = if before.back { "rollback" } else { "rebuild" };
        why.push(format!("the {what} that is under way would be given up"));
    }
    let builds = state.building.module() == Some(module) && !state.back;
    let action = match before.live.module() {
        None => Action::New,
        Some(_) if before.held.as_ref() == Some(&module.hash) => {
            why.push("a person has rolled back from this module; it is taken up again after another one only".into());
            Action::Nothing
        }
        Some(live) if live == module && builds => Action::Rebuild,
        Some(live) if live == module => {
            why.push("this module runs already".into());
            Action::Nothing
        }
        Some(_) if builds => Action::Rebuild,
        Some(_) => {
            why.push(
                "version, columns and subscriptions are the same: it goes on from the rows that are there, and leaves \
                 them as the former module made them until an event touches them"
                    .into(),
            );
            Action::HotSwap
        }
    };
    (action, why)
}

/// A module to be tried.
struct Trial<'a> {
    config: &'a Config,
    engine: Engine,
    log: EventLog,
    module: Module,
    live: Option<(GenerationRecord, Snapshot)>,
    last: Option<u64>,
    scratch: Scratch,
}

impl Trial<'_> {
    fn run(self, tell: &mut Tell) -> Result<(Run, Option<Live>), Error> {
        let none = HashSet::new();
        if let Some((_, snapshot)) = &self.live {
            check_file(&self.log, &snapshot.file)?;
        }
        let live_module = self.live.as_ref().map(|(r, s)| module_of(self.config, &self.engine, r, s)).transpose()?;
        let head = self.log.head_now();
        let until = match (&self.live, &live_module) {
            (Some((_, snapshot)), Some(live)) => complete(&self.log, &live.manifest, snapshot.checkpoint(), None)?,
            _ => head.last(),
        };
        let fold = |module| Fold {
            module,
            log: &self.log,
            limits: self.config.batch,
            // Positions are dense: behind this one there are just so many.
            after: self.last.and_then(|last| until?.0.checked_sub(last)).map(Position),
            until,
            without: self.live.as_ref().map_or(&none, |(_, snapshot)| &snapshot.dead_letters),
        };
        let (cost, failed) = follow(&fold(&self.module), self.scratch.file("new.sqlite"), "running", tell)?;
        let wanted = self.log.count(&self.module.manifest, 0, head.next)?;
        let complete_from = self.log.effect(&self.module.manifest, 0, None)?.complete_from;
        let (log, last) = (head.next, self.last);
        let mut run = Run { wanted, log, last, until, complete_from, cost, failed: None, views: Vec::new() };
        run.failed = failed.map(|error| Failed { by_live: false, error });
        let mut live_file = self.live.as_ref().map(|(_, snapshot)| snapshot.file.clone());
        if let (None, Some(_), Some(module)) = (&run.failed, self.last, &live_module) {
            let file = self.scratch.file("former.sqlite");
            let (_, failed) = follow(&fold(module), file.clone(), "running the live module", tell)?;
            run.failed = failed.map(|error| Failed { by_live: true, error });
            live_file = Some(file);
        }
        if run.failed.is_none() {
            run.views = self.compare(live_file.as_deref(), tell)?;
        }
        let live = self.live.map(|(record, snapshot)| Live {
            generation: record.number,
            module: live_module.map_or(record.module, |module| module.hash),
            version: record.manifest.version,
            position: snapshot.checkpoint(),
        });
        Ok((run, live))
    }

    fn compare(&self, live: Option<&Path>, tell: &mut Tell) -> Result<Vec<View>, Error> {
        let former: &[ViewSchema] = self.live.as_ref().map_or(&[], |(record, _)| &record.manifest.views);
        let ours = &self.module.manifest.views;
        let shadow = self.scratch.file("new.sqlite");
        let removed = former.iter().filter(|view| !ours.iter().any(|v| v.name == view.name));
        let mut views = Vec::new();
        for name in ours.iter().chain(removed).map(|view| &view.name) {
            let before = live.zip(former.iter().find(|v| v.name == *name)).map(|(file, schema)| Side { file, schema });
            let after = ours.iter().find(|v| v.name == *name).map(|schema| Side { file: &shadow, schema });
            let found = compare(before, after, limits::PROOF_SAMPLES, &mut rows(tell, "comparing"))?;
            views.push(View { view: name.clone(), found: found.ok_or(Error::Interrupted)? });
        }
        Ok(views)
    }
}

/// Runs a fold to its end, or to an event that fails.
fn follow(
    fold: &Fold<'_>,
    file: PathBuf,
    doing: &'static str,
    tell: &mut Tell,
) -> Result<(Cost, Option<String>), Error> {
    let begin = Instant::now();
    let mut shadow = Shadow::begin(fold, file)?;
    let failed = loop {
        match shadow.step(fold.limits.events, |_| {}) {
            Ok(true) => {}
            Ok(false) => break None,
            Err(error @ projection::Error::Event { .. }) => break Some(error.to_string()),
            Err(error) => return Err(error.into()),
        }
        let (done, of) = shadow.progress();
        if !tell(Progress { doing, done, of }) {
            return Err(Error::Interrupted);
        }
    };
    let cost = Cost {
        events: shadow.events(),
        seconds: begin.elapsed().as_secs_f64(),
        sandbox_memory: shadow.memory(),
        process_memory: process_memory(),
    };
    Ok((cost, failed))
}
