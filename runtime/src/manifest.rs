//! What a plugin declares about itself: its projection's name and version, what it subscribes to, its views.
//!
//! The JSON form and its rules are described at `describe` in `wit/projection.wit`. A [`Manifest`] is always valid.

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::config::limits;
use crate::model::{BatchColumn, ColumnSet, cut};

/// The version of `wit/projection.wit` that this host speaks.
pub const CONTRACT: &str = "0.1.0";

/// A validated manifest.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// The projection's name.
    pub projection: String,
    /// The projection's version, 1 or more.
    pub version: u32,
    /// What it subscribes to, sorted by the patterns of the sources.
    pub sources: Vec<Subscription>,
    /// Its views, in the order by which plugins number them.
    pub views: Vec<ViewSchema>,
    /// The optional batch columns that the plugin reads.
    pub batch: ColumnSet,
    /// Whether events whose content is gone come, too.
    pub forgotten: bool,
    /// The JSON that the plugin gave.
    pub json: String,
}

/// Sources, and the event types that are wanted of them.
#[derive(Clone, Debug)]
pub struct Subscription {
    /// The pattern of the sources as declared: a name, or a glob that takes any number of them.
    pub source: String,
    source_matcher: GlobSet,
    /// The patterns of the types as declared, sorted; empty for all types.
    pub types: Vec<String>,
    matcher: GlobSet,
}

impl Subscription {
    /// True if this is about the source. It runs a matcher: keep the answer for each source, which never changes.
    pub fn takes_source(&self, source: &str) -> bool {
        self.source_matcher.is_match(source)
    }

    /// True if events of this type are wanted of the sources that it takes. It runs a matcher, too.
    pub fn wants(&self, event_type: &str) -> bool {
        self.types.is_empty() || self.matcher.is_match(event_type)
    }
}

/// A view as declared: one table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewSchema {
    /// The view's name, unique in a runtime.
    pub name: String,
    /// All columns, in order.
    pub columns: Vec<Column>,
    /// Names of the key's columns, in order.
    pub key: Vec<String>,
    /// Secondary indexes, each a list of column names.
    #[serde(default)]
    pub indexes: Vec<Vec<String>>,
}

/// A column of a view.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    /// The column's name.
    pub name: String,
    /// What it holds.
    #[serde(rename = "type")]
    pub kind: ColumnType,
    /// Whether it may be absent.
    #[serde(default)]
    pub nullable: bool,
}

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it; wit/projection.wit gives the ranges")]
pub enum ColumnType {
    Text,
    Integer,
    Real,
    Boolean,
    Bytes,
    Timestamp,
    Json,
    Uuid,
    Decimal,
}

impl ColumnType {
    /// The name in a manifest.
    pub fn name(self) -> &'static str {
        match self {
            ColumnType::Text => "text",
            ColumnType::Integer => "integer",
            ColumnType::Real => "real",
            ColumnType::Boolean => "boolean",
            ColumnType::Bytes => "bytes",
            ColumnType::Timestamp => "timestamp",
            ColumnType::Json => "json",
            ColumnType::Uuid => "uuid",
            ColumnType::Decimal => "decimal",
        }
    }

    /// Reals, JSON and decimals have several spellings of one value, so they cannot identify a row.
    fn can_be_key(self) -> bool {
        !matches!(self, ColumnType::Real | ColumnType::Json | ColumnType::Decimal)
    }
}

impl ViewSchema {
    /// The index of a column.
    pub fn column(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|c| c.name == name)
    }

    /// Indexes of the key's columns, in the key's order.
    pub fn key_columns(&self) -> Vec<usize> {
        self.key.iter().map(|k| self.column(k).expect("validated")).collect()
    }

    /// Indexes of the other columns, in order.
    pub fn value_columns(&self) -> Vec<usize> {
        (0..self.columns.len()).filter(|&i| !self.key.contains(&self.columns[i].name)).collect()
    }
}

/// Why a manifest is refused: a sentence for the plugin's author.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

fn error(message: String) -> Error {
    Error(cut(message))
}

macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(error(format!($($message)+)));
        }
    };
}

#[derive(Deserialize)]
struct Contract {
    contract: String,
}

#[derive(Deserialize)]
struct Written {
    projection: String,
    version: u32,
    sources: Vec<WrittenSource>,
    views: Vec<ViewSchema>,
    batch: Option<Vec<BatchColumn>>,
    #[serde(default)]
    forgotten: bool,
}

#[derive(Deserialize)]
struct WrittenSource {
    source: String,
    #[serde(default)]
    types: Vec<String>,
}

