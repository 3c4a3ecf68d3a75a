//! What there is to know of a running Shadowbox, as it is told.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::config::Policy;
use crate::log::{Behind, Head};
use crate::model::{FailureReport, Position, Time};
use crate::projection::lifecycle::{Building, Live};
use crate::projection::{Activity, Snapshot, SnapshotGeneration, Stalls};
use crate::view::{LetterCounts, Origin};

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

/// How long a measured rate is worth showing.
const RATE_FRESH: Duration = Duration::from_secs(5);

/// What the status of generations is made from besides themselves.
pub(super) struct Look<'a> {
    pub(super) head: Head,
    /// Why the log cannot be read.
    pub(super) log: Option<String>,
    pub(super) stalls: &'a Stalls,
    pub(super) stall_after: Duration,
}

impl Look<'_> {
    /// What a generation waits for, if it is stalled.
    fn stalled(&self, name: &str, generation: &SnapshotGeneration, follows: bool) -> Option<String> {
        let key = (name, generation.record.number);
        let quiet = self.stalls.quiet(key, generation.reached.checkpoint(), Instant::now());
        (follows && quiet >= self.stall_after).then(|| waits_for(generation, self.log.as_deref(), quiet))
    }
}

/// The generations of a projection, and whether somebody is to follow the log for them.
pub(super) fn generations(snapshot: &Snapshot) -> impl Iterator<Item = (&SnapshotGeneration, bool)> {
    let live = matches!(snapshot.state.live, Live::Running(_) | Live::Proving { .. } | Live::Waiting(_));
    let building = snapshot.state.building.is_followed();
    snapshot
        .live
        .iter()
        .map(move |g| (g, live && !g.former))
        .chain(snapshot.building.iter().map(move |g| (g, building)))
}

/// What a generation waits for that does not move.
pub(super) fn waits_for(generation: &SnapshotGeneration, log: Option<&str>, quiet: Duration) -> String {
    let progress = generation.progress.borrow();
    let why = match (&progress.activity, &progress.task, log) {
        (_, _, Some(trouble)) => trouble.to_owned(),
        (Activity::Retrying(error), _, _) => format!("{error}; retrying"),
        (_, Some((task, since)), _) => format!("{task} has taken {:.1} s so far", since.elapsed().as_secs_f64()),
        (_, None, _) => "it has not begun".to_owned(),
    };
    format!("no progress for {:.1} s: {why}", quiet.as_secs_f64())
}

pub(super) fn projection(
    policy: Policy,
    name: String,
    snapshot: &Snapshot,
    look: &Look<'_>,
) -> Option<ProjectionStatus> {
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
    let mut live_status = generation(live, look.head, error);
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
    let building = building.map(|b| generation(b, look.head, build_error));
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

fn generation(generation: &SnapshotGeneration, head: Head, fault: Option<String>) -> GenerationStatus {
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
