//! A plugin that does to its host whatever an event asks for. It is written against the raw contract, because the SDK
//! would prevent most of it. Each event type is one behaviour; any other type is an honest event, which puts a row.

#![cfg(target_arch = "wasm32")]

#[allow(
    unsafe_code,
    missing_docs,
    unreachable_pub,
    clippy::allow_attributes_without_reason,
    reason = "generated; its shape is wit-bindgen's"
)]
mod bindings {
    wit_bindgen::generate!({ path: "../../../wit", world: "plugin" });
    export!(Hostile with_types_in self);
    use super::Hostile;
}

use std::hint::black_box;

use bindings::exports::shadowbox::plugin::projection::{Failure, Guest};
use bindings::shadowbox::plugin::host;
use rmp::encode::{write_array_len, write_bin, write_f64, write_sint, write_str};

/// Tests put another word in its place in the compiled module, which saves them a build for each manifest.
static DESCRIBE: &str = "describe:honest.................";

const HONEST: &str = r#"{ "contract": "0.1.0", "projection": "hostile", "version": 1,
    "sources": [ { "source": "left" } ],
    "views": [ { "name": "deeds", "key": ["name"], "columns": [
        { "name": "name", "type": "text" }, { "name": "count", "type": "integer" },
        { "name": "real", "type": "real", "nullable": true }, { "name": "note", "type": "text", "nullable": true } ] } ] }"#;

struct Hostile;

impl Guest for Hostile {
    fn describe() -> String {
        let word = black_box(DESCRIBE).trim_start_matches("describe:").trim_end_matches('.');
        match word {
            "traps" => panic!("no manifest today"),
            "loops" => endless(),
            "exits" => std::process::exit(0),
            "recurses" => recurse(0).to_string(),
            #[expect(clippy::print_stdout, reason = "it is admitted, and checked, like any other")]
            "prints" => {
                println!("a manifest comes next");
                HONEST.to_owned()
            }
            "asks" => format!("{:?}", host::get(0, &text("a"))),
            "is-not-json" => "a projection called hostile".to_owned(),
            "is-huge" => format!("{HONEST}{}", " ".repeat(5 << 20)),
            "is-beyond" => " ".repeat(100 << 20),
            "nests" => {
                HONEST.replacen('{', &format!("{{ \"deep\": {}{},", "[".repeat(1 << 20), "]".repeat(1 << 20)), 1)
            }
            "has-bad-names" => HONEST.replace("deeds", "Robert'); DROP TABLE"),
            "has-a-long-name" => HONEST.replace("deeds", &"d".repeat(1 << 20)),
            "has-no-views" => HONEST.replace("\"views\"", "\"views\": [], \"former_views\""),
            "has-bad-globs" => with_types(&[format!("{}a{}", "{".repeat(1 << 18), "}".repeat(1 << 18))]),
            "has-many-globs" => with_types(&(0..100_000).map(|n| format!("*a?[b-d]*{n}")).collect::<Vec<_>>()),
            "has-many-indexes" => HONEST
                .replace("\"key\"", &format!("\"indexes\": [{}[\"count\"]], \"key\"", "[\"count\"],".repeat(100_000))),
            _ => HONEST.to_owned(),
        }
    }

    fn apply(batch: Vec<u8>) -> Result<Vec<u8>, Failure> {
        let batch: Batch<'_> = rmp_serde::from_slice(&batch).expect("the host writes batches");
        let ends =
            |i: usize| u32::from_le_bytes(batch.payload_ends[4 * i..4 * i + 4].try_into().expect("four")) as usize;
        let mut changes = Vec::new();
        for (i, index) in batch.r#type.chunks_exact(2).enumerate() {
            let event_type = batch.types[usize::from(u16::from_le_bytes([index[0], index[1]]))];
            let payload = &batch.payloads[if i == 0 { 0 } else { ends(i - 1) }..ends(i)];
            let position = u64::from_le_bytes(batch.positions[8 * i..8 * i + 8].try_into().expect("eight"));
            match deed(event_type, payload, i as u32)? {
                Deed::Honest => changes.push(put(&text(&format!("event {position}")), &row(1))),
                Deed::Changes(mut more) => changes.append(&mut more),
                Deed::Answer(answer) => return Ok(answer),
            }
        }
        Ok(array(&changes))
    }
}

