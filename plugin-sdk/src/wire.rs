//! The batch as the host sends it: decoded in place, and checked as a whole, so that reading an event cannot fail.

use serde::Deserialize;

use crate::Error;

#[derive(Deserialize)]
struct Columns<'a> {
    #[serde(borrow)]
    positions: &'a [u8],
    times: &'a [u8],
    sources: Vec<&'a str>,
    source: &'a [u8],
    types: Vec<&'a str>,
    r#type: &'a [u8],
    // The rest may be absent: the manifest may say that a projection does not read it.
    versions: Option<&'a [u8]>,
    streams: Option<&'a [u8]>,
    stream_ends: Option<&'a [u8]>,
    ids: Option<&'a [u8]>,
    id_ends: Option<&'a [u8]>,
    payloads: Option<&'a [u8]>,
    payload_ends: Option<&'a [u8]>,
    metadata: Option<&'a [u8]>,
    metadata_ends: Option<&'a [u8]>,
    /// Comes only if the manifest asks for such events.
    forgotten: Option<&'a [u8]>,
}

#[doc(hidden)]
pub struct Batch<'a> {
    positions: &'a [[u8; 8]],
    times: &'a [[u8; 8]],
    versions: Option<&'a [[u8; 8]]>,
    sources: Vec<&'a str>,
    source: &'a [[u8; 2]],
    types: Vec<&'a str>,
    event_type: &'a [[u8; 2]],
    streams: Texts<'a>,
    ids: Texts<'a>,
    metadata: Texts<'a>,
    payloads: Values<'a>,
    /// The payloads as text, if all of them are: JSON is, but the contract allows others.
    payload_texts: Option<Texts<'a>>,
    forgotten: Option<&'a [[u8; 1]]>,
}

/// What an event is, apart from its texts.
pub(crate) struct Fixed<'a> {
    pub(crate) position: u64,
    pub(crate) time: i64,
    pub(crate) version: u64,
    pub(crate) forgotten: bool,
    pub(crate) source: &'a str,
    pub(crate) event_type: &'a str,
}

impl<'a> Batch<'a> {
    pub(crate) fn decode(bytes: &'a [u8]) -> Result<Self, Error> {
        let columns: Columns<'a> = rmp_serde::from_slice(bytes)?;
        let n = columns.positions.len() / 8;
        if n == 0 {
            return Err(Error::msg("no events"));
        }
        let payloads = Values::new("payloads", n, columns.payloads, columns.payload_ends)?;
        let batch = Self {
            positions: fixed("positions", n, columns.positions)?,
            times: fixed("times", n, columns.times)?,
            versions: columns.versions.map(|column| fixed("versions", n, column)).transpose()?,
            source: fixed("source", n, columns.source)?,
            event_type: fixed("type", n, columns.r#type)?,
            streams: Values::new("streams", n, columns.streams, columns.stream_ends)?.texts("streams")?,
            ids: Values::new("ids", n, columns.ids, columns.id_ends)?.texts("ids")?,
            metadata: Values::new("metadata", n, columns.metadata, columns.metadata_ends)?.texts("metadata")?,
            payload_texts: payloads.texts("payloads").ok(),
            payloads,
            forgotten: columns.forgotten.map(|column| fixed("forgotten", n, column)).transpose()?,
            sources: columns.sources,
            types: columns.types,
        };
        let within = |column: &[[u8; 2]], names: &[&str]| {
            column.iter().all(|index| usize::from(u16::from_le_bytes(*index)) < names.len())
        };
        if !within(batch.source, &batch.sources) || !within(batch.event_type, &batch.types) {
            return Err(Error::msg("an index is beyond its dictionary"));
        }
        Ok(batch)
    }

    pub(crate) fn len(&self) -> usize {
        self.positions.len()
    }

    /// How many sources and types there are: the indices of `pair` are below these.
    pub(crate) fn dictionaries(&self) -> (usize, usize) {
        (self.sources.len(), self.types.len())
    }

    /// The event's source and type, as indices.
    pub(crate) fn pair(&self, i: usize) -> (usize, usize) {
        (u16::from_le_bytes(self.source[i]).into(), u16::from_le_bytes(self.event_type[i]).into())
    }

    pub(crate) fn fixed(&self, i: usize) -> Fixed<'a> {
        let (source, event_type) = self.pair(i);
        Fixed {
            position: u64::from_le_bytes(self.positions[i]),
            time: i64::from_le_bytes(self.times[i]),
            version: self.versions.map_or(0, |versions| u64::from_le_bytes(versions[i])),
            forgotten: self.forgotten.is_some_and(|forgotten| forgotten[i] != [0]),
            source: self.sources[source],
            event_type: self.types[event_type],
        }
    }

