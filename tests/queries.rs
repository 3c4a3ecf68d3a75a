//! Queries and events over HTTP, as a client sees them.

use serde_json::{Value, json};

use crate::support::{World, event, module, moved, root};

const ONE: &str = "application/cloudevents+json";
const BATCH: &str = "application/cloudevents-batch+json";

/// The ledger with five accounts: a 0, b 10, c 20, d 30, e 40.
fn ledger() -> World {
    let world = World::running(&["ledger"]);
    let lines: Vec<_> = (0..5).map(|n| moved("left", n, ["a", "b", "c", "d", "e"][n as usize], n * 10)).collect();
    let position = world.append(&lines);
    assert_eq!(world.rows_at("ledger", &position).len(), 5);
    world
}

fn accounts(world: &World, query: &str) -> String {
    let answer = world.get(&format!("/views/ledger?{query}"));
    assert_eq!(answer.status, 200, "{query}: {}", answer.body);
    answer.json().as_array().unwrap().iter().map(|row| row["account"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_dialect_of_postgrest() {
    let world = ledger();
    for (query, expected) in [
        ("amount=eq.20", "c"),
        ("amount=neq.20", "abde"),
        ("amount=gt.20", "de"),
        ("amount=gte.20", "cde"),
        ("amount=lt.20", "ab"),
        ("amount=lte.20", "abc"),
        ("account=like.*", "abcde"),
        ("account=like.C", ""),
        ("account=ilike.C", "c"),
        ("account=in.(a,%22e%22,zz)", "ae"),
        ("updated=is.null", ""),
        ("updated=not.is.null", "abcde"),
        ("amount=not.gt.20", "abc"),
        ("amount=gt.0&amount=lt.40", "bcd"),
        ("order=amount.desc", "edcba"),
        ("order=events,account.desc&limit=2", "ed"),
        ("order=account&limit=2&offset=1", "bc"),
        ("updated=gte.2023-11-14T22:13:23Z", "de"),
        ("select=account,sum:amount&account=eq.b", "b"),
    ] {
        assert_eq!(accounts(&world, query), expected, "{query}");
    }
    assert_eq!(world.get("/views/ledger?select=sum:amount&account=eq.b").json(), json!([{ "sum": 10 }]));
}

#[test]
fn mistakes_are_named_with_what_would_be_right() {
    let world = ledger();
    for (path, status, expected) in [
        ("/views/legder", 404, "there are: ledger, sights"),
        ("/views/ledger?amuont=eq.1", 400, "\"amuont\""),
        ("/views/ledger?amount=eq.x", 400, "\"x\""),
        ("/views/ledger?amount=is.big", 400, "big"),
        ("/views/ledger?amount=equals.1", 400, "equals"),
        ("/views/ledger?limit=many", 400, "many"),
        ("/views/ledger?select=nothing", 400, "nothing"),
        ("/views/ledger?order=account.upwards", 400, "upwards"),
        ("/views/ledger?account=eq.%ff", 400, "not UTF-8"),
        ("/views/ledger?%ff=eq.1", 400, "not UTF-8"),
        ("/views/ledger?account=%22%3C", 400, "write account=eq.%22%3C"),
        ("/views/%ff", 400, "/views/%ff"),
        ("/projections/%ff", 400, "/projections/%ff"),
        ("/projections/ledger/dead-letters/-1", 400, "dead-letters/-1"),
        ("/projections/ledger/dead-letters/x", 400, "dead-letters/x"),
        ("/projections/ledger/dead-letters?after=%ff", 400, ""),
        ("/nothing", 404, "GET / lists"),
        ("/projections/nobody", 404, "there are: ledger"),
    ] {
        let answer = world.get(path);
        let body = answer.json();
        assert_eq!(answer.status, status, "{path}: {body}");
        assert!(body["error"].is_string() && body["message"].as_str().unwrap().contains(expected), "{path}: {body}");
    }
    assert_eq!(world.post("/views", ONE, "").status, 405);
    assert_eq!(world.get_with("/views/ledger", &[("accept", "image/png")]).status, 406);
}

#[test]
fn queries_at_the_limits_work_and_beyond_them_are_refused() {
    use shadowbox::config::limits::{FILTERS, PATTERN_BYTES, QUERY_TERMS};
    let world = ledger();
    let conditions = |n: usize| vec!["amount=not.lt.40"; n].join("&");
    let lists = |n: usize| vec!["amount=in.(40)"; n].join("&");
    let order = |n: usize| format!("amount=eq.40&order={}", vec!["events.desc.nullsfirst"; n].join(","));
    let select = |n: usize| {
        let names = (1..n).map(|i| format!("a{i}:account"));
        format!("amount=eq.40&select=account,{}", names.collect::<Vec<_>>().join(","))
    };
    let like = |n: usize| format!("amount=eq.40&account=not.like.{}", "[".repeat(n));
    let ilike = |n: usize| format!("amount=eq.40&account=not.ilike.{}", "%5c%25".repeat(n / 2) + &"a".repeat(n % 2));
    for (query, limit) in [
        (&conditions as &dyn Fn(usize) -> String, FILTERS),
        (&lists, FILTERS),
        (&order, QUERY_TERMS),
        (&select, QUERY_TERMS),
        (&like, PATTERN_BYTES),
        (&ilike, PATTERN_BYTES / 2),
    ] {
        assert_eq!(accounts(&world, &query(limit)), "e");
        if limit != PATTERN_BYTES / 2 {
            let answer = world.get(&format!("/views/ledger?{}", query(limit + 1)));
            assert_eq!((answer.status, &answer.json()["error"]), (400, &json!("bad_request")), "{}", answer.body);
            assert!(answer.body.contains(&limit.to_string()), "{}", answer.body);
        }
    }
}

#[test]
fn csv_ranges_and_single_objects() {
    let world = ledger();
    let csv = world.get_with("/views/ledger?select=account,amount&limit=2&order=account", &[("accept", "text/csv")]);
    assert_eq!(csv.body.replace("\r\n", "\n"), "account,amount\na,0\nb,10\n");
    assert!(csv.header("content-type").starts_with("text/csv"));
    let counted = world.get_with("/views/ledger?limit=2&offset=1", &[("prefer", "count=exact")]);
    assert_eq!(counted.header("content-range"), "1-2/5");
    let object = [("accept", "application/vnd.pgrst.object+json")];
    assert_eq!(world.get_with("/views/ledger?account=eq.c&select=amount", &object).json(), json!({ "amount": 20 }));
    assert_eq!(world.get_with("/views/ledger", &object).status, 406);
}

#[test]
fn an_answer_is_never_larger_than_the_limit() {
    let mut world = World::new();
    std::fs::write(world.directory.path().join("shadowbox.toml"), "[http]\nmax_rows = 3\n").unwrap();
    world.drop_module("ledger", &module("ledger"));
    let position = world.append(&(0..9).map(|n| moved("left", n, &n.to_string(), n)).collect::<Vec<_>>());
    world.start();
    assert_eq!(world.rows_at("ledger", &position).len(), 3);
    assert_eq!(world.get("/views/ledger?limit=100").header("content-range"), "0-2/*");
    assert_eq!(world.get("/views/ledger?limit=100&offset=6").header("content-range"), "6-8/*");
}

#[test]
fn a_column_that_is_selected_many_times_is_read_once_and_counts_as_often() {
    let world = World::running(&["ledger"]);
    // A key is short, but the answer has it some 80,000 times.
    let account = "k".repeat(1_000);
    let lines: Vec<_> = (0..80).map(|n| moved("left", n, &format!("{account}{n:02}"), n)).collect();
    world.rows_at("ledger", &world.append(&lines));
    let select: String = (0..999).map(|n| format!("c{n}:account,")).collect();
    let path = format!("/views/ledger?select={select}amount&order=account");
    let rows = world.get(&format!("{path}&limit=2"));
    assert_eq!(rows.status, 200, "{}", rows.body);
    let rows = rows.json();
    assert_eq!((rows[1].as_object().unwrap().len(), &rows[1]["amount"]), (1_000, &json!(1)));
    assert_eq!((&rows[0]["c0"], &rows[1]["c998"]), (&json!(format!("{account}00")), &json!(format!("{account}01"))));
    for accept in ["application/json", "text/csv"] {
        let all = world.get_with(&path, &[("accept", accept)]);
        assert_eq!((all.status, &all.json()["error"]), (400, &json!("too_large")), "{accept}");
    }
    // An order by a column is the same when it is said again.
    let order = "account.desc,".repeat(999);
    assert_eq!(world.get(&format!("/views/ledger?order={order}amount&limit=1")).json()[0]["amount"], json!(79));
}

#[test]
fn views_and_projections_are_listed() {
    let world = ledger();
    let views = world.get("/views").json();
    let ledger = &views[0];
    assert_eq!(
        (&ledger["name"], &ledger["projection"], &ledger["generation"]),
        (&json!("ledger"), &json!("ledger"), &json!(1))
    );
    assert_eq!(ledger["key"], json!(["account"]));
    assert_eq!(ledger["columns"][1], json!({ "name": "amount", "type": "integer", "nullable": false }));
    assert_eq!(ledger["position"], json!(4));
    let projection = &world.get("/projections").json()[0];
    assert_eq!(
        (&projection["name"], &projection["version"], &projection["state"]),
        (&json!("ledger"), &json!(1), &json!("live"))
    );
    assert_eq!(projection["position"], json!(4));
    let log = &world.get("/status").json()["log"];
    assert_eq!((&log["head"], &log["sources"], &log["types"]), (&json!(4), &json!(1), &json!(1)));
    assert!(log["identity"].is_string() && log["appended"].is_string() && log["error"].is_null(), "{log}");
    assert_eq!((&projection["lag_events"], &projection["lag_seconds"]), (&json!(0), &json!(0.0)));
    assert!(projection["rate"].is_number() && projection["error"].is_null());
    assert_eq!(projection["module_hash"].as_str().unwrap().len(), 64);
    assert_eq!((world.get("/healthz").status, world.get("/readyz").status), (200, 200));
}

#[test]
fn who_appends_reads_their_own_write() {
    let world = World::running(&["ledger"]);
    for n in 0..50 {
        let answer = world.post("/events", ONE, &moved("left", n, "a", 1));
        let expected =
            json!({ "appended": 1, "duplicates": 0, "first_position": n, "last_position": n, "position": n });
        assert_eq!((answer.status, answer.json()), (200, expected));
        let rows = world.rows_at("ledger", answer.header("shadowbox-position"));
        assert_eq!(rows[0]["events"].as_i64(), Some(n + 1));
    }
}

#[test]
fn a_position_that_is_not_there_yet_is_waited_for_and_then_refused_by_type() {
    let world = ledger();
    let late = world.get_with("/views/ledger", &[("shadowbox-position", "5"), ("prefer", "wait=0.05")]);
    let body = late.json();
    assert_eq!((late.status, &body["error"]), (412, &json!("not_yet")));
    assert_eq!((&body["position"], &body["wanted"]), (&json!(4), &json!(5)));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| world.rows_at("ledger", "5"));
        world.append(&[moved("left", 5, "f", 50)]);
        assert_eq!(waiting.join().unwrap().len(), 6);
    });
    for position in ["elsewhere=1", "left", "-1", "5,6"] {
        let answer = world.get_with("/views/ledger", &[("shadowbox-position", position)]);
        assert!(answer.status == 400 && answer.body.contains("one number"), "{}", answer.body);
    }
}

