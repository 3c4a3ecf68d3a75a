//! A projection as the host sees it: a manifest, and batches in, changes out.

use std::any::TypeId;
use std::marker::PhantomData;
use std::rc::Rc;

use crate::cache::Limits;
use crate::event::{Payload, Subscription, variant_for};
use crate::view::{Schema, View};
use crate::views::{AnyTable, Store, Views, table};
use crate::wire::Batch;
use crate::{Error, Event, Events, Timestamp};

/// A projection. Comes from [`#[projection]`](macro@crate::projection), which turns a function into a type of the same
/// name with this trait.
pub trait Projection: Sized + 'static {
    /// The projection's name.
    const NAME: &'static str;
    /// Its version: a higher one means that its rows mean something else, and are to be rebuilt.
    const VERSION: u32;

    #[doc(hidden)]
    fn definition() -> Definition;

    #[doc(hidden)]
    fn run(batch: &Batch<'_>, views: &mut Views) -> Result<(), Failure>;
}

/// Which event could not be applied, and why.
#[doc(hidden)]
#[derive(Debug)]
pub struct Failure {
    /// The event's index in the batch.
    pub(crate) event: u32,
    /// Why.
    pub(crate) message: String,
}

/// What a projection reads and maintains.
#[doc(hidden)]
pub struct Definition {
    pub(crate) subscriptions: &'static [Subscription],
    /// The batch columns that it reads, of those that may be absent; None for all.
    pub(crate) columns: Option<Vec<&'static str>>,
    /// Whether it asks for events whose content was forgotten.
    pub(crate) forgotten: bool,
    pub(crate) views: Vec<ViewDefinition>,
    /// Whether events are made of payloads.
    parses: bool,
}

/// The one optional column that is read for more than the field of the same name.
const PAYLOADS: &str = "payloads";

pub(crate) struct ViewDefinition {
    pub(crate) schema: Schema,
    pub(crate) row: TypeId,
    table: fn(u32, Rc<dyn Store>, Limits) -> Box<dyn AnyTable>,
}

impl Definition {
    /// A definition without views, for a function that takes `E`.
    #[doc(hidden)]
    pub fn new<E: Events>(_: Takes<E>) -> Self {
        let (subscriptions, parses) = (E::SUBSCRIPTIONS, E::PARSES);
        Self { subscriptions, columns: None, forgotten: false, views: Vec::new(), parses }
    }