    pub(crate) fn stream(&self, i: usize) -> &'a str {
        self.streams.get(i)
    }

    pub(crate) fn id(&self, i: usize) -> &'a str {
        self.ids.get(i)
    }

    pub(crate) fn metadata(&self, i: usize) -> &'a str {
        self.metadata.get(i)
    }

    /// The payload, and again as text if the batch has only text.
    pub(crate) fn payload(&self, i: usize) -> (&'a [u8], Option<&'a str>) {
        (self.payloads.get(i), self.payload_texts.as_ref().map(|texts| texts.get(i)))
    }
}

/// A column of `n` numbers of `N` bytes.
fn fixed<'a, const N: usize>(name: &str, n: usize, column: &'a [u8]) -> Result<&'a [[u8; N]], Error> {
    match column.as_chunks::<N>() {
        (numbers, []) if numbers.len() == n => Ok(numbers),
        _ => Err(Error::msg(format_args!("`{name}` has {} bytes for {n} events", column.len()))),
    }
}

/// A column of byte strings. The ends are known to rise and to stay inside the bytes.
#[derive(Clone, Copy)]
struct Values<'a> {
    bytes: &'a [u8],
    /// None: an absent column.
    ends: Option<&'a [[u8; 4]]>,
}

impl<'a> Values<'a> {
    fn new(name: &str, n: usize, bytes: Option<&'a [u8]>, ends: Option<&'a [u8]>) -> Result<Self, Error> {
        let (bytes, ends) = match (bytes, ends) {
            (Some(bytes), Some(ends)) => (bytes, fixed::<4>(name, n, ends)?),
            (None, None) => return Ok(Self { bytes: &[], ends: None }),
            _ => return Err(Error::msg(format_args!("`{name}` came without its other half"))),
        };
        let mut begin = 0;
        for end in ends {
            let end = u32::from_le_bytes(*end);
            if end < begin {
                return Err(Error::msg(format_args!("an end in `{name}` is before its beginning")));
            }
            begin = end;
        }
        if begin as usize != bytes.len() {
            return Err(Error::msg(format_args!("`{name}` ends at {begin} and has {} bytes", bytes.len())));
        }
        Ok(Self { bytes, ends: Some(ends) })
    }

    fn range(&self, i: usize) -> std::ops::Range<usize> {
        let Some(ends) = self.ends else { return 0..0 };
        let end = |i: usize| u32::from_le_bytes(ends[i]) as usize;
        let begin = if i == 0 { 0 } else { end(i - 1) };
        begin..end(i)
    }

    fn get(&self, i: usize) -> &'a [u8] {
        &self.bytes[self.range(i)]
    }

    /// The same column as text, if it is UTF-8 and no end is inside a character.
    fn texts(self, name: &str) -> Result<Texts<'a>, Error> {
        let text = std::str::from_utf8(self.bytes)
            .map_err(|error| Error::from(error).within(format_args!("`{name}` is not text")))?;
        let ends = self.ends.unwrap_or(&[]);
        if !ends.iter().all(|end| text.is_char_boundary(u32::from_le_bytes(*end) as usize)) {
            return Err(Error::msg(format_args!("an end in `{name}` is inside a character")));
        }
        Ok(Texts { text, values: self })
    }
}

struct Texts<'a> {
    text: &'a str,
    values: Values<'a>,
}

impl<'a> Texts<'a> {
    fn get(&self, i: usize) -> &'a str {
        &self.text[self.values.range(i)]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Serialize;
    use serde_bytes::ByteBuf;

    use super::*;

    #[derive(Clone, Serialize)]
    #[serde(untagged)]
    enum Column {
        Bytes(ByteBuf),
        Names(Vec<&'static str>),
    }

    fn bytes(bytes: impl Into<Vec<u8>>) -> Column {
        Column::Bytes(ByteBuf::from(bytes.into()))
    }

