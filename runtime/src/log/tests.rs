//! The log against the plainest one that there can be: a vector.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::model::BatchColumn;

fn event(n: u64, source: &str, event_type: &str) -> NewEvent {
    NewEvent {
        source: source.into(),
        id: format!("id{n}"),
        stream: format!("stream{}", n % 7),
        version: n,
        event_type: event_type.into(),
        time: Time::from_microseconds((n * n % 1_000) as i64).expect("a time"),
        metadata: if n.is_multiple_of(3) { String::new() } else { format!("{{\"n\":{n}}}") },
        payload: vec![b'1'; (n % 50) as usize],
    }
}

fn manifest(subscriptions: &[(&str, &[&str])]) -> Manifest {
    let sources: Vec<_> =
        subscriptions.iter().map(|(source, types)| serde_json::json!({"source": source, "types": types})).collect();
    let json = serde_json::json!({
        "contract": crate::manifest::CONTRACT, "projection": "p", "version": 1, "sources": sources,
        "views": [{"name": "v", "columns": [{"name": "k", "type": "text"}], "key": ["k"]}],
    });
    Manifest::parse(&json.to_string()).unwrap()
}

/// What a projection reads from a position on, and to where that is complete.
fn read(log: &EventLog, manifest: &Manifest, begin: u64, set: ColumnSet) -> (Vec<Event>, u64) {
    let mut reading = log.reading(manifest, set);
    let (mut sources, mut types) = (Vec::new(), Vec::new());
    let mut events = Vec::new();
    let mut next = begin;
    loop {
        let (from, chunk) = reading.chunk(next).unwrap();
        assert!(from >= next);
        next = from;
        let Some(chunk) = chunk else { return (events, next) };
        reading.masks(&chunk, &mut sources, &mut types);
        for i in (next - chunk.first()) as usize..chunk.events().len() {
            let raw = chunk.events();
            if sources[usize::from(raw.source(i))] & types[usize::from(raw.event_type(i))] != 0 {
                // Another reader may have asked for more columns.
                events.push(only(&chunk.event(i), set));
            }
        }
        next = chunk.end();
    }
}

/// An event without the columns that are not in the set.
fn only(event: &Event, set: ColumnSet) -> Event {
    let Event { position, event: e } = event.clone();
    let has = |column| set.contains(column);
    let event = NewEvent {
        id: if has(BatchColumn::Ids) { e.id } else { String::new() },
        stream: if has(BatchColumn::Streams) { e.stream } else { String::new() },
        version: if has(BatchColumn::Versions) { e.version } else { 0 },
        metadata: if has(BatchColumn::Metadata) { e.metadata } else { String::new() },
        payload: if has(BatchColumn::Payloads) { e.payload } else { Vec::new() },
        ..e
    };
    Event { position, event }
}

/// Shows where two sequences part, not the thousands of events before.
fn same(found: &[Event], expected: &[Event]) -> Result<(), TestCaseError> {
    let parted = found.iter().zip(expected).position(|(found, expected)| found != expected);
    let at = parted.unwrap_or(found.len().min(expected.len()));
    prop_assert_eq!(found.get(at), expected.get(at), "event {} of {} and {}", at, found.len(), expected.len());
    Ok(())
}

#[derive(Clone, Debug)]
enum Step {
    /// Appends so many new events, and so many that are there already.
    Append(usize, usize),
    Seal(u64),
    Reopen,
    /// Appends through another handle on the same directory, as another process does.
    Elsewhere(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0_usize..40, 0_usize..5).prop_map(|(new, old)| Step::Append(new, old)),
        2 => (3_000_usize..9_000, 0_usize..500).prop_map(|(new, old)| Step::Append(new, old)),
        3 => (0_u64..3_000).prop_map(Step::Seal),
        1 => Just(Step::Reopen),
        2 => (1_usize..3_000).prop_map(Step::Elsewhere),
    ];
    proptest::collection::vec(step, 1..12)
}

const SOURCES: [&str; 4] = ["orders", "sensors/a", "sensors/b", "fleet"];
const TYPES: [&str; 5] = ["OrderPlaced", "OrderPaid", "Measured", "Moved", "Rare"];

