//! Property tests: what is written reads back, and rows follow a plain model whatever the cache and the batches do.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::{encode, saved};
use crate::cache::Limits;
use crate::column::{ColumnType, value};
use crate::prelude::*;
use crate::view::decode;
use crate::wire::Batch;

#[derive(TextEnum, Clone, Copy, Debug, Default, PartialEq)]
enum Status {
    #[default]
    Open,
    AwaitingPayment,
    #[text("")]
    Empty,
}

/// A row with a column of every type.
#[derive(View, Clone, Debug, Default, PartialEq)]
#[view(name = "everything", index(note), index(n, flag))]
struct Everything {
    note: Option<String>,
    #[view(key)]
    id: String,
    #[view(key)]
    n: i64,
    #[view(key)]
    flag: bool,
    #[view(key)]
    raw: Vec<u8>,
    #[view(key)]
    at: Timestamp,
    #[view(key)]
    status: Status,
    i32: i32,
    i16: Option<i16>,
    u32: u32,
    u16: u16,
    u8: u8,
    f64: f64,
    f32: Option<f32>,
    later: Option<Timestamp>,
    states: Option<Status>,
    json: serde_json::Value,
    list: Json<Vec<String>>,
    bytes: Option<Vec<u8>>,
}

prop_compose! {
    fn everything()(
        keys in (any::<String>(), edgy_int(), any::<bool>(), any::<Vec<u8>>(), edgy_int(), status()),
        ints in (any::<i32>(), any::<Option<i16>>(), any::<u32>(), any::<u16>(), any::<u8>()),
        reals in (prop::num::f64::NORMAL | prop::num::f64::ZERO, prop::option::of(prop::num::f32::NORMAL)),
        others in (any::<Option<String>>(), any::<Option<i64>>(), prop::option::of(status()), any::<Option<Vec<u8>>>()),
        list in prop::collection::vec(any::<String>(), 0..3),
    ) -> Everything {
        let (id, n, flag, raw, at, status) = keys;
        let (i32, i16, u32, u16, u8) = ints;
        let (f64, f32) = reals;
        let (note, later, states, bytes) = others;
        let json = json!({ "list": list, "n": n });
        let (at, later) = (Timestamp::from_micros(at), later.map(Timestamp::from_micros));
        Everything {
            note, id, n, flag, raw, at, status, i32, i16, u32, u16, u8, f64, f32, later, states, json,
            list: Json(list), bytes,
        }
    }
}

/// Integers around every change of length.
fn edgy_int() -> impl Strategy<Value = i64> {
    prop_oneof![
        any::<i64>(),
        (0_u32..63, -2_i64..=2, any::<bool>()).prop_map(|(bits, off, negative)| {
            let n = (1_i64 << bits).wrapping_add(off);
            if negative { n.wrapping_neg() } else { n }
        }),
    ]
}

fn status() -> impl Strategy<Value = Status> {
    prop::sample::select(vec![Status::Open, Status::AwaitingPayment, Status::Empty])
}

fn encoded(row: &Everything) -> (Vec<u8>, Vec<u8>) {
    let (mut key, mut values) = (Vec::new(), Vec::new());
    Everything::encode_key(row.key(), &mut key);
    row.encode_row(&mut values).unwrap();
    (key, values)
}

/// Reads one value as the host would: by the manifest alone, and only in its shortest form.
fn host_reads(input: &mut &[u8], column: ColumnType, nullable: bool) {
    if nullable && input.first() == Some(&0xc0) {
        *input = &input[1..];
        return;
    }
    let before = *input;
    let mut again = Vec::new();
    match column {
        ColumnType::Text | ColumnType::Json | ColumnType::Decimal => {
            value::write_str(&mut again, value::read_str(input).unwrap());
        }
        ColumnType::Integer | ColumnType::Timestamp => value::write_int(&mut again, value::read_int(input).unwrap()),
        ColumnType::Bytes | ColumnType::Uuid => value::write_bin(&mut again, value::read_bin(input).unwrap()),
        ColumnType::Real => {
            let real = rmp::decode::read_f64(input).unwrap();
            assert!(real.is_finite());
            rmp::encode::write_f64(&mut again, real).unwrap();
        }
        ColumnType::Boolean => rmp::encode::write_bool(&mut again, rmp::decode::read_bool(input).unwrap()).unwrap(),
    }
    assert_eq!(again, before[..before.len() - input.len()], "the shortest form");
}