impl Manifest {
    /// Reads and validates the JSON that a plugin's `describe` returned.
    pub fn parse(json: &str) -> Result<Manifest, Error> {
        check_length(json)?;
        let contract: Contract =
            serde_json::from_str(json).map_err(|e| error(format!("the manifest is not valid: {e}")))?;
        ensure!(
            contract.contract == CONTRACT,
            "the manifest is written for contract {}; this runtime speaks {CONTRACT}; rebuild it with the SDK of this version",
            contract.contract
        );
        Manifest::stored(json)
    }

    /// The same for one that was kept with a view: that can be read, whichever contract its module was written for.
    pub fn stored(json: &str) -> Result<Manifest, Error> {
        check_length(json)?;
        let written: Written =
            serde_json::from_str(json).map_err(|e| error(format!("the manifest is not valid: {e}")))?;
        name("projection", &written.projection, "-_")?;
        ensure!(written.version >= 1, "the projection's version is 0; begin with 1");
        let mut views: Vec<&str> = Vec::new();
        ensure!(!written.views.is_empty(), "the projection has no views");
        ensure!(
            written.views.len() <= limits::VIEWS,
            "the projection has {} views; the limit is {}",
            written.views.len(),
            limits::VIEWS
        );
        for view in &written.views {
            validate_view(view)?;
            ensure!(!views.contains(&view.name.as_str()), "view {:?} is declared twice", view.name);
            views.push(&view.name);
        }
        Ok(Manifest {
            projection: written.projection,
            version: written.version,
            sources: subscriptions(written.sources)?,
            batch: written.batch.map_or(ColumnSet::ALL, ColumnSet::from_iter),
            forgotten: written.forgotten,
            views: written.views,
            json: json.to_owned(),
        })
    }

    /// A digest of the views' shape and of the sources: two modules with the same projection version and the same
    /// digest may go on from one another's rows. Another pattern may mean that events of the past are missing from the
    /// rows, so it counts as another shape, of sources and of types alike; their order in the manifest does not. So does
    /// whether events whose content is gone are among them.
    pub fn schema_digest(&self) -> String {
        let sources: Vec<_> = self.sources.iter().map(|s| (&s.source, &s.types)).collect();
        let mut shape = serde_json::to_vec(&(&self.views, sources)).expect("plain data");
        shape.extend_from_slice(if self.forgotten { b"forgotten" } else { b"" });
        hex(&Sha256::digest(shape))[..16].to_owned()
    }

    /// True if events of this type of this source are wanted by any of the subscriptions.
    pub fn wants(&self, source: &str, event_type: &str) -> bool {
        self.sources.iter().any(|s| s.takes_source(source) && s.wants(event_type))
    }
}

fn check_length(json: &str) -> Result<(), Error> {
    let (bytes, limit) = (json.len(), limits::MANIFEST_BYTES);
    ensure!(bytes <= limit, "the manifest is {bytes} bytes long; the limit is {limit}");
    Ok(())
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn subscriptions(written: Vec<WrittenSource>) -> Result<Vec<Subscription>, Error> {
    ensure!(!written.is_empty(), "the projection subscribes to no source");
    ensure!(
        written.len() <= limits::SOURCES,
        "the projection names {} sources; the limit is {}; a glob like sensors/* takes many",
        written.len(),
        limits::SOURCES
    );
    let mut sources: Vec<Subscription> = Vec::new();
    for WrittenSource { source, mut types } in written {
        ensure!(!source.is_empty(), "a source has an empty name");
        // A long pattern of nested braces would take as deep a stack to compile.
        let bytes = source.len();
        ensure!(
            bytes <= limits::EVENT_NAME_BYTES,
            "a source's name has {bytes} bytes; the limit is {}",
            limits::EVENT_NAME_BYTES
        );
        ensure!(!sources.iter().any(|s| s.source == source), "source {source:?} is listed twice");
        types.sort();
        types.dedup();
        ensure!(
            types.len() <= limits::TYPES,
            "{} event types are named for source {source:?}; the limit is {}; a glob like Order* names many",
            types.len(),
            limits::TYPES
        );
        ensure!(
            types.iter().all(|t| t.len() <= limits::EVENT_NAME_BYTES),
            "an event type of source {source:?} is longer than {} bytes",
            limits::EVENT_NAME_BYTES
        );
        let source_matcher = matcher("source", std::slice::from_ref(&source))?;
        let matcher = matcher("event type", &types)?;
        sources.push(Subscription { source, source_matcher, types, matcher });
    }
    sources.sort_by(|a, b| a.source.cmp(&b.source));
    Ok(sources)
}

/// Matches what one of the patterns matches, and nothing if there are none.
fn matcher(what: &str, patterns: &[String]) -> Result<GlobSet, Error> {
    // A set even for one pattern: the other matcher panics where a pattern is too large to compile.
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        // Escaping is the default only where `\` does not separate paths.
        let compiled = |pattern: &str| GlobBuilder::new(pattern).backslash_escape(true).build();
        let mut glob = compiled(pattern);
        if glob.is_ok() && pattern.ends_with('.') {
            // A set takes what stands behind the last `.` for a file's extension, and finds none in the name `a.`. An
            // empty alternative matches as before, and is compared without such a short cut.
            glob = compiled(&format!("{pattern}{{}}"));
        }
        set.add(glob.map_err(|e| error(format!("{what} {pattern:?} is not a glob: {}", e.kind())))?);
    }
    set.build().map_err(|e| error(format!("{what} {} cannot be matched: {}", patterns.join(", "), e.kind())))
}

