//! What becomes of a directory in which each source had positions of its own?

use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use rusqlite::{Connection, params};
use serde_json::Value;

use crate::support::{World, module, moved};

/// Events of each of the two services.
const EACH: i64 = 30;

/// As the former runtime took them: `left` to its end, though `right` has the earlier times in between.
fn lines() -> Vec<String> {
    let of = |source, account: &'static str| (0..EACH).map(move |n| moved(source, n, account, n + 1));
    of("left", "ann").chain(of("right", "ann")).collect()
}

/// Rows of a runtime that has applied the events in this order, in a directory that is made into one of the former
/// format then.
fn former() -> (World, Vec<Value>) {
    let mut world = World::running(&["ledger"]);
    let at = world.append(&lines());
    let rows = world.rows_at("ledger", &at);
    world.stop();
    std::fs::remove_file(world.plugins().join("ledger.wasm")).unwrap();
    make_former(&world.data());
    (world, rows)
}

fn make_former(data: &Path) {
    for entry in std::fs::read_dir(data).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_str().unwrap().starts_with("log.") {
            std::fs::remove_file(path).unwrap();
        }
    }
    let log = Connection::open(data.join("log.sqlite")).unwrap();
    log.pragma_update(None, "journal_mode", "wal").unwrap();
    log.execute_batch(
        "CREATE TABLE log (identity TEXT NOT NULL, created_at TEXT NOT NULL) STRICT;
         CREATE TABLE sources (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
            head INTEGER, head_time INTEGER, first_time INTEGER) STRICT;
         CREATE TABLE types (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
         INSERT INTO log VALUES ('the former one', '2026-11-01T00:00:00Z');
         INSERT INTO types VALUES (1, 'Moved');
         PRAGMA user_version = 1;",
    )
    .unwrap();
    for (number, source) in [(1, "left"), (2, "right")] {
        log.execute_batch(&format!(
            "CREATE TABLE source_{number} (position INTEGER PRIMARY KEY, time INTEGER NOT NULL,
                version INTEGER NOT NULL, type INTEGER NOT NULL, stream TEXT NOT NULL, id TEXT NOT NULL UNIQUE,
                metadata TEXT NOT NULL, payload BLOB NOT NULL) STRICT"
        ))
        .unwrap();
        for n in 0..EACH {
            let line: Value = serde_json::from_str(&moved(source, n, "ann", n + 1)).unwrap();
            let time = (1_700_000_000 + n) * 1_000_000;
            let (id, data) = (line["id"].as_str().unwrap(), line["data"].to_string());
            log.execute(
                &format!("INSERT INTO source_{number} VALUES (?, ?, 1, 1, 's', ?, '', ?)"),
                params![n, time, id, data.as_bytes()],
            )
            .unwrap();
        }
        let (first, last) = (1_700_000_000_000_000_i64, (1_700_000_000 + EACH - 1) * 1_000_000);
        log.execute("INSERT INTO sources VALUES (?, ?, ?, ?, ?)", params![number, source, EACH - 1, last, first])
            .unwrap();
    }
    let view = Connection::open(data.join("views/ledger/1.sqlite")).unwrap();
    view.execute_batch(
        "DROP TABLE _shadowbox_checkpoint;
         CREATE TABLE _shadowbox_checkpoint (source TEXT PRIMARY KEY, position INTEGER NOT NULL, time INTEGER NOT NULL,
            fingerprint INTEGER NOT NULL, log TEXT NOT NULL) STRICT, WITHOUT ROWID;
         CREATE TABLE _shadowbox_order (number INTEGER PRIMARY KEY, runs BLOB NOT NULL) STRICT;",
    )
    .unwrap();
    let last = EACH - 1;
    for source in ["left", "right"] {
        let mark = params![source, last, (1_700_000_000 + last) * 1_000_000, "the former one"];
        view.execute("INSERT INTO _shadowbox_checkpoint VALUES (?1, ?2, ?3, 0, ?4)", mark).unwrap();
    }
    let runs = rmp_serde::to_vec(&[(0_u16, last as u64), (1, last as u64)]).unwrap();
    view.execute("INSERT INTO _shadowbox_order (runs) VALUES (?)", [runs]).unwrap();
}

fn check_converted(world: &mut World, rows: &[Value]) {
    world.start();
    let answer = world.get("/views/ledger");
    assert_eq!((answer.status, answer.json().as_array().unwrap().as_slice()), (200, rows), "served meanwhile");
    assert_eq!(answer.header("shadowbox-position"), "", "their checkpoint says nothing about the new order");
    world.drop_module("ledger", &module("ledger"));
    world.wait_until("ledger", "the rebuild", |p| p["generation"] == 2 && p["state"] == "live");
    let last = (2 * EACH - 1).to_string();
    assert_eq!(world.rows_at("ledger", &last), rows, "the same rows, whose digests depend on the order");
    let order = world.ok(&["events"]);
    let ids = order.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["id"].as_str().unwrap().to_owned());
    let expected = ["left", "right"].into_iter().flat_map(|source| (0..EACH).map(move |n| format!("{source}-{n}")));
    assert!(ids.eq(expected), "{order}");
    assert!(world.ok(&["verify", "ledger"]).contains("equal"), "the proof holds");
    world.stop();
}

#[test]
fn its_events_get_the_order_in_which_they_were_taken_and_its_views_are_rebuilt() {
    let (mut world, rows) = former();
    check_converted(&mut world, &rows);
    assert!(world.data().join("log.former.sqlite").exists(), "nothing is thrown away");
}

#[test]
fn a_module_that_was_mended_meanwhile_makes_the_new_rows() {
    let (mut world, rows) = former();
    world.start();
    world.drop_module("ledger", &module("ledger+tweaked"));
    let status = world.wait_until("ledger", "the rebuild", |p| p["generation"] == 2 && p["state"] == "live");
    assert_eq!(status["module_hash"], shadowbox::plugin::hash(&module("ledger+tweaked")));
    let mended = world.rows_at("ledger", &(2 * EACH - 1).to_string());
    assert_eq!((&mended[0]["digest"], &mended[0]["code"]), (&rows[0]["digest"], &2.into()));
}

#[test]
fn a_conversion_that_is_killed_goes_on() {
    for point in ["convert.appended", "convert.moved", "convert.done"] {
        let (mut world, rows) = former();
        let status = world.try_start(&[], Some(&format!("{point}=kill"))).expect_err("it dies there");
        assert_eq!(status.signal(), Some(6), "{point}: {status}\n{}", world.log());
        check_converted(&mut world, &rows);
    }
}
