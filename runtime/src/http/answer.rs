//! What answers have in common: errors in JSON, the headers that carry positions, a reader's preferences.

use std::borrow::Cow;
use std::time::Duration;

use axum::Json;
use axum::extract::{self, FromRequestParts};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use percent_encoding::percent_decode_str;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::model::Position;

/// The position to which an answer is complete, or, in a request, is to be complete.
pub(super) const POSITION: HeaderName = HeaderName::from_static("shadowbox-position");
/// The generation that an answer was read from.
pub(super) const GENERATION: HeaderName = HeaderName::from_static("shadowbox-generation");
/// Before this position events have come without their content, since their source keeps it no longer.
pub(super) const COMPLETE_FROM: HeaderName = HeaderName::from_static("shadowbox-complete-from");
/// Stretches of the log that could not be read, and were passed over.
pub(super) const DAMAGED: HeaderName = HeaderName::from_static("shadowbox-damaged");
const PREFER: HeaderName = HeaderName::from_static("prefer");
pub(super) const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");

/// An answer that is an error: `{"error": code, "message": ...}` and what else a program may want to know.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) status: StatusCode,
    body: Value,
    /// Boxed, because results are moved around a lot, and seldom are errors.
    headers: Box<HeaderMap>,
}

impl Failure {
    /// `code` is for programs and never changes; `message` is for people and says what to do.
    pub(super) fn new(status: StatusCode, code: &str, message: impl Into<String>) -> Failure {
        Failure { status, body: json!({"error": code, "message": message.into()}), headers: Box::default() }
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Failure {
        Failure::new(StatusCode::BAD_REQUEST, "bad_request", message)
    }

    pub(super) fn not_found(message: impl Into<String>) -> Failure {
        Failure::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// For what is our fault. The cause goes to the log, too.
    pub(super) fn internal(message: impl Into<String>) -> Failure {
        let message = message.into();
        tracing::error!(message, "a request failed");
        Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }

    /// Adds a field to the body.
    pub(super) fn with(mut self, field: &str, value: impl serde::Serialize) -> Failure {
        self.body[field] = serde_json::to_value(value).expect("plain data");
        self
    }

    /// Says to which position the answer would have been complete.
    pub(super) fn position(mut self, position: Option<Position>) -> Failure {
        tell_position(&mut self.headers, position);
        self.with("position", position)
    }

    /// Adds a header.
    pub(super) fn header(mut self, name: HeaderName, value: HeaderValue) -> Failure {
        self.headers.insert(name, value);
        self
    }
}

/// What stands in the path of a request. What cannot be read of it is a [`Failure`].
pub(super) struct Path<T>(pub(super) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Path<T>, Failure> {
        match extract::Path::from_request_parts(parts, state).await {
            Ok(extract::Path(value)) => Ok(Path(value)),
            Err(rejection) => {
                let (path, why) = (parts.uri.path(), rejection.body_text());
                Err(Failure::bad_request(format!("the path {path:?} cannot be read: {why}")))
            }
        }
    }
}

/// The parameters of a URL's query, in their order. What is not UTF-8 is refused, and not guessed.
pub(super) fn parameters(query: &str) -> Result<Vec<(String, String)>, Failure> {
    let decode = |text: &str| {
        let text = text.replace('+', " ");
        let decoded = percent_decode_str(&text).decode_utf8().map(Cow::into_owned);
        decoded.map_err(|_| Failure::bad_request(format!("{text:?} in the query is not UTF-8 when it is decoded")))
    };
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.map(|(name, value)| Ok((decode(name)?, decode(value)?))).collect()
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, *self.headers, Json(self.body)).into_response()
    }
}

/// Says in an answer to which position it is complete; nothing, if it is to none.
pub(super) fn tell_position(headers: &mut HeaderMap, position: Option<Position>) {
    if let Some(position) = position {
        headers.insert(POSITION, HeaderValue::from(position.0));
    }
}

/// The position that a request asks for. An empty header asks for none.
pub(super) fn wanted_position(headers: &HeaderMap) -> Result<Option<Position>, Failure> {
    let Some(value) = headers.get(POSITION).filter(|v| !v.is_empty()) else { return Ok(None) };
    let text = value.to_str().map_err(|_| Failure::bad_request("the header shadowbox-position is not ASCII"))?;
    text.parse().map(Some).map_err(|e| Failure::bad_request(format!("the header shadowbox-position: {e}")))
}

