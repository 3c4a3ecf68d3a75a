//! Events in: one CloudEvent or a batch, appended in one transaction.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde_json::{Value, json};

use super::App;
use super::answer::{Failure, POSITION, position_header};
use crate::log::{self, cloudevents};
use crate::model::{Checkpoint, NewEvent};

const ONE: &str = "application/cloudevents+json";
const BATCH: &str = "application/cloudevents-batch+json";
const EITHER: &str = "application/json";

pub(super) async fn append(
    State(app): State<App>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<([(HeaderName, HeaderValue); 1], Json<Value>), Failure> {
    let body = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            let limit = app.runtime.config().http.max_body >> 20;
            let message = format!("the body is larger than {limit} MiB (http.max_body_mb); send smaller batches");
            Failure::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
        }
        _ => Failure::bad_request(format!("the body could not be read: {}", rejection.body_text())),
    })?;
    let events = parse(&headers, &body)?;
    let log = app.runtime.log().clone();
    let appended = tokio::task::spawn_blocking(move || log.append(&events))
        .await
        .map_err(|error| Failure::internal(error.to_string()))?
        .map_err(|error| match error {
            log::Error::TooLarge { .. } => Failure::bad_request(error.to_string()),
            other => Failure::internal(other.to_string()),
        })?;
    let mut highest = Checkpoint::default();
    for event in &appended {
        if highest.get(&event.source) < Some(event.position) {
            highest.set(&event.source, event.position);
        }
    }
    let new = appended.iter().filter(|event| event.new).count();
    let positions: Vec<_> =
        (appended.iter()).map(|e| json!({ "source": e.source, "position": e.position, "appended": e.new })).collect();
    let answer = json!({ "appended": new, "already": appended.len() - new, "positions": positions });
    Ok(([(POSITION, position_header(&highest))], Json(answer)))
}

fn parse(headers: &HeaderMap, body: &[u8]) -> Result<Vec<NewEvent>, Failure> {
    let content_type = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let media = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let is_array = body.trim_ascii_start().starts_with(b"[");
    let batch = match media.as_str() {
        ONE => false,
        BATCH => true,
        EITHER => is_array,
        _ => {
            let message = format!("content-type {content_type:?} is not accepted; send {ONE}, {BATCH} or {EITHER}");
            return Err(Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
        }
    };
    if !batch {
        let event = cloudevents::parse(body, None).map_err(|error| Failure::bad_request(error.to_string()))?;
        return Ok(vec![event]);
    }
    let batch = cloudevents::split_batch(body).map_err(|error| Failure::bad_request(error.to_string()))?;
    let parse = |(i, json): (usize, &&serde_json::value::RawValue)| {
        cloudevents::parse(json.get().as_bytes(), None)
            .map_err(|error| Failure::bad_request(format!("event {i} of the batch: {error}; nothing was appended")))
    };
    batch.iter().enumerate().map(parse).collect()
}
