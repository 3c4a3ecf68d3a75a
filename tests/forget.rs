//! What is forgotten is gone: from the log, from every view that took it, from dead letters. And what a source keeps for a
//! time only, or what is damaged, is never missing from a view in silence.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::support::{World, module, moved, wait_for};

/// An event of a stream.
fn of_stream(kind: &str, n: i64, stream: &str, account: &str) -> String {
    let mut event: Value = serde_json::from_str(&moved("left", n, account, n)).unwrap();
    (event["subject"], event["type"]) = (stream.into(), kind.into());
    event.to_string()
}

/// The files below a directory that have a text in them.
fn files_with(directory: &Path, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files_with(&path, text));
        } else if std::fs::read(&path).is_ok_and(|bytes| bytes.windows(text.len()).any(|w| w == text.as_bytes())) {
            // One that is gone meanwhile has nothing.
            found.push(path.display().to_string());
        }
    }
    found
}

fn config(world: &World, text: &str) {
    std::fs::write(world.directory.path().join("shadowbox.toml"), text).unwrap();
}

fn json_of(world: &World, arguments: &[&str]) -> Value {
    serde_json::from_str(&world.ok(&[arguments, &["--json"]].concat())).unwrap()
}

/// The exit code of `verify`, and what it says.
fn verify(world: &World, projection: &str) -> (i32, String) {
    let output = world.run(&["verify", projection]);
    (output.status.code().unwrap(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

/// Waits until a projection is live without anything that is forgotten.
fn wait_clean(world: &World, projection: &str) -> Value {
    world.wait_until(projection, "rows without what is forgotten", |p| {
        p["state"] == "live" && p["lag_events"] == 0 && p["forgotten"].is_null() && p["building"].is_null()
    })
}

#[test]
fn what_is_forgotten_is_in_no_file_and_the_views_are_rebuilt_without_it() {
    let mut world = World::new();
    config(&world, "[failures]\npolicy = 'park'\n");
    world.drop_module("ledger", &module("ledger"));
    world.start();
    world.append(&(0..50).map(|n| moved("left", n, &format!("a{}", n % 5), n)).collect::<Vec<_>>());
    let doubtful = of_stream("Doubtful", 51, "alice", "wonderland");
    let mut position = world.append(&[of_stream("Moved", 50, "alice", "wonderland"), doubtful.clone()]);
    assert_eq!(world.rows_at("ledger", &position).len(), 6);
    let letters = world.get("/projections/ledger/dead-letters").body;
    assert!(letters.contains("wonderland has 50, and 51 is doubtful"), "{letters}");
    // A former generation has it, too.
    world.ok(&["rebuild", "ledger", "--wait"]);
    assert!(files_with(&world.data(), "wonderland").len() >= 3, "the log and two generations");
    let forget =
        ["forget", "--source", "left", "--stream", "alice", "--by", "dpo", "--reason", "ticket 4711", "--json"];
    let done: Value = serde_json::from_str(&world.ok(&forget)).unwrap();
    assert_eq!((&done["forgetting"]["events"], &done["forgetting"]["number"]), (&json!(2), &json!(1)), "{done:#}");
    // It may be rebuilt already.
    assert!(done["projections"].as_array().unwrap().iter().all(|p| p["projection"] == "ledger" && p["module"] == true));
    let status = wait_clean(&world, "ledger");
    assert_eq!((&status["generation"], &status["dead_letters"]), (&json!(3), &json!({ "parked": 0, "skipped": 0 })));
    wait_for("files without it", || files_with(&world.data(), "wonderland").is_empty().then_some(()));
    // Positions have not moved, and the gap is complete.
    let rows = world.rows_at("ledger", &position);
    assert_eq!((rows.len(), &rows[4]["events"]), (5, &json!(10)));
    assert_eq!(verify(&world, "ledger").0, 0);
    let events = world.ok(&["events", "--stream", "alice"]);
    let events: Vec<Value> = events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(events.len(), 2);
    assert!(
        events.iter().all(|e| e["forgotten"] == true && e["data"].is_null() && e["subject"] == "alice"),
        "{events:?}"
    );
    // Who sends it again brings nothing back.
    let again = world.post("/events", "application/cloudevents+json", &doubtful).json();
    assert_eq!((&again["duplicates"], &again["position"]), (&json!(1), &json!(51)), "{again}");
    // It is recorded, and there is nothing left to be forgotten.
    let recorded = world.get("/forgettings").json();
    let [recorded] = recorded.as_array().unwrap().as_slice() else { panic!("{recorded}") };
    assert_eq!(
        (&recorded["by"], &recorded["reason"], &recorded["stream"]),
        (&json!("dpo"), &json!("ticket 4711"), &json!("alice"))
    );
    assert!(recorded["begun"].is_string() && recorded["ended"].is_string());
    assert!(json_of(&world, &forget[..9])["forgetting"].is_null());
    // Life goes on, after a restart, too.
    position = world.append(&[of_stream("Moved", 52, "alice", "again")]);
    assert_eq!(world.rows_at("ledger", &position).len(), 6);
    world.stop();
    world.start();
    assert_eq!(world.rows_at("ledger", &position).len(), 6);
    assert_eq!(world.projection("ledger")["generation"], 3, "nothing is rebuilt again");
    assert!(files_with(&world.data(), "wonderland").is_empty());
}

#[test]
fn views_without_a_module_are_named_and_rebuilt_when_it_is_back() {
    let mut world = World::running(&["ledger"]);
    let position = world.append(&[of_stream("Moved", 0, "alice", "wonderland"), of_stream("Moved", 1, "bob", "b")]);
    assert_eq!(world.rows_at("ledger", &position).len(), 2);
    std::fs::remove_file(world.plugins().join("ledger.wasm")).unwrap();
    world.wait_until("ledger", "a stop", |p| p["state"] == "stopped");
    let said = world.ok(&["forget", "--source", "left", "--stream", "alice"]);
    assert!(
        said.contains("1 events are forgotten (forgetting 1)")
            && said.contains("ledger, generation 1, may still have it")
    );
    assert!(said.contains("(ledger, sights); it is rebuilt when its module is in the plugin folder"), "{said}");
    world.wait_until("ledger", "what is known", |p| p["forgotten"] == 1);
    let (code, said) = verify(&world, "ledger");
    assert!(
        code == 2 && said.contains("may have what was forgotten since its rows were made (forgetting 1)"),
        "{said}"
    );
    // Without a runtime as well, and after a restart without the module.
    world.stop();
    let said = world.ok(&["forget", "--source", "left", "--id", "left-1"]);
    assert!(said.contains("(forgetting 2)") && said.contains("ledger, generation 1, may still have it"), "{said}");
    assert_eq!(json_of(&world, &["status"])["projections"][0]["forgotten"], 1);
    world.start();
    world.wait_until("ledger", "what is known", |p| p["forgotten"] == 1 && p["generation"] == 1);
    world.drop_module("ledger", &module("ledger"));
    assert_eq!(wait_clean(&world, "ledger")["generation"], 2);
    assert!(world.rows_at("ledger", &position).is_empty());
    wait_for("files without it", || files_with(&world.data(), "wonderland").is_empty().then_some(()));
    assert_eq!(verify(&world, "ledger").0, 0);
}

#[test]
fn a_projection_that_stands_at_an_event_goes_on_when_it_is_forgotten() {
    let world = World::running(&["ledger"]);
    world.append(&[of_stream("Moved", 0, "bob", "b"), of_stream("Doubtful", 1, "alice", "wonderland")]);
    world.wait_until("ledger", "the fault", |p| p["state"] == "faulted");
    let position = world.append(&[of_stream("Moved", 2, "bob", "b")]);
    assert!(world.get("/status").body.contains("wonderland"));
    world.ok(&["forget", "--source", "left", "--stream", "alice"]);
    assert_eq!(world.rows_at("ledger", &position)[0]["events"], 2);
    let status = world.wait_live("ledger");
    assert_eq!((&status["generation"], &status["fault"]), (&json!(1), &Value::Null), "it had not taken it");
    assert!(!world.get("/status").body.contains("wonderland") && files_with(&world.data(), "wonderland").is_empty());
    assert_eq!(verify(&world, "ledger").0, 0);
}

#[test]
fn who_asks_for_forgotten_events_gets_their_places() {
    let world = World::running(&[]);
    world.drop_module("ledger", &module("ledger+columns"));
    world.wait_live("ledger");
    let looks = |n: i64, stream: &str| of_stream("Looks", n, stream, "wonderland");
    let position = world.append(&[looks(0, "alice"), looks(1, "bob"), looks(2, "alice")]);
    let seen = |world: &World| {
        let rows = world.rows_at("sights", &position);
        rows.iter().map(|row| row["seen"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(seen(&world), ["alice", "bob", "alice"]);
    world.ok(&["forget", "--source", "left", "--stream", "alice", "--stream-name"]);
    wait_clean(&world, "ledger");
    assert_eq!(seen(&world), ["forgotten", "bob", "forgotten"]);
    assert_eq!(verify(&world, "ledger").0, 0);
    wait_for("files without the name", || files_with(&world.data(), "alice").is_empty().then_some(()));
    let refused = world.run(&["forget", "--source", "left", "--stream", "left-1", "--stream-name"]);
    assert!(refused.status.success(), "there is no such stream, and nothing is done");
}

#[test]
fn forgetting_beside_appends_rebuilds_and_commits_leaves_nothing() {
    const ROUNDS: i64 = 12;
    let mut world = World::new();
    config(&world, "[batch]\nevents = 50\ncommit_rows = 20\n");
    world.drop_module("ledger", &module("ledger"));
    world.start();
    let name = |person: i64| format!("person{person}x");
    // Each event is of one person of all there are; every account is a person's.
    let line = |n: i64| of_stream("Moved", n, &name(n % 40), &name(n % 40));
    world.append(&(0..2_000).map(line).collect::<Vec<_>>());
    let done = AtomicBool::new(false);
    let last = std::thread::scope(|scope| {
        let (world, done) = (&world, &done);
        let writer = scope.spawn(move || {
            let mut n = 2_000;
            while !done.load(Ordering::Relaxed) {
                // Those who are forgotten do not come back.
                let lines: Vec<_> = (n..n + 20).filter(|n| n % 40 >= ROUNDS).map(line).collect();
                n += 20;
                if !lines.is_empty() {
                    let body = format!("[{}]", lines.join(","));
                    let answer = world.post("/events", "application/cloudevents-batch+json", &body);
                    assert_eq!(answer.status, 200, "{}", answer.body);
                }
            }
        });
        for person in 0..ROUNDS {
            if person % 3 == 0 {
                // It may be under way already.
                world.post("/projections/ledger/rebuild", "application/json", "");
            }
            let answer = json_of(world, &["forget", "--source", "left", "--stream", &name(person)]);
            assert_eq!(answer["forgetting"]["events"], 50, "{answer}");
        }
        done.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        world.get("/status").json()["log"]["head"].to_string()
    });
    let rows = wait_for("rows of those who are left", || {
        wait_clean(&world, "ledger");
        let rows = world.rows_at("ledger", &last);
        (rows.len() == 40 - ROUNDS as usize).then_some(rows)
    });
    assert!(rows.iter().all(|row| row["events"].as_i64() >= Some(50)), "{rows:?}");
    for person in 0..ROUNDS {
        wait_for("files without a person", || {
            // The names of their streams were not to be forgotten; they are in the log alone.
            let files = files_with(&world.data(), &format!("\"account\":\"{}\"", name(person)));
            let views = files_with(&world.data().join("views"), &name(person));
            (files.is_empty() && views.is_empty()).then_some(())
        });
    }
    assert_eq!(verify(&world, "ledger").0, 0);
}

#[test]
fn what_is_kept_for_a_time_only_stays_in_views_and_a_thinner_one_waits_for_a_person() {
    let mut world = World::running(&["ledger"]);
    let lines = (0..20).map(|n| moved(if n % 2 == 0 { "left" } else { "right" }, n, &format!("a{}", n % 4), 1));
    let lines: Vec<_> = lines.collect();
    world.append(&lines);
    let rows = world.rows_at("ledger", "19");
    world.stop();
    config(&world, "[sources.'l*']\nkeep = '1s'\n");
    world.start();
    wait_for("the retention", || {
        let forgettings = json_of(&world, &["log"])["forgettings"].clone();
        let [done] = forgettings.as_array().unwrap().as_slice() else { return None };
        assert_eq!((&done["by"], &done["source"], &done["events"]), (&json!("retention"), &json!("l*"), &json!(10)));
        done["ended"].is_string().then_some(())
    });
    world.stop();
    config(&world, "");
    world.start();
    // What was folded stays, and nothing is rebuilt; but nobody can prove it any more.
    let live = world.wait_live("ledger");
    assert_eq!(
        (&live["generation"], &live["complete_from"], &live["forgotten"]),
        (&json!(1), &Value::Null, &Value::Null)
    );
    assert_eq!(world.rows_at("ledger", "19"), rows);
    let (code, said) = verify(&world, "ledger");
    assert!(code == 2 && said.contains("before position 19 the log has lost content"), "{said}");
    // A rebuild lacks something, so it waits, and goes on meanwhile.
    let rebuilding = world.run(&["rebuild", "ledger", "--wait"]);
    let said = String::from_utf8(rebuilding.stderr).unwrap();
    assert!(!rebuilding.status.success() && said.contains("content of events before position 19"), "{said}");
    assert!(said.contains("shadowbox promote ledger"), "{said}");
    let position = world.append(&[moved("left", 20, "new", 1)]);
    assert_eq!(world.rows_at("ledger", &position).len(), 5);
    assert!(world.run(&["rollback", "ledger"]).status.code() == Some(1));
    world.ok(&["promote", "ledger", "--discard"]);
    let status = world.wait_live("ledger");
    assert_eq!((&status["generation"], &status["waits"]), (&json!(1), &Value::Null));
    assert!(!world.run(&["promote", "ledger"]).status.success(), "nothing waits");
    // After a restart it waits again; then a person takes it.
    world.ok(&["rebuild", "ledger"]);
    world.wait_until("ledger", "a generation that waits", |p| p["waits"].is_string());
    world.stop();
    world.start();
    let status = world.wait_until("ledger", "a generation that waits", |p| p["waits"].is_string());
    assert_eq!((&status["generation"], &status["building"]["complete_from"]), (&json!(1), &json!(19)));
    world.ok(&["promote", "ledger"]);
    let live = world.wait_until("ledger", "the promotion", |p| p["state"] == "live" && p["building"].is_null());
    assert_eq!((&live["complete_from"], &live["waits"]), (&json!(19), &Value::Null));
    let answer = world.get("/views/ledger");
    assert_eq!(answer.header("shadowbox-complete-from"), "19");
    let rows = answer.json();
    let of = |account: &str| rows.as_array().unwrap().iter().find(|row| row["account"] == account).cloned();
    assert_eq!(rows.as_array().unwrap().len(), 3, "two accounts of the right, and the new one: {rows}");
    assert!(of("a1").is_some_and(|row| row["events"] == 5) && of("new").is_some());
    let proved = json_of(&world, &["verify", "ledger"]);
    assert_eq!((&proved["equal"], &proved["complete_from"]), (&json!(true), &json!(19)), "{proved:#}");
    // The fuller one is kept, and may come back by itself.
    world.ok(&["rollback", "ledger", "--wait"]);
    assert_eq!(world.rows_at("ledger", &position).len(), 5);
}

#[test]
fn damage_is_passed_over_only_if_that_is_said_and_never_in_silence() {
    let mut world = World::running(&["ledger"]);
    let line = |n: i64| moved("left", n, &format!("a{}", n % 500), n);
    world.append(&(0..9_000).map(line).collect::<Vec<_>>());
    world.rows_at("ledger", "8999");
    world.stop();
    let log = world.data().join("log.sqlite");
    let whole = std::fs::read(&log).unwrap();
    {
        let file = rusqlite::Connection::open(&log).unwrap();
        let sql = "UPDATE blocks SET payloads = zeroblob(length(payloads)) WHERE first = 4096";
        assert_eq!(file.execute(sql, []).unwrap(), 1);
    }
    world.start();
    world.ok(&["rebuild", "ledger"]);
    let status = world.wait_until("ledger", "the fault", |p| p["building"]["error"].is_string());
    let said = status["building"]["error"].to_string();
    assert!(
        said.contains("events 4096 to 8191 cannot be read") && said.contains("restore the log from a copy"),
        "{said}"
    );
    world.stop();
    world.start_with(&["--skip-damaged"]);
    let status = world.wait_until("ledger", "a generation that waits", |p| p["waits"].is_string());
    assert!(status["waits"].as_str().unwrap().contains("events 4096 to 8191, which could not be read"), "{status}");
    assert_eq!(
        (&status["building"]["lag_events"], &status["building"]["position"]),
        (&json!(0), &json!(8_999)),
        "{status}"
    );
    world.ok(&["promote", "ledger"]);
    let promoted = world.wait_until("ledger", "the promotion", |p| p["generation"] != 1 && p["building"].is_null());
    assert_eq!(promoted["damaged"], json!([[4_096, 8_191]]));
    let answer = world.get("/views/ledger");
    let events = |answer: &Value| answer.as_array().unwrap().iter().map(|r| r["events"].as_i64().unwrap()).sum::<i64>();
    assert_eq!((answer.header("shadowbox-damaged"), events(&answer.json())), ("4096-8191", 9_000 - 4_096));
    let (code, said) = verify(&world, "ledger");
    assert!(code == 2 && said.contains("were made without the events 4096 to 8191"), "{said}");
    // It says so for ever, also when the log is whole again; then a rebuild has everything, and nobody needs to be asked.
    world.stop();
    std::fs::write(&log, &whole).unwrap();
    world.start();
    assert_eq!(world.wait_live("ledger")["damaged"], json!([[4_096, 8_191]]));
    let (code, said) = verify(&world, "ledger");
    assert!(code == 2 && said.contains("were made without the events 4096 to 8191"), "{said}");
    world.ok(&["rebuild", "ledger", "--wait"]);
    assert_eq!(events(&world.rows_at("ledger", "8999").into()), 9_000);
    assert_eq!((&world.wait_live("ledger")["damaged"], verify(&world, "ledger").0), (&json!([]), 0));
}

#[test]
fn two_machines_with_copies_of_one_log_have_one_digest() {
    let mut worlds = [World::new(), World::new()];
    // Rows depend on the order across the two sources.
    let line = |n: i64| moved(if n * n % 7 < 3 { "left" } else { "right" }, n, &format!("a{}", n % 20), n);
    for chunk in (0..3_000).map(line).collect::<Vec<_>>().chunks(700) {
        worlds[0].append(chunk);
    }
    worlds[0].ok(&["forget", "--source", "left", "--id", "left-0"]);
    std::fs::create_dir(worlds[1].data()).unwrap();
    std::fs::copy(worlds[0].data().join("log.sqlite"), worlds[1].data().join("log.sqlite")).unwrap();
    config(&worlds[1], "[batch]\nevents = 7\ncommit_rows = 11\n");
    let proofs = worlds.each_mut().map(|world| {
        world.drop_module("ledger", &module("ledger"));
        world.start();
        world.wait_live("ledger");
        let proved = json_of(world, &["verify", "ledger"]);
        assert_eq!(proved["equal"], true, "{proved:#}");
        (proved["position"].clone(), proved["views"][0]["live"].clone())
    });
    assert_eq!(proofs[0], proofs[1]);
    assert!(proofs[0].1["rows"] == 20 && proofs[0].1["digest"].as_str().is_some_and(|d| d.len() == 32), "{proofs:?}");
}
