//! The peer: a three-node etcd with its default timings, driven through its own gRPC API.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};
use tonic::transport::{Channel, Endpoint};

use super::Operation;
use super::etcdserverpb::kv_client::KvClient;
use super::etcdserverpb::maintenance_client::MaintenanceClient;
use super::etcdserverpb::{PutRequest, RangeRequest, StatusRequest};

const CLIENT_PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;
const START_LIMIT: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const ASK_LIMIT: Duration = Duration::from_secs(2);

/// Three etcd processes on loopback addresses of their own. Dropped, they are gone.
pub struct Etcd {
    program: PathBuf,
    dir: TempDir,
    members: Vec<Member>,
}

struct Member {
    name: String,
    address: std::net::Ipv4Addr,
    process: Child,
}

impl Member {
    fn client(&self) -> SocketAddr {
        SocketAddr::from((self.address, CLIENT_PORT))
    }
}

/// The etcd on PATH, if there is one.
pub fn program() -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join("etcd")).find(|program| program.is_file())
}

impl Etcd {
    /// Starts it with its data beside `beside`, on the same disk, and waits until it has a leader.
    pub async fn start(program: &Path, beside: &Path) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("xenith-etcd-").tempdir_in(beside)?;
        let mut etcd = Self { program: program.to_owned(), dir, members: Vec::new() };
        // Derived from the process id, so that two runs do not meet.
        let [second, third] = [std::process::id() / 250 % 100, std::process::id() % 250].map(|part| part as u8);
        let addresses = [1, 2, 3].map(|last| std::net::Ipv4Addr::new(127, 130 + second, 1 + third, last));
        for (position, address) in addresses.into_iter().enumerate() {
            let name = format!("etcd{}", position + 1);
            let process = etcd.spawn(&name, address, &addresses)?;
            etcd.members.push(Member { name, address, process });
        }
        etcd.leader(START_LIMIT).await?;
        Ok(etcd)
    }

    fn spawn(&self, name: &str, address: std::net::Ipv4Addr, all: &[std::net::Ipv4Addr]) -> anyhow::Result<Child> {
        let cluster: Vec<_> = (1..).zip(all).map(|(n, ip)| format!("etcd{n}=http://{ip}:{PEER_PORT}")).collect();
        let log = std::fs::File::create(self.dir.path().join(format!("{name}.log")))?;
        Command::new(&self.program)
            .env_clear()
            .args(["--name", name, "--data-dir"])
            .arg(self.dir.path().join(name))
            .arg(format!("--listen-client-urls=http://{address}:{CLIENT_PORT}"))
            .arg(format!("--advertise-client-urls=http://{address}:{CLIENT_PORT}"))
            .arg(format!("--listen-peer-urls=http://{address}:{PEER_PORT}"))
            .arg(format!("--initial-advertise-peer-urls=http://{address}:{PEER_PORT}"))
            .arg(format!("--initial-cluster={}", cluster.join(",")))
            .args(["--initial-cluster-state=new", "--log-level=error"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot run {}", self.program.display()))
    }

    /// Where clients connect.
    pub fn endpoints(&self) -> Vec<SocketAddr> {
        self.members.iter().map(Member::client).collect()
    }

    /// Position of the leader, as soon as all living members agree on one.
    pub async fn leader(&mut self, limit: Duration) -> anyhow::Result<usize> {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if let Some(leader) = self.agreed_leader().await {
                return Ok(leader);
            }
            for member in &mut self.members {
                if let Some(status) = member.process.try_wait()? {
                    let log = std::fs::read_to_string(self.dir.path().join(format!("{}.log", member.name)));
                    bail!("{} ended with {status}: {}", member.name, log.unwrap_or_default());
                }
            }
            sleep(LOOK_AGAIN).await;
        }
        bail!("etcd has no leader")
    }

    async fn agreed_leader(&self) -> Option<usize> {
        let mut leaders = Vec::new();
        let mut ids = Vec::new();
        let mut applied = Vec::new();
        for member in &self.members {
            let channel = timeout(ASK_LIMIT, connect(member.client())).await.ok()?.ok()?;
            let mut client = MaintenanceClient::new(channel);
            let status = timeout(ASK_LIMIT, client.status(StatusRequest {})).await.ok()?.ok()?.into_inner();
            ids.push(status.header?.member_id);
            leaders.push(status.leader);
            applied.push(status.raft_index);
        }
        let (first, rest) = leaders.split_first()?;
        let caught_up = applied.iter().max() == applied.iter().min();
        let agreed = *first != 0 && caught_up && rest.iter().all(|leader| leader == first);
        agreed.then(|| ids.iter().position(|id| id == first)).flatten()
    }

    /// SIGKILL, without a look at what becomes of it.
    pub fn signal(&mut self, position: usize) -> anyhow::Result<()> {
        Ok(self.members.get_mut(position).context("no such member")?.process.start_kill()?)
    }

    /// SIGKILL, and gone when this returns.
    pub async fn kill(&mut self, position: usize) -> anyhow::Result<()> {
        let member = self.members.get_mut(position).context("no such member")?;
        // One that a signal has met already is only waited for.
        Ok(member.process.kill().await?)
    }

    /// Starts a member that was killed.
    pub fn restart(&mut self, position: usize) -> anyhow::Result<()> {
        let all: Vec<_> = self.members.iter().map(|member| member.address).collect();
        let (name, address) = {
            let member = self.members.get(position).context("no such member")?;
            (member.name.clone(), member.address)
        };
        let process = self.spawn(&name, address, &all)?;
        if let Some(member) = self.members.get_mut(position) {
            member.process = process;
        }
        Ok(())
    }

    /// So many clients that each write a key of their own, at the leader. They share one HTTP/2 connection: etcd is
    /// faster with one than with one for each.
    pub async fn writers(&mut self, count: usize) -> anyhow::Result<Vec<Put>> {
        let channel = self.leader_channel().await?;
        Ok((0..count).map(|position| Put::new(channel.clone(), &key(position))).collect())
    }

    /// So many clients that each read the key of one of those writers.
    pub async fn readers(&mut self, count: usize) -> anyhow::Result<Vec<Get>> {
        let channel = self.leader_channel().await?;
        Ok((0..count).map(|position| Get::new(channel.clone(), &key(position))).collect())
    }

    async fn leader_channel(&mut self) -> anyhow::Result<Channel> {
        let leader = self.leader(START_LIMIT).await?;
        connect(*self.endpoints().get(leader).context("no leader")?).await
    }
}

