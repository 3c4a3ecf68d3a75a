//! Tests a projection with plain `cargo test`: no Wasm, no host, but their wire formats.

use std::any::TypeId;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::rc::Rc;

use serde::{Deserialize as _, Serialize};
use serde_bytes::Bytes;
use serde_json::Value;

use crate::cache::Limits;
use crate::column::value::{read_bin, write_bin, written};
use crate::event::variant_for;
use crate::projection::{Definition, Failure, Instance};
use crate::view::decode;
use crate::views::Store;
use crate::{Error, Projection, Result, Timestamp, View};

/// A host in miniature, for tests of a projection.
///
/// It gives the projection the events it subscribes to, as the host would: as an encoded batch that the projection
/// decodes; and it keeps the rows that come back, encoded, to answer from. All given events are one log, whatever their
/// sources: their positions count up from 0 in the order in which they are given, also those of events that the
/// projection does not subscribe to, and of forgotten ones that it does not ask for, which are passed over. An event
/// that fails leaves everything as it was before.
///
/// ```
/// use shadowbox_plugin::prelude::*;
/// # use serde::Deserialize;
/// # #[derive(Deserialize)]
/// # struct Departed { carrier: String }
/// # #[derive(Events)]
/// # enum Fact {
/// #     #[event("FlightDeparted", source = "flights")]
/// #     Departed(Departed),
/// # }
/// # #[derive(View, Default)]
/// # #[view(name = "carriers")]
/// # struct Carrier {
/// #     #[view(key)]
/// #     carrier: String,
/// #     departed: i64,
/// # }
/// # #[projection(name = "carriers", version = 1, views(Carrier))]
/// # fn apply(event: Event<Fact>, views: &mut Views) -> Result<()> {
/// #     let Fact::Departed(e) = event.data;
/// #     views.upsert::<Carrier>(&e.carrier, |carrier| carrier.departed += 1)
/// # }
/// let kit = TestKit::new(apply)
///     .given("flights", "FlightDeparted", json!({ "carrier": "UA" }))
///     .given("flights", "FlightDeparted", json!({ "carrier": "UA" }));
/// assert_eq!(kit.row::<Carrier>("UA").unwrap().departed, 2);
/// kit.assert_pure();
/// ```
pub struct TestKit<P: Projection> {
    definition: Definition,
    store: Rc<Memory>,
    instance: Option<Instance<P>>,
    limits: Limits,
    /// The next position.
    head: u64,
    /// What has been applied, for the replay.
    applied: Vec<Delivered>,
    /// The rows before that.
    start: Vec<BTreeMap<Vec<u8>, Vec<u8>>>,
    /// What was loaded and is still to be given.
    saved: Vec<TestEvent>,
    changes: u64,
}

impl<P: Projection> TestKit<P> {
    /// A kit without events or rows. `projection` is the name of the function with `#[projection]`.
    pub fn new(projection: fn() -> P) -> Self {
        // Its type is all that matters.
        let _ = projection;
        let definition = P::definition();
        let limits = Limits::for_views(definition.views.len());
        let start = vec![BTreeMap::new(); definition.views.len()];
        Self {
            store: Rc::new(Memory::new(start.clone())),
            definition,
            instance: None,
            limits,
            head: 0,
            applied: Vec::new(),
            start,
            saved: Vec::new(),
            changes: 0,
        }
    }

    /// Applies one event; `data` is its payload, such as a `json!({...})` or anything else that serializes.
    ///
    /// # Panics
    ///
    /// If the projection fails.
    #[must_use]
    #[track_caller]
    pub fn given(self, source: &str, event_type: &str, data: impl Serialize) -> Self {
        self.given_all([TestEvent::new(source, event_type, data)])
    }

    /// Applies events as one batch. Take this over [`given`](Self::given) where an id, a stream or a time matters, too.
    ///
    /// # Panics
    ///
    /// If the projection fails.
    #[must_use]
    #[track_caller]
    pub fn given_all(mut self, events: impl IntoIterator<Item = TestEvent>) -> Self {
        if let Err(error) = self.try_given(events) {
            panic!("the projection failed: {error}");
        }
        self
    }

