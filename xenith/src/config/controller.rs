//! `controller.toml`: one host's part in the pool.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Check, Fault, Log, Tls, Traces, fault};

/// The whole file.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
pub struct ControllerConfig {
    /// Uuid of this host, as the pool knows it.
    pub host_uuid: Uuid,
    /// Number of this host in the Raft group; never used again for another host, nor for this one after a wipe.
    pub node_id: u64,
    /// Directory of the replicated database.
    pub data_dir: PathBuf,
    /// What XenAPI clients reach.
    pub api: Api,
    /// What the other controllers reach.
    pub peers: Peers,
    /// Who this host is to peers and agents.
    pub tls: Tls,
    /// What the pool is made of while there is none yet; not read any more from then on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub founding: Option<Founding>,
    /// Timings of consensus.
    #[serde(default)]
    pub raft: Raft,
    /// What is replicated, and in which format.
    #[serde(default)]
    pub store: Store,
    /// Who votes.
    #[serde(default)]
    pub membership: Membership,
    /// What templates boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest: Option<Guest>,
    /// For tests alone: a file with a number of seconds by which this host's clock is wrong. Read again and again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_offset: Option<PathBuf>,
    /// Logs.
    #[serde(default)]
    pub log: Log,
    /// Spans.
    #[serde(default)]
    pub traces: Traces,
}

/// `[api]`: where and how XenAPI is served.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
pub struct Api {
    /// HTTPS.
    pub listen: Vec<SocketAddr>,
    /// HTTP without TLS: none unless listed here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plain_http: Vec<SocketAddr>,
    /// Unix socket whose every caller is root of the pool. The file is 0600.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Certificate (PEM) shown to clients; made, self-signed, when missing.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Answers `HOST_IS_SLAVE` to every call at a host that is not the master, rather than forwarding those that carry
    /// a live session.
    #[serde(default)]
    pub redirect_sessions: bool,
    /// How long a call waits for a master before it is told that there is none.
    #[serde(default = "election_wait_ms")]
    pub election_wait_ms: u64,
}

fn election_wait_ms() -> u64 {
    5_000
}

/// `[peers]`: where other controllers reach this one (mutual TLS).
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
pub struct Peers {
    /// Raft and forwarded calls.
    pub listen: SocketAddr,
}

/// `[founding]`: how the pool is made. The same on each of its first hosts but for `initialize`, for any of them may be
/// the first master.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
pub struct Founding {
    /// On exactly one host: it starts consensus.
    #[serde(default)]
    pub initialize: bool,
    /// File with the first password of root, one line, readable by its owner only. Without it the environment variable
    /// XENITH_ROOT_PASSWORD is taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root_password_file: Option<PathBuf>,
    /// Key of the CA under `[tls]`, to be kept in the pool's database, so that hosts can join. Without it the pool stays
    /// as it is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_key: Option<PathBuf>,
    /// The hosts that the pool starts with.
    pub members: Vec<Member>,
}

/// `[[founding.members]]`: a host that the pool starts with.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its number in the Raft group.
    pub node_id: u64,
    /// Its uuid.
    pub host_uuid: Uuid,
    /// The address that clients are sent to; no port, for they keep their own.
    pub api_address: IpAddr,
    /// Where its controller listens for peers.
    pub peer_address: SocketAddr,
    /// Where its agent listens.
    pub agent_address: SocketAddr,
    /// Whether it keeps the pool's state and votes. A host without a copy runs its agent alone.
    #[serde(default = "yes")]
    pub replica: bool,
}

fn yes() -> bool {
    true
}

/// `[raft]`: timings of consensus. The defaults give a new master well within a second on a machine whose disk
/// acknowledges a write in a few milliseconds; on slower disks raise all three alike.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields, default)]
pub struct Raft {
    /// How often a leader says that it is there.
    pub heartbeat_ms: u64,
    /// Least silence after which a follower stands for election.
    pub election_min_ms: u64,
    /// Greatest such silence; also how long a leader's lease lasts.
    pub election_max_ms: u64,
    /// After so many entries the log is cut: what the rows on disk hold need not be in it too.
    pub snapshot_every: u64,
    /// So many entries stay in it all the same, for hosts that were away for a moment. Who was away for longer is sent
    /// the whole state.
    pub keep_entries: u64,
}

