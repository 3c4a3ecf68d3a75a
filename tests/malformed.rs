//! Bytes that are not what they should be: modules that are cut or changed, and answers of plugins. The host refuses
//! them with a sentence or takes them for what they are; it never panics, and what it takes it can store.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Value, json};
use shadowbox::config::SandboxLimits;
use shadowbox::manifest::{CONTRACT, Manifest};
use shadowbox::model::Position;
use shadowbox::plugin::{Engine, Error};
use shadowbox::view::{Changes, Commit, Generation, Mark, Table};

use crate::hostile::{Bench, engine};
use crate::support::{module, properties};

/// A change of some bytes: where, as a part of the whole, and how.
#[derive(Clone, Debug)]
enum Damage {
    Cut(f64),
    Flip(f64, u8),
    Put(f64, u8),
    Remove(f64, usize),
    Repeat(f64, usize),
    /// A length or a count that is far too large.
    Grow(f64),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        (0.0..1.0).prop_map(Damage::Cut),
        (0.0..1.0, 0_u8..8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        (0.0..1.0, any::<u8>()).prop_map(|(at, byte)| Damage::Put(at, byte)),
        (0.0..1.0, 1_usize..16).prop_map(|(at, bytes)| Damage::Remove(at, bytes)),
        (0.0..1.0, 1_usize..16).prop_map(|(at, bytes)| Damage::Repeat(at, bytes)),
        (0.0..1.0).prop_map(Damage::Grow),
    ]
}

fn damaged(bytes: &[u8], damages: &[Damage]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for damage in damages {
        if bytes.is_empty() {
            break;
        }
        let place = |part: f64| ((bytes.len() - 1) as f64 * part) as usize;
        match *damage {
            Damage::Cut(at) => bytes.truncate(place(at)),
            Damage::Flip(at, bit) => {
                let at = place(at);
                bytes[at] ^= 1 << bit;
            }
            Damage::Put(at, byte) => {
                let at = place(at);
                bytes[at] = byte;
            }
            Damage::Remove(at, count) => {
                let at = place(at);
                bytes.drain(at..(at + count).min(bytes.len()));
            }
            Damage::Repeat(at, count) => {
                let at = place(at);
                let part = bytes[at..(at + count).min(bytes.len())].to_vec();
                bytes.splice(at..at, part);
            }
            Damage::Grow(at) => {
                let at = place(at);
                let end = (at + 4).min(bytes.len());
                bytes[at..end].fill(0xff);
            }
        }
    }
    bytes
}

#[test]
fn damaged_modules_are_refused_or_run_within_their_limits() {
    let sandbox = SandboxLimits { memory: 16 << 20, deadline: Duration::from_millis(50) };
    let engine = Engine::new(None, sandbox).unwrap();
    let whole = module("hostile");
    assert!(matches!(engine.admit(b""), Err(Error::NotWasm)));
    // In the head are the types, imports and names; damage in the code behind it is found by validation, or is other code.
    let head = 0.02;
    let place = prop_oneof![Just(head), Just(1.0)];
    let damages = (place, proptest::collection::vec(damage(), 1..3));
    let result = properties(24, file!()).run(&damages, |(part, damages)| {
        let end = (whole.len() as f64 * part) as usize;
        let bytes = [&damaged(&whole[..end], &damages), &whole[end..]].concat();
        // Either is fine. A panic, a crash or a hang is not.
        if let Err(error) = engine.admit(&bytes) {
            prop_assert!(error.to_string().len() < 20_000);
        }
        Ok(())
    });
    result.unwrap();
}

