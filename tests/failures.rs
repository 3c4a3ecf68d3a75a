//! Events that a module cannot apply: what is told of them, what becomes of them, and that nothing of it is lost or
//! applied twice.

use std::collections::BTreeMap;
use std::process::Stdio;

use proptest::prelude::*;
use serde_json::{Value, json};
use shadowbox::config::Policy;
use shadowbox::log::cloudevents;
use shadowbox::model::{NewEvent, Position};
use shadowbox::supervisor::Treatment;
use shadowbox::view::{DeadLetters, LetterCounts, Selector};

use crate::batches::{self, Limits, Rows, new_world, stored, wait};
use crate::support::{World, module, properties, root, wait_for};

/// An event of a stream that is named after its account.
fn line(source: &str, event_type: &str, n: i64, account: &str, amount: i64) -> String {
    let time = jiff::Timestamp::from_second(1_700_000_000 + n).unwrap();
    json!({
        "specversion": "1.0", "source": source, "type": event_type, "id": format!("{source}-{n}"), "subject": account,
        "time": time.to_string(), "data": { "account": account, "amount": amount },
    })
    .to_string()
}

/// Events of `left`, numbered from `first` on: a type, an account and an amount each.
fn left(first: i64, events: &[(&str, &str, i64)]) -> Vec<String> {
    let line =
        |(n, (event_type, account, amount)): (i64, &(&str, &str, i64))| line("left", event_type, n, account, *amount);
    (first..).zip(events).map(line).collect()
}

fn world(config: &str) -> World {
    let mut world = World::new();
    std::fs::write(world.directory.path().join("shadowbox.toml"), config).unwrap();
    world.drop_module("ledger", &module("ledger"));
    world.start();
    world
}

const PARK: &str = "[projections.ledger]\npolicy = \"park\"\n";

/// The events and the amount of each account.
fn accounts(world: &World, position: &str) -> BTreeMap<String, (i64, i64)> {
    let rows = world.rows_at("ledger", position);
    let number = |row: &Value, column: &str| row[column].as_i64().unwrap();
    let account =
        |row: &Value| (row["account"].as_str().unwrap().to_owned(), (number(row, "events"), number(row, "amount")));
    rows.iter().map(account).collect()
}

fn expected(accounts: &[(&str, i64, i64)]) -> BTreeMap<String, (i64, i64)> {
    accounts.iter().map(|(account, events, amount)| ((*account).to_owned(), (*events, *amount))).collect()
}

fn letters(world: &World) -> Vec<Value> {
    serde_json::from_str::<Value>(&world.ok(&["dead-letters", "list", "ledger", "--json"]))
        .unwrap()
        .as_array()
        .unwrap()
        .clone()
}

/// Number, position and state of each.
fn brief(letters: &[Value]) -> Vec<(u64, u64, &str)> {
    let number = |letter: &Value, field: &str| letter[field].as_u64().unwrap();
    letters.iter().map(|l| (number(l, "number"), number(l, "position"), l["state"].as_str().unwrap())).collect()
}

fn fails(world: &World, arguments: &[&str], expected: &str) {
    let output = world.run(arguments);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains(expected), "{error}");
}

/// Swaps the module of the ledger for one of the same version, and waits until it runs.
fn swap(world: &World, name: &str) {
    world.drop_module("ledger", &module(name));
    let hash = shadowbox::plugin::hash(&module(name));
    world.wait_until("ledger", "the swap", |p| p["module_hash"] == hash.as_str());
}

