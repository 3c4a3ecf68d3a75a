//! Plugins that mean harm: the right, named failure; bounded memory; nobody else is harmed; and so a thousand times.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use shadowbox::config::SandboxLimits;
use shadowbox::model::{Columns, Position, RawEvent, Time};
use shadowbox::plugin::{Engine, Failure, Module, RowError, Rows};
use shadowbox::view::{Changes, Commit, CommittedRows, Generation, Table};
use tempfile::TempDir;

use crate::support::{World, event, module, moved, patched};

/// What each event type of the fixture does to the host, by what is said of it. Those that end by the deadline come
/// first: they take as long as that.
const DEEDS: &[(&str, &str)] = &[
    ("Loops", "ran for more than"),
    ("AsksForEver", "ran for more than"),
    ("AsksForEverForMany", "ran for more than"),
    ("Recurses", "call stack exhausted"),
    ("RecursesAndAsks", "call stack exhausted"),
    ("RecursesWithArrays", "recursion that is too deep"),
    ("Grows", "wanted more than 128 MB of memory"),
    ("Panics", "the event says so"),
    ("Exits", "called exit("),
    ("Succeeds", "called exit("),
    ("Traps", "unreachable"),
    ("BlamesNobody", "an event that is not there"),
    ("TalksTooMuch", "more bytes]"),
    ("AnswersNonsense", "not an array of [view, op, key, row]"),
    ("AnswersNothing", "not an array of [view, op, key, row]"),
    ("AnswersMore", "100 bytes too many"),
    ("AnswersAMap", "not an array of [view, op, key, row]"),
    ("Declares", "4294967295 changes; the limit for one batch is 500000"),
    ("DeclaresAKey", "it ends too early"),
    ("Nests", "it has 1 elements"),
    ("AnswersTooMuch", "handed over more than 64 MiB"),
    ("AnswersAMillion", "1000000 changes; the limit for one batch is 500000"),
    ("MissesAColumn", "column \"real\": it is missing"),
    ("AddsAColumn", "1 bytes too many"),
    ("MistakesAType", "column \"count\": it is not an integer"),
    ("ForgetsAValue", "column \"count\": it is nil, but not nullable"),
    ("InventsAView", "view 9 does not exist"),
    ("InventsAnOperation", "op 7"),
    ("WritesALongKey", "a key of 2003 bytes; the limit is 1024"),
    ("WritesALongRow", "the limit is 1048576"),
    ("WritesBadText", "it is not UTF-8"),
    ("WritesNaN", "it is NaN"),
    ("WritesInfinity", "it is inf"),
    ("AsksForAnUnknownView", "view 9 does not exist"),
    ("AsksForABadKey", "column \"name\": it is not a string"),
    ("AsksForALongKey", "a key of 2097152 bytes"),
    ("AsksForTooMuch", "handed over more than 64 MiB"),
    ("AsksForTooMany", "10000000 keys; the limit for one call is 65536"),
    ("AsksForNonsense", "the keys are not an array of bin"),
    ("AsksForADeclaration", "4294967295 keys; the limit"),
    ("AsksForALotOfRows", "the rows have more than 67108864 bytes"),
];

/// Deeds that harm nobody.
const HARMLESS: &[&str] = &["Honest", "Prints", "WritesTwice"];

/// How many of [`DEEDS`] end by the deadline.
const SLOW: usize = 3;

/// What `describe` does, by what is said of it. A manifest that is read without an error harms nobody: `nests`.
const MANIFESTS: &[(&str, &str)] = &[
    ("loops", "ran for more than"),
    ("traps", "no manifest today"),
    ("exits", "called exit("),
    ("recurses", "call stack exhausted"),
    ("asks", "get was called from describe"),
    ("is-not-json", "the manifest is not valid"),
    ("is-huge", "bytes long; the limit is 4194304"),
    ("is-beyond", "handed over more than 64 MiB"),
    ("has-bad-names", "is not valid; use 1 to 63 of a-z"),
    ("has-a-long-name", "more bytes]"),
    ("has-no-views", "no views"),
    ("has-bad-globs", "longer than 1024 bytes"),
    ("has-many-globs", "event types are named for source \"left\"; the limit is 1024"),
    ("has-many-indexes", "100001 indexes; the limit is 32"),
];

fn describing(word: &str) -> Vec<u8> {
    let honest = format!("{:.<32}", "describe:honest");
    patched(&module("hostile"), &honest, &format!("{:.<32}", format!("describe:{word}")))
}

pub(crate) fn engine(deadline_ms: u64) -> Engine {
    let sandbox = SandboxLimits { memory: 128 << 20, deadline: Duration::from_millis(deadline_ms) };
    Engine::new(None, sandbox).unwrap()
}

