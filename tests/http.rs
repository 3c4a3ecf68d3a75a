//! HTTP itself: what a client library does not send, byte by byte.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::Value;

use crate::support::{World, event};

/// Sends bytes as they are; answers the status and the body when the server has closed the connection.
fn raw(world: &World, request: &[u8]) -> (u16, String) {
    let mut stream = TcpStream::connect(world.url("").strip_prefix("http://").unwrap()).unwrap();
    stream.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
    stream.write_all(request).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// The message of an answer that is an error of ours.
fn message(body: &str) -> String {
    let body: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body:?}"));
    assert!(body["error"].is_string(), "{body}");
    body["message"].as_str().unwrap().to_owned()
}

#[test]
fn a_foreign_name_neither_reads_nor_appends() {
    let mut world = World::new();
    std::fs::write(world.directory.path().join("shadowbox.toml"), "[http]\nhosts = ['shadowbox.example.com']\n")
        .unwrap();
    world.start();
    let address = world.url("").split_once("://").unwrap().1.to_owned();
    let port = address.split_once(':').unwrap().1.to_owned();
    let line = event("s", "T", "1", 0, Value::Null);
    let post = |headers: &str| {
        raw(
            &world,
            format!(
                "POST /events HTTP/1.1\r\n{headers}connection: close\r\ncontent-type: application/json\r\ncontent-length: \
                 {}\r\n\r\n{line}",
                line.len()
            )
            .as_bytes(),
        )
    };
    let get = |version: &str, headers: &str| {
        raw(&world, format!("GET /views HTTP/{version}\r\n{headers}connection: close\r\n\r\n").as_bytes())
    };
    let evil = format!("evil.example:{port}");
    // The page is of the same origin for the browser, once its name leads here.
    for headers in [
        format!("host: {evil}\r\n"),
        format!("host: {evil}\r\norigin: http://{evil}\r\n"),
        format!("host: x.shadowbox.example.com\r\norigin: http://{evil}\r\n"),
    ] {
        for (status, body) in [post(&headers), get("1.1", &headers), get("1.0", &headers)] {
            assert_eq!(status, 421, "{headers}: {body}");
            let message = message(&body);
            assert!(message.contains("add the name to hosts under [http]"), "{message}");
            assert!(message.contains(headers["host: ".len()..].split("\r\n").next().unwrap()), "{message}");
        }
    }
    let (status, body) = raw(
        &world,
        format!("GET http://{evil}/views HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").as_bytes(),
    );
    assert_eq!(status, 421, "{body}");
    assert_eq!(get("1.1", "").0, 400);
    assert_eq!(get("1.1", "host: localhost\r\nhost: evil.example\r\n").0, 400);
    for origin in [format!("http://{evil}"), "null".into(), "http://\u{e9}".into()] {
        let (status, body) = post(&format!("host: {address}\r\norigin: {origin}\r\n"));
        assert_eq!((status, message(&body).contains("may not change anything")), (403, true), "{origin}: {body}");
    }
    assert!(world.get("/status").json()["log"]["head"].is_null(), "something was appended");

    let own = format!("localhost:{port}");
    for host in [&address, &own, "[::1]", "shadowbox.example.com", "Shadowbox.Example.Com:8443"] {
        assert_eq!(get("1.1", &format!("host: {host}\r\n")).0, 200, "{host}");
        assert_eq!(post(&format!("host: {host}\r\norigin: https://{host}\r\n")).0, 200, "{host}");
    }
    assert_eq!(get("1.0", "").0, 200);
    assert_eq!(world.get("/status").json()["log"]["head"], 0);
}

#[test]
fn an_event_of_the_binary_mode_is_the_same_as_in_json() {
    let mut world = World::new();
    world.start();
    let binary = |id: &str, headers: &str, body: &[u8]| {
        let head = format!(
            "POST /events HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nCE-SpecVersion: 1.0\r\nce-id: \
             {id}\r\nce-source: s\r\nce-type: T\r\nce-time: 2013-01-01T10:15:00Z\r\n{headers}content-length: {}\r\n\r\n",
            body.len()
        );
        raw(&world, &[head.as_bytes(), body].concat())
    };
    let events = [
        ("application/json", "ce-subject: %C3%A4%20%22\r\n", &b"{\"n\":1}"[..], r#""subject":"ä \"","data":{"n":1}"#),
        (
            "text/plain",
            "ce-sequence: 7\r\nce-traceparent: \"00 1\"\r\n",
            b"a b",
            r#""sequence":7,"traceparent":"00 1","data":"a b""#,
        ),
        ("image/png", "", b"\xff\0", r#""data_base64":"/wA=""#),
    ];
    for (n, (content_type, headers, body, members)) in events.into_iter().enumerate() {
        let headers = format!("content-type: {content_type}\r\n{headers}");
        let (status, answer) = binary(&format!("b{n}"), &headers, body);
        assert_eq!(status, 200, "{answer}");
        let json = format!(
            r#"{{"specversion":"1.0","id":"j{n}","source":"s","type":"T","time":"2013-01-01T10:15:00Z","datacontenttype":"{content_type}",{members}}}"#
        );
        let answer = world.post("/events", "application/cloudevents+json", &json);
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
    for (headers, body, expected) in [
        ("content-type: application/json\r\n", &b"{"[..], "the body is not JSON"),
        ("ce-sequence: 1.5\r\n", b"", "\"sequence\" is \"1.5\""),
        ("ce-my_own: 1\r\n", b"", "\"my_own\" has a name that is not valid"),
    ] {
        let (status, answer) = binary("refused", headers, body);
        assert_eq!((status, message(&answer).contains(expected)), (400, true), "{answer}");
    }
    let events: Vec<Value> = world.ok(&["events"]).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(events.len(), 6);
    let same = |event: &Value| {
        let mut event = event.clone();
        (event["id"], event["position"]) = (Value::Null, Value::Null);
        event
    };
    for pair in events.chunks(2) {
        assert_eq!(same(&pair[0]), same(&pair[1]));
    }
}

#[test]
fn what_is_no_http_is_answered_in_our_words() {
    let mut world = World::new();
    world.start();
    let long = format!("GET /{} HTTP/1.1\r\nhost: localhost\r\n\r\n", "x".repeat(70_000));
    let wide = format!("GET / HTTP/1.1\r\nhost: localhost\r\n{}\r\n", "x: y\r\n".repeat(200));
    for (request, status, expected) in [
        ("GET /views/v?a=in.(\"b\") HTTP/1.1\r\nhost: localhost\r\n\r\n", 400, "%22"),
        ("GET /views/v?a=eq.<b> HTTP/1.1\r\nhost: localhost\r\n\r\n", 400, "%3C"),
        ("GET / HTTP/1.1\r\nhost localhost\r\n\r\n", 400, "not valid HTTP"),
        (&long, 414, "65,534"),
        (&wide, 431, "headers"),
    ] {
        let (found, body) = raw(&world, request.as_bytes());
        assert_eq!(found, status, "{body}");
        assert!(message(&body).contains(expected), "{body}");
    }
    // After another answer on the same connection, too.
    let request = "GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let mut stream = TcpStream::connect(world.url("").strip_prefix("http://").unwrap()).unwrap();
    stream.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answers = Vec::new();
    while !answers.ends_with(b"true}") {
        let mut bytes = [0; 1024];
        let n = stream.read(&mut bytes).unwrap();
        answers.extend_from_slice(&bytes[..n]);
    }
    stream.write_all(request.replace("/healthz", "/healthz?\"").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 400") && message(body).contains("%22"), "{answer}");
}
