//! Files that do not do what they should: full, locked, read-only, damaged, gone, older than they were. What can mend
//! itself goes on by itself and has lost nothing; what cannot is named, and stays as it is until somebody asks.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::support::{World, event, module, moved, patched, wait_for};

/// `n` events on a few accounts.
fn lines(from: i64, to: i64) -> Vec<String> {
    (from..to).map(|n| moved("left", n, &format!("a{}", n % 500), n)).collect()
}

/// The rows must be the fold of the first `n` of them.
fn check_rows(world: &World, n: i64) {
    let rows = world.rows_at("ledger", &(n - 1).to_string());
    let sum = |column: &str| rows.iter().map(|r| r[column].as_i64().unwrap()).sum::<i64>();
    assert_eq!((sum("events"), sum("amount")), (n, n * (n - 1) / 2));
}

fn error(status: &Value) -> &str {
    status["error"].as_str().unwrap_or_default()
}

/// A world whose ledger is complete to 500 events.
fn world() -> World {
    let world = World::running(&["ledger"]);
    world.append(&lines(0, 500));
    check_rows(&world, 500);
    world
}

fn view_file(world: &World) -> PathBuf {
    world.data().join("views/ledger/1.sqlite")
}

/// Overwrites everything from `from` on with bytes that mean nothing.
fn damage(file: &Path, from: u64) {
    let length = std::fs::metadata(file).unwrap().len();
    assert!(length > from + 4_096, "{length} bytes are too few to damage some of them");
    let file = std::fs::File::options().write(true).open(file).unwrap();
    file.write_all_at(&vec![0xa5; (length - from) as usize], from).unwrap();
}

/// How many bytes a file of the process may have; None for any.
fn limit_files(world: &World, bytes: Option<u64>) {
    let limit = bytes.map_or("unlimited".to_owned(), |b| b.to_string());
    let limit = format!("--fsize={limit}:unlimited");
    let done = Command::new("prlimit").args(["--pid", &world.process().to_string(), &limit]).status().unwrap();
    assert!(done.success());
}

#[test]
fn a_disk_that_is_full_is_waited_for() {
    let mut world = World::new();
    world.drop_module("ledger", &module("ledger"));
    world.append(&lines(0, 500));
    world.start();
    check_rows(&world, 500);
    let wal = |file: PathBuf| std::fs::metadata(file.with_extension("sqlite-wal")).map_or(0, |m| m.len());
    limit_files(&world, Some(wal(view_file(&world)).max(8_192)));
    // From another process, which has room.
    world.append(&lines(500, 2_000));
    let status = world.wait_until("ledger", "the error", |p| error(p).contains("views/ledger/1.sqlite"));
    assert!(error(&status).contains("retrying"), "{status}");
    assert_eq!(world.get("/readyz").status, 503);
    limit_files(&world, None);
    check_rows(&world, 2_000);
    assert_eq!(world.wait_live("ledger")["generation"], 1);
}

/// The command that takes from root what lets it write where nobody may.
fn without_privileges() -> Vec<String> {
    let probe = tempfile::tempdir().unwrap();
    std::fs::set_permissions(probe.path(), std::fs::Permissions::from_mode(0o555)).unwrap();
    match std::fs::write(probe.path().join("x"), "") {
        Err(_) => Vec::new(),
        Ok(()) => ["setpriv", "--bounding-set=-dac_override", "--"].map(str::to_owned).to_vec(),
    }
}

fn permit(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_directory_that_is_read_only_is_named_and_waited_for() {
    let mut world = world();
    world.stop();
    world.append(&lines(500, 600));
    world.through = without_privileges();
    let (file, directory) = (view_file(&world), world.data().join("views/ledger"));
    permit(&file, 0o444);
    permit(&directory, 0o555);
    world.start();
    let status = world.wait_until("ledger", "the error", |p| error(p).contains("views/ledger/1.sqlite"));
    assert!(error(&status).contains("readonly") || error(&status).contains("unable to open"), "{status}");
    permit(&directory, 0o755);
    permit(&file, 0o644);
    check_rows(&world, 600);
    world.stop();

    permit(&world.data(), 0o555);
    permit(&world.data().join("runtime.lock"), 0o444);
    let output = world.run(&["run", "--plugins", "plugins", "--listen", "127.0.0.1:0"]);
    permit(&world.data(), 0o755);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && said.contains("runtime.lock") && said.contains("denied"), "{said}");
}

/// Another process's lock on a database, until it is dropped.
struct Lock(rusqlite::Connection);

