//! Stops, kills and restarts: nothing is applied twice, nothing is skipped.

use proptest::prelude::*;
use serde_json::Value;

use crate::support::{World, module, moved, properties, wait_for};

/// The ledger's rows as a plain fold of one source makes them.
fn fold(events: &[(String, i64)]) -> Vec<(String, i64, i64, i64)> {
    let mut rows = std::collections::BTreeMap::<&str, (i64, i64, i64)>::new();
    for (position, (account, amount)) in events.iter().enumerate() {
        let row = rows.entry(account).or_default();
        let digest = row.2.wrapping_mul(31).wrapping_add(position as i64 * 2 + 1);
        *row = (row.0 + amount, row.1 + 1, digest);
    }
    rows.into_iter().map(|(account, row)| (account.to_owned(), row.0, row.1, row.2)).collect()
}

fn ledger(rows: &[Value]) -> Vec<(String, i64, i64, i64)> {
    let number = |row: &Value, column: &str| row[column].as_i64().unwrap();
    let row = |r: &Value| {
        (r["account"].as_str().unwrap().to_owned(), number(r, "amount"), number(r, "events"), number(r, "digest"))
    };
    rows.iter().map(row).collect()
}

fn history(n: i64) -> (Vec<String>, Vec<(String, i64)>) {
    let account = |i: i64| format!("a{}", i * i % 97);
    let lines = (0..n).map(|i| moved("left", i, &account(i), i)).collect();
    (lines, (0..n).map(|i| (account(i), i)).collect())
}

#[test]
fn a_clean_stop_and_a_start_go_on_where_they_were() {
    let (lines, events) = history(2_000);
    let mut world = World::running(&["ledger"]);
    world.append(&lines[..1_000]);
    assert_eq!(ledger(&world.rows_at("ledger", "999")), fold(&events[..1_000]));
    world.stop();
    world.append(&lines[1_000..]);
    world.start();
    assert_eq!(ledger(&world.rows_at("ledger", "1999")), fold(&events));
    assert_eq!(world.projection("ledger")["generation"], 1);
}

#[test]
fn kill_9_at_random_moments_loses_nothing_and_applies_nothing_twice() {
    let (lines, events) = history(20_000);
    // Small commits, so that there are many moments to be killed in.
    let config = "[batch]\nevents = 50\ncommit_rows = 20\n";
    let mut runner = properties(2, file!());
    let moments = proptest::collection::vec(0..20_000_u64, 3);
    let result = runner.run(&moments, |mut moments| {
        let mut world = World::new();
        std::fs::write(world.directory.path().join("shadowbox.toml"), config).unwrap();
        world.drop_module("ledger", &module("ledger"));
        world.append(&lines);
        moments.sort_unstable();
        for moment in moments {
            world.start();
            wait_for("the moment to kill", || {
                let reached = world.projection("ledger")["position"].as_u64();
                (reached >= Some(moment)).then_some(())
            });
            world.kill();
        }
        world.start();
        prop_assert_eq!(ledger(&world.rows_at("ledger", "19999")), fold(&events));
        Ok(())
    });
    result.unwrap();
}

#[test]
fn kill_9_in_the_middle_of_a_rebuild_ends_in_a_rebuilt_view() {
    let (lines, events) = history(20_000);
    let mut world = World::new();
    std::fs::write(world.directory.path().join("shadowbox.toml"), "[batch]\nevents = 20\ncommit_rows = 5\n").unwrap();
    world.drop_module("ledger", &module("ledger"));
    world.append(&lines);
    world.start();
    world.wait_live("ledger");
    let answer = world.post("/projections/ledger/rebuild", "application/json", "");
    assert_eq!((answer.status, &answer.json()["generation"]), (202, &Value::from(2)));
    world.wait_until("ledger", "the middle of the rebuild", |p| p["building"]["position"].as_u64() > Some(2_000));
    world.kill();
    world.start();
    // The old generation answers at once; the new one goes on by itself and is promoted.
    assert_eq!(ledger(&world.rows_at("ledger", "19999")), fold(&events));
    world.wait_until("ledger", "the promotion", |p| p["generation"] == 2 && p["building"].is_null());
    assert_eq!(ledger(&world.rows_at("ledger", "19999")), fold(&events));
}

