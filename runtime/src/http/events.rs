//! `POST /events`: one CloudEvent or a batch, in one transaction; or one in the binary mode, whose attributes are headers.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::header::{CONTENT_ENCODING, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::App;
use super::answer::{Failure, tell_position};
use crate::log::{self, cloudevents};
use crate::model::NewEvent;

/// `POST /events`
pub(super) async fn append(
    State(app): State<App>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Failure> {
    let form = Form::of(&headers)?;
    let body = body.map_err(|e| rejected(&e, app.runtime.config().http.max_body))?;
    let log = app.runtime.log().clone();
    let appended = tokio::task::spawn_blocking(move || {
        let events = parse(&body, form, &headers)?;
        log.append(events).map_err(|error| match error {
            log::Error::TooLarge { .. } | log::Error::Names { .. } => Failure::bad_request(error.to_string()),
            log::Error::Busy { .. } => Failure::new(StatusCode::SERVICE_UNAVAILABLE, "busy", error.to_string())
                .header(RETRY_AFTER, HeaderValue::from_static("1")),
            error => Failure::internal(format!("the append failed: {error}; send it again, nothing is appended twice")),
        })
    });
    let appended = appended.await.map_err(|e| Failure::internal(format!("the append did not finish: {e}")))??;

    let new = appended.iter().filter(|a| a.new).count();
    let positions = || appended.iter().map(|a| a.position);
    let last = positions().max();
    let body = json!({
        "appended": new,
        "duplicates": appended.len() - new,
        "first_position": positions().min(),
        "last_position": last,
        // What to wait for.
        "position": last,
    });
    let mut headers = HeaderMap::new();
    tell_position(&mut headers, last);
    Ok((headers, Json(body)).into_response())
}

/// What the headers of the binary mode begin with.
const ATTRIBUTE: &str = "ce-";

/// How events are written in a request.
#[derive(Clone, Copy)]
enum Form {
    One,
    Batch,
    /// The first byte says it.
    Either,
    Binary,
}

impl Form {
    fn of(headers: &HeaderMap) -> Result<Form, Failure> {
        let unsupported =
            |message: String| Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message);
        if let Some(encoding) = headers.get(CONTENT_ENCODING).filter(|e| *e != "identity") {
            return Err(unsupported(format!("content-encoding {encoding:?} is not understood; send the events plain")));
        }
        let content_type = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let binary = headers.keys().any(|name| name.as_str().starts_with(ATTRIBUTE));
        match content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
            // The attributes may be in headers too; the content type decides.
            "application/cloudevents+json" => Ok(Form::One),
            "application/cloudevents-batch+json" => Ok(Form::Batch),
            other if binary && !other.starts_with("application/cloudevents") => Ok(Form::Binary),
            "application/json" => Ok(Form::Either),
            other => Err(unsupported(format!(
                "content-type {other:?} is not understood; send application/cloudevents+json (one event), \
                 application/cloudevents-batch+json (an array), application/json (either), or attributes as headers, like \
                 ce-id: 1, with the data as the body"
            ))),
        }
    }
}

fn rejected(rejection: &BytesRejection, max_body: usize) -> Failure {
    match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            let message = format!(
                "the body is larger than {} MiB (http.max_body_mb); send several batches, or use shadowbox append",
                max_body >> 20
            );
            Failure::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
        }
        _ => Failure::bad_request(format!("the body cannot be read: {}", rejection.body_text())),
    }
}

fn parse(body: &[u8], form: Form, headers: &HeaderMap) -> Result<Vec<NewEvent>, Failure> {
    let one = match form {
        Form::Binary => Some(binary(body, headers)),
        Form::Either if body.trim_ascii_start().starts_with(b"[") => None,
        Form::One | Form::Either => Some(cloudevents::parse(body, None)),
        Form::Batch => None,
    };
    if let Some(event) = one {
        return Ok(vec![event.map_err(|e| Failure::bad_request(e.to_string()))?]);
    }
    let events = cloudevents::split_batch(body).map_err(|e| Failure::bad_request(e.to_string()))?;
    let parsed = events.iter().enumerate().map(|(index, raw)| {
        cloudevents::parse(raw.get().as_bytes(), None).map_err(|e| {
            let message = format!("event {index} of the batch (counted from 0): {e}; nothing was appended");
            Failure::bad_request(message).with("index", index)
        })
    });
    parsed.collect()
}

fn binary(body: &[u8], headers: &HeaderMap) -> Result<NewEvent, cloudevents::Error> {
    let attributes = headers.iter().filter_map(|(name, value)| {
        let name = name.as_str().strip_prefix(ATTRIBUTE)?;
        Some((name, value.as_bytes()))
    });
    cloudevents::parse_binary(attributes, headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes), body)
}