#[test]
fn a_pause_tells_everything_and_ends_when_the_policy_changes() {
    let mut world = world("");
    world.append(&left(0, &[("Moved", "a", 5), ("Doubtful", "a", -7), ("Moved", "b", 1), ("Moved", "a", 2)]));
    let status = world.wait_until("ledger", "the fault", |p| p["state"] == "faulted");
    assert_eq!(status["policy"], "pause");
    let fault = &status["fault"];
    for (field, value) in [
        ("projection", json!("ledger")),
        ("module_hash", json!(shadowbox::plugin::hash(&module("ledger")))),
        ("source", json!("left")),
        ("position", json!(1)),
        ("stream", json!("a")),
        ("type", json!("Doubtful")),
        ("id", json!("left-1")),
        ("time", json!("2023-11-14T22:13:21Z")),
    ] {
        assert_eq!(fault[field], value, "{field}: {fault:#}");
    }
    for (field, part) in [("message", "no debts: 5 and -7"), ("output", "no debts"), ("backtrace", "ledger::no_debts")]
    {
        assert!(fault[field].as_str().unwrap().contains(part), "{field}: {fault:#}");
    }
    let error = status["error"].as_str().unwrap();
    assert!(error.contains("shadowbox policy ledger park"), "{error}");
    let shown = world.ok(&["status"]);
    assert!(
        shown.contains("event \"left-1\" (Doubtful) of source \"left\" at position 1")
            && shown.contains("ledger::no_debts"),
        "{shown}"
    );

    // To try again without a change ends at the same event.
    world.ok(&["resume", "ledger"]);
    world.wait_until("ledger", "the same fault", |p| p["state"] == "faulted" && p["fault"]["position"] == 1);

    assert!(world.ok(&["policy", "ledger", "park"]).contains("park; it was set by a command"));
    assert_eq!(accounts(&world, "3"), expected(&[("a", 1, 5), ("b", 1, 1)]));
    let before = letters(&world);
    assert_eq!(brief(&before), [(1, 1, "parked"), (2, 3, "parked")]);
    fails(&world, &["resume", "ledger"], "is not faulted");

    // Both survive a restart.
    world.kill();
    world.start();
    assert_eq!(world.wait_live("ledger")["dead_letters"], json!({ "parked": 2, "skipped": 0 }));
    assert_eq!(letters(&world), before);
    assert!(world.ok(&["policy", "ledger"]).contains("park; it was set by a command, the configuration says pause"));
    world.append(&left(4, &[("Moved", "a", 1), ("Moved", "b", 1)]));
    assert_eq!(accounts(&world, "5"), expected(&[("a", 1, 5), ("b", 2, 2)]));
    assert_eq!(brief(&letters(&world)).last(), Some(&(3, 4, "parked")));

    assert!(world.ok(&["policy", "ledger", "default"]).contains("pause, by the configuration"));
    assert_eq!(world.put("/projections/ledger/policy", &json!({ "policy": "stop" })).status, 400);
    assert_eq!(world.put("/projections/other/policy", &json!({ "policy": "park" })).status, 404);
    world.append(&left(6, &[("Doubtful", "b", 1)]));
    world.wait_until("ledger", "the next fault", |p| p["state"] == "faulted" && p["fault"]["id"] == "left-6");
}

#[test]
fn a_parked_stream_waits_in_order_and_rejoins() {
    let world = world(PARK);
    world.append(&left(
        0,
        &[
            ("Moved", "a", 1),
            ("Doubtful", "a", 2),
            ("Moved", "b", 3),
            ("Moved", "a", 4),
            ("Doubtful", "a", 5),
            ("Moved", "b", 6),
        ],
    ));
    assert_eq!(accounts(&world, "5"), expected(&[("a", 1, 1), ("b", 2, 9)]));
    let parked = letters(&world);
    assert_eq!(brief(&parked), [(1, 1, "parked"), (2, 3, "parked"), (3, 4, "parked")]);
    assert_eq!(parked[0]["message"], "a has 1, and 2 is doubtful");
    assert!(parked[1].get("message").is_none(), "it was not tried: {}", parked[1]);

    fails(&world, &["dead-letters", "retry", "ledger", "2"], "waits for 1, which is before it in stream \"a\"");
    fails(&world, &["dead-letters", "retry", "ledger", "7"], "there is no dead letter 7");
    fails(&world, &["dead-letters", "retry", "ledger", "--stream", "c"], "no dead letters of stream \"c\"");
    fails(&world, &["dead-letters", "retry", "ledger", "--all"], "1 failed again");
    assert_eq!(letters(&world), parked, "nothing has changed");

    swap_after_a_batch(&world, 6);
    let answer = world.ok(&["dead-letters", "retry", "ledger", "1"]);
    assert!(answer.contains("applied 1") && answer.contains("2 are parked"), "{answer}");
    let answer = world.ok(&["dead-letters", "retry", "ledger", "--stream", "a", "--source", "left"]);
    assert!(answer.contains("applied 2") && answer.contains("0 are parked"), "{answer}");
    world.append(&left(7, &[("Doubtful", "a", 10)]));
    assert_eq!(accounts(&world, "7"), expected(&[("a", 5, 22), ("b", 3, 10)]));
    assert_eq!(world.wait_live("ledger")["dead_letters"], json!({ "parked": 0, "skipped": 0 }));
    let digest = [0_i64, 1, 3, 4, 7].iter().fold(0_i64, |digest, p| digest.wrapping_mul(31).wrapping_add(p * 2 + 1));
    assert_eq!(world.query("select digest from ledger where account = 'a'").trim(), format!("digest\n{digest}"));
}