/// The committed rows of a generation, as a projection gives them to its plugin.
struct Stored(CommittedRows);

impl Rows for Stored {
    fn get(&mut self, view: u32, key: &[u8]) -> Result<Option<Vec<u8>>, RowError> {
        self.0.get(view, key).map_err(|e| RowError::Host(e.to_string()))?.map_err(RowError::Plugin)
    }
}

/// A module and a generation of it, without a runtime around them.
pub(crate) struct Bench {
    module: Module,
    rows: Arc<Mutex<Stored>>,
    tables: Vec<Table>,
    _directory: TempDir,
}

impl Bench {
    pub(crate) fn new(module: Module) -> Bench {
        let directory = tempfile::tempdir().unwrap();
        let (file, manifest) = (directory.path().join("1.sqlite"), &module.manifest);
        Generation::create(&file, manifest).unwrap();
        let mut generation = Generation::open(&file, manifest).unwrap();
        let tables: Vec<_> = manifest.views.iter().map(Table::new).collect();
        let mut changes = Changes::default();
        changes.absorb(&tables, large_row()).unwrap();
        let (changes, module_hash) = (Arc::new(changes), module.hash.clone());
        let letters = shadowbox::view::LetterChanges::default();
        generation
            .commit(&Commit { mark: None, changes, module: module_hash, letters, origin: None, rests: true })
            .unwrap();
        let rows = Arc::new(Mutex::new(Stored(generation.rows().unwrap())));
        Bench { module, rows, tables, _directory: directory }
    }

    /// One event between two honest ones on a fresh instance; what becomes of it.
    pub(crate) fn meet(&self, event_type: &str, payload: &[u8]) -> Result<usize, String> {
        let types: Vec<Arc<str>> = vec!["Honest".into(), event_type.into()];
        let mut batch = Columns::new(self.module.manifest.batch);
        for (position, kind) in [(0, 0), (1, 1), (2, 0)] {
            let (position, payload) = (Position(position), if kind == 1 { payload } else { b"{}" });
            let (stream, id, metadata) = (&b"s"[..], &b"id"[..], &b""[..]);
            let raw =
                RawEvent { position, time: Time::EPOCH, version: 0, stream, id, metadata, payload, forgotten: false };
            batch.push(0, kind, raw);
        }
        let encoded = batch.encode(&["left".into()], &types, self.module.manifest.batch, false);
        let applied = self.module.instantiate(self.rows.clone()).and_then(|mut instance| instance.apply(&encoded));
        let changes = applied.map_err(|failure: Failure| failure.to_string())?;
        let mut pending = Changes::default();
        pending.absorb(&self.tables, changes)?;
        Ok(pending.rows())
    }
}

/// A change that puts the row `large`, which has nearly as many bytes as a row may have.
fn large_row() -> Vec<u8> {
    let (mut out, mut row) = (vec![0x91, 0x94, 0, 0], vec![0x01, 0xc0]);
    rmp::encode::write_str(&mut row, &"x".repeat(1_000_000)).unwrap();
    rmp::encode::write_bin(&mut out, b"\xa5large").unwrap();
    rmp::encode::write_bin(&mut out, &row).unwrap();
    out
}

/// Longer than anything takes that ends by itself.
const LONG: u64 = 60_000;

fn check(what: &str, failure: &str, expected: &str) {
    assert!(failure.contains(expected), "{what}: {failure}");
    assert!(failure.len() < 20_000, "{what}: a message of {} bytes", failure.len());
}

#[test]
fn each_hostile_deed_has_the_failure_that_names_it() {
    let bench = |deadline| Bench::new(engine(deadline).admit(&module("hostile")).unwrap());
    let (hasty, patient) = (bench(500), bench(LONG));
    for (i, (deed, expected)) in DEEDS.iter().enumerate() {
        let bench = if i < SLOW { &hasty } else { &patient };
        check(deed, &bench.meet(deed, b"").unwrap_err(), expected);
    }
    for deed in HARMLESS {
        assert!(patient.meet(deed, b"") >= Ok(2), "{deed}");
    }
}

#[test]
fn each_hostile_manifest_is_refused_by_name() {
    let (hasty, patient) = (engine(500), engine(LONG));
    for (word, expected) in MANIFESTS {
        let engine = if *word == "loops" { &hasty } else { &patient };
        let Err(error) = engine.admit(&describing(word)) else { panic!("{word} was admitted") };
        check(word, &error.to_string(), expected);
    }
    assert!(patient.admit(&describing("nests")).is_ok(), "what is not read harms nobody");
}

#[test]
fn a_module_that_prints_its_way_to_a_manifest_can_be_checked() {
    let world = World::new();
    let file = world.directory.path().join("prints.wasm");
    std::fs::write(&file, describing("prints")).unwrap();
    let output = world.command(&["plugin", "check", file.to_str().unwrap()]).output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && said.contains("deeds"), "{said}");
}

