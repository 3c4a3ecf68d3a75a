//! Rollbacks: the former generation catches up and is promoted, and what was rolled back from does not come back.

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use crate::support::{World, event, module, moved, patched, wait_for};

/// Version 1 has applied the first events and is kept, version 2 is live.
fn second_version(world: &World, events: i64) -> String {
    let lines: Vec<_> =
        (0..events).map(|n| moved(["left", "right"][n as usize % 2], n, &format!("a{}", n % 7), n)).collect();
    let position = world.append(&lines);
    world.rows_at("ledger", &position);
    world.drop_module("ledger", &module("ledger+v2"));
    wait_version(world, 2);
    world.rows_at("ledger", &position);
    position
}

fn wait_version(world: &World, version: u64) -> Value {
    world.wait_until("ledger", "the version", |p| p["version"] == version && p["building"].is_null())
}

/// Which code made the rows, and how many events are in them.
fn codes_and_events(rows: &[Value]) -> (Vec<i64>, i64) {
    let mut codes: Vec<_> = rows.iter().map(|r| r["code"].as_i64().unwrap()).collect();
    codes.sort_unstable();
    codes.dedup();
    (codes, rows.iter().map(|r| r["events"].as_i64().unwrap()).sum())
}

fn roll_back(world: &World) -> String {
    world.ok(&["rollback", "ledger", "--wait"])
}

#[test]
fn the_former_generation_catches_up_and_stays_live_until_another_module_comes() {
    let mut world = World::running(&["ledger"]);
    second_version(&world, 40);
    // Only version 2 has seen these.
    let position = world.append(&[moved("left", 40, "a0", 1), moved("right", 41, "new", 1)]);
    assert_eq!(codes_and_events(&world.rows_at("ledger", &position)).1, 42);
    assert!(roll_back(&world).contains("generation 1 of ledger is live again"));
    assert_eq!(codes_and_events(&world.rows_at("ledger", &position)), (vec![1], 42));
    let status = wait_version(&world, 1);
    assert_eq!((&status["generation"], &status["state"], &status["error"]), (&1.into(), &"live".into(), &Value::Null));
    assert!(status["rolled_back_from"].is_string(), "{status}");
    let said = world.ok(&["status"]);
    assert!(said.contains("ledger: rolled back; module") && said.contains("shadowbox rollback ledger"), "{said}");

    // It follows the log with the code of version 1, also after a restart, and after a look at the same file.
    world.stop();
    assert!(world.ok(&["status"]).contains("ledger: rolled back; module"));
    world.start();
    world.drop_module("ledger", &module("ledger+v2"));
    let position = world.append(&[moved("left", 42, "late", 1)]);
    assert_eq!(codes_and_events(&world.rows_at("ledger", &position)), (vec![1], 43));
    assert_eq!(world.wait_live("ledger")["generation"], 1);
    // A rebuild is by the module that runs, not by the one in the folder.
    world.ok(&["rebuild", "ledger", "--wait"]);
    assert_eq!(codes_and_events(&world.rows_at("ledger", &position)), (vec![1], 43));
    let status = world.wait_live("ledger");
    assert_eq!((&status["generation"], &status["version"]), (&3.into(), &1.into()));
    assert!(status["rolled_back_from"].is_string());

    // Another module ends it.
    world.drop_module("ledger", &module("ledger+tweaked"));
    let status = world.wait_until("ledger", "the third module", |p| p["rolled_back_from"].is_null());
    assert_eq!(status["version"], 1);
    let position = world.append(&[moved("left", 43, "last", 1)]);
    assert_eq!(codes_and_events(&world.rows_at("ledger", &position)).0, [1, 2]);
    // And then the one that was rolled back from is a module like every other.
    world.drop_module("ledger", &module("ledger+v2"));
    wait_version(&world, 2);
    assert_eq!(codes_and_events(&world.rows_at("ledger", &position)), (vec![3], 44));
}

#[test]
fn a_second_version_that_stops_at_an_event_is_left_behind() {
    let world = World::running(&["ledger"]);
    second_version(&world, 10);
    world.append(&[moved("left", 10, "a0", 1), event("left", "OnlyVersion2Panics", "bad", 11, Value::Null)]);
    let position = world.append(&[moved("left", 12, "a0", 1)]);
    let status = world.wait_until("ledger", "the fault", |p| p["state"] == "faulted");
    assert!(status["error"].as_str().unwrap().contains("event \"bad\""), "{status}");
    roll_back(&world);
    assert_eq!(codes_and_events(&world.rows_at("ledger", &position)), (vec![1], 12));
    assert_eq!(world.wait_live("ledger")["version"], 1);
}

