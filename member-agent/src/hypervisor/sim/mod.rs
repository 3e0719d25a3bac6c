//! Domains without processes: an honest state machine for tests of scale and of bad days.
//!
//! It keeps every rule that `qemu` keeps, and passes the same suite. Its domains are files, so they outlive the
//! agent as QEMU's processes do; and they are bound to the boot of their host, so a host that lost its power has
//! none. `faults` says how to make it slow or make it fail.

mod faults;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use async_trait::async_trait;
use tokio::time::{MissedTickBehavior, interval, sleep};
use uuid::Uuid;

use super::domain::{DomainSpec, DomainState, Power, Reason, Reboot, Refusal, StepKind};
use super::roster::{Feed, Roster};
use super::{DomainIds, Features, Hypervisor, OpenError, Site};
use crate::facts::unix_seconds;
use crate::files::{self, Durability};
pub(crate) use faults::Faults;

/// How soon an order in `sim.toml` is seen without a step.
const LOOK: Duration = Duration::from_millis(100);
/// The longest a destroy waits for a start that is being given up.
const GIVE_UP: Duration = Duration::from_secs(30);

/// The driver.
#[derive(Debug)]
pub struct Sim {
    roster: Arc<Roster>,
    ids: DomainIds,
    faults: Faults,
    domains: PathBuf,
}

impl Sim {
    /// Takes up the domains of this boot.
    pub fn open(site: Site) -> Result<Arc<Self>, OpenError> {
        let state_dir = &site.config.state_dir;
        let domains = state_dir.join("sim-domains");
        fs::create_dir_all(&domains)?;
        let roster = Roster::new(site.capacity);
        let boot = state_dir.join("sim-boot");
        let same_boot = fs::read_to_string(&boot).is_ok_and(|kept| kept == site.boot_id);
        if !same_boot {
            files::replace(&boot, site.boot_id.as_bytes(), Durability::Process)?;
        }
        for entry in fs::read_dir(&domains)? {
            let path = entry?.path();
            match fs::read(&path).ok().and_then(|content| serde_json::from_slice::<DomainState>(&content).ok()) {
                Some(state) if same_boot => roster.adopt(state),
                _ => fs::remove_file(&path)?,
            }
        }
        let ids = DomainIds::open(state_dir, &site.boot_id)?;
        let sim = Arc::new(Self { roster, ids, faults: Faults::open(state_dir, "sim"), domains });
        sim.carry_out_orders();
        let (watching, shutdown) = (Arc::clone(&sim), site.shutdown);
        site.tasks.spawn(async move {
            let mut look = interval(LOOK);
            look.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    _ = look.tick() => watching.carry_out_orders(),
                }
            }
        });
        Ok(sim)
    }

    fn carry_out_orders(&self) {
        for vm in self.faults.refresh() {
            if let Some(state) = self.roster.get(vm) {
                self.forget(&state.gone(Power::Crashed, "", "crashed"));
            }
        }
    }

    /// What every step begins with: its ordered failure, its delay.
    async fn begin(&self, step: StepKind) -> Result<(), Refusal> {
        self.carry_out_orders();
        self.faults.failure(step)?;
        let delay = self.faults.delay(step);
        if !delay.is_zero() {
            sleep(delay).await;
        }
        Ok(())
    }

    fn living(&self, vm: Uuid, step: StepKind, clean: bool) -> Result<DomainState, Refusal> {
        let state = self.roster.get(vm).ok_or_else(|| Refusal::no_such_domain(vm))?;
        step.check(state.power, clean)?;
        Ok(state)
    }

    fn path(&self, vm: Uuid) -> PathBuf {
        self.domains.join(format!("{vm}.json"))
    }

    /// The loss of power ends the domain anyway, so page cache is enough.
    fn keep(&self, state: &DomainState) -> io::Result<()> {
        files::replace(&self.path(state.vm), &serde_json::to_vec(state)?, Durability::Process)
    }

    fn forget(&self, last: &DomainState) {
        let _ = fs::remove_file(self.path(last.vm));
        self.roster.remove(last.clone());
    }

    /// A step that takes a living domain from one state to another.
    async fn change(
        &self,
        vm: Uuid,
        step: StepKind,
        by: &str,
        change: impl FnOnce(&mut DomainState) + Send,
    ) -> Result<DomainState, Refusal> {
        self.living(vm, step, false)?;
        self.begin(step).await?;
        // The delay is over: the domain may be another by now.
        let mut state = self.living(vm, step, false)?;
        change(&mut state);
        state.last_operation = by.to_owned();
        state.reason.clear();
        self.keep(&state).map_err(Refusal::failed)?;
        self.roster.publish(state.clone());
        Ok(state)
    }

    /// The guest is asked and obeys, or time is up. Gives the last state, if it went otherwise meanwhile.
    async fn guest_obeys(&self, vm: Uuid, domid: i64, limit: Duration) -> Result<Option<DomainState>, Refusal> {
        let Feed { all, mut changes } = self.roster.feed();
        if !all.iter().any(|domain| domain.vm == vm && domain.domid == domid) {
            return Err(Refusal::no_such_domain(vm));
        }
        let obeys = async {
            match self.faults.obeys_after() {
                Some(time) => sleep(time).await,
                None => std::future::pending().await,
            }
        };
        let goes = async {
            loop {
                match changes.recv().await {
                    Ok(state) if state.vm == vm && state.domid != domid => return state,
                    Ok(_) => {}
                    // Too many changes to follow: what counts is whether it is still there.
                    Err(_) => sleep(LOOK).await,
                }
                if self.roster.get(vm).is_none_or(|now| now.domid != domid) {
                    return DomainState::halted(vm, "", "");
                }
            }
        };
        tokio::select! {
            () = obeys => Ok(None),
            state = goes => Ok(Some(state)),
            () = sleep(limit) => {
                let detail = format!("the guest did not obey within {} ms", limit.as_millis());
                Err(Refusal::new(Reason::TimedOut, detail))
            }
        }
    }
}