fn manifest() -> Value {
    let kinds = ["text", "integer", "real", "boolean", "bytes", "timestamp", "json", "uuid", "decimal"];
    let columns = kinds
        .iter()
        .map(|kind| json!({"name": format!("c_{kind}"), "type": kind, "nullable": *kind != "text" && *kind != "uuid"}));
    json!({
        "contract": CONTRACT, "projection": "p", "version": 1,
        "sources": [{"source": "a", "types": ["A*", "{b,c}?"]}, {"source": "b/{c,d}*"}],
        "views": [
            {"name": "v", "columns": columns.collect::<Vec<_>>(), "key": ["c_text", "c_uuid"], "indexes": [["c_integer"], ["c_real", "c_json"]]},
            {"name": "v_0", "columns": [{"name": "order", "type": "integer"}], "key": ["order"]},
        ],
        "batch": ["ids", "payloads"],
    })
}

/// Another value at a place of a manifest, or a name that is there already.
fn changed(mut manifest: Value, place: usize, value: Value) -> Value {
    fn walk<'a>(value: &'a mut Value, left: &mut usize) -> Option<&'a mut Value> {
        if *left == 0 {
            return Some(value);
        }
        *left -= 1;
        match value {
            Value::Array(values) => values.iter_mut().find_map(|v| walk(v, left)),
            Value::Object(values) => values.values_mut().find_map(|v| walk(v, left)),
            _ => None,
        }
    }
    if let Some(found) = walk(&mut manifest, &mut { place }) {
        *found = value;
    }
    manifest
}

#[test]
fn damaged_manifests_are_refused_or_can_be_entered() {
    let values = prop_oneof![
        Just(Value::Null),
        Just(json!([])),
        Just(json!({})),
        any::<i64>().prop_map(|n| json!(n)),
        any::<String>().prop_map(Value::String),
        "[a-z][a-z0-9_]{0,5}".prop_map(Value::String),
        "[*?{}\\[\\],!a-c\\\\-]{0,40}".prop_map(Value::String),
        prop::sample::select(vec!["v", "v_0", "p", "text", "c_text", "order", "sqlite_v", "ids"])
            .prop_map(|s| json!(s)),
        Just(json!(["c_integer", "c_integer"])),
        Just(manifest()["views"][0].clone()),
        Just(manifest()["views"].clone()),
    ];
    let changes = proptest::collection::vec((0_usize..120, values), 0..4);
    let damages = proptest::collection::vec(damage(), 0..3);
    let directory = tempfile::tempdir().unwrap();
    let entered = RefCell::new(0);
    let result = properties(1_500, file!()).run(&(changes, damages), |(changes, damages)| {
        let manifest = changes.into_iter().fold(manifest(), |m, (place, value)| changed(m, place, value));
        let bytes = damaged(manifest.to_string().as_bytes(), &damages);
        let Ok(manifest) = Manifest::parse(&String::from_utf8_lossy(&bytes)) else { return Ok(()) };
        _ = manifest.wants("anywhere", "Anything");
        manifest.sources.iter().for_each(|s| _ = (s.takes_source("anywhere"), s.wants("Anything")));
        // What is admitted has tables. Creating them takes a file, so not each time.
        let nth = entered.replace_with(|n| *n + 1);
        if nth % 4 == 0 {
            let file = directory.path().join(format!("{nth}.sqlite"));
            Generation::create(&file, &manifest).map_err(|e| TestCaseError::fail(format!("{e}: {}", manifest.json)))?;
            std::fs::remove_file(file).unwrap();
        }
        Ok(())
    });
    result.unwrap();
    assert!(*entered.borrow() > 50, "the test admits hardly anything: {}", entered.borrow());
}

