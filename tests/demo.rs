//! The demo does what the README says, to the end.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use crate::support::{World, module, wait_for};

#[test]
fn the_demo_shows_two_views_and_serves_until_it_is_stopped() {
    // Built beforehand, so that two builds do not wait for each other.
    module("flight-board");
    let world = World::new();
    let mut demo = world.command(&["demo", "--data", "demo", "--listen", "127.0.0.1:0"]);
    let mut child = demo.stdout(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
    let mut shown = String::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        shown += &line.unwrap();
        shown.push('\n');
        if shown.ends_with("ctrl-c ends the demo\n") {
            break;
        }
    }
    for part in [
        "appended 426",
        "United Air Lines Inc.",
        "\nflight_board\n",
        "curl 'http://127.0.0.1:",
        "shadowbox-position",
        "-X POST http://127.0.0.1:",
    ] {
        assert!(shown.contains(part), "{part:?}\n{shown}");
    }
    assert!(!shown.contains("fault"), "{shown}");
    // The lines to try work as they are printed.
    let tries = shown.split_once("; try:\n").unwrap().1.split("\nctrl-c").next().unwrap();
    let output = std::process::Command::new("bash").args(["-euc", tries]).output().unwrap();
    let answers = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{tries}\n{}", String::from_utf8_lossy(&output.stderr));
    let url = tries.split("curl '").nth(1).unwrap().split("/views").next().unwrap();
    let projections = ureq::get(format!("{url}/projections")).call().unwrap().body_mut().read_to_string().unwrap();
    assert!(projections.matches("\"error\":null").count() >= 5 && !projections.contains("faulted"), "{projections}");
    for part in ["\"dep_delay\":", "Shadowbox Air", "\"generation\":2"] {
        assert!(answers.contains(part), "{part:?}\n{answers}");
    }
    assert!(std::process::Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
    let status = wait_for("a clean stop", || child.try_wait().unwrap());
    assert!(status.success(), "{status}");
}
