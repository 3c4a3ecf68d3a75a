//! Proofs: a live view is the fold of the log, or the rows that are not are named; and what a module would change is
//! known before it is dropped.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::support::{World, event, module, moved, patched, root, wait_for};

/// A command with `--json`, its exit code and what it answers.
fn proof(world: &World, arguments: &[&str]) -> (i32, Value) {
    let output = world.run(&[arguments, &["--json"]].concat());
    let answer = serde_json::from_slice(&output.stdout);
    let answer = answer.unwrap_or_else(|_| String::from_utf8(output.stderr).unwrap().into());
    assert_eq!(left_behind(world), 0, "{arguments:?}");
    (output.status.code().unwrap(), answer)
}

/// How many directories there are for copies and replays.
fn left_behind(world: &World) -> usize {
    let entries = std::fs::read_dir(world.data().join("shadow")).into_iter().flatten().flatten();
    entries.filter(|entry| entry.path().is_dir()).count()
}

/// A module as a file outside of the plugin folder.
fn module_file(world: &World, name: &str, bytes: &[u8]) -> PathBuf {
    let path = world.directory.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn plan(world: &World, name: &str, more: &[&str]) -> (i32, Value) {
    let path = module_file(world, "ledger.wasm", &module(name));
    proof(world, &[&["plan", path.to_str().unwrap(), "--config", "run.toml"], more].concat())
}

/// The configuration that `World::start` gives by flags.
fn with_plugins(world: &World) {
    std::fs::write(world.directory.path().join("run.toml"), "plugins = 'plugins'\n").unwrap();
}

fn view<'a>(answer: &'a Value, name: &str) -> &'a Value {
    answer["views"].as_array().unwrap().iter().find(|v| v["view"] == name).unwrap_or_else(|| panic!("{answer:#}"))
}

/// Two services, in many appends, so that the recorded order is that of arrival.
fn append_interleaved(world: &World, n: i64) -> String {
    let lines: Vec<_> =
        (0..n).map(|i| moved(if i * i % 7 < 3 { "left" } else { "right" }, i, &format!("a{}", i % 20), i)).collect();
    let mut position = String::new();
    for chunk in lines.rchunks(37) {
        position = world.append(chunk);
        world.rows_at("ledger", &position);
    }
    position
}

#[test]
fn a_view_that_is_the_fold_is_equal_in_whatever_batches_while_it_goes_on() {
    let mut world = World::running(&["ledger"]);
    append_interleaved(&world, 400);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut n = 400;
            while !done.load(Ordering::Relaxed) {
                world.append(&[moved("left", n, "a1", 1)]);
                n += 1;
            }
            n
        });
        for _ in 0..3 {
            let (code, answer) = proof(&world, &["verify", "ledger"]);
            assert_eq!((code, &answer["equal"]), (0, &true.into()), "{answer:#}");
            assert!(answer["events"].as_u64() >= Some(400) && answer["dropped"].as_u64() >= Some(1), "{answer:#}");
        }
        done.store(true, Ordering::Relaxed);
        let n = writer.join().unwrap();
        // As far as a position that is not there yet when it is asked for.
        let at = world.append(&[moved("left", n, "a1", 1)]);
        let (code, answer) = proof(&world, &["verify", "ledger", "--at", &at]);
        assert_eq!((code, &answer["events"]), (0, &(n + 1).into()), "{answer:#}");
    });
    // The same seed gives the same batches, and the digests do not depend on any.
    let seeded = |world: &World, seed: &str| {
        let (code, mut answer) = proof(world, &["verify", "ledger", "--seed", seed]);
        assert_eq!(code, 0, "{answer:#}");
        let answer = answer.as_object_mut().unwrap();
        for measured in ["seconds", "sandbox_memory", "process_memory"] {
            answer.remove(measured).unwrap();
        }
        answer.clone()
    };
    let first = seeded(&world, "7");
    world.stop();
    assert_eq!(first, seeded(&world, "7"), "without a runtime, too");
    let other = seeded(&world, "8");
    assert_eq!(first["views"], other["views"]);
    assert_ne!(first["batches"], other["batches"]);
    let said = world.ok(&["verify", "ledger", "--seed", "7"]);
    assert!(said.starts_with("equal: ledger, generation 1, at ") && said.contains("--seed 7"), "{said}");
    assert!(said.contains("view ledger: 20 rows, digest ") && said.contains("view sights: 0 rows"), "{said}");
}

