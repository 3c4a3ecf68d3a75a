//! Events that the plugin cannot apply: how they are found and reported, what becomes of them and of the dead letters.
//!
//! An event is to blame only if it fails alone, on a fresh instance. What fails for a reason of the host's is never the
//! event's fault; it is tried again ([`retry_wait`]).

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::oneshot;

use super::Error;
use super::session::{Session, columns};
use super::worker::{Job, Task};
use crate::config::{Policy, limits};
use crate::log::EventLog;
use crate::manifest::Manifest;
use crate::model::{Cause, Columns, Event, EventName, FailureReport, Position, RawEvent};
use crate::plugin::{Details, Failure};
use crate::view::{DeadLetter, DeadLetters, LetterCounts, LetterState, Selector};

/// How long to wait before trying again for the `attempt`-th time, counted from 0: doubling, and between half of it and
/// all of it. By how much depends on the name alone, which is random enough to keep projections apart, and the same
/// every time.
pub(super) fn retry_wait(projection: &str, attempt: u32) -> Duration {
    let hash = foldhash::fast::FixedState::default().hash_one((projection, attempt));
    let longest = limits::RETRY_FIRST * 2_u32.pow(attempt);
    longest / 2 + longest.mul_f64((hash >> 11) as f64 / (1_u64 << 53) as f64 / 2.0)
}

/// What is to be done with dead letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treatment {
    /// Apply them now, in order.
    Retry,
    /// Forget them.
    Discard,
}

/// What a treatment came to.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// Letters that were applied.
    pub applied: u64,
    /// Letters that were discarded.
    pub discarded: u64,
    /// Letters that are gone because the content of their events is.
    pub forgotten: u64,
    /// Letters that failed again. Those after them in their streams were not tried.
    pub failed: Vec<Refusal>,
    /// What is left in the generation.
    pub left: LetterCounts,
}

/// A dead letter that failed again.
#[derive(Clone, Debug, Serialize)]
pub struct Refusal {
    /// Its number.
    pub number: u64,
    /// Its event.
    #[serde(flatten)]
    pub event: EventName,
    /// Why.
    pub message: String,
}

/// A treatment that somebody waits for.
pub(super) struct Request {
    pub(super) treatment: Treatment,
    pub(super) selector: Selector,
    pub(super) reply: oneshot::Sender<Result<Outcome, String>>,
}

/// A retry that is under way: a batch of it between two looks at the commands.
pub(super) struct Retry {
    letters: VecDeque<DeadLetter>,
    /// Streams of which a letter has failed again; the rest of them stays parked.
    stuck: HashSet<(String, String)>,
    /// Letters in the next batch, at most.
    size: usize,
    outcome: Outcome,
    reply: oneshot::Sender<Result<Outcome, String>>,
}

impl Retry {
    pub(super) fn is_done(&self) -> bool {
        self.letters.is_empty()
    }

    pub(super) fn finish(mut self, left: LetterCounts) {
        self.outcome.left = left;
        // Whoever asked may have gone away.
        let _ = self.reply.send(Ok(self.outcome));
    }

    pub(super) fn fail(self, error: &str) {
        let _ = self.reply.send(Err(format!(
            "{error}; {} were applied, and are no dead letters any more; retry the rest",
            self.outcome.applied
        )));
    }
}

/// What a generation leaves out: the streams that wait, and how many letters there are, those that wait for their
/// commit included.
pub(super) struct Park {
    /// By the source's name.
    streams: HashMap<String, HashSet<Box<[u8]>>>,
    pub(super) counts: LetterCounts,
}

impl Park {
    pub(super) fn load(job: &Job) -> Result<Park, Error> {
        let letters = DeadLetters::open(&job.file)?;
        let mut park = Park { streams: HashMap::new(), counts: letters.counts()? };
        letters.parked_streams()?.into_iter().for_each(|(source, stream)| park.add(source, stream));
        Ok(park)
    }

    /// True if no stream waits, so that nothing needs to be looked at.
    pub(super) fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    fn add(&mut self, source: String, stream: String) {
        self.streams.entry(source).or_default().insert(stream.into_bytes().into());
    }

    fn of(&self, source: &str) -> Option<&HashSet<Box<[u8]>>> {
        self.streams.get(source)
    }
}