/// What a request prefers (RFC 7240). Preferences that we do not know are ignored, as the RFC wants it.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Preferences {
    /// `wait=SECONDS`: how long to wait for a position.
    pub(super) wait: Option<Duration>,
    /// `count=exact`: count all rows.
    pub(super) count: bool,
}

impl Preferences {
    pub(super) fn read(headers: &HeaderMap) -> Result<Preferences, Failure> {
        let mut preferences = Preferences::default();
        let values = headers.get_all(PREFER).into_iter().filter_map(|v| v.to_str().ok());
        for preference in values.flat_map(|v| v.split(',')) {
            // Parameters of a preference come after a semicolon; we know none.
            let token = preference.split(';').next().unwrap_or_default();
            let (name, value) = token.split_once('=').unwrap_or((token, ""));
            let value = value.trim().trim_matches('"');
            match name.trim().to_ascii_lowercase().as_str() {
                "wait" => {
                    let seconds = value.parse().ok().and_then(|s| Duration::try_from_secs_f64(s).ok());
                    preferences.wait = Some(seconds.ok_or_else(|| {
                        Failure::bad_request(format!("prefer: wait={value} is not valid; write seconds, like wait=5"))
                    })?);
                }
                "count" if value == "exact" => preferences.count = true,
                _ => {}
            }
        }
        Ok(preferences)
    }
}

/// The media types of an `Accept` header, best first. Without one everything is fine.
pub(super) fn accepted(headers: &HeaderMap) -> Vec<String> {
    let values: Vec<_> =
        headers.get_all(axum::http::header::ACCEPT).into_iter().filter_map(|v| v.to_str().ok()).collect();
    if values.is_empty() {
        return vec!["*/*".into()];
    }
    let mut types: Vec<(f32, String)> = (values.iter().flat_map(|v| v.split(',')))
        .map(|range| {
            let mut parts = range.split(';').map(str::trim);
            let media = parts.next().unwrap_or_default().to_ascii_lowercase();
            let quality = parts.find_map(|p| p.strip_prefix("q=")).and_then(|q| q.parse().ok()).unwrap_or(1.0);
            (quality, media)
        })
        .filter(|(quality, media)| *quality > 0.0 && !media.is_empty())
        .collect();
    types.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    types.into_iter().map(|(_, media)| media).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preferences() {
        let read = |values: &[&'static str]| {
            let headers = values.iter().map(|v| (PREFER, HeaderValue::from_static(v))).collect();
            Preferences::read(&headers)
        };
        let expected = Preferences { wait: Some(Duration::from_millis(1500)), count: true };
        assert_eq!(read(&["return=minimal, Wait=1.5;x=y", "count=\"exact\""]).unwrap(), expected);
        assert_eq!(read(&[]).unwrap(), Preferences::default());
        assert_eq!(read(&["count=planned"]).unwrap(), Preferences::default());
        for bad in ["wait=soon", "wait=-1", "wait"] {
            assert_eq!(read(&[bad]).unwrap_err().status, StatusCode::BAD_REQUEST, "{bad}");
        }
    }

    #[test]
    fn parameters_are_utf8() {
        let pairs = parameters("a=b+c&&d&e=%C3%a4%26=%2B&e=%zz").unwrap();
        let pairs: Vec<_> = pairs.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(pairs, [("a", "b c"), ("d", ""), ("e", "ä&=+"), ("e", "%zz")]);
        for bad in ["a=eq.%ff", "%C3=eq.1"] {
            assert_eq!(parameters(bad).unwrap_err().status, StatusCode::BAD_REQUEST, "{bad}");
        }
    }

    #[test]
    fn accept_is_in_order_of_preference() {
        for (value, expected) in [
            ("text/csv", vec!["text/csv"]),
            ("text/html;q=0.5, application/json;charset=utf-8;q=0.9, */*;q=0", vec!["application/json", "text/html"]),
        ] {
            let headers = [(axum::http::header::ACCEPT, HeaderValue::from_static(value))].into_iter().collect();
            assert_eq!(accepted(&headers), expected);
        }
        assert_eq!(accepted(&HeaderMap::new()), ["*/*"]);
    }
}