#[test]
fn a_rollback_of_a_rollback_is_as_before_both() {
    let mut world = World::running(&["ledger"]);
    second_version(&world, 30);
    roll_back(&world);
    let position = &world.append(&[moved("right", 30, "between", 1)]);
    world.rows_at("ledger", position);
    assert!(roll_back(&world).contains("generation 2 of ledger is live again"));
    let status = wait_version(&world, 2);
    assert!(status["rolled_back_from"].is_null(), "{status}");
    assert_eq!(codes_and_events(&world.rows_at("ledger", position)), (vec![3], 31));
    // Version 2 goes on where it had stopped, so the folder's module is the one that runs; version 1 is a new module.
    world.stop();
    world.start();
    assert_eq!(wait_version(&world, 2)["generation"], 2);
    world.drop_module("ledger", &module("ledger"));
    assert_eq!(wait_version(&world, 1)["generation"], 3);
}

#[test]
fn readers_see_no_gap_and_nothing_that_goes_back() {
    let world = World::running(&["ledger"]);
    second_version(&world, 2_000);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut last, mut generations) = (0, Vec::new());
            loop {
                let ended = done.load(Ordering::Relaxed);
                let answer = world.get("/views/ledger");
                assert_eq!(answer.status, 200, "{}", answer.body);
                let rows = answer.json();
                let (codes, events) = codes_and_events(rows.as_array().unwrap());
                let generation: u64 = answer.header("shadowbox-generation").parse().unwrap();
                assert_eq!(codes, [if generation == 1 { 1 } else { 3 }], "a view of two generations");
                let position = answer.header("shadowbox-position");
                // All of them are wanted.
                assert_eq!(events, position.parse::<i64>().unwrap() + 1);
                assert!(events >= last, "{events} after {last}");
                last = events;
                generations.push(generation);
                if ended {
                    generations.dedup();
                    return generations;
                }
            }
        });
        let writer = scope.spawn(|| {
            let mut n = 2_000;
            while !done.load(Ordering::Relaxed) {
                world.append(&[moved("left", n, &format!("a{}", n % 7), 1)]);
                n += 1;
            }
        });
        for generation in ["1", "2", "1"] {
            assert!(roll_back(&world).starts_with(&format!("generation {generation} ")));
        }
        done.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        // Some of them may have been too short to be seen.
        assert_eq!(reader.join().unwrap().last(), Some(&1));
    });
}

#[test]
fn kill_9_in_the_middle_of_a_rollback_ends_in_the_former_generation() {
    let mut world = World::new();
    std::fs::write(world.directory.path().join("shadowbox.toml"), "[batch]\nevents = 20\ncommit_rows = 5\n").unwrap();
    world.drop_module("ledger", &module("ledger"));
    world.append(&[moved("left", 0, "a0", 0)]);
    world.start();
    world.wait_live("ledger");
    world.drop_module("ledger", &module("ledger+v2"));
    wait_version(&world, 2);
    let lines: Vec<_> = (1..6_000).map(|n| moved("left", n, &format!("a{}", n * n % 97), n)).collect();
    let position = world.append(&lines);
    world.rows_at("ledger", &position);
    let answer = world.post("/projections/ledger/rollback", "application/json", "");
    assert_eq!((answer.status, &answer.json()["generation"]), (202, &Value::from(1)));
    world.wait_until("ledger", "the middle of the rollback", |p| p["building"]["position"].as_u64() > Some(1_000));
    for (path, expected) in [("rollback", "a rollback of projection"), ("rebuild", "a rollback of projection")] {
        let answer = world.post(&format!("/projections/ledger/{path}"), "application/json", "");
        assert!(answer.status == 409 && answer.body.contains(expected), "{}", answer.body);
    }
    world.kill();
    world.start();
    // The folder still has version 2, which answers until version 1 has caught up by itself.
    assert_eq!(codes_and_events(&world.rows_at("ledger", &position)).1, 6_000);
    wait_version(&world, 1);
    assert_eq!(codes_and_events(&world.rows_at("ledger", &position)), (vec![1], 6_000));
    assert!(world.projection("ledger")["rolled_back_from"].is_string());
}

#[test]
fn another_module_in_the_middle_of_a_rollback_keeps_the_former_generation() {
    let mut world = World::new();
    std::fs::write(world.directory.path().join("shadowbox.toml"), "[batch]\nevents = 20\ncommit_rows = 5\n").unwrap();
    world.drop_module("ledger", &module("ledger+v2"));
    world.append(&[moved("left", 0, "a0", 0)]);
    world.start();
    world.wait_live("ledger");
    // From version 2 down to version 1, which counts as another version, too.
    world.drop_module("ledger", &module("ledger"));
    wait_version(&world, 1);
    let lines: Vec<_> = (1..6_000).map(|n| moved("left", n, &format!("a{}", n % 50), n)).collect();
    let position = world.append(&lines);
    world.rows_at("ledger", &position);
    world.stop();
    // It dies in the middle: each batch is a commit, and there are three hundred.
    world.try_start(&[], Some("commit.rows@/1.sqlite=kill:100")).unwrap();
    world.wait_live("ledger");
    world.post("/projections/ledger/rollback", "application/json", "");
    let status = wait_for("the middle of the rollback", || world.ended());
    assert!(!status.success(), "{}", world.log());
    world.drop_module("ledger", &module("ledger+v2,broken"));
    world.start();
    let status = world.wait_until("ledger", "the failing build", |p| p["building"]["error"].is_string());
    assert_eq!((&status["version"], &status["generation"]), (&1.into(), &2.into()));
    // What failed makes room for what is kept.
    assert!(roll_back(&world).contains("generation 1 "));
    assert_eq!(codes_and_events(&world.rows_at("ledger", &position)), (vec![3], 6_000));
}