fn made(n: u64) -> NewEvent {
    let event_type = if n.is_multiple_of(5_000) { "Rare" } else { TYPES[(n % 4) as usize] };
    event(n, SOURCES[(n / 3 % 4) as usize], event_type)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_appended_packed_and_reopened_reads_as_one_sequence(steps in steps(), begin in 0_u64..10_000) {
        let directory = tempfile::tempdir().unwrap();
        let mut log = EventLog::open(directory.path()).unwrap();
        let all = manifest(&[("*", &[])]);
        let some = manifest(&[("sensors/*", &["Mea*"]), ("orders", &["Rare"])]);
        let mut following = log.follow(&some, None).unwrap();
        let mut model: Vec<Event> = Vec::new();
        for step in steps {
            let appends = match step {
                Step::Append(new, old) => {
                    let known = model.len() as u64;
                    let mut events: Vec<_> = (known..known + new as u64).map(made).collect();
                    let again = (0..old as u64).filter(|_| known > 0).map(|n| made(n * 7919 % known));
                    events.extend(again);
                    Some((log.clone(), events))
                }
                Step::Elsewhere(new) => {
                    let known = model.len() as u64;
                    let other = EventLog::open(directory.path()).unwrap();
                    Some((other, (known..known + new as u64).map(made).collect()))
                }
                Step::Seal(keep) => {
                    log.seal(keep).unwrap();
                    None
                }
                Step::Reopen => {
                    drop(following);
                    drop(log);
                    log = EventLog::open(directory.path()).unwrap();
                    following = log.follow(&some, None).unwrap();
                    None
                }
            };
            if let Some((log, events)) = appends {
                let appended = log.append(&events[..]).unwrap();
                for (event, Appended { position, new }) in events.into_iter().zip(appended) {
                    if new {
                        prop_assert_eq!(position.0, model.len() as u64);
                        model.push(Event { position, event });
                    } else {
                        prop_assert_eq!(&model[position.0 as usize].event, &event);
                    }
                }
            }
        }
        let begin = begin.min(model.len() as u64);
        for set in [ColumnSet::ALL, ColumnSet::default(), ColumnSet::from_iter([BatchColumn::Ids])] {
            for wanted in [&all, &some] {
                let (events, end) = read(&log, wanted, begin, set);
                let expected = model[begin as usize..].iter();
                let expected = expected.filter(|e| wanted.wants(&e.event.source, &e.event.event_type));
                same(&events, &expected.map(|e| only(e, set)).collect::<Vec<_>>())?;
                prop_assert_eq!(end, model.len() as u64);
            }
        }
        let wanted = |e: &&Event| some.wants(&e.event.source, &e.event.event_type);
        prop_assert_eq!(log.count(&some, begin, u64::MAX >> 1).unwrap(),
            model[begin as usize..].iter().filter(wanted).count() as u64);
        // Appends elsewhere are noticed by and by; an append here tells of all of them.
        let last = made(model.len() as u64);
        let position = log.append([last.clone()]).unwrap()[0].position;
        model.push(Event { position, event: last });
        prop_assert_eq!(log.head_now().next, model.len() as u64);
        let behind = model.iter().filter(wanted).count() as u64;
        prop_assert_eq!(following.seen().behind().events, behind);
        following.took(behind, Some(position));
        prop_assert_eq!(following.seen().complete(), Some(position));
        for filter in [
            Filter { source: Some("sensors/*".into()), ..Filter::default() },
            Filter { stream: Some("stream3".into()), event_type: Some("Order*".into()), ..Filter::default() },
            Filter { id: Some(format!("id{}", model.len() / 2)), ..Filter::default() },
            Filter { since: Time::from_microseconds(900), until: Time::from_microseconds(950), ..Filter::default() },
        ] {
            let mut found = Vec::new();
            let mut next = Some(begin);
            while let Some(from) = next {
                next = log.events(&filter, from, 500, |event| found.push(event)).unwrap();
            }
            let glob = |glob: &Option<String>, name: &str| {
                glob.as_ref().is_none_or(|glob| globset::Glob::new(glob).unwrap().compile_matcher().is_match(name))
            };
            let expected = model[begin as usize..].iter().filter(|Event { event: e, .. }| {
                glob(&filter.source, &e.source) && glob(&filter.event_type, &e.event_type)
                    && filter.stream.as_ref().is_none_or(|s| *s == e.stream)
                    && filter.id.as_ref().is_none_or(|id| *id == e.id)
                    && filter.since.is_none_or(|since| e.time >= since)
                    && filter.until.is_none_or(|until| e.time < until)
            });
            same(&found, &expected.cloned().collect::<Vec<_>>())?;
        }
        let summary = log.summary().unwrap();
        prop_assert_eq!(summary.events, model.len() as u64);
    }
}

