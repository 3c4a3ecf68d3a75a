//! The log against the plainest one that there can be: a vector.

use std::collections::HashMap;
use std::time::Duration;

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
    let Event { position, event: e, forgotten } = event.clone();
    let has = |column| set.contains(column);
    let event = NewEvent {
        id: if has(BatchColumn::Ids) { e.id } else { String::new() },
        stream: if has(BatchColumn::Streams) { e.stream } else { String::new() },
        version: if has(BatchColumn::Versions) { e.version } else { 0 },
        metadata: if has(BatchColumn::Metadata) { e.metadata } else { String::new() },
        payload: if has(BatchColumn::Payloads) { e.payload } else { Vec::new() },
        ..e
    };
    Event { position, event, forgotten }
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
    /// Forgets a stream of a source; here or through another handle.
    Forget(usize, u64, bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0_usize..40, 0_usize..5).prop_map(|(new, old)| Step::Append(new, old)),
        2 => (3_000_usize..9_000, 0_usize..500).prop_map(|(new, old)| Step::Append(new, old)),
        3 => (0_u64..3_000).prop_map(Step::Seal),
        1 => Just(Step::Reopen),
        2 => (1_usize..3_000).prop_map(Step::Elsewhere),
        2 => (0_usize..4, 0_u64..7, any::<bool>()).prop_map(|(s, n, here)| Step::Forget(s, n, here)),
    ];
    proptest::collection::vec(step, 1..12)
}

const SOURCES: [&str; 4] = ["orders", "sensors/a", "sensors/b", "fleet"];
const TYPES: [&str; 5] = ["OrderPlaced", "OrderPaid", "Measured", "Moved", "Rare"];

fn made(n: u64) -> NewEvent {
    let event_type = if n.is_multiple_of(5_000) { "Rare" } else { TYPES[(n % 4) as usize] };
    event(n, SOURCES[(n / 3 % 4) as usize], event_type)
}

