//! Queries.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::header::{CONTENT_RANGE, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::App;
use super::answer::{
    Failure, GENERATION, POSITION, PREFERENCE_APPLIED, Preferences, accepted, position_header, wanted_position,
};
use super::dialect;
use crate::config::limits;
use crate::model::Checkpoint;
use crate::supervisor::LiveView;
use crate::view::query::Select;
use crate::view::readers::{Error, Found, Place};
use crate::view::render::{JsonRows, text, write_csv};

/// All live views.
pub(super) async fn list(State(app): State<App>) -> Json<Vec<Value>> {
    let views = app.runtime.views();
    let describe = |view: &LiveView| {
        json!({
            "name": view.schema.name, "columns": view.schema.columns, "key": view.schema.key,
            "projection": view.projection, "generation": view.generation,
            "position": *view.checkpoint.borrow().clone(),
        })
    };
    Json(views.values().map(describe).collect())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Array,
    Object,
    Csv,
}

const OBJECT: &str = "application/vnd.pgrst.object+json";

fn shape(headers: &HeaderMap) -> Result<Shape, Failure> {
    let shape = accepted(headers).into_iter().find_map(|media| match media.as_str() {
        "application/json" | "application/*" | "*/*" => Some(Shape::Array),
        "text/csv" | "text/*" => Some(Shape::Csv),
        OBJECT => Some(Shape::Object),
        _ => None,
    });
    let refused = || {
        let message = format!("none of the accepted types is there; accept application/json, text/csv or {OBJECT}");
        Failure::new(StatusCode::NOT_ACCEPTABLE, "not_acceptable", message)
    };
    shape.ok_or_else(refused)
}

/// `GET /views/{view}`
pub(super) async fn select(
    State(app): State<App>,
    Path(name): Path<String>,
    Query(parameters): Query<Vec<(String, String)>>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let shape = shape(&headers)?;
    let preferences = Preferences::read(&headers)?;
    let wanted = wanted_position(&headers)?;
    let limits = app.runtime.config().http;
    let wait = preferences.wait.unwrap_or(limits.default_wait).min(limits.max_wait);
    let deadline = Instant::now() + wait;
    // Again if a generation was promoted and the former one dropped in the middle of it.
    for _ in 0..3 {
        let view = find(&app, &name)?;
        if let Some(wanted) = &wanted {
            wait_for(&view, wanted, deadline).await?;
        }
        let mut select = dialect::parse(&view.schema, &parameters, limits.max_rows).map_err(Failure::bad_request)?;
        select.count = preferences.count;
        let read = match read(&app, &view, &select, shape).await {
            Err(Error::Gone) => continue,
            read => read.map_err(failed)?,
        };
        // Another generation may be live by now, but this one was read, so this one has to have it.
        if wanted.as_ref().is_some_and(|wanted| !read.found.checkpoint.covers(wanted, |_| true)) {
            continue;
        }
        return answer(&view, &select, shape, &preferences, read);
    }
    Err(Failure::internal(format!("view {name:?} changed again and again while it was read; ask again")))
}

fn find(app: &App, name: &str) -> Result<LiveView, Failure> {
    let views = app.runtime.views();
    views.get(name).cloned().ok_or_else(|| {
        let names: Vec<_> = views.keys().map(String::as_str).collect();
        let known =
            if names.is_empty() { "there are none yet".into() } else { format!("there are: {}", names.join(", ")) };
        Failure::not_found(format!("there is no view {name:?}; {known}"))
    })
}

/// Waits until the view is complete to a position. Nothing of a database is held meanwhile.
async fn wait_for(view: &LiveView, wanted: &Checkpoint, deadline: Instant) -> Result<(), Failure> {
    if let Some((source, _)) = wanted.iter().find(|(source, _)| !view.sources.iter().any(|s| s == source)) {
        let message = format!(
            "view {:?} does not depend on source {source:?}; it depends on {}",
            view.schema.name,
            view.sources.join(", ")
        );
        return Err(Failure::bad_request(message));
    }
    let mut checkpoint = view.checkpoint.clone();
    let reached = checkpoint.wait_for(|now| now.covers(wanted, |_| true));
    match tokio::time::timeout_at(deadline, reached).await {
        Ok(Ok(_)) => Ok(()),
        // The generation was replaced and dropped; whoever asked looks for the view again.
        Ok(Err(_)) => Ok(()),
        Err(_) => {
            let now = view.checkpoint.borrow().clone();
            let message = format!(
                "view {:?} is not complete to {wanted} yet; ask again, or wait longer with prefer: wait=SECONDS",
                view.schema.name
            );
            Err(Failure::new(StatusCode::PRECONDITION_FAILED, "not_yet", message)
                .with("position", &*now)
                .with("wanted", wanted)
                .header(POSITION, position_header(&now))
                .header(RETRY_AFTER, HeaderValue::from_static("1")))
        }
    }
}

