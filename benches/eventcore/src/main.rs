//! The projection `carrier-performance`, as a user of EventCore 2.1 writes it and runs it by EventCore's own runner.
//!
//! `eventcore-contestant SETTING EVENTS.sqlite DIRECTORY EVENTS` fills a store of EventCore's in DIRECTORY with the first
//! events of a plain table, which are in the order of our log, takes the time from the start of the projection until it has applied the last one, and prints that as
//! JSON. The store is filled before, and counts for nothing. `benches/README.md` says what the settings are.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use eventcore::{Event, ProjectionConfig, Projector, StreamId, StreamPosition, run_projection};
use eventcore_sqlite::rusqlite::{self, Connection, OpenFlags, params};
use eventcore_sqlite::{SqliteConfig, SqliteEventStore};
use eventcore_types::{EventStore, StreamVersion, StreamWrites};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use tokio::sync::Notify;

/// EventCore asks a store for the events of one type, and a type of Rust is a type of event: one enum for all of them.
const TYPE: &str = "Fact";

const TYPES: [&str; 6] =
    ["AirlineRegistered", "FlightScheduled", "FlightDeparted", "FlightCancelled", "FlightArrived", "FlightDiverted"];

/// An event on its way into the store, with its payload as it is: `{"FlightDeparted": {...}}`.
#[derive(Clone)]
struct Stored {
    stream: StreamId,
    event_type: String,
    payload: Box<RawValue>,
}

impl Serialize for Stored {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry(&self.event_type, &self.payload)?;
        map.end()
    }
}

impl<'de> Deserialize<'de> for Stored {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Err(serde::de::Error::custom("this form is only written"))
    }
}

impl Event for Stored {
    fn stream_id(&self) -> &StreamId {
        &self.stream
    }

    fn event_type_name() -> &'static str {
        TYPE
    }
}

/// The same events as the projection needs them: what it does not read is passed over by the parser.
#[derive(Clone, serde::Serialize, Deserialize)]
enum Fact {
    AirlineRegistered { carrier: StreamId, name: String },
    FlightScheduled { flight_id: StreamId, carrier: String },
    FlightDeparted { flight_id: StreamId, dep_delay: i64 },
    FlightCancelled { flight_id: StreamId },
    FlightArrived { flight_id: StreamId, arr_delay: i64 },
    FlightDiverted { flight_id: StreamId },
}

impl Event for Fact {
    fn stream_id(&self) -> &StreamId {
        match self {
            Fact::AirlineRegistered { carrier: stream, .. }
            | Fact::FlightScheduled { flight_id: stream, .. }
            | Fact::FlightDeparted { flight_id: stream, .. }
            | Fact::FlightCancelled { flight_id: stream }
            | Fact::FlightArrived { flight_id: stream, .. }
            | Fact::FlightDiverted { flight_id: stream } => stream,
        }
    }

    fn event_type_name() -> &'static str {
        TYPE
    }
}

const SCHEMA: &str = "
    CREATE TABLE carrier_performance (carrier TEXT NOT NULL, name TEXT, scheduled INTEGER NOT NULL DEFAULT 0,
        departed INTEGER NOT NULL DEFAULT 0, cancelled INTEGER NOT NULL DEFAULT 0, arrived INTEGER NOT NULL DEFAULT 0,
        diverted INTEGER NOT NULL DEFAULT 0, dep_delay_sum INTEGER NOT NULL DEFAULT 0,
        arr_delay_sum INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (carrier)) STRICT, WITHOUT ROWID;
    CREATE TABLE flight_carrier (flight_id TEXT NOT NULL, carrier TEXT NOT NULL,
        PRIMARY KEY (flight_id)) STRICT, WITHOUT ROWID;";

/// The read model. The runner saves its checkpoint after each event, so rows must be committed after each event: what is
/// collected over several is lost by a crash, because the checkpoint is ahead of it.
struct Carriers {
    rows: Connection,
    expected: usize,
    applied: usize,
    done: Arc<Notify>,
}

impl Carriers {
    fn of_flight(&self, flight_id: &StreamId, change: &str, delay: i64) -> rusqlite::Result<()> {
        let sql = format!(
            "UPDATE carrier_performance SET {change} WHERE carrier = (SELECT carrier FROM flight_carrier WHERE flight_id = ?2)
             AND ?1 IS NOT NULL"
        );
        match self.rows.prepare_cached(&sql)?.execute(params![delay, flight_id.as_ref()])? {
            1 => Ok(()),
            _ => Err(rusqlite::Error::QueryReturnedNoRows),
        }
    }
}

impl Projector for Carriers {
    type Event = Fact;
    type Error = rusqlite::Error;
    type Context = ();

