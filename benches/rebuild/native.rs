//! What somebody would write by hand who needs these views, once and fast, in one thread: read a plain table of events in
//! one scan by position, the columns that the views are made of and no others; parse the borrowed payload, fold in hash
//! maps, and write the rows that changed, once for each transaction and in the order of their keys.

use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use rusqlite::{Connection, OpenFlags, Row, Transaction, TransactionBehavior, params};
use serde::Deserialize;
use shadowbox::model::Time;

type Map<K, V> = HashMap<K, V, foldhash::fast::FixedState>;

/// Rows of a transaction.
const ROWS: usize = 50_000;

/// Flights in a note of those that wait for a fact.
const ROOM: usize = 16;

/// Folds a table of events, see `support::plain`, into `file`; answers how many events it took.
pub(crate) fn run(projection: &str, table: &Path, file: &Path) -> Result<u64> {
    match projection {
        "event-counts" => catch_up(Counts::default(), table, file),
        "carrier-performance" => catch_up(Carriers::default(), table, file),
        "flight-board" => catch_up(Board::default(), table, file),
        _ => bail!("no such projection"),
    }
}

trait Fold {
    const SCHEMA: &'static str;
    /// What it needs beside position and type: [`Event::columns`] from 2 on.
    const COLUMNS: &'static str = "payload";

    /// Answers false for an event that it does not want.
    fn apply(&mut self, event: &Event<'_>) -> Result<bool>;
    fn changed_rows(&self) -> usize;
    fn write(&mut self, transaction: &Transaction<'_>) -> Result<()>;
}

struct Event<'a> {
    event_type: &'a str,
    columns: &'a Row<'a>,
}

impl<'a> Event<'a> {
    fn parse<T: Deserialize<'a>>(&self) -> Result<T> {
        Ok(serde_json::from_slice(self.columns.get_ref(2)?.as_blob()?)?)
    }
}

fn catch_up<F: Fold>(mut fold: F, table: &Path, file: &Path) -> Result<u64> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let table = Connection::open_with_flags(table, flags)?;
    let mut store = open::<F>(file)?;
    let mut statement =
        table.prepare(&format!("SELECT position, type, {} FROM events ORDER BY position", F::COLUMNS))?;
    let mut rows = statement.query([])?;
    let (mut events, mut position) = (0, 0);
    while let Some(row) = rows.next()? {
        position = row.get(0)?;
        if fold.apply(&Event { event_type: row.get_ref(1)?.as_str()?, columns: row })? {
            events += 1;
        }
        if fold.changed_rows() >= ROWS {
            commit(&mut fold, &mut store, position)?;
        }
    }
    commit(&mut fold, &mut store, position)?;
    Ok(events)
}

fn open<F: Fold>(file: &Path) -> Result<Connection> {
    let connection = Connection::open(file)?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    connection.pragma_update(None, "synchronous", "normal")?;
    connection.pragma_update(None, "cache_size", -16_384)?;
    connection.set_prepared_statement_cache_capacity(16);
    connection.execute_batch(F::SCHEMA)?;
    connection.execute_batch("CREATE TABLE checkpoint (one INTEGER PRIMARY KEY, position INTEGER NOT NULL) STRICT")?;
    Ok(connection)
}

fn commit(fold: &mut impl Fold, store: &mut Connection, position: i64) -> Result<()> {
    let transaction = store.transaction_with_behavior(TransactionBehavior::Immediate)?;
    fold.write(&transaction)?;
    transaction.prepare_cached("INSERT OR REPLACE INTO checkpoint VALUES (1, ?)")?.execute([position])?;
    transaction.commit()?;
    Ok(())
}

#[derive(Deserialize)]
struct FlightRef<'a> {
    flight_id: &'a str,
}

#[derive(Deserialize)]
struct Departed<'a> {
    flight_id: &'a str,
    dep_delay: i64,
}

#[derive(Deserialize)]
struct Arrived<'a> {
    flight_id: &'a str,
    arr_delay: i64,
}

#[derive(Deserialize)]
struct AirlineRegistered<'a> {
    carrier: &'a str,
    name: String,
}

