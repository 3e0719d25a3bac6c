//! One host under test: an agent with its own pool authority, a client as the master has it, and whatever QEMU it
//! started, which ends with the test however the test ends.
#![allow(dead_code, clippy::expect_used, clippy::unwrap_used)]

pub mod store;

/// One suite, run against each driver; a test's name ends in the driver's.
#[allow(unused_macros)]
macro_rules! for_each_driver {
    ($($promise:ident),+ $(,)?) => {
        mod qemu {
            $(#[tokio::test] async fn $promise() { super::$promise("qemu").await; })+
        }
        mod sim {
            $(#[tokio::test] async fn $promise() { super::$promise("sim").await; })+
        }
    };
}

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use member_agent::{AcceleratorChoice, Agent, Config, NicSource, StoreChoice, TlsFiles};
use proto::agent::agent_client::AgentClient;
use proto::agent::agent_event::Event;
use proto::agent::step::Action;
use proto::agent::{
    AgentEvent, DestroyDomain, DomainSpec, DomainState, HelloReply, HelloRequest, PauseDomain, PowerState,
    RebootDomain, Refusal, ShutdownDomain, StartDomain, Step, UnpauseDomain, WatchRequest, outcome, refusal,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Status, Streaming};
use uuid::Uuid;

pub const MIB: u64 = 1024 * 1024;
pub const POOL: &str = "11111111-0000-4000-8000-000000000001";
/// For what takes a guest's time; a machine under load is slow.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub type Authority = CertifiedIssuer<'static, KeyPair>;

pub fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).expect("params");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("authority")
}

/// Certificate and key of a peer, PEM.
pub fn certificate(authority: &Authority) -> (String, String) {
    let key = KeyPair::generate().expect("key");
    let params = CertificateParams::new(vec!["agent.xenith".to_owned()]).expect("params");
    (params.signed_by(&key, authority).expect("signed").pem(), key.serialize_pem())
}

/// A host: its directory, its agent while it runs, and its domains.
pub struct Host {
    pub dir: TempDir,
    pub config: Config,
    pub authority: Authority,
    running: Option<(Agent, CancellationToken)>,
    epoch: AtomicU64,
}

impl Host {
    pub async fn start(driver: &str) -> Self {
        Self::start_with(driver, |_| {}).await
    }

    pub async fn start_with(driver: &str, change: impl FnOnce(&mut Config)) -> Self {
        let mut host = Self::without_agent(driver, change);
        host.start_agent().await;
        host
    }

