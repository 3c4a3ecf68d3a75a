//! `verify`: is the live generation the fold of the log?

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{
    Cost, Error, Progress, Tell, blocking, complete, engine, live, module_of, process_memory, rows, snapshot, stored,
};
use crate::config::{BatchLimits, Config, limits};
use crate::log::EventLog;
use crate::model::{EventName, Position};
use crate::projection::{self, Applied, Fold, Shadow, check_file, origin_now};
use crate::supervisor;
use crate::view::compare::{Comparison, Difference, Side, Snapshot, compare};
use crate::view::{self, GenerationRecord, Origin, Scratch};

/// What is to be proved.
#[derive(Clone, Debug)]
pub struct Request {
    /// The projection.
    pub projection: String,
    /// Wait until the live generation is complete to this position.
    pub at: Option<Position>,
    /// Where batches end and instances are dropped follows from it.
    pub seed: u64,
}

/// What came of it.
#[derive(Debug, Serialize)]
pub struct Verified {
    /// The projection.
    pub projection: String,
    /// Its live generation.
    pub generation: u64,
    /// The hash of the module that made its last commit.
    pub module: String,
    /// The modules that made the rows, one after the other, as they were swapped.
    pub modules: Vec<Made>,
    /// To where its rows were complete, and the replayed ones are; None before the first event.
    pub position: Option<Position>,
    /// Before this position events have come without their content, since their source keeps it no longer.
    pub complete_from: Option<Position>,
    /// The same seed gives the same batches.
    pub seed: u64,
    /// In how many batches the events were replayed.
    pub batches: u64,
    /// How many instances were dropped on the way.
    pub dropped: u64,
    /// Events that were left out, as they are dead letters.
    pub dead_letters: usize,
    /// What the replay took.
    #[serde(flatten)]
    pub cost: Cost,
    /// True if all rows are the same.
    pub equal: bool,
    /// Why the replay could not apply an event that the live generation has passed.
    pub failed: Option<String>,
    /// View by view; empty if the replay failed.
    pub views: Vec<View>,
}

/// A module that has made a part of the rows.
#[derive(Debug, Serialize)]
pub struct Made {
    /// Its hash.
    pub module: String,
    /// It began after this position; None for the beginning.
    pub after: Option<Position>,
}

/// What was compared of one view.
#[derive(Debug, Serialize)]
pub struct View {
    /// Its name.
    pub view: String,
    /// Counts and digests; the shadow's rows are the replayed ones.
    #[serde(flatten)]
    pub found: Comparison,
    /// The first rows that differ.
    pub rows: Vec<Differing>,
}

/// A row that differs, and which events changed it.
#[derive(Debug, Serialize)]
pub struct Differing {
    /// In what.
    #[serde(flatten)]
    pub difference: Difference,
    /// How many events changed it when they were replayed one by one.
    pub changes: u64,
    /// The last of them, in their order.
    pub events: Vec<EventName>,
}

/// How often a live generation that is waited for is looked at.
const POLL: Duration = Duration::from_millis(50);

/// Proves, or disproves, that the rows of a projection's live generation are the fold of the log by its module, in
/// whatever batches and instances. The live generation goes on meanwhile.
///
/// # Errors
///
/// If it cannot be told. That it is not so is no error.
pub async fn verify(config: &Config, request: Request, mut tell: Tell) -> Result<Verified, Error> {
    if let Some(at) = request.at {
        wait(config, &request.projection, at, &mut tell).await?;
    }
    let scratch = {
        let data = config.data.clone();
        blocking(move || Ok(Scratch::new(&data)?)).await?
    };
    let (record, live) = snapshot(config, &request.projection, &scratch).await?;
    let config = config.clone();
    let (at, seed) = (request.at, request.seed);
    blocking(move || Replay { config: &config, record, live, scratch, at, seed }.run(&mut tell)).await
}

/// Returns when the live generation is complete to a position; without a runtime it may never be.
async fn wait(config: &Config, name: &str, at: Position, tell: &mut Tell) -> Result<(), Error> {
    let begin = Instant::now();
    let mut record = live(config, name).await?;
    let data = config.data.clone();
    let log = blocking(move || Ok(EventLog::open(&data)?)).await?;
    // From now on the log looks for what others append.
    drop(log.head());
    loop {
        // One that cannot be read is told by whoever copies it.
        let Ok(mark) = view::mark(&record.file) else { return Ok(()) };
        let checkpoint = mark.map(|mark| mark.position);
        let (log, manifest) = (log.clone(), record.manifest.clone());
        let here = blocking(move || complete(&log, &manifest, checkpoint, Some(at))).await?;
        if here >= Some(at) {
            return Ok(());
        }
        let waited = match supervisor::running(&config.data) {
            None => "; no runtime is running, start one with shadowbox run".to_owned(),
            Some(_) if begin.elapsed() < config.http.max_wait => {
                if !tell(Progress { doing: "waiting for the position", done: 0, of: 0 }) {
                    return Err(Error::Interrupted);
                }
                tokio::time::sleep(POLL).await;
                record = live(config, name).await?;
                continue;
            }
            Some(_) => {
                format!(", after {} s (http.max_wait_ms); see shadowbox status", config.http.max_wait.as_secs())
            }
        };
        let here = here.map_or_else(|| "the beginning".to_owned(), |here| here.to_string());
        return Err(Error::NotYet { name: name.to_owned(), generation: record.number, here, at, waited });
    }
}