#[test]
fn what_cannot_be_rolled_back_to_is_said() {
    let mut world = World::running(&["ledger"]);
    let refused = |world: &World, expected: &str| {
        let answer = world.post("/projections/ledger/rollback", "application/json", "");
        assert!(answer.status == 409 && answer.body.contains(expected), "{}", answer.body);
        let output = world.run(&["rollback", "ledger", "--wait"]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && error.contains(expected), "{error}");
        // The live one goes on, and nothing is held.
        let status = world.wait_live("ledger");
        assert!(status["rolled_back_from"].is_null() && status["building"].is_null(), "{status}");
    };
    world.append(&[moved("left", 0, "a", 1)]);
    world.rows_at("ledger", "0");
    refused(&world, "no former generation to go back to");
    assert_eq!(world.post("/projections/nobody/rollback", "application/json", "").status, 404);
    second_version(&world, 4);
    let (file, aside) = (world.data().join("views/ledger/1.sqlite"), world.data().join("aside"));
    std::fs::rename(&file, &aside).unwrap();
    refused(&world, "views/ledger/1.sqlite");
    std::fs::rename(&aside, &file).unwrap();
    let hash = shadowbox::plugin::hash(&module("ledger"));
    let stored = world.data().join(format!("modules/{hash}.wasm"));
    std::fs::rename(&stored, &aside).unwrap();
    refused(&world, &hash[..12]);
    std::fs::rename(&aside, &stored).unwrap();
    // Version 2 of another log; version 1 knows the one before.
    world.stop();
    for suffix in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(world.data().join(format!("log.sqlite{suffix}")));
    }
    world.append(&[moved("left", 0, "other", 1)]);
    world.start();
    world.wait_until("ledger", "the fault", |p| p["state"] == "faulted");
    let output = world.run(&["rollback", "ledger"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("the log is not the one that") && error.contains("1.sqlite"), "{error}");
    std::fs::remove_file(world.plugins().join("ledger.wasm")).unwrap();
    world.wait_until("ledger", "the stop", |p| p["state"] == "stopped");
    assert!(
        world.post("/projections/ledger/rollback", "application/json", "").body.contains("no module in the plugin")
    );
}

#[test]
fn nobody_goes_back_to_a_view_that_belongs_to_another_projection_now() {
    let world = World::running(&["ledger"]);
    let position = world.append(&[moved("left", 0, "a", 1), event("left", "Looks", "looks", 1, Value::Null)]);
    world.rows_at("ledger", &position);
    // Version 2 has another name for one of its views, and somebody else takes the one that is free.
    world.drop_module("ledger", &patched(&module("ledger+v2"), "sights", "sihgts"));
    wait_version(&world, 2);
    world.drop_module("other", &patched(&module("ledger"), "ledger", "legder"));
    world.wait_live("legder");
    let sights = world.rows_at("sights", &position);
    let refused = world.run(&["rollback", "ledger"]);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(said.contains("view \"sights\" belongs to projection \"legder\" now"), "{said}");
    let owner = |name: &str| {
        let views = world.get("/views").json();
        let view = views.as_array().unwrap().iter().find(|view| view["name"] == name).cloned();
        view.unwrap_or_else(|| panic!("{name} is not there: {views}"))["projection"].clone()
    };
    assert_eq!(
        (owner("sights"), owner("sihgts"), owner("ledger")),
        ("legder".into(), "ledger".into(), "ledger".into())
    );
    assert_eq!(world.rows_at("sights", &position), sights);
    assert_eq!(world.wait_live("ledger")["version"], 2);
    // What is refused for a name, may have it once nobody else has, without anybody touching its file.
    world.drop_module("third", &patched(&patched(&module("ledger"), "ledger", "lecher"), "sights", "sihgts"));
    wait_for("the refusal", || {
        world.get("/status").body.contains("belongs to projection \\\"ledger\\\"").then_some(())
    });
    world.drop_module("ledger", &patched(&module("ledger"), "sights", "visits"));
    world.wait_live("lecher");
    assert_eq!(owner("sihgts"), "lecher");
}
