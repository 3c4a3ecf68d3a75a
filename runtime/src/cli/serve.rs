//! `shadowbox run`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use shadowbox::config::{Config, limits};
use shadowbox::http;
use shadowbox::supervisor::Runtime;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::Common;

#[derive(Args)]
pub(super) struct Run {
    /// The watched folder of modules [default: ./plugins]
    #[arg(long, value_name = "DIR")]
    plugins: Option<PathBuf>,
    /// Where to listen; port 0 takes a free one [default: 127.0.0.1:7070]
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Let projections pass over parts of the log that are damaged; what they make of the rest says so for ever
    #[arg(long)]
    skip_damaged: bool,
    /// Log as JSON lines
    #[arg(long)]
    pub(super) json: bool,
}

impl Run {
    pub(super) async fn run(self, common: &Common) -> Result<()> {
        let config = common.config(|written| {
            written.plugins = self.plugins.or(written.plugins.take());
            written.listen = self.listen.or(written.listen.take());
            written.skip_damaged = self.skip_damaged;
        })?;
        let server = Server::start(config).await?;
        // Nobody may be reading. That is no reason not to serve.
        let _ = writeln!(std::io::stdout(), "listening on http://{}", server.address);
        server.until_stopped().await
    }
}

/// SIGXFSZ of Linux on all common processors.
const FILE_TOO_LARGE: i32 = 25;

/// A runtime and its HTTP server.
pub(super) struct Server {
    pub(super) runtime: Runtime,
    pub(super) address: std::net::SocketAddr,
    serving: tokio::task::JoinHandle<std::io::Result<()>>,
    stop: watch::Sender<bool>,
}

impl Server {
    pub(super) async fn start(config: Config) -> Result<Server> {
        let listen = config.listen;
        // Once it has been listened to, it kills nobody: a file beyond its limit is an error like a full disk.
        drop(signal(SignalKind::from_raw(FILE_TOO_LARGE))?);
        // First of all, so that a port that is taken stops everything before it begins.
        let listener = TcpListener::bind(listen)
            .await
            .with_context(|| format!("cannot listen on {listen}; choose another address with --listen"))?;
        let address = listener.local_addr()?;
        let runtime = Runtime::start(config).await?;
        let stop = watch::Sender::new(false);
        let mut stopped = stop.subscribe();
        let until = async move {
            // The sender lives as long as the server.
            let _ = stopped.wait_for(|stopped| *stopped).await;
        };
        let serving = tokio::spawn(http::serve(runtime.clone(), listener, until));
        runtime.announce(address)?;
        Ok(Server { runtime, address, serving, stop })
    }

    /// Serves until SIGTERM or Ctrl-C, then stops cleanly, in bounded time. A second signal ends the process at once.
    pub(super) async fn until_stopped(self) -> Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
        self.stop.send_replace(true);
        let stopped = async {
            self.runtime.shutdown().await;
            self.serving.await
        };
        tokio::select! {
            served = tokio::time::timeout(limits::SHUTDOWN, stopped) => match served {
                Ok(served) => served?.context("the server")?,
                // Every commit is atomic: what has not stopped by now loses nothing.
                Err(_) => tracing::warn!("not everything has stopped in time; leaving"),
            },
            _ = terminate.recv() => tracing::warn!("a second signal; leaving at once"),
            _ = interrupt.recv() => tracing::warn!("a second signal; leaving at once"),
        }
        Ok(())
    }
}
