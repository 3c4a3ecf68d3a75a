//! What is in the log: for each source and event type how many events there are, and when the first and the last of them
//! happened.
//!
//! It shows a projection over events that it knows nothing of. Its subscription is a glob for sources and one for types,
//! so that both count which did not exist when this was written; and a variant without a payload's type says that the payload is not looked at, so
//! that it may be anything, JSON or not, and costs nothing. All there is to know then is in the [`Event`] itself.

use shadowbox_plugin::prelude::*;

/// Every event of every source. `source = "sensors/*"` would be those of the sources whose names begin so.
#[derive(Events)]
enum Anything {
    #[event("*", source = "*")]
    Happened,
}

/// An event type of a source. `first_at` and `last_at` are in the order of the log, whatever their clocks said.
#[derive(View, Default, Debug, PartialEq)]
#[view(name = "event_counts")]
struct EventCount {
    #[view(key)]
    source: String,
    #[view(key)]
    event_type: String,
    events: i64,
    first_at: Timestamp,
    last_at: Timestamp,
}

#[projection(name = "event-counts", version = 1, views(EventCount))]
fn event_counts(event: Event<Anything>, views: &mut Views) -> Result<()> {
    let Anything::Happened = event.data;
    views.upsert::<EventCount>((event.source, event.event_type), |row| {
        if row.events == 0 {
            row.first_at = event.time;
        }
        row.events += 1;
        row.last_at = event.time;
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_knew_counts_too_by_source_and_type() {
        let kit = TestKit::new(event_counts)
            .given("flights", "FlightDeparted", json!({}))
            .given("flights", "FlightInvented", json!("not what anybody expects"))
            .given("flights", "FlightDeparted", json!(null))
            .given("sensors/7", "FlightDeparted", json!({}));
        let counts: Vec<_> = kit.rows::<EventCount>().into_iter().map(|r| (r.source, r.event_type, r.events)).collect();
        let expected =
            [("flights", "FlightDeparted", 2), ("flights", "FlightInvented", 1), ("sensors/7", "FlightDeparted", 1)];
        assert_eq!(counts, expected.map(|(source, event_type, n)| (source.to_owned(), event_type.to_owned(), n)));
        kit.assert_pure();
    }

    #[test]
    fn the_first_and_the_last_are_told_by_the_log() {
        let kit = TestKit::new(event_counts);
        let kit = kit.given("fleet", "AirlineRegistered", json!({})).given("fleet", "AirlineRegistered", json!({}));
        let row = kit.row::<EventCount>(("fleet", "AirlineRegistered")).unwrap();
        assert!(row.first_at < row.last_at);
    }
}
