//! What is dropped into the plugin folder, and how: each case is handled, and everything else goes on.

use std::io::Write;

use serde_json::Value;

use crate::support::{World, module, moved, patched, wait_for};

/// A second ledger under names of its own.
fn other_ledger() -> Vec<u8> {
    patched(&patched(&module("ledger"), "ledger", "legder"), "sights", "sihgts")
}

/// Waits until a file is refused, and answers why. The log must say it, too.
fn refusal(world: &World, file: &str) -> String {
    let reason = wait_for("the refusal", || {
        let status = world.get("/status").json();
        let refused = status["refused"].as_array().unwrap().iter().find(|r| r["file"] == file).cloned();
        refused.map(|r| r["reason"].as_str().unwrap().to_owned())
    });
    wait_for("the refusal in the log", || world.log().contains(file).then_some(()));
    reason
}

/// The ledger still takes events.
fn assert_goes_on(world: &World, n: i64) {
    let position = world.append(&[moved("left", n, "a", 1)]);
    assert!(!world.rows_at("ledger", &position).is_empty());
}

#[test]
fn what_is_no_projection_is_refused_with_a_sentence() {
    let world = World::running(&["ledger"]);
    let ledger = module("ledger");
    let core = [&b"\0asm\x01\0\0\0"[..], &[]].concat();
    let cases: [(&str, Vec<u8>, &str); 5] = [
        ("empty", Vec::new(), "not a WebAssembly file"),
        ("text", b"this is not wasm".to_vec(), "not a WebAssembly file"),
        ("core", core, "core WebAssembly module, not a component"),
        ("half", ledger[..ledger.len() / 2].to_vec(), "only a part of one"),
        (
            "future",
            patched(&ledger, "shadowbox:plugin/projection@0.1.0", "shadowbox:plugin/projection@0.9.0"),
            "contract 0.9.0",
        ),
    ];
    for (n, (name, bytes, expected)) in cases.iter().enumerate() {
        world.drop_module(name, bytes);
        let reason = refusal(&world, &format!("{name}.wasm"));
        assert!(reason.contains(expected), "{name}: {reason}");
        assert_goes_on(&world, n as i64);
        let check = world.run(&["plugin", "check", world.plugins().join(format!("{name}.wasm")).to_str().unwrap()]);
        let said = String::from_utf8(check.stderr).unwrap();
        assert!(check.status.code() == Some(1) && said.contains(expected), "{said}");
    }
    let status = world.ok(&["status"]);
    assert!(cases.iter().all(|(name, ..)| status.contains(&format!("{name}.wasm is refused"))), "{status}");
    // What is removed is not refused any more.
    for (name, ..) in cases {
        std::fs::remove_file(world.plugins().join(format!("{name}.wasm"))).unwrap();
    }
    wait_for("no refusals", || world.get("/status").json()["refused"].as_array().unwrap().is_empty().then_some(()));
}

#[test]
fn the_second_file_with_a_projection_or_a_view_is_refused_until_the_first_is_gone() {
    let world = World::running(&["ledger"]);
    world.drop_module("a-copy", &module("ledger"));
    let reason = refusal(&world, "a-copy.wasm");
    assert!(reason.contains("projection \"ledger\" is already run by \"ledger.wasm\""), "{reason}");
    // Another projection, but one of its views has the name of ours.
    world.drop_module("thief", &patched(&module("ledger"), "ledger", "legder"));
    let reason = refusal(&world, "thief.wasm");
    assert!(reason.contains("view \"sights\" belongs to projection \"ledger\""), "{reason}");
    assert_goes_on(&world, 0);
    std::fs::remove_file(world.plugins().join("ledger.wasm")).unwrap();
    let status = world.wait_until("ledger", "the copy to take over", |p| p["file"] == "a-copy.wasm");
    assert_eq!(status["generation"], 1);
    assert_goes_on(&world, 1);
}

#[test]
fn a_file_that_is_written_slowly_is_started_when_it_is_whole() {
    let world = World::running(&[]);
    let bytes = module("ledger");
    let mut file = std::fs::File::create(world.plugins().join("ledger.wasm")).unwrap();
    for piece in bytes.chunks(bytes.len() / 20 + 1) {
        assert_eq!(world.get("/projections").json(), Value::Array(vec![]));
        file.write_all(piece).unwrap();
        file.flush().unwrap();
    }
    world.wait_live("ledger");
    assert_eq!(world.get("/status").json()["refused"], Value::Array(vec![]));
    // Written over in place: truncated, then whole again, but another one.
    let other = module("ledger+tweaked");
    let before = world.projection("ledger")["module_hash"].clone();
    let mut file = std::fs::File::create(world.plugins().join("ledger.wasm")).unwrap();
    assert_goes_on(&world, 0);
    file.write_all(&other).unwrap();
    drop(file);
    world.wait_until("ledger", "the new module", |p| p["module_hash"] != before);
    assert_eq!(world.projection("ledger")["generation"], 1);
}

