//! Logs to measure with, made once and kept: a year of flights, or the bundled two weeks as often as it takes.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rusqlite::Connection;
use sha2::{Digest, Sha256};
use shadowbox::config::limits;
use shadowbox::log::{EventLog, cloudevents};
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

    /// Calls `each` for the events of a source, in their order.
    fn events(&self, source: &str, mut each: impl FnMut(NewEvent) -> Result<()>) -> Result<()> {
        for line in BufReader::new(zstd::Decoder::new(fs::File::open(self.file(source))?)?).lines() {
            each(cloudevents::parse(line?.as_bytes(), Some(source))?)?;
        }
        Ok(())
    }
}

/// See [`super::log`].
pub(super) fn log(millions: u64) -> Result<PathBuf> {
    let input = Input::find();
    let mut digest = Sha256::new();
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

fn make(input: &Input, directory: &Path, millions: std::ops::Range<u64>) -> Result<()> {
    let log = EventLog::open(directory)?;
    let mut events = Vec::with_capacity(limits::APPEND_EVENTS);
    let mut append = |event: NewEvent| -> Result<()> {
        events.push(event);
        if events.len() == limits::APPEND_EVENTS {
            log.append(&events)?;
            events.clear();
        }
        Ok(())
    };
    if millions.start == 0 {
        input.events("fleet", &mut append)?;
        input.events("weather", &mut append)?;
    }
    for repetition in millions.start * input.repetitions..millions.end * input.repetitions {
        let weeks = input.weeks * i64::try_from(repetition)?;
        input.events("flights", |event| append(later(event, weeks)?))?;
    }
    log.append(&events)?;
    drop(log);
    // The file is all: what is linked into a data directory comes without its write-ahead log.
    let connection = Connection::open(directory.join("log.sqlite"))?;
    let busy: i64 = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
    ensure!(busy == 0, "the log is in use");
    connection.close().map_err(|(_, error)| error)?;
    Ok(())
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
