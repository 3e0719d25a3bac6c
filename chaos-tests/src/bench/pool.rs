//! The pool under load: a simulated lab, its VMs, and the clients that write and read them.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use rustls::ClientConfig;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::Operation;
use super::wire::Wire;
use crate::client::{Client, Endpoint, trust_anyone};
use crate::lab::{Lab, State};

/// How many connections make VMs at once.
const MAKERS: usize = 16;
/// How long a pool may take that has just lost a master.
const SOON: Duration = Duration::from_secs(15);
/// What VMs of the benchmarks are called, and what they are found by when they are counted.
const NAME: &str = "benchmark";

/// A pool of three simulated hosts.
pub struct Pool {
    lab: Lab,
    tls: Arc<ClientConfig>,
    client: Client,
    vms: Vec<String>,
}

impl Pool {
    /// Starts it, with its data below `parent`.
    pub async fn start(program: &Path, parent: &Path) -> anyhow::Result<Self> {
        Self::over(Lab::of(program, parent, 3, "sim").await?).await
    }

    /// The pool of a lab that is there.
    pub async fn over(lab: Lab) -> anyhow::Result<Self> {
        let client = lab.client().await?;
        Ok(Self { lab, tls: trust_anyone()?, client, vms: Vec::new() })
    }

    /// Its lab.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// A client that finds the master.
    pub fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    /// What TLS connections are made with.
    pub fn tls(&self) -> &Arc<ClientConfig> {
        &self.tls
    }

    /// The session all load runs in.
    pub fn session(&self) -> &str {
        self.client.session()
    }

    /// A VM of the benchmarks.
    pub fn vm(&self, position: usize) -> anyhow::Result<&str> {
        self.vms.get(position).map(String::as_str).context("too few VMs were made")
    }

    /// Address of the API at the master.
    pub async fn master(&self) -> anyhow::Result<SocketAddr> {
        address(&self.lab.status().await?)
    }

    /// A connection to the master.
    pub async fn wire(&self) -> anyhow::Result<Wire> {
        Wire::open(self.master().await?, &self.tls).await
    }

    /// So many connections to the master.
    pub async fn wires(&self, count: usize) -> anyhow::Result<Vec<Wire>> {
        let master = self.master().await?;
        let mut wires = Vec::with_capacity(count);
        for _ in 0..count {
            wires.push(Wire::open(master, &self.tls).await?);
        }
        Ok(wires)
    }

    /// Makes VMs until there are so many.
    pub async fn make_vms(&mut self, count: usize) -> anyhow::Result<()> {
        let missing = count.saturating_sub(self.vms.len());
        if missing == 0 {
            return Ok(());
        }
        let template = self.template().await?;
        let master = self.master().await?;
        let mut makers = JoinSet::new();
        for maker in 0..MAKERS.min(missing) {
            let share = (missing + MAKERS.min(missing) - 1 - maker) / MAKERS.min(missing);
            let mut wire = Wire::open(master, &self.tls).await?;
            let body = call("VM.clone", &json!([self.session(), template, NAME]));
            makers.spawn(async move {
                let mut made = Vec::with_capacity(share);
                for _ in 0..share {
                    let answer = wire.post(body.as_bytes()).await?.success()?;
                    let answer: Value = serde_json::from_slice(answer.first)?;
                    made.push(answer["result"].as_str().context("VM.clone answered no reference")?.to_owned());
                }
                anyhow::Ok(made)
            });
        }
        while let Some(made) = makers.join_next().await {
            self.vms.extend(made??);
        }
        Ok(())
    }

    /// A template with no disks: what is measured is the pool, not storage.
    async fn template(&mut self) -> anyhow::Result<String> {
        let vms = self.client.persist(SOON, "VM.get_all_records", Value::Null).await?;
        let templates = vms.as_object().into_iter().flatten().filter(|(_, vm)| vm["is_a_template"] == true);
        let mut templates: Vec<_> =
            templates.filter(|(_, vm)| vm["VBDs"].as_array().is_some_and(Vec::is_empty)).collect();
        templates.sort_by_key(|(_, vm)| vm["name_label"].to_string());
        let Some((reference, _)) = templates.first() else { bail!("the pool has no template without disks") };
        Ok((*reference).clone())
    }

    /// So many clients that each write one VM of their own.
    pub async fn writers(&mut self, count: usize) -> anyhow::Result<Vec<Write>> {
        self.make_vms(count).await?;
        let mut writers = Vec::with_capacity(count);
        for position in 0..count {
            let (before, after) = around("VM.set_name_description", self.session(), self.vm(position)?);
            writers.push(Write { wire: self.wire().await?, before, after, body: String::new() });
        }
        Ok(writers)
    }

    /// So many clients that each read one VM of their own.
    pub async fn readers(&mut self, count: usize) -> anyhow::Result<Vec<Read>> {
        self.make_vms(count).await?;
        let mut readers = Vec::with_capacity(count);
        for position in 0..count {
            let body = call("VM.get_record", &json!([self.session(), self.vm(position)?]));
            readers.push(Read { wire: self.wire().await?, body });
        }
        Ok(readers)
    }
}

fn address(state: &State) -> anyhow::Result<SocketAddr> {
    match state.master()?.endpoint()? {
        Endpoint::Https(address) => Ok(address),
        other => bail!("{other} is not reached over TLS"),
    }
}

/// A JSON-RPC 2.0 request.
pub fn call(method: &str, params: &Value) -> String {
    json!({"jsonrpc": "2.0", "method": method, "params": params, "id": 1}).to_string()
}

/// A request to set a description, before and after the text.
fn around(method: &str, session: &str, vm: &str) -> (String, String) {
    let before = format!(r#"{{"jsonrpc":"2.0","method":"{method}","params":["{session}","{vm}",""#);
    (before, r#""],"id":1}"#.to_owned())
}

/// Sets one VM's description, to a new text each time.
pub struct Write {
    wire: Wire,
    before: String,
    after: String,
    body: String,
}

impl Operation for Write {
    async fn run(&mut self, number: u64) -> anyhow::Result<()> {
        self.body.clear();
        self.body.push_str(&self.before);
        self.body.push_str(&super::description(number));
        self.body.push_str(&self.after);
        self.wire.post(self.body.as_bytes()).await?.success()?;
        Ok(())
    }
}

/// Reads one VM's record.
pub struct Read {
    wire: Wire,
    body: String,
}

impl Operation for Read {
    async fn run(&mut self, _number: u64) -> anyhow::Result<()> {
        self.wire.post(self.body.as_bytes()).await?.success()?;
        Ok(())
    }
}
