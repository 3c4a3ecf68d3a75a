//! Write Shadowbox projections in Rust: typed events in, typed rows out.
//!
//! A **projection** is a function from events to rows. It subscribes to events of one or more **sources**, and maintains
//! one or more **views**: tables that anyone can query. The host calls it with every event once, in order, stores the
//! rows together with the position up to which they are complete, and rebuilds them from the first event whenever the
//! projection asks for it by a higher version.
//!
//! ```
//! use serde::Deserialize;
//! use shadowbox_plugin::prelude::*;
//!
//! /// What goes in: events of the source `flights`, each with its payload.
//! #[derive(Events)]
//! #[events(source = "flights")]
//! enum FlightEvent {
//!     #[event("FlightDeparted")]
//!     Departed(Departed),
//!     #[event("FlightCancelled", "FlightDiverted")]
//!     Failed(Flight),
//! }
//!
//! #[derive(Deserialize)]
//! struct Departed {
//!     carrier: String,
//!     dep_delay: i64,
//! }
//!
//! #[derive(Deserialize)]
//! struct Flight {
//!     carrier: String,
//! }
//!
//! /// What comes out: a row of the view `carriers`.
//! #[derive(View, Default)]
//! #[view(name = "carriers", index(failed))]
//! struct Carrier {
//!     #[view(key)]
//!     carrier: String,
//!     departed: i64,
//!     failed: i64,
//!     delay_sum: i64,
//! }
//!
//! /// And how.
//! #[projection(name = "carriers", version = 1, views(Carrier))]
//! fn carriers(event: Event<FlightEvent>, views: &mut Views) -> Result<()> {
//!     match event.data {
//!         FlightEvent::Departed(e) => views.upsert::<Carrier>(&e.carrier, |row| {
//!             row.departed += 1;
//!             row.delay_sum += e.dep_delay;
//!         }),
//!         FlightEvent::Failed(e) => views.upsert::<Carrier>(&e.carrier, |row| row.failed += 1),
//!     }
//! }
//!
//! // A test needs no Wasm and no host.
//! let kit = TestKit::new(carriers)
//!     .given("flights", "FlightDeparted", json!({ "carrier": "UA", "dep_delay": 4 }))
//!     .given("flights", "FlightCancelled", json!({ "carrier": "UA" }));
//! let united = kit.row::<Carrier>("UA").unwrap();
//! assert_eq!((united.departed, united.failed, united.delay_sum), (1, 1, 4));
//! kit.assert_pure();
//! ```
//!
//! For the target `wasm32-wasip2`, a crate of type `cdylib` with this in it is a plugin; for every other target it is an
//! ordinary crate with ordinary tests. The README of this crate is a tutorial, from an empty folder to a queried view.
//!
//! # What must hold
//!
//! The rows are a pure function of the events. The host drops instances when it likes, cuts batches where it likes, and
//! rebuilds at any time, so:
//!
//! - No statics, no clock, no randomness, no files: all there is to know is in the event and in the views.
//!   [`Event::time`] is the time. [`TestKit::assert_pure`] finds most offences.
//! - An event is either applied or refused with an error; nothing of a refused event stays. What the host does then is
//!   the operator's choice: by default the projection stops there, loudly.
//! - Change what the rows mean, and you must raise the version. With the same version and the same columns, the host
//!   goes on from where the old module was.
//!
//! # The map
//!
//! - [`macro@projection`], [`Projection`]: the function, and what it becomes.
//! - [`Event`], [`derive@Events`]: what it is given.
//! - [`Views`], [`derive@View`], [`Schema`](view::Schema): what it changes.
//! - [`mod@column`]: what a field of a row can be; [`Timestamp`], [`Json`], [`derive@TextEnum`] are the ones made here.
//! - [`Error`], [`bail!`], [`ensure!`]: how it refuses.
//! - [`TestKit`], [`TestEvent`]: how it is tested.