#[test]
fn links_are_followed_and_switching_one_is_a_new_module() {
    let world = World::new();
    let store = world.directory.path().join("store");
    std::fs::create_dir(&store).unwrap();
    std::fs::write(store.join("one.wasm"), module("ledger")).unwrap();
    std::fs::write(store.join("two.wasm"), module("ledger+tweaked")).unwrap();
    let link = world.plugins().join("ledger.wasm");
    std::os::unix::fs::symlink(store.join("one.wasm"), &link).unwrap();
    let mut world = world;
    world.start();
    let before = world.wait_live("ledger")["module_hash"].clone();
    let new = world.plugins().join(".new");
    std::os::unix::fs::symlink(store.join("two.wasm"), &new).unwrap();
    std::fs::rename(new, link).unwrap();
    world.wait_until("ledger", "the module behind the switched link", |p| p["module_hash"] != before);
}

#[test]
fn editors_files_and_folders_are_not_modules() {
    let world = World::running(&["ledger"]);
    for name in [".ledger.wasm.swp", "ledger.wasm~", "#ledger.wasm#", "4913", "README.md", ".hidden.wasm"] {
        std::fs::write(world.plugins().join(name), "x").unwrap();
    }
    std::fs::create_dir(world.plugins().join("folder.wasm")).unwrap();
    // A valid one that comes after them is seen, so they have been looked at.
    world.drop_module("other", &other_ledger());
    world.wait_live("legder");
    assert_eq!(world.get("/status").json()["refused"], Value::Array(vec![]));
}

#[test]
fn a_removed_module_stops_its_projection_and_leaves_the_views_readable() {
    let mut world = World::running(&["ledger"]);
    world.drop_module("other", &other_ledger());
    world.wait_live("legder");
    let position = world.append(&[moved("left", 0, "a", 1)]);
    world.rows_at("ledger", &position);
    world.rows_at("legder", &position);
    std::fs::remove_file(world.plugins().join("ledger.wasm")).unwrap();
    world.wait_until("ledger", "the stop", |p| p["state"] == "stopped" && p["file"].is_null());
    let after = world.append(&[moved("left", 1, "b", 1)]);
    assert_eq!(world.rows_at("legder", &after).len(), 2, "the other one goes on");
    let answer = world.get("/views/ledger");
    assert_eq!((answer.header("shadowbox-position"), answer.json().as_array().unwrap().len()), ("0", 1));
    let late = world.get_with("/views/ledger", &[("shadowbox-position", &after), ("prefer", "wait=0")]);
    assert_eq!((late.status, &late.json()["error"]), (412, &Value::from("not_yet")));
    // Also after a restart, and it goes on when the file is back.
    world.stop();
    world.start();
    assert_eq!(world.get("/views/ledger").json().as_array().unwrap().len(), 1);
    world.drop_module("ledger", &module("ledger"));
    assert_eq!(world.rows_at("ledger", &after).len(), 2);
    assert_eq!(world.projection("ledger")["generation"], 1);
}

#[test]
fn an_empty_folder_is_no_error_and_a_missing_one_is_made() {
    let mut world = World::new();
    std::fs::remove_dir(world.plugins()).unwrap();
    world.start();
    assert!(world.plugins().is_dir());
    assert_eq!(world.get("/projections").json(), Value::Array(vec![]));
    assert_eq!(world.get("/readyz").status, 200);
    assert!(world.ok(&["status"]).contains("no projections"));
    wait_for("a hint", || world.log().contains("drop one into the folder").then_some(()));
}

#[test]
fn a_restart_keeps_the_module_that_ran_whatever_its_file_is_called() {
    let mut world = World::running(&[]);
    world.drop_module("ledger", &module("ledger+v2"));
    let position = world.append(&[moved("left", 0, "a", 1)]);
    assert_eq!(world.wait_live("ledger")["version"], 2);
    // An older version, under a name that comes first.
    world.drop_module("a_backup", &module("ledger"));
    assert!(refusal(&world, "a_backup.wasm").contains("is already run by \"ledger.wasm\""));
    world.stop();
    world.start();
    let status = world.wait_live("ledger");
    assert_eq!(
        (&status["version"], &status["generation"], &status["file"]),
        (&2.into(), &1.into(), &"ledger.wasm".into())
    );
    assert!(refusal(&world, "a_backup.wasm").contains("is already run by \"ledger.wasm\""));
    assert_eq!(world.rows_at("ledger", &position)[0]["doubled"], 2);
    // Of two that have never run, the higher version does.
    world.stop();
    std::fs::remove_dir_all(world.data()).unwrap();
    world.start();
    assert_eq!(world.wait_live("ledger")["version"], 2);
}