/// A key of about the length of a VM's reference and field.
fn key(position: usize) -> String {
    format!("/vm/OpaqueRef:00000000-0000-0000-0000-{position:012}/name_description")
}

/// A connection to one member.
pub async fn connect(address: SocketAddr) -> anyhow::Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?.tcp_nodelay(true).connect_timeout(ASK_LIMIT);
    Ok(endpoint.connect().await?)
}

/// Puts under one key.
pub struct Put {
    client: KvClient<Channel>,
    key: Vec<u8>,
}

impl Put {
    /// Puts over this connection.
    pub fn new(channel: Channel, key: &str) -> Self {
        Self { client: KvClient::new(channel), key: key.as_bytes().to_vec() }
    }
}

impl Operation for Put {
    async fn run(&mut self, number: u64) -> anyhow::Result<()> {
        let value = super::description(number).into_bytes();
        self.client.put(PutRequest { key: self.key.clone(), value }).await?;
        Ok(())
    }
}

/// Linearizable reads of one key.
pub struct Get {
    client: KvClient<Channel>,
    key: Vec<u8>,
}

impl Get {
    /// Reads over this connection.
    pub fn new(channel: Channel, key: &str) -> Self {
        Self { client: KvClient::new(channel), key: key.as_bytes().to_vec() }
    }
}

impl Operation for Get {
    async fn run(&mut self, _number: u64) -> anyhow::Result<()> {
        let answer = self.client.range(RangeRequest { key: self.key.clone() }).await?.into_inner();
        anyhow::ensure!(answer.kvs.len() == 1, "the key is not there");
        Ok(())
    }
}
