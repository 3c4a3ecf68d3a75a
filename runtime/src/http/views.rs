//! `GET /views` and `GET /views/{view}`.
//!
//! A reader may ask for an answer that is complete to at least a position. Waiting for it holds no connection: it
//! follows how far the runtime says that the rows are complete. What counts in the end is what the read itself finds,
//! because the view may have been switched to another generation in between: the checkpoint in its snapshot, or the
//! position to which that generation was complete before, if nothing that is wanted came after the checkpoint.

use std::io::Write as _;
use std::time::Duration;

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::http::header::{CONTENT_RANGE, CONTENT_TYPE, RETRY_AFTER, VARY};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use tokio::time::Instant;

use super::answer::{
    COMPLETE_FROM, DAMAGED, Failure, GENERATION, PREFERENCE_APPLIED, Path, Preferences, accepted, parameters,
    tell_position, wanted_position,
};
use super::{App, dialect};
use crate::config::limits;
use crate::model::Position;
use crate::supervisor::LiveView;
use crate::view::query::Select;
use crate::view::readers::{Error, Found, Place, Value};
use crate::view::render::{Bounded, JsonRows, text, write_csv, write_csv_to};

/// How often a waiting reader looks whether its view has another generation. A switch ends the old generation's
/// checkpoints, but not at once: readers still have it.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// The pause before a read is tried again that came to nothing for a reason that passes: a switch that is under way.
const PAUSE: Duration = Duration::from_millis(20);
/// How often a read is tried whose file is gone. One switch can hit it once; more is another matter.
const TRIES: usize = 5;

/// `GET /views`
pub(super) async fn list(State(app): State<App>) -> Json<Vec<serde_json::Value>> {
    let views = app.runtime.views();
    let describe = |(name, view): (&String, &LiveView)| {
        json!({
            "name": name,
            "projection": view.projection,
            "generation": view.generation,
            "position": view.reached.now(),
            "complete_from": view.reached.origin().complete_from,
            "columns": view.schema.columns,
            "key": view.schema.key,
            "indexes": view.schema.indexes,
            "rows": format!("/views/{name}"),
        })
    };
    Json(views.iter().map(describe).collect())
}