impl Lock {
    fn on(file: &Path) -> Lock {
        let connection = rusqlite::Connection::open(file).unwrap();
        connection.busy_timeout(std::time::Duration::from_secs(60)).unwrap();
        connection.execute_batch("BEGIN EXCLUSIVE").unwrap();
        Lock(connection)
    }

    fn release(self) {
        self.0.execute_batch("ROLLBACK").unwrap();
    }
}

#[test]
fn a_view_file_that_is_locked_is_a_stall_that_is_seen_and_ends_by_itself() {
    let mut world = World::new();
    std::fs::write(world.directory.path().join("shadowbox.toml"), "stall_after_ms = 200\n").unwrap();
    world.drop_module("ledger", &module("ledger"));
    world.append(&lines(0, 500));
    world.start();
    check_rows(&world, 500);
    let lock = Lock::on(&view_file(&world));
    world.append(&lines(500, 600));
    let status = world.wait_until("ledger", "the stall", |p| p["state"] == "stalled");
    assert!(
        error(&status).contains("no progress for") && error(&status).contains("a commit to the view file"),
        "{status}"
    );
    let ready = world.get("/readyz");
    let view = &ready.json()["views"][0];
    assert_eq!((ready.status, &view["state"], &view["lag_events"]), (503, &"stalled".into(), &100.into()), "{view}");
    assert!(view["reason"].as_str().unwrap().contains("a commit to the view file"), "{view}");
    assert_eq!(world.get("/healthz").status, 200, "it is alive");
    assert!(world.ok(&["status"]).contains("stalled"));
    wait_for("the stall in the log", || world.log().contains("a commit to the view file").then_some(()));
    lock.release();
    check_rows(&world, 600);
    world.wait_live("ledger");
    assert_eq!(world.get("/readyz").status, 200);
    wait_for("the end of it in the log", || world.log().contains("not stalled any more").then_some(()));
}

#[test]
fn a_plugin_that_takes_long_is_a_stall_that_says_so() {
    let mut world = World::new();
    let config = "stall_after_ms = 200\n[sandbox]\ndeadline_ms = 600000\n";
    std::fs::write(world.directory.path().join("shadowbox.toml"), config).unwrap();
    world.drop_module("hostile", &module("hostile"));
    world.drop_module("ledger", &module("ledger"));
    world.append(&lines(0, 500));
    world.start();
    // So that it is alone in its batch.
    world.wait_live("hostile");
    world.append(&[event("left", "AsksForEver", "endless", 0, serde_json::json!({}))]);
    let status = world.wait_until("hostile", "the stall", |p| p["state"] == "stalled");
    assert!(error(&status).contains("a plugin call for the event at position 500"), "{status}");
    check_rows(&world, 500);
    assert_eq!(world.get("/readyz").json()["views"][0]["view"], "deeds");
    // What is at its head does not become stalled by standing there.
    assert_eq!(world.wait_live("ledger")["error"], Value::Null);
    world.kill();
}

#[test]
fn a_log_that_is_locked_delays_appends_and_loses_none() {
    let mut world = world();
    let lock = Lock::on(&world.data().join("log.sqlite"));
    let appending = {
        let file = world.directory.path().join("more.jsonl");
        std::fs::write(&file, lines(500, 600).join("\n")).unwrap();
        let mut command = world.command(&["append", file.to_str().unwrap(), "--data"]);
        command.arg(world.data()).spawn().unwrap()
    };
    // Readers are not in its way, nor it in theirs.
    check_rows(&world, 500);
    lock.release();
    assert!(appending.wait_with_output().unwrap().status.success());
    check_rows(&world, 600);
    world.stop();
}

#[test]
fn a_damaged_view_file_is_named_and_rebuilt_on_request() {
    let mut world = world();
    for from in [0, 4_096] {
        let generation = world.projection("ledger")["generation"].as_u64().unwrap();
        world.stop();
        damage(&world.data().join(format!("views/ledger/{generation}.sqlite")), from);
        world.start();
        let status = world.wait_until("ledger", "the fault", |p| p["state"] == "faulted");
        let file = format!("views/ledger/{generation}.sqlite");
        assert!(error(&status).contains(&file) && error(&status).contains("it is damaged, rebuild"), "{status}");
        assert!(!world.log().contains("going back to the last commit"), "nothing to wait for: {}", world.log());
        let rows = world.get("/views/ledger");
        assert!(rows.status == 500 && rows.json()["error"] == "damaged", "{} {}", rows.status, rows.body);
        assert!(rows.body.contains("rebuild the projection"), "{}", rows.body);
        world.ok(&["rebuild", "ledger", "--wait"]);
        check_rows(&world, 500);
    }
}