/// Cuts a text of the plugin's to what is kept of it.
fn bounded(text: String) -> String {
    if text.len() <= limits::REPORT_TEXT_BYTES {
        return text;
    }
    let mut end = limits::REPORT_TEXT_BYTES;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{} [and {} more bytes]", &text[..end], text.len() - end)
}

/// Why `module` could not apply an event.
pub(super) fn cause(module: &str, failure: &Failure, details: Details) -> Cause {
    Cause {
        module_hash: module.to_owned(),
        message: bounded(failure.to_string()),
        backtrace: details.backtrace.map(bounded),
        output: details.output.map(bounded),
    }
}

/// An event by its position, which was read before.
pub(super) fn event_at(log: &EventLog, position: Position) -> Result<Event, Error> {
    log.event(position)?.map(|(event, _)| event).ok_or(Error::Missing { position })
}

/// Events in the form of a batch, encoded as this plugin gets it.
pub(super) fn encode(manifest: &Manifest, events: &[Event]) -> Vec<u8> {
    let (mut sources, mut types): (Vec<Arc<str>>, Vec<Arc<str>>) = Default::default();
    let index = |names: &mut Vec<Arc<str>>, name: &str| {
        let known = names.iter().position(|known| **known == *name);
        known.unwrap_or_else(|| {
            names.push(name.into());
            names.len() - 1
        }) as u16
    };
    let mut batch = Columns::new(manifest.batch);
    for Event { position, event, forgotten } in events {
        let (source, event_type) = (index(&mut sources, &event.source), index(&mut types, &event.event_type));
        let raw = RawEvent {
            position: *position,
            time: event.time,
            version: event.version,
            stream: event.stream.as_bytes(),
            id: event.id.as_bytes(),
            metadata: event.metadata.as_bytes(),
            payload: &event.payload,
            forgotten: *forgotten,
        };
        batch.push(source, event_type, raw);
    }
    batch.encode(&sources, &types, manifest.batch, manifest.forgotten)
}

impl Session {
    /// Takes the events of parked streams out of the batch. Answers their indexes, or the index of the first one that
    /// there is no room for.
    pub(super) fn take_parked(&mut self, max: u64) -> Result<Vec<usize>, usize> {
        if self.park.is_empty() {
            return Ok(Vec::new());
        }
        let batch = &self.batch;
        let waiting: Vec<_> = batch.sources.names.iter().map(|source| self.park.of(source)).collect();
        let waits = |i: &usize| {
            let streams = waiting[usize::from(batch.events.source(*i))];
            streams.is_some_and(|streams| streams.contains(batch.events.get(*i).stream))
        };
        let parked: Vec<usize> = (0..batch.len()).filter(waits).collect();
        let room = max.saturating_sub(self.park.counts.all());
        if let Some(&first) = parked.get(usize::try_from(room).unwrap_or(usize::MAX)) {
            return Err(first);
        }
        Ok(parked)
    }

    /// The name of event `i` of the batch. The batch has only what the plugin reads of an event.
    pub(super) fn event_name(&self, job: &Job, i: usize) -> Result<EventName, Error> {
        event_at(&job.log, self.batch.events.position(i)).map(|event| event.name())
    }

    /// Adds dead letters to what waits for the commit.
    pub(super) fn set_aside(&mut self, event: EventName, state: LetterState, cause: Option<Cause>) {
        *self.park.counts.of(state) += 1;
        if state == LetterState::Parked && !event.stream.is_empty() {
            self.park.add(event.source.clone(), event.stream.clone());
        }
        self.letters.add.push((event, state, cause));
    }