// The macros name this crate from outside; its own tests are inside.
#[cfg(all(test, not(target_arch = "wasm32")))]
extern crate self as shadowbox_plugin;

pub mod column;
pub mod view;

mod cache;
#[cfg(target_arch = "wasm32")]
#[doc(hidden)]
pub mod component;
mod error;
mod event;
mod glob;
mod key;
mod manifest;
mod projection;
#[cfg(not(target_arch = "wasm32"))]
mod testkit;
mod timestamp;
mod views;
mod wire;

pub use column::{Json, TextEnum};
pub use error::{Error, Result};
pub use event::{Event, Events};
pub use projection::Projection;
#[cfg(not(target_arch = "wasm32"))]
pub use testkit::{TestEvent, TestKit};
pub use timestamp::Timestamp;
pub use view::View;
pub use views::Views;

pub use serde_json::json;

/// Makes an enum the events that a projection subscribes to: one variant for each event that it tells apart.
///
/// ```
/// use serde::Deserialize;
/// use shadowbox_plugin::prelude::*;
///
/// #[derive(Events)]
/// #[events(source = "orders")]
/// enum Fact<'a> {
///     #[event("OrderPlaced")]
///     Placed(Placed<'a>),
///     #[event("OrderCancelled", "OrderExpired")]
///     Gone,
///     #[event("Payment*", source = "payments/*")]
///     Payment(serde_json::Value),
/// }
///
/// #[derive(Deserialize)]
/// struct Placed<'a> {
///     order_id: &'a str,
/// }
/// ```
///
/// - `#[event("Type", ...)]` names one or more event types; which one it was stands in [`Event::event_type`].
/// - `source = "..."` says where: at the event, or in `#[events(source = "...")]` for the whole enum. A variant that
///   stands for events of several sources has several `#[event(...)]`, or a glob; [`Event::source`] tells them apart.
/// - Both are names or globs: `*` (any characters, `/` too), `?`, `[ab]`, `[!ab]`, `[a-z]` and `{a,b}`. A glob takes
///   every source that it matches, however many there are and whenever they appear first. Where a character of a name
///   would make a glob, `\` before it takes it as it is: `r"what\?"`.
/// - An event that several variants match becomes one of them: a source's exact name wins over globs; then a type's exact
///   name does; then the variant that stands first.
/// - A variant holds the payload's type, which implements `serde::Deserialize` and is parsed from JSON; an empty payload
///   is `null`. A variant without a payload parses nothing.
/// - The enum may have one lifetime: then payloads can borrow from the batch, which saves an allocation a field. `&str`
///   borrows, and **refuses a string that has an escape in it**, such as `\n` or `\u00e9`: take it for ids and codes.
///   For text that people write, take `String`, or `Cow<str>` with `#[serde(borrow)]`.
pub use shadowbox_plugin_macros::Events;

/// Makes an enum without fields a text column, and a key type.
///
/// ```
/// use shadowbox_plugin::prelude::*;
///
/// #[derive(TextEnum, Clone, Copy, Debug, Default, PartialEq)]
/// enum Status {
///     #[default]
///     Open,
///     AwaitingPayment,
///     #[text("done")]
///     Completed,
/// }
/// assert_eq!(Status::AwaitingPayment.as_text(), "awaiting_payment");
/// assert_eq!(Status::from_text("done"), Some(Status::Completed));
/// ```
///
/// A variant is stored as its name in snake case, or as `#[text("...")]` says. Renaming one changes what is stored: raise
/// the projection's version with it. `#[default]` is the standard library's, for rows with `#[derive(Default)]`.
pub use shadowbox_plugin_macros::TextEnum;