    /// Gives an event that the projection must refuse, with an error that contains `message`.
    ///
    /// # Panics
    ///
    /// If the projection applies it, or refuses it with another message.
    #[must_use]
    #[track_caller]
    pub fn given_failing(mut self, source: &str, event_type: &str, data: impl Serialize, message: &str) -> Self {
        let what = format!("`{event_type}`");
        self.expect_failure([TestEvent::new(source, event_type, data)], &what, message);
        self
    }

    #[track_caller]
    fn expect_failure(&mut self, events: impl IntoIterator<Item = TestEvent>, what: &str, message: &str) {
        match self.try_given(events) {
            Ok(()) => panic!("the projection applied {what}, and should have failed with `{message}`"),
            Err(error) if error.to_string().contains(message) => {}
            Err(error) => panic!("the projection failed with `{error}`, and should have failed with `{message}`"),
        }
    }

    /// Applies events as one batch, or none of them.
    ///
    /// # Errors
    ///
    /// What the projection says about the first event that it could not apply.
    pub fn try_given(&mut self, events: impl IntoIterator<Item = TestEvent>) -> Result<()> {
        let mut head = self.head;
        let mut delivered = Vec::new();
        for event in events {
            let position = event.position.unwrap_or(head);
            head = position + 1;
            let asked = self.definition.forgotten || !event.forgotten;
            if asked && variant_for(self.definition.subscriptions, &event.source, &event.event_type).is_some() {
                delivered.push(event.deliver(position, self.applied.len() + delivered.len()));
            }
        }
        if !delivered.is_empty() {
            let instance = self.instance.take();
            let mut instance = instance.unwrap_or_else(|| self.fresh_instance(&self.store));
            // Only a success puts the instance back: after a failure it holds rows that are half changed.
            self.changes += apply(&mut instance, &self.store, &delivered).map_err(|failure| match delivered.len() {
                1 => Error::msg(failure.message),
                n => Error::msg(failure.message).within(format_args!("event {} of {n}", failure.event + 1)),
            })?;
            self.instance = Some(instance);
        }
        self.applied.append(&mut delivered);
        self.head = head;
        Ok(())
    }

    /// The row with this key, if there is one.
    pub fn row<V: View>(&self, key: V::Key<'_>) -> Option<V> {
        let mut encoded = Vec::new();
        V::encode_key(key, &mut encoded);
        let row = self.store.rows.borrow()[self.view::<V>()].get(&encoded).cloned()?;
        Some(decode(&encoded, &row).expect("a row reads back as it was written"))
    }

    /// All rows of a view, in the order of their keys.
    pub fn rows<V: View>(&self) -> Vec<V> {
        let stored = self.store.rows.borrow();
        let decoded = stored[self.view::<V>()].iter().map(|(key, row)| decode(key, row));
        let mut rows = decoded.collect::<Result<Vec<V>>>().expect("rows read back as they were written");
        rows.sort_by(V::compare_keys);
        rows
    }

    /// How many row changes the projection has returned, over all batches: what the host has to write.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// How many rows the projection has asked the host for, because its cache did not have them.
    pub fn lookups(&self) -> u64 {
        self.store.lookups.get()
    }

    /// The manifest, as the host gets it.
    pub fn manifest(&self) -> Value {
        serde_json::from_str(&crate::manifest::of::<P>()).expect("the manifest is JSON")
    }

    /// Checks that the rows are a function of the events alone: applies them all again as one batch, one by one, and
    /// one by one with a new instance each time, and compares the rows. A projection fails this if it keeps something
    /// in a static, or if its rows depend on where a batch ends.
    ///
    /// # Panics
    ///
    /// If a row differs.
    #[track_caller]
    pub fn assert_pure(&self) -> &Self {
        let all = self.applied.len().max(1);
        for (how, batch, forget) in [
            ("as one batch", all, true),
            ("one by one", 1, false),
            ("one by one, with a new instance for each event", 1, true),
        ] {
            let store = Rc::new(Memory::new(self.start.clone()));
            let mut instance: Instance<P> = self.fresh_instance(&store);
            for batch in self.applied.chunks(batch) {
                if forget {
                    instance = self.fresh_instance(&store);
                }
                if let Err(failure) = apply(&mut instance, &store, batch) {
                    panic!("applying the events {how} fails: {}", failure.message);
                }
            }
            if let Some(difference) = self.difference(&store) {
                panic!("applying the events {how} gives other rows: {difference}");
            }
        }
        self
    }