/// Swaps to the mended module, which proves itself with event `n`.
fn swap_after_a_batch(world: &World, n: i64) {
    world.drop_module("ledger", &module("ledger+mended"));
    let hash = shadowbox::plugin::hash(&module("ledger+mended"));
    world.wait_until("ledger", "the swap", |p| p["module_hash"] == hash.as_str());
    world.append(&left(n, &[("Moved", "b", 1)]));
}

#[test]
fn what_is_skipped_is_left_out_alone() {
    let world = world("[failures]\npolicy = \"skip\"\n");
    world.append(&left(
        0,
        &[("Moved", "a", 1), ("Doubtful", "a", 2), ("Moved", "a", 3), ("Doubtful", "b", -4), ("Moved", "b", 5)],
    ));
    assert_eq!(accounts(&world, "4"), expected(&[("a", 2, 4), ("b", 1, 5)]));
    assert_eq!(brief(&letters(&world)), [(1, 1, "skipped"), (2, 3, "skipped")]);
    let shown = world.ok(&["dead-letters", "show", "ledger", "2"]);
    for part in ["dead letter 2, skipped", "left-3 (Doubtful)", "position 3", "no debts", "ledger::no_debts"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    swap(&world, "ledger+mended");
    // In any order: nothing waits for it.
    world.ok(&["dead-letters", "retry", "ledger", "2"]);
    assert_eq!(world.ok(&["dead-letters", "discard", "ledger", "1"]).lines().next(), Some("discarded 1"));
    assert_eq!(accounts(&world, "4"), expected(&[("a", 2, 4), ("b", 2, 1)]));
    assert_eq!(world.ok(&["dead-letters", "list", "ledger"]).trim(), "ledger has no dead letters");
}

#[test]
fn a_full_park_pauses_and_goes_on_when_there_is_room() {
    let world = world(&format!("[failures]\nmax_dead_letters = 3\n{PARK}"));
    let bad = ("Doubtful", "a", 1);
    world.append(&left(
        0,
        &[bad, ("Moved", "b", 1), bad, ("Moved", "b", 1), bad, ("Moved", "b", 1), bad, ("Moved", "b", 1)],
    ));
    let status = world.wait_until("ledger", "the fault", |p| p["state"] == "faulted");
    let error = status["error"].as_str().unwrap();
    for part in [
        "event \"left-6\" (Doubtful) of source \"left\" at position 6",
        "3 dead letters already",
        "retry or discard some",
    ] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(accounts(&world, "5"), expected(&[("b", 3, 3)]));
    assert_eq!(status["dead_letters"], json!({ "parked": 3, "skipped": 0 }));
    world.ok(&["dead-letters", "discard", "ledger", "1"]);
    assert_eq!(accounts(&world, "7"), expected(&[("b", 4, 4)]));
    assert_eq!(brief(&letters(&world)), [(2, 2, "parked"), (3, 4, "parked"), (4, 6, "parked")]);
    // An event that fails itself finds no room either.
    world.append(&left(8, &[("Doubtful", "c", 1)]));
    let status = world.wait_until("ledger", "the fault", |p| p["state"] == "faulted");
    assert!(status["error"].as_str().unwrap().contains("\"left-8\""), "{status}");
}

#[test]
fn a_retry_that_fails_in_the_middle_keeps_the_rest() {
    let world = world(PARK);
    let refused = |n: i64, account: &str| line("left", "Refused", n, account, 0);
    let mut lines = left(0, &[("Doubtful", "a", 1), ("Moved", "a", 2), ("Doubtful", "b", 10)]);
    lines.push(refused(3, "a"));
    lines.extend(left(4, &[("Moved", "a", 4), ("Moved", "b", 20)]));
    world.append(&lines);
    assert_eq!(accounts(&world, "5"), expected(&[]));
    swap(&world, "ledger+mended");
    let answer = world.post("/projections/ledger/dead-letters/retry", "application/json", "{\"all\": true}").json();
    assert_eq!((&answer["applied"], &answer["left"]["parked"]), (&json!(4), &json!(2)), "{answer}");
    assert_eq!(answer["failed"][0]["number"], 4);
    assert_eq!(answer["failed"][0]["message"], "the event says so");
    assert_eq!(accounts(&world, "5"), expected(&[("a", 2, 3), ("b", 2, 30)]));
    let left_over = letters(&world);
    assert_eq!(brief(&left_over), [(4, 3, "parked"), (5, 4, "parked")]);
    assert_eq!(left_over[0]["message"], "the event says so");
    assert_eq!(left_over[0]["module_hash"], shadowbox::plugin::hash(&module("ledger+mended")));
    // It still waits; the other stream does not.
    world.append(&left(6, &[("Moved", "a", 8), ("Moved", "b", 40)]));
    assert_eq!(accounts(&world, "7"), expected(&[("a", 2, 3), ("b", 3, 70)]));
    world.ok(&["dead-letters", "discard", "ledger", "4"]);
    world.ok(&["dead-letters", "retry", "ledger", "--all"]);
    assert_eq!(accounts(&world, "7"), expected(&[("a", 4, 15), ("b", 3, 70)]));
    assert!(letters(&world).is_empty());
}

#[test]
fn killed_in_the_middle_of_retries_nothing_is_applied_twice() {
    let mut world = world(&format!("[batch]\nevents = 4\n{PARK}"));
    let streams = ["a", "b", "c", "d", "e"];
    let mut lines = left(0, &streams.map(|stream| ("Doubtful", stream, 1)));
    lines.extend((5..3_000).map(|n| line("left", "Moved", n, streams[n as usize % 5], n)));
    world.append(&lines);
    assert_eq!(accounts(&world, "2999"), expected(&[]));
    swap(&world, "ledger+mended");
    let mut kills = 0;
    loop {
        let file = world.data().join("views/ledger/1.sqlite");
        let parked = || DeadLetters::open(&file).unwrap().counts().unwrap().parked;
        let before = parked();
        if before == 0 {
            break;
        }
        let retry = ["dead-letters", "retry", "ledger", "--all", "--data", "data"];
        let mut command = world.command(&retry);
        let mut retry = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // In the middle, wherever that is, or at the end.
        wait_for("some of it", || (parked() < before).then_some(()));
        world.kill();
        kills += 1;
        retry.wait().unwrap();
        world.start();
        world.wait_live("ledger");
    }
    assert!(kills > 1, "the retry was not interrupted");
    let of = |i: usize| (5..3_000).filter(move |n| n % 5 == i as i64);
    let fold: Vec<_> =
        streams.iter().enumerate().map(|(i, s)| (*s, 1 + of(i).count() as i64, 1 + of(i).sum::<i64>())).collect();
    assert_eq!(accounts(&world, "2999"), expected(&fold));
}

#[test]
fn a_rebuild_has_dead_letters_of_its_own() {
    let world = world(PARK);
    world.append(&left(0, &[("Doubtful", "a", 1), ("Moved", "a", 2), ("Moved", "b", 3), ("Doubtful", "c", 4)]));
    world.rows_at("ledger", "3");
    world.ok(&["dead-letters", "discard", "ledger", "--stream", "c"]);
    assert_eq!(brief(&letters(&world)), [(1, 0, "parked"), (2, 1, "parked")]);
    world.ok(&["rebuild", "ledger", "--wait"]);
    assert_eq!(brief(&letters(&world)), [(1, 0, "parked"), (2, 1, "parked"), (3, 3, "parked")]);
    assert_eq!(accounts(&world, "3"), expected(&[("b", 1, 3)]));
    // A module that applies them leaves nothing out.
    swap(&world, "ledger+mended");
    assert_eq!(letters(&world).len(), 3, "a hot swap goes on with what is there");
    world.ok(&["rebuild", "ledger", "--wait"]);
    assert!(letters(&world).is_empty());
    assert_eq!(accounts(&world, "3"), expected(&[("a", 2, 3), ("b", 1, 3), ("c", 1, 4)]));
}

#[test]
fn a_module_that_has_not_proved_itself_sets_nothing_aside() {
    let world = world(PARK);
    world.append(&left(0, &[("Moved", "a", 1)]));
    assert_eq!(accounts(&world, "0"), expected(&[("a", 1, 1)]));
    world.drop_module("ledger", &module("ledger+broken"));
    let hash = shadowbox::plugin::hash(&module("ledger+broken"));
    world.wait_until("ledger", "the swap", |p| p["module_hash"] == hash.as_str());
    world.append(&left(1, &[("Moved", "a", 1)]));
    assert_eq!(accounts(&world, "1"), expected(&[("a", 2, 2)]));
    let status = world.wait_until("ledger", "the refusal", |p| !p["error"].is_null());
    assert!(status["error"].as_str().unwrap().contains("is refused"), "{status}");
    assert!(letters(&world).is_empty());
}

#[test]
fn a_failure_is_saved_as_a_test_would_load_it() {
    let world = world(PARK);
    world.append(&left(0, &[("Moved", "ada", 5), ("Moved", "bob", 1), ("Doubtful", "ada", -7)]));
    world.rows_at("ledger", "2");
    let shown = world.ok(&["dead-letters", "show", "ledger", "1", "--save", "saved"]);
    assert!(shown.contains("still fails: ") && shown.contains(".load(\"saved\").given_saved()"), "{shown}");
    // The ledger's own tests load what is kept there.
    let kept = root().join("tests/plugins/ledger/tests/bad-event");
    for file in ["events.jsonl", "rows.jsonl"] {
        let saved = std::fs::read_to_string(world.directory.path().join("saved").join(file)).unwrap();
        assert_eq!(saved, std::fs::read_to_string(kept.join(file)).unwrap(), "{file}");
    }
    let manifest = std::fs::read(world.directory.path().join("saved/manifest.json")).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&manifest).unwrap()["projection"], "ledger");
    let letter = std::fs::read(world.directory.path().join("saved/letter.json")).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&letter).unwrap()["id"], "left-2");
}

