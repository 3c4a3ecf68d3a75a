//! What an operator does about bad events: policy, resume, dead letters.

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Query, State};
use serde::Deserialize;
use serde_json::{Value, json};

use super::App;
use super::admin::failure;
use super::answer::{Failure, Path};
use crate::config::{Policy, limits};
use crate::supervisor::{Outcome, PolicyStatus, Treatment};
use crate::view::{self, DeadLetter, DeadLetters, LetterCounts, Selector};

/// `POST /projections/{projection}/resume`
pub(super) async fn resume(State(app): State<App>, Path(name): Path<String>) -> Result<Json<Value>, Failure> {
    app.runtime.resume(&name).await.map_err(failure)?;
    Ok(Json(json!({"projection": name, "resumed": true})))
}

/// `GET /projections/{projection}/policy`
pub(super) async fn policy(State(app): State<App>, Path(name): Path<String>) -> Result<Json<PolicyStatus>, Failure> {
    app.runtime.policy(&name).map(Json).map_err(failure)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenPolicy {
    policy: String,
}

/// `PUT /projections/{projection}/policy`
pub(super) async fn set_policy(
    State(app): State<App>,
    Path(name): Path<String>,
    body: Result<Json<WrittenPolicy>, JsonRejection>,
) -> Result<Json<PolicyStatus>, Failure> {
    let Json(WrittenPolicy { policy }) =
        body.map_err(|e| Failure::bad_request(format!("send {{\"policy\": \"park\"}}: {}", e.body_text())))?;
    let policy: Option<Policy> = match policy.as_str() {
        "default" => None,
        written => {
            let unknown = |e| Failure::bad_request(format!("{e}, or default for what the configuration says"));
            Some(written.parse().map_err(unknown)?)
        }
    };
    app.runtime.set_policy(&name, policy).await.map(Json).map_err(failure)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Page {
    #[serde(default)]
    after: u64,
    limit: Option<u64>,
}

/// `GET /projections/{projection}/dead-letters`: in order, without backtraces and outputs.
pub(super) async fn list(
    State(app): State<App>,
    Path(name): Path<String>,
    page: Result<Query<Page>, QueryRejection>,
) -> Result<Json<Value>, Failure> {
    let Query(page) = page.map_err(|e| Failure::bad_request(format!("the query cannot be read: {}", e.body_text())))?;
    let limit = page.limit.unwrap_or(limits::DEAD_LETTERS_LISTED).min(limits::DEAD_LETTERS_LISTED);
    let (counts, mut letters): (LetterCounts, Vec<DeadLetter>) =
        read(&app, &name, move |letters| Ok((letters.counts()?, letters.list(page.after, limit)?))).await?;
    for cause in letters.iter_mut().filter_map(|letter| letter.cause.as_mut()) {
        (cause.backtrace, cause.output) = (None, None);
    }
    Ok(Json(json!({"parked": counts.parked, "skipped": counts.skipped, "dead_letters": letters})))
}

/// `GET /projections/{projection}/dead-letters/{number}`
pub(super) async fn show(
    State(app): State<App>,
    Path((name, number)): Path<(String, u64)>,
) -> Result<Json<DeadLetter>, Failure> {
    let letter = read(&app, &name, move |letters| letters.get(number)).await?;
    let none = || Failure::not_found(format!("projection {name:?} has no dead letter {number}"));
    letter.map(Json).ok_or_else(none)
}

async fn read<T: Send + 'static>(
    app: &App,
    projection: &str,
    read: impl FnOnce(&DeadLetters) -> Result<T, view::Error> + Send + 'static,
) -> Result<T, Failure> {
    let live = app.runtime.live(projection).map_err(failure)?;
    let read = tokio::task::spawn_blocking(move || DeadLetters::open(&live.file).and_then(|letters| read(&letters)));
    let done = read.await.map_err(|e| Failure::internal(format!("the read did not finish: {e}")))?;
    done.map_err(|error| Failure::internal(error.to_string()))
}

/// Which letters are meant, as it is written: exactly one of number, stream and all.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenSelector {
    number: Option<u64>,
    source: Option<String>,
    stream: Option<String>,
    #[serde(default)]
    all: bool,
}

impl WrittenSelector {
    fn selector(self) -> Option<Selector> {
        match self {
            WrittenSelector { number: Some(number), source: None, stream: None, all: false } => {
                Some(Selector::Number(number))
            }
            WrittenSelector { number: None, source, stream: Some(stream), all: false } => {
                Some(Selector::Stream { source, stream })
            }
            WrittenSelector { number: None, source: None, stream: None, all: true } => Some(Selector::All),
            _ => None,
        }
    }
}

/// `POST /projections/{projection}/dead-letters/retry`
pub(super) async fn retry(
    State(app): State<App>,
    Path(name): Path<String>,
    body: Result<Json<WrittenSelector>, JsonRejection>,
) -> Result<Json<Outcome>, Failure> {
    treat(&app, &name, Treatment::Retry, body).await
}

/// `POST /projections/{projection}/dead-letters/discard`
pub(super) async fn discard(
    State(app): State<App>,
    Path(name): Path<String>,
    body: Result<Json<WrittenSelector>, JsonRejection>,
) -> Result<Json<Outcome>, Failure> {
    treat(&app, &name, Treatment::Discard, body).await
}

async fn treat(
    app: &App,
    projection: &str,
    treatment: Treatment,
    body: Result<Json<WrittenSelector>, JsonRejection>,
) -> Result<Json<Outcome>, Failure> {
    let usage = "say which: {\"number\": 3}, {\"stream\": \"order-1\", \"source\": \"orders\"} or {\"all\": true}";
    let Json(written) = body.map_err(|e| Failure::bad_request(format!("{usage}; {}", e.body_text())))?;
    let selector = written.selector().ok_or_else(|| Failure::bad_request(usage))?;
    // That some have failed again is no error: it is what the request was to find out.
    app.runtime.treat(projection, treatment, selector).await.map(Json).map_err(failure)
}
