//! The command line of Shadowbox: parse, do, say what went wrong, exit code.

#![expect(clippy::print_stderr, reason = "printing is what a command line is for")]

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    cli::log_to_stderr(&cli);
    let failure = cli.exit_code_of_errors();
    let runtime = tokio::runtime::Runtime::new().expect("threads can be started");
    let result = runtime.block_on(cli::run(cli));
    // Threads that wait for files or sockets need not be waited for: everything that counts is committed.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        // Whoever read our output has had enough.
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // It may name what somebody else wrote.
            eprintln!("shadowbox: {}", cli::text::lines(&format!("{error:#}")));
            failure
        }
    }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let kinds = error.chain().filter_map(|e| e.downcast_ref::<std::io::Error>());
    kinds.into_iter().any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
