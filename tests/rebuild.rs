//! Rebuilds and new versions: built in the shadow, promoted in one step, and never seen half done.

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use crate::support::{World, event, module, moved};

/// Events of two services that come alternately in runs of varying length, so that the order matters.
fn interleaved(n: i64) -> Vec<String> {
    (0..n).map(|i| moved(if i * i % 7 < 3 { "left" } else { "right" }, i, &format!("a{}", i % 50), i)).collect()
}

#[test]
fn a_rebuild_takes_the_sources_in_the_order_of_the_log() {
    let world = World::running(&["ledger"]);
    // In many small appends, against the times of the events: no rule but the log's order could reproduce that.
    let mut live = Vec::new();
    for chunk in interleaved(600).rchunks(37) {
        live = world.rows_at("ledger", &world.append(chunk));
    }
    assert_eq!(live.len(), 50);
    world.ok(&["rebuild", "ledger", "--wait"]);
    assert_eq!(world.projection("ledger")["generation"], 2);
    assert_eq!(world.get("/views/ledger").json(), Value::from(live.clone()));
    // And so does a third one.
    world.ok(&["rebuild", "ledger", "--wait"]);
    assert_eq!(world.get("/views/ledger").json(), Value::from(live));
}

#[test]
fn readers_never_see_an_empty_or_half_built_view() {
    let world = World::running(&["ledger"]);
    let complete = world.rows_at("ledger", &world.append(&interleaved(20_000)));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut answers, mut generations) = (0, Vec::new());
            while !done.load(Ordering::Relaxed) {
                let answer = world.get("/views/ledger?order=account");
                assert_eq!(
                    answer.json(),
                    Value::from(complete.clone()),
                    "position {}",
                    answer.header("shadowbox-position")
                );
                answers += 1;
                generations.push(answer.header("shadowbox-generation").to_owned());
            }
            generations.dedup();
            (answers, generations)
        });
        for _ in 0..3 {
            world.ok(&["rebuild", "ledger", "--wait"]);
        }
        done.store(true, Ordering::Relaxed);
        let (answers, generations) = reader.join().unwrap();
        assert!(answers > 3, "{answers}");
        assert!(generations.is_sorted_by_key(|g| g.parse::<u64>().unwrap()), "{generations:?}");
    });
}

#[test]
fn the_live_generation_follows_the_log_while_another_is_built() {
    let mut world = World::new();
    std::fs::write(world.directory.path().join("shadowbox.toml"), "[batch]\nevents = 1\ncommit_rows = 1\n").unwrap();
    world.drop_module("ledger", &module("ledger"));
    world.append(&interleaved(5_000));
    world.start();
    world.wait_live("ledger");
    world.post("/projections/ledger/rebuild", "application/json", "");
    let mut seen_while_building = 0;
    let mut n = 5_000;
    while !world.projection("ledger")["building"].is_null() {
        let position = world.append(&[moved("left", n, "new", 1)]);
        n += 1;
        let rows = world.rows_at("ledger", &position);
        let new = rows.iter().find(|r| r["account"] == "new").expect("read your own write");
        assert_eq!(new["events"].as_i64(), Some(n - 5_000));
        seen_while_building += i64::from(!world.projection("ledger")["building"].is_null());
    }
    assert!(seen_while_building > 0, "the rebuild was over before anything was seen");
    assert_eq!(world.projection("ledger")["generation"], 2);
}

#[test]
fn a_new_version_is_built_beside_the_old_one_and_takes_over() {
    let world = World::running(&["ledger"]);
    let position = world.append(&interleaved(3_000));
    world.rows_at("ledger", &position);
    world.drop_module("ledger", &module("ledger+v2"));
    let status = world.wait_until("ledger", "the second version", |p| p["version"] == 2 && p["building"].is_null());
    assert_eq!(status["generation"], 2);
    let rows = world.rows_at("ledger", &position);
    assert!(rows.iter().all(|r| r["code"] == 3 && r["doubled"].as_i64() == r["amount"].as_i64().map(|a| 2 * a)));
    assert_eq!(world.get("/views").json().as_array().unwrap().len(), 2);
}

#[test]
fn the_same_version_and_schema_is_swapped_and_goes_on_from_the_checkpoint() {
    let world = World::running(&["ledger"]);
    world.append(&[moved("left", 0, "old", 1)]);
    world.rows_at("ledger", "0");
    let before = world.projection("ledger")["module_hash"].clone();
    world.drop_module("ledger", &module("ledger+tweaked"));
    world.wait_until("ledger", "the swap", |p| p["module_hash"] != before);
    world.append(&[moved("left", 1, "new", 1)]);
    let rows = world.rows_at("ledger", "1");
    let code = |account: &str| rows.iter().find(|r| r["account"] == account).unwrap()["code"].clone();
    assert_eq!((code("old"), code("new")), (Value::from(1), Value::from(2)));
    assert_eq!(world.projection("ledger")["generation"], 1);
}