    /// After a failure: everything before the batch is committed. The next batch is smaller, until the event that fails
    /// is alone and its instance fresh; then the policy says what becomes of it. `parked` are the indexes of events that
    /// were taken out of the batch, of which `read` were read.
    pub(super) fn isolate(&mut self, job: &Job, failure: Failure, read: usize, parked: &[usize]) -> Result<(), Error> {
        let details = self.instance.as_mut().map(|instance| instance.details()).unwrap_or_default();
        self.instance = None;
        let first_bad = match failure {
            Failure::Host(message) => return Err(self.host_error(message)),
            Failure::Refused { event, .. } => Some(event as usize).filter(|&i| i < self.batch.len()),
            _ => None,
        };
        if job.proving {
            let cause = cause(&job.module.hash, &failure, details);
            return Err(match first_bad {
                Some(i) => Error::Event(Box::new(self.report(job, i, cause)?)),
                None => Error::FirstBatch {
                    events: self.batch.len(),
                    position: self.batch.events.position(0),
                    reason: failure.to_string(),
                },
            });
        }
        if self.has_uncommitted() {
            self.end_commit(true)?;
            self.begin_commit(job, false)?;
        }
        self.end_commit(true)?;
        if read > 1 || !self.was_fresh {
            tracing::warn!(%failure, events = read, "a batch failed; looking for the event");
            let before = first_bad.map(|bad| parked.iter().fold(bad, |i, &taken| i + usize::from(taken <= i)));
            return self.rewind(job, read, before.unwrap_or(read / 2));
        }
        let report = self.report(job, 0, cause(&job.module.hash, &failure, details))?;
        let state = match *job.policy.borrow() {
            Policy::Pause => return Err(Error::Event(Box::new(report))),
            Policy::Park => LetterState::Parked,
            Policy::Skip => LetterState::Skipped,
        };
        self.check_room(job, &report.event)?;
        let error = Error::Event(Box::new(report.clone()));
        tracing::warn!(%error, "{} it; going on", if state == LetterState::Parked { "parking" } else { "skipping" });
        self.set_aside(report.event, state, Some(report.cause));
        self.passed(1, job.limits.events);
        self.advance();
        self.read_streams(job)
    }

    /// Reads anew if it has changed whether streams have to be looked at.
    fn read_streams(&mut self, job: &Job) -> Result<(), Error> {
        if self.batch.events.set() == columns(job, &self.park) { Ok(()) } else { self.read_anew(job) }
    }

    /// Loads the park after dead letters were removed and that is committed.
    pub(super) fn load_park(&mut self, job: &Job) -> Result<(), Error> {
        self.park = Park::load(job)?;
        self.read_streams(job)
    }

    fn check_room(&self, job: &Job, event: &EventName) -> Result<(), Error> {
        match job.max_dead_letters {
            max if self.park.counts.all() >= max => Err(Error::Full { event: Box::new(event.clone()), max }),
            _ => Ok(()),
        }
    }

    /// There is no room for event `i` of the batch: what comes before it is applied and committed first.
    pub(super) fn stop_before(&mut self, job: &Job, i: usize) -> Result<(), Error> {
        if i > 0 {
            return self.rewind(job, i, i);
        }
        let event = self.event_name(job, 0)?;
        self.end_commit(true)?;
        self.begin_commit(job, false)?;
        self.end_commit(true)?;
        Err(Error::Full { event: Box::new(event), max: job.max_dead_letters })
    }

    fn report(&self, job: &Job, i: usize, cause: Cause) -> Result<FailureReport, Error> {
        let projection = job.module.manifest.projection.clone();
        Ok(FailureReport { projection, event: self.event_name(job, i)?, cause })
    }

    /// Looks for the letters that somebody wants to retry, or says why they cannot be.
    pub(super) fn select(&self, job: &Job, request: Request) -> Result<Option<Retry>, Error> {
        let letters = DeadLetters::open(&job.file)?;
        let selected = letters.select(&request.selector)?;
        // In a whole stream the first one comes first anyway.
        let alone = |selected: &[DeadLetter]| match (&request.selector, selected) {
            (Selector::Number(_), [letter]) => letters.waits_for(letter),
            _ => Ok(None),
        };
        let waits_for = selected.as_deref().map_or(Ok(None), alone)?;
        let refusal = match (&selected, waits_for) {
            (Err(reason), _) => reason.clone(),
            (Ok(selected), Some(first)) => format!(
                "dead letter {} waits for {first}, which is before it in stream {:?}; retry {first} or the whole stream \
                 (--stream), or discard {first}",
                selected[0].number, selected[0].event.stream
            ),
            (Ok(selected), None) => {
                return Ok(Some(Retry {
                    letters: selected.clone().into(),
                    stuck: HashSet::new(),
                    size: job.limits.events,
                    outcome: Outcome::default(),
                    reply: request.reply,
                }));
            }
        };
        // Whoever asked may have gone away.
        let _ = request.reply.send(Err(refusal));
        Ok(None)
    }