/// What is read of a batch.
#[derive(serde::Deserialize)]
struct Batch<'a> {
    #[serde(borrow)]
    positions: &'a [u8],
    types: Vec<&'a str>,
    r#type: &'a [u8],
    payloads: &'a [u8],
    payload_ends: &'a [u8],
}

/// What becomes of an event.
enum Deed {
    /// A row, as it should be.
    Honest,
    /// These changes, each encoded.
    Changes(Vec<Vec<u8>>),
    /// Not an array of changes, but this.
    Answer(Vec<u8>),
}

fn deed(event_type: &str, payload: &[u8], event: u32) -> Result<Deed, Failure> {
    let changes = match event_type {
        // The sandbox: time, memory, the stack, the ways to end.
        "Loops" => endless(),
        "Recurses" => vec![put(&text("depth"), &row(recurse(0).into()))],
        "RecursesAndAsks" => vec![put(&text("depth"), &row(recurse_and_ask(0).into()))],
        "RecursesWithArrays" => vec![put(&text("depth"), &row(recurse_with_arrays(0).into()))],
        "Grows" => {
            let mut hoard: Vec<Vec<u8>> = Vec::new();
            loop {
                hoard.push(vec![1; 1 << 20]);
                black_box(&hoard);
            }
        }
        "Panics" => panic!("the event says so"),
        "Exits" => std::process::exit(3),
        "Succeeds" => std::process::exit(0),
        "Traps" => core::arch::wasm32::unreachable(),
        #[expect(clippy::print_stdout, clippy::print_stderr, reason = "a flood of output is what this event is for")]
        "Prints" => {
            let line = "a line that nobody needs ".repeat(1_000);
            for _ in 0..1_000 {
                println!("{line}");
                eprintln!("{line}");
            }
            Vec::new()
        }

        // What it says of an event.
        "BlamesNobody" => return Err(Failure { event: u32::MAX, message: "an event that is not there".into() }),
        "TalksTooMuch" => return Err(Failure { event, message: "blah ".repeat(2 << 20) }),

        // Answers that are not changes, or too many.
        "AnswersNonsense" => return Ok(Deed::Answer(b"this is not MessagePack".to_vec())),
        "AnswersNothing" => return Ok(Deed::Answer(Vec::new())),
        "AnswersMore" => return Ok(Deed::Answer([array(&[]), vec![0xc0; 100]].concat())),
        "AnswersAMap" => return Ok(Deed::Answer(vec![0x81, 0x00, 0x00])),
        "Declares" => return Ok(Deed::Answer(vec![0xdd, 0xff, 0xff, 0xff, 0xff])),
        "DeclaresAKey" => return Ok(Deed::Answer(vec![0x91, 0x94, 0, 0, 0xc6, 0xff, 0xff, 0xff, 0xff])),
        "Nests" => return Ok(Deed::Answer(vec![0x91; 1 << 20])),
        "AnswersTooMuch" => return Ok(Deed::Answer(vec![0xc0; (64 << 20) + 1])),
        "AnswersAMillion" => return Ok(Deed::Answer(million())),
        "Echoes" => return Ok(Deed::Answer(payload.to_vec())),

        // Changes that are not rows of the view.
        "MissesAColumn" => vec![put(&text("a"), &[0x01])],
        "AddsAColumn" => vec![put(&text("a"), &[0x01, 0xc0, 0xc0, 0xc0])],
        "MistakesAType" => vec![put(&text("a"), &[&text("one")[..], &[0xc0, 0xc0]].concat())],
        "ForgetsAValue" => vec![put(&text("a"), &[0xc0, 0xc0, 0xc0])],
        "InventsAView" => vec![change(9, 0, &text("a"), &row(1))],
        "InventsAnOperation" => vec![change(0, 7, &text("a"), &row(1))],
        "WritesALongKey" => vec![put(&text(&"a".repeat(2_000)), &row(1))],
        "WritesALongRow" => vec![put(&text("a"), &[&row(1)[..2], &text(&"a".repeat(1 << 20))].concat())],
        "WritesBadText" => vec![put(&[0xa2, 0xc3, 0x28], &row(1))],
        "WritesNaN" => vec![put(&text("a"), &real(f64::NAN))],
        "WritesInfinity" => vec![put(&text("a"), &real(f64::INFINITY))],
        "WritesTwice" => vec![put(&text("twice"), &row(1)), put(&text("twice"), &row(2))],

        // Host calls.
        "AsksForEver" => loop {
            black_box(host::get(0, &text("a")));
        },
        "AsksForEverForMany" => {
            let keys = keys(10_000);
            loop {
                black_box(host::get_many(0, &keys));
            }
        }
        "AsksForAnUnknownView" => vec![host::get(9, &text("a")).unwrap_or_default()],
        "AsksForABadKey" => vec![host::get(0, &[0xc1]).unwrap_or_default()],
        "AsksForALongKey" => vec![host::get(0, &vec![0xa1; 2 << 20]).unwrap_or_default()],
        "AsksForTooMuch" => vec![host::get(0, &vec![0xa1; 65 << 20]).unwrap_or_default()],
        "AsksForTooMany" => vec![host::get_many(0, &keys(10_000_000))],
        "AsksForNonsense" => vec![host::get_many(0, b"this is not MessagePack")],
        "AsksForADeclaration" => vec![host::get_many(0, &[0xdd, 0xff, 0xff, 0xff, 0xff])],
        "AsksForWhatItIsTold" => {
            black_box(host::get_many(0, payload));
            Vec::new()
        }
        "AsksForALotOfRows" => {
            // Over and over the same row, which may be a large one.
            black_box(host::get_many(0, &array(&vec![bin(&text("large")); 60_000])));
            Vec::new()
        }
        _ => return Ok(Deed::Honest),
    };
    Ok(Deed::Changes(changes))
}

