//! The command line, as a person or a script uses it.

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use serde_json::Value;

use crate::support::{World, event, moved, root, wait_for};

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn help_reads_like_a_manual_and_wrong_usage_is_exit_code_2() {
    let world = World::new();
    let help = world.ok(&["--help"]);
    for command in [
        "run",
        "append",
        "events",
        "status",
        "query",
        "rebuild",
        "verify",
        "plan",
        "rollback",
        "resume",
        "policy",
        "dead-letters",
        "plugin",
        "demo",
    ] {
        assert!(help.contains(&format!("\n  {command} ")), "{command}\n{help}");
    }
    assert!(help.contains("Examples:") && help.contains("Exit codes:"));
    assert_eq!(world.run(&["frobnicate"]).status.code(), Some(2));
    assert_eq!(world.run(&["append"]).status.code(), Some(2));
    assert_eq!(world.run(&["--version"]).status.code(), Some(0));
}

#[test]
fn commands_on_data_that_is_not_there_say_so() {
    let world = World::new();
    for command in [&["status"][..], &["events"], &["query", "select 1"], &["rebuild", "x"]] {
        let output = world.run(command);
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains("there is no shadowbox data in"), "{}", text(&output.stderr));
    }
    assert!(!world.data().exists(), "a command that reads made something");
}

#[test]
fn configuration_files_are_read_and_their_mistakes_named() {
    let world = World::new();
    let file = world.directory.path().join("shadowbox.toml");
    for (toml, expected) in [
        ("plugin = 'x'", "unknown field `plugin`"),
        ("listen = 'nowhere'", "listen = \"nowhere\" is not valid"),
        ("[batch]\nevents = 0", "batch.events = 0 is not valid; use a number from 1 to 65536"),
    ] {
        std::fs::write(&file, toml).unwrap();
        let output = world.run(&["run"]);
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains(expected), "{}", text(&output.stderr));
    }
    std::fs::remove_file(&file).unwrap();
    let output = world.run(&["run", "--config", "missing.toml"]);
    assert!(text(&output.stderr).contains("cannot read the configuration file \"missing.toml\""));
}

#[test]
fn append_is_repeatable_and_stops_at_a_bad_line_with_its_number() {
    let world = World::new();
    let mut lines: Vec<String> = (0..10).map(|n| moved("left", n, "a", n)).collect();
    lines.insert(5, "{\"specversion\": \"1.0\"}".into());
    let file = world.directory.path().join("events.jsonl");
    std::fs::write(&file, lines.join("\n")).unwrap();
    let output = world.run(&["append", "events.jsonl"]);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(error.contains("events.jsonl:6: ") && error.contains("id"), "{error}");
    assert!(
        text(&output.stdout)
            .contains("appended 5 events; 0 were there already\nthe first is at position 0, the last at position 4")
    );
    lines.remove(5);
    let compressed = zstd::encode_all(lines.join("\n").as_bytes(), 1).unwrap();
    std::fs::write(world.directory.path().join("events.jsonl.zst"), compressed).unwrap();
    let again = world.ok(&["append", "--json", "events.jsonl.zst"]);
    let again: Value = serde_json::from_str(&again).unwrap();
    let expected = serde_json::json!({
        "appended": 5, "duplicates": 5, "first_position": 0, "last_position": 9, "position": 9,
    });
    assert_eq!(again, expected);
}

