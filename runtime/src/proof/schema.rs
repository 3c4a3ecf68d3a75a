//! What differs between two manifests of a projection.

use std::fmt;

use serde::Serialize;

use crate::manifest::{Column, Manifest, ViewSchema};

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "change", rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it, and `Display` says it in words")]
pub enum Change {
    Version {
        from: u32,
        to: u32,
    },
    SourceAdded {
        source: String,
        types: Vec<String>,
    },
    SourceRemoved {
        source: String,
    },
    TypesChanged {
        source: String,
        from: Vec<String>,
        to: Vec<String>,
    },
    ViewAdded {
        view: String,
    },
    ViewRemoved {
        view: String,
    },
    ColumnAdded {
        view: String,
        column: String,
        kind: String,
    },
    ColumnRemoved {
        view: String,
        column: String,
    },
    ColumnChanged {
        view: String,
        column: String,
        from: String,
        to: String,
    },
    KeyChanged {
        view: String,
        from: Vec<String>,
        to: Vec<String>,
    },
    IndexAdded {
        view: String,
        columns: Vec<String>,
    },
    IndexRemoved {
        view: String,
        columns: Vec<String>,
    },
    /// Columns of one view, or the views, are the same in another order.
    Reordered {
        what: String,
    },
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |names: &[String]| if names.is_empty() { "all".to_owned() } else { names.join(", ") };
        match self {
            Change::Version { from, to } => write!(f, "version {from} becomes {to}"),
            Change::SourceAdded { source, types } => write!(f, "it reads source {source}, too: {} events", list(types)),
            Change::SourceRemoved { source } => write!(f, "it does not read source {source} any more"),
            Change::TypesChanged { source, from, to } => {
                write!(f, "of source {source} it reads {} events instead of {}", list(to), list(from))
            }
            Change::ViewAdded { view } => write!(f, "view {view} is added"),
            Change::ViewRemoved { view } => write!(f, "view {view} is removed"),
            Change::ColumnAdded { view, column, kind } => write!(f, "view {view} gets column {column}, {kind}"),
            Change::ColumnRemoved { view, column } => write!(f, "view {view} loses column {column}"),
            Change::ColumnChanged { view, column, from, to } => {
                write!(f, "column {column} of view {view} is {to} instead of {from}")
            }
            Change::KeyChanged { view, from, to } => {
                write!(f, "the key of view {view} is {} instead of {}", to.join(", "), from.join(", "))
            }
            Change::IndexAdded { view, columns } => write!(f, "view {view} gets an index on {}", columns.join(", ")),
            Change::IndexRemoved { view, columns } => {
                write!(f, "view {view} loses its index on {}", columns.join(", "))
            }
            Change::Reordered { what } => write!(f, "{what} are in another order"),
        }
    }
}

/// Everything that keeps a module from going on from another one's rows, and nothing else.
pub(super) fn changes(from: &Manifest, to: &Manifest) -> Vec<Change> {
    let mut changes = Vec::new();
    if from.version != to.version {
        changes.push(Change::Version { from: from.version, to: to.version });
    }
    // By their patterns as declared: which sources those take is nothing that a module says.
    let declared = |manifest: &Manifest, pattern: &str| manifest.sources.iter().find(|s| s.source == pattern).cloned();
    for source in &from.sources {
        let name = || source.source.clone();
        match declared(to, &source.source) {
            None => changes.push(Change::SourceRemoved { source: name() }),
            Some(now) if now.types != source.types => {
                let (from, to) = (source.types.clone(), now.types);
                changes.push(Change::TypesChanged { source: name(), from, to });
            }
            Some(_) => {}
        }
    }
    for source in to.sources.iter().filter(|s| declared(from, &s.source).is_none()) {
        changes.push(Change::SourceAdded { source: source.source.clone(), types: source.types.clone() });
    }
    let find = |views: &[ViewSchema], name: &str| views.iter().find(|v| v.name == name).cloned();
    for view in &from.views {
        match find(&to.views, &view.name) {
            None => changes.push(Change::ViewRemoved { view: view.name.clone() }),
            Some(now) => view_changes(view, &now, &mut changes),
        }
    }
    for view in to.views.iter().filter(|v| find(&from.views, &v.name).is_none()) {
        changes.push(Change::ViewAdded { view: view.name.clone() });
    }
    if changes.is_empty() && from.views != to.views {
        changes.push(Change::Reordered { what: "the views".into() });
    }
    changes
}

