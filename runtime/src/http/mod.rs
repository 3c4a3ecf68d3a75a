//! The HTTP interface: views, events in, status. The only module that names axum.
//!
//! `GET /` lists the routes. Errors are JSON, `{"error": code, "message": what to do}`, with nothing else in place of
//! it: also for unknown routes, wrong methods, hosts that are not ours, bodies that are too
//! large, requests that are no HTTP, and panics.

mod admin;
mod answer;
mod dead_letters;
mod dialect;
mod events;
mod guard;
mod views;
mod wire;

use std::any::Any;
use std::future::Future;
use std::io;
use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, StatusCode, Uri};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::CompressionLayer;

use crate::supervisor::Runtime;
use crate::view::readers::Readers;
use answer::Failure;

/// What every handler has.
#[derive(Clone)]
struct App {
    runtime: Runtime,
    readers: Arc<Readers>,
    /// True from the moment on at which the server is asked to stop: waiting readers must not hold it up.
    stopping: watch::Receiver<bool>,
}

/// Serves until `shutdown` is ready. Then no connection is taken any more, readers that wait are told so, and requests
/// that are being answered are finished.
///
/// # Errors
///
/// If the listener fails.
pub async fn serve(
    runtime: Runtime,
    listener: TcpListener,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let (stop, stopping) = watch::channel(false);
    let app = App { runtime, readers: Arc::default(), stopping };
    let shutdown = async move {
        shutdown.await;
        stop.send_replace(true);
    };
    axum::serve(wire::Listening(listener), router(app)).with_graceful_shutdown(shutdown).await
}

fn router(app: App) -> Router {
    let http = &app.runtime.config().http;
    let (max_body, hosts) = (http.max_body, Arc::from(&*http.hosts));
    Router::new()
        .route("/", get(admin::index))
        .route("/views", get(views::list))
        .route("/views/{view}", get(views::read))
        .route("/events", post(events::append))
        .route("/forget", post(admin::forget))
        .route("/forgettings", get(admin::forgettings))
        .route("/projections", get(admin::projections))
        .route("/projections/{projection}", get(admin::projection))
        .route("/projections/{projection}/rebuild", post(admin::rebuild))
        .route("/projections/{projection}/rollback", post(admin::rollback))
        .route("/projections/{projection}/promote", post(admin::promote))
        .route("/projections/{projection}/discard", post(admin::discard))
        .route("/projections/{projection}/resume", post(dead_letters::resume))
        .route("/projections/{projection}/policy", get(dead_letters::policy).put(dead_letters::set_policy))
        .route("/projections/{projection}/dead-letters", get(dead_letters::list))
        .route("/projections/{projection}/dead-letters/{number}", get(dead_letters::show))
        .route("/projections/{projection}/dead-letters/retry", post(dead_letters::retry))
        .route("/projections/{projection}/dead-letters/discard", post(dead_letters::discard))
        .route("/status", get(admin::status))
        .route("/healthz", get(admin::health))
        .route("/readyz", get(admin::ready))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        // The outermost first. Together, because each layer of a router costs every request two allocations.
        .layer((
            CompressionLayer::new(),
            CatchPanicLayer::custom(panicked),
            middleware::from_fn_with_state(hosts, guard::guard),
            DefaultBodyLimit::max(max_body),
        ))
        .with_state(app)
}

async fn unknown_route(uri: Uri) -> Failure {
    Failure::not_found(format!("there is nothing at {:?}; GET / lists the routes", uri.path()))
}

async fn wrong_method(method: Method, uri: Uri) -> Failure {
    let message = format!("{method} does not work on {:?}; GET / lists the routes", uri.path());
    Failure::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

/// The panic itself has been logged by the panic hook.
fn panicked(_: Box<dyn Any + Send + 'static>) -> Response {
    Failure::internal("an assertion failed; it is in the log; please report it").into_response()
}
