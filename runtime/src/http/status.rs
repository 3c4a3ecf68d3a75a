//! What every projection is doing; liveness and readiness; rebuilds.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::App;
use super::answer::Failure;
use crate::config::limits;
use crate::supervisor::{Error, ProjectionState, ProjectionStatus, Status};

pub(super) async fn index() -> Json<Value> {
    Json(json!({
        "GET /views": "all live views with their columns",
        "GET /views/{view}?column=eq.value&select=a,b&order=a.desc&limit=20&offset=0": "rows of a view",
        "POST /events": "append a CloudEvent, or a batch of them",
        "GET /projections": "what every projection is doing",
        "GET /projections/{name}": "what one is doing",
        "POST /projections/{name}/rebuild": "build its views again from offset zero",
        "GET /status": "projections, sources and refused modules",
        "GET /healthz": "whether this process is alive",
        "GET /readyz": "whether all views are current",
    }))
}

pub(super) async fn status(State(app): State<App>) -> Json<Status> {
    Json(app.runtime.status())
}

pub(super) async fn projections(State(app): State<App>) -> Json<Vec<ProjectionStatus>> {
    Json(app.runtime.status().projections)
}

pub(super) async fn projection(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<ProjectionStatus>, Failure> {
    let projections = app.runtime.status().projections;
    let names: Vec<_> = projections.iter().map(|p| p.name.clone()).collect();
    projections
        .into_iter()
        .find(|p| p.name == name)
        .map(Json)
        .ok_or_else(|| Failure::not_found(format!("there is no projection {name:?}; there are: {}", names.join(", "))))
}

pub(super) async fn rebuild(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<(StatusCode, Json<Value>), Failure> {
    match app.runtime.rebuild(&name).await {
        Ok(generation) => Ok((StatusCode::ACCEPTED, Json(json!({ "projection": name, "generation": generation })))),
        Err(error @ Error::UnknownProjection { .. }) => Err(Failure::not_found(error.to_string())),
        Err(error) => Err(Failure::new(StatusCode::CONFLICT, "cannot_rebuild", error.to_string())),
    }
}

/// Alive is whoever answers: rebuilding or catching up is work, not illness.
pub(super) async fn healthz() -> Json<Value> {
    Json(json!({ "status": "alive" }))
}

pub(super) async fn readyz(State(app): State<App>) -> Result<Json<Value>, Failure> {
    let status = app.runtime.status();
    let behind: Vec<Value> = status.projections.iter().filter_map(not_current).collect();
    if behind.is_empty() {
        return Ok(Json(json!({ "status": "ready" })));
    }
    let message = format!("{} projections are not current", behind.len());
    Err(Failure::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", message).with("not_current", behind))
}

/// Why the views of a projection should not be relied on, if so. A build in the shadow alone is no reason.
fn not_current(projection: &ProjectionStatus) -> Option<Value> {
    let why = match projection.state {
        ProjectionState::Live => return None,
        ProjectionState::Rebuilding | ProjectionState::CatchingUp
            if projection.live.lag_events <= limits::READY_LAG =>
        {
            return None;
        }
        ProjectionState::Rebuilding | ProjectionState::CatchingUp => "it is catching up".to_owned(),
        ProjectionState::Stopped => "its module is not in the plugin folder".to_owned(),
        ProjectionState::Faulted => projection.live.error.clone().unwrap_or_default(),
    };
    Some(json!({
        "projection": projection.name, "views": projection.views, "lag_events": projection.live.lag_events,
        "lag_seconds": projection.live.lag_seconds, "why": why,
    }))
}
