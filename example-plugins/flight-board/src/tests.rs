use proptest::prelude::*;

use super::*;

fn scheduled(flight_id: &str, hour: u8) -> TestEvent {
    let data = json!({
        "flight_id": flight_id, "carrier": "UA", "flight": 1545, "tailnum": "N14228", "origin": "EWR", "dest": "IAH",
        "departs_at": format!("2013-01-01T{hour:02}:15:00Z"), "distance": 1400,
    });
    TestEvent::new("flights", "FlightScheduled", data)
}

fn departed(flight_id: &str) -> TestEvent {
    TestEvent::new("flights", "FlightDeparted", json!({ "flight_id": flight_id, "dep_delay": 2 }))
}

fn arrived(flight_id: &str) -> TestEvent {
    TestEvent::new("flights", "FlightArrived", json!({ "flight_id": flight_id, "arr_delay": 11 }))
}

fn airline(name: &str) -> TestEvent {
    TestEvent::new("fleet", "AirlineRegistered", json!({ "carrier": "UA", "name": name }))
}

fn aircraft() -> TestEvent {
    TestEvent::new("fleet", "AircraftRegistered", json!({ "tailnum": "N14228", "model": "737-824" }))
}

fn weather(hour: u8, wind: f64) -> TestEvent {
    let data = json!({
        "airport": "EWR", "observed_at": format!("2013-01-01T{hour:02}:00:00Z"), "temp": 39.02,
        "wind_speed": wind, "precip": 0, "visib": 10,
    });
    TestEvent::new("weather", "WeatherObserved", data)
}

#[test]
fn in_the_usual_order_an_event_of_a_flight_writes_one_row() {
    let kit = TestKit::new(flight_board)
        .given_all([airline("United Air Lines Inc.")])
        .given_all([aircraft()])
        .given_all([weather(10, 10.5)])
        .given_all([scheduled("f1", 10)])
        .given_all([departed("f1")])
        .given_all([arrived("f1")]);
    let expected = Flight {
        flight_id: "f1".into(),
        carrier: "UA".into(),
        airline: Some("United Air Lines Inc.".into()),
        flight: 1545,
        tailnum: Some("N14228".into()),
        aircraft: Some("737-824".into()),
        origin: "EWR".into(),
        dest: "IAH".into(),
        status: Status::Arrived,
        departs_at: "2013-01-01T10:15:00Z".parse().unwrap(),
        dep_delay: Some(2),
        arr_delay: Some(11),
        wind_speed: Some(10.5),
        visibility: Some(10.0),
        precipitation: Some(0.0),
    };
    assert_eq!(kit.rows::<Flight>(), [expected]);
    assert_eq!(kit.changes(), 6);
}

#[test]
fn a_fact_that_comes_last_costs_a_few_rows_a_flight_and_leaves_no_notes() {
    // More than one chunk.
    const FLIGHTS: u64 = 2_500;
    let ids: Vec<String> = (0..FLIGHTS).map(|n| format!("f{n}")).collect();
    let kit = TestKit::new(flight_board)
        .given_all(ids.iter().map(|id| scheduled(id, 10)))
        .given_all([aircraft()])
        .given_all([airline("United Air Lines Inc.")])
        .given_all([weather(10, 10.5)]);
    assert_eq!(kit.rows::<Waiting>().len(), 0);
    let whole = |flight: &Flight| flight.airline.is_some() && flight.aircraft.is_some() && flight.wind_speed.is_some();
    assert!(kit.rows::<Flight>().iter().all(whole));
    // A board row and three notes a flight; then for each fact a board row and a note less.
    assert!(kit.changes() <= 10 * FLIGHTS + 10, "{} changes", kit.changes());
}

#[test]
fn the_first_registration_counts() {
    let kit = TestKit::new(flight_board)
        .given_all([airline("United Air Lines Inc.")])
        .given_all([airline("Continental")])
        .given_all([scheduled("f1", 10)]);
    assert_eq!(kit.row::<Flight>("f1").unwrap().airline.as_deref(), Some("United Air Lines Inc."));
}

#[test]
fn a_flight_shows_its_weather_whichever_comes_first() {
    for events in [[weather(10, 10.5), scheduled("f1", 10)], [scheduled("f1", 10), weather(10, 10.5)]] {
        let kit = TestKit::new(flight_board).given_all(events).given_all([weather(11, 30.0)]);
        assert_eq!(kit.row::<Flight>("f1").unwrap().wind_speed, Some(10.5));
    }
}

#[test]
fn a_flight_that_was_never_scheduled_stops_the_projection() {
    for event_type in ["FlightCancelled", "FlightDiverted"] {
        let data = json!({ "flight_id": "f9" });
        let _ = TestKit::new(flight_board).given_failing("flights", event_type, data, "`f9` was never scheduled");
    }
}

/// The events of each service, in its own order.
fn services() -> impl Strategy<Value = [Vec<TestEvent>; 3]> {
    let flights = prop::collection::vec((9_u8..12, 0_usize..4), 0..6).prop_map(|flights| {
        // All are scheduled first, as in the real log.
        let ids = (0..).map(|n| format!("f{n}"));
        let (mut events, mut later) = (Vec::new(), Vec::new());
        for ((hour, fate), id) in flights.into_iter().zip(ids) {
            events.push(scheduled(&id, hour));
            let end = |event_type| TestEvent::new("flights", event_type, json!({ "flight_id": id }));
            match fate {
                0 => {}
                1 => later.push(end("FlightCancelled")),
                2 => later.extend([departed(&id), end("FlightDiverted")]),
                _ => later.extend([departed(&id), arrived(&id)]),
            }
        }
        events.append(&mut later);
        events
    });
    let fleet = (prop::collection::vec("[A-C]", 0..3), any::<bool>()).prop_map(|(names, with_aircraft)| {
        let mut events: Vec<_> = names.iter().map(|name| airline(name)).collect();
        events.extend(with_aircraft.then(aircraft));
        events
    });
    let weather = prop::collection::vec((9_u8..12, 0_u8..50), 0..5)
        .prop_map(|hours| hours.into_iter().map(|(hour, wind)| weather(hour, wind.into())).collect());
    (flights, fleet, weather).prop_map(|(flights, fleet, weather)| [flights, fleet, weather])
}

proptest! {
    #[test]
    fn any_interleaving_of_the_services_gives_the_same_rows(
        services in services(),
        choices in prop::collection::vec((0_usize..3, 1_usize..5), 0..20),
    ) {
        let one_after_the_other = TestKit::new(flight_board).given_all(services.iter().flatten().cloned());

        let mut queues = services.map(Vec::into_iter);
        let mut mixed = TestKit::new(flight_board);
        for (service, count) in choices {
            mixed = mixed.given_all(queues[service].by_ref().take(count));
        }
        mixed = mixed.given_all(queues.into_iter().rev().flatten());

        prop_assert_eq!(mixed.rows::<Flight>(), one_after_the_other.rows::<Flight>());
        prop_assert_eq!(mixed.rows::<Fact>(), one_after_the_other.rows::<Fact>());
        prop_assert_eq!(mixed.rows::<Waiting>(), one_after_the_other.rows::<Waiting>());
        mixed.assert_pure();
    }
}