impl Default for Raft {
    fn default() -> Self {
        Self {
            heartbeat_ms: 50,
            election_min_ms: 150,
            election_max_ms: 300,
            snapshot_every: 20_000,
            keep_entries: 10_000,
        }
    }
}

/// `[store]`: what this host reads and writes.
#[derive(Serialize, Deserialize, Clone, Debug, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Store {
    /// The newest format of replicated data that this host reads, if that is not to be this version's. While any host
    /// has a limit the pool stays at it, and so an upgrade of all hosts can be taken back. None: this version's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_limit: Option<u32>,
}

impl Store {
    /// Finds a limit that this version does not have.
    pub fn check(&self) -> Result<(), Fault> {
        let (oldest, newest) = raft_store::FORMATS.into_inner();
        match self.format_limit {
            Some(limit) if !(oldest..=newest).contains(&limit) => {
                fault("store.format_limit", format_args!("this version reads formats {oldest} to {newest}"))
            }
            _ => Ok(()),
        }
    }
}

/// `[membership]`: which of the pool's hosts vote. The same on every host, for any of them may be master.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields, default)]
pub struct Membership {
    /// So many at most: 1, 3, 5 or 7.
    pub voters: u8,
    /// A voter that is silent for this long gives its vote to a host that is there.
    pub replace_after_ms: u64,
}

impl Default for Membership {
    fn default() -> Self {
        Self { voters: 5, replace_after_ms: 300_000 }
    }
}

/// `[guest]`: the small Linux that the test template boots.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    /// Kernel image, at the same path on every host.
    pub kernel: PathBuf,
    /// Initial RAM disk, at the same path on every host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ramdisk: Option<PathBuf>,
    /// Kernel command line.
    #[serde(default)]
    pub args: String,
}

impl Raft {
    /// Finds timings that contradict one another.
    pub fn check(&self) -> Result<(), Fault> {
        let Raft { heartbeat_ms, election_min_ms, election_max_ms, snapshot_every, .. } = *self;
        if heartbeat_ms == 0 || election_min_ms < heartbeat_ms * 2 {
            return fault(
                "raft.election_min_ms",
                "must be at least twice raft.heartbeat_ms, or one late heartbeat costs the master",
            );
        }
        if election_max_ms <= election_min_ms {
            return fault("raft.election_max_ms", "must be greater than raft.election_min_ms, or votes split for ever");
        }
        if snapshot_every == 0 {
            return fault("raft.snapshot_every", "must be at least 1");
        }
        Ok(())
    }
}

impl Check for ControllerConfig {
    fn check(&self) -> Result<(), Fault> {
        if self.node_id == 0 {
            return fault("node_id", "node numbers start at 1");
        }
        if self.api.listen.is_empty() && self.api.plain_http.is_empty() && self.api.socket.is_none() {
            return fault("api.listen", "no client could reach this host: give an address, or api.socket");
        }
        self.tls.check()?;
        self.raft.check()?;
        self.store.check()?;
        if !matches!(self.membership.voters, 1 | 3 | 5 | 7) {
            return fault("membership.voters", "must be 1, 3, 5 or 7: an even number survives no more deaths");
        }
        self.founding.as_ref().map_or(Ok(()), |founding| self.check_founding(founding))
    }
}

impl ControllerConfig {
    fn check_founding(&self, founding: &Founding) -> Result<(), Fault> {
        const MEMBERS: &str = "founding.members";
        let members = &founding.members;
        let nodes: BTreeSet<_> = members.iter().map(|member| member.node_id).collect();
        let hosts: BTreeSet<_> = members.iter().map(|member| member.host_uuid).collect();
        if nodes.len() != members.len() || hosts.len() != members.len() {
            return fault(MEMBERS, "a node_id or host_uuid is there twice");
        }
        match members.iter().find(|member| member.node_id == self.node_id) {
            None => fault(MEMBERS, format_args!("none has this host's node_id, {}", self.node_id)),
            Some(me) if me.host_uuid != self.host_uuid => {
                fault(MEMBERS, format_args!("node_id {} has another host_uuid than this host", self.node_id))
            }
            Some(_) => Ok(()),
        }
    }
}
