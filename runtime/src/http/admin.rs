//! What an operator and a load balancer ask: status, health, rebuild.

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use axum::http::header::LOCATION;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::App;
use super::answer::{Failure, Path};
use crate::config::limits;
use crate::log::{self, Forgetting};
use crate::supervisor::{Error, Forgotten, ProjectionState, ProjectionStatus, Status};

/// `GET /`: what there is.
pub(super) async fn index() -> Json<Value> {
    Json(json!({
        "name": "shadowbox",
        "version": env!("CARGO_PKG_VERSION"),
        "routes": {
            "GET /views": "all views: columns, key, generation, position",
            "GET /views/{view}": "rows; ?select=a,b&column=gte.5&order=a.desc&limit=20, as in PostgREST",
            "POST /events": "append one CloudEvent or a batch; answers the first and the last position",
            "POST /forget": "forget events for good; {\"source\": \"orders\", \"stream\": \"order-1\", \"by\": \"who\"}",
            "GET /forgettings": "what was forgotten, when and by whom, the newest first",
            "GET /projections": "state, position, lag and errors of all projections",
            "GET /projections/{projection}": "of one",
            "POST /projections/{projection}/rebuild": "build its views anew while the present ones go on answering",
            "POST /projections/{projection}/rollback": "go back to the former generation that is kept",
            "POST /projections/{projection}/promote": "let the generation that waits for a person take the live one's place",
            "POST /projections/{projection}/discard": "drop the generation that waits for a person",
            "POST /projections/{projection}/resume": "start a faulted projection again",
            "GET, PUT /projections/{projection}/policy": "what it does about bad events; {\"policy\": \"pause|park|skip|default\"}",
            "GET /projections/{projection}/dead-letters": "events that it could not apply; ?after=NUMBER&limit=100",
            "GET /projections/{projection}/dead-letters/{number}": "one, with backtrace and output",
            "POST /projections/{projection}/dead-letters/retry": "apply them now; {\"number\": 3}, {\"stream\": \"order-1\"} or {\"all\": true}",
            "POST /projections/{projection}/dead-letters/discard": "forget them; the same",
            "GET /status": "the log, projections, refused modules",
            "GET /healthz": "200 while the process works",
            "GET /readyz": "200 while all views are current",
        },
        "links": ["/views", "/projections", "/status", "/healthz", "/readyz"],
    }))
}

/// `GET /status`
pub(super) async fn status(State(app): State<App>) -> Json<Status> {
    Json(app.runtime.status())
}

/// `GET /projections`
pub(super) async fn projections(State(app): State<App>) -> Json<Vec<ProjectionStatus>> {
    Json(app.runtime.status().projections)
}

/// `GET /projections/{name}`
pub(super) async fn projection(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<ProjectionStatus>, Failure> {
    let projections = app.runtime.status().projections;
    let names: Vec<_> = projections.iter().map(|p| p.name.clone()).collect();
    projections.into_iter().find(|p| p.name == name).map(Json).ok_or_else(|| {
        let known =
            if names.is_empty() { "there are none yet".into() } else { format!("there are: {}", names.join(", ")) };
        Failure::not_found(Error::UnknownProjection { name, known }.to_string())
    })
}

/// `POST /projections/{name}/rebuild`
pub(super) async fn rebuild(State(app): State<App>, Path(name): Path<String>) -> Result<Response, Failure> {
    begun(&name, app.runtime.rebuild(&name).await)
}

/// `POST /projections/{name}/rollback`
pub(super) async fn rollback(State(app): State<App>, Path(name): Path<String>) -> Result<Response, Failure> {
    begun(&name, app.runtime.rollback(&name).await)
}

/// `POST /projections/{name}/promote`
pub(super) async fn promote(State(app): State<App>, Path(name): Path<String>) -> Result<Response, Failure> {
    begun(&name, app.runtime.promote(&name, true).await)
}

/// `POST /projections/{name}/discard`
pub(super) async fn discard(State(app): State<App>, Path(name): Path<String>) -> Result<Response, Failure> {
    begun(&name, app.runtime.promote(&name, false).await)
}

/// What is to be forgotten.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Forget {
    source: String,
    stream: Option<String>,
    id: Option<String>,
    #[serde(default)]
    stream_name: bool,
    by: Option<String>,
    reason: Option<String>,
}

/// `POST /forget`
pub(super) async fn forget(
    State(app): State<App>,
    body: Result<Json<Forget>, JsonRejection>,
) -> Result<Json<Forgotten>, Failure> {
    let Json(Forget { source, stream, id, stream_name, by, reason }) =
        body.map_err(|error| Failure::bad_request(format!("the request cannot be read: {}", error.body_text())))?;
    let by = by.unwrap_or_else(|| "somebody over http".into());
    let request = log::Request { source, stream, id, names: stream_name, by, reason };
    let done = app.runtime.forget(request).await.map_err(|error| match error {
        Error::Log(log::Error::Request { reason }) => Failure::bad_request(reason),
        Error::Log(error @ log::Error::Uncleared { .. }) => {
            Failure::new(StatusCode::SERVICE_UNAVAILABLE, "uncleared", error.to_string())
        }
        Error::Log(log::Error::File { error, .. }) if error.kind() == std::io::ErrorKind::TimedOut => {
            Failure::new(StatusCode::SERVICE_UNAVAILABLE, "busy", error.to_string())
        }
        error => Failure::internal(format!("it may have begun, and goes on when it is asked for again: {error}")),
    })?;
    Ok(Json(done))
}

