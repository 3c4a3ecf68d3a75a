//! How each airline keeps its timetable: flights scheduled, departed, cancelled, arrived and diverted, and the minutes
//! that they were late.
//!
//! It shows a helper view. Only `FlightScheduled` names the airline; the later events of a flight carry its id alone.
//! So the projection keeps a second view, from flight to airline, and joins by looking it up. Helper views are ordinary
//! views: complete to the same checkpoint, rebuilt together, and there to be queried.

use serde::Deserialize;
use shadowbox_plugin::prelude::*;

/// Codes and ids are borrowed from the batch. `&str` refuses a string with an escape in it, such as `\u00e9`, which
/// codes do not have; names may, so the airline's name is owned.
#[derive(Events)]
enum Fact<'a> {
    #[event("FlightScheduled", source = "flights")]
    Scheduled(Scheduled<'a>),
    #[event("FlightDeparted", source = "flights")]
    Departed(Departed<'a>),
    #[event("FlightCancelled", source = "flights")]
    Cancelled(Flight<'a>),
    #[event("FlightArrived", source = "flights")]
    Arrived(Arrived<'a>),
    #[event("FlightDiverted", source = "flights")]
    Diverted(Flight<'a>),
    #[event("AirlineRegistered", source = "fleet")]
    Airline(Airline<'a>),
}

#[derive(Deserialize)]
struct Scheduled<'a> {
    flight_id: &'a str,
    carrier: &'a str,
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
struct Flight<'a> {
    flight_id: &'a str,
}

#[derive(Deserialize)]
struct Airline<'a> {
    carrier: &'a str,
    name: String,
}

/// An airline; delays are sums of minutes. The name is absent until the airline is registered.
#[derive(View, Default, Debug, PartialEq)]
#[view(name = "carrier_performance")]
struct CarrierPerformance {
    #[view(key)]
    carrier: String,
    name: Option<String>,
    scheduled: i64,
    departed: i64,
    cancelled: i64,
    arrived: i64,
    diverted: i64,
    dep_delay_sum: i64,
    arr_delay_sum: i64,
}

/// Which airline flies a flight.
#[derive(View)]
#[view(name = "flight_carrier")]
struct FlightCarrier {
    #[view(key)]
    flight_id: String,
    carrier: String,
}

/// Counts each event for its airline.
#[projection(name = "carrier-performance", version = 1, views(CarrierPerformance, FlightCarrier))]
pub fn carrier_performance(event: Event<Fact>, views: &mut Views) -> Result<()> {
    match event.data {
        Fact::Airline(e) => views.upsert::<CarrierPerformance>(e.carrier, |row| row.name = Some(e.name)),
        Fact::Scheduled(e) => {
            views.put(FlightCarrier { flight_id: e.flight_id.into(), carrier: e.carrier.into() })?;
            views.upsert::<CarrierPerformance>(e.carrier, |row| row.scheduled += 1)
        }
        Fact::Departed(e) => count(views, e.flight_id, |row| {
            row.departed += 1;
            row.dep_delay_sum += e.dep_delay;
        }),
        Fact::Arrived(e) => count(views, e.flight_id, |row| {
            row.arrived += 1;
            row.arr_delay_sum += e.arr_delay;
        }),
        Fact::Cancelled(e) => count(views, e.flight_id, |row| row.cancelled += 1),
        Fact::Diverted(e) => count(views, e.flight_id, |row| row.diverted += 1),
    }
}

/// Changes the row of the airline that flies this flight. A flight that was never scheduled would silently be missing
/// from the sums, so it stops the projection instead.
fn count(views: &mut Views, flight_id: &str, change: impl FnOnce(&mut CarrierPerformance)) -> Result<()> {
    let Some(flight) = views.get::<FlightCarrier>(flight_id) else {
        bail!("flight `{flight_id}` was never scheduled");
    };
    let carrier = flight.carrier.clone();
    views.upsert::<CarrierPerformance>(&carrier, change)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registered() -> TestKit<carrier_performance> {
        let airline = json!({ "carrier": "UA", "name": "United Air Lines Inc." });
        TestKit::new(carrier_performance).given("fleet", "AirlineRegistered", airline)
    }

    #[test]
    fn an_airline_without_flights_has_a_row_of_zeros() {
        let name = Some("United Air Lines Inc.".to_owned());
        let zeros = CarrierPerformance { carrier: "UA".into(), name, ..Default::default() };
        assert_eq!(registered().rows::<CarrierPerformance>(), [zeros]);
    }

    #[test]
    fn flights_are_counted_for_the_airline_that_scheduled_them() {
        let kit = registered()
            .given("flights", "FlightScheduled", json!({ "flight_id": "f1", "carrier": "UA" }))
            .given("flights", "FlightScheduled", json!({ "flight_id": "f2", "carrier": "B6" }))
            .given("flights", "FlightScheduled", json!({ "flight_id": "f3", "carrier": "UA" }))
            .given("flights", "FlightDeparted", json!({ "flight_id": "f1", "dep_delay": -3 }))
            .given("flights", "FlightDeparted", json!({ "flight_id": "f2", "dep_delay": 20 }))
            .given("flights", "FlightCancelled", json!({ "flight_id": "f3" }))
            .given("flights", "FlightArrived", json!({ "flight_id": "f1", "arr_delay": 5 }))
            .given("flights", "FlightDiverted", json!({ "flight_id": "f2" }));
        let united = kit.row::<CarrierPerformance>("UA").unwrap();
        assert_eq!((united.scheduled, united.departed, united.cancelled, united.arrived), (2, 1, 1, 1));
        assert_eq!((united.dep_delay_sum, united.arr_delay_sum), (-3, 5));
        let jet_blue = kit.row::<CarrierPerformance>("B6").unwrap();
        assert_eq!((jet_blue.name, jet_blue.departed, jet_blue.diverted), (None, 1, 1));
        kit.assert_pure();
    }

    #[test]
    fn a_flight_that_was_never_scheduled_stops_the_projection() {
        let _ =
            registered().given_failing("flights", "FlightCancelled", json!({ "flight_id": "f9" }), "`f9` was never");
    }
}