/// The rows, rendered.
struct Rows {
    body: Vec<u8>,
    count: u64,
    found: Found,
}

async fn read(app: &App, view: &LiveView, select: &Select, shape: Shape) -> Result<Rows, Error> {
    let kinds = select.kinds(&view.schema);
    let columns = select.columns.iter().zip(&kinds).map(|(column, kind)| (column.name.as_str(), Some(*kind)));
    let json = JsonRows::new(columns);
    let (mut body, mut count) = (Vec::new(), 0);
    match shape {
        Shape::Csv => write_csv(select.columns.iter().map(|column| column.name.as_str()), &mut body),
        Shape::Array => body.push(b'['),
        Shape::Object => {}
    }
    let place = Place { projection: &view.projection, generation: view.generation, file: &view.file };
    let live = app.runtime.views();
    let is_live = |projection: &str, n: u64| live.values().any(|v| v.projection == projection && v.generation == n);
    let row = |values: &[crate::view::readers::Value<'_>]| {
        match shape {
            Shape::Csv => {
                let fields = values.iter().zip(&kinds).map(|(value, kind)| text(Some(*kind), *value));
                write_csv(fields, &mut body);
            }
            Shape::Array | Shape::Object => {
                if count > 0 {
                    body.extend_from_slice(b",\n");
                }
                json.write(values, &mut body);
            }
        }
        count += 1;
        if body.len() > limits::ANSWER_BYTES { Err(Error::TooLarge) } else { Ok(()) }
    };
    let found = app.readers.select(place, &view.schema, select, is_live, row).await?;
    if shape == Shape::Array {
        body.extend_from_slice(b"]\n");
    }
    Ok(Rows { body, count, found })
}

fn failed(error: Error) -> Failure {
    let message = error.to_string();
    match error {
        Error::Refused(_) => Failure::bad_request(message),
        Error::TooLarge => Failure::bad_request(message),
        Error::TooSlow => Failure::new(StatusCode::GATEWAY_TIMEOUT, "too_slow", message),
        Error::Busy => Failure::new(StatusCode::SERVICE_UNAVAILABLE, "busy", message),
        Error::Gone | Error::Output(_) | Error::Database(_) => Failure::internal(message),
    }
}

fn answer(
    view: &LiveView,
    select: &Select,
    shape: Shape,
    preferences: &Preferences,
    rows: Rows,
) -> Result<Response, Failure> {
    if shape == Shape::Object && rows.count != 1 {
        let message = format!("{OBJECT} is for exactly one row; the query has {}", rows.count);
        return Err(Failure::new(StatusCode::NOT_ACCEPTABLE, "not_one_row", message));
    }
    let media = match shape {
        Shape::Array => "application/json; charset=utf-8",
        Shape::Object => OBJECT,
        Shape::Csv => "text/csv; charset=utf-8",
    };
    let total = rows.found.total.map_or_else(|| "*".to_owned(), |total| total.to_string());
    let range = match rows.count {
        0 => format!("*/{total}"),
        count => format!("{}-{}/{total}", select.offset, select.offset + count - 1),
    };
    let header = |text: String| HeaderValue::try_from(text).expect("ASCII");
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(media));
    headers.insert(CONTENT_RANGE, header(range));
    headers.insert(POSITION, position_header(&rows.found.checkpoint));
    headers.insert(GENERATION, header(view.generation.to_string()));
    let applied = [
        preferences.wait.map(|wait: Duration| format!("wait={}", wait.as_secs_f64())),
        preferences.count.then(|| "count=exact".to_owned()),
    ];
    let applied = applied.into_iter().flatten().collect::<Vec<_>>().join(", ");
    if !applied.is_empty() {
        headers.insert(PREFERENCE_APPLIED, header(applied));
    }
    Ok((headers, rows.body).into_response())
}