/// `GET /forgettings`
pub(super) async fn forgettings(State(app): State<App>) -> Result<Json<Vec<Forgetting>>, Failure> {
    let log = app.runtime.log().clone();
    let read = tokio::task::spawn_blocking(move || log.forgettings(limits::FORGETTINGS_LISTED)).await;
    let read = read.map_err(|error| Failure::internal(error.to_string()))?;
    read.map(Json).map_err(|error| Failure::internal(error.to_string()))
}

/// What the runtime refuses, as an answer.
pub(super) fn failure(error: Error) -> Failure {
    match &error {
        Error::UnknownProjection { .. } => Failure::not_found(error.to_string()),
        _ => Failure::new(StatusCode::CONFLICT, "conflict", error.to_string()),
    }
}

/// The generation that is on its way now.
fn begun(name: &str, generation: Result<u64, Error>) -> Result<Response, Failure> {
    let generation = generation.map_err(failure)?;
    let location = format!("/projections/{name}");
    let body = Json(json!({"projection": name, "generation": generation}));
    Ok((StatusCode::ACCEPTED, [(LOCATION, location)], body).into_response())
}

/// `GET /healthz`: the process answers. A projection that has stopped, or one that catches up, is no reason to kill it.
pub(super) async fn health() -> Json<Value> {
    Json(json!({"healthy": true}))
}

/// `GET /readyz`: whether readers get current rows here.
pub(super) async fn ready(State(app): State<App>) -> Result<Json<Value>, Failure> {
    let behind = not_current(&app.runtime.status());
    if behind.is_empty() {
        return Ok(Json(json!({"ready": true})));
    }
    let names: Vec<_> = behind.iter().filter_map(|b| b["view"].as_str()).collect();
    let message = format!("not current: {}; see \"views\" for the reasons, or run shadowbox status", names.join(", "));
    Err(Failure::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", message).with("views", behind))
}

/// The views that are not current, by how much, and why.
fn not_current(status: &Status) -> Vec<Value> {
    let mut views = Vec::new();
    for projection in &status.projections {
        let Some(reason) = why_not_current(projection) else { continue };
        for view in &projection.views {
            views.push(json!({
                "view": view,
                "projection": projection.name,
                "state": projection.state,
                "lag_events": projection.live.lag_events,
                "lag_seconds": projection.live.lag_seconds,
                "reason": reason,
            }));
        }
    }
    views
}

fn why_not_current(projection: &ProjectionStatus) -> Option<String> {
    let error = || projection.live.error.clone();
    match projection.state {
        ProjectionState::Live => None,
        // The generation that readers see decides, not the one that is being built.
        ProjectionState::Rebuilding
            if projection.live.error.is_none() && projection.live.lag_events <= limits::READY_LAG =>
        {
            None
        }
        ProjectionState::Rebuilding => Some(error().unwrap_or_else(|| "the live generation is behind".into())),
        ProjectionState::CatchingUp => Some("it is catching up with the log".into()),
        ProjectionState::Stalled => Some(error().unwrap_or_else(|| "it makes no progress".into())),
        ProjectionState::Faulted => Some(error().unwrap_or_else(|| "the projection has stopped by a fault".into())),
        // Its views stay readable as they are, because somebody took the module away. That is a decision, no outage.
        ProjectionState::Stopped if projection.file.is_none() => None,
        ProjectionState::Stopped => Some(error().unwrap_or_else(|| "the projection is stopped".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Policy;
    use crate::supervisor::{GenerationStatus, LogStatus, MadeFrom};
    use crate::view::LetterCounts;

    #[test]
    fn readiness_depends_on_what_readers_see() {
        use ProjectionState::*;
        for (state, lag, file, error, ready) in [
            (Live, 3, true, None, true),
            (Rebuilding, 0, true, None, true),
            (Rebuilding, limits::READY_LAG + 1, true, None, false),
            (Rebuilding, 0, true, Some("trapped"), false),
            (CatchingUp, 10, true, None, false),
            (Stalled, 1, true, Some("no progress for 30 s"), false),
            (Faulted, 0, true, Some("trapped"), false),
            (Stopped, 10, false, None, true),
            (Stopped, 10, true, None, false),
        ] {
            let live = GenerationStatus {
                generation: 1,
                version: 1,
                module_hash: String::new(),
                position: None,
                lag_events: lag,
                lag_seconds: 0.0,
                rate: 0.0,
                error: error.map(str::to_owned),
                fault: None,
                dead_letters: LetterCounts::default(),
                made_from: MadeFrom::default(),
            };
            let file = file.then(|| "p.wasm".to_owned());
            let (name, views) = ("p".to_owned(), vec!["v".to_owned()]);
            let policy = Policy::Pause;
            let (building, rolled_back_from, waits) = (None, None, None);
            let projection =
                ProjectionStatus { name, state, file, views, policy, live, building, rolled_back_from, waits };
            let log =
                LogStatus { identity: "log".into(), head: None, appended: None, sources: 0, types: 0, error: None };
            let status = Status { log, projections: vec![projection], refused: Vec::new() };
            assert_eq!(not_current(&status).is_empty(), ready, "{state:?} {lag} {error:?}");
        }
    }
}