#[test]
fn events_come_alone_or_in_batches_and_twice_is_once() {
    let world = World::running(&["ledger"]);
    let batch = format!("[{},{}]", moved("left", 0, "a", 1), moved("right", 0, "a", 1));
    let answer = world.post("/events", BATCH, &batch);
    let expected = |appended: u64, duplicates: u64, last: u64| {
        json!({
            "appended": appended, "duplicates": duplicates, "first_position": 0, "last_position": last, "position": last,
        })
    };
    assert_eq!(answer.json(), expected(2, 0, 1));
    assert_eq!(answer.header("shadowbox-position"), "1");
    let again = world.post("/events", "application/json", &batch);
    assert_eq!((again.json(), again.header("shadowbox-position")), (expected(0, 2, 1), "1"));
    assert_eq!(world.rows_at("ledger", "1")[0]["events"], 2);
    // What is there and what is new, in one; the same id is another event where it is another source's.
    let batch = format!("[{},{}]", moved("right", 0, "a", 1), moved("right", 1, "a", 1));
    assert_eq!(world.post("/events", BATCH, &batch).json()["first_position"], 1);
    let other = event("right", "Moved", "left-0", 0, json!({ "account": "a", "amount": 1 }));
    assert_eq!(world.post("/events", ONE, &other).json()["position"], 3);
    // Nothing is no error, and says nothing of where.
    let none = world.post("/events", BATCH, "[]");
    assert_eq!((none.status, &none.json()["appended"], &none.json()["position"]), (200, &json!(0), &Value::Null));
}