#[test]
fn dead_letters_over_http() {
    let world = world(PARK);
    world.append(&left(0, &[("Doubtful", "a", -1), ("Moved", "a", 2), ("Moved", "a", 3)]));
    world.rows_at("ledger", "2");
    let page = world.get("/projections/ledger/dead-letters?after=1&limit=1").json();
    assert_eq!((&page["parked"], &page["dead_letters"].as_array().unwrap().len()), (&json!(3), &1), "{page}");
    assert_eq!(page["dead_letters"][0]["position"], 1);
    let first = world.get("/projections/ledger/dead-letters/1").json();
    assert!(first["backtrace"].as_str().unwrap().contains("no_debts"), "{first}");
    assert_eq!(world.get("/projections/ledger/dead-letters/9").status, 404);
    assert_eq!(world.get("/projections/other/dead-letters").status, 404);
    for (body, status) in
        [("{}", 400), ("{\"number\": 1, \"all\": true}", 400), ("{\"numbr\": 2}", 400), ("{\"number\": 2}", 409)]
    {
        let answer = world.post("/projections/ledger/dead-letters/retry", "application/json", body);
        assert_eq!(answer.status, status, "{body}: {}", answer.body);
    }
    assert_eq!(world.post("/projections/ledger/resume", "application/json", "").status, 409);
}