/// How many events of each type of each source, and when the first and the last of them happened.
#[derive(Default)]
struct Counts {
    symbols: Symbols,
    rows: Map<(Symbol, Symbol), Count>,
}

struct Count {
    events: i64,
    first_at: i64,
    last_at: i64,
}

impl Fold for Counts {
    const SCHEMA: &'static str = "
        CREATE TABLE event_counts (source TEXT NOT NULL, event_type TEXT NOT NULL, events INTEGER NOT NULL,
            first_at TEXT NOT NULL, last_at TEXT NOT NULL, PRIMARY KEY (source, event_type)) STRICT, WITHOUT ROWID;";
    const COLUMNS: &'static str = "time, source";

    fn apply(&mut self, event: &Event<'_>) -> Result<bool> {
        let at = event.columns.get(2)?;
        let key = (self.symbols.of(event.columns.get_ref(3)?.as_str()?), self.symbols.of(event.event_type));
        let count = self.rows.entry(key).or_insert(Count { events: 0, first_at: at, last_at: at });
        count.events += 1;
        count.last_at = at;
        Ok(true)
    }

    fn changed_rows(&self) -> usize {
        self.rows.len()
    }

    fn write(&mut self, transaction: &Transaction<'_>) -> Result<()> {
        let mut upsert = transaction.prepare_cached(
            "INSERT INTO event_counts VALUES (?, ?, ?, ?, ?) ON CONFLICT (source, event_type) DO UPDATE SET
             events = excluded.events, first_at = excluded.first_at, last_at = excluded.last_at",
        )?;
        let (mut first_at, mut last_at) = (String::new(), String::new());
        for (&(source, event_type), count) in &self.rows {
            upsert.execute(params![
                self.symbols.text(source),
                self.symbols.text(event_type),
                count.events,
                sortable(count.first_at, &mut first_at)?,
                sortable(count.last_at, &mut last_at)?
            ])?;
        }
        Ok(())
    }
}

#[derive(Default)]
struct Carriers {
    carriers: Vec<Carrier>,
    by_code: Map<Box<str>, usize>,
    flights: Map<Rc<str>, usize>,
    new_flights: Vec<(Rc<str>, usize)>,
}

#[derive(Default)]
struct Carrier {
    code: Box<str>,
    name: Option<String>,
    scheduled: i64,
    departed: i64,
    cancelled: i64,
    arrived: i64,
    diverted: i64,
    dep_delay_sum: i64,
    arr_delay_sum: i64,
    changed: bool,
}

#[derive(Deserialize)]
struct ScheduledCarrier<'a> {
    flight_id: &'a str,
    carrier: &'a str,
}

impl Carriers {
    fn carrier(&mut self, code: &str) -> usize {
        if let Some(&i) = self.by_code.get(code) {
            return i;
        }
        self.carriers.push(Carrier { code: code.into(), ..Carrier::default() });
        self.by_code.insert(code.into(), self.carriers.len() - 1);
        self.carriers.len() - 1
    }

    fn change(&mut self, carrier: usize) -> &mut Carrier {
        let carrier = &mut self.carriers[carrier];
        carrier.changed = true;
        carrier
    }

    fn of_flight(&mut self, flight_id: &str) -> Result<&mut Carrier> {
        let carrier = *self.flights.get(flight_id).context("a flight that was never scheduled")?;
        Ok(self.change(carrier))
    }
}

impl Fold for Carriers {
    const SCHEMA: &'static str = "
        CREATE TABLE carrier_performance (carrier TEXT NOT NULL, name TEXT, scheduled INTEGER NOT NULL,
            departed INTEGER NOT NULL, cancelled INTEGER NOT NULL, arrived INTEGER NOT NULL, diverted INTEGER NOT NULL,
            dep_delay_sum INTEGER NOT NULL, arr_delay_sum INTEGER NOT NULL, PRIMARY KEY (carrier)) STRICT, WITHOUT ROWID;
        CREATE TABLE flight_carrier (flight_id TEXT NOT NULL, carrier TEXT NOT NULL,
            PRIMARY KEY (flight_id)) STRICT, WITHOUT ROWID;";

