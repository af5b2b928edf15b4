//! The command line interface.
//!
//! Exit codes: 0 success, 1 failure, 2 wrong command line or config; `status` also uses 3. Messages go
//! to stderr as `headworks: ...`. Output goes to stdout; with `--format json` it is one JSON object per
//! line.

mod admin_client;
mod args;
mod clients;
mod data_folder;
mod dead_letters;
mod message;
mod output;
mod passwd;
mod plugin;
mod plugin_new;
mod run;
mod status;
mod streams;
mod validate;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use output::Out;

use crate::config;
use crate::telemetry::{self, InitError};

const FAILED: u8 = 1;
const WRONG: u8 = 2;

/// Runs the whole program, except the child process that compiles plugins.
pub fn main() -> ExitCode {
    let code = run_command();
    telemetry::flush_logs();
    code
}

fn run_command() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { WRONG } else { 0 });
        }
    };
    match dispatch(cli) {
        Ok(code) => code,
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(config::Error::Invalid(problems)) = error.downcast_ref::<config::Error>() {
                let noun = if problems.len() == 1 { "problem" } else { "problems" };
                let list = problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
                output::complain(&format!(
                    "{list}\nheadworks: {} {noun} in the config, nothing was started",
                    problems.len()
                ));
                return ExitCode::from(WRONG);
            }
            output::complain(&format!("headworks: {error:#}"));
            let is_wrong = error.is::<config::Error>() || error.is::<InitError>();
            ExitCode::from(if is_wrong { WRONG } else { FAILED })
        }
    }
}

fn dispatch(cli: Cli) -> anyhow::Result<ExitCode> {
    let out = &mut Out::stdout();
    let done = match cli.command {
        Command::Status(args) => return status::status(&args, out),
        Command::Run(args) => run::run(&args, cli.log.as_deref(), cli.log_format),
        Command::Validate(args) => return validate::validate(&args, out),
        Command::Plugin(command) => plugin::plugin(command, out),
        Command::Streams(command) => streams::streams(command, out),
        Command::Clients(command) => clients::clients(command, out),
        Command::DeadLetters(command) => dead_letters::dead_letters(command, out),
        Command::Passwd(args) => passwd::passwd(&args, out),
        Command::Schema => out.json_pretty(&config::schema()),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Runs `work` on a small runtime, for commands that wait for something.
fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}