#[async_trait]
impl Hypervisor for Sim {
    fn features(&self) -> Features {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Features { name: "sim", version, accelerator: "none", abilities: &[] }
    }

    fn roster(&self) -> &Arc<Roster> {
        &self.roster
    }

    async fn start(&self, spec: DomainSpec, paused: bool, by: &str) -> Result<DomainState, Refusal> {
        if spec.memory() == 0 {
            return Err(Refusal::new(Reason::BootFailed, "a domain needs memory"));
        }
        let reservation = self.roster.reserve(spec.vm, spec.memory())?;
        tokio::select! {
            began = self.begin(StepKind::Start) => began?,
            () = reservation.cancelled() => return Err(Refusal::failed("destroyed while it was being built")),
        }
        let state = DomainState {
            power: if paused { Power::Paused } else { Power::Running },
            domid: self.ids.next().map_err(Refusal::failed)?,
            memory_actual: spec.memory(),
            start_time: unix_seconds(),
            generation: spec.generation,
            ..DomainState::halted(spec.vm, by, "")
        };
        self.keep(&state).map_err(Refusal::failed)?;
        reservation.settle(state.clone());
        Ok(state)
    }

    async fn destroy(&self, vm: Uuid, by: &str) -> Result<DomainState, Refusal> {
        self.begin(StepKind::Destroy).await?;
        self.roster.cancel_building(vm, GIVE_UP).await?;
        let Some(state) = self.roster.get(vm) else {
            return Ok(DomainState::halted(vm, by, ""));
        };
        let last = state.gone(Power::Halted, by, "destroyed");
        self.forget(&last);
        Ok(last)
    }

    async fn pause(&self, vm: Uuid, by: &str) -> Result<DomainState, Refusal> {
        self.change(vm, StepKind::Pause, by, |state| state.power = Power::Paused).await
    }

    async fn unpause(&self, vm: Uuid, by: &str) -> Result<DomainState, Refusal> {
        self.change(vm, StepKind::Unpause, by, |state| state.power = Power::Running).await
    }

    async fn shutdown(&self, vm: Uuid, limit: Duration, by: &str) -> Result<DomainState, Refusal> {
        self.living(vm, StepKind::Shutdown, true)?;
        self.begin(StepKind::Shutdown).await?;
        let state = self.living(vm, StepKind::Shutdown, true)?;
        if let Some(gone) = self.guest_obeys(vm, state.domid, limit).await? {
            return Ok(gone);
        }
        let last = state.gone(Power::Halted, by, "guest-shutdown");
        self.forget(&last);
        Ok(last)
    }

    async fn reboot(&self, vm: Uuid, reboot: Reboot, by: &str) -> Result<DomainState, Refusal> {
        let state = self.living(vm, StepKind::Reboot, reboot.clean)?;
        if reboot.clean && self.guest_obeys(vm, state.domid, reboot.limit).await?.is_some() {
            return Err(Refusal::failed("the domain has ended meanwhile"));
        }
        let again = reboot.spec.filter(|spec| spec.memory() != state.memory_actual);
        if let Some(spec) = again {
            self.forget(&state.gone(Power::Halted, by, "guest-shutdown"));
            return self.start(spec, false, by).await;
        }
        self.change(vm, StepKind::Reboot, by, |state| {
            state.power = Power::Running;
            state.start_time = unix_seconds();
        })
        .await
    }
}
