//! One order of the events of all sources, the same for everybody: for whoever was there, came late, rebuilds or proves.
//! And what is in that order and nobody wants costs nobody a commit, and holds up no reader.

use rusqlite::{Connection, OpenFlags};
use serde_json::{Value, json};

use crate::support::{World, event, module, moved, patched, wait_for};

/// A second ledger under names of its own.
fn other_ledger() -> Vec<u8> {
    patched(&patched(&module("ledger"), "ledger", "legder"), "sights", "sihgts")
}

#[test]
fn two_projections_take_two_sources_in_one_order_live_rebuilt_and_proved() {
    let world = World::running(&["ledger"]);
    let mut position = String::new();
    let line = |n: i64| {
        // Each account belongs to both sources, and the times of the events say another order.
        let source = if n * n % 7 < 3 { "left" } else { "right" };
        let data = json!({ "account": format!("a{}", n % 10), "amount": n });
        event(source, "Moved", &format!("{source}-{n}"), 1_000 - n * 37 % 100, data)
    };
    let lines: Vec<String> = (0..400).map(line).collect();
    let (first, rest) = lines.split_at(200);
    for chunk in first.chunks(23) {
        position = world.append(chunk);
    }
    let early = world.rows_at("ledger", &position);
    // One comes when half of it is there.
    world.drop_module("other", &other_ledger());
    world.wait_live("legder");
    assert_eq!(world.rows_at("legder", &position), early, "who comes late takes the same order");
    for chunk in rest.chunks(7) {
        position = world.append(chunk);
    }
    let live = world.rows_at("ledger", &position);
    assert_eq!((live.len(), &world.rows_at("legder", &position)), (10, &live));
    // The digests are those of the order in which they were appended, so it is that order.
    let digest = |account: i64| {
        let of = (0..400_i64).filter(|n| n % 10 == account);
        of.fold(0_i64, |digest, n| digest.wrapping_mul(31).wrapping_add(n * 2 + if n * n % 7 < 3 { 1 } else { 2 }))
    };
    for (account, row) in (0..10).zip(&live) {
        assert_eq!(
            (row["account"].as_str(), row["digest"].as_i64()),
            (Some(&*format!("a{account}")), Some(digest(account)))
        );
    }
    for name in ["ledger", "legder"] {
        let proved: Value = serde_json::from_str(&world.ok(&["verify", name, "--json"])).unwrap();
        assert_eq!((&proved["equal"], &proved["events"]), (&json!(true), &json!(400)), "{proved:#}");
        world.ok(&["rebuild", name, "--wait"]);
        assert_eq!(world.rows_at(name, &position), live, "{name} rebuilt");
        world.ok(&["verify", name]);
    }
}

#[test]
fn a_glob_takes_events_of_a_source_that_appeared_after_it_began() {
    let world = World::running(&[]);
    // It takes every event of the sources whose names begin so.
    world.drop_module("hostile", &patched(&module("hostile"), "left", "s/t*"));
    world.wait_live("hostile");
    world.append(&[event("s/t1", "Honest", "1", 0, json!({})), event("s/x1", "Honest", "1", 0, json!({}))]);
    assert_eq!(world.rows_at("deeds", "1").len(), 1);
    let position = world.append(&[event("s/t2", "Honest", "1", 1, json!({})), event("s", "Honest", "1", 1, json!({}))]);
    assert_eq!(world.rows_at("deeds", &position).len(), 2, "a source that was not there before");
    let position =
        world.append(&(0..50).map(|n| event(&format!("s/t/{n}"), "Honest", "1", n, json!({}))).collect::<Vec<_>>());
    assert_eq!(world.rows_at("deeds", &position).len(), 52);
    assert_eq!(world.get("/status").json()["log"]["sources"], 54);
    world.ok(&["verify", "hostile"]);
}

/// Of a view file: the checkpoint, the fence, and a number that changes with each commit of somebody else.
fn state(file: &Connection) -> (i64, i64, i64) {
    let number = |sql: &str| file.query_row(sql, [], |r| r.get(0)).unwrap();
    (
        number("SELECT position FROM _shadowbox_checkpoint"),
        number("SELECT fence FROM _shadowbox_generation"),
        number("PRAGMA data_version"),
    )
}

#[test]
fn what_nobody_wants_costs_no_commit_and_is_complete_all_the_same() {
    let mut world = World::running(&["ledger"]);
    world.append(&[moved("left", 0, "a", 1)]);
    let rows = world.rows_at("ledger", "0");
    let file = world.data().join("views/ledger/1.sqlite");
    let file = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    let before = state(&file);
    assert_eq!(before.0, 0);
    for n in 0..20 {
        // A type of its own source that it does not want, and another source.
        let lines = [moved("elsewhere", n, "a", 1), event("left", "Unheard", &format!("u{n}"), n, json!({}))];
        // By another process, and by this one.
        let position = if n % 2 == 0 {
            world.append(&lines)
        } else {
            let body = format!("[{}]", lines.join(","));
            let answer = world.post("/events", "application/cloudevents-batch+json", &body);
            answer.header("shadowbox-position").to_owned()
        };
        assert_eq!(position, (2 * n + 2).to_string());
        let answer = world.get_with("/views/ledger", &[("shadowbox-position", &position), ("prefer", "wait=60")]);
        assert_eq!((answer.status, answer.json()), (200, Value::from(rows.clone())));
        assert_eq!(answer.header("shadowbox-position"), position);
        let status = world.projection("ledger");
        assert_eq!((&status["lag_events"], &status["state"]), (&json!(0), &json!("live")), "{status}");
        assert_eq!(status["position"].to_string(), position);
    }
    assert_eq!(state(&file), before, "it committed something");
    drop(file);
    // At rest as well, and after a restart.
    world.stop();
    let status: Value = serde_json::from_str(&world.ok(&["status", "--json"])).unwrap();
    let projection = &status["projections"][0];
    assert_eq!((&projection["position"], &projection["lag_events"]), (&json!(40), &json!(0)), "{projection}");
    world.start();
    assert_eq!(world.rows_at("ledger", "40"), rows);
    // And what it wants is taken where it stands.
    let position = world.append(&[moved("left", 1, "a", 1)]);
    assert_eq!(world.rows_at("ledger", &position)[0]["events"], 2);
    wait_for("the status", || (world.projection("ledger")["position"] == 41).then_some(()));
}
