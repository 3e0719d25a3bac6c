//! The `xenith` program: a pool's controller, a host's agent, or a whole lab of both.
//!
//! Here the crates meet: configuration becomes components, components are wired, signals end them. What calls mean is
//! in `controller`, how they come in is in `gateway`, how domains run is in `member-agent`.

mod cli;
mod config;
mod daemon;
mod lab;
mod telemetry;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser};

use crate::cli::{Cli, Command, Shell};

/// A controller's work is small pieces of memory that one thread makes and another gives back.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Controller(flags) if flags.witness => daemon::witness(&flags),
        Command::Controller(flags) => daemon::controller(&flags.daemon),
        Command::Agent(flags) => daemon::agent(&flags),
        Command::Lab(command) => lab::run(&command),
        Command::Completions { shell } => print(&completions(shell)),
        Command::Coverage => print(&controller::coverage::document()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xenith: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn completions(shell: Shell) -> String {
    let mut text = Vec::new();
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    clap_complete::generate(shell, &mut Cli::command(), "xenith", &mut text);
    String::from_utf8_lossy(&text).into_owned()
}

fn print(text: &str) -> anyhow::Result<()> {
    std::io::stdout().lock().write_all(text.as_bytes()).context("cannot write to standard output")
}