#[test]
fn rows_that_differ_are_named_with_the_events_that_changed_them() {
    let mut world = World::running(&["ledger"]);
    let position = append_interleaved(&world, 100);
    world.stop();
    let file = rusqlite::Connection::open(world.data().join("views/ledger/1.sqlite")).unwrap();
    file.execute_batch(
        "UPDATE ledger SET amount = amount + 1, digest = 0 WHERE account = 'a3'; DELETE FROM ledger WHERE account = 'a4';
         INSERT INTO ledger SELECT 'stranger', 1, 2, 3, 4, NULL;",
    )
    .unwrap();
    drop(file);
    let (code, answer) = proof(&world, &["verify", "ledger"]);
    assert_eq!((code, &answer["equal"]), (1, &false.into()), "{answer:#}");
    let ledger = view(&answer, "ledger");
    let counts = ["equal", "changed", "added", "removed"].map(|kind| ledger[kind].as_u64().unwrap());
    assert_eq!(counts, [18, 1, 1, 1]);
    assert_ne!(ledger["live"]["digest"], ledger["shadow"]["digest"]);
    let row = |kind: &str| ledger["rows"].as_array().unwrap().iter().find(|r| r["kind"] == kind).unwrap().clone();
    let changed = row("changed");
    assert_eq!(changed["key"][0], serde_json::json!(["account", "a3"]));
    let columns: Vec<_> = changed["columns"].as_array().unwrap().iter().map(|c| c["column"].clone()).collect();
    assert_eq!(columns, ["amount", "digest"]);
    // 3 + 23 + 43 + 63 + 83
    assert_eq!((&changed["columns"][0]["live"], &changed["columns"][0]["shadow"]), (&216.into(), &215.into()));
    assert_eq!(changed["changes"], 5);
    let ids: Vec<_> = changed["events"].as_array().unwrap().iter().map(|e| e["id"].as_str().unwrap()).collect();
    let number = |id: &&str| id.rsplit_once('-').unwrap().1.parse::<i64>().unwrap();
    let mut numbers: Vec<_> = ids.iter().map(number).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, [3, 23, 43, 63, 83]);
    assert_eq!((&row("added")["key"][0][1], &row("added")["changes"]), (&"a4".into(), &5.into()));
    assert_eq!((&row("removed")["key"][0][1], &row("removed")["changes"]), (&"stranger".into(), &0.into()));
    let output = world.run(&["verify", "ledger"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.starts_with("different: ledger, generation 1, at "), "{said}");
    for expected in [
        "~ account \"a3\": amount live 216, replayed 215; digest live 0, replayed ",
        "+ account \"a4\": amount 220",
        "- account \"stranger\": amount 1; events 2",
        "changed by no event",
        "shadowbox rebuild ledger",
    ] {
        assert!(said.contains(expected), "{expected}\n{said}");
    }
    // A rebuild is the fold again.
    world.start();
    world.ok(&["rebuild", "ledger", "--wait"]);
    assert_eq!(proof(&world, &["verify", "ledger", "--at", &position]).0, 0);
}

#[test]
fn a_plugin_that_keeps_state_of_its_own_is_caught() {
    let world = World::running(&["ledger+stateful"]);
    append_interleaved(&world, 100);
    for seed in ["1", "2", "3"] {
        let (code, answer) = proof(&world, &["verify", "ledger", "--seed", seed]);
        assert_eq!(code, 1, "{answer:#}");
        let ledger = view(&answer, "ledger");
        assert!(ledger["changed"].as_u64() > Some(0));
        let columns = ledger["rows"].as_array().unwrap().iter().flat_map(|r| r["columns"].as_array().unwrap());
        assert!(columns.into_iter().all(|c| c["column"] == "code"), "{ledger:#}");
    }
}