fn validate_view(view: &ViewSchema) -> Result<(), Error> {
    name("view", &view.name, "_")?;
    ensure!(
        view.columns.len() <= limits::COLUMNS,
        "view {:?} has {} columns; the limit is {}",
        view.name,
        view.columns.len(),
        limits::COLUMNS
    );
    for (i, column) in view.columns.iter().enumerate() {
        name("column", &column.name, "_")?;
        ensure!(
            view.column(&column.name) == Some(i),
            "column {:?} of view {:?} is declared twice",
            column.name,
            view.name
        );
    }
    ensure!(!view.key.is_empty(), "view {:?} has no key", view.name);
    for (i, key) in view.key.iter().enumerate() {
        let Some(column) = view.column(key).map(|i| &view.columns[i]) else {
            return Err(error(format!("key {key:?} of view {:?} is not one of its columns", view.name)));
        };
        ensure!(!view.key[..i].contains(key), "column {key:?} is twice in the key of view {:?}", view.name);
        ensure!(!column.nullable, "key column {key:?} of view {:?} is nullable; a key must always be there", view.name);
        ensure!(
            column.kind.can_be_key(),
            "key column {key:?} of view {:?} is of type {}; a key can be text, integer, boolean, bytes, timestamp or uuid",
            view.name,
            column.kind.name()
        );
    }
    ensure!(
        view.indexes.len() <= limits::INDEXES,
        "view {:?} has {} indexes; the limit is {}",
        view.name,
        view.indexes.len(),
        limits::INDEXES
    );
    for index in &view.indexes {
        ensure!(!index.is_empty(), "view {:?} has an index without columns", view.name);
        for (i, column) in index.iter().enumerate() {
            let known = view.column(column).is_some();
            ensure!(known, "index column {column:?} of view {:?} is not one of its columns", view.name);
            ensure!(!index[..i].contains(column), "column {column:?} is twice in an index of view {:?}", view.name);
        }
    }
    Ok(())
}