/// Whether it is of `right`, an account, whether it is doubtful, an amount.
type Made = (bool, u8, bool, i64);

fn made() -> impl Strategy<Value = Vec<Made>> {
    proptest::collection::vec((any::<bool>(), 0..4_u8, proptest::bool::weighted(0.15), -100..100_i64), 1..50)
}

/// Each account belongs to one source, so that its row is the fold of its stream. With the positions in the log.
fn events(made: &[Made], next: &mut u64) -> Vec<(NewEvent, u64)> {
    let event = |(right, account, doubtful, amount): &Made| {
        let (source, kind) = (["left", "right"][usize::from(*right)], if *doubtful { "Doubtful" } else { "Moved" });
        let position = *next;
        *next += 1;
        let line = line(source, kind, position as i64, &format!("{source}{account}"), *amount);
        (cloudevents::parse(line.as_bytes(), None).unwrap(), position)
    };
    made.iter().map(event).collect()
}

/// The rows of each stream up to its first doubtful event, or of all of it; and how many events are left out.
fn fold(events: &[(NewEvent, u64)], mended: bool) -> (Rows, u64) {
    let (mut rows, mut parked, mut left_out) = (Rows::new(), Vec::new(), 0);
    for (event, position) in events {
        if !mended && (event.event_type == "Doubtful" || parked.contains(&event.stream)) {
            parked.push(event.stream.clone());
            left_out += 1;
            continue;
        }
        let payload: Value = serde_json::from_slice(&event.payload).unwrap();
        let row = rows.entry(event.stream.clone()).or_default();
        let from = if event.source == "left" { 1 } else { 2 };
        let digest = row.2.wrapping_mul(31).wrapping_add(*position as i64 * 2 + from);
        *row = (row.0 + payload["amount"].as_i64().unwrap(), row.1 + 1, digest);
    }
    (rows, left_out)
}