    /// Prepares to forget the selected letters; the commit is the caller's.
    pub(super) fn discard(&mut self, job: &Job, selector: &Selector) -> Result<Result<u64, String>, Error> {
        let selected = DeadLetters::open(&job.file)?.select(selector)?;
        Ok(selected.map(|letters| {
            self.letters.remove.extend(letters.iter().map(|letter| letter.number));
            letters.len() as u64
        }))
    }

    /// Applies the next letters of a retry, as many as fit into a batch; the commit is the caller's, and holds their
    /// rows and the end of the letters. Everything before must be committed. Answers false if there is nothing to
    /// commit.
    pub(super) fn retry(&mut self, job: &Job, retry: &mut Retry) -> Result<bool, Error> {
        let mut letters = Vec::new();
        let mut events: Vec<Event> = Vec::new();
        let (mut bytes, mut gone) = (0, false);
        while letters.len() < retry.size
            && bytes < job.limits.bytes
            && let Some(letter) = retry.letters.pop_front()
        {
            if retry.stuck.contains(&(letter.event.source.clone(), letter.event.stream.clone()))
                && letter.state == LetterState::Parked
            {
                continue;
            }
            let event = event_at(&job.log, letter.event.position)?;
            if event.forgotten && !job.module.manifest.forgotten {
                retry.outcome.forgotten += 1;
                self.letters.remove.push(letter.number);
                gone = true;
                continue;
            }
            bytes += event.event.payload.len() + event.event.metadata.len();
            events.push(event);
            letters.push(letter);
        }
        if letters.is_empty() {
            return Ok(gone);
        }
        let task = Task::Applying { events: letters.len(), position: letters[0].event.position };
        let failure = match self.apply_encoded(job, task, &encode(&job.module.manifest, &events)) {
            Ok(()) => {
                retry.outcome.applied += letters.len() as u64;
                retry.size = (retry.size * 2).min(job.limits.events);
                self.letters.remove.extend(letters.iter().map(|letter| letter.number));
                self.has_applied = true;
                return Ok(true);
            }
            Err(Failure::Host(message)) => return Err(self.host_error(message)),
            Err(failure) => failure,
        };
        let details = self.instance.as_mut().map(|instance| instance.details()).unwrap_or_default();
        self.instance = None;
        if letters.len() > 1 || !self.was_fresh {
            retry.size = match failure {
                Failure::Refused { event, .. } if (event as usize) < letters.len() => (event as usize).max(1),
                _ => (letters.len() / 2).max(1),
            };
            letters.into_iter().rev().for_each(|letter| retry.letters.push_front(letter));
            return Ok(false);
        }
        let letter = letters.remove(0);
        let cause = cause(&job.module.hash, &failure, details);
        if letter.state == LetterState::Parked && !letter.event.stream.is_empty() {
            retry.stuck.insert((letter.event.source.clone(), letter.event.stream.clone()));
        }
        let message = cause.message.clone();
        retry.outcome.failed.push(Refusal { number: letter.number, event: letter.event, message });
        self.letters.explain.push((letter.number, cause));
        retry.size = job.limits.events;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_and_keep_projections_apart() {
        let waits = |name: &str| (0..limits::RETRIES).map(|n| retry_wait(name, n)).collect::<Vec<_>>();
        let (orders, flights) = (waits("orders"), waits("flights"));
        assert_eq!(orders, waits("orders"));
        for (n, (one, other)) in orders.iter().zip(&flights).enumerate() {
            let longest = limits::RETRY_FIRST * (1 << n);
            assert!((longest / 2..=longest).contains(one), "{n}: {one:?}");
            assert!((longest / 2..=longest).contains(other) && one != other, "{n}: {one:?} {other:?}");
        }
    }

    #[test]
    fn texts_of_a_plugin_are_cut_between_characters() {
        let text = bounded("é".repeat(limits::REPORT_TEXT_BYTES));
        assert!(text.starts_with('é') && text.ends_with(&format!(" [and {} more bytes]", limits::REPORT_TEXT_BYTES)));
        assert_eq!(bounded("short".into()), "short");
    }
}