fn name(what: &str, name: &str, extra: &str) -> Result<(), Error> {
    let valid = (1..=63).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || extra.contains(c));
    ensure!(
        valid && !name.starts_with("sqlite_"),
        "{what} name {name:?} is not valid; use 1 to 63 of a-z, 0-9 and {}, beginning with a letter",
        if extra.len() > 1 { "- _" } else { "_" }
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn valid() -> serde_json::Value {
        json!({
            "contract": CONTRACT, "projection": "p", "version": 1,
            "sources": [{"source": "flights", "types": ["Flight*"]}, {"source": "fleet"}],
            "views": [{"name": "v", "columns": [{"name": "k", "type": "text"}, {"name": "x", "type": "real"}], "key": ["k"]}],
            "something_new": true,
        })
    }

    #[test]
    fn a_valid_manifest_is_read() {
        let manifest = Manifest::parse(&valid().to_string()).unwrap();
        assert!(manifest.wants("flights", "FlightDeparted") && !manifest.wants("flights", "Weather"));
        assert!(manifest.wants("fleet", "Anything") && !manifest.wants("crew", "Anything"));
    }

    fn subscribed(sources: serde_json::Value) -> Manifest {
        let mut manifest = valid();
        manifest["sources"] = sources;
        Manifest::parse(&manifest.to_string()).unwrap()
    }

    #[test]
    fn sources_are_globs_as_types_are() {
        let manifest = subscribed(json!([
            {"source": "sensors/*", "types": ["Reading*"]}, {"source": "sensors/{a,b}", "types": ["Lost"]},
            {"source": "lab[0-9]"}, {"source": "what\\?"},
        ]));
        for (source, event_type, wanted) in [
            ("sensors/a", "ReadingTaken", true),
            ("sensors/north/a", "ReadingTaken", true),
            ("sensors/", "ReadingTaken", true),
            ("sensors", "ReadingTaken", false),
            ("old/sensors/a", "ReadingTaken", false),
            ("sensors/a", "Lost", true),
            ("sensors/c", "Lost", false),
            ("lab7", "Anything", true),
            ("lab10", "Anything", false),
            ("what?", "Anything", true),
            ("whats", "Anything", false),
        ] {
            assert_eq!(manifest.wants(source, event_type), wanted, "{source} {event_type}");
        }
        assert!(
            subscribed(json!([{"source": "*"}])).wants("", "")
                && subscribed(json!([{"source": "*"}])).wants("a/b", "c")
        );
    }

    #[test]
    fn a_set_matches_what_its_globs_do() {
        let texts = |alphabet: &[&str]| {
            let longer = |text: &String| alphabet.iter().map(|more| format!("{text}{more}")).collect::<Vec<_>>();
            let mut all = vec![vec![String::new()]];
            (0..4).for_each(|n| all.push(all[n].iter().flat_map(longer).collect()));
            all.concat()
        };
        let names = texts(&["a", ".", "/"]);
        for pattern in texts(&["a", ".", "*", "/", "\\."]).into_iter().filter(|p| !p.is_empty() && !p.contains("**")) {
            let set = matcher("source", std::slice::from_ref(&pattern)).unwrap();
            let glob = GlobBuilder::new(&pattern).backslash_escape(true).build().unwrap().compile_matcher();
            for name in &names {
                assert_eq!(set.is_match(name), glob.is_match(name), "{pattern} on {name}");
            }
        }
    }

    #[test]
    fn the_order_of_sources_and_types_is_no_part_of_the_shape_but_their_patterns_are() {
        let digest = |sources| subscribed(sources).schema_digest();
        let one = digest(json!([{"source": "a*", "types": ["X", "Y"]}, {"source": "b"}]));
        assert_eq!(one, digest(json!([{"source": "b"}, {"source": "a*", "types": ["Y", "X", "Y"]}])));
        assert_ne!(one, digest(json!([{"source": "a", "types": ["X", "Y"]}, {"source": "b"}])));
        assert_ne!(one, digest(json!([{"source": "a*", "types": ["X"]}, {"source": "b"}])));
    }

    /// What a hostile manifest can make of patterns: an answer comes soon, whatever it is.
    #[test]
    fn patterns_are_bounded_in_number_and_in_length() {
        let named = |n: usize, name: &dyn Fn(usize) -> String| {
            let mut manifest = valid();
            manifest["sources"] = (0..n).map(|i| json!({ "source": name(i) })).collect();
            Manifest::parse(&manifest.to_string())
        };
        assert!(named(limits::SOURCES, &|i| format!("s{i}*")).is_ok());
        let error = named(limits::SOURCES + 1, &|i| format!("s{i}*")).unwrap_err().to_string();
        assert!(error.contains("names 65 sources; the limit is 64"), "{error}");
        let error = named(1, &|_| "s".repeat(limits::EVENT_NAME_BYTES + 1)).unwrap_err().to_string();
        assert!(error.contains("has 1025 bytes; the limit is 1024"), "{error}");
        for unit in ["*a?[b-d]", "{a,*}", "{"] {
            let longest = (limits::EVENT_NAME_BYTES - 2) / unit.len();
            if let Ok(manifest) = named(limits::SOURCES, &|i| format!("{}{i}", unit.repeat(longest))) {
                assert!(!manifest.wants(&"a".repeat(limits::EVENT_NAME_BYTES), "T"), "{unit}");
            }
        }
    }

    #[test]
    fn each_refusal_names_the_value() {
        let cases = [
            (
                "/contract",
                json!("0.0.9"),
                "written for contract 0.0.9; this runtime speaks 0.1.0; rebuild it with the SDK of this version",
            ),
            ("/projection", json!("Über"), "\"Über\""),
            ("/version", json!(0), "version is 0"),
            ("/sources", json!([]), "no source"),
            ("/sources/1/source", json!("flights"), "\"flights\" is listed twice"),
            ("/sources/1/source", json!("fleet/{a"), "source \"fleet/{a\" is not a glob: unclosed alternate group"),
            ("/sources/1/source", json!("fleet\\"), "source \"fleet\\\\\" is not a glob: dangling"),
            ("/sources/0/types/0", json!("a{"), "\"a{\" is not a glob"),
            ("/views", json!([]), "no views"),
            ("/views/0/name", json!("sqlite_x"), "\"sqlite_x\""),
            ("/views/0/columns/1/name", json!("k"), "\"k\" of view \"v\" is declared twice"),
            ("/views/0/columns/1/type", json!("money"), "money"),
            ("/views/0/key", json!([]), "no key"),
            ("/views/0/key/0", json!("z"), "\"z\""),
            ("/views/0/key/0", json!("x"), "of type real"),
        ];
        for (path, value, expected) in cases {
            let mut manifest = valid();
            *manifest.pointer_mut(path).unwrap() = value;
            let error = Manifest::parse(&manifest.to_string()).unwrap_err().to_string();
            assert!(error.contains(expected), "{path}: {error}");
        }
    }
}