    fn fresh_instance(&self, store: &Rc<Memory>) -> Instance<P> {
        let store: Rc<dyn Store> = Rc::<Memory>::clone(store);
        Instance::new(&self.definition, &store, self.limits)
    }

    fn view<V: View>(&self) -> usize {
        let found = self.definition.views.iter().position(|view| view.row == TypeId::of::<V>());
        found.unwrap_or_else(|| panic!("view `{}` is not listed in views(...) of #[projection]", V::SCHEMA.name))
    }

    fn difference(&self, other: &Memory) -> Option<String> {
        let (ours, theirs) = (self.store.rows.borrow(), other.rows.borrow());
        for (view, (ours, theirs)) in self.definition.views.iter().zip(ours.iter().zip(theirs.iter())) {
            for key in ours.keys().chain(theirs.keys()) {
                let (ours, theirs) = (ours.get(key), theirs.get(key));
                if ours != theirs {
                    let print = |row: Option<&Vec<u8>>| row.map_or("no row".to_owned(), |row| printed(row));
                    let (name, key) = (view.schema.name, printed(key));
                    return Some(format!("`{name}` at {key} has {} instead of {}", print(theirs), print(ours)));
                }
            }
        }
        None
    }
}

/// A projection at work in this process, with no rows stored: what benches compare the sandbox with.
#[doc(hidden)]
pub struct InProcess<P: Projection>(Instance<P>);

impl<P: Projection> InProcess<P> {
    /// `projection` is the name of the function with `#[projection]`.
    pub fn new(projection: fn() -> P) -> Self {
        let kit = TestKit::new(projection);
        Self(kit.fresh_instance(&kit.store))
    }

    /// Applies a batch and returns the changes, both encoded.
    ///
    /// # Errors
    ///
    /// What the projection says; then it is of no more use.
    pub fn apply(&mut self, batch: &[u8]) -> Result<Vec<u8>> {
        self.0.apply(batch).map_err(|failure| Error::msg(failure.message))
    }
}

/// An event for a [`TestKit`]: like an event in a log, with what a test does not care about left out.
#[derive(Clone, Debug)]
pub struct TestEvent {
    source: String,
    event_type: String,
    id: Option<String>,
    stream: String,
    version: u64,
    /// None for the next one.
    position: Option<u64>,
    time: Option<Timestamp>,
    metadata: String,
    payload: Vec<u8>,
    forgotten: bool,
}

impl TestEvent {
    /// An event of this source and type, with `data` as its payload. Unless told otherwise it has an id made of its
    /// position, no stream, version 0, no metadata, and a time one second after the event before it.
    ///
    /// # Panics
    ///
    /// If `data` cannot be turned into JSON.
    #[must_use]
    #[track_caller]
    pub fn new(source: &str, event_type: &str, data: impl Serialize) -> Self {
        Self {
            source: source.to_owned(),
            event_type: event_type.to_owned(),
            id: None,
            stream: String::new(),
            version: 0,
            position: None,
            time: None,
            metadata: String::new(),
            payload: serde_json::to_vec(&data).expect("the payload can be turned into JSON"),
            forgotten: false,
        }
    }

    /// Reads a CloudEvent 1.0 in its JSON form, as `shadowbox events` prints it: `subject` is the stream, `sequence` the
    /// version in it, `position` the position, and `"forgotten": true` one whose content was forgotten. The payload
    /// stays as it is written.
    ///
    /// # Errors
    ///
    /// If it is not a JSON object with a source, a type and an id.
    pub fn from_cloud_event(json: &str) -> Result<Self> {
        saved::read_event(json)
    }

    /// Sets the id.
    #[must_use]
    pub fn id(mut self, id: &str) -> Self {
        self.id = Some(id.to_owned());
        self
    }

    /// Sets the stream, and the version in it.
    #[must_use]
    pub fn stream(mut self, stream: &str, version: u64) -> Self {
        self.stream = stream.to_owned();
        self.version = version;
        self
    }

    /// Sets the time, as RFC 3339.
    ///
    /// # Panics
    ///
    /// If it is not such a time.
    #[must_use]
    #[track_caller]
    pub fn at(self, time: &str) -> Self {
        match time.parse() {
            Ok(time) => self.time(time),
            Err(error) => panic!("{error}"),
        }
    }

