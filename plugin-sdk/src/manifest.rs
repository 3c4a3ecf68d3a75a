//! The manifest: what a projection reads and maintains, as JSON.

use serde::Serialize;

use crate::Projection;
use crate::column::ColumnType;

/// The version of the contract in `wit/projection.wit`.
const CONTRACT: &str = "0.1.0";

#[derive(Serialize)]
struct Manifest {
    contract: &'static str,
    projection: &'static str,
    version: u32,
    sources: Vec<Source>,
    views: Vec<View>,
    #[serde(skip_serializing_if = "Option::is_none")]
    batch: Option<Vec<&'static str>>,
    // Left out where it is false, so that the manifests of all others stay byte for byte as they were.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    forgotten: bool,
}

#[derive(Serialize)]
struct Source {
    source: &'static str,
    types: Vec<&'static str>,
}

#[derive(Serialize)]
struct View {
    name: &'static str,
    columns: Vec<Column>,
    key: &'static [&'static str],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    indexes: &'static [&'static [&'static str]],
}

#[derive(Serialize)]
struct Column {
    name: &'static str,
    r#type: ColumnType,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    nullable: bool,
}

/// The manifest of `P`. The same at every call: everything in it is constant.
pub(crate) fn of<P: Projection>() -> String {
    let definition = P::definition();
    let mut sources: Vec<Source> = Vec::new();
    for subscription in definition.subscriptions {
        let known = sources.iter().position(|source| source.source == subscription.source);
        let i = known.unwrap_or_else(|| {
            sources.push(Source { source: subscription.source, types: Vec::new() });
            sources.len() - 1
        });
        sources[i].types.push(subscription.event_type);
    }
    let views = definition.views.iter().map(|view| View {
        name: view.schema.name,
        columns: view
            .schema
            .columns
            .iter()
            .map(|column| Column { name: column.name, r#type: column.column_type, nullable: column.nullable })
            .collect(),
        key: view.schema.key,
        indexes: view.schema.indexes,
    });
    let manifest = Manifest {
        contract: CONTRACT,
        projection: P::NAME,
        version: P::VERSION,
        sources,
        views: views.collect(),
        batch: definition.columns,
        forgotten: definition.forgotten,
    };
    serde_json::to_string(&manifest).expect("a manifest holds nothing that JSON cannot")
}