#[test]
fn rows_of_modules_that_were_swapped_are_replayed_by_each_of_them() {
    let mut world = World::running(&["ledger"]);
    let swap = |world: &World, name: &str| {
        let hash = shadowbox::plugin::hash(&module(name));
        world.drop_module("ledger", &module(name));
        world.wait_until("ledger", "the swap", |p| p["module_hash"] == *hash);
        hash
    };
    world.append(&[moved("left", 0, "old", 1), moved("left", 1, "both", 1)]);
    world.rows_at("ledger", "1");
    let first = shadowbox::plugin::hash(&module("ledger"));
    let second = swap(&world, "ledger+tweaked");
    // It has made nothing yet.
    let (code, answer) = proof(&world, &["verify", "ledger"]);
    assert_eq!((code, &answer["modules"]), (0, &json!([{ "module": first, "after": null }])), "{answer:#}");
    world.append(&[moved("left", 2, "both", 1), moved("left", 3, "new", 1)]);
    world.rows_at("ledger", "3");
    swap(&world, "ledger");
    world.append(&[moved("left", 4, "last", 1)]);
    let rows = world.rows_at("ledger", "4");
    let codes: Vec<_> =
        rows.iter().map(|row| (row["account"].as_str().unwrap(), row["code"].as_i64().unwrap())).collect();
    assert_eq!(codes, [("both", 2), ("last", 1), ("new", 2), ("old", 1)]);
    // The modules of the past are kept, also when the folder has another one after a restart.
    world.stop();
    world.start();
    world.wait_live("ledger");
    let (code, answer) = proof(&world, &["verify", "ledger"]);
    let made = json!([
        { "module": first, "after": null }, { "module": second, "after": 1 }, { "module": first, "after": 3 },
    ]);
    assert_eq!((code, &answer["modules"], &answer["events"]), (0, &made, &json!(5)), "{answer:#}");
    let said = world.ok(&["verify", "ledger"]);
    let expected = format!("the rows after position 1 were made by module {}, swapped in", &second[..8]);
    assert!(said.contains(&expected), "{said}");
    // A row that none of them has made is found all the same.
    world.stop();
    let file = rusqlite::Connection::open(world.data().join("views/ledger/1.sqlite")).unwrap();
    file.execute("UPDATE ledger SET code = 1 WHERE account = 'new'", []).unwrap();
    drop(file);
    let (code, answer) = proof(&world, &["verify", "ledger"]);
    let rows = &view(&answer, "ledger")["rows"];
    assert_eq!((code, rows.as_array().unwrap().len(), &rows[0]["key"][0][1]), (1, 1, &"new".into()), "{answer:#}");
    assert_eq!(rows[0]["events"][0]["position"], 3);
}

#[test]
fn dead_letters_are_left_out_of_the_replay() {
    let mut world = World::new();
    std::fs::write(world.directory.path().join("shadowbox.toml"), "[failures]\npolicy = \"skip\"\n").unwrap();
    world.drop_module("ledger", &module("ledger"));
    world.start();
    let doubtful = event("left", "Doubtful", "bad", 1, json!({ "account": "b", "amount": 1 }));
    world.append(&[moved("left", 0, "a", 1), doubtful, moved("left", 2, "a", 1)]);
    world.rows_at("ledger", "2");
    let (code, answer) = proof(&world, &["verify", "ledger"]);
    assert_eq!((code, &answer["dead_letters"], &answer["events"]), (0, &1.into(), &2.into()), "{answer:#}");
}