    fn apply(&mut self, event: Fact, _: StreamPosition, (): &mut ()) -> rusqlite::Result<()> {
        match event {
            Fact::AirlineRegistered { carrier, name } => {
                let sql = "INSERT INTO carrier_performance (carrier, name) VALUES (?, ?)
                           ON CONFLICT (carrier) DO UPDATE SET name = excluded.name";
                self.rows.prepare_cached(sql)?.execute(params![carrier.as_ref(), name])?;
            }
            Fact::FlightScheduled { flight_id, carrier } => {
                let transaction = self.rows.unchecked_transaction()?;
                let sql = "INSERT INTO flight_carrier VALUES (?, ?)
                           ON CONFLICT (flight_id) DO UPDATE SET carrier = excluded.carrier";
                transaction.prepare_cached(sql)?.execute(params![flight_id.as_ref(), carrier])?;
                let sql = "INSERT INTO carrier_performance (carrier, scheduled) VALUES (?, 1)
                           ON CONFLICT (carrier) DO UPDATE SET scheduled = scheduled + 1";
                transaction.prepare_cached(sql)?.execute([carrier])?;
                transaction.commit()?;
            }
            Fact::FlightDeparted { flight_id, dep_delay } => {
                self.of_flight(&flight_id, "departed = departed + 1, dep_delay_sum = dep_delay_sum + ?1", dep_delay)?;
            }
            Fact::FlightArrived { flight_id, arr_delay } => {
                self.of_flight(&flight_id, "arrived = arrived + 1, arr_delay_sum = arr_delay_sum + ?1", arr_delay)?;
            }
            Fact::FlightCancelled { flight_id } => self.of_flight(&flight_id, "cancelled = cancelled + 1", 0)?,
            Fact::FlightDiverted { flight_id } => self.of_flight(&flight_id, "diverted = diverted + 1", 0)?,
        }
        self.applied += 1;
        if self.applied == self.expected {
            self.done.notify_one();
        }
        Ok(())
    }

    fn name(&self) -> &str {
        "carrier-performance"
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [setting, log, directory, events] = &arguments[..] else {
        bail!("usage: eventcore-contestant durable|relaxed|memory EVENTS.sqlite DIRECTORY EVENTS");
    };
    let (log, directory) = (Path::new(log), Path::new(directory));
    let path = directory.join("events.sqlite");
    // In batch mode the runner returns after one page of 1,000 events, and in continuous mode it rests for 100 ms after
    // each unless told otherwise.
    let config = ProjectionConfig::default().continuous().poll_interval(Duration::ZERO);
    let file = directory.join("views.sqlite");
    let (store, rows) = match setting.as_str() {
        "durable" => (SqliteEventStore::new(SqliteConfig { path, encryption_key: None })?, file),
        "relaxed" => (SqliteEventStore::from_connection(relaxed(&path)?), file),
        "memory" => (SqliteEventStore::in_memory()?, PathBuf::from(":memory:")),
        _ => bail!("no such setting: {setting:?}"),
    };
    store.migrate().await?;
    let expected = fill(&store, log, events.parse()?).await?;

    let views = relaxed(&rows)?;
    views.execute_batch(SCHEMA)?;
    let done = Arc::new(Notify::new());
    let projector = Carriers { rows: views, expected, applied: 0, done: done.clone() };

    let (began, cpu) = (Instant::now(), cpu_seconds()?);
    tokio::select! {
        ended = run_projection(projector, &store, config) => { ended?; bail!("the runner ended before the last event") }
        () = done.notified() => {}
    }
    let run = serde_json::json!({
        "seconds": began.elapsed().as_secs_f64(),
        "cpu_seconds": cpu_seconds()? - cpu,
        "peak_mb": peak_mb()?,
        "threads": {},
        "file": rows,
        "events": expected,
    });
    println!("{run}");
    Ok(())
}

/// A file as most set it up who know SQLite: a commit survives the end of the process, but not always a power cut.
fn relaxed(path: &Path) -> Result<Connection> {
    let connection = Connection::open(path)?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    connection.pragma_update(None, "synchronous", "normal")?;
    Ok(connection)
}

/// Appends the first events of a table that the projection subscribes to.
async fn fill(store: &SqliteEventStore, table: &Path, events: usize) -> Result<usize> {
    let table = Connection::open_with_flags(table, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let mut versions = HashMap::new();
    let mut filled = 0;
    let mut statement = table.prepare("SELECT type, payload FROM events ORDER BY position")?;
    let mut rows = statement.query([])?;
    let mut page = Vec::new();
    while filled + page.len() < events
        && let Some(row) = rows.next()?
    {
        let event_type: String = row.get(0)?;
        if TYPES.contains(&event_type.as_str()) {
            page.push(stored(event_type, row.get_ref(1)?.as_blob()?)?);
        }
        if page.len() == 1_000 {
            filled += append(store, &mut versions, std::mem::take(&mut page)).await?;
        }
    }
    filled += append(store, &mut versions, page).await?;
    ensure!(filled == events, "the log has only {filled} events");
    Ok(filled)
}

fn stored(event_type: String, payload: &[u8]) -> Result<Stored> {
    #[derive(Deserialize)]
    struct Name<'a> {
        flight_id: Option<&'a str>,
        carrier: Option<&'a str>,
    }
    let name: Name<'_> = serde_json::from_slice(payload)?;
    let stream = name.flight_id.or(name.carrier).context("an event of nothing")?;
    let payload = RawValue::from_string(String::from_utf8(payload.to_vec())?)?;
    Ok(Stored { stream: StreamId::try_new(stream.to_owned())?, event_type, payload })
}

async fn append(
    store: &SqliteEventStore,
    versions: &mut HashMap<StreamId, usize>,
    events: Vec<Stored>,
) -> Result<usize> {
    let mut writes = StreamWrites::new();
    for event in &events {
        let version = StreamVersion::new(versions.get(&event.stream).copied().unwrap_or(0));
        writes = writes.register_stream(event.stream.clone(), version)?;
    }
    let count = events.len();
    for event in events {
        *versions.entry(event.stream.clone()).or_insert(0) += 1;
        writes = writes.append(event)?;
    }
    store.append_events(writes).await?;
    Ok(count)
}

/// User and system time of this process. Linux counts in hundredths of a second here.
fn cpu_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? / 100.0)
}

fn peak_mb() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM in status")?;
    let kilobytes: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kilobytes * 1024.0 / 1e6)
}
