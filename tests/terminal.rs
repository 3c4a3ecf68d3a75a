//! What reaches an operator's terminal, or the program behind a pipe.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::{World, event, module};

/// Clears the screen, in the two ways there are, takes back a line, and turns the direction of writing.
const HOSTILE: &str = "\u{1b}[2Jx\u{9b}2J\u{8}\r\u{7f}\u{202e}";

/// The same as far as JSON has no escapes for it: the ledger takes accounts that have none.
const ACCOUNT: &str = "x\u{9b}2J\u{7f}\u{202e}";

fn is_harmless(text: &str) -> bool {
    !text.contains(|c: char| c.is_control() && c != '\n' && c != '\t' || c == '\u{202e}')
}

#[test]
fn nobody_who_appends_moves_the_cursor() {
    let mut world = World::new();
    std::fs::write(world.directory.path().join("shadowbox.toml"), "[failures]\npolicy = 'skip'\n").unwrap();
    world.drop_module("ledger", &module("ledger"));
    world.start();
    let hostile = |id: &str, event_type: &str, data: Value| {
        let mut event: Value = serde_json::from_str(&event("left", event_type, "", 0, data)).unwrap();
        (event["id"], event["subject"]) = (format!("{id}{HOSTILE}\nforged").into(), HOSTILE.into());
        event.to_string()
    };
    let position = world.append(&[
        hostile("1", "Moved", json!({ "account": ACCOUNT, "amount": 1 })),
        hostile("2", "Doubtful", json!({ "account": ACCOUNT, "amount": -2 })),
        hostile("3", "Moved", json!({ "account": 1, "amount": HOSTILE })),
    ]);
    assert_eq!(world.rows_at("ledger", &position).len(), 1);
    for (arguments, shown) in [
        (&["query", "select account from ledger"][..], "x\\u{9b}2J"),
        (&["query", "select account as \"\u{9b}\" from ledger"], "\\u{9b}\n"),
        (&["query", "select \u{9b}"], "\\u{9b}"),
        (&["dead-letters", "list", "ledger"], "3\\u{1b}[2Jx"),
        (&["dead-letters", "list", "ledger", "--json"], "\\u009b2J"),
        (&["dead-letters", "show", "ledger", "1"], "\\nforged"),
        (&["status"], "skipped"),
        (&["status", "--json"], "ledger"),
        (&["forget", "--source", "left", "--stream", HOSTILE, "--by", HOSTILE, "--reason", HOSTILE], "3 events"),
        (&["log"], "x\\u{9b}2J"),
        (&["log", "--json"], "x\\u009b2J"),
        (&["rebuild", HOSTILE], ""),
        (&["append", HOSTILE], "x\\u{9b}2J"),
    ] {
        let output = world.run(arguments);
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(is_harmless(&text), "{arguments:?}: {text:?}");
        assert!(text.contains(shown), "{arguments:?}: {text}");
    }
    let log = world.log();
    assert!(log.contains("skipping it"), "{log}");
    assert!(is_harmless(&log) && !log.contains("\nforged"), "{log:?}");
}

#[test]
fn a_table_that_is_piped_has_a_row_a_line_and_its_names_whole() {
    let world = World::running(&["ledger"]);
    let account = "long".repeat(60);
    let position = world.append(&[event("left", "Moved", "1", 0, json!({ "account": account, "amount": 5 }))]);
    world.rows_at("ledger", &position);
    let table = world.ok(&["query", "select account, amount, account as again from ledger"]);
    assert_eq!(table, format!("account\tamount\tagain\n{account}\t5\t{account}\n"));
    world.wait_live("ledger");
    let status = world.ok(&["status"]);
    assert!(status.contains("\nprojection\tstate\tgen\t") && status.contains("\nledger\tlive\t1\t"), "{status}");
}

#[test]
fn an_endless_answer_flows_and_is_not_kept() {
    let world = World::new();
    world.append(&[event("left", "Moved", "1", 0, Value::Null)]);
    let sql =
        "with recursive n(i) as (select 1 union all select i + 1 from n) select i, hex(zeroblob(5000)) as x from n";
    for format in ["table", "csv", "json"] {
        let mut command = world.command(&["query", "--format", format, sql, "--data", "data"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Two hundred megabytes.
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().take(20_000);
        assert_eq!(
            lines.map(Result::unwrap).filter(|line| line.contains("0000")).count(),
            19_999 + usize::from(format == "json")
        );
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(peak < 100 << 10, "{format}: {peak} KiB");
    }
}

#[test]
fn a_table_that_is_drawn_is_cut_and_says_so() {
    let world = World::new();
    world.append(&[event("left", "Moved", "1", 0, Value::Null)]);
    // A terminal of its own, as script (of every Debian) gives one.
    let drawn = |format: &str, sql: &str| {
        let line =
            format!("timeout 60 {} query --format {format} --data data \"{sql}\"", env!("CARGO_BIN_EXE_shadowbox"));
        let mut command = Command::new("script");
        command.args(["-qec", &line, "/dev/null"]).current_dir(world.directory.path()).stdin(Stdio::null());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let endless = "with recursive n(i) as (select 1 union all select i + 1 from n)";
    let rows = drawn("table", &format!("{endless} select i from n"));
    assert!(rows.contains("the table is cut after 1000 rows"), "{rows}");
    let columns = ["hex(zeroblob(1000))"; 10].join(", ");
    let wide = drawn("table", &format!("{endless} select {columns} from n"));
    assert!(wide.contains("the table is cut after 104 rows"));
    for format in ["table", "csv", "json"] {
        let shown = drawn(format, "select char(27) || char(155) || 'x' as n");
        assert!(is_harmless(&shown.replace("\r\n", "\n")) && shown.contains("9b"), "{format}: {shown:?}");
    }
}
