use crate::glob::matches;
use crate::{Error, Timestamp};

/// One event, as `apply` gets it.
///
/// `T` is the enum with `#[derive(Events)]`. The texts are borrowed from the batch.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Event<'a, T> {
    /// The source's name.
    pub source: &'a str,
    /// The position in the log, which is one sequence of the events of all sources: it rises from event to event, with
    /// gaps where the projection does not subscribe.
    pub position: u64,
    /// The id, unique in its source.
    pub id: &'a str,
    /// The stream, such as one order; empty if the log has none, or if its name was forgotten.
    pub stream: &'a str,
    /// The version in its stream; 0 where the log does not say.
    pub version: u64,
    /// The type's name in the log.
    pub event_type: &'a str,
    /// When it happened, as its producer says.
    pub time: Timestamp,
    /// A JSON object of the CloudEvents attributes that have no field here; empty for none.
    pub metadata: &'a str,
    /// The payload's bytes as they came, for payloads that are not JSON.
    pub payload: &'a [u8],
    /// Its content was forgotten: payload and metadata are empty. Always false unless the projection asks for such
    /// events, with `forgotten` in [`#[projection]`](macro@crate::projection).
    pub forgotten: bool,
    /// The payload, parsed.
    pub data: T,
}

/// The events that a projection subscribes to. Comes from [`#[derive(Events)]`](derive@crate::Events).
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not say which events it stands for",
    note = "the argument of Event<...> is an enum with #[derive(Events)]"
)]
pub trait Events {
    /// The same enum, with payloads that borrow for `'a`.
    type Of<'a>;

    /// One for each source and type of each variant, as written: names and globs.
    #[doc(hidden)]
    const SUBSCRIPTIONS: &'static [Subscription];

    /// Whether any of the variants is made of a payload.
    #[doc(hidden)]
    const PARSES: bool;

    /// Makes the variant with this index of a payload.
    #[doc(hidden)]
    fn parse<'a>(variant: u16, payload: Payload<'a>) -> Result<Self::Of<'a>, Error>;
}

/// A pattern of sources with a pattern of event types, and the variant that they become.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Subscription {
    /// The source's name, or a glob.
    pub source: &'static str,
    /// Whether that is a glob; the macro knows.
    pub source_glob: bool,
    /// The type's name, or a glob.
    pub event_type: &'static str,
    /// Whether that is a glob.
    pub type_glob: bool,
    /// The index of the variant.
    pub variant: u16,
}

/// An event's data, not parsed yet.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    pub(crate) event_type: &'a str,
    pub(crate) bytes: &'a [u8],
    /// The same as text, if the whole column is known to be UTF-8: `serde_json` need not look again.
    pub(crate) text: Option<&'a str>,
    /// Whether it is empty because it was forgotten.
    pub(crate) forgotten: bool,
}

impl<'a> Payload<'a> {
    #[doc(hidden)]
    pub fn json<T: serde::Deserialize<'a>>(self) -> Result<T, Error> {
        let parsed = match self.text {
            _ if self.bytes.is_empty() => serde_json::from_str("null"),
            Some(text) => serde_json::from_str(text),
            None => serde_json::from_slice(self.bytes),
        };
        parsed.map_err(|error| match self.forgotten {
            // What JSON lacks is no help: nobody left out a field.
            true => Error::msg(format_args!(
                "the data of `{}` was forgotten; let its variant hold an `Option`, or nothing",
                self.event_type
            )),
            false => Error::from(error).within(format_args!("the data of `{}`", self.event_type)),
        })
    }
}

/// The variant for events of this source and type, or None if the projection does not subscribe to them. A source's
/// exact name wins over globs, then a type's exact name does, then whichever stands first.
pub(crate) fn variant_for(subscriptions: &[Subscription], source: &str, event_type: &str) -> Option<u16> {
    // A name is a glob that matches itself alone.
    let matching = subscriptions.iter().filter(|s| matches(s.source, source) && matches(s.event_type, event_type));
    matching.min_by_key(|s| (s.source_glob, s.type_glob)).map(|s| s.variant)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exact_source_wins_then_an_exact_type_then_what_stands_first() {
        let subscription = |source, event_type: &'static str, variant| Subscription {
            source,
            source_glob: "*{".chars().any(|c| source.contains(c)),
            event_type,
            type_glob: event_type.contains('*'),
            variant,
        };
        let all = [
            subscription("*", "Order*", 0),
            subscription("{orders,carts}", "*", 1),
            subscription("*", "OrderPlaced", 2),
            subscription("orders", "Order*", 3),
            subscription("orders", "O*", 4),
            subscription("orders", "OrderPaid", 5),
            subscription("odd\\*", "Odd", 6),
        ];
        for (source, event_type, variant) in [
            ("orders", "OrderPaid", Some(5)),
            ("orders", "OrderPlaced", Some(3)),
            ("orders", "Opened", Some(4)),
            ("orders", "Cancelled", Some(1)),
            ("carts", "OrderPlaced", Some(2)),
            ("carts", "OrderPaid", Some(0)),
            ("carts", "Filled", Some(1)),
            ("users", "OrderPaid", Some(0)),
            ("users", "Registered", None),
            ("odd*", "Odd", Some(6)),
            ("odd-", "Odd", None),
        ] {
            assert_eq!(variant_for(&all, source, event_type), variant, "{source} {event_type}");
        }
    }
}