proptest! {
    #[test]
    fn a_row_reads_back_as_it_was_written(row in everything()) {
        let (key, values) = encoded(&row);
        prop_assert_eq!(decode::<Everything>(&key, &values).unwrap(), row);
    }

    #[test]
    fn the_host_reads_a_row_by_its_schema(row in everything()) {
        let (key, values) = encoded(&row);
        let (mut key, mut values) = (key.as_slice(), values.as_slice());
        for column in Everything::SCHEMA.columns {
            let part = if Everything::SCHEMA.key.contains(&column.name) { &mut key } else { &mut values };
            host_reads(part, column.column_type, column.nullable);
        }
        prop_assert!(key.is_empty() && values.is_empty());
    }

    #[test]
    fn no_bytes_make_reading_a_row_panic(row in everything(), cut in any::<prop::sample::Index>(), byte: u8) {
        let (key, mut values) = encoded(&row);
        let cut = cut.index(values.len());
        values[cut] = byte;
        let _ = decode::<Everything>(&key, &values);
        prop_assert!(decode::<Everything>(&key, &values[..cut]).is_err());
    }
}

proptest! {
    #[test]
    fn values_are_written_as_a_library_does(n in edgy_int(), len in prop_oneof![0_usize..300, 65_530_usize..65_540]) {
        let text = "x".repeat(len);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        value::write_int(&mut ours, n);
        value::write_str(&mut ours, &text);
        value::write_bin(&mut ours, text.as_bytes());
        rmp::encode::write_sint(&mut theirs, n).unwrap();
        rmp::encode::write_str(&mut theirs, &text).unwrap();
        rmp::encode::write_bin(&mut theirs, text.as_bytes()).unwrap();
        prop_assert_eq!(ours, theirs);
    }
}

/// What a test event does to the view `cells`.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Op {
    Put(u8, i64),
    Upsert(u8, i64),
    Update(u8, i64),
    Delete(u8),
    /// Makes a read visible: the value of the first cell goes into the second.
    Copy(u8, u8),
    Load(Vec<u8>),
    /// Changes the cell, and refuses the event then.
    Fail(u8),
}

#[derive(Events)]
#[events(source = "test")]
enum TestEvents {
    #[event("Op")]
    Op(Op),
}

#[derive(View, Clone, Debug, Default, PartialEq)]
#[view(name = "cells")]
struct Cell {
    #[view(key)]
    row: String,
    #[view(key)]
    column: i64,
    value: i64,
}

/// Cells 0 to 8 of a board, three a row.
fn at(cell: u8) -> (&'static str, i64) {
    (["a", "b", "c"][usize::from(cell / 3 % 3)], i64::from(cell % 3))
}

#[projection(name = "cells", version = 1, views(Cell))]
fn cells(event: Event<TestEvents>, views: &mut Views) -> Result<()> {
    let TestEvents::Op(op) = event.data;
    match op {
        Op::Put(cell, value) => views.put(Cell { row: at(cell).0.into(), column: at(cell).1, value }),
        Op::Upsert(cell, value) => views.upsert::<Cell>(at(cell), |cell| cell.value += value),
        Op::Update(cell, value) => {
            let _ = views.update::<Cell>(at(cell), |cell| cell.value += value);
            Ok(())
        }
        Op::Delete(cell) => views.delete::<Cell>(at(cell)),
        Op::Copy(from, to) => match views.get::<Cell>(at(from)).map(|cell| cell.value) {
            Some(value) => views.upsert::<Cell>(at(to), |cell| cell.value = value),
            None => Ok(()),
        },
        Op::Load(cells) => {
            views.load::<Cell>(cells.iter().map(|cell| at(*cell)));
            Ok(())
        }
        Op::Fail(cell) => {
            views.upsert::<Cell>(at(cell), |cell| cell.value = -1)?;
            bail!("told to")
        }
    }
}

