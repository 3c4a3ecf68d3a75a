//! Plugins that misbehave: the right, named failure; what came before is committed; others are unharmed.

use serde_json::{Value, json};

use crate::support::{World, event, module, moved, patched, wait_for};

/// Runs one bad event between good ones; answers the status of the projection that met it.
fn meet(event_type: &str, config: &str) -> (World, Value) {
    let mut world = World::new();
    std::fs::write(world.directory.path().join("shadowbox.toml"), config).unwrap();
    world.drop_module("ledger", &module("ledger"));
    let other = patched(&patched(&module("ledger"), "ledger", "legder"), "sights", "sihgts");
    // The other one does not subscribe to the bad event.
    world.drop_module("other", &patched(&other, event_type, &"x".repeat(event_type.len())));
    let mut lines: Vec<String> = (0..100).map(|n| moved("left", n, &format!("a{n}"), n)).collect();
    lines.push(event("left", event_type, "bad", 100, json!({})));
    lines.extend((101..200).map(|n| moved("left", n, &format!("a{n}"), n)));
    world.append(&lines);
    world.start();
    let status = world.wait_until("ledger", "the fault", |p| p["state"] == "faulted");
    let rows = world.get("/views/ledger?limit=1000");
    assert_eq!(rows.header("shadowbox-position"), "99");
    assert_eq!(rows.json().as_array().unwrap().len(), 100, "everything before the bad event is committed");
    assert_eq!(world.rows_at("legder", "199").len(), 199, "the other projection went on");
    (world, status)
}

fn check(event_type: &str, config: &str, expected: &str) {
    let (_world, status) = meet(event_type, config);
    let error = status["error"].as_str().unwrap();
    let names = format!("event \"bad\" ({event_type}) of source \"left\" at position 100");
    assert!(error.contains(&names) && error.contains(expected), "{error}");
}

#[test]
fn an_event_that_the_plugin_refuses() {
    check("Refused", "", "the event says so");
}

#[test]
fn a_panic() {
    check("Panics", "", "the event says so");
}

#[test]
fn an_endless_loop() {
    check("Loops", "[sandbox]\ndeadline_ms = 200\n", "ran for more than 200 ms");
}

#[test]
fn a_plugin_that_waits() {
    check("Sleeps", "", "cannot wait");
}

#[test]
fn a_memory_bomb() {
    check("Grows", "[sandbox]\nmemory_mb = 16\n", "more than 16 MB of memory");
}

#[test]
fn an_exit() {
    check("Exits", "", "called exit(");
}

#[test]
fn a_plugin_gets_the_columns_that_it_reads() {
    let world = World::running(&["ledger+columns"]);
    world.append(&[moved("left", 0, "a", 1), moved("right", 0, "a", 1)]);
    let rows = world.rows_at("sights", "1");
    assert_eq!(rows, [json!({ "what": "left-0", "seen": "s" }), json!({ "what": "right-0", "seen": "s" })]);
}

#[test]
fn a_flood_of_output_is_cut_and_harms_nobody() {
    let world = World::running(&["ledger"]);
    world.append(&[event("left", "Prints", "p", 0, json!({})), moved("left", 1, "a", 1)]);
    assert_eq!(world.rows_at("ledger", "1").len(), 1);
    let log = wait_for("the captured output", || Some(world.log()).filter(|log| log.contains("the plugin printed")));
    assert!(log.contains("a line that nobody needs") && log.contains("more bytes]"), "{log}");
    assert!(log.len() < 100_000, "{}", log.len());
}

#[test]
fn a_plugin_sees_nothing_of_the_world() {
    let look = event("left", "Looks", "look", 0, json!({}));
    let mut world = World::running(&["ledger"]);
    world.append(std::slice::from_ref(&look));
    let rows = world.rows_at("sights", "0");
    let seen = |what: &str| rows.iter().find(|r| r["what"] == what).unwrap()["seen"].as_str().unwrap().to_owned();
    assert_eq!(seen("time"), "Ok(0ns)");
    assert_eq!(seen("elapsed"), "0ns");
    assert_eq!(seen("environment"), "[]");
    assert_eq!(seen("arguments"), "[]");
    assert_eq!(seen("input"), "Ok(0)");
    assert_eq!(seen("current folder"), "Ok(\"/\")");
    for nothing in ["file", "folder", "written", "program", "thread", "process", "network"] {
        assert!(seen(nothing).starts_with("Err("), "{nothing}: {}", seen(nothing));
    }
    // The same for every instance, in every process, whatever its environment, also the order of a hash set.
    world.ok(&["rebuild", "ledger", "--wait"]);
    assert_eq!(world.rows_at("sights", "0"), rows);
    world.stop();
    world.start();
    world.append(&[event("left", "Looks", "look again", 1, json!({}))]);
    assert_eq!(world.rows_at("sights", "1"), rows);
    let other = World::running(&["ledger"]);
    other.append(&[look]);
    assert_eq!(other.rows_at("sights", "0"), rows);
}

#[test]
fn instances_that_look_for_a_bad_event_read_the_latest_commit() {
    let world = World::running(&["ledger"]);
    let mut lines: Vec<String> = (0..100).map(|n| moved("left", n, "one account", n)).collect();
    lines.push(event("left", "Panics", "bad", 100, json!({})));
    lines.extend((101..300).map(|n| moved("left", n, "one account", n)));
    world.append(&lines);
    world.wait_until("ledger", "the fault", |p| p["state"] == "faulted");
    let rows = world.get("/views/ledger").json();
    // Each half begins on a fresh instance, which knows the row only from the commit before.
    assert_eq!((&rows[0]["events"], &rows[0]["amount"]), (&json!(100), &json!(99 * 100 / 2)));
}