#[test]
fn a_replaced_log_is_refused_with_both_facts() {
    let (lines, _) = history(10);
    let mut world = World::running(&["ledger"]);
    world.append(&lines);
    world.rows_at("ledger", "9");
    world.stop();
    for suffix in ["", "-wal", "-shm"] {
        // The last two are there only after a crash.
        let _ = std::fs::remove_file(world.data().join(format!("log.sqlite{suffix}")));
    }
    world.append(&lines[..5]);
    world.start();
    let status = world.wait_until("ledger", "the refusal", |p| p["state"] == "faulted");
    let error = status["error"].as_str().unwrap();
    assert!(error.contains("complete to position 9,") && error.contains("no event there"), "{error}");
    assert_eq!(ledger(&world.rows_at("ledger", "9")).len(), 10, "the view stays readable");
    world.ok(&["rebuild", "ledger", "--wait"]);
    assert_eq!(ledger(&world.rows_at("ledger", "4")).len(), 5);
}

#[test]
fn a_view_file_that_is_gone_is_named_and_rebuilt_on_request() {
    let (lines, events) = history(10);
    let mut world = World::running(&["ledger"]);
    world.append(&lines);
    world.rows_at("ledger", "9");
    world.stop();
    std::fs::remove_file(world.data().join("views/ledger/1.sqlite")).unwrap();
    world.start();
    let status = world.wait_until("ledger", "the fault", |p| p["state"] == "faulted");
    assert!(status["error"].as_str().unwrap().contains("views/ledger/1.sqlite"), "{status}");
    world.ok(&["rebuild", "ledger", "--wait"]);
    assert_eq!(ledger(&world.rows_at("ledger", "9")), fold(&events));
}

#[test]
fn a_view_file_that_is_removed_under_a_running_runtime_is_noticed() {
    let (lines, events) = history(20);
    let world = World::running(&["ledger"]);
    world.append(&lines[..10]);
    world.rows_at("ledger", "9");
    std::fs::remove_file(world.data().join("views/ledger/1.sqlite")).unwrap();
    world.append(&lines[10..]);
    let status = world.wait_until("ledger", "the fault", |p| p["state"] == "faulted");
    assert!(status["error"].as_str().unwrap().contains("was removed or replaced"), "{status}");
    assert_eq!(world.get("/readyz").status, 503);
    world.ok(&["rebuild", "ledger", "--wait"]);
    assert_eq!(ledger(&world.rows_at("ledger", "19")), fold(&events));
}

#[test]
fn a_projection_that_cannot_be_entered_is_shown_and_can_be_mended() {
    let world = World::running(&[]);
    // Where its directory should be is a file.
    std::fs::create_dir_all(world.data().join("views")).unwrap();
    std::fs::write(world.data().join("views/ledger"), "").unwrap();
    world.drop_module("ledger", &module("ledger"));
    wait_for("the error", || world.ok(&["status"]).contains("views/ledger").then_some(()));
    std::fs::remove_file(world.plugins().join("ledger.wasm")).unwrap();
    wait_for("the removal", || world.log().contains("the module is gone").then_some(()));
    std::fs::remove_file(world.data().join("views/ledger")).unwrap();
    world.drop_module("ledger", &module("ledger"));
    world.wait_live("ledger");
    assert_eq!(world.get("/status").json()["refused"], Value::Array(vec![]));
}

#[test]
fn a_missing_catalogue_does_not_take_the_views_with_it() {
    let (lines, events) = history(10);
    let mut world = World::running(&["ledger"]);
    world.append(&lines);
    world.rows_at("ledger", "9");
    world.stop();
    let (catalogue, aside) = (world.data().join("catalogue.sqlite"), world.data().join("aside"));
    let left = |file: &str| std::fs::metadata(world.data().join(file)).map_or(0, |m| m.len());
    assert_eq!((left("log.sqlite-wal"), left("views/ledger/1.sqlite-wal")), (0, 0), "a clean stop leaves whole files");
    std::fs::rename(&catalogue, &aside).unwrap();
    let output = world.run(&["run", "--plugins", "plugins", "--listen", "127.0.0.1:0"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && error.contains("is missing, but there are generations"), "{error}");
    std::fs::rename(aside, catalogue).unwrap();
    world.start();
    assert_eq!(ledger(&world.rows_at("ledger", "9")), fold(&events));
}

#[test]
fn a_second_runtime_on_the_same_data_is_refused_by_name() {
    let world = World::running(&[]);
    let output = world.run(&["run", "--plugins", "plugins", "--listen", "127.0.0.1:0"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(error.contains("is held by another shadowbox (process"), "{error}");
}
