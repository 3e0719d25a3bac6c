//! The command line: what can be asked of the program, with an example for each.
//!
//! Standard output is for answers (JSON, shell completions, the coverage table); progress, logs and errors go to
//! standard error.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::telemetry::LogFormat;

/// One XenAPI pool from many hosts, with no single master to lose.
#[derive(Parser, Debug)]
#[command(
    name = "xenith",
    version,
    about,
    after_help = "Examples:\n  \
        xenith lab up --dir /tmp/pool            three hosts on this machine, one pool\n  \
        xenith controller --config /etc/xenith/controller.toml\n  \
        xenith agent --config /etc/xenith/agent.toml\n\n\
        Logs go to standard error; XENITH_LOG=debug (or RUST_LOG) says how much."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the program can be.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run the pool controller of this host: Raft member, pool logic, XenAPI gateway
    #[command(after_help = "Examples:\n  \
        xenith controller --config /etc/xenith/controller.toml --check\n  \
        XENITH_LOG=info,raft_store=debug xenith controller --config /etc/xenith/controller.toml\n  \
        xenith controller --witness --join 192.0.2.11 --config /etc/xenith/witness.toml\n\n\
        Ends cleanly on SIGTERM or SIGINT: hands mastership to another host first. A second signal ends it at once.")]
    Controller(ControllerFlags),
    /// Run the agent of this host: its domains, driven for the pool's master
    #[command(after_help = "Examples:\n  \
        xenith agent --config /etc/xenith/agent.toml --check\n  \
        xenith agent --config /etc/xenith/agent.toml --log-format json\n\n\
        Ends cleanly on SIGTERM or SIGINT. Domains go on running and are found again at the next start.")]
    Agent(Daemon),
    /// Run a whole pool on this machine, one loopback address for each host
    #[command(
        subcommand,
        after_help = "Examples:\n  \
        xenith lab up --dir /tmp/pool --hosts 3 --driver sim\n  \
        xenith lab kill --dir /tmp/pool host1\n  \
        xenith lab start --dir /tmp/pool host1\n  \
        xenith lab down --dir /tmp/pool\n\n\
        Every subcommand prints the state of the lab as JSON on standard output."
    )]
    Lab(Lab),
    /// Print shell completions
    #[command(after_help = "Example:\n  \
        xenith completions bash > ~/.local/share/bash-completion/completions/xenith")]
    Completions {
        /// The shell to write for.
        shell: Shell,
    },
    /// Print the table of XenAPI calls and which of them are there
    #[command(hide = true)]
    Coverage,
}

/// Shells that completions are made for.
#[derive(ValueEnum, Clone, Copy, Debug)]
pub enum Shell {
    /// GNU bash.
    Bash,
    /// Z shell.
    Zsh,
    /// fish.
    Fish,
}

/// How a daemon is started.
#[derive(Args, Debug)]
pub struct Daemon {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Read and check the configuration, say what is wrong with it, and end
    #[arg(long)]
    pub check: bool,
    /// How log lines look (default: as configured, else text)
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// How a controller is started.
#[derive(Args, Debug)]
pub struct ControllerFlags {
    /// The daemon.
    #[command(flatten)]
    pub daemon: Daemon,
    /// Be the third vote of a pool of two hosts, and nothing else; the configuration is a witness.toml
    #[arg(long)]
    pub witness: bool,
    /// Master of the pool that a new witness asks for its vote; root's password is in XENITH_ROOT_PASSWORD
    #[arg(long, value_name = "ADDRESS", requires = "witness")]
    pub join: Option<String>,
}

/// What can be done with a lab.
#[derive(Subcommand, Debug)]
pub enum Lab {
    /// Make the lab or start what is not running of it; returns once the pool serves
    #[command(after_help = "Example:\n  xenith lab up --dir /tmp/pool --driver sim --base 127.0.72.1\n\n\
        Run again on the same directory it finds the pool as it was.")]
    Up(Up),
    /// Print the state of the lab
    #[command(after_help = "Example:\n  xenith lab status --dir /tmp/pool | python3 -m json.tool")]
    Status(At),
    /// SIGKILL a host or one of its daemons
    #[command(after_help = "Example:\n  xenith lab kill --dir /tmp/pool host1 --what controller\n\n\
        A host takes its domains with it, as a power cut would.")]
    Kill(OnHost),
    /// SIGSTOP a host or one of its daemons
    #[command(after_help = "Example:\n  xenith lab pause --dir /tmp/pool host2")]
    Pause(OnHost),
    /// SIGCONT what was paused
    #[command(after_help = "Example:\n  xenith lab resume --dir /tmp/pool host2")]
    Resume(OnHost),
    /// Start what is dead of a host
    #[command(after_help = "Example:\n  xenith lab start --dir /tmp/pool host1")]
    Start(OnHost),
    /// Stop everything, domains too; the directory stays
    #[command(after_help = "Example:\n  xenith lab down --dir /tmp/pool")]
    Down(At),
}

/// Which lab.
#[derive(Args, Debug)]
pub struct At {
    /// Directory of the lab
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
}

/// Which lab, and how it is to be made when it is not there yet.
#[derive(Args, Debug)]
pub struct Up {
    /// Directory of the lab; made when missing
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Number of hosts [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub hosts: Option<u8>,
    /// Hosts that run a controller and keep the pool's state; the others run their agent alone, so that a large pool fits
    /// on one machine [default: all, at most 7]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub replicas: Option<u8>,
    /// Further hosts, each of which begins as a pool of its own: to join them and to eject them again [default: 0]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=16))]
    pub apart: Option<u8>,
    /// Milliseconds after which a silent voter is replaced [default: 300000]
    #[arg(long, value_name = "MS")]
    pub replace_after_ms: Option<u64>,
    /// Newest format of replicated data that the hosts read when the lab is made, as if they were of the version that had
    /// it; taking `store.format_limit` out of a host's DIR/HOST/controller.toml upgrades it [default: this version's]
    #[arg(long, value_name = "FORMAT")]
    pub format_limit: Option<u32>,
    /// What runs the guests [default: qemu]
    #[arg(long)]
    pub driver: Option<Driver>,
    /// Address of the first host; the others follow it [default: 127.0.71.1]
    #[arg(long, value_name = "ADDRESS")]
    pub base: Option<Ipv4Addr>,
    /// Port of the API on every host; the next two are for peers and agents [default: 8443]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..=65533))]
    pub port: Option<u16>,
    /// Password of root [default: xenith]
    #[arg(long, value_name = "PASSWORD", env = "XENITH_LAB_PASSWORD", hide_env_values = true)]
    pub password: Option<String>,
    /// Seconds to wait until the pool serves
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub wait: u64,
}

/// Which host of which lab, and what of it.
#[derive(Args, Debug)]
pub struct OnHost {
    /// Directory of the lab
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Name of the host, as `status` prints it
    pub host: String,
    /// What of the host
    #[arg(long, default_value = "host")]
    pub what: What,
}

/// What of a host is meant.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Both daemons and all domains.
    Host,
    /// The controller alone.
    Controller,
    /// The agent alone; its domains go on.
    Agent,
}

/// What runs the guests of a host.
#[derive(ValueEnum, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// One QEMU process for each domain.
    Qemu,
    /// No process at all: an honest state machine.
    Sim,
}

impl Driver {
    /// As configuration files and flags say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Sim => "sim",
        }
    }
}
