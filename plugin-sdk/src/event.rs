use crate::{Error, Timestamp};

/// One event, as `apply` gets it.
///
/// `T` is the enum with `#[derive(Events)]`. The texts are borrowed from the batch.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Event<'a, T> {
    /// The source's name.
    pub source: &'a str,
    /// The position in its source: strictly increasing there, not always dense.
    pub position: u64,
    /// The id, unique in its source.
    pub id: &'a str,
    /// The stream, such as one order; empty if the log has none.
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

    /// One for each source and type of each variant.
    #[doc(hidden)]
    const SUBSCRIPTIONS: &'static [Subscription];

    /// Whether any of the variants is made of a payload.
    #[doc(hidden)]
    const PARSES: bool;

    /// Makes the variant with this index of a payload.
    #[doc(hidden)]
    fn parse<'a>(variant: u16, payload: Payload<'a>) -> Result<Self::Of<'a>, Error>;
}

/// An event type of a source, and the variant that it becomes.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Subscription {
    /// The source's exact name.
    pub source: &'static str,
    /// The type's name, or a glob.
    pub event_type: &'static str,
    /// Whether it is a glob; the macro knows.
    pub glob: bool,
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
}

impl<'a> Payload<'a> {
    #[doc(hidden)]
    pub fn json<T: serde::Deserialize<'a>>(self) -> Result<T, Error> {
        let parsed = match self.text {
            _ if self.bytes.is_empty() => serde_json::from_str("null"),
            Some(text) => serde_json::from_str(text),
            None => serde_json::from_slice(self.bytes),
        };
        parsed.map_err(|error| Error::from(error).within(format_args!("the data of `{}`", self.event_type)))
    }
}

/// The variant for events of this type, or None if the projection does not subscribe to it. An exact name wins over
/// globs; among globs the first one does.
pub(crate) fn variant_for(subscriptions: &[Subscription], source: &str, event_type: &str) -> Option<u16> {
    let mut of_source = subscriptions.iter().filter(|subscription| subscription.source == source);
    of_source
        .clone()
        .find(|subscription| !subscription.glob && subscription.event_type == event_type)
        .or_else(|| of_source.find(|s| s.glob && crate::glob::matches(s.event_type, event_type)))
        .map(|subscription| subscription.variant)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exact_name_wins_over_globs_and_the_first_glob_over_later_ones() {
        let subscription = |source, event_type, glob, variant| Subscription { source, event_type, glob, variant };
        let all = [
            subscription("orders", "Order*", true, 0),
            subscription("orders", "*", true, 1),
            subscription("orders", "OrderPlaced", false, 2),
            subscription("carts", "OrderPlaced", false, 3),
        ];
        for (source, event_type, variant) in [
            ("orders", "OrderPlaced", Some(2)),
            ("orders", "OrderShipped", Some(0)),
            ("orders", "Cancelled", Some(1)),
            ("carts", "OrderPlaced", Some(3)),
            ("carts", "OrderShipped", None),
            ("users", "OrderPlaced", None),
        ] {
            assert_eq!(variant_for(&all, source, event_type), variant, "{source} {event_type}");
        }
    }
}