fn reached(events: &[(NewEvent, u64)]) -> Option<Position> {
    events.last().map(|(_, position)| Position(*position))
}

async fn park_and_retry(before: &[Made], after: &[Made], limits: Limits) {
    let world = new_world();
    let mut next = 0;
    let mut all = events(before, &mut next);
    let runtime = batches::start(world.path(), limits, Policy::Park).await;
    let append = |events: &[(NewEvent, u64)]| {
        runtime.log().append(events.iter().map(|(event, _)| event.clone()).collect::<Vec<_>>()).unwrap();
    };
    append(&all);
    let view = wait(&runtime, 1, reached(&all)).await;
    let (rows, left_out) = fold(&all, false);
    assert_eq!(stored(&view), rows);
    assert_eq!(DeadLetters::open(&view.file).unwrap().counts().unwrap(), LetterCounts { parked: left_out, skipped: 0 });

    std::fs::write(world.path().join("plugins/ledger.wasm"), module("ledger+mended")).unwrap();
    let hash = shadowbox::plugin::hash(&module("ledger+mended"));
    let deadline = tokio::time::Instant::now() + crate::support::DEADLINE;
    while runtime.status().projections[0].live.module_hash != hash {
        assert!(tokio::time::Instant::now() < deadline, "{:?}", runtime.status());
        tokio::task::yield_now().await;
    }
    let outcome = runtime.treat("ledger", Treatment::Retry, Selector::All).await.unwrap();
    assert_eq!((outcome.applied, outcome.left.all(), outcome.failed.len()), (left_out, 0, 0));
    assert_eq!(stored(&view), fold(&all, true).0, "each stream in order");
    all.extend(events(after, &mut next));
    append(&all[before.len()..]);
    assert_eq!(stored(&wait(&runtime, 1, reached(&all)).await), fold(&all, true).0, "all streams have rejoined");
    runtime.shutdown().await;
}

#[test]
fn parked_and_retried_each_stream_is_folded_in_order() {
    let tokio = tokio::runtime::Runtime::new().unwrap();
    let run = |(before, after, limits): (Vec<Made>, Vec<Made>, Limits)| {
        tokio.block_on(park_and_retry(&before, &after, limits));
        Ok(())
    };
    properties(24, file!()).run(&(made(), made(), batches::limits()), run).unwrap();
}