#[test]
fn a_view_file_that_is_damaged_under_a_running_runtime_is_noticed_when_it_is_touched() {
    let mut world = world();
    // Rows only: the tables of Shadowbox's own come first in the file. Restarted, so that no page is cached.
    world.stop();
    let pages = std::fs::metadata(view_file(&world)).unwrap().len() / 4_096;
    world.start();
    world.wait_live("ledger");
    damage(&view_file(&world), 4_096 * (pages - 8));
    world.append(&lines(500, 1_000));
    let status = world.wait_until("ledger", "the fault", |p| p["state"] == "faulted");
    assert!(error(&status).contains("it is damaged, rebuild the projection"), "{status}");
    world.ok(&["rebuild", "ledger", "--wait"]);
    check_rows(&world, 1_000);
}

#[test]
fn a_damaged_log_is_named() {
    let mut world = world();
    // Two packed blocks, and rows.
    world.append(&lines(500, 9_000));
    check_rows(&world, 9_000);
    world.stop();
    let log = world.data().join("log.sqlite");
    let whole = std::fs::read(&log).unwrap();
    damage(&log, 0);
    let output = world.run(&["run", "--plugins", "plugins", "--listen", "127.0.0.1:0"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1), "{said}");
    assert!(said.contains("log.sqlite") && said.contains("it is damaged, restore it from a copy"), "{said}");

    // Within a block: it shows when that is read, and only there.
    std::fs::write(&log, &whole).unwrap();
    let payloads: Vec<u8> = {
        let copy = rusqlite::Connection::open(&log).unwrap();
        copy.query_row("SELECT payloads FROM blocks WHERE first = 4096", [], |r| r.get(0)).unwrap()
    };
    let at = whole.windows(64).position(|bytes| bytes == &payloads[..64]).expect("it is in the file");
    let mut damaged = whole.clone();
    damaged[at + 32] ^= 0x10;
    std::fs::write(&log, &damaged).unwrap();
    world.start();
    check_rows(&world, 9_000);
    let rebuilding = world.run(&["rebuild", "ledger"]);
    let status = wait_for("the fault", || {
        let status = world.projection("ledger");
        error(&status).contains("log.sqlite").then_some(status)
    });
    let expected = "events 4096 to 8191 cannot be read: ";
    assert!(error(&status).contains(expected) && error(&status).contains("restore the log from a copy"), "{status}");
    assert!(rebuilding.status.success(), "it began, and the live generation goes on");
    check_rows(&world, 9_000);
    world.append(&lines(9_000, 9_100));
    check_rows(&world, 9_100);
    world.stop();
    std::fs::write(&log, &whole).unwrap();
    std::fs::remove_dir_all(world.data().join("views")).unwrap();
    std::fs::remove_file(world.data().join("catalogue.sqlite")).unwrap();
    world.start();
    check_rows(&world, 9_000);
}

#[test]
fn a_log_that_was_rolled_back_to_an_older_copy_is_refused_with_both_facts() {
    let mut world = world();
    world.stop();
    let log = world.data().join("log.sqlite");
    let older = std::fs::read(&log).unwrap();
    world.append(&lines(500, 600));
    world.start();
    check_rows(&world, 600);
    world.stop();
    let newer = std::fs::read(&log).unwrap();
    let restore = |bytes: &[u8]| {
        for suffix in ["-wal", "-shm"] {
            // They are there only after a crash.
            let _ = std::fs::remove_file(log.with_file_name(format!("log.sqlite{suffix}")));
        }
        std::fs::write(&log, bytes).unwrap();
    };
    restore(&older);
    // The second time other events are where the view has been already.
    for (more, expected) in [(vec![], "no event there"), (lines(700, 900), "there;")] {
        world.append(&more);
        world.start();
        let status = world.wait_until("ledger", "the refusal", |p| p["state"] == "faulted");
        let facts = ["complete to position 599,", expected, "restore that log, or rebuild"];
        assert!(facts.iter().all(|fact| error(&status).contains(fact)), "{status}");
        assert_eq!(world.get("/views/ledger").header("shadowbox-position"), "599", "the view stays readable");
        world.stop();
    }
    restore(&newer);
    world.start();
    world.wait_live("ledger");
    check_rows(&world, 600);
}