    /// Sets the time.
    #[must_use]
    pub fn time(mut self, time: Timestamp) -> Self {
        self.time = Some(time);
        self
    }

    /// Sets the metadata: the CloudEvents attributes that are no field of an event.
    #[must_use]
    pub fn metadata(mut self, metadata: &Value) -> Self {
        self.metadata = metadata.to_string();
        self
    }

    /// Sets the payload's bytes, for one that is not JSON, or not right.
    #[must_use]
    pub fn payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    /// The event as the log gives it after it was forgotten: without payload and metadata, whatever was set. Only a
    /// projection with `forgotten` in `#[projection]` gets it.
    #[must_use]
    pub fn forgotten(mut self) -> Self {
        self.forgotten = true;
        self
    }

    /// The event as it stands in its log. `nth` is its number among all that were applied.
    fn deliver(mut self, position: u64, nth: usize) -> Delivered {
        if self.forgotten {
            self.metadata.clear();
            self.payload.clear();
        }
        self.id.get_or_insert_with(|| format!("{}/{position}", self.source));
        // 2000-01-01, so that a test which prints a time shows at once that nobody set it.
        self.time.get_or_insert(Timestamp::from_micros(946_684_800_000_000 + nth as i64 * 1_000_000));
        Delivered { position, event: self }
    }
}

/// An event with its position, its id and its time.
struct Delivered {
    position: u64,
    event: TestEvent,
}

/// The rows, encoded, as the host keeps them.
struct Memory {
    rows: RefCell<Vec<BTreeMap<Vec<u8>, Vec<u8>>>>,
    lookups: Cell<u64>,
}

impl Memory {
    fn new(rows: Vec<BTreeMap<Vec<u8>, Vec<u8>>>) -> Self {
        Self { rows: RefCell::new(rows), lookups: Cell::new(0) }
    }

    /// Writes the changes of a batch, and returns how many there were. A malformed answer is an error of this crate.
    fn commit(&self, mut changes: &[u8]) -> Result<u64> {
        let mut views = self.rows.borrow_mut();
        let count = rmp::decode::read_array_len(&mut changes)?;
        for _ in 0..count {
            assert_eq!(rmp::decode::read_array_len(&mut changes)?, 4, "a change has four parts");
            let view: usize = rmp::decode::read_int(&mut changes)?;
            let op: u8 = rmp::decode::read_int(&mut changes)?;
            let (key, row) = (read_bin(&mut changes)?, read_bin(&mut changes)?);
            match op {
                0 => views[view].insert(key.to_vec(), row.to_vec()),
                1 => views[view].remove(key),
                _ => panic!("an operation is 0 or 1, and not {op}"),
            };
        }
        assert!(changes.is_empty(), "nothing follows the changes");
        Ok(count.into())
    }
}

impl Store for Memory {
    fn get(&self, view: u32, key: &[u8]) -> Option<Vec<u8>> {
        self.lookups.set(self.lookups.get() + 1);
        self.rows.borrow()[view as usize].get(key).cloned()
    }

    fn get_many(&self, view: u32, mut keys: &[u8]) -> Vec<u8> {
        let count = rmp::decode::read_array_len(&mut keys).expect("the keys are an array");
        let mut answer = Vec::new();
        written(rmp::encode::write_array_len(&mut answer, count));
        for _ in 0..count {
            match self.get(view, read_bin(&mut keys).expect("a key is a bin")) {
                Some(row) => write_bin(&mut answer, &row),
                None => written(rmp::encode::write_nil(&mut answer)),
            }
        }
        answer
    }
}

/// Applies one batch and stores what comes back.
fn apply<P: Projection>(instance: &mut Instance<P>, store: &Memory, events: &[Delivered]) -> Result<u64, Failure> {
    let Definition { columns, forgotten, .. } = P::definition();
    let changes = instance.apply(&encode(events, columns.as_deref(), forgotten))?;
    Ok(store.commit(&changes).expect("the changes are well formed"))
}