/// `GET /views/{view}`
pub(super) async fn read(
    State(app): State<App>,
    Path(name): Path<String>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let parameters = parameters(&query.unwrap_or_default())?;
    let format = Format::negotiate(&headers)?;
    let preferences = Preferences::read(&headers)?;
    let wanted = wanted_position(&headers)?;
    let http = &app.runtime.config().http;
    let wait = preferences.wait.unwrap_or(http.default_wait).min(http.max_wait);
    let deadline = Instant::now() + wait;

    let mut tries = TRIES;
    loop {
        let view = live_view(&app, &name)?;
        if let Some(wanted) = wanted {
            follow(&app, &view, wanted, deadline).await?;
        }
        // The columns may have changed with the generation.
        let mut select = dialect::parse(&view.schema, &parameters, http.max_rows).map_err(Failure::bad_request)?;
        select.count = preferences.count;
        if format == Format::Object {
            // One more than there may be, in order to know.
            select.limit = select.limit.min(2);
        }
        let answer = match Answer::read(&app, view, select, format).await {
            Err(Error::Gone) if tries > 1 => {
                tries -= 1;
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            answer => answer.map_err(failure)?,
        };
        let Some(wanted) = wanted else { return answer.respond(&preferences, None) };
        if answer.position() >= Some(wanted) {
            return answer.respond(&preferences, Some(wait));
        }
        if Instant::now() >= deadline {
            return Err(not_yet(&app, &answer.view, answer.position(), wanted, wait));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn live_view(app: &App, name: &str) -> Result<LiveView, Failure> {
    let views = app.runtime.views();
    views.get(name).cloned().ok_or_else(|| {
        let names: Vec<_> = views.keys().map(String::as_str).collect();
        Failure::not_found(match names.is_empty() {
            true => format!("there is no view {name:?}, nor any other yet; drop a module into the plugin folder"),
            false => format!("there is no view {name:?}; there are: {}", names.join(", ")),
        })
    })
}

/// Waits until the generation has come as far as wanted. Returns early if it ends, and at the deadline: what the
/// answer is complete to, the read finds out.
async fn follow(app: &App, view: &LiveView, wanted: Position, deadline: Instant) -> Result<(), Failure> {
    let mut stopping = app.stopping.clone();
    loop {
        if view.reached.now() >= Some(wanted) || Instant::now() >= deadline {
            return Ok(());
        }
        let pause = tokio::time::sleep_until(deadline.min(Instant::now() + LOOK_AGAIN));
        tokio::select! {
            () = view.reached.wait_for(wanted) => return Ok(()),
            () = pause => {}
            () = async { _ = stopping.wait_for(|stopping| *stopping).await } => {
                let message = "the runtime is stopping; ask again when it runs";
                return Err(Failure::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", message));
            }
        }
        if replaced(app, view) {
            return Ok(());
        }
    }
}

fn replaced(app: &App, view: &LiveView) -> bool {
    app.runtime.views().get(&view.schema.name).is_none_or(|now| now.generation != view.generation)
}

/// The typed answer that a view is not as far as wanted, and why.
fn not_yet(app: &App, view: &LiveView, position: Option<Position>, wanted: Position, wait: Duration) -> Failure {
    let head = app.runtime.log().head_now().last();
    let status = app.runtime.status();
    let error = status.projections.into_iter().find(|p| p.name == view.projection).and_then(|p| p.live.error);
    let why = match (head, error) {
        (None, _) => "the log has no events".into(),
        (Some(head), _) if head < wanted => format!("the log ends at position {head}"),
        (_, Some(error)) => format!("projection {:?} has stopped: {error}", view.projection),
        (_, None) => "ask again, or wait longer with the header prefer: wait=SECONDS".into(),
    };
    let message = format!(
        "view {:?} was not complete to position {wanted} within {} s; {why}",
        view.schema.name,
        wait.as_secs_f64()
    );
    Failure::new(StatusCode::PRECONDITION_FAILED, "not_yet", message)
        .position(position)
        .with("wanted", wanted)
        .header(GENERATION, HeaderValue::from(view.generation))
        .header(RETRY_AFTER, HeaderValue::from_static("1"))
}

fn failure(error: Error) -> Failure {
    let message = error.to_string();
    match error {
        Error::Refused(_) => Failure::bad_request(message),
        Error::TooSlow => Failure::new(StatusCode::SERVICE_UNAVAILABLE, "too_slow", message),
        Error::Busy => Failure::new(StatusCode::SERVICE_UNAVAILABLE, "busy", message),
        Error::Gone => Failure::new(StatusCode::SERVICE_UNAVAILABLE, "gone", message),
        Error::Damaged(_) => Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "damaged", message),
        Error::TooLarge => Failure::new(StatusCode::BAD_REQUEST, "too_large", message),
        Error::Output(_) | Error::Database(_) => Failure::internal(message),
    }
}

/// The forms in which rows are given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Json,
    Csv,
    /// PostgREST's way to say: there is one row, and I want it without the array.
    Object,
}

impl Format {
    fn negotiate(headers: &HeaderMap) -> Result<Format, Failure> {
        let accepted = accepted(headers);
        let format = accepted.iter().find_map(|media| match media.as_str() {
            "*/*" | "application/*" | "application/json" | "application/vnd.pgrst.array+json" => Some(Format::Json),
            "text/csv" | "text/*" => Some(Format::Csv),
            "application/vnd.pgrst.object+json" | "application/vnd.pgrst.object" => Some(Format::Object),
            _ => None,
        });
        format.ok_or_else(|| {
            let message = format!(
                "accept: {} is not available; there are application/json, text/csv and application/vnd.pgrst.object+json",
                accepted.join(", ")
            );
            Failure::new(StatusCode::NOT_ACCEPTABLE, "not_acceptable", message)
        })
    }

    fn content_type(self) -> &'static str {
        match self {
            Format::Json => "application/json",
            Format::Csv => "text/csv; charset=utf-8",
            Format::Object => "application/vnd.pgrst.object+json",
        }
    }
}

/// A read that succeeded.
struct Answer {
    view: LiveView,
    format: Format,
    offset: u64,
    rows: u64,
    found: Found,
    /// The rows were complete to here before they were read.
    reached: Option<Position>,
    body: Vec<u8>,
}

impl Answer {
    /// The rows are those of the checkpoint that was read with them; if nothing that the projection wants came after it,
    /// they were complete further on.
    fn position(&self) -> Option<Position> {
        self.found.checkpoint.max(self.reached)
    }

    async fn read(app: &App, view: LiveView, select: Select, format: Format) -> Result<Answer, Error> {
        let reached = view.reached.now();
        let offset = select.offset;
        let kinds = select.kinds(&view.schema);
        let names = || select.columns.iter().map(|o| o.name.as_str());
        let json = JsonRows::new(names().zip(kinds.iter().copied().map(Some)));
        let mut body = Vec::new();
        match format {
            Format::Json => body.push(b'['),
            Format::Csv => write_csv(names(), &mut body),
            Format::Object => {}
        }
        let live = app.runtime.views();
        let live = |p: &str, g: u64| live.values().any(|v| v.projection == p && v.generation == g);
        let place = Place { projection: &view.projection, generation: view.generation, file: &view.file };
        let write = move |(rows, body): &mut (u64, Vec<u8>), values: &[Value<'_>]| {
            *rows += 1;
            let mut out = Bounded::new(body, limits::ANSWER_BYTES);
            let written = if format == Format::Csv {
                write_csv_to(kinds.iter().zip(values).map(|(kind, value)| text(Some(*kind), *value)), &mut out)
            } else {
                let between: &[u8] = if *rows > 1 { b",\n" } else { b"" };
                out.write_all(between).and_then(|()| json.write_to(values, &mut out))
            };
            written.map_err(|_| Error::TooLarge)
        };
        let found = app.readers.select(place, &view.schema, select, live, (0, body), write);
        let (found, (rows, mut body)) = found.await?;
        if format == Format::Json {
            body.push(b']');
        }
        Ok(Answer { offset, view, format, rows, found, reached, body })
    }

    /// `waited` is the bound of a wait that the request asked for, so that the answer can say that it was heard.
    fn respond(self, preferences: &Preferences, waited: Option<Duration>) -> Result<Response, Failure> {
        if self.format == Format::Object && self.rows != 1 {
            let found = if self.rows == 0 { "no row matches" } else { "several rows match" };
            let message = format!("{found}, but accept: {} wants one; filter by the key", self.format.content_type());
            return Err(Failure::new(StatusCode::NOT_ACCEPTABLE, "not_one_row", message));
        }
        let total = self.found.total.map_or("*".to_owned(), |total| total.to_string());
        let range = match self.rows {
            0 => format!("*/{total}"),
            rows => format!("{}-{}/{total}", self.offset, self.offset.saturating_add(rows - 1)),
        };
        let applied: Vec<_> = [
            waited.filter(|_| preferences.wait.is_some()).map(|w| format!("wait={}", w.as_secs_f64())),
            preferences.count.then(|| "count=exact".to_owned()),
        ]
        .into_iter()
        .flatten()
        .collect();
        let mut headers = HeaderMap::new();
        let ascii = |text: String| HeaderValue::try_from(text).expect("ASCII");
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(self.format.content_type()));
        headers.insert(VARY, HeaderValue::from_static("accept"));
        headers.insert(CONTENT_RANGE, ascii(range));
        tell_position(&mut headers, self.position());
        headers.insert(GENERATION, HeaderValue::from(self.view.generation));
        let origin = self.view.reached.origin();
        if let Some(from) = origin.complete_from {
            headers.insert(COMPLETE_FROM, HeaderValue::from(from.0));
        }
        if !origin.damaged.is_empty() {
            // However many there are, a header has its limit; the status has them all.
            let shown = origin.damaged.iter().take(10).map(|(first, last)| format!("{first}-{last}"));
            headers.insert(DAMAGED, ascii(shown.collect::<Vec<_>>().join(", ")));
        }
        if !applied.is_empty() {
            headers.insert(PREFERENCE_APPLIED, ascii(applied.join(", ")));
        }
        Ok((headers, self.body).into_response())
    }
}
