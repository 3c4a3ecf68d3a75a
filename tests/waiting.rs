//! Readers that wait for a position, and what happens around them meanwhile.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{World, event, module, moved, wait_for};

/// Asks from a thread for the ledger, complete to the second event; answers the status and the body.
fn ask_for_the_second(world: &World) -> std::thread::JoinHandle<(u16, String)> {
    let url = world.url("/views/ledger");
    std::thread::spawn(move || {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let request = agent.get(url).header("shadowbox-position", "1").header("prefer", "wait=60");
        let mut response = request.call().unwrap();
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
    })
}

#[test]
fn a_waiting_reader_gets_the_generation_that_has_the_position() {
    let mut world = World::new();
    // A generation that is replaced is gone at once, with its file and its checkpoints.
    std::fs::write(world.directory.path().join("shadowbox.toml"), "keep_generations = 0\n").unwrap();
    world.drop_module("ledger", &module("ledger"));
    world.append(&[moved("left", 0, "a", 1)]);
    world.start();
    world.rows_at("ledger", "0");
    let readers: Vec<_> = (0..8).map(|_| ask_for_the_second(&world)).collect();
    for generation in 2..=4 {
        world.ok(&["rebuild", "ledger", "--wait"]);
        world.wait_until("ledger", "the promotion", |p| p["generation"] == generation);
    }
    assert!(!readers.iter().any(|reader| reader.is_finished()), "{}", world.log());
    world.append(&[moved("left", 1, "a", 1)]);
    for reader in readers {
        let (status, body) = reader.join().unwrap();
        assert_eq!(status, 200, "{body}");
        assert!(body.contains("\"events\":2"), "{body}");
    }
}

#[test]
fn a_waiting_reader_does_not_hold_up_a_stop() {
    let mut world = World::running(&["ledger"]);
    wait_for("the view", || (world.get("/views/ledger").status == 200).then_some(()));
    let url = world.url("");
    let mut reader = TcpStream::connect(url.strip_prefix("http://").unwrap()).unwrap();
    reader
        .write_all(b"GET /views/ledger HTTP/1.1\r\nhost: localhost\r\nshadowbox-position: 1\r\nprefer: wait=60\r\n\r\n")
        .unwrap();
    // The server takes connections in their order, so that by then it has ours.
    assert_eq!(world.get("/healthz").status, 200);
    let begin = Instant::now();
    world.stop();
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    let mut answer = String::new();
    reader.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("\"stopping\""), "{answer}");
}

#[test]
fn a_position_beyond_the_log_is_told_apart_from_one_that_is_late() {
    let world = World::running(&["ledger"]);
    let position = world.append(&[moved("left", 0, "a", 1)]);
    world.rows_at("ledger", &position);
    let answer = world.get_with("/views/ledger", &[("shadowbox-position", "9"), ("prefer", "wait=0")]);
    let message = answer.json()["message"].as_str().unwrap().to_owned();
    assert!(answer.status == 412 && message.contains("the log ends at position 0"), "{message}");
}

#[test]
fn pages_of_other_origins_change_nothing() {
    let world = World::running(&["ledger"]);
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let body = event("left", "Moved", "left-0", 0, json!({ "account": "a", "amount": 1 }));
    for (origin, status) in [("https://example.org", 403), ("null", 403), (&*world.url(""), 200)] {
        let request = agent.post(world.url("/events")).header("content-type", "application/json");
        let response = request.header("origin", origin).send(&body).unwrap();
        assert_eq!(response.status().as_u16(), status, "{origin}");
    }
}

#[test]
fn who_takes_a_module_away_keeps_the_others_ready() {
    let world = World::running(&["ledger"]);
    world.wait_live("ledger");
    std::fs::remove_file(world.plugins().join("ledger.wasm")).unwrap();
    world.wait_until("ledger", "the stop", |p| p["state"] == "stopped");
    world.append(&[moved("left", 0, "a", 1)]);
    assert_eq!(world.get("/readyz").status, 200, "{}", world.get("/readyz").body);
}