    /// Says that the function can use none of the optional columns but these.
    #[doc(hidden)]
    #[must_use]
    pub fn reads(mut self, columns: &[&'static str]) -> Self {
        let mut columns = columns.to_vec();
        if self.parses && !columns.contains(&PAYLOADS) {
            columns.push(PAYLOADS);
        }
        self.columns = Some(columns);
        self
    }

    /// Asks for events whose content was forgotten.
    #[doc(hidden)]
    #[must_use]
    pub fn forgotten(mut self) -> Self {
        self.forgotten = true;
        self
    }

    /// Adds a view.
    #[doc(hidden)]
    #[must_use]
    pub fn view<V: View>(mut self) -> Self {
        self.views.push(ViewDefinition { schema: V::SCHEMA, row: TypeId::of::<V>(), table: table::<V> });
        self
    }

    pub(crate) fn open(&self, store: &Rc<dyn Store>, limits: Limits) -> Views {
        let open = |(i, view): (usize, &ViewDefinition)| (view.row, (view.table)(i as u32, Rc::clone(store), limits));
        Views::new(self.views.iter().enumerate().map(open).collect())
    }
}

/// Fails to compile if two of the names are the same.
#[doc(hidden)]
pub const fn assert_distinct(names: &[&str]) {
    let mut i = 0;
    while i < names.len() {
        let mut j = 0;
        while j < i {
            assert!(!same(names[i].as_bytes(), names[j].as_bytes()), "two views of the projection have the same name");
            j += 1;
        }
        i += 1;
    }
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    match (a, b) {
        ([], []) => true,
        ([x, a @ ..], [y, b @ ..]) => *x == *y && same(a, b),
        _ => false,
    }
}

/// Stands for the enum that the author's function takes. The macro cannot name it where it needs it: it sees `Fact`, and
/// not whether that has a lifetime; so the compiler infers it from the function.
#[doc(hidden)]
pub struct Takes<E>(PhantomData<E>);

/// See [`Takes`].
#[doc(hidden)]
pub fn takes<E: Events>(_: fn(Event<'static, E>, &mut Views) -> Result<(), Error>) -> Takes<E> {
    Takes(PhantomData)
}

/// Folds a batch: the body of every `Projection::run`.
#[doc(hidden)]
pub fn fold<E, F>(_: Takes<E>, apply: F, batch: &Batch<'_>, views: &mut Views) -> Result<(), Failure>
where
    E: Events,
    F: for<'a> Fn(Event<'a, E::Of<'a>>, &mut Views) -> Result<(), Error>,
{
    let mut routes = Routes::new(batch);
    for i in 0..batch.len() {
        let Some(variant) = routes.variant(E::SUBSCRIPTIONS, batch, i) else { continue };
        let index = i as u32;
        views.begin_event(index);
        let done = event::<E>(batch, i, variant).and_then(|event| apply(event, views));
        // An error of the views comes first: the author's code may not have looked at it, and went on without a row.
        if let Some(error) = views.take_error().or(done.err()) {
            return Err(Failure { event: index, message: error.to_string() });
        }
    }
    Ok(())
}

fn event<'a, E: Events>(batch: &Batch<'a>, i: usize, variant: u16) -> Result<Event<'a, E::Of<'a>>, Error> {
    let fixed = batch.fixed(i);
    let (payload, text) = batch.payload(i);
    let forgotten = fixed.forgotten;
    let data = E::parse(variant, Payload { event_type: fixed.event_type, bytes: payload, text, forgotten })?;
    Ok(Event {
        source: fixed.source,
        position: fixed.position,
        id: batch.id(i),
        stream: batch.stream(i),
        version: fixed.version,
        event_type: fixed.event_type,
        time: Timestamp::from_micros(fixed.time),
        metadata: batch.metadata(i),
        payload,
        forgotten,
        data,
    })
}

/// The variant for each source and type of a batch, looked up once a batch.
struct Routes {
    types: usize,
    /// The pairs that occur, sorted: where each has its route. None if there is a route for every pair there can be.
    pairs: Option<Vec<(usize, usize)>>,
    routes: Vec<Route>,
}

#[derive(Clone, Copy)]
enum Route {
    Unknown,
    Skip,
    Variant(u16),
}

impl Routes {
    /// How many routes an event may cost. A batch has a few sources and some dozens of types as a rule, and finds its
    /// routes by their place in a table. But it can have as many of both as it has events, and their product is too much.
    const PER_EVENT: usize = 8;

    fn new(batch: &Batch<'_>) -> Self {
        let (sources, types) = batch.dictionaries();
        let all = sources.saturating_mul(types);
        if all <= Self::PER_EVENT * batch.len() {
            return Self { types, pairs: None, routes: vec![Route::Unknown; all] };
        }
        let mut pairs: Vec<_> = (0..batch.len()).map(|i| batch.pair(i)).collect();
        pairs.sort_unstable();
        pairs.dedup();
        Self { types, routes: vec![Route::Unknown; pairs.len()], pairs: Some(pairs) }
    }

    fn variant(&mut self, subscriptions: &[Subscription], batch: &Batch<'_>, i: usize) -> Option<u16> {
        let (source, event_type) = batch.pair(i);
        let place = match &self.pairs {
            None => source * self.types + event_type,
            Some(pairs) => pairs.binary_search(&(source, event_type)).expect("the pairs are of this batch"),
        };
        let route = &mut self.routes[place];
        if let Route::Unknown = route {
            let fixed = batch.fixed(i);
            *route = variant_for(subscriptions, fixed.source, fixed.event_type).map_or(Route::Skip, Route::Variant);
        }
        match route {
            Route::Variant(variant) => Some(*variant),
            _ => None,
        }
    }
}

/// A projection at work. It may be thrown away between any two batches.
pub(crate) struct Instance<P> {
    views: Views,
    /// How large the last answer was: the next one is probably alike.
    answer: usize,
    projection: PhantomData<P>,
}

impl<P: Projection> Instance<P> {
    pub(crate) fn new(definition: &Definition, store: &Rc<dyn Store>, limits: Limits) -> Self {
        Self { views: definition.open(store, limits), answer: 0, projection: PhantomData }
    }

    /// Applies a batch and returns the changes, both encoded. After a failure the instance is of no more use.
    pub(crate) fn apply(&mut self, batch: &[u8]) -> Result<Vec<u8>, Failure> {
        let batch = Batch::decode(batch)
            .map_err(|error| Failure { event: 0, message: format!("the batch is malformed: {error}") })?;
        P::run(&batch, &mut self.views)?;
        let mut changes = Vec::with_capacity(self.answer);
        self.views.finish_batch(&mut changes)?;
        self.answer = changes.len();
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn different_names_are_distinct() {
        assert_distinct(&["a", "ab", "b", ""]);
    }

    #[test]
    #[should_panic = "two views of the projection have the same name"]
    fn the_same_name_twice_is_not() {
        assert_distinct(&["ab", "b", "ab"]);
    }
}
