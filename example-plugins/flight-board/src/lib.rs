//! A departures board: one row a flight, with its airline, its aircraft and the weather that it left in.
//!
//! It shows a join that is cheap in the usual order and right in any. Flights, the fleet and the weather are three
//! services; a flight may be scheduled before its airline is registered, and depart before its weather is reported.
//!
//! Everything that flights look up is a **fact**: the name of an airline, the model of an aircraft, the weather at an
//! airport in an hour. If it is known when a flight needs it, the flight takes it: one row is written. If not, the
//! flight leaves a note in `waiting`, and the fact gives itself to the flights that wait when it arrives. A note has room
//! for some flights, and there are as many notes as it takes: one list of all would be written anew for each flight
//! that joins it, and a row for each flight would be a row more to write for each flight.
//!
//! One rule keeps the rows independent of the order of arrival: a fact counts once. The first registration or observation
//! is the one that the board shows.

use serde::Deserialize;
use shadowbox_plugin::prelude::*;

/// Codes and ids are borrowed from the batch, text that people wrote is not: `&str` refuses a string with an escape.
#[derive(Events)]
enum Input<'a> {
    #[event("FlightScheduled", source = "flights")]
    Scheduled(Scheduled<'a>),
    #[event("FlightDeparted", source = "flights")]
    Departed(Departed<'a>),
    #[event("FlightCancelled", source = "flights")]
    Cancelled(FlightRef<'a>),
    #[event("FlightArrived", source = "flights")]
    Arrived(Arrived<'a>),
    #[event("FlightDiverted", source = "flights")]
    Diverted(FlightRef<'a>),
    #[event("AirlineRegistered", source = "fleet")]
    Airline(Airline<'a>),
    #[event("AircraftRegistered", source = "fleet")]
    Aircraft(Aircraft<'a>),
    #[event("WeatherObserved", source = "weather")]
    Weather(Weather<'a>),
}

#[derive(Deserialize)]
struct Scheduled<'a> {
    flight_id: &'a str,
    carrier: &'a str,
    flight: i64,
    tailnum: Option<&'a str>,
    origin: &'a str,
    dest: &'a str,
    departs_at: Timestamp,
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
struct FlightRef<'a> {
    flight_id: &'a str,
}

#[derive(Deserialize)]
struct Airline<'a> {
    carrier: &'a str,
    name: String,
}

#[derive(Deserialize)]
struct Aircraft<'a> {
    tailnum: &'a str,
    model: String,
}

#[derive(Deserialize)]
struct Weather<'a> {
    airport: &'a str,
    observed_at: Timestamp,
    wind_speed: Option<f64>,
    visib: Option<f64>,
    precip: Option<f64>,
}

#[derive(TextEnum, Clone, Copy, Debug, Default, PartialEq)]
enum Status {
    #[default]
    Scheduled,
    Departed,
    Arrived,
    Cancelled,
    Diverted,
}

/// A row of the board. Delays are in minutes; the weather is that at the origin in the hour of the scheduled departure.
#[derive(View, Clone, Debug, Default, PartialEq)]
#[view(name = "flight_board")]
struct Flight {
    #[view(key)]
    flight_id: String,
    carrier: String,
    airline: Option<String>,
    flight: i64,
    tailnum: Option<String>,
    aircraft: Option<String>,
    origin: String,
    dest: String,
    status: Status,
    departs_at: Timestamp,
    dep_delay: Option<i64>,
    arr_delay: Option<i64>,
    wind_speed: Option<f64>,
    visibility: Option<f64>,
    precipitation: Option<f64>,
}

#[derive(TextEnum, Clone, Copy, Debug, Default, PartialEq)]
enum Kind {
    #[default]
    Airline,
    Aircraft,
    Weather,
}

/// A fact that flights look up, or that some wait for.
#[derive(View, Clone, Debug, Default, PartialEq)]
#[view(name = "facts")]
struct Fact {
    #[view(key)]
    kind: Kind,
    /// A carrier, a tail number or an airport.
    #[view(key)]
    id: String,
    /// The hour of a weather observation; 1970 for what holds at any time.
    #[view(key)]
    hour: Timestamp,
    known: bool,
    /// Of an airline its name, of an aircraft its model.
    name: Option<String>,
    wind_speed: Option<f64>,
    visibility: Option<f64>,
    precipitation: Option<f64>,
    /// How many flights wait for it; they are on the first `waiting` places of its notes.
    waiting: i64,
}

type FactKey<'a> = (Kind, &'a str, Timestamp);

/// Flights that wait for a fact.
#[derive(View, Clone, Debug, Default, PartialEq)]
#[view(name = "waiting")]
struct Waiting {
    #[view(key)]
    kind: Kind,
    #[view(key)]
    id: String,
    #[view(key)]
    hour: Timestamp,
    /// 0, 1, ...; all notes of a fact but the last one are full.
    #[view(key)]
    number: i64,
    flight_ids: Json<Vec<String>>,
}

/// For facts that hold at any time.
const ALWAYS: Timestamp = Timestamp::from_micros(0);

/// How many flights a note has room for. Some aircraft are never registered, so that their notes stay and grow: each
/// flight that joins a note has all of it written anew.
const ROOM: i64 = 16;

#[projection(name = "flight-board", version = 1, views(Flight, Fact, Waiting))]
fn flight_board(event: Event<Input>, views: &mut Views) -> Result<()> {
    match event.data {
        Input::Scheduled(e) => schedule(views, &e),
        Input::Departed(e) => change(views, e.flight_id, |flight| {
            flight.status = Status::Departed;
            flight.dep_delay = Some(e.dep_delay);
        }),
        Input::Cancelled(e) => change(views, e.flight_id, |flight| flight.status = Status::Cancelled),
        Input::Arrived(e) => change(views, e.flight_id, |flight| {
            flight.status = Status::Arrived;
            flight.arr_delay = Some(e.arr_delay);
        }),
        Input::Diverted(e) => change(views, e.flight_id, |flight| flight.status = Status::Diverted),
        Input::Airline(e) => {
            learn(views, Fact { kind: Kind::Airline, id: e.carrier.into(), name: Some(e.name), ..Default::default() })
        }
        Input::Aircraft(e) => {
            learn(views, Fact { kind: Kind::Aircraft, id: e.tailnum.into(), name: Some(e.model), ..Default::default() })
        }
        Input::Weather(e) => learn(
            views,
            Fact {
                kind: Kind::Weather,
                id: e.airport.into(),
                hour: e.observed_at.start_of_hour(),
                wind_speed: e.wind_speed,
                visibility: e.visib,
                precipitation: e.precip,
                ..Default::default()
            },
        ),
    }
}

fn schedule(views: &mut Views, e: &Scheduled<'_>) -> Result<()> {
    let mut flight = Flight {
        flight_id: e.flight_id.into(),
        carrier: e.carrier.into(),
        flight: e.flight,
        tailnum: e.tailnum.map(Into::into),
        origin: e.origin.into(),
        dest: e.dest.into(),
        departs_at: e.departs_at,
        ..Default::default()
    };
    ask(views, (Kind::Airline, e.carrier, ALWAYS), &mut flight)?;
    if let Some(tailnum) = e.tailnum {
        ask(views, (Kind::Aircraft, tailnum, ALWAYS), &mut flight)?;
    }
    ask(views, (Kind::Weather, e.origin, e.departs_at.start_of_hour()), &mut flight)?;
    views.put(flight)
}

fn change(views: &mut Views, flight_id: &str, change: impl FnOnce(&mut Flight)) -> Result<()> {
    if views.update::<Flight>(flight_id, change) { Ok(()) } else { never_scheduled(flight_id) }
}

/// The log of the flights tells their stories in order, so this means that events are missing: stop, and say so.
fn never_scheduled(flight_id: &str) -> Result<()> {
    bail!("flight `{flight_id}` was never scheduled")
}

/// Gives the fact to the flight, if it is known; if not, the flight waits for it from now on.
fn ask(views: &mut Views, key: FactKey<'_>, flight: &mut Flight) -> Result<()> {
    let mut waiting = 0;
    if let Some(fact) = views.get::<Fact>(key) {
        if fact.known {
            give(fact, flight);
            return Ok(());
        }
        waiting = fact.waiting;
    }
    views.upsert::<Fact>(key, |fact| fact.waiting = waiting + 1)?;
    let (kind, id, hour) = key;
    let note = (kind, id, hour, waiting / ROOM);
    views.upsert::<Waiting>(note, |note| note.flight_ids.push(flight.flight_id.clone()))
}

/// Takes note of a fact, and gives it to the flights that wait for it.
fn learn(views: &mut Views, fact: Fact) -> Result<()> {
    let fact = Fact { known: true, ..fact };
    let mut waiting = 0;
    if let Some(noted) = views.get::<Fact>(fact.key()) {
        if noted.known {
            return Ok(());
        }
        waiting = noted.waiting;
    }
    views.put(fact.clone())?;
    let (kind, id, hour) = fact.key();
    for number in 0..(waiting + ROOM - 1) / ROOM {
        let note = (kind, id, hour, number);
        let Some(Waiting { flight_ids: Json(flight_ids), .. }) = views.get::<Waiting>(note).cloned() else {
            bail!("note {number} of those who wait for {kind:?} `{id}` is missing");
        };
        views.delete::<Waiting>(note)?;
        // One call to the host for all that are not cached.
        views.load::<Flight>(flight_ids.iter().map(String::as_str));
        for flight_id in &flight_ids {
            change(views, flight_id, |flight| give(&fact, flight))?;
        }
    }
    Ok(())
}

fn give(fact: &Fact, flight: &mut Flight) {
    match fact.kind {
        Kind::Airline => flight.airline.clone_from(&fact.name),
        Kind::Aircraft => flight.aircraft.clone_from(&fact.name),
        Kind::Weather => {
            flight.wind_speed = fact.wind_speed;
            flight.visibility = fact.visibility;
            flight.precipitation = fact.precipitation;
        }
    }
}

#[cfg(test)]
mod tests;
