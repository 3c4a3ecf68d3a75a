//! Archives of several services, appended by one command: the log has their events as they happened.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Output, Stdio};

use serde_json::{Value, json};

use crate::support::{World, event, root};

/// A file of events of one source, `(id, seconds)` each.
fn archive(world: &World, source: &str, events: &[(&str, i64)]) -> PathBuf {
    let lines = events.iter().map(|(id, seconds)| event(source, "Noted", id, *seconds, json!({})) + "\n");
    let file = world.directory.path().join(format!("{source}.jsonl"));
    std::fs::write(&file, lines.collect::<String>()).unwrap();
    file
}

/// Three services; `b` has events of the same moment as both others.
fn archives(world: &World) {
    archive(world, "a", &[("a0", 0), ("a1", 30), ("a2", 31), ("a3", 60)]);
    archive(world, "b", &[("b0", 30), ("b1", 30), ("b2", 50)]);
    archive(world, "c", &[("c0", -10), ("c1", 30), ("c2", 55), ("c3", 70)]);
}

const AS_HAPPENED: [&str; 11] = ["c0", "a0", "a1", "b0", "b1", "c1", "a2", "b2", "c2", "a3", "c3"];

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn events(world: &World) -> Vec<Value> {
    world.ok(&["events"]).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The ids of all events in the order of the log; their positions are 0, 1, 2, ...
fn ids(world: &World) -> Vec<String> {
    let id = |(place, event): (usize, Value)| {
        assert_eq!(event["position"], place);
        event["id"].as_str().unwrap().to_owned()
    };
    events(world).into_iter().enumerate().map(id).collect()
}

/// Appends with text on standard input.
fn append_with_input(world: &World, arguments: &[&str], input: &str) -> Output {
    let mut command = world.command(&["append", "--data", "data"]);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn archives_of_several_services_arrive_as_their_events_happened() {
    // However they are named, and whichever of them are compressed.
    for files in [["a.jsonl", "b.jsonl", "c.jsonl"], ["c.jsonl", "b.jsonl.zst", "a.jsonl"]] {
        let world = World::new();
        archives(&world);
        let plain = std::fs::read(world.directory.path().join("b.jsonl")).unwrap();
        std::fs::write(world.directory.path().join("b.jsonl.zst"), zstd::encode_all(&*plain, 1).unwrap()).unwrap();
        let output = world.run(&[&["append"], &files[..]].concat());
        assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
        let answer = "appended 11 events; 0 were there already\nthe first is at position 0, the last at position 10\n";
        assert_eq!(text(&output.stdout), answer);
        assert_eq!(ids(&world), AS_HAPPENED);
        // Again, in another order: nothing is appended, and the answer tells where the events are.
        let again: Value = serde_json::from_str(&world.ok(&["append", "--json", "c.jsonl", "b.jsonl"])).unwrap();
        let expected = json!({
            "appended": 0, "duplicates": 7, "first_position": 0, "last_position": 10, "position": 10,
        });
        assert_eq!(again, expected);
        assert_eq!(ids(&world), AS_HAPPENED);
    }
}

#[test]
fn real_archives_are_interleaved_and_each_keeps_its_order() {
    let world = World::new();
    let files = ["weather", "flights", "fleet"].map(|name| root().join(format!("tests/data/flights/{name}.jsonl.zst")));
    world.ok(&["append", files[0].to_str().unwrap(), files[1].to_str().unwrap(), files[2].to_str().unwrap()]);
    let log = events(&world);
    for (source, file) in ["weather", "flights", "fleet"].iter().zip(&files) {
        let archive = text(&zstd::decode_all(std::fs::File::open(file).unwrap()).unwrap());
        let expected = archive.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["id"].clone());
        let of_source = log.iter().filter(|event| event["source"] == **source).map(|event| event["id"].clone());
        assert!(of_source.eq(expected), "{source} is not in the order of its file");
    }
    // Their times are all written alike, so that text compares as time does; those that fall belong to one source.
    for pair in log.windows(2) {
        let falls = pair[0]["time"].as_str() > pair[1]["time"].as_str();
        assert!(!falls || pair[0]["source"] == pair[1]["source"], "{} before {}", pair[0], pair[1]);
    }
}

#[test]
fn files_are_appended_as_they_are_given_if_asked() {
    let world = World::new();
    archives(&world);
    world.ok(&["append", "--in-file-order", "c.jsonl", "a.jsonl", "b.jsonl"]);
    assert_eq!(ids(&world), ["c0", "c1", "c2", "c3", "a0", "a1", "a2", "a3", "b0", "b1", "b2"]);
}

#[test]
fn standard_input_keeps_its_order_and_can_be_one_of_several() {
    let world = World::new();
    archives(&world);
    let input = [("x0", 40), ("x1", 20), ("x2", 58)].map(|(id, at)| event("x", "Noted", id, at, json!({})) + "\n");
    assert!(append_with_input(&world, &["-"], &input.concat()).status.success());
    assert_eq!(ids(&world), ["x0", "x1", "x2"]);
    let other = World::new();
    archives(&other);
    assert!(append_with_input(&other, &["a.jsonl", "-"], &input.concat()).status.success());
    assert_eq!(ids(&other), ["a0", "a1", "a2", "x0", "x1", "x2", "a3"]);
    let twice = append_with_input(&other, &["-", "a.jsonl", "-"], "");
    assert_eq!(twice.status.code(), Some(1));
    assert!(text(&twice.stderr).contains("standard input (-) is given more than once"), "{}", text(&twice.stderr));
}

#[test]
fn disorder_in_a_file_is_told_and_kept() {
    let world = World::new();
    archive(&world, "a", &[("a0", 10), ("a1", 30), ("a2", 5), ("a3", 29), ("a4", 40)]);
    archive(&world, "b", &[("b0", 20), ("b1", 35), ("b2", 34)]);
    archive(&world, "c", &[("c0", 7), ("c1", 31)]);
    // An empty line counts as a line.
    let file = world.directory.path().join("a.jsonl");
    std::fs::write(&file, format!("\n{}", std::fs::read_to_string(&file).unwrap())).unwrap();
    let output = world.run(&["append", "a.jsonl", "b.jsonl", "c.jsonl"]);
    assert!(output.status.success());
    let notes = "\
shadowbox: note: a.jsonl: 2 events are earlier than one before them in the file; the first is \"a2\" at line 4 \
(2023-11-14T22:13:25Z, after 2023-11-14T22:13:50Z); they stand where the file has them
shadowbox: note: b.jsonl: 1 event is earlier than one before it in the file: \"b2\" at line 3 \
(2023-11-14T22:13:54Z, after 2023-11-14T22:13:55Z); it stands where the file has it
";
    assert_eq!(text(&output.stderr), notes);
    assert_eq!(ids(&world), ["c0", "a0", "b0", "a1", "a2", "a3", "c1", "b1", "b2", "a4"]);
}

#[test]
fn a_bad_line_in_one_of_several_files_is_mended_and_the_log_is_as_if_it_had_never_been() {
    let world = World::new();
    archives(&world);
    let file = world.directory.path().join("b.jsonl");
    let whole = std::fs::read_to_string(&file).unwrap();
    let bad: Vec<&str> = whole.lines().enumerate().map(|(n, line)| if n == 1 { "{\"id\":" } else { line }).collect();
    std::fs::write(&file, bad.join("\n")).unwrap();
    let output = world.run(&["append", "a.jsonl", "b.jsonl", "c.jsonl"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("shadowbox: b.jsonl:2: "), "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with("appended 4 events; 0 were there already\n"), "{}", text(&output.stdout));
    assert_eq!(ids(&world), AS_HAPPENED[..4]);

    std::fs::write(&file, whole).unwrap();
    let answer = world.ok(&["append", "a.jsonl", "b.jsonl", "c.jsonl"]);
    assert!(answer.starts_with("appended 7 events; 4 were there already\n"), "{answer}");
    assert_eq!(ids(&world), AS_HAPPENED);
}

#[test]
fn more_files_than_can_be_open_are_refused_with_a_way_out() {
    let mut world = World::new();
    let files: Vec<String> = (0..1_001).map(|n| format!("{n}.jsonl")).collect();
    for (n, file) in files.iter().enumerate() {
        let line = event("many", "Noted", &n.to_string(), -(n as i64), json!({}));
        std::fs::write(world.directory.path().join(file), line).unwrap();
    }
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    let append = |world: &World, first: &[&str], n: usize| world.run(&[&["append"], first, &files[..n]].concat());
    let refused = append(&world, &[], 1_001);
    assert_eq!(refused.status.code(), Some(1));
    for part in ["1001 files are too many to interleave", "the limit is 1000", "--in-file-order"] {
        assert!(text(&refused.stderr).contains(part), "{}", text(&refused.stderr));
    }
    assert!(!world.data().exists(), "a command that was refused made something");

    // The system's own limit may be lower.
    world.through = ["sh", "-c", "ulimit -n 100 && exec \"$@\"", "sh"].map(String::from).to_vec();
    let refused = append(&world, &[], 200);
    assert_eq!(refused.status.code(), Some(1));
    for part in ["cannot read \"", "other files: ", "ulimit -n", "--in-file-order"] {
        assert!(text(&refused.stderr).contains(part), "{}", text(&refused.stderr));
    }
    assert!(append(&world, &["--in-file-order"], 1_001).status.success());
    let newest_first: Vec<String> = (0..1_001).map(|n| n.to_string()).collect();
    assert_eq!(ids(&world), newest_first);

    let other = World::new();
    for file in &files[..1_000] {
        std::fs::copy(world.directory.path().join(file), other.directory.path().join(file)).unwrap();
    }
    assert!(append(&other, &[], 1_000).status.success());
    assert!(ids(&other).iter().eq(newest_first[..1_000].iter().rev()));
}