struct Replay<'a> {
    config: &'a Config,
    record: GenerationRecord,
    live: Snapshot,
    scratch: Scratch,
    at: Option<Position>,
    seed: u64,
}

impl Replay<'_> {
    fn run(self, tell: &mut Tell) -> Result<Verified, Error> {
        let log = EventLog::open(&self.config.data)?;
        check_file(&log, &self.live.file)?;
        let origin = self.check_origin(&log)?;
        let engine = engine(self.config)?;
        let until = self.live.checkpoint();
        let mut modules = Vec::new();
        for (after, hash) in &origin.modules {
            modules.push((*after, stored(self.config, &engine, hash)?));
        }
        if modules.is_empty() {
            modules.push((None, module_of(self.config, &engine, &self.record, &self.live)?));
        }
        let ends = modules.iter().skip(1).map(|(after, _)| *after).chain([until]);
        let folds: Vec<_> = (modules.iter().zip(ends))
            .map(|((after, module), until)| Fold {
                module,
                log: &log,
                limits: self.config.batch,
                after: *after,
                until,
                without: &self.live.dead_letters,
            })
            .collect();
        let module = &modules.last().expect("at least one").1;
        let mut verified = Verified {
            projection: self.record.projection.clone(),
            generation: self.record.number,
            module: module.hash.clone(),
            modules: modules.iter().map(|(after, m)| Made { module: m.hash.clone(), after: *after }).collect(),
            position: complete(&log, &module.manifest, until, self.at)?,
            complete_from: origin.complete_from,
            seed: self.seed,
            batches: 0,
            dropped: 0,
            dead_letters: self.live.dead_letters.len(),
            cost: Cost { events: 0, seconds: 0.0, sandbox_memory: 0, process_memory: None },
            equal: false,
            failed: None,
            views: Vec::new(),
        };
        match self.shake(&folds, &mut verified, tell) {
            // What was passed once must pass always.
            Err(Error::Projection(error @ projection::Error::Event { .. })) => {
                verified.failed = Some(error.to_string());
                return Ok(verified);
            }
            done => done?,
        }
        if self.check_origin(&log)?.epoch != origin.epoch {
            return Err(Error::UnderWay);
        }
        for schema in &self.record.manifest.views {
            let shadow = self.scratch.file("replay.sqlite");
            let (live, shadow) = (Side { file: &self.live.file, schema }, Side { file: &shadow, schema });
            let mut go_on = rows(tell, "comparing");
            let found = compare(Some(live), Some(shadow), limits::PROOF_SAMPLES, &mut go_on)?;
            drop(go_on);
            let mut found = found.ok_or(Error::Interrupted)?;
            let rows = std::mem::take(&mut found.samples).into_iter();
            let rows = rows.map(|difference| Differing { difference, changes: 0, events: Vec::new() });
            verified.views.push(View { view: schema.name.clone(), rows: rows.collect(), found });
        }
        verified.equal = verified.views.iter().all(|view| view.found.is_equal());
        if !verified.equal {
            self.trace(&folds, &mut verified.views, tell)?;
        }
        Ok(verified)
    }

    /// Refuses rows of which nobody can tell whether they are the fold of the log as it is now.
    fn check_origin(&self, log: &EventLog) -> Result<Origin, Error> {
        let (name, generation) = (self.record.projection.clone(), self.record.number);
        let (manifest, mark) = (&self.record.manifest, self.live.mark.as_ref());
        let origin = origin_now(log, manifest, mark, self.live.origin.as_ref())?;
        if !origin.epoch.is_multiple_of(2) {
            return Err(Error::UnderWay);
        }
        if let Some(number) = origin.forgotten {
            return Err(Error::Forgotten { name, generation, number });
        }
        if let Some(&(first, last)) = origin.damaged.first() {
            return Err(Error::Damaged { name, generation, first, last });
        }
        // Whatever was read of what has gone since, was read with its content, or nobody knows.
        if let Some(before) = log.effect(manifest, origin.began, None)?.complete_from {
            return Err(Error::NotKept { name, generation, before });
        }
        Ok(origin)
    }

    /// Replays in batches of random size, with instances dropped at random.
    fn shake(&self, folds: &[Fold<'_>], verified: &mut Verified, tell: &mut Tell) -> Result<(), Error> {
        let begin = Instant::now();
        let mut dice = Dice(self.seed);
        let mut memory = 0;
        let mut result = Ok(());
        for (number, fold) in folds.iter().enumerate() {
            let usual = fold.limits;
            let limits = BatchLimits { commit_rows: dice.up_to(usual.commit_rows as u64) as usize, ..usual };
            let mut shadow = shadow(number, &Fold { limits, ..fold.clone() }, self.scratch.file("replay.sqlite"))?;
            result = self.shake_one(&mut shadow, fold, &mut dice, verified, tell);
            verified.cost.events += shadow.events();
            memory = memory.max(shadow.memory());
            if result.is_err() {
                break;
            }
        }
        verified.cost = Cost {
            events: verified.cost.events,
            seconds: begin.elapsed().as_secs_f64(),
            sandbox_memory: memory,
            process_memory: process_memory(),
        };
        result
    }

    fn shake_one(
        &self,
        shadow: &mut Shadow,
        fold: &Fold<'_>,
        dice: &mut Dice,
        verified: &mut Verified,
        tell: &mut Tell,
    ) -> Result<(), Error> {
        let end = |p: Option<Position>| p.map_or(0, |p| p.0 + 1);
        let wanted = fold.log.count(&fold.module.manifest, end(fold.after), end(fold.until))?;
        // Also where little is wanted there are to be some batches.
        let largest = (wanted / 16).clamp(1, fold.limits.events as u64);
        // As many batches of one event as of a thousand.
        let next_size = |dice: &mut Dice| {
            let magnitude = dice.up_to(u64::from(largest.ilog2()) + 1);
            dice.up_to(largest.min(1 << magnitude)) as usize
        };
        let mut size = next_size(dice);
        loop {
            let before = shadow.events();
            let more = shadow.step(size, |_| {})?;
            // How often events are only passed over depends on how the log is packed; what follows from the seed does not.
            if shadow.events() > before {
                verified.batches += 1;
                // The first one always: there may not be many.
                if more && (verified.batches == 1 || dice.up_to(4) == 1) {
                    shadow.forget();
                    verified.dropped += 1;
                }
                size = next_size(dice);
            }
            if !more {
                return Ok(());
            }
            let (done, of) = shadow.progress();
            if !tell(Progress { doing: "replaying", done, of }) {
                return Err(Error::Interrupted);
            }
        }
    }

    /// Replays once more, event by event, and notes which of them change the rows in question.
    fn trace(&self, folds: &[Fold<'_>], views: &mut [View], tell: &mut Tell) -> Result<(), Error> {
        let mut traced: Vec<Traced<'_>> = Vec::new();
        for (view, found) in views.iter_mut().enumerate() {
            let rows = found.rows.iter_mut().filter(|row| row.difference.encoded.is_some());
            traced.extend(rows.map(|row| Traced { view: view as u32, row, last: None, events: VecDeque::new() }));
        }
        'folds: for (number, fold) in folds.iter().enumerate() {
            let mut shadow = shadow(number, fold, self.scratch.file("trace.sqlite"))?;
            loop {
                let more = match shadow.step(1, |applied| traced.iter_mut().for_each(|row| row.look(applied))) {
                    Ok(more) => more,
                    // It was passed before. The rows differ all the same; this was only to say more of them.
                    Err(projection::Error::Event { .. }) => break 'folds,
                    Err(error) => return Err(error.into()),
                };
                let (done, of) = shadow.progress();
                if !tell(Progress { doing: "looking for the events", done, of }) {
                    return Err(Error::Interrupted);
                }
                if !more {
                    break;
                }
            }
        }
        let log = folds[0].log;
        for Traced { row, events, .. } in traced {
            for position in events {
                row.events.extend(log.event(position)?.map(|(event, _)| event.name()));
            }
        }
        Ok(())
    }
}

/// The first fold makes the file, the others go on in it.
fn shadow(number: usize, fold: &Fold<'_>, file: PathBuf) -> Result<Shadow, projection::Error> {
    if number == 0 { Shadow::begin(fold, file) } else { Shadow::go_on(fold, file) }
}

/// A row whose changes are noted.
struct Traced<'a> {
    view: u32,
    row: &'a mut Differing,
    last: Option<Vec<u8>>,
    events: VecDeque<Position>,
}

impl Traced<'_> {
    fn look(&mut self, applied: &Applied<'_>) {
        let key = self.row.difference.encoded.as_deref().expect("only such are traced");
        let Some(now) = applied.row(self.view, key).filter(|now| *now != self.last) else { return };
        self.last = now;
        self.row.changes += 1;
        if self.events.len() == limits::PROOF_EVENTS {
            self.events.pop_front();
        }
        self.events.extend(applied.event());
    }
}

/// Numbers that look random and follow from a seed: splitmix64.
struct Dice(u64);

impl Dice {
    /// From 1 to `n`.
    fn up_to(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        1 + (z ^ (z >> 31)) % n.max(1)
    }
}