    fn apply(&mut self, event: &Event<'_>) -> Result<bool> {
        match event.event_type {
            "FlightScheduled" => {
                let e: ScheduledCarrier<'_> = event.parse()?;
                let carrier = self.carrier(e.carrier);
                self.change(carrier).scheduled += 1;
                let flight_id: Rc<str> = e.flight_id.into();
                self.flights.insert(flight_id.clone(), carrier);
                self.new_flights.push((flight_id, carrier));
            }
            "FlightDeparted" => {
                let e: Departed<'_> = event.parse()?;
                let carrier = self.of_flight(e.flight_id)?;
                carrier.departed += 1;
                carrier.dep_delay_sum += e.dep_delay;
            }
            "FlightArrived" => {
                let e: Arrived<'_> = event.parse()?;
                let carrier = self.of_flight(e.flight_id)?;
                carrier.arrived += 1;
                carrier.arr_delay_sum += e.arr_delay;
            }
            "FlightCancelled" => self.of_flight(event.parse::<FlightRef<'_>>()?.flight_id)?.cancelled += 1,
            "FlightDiverted" => self.of_flight(event.parse::<FlightRef<'_>>()?.flight_id)?.diverted += 1,
            "AirlineRegistered" => {
                let e: AirlineRegistered<'_> = event.parse()?;
                let carrier = self.carrier(e.carrier);
                self.change(carrier).name = Some(e.name);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn changed_rows(&self) -> usize {
        // All carriers together are a handful, so that counting the changed ones is not worth the while.
        self.new_flights.len() + self.carriers.len()
    }

    fn write(&mut self, transaction: &Transaction<'_>) -> Result<()> {
        let mut upsert = transaction.prepare_cached(
            "INSERT INTO carrier_performance VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (carrier) DO UPDATE SET
             name = excluded.name, scheduled = excluded.scheduled, departed = excluded.departed,
             cancelled = excluded.cancelled, arrived = excluded.arrived, diverted = excluded.diverted,
             dep_delay_sum = excluded.dep_delay_sum, arr_delay_sum = excluded.arr_delay_sum",
        )?;
        for c in self.carriers.iter_mut().filter(|c| c.changed) {
            c.changed = false;
            upsert.execute(params![
                c.code,
                c.name,
                c.scheduled,
                c.departed,
                c.cancelled,
                c.arrived,
                c.diverted,
                c.dep_delay_sum,
                c.arr_delay_sum
            ])?;
        }
        let mut upsert = transaction.prepare_cached(
            "INSERT INTO flight_carrier VALUES (?, ?) ON CONFLICT (flight_id) DO UPDATE SET carrier = excluded.carrier",
        )?;
        self.new_flights.sort_unstable();
        for (flight_id, carrier) in self.new_flights.drain(..) {
            upsert.execute(params![flight_id, self.carriers[carrier].code])?;
        }
        Ok(())
    }
}

/// A code or a name: most of them come thousands of times.
type Symbol = u32;

#[derive(Default)]
struct Symbols {
    texts: Vec<Rc<str>>,
    known: Map<Rc<str>, Symbol>,
}

impl Symbols {
    fn of(&mut self, text: &str) -> Symbol {
        if let Some(&symbol) = self.known.get(text) {
            return symbol;
        }
        let (symbol, text) = (self.texts.len() as Symbol, Rc::<str>::from(text));
        self.texts.push(text.clone());
        self.known.insert(text, symbol);
        symbol
    }

    fn text(&self, symbol: Symbol) -> &str {
        &self.texts[symbol as usize]
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Kind {
    Aircraft,
    Airline,
    Weather,
}

impl Kind {
    fn text(self) -> &'static str {
        match self {
            Kind::Aircraft => "aircraft",
            Kind::Airline => "airline",
            Kind::Weather => "weather",
        }
    }
}

/// Its kind; a tail number, a carrier or an airport; for the weather the hour, in microseconds, else 0.
type FactKey = (Kind, Symbol, i64);

#[derive(Clone, Copy, Default)]
struct Weather {
    wind_speed: Option<f64>,
    visibility: Option<f64>,
    precipitation: Option<f64>,
}

#[derive(Default)]
struct Fact {
    known: bool,
    name: Option<Symbol>,
    weather: Weather,
    /// The flights that wait for it.
    waiting: Vec<u32>,
    /// How many are in the notes that the file has.
    noted: usize,
    changed: bool,
}

struct Flight {
    flight_id: Rc<str>,
    carrier: Symbol,
    airline: Option<Symbol>,
    flight: i64,
    tailnum: Option<Symbol>,
    aircraft: Option<Symbol>,
    origin: Symbol,
    dest: Symbol,
    status: &'static str,
    departs_at: i64,
    dep_delay: Option<i64>,
    arr_delay: Option<i64>,
    weather: Weather,
    changed: bool,
}

/// A flight takes the facts that are known, and waits for the others: a fact gives itself to those who wait when it comes.
/// Who waits is noted in the file, as the plugin does it, so that the views could go on from there; this run has it all in
/// memory, and never reads a note.
#[derive(Default)]
struct Board {
    symbols: Symbols,
    flights: Vec<Flight>,
    by_id: Map<Rc<str>, u32>,
    facts: Map<FactKey, Fact>,
    changed_flights: Vec<u32>,
    changed_facts: Vec<FactKey>,
}

#[derive(Deserialize)]
struct Scheduled<'a> {
    flight_id: &'a str,
    carrier: &'a str,
    flight: i64,
    tailnum: Option<&'a str>,
    origin: &'a str,
    dest: &'a str,
    departs_at: &'a str,
}

#[derive(Deserialize)]
struct AircraftRegistered<'a> {
    tailnum: &'a str,
    model: String,
}

#[derive(Deserialize)]
struct WeatherObserved<'a> {
    airport: &'a str,
    observed_at: &'a str,
    wind_speed: Option<f64>,
    visib: Option<f64>,
    precip: Option<f64>,
}

fn microseconds(text: &str) -> Result<i64> {
    text.parse().map(Time::microseconds).map_err(anyhow::Error::msg)
}

fn hour(microseconds: i64) -> i64 {
    microseconds - microseconds.rem_euclid(3_600_000_000)
}

/// The time as text, in `out`.
fn sortable(microseconds: i64, out: &mut String) -> Result<&str> {
    out.clear();
    Time::from_microseconds(microseconds).context("a time beyond all years")?.write_sortable(out);
    Ok(out)
}

impl Board {
    fn learn(&mut self, key: FactKey, name: Option<Symbol>, weather: Weather) {
        let fact = self.facts.entry(key).or_default();
        // The first one counts.
        if std::mem::replace(&mut fact.known, true) {
            return;
        }
        (fact.name, fact.weather) = (name, weather);
        if !std::mem::replace(&mut fact.changed, true) {
            self.changed_facts.push(key);
        }
        for number in std::mem::take(&mut fact.waiting) {
            let flight = &mut self.flights[number as usize];
            match key.0 {
                Kind::Airline => flight.airline = name,
                Kind::Aircraft => flight.aircraft = name,
                Kind::Weather => flight.weather = weather,
            }
            if !std::mem::replace(&mut flight.changed, true) {
                self.changed_flights.push(number);
            }
        }
    }

    fn ask(&mut self, key: FactKey, flight: u32) -> Option<&Fact> {
        let fact = self.facts.entry(key).or_default();
        if fact.known {
            return Some(fact);
        }
        fact.waiting.push(flight);
        if !std::mem::replace(&mut fact.changed, true) {
            self.changed_facts.push(key);
        }
        None
    }

    fn schedule(&mut self, e: &Scheduled<'_>) -> Result<()> {
        let number = u32::try_from(self.flights.len())?;
        let (carrier, origin) = (self.symbols.of(e.carrier), self.symbols.of(e.origin));
        let tailnum = e.tailnum.map(|tailnum| self.symbols.of(tailnum));
        let departs_at = microseconds(e.departs_at)?;
        let airline = self.ask((Kind::Airline, carrier, 0), number).and_then(|fact| fact.name);
        let aircraft = tailnum.and_then(|tailnum| self.ask((Kind::Aircraft, tailnum, 0), number)?.name);
        let weather = self.ask((Kind::Weather, origin, hour(departs_at)), number).map(|fact| fact.weather);
        let flight_id: Rc<str> = e.flight_id.into();
        self.by_id.insert(flight_id.clone(), number);
        self.changed_flights.push(number);
        self.flights.push(Flight {
            flight_id,
            carrier,
            airline,
            flight: e.flight,
            tailnum,
            aircraft,
            origin,
            dest: self.symbols.of(e.dest),
            status: "scheduled",
            departs_at,
            dep_delay: None,
            arr_delay: None,
            weather: weather.unwrap_or_default(),
            changed: true,
        });
        Ok(())
    }

    fn change(&mut self, flight_id: &str, status: &'static str) -> Result<&mut Flight> {
        let number = *self.by_id.get(flight_id).context("a flight that was never scheduled")?;
        let flight = &mut self.flights[number as usize];
        flight.status = status;
        if !std::mem::replace(&mut flight.changed, true) {
            self.changed_flights.push(number);
        }
        Ok(flight)
    }

    fn write_facts(&mut self, transaction: &Transaction<'_>) -> Result<()> {
        let (symbols, flights, mut text) = (&self.symbols, &self.flights, String::new());
        let mut upsert = transaction.prepare_cached(
            "INSERT INTO facts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (kind, id, hour) DO UPDATE SET
             known = excluded.known, name = excluded.name, wind_speed = excluded.wind_speed,
             visibility = excluded.visibility, precipitation = excluded.precipitation, waiting = excluded.waiting",
        )?;
        let mut upsert_note = transaction.prepare_cached(
            "INSERT INTO waiting VALUES (?, ?, ?, ?, ?)
             ON CONFLICT (kind, id, hour, number) DO UPDATE SET flight_ids = excluded.flight_ids",
        )?;
        // Those whose fact has come wait no more.
        let mut remove_notes =
            transaction.prepare_cached("DELETE FROM waiting WHERE kind = ? AND id = ? AND hour = ?")?;
        self.changed_facts.sort_unstable_by_key(|&(kind, id, hour)| (kind, symbols.text(id), hour));
        for key in self.changed_facts.drain(..) {
            let fact = self.facts.get_mut(&key).context("a fact that changed")?;
            fact.changed = false;
            let (kind, id, hour) = (key.0.text(), symbols.text(key.1), sortable(key.2, &mut text)?);
            upsert.execute(params![
                kind,
                id,
                hour,
                fact.known,
                fact.name.map(|name| symbols.text(name)),
                fact.weather.wind_speed,
                fact.weather.visibility,
                fact.weather.precipitation,
                fact.waiting.len() as i64
            ])?;
            if fact.known {
                if std::mem::take(&mut fact.noted) > 0 {
                    remove_notes.execute([kind, id, hour])?;
                }
                continue;
            }
            for (number, note) in fact.waiting.chunks(ROOM).enumerate().skip(fact.noted / ROOM) {
                let ids: Vec<&str> = note.iter().map(|&flight| &*flights[flight as usize].flight_id).collect();
                upsert_note.execute(params![kind, id, hour, number as i64, serde_json::to_string(&ids)?])?;
            }
            fact.noted = fact.waiting.len();
        }
        Ok(())
    }
}

impl Fold for Board {
    const SCHEMA: &'static str = "
        CREATE TABLE flight_board (flight_id TEXT NOT NULL, carrier TEXT NOT NULL, airline TEXT, flight INTEGER NOT NULL,
            tailnum TEXT, aircraft TEXT, origin TEXT NOT NULL, dest TEXT NOT NULL, status TEXT NOT NULL,
            departs_at TEXT NOT NULL, dep_delay INTEGER, arr_delay INTEGER, wind_speed REAL, visibility REAL,
            precipitation REAL, PRIMARY KEY (flight_id)) STRICT, WITHOUT ROWID;
        CREATE TABLE facts (kind TEXT NOT NULL, id TEXT NOT NULL, hour TEXT NOT NULL, known INTEGER NOT NULL, name TEXT,
            wind_speed REAL, visibility REAL, precipitation REAL, waiting INTEGER NOT NULL,
            PRIMARY KEY (kind, id, hour)) STRICT, WITHOUT ROWID;
        CREATE TABLE waiting (kind TEXT NOT NULL, id TEXT NOT NULL, hour TEXT NOT NULL, number INTEGER NOT NULL,
            flight_ids TEXT NOT NULL, PRIMARY KEY (kind, id, hour, number)) STRICT, WITHOUT ROWID;";

    fn apply(&mut self, event: &Event<'_>) -> Result<bool> {
        match event.event_type {
            "FlightScheduled" => self.schedule(&event.parse()?)?,
            "FlightDeparted" => {
                let e: Departed<'_> = event.parse()?;
                self.change(e.flight_id, "departed")?.dep_delay = Some(e.dep_delay);
            }
            "FlightArrived" => {
                let e: Arrived<'_> = event.parse()?;
                self.change(e.flight_id, "arrived")?.arr_delay = Some(e.arr_delay);
            }
            "FlightCancelled" => _ = self.change(event.parse::<FlightRef<'_>>()?.flight_id, "cancelled")?,
            "FlightDiverted" => _ = self.change(event.parse::<FlightRef<'_>>()?.flight_id, "diverted")?,
            "AirlineRegistered" => {
                let e: AirlineRegistered<'_> = event.parse()?;
                let (carrier, name) = (self.symbols.of(e.carrier), self.symbols.of(&e.name));
                self.learn((Kind::Airline, carrier, 0), Some(name), Weather::default());
            }
            "AircraftRegistered" => {
                let e: AircraftRegistered<'_> = event.parse()?;
                let (tailnum, model) = (self.symbols.of(e.tailnum), self.symbols.of(&e.model));
                self.learn((Kind::Aircraft, tailnum, 0), Some(model), Weather::default());
            }
            "WeatherObserved" => {
                let e: WeatherObserved<'_> = event.parse()?;
                let key = (Kind::Weather, self.symbols.of(e.airport), hour(microseconds(e.observed_at)?));
                let (wind_speed, visibility, precipitation) = (e.wind_speed, e.visib, e.precip);
                self.learn(key, None, Weather { wind_speed, visibility, precipitation });
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn changed_rows(&self) -> usize {
        self.changed_flights.len() + self.changed_facts.len()
    }

    fn write(&mut self, transaction: &Transaction<'_>) -> Result<()> {
        self.write_facts(transaction)?;
        let mut upsert = transaction.prepare_cached(
            "INSERT INTO flight_board VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
             ON CONFLICT (flight_id) DO UPDATE SET carrier = excluded.carrier, airline = excluded.airline,
             flight = excluded.flight, tailnum = excluded.tailnum, aircraft = excluded.aircraft,
             origin = excluded.origin, dest = excluded.dest, status = excluded.status,
             departs_at = excluded.departs_at, dep_delay = excluded.dep_delay, arr_delay = excluded.arr_delay,
             wind_speed = excluded.wind_speed, visibility = excluded.visibility, precipitation = excluded.precipitation",
        )?;
        let (symbols, mut text) = (&self.symbols, String::new());
        self.changed_flights
            .sort_unstable_by(|&a, &b| self.flights[a as usize].flight_id.cmp(&self.flights[b as usize].flight_id));
        for number in self.changed_flights.drain(..) {
            let f = &mut self.flights[number as usize];
            f.changed = false;
            upsert.execute(params![
                f.flight_id,
                symbols.text(f.carrier),
                f.airline.map(|airline| symbols.text(airline)),
                f.flight,
                f.tailnum.map(|tailnum| symbols.text(tailnum)),
                f.aircraft.map(|aircraft| symbols.text(aircraft)),
                symbols.text(f.origin),
                symbols.text(f.dest),
                f.status,
                sortable(f.departs_at, &mut text)?,
                f.dep_delay,
                f.arr_delay,
                f.weather.wind_speed,
                f.weather.visibility,
                f.weather.precipitation
            ])?;
        }
        Ok(())
    }
}