    /// Two events, with the columns that always come and one that no contract knows yet.
    fn columns() -> BTreeMap<&'static str, Column> {
        BTreeMap::from([
            ("positions", bytes([[7, 0, 0, 0, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0, 1]].concat())),
            ("times", bytes([[0; 8], [0xff; 8]].concat())),
            ("sources", Column::Names(vec!["orders"])),
            ("source", bytes([0, 0, 0, 0])),
            ("types", Column::Names(vec!["A", "B"])),
            ("type", bytes([1, 0, 0, 0])),
            ("tenants", bytes([1, 2, 3])),
        ])
    }

    fn decoded(columns: &BTreeMap<&str, Column>) -> Result<Vec<String>, String> {
        let encoded = rmp_serde::to_vec_named(columns).unwrap();
        let batch = Batch::decode(&encoded).map_err(|error| error.to_string())?;
        Ok((0..batch.len())
            .map(|i| {
                let Fixed { position, time, version, forgotten, source, event_type } = batch.fixed(i);
                let (stream, (payload, text)) = (batch.stream(i), batch.payload(i));
                let end = if forgotten { " forgotten" } else { "" };
                format!(
                    "{source} {position} v{version} {event_type} at {time} in `{stream}`: {payload:?} {text:?}{end}"
                )
            })
            .collect())
    }

    #[test]
    fn columns_may_be_absent_or_unknown() {
        let events = decoded(&columns()).unwrap();
        assert_eq!(
            events,
            [r#"orders 7 v0 B at 0 in ``: [] Some("")"#, r#"orders 72057594037927945 v0 A at -1 in ``: [] Some("")"#]
        );
    }

    #[test]
    fn events_are_forgotten_where_the_column_says_so() {
        let mut columns = columns();
        columns.insert("forgotten", bytes([0, 1]));
        let forgotten = decoded(&columns).unwrap().into_iter().map(|event| event.ends_with(" forgotten"));
        assert_eq!(forgotten.collect::<Vec<_>>(), [false, true]);
    }

    #[test]
    fn payloads_need_not_be_text_but_the_others_must() {
        let mut columns = columns();
        columns.insert("payloads", bytes([b'1', 0xff, 0xc3, 0xa9]));
        columns.insert("payload_ends", bytes([1, 0, 0, 0, 4, 0, 0, 0]));
        assert!(decoded(&columns).unwrap()[1].ends_with("[255, 195, 169] None"));
        // An end inside a character.
        columns.insert("payloads", bytes("né"));
        columns.insert("payload_ends", bytes([2, 0, 0, 0, 3, 0, 0, 0]));
        assert!(decoded(&columns).unwrap()[0].ends_with("[110, 195] None"));
        columns.insert("streams", bytes("né"));
        columns.insert("stream_ends", bytes([2, 0, 0, 0, 3, 0, 0, 0]));
        assert_eq!(decoded(&columns).unwrap_err(), "an end in `streams` is inside a character");
    }

    #[test]
    fn a_malformed_batch_is_refused_with_a_reason() {
        for (name, column, expected) in [
            ("positions", bytes([]), "no events"),
            ("times", bytes([0; 15]), "`times` has 15 bytes for 2 events"),
            ("versions", bytes([0; 8]), "`versions` has 8 bytes for 2 events"),
            ("type", bytes([0, 0, 2, 0]), "an index is beyond its dictionary"),
            ("forgotten", bytes([0; 3]), "`forgotten` has 3 bytes for 2 events"),
            ("payloads", bytes([]), "`payloads` came without its other half"),
        ] {
            let mut columns = columns();
            columns.insert(name, column);
            assert_eq!(decoded(&columns).unwrap_err(), expected);
        }
        for (ends, expected) in [
            ([3, 0, 0, 0, 2, 0, 0, 0], "an end in `ids` is before its beginning"),
            ([1, 0, 0, 0, 2, 0, 0, 0], "`ids` ends at 2 and has 3 bytes"),
        ] {
            let mut columns = columns();
            columns.insert("ids", bytes("abc"));
            columns.insert("id_ends", bytes(ends));
            assert_eq!(decoded(&columns).unwrap_err(), expected);
        }
    }
}