/// Without those that the projection does not read, as the host sends them.
#[derive(Serialize)]
struct Columns<'a> {
    positions: &'a Bytes,
    times: &'a Bytes,
    #[serde(skip_serializing_if = "Option::is_none")]
    versions: Option<&'a Bytes>,
    sources: Vec<&'a str>,
    source: &'a Bytes,
    types: Vec<&'a str>,
    r#type: &'a Bytes,
    #[serde(skip_serializing_if = "Option::is_none")]
    streams: Option<&'a Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_ends: Option<&'a Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ids: Option<&'a Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id_ends: Option<&'a Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payloads: Option<&'a Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_ends: Option<&'a Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<&'a Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata_ends: Option<&'a Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    forgotten: Option<&'a Bytes>,
}

/// The batch as the host would send it to a projection that reads these of the optional columns, None for all, and that
/// asks for forgotten events or does not.
fn encode(events: &[Delivered], wanted: Option<&[&str]>, forgotten: bool) -> Vec<u8> {
    let mut positions = Vec::new();
    let mut times = Vec::new();
    let mut versions = Vec::new();
    let mut flags = Vec::new();
    let (mut sources, mut types) = (Dictionary::default(), Dictionary::default());
    let [mut streams, mut ids, mut payloads, mut metadata] = [(); 4].map(|()| (Vec::new(), Vec::new()));
    let push = |(bytes, ends): &mut (Vec<u8>, Vec<u8>), value: &[u8]| {
        bytes.extend_from_slice(value);
        ends.extend((bytes.len() as u32).to_le_bytes());
    };
    for Delivered { position, event } in events {
        positions.extend(position.to_le_bytes());
        times.extend(event.time.unwrap_or_default().as_micros().to_le_bytes());
        versions.extend(event.version.to_le_bytes());
        flags.push(event.forgotten.into());
        sources.push(&event.source);
        types.push(&event.event_type);
        push(&mut streams, event.stream.as_bytes());
        push(&mut ids, event.id.as_deref().unwrap_or_default().as_bytes());
        push(&mut payloads, &event.payload);
        push(&mut metadata, event.metadata.as_bytes());
    }
    let optional = |name, column| wanted.is_none_or(|wanted| wanted.contains(&name)).then_some(Bytes::new(column));
    let columns = Columns {
        positions: Bytes::new(&positions),
        times: Bytes::new(&times),
        versions: optional("versions", &versions),
        sources: sources.names,
        source: Bytes::new(&sources.indices),
        types: types.names,
        r#type: Bytes::new(&types.indices),
        streams: optional("streams", &streams.0),
        stream_ends: optional("streams", &streams.1),
        ids: optional("ids", &ids.0),
        id_ends: optional("ids", &ids.1),
        payloads: optional("payloads", &payloads.0),
        payload_ends: optional("payloads", &payloads.1),
        metadata: optional("metadata", &metadata.0),
        metadata_ends: optional("metadata", &metadata.1),
        forgotten: forgotten.then_some(Bytes::new(&flags)),
    };
    rmp_serde::to_vec_named(&columns).expect("a batch can be encoded")
}

#[derive(Default)]
struct Dictionary<'a> {
    names: Vec<&'a str>,
    known: HashMap<&'a str, u16>,
    indices: Vec<u8>,
}

impl<'a> Dictionary<'a> {
    fn push(&mut self, name: &'a str) {
        let index = *self.known.entry(name).or_insert_with(|| {
            self.names.push(name);
            u16::try_from(self.names.len() - 1).expect("a batch has at most 65,536 names of a kind")
        });
        self.indices.extend(index.to_le_bytes());
    }
}

/// Encoded values for people to read.
fn printed(mut values: &[u8]) -> String {
    let mut text = String::from("(");
    while !values.is_empty() {
        if text.len() > 1 {
            text.push_str(", ");
        }
        let before = values;
        match Value::deserialize(&mut rmp_serde::Deserializer::new(&mut values)) {
            Ok(value) => text.push_str(&value.to_string()),
            // Bytes, which JSON does not have.
            Err(_) => {
                values = before;
                match read_bin(&mut values) {
                    Ok(bytes) => bytes.iter().for_each(|byte| _ = write!(text, "{byte:02x}")),
                    Err(_) => return format!("{before:02x?}"),
                }
            }
        }
    }
    text + ")"
}

mod saved;

#[cfg(test)]
mod properties;