fn endless() -> ! {
    loop {
        std::hint::spin_loop();
    }
}

/// Fills the stack of the host's, on which WebAssembly's own values are.
#[expect(unconditional_recursion, reason = "what it is for")]
#[inline(never)]
fn recurse(depth: u32) -> u32 {
    recurse(black_box(depth + 1)).wrapping_mul(31) + depth
}

#[expect(unconditional_recursion, reason = "what it is for")]
#[inline(never)]
fn recurse_and_ask(depth: u32) -> u32 {
    black_box(host::get(0, &text("a")));
    recurse_and_ask(depth + 1).wrapping_mul(31) + depth
}

/// Fills the guest's own stack in its memory, which is at the bottom of that.
#[expect(unconditional_recursion, reason = "what it is for")]
#[inline(never)]
fn recurse_with_arrays(depth: u32) -> u32 {
    let frame = black_box([depth; 1_024]);
    recurse_with_arrays(depth + 1) + black_box(frame)[0]
}

/// A million small rows, well below the limit in bytes.
fn million() -> Vec<u8> {
    let mut out = Vec::with_capacity(32 << 20);
    written(write_array_len(&mut out, 1_000_000));
    for i in 0..1_000_000 {
        out.extend_from_slice(&put(&text(&format!("{i}")), &row(i)));
    }
    out
}

fn with_types(types: &[String]) -> String {
    HONEST.replace("\"left\"", &format!("\"left\", \"types\": {types:?}"))
}

fn keys(count: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(5 + 4 * count);
    written(write_array_len(&mut out, count as u32));
    let key = bin(&text("a"));
    (0..count).for_each(|_| out.extend_from_slice(&key));
    out
}

fn put(key: &[u8], row: &[u8]) -> Vec<u8> {
    change(0, 0, key, row)
}

fn change(view: u8, op: u8, key: &[u8], row: &[u8]) -> Vec<u8> {
    [&[0x94, view, op][..], &bin(key), &bin(row)].concat()
}

fn row(count: i64) -> Vec<u8> {
    let mut out = Vec::new();
    written(write_sint(&mut out, count));
    out.extend_from_slice(&[0xc0, 0xc0]);
    out
}

fn real(real: f64) -> Vec<u8> {
    let mut out = vec![0x01];
    written(write_f64(&mut out, real));
    out.push(0xc0);
    out
}

fn text(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    written(write_str(&mut out, text));
    out
}

fn bin(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    written(write_bin(&mut out, bytes));
    out
}

fn array(elements: &[Vec<u8>]) -> Vec<u8> {
    let mut out = Vec::new();
    written(write_array_len(&mut out, elements.len() as u32));
    elements.iter().for_each(|element| out.extend_from_slice(element));
    out
}

fn written<T, E: std::fmt::Debug>(result: Result<T, E>) {
    result.expect("writing to memory cannot fail");
}