/// One value in the form of the contract, or nearly.
fn value() -> impl Strategy<Value = Vec<u8>> {
    let encoded = |write: &dyn Fn(&mut Vec<u8>)| {
        let mut out = Vec::new();
        write(&mut out);
        out
    };
    prop_oneof![
        Just(vec![0xc0]),
        any::<bool>().prop_map(|b| vec![if b { 0xc3 } else { 0xc2 }]),
        any::<i64>().prop_map(move |n| encoded(&|out| _ = rmp::encode::write_sint(out, n).unwrap())),
        (-40_i64..200).prop_map(move |n| encoded(&|out| _ = rmp::encode::write_sint(out, n).unwrap())),
        any::<f64>().prop_map(move |r| encoded(&|out| rmp::encode::write_f64(out, r).unwrap())),
        ".{0,40}".prop_map(move |s| encoded(&|out| rmp::encode::write_str(out, &s).unwrap())),
        "-?[0-9]{1,9}(\\.[0-9]{1,9})?".prop_map(move |s| encoded(&|out| rmp::encode::write_str(out, &s).unwrap())),
        "\\{\"a\":\\[{0,200}1\\]{0,200}\\}".prop_map(move |s| encoded(&|out| rmp::encode::write_str(out, &s).unwrap())),
        proptest::collection::vec(any::<u8>(), 0..20)
            .prop_map(move |b| encoded(&|out| rmp::encode::write_bin(out, &b).unwrap())),
        any::<[u8; 16]>().prop_map(move |b| encoded(&|out| rmp::encode::write_bin(out, &b).unwrap())),
    ]
}

/// A row of the first view of [`manifest`] with values of the right types, and nil now and then.
fn row() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let bin = |bytes: &[u8]| {
        let mut out = Vec::new();
        rmp::encode::write_bin(&mut out, bytes).unwrap();
        out
    };
    let values =
        (any::<i64>(), any::<f64>(), any::<bool>(), proptest::collection::vec(any::<u8>(), 0..9), any::<i64>());
    let key = (".{0,5}", any::<[u8; 16]>());
    (key, values, any::<[bool; 7]>()).prop_map(move |((text, uuid), (integer, real, boolean, bytes, time), nil)| {
        let mut key = Vec::new();
        rmp::encode::write_str(&mut key, &text).unwrap();
        key.extend(bin(&uuid));
        let mut values: [Vec<u8>; 7] = Default::default();
        rmp::encode::write_sint(&mut values[0], integer).unwrap();
        rmp::encode::write_f64(&mut values[1], real).unwrap();
        rmp::encode::write_bool(&mut values[2], boolean).unwrap();
        values[3] = bin(&bytes);
        // Mostly within the years that a column holds.
        rmp::encode::write_sint(&mut values[4], time / 50).unwrap();
        rmp::encode::write_str(&mut values[5], &format!("[{integer}]")).unwrap();
        rmp::encode::write_str(&mut values[6], &format!("{integer}")).unwrap();
        for (value, nil) in values.iter_mut().zip(nil) {
            if nil {
                *value = vec![0xc0];
            }
        }
        (key, values.concat())
    })
}

/// Changes: nonsense, nearly right, and right ones.
fn changes() -> impl Strategy<Value = Vec<u8>> {
    let element = |view: u8, op: u8, key: &[u8], row: &[u8]| {
        let mut out = vec![0x94, view, op];
        rmp::encode::write_bin(&mut out, key).unwrap();
        rmp::encode::write_bin(&mut out, row).unwrap();
        out
    };
    let right = row().prop_map(move |(key, row)| element(0, 0, &key, &row));
    let values = |n| proptest::collection::vec(value(), 0..n).prop_map(|v| v.concat());
    let nearly = (0_u8..3, 0_u8..3, values(3), values(8)).prop_map(move |(v, op, key, row)| element(v, op, &key, &row));
    let small = (any::<i64>(), 0_u8..2).prop_map(move |(n, op)| {
        let mut key = Vec::new();
        rmp::encode::write_sint(&mut key, n).unwrap();
        element(1, op, &key, &[])
    });
    let array = |elements: Vec<Vec<u8>>| {
        let mut out = Vec::new();
        rmp::encode::write_array_len(&mut out, elements.len() as u32).unwrap();
        out.extend(elements.concat());
        out
    };
    prop_oneof![
        1 => proptest::collection::vec(any::<u8>(), 0..200),
        6 => proptest::collection::vec(prop_oneof![right, small], 0..20).prop_map(array),
        3 => proptest::collection::vec(nearly, 0..3).prop_map(array),
    ]
}

