//! The invariants in `runtime/src/lib.rs` that text can show.

use std::path::{Path, PathBuf};

use crate::support::root;

fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() && !["target", "ui"].contains(&name) {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(root()).unwrap().to_owned(), text));
            }
        }
    }
    assert!(!found.is_empty());
    found
}

/// Code without comments and without the unit tests at the end of a file.
fn code(text: &str) -> impl Iterator<Item = &str> {
    let code = text.split("\n#[cfg(test)]").next().unwrap();
    code.lines().map(|line| line.split("//").next().unwrap())
}

/// Fails if one of the words is in the code of a file outside of the allowed places.
fn only_in(words: &[&str], allowed: &[&str]) {
    for (path, text) in sources("runtime/src") {
        if allowed.iter().any(|place| path.starts_with(Path::new("runtime/src").join(place))) {
            continue;
        }
        for (number, line) in code(&text).enumerate() {
            let word = words.iter().find(|word| line.contains(**word));
            assert!(word.is_none(), "{}:{}: {:?} belongs into {allowed:?}", path.display(), number + 1, word.unwrap());
        }
    }
}

#[test]
fn each_outside_library_is_named_in_one_place() {
    only_in(&["wasmtime"], &["plugin"]);
    only_in(&["rusqlite", "sqlx"], &["log", "view"]);
    only_in(&["axum", "tower_http"], &["http"]);
    only_in(&["println!", "eprintln!", "print!("], &["main.rs", "cli"]);
    only_in(&["anyhow"], &["main.rs", "cli"]);
}

#[test]
fn modules_depend_downwards() {
    let no = |place: &str, words: &[&str]| {
        for (path, text) in
            sources("runtime/src").iter().filter(|(path, _)| path.starts_with(Path::new("runtime/src").join(place)))
        {
            for line in code(text) {
                let word = words.iter().find(|word| {
                    line.contains(&format!("crate::{word}")) || line.contains(&format!("shadowbox::{word}"))
                });
                assert!(word.is_none(), "{}: {place} names {:?}: {line}", path.display(), word.unwrap());
            }
        }
    };
    let upper = ["http", "proof", "supervisor", "projection"];
    no("plugin", &[&upper[..], &["view", "log"]].concat());
    no("view", &[&upper[..], &["plugin", "log"]].concat());
    no("log", &[&upper[..], &["plugin", "view"]].concat());
    no("projection", &["http", "proof", "supervisor"]);
    no("supervisor.rs", &["http", "proof"]);
    no("proof", &["http"]);
    no("http", &["proof"]);
    for low in ["model.rs", "manifest.rs", "config.rs", "fault.rs"] {
        no(low, &[&upper[..], &["plugin", "view", "log"]].concat());
    }
}

#[test]
fn the_lifecycle_has_no_clock_no_input_and_no_async() {
    let text = std::fs::read_to_string(root().join("runtime/src/projection/lifecycle.rs")).unwrap();
    for line in code(&text) {
        for word in ["async", "await", "Instant", "SystemTime", "std::fs", "std::net", "tokio", "std::io", "use "] {
            assert!(!line.contains(word), "{word:?}: {line}");
        }
    }
}

#[test]
fn the_system_clock_only_stamps() {
    // What is waited for is measured by a clock that does not jump; a new log, a new generation and an event whose
    // producer gave no time get a time, which nothing depends on. An append is stamped, and never goes back.
    let stamps =
        ["model.rs", "log/file.rs", "log/append.rs", "log/forget.rs", "log/cloudevents.rs", "view/catalogue.rs"];
    only_in(&["Time::now", "SystemTime", "Timestamp::now"], &stamps);
}

#[test]
fn rows_and_checkpoint_are_written_by_one_function() {
    let writers: Vec<_> = sources("runtime/src")
        .into_iter()
        .filter(|(_, text)| code(text).any(|line| line.contains("INTO _shadowbox_checkpoint")))
        .map(|(path, _)| path)
        .collect();
    assert_eq!(writers, [Path::new("runtime/src/view/generation.rs")]);
}

#[test]
fn tests_wait_for_something_instead_of_sleeping() {
    for (path, text) in sources("tests").into_iter().chain(sources("plugin-sdk")).chain(sources("runtime/src")) {
        let tests = if path.starts_with("runtime") { text.split("#[cfg(test)]").nth(1).unwrap_or("") } else { &text };
        // One of the fixtures sleeps for a living.
        let fixture = path.starts_with("tests/plugins");
        assert!(fixture || !tests.contains(concat!("::sle", "ep(")), "{}", path.display());
    }
}

#[test]
fn no_file_is_too_long_to_read() {
    for folder in ["runtime", "plugin-sdk", "tests", "example-plugins", "benches"] {
        for (path, text) in sources(folder) {
            assert!(text.lines().count() <= 1_000, "{}", path.display());
        }
    }
}