#[test]
fn positions_are_those_of_the_order_of_commits_whoever_appends() {
    let directory = tempfile::tempdir().unwrap();
    let log = EventLog::open(directory.path()).unwrap();
    let positions: Vec<(u64, u64)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16_u64)
            .map(|t| {
                let log = log.clone();
                scope.spawn(move || {
                    let mut done = Vec::new();
                    for n in 0..20 {
                        let n = t * 1_000 + n;
                        done.push((log.append([made(n)]).unwrap()[0].position.0, n));
                    }
                    done
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    let by_position: HashMap<_, _> = positions.iter().copied().collect();
    assert_eq!(by_position.len(), 320, "nobody got the same position");
    for position in 0..320 {
        let (found, _) = log.event(Position(position)).unwrap().unwrap();
        assert_eq!(found.event, made(by_position[&position]));
    }
    for (before, after) in (0..319).map(|p| (log.event(Position(p)), log.event(Position(p + 1)))) {
        assert!(before.unwrap().unwrap().1 <= after.unwrap().unwrap().1, "append times never go back");
    }
}

#[test]
fn an_append_wakes_only_those_who_want_it() {
    let directory = tempfile::tempdir().unwrap();
    let log = EventLog::open(directory.path()).unwrap();
    let mut orders = log.follow(&manifest(&[("orders", &[])]), None).unwrap();
    let mut sensors = log.follow(&manifest(&[("sensors/*", &[])]), None).unwrap();
    log.append([event(1, "sensors/new", "Measured")]).unwrap();
    assert!(!orders.has_changed() && sensors.has_changed());
    assert_eq!(orders.seen().complete(), Some(Position(0)), "at the head without having moved");
    assert_eq!(sensors.seen().complete(), None);
    assert_eq!(sensors.seen().behind().events, 1);
    sensors.took(1, Some(Position(0)));
    assert_eq!(sensors.seen().complete(), Some(Position(0)));
    log.append([event(2, "orders", "OrderPlaced")]).unwrap();
    assert_eq!(orders.seen().complete(), None, "what is wanted counts until it is committed");
    assert_eq!(sensors.seen().complete(), Some(Position(1)));
}

#[test]
fn a_source_that_another_process_has_packed_is_not_passed_over() {
    let directory = tempfile::tempdir().unwrap();
    let log = EventLog::open(directory.path()).unwrap();
    log.append([made(0)]).unwrap();
    let mut following = log.follow(&manifest(&[("new/*", &[])]), None).unwrap();
    let mut reading = log.reading(&manifest(&[("new/*", &[])]), ColumnSet::default());
    assert!(reading.chunk(0).unwrap().1.is_some_and(|chunk| chunk.end() == 1));
    let elsewhere = EventLog::open(directory.path()).unwrap();
    elsewhere.append((1..9_000).map(|n| event(n, "new/source", "New")).collect::<Vec<_>>()).unwrap();
    // One that is there hears of it by the next append, or by and by.
    log.append([event(9_000, "new/other", "Newer")]).unwrap();
    assert_eq!(following.seen().behind().events, 9_000);
    assert!(following.has_changed());
    let (events, end) = read(&log, &manifest(&[("new/*", &["New*"])]), 1, ColumnSet::default());
    assert_eq!((events.len(), end), (9_000, 9_001));
}

#[test]
fn what_is_committed_before_it_is_told_of_does_not_wait() {
    let directory = tempfile::tempdir().unwrap();
    let log = EventLog::open(directory.path()).unwrap();
    let elsewhere = EventLog::open(directory.path()).unwrap();
    elsewhere.append((0..10).map(|n| event(n, "orders", "T")).collect::<Vec<_>>()).unwrap();
    // Whoever reads the file may be further than this handle has looked.
    let following = log.follow(&manifest(&[("orders", &[])]), Some(Position(9))).unwrap();
    log.append([event(10, "orders", "T")]).unwrap();
    assert_eq!(following.seen().behind().events, 1);
    following.took(1, Some(Position(10)));
    assert_eq!((following.seen().behind().since, following.seen().complete()), (None, Some(Position(10))));
    log.append([event(11, "fleet", "T")]).unwrap();
    assert_eq!(following.seen().complete(), Some(Position(11)));
}

#[test]
fn a_row_that_is_missing_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let log = EventLog::open(directory.path()).unwrap();
    log.append((0..100).map(made).collect::<Vec<_>>()).unwrap();
    let file = rusqlite::Connection::open(directory.path().join("log.sqlite")).unwrap();
    file.execute("DELETE FROM events WHERE position = 50", []).unwrap();
    let mut reading = log.reading(&manifest(&[("*", &[])]), ColumnSet::ALL);
    assert_eq!(reading.chunk(0).unwrap().1.unwrap().end(), 50, "what comes before can be read");
    assert!(reading.chunk(50).err().expect("a gap").to_string().contains("events 50 to ? cannot be read"));
    let error = log.append((100..9_000).map(made).collect::<Vec<_>>()).unwrap_err().to_string();
    assert!(error.contains("events 50 to ?"), "{error}");
}

#[test]
fn a_damaged_block_is_named_and_everything_else_can_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let log = EventLog::open(directory.path()).unwrap();
    log.append((0..3 * 4_096).map(made).collect::<Vec<_>>()).unwrap();
    drop(log);
    let file = rusqlite::Connection::open(directory.path().join("log.sqlite")).unwrap();
    let sql = "UPDATE blocks SET payloads = zeroblob(length(payloads)) WHERE first = 4096";
    assert_eq!(file.execute(sql, []).unwrap(), 1);
    let log = EventLog::open(directory.path()).unwrap();
    let all = manifest(&[("*", &[])]);
    let mut reading = log.reading(&all, ColumnSet::ALL);
    assert!(reading.chunk(0).is_ok());
    let error = reading.chunk(4_096).err().expect("it is damaged").to_string();
    assert!(error.contains("events 4096 to 8191 cannot be read") && error.contains("restore"), "{error}");
    assert!(reading.chunk(8_192).is_ok());
    let types = log.reading(&all, ColumnSet::default()).chunk(4_096).unwrap();
    assert_eq!(types.1.unwrap().events().len(), 4_096, "who does not want payloads, does not miss them");
}

#[test]
fn a_damaged_index_is_made_anew() {
    let directory = tempfile::tempdir().unwrap();
    let log = EventLog::open(directory.path()).unwrap();
    log.append((0..3 * 4_096).map(made).collect::<Vec<_>>()).unwrap();
    drop(log);
    let file = rusqlite::Connection::open(directory.path().join("log.sqlite")).unwrap();
    assert!(file.execute("UPDATE id_level_0 SET page = zeroblob(length(page))", []).unwrap() > 0);
    let log = EventLog::open(directory.path()).unwrap();
    let again: Vec<_> = (0..3 * 4_096).step_by(100).map(made).collect();
    let appended = log.append(&again[..]).unwrap();
    assert!(appended.iter().zip((0..).step_by(100)).all(|(a, n)| !a.new && a.position == Position(n)));
    assert!(log.append([made(3 * 4_096)]).unwrap()[0].new);
}

#[test]
fn too_many_names_are_refused_and_nothing_of_them_is_appended() {
    let directory = tempfile::tempdir().unwrap();
    let log = EventLog::open(directory.path()).unwrap();
    log.append([made(0)]).unwrap();
    let file = rusqlite::Connection::open(directory.path().join("log.sqlite")).unwrap();
    let sql = "INSERT INTO sources VALUES (?, 'the last one')";
    file.execute(sql, [limits::LOG_NAMES as i64 - 1]).unwrap();
    let error = log.append([made(1), event(2, "one more", "T")]).unwrap_err().to_string();
    assert!(error.contains("\"one more\" is not appended: the log has 1000000 sources"), "{error}");
    assert_eq!(log.head_now().next, 1);
}