#[test]
fn events_that_are_none_append_nothing() {
    let world = World::running(&[]);
    let good = moved("left", 0, "a", 1);
    let huge = event("left", "Moved", "huge", 0, json!({ "x": "y".repeat(2 << 20) }));
    for (content_type, body, status, expected) in [
        (ONE, "{".to_owned(), 400, "not a JSON object"),
        (ONE, good.replace("\"id\":\"left-0\"", "\"id\":\"\""), 400, "id"),
        (ONE, good.replace("1.0", "0.3"), 400, "specversion"),
        (ONE, huge, 400, "the limit is 1048576"),
        (BATCH, format!("[{good},{{}}]"), 400, "event 1 of the batch"),
        ("text/plain", good.clone(), 415, BATCH),
    ] {
        let answer = world.post("/events", content_type, &body);
        assert!(answer.status == status && answer.body.contains(expected), "{}: {}", answer.status, answer.body);
    }
    assert_eq!(world.get("/status").json()["log"]["head"], Value::Null);
}

#[test]
fn the_same_rows_whatever_the_order_of_arrival_across_services() {
    let lines = std::fs::read_to_string(root().join("example-plugins/orders-across-services/events.jsonl")).unwrap();
    let mut lines: Vec<String> = lines.lines().map(str::to_owned).collect();
    let by_source = |line: &String| {
        let event: Value = serde_json::from_str(line).unwrap();
        ["shipping", "payments", "users", "orders"].iter().position(|s| event["source"] == *s).unwrap()
    };
    let read = |lines: &[String]| {
        let world = World::running(&["orders-across-services"]);
        // One by one, so that they are applied in the order of arrival.
        let mut position = String::new();
        for line in lines {
            position = world.post("/events", ONE, line).header("shadowbox-position").to_owned();
            world.rows_at("orders", &position);
        }
        world.rows_at("orders", &position)
    };
    let in_order = read(&lines);
    lines.sort_by_key(by_source);
    assert!(!in_order.is_empty());
    assert_eq!(read(&lines), in_order);
}