    /// A host whose agent has not been started.
    pub fn without_agent(driver: &str, change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let authority = authority();
        let (certificate, key) = certificate(&authority);
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).expect("write");
            path
        };
        let mut config = Config {
            host_uuid: Uuid::new_v4(),
            hostname: Some("host-under-test".to_owned()),
            listen: "127.0.0.1:0".parse().expect("address"),
            identity: None,
            tls: TlsFiles {
                ca: file("ca.pem", &authority.pem()),
                certificate: file("host.pem", &certificate),
                key: file("host.key", &key),
            },
            state_dir: dir.path().join("state"),
            driver: driver.to_owned(),
            pool: None,
            memory_total_mib: Some(512),
            control_domain_memory_mib: 128,
            nics: NicSource::Sim,
            qemu_binary: None,
            // The probe has tests of its own; elsewhere it would only cost time.
            accelerator: AcceleratorChoice::Tcg,
            boot_id_path: file("boot-id", "boot-1"),
            storage_dir: None,
            stores: StoreChoice::Auto,
            programs: None,
        };
        change(&mut config);
        Self { dir, config, authority, running: None, epoch: AtomicU64::new(10) }
    }

    pub async fn start_agent(&mut self) {
        let token = CancellationToken::new();
        let agent = Agent::start(self.config.clone(), token.clone()).await.expect("agent starts");
        self.running = Some((agent, token));
    }

    pub async fn stop_agent(&mut self) {
        let (agent, token) = self.running.take().expect("agent runs");
        token.cancel();
        agent.ended().await;
    }

    pub fn endpoint(&self) -> Endpoint {
        let (agent, _) = self.running.as_ref().expect("agent runs");
        Endpoint::from_shared(format!("https://{}", agent.address())).expect("endpoint")
    }

    pub fn tls(&self, certificate: &(String, String)) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(self.authority.pem()))
            .identity(Identity::from_pem(&certificate.0, &certificate.1))
            .domain_name("agent.xenith")
    }

    pub async fn client(&self) -> Client {
        let tls = self.tls(&certificate(&self.authority));
        let channel = self.endpoint().tls_config(tls).expect("tls").connect().await.expect("connects");
        Client { calls: AgentClient::new(channel), epoch: self.epoch.load(Ordering::Relaxed) }
    }

    pub fn domain_dir(&self, vm: Uuid) -> PathBuf {
        self.config.state_dir.join("domains").join(vm.to_string())
    }

    pub fn pid(&self, vm: Uuid) -> i32 {
        let path = self.domain_dir(vm).join("qemu.pid");
        fs::read_to_string(&path).expect("pid file").trim().parse().expect("pid")
    }

    pub fn console(&self, vm: Uuid) -> String {
        let log = fs::read(self.domain_dir(vm).join("console.log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Waits until the guest has shown `count` signs of life.
    pub async fn heartbeats(&self, vm: Uuid, count: usize) {
        let what = format!("{count} heartbeats of the guest");
        eventually(&what, || self.console(vm).matches("XENITH-GUEST ").count() >= count).await;
    }

    /// Waits until the guest has booted `count` times: each time its shell greets once.
    pub async fn boots(&self, vm: Uuid, count: usize) {
        let greetings = || self.console(vm).matches("BusyBox v").count();
        eventually(&format!("boot {count} of the guest"), || greetings() >= count).await;
    }

    /// Types a line at the guest's serial console, once there is a prompt. The line stays up while the answer is held.
    pub async fn type_at(&self, vm: Uuid, line: &str) -> UnixStream {
        eventually("a prompt", || self.console(vm).contains("/ # ")).await;
        let mut stream = UnixStream::connect(self.domain_dir(vm).join("console")).expect("console");
        stream.write_all(format!("{line}\n").as_bytes()).expect("typed");
        stream
    }

    /// Runs a command in the guest until it says what is expected.
    pub async fn guest_says(&self, vm: Uuid, command: &str, expected: &str) {
        static QUESTIONS: AtomicU64 = AtomicU64::new(1);
        let deadline = Instant::now() + PATIENCE;
        loop {
            // The console keeps what was said before: an answer is known by its question's number.
            let number = QUESTIONS.fetch_add(1, Ordering::Relaxed);
            assert!(Instant::now() < deadline, "{command:?} does not say {expected:?}: {}", self.console(vm));
            // Between marks, so that neither the echo nor heartbeats are taken for the answer.
            let _line = self.type_at(vm, &format!("echo [$(echo {number}) $({command})]")).await;
            let mark = format!("[{number} ");
            eventually("an answer of the guest", || self.console(vm).contains(&mark)).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
            if self.console(vm).contains(&format!("{mark}{expected}]")) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// What lives in this host's domains' directories.
    pub fn processes(&self) -> Vec<i32> {
        let domains = fs::canonicalize(self.config.state_dir.join("domains")).unwrap_or_default();
        let below = |pid: i32| {
            fs::read_link(format!("/proc/{pid}/cwd"))
                .is_ok_and(|cwd| !domains.as_os_str().is_empty() && cwd.starts_with(&domains))
        };
        let entries = fs::read_dir("/proc").expect("proc").filter_map(Result::ok);
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(|pid| below(*pid)).collect()
    }

    pub fn order(&self, text: &str) {
        let path = self.config.state_dir.join("sim.toml");
        fs::write(path.with_extension("new"), text).expect("write");
        fs::rename(path.with_extension("new"), path).expect("rename");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some((_, token)) = self.running.take() {
            token.cancel();
        }
        for pid in self.processes() {
            kill(pid);
        }
    }
}

pub fn kill(pid: i32) {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
}

/// Waits for something to become true, and says what it was if it does not.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "did not come: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The agent as the master sees it.
#[derive(Clone)]
pub struct Client {
    pub calls: AgentClient<Channel>,
    pub epoch: u64,
}

pub fn operation() -> String {
    Uuid::new_v4().to_string()
}

impl Client {
    pub async fn hello(&mut self) -> Result<HelloReply, Status> {
        let request = HelloRequest { version: 1, pool: POOL.to_owned(), epoch: self.epoch };
        self.calls.hello(request).await.map(tonic::Response::into_inner)
    }

    pub async fn watch(&mut self) -> Watching {
        let request = WatchRequest { pool: POOL.to_owned(), epoch: self.epoch };
        let stream = self.calls.watch(request).await.expect("watch").into_inner();
        Watching { stream }
    }

    pub async fn step_as(&mut self, operation: &str, vm: Uuid, action: Action) -> Result<DomainState, Refusal> {
        let step = Step {
            pool: POOL.to_owned(),
            epoch: self.epoch,
            operation: operation.to_owned(),
            vm: vm.to_string(),
            traceparent: String::new(),
            number: 0,
            action: Some(action),
        };
        match self.calls.perform(step).await.expect("call").into_inner().result.expect("outcome") {
            outcome::Result::Domain(state) => Ok(state),
            outcome::Result::Refusal(refusal) => Err(refusal),
            other => panic!("an outcome of a domain's step, not {other:?}"),
        }
    }

    pub async fn step(&mut self, vm: Uuid, action: Action) -> Result<DomainState, Refusal> {
        self.step_as(&operation(), vm, action).await
    }
}

pub struct Watching {
    pub stream: Streaming<AgentEvent>,
}

impl Watching {
    pub async fn next(&mut self) -> Event {
        let next = tokio::time::timeout(PATIENCE, self.stream.message()).await.expect("an event in time");
        next.expect("stream lives").expect("stream goes on").event.expect("event")
    }

    /// The first event: all domains.
    pub async fn all(&mut self) -> Vec<DomainState> {
        match self.next().await {
            Event::All(list) => list.domains,
            other => panic!("all domains come first, not {other:?}"),
        }
    }

    /// The next change.
    pub async fn change(&mut self) -> DomainState {
        // Beats go on for ever, so each of them in time is not enough.
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "no change in time");
            match self.next().await {
                Event::Domain(state) => return state,
                Event::Beat(_) => {}
                Event::All(list) => panic!("told everything anew: {list:?}"),
            }
        }
    }

    /// The change that takes the VM to this state.
    pub async fn becomes(&mut self, vm: Uuid, power: PowerState) -> DomainState {
        loop {
            let state = self.change().await;
            if state.vm == vm.to_string() && state.state() == power {
                return state;
            }
        }
    }
}

pub fn reason(outcome: Result<DomainState, Refusal>) -> refusal::Reason {
    outcome.expect_err("refused").reason()
}

/// A spec that both drivers can build; with QEMU the guest boots.
pub fn spec(vm: Uuid) -> DomainSpec {
    DomainSpec {
        vm: vm.to_string(),
        name: "a guest, under test".to_owned(),
        memory_static_max: 96 * MIB,
        memory_target: 96 * MIB,
        vcpus_max: 1,
        vcpus_at_startup: 1,
        kernel: guest().join("vmlinuz").display().to_string(),
        ramdisk: guest().join("initrd.gz").display().to_string(),
        kernel_args: "console=ttyS0 quiet panic=-1".to_owned(),
        generation: 3,
        ..DomainSpec::default()
    }
}

/// The tiny guest: from XENITH_GUEST_DIR, or built once and kept.
pub fn guest() -> &'static Path {
    static GUEST: OnceLock<PathBuf> = OnceLock::new();
    GUEST.get_or_init(|| {
        if let Some(dir) = std::env::var_os("XENITH_GUEST_DIR") {
            return PathBuf::from(dir);
        }
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest");
        make("../deploy/guest/build.sh", &dir);
        dir
    })
}

/// The machine that runs what this kernel cannot, made once and kept beside the guest.
pub fn machine_for_storage() -> PathBuf {
    let machine = guest().join("machine.gz");
    if !machine.exists() {
        make("../deploy/guest/machine.sh", guest());
    }
    machine
}

fn make(script: &str, into: &Path) {
    let status = Command::new(script).arg(into).status().expect("runs");
    assert!(status.success(), "{script} failed");
}

pub fn start(spec: DomainSpec) -> Action {
    Action::Start(StartDomain { spec: Some(spec), paused: false })
}

pub fn start_paused(spec: DomainSpec) -> Action {
    Action::Start(StartDomain { spec: Some(spec), paused: true })
}

pub fn pause() -> Action {
    Action::Pause(PauseDomain {})
}

pub fn unpause() -> Action {
    Action::Unpause(UnpauseDomain {})
}

pub fn destroy() -> Action {
    Action::Destroy(DestroyDomain {})
}

pub fn shutdown(limit: Duration) -> Action {
    Action::Shutdown(ShutdownDomain { timeout_ms: u64::try_from(limit.as_millis()).expect("limit") })
}

pub fn reboot(clean: bool, spec: Option<DomainSpec>) -> Action {
    Action::Reboot(RebootDomain { clean, timeout_ms: 60_000, spec })
}

pub fn distinct<T: std::hash::Hash + Eq>(values: impl IntoIterator<Item = T>) -> HashSet<T> {
    values.into_iter().collect()
}