/// Makes a struct the row of a view, each field a column.
///
/// ```
/// use shadowbox_plugin::prelude::*;
///
/// #[derive(View, Default)]
/// #[view(name = "weather", index(observed_at), index(airport, temp))]
/// struct Weather {
///     #[view(key)]
///     airport: String,
///     #[view(key)]
///     observed_at: Timestamp,
///     temp: Option<f64>,
///     #[view(column = "type")]
///     kind: String,
/// }
/// ```
///
/// - `name` is the table's name: 1 to 63 of a-z, 0-9 and `_`, beginning with a letter. Column names are the fields', or
///   `#[view(column = "...")]`.
/// - `#[view(key)]` marks the key; several make a composite key, in the order of the fields.
/// - Each `index(column, ...)` makes an index for queries. They cost time at every write, so add them when a query needs
///   them. For a column in several indexes write the names as strings, `index("a", "b")`, or Clippy reports a duplicate.
/// - What a column can be is listed at [`Column`](column::Column), what a key can be at
///   [`KeyColumn`](column::KeyColumn).
/// - `#[derive(Default)]` is needed for [`Views::upsert`] alone.
pub use shadowbox_plugin_macros::View;

/// Makes a function a projection.
///
/// ```
/// # use shadowbox_plugin::prelude::*;
/// # #[derive(Events)]
/// # enum Fact {
/// #     #[event("FlightDeparted", source = "flights")]
/// #     Departed,
/// # }
/// # #[derive(View, Default)]
/// # #[view(name = "days")]
/// # struct Day {
/// #     #[view(key)]
/// #     day: Timestamp,
/// #     departed: i64,
/// # }
/// #[projection(name = "days", version = 1, views(Day))]
/// fn days(event: Event<Fact>, views: &mut Views) -> Result<()> {
///     views.upsert::<Day>(event.time.start_of_day(), |day| day.departed += 1)
/// }
/// ```
///
/// - `name`: 1 to 63 of a-z, 0-9, `-` and `_`, beginning with a letter. Under this name the host knows the projection,
///   whatever its file is called.
/// - `version`: 1 or more. Raise it when the same events are to give other rows: the host then builds the views anew
///   beside the old ones, and switches when they have caught up.
/// - `views(...)`: the rows' types. Views are complete to the same position together.
/// - `forgotten`: events whose content was forgotten come too, with [`Event::forgotten`] set; without it they are
///   passed over. Take it where it counts that something happened, and let variants hold an `Option`, or nothing.
///
/// # What it is given
///
/// The host sends only the columns that the function can use. `version`, `stream`, `id`, `metadata` and `payload` are
/// left out if it visibly does not read them, and payloads only if no variant holds one. It is visible if every mention
/// of the event is `event.field`, outside of macro calls, and if no macros or attributes stand in the function but those
/// of the language and of this crate. Whatever else is done with the event, such as passing it on, taking it apart or
/// printing it, gives the function all columns; so no field is ever empty because it was left out. The key `batch` of
/// the manifest tells which they are.
///
/// In place of the function stands a type of its name, which implements [`Projection`], and a function that makes one,
/// which is what [`TestKit::new`] takes. For `wasm32` the type is also exported as the plugin's component, so a crate has
/// one projection.
pub use shadowbox_plugin_macros::projection;

/// All that a plugin names: `use shadowbox_plugin::prelude::*;`
pub mod prelude {
    pub use crate::{
        Error, Event, Events, Json, Projection as _, Result, TextEnum, Timestamp, View, Views, bail, ensure, json,
        projection,
    };
    #[cfg(not(target_arch = "wasm32"))]
    pub use crate::{TestEvent, TestKit};
}

/// What the macros' output names. Not for people, and free to change.
#[doc(hidden)]
pub mod __private {
    #[cfg(target_arch = "wasm32")]
    pub use crate::component::{self as bindings, export};
    pub use crate::event::{Payload, Subscription};
    pub use crate::key::KeyHasher;
    pub use crate::projection::{Definition, Failure, Takes, assert_distinct, fold, takes};
    #[cfg(not(target_arch = "wasm32"))]
    pub use crate::testkit::InProcess;
    pub use crate::wire::Batch;
}

/// The README's code, as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