#[test]
fn a_module_that_fails_in_its_first_batch_is_refused_and_the_old_one_goes_on() {
    let mut world = World::running(&["ledger"]);
    world.append(&[moved("left", 0, "a", 1)]);
    world.rows_at("ledger", "0");
    world.drop_module("ledger", &module("ledger+broken"));
    let good = world.projection("ledger")["module_hash"].clone();
    world.wait_until("ledger", "the broken module", |p| p["module_hash"] != good);
    world.append(&[moved("left", 1, "a", 1)]);
    assert_eq!(world.rows_at("ledger", "1")[0]["events"], 2);
    let status = world.wait_until("ledger", "the refusal", |p| p["error"].is_string());
    assert_eq!(status["module_hash"], good);
    let error = status["error"].as_str().unwrap();
    assert!(error.contains("is refused") && error.contains("this module is broken"), "{error}");
    // The same after a restart, although the folder still has the broken one.
    world.stop();
    world.append(&[moved("left", 2, "a", 1)]);
    world.start();
    assert_eq!(world.rows_at("ledger", "2")[0]["events"], 3);
}

#[test]
fn a_new_version_that_fails_is_refused_and_the_old_one_goes_on() {
    let world = World::running(&["ledger"]);
    let position = world.append(&[moved("left", 0, "a", 1)]);
    world.rows_at("ledger", &position);
    world.drop_module("ledger", &module("ledger+v2,broken"));
    let status = world.wait_until("ledger", "the refusal", |p| p["building"]["error"].is_string());
    assert_eq!((&status["version"], &status["generation"], &status["state"]), (&1.into(), &1.into(), &"live".into()));
    let error = status["error"].as_str().unwrap();
    assert!(error.contains("the rebuild failed: event \"left-0\"") && error.contains("module is broken"), "{error}");
    let position = world.append(&[moved("left", 1, "a", 1)]);
    assert_eq!(world.rows_at("ledger", &position)[0]["events"], 2);
    // The right one makes it good.
    world.drop_module("ledger", &module("ledger+v2"));
    world.wait_until("ledger", "the second version", |p| p["version"] == 2 && p["building"].is_null());
    assert_eq!(world.rows_at("ledger", &position)[0]["doubled"], 4);
}

#[test]
fn a_refused_module_leaves_no_rows_behind() {
    let world = World::running(&["ledger"]);
    let position = world.append(&[moved("left", 0, "a", 1)]);
    world.rows_at("ledger", &position);
    std::fs::remove_file(world.plugins().join("ledger.wasm")).unwrap();
    world.wait_until("ledger", "the stop", |p| p["state"] == "stopped");
    let mut lines: Vec<_> = (1..300).map(|n| moved("left", n, &format!("a{n}"), 1)).collect();
    lines.push(event("left", "Panics", "bad", 300, serde_json::json!({})));
    world.append(&lines);
    // Its first batch has good events and a bad one: it is refused as a whole, and the former module takes the good ones.
    world.drop_module("ledger", &module("ledger+tweaked"));
    let status = world.wait_until("ledger", "the former module's own fault", |p| p["state"] == "faulted");
    assert!(status["error"].as_str().unwrap().contains("event \"bad\""), "{status}");
    assert!(world.log().contains("refused; the former module goes on"));
    let rows = world.rows_at("ledger", "299");
    assert_eq!(rows.len(), 300);
    assert!(rows.iter().all(|row| row["code"] == 1), "rows of a refused module");
}

#[test]
fn a_rebuild_that_cannot_begin_leaves_the_live_generation_alone() {
    let world = World::running(&["ledger"]);
    let position = world.append(&[moved("left", 0, "a", 1)]);
    world.rows_at("ledger", &position);
    // Somebody's own, where the next generation would be.
    let in_the_way = world.data().join("views/ledger/2.sqlite");
    std::fs::create_dir(&in_the_way).unwrap();
    let answer = world.post("/projections/ledger/rebuild", "application/json", "");
    assert!(answer.status == 409 && answer.body.contains("2.sqlite"), "{}", answer.body);
    assert!(answer.body.contains("move it elsewhere"), "{}", answer.body);
    let position = world.append(&[moved("left", 1, "a", 1)]);
    assert_eq!(world.rows_at("ledger", &position)[0]["events"], 2);
    std::fs::remove_dir(&in_the_way).unwrap();
    world.ok(&["rebuild", "ledger", "--wait"]);
    assert!(world.wait_live("ledger")["error"].is_null());
}