type Model = BTreeMap<(&'static str, i64), i64>;

/// The same as `cells`, on a plain map. False: the event fails.
fn apply_to_model(model: &mut Model, op: &Op) -> bool {
    match op {
        Op::Put(cell, value) => {
            model.insert(at(*cell), *value);
        }
        Op::Upsert(cell, value) => *model.entry(at(*cell)).or_default() += value,
        Op::Update(cell, value) => {
            model.entry(at(*cell)).and_modify(|old| *old += value);
        }
        Op::Delete(cell) => {
            model.remove(&at(*cell));
        }
        Op::Copy(from, to) => {
            if let Some(value) = model.get(&at(*from)).copied() {
                model.insert(at(*to), value);
            }
        }
        Op::Load(_) => {}
        Op::Fail(_) => return false,
    }
    true
}

fn op() -> impl Strategy<Value = Op> {
    let value = -100_i64..100;
    prop_oneof![
        4 => (0_u8..9, value.clone()).prop_map(|(cell, value)| Op::Put(cell, value)),
        4 => (0_u8..9, value.clone()).prop_map(|(cell, value)| Op::Upsert(cell, value)),
        4 => (0_u8..9, value).prop_map(|(cell, value)| Op::Update(cell, value)),
        4 => (0_u8..9).prop_map(Op::Delete),
        4 => (0_u8..9, 0_u8..9).prop_map(|(from, to)| Op::Copy(from, to)),
        2 => prop::collection::vec(0_u8..9, 0..6).prop_map(Op::Load),
        1 => (0_u8..9).prop_map(Op::Fail),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn rows_follow_a_plain_map(
        batches in prop::collection::vec((prop::collection::vec(op(), 1..8), any::<bool>()), 1..20),
        cache in 0_usize..6,
    ) {
        let mut kit = TestKit::new(cells);
        kit.limits = Limits { rows: cache, bytes: usize::MAX };
        let mut model = Model::new();
        for (batch, drop_first) in batches {
            if drop_first {
                kit.instance = None;
            }
            let mut after = model.clone();
            let succeeds = batch.iter().all(|op| apply_to_model(&mut after, op));
            let done = kit.try_given(batch.iter().map(|op| TestEvent::new("test", "Op", op)));
            prop_assert_eq!(done.is_ok(), succeeds);
            if succeeds {
                model = after;
            }
            let rows = kit.rows::<Cell>().into_iter().map(|cell| (cell.row, cell.column, cell.value));
            let expected = model.iter().map(|((row, column), value)| ((*row).to_owned(), *column, *value));
            prop_assert!(rows.eq(expected));
        }
        kit.assert_pure();
    }

    #[test]
    fn no_bytes_make_reading_a_batch_panic(
        ops in prop::collection::vec(op(), 1..4),
        forgotten: bool,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = encode(
            &(0..).zip(&ops).map(|(i, op)| TestEvent::new("test", "Op", op).deliver(i, 0)).collect::<Vec<_>>(),
            None,
            forgotten,
        );
        prop_assert!(Batch::decode(&bytes).is_ok());
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(batch) = Batch::decode(&bytes) {
            for i in 0..batch.len() {
                let _ = (batch.fixed(i).time, batch.stream(i), batch.id(i), batch.metadata(i), batch.payload(i));
            }
        }
    }

    #[test]
    fn forgotten_events_keep_their_positions_whoever_gets_them(
        batches in prop::collection::vec(prop::collection::vec(any::<bool>(), 0..6), 0..6),
    ) {
        let (mut all, mut known) = (TestKit::new(lengths), TestKit::new(known_lengths));
        for batch in &batches {
            let events = batch.iter().map(|forgotten| {
                let event = TestEvent::new("test", "Op", 12);
                if *forgotten { event.forgotten() } else { event }
            });
            all = all.given_all(events.clone());
            known = known.given_all(events);
        }
        let expected = (0..).zip(batches.concat()).map(|(i, forgotten)| (i, if forgotten { 0 } else { 2 }));
        prop_assert_eq!(stored(&all), expected.clone().collect::<Vec<_>>());
        prop_assert_eq!(stored(&known), expected.filter(|(_, length)| *length > 0).collect::<Vec<_>>());
        all.assert_pure();
        known.assert_pure();
    }
}

#[derive(Events)]
enum Anything {
    #[event("*", source = "test")]
    Any,
}

#[projection(name = "lengths", version = 1, views(Cell), forgotten)]
fn lengths(event: Event<Anything>, views: &mut Views) -> Result<()> {
    if event.forgotten != event.payload.is_empty() {
        bail!("the column is not of these events");
    }
    views.put(Cell { row: String::new(), column: event.position as i64, value: event.payload.len() as i64 })
}

#[projection(name = "known-lengths", version = 1, views(Cell))]
fn known_lengths(event: Event<Anything>, views: &mut Views) -> Result<()> {
    views.put(Cell { row: String::new(), column: event.position as i64, value: event.payload.len() as i64 })
}

/// The cells' columns and values.
fn stored<P: crate::Projection>(kit: &TestKit<P>) -> Vec<(i64, i64)> {
    kit.rows::<Cell>().into_iter().map(|cell| (cell.column, cell.value)).collect()
}

#[test]
fn the_bytes_on_the_wire_are_these() {
    let row = Cell { row: "b".into(), column: 200, value: -33 };
    let (mut key, mut values) = (Vec::new(), Vec::new());
    Cell::encode_key(row.key(), &mut key);
    row.encode_row(&mut values).unwrap();
    assert_eq!(key, [0xa1, b'b', 0xcc, 200]);
    assert_eq!(values, [0xd0, 0xdf]);
}

#[test]
fn a_manifest_grows_by_what_is_asked_for_alone() {
    let manifest = |name: &str, end: &str| {
        let columns =
            r#"{"name":"row","type":"text"},{"name":"column","type":"integer"},{"name":"value","type":"integer"}"#;
        let views = format!(r#"[{{"name":"cells","columns":[{columns}],"key":["row","column"]}}]"#);
        let head = format!(r#""contract":"0.1.0","projection":"{name}","version":1"#);
        let sources = r#"[{"source":"test","types":["*"]}]"#;
        format!(r#"{{{head},"sources":{sources},"views":{views},"batch":["payloads"]{end}}}"#)
    };
    assert_eq!(crate::manifest::of::<known_lengths>(), manifest("known-lengths", ""));
    assert_eq!(crate::manifest::of::<lengths>(), manifest("lengths", r#","forgotten":true"#));
}

#[test]
fn a_saved_row_is_read_by_the_columns() {
    let key = json!({ "id": "i", "n": -5, "flag": true, "raw": "AP8=", "at": "2013-01-01T10:15:00.000000Z",
        "status": "open" });
    let mut row = json!({ "note": null, "i32": 1, "i16": null, "u32": 2, "u16": 3, "u8": 4, "f64": 0.5, "f32": 0.25,
        "later": "2013-01-01T10:15:00.000001Z", "states": "open", "json": { "x": 1 }, "list": ["a"], "bytes": "aGV5" });
    let read = |row: &serde_json::Value| {
        let (key, row) = saved::encode(&Everything::SCHEMA, key.as_object().unwrap(), row.as_object().unwrap())?;
        decode::<Everything>(&key, &row)
    };
    let at: Timestamp = "2013-01-01T10:15:00Z".parse().unwrap();
    let expected = Everything {
        id: "i".into(),
        n: -5,
        flag: true,
        raw: vec![0, 255],
        at,
        i32: 1,
        u32: 2,
        u16: 3,
        u8: 4,
        f64: 0.5,
        f32: Some(0.25),
        later: Some(Timestamp::from_micros(at.as_micros() + 1)),
        states: Some(Status::Open),
        json: json!({ "x": 1 }),
        list: Json(vec!["a".into()]),
        bytes: Some(b"hey".to_vec()),
        ..Everything::default()
    };
    assert_eq!(read(&row).unwrap(), expected);
    // A column that came later: only one that may be absent can be left out.
    row.as_object_mut().unwrap().remove("note");
    assert_eq!(read(&row).unwrap(), expected);
    row.as_object_mut().unwrap().remove("u8");
    assert!(read(&row).unwrap_err().to_string().contains("it has no `u8`"));
    row["u8"] = json!("4");
    assert!(read(&row).unwrap_err().to_string().contains("`u8` is \"4\""));
}