#[test]
fn a_row_that_is_answered_twice_is_the_last_of_both() {
    let world = World::running(&["hostile"]);
    world.append(&[event("left", "WritesTwice", "twice", 0, json!({}))]);
    assert_eq!(world.rows_at("deeds", "0"), [json!({"name": "twice", "count": 2, "real": null, "note": null})]);
}

/// The value of a line of `/proc/self/status`, in KiB.
fn memory(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap()
}

/// In a process of its own, because the memory of this one belongs to all tests.
#[test]
fn a_thousand_hostile_deeds_leave_no_memory_behind() {
    const CHILD: &str = "SHADOWBOX_HOSTILE_CHILD";
    if std::env::var_os(CHILD).is_none() {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "hostile::a_thousand_hostile_deeds_leave_no_memory_behind", "--nocapture"]);
        let output = command.env(CHILD, "1").output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
        return;
    }
    // How often each deed is met; 41 deeds are more than a thousand meetings.
    let times = std::env::var("SHADOWBOX_HOSTILE_REPEATS").map_or(25, |times| times.parse().unwrap());
    let bench = Bench::new(engine(20).admit(&module("hostile")).unwrap());
    // What needs time and has none fails otherwise than it should, so this round only warms up.
    for (deed, _) in DEEDS {
        let _ = bench.meet(deed, b"");
    }
    let before = memory("VmRSS:");
    for (deed, _) in DEEDS {
        for _ in 0..times {
            assert!(bench.meet(deed, b"").is_err(), "{deed}");
        }
    }
    let (after, most) = (memory("VmRSS:"), memory("VmHWM:"));
    let figures = format!("{before} KiB before, {after} KiB after {} deeds, {most} KiB at most", times * DEEDS.len());
    assert!(after < before + (48 << 10), "{figures}");
    // A guest's memory, what it hands over, what the host makes of it.
    assert!(most < 512 << 10, "{figures}");
}

/// One behaviour of each kind, each in a projection of its own, in one runtime.
#[test]
fn hostile_plugins_stop_alone_at_the_event_and_the_others_go_on() {
    let deeds = ["Loops", "Recurses", "Grows", "Exits", "AnswersNonsense", "Declares", "WritesNaN", "AsksForEver"];
    let mut world = World::new();
    let config = "[sandbox]\ndeadline_ms = 4000\nmemory_mb = 128\n[batch]\nevents = 2\n";
    std::fs::write(world.directory.path().join("shadowbox.toml"), config).unwrap();
    let mut lines: Vec<String> = Vec::new();
    for (i, deed) in deeds.iter().enumerate() {
        let source = format!("s{i:03}");
        let names =
            patched(&patched(&module("hostile"), "deeds", &format!("de{i:03}")), "hostile", &format!("host{i:03}"));
        world.drop_module(&format!("hostile{i}"), &patched(&names, "left", &source));
        lines.extend(
            (0..20).map(|n| event(&source, if n == 10 { deed } else { "Honest" }, &n.to_string(), n, json!({}))),
        );
    }
    world.drop_module("ledger", &module("ledger"));
    world.append(&lines);
    world.start();
    // While they do what they do.
    for n in 0..10 {
        let at = world.append(&[moved("left", n, &format!("a{n}"), n)]);
        assert_eq!(world.rows_at("ledger", &at).len(), n as usize + 1);
    }
    for (i, deed) in deeds.iter().enumerate() {
        let status = world.wait_until(&format!("host{i:03}"), "the fault", |p| p["state"] == "faulted");
        let error = status["error"].as_str().unwrap();
        let event = format!("event \"10\" ({deed}) of source \"s{i:03}\" at position {}", 20 * i + 10);
        let expected = DEEDS.iter().find(|(name, _)| name == deed).unwrap().1;
        assert!(error.contains(&event) && error.contains(expected), "{error}");
        assert_eq!(world.rows_at(&format!("de{i:03}"), &(20 * i + 9).to_string()).len(), 10, "{deed}");
    }
    let at = world.append(&[moved("left", 10, "a10", 10)]);
    assert_eq!(world.rows_at("ledger", &at).len(), 11);
}

#[test]
fn a_manifest_of_a_hostile_module_is_refused_and_the_others_go_on() {
    let world = World::running(&["ledger"]);
    world.drop_module("hostile", &describing("has-many-globs"));
    crate::support::wait_for("the refusal", || {
        world.ok(&["status"]).contains("event types are named for source").then_some(())
    });
    world.append(&[moved("left", 0, "a", 1)]);
    assert_eq!(world.rows_at("ledger", "0").len(), 1);
}