#[test]
fn what_cannot_be_proved_is_neither_equal_nor_different() {
    let mut world = World::running(&["ledger"]);
    world.append(&[moved("left", 0, "a", 1), moved("left", 1, "b", 1)]);
    world.rows_at("ledger", "1");
    world.stop();
    let unknown = |arguments: &[&str], expected: &str| {
        let (code, answer) = proof(&world, arguments);
        assert!(code == 2 && answer.as_str().unwrap().contains(expected), "{answer}");
    };
    unknown(&["verify", "nobody"], "there is no projection \"nobody\"; there are: ledger");
    unknown(&["verify", "ledger", "--at", "2"], "is at 1, not at 2; no runtime is running");
    unknown(&["verify", "ledger", "--at", "up=2"], "one number");
    unknown(&["plan", "missing.wasm"], "missing.wasm");
    let hash = shadowbox::plugin::hash(&module("ledger"));
    let stored = world.data().join(format!("modules/{hash}.wasm"));
    std::fs::rename(&stored, world.data().join("aside")).unwrap();
    unknown(&["verify", "ledger"], &format!("the module {hash} that made the last commit cannot be run"));
    std::fs::rename(world.data().join("aside"), &stored).unwrap();
    for suffix in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(world.data().join(format!("log.sqlite{suffix}")));
    }
    world.append(&[moved("left", 0, "other", 1)]);
    let replaced = "the log is not the one that";
    unknown(&["verify", "ledger"], replaced);
    with_plugins(&world);
    let (code, answer) = plan(&world, "ledger+v2", &[]);
    assert!(code == 2 && answer.as_str().unwrap().contains(replaced), "{answer}");
}

#[test]
fn an_event_that_fails_now_is_what_comes_of_a_proof() {
    let mut world = World::running(&["ledger"]);
    with_plugins(&world);
    world.append(&[moved("left", 0, "a", 1), event("left", "OnlyVersion2Panics", "bad", 1, Value::Null)]);
    world.append(&[moved("left", 2, "a", 1)]);
    world.rows_at("ledger", "2");
    let (code, answer) = plan(&world, "ledger+v2", &[]);
    assert_eq!((code, &answer["action"], &answer["run"]["failed"]["by_live"]), (1, &"rebuild".into(), &false.into()));
    let error = answer["run"]["failed"]["error"].as_str().unwrap();
    assert!(error.contains("event \"bad\" (OnlyVersion2Panics) of source \"left\" at position 1"), "{error}");
    // Not among the last one of each source.
    assert_eq!(plan(&world, "ledger+v2", &["--last", "1"]).0, 0);
    // A view that claims to be made by the other module, which cannot have passed that event.
    world.stop();
    let hash = shadowbox::plugin::hash(&module("ledger+v2"));
    std::fs::write(world.data().join(format!("modules/{hash}.wasm")), module("ledger+v2")).unwrap();
    let file = rusqlite::Connection::open(world.data().join("views/ledger/1.sqlite")).unwrap();
    file.execute("UPDATE _shadowbox_generation SET module = ?", [&hash]).unwrap();
    let made = [shadowbox::plugin::hash(&module("ledger")), hash];
    file.execute("UPDATE _shadowbox_origin SET modules = replace(modules, ?, ?)", made).unwrap();
    drop(file);
    let (code, answer) = proof(&world, &["verify", "ledger"]);
    assert_eq!(code, 1, "{answer:#}");
    assert!(answer["failed"].as_str().unwrap().contains("event \"bad\""), "{answer:#}");
}

#[test]
fn real_views_of_three_services_are_the_fold_of_the_log() {
    let world = World::running(&["carrier-performance", "flight-board"]);
    let file = |source: &str| root().join(format!("tests/data/flights/{source}.jsonl.zst"));
    for source in ["fleet", "flights", "weather"] {
        world.ok(&["append", file(source).to_str().unwrap()]);
    }
    for name in ["carrier-performance", "flight-board"] {
        let (code, answer) = proof(&world, &["verify", name, "--at", "42627", "--seed", "1"]);
        assert_eq!(code, 0, "{answer:#}");
    }
}

