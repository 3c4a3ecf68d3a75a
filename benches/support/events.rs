//! Logs to measure with, made once and kept: a year of flights, or the bundled two weeks as often as it takes.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rusqlite::{Connection, params};
use sha2::{Digest, Sha256};
use shadowbox::config::limits;
use shadowbox::log::interleave::Interleave;
use shadowbox::log::{EventLog, Filter, cloudevents};
use shadowbox::model::NewEvent;

use super::{root, workplace};

const SOURCES: [&str; 3] = ["fleet", "flights", "weather"];

/// The files that events come from, and how often their flights make a million.
struct Input {
    directory: PathBuf,
    repetitions: u64,
    /// So much later is each repetition, by the ids of its flights.
    weeks: i64,
}

impl Input {
    /// `SHADOWBOX_BENCH_EVENTS`, a directory with the year's logs, or the bundled sample.
    fn find() -> Input {
        match std::env::var_os("SHADOWBOX_BENCH_EVENTS") {
            Some(given) => Input { directory: root().join(given), repetitions: 1, weeks: 53 },
            // It has 36,845 flight events.
            None => Input { directory: root().join("tests/data/flights"), repetitions: 27, weeks: 2 },
        }
    }

    fn file(&self, source: &str) -> PathBuf {
        self.directory.join(format!("{source}.jsonl.zst"))
    }

    /// The events of a source, in their order, with the numbers of their lines.
    fn events(&self, source: &'static str) -> Result<impl Iterator<Item = Result<(u64, NewEvent)>> + use<>> {
        let lines = BufReader::new(zstd::Decoder::new(fs::File::open(self.file(source))?)?).lines();
        let parse = move |line: std::io::Result<String>| Ok(cloudevents::parse(line?.as_bytes(), Some(source))?);
        Ok((1..).zip(lines).map(move |(number, line)| parse(line).map(|event| (number, event))))
    }
}

/// See [`super::log`].
pub(super) fn log(millions: u64) -> Result<PathBuf> {
    let input = Input::find();
    let mut digest = Sha256::new();
    // Logs of another making are not these.
    digest.update("interleaved, packed");
    digest.update(input.repetitions.to_le_bytes());
    for source in SOURCES {
        let file = input.file(source);
        digest.update(fs::read(&file).with_context(|| file.display().to_string())?);
    }
    let digest: String = digest.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let place = |name: String| workplace().join("logs").join(name);
    let made = |millions: u64| place(format!("{digest}-{millions}"));
    if !made(millions).exists() {
        println!("making the log of {millions} million events of {}", input.directory.display());
        let part = place(format!("{digest}.part"));
        if part.exists() {
            fs::remove_dir_all(&part)?;
        }
        fs::create_dir_all(&part)?;
        // A smaller one is the beginning of it.
        let smaller = (1..millions).rev().find(|&smaller| made(smaller).exists());
        if let Some(smaller) = smaller {
            fs::copy(made(smaller).join("log.sqlite"), part.join("log.sqlite"))?;
        }
        make(&input, &part, smaller.unwrap_or(0)..millions)?;
        fs::rename(part, made(millions))?;
    }
    Ok(made(millions))
}

/// The first repetition of the flights stands among the events of the other services, as they happened: an import of the
/// three archives by `shadowbox append` gives the same order. Later repetitions have the times of the first one, and come
/// after everything.
fn make(input: &Input, directory: &Path, millions: std::ops::Range<u64>) -> Result<()> {
    let log = EventLog::open(directory)?;
    let mut events = Vec::with_capacity(limits::APPEND_EVENTS);
    let mut append = |event: NewEvent| -> Result<()> {
        events.push(event);
        if events.len() == limits::APPEND_EVENTS {
            log.append(std::mem::take(&mut events))?;
        }
        Ok(())
    };
    let mut repetitions = millions.start * input.repetitions..millions.end * input.repetitions;
    if repetitions.start == 0 {
        repetitions.start = 1;
        let archives = SOURCES.iter().map(|source| input.events(source)).collect::<Result<Vec<_>>>()?;
        Interleave::new(archives).try_for_each(|next| append(next?.1))?;
    }
    for repetition in repetitions {
        let weeks = input.weeks * i64::try_from(repetition)?;
        input.events("flights")?.try_for_each(|event| append(later(event?.1, weeks)?))?;
    }
    log.append(events)?;
    log.seal(0)?;
    log.tidy();
    drop(log);
    // The file is all: what is linked into a data directory comes without its write-ahead log.
    let connection = Connection::open(directory.join("log.sqlite"))?;
    let busy: i64 = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
    ensure!(busy == 0, "the log is in use");
    connection.close().map_err(|(_, error)| error)?;
    Ok(())
}

/// See [`super::plain`].
pub(super) fn plain(log: &Path) -> Result<PathBuf> {
    let made = log.join("plain.sqlite");
    if made.exists() {
        return Ok(made);
    }
    println!("making a plain table of {}", log.display());
    let part = log.join("plain.part");
    if part.exists() {
        fs::remove_file(&part)?;
    }
    let log = EventLog::open(log)?;
    let mut table = Connection::open(&part)?;
    // Nobody reads it before it has its name.
    table.pragma_update(None, "journal_mode", "off")?;
    table.pragma_update(None, "synchronous", "off")?;
    table.execute_batch(super::PLAIN)?;
    let transaction = table.transaction()?;
    let mut next = Some(0);
    while let Some(begin) = next {
        let mut insert = transaction.prepare_cached("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)")?;
        let mut written = Ok(0);
        next = log.events(&Filter::default(), begin, limits::APPEND_EVENTS, |event| {
            let e = &event.event;
            let row = params![
                event.position.0 as i64,
                e.source,
                e.event_type,
                e.time.microseconds(),
                e.stream,
                e.id,
                e.payload
            ];
            if written.is_ok() {
                written = insert.execute(row);
            }
        })?;
        written?;
    }
    transaction.commit()?;
    table.close().map_err(|(_, error)| error)?;
    fs::rename(part, &made)?;
    Ok(made)
}

/// The event of a flight, later by the date in the flight's id alone. Its times stay, or there would be no weather for it.
fn later(event: NewEvent, weeks: i64) -> Result<NewEvent> {
    if weeks == 0 {
        return Ok(event);
    }
    let flight = event.stream.strip_prefix("flight-").with_context(|| format!("no flight in {}", event.stream))?;
    let (day, rest) = flight.split_at_checked(8).with_context(|| format!("no date in {flight}"))?;
    let date = jiff::civil::Date::strptime("%Y%m%d", day)?.checked_add(jiff::Span::new().try_weeks(weeks)?)?;
    let moved = format!("{}{rest}", date.strftime("%Y%m%d"));
    Ok(NewEvent {
        id: event.id.replace(flight, &moved),
        stream: format!("flight-{moved}"),
        payload: String::from_utf8(event.payload)?.replace(flight, &moved).into_bytes(),
        ..event
    })
}