fn view_changes(from: &ViewSchema, to: &ViewSchema, changes: &mut Vec<Change>) {
    let before = changes.len();
    let kind = |c: &Column| format!("{}{}", c.kind.name(), if c.nullable { ", may be null" } else { "" });
    let view = || to.name.clone();
    for column in &from.columns {
        let name = column.name.clone();
        match to.column(&column.name).map(|i| &to.columns[i]) {
            None => changes.push(Change::ColumnRemoved { view: view(), column: name }),
            Some(now) if now != column => {
                changes.push(Change::ColumnChanged { view: view(), column: name, from: kind(column), to: kind(now) });
            }
            Some(_) => {}
        }
    }
    for column in to.columns.iter().filter(|c| from.column(&c.name).is_none()) {
        changes.push(Change::ColumnAdded { view: view(), column: column.name.clone(), kind: kind(column) });
    }
    if from.key != to.key {
        changes.push(Change::KeyChanged { view: view(), from: from.key.clone(), to: to.key.clone() });
    }
    for columns in from.indexes.iter().filter(|i| !to.indexes.contains(i)) {
        changes.push(Change::IndexRemoved { view: view(), columns: columns.clone() });
    }
    for columns in to.indexes.iter().filter(|i| !from.indexes.contains(i)) {
        changes.push(Change::IndexAdded { view: view(), columns: columns.clone() });
    }
    if changes.len() == before && from != to {
        changes.push(Change::Reordered { what: format!("the columns or indexes of view {}", to.name) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::CONTRACT;
    use serde_json::json;

    fn manifest() -> serde_json::Value {
        let columns = |names: &[&str]| names.iter().map(|n| json!({ "name": n, "type": "text" })).collect::<Vec<_>>();
        json!({
            "contract": CONTRACT, "projection": "p", "version": 1,
            "sources": [{ "source": "a", "types": ["X"] }, { "source": "b" }],
            "views": [
                { "name": "v", "columns": columns(&["k", "l", "x"]), "key": ["k"], "indexes": [["x"]] },
                { "name": "w", "columns": columns(&["k"]), "key": ["k"] },
            ],
        })
    }

    #[test]
    fn whatever_keeps_a_module_from_going_on_is_said_and_nothing_else() {
        let column = |name: &str, kind: &str| json!({ "name": name, "type": kind, "nullable": true });
        let cases = [
            ("/version", json!(2), "version 1 becomes 2"),
            ("/sources/0/types", json!(["X", "Y"]), "of source a it reads X, Y events instead of X"),
            ("/sources/0/types", json!([]), "of source a it reads all events instead of X"),
            ("/sources/1/source", json!("c"), "it does not read source b any more; it reads source c, too: all events"),
            (
                "/sources/1/source",
                json!("b*"),
                "it does not read source b any more; it reads source b*, too: all events",
            ),
            (
                "/views/0/columns/2",
                column("x", "integer"),
                "column x of view v is integer, may be null instead of text",
            ),
            (
                "/views/0/columns/1",
                column("z", "real"),
                "view v loses column l; view v gets column z, real, may be null",
            ),
            ("/views/0/key", json!(["l"]), "the key of view v is l instead of k"),
            ("/views/0/indexes", json!([["l", "x"]]), "view v loses its index on x; view v gets an index on l, x"),
            ("/views/1/name", json!("u"), "view w is removed; view u is added"),
            (
                "/views/0/columns",
                json!([{"name": "l", "type": "text"}, {"name": "k", "type": "text"}, {"name": "x", "type": "text"}]),
                "the columns or indexes of view v are in another order",
            ),
            ("/batch", json!(["ids"]), ""),
            ("/sources/0/types", json!(["X", "X"]), ""),
        ];
        let parse = |json: &serde_json::Value| Manifest::parse(&json.to_string()).unwrap();
        let from = parse(&manifest());
        for (path, value, expected) in cases {
            let mut to = manifest();
            match to.pointer_mut(path) {
                Some(place) => *place = value,
                None => _ = to.as_object_mut().unwrap().insert(path[1..].to_owned(), value),
            }
            let to = parse(&to);
            let said = changes(&from, &to).iter().map(Change::to_string).collect::<Vec<_>>().join("; ");
            assert_eq!(said, expected, "{path}");
            // The runtime decides by the version and this digest.
            let continues = from.version == to.version && from.schema_digest() == to.schema_digest();
            assert_eq!(said.is_empty(), continues, "{path}");
        }
        let mut swapped = manifest();
        swapped["views"].as_array_mut().unwrap().reverse();
        assert_eq!(changes(&from, &parse(&swapped))[0].to_string(), "the views are in another order");
    }
}