#[test]
fn a_log_that_is_removed_under_a_running_runtime_takes_no_more_events() {
    let mut world = World::new();
    std::fs::write(world.directory.path().join("shadowbox.toml"), "stall_after_ms = 200\n").unwrap();
    world.drop_module("ledger", &module("ledger"));
    world.append(&lines(0, 500));
    world.start();
    check_rows(&world, 500);
    let aside = world.data().join("aside");
    std::fs::rename(world.data().join("log.sqlite"), &aside).unwrap();
    let answer = world.post("/events", "application/cloudevents+json", &moved("left", 500, "a", 1));
    assert!(answer.status == 500 && answer.body.contains("was removed or replaced"), "{}", answer.body);
    // Nobody knows whether there are new events, so nobody says that the view is current.
    let status = world.wait_until("ledger", "the stall", |p| p["state"] == "stalled");
    assert!(error(&status).contains("was removed or replaced"), "{status}");
    assert_eq!(world.get("/readyz").status, 503);
    std::fs::rename(&aside, world.data().join("log.sqlite")).unwrap();
    world.wait_live("ledger");
    let answer = world.post("/events", "application/cloudevents+json", &moved("left", 500, "a0", 500));
    assert_eq!(answer.status, 200, "{}", answer.body);
    check_rows(&world, 501);
}

#[test]
fn times_of_events_may_be_anything() {
    let mut world = World::running(&["ledger"]);
    let times = ["9999-12-30T22:00:00Z", "0000-01-01T00:00:00Z", "2013-01-01T00:00:00Z", "1969-12-31T23:59:59Z"];
    let line = |n: usize, source: &str| {
        let line = moved(source, n as i64, "a", 1);
        let mut event: Value = serde_json::from_str(&line).unwrap();
        event["time"] = times[n % times.len()].into();
        event.to_string()
    };
    for n in 0..8 {
        world.append(&[line(n, "left"), line(n + 1, "right")]);
        let status = world.projection("ledger");
        assert!(status["lag_seconds"].as_f64().unwrap() >= 0.0, "{status}");
    }
    assert_eq!(world.rows_at("ledger", "15")[0]["events"], 16);
    world.stop();
    // Behind by every one of these jumps, at rest and while it runs.
    for n in 8..12 {
        world.append(&[line(n, "left")]);
        let status: Value = serde_json::from_str(&world.ok(&["status", "--json"])).unwrap();
        let lag = status["projections"][0]["lag_seconds"].as_f64().unwrap();
        assert!((0.0..400e9).contains(&lag), "{lag}");
    }
    world.start();
    assert_eq!(world.rows_at("ledger", "19")[0]["events"], 20);
}

#[test]
fn a_reader_that_holds_a_snapshot_holds_up_no_swap_and_no_stop() {
    let mut world = world();
    let held: Vec<_> = [view_file(&world), world.data().join("log.sqlite")]
        .map(|file| {
            let reader =
                rusqlite::Connection::open_with_flags(file, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
            reader.execute_batch("BEGIN; SELECT count(*) FROM sqlite_schema;").unwrap();
            reader
        })
        .into();
    let begin = std::time::Instant::now();
    for (n, name) in (500..).zip(["ledger+tweaked", "ledger", "ledger+tweaked"]) {
        let before = world.projection("ledger")["module_hash"].clone();
        world.drop_module("ledger", &module(name));
        world.wait_until("ledger", "the swap", |p| p["module_hash"] != before);
        world.append(&lines(n, n + 1));
        check_rows(&world, n + 1);
    }
    world.stop();
    // Each of the four would wait as long as for a lock.
    assert!(begin.elapsed() < 3 * shadowbox::config::limits::DATABASE_BUSY, "{:?}", begin.elapsed());
    drop(held);
    world.start();
    check_rows(&world, 503);
}

#[test]
fn views_of_a_module_for_another_contract_stay_readable() {
    let mut world = world();
    world.stop();
    std::fs::remove_file(world.plugins().join("ledger.wasm")).unwrap();
    let former = "SET manifest = replace(manifest, '\"contract\":\"0.1.0\"', '\"contract\":\"0.0.9\"')";
    for (file, table) in
        [(world.data().join("catalogue.sqlite"), "generations"), (view_file(&world), "_shadowbox_generation")]
    {
        let file = rusqlite::Connection::open(file).unwrap();
        assert_eq!(file.execute(&format!("UPDATE {table} {former}"), []).unwrap(), 1);
    }
    // What such a module would say of itself when it is dropped.
    world.drop_module("ledger", &patched(&module("ledger"), "0.1.0", "0.0.9"));
    world.start();
    assert_eq!(world.rows_at("ledger", "499").len(), 500);
    let status = wait_for("the refusal", || {
        let status = world.get("/status").json();
        (status["refused"][0]["file"] == "ledger.wasm").then_some(status)
    });
    assert_eq!(status["projections"][0]["state"], "stopped", "{status}");
    // The module that was built again goes on from these rows.
    world.drop_module("ledger", &module("ledger"));
    world.append(&lines(500, 510));
    check_rows(&world, 510);
    assert_eq!(world.wait_live("ledger")["generation"], 1);
}