fn request(source: &str, stream: &str) -> Request {
    let (source, stream) = (source.to_owned(), Some(stream.to_owned()));
    Request { source, stream, by: "somebody".into(), ..Request::default() }
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
                Step::Forget(source, stream, here) => {
                    let (source, stream) = (SOURCES[source], format!("stream{stream}"));
                    let is = |e: &&mut Event| e.event.source == source && e.event.stream == stream;
                    let (mut events, mut left) = (0, false);
                    for event in model.iter_mut().filter(is) {
                        events += 1;
                        left |= !event.forgotten;
                        (event.event.metadata, event.event.payload) = Default::default();
                        event.forgotten = true;
                    }
                    if !left {
                        events = 0;
                    }
                    let other = EventLog::open(directory.path()).unwrap();
                    let done = if here { &log } else { &other }.forget(&request(source, &stream));
                    match done {
                        Ok(done) => prop_assert_eq!(done.map_or(0, |done| done.events), events),
                        Err(error) => prop_assert!(matches!(error, Error::Request { .. }) && events == 0, "{error}"),
                    }
                    // What another process did is noticed by and by; a look at the file sees it at once.
                    log.effect(&all, 0, None).unwrap();
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
                        model.push(Event { position, event, forgotten: false });
                    } else {
                        let Event { event: known, forgotten, .. } = &model[position.0 as usize];
                        prop_assert!(known.id == event.id && (*forgotten || *known == event));
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
        model.push(Event { position, event: last, forgotten: false });
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

/// Everything that is in the files of a log.
fn bytes(directory: &Path) -> Vec<u8> {
    std::fs::read_dir(directory).unwrap().flat_map(|entry| std::fs::read(entry.unwrap().path()).unwrap()).collect()
}

fn holds(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// An event whose payload can hardly be made smaller, so that a text stands in a block as it is.
fn secret(n: u64, stream: &str, text: &str) -> NewEvent {
    let mix = |z: u64| (z ^ (z >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let noise = (0..100 + n * n % 700).map(|i| (mix(mix(n << 32 | (i + 1))) >> 56) as u8);
    let payload = format!("{text}{n}.").into_bytes().into_iter().chain(noise).collect();
    NewEvent {
        stream: stream.into(),
        payload,
        metadata: format!("{{\"m\":\"{text}\"}}"),
        ..event(n, "people", "Moved")
    }
}

#[test]
fn what_is_forgotten_is_in_no_byte_of_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let log = EventLog::open(directory.path()).unwrap();
    let stream = |n: u64| if n.is_multiple_of(3) { "alice" } else { "bob" };
    let text = |n: u64| if n.is_multiple_of(3) { "wonderland" } else { "builder" };
    // Packed at once, packed from rows, and rows; with enough of them that nothing is compressed away.
    log.append((0..4_200).map(|n| secret(n, stream(n), text(n))).collect::<Vec<_>>()).unwrap();
    for n in 4_200..9_000 {
        log.append([secret(n, stream(n), text(n))]).unwrap();
    }
    log.seal(500).unwrap();
    let packed = rusqlite::Connection::open(directory.path().join("log.sqlite")).unwrap();
    let packed = packed.query_row("SELECT payloads FROM blocks WHERE first = 0", [], |r| r.get::<_, Vec<u8>>(0));
    assert!(holds(&packed.unwrap(), "wonderland"), "it could not be found in a block");
    let reader = EventLog::open(directory.path()).unwrap();
    let done = log.forget(&request("people", "alice")).unwrap().expect("there are some");
    assert_eq!((done.number, done.events, &*done.by), (1, 3_000, "somebody"));
    assert!(done.ended.is_some() && done.stream.as_deref() == Some("alice"));
    let left = bytes(directory.path());
    assert!(!holds(&left, "wonderland") && holds(&left, "builder8999."), "rows, blocks, free pages, write-ahead log");
    // Nothing is shifted, and who sends it again appends nothing.
    for n in [0, 1, 4_201, 4_203, 8_997, 8_998] {
        let (found, _) = reader.event(Position(n)).unwrap().unwrap();
        assert_eq!((found.forgotten, &*found.event.stream), (n % 3 == 0, stream(n)));
        assert_eq!(found.event.payload.is_empty() && found.event.metadata.is_empty(), n % 3 == 0);
        assert_eq!(
            log.append([secret(n, stream(n), text(n))]).unwrap()[0],
            Appended { position: Position(n), new: false }
        );
    }
    assert!(!holds(&bytes(directory.path()), "wonderland"));
    assert!(log.forget(&request("people", "alice")).unwrap().is_none(), "there is nothing left to be forgotten");
    // One event, and the name of a stream.
    let one = Request { id: Some("id4204".into()), stream: None, ..request("people", "") };
    assert_eq!(log.forget(&one).unwrap().unwrap().events, 1);
    let names = Request { names: true, ..request("people", "bob") };
    let done = log.forget(&names).unwrap().unwrap();
    assert_eq!((done.number, done.events, done.stream), (3, 6_000, None));
    assert!(!holds(&bytes(directory.path()), "bob") && !holds(&bytes(directory.path()), "builder"));
    assert!(log.forgettings(10).unwrap().iter().map(|f| f.number).eq([3, 2, 1]));
}

#[test]
fn what_cannot_be_forgotten_so_is_said_and_nothing_is_changed() {
    let directory = tempfile::tempdir().unwrap();
    let log = EventLog::open(directory.path()).unwrap();
    log.append([NewEvent { id: "alice/1".into(), stream: "alice".into(), ..made(0) }]).unwrap();
    let refusal = |request: &Request| match log.forget(request) {
        Err(Error::Request { reason }) => reason,
        other => panic!("{other:?}"),
    };
    let names = Request { names: true, ..request("orders", "alice") };
    assert!(refusal(&names).contains("the id \"alice/1\" has the name of the stream in it"));
    assert!(refusal(&request("nobody", "alice")).contains("the log has no source \"nobody\""));
    assert!(refusal(&Request { stream: None, ..request("orders", "") }).contains("neither a stream nor an id"));
    assert!(refusal(&request("orders", "")).contains("the stream or the id is empty"));
    let long = Request { reason: Some("x".repeat(2_000)), ..request("orders", "alice") };
    assert!(refusal(&long).contains("the reason has 2000 bytes; the limit is 1024"));
    assert!(log.forget(&request("orders", "bob")).unwrap().is_none());
    std::fs::write(directory.path().join("log.former.sqlite"), "").unwrap();
    assert!(refusal(&request("orders", "alice")).contains("delete it, then forget"));
    assert_eq!((*log.epoch().borrow(), log.forgettings(1).unwrap().len()), (0, 0));
}

#[test]
fn rows_are_told_what_a_forgetting_means_for_them() {
    let directory = tempfile::tempdir().unwrap();
    let log = EventLog::open(directory.path()).unwrap();
    log.append((0..9_000).map(made).collect::<Vec<_>>()).unwrap();
    let orders = manifest(&[("orders", &["OrderPaid"])]);
    let fleet = manifest(&[("fleet", &[])]);
    // Number 24 is the first of this source and stream of this type.
    let first =
        (0..).map(made).position(|e| e.source == "orders" && e.stream == "stream4" && e.event_type == "OrderPaid");
    let first = Position(first.unwrap() as u64);
    let before = Position(first.0 - 1);
    assert_eq!(log.effect(&orders, 0, Some(first)).unwrap(), Effect::default());
    log.forget(&request("orders", "stream4")).unwrap().unwrap();
    let effect = |manifest, since, checkpoint| log.effect(manifest, since, checkpoint).unwrap();
    let clean = Effect { epoch: 2, ..Effect::default() };
    assert_eq!(effect(&orders, 0, Some(first)), Effect { forgotten: Some(1), ..clean });
    assert_eq!((effect(&orders, 0, Some(before)), effect(&orders, 0, None)), (clean.clone(), clean.clone()));
    assert_eq!((effect(&fleet, 0, Some(Position(8_999))), effect(&orders, 2, Some(first))), (clean.clone(), clean));
    // By retention nothing is wrong with what was read before; what is read later lacks something.
    let none = Some(Duration::ZERO);
    let rules = [("ord*".to_owned(), none), ("*".to_owned(), None)];
    let done = log.retain(&rules).unwrap().expect("there is something");
    assert_eq!(
        (done.number, &*done.by, &*done.source, done.before > Some(Time::EPOCH)),
        (2, "retention", "ord*", true)
    );
    let last = (0..9_000).filter(|n| made(*n).source == "orders" && made(*n).event_type == "OrderPaid").max().unwrap();
    let thin = Effect { epoch: 4, forgotten: None, complete_from: Some(Position(last + 1)) };
    assert_eq!(effect(&orders, 2, Some(Position(last))), Effect { epoch: 4, ..Effect::default() });
    assert_eq!((effect(&orders, 2, Some(Position(last - 1))), effect(&orders, 2, None)), (thin.clone(), thin));
    assert_eq!(effect(&fleet, 2, None), Effect { epoch: 4, ..Effect::default() });
    assert!(log.retain(&rules).unwrap().is_none(), "there is nothing left to be given up");
    // A source's own rule goes before a glob.
    let own = [("fl*".to_owned(), none), ("fleet".to_owned(), None)];
    assert!(log.retain(&own).unwrap().is_none());
    // Somebody may have taken the content before it was given up, so a person's request is about it all the same.
    let done = log.forget(&request("orders", "stream0")).unwrap().expect("views may have it");
    assert_eq!(done.number, 3);
    assert_eq!(effect(&orders, 4, Some(Position(8_999))).forgotten, Some(3));
    assert!(log.forget(&request("orders", "stream0")).unwrap().is_none(), "everybody has been told");
    assert!(log.event(Position(0)).unwrap().unwrap().0.forgotten);
}

#[test]
fn a_log_from_before_forgetting_is_opened_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    drop(EventLog::open(directory.path()).unwrap());
    let file = rusqlite::Connection::open(directory.path().join("log.sqlite")).unwrap();
    let former = "ALTER TABLE events DROP COLUMN forgotten; DROP TABLE forgettings; PRAGMA user_version = 2;
                  INSERT INTO sources VALUES (0, 'orders'); INSERT INTO types VALUES (0, 'T');
                  INSERT INTO events VALUES (0, 1, 2, 0, 0, 3, 's', 'i', '', x'31');";
    file.execute_batch(former).unwrap();
    let log = EventLog::open(directory.path()).unwrap();
    let (event, _) = log.event(Position(0)).unwrap().unwrap();
    assert_eq!((event.forgotten, &*event.event.payload, &*event.event.id), (false, &b"1"[..], "i"));
    assert_eq!(log.forget(&request("orders", "s")).unwrap().unwrap().events, 1);
    assert!(log.event(Position(0)).unwrap().unwrap().0.forgotten);
}

#[test]
fn damage_is_passed_over_only_where_somebody_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let log = EventLog::open(directory.path()).unwrap();
    log.append((0..4 * 4_096).map(made).collect::<Vec<_>>()).unwrap();
    log.append([made(4 * 4_096)]).unwrap();
    drop(log);
    let file = rusqlite::Connection::open(directory.path().join("log.sqlite")).unwrap();
    for (column, first) in [("payloads", 4_096), ("header", 8_192)] {
        let sql = format!("UPDATE blocks SET {column} = zeroblob(length({column})) WHERE first = ?");
        assert_eq!(file.execute(&sql, [first]).unwrap(), 1);
    }
    let error = EventLog::open(directory.path()).err().expect("it is damaged").to_string();
    assert!(error.contains("events 8192 to 12287 cannot be read"), "{error}");
    let log = EventLog::open_past_damage(directory.path()).unwrap();
    let all = manifest(&[("*", &[])]);
    let mut reading = log.reading(&all, ColumnSet::ALL);
    assert!(reading.chunk(0).is_ok());
    for (first, last, wanted) in [(4_096, 8_191, 4_096), (8_192, 12_287, 0)] {
        match reading.chunk(first) {
            Err(Error::Damaged { first: f, last: Some(l), .. }) => assert_eq!((f.0, l.0), (first, last)),
            other => panic!("{:?}", other.map(|(begin, _)| begin)),
        }
        assert_eq!(reading.passes_over(first, last + 1).unwrap(), Some(wanted));
    }
    assert!(reading.chunk(12_288).is_ok());
    // What waits and what is passed over agree, so that somebody who has passed over it is at the head.
    let behind = log.follow(&all, None).unwrap().seen().behind().events;
    assert_eq!(behind, 3 * 4_096 + 1);
    assert!(!log.append([made(4_100), made(8_200)]).unwrap().iter().any(|a| a.new), "ids of damaged blocks are known");
}