#[test]
fn a_proof_that_is_interrupted_or_killed_leaves_nothing() {
    let world = World::running(&["ledger"]);
    let lines: Vec<_> = (0..20_000).map(|n| moved("left", n, &format!("a{}", n % 97), n)).collect();
    world.rows_at("ledger", &world.append(&lines));
    let verify = || {
        let mut command = world.command(&["verify", "ledger", "--data", "data"]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        wait_for("the proof to begin", || (left_behind(&world) > 0).then_some(()));
        child
    };
    let mut interrupted = verify();
    assert!(Command::new("kill").arg("-INT").arg(interrupted.id().to_string()).status().unwrap().success());
    let code = interrupted.wait().unwrap().code();
    // It may just have been done.
    assert!(code == Some(2) || code == Some(0), "{code:?}");
    assert_eq!(left_behind(&world), 0);
    let mut killed = verify();
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert_eq!(proof(&world, &["verify", "ledger"]).0, 0);
}

#[test]
fn a_plan_says_what_dropping_a_module_would_do() {
    let mut world = World::new();
    with_plugins(&world);
    world.append(
        &(0..60).map(|n| moved(["left", "right"][n as usize % 2], n, &format!("a{}", n % 6), n)).collect::<Vec<_>>(),
    );
    let (code, new) = plan(&world, "ledger", &[]);
    assert_eq!((code, &new["action"], &new["live"]), (0, &"new".into(), &Value::Null), "{new:#}");
    assert_eq!((&new["run"]["events"], &view(&new["run"], "ledger")["added"]), (&60.into(), &6.into()));
    assert!(
        !world.data().join("catalogue.sqlite").exists() && !world.data().join("views").exists(),
        "it made something"
    );

    world.drop_module("ledger", &module("ledger"));
    world.start();
    world.rows_at("ledger", "59");
    let (code, same) = plan(&world, "ledger", &[]);
    assert_eq!((code, &same["action"], &same["run"]), (0, &"nothing".into(), &Value::Null));
    let (code, swap) = plan(&world, "ledger+tweaked", &[]);
    assert_eq!((code, &swap["action"], &swap["schema"]), (0, &"hot_swap".into(), &serde_json::json!([])), "{swap:#}");
    let ledger = view(&swap["run"], "ledger");
    assert_eq!((&ledger["changed"], &ledger["equal"], &ledger["added"]), (&6.into(), &0.into(), &0.into()));
    let code_column = &ledger["samples"][0]["columns"][0];
    assert_eq!(
        (&code_column["column"], &code_column["live"], &code_column["shadow"]),
        (&"code".into(), &1.into(), &2.into())
    );

    let (code, rebuild) = plan(&world, "ledger+v2", &[]);
    assert_eq!((code, &rebuild["action"]), (0, &"rebuild".into()), "{rebuild:#}");
    let reasons: Vec<_> = rebuild["reasons"].as_array().unwrap().iter().map(|r| r.as_str().unwrap()).collect();
    assert_eq!(reasons, ["version 1 becomes 2", "view ledger gets column doubled, integer"]);
    // The column that only one side has is said once, and not in every row.
    assert_eq!(view(&rebuild["run"], "ledger")["samples"][0]["columns"].as_array().unwrap().len(), 1);
    assert_eq!((&rebuild["run"]["events"], &rebuild["live"]["position"]), (&60.into(), &59.into()));
    assert!(rebuild["run"]["sandbox_memory"].as_u64() > Some(1 << 16), "{rebuild:#}");
    assert!(rebuild["run"]["process_memory"].as_u64() > rebuild["run"]["sandbox_memory"].as_u64());

    // The last twenty, by both modules from empty views.
    let (code, last) = plan(&world, "ledger+tweaked", &["--last", "20"]);
    assert_eq!((code, &last["run"]["events"]), (0, &20.into()), "{last:#}");
    let ledger = view(&last["run"], "ledger");
    assert_eq!((&ledger["live"]["rows"], &ledger["changed"]), (&6.into(), &6.into()));
    let columns = ledger["samples"].as_array().unwrap().iter().flat_map(|r| r["columns"].as_array().unwrap());
    assert!(columns.into_iter().all(|c| c["column"] == "code"), "both saw the same events: {ledger:#}");

    let (code, broken) = plan(&world, "ledger+v2,broken", &[]);
    assert_eq!((code, &broken["action"]), (1, &"rebuild".into()));
    assert!(broken["run"]["failed"]["error"].as_str().unwrap().contains("this module is broken"), "{broken:#}");
    // None of it did anything.
    let status = world.wait_live("ledger");
    assert_eq!((&status["generation"], &status["version"], &status["error"]), (&1.into(), &1.into(), &Value::Null));
    // Only as far as the live generation, whether its order can be followed or, with another source, cannot.
    world.stop();
    world.append(&(60..80).map(|n| moved(["left", "right"][n as usize % 2], n, "late", n)).collect::<Vec<_>>());
    let (code, same_sources) = plan(&world, "ledger+v2", &[]);
    assert_eq!((code, &same_sources["run"]["events"]), (0, &60.into()), "{same_sources:#}");
    let path = module_file(&world, "ledger.wasm", &patched(&module("ledger+v2"), "right", "rihgt"));
    let (code, other_source) = proof(&world, &["plan", path.to_str().unwrap(), "--config", "run.toml"]);
    assert_eq!((code, &other_source["run"]["events"]), (0, &30.into()), "{other_source:#}");
    let reasons = other_source["reasons"].to_string();
    assert!(
        reasons.contains("not read source right any more") && reasons.contains("reads source rihgt, too"),
        "{reasons}"
    );
    assert_eq!(proof(&world, &["verify", "ledger"]).0, 0);
}

#[test]
fn a_plan_knows_what_the_folder_would_refuse() {
    let world = World::running(&["ledger"]);
    with_plugins(&world);
    world.append(&[moved("left", 0, "a", 1)]);
    world.rows_at("ledger", "0");
    let plan = |name: &str, bytes: &[u8]| {
        let path = module_file(&world, name, bytes);
        proof(&world, &["plan", path.to_str().unwrap(), "--config", "run.toml"])
    };
    let reason = |answer: &Value| answer["reasons"][0].as_str().unwrap().to_owned();
    let (code, answer) = plan("text.wasm", b"this is not wasm");
    assert!(
        code == 1 && answer["action"] == "refused" && reason(&answer).contains("not a WebAssembly file"),
        "{answer}"
    );
    // Another projection, but one of its views has the name of ours.
    let thief = patched(&module("ledger"), "ledger", "legder");
    let (code, answer) = plan("thief.wasm", &thief);
    assert_eq!((code, &answer["action"]), (1, &"refused".into()));
    assert!(reason(&answer).contains("view \"sights\" belongs to projection \"ledger\" already"), "{answer}");
    // Under another name, it is meant for the file that runs.
    let (code, answer) = plan("ledger-2.wasm", &module("ledger+v2"));
    assert_eq!((code, &answer["file"], &answer["action"]), (0, &"ledger.wasm".into(), &"rebuild".into()));
    assert!(answer["reasons"].to_string().contains("it takes the place of"), "{answer}");
    // What a person has rolled back from.
    world.drop_module("ledger", &module("ledger+v2"));
    world.wait_until("ledger", "the second version", |p| p["version"] == 2 && p["building"].is_null());
    world.ok(&["rollback", "ledger", "--wait"]);
    let (code, answer) = plan("ledger.wasm", &module("ledger+v2"));
    assert!(code == 0 && answer["action"] == "nothing" && reason(&answer).contains("rolled back from"), "{answer}");
    assert_eq!(proof(&world, &["verify", "ledger"]).0, 0, "what was rolled back to is the fold, too");
    let path = module_file(&world, "ledger.wasm", &module("ledger+tweaked"));
    let output = world.run(&["plan", path.to_str().unwrap(), "--config", "run.toml"]);
    let said = String::from_utf8(output.stdout).unwrap();
    for expected in [
        "ledger.wasm (projection ledger): a hot swap",
        "run in the shadow: 1 events, up to 0; ",
        "compared with generation 1, module ",
        "view ledger: 0 rows equal, 1 changed, 0 added, 0 removed",
        "~ account \"a\": code live 1, then 2",
    ] {
        assert!(said.contains(expected), "{expected}\n{said}");
    }
}