/// An array of keys of the fixture's view, or nearly.
fn keys() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(prop_oneof![value(), Just(b"\xa5large".to_vec())], 0..20).prop_map(|keys| {
        let mut out = Vec::new();
        rmp::encode::write_array_len(&mut out, keys.len() as u32).unwrap();
        keys.iter().for_each(|key| rmp::encode::write_bin(&mut out, key).unwrap());
        out
    })
}

#[test]
fn a_damaged_answer_or_question_ends_the_plugin_and_not_the_host() {
    let bench = Bench::new(engine(60_000).admit(&module("hostile")).unwrap());
    let deed = prop::sample::select(vec!["AsksForWhatItIsTold", "Echoes"]);
    let bytes = prop_oneof![keys(), changes(), proptest::collection::vec(any::<u8>(), 0..50)];
    let damages = proptest::collection::vec(damage(), 0..3);
    let result = properties(500, file!()).run(&(deed, bytes, damages), |(deed, bytes, damages)| {
        if let Err(failure) = bench.meet(deed, &damaged(&bytes, &damages)) {
            let sentences =
                ["get-many: ", "a row of view ", "are not an array", "the limit", "does not exist", "has op "];
            prop_assert!(sentences.iter().any(|sentence| failure.contains(sentence)), "{failure}");
        }
        Ok(())
    });
    result.unwrap();
}

/// SQLite has no negative zero; it stores zero.
fn without_negative_zeros(row: &[u8]) -> Vec<u8> {
    let (negative, zero) = ([0xcb, 0x80, 0, 0, 0, 0, 0, 0, 0], [0xcb, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut row = row.to_vec();
    while let Some(at) = row.windows(9).position(|window| window == negative) {
        row[at..at + 9].copy_from_slice(&zero);
    }
    row
}

#[test]
fn whatever_is_taken_of_an_answer_can_be_stored_and_reads_back_the_same() {
    let manifest = Manifest::parse(&manifest().to_string()).unwrap();
    let tables: Vec<_> = manifest.views.iter().map(Table::new).collect();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("1.sqlite");
    Generation::create(&file, &manifest).unwrap();
    let generation = RefCell::new(Generation::open(&file, &manifest).unwrap());
    let taken = RefCell::new(0);
    let damages = proptest::collection::vec(damage(), 0..2);
    let result = properties(1_500, file!()).run(&(changes(), damages), |(encoded, damages)| {
        let encoded = damaged(&encoded, &damages);
        let mut pending = Changes::default();
        if let Err(refusal) = pending.absorb(&tables, encoded.clone()) {
            prop_assert!(!refusal.is_empty() && pending.rows() == 0, "{refusal}");
            return Ok(());
        }
        let position = Position(taken.replace_with(|n| *n + 1));
        let mark = Mark { position, appended: shadowbox::model::Time::EPOCH, fingerprint: 0, log: "l".into() };
        let (mark, changes) = (Some(mark), Arc::new(pending));
        let letters = shadowbox::view::LetterChanges::default();
        let commit = Commit { mark, changes: changes.clone(), module: "m".into(), letters, origin: None, rests: false };
        let mut generation = generation.borrow_mut();
        generation.commit(&commit).map_err(|e| TestCaseError::fail(e.to_string()))?;
        // Each element as it was answered, the last one for a key being what counts.
        let mut rows = generation.rows().unwrap();
        let elements: Vec<(u32, u8, serde_bytes::ByteBuf, serde_bytes::ByteBuf)> =
            rmp_serde::from_slice(&encoded).unwrap();
        for (view, _, key, _) in elements {
            let stored = rows.get(view, &key).map_err(|e| TestCaseError::fail(e.to_string()))?;
            let stored = stored.map_err(TestCaseError::fail)?;
            let expected = changes.get(view, &key).expect("it was answered");
            prop_assert_eq!(stored, expected.map(without_negative_zeros));
        }
        Ok(())
    });
    result.unwrap();
    assert!(*taken.borrow() > 300, "the test stores hardly anything: {}", taken.borrow());
}
