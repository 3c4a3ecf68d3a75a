//! What happens to events and to rows.

use std::borrow::Cow;

use serde::Deserialize;
use shadowbox_plugin::prelude::*;

/// What each event does is in its type's name; which row it does it to in the payload.
#[derive(Events)]
#[events(source = "a")]
enum Fact<'a> {
    #[event("Put")]
    #[event("Put*", source = "b")]
    Put(Put<'a>),
    #[event("Broken", "Bad?", "{Un,Mis}known[0-9]")]
    Broken,
    #[event("*", source = "b")]
    Rest,
    #[event("Rekeyed")]
    Rekeyed(Put<'a>),
    #[event("NotANumber")]
    NotANumber,
    #[event("NotListed")]
    NotListed,
    #[event("Nothing")]
    Nothing(Option<Put<'a>>),
    #[event("Read")]
    Read(Vec<&'a str>),
    #[event("Raw")]
    Raw,
}

#[derive(Deserialize)]
struct Put<'a> {
    id: &'a str,
    #[serde(borrow, default)]
    text: Cow<'a, str>,
}

#[derive(View, Debug, Default, PartialEq)]
#[view(name = "rows", index(text), index("source", "text"))]
struct Row {
    source: Option<String>,
    #[view(key)]
    id: String,
    #[view(column = "type")]
    event_type: String,
    text: String,
    real: f64,
}

#[derive(View, Default)]
#[view(name = "unlisted")]
struct Unlisted {
    #[view(key)]
    id: i64,
}

#[projection(name = "behaviour", version = 3, views(Row))]
fn behaviour(event: Event<Fact>, views: &mut Views) -> Result<()> {
    let Event { source, event_type, .. } = event;
    match event.data {
        Fact::Put(e) | Fact::Nothing(Some(e)) => views.put(Row {
            source: Some(source.into()),
            id: e.id.into(),
            event_type: event_type.into(),
            text: e.text.into(),
            real: 0.5,
        }),
        Fact::Broken => bail!("{event_type} at {}", event.position),
        Fact::Rest | Fact::Nothing(None) => views.upsert::<Row>("rest", |row| row.text += event_type),
        // The mistakes that nobody looks at.
        Fact::Rekeyed(e) => {
            let _ = views.update::<Row>(e.id, |row| row.id.push('!'));
            Ok(())
        }
        Fact::NotANumber => {
            let _ = views.upsert::<Row>("nan", |row| row.real = f64::NAN);
            views.upsert::<Row>("nan", |row| row.real = 0.0)
        }
        Fact::NotListed => {
            assert!(views.get::<Unlisted>(1).is_none());
            Ok(())
        }
        Fact::Read(ids) => {
            views.load::<Row>(ids.iter().copied());
            let found = ids.iter().filter(|id| views.get::<Row>(id).is_some()).count();
            ensure!(found > 0, "found none of {}", ids.len());
            Ok(())
        }
        Fact::Raw => views.put(Row {
            id: event.id.into(),
            text: format!(
                "{} {} {} {} {} {:?}",
                event.stream, event.version, event.time, event.metadata, event.position, event.payload
            ),
            real: -0.0,
            ..Default::default()
        }),
    }
}

fn put(id: &str) -> serde_json::Value {
    json!({ "id": id })
}

#[test]
fn a_negative_zero_is_a_zero_because_the_database_has_no_other() {
    let kit = TestKit::new(behaviour).given("a", "Raw", json!(1));
    assert!(kit.rows::<Row>()[0].real.is_sign_positive());
}

#[test]
fn types_are_told_apart_by_source_name_and_glob() {
    let kit = TestKit::new(behaviour)
        .given("a", "Put", put("1"))
        .given("a", "Putty", put("2"))
        .given("b", "Putty", put("3"))
        .given("b", "Other", put("4"))
        .given("c", "Put", put("5"))
        .given("a", "Badly", ())
        // The log is one sequence, and what failed is not in it.
        .given_failing("a", "Bad1", (), "Bad1 at 6")
        .given_failing("a", "Misknown7", (), "Misknown7 at 6");
    let rows: Vec<_> = kit.rows::<Row>().into_iter().map(|row| (row.id, row.source, row.event_type)).collect();
    let row = |id: &str, source: &str, event_type: &str| (id.into(), Some(source.into()), event_type.into());
    assert_eq!(rows, [row("1", "a", "Put"), row("3", "b", "Putty"), ("rest".into(), None, String::new())]);
}

/// Sources that are not known by name.
mod sources {
    use super::*;

    #[derive(Events)]
    #[events(source = "sensors/*")]
    enum Reading {
        #[event("Read")]
        Read,
        #[event("Read", source = "sensors/old?")]
        #[event("Read", "Recovered", source = "sensors/7")]
        Special,
        #[event("*")]
        Other,
        #[event("Read", source = "lab\\*")]
        Lab,
    }

    #[projection(name = "sources", version = 1, views(Row))]
    fn sources(event: Event<Reading>, views: &mut Views) -> Result<()> {
        let text = match event.data {
            Reading::Read => "read",
            Reading::Special => "special",
            Reading::Other => "other",
            Reading::Lab => "lab",
        };
        let text = format!("{text} at {}", event.position);
        views.put(Row { id: event.id.into(), source: Some(event.source.into()), text, ..Default::default() })
    }

    fn texts(kit: &TestKit<sources>) -> Vec<(String, String)> {
        kit.rows::<Row>().into_iter().map(|row| (row.source.unwrap(), row.text)).collect()
    }

    #[test]
    fn a_glob_takes_every_source_that_it_matches_and_an_exact_name_wins() {
        let event = |source: &str, event_type: &str| TestEvent::new(source, event_type, ());
        let numbered = |(i, event): (usize, TestEvent)| event.id(&i.to_string());
        let events = [
            event("sensors/north/1", "Read"),
            event("sensors/7", "Read"),
            event("elsewhere", "Read"),
            event("sensors/7", "Lost"),
            event("sensors/7", "Recovered"),
            event("sensors/old1", "Read"),
            event("lab*", "Read"),
            event("lab1", "Read"),
            event("sensors/", "Lost"),
        ];
        let kit = TestKit::new(sources).given_all(events.into_iter().enumerate().map(numbered));
        let expected = [
            ("sensors/north/1", "read at 0"),
            ("sensors/7", "special at 1"),
            ("sensors/7", "other at 3"),
            ("sensors/7", "special at 4"),
            // Both sources are globs: the first one wins.
            ("sensors/old1", "read at 5"),
            ("lab*", "lab at 6"),
            ("sensors/", "other at 8"),
        ];
        assert_eq!(texts(&kit), expected.map(|(source, text)| (source.to_owned(), text.to_owned())));
        kit.assert_pure();
    }

    #[test]
    fn the_manifest_has_the_patterns_as_they_are_written() {
        let expected = json!([
            { "source": "sensors/*", "types": ["Read", "*"] },
            { "source": "sensors/old?", "types": ["Read"] },
            { "source": "sensors/7", "types": ["Read", "Recovered"] },
            { "source": "lab\\*", "types": ["Read"] },
        ]);
        assert_eq!(TestKit::new(sources).manifest()["sources"], expected);
    }

    /// With so many of both, a table of all pairs would have a hundred million places.
    #[test]
    fn a_batch_may_have_as_many_sources_and_types_as_events() {
        let event = |i: usize| TestEvent::new(&format!("sensors/{}", i % 10_000), &format!("T{}", i % 9_999), ());
        let kit = TestKit::new(sources).given_all((0..16_384).map(event));
        assert_eq!(kit.rows::<Row>().len(), 16_384);
    }
}

#[test]
fn an_event_brings_all_that_the_log_knows() {
    let event = TestEvent::new("a", "Raw", ())
        .id("e-1")
        .stream("s", 4)
        .at("2013-01-01T10:15:00.25Z")
        .metadata(&json!({ "tenant": "t" }))
        .payload(&[0xff, 0]);
    let kit = TestKit::new(behaviour).given("a", "Unheard", ()).given_all([event]);
    let text = r#"s 4 2013-01-01T10:15:00.250Z {"tenant":"t"} 1 [255, 0]"#;
    assert_eq!(kit.row::<Row>("e-1").unwrap().text, text);
}

#[test]
fn a_cloud_event_is_read_with_its_extensions() {
    let json = r#"{"specversion":"1.0","id":"e-2","source":"a","type":"Raw","subject":"s","sequence":9,
                   "time":"2013-01-01T10:15:00Z","tenant":"t","data":{"x":1}}"#;
    let kit = TestKit::new(behaviour).given_all([TestEvent::from_cloud_event(json).unwrap()]);
    let payload = format!("{:?}", br#"{"x":1}"#);
    let text = format!(r#"s 9 2013-01-01T10:15:00Z {{"tenant":"t"}} 0 {payload}"#);
    assert_eq!(kit.row::<Row>("e-2").unwrap().text, text);
    assert!(TestEvent::from_cloud_event("{}").is_err());
}

#[test]
fn payloads_may_be_empty_and_may_have_escapes() {
    let kit = TestKit::new(behaviour)
        .given_all([TestEvent::new("a", "Nothing", ()).payload(b"")])
        .given_all([TestEvent::new("a", "Put", ()).payload(br#"{"id":"1","text":"caf\u00e9"}"#)]);
    assert_eq!(kit.row::<Row>("1").unwrap().text, "café");
    assert!(kit.row::<Row>("rest").is_some());
}

#[test]
fn a_wrong_payload_names_the_type_and_what_is_wrong() {
    let _ = TestKit::new(behaviour).given_failing("a", "Put", json!({}), "the data of `Put`: missing field `id`");
    let mut kit = TestKit::new(behaviour);
    for payload in [&b"{"[..], b"", b"\xff\xff", b"{\"id\":\"\xff\"}"] {
        let event = TestEvent::new("a", "Put", ()).payload(payload);
        let error = kit.try_given([TestEvent::new("a", "Put", put("1")), event]).unwrap_err().to_string();
        assert!(error.starts_with("event 2 of 2: the data of `Put`: "), "{error}");
    }
    assert_eq!(kit.rows::<Row>(), []);
}

#[test]
fn a_mistake_fails_the_event_even_if_nobody_looks() {
    let kit = TestKit::new(behaviour)
        .given("a", "Put", put("1"))
        .given_failing("a", "Rekeyed", put("1"), "a change to a row of `rows` gave it another key")
        .given_failing("a", "NotANumber", (), "a row of `rows`: NaN is not a finite number")
        .given_failing("a", "NotListed", (), "view `unlisted` is not listed in views(...) of #[projection]");
    assert_eq!(kit.rows::<Row>().len(), 1);
    assert_eq!(kit.changes(), 1);
    kit.assert_pure();
}

#[test]
fn reading_writes_nothing_and_asks_once() {
    let kit = TestKit::new(behaviour)
        .given("a", "Put", put("1"))
        .given_failing("a", "Read", ["7", "8"], "found none of 2")
        // The failure has dropped the instance and its cache, so both are asked for.
        .given("a", "Read", ["1", "2", "1"])
        .given("a", "Read", ["2", "1"]);
    assert_eq!(kit.changes(), 1);
    // 7 and 8, then 1 and 2 and 1 again in one request.
    assert_eq!(kit.lookups(), 5);
}

#[test]
fn the_manifest_says_what_the_macros_read() {
    let expected = json!({
        "contract": "0.1.0",
        "projection": "behaviour",
        "version": 3,
        "sources": [
            { "source": "a", "types": [
                "Put", "Broken", "Bad?", "{Un,Mis}known[0-9]", "Rekeyed", "NotANumber", "NotListed", "Nothing", "Read", "Raw"
            ] },
            { "source": "b", "types": ["Put*", "*"] },
        ],
        "views": [{
            "name": "rows",
            "columns": [
                { "name": "source", "type": "text", "nullable": true },
                { "name": "id", "type": "text" },
                { "name": "type", "type": "text" },
                { "name": "text", "type": "text" },
                { "name": "real", "type": "real" },
            ],
            "key": ["id"],
            "indexes": [["text"], ["source", "text"]],
        }],
    });
    assert_eq!(TestKit::new(behaviour).manifest(), expected);
}

/// Projections that read only some of the columns of a batch.
mod columns {
    use super::*;

    #[derive(Events)]
    #[events(source = "a")]
    enum Unit {
        #[event("*")]
        Any,
    }

    #[projection(name = "reads-two", version = 1, views(Row))]
    fn reads_two(event: Event<Unit>, views: &mut Views) -> Result<()> {
        let Unit::Any = event.data;
        let mut text = event.stream.to_owned();
        text.push_str(event.event_type);
        views.put(Row { id: event.id.into(), text, ..Default::default() })
    }

    #[projection(name = "reads-none", version = 1, views(Row))]
    fn reads_none(event: Event<Unit>, views: &mut Views) -> Result<()> {
        views.upsert::<Row>(event.source, |row| row.real += 1.0)
    }

    #[projection(name = "parses", version = 1, views(Row))]
    fn parses(event: Event<Fact>, views: &mut Views) -> Result<()> {
        match event.data {
            Fact::Put(e) => views.put(Row { id: e.id.into(), text: event.metadata.into(), ..Default::default() }),
            _ => Ok(()),
        }
    }

    #[test]
    fn the_manifest_asks_for_what_the_function_reads() {
        assert_eq!(TestKit::new(reads_two).manifest()["batch"], json!(["streams", "ids"]));
        assert_eq!(TestKit::new(reads_none).manifest()["batch"], json!([]));
        assert_eq!(TestKit::new(parses).manifest()["batch"], json!(["metadata", "payloads"]));
        // It takes the event apart.
        assert!(TestKit::new(behaviour).manifest().get("batch").is_none());
    }

    #[test]
    fn what_it_reads_arrives() {
        let event = TestEvent::new("a", "X", ()).id("e-1").stream("s-", 4);
        assert_eq!(TestKit::new(reads_two).given_all([event]).row::<Row>("e-1").unwrap().text, "s-X");
        let kit = TestKit::new(reads_none).given("a", "X", ()).given("a", "Y", ());
        assert_eq!(kit.row::<Row>("a").unwrap().real, 2.0);
        let event = TestEvent::new("a", "Put", put("1")).metadata(&json!({ "tenant": "t" }));
        assert_eq!(TestKit::new(parses).given_all([event]).row::<Row>("1").unwrap().text, r#"{"tenant":"t"}"#);
    }
}

/// Events whose content was forgotten.
mod forgotten {
    use super::*;

    #[derive(Events)]
    #[events(source = "a")]
    enum Lossy<'a> {
        #[event("Put")]
        Put(Put<'a>),
        #[event("Perhaps")]
        Perhaps(Option<Put<'a>>),
        #[event("Any")]
        Any(serde_json::Value),
        #[event("Unit")]
        Unit,
    }

    #[projection(name = "lossy", version = 1, views(Row), forgotten)]
    fn lossy(event: Event<Lossy>, views: &mut Views) -> Result<()> {
        let data = match event.data {
            Lossy::Put(e) | Lossy::Perhaps(Some(e)) => e.id.to_owned(),
            Lossy::Perhaps(None) => "none".to_owned(),
            Lossy::Any(value) => value.to_string(),
            Lossy::Unit => "unit".to_owned(),
        };
        let (metadata, n) = (event.metadata, event.payload.len());
        let mut text = format!("{data} `{metadata}` {n}");
        if event.forgotten {
            text.push_str(" forgotten");
        }
        views.put(Row { id: event.id.into(), text, ..Default::default() })
    }

    #[projection(name = "default", version = 1, views(Row))]
    fn default(event: Event<Lossy>, views: &mut Views) -> Result<()> {
        let text = event.position.to_string();
        views.put(Row { id: event.id.into(), text, ..Default::default() })
    }

    fn events() -> Vec<TestEvent> {
        let event = |event_type: &str| {
            TestEvent::new("a", event_type, put("1")).id(event_type).metadata(&json!({ "tenant": "t" }))
        };
        vec![event("Perhaps").forgotten(), event("Put"), event("Any").forgotten(), event("Unit").forgotten()]
    }

    fn texts<P: shadowbox_plugin::Projection>(kit: &TestKit<P>) -> Vec<(String, String)> {
        kit.rows::<Row>().into_iter().map(|row| (row.id, row.text)).collect()
    }

    #[test]
    fn they_come_without_their_content_to_a_projection_that_asks() {
        let kit = TestKit::new(lossy).given_all(events());
        let expected = [
            ("Any", "null `` 0 forgotten"),
            ("Perhaps", "none `` 0 forgotten"),
            ("Put", r#"1 `{"tenant":"t"}` 10"#),
            ("Unit", "unit `` 0 forgotten"),
        ];
        assert_eq!(texts(&kit), expected.map(|(id, text)| (id.to_owned(), text.to_owned())));
        kit.assert_pure();
    }

    #[test]
    fn all_others_pass_over_them() {
        let kit = TestKit::new(default).given_all(events()).given("a", "Put", put("1"));
        assert_eq!(texts(&kit), [("Put", "1"), ("a/4", "4")].map(|(id, text)| (id.to_owned(), text.to_owned())));
    }

    #[test]
    fn a_variant_that_needs_its_payload_refuses_them() {
        let mut kit = TestKit::new(lossy);
        let error = kit.try_given([TestEvent::new("a", "Put", put("1")).forgotten()]).unwrap_err();
        assert_eq!(error.to_string(), "the data of `Put` was forgotten; let its variant hold an `Option`, or nothing");
        let error = kit.try_given([TestEvent::new("a", "Put", ()).payload(b"")]).unwrap_err().to_string();
        assert!(error.starts_with("the data of `Put`: "), "{error}");
    }

    #[test]
    fn a_cloud_event_says_so_itself() {
        let read = |forgotten: &str| {
            let json = format!(r#"{{"id":"1","source":"a","type":"Unit","forgotten":{forgotten}}}"#);
            texts(&TestKit::new(lossy).given_all([TestEvent::from_cloud_event(&json).unwrap()])).remove(0).1
        };
        assert_eq!(read("true"), "unit `` 0 forgotten");
        assert_eq!(read(r#""long ago""#), r#"unit `{"forgotten":"long ago"}` 0"#);
    }

    #[test]
    fn only_the_manifest_that_asks_for_them_says_so() {
        let manifest = TestKit::new(lossy).manifest();
        assert_eq!(manifest["forgotten"], true);
        // The column comes with the events.
        assert_eq!(manifest["batch"], json!(["metadata", "payloads", "ids"]));
        assert!(TestKit::new(default).manifest().get("forgotten").is_none());
    }
}

#[cfg(all(feature = "uuid", feature = "decimal"))]
#[test]
fn uuids_and_decimals_are_columns() {
    #[derive(View, Debug, Default, PartialEq)]
    #[view(name = "extras")]
    struct Extra {
        #[view(key)]
        id: uuid::Uuid,
        price: rust_decimal::Decimal,
        other: Option<uuid::Uuid>,
    }

    #[derive(Events)]
    #[events(source = "a")]
    enum ExtraFact {
        #[event("Priced")]
        Priced((uuid::Uuid, String)),
    }

    #[projection(name = "extras", version = 1, views(Extra))]
    fn extras(event: Event<ExtraFact>, views: &mut Views) -> Result<()> {
        let ExtraFact::Priced((id, price)) = event.data;
        views.put(Extra { id, price: price.parse()?, other: Some(id) })
    }

    let id = uuid::Uuid::from_u128(7);
    let kit = TestKit::new(extras).given("a", "Priced", (id, "-12.50"));
    let row = kit.row::<Extra>(id).unwrap();
    assert_eq!((row.price.to_string().as_str(), row.other), ("-12.50", Some(id)));
    let types: Vec<_> = Extra::SCHEMA.columns.iter().map(|column| column.column_type).collect();
    assert_eq!(format!("{types:?}"), "[Uuid, Decimal, Uuid]");
}

/// A projection that cheats: the rows depend on how often the instance was made anew.
mod impure {
    use std::cell::Cell;

    use super::*;

    thread_local!(static SEEN: Cell<i64> = const { Cell::new(0) });

    #[derive(Events)]
    enum Any {
        #[event("*", source = "a")]
        Any,
    }

    #[derive(View, Default)]
    #[view(name = "counts")]
    struct Count {
        #[view(key)]
        id: i64,
        seen: i64,
    }

    #[projection(name = "impure", version = 1, views(Count))]
    fn impure(_event: Event<Any>, views: &mut Views) -> Result<()> {
        SEEN.set(SEEN.get() + 1);
        views.upsert::<Count>(1, |count| count.seen = SEEN.get())
    }

    #[test]
    #[should_panic = "applying the events as one batch gives other rows: `counts` at (1) has (4) instead of (2)"]
    fn an_impure_projection_is_found_out() {
        TestKit::new(impure).given("a", "X", ()).given("a", "X", ()).assert_pure();
    }
}