#[test]
fn append_reads_standard_input_and_fills_in_a_source() {
    let world = World::new();
    let append = |source: &str, line: &str| {
        let mut command = world.command(&["append", "--source", source, "-", "--data", "data"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(line.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let line = r#"{"specversion":"1.0","id":"1","type":"Moved","data":{}}"#;
    assert!(text(&append("left", line).stdout).contains("the last at position 0"));
    let refused = append("right", &moved("left", 1, "a", 1));
    assert!(text(&refused.stderr).contains("standard input:1: "), "{}", text(&refused.stderr));
}

#[test]
fn events_come_back_as_they_were_and_can_be_followed() {
    let world = World::new();
    let lines = [
        event("left", "Moved", "l0", 0, serde_json::json!({ "account": "a", "amount": 1.5, "nested": [null] })),
        event("right", "Moved", "r0", 1, serde_json::json!("text")),
        event("left", "Moved", "l1", 2, serde_json::json!({})),
    ];
    world.append(&lines);
    let parse = |line: &str| -> Value { serde_json::from_str(line).unwrap() };
    let all: Vec<Value> = world.ok(&["events"]).lines().map(parse).collect();
    assert_eq!(all.len(), lines.len());
    for (position, (ours, line)) in all.iter().zip(&lines).enumerate() {
        let mut theirs = parse(line);
        theirs["position"] = position.into();
        assert_eq!(*ours, theirs);
    }
    let some = world.ok(&["events", "--source", "left", "--after", "0", "--limit", "5"]);
    assert_eq!(some.lines().map(|line| parse(line)["id"].clone()).collect::<Vec<_>>(), ["l1"]);
    // What is printed can be appended elsewhere.
    let other = World::new();
    std::fs::write(other.directory.path().join("copy"), world.ok(&["events"])).unwrap();
    other.ok(&["append", "copy"]);
    assert_eq!(other.ok(&["events"]), world.ok(&["events"]));

    let mut follow = world.command(&["events", "--follow", "--source", "left", "--data", "data"]);
    let mut child = follow.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(parse(&output.next().unwrap().unwrap())["id"], "l0");
    assert_eq!(parse(&output.next().unwrap().unwrap())["id"], "l1");
    world.append(&[event("left", "Moved", "l2", 3, serde_json::json!({}))]);
    assert_eq!(parse(&output.next().unwrap().unwrap())["id"], "l2");
    // A reader that has had enough ends it without a complaint.
    drop(output);
    world.append(&[event("left", "Moved", "l3", 4, serde_json::json!({}))]);
    let status = wait_for("the end after a closed pipe", || child.try_wait().unwrap());
    assert!(status.success());
}

#[test]
fn queries_join_projections_and_only_read() {
    let mut world = World::running(&["order-summary", "orders-across-services"]);
    world.ok(&["append", root().join("example-plugins/orders-across-services/events.jsonl").to_str().unwrap()]);
    world.wait_until("orders-across-services", "the sample", |p| p["lag_events"] == 0 && p["position"].is_u64());
    world.wait_live("order-summary");
    let sql = "select count(*) as n from orders o join order_summary s on s.order_id = o.order_id
               where o.total_cents = s.total_cents and o.customer is not null";
    let rows: Value = serde_json::from_str(&world.ok(&["query", "--format", "json", sql])).unwrap();
    assert!(rows[0]["n"].as_i64().unwrap() > 0, "{rows}");
    assert!(world.ok(&["query", sql]).contains('n'));
    for (sql, expected) in [
        (
            "select * from no_such",
            "there is no view \"no_such\"; the views are customer_orders, customers, order_summary, orders",
        ),
        ("delete from orders", "read-only"),
        ("drop table orders", "read-only"),
        ("selec 1", "syntax error"),
    ] {
        let output = world.run(&["query", sql]);
        assert_eq!(output.status.code(), Some(1), "{sql}");
        assert!(text(&output.stderr).contains(expected), "{sql}: {}", text(&output.stderr));
    }
    // Without a runtime, too.
    world.stop();
    assert_eq!(world.query("select 1 as one from orders limit 1").replace("\r\n", "\n"), "one\n1\n");
    let status = world.run(&["status", "--json"]);
    assert!(text(&status.stderr).contains("no runtime is running"));
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["projections"][0]["state"], "stopped");
}

#[test]
fn status_shows_where_everything_stands() {
    let world = World::running(&["ledger"]);
    let position = world.append(&[moved("left", 0, "a", 1)]);
    world.rows_at("ledger", &position);
    world.wait_live("ledger");
    let table = world.ok(&["status"]);
    for part in ["ledger", "live", "position", "head"] {
        assert!(table.contains(part), "{part}\n{table}");
    }
    assert!(table.lines().all(|line| line.chars().count() <= 100), "{table}");
    let status: Value = serde_json::from_str(&world.ok(&["status", "--json"])).unwrap();
    assert_eq!((&status["log"]["head"], &status["projections"][0]["position"]), (&0.into(), &0.into()));
    assert_eq!((&status["log"]["sources"], &status["log"]["types"]), (&1.into(), &1.into()));
}

#[test]
fn a_rebuild_needs_a_runtime_and_a_projection() {
    let mut world = World::running(&["ledger"]);
    let output = world.run(&["rebuild", "nobody"]);
    assert!(text(&output.stderr).contains("there is no projection \"nobody\"; there are: ledger"));
    assert!(world.ok(&["rebuild", "ledger", "--wait"]).contains("generation 2 of ledger is live"));
    world.stop();
    let output = world.run(&["rebuild", "ledger"]);
    assert!(text(&output.stderr).contains("start one with shadowbox run"), "{}", text(&output.stderr));
}

#[test]
fn a_new_plugin_compiles_passes_its_test_and_runs() {
    let mut world = World::new();
    world.ok(&["plugin", "new", "my-orders"]);
    let made = world.directory.path().join("my-orders");
    let cargo = |arguments: &[&str]| {
        let mut cargo = std::process::Command::new(env!("CARGO"));
        // The dependencies are compiled once for all runs of this test.
        cargo.current_dir(&made).env("CARGO_TARGET_DIR", root().join("target/new-plugin")).args(arguments);
        // The versions that this workspace is tested with.
        std::fs::copy(root().join("Cargo.lock"), made.join("Cargo.lock")).unwrap();
        let output = cargo.output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    assert!(cargo(&["test"]).contains("1 passed"));
    cargo(&["build", "--release", "--target", "wasm32-wasip2"]);
    let module = root().join("target/new-plugin/wasm32-wasip2/release/my_orders.wasm");
    let check = world.ok(&["plugin", "check", module.to_str().unwrap()]);
    assert!(check.contains("projection my-orders, version 1") && check.contains("view my_orders"), "{check}");
    world.drop_module("my-orders", &std::fs::read(module).unwrap());
    world.start();
    let placed = serde_json::json!({ "customer": "Ada", "total_cents": 4800 });
    let position = world.append(&[event("orders", "OrderPlaced", "1", 0, placed)]);
    assert_eq!(world.rows_at("my_orders", &position)[0]["total_cents"], 4800);

    for (name, expected) in [("my-orders", "exists already"), ("My_Orders", "is not a name for a plugin")] {
        let output = world.run(&["plugin", "new", name]);
        assert!(output.status.code() == Some(1) && text(&output.stderr).contains(expected));
    }
}
