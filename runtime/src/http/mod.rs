//! HTTP: queries in PostgREST's dialect, events in, status. The only place that names axum.
//!
//! Every answer from a view says in `shadowbox-position` to which position of each source it is complete. A request
//! with the same header waits, bounded, until the answer is complete to there: send back what an append answered, and
//! you read your own write.

mod answer;
mod dialect;
mod ingest;
mod status;
mod views;

use std::future::Future;
use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, StatusCode, Uri};
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::CompressionLayer;

use crate::supervisor::Runtime;
use crate::view::readers::Readers;
use answer::Failure;

/// What every request needs.
#[derive(Clone)]
struct App {
    runtime: Runtime,
    readers: Arc<Readers>,
}

/// Serves until `shutdown`, then finishes the requests that are under way.
///
/// # Errors
///
/// If the listener fails.
pub async fn serve(
    runtime: Runtime,
    listener: TcpListener,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let max_body = runtime.config().http.max_body;
    let app = App { runtime, readers: Arc::default() };
    let router = Router::new()
        .route("/", get(status::index))
        .route("/views", get(views::list))
        .route("/views/{view}", get(views::select))
        .route("/events", post(ingest::append))
        .route("/projections", get(status::projections))
        .route("/projections/{name}", get(status::projection))
        .route("/projections/{name}/rebuild", post(status::rebuild))
        .route("/status", get(status::status))
        .route("/healthz", get(status::healthz))
        .route("/readyz", get(status::readyz))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(max_body))
        .layer(CompressionLayer::new())
        // A bug in one answer must not take the connection's other requests with it.
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(app);
    axum::serve(listener, router).with_graceful_shutdown(shutdown).await
}

async fn unknown_route(uri: Uri) -> Failure {
    Failure::not_found(format!("there is nothing at {:?}; GET / lists what there is", uri.path()))
}

async fn wrong_method(method: Method, uri: Uri) -> Failure {
    let message = format!("{:?} does not take {method}; GET / lists what there is", uri.path());
    Failure::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

fn panicked(_: Box<dyn std::any::Any + Send>) -> axum::response::Response {
    use axum::response::IntoResponse;
    // What it was is in the log already, from the panic hook.
    Failure::internal("a bug in shadowbox; please report it with the log").into_response()
}
