//! Real events, with answers that were computed by other means: see `tests/data/README.md`.

use crate::support::{World, module, root};

/// The last of all events.
const POSITION: &str = "42627";

const MODULES: [&str; 3] = ["carrier-performance", "flight-board", "event-counts"];

fn data(file: &str) -> String {
    root().join("tests/data/flights").join(file).to_str().unwrap().to_owned()
}

fn append_all(world: &World, options: &[&str]) {
    let files = ["fleet", "flights", "weather"].map(|source| data(&format!("{source}.jsonl.zst")));
    world.ok(&[&["append"], options, &files.each_ref().map(String::as_str)].concat());
}

/// The rows of CSV without its header. Numbers are compared as numbers: 1e-05 is 0.00001.
fn parse(csv: &[u8]) -> Vec<Vec<String>> {
    let number = |field: &str| match field.parse::<f64>() {
        Ok(number) if field.contains('.') => number.to_string(),
        _ => field.to_owned(),
    };
    let mut reader = csv::Reader::from_reader(csv);
    reader.records().map(|record| record.unwrap().iter().map(number).collect()).collect()
}

fn wait_complete(world: &World) {
    for view in ["carrier_performance", "flight_board", "event_counts"] {
        let headers = [("shadowbox-position", POSITION), ("prefer", "wait=60")];
        let answer = world.get_with(&format!("/views/{view}?limit=1"), &headers);
        assert_eq!(answer.status, 200, "{}\n{}", answer.body, world.log());
        assert_eq!(answer.header("shadowbox-position"), POSITION);
    }
}

fn assert_as_expected(world: &World) {
    let carriers = world.query("select * from carrier_performance order by carrier");
    let expected = std::fs::read(data("expected/carrier_performance.csv")).unwrap();
    assert_eq!(parse(carriers.as_bytes()), parse(&expected));

    // As tests/data/README.md counts them.
    let counts = world.query("select source, event_type, events from event_counts order by source, events, event_type");
    let expected = "fleet,AirlineRegistered,16
fleet,AirportRegistered,1458
fleet,AircraftRegistered,3322
flights,FlightDiverted,39
flights,FlightCancelled,82
flights,FlightArrived,11764
flights,FlightDeparted,11991
flights,FlightScheduled,12969
weather,WeatherObserved,987";
    assert_eq!(counts.lines().skip(1).collect::<Vec<_>>(), expected.lines().collect::<Vec<_>>());
    // Flights are scheduled in the order of time, beginning a day before the year does.
    let span = world.query("select first_at, last_at from event_counts where event_type = 'FlightScheduled'");
    assert!(span.lines().nth(1).unwrap().starts_with("2012-12-31T10:15:00"), "{span}");

    let board = world.query(
        "select flight_id, carrier, airline, flight, tailnum, aircraft, origin, dest, status, departs_at, dep_delay,
         arr_delay, wind_speed, visibility, precipitation from flight_board order by flight_id",
    );
    let expected = zstd::decode_all(&*std::fs::read(data("expected/flight_board.csv.zst")).unwrap()).unwrap();
    let (board, expected) = (parse(board.as_bytes()), parse(&expected));
    assert_eq!(board.len(), expected.len());
    for (ours, theirs) in board.iter().zip(&expected) {
        assert_eq!(ours, theirs);
    }
}

#[test]
fn the_tables_are_right_early_and_after_a_rebuild() {
    // The modules are there first, and the events come in the order of the files, not of time.
    let world = World::running(&MODULES);
    append_all(&world, &["--in-file-order"]);
    wait_complete(&world);
    assert_as_expected(&world);
    for name in MODULES {
        world.ok(&["rebuild", name, "--wait"]);
        assert_eq!(world.projection(name)["generation"], 2);
    }
    assert_as_expected(&world);
}

#[test]
fn the_tables_are_right_when_the_modules_come_late() {
    let mut world = World::new();
    append_all(&world, &[]);
    world.start();
    for name in MODULES {
        world.drop_module(name, &module(name));
        world.wait_live(name);
    }
    wait_complete(&world);
    assert_as_expected(&world);
}
