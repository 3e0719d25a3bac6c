//! Clients at work on a pool, at every host of it, while others do it harm; and the record of what they saw.
//!
//! Readers and watchers stay with one host each, whatever becomes of it: a paused host that wakes must not tell them
//! what it knew before. Writers go to the next host when theirs does not serve them, and never ask twice, so that the
//! fate of each write is one question; makers of objects ask again under their key until they are answered.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::growing::Growing;
use super::making::{self, Making};
use super::register::Register;
use super::watching::{self, Batch, Told};
use super::{Outcome, Span, Violation, must_be_kept};
use crate::client::{CallError, Client, Endpoint};
use crate::lab::Lab;

/// Keys that are added are named so; a VM has others.
const KEY: &str = "added-";
/// What the descriptions are before the first write.
const BEGINNING: &str = "nobody wrote yet";
/// VMs that are made under a key.
const MADE: &str = "made-";
const OBJECTS: usize = 2;
/// Between two calls of one client.
const PACE: Duration = Duration::from_millis(8);
/// A record with thousands of keys would be all that is measured.
const KEY_PACE: Duration = Duration::from_millis(40);
const MAKING_PACE: Duration = Duration::from_millis(50);
const OPERATION_PACE: Duration = Duration::from_millis(30);
/// So much more slowly the clients work while nothing but time passes: of minutes at full speed the record has gigabytes.
const LEISURE: u32 = 25;
/// After a call that was not served.
const PAUSE: Duration = Duration::from_millis(15);
/// Longer than any pause of a host in these tests, so that its answers from after the pause are seen.
const CALL_LIMIT: Duration = Duration::from_secs(12);
const SOON: Duration = Duration::from_secs(20);

/// What one client reports.
enum Report {
    Writes(usize, Vec<(String, Span, Outcome)>),
    Adds(usize, Vec<(String, Span, Outcome)>),
    Views(Vec<View>),
    Makings(Vec<Making>),
    Watch(String, Vec<Batch>, Vec<View>),
    Nothing,
}

/// One of the VMs as somebody saw it.
struct View {
    object: usize,
    description: String,
    keys: BTreeSet<String>,
    span: Span,
}

/// What all clients share.
#[derive(Clone)]
struct Run {
    start: Instant,
    stop: Arc<AtomicBool>,
    leisurely: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    objects: Arc<[String; OBJECTS]>,
    template: Arc<str>,
}

impl Run {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// Waits for a client's next call.
    async fn pace(&self, usual: Duration) {
        sleep(usual * if self.leisurely.load(Ordering::Relaxed) { LEISURE } else { 1 }).await;
    }

    /// A call, and when it was under way.
    async fn timed<T>(&self, call: impl Future<Output = T>) -> (T, Span) {
        let begun = self.start.elapsed();
        let answer = call.await;
        (answer, Span { begun, ended: self.start.elapsed() })
    }
}

/// Clients at work, until [`settle`](Self::settle).
pub struct Load {
    run: Run,
    clients: JoinSet<anyhow::Result<Report>>,
}

impl Load {
    /// Lets clients loose on every host of a lab, all in one session.
    pub async fn start(lab: &Lab) -> anyhow::Result<Self> {
        let mut client = lab.client().await?;
        let template = template(&mut client).await?;
        let mut made = Vec::new();
        for name in ["one", "two", "started and stopped"] {
            let vm = text(&client.call("VM.clone", json!([template, name])).await?)?;
            client.call("VM.set_name_description", json!([vm, BEGINNING])).await?;
            made.push(vm);
        }
        let [one, two, runner] = <[String; 3]>::try_from(made).map_err(|_| anyhow::anyhow!("three VMs"))?;
        client.call("VM.provision", json!([runner])).await?;
        let run = Run {
            start: Instant::now(),
            stop: Arc::default(),
            leisurely: Arc::default(),
            acknowledged: Arc::default(),
            objects: Arc::new([one, two]),
            template: template.into(),
        };
        let mut clients = JoinSet::new();
        let endpoints = lab.made().hosts.iter().map(|host| host.endpoint()).collect::<anyhow::Result<Vec<_>>>()?;
        let roaming = |place: usize| client.at(&endpoints[place % endpoints.len()]).with_call_limit(CALL_LIMIT);
        for object in 0..OBJECTS {
            for writer in 0..2 {
                clients.spawn(write(run.clone(), roaming(object + writer), object, writer));
            }
            clients.spawn(add(run.clone(), roaming(object), object));
        }
        clients.spawn(make(run.clone(), roaming(1)));
        clients.spawn(operate(run.clone(), roaming(0), runner.clone()));
        for endpoint in &endpoints {
            clients.spawn(read(run.clone(), pinned(&client, endpoint)));
            clients.spawn(watch(run.clone(), pinned(&client, endpoint)));
        }
        Ok(Self { run, clients })
    }

    /// Waits until so many more writes were acknowledged: the pool serves.
    pub async fn some_more(&mut self, count: u64) -> anyhow::Result<()> {
        let goal = self.run.acknowledged.load(Ordering::Relaxed) + count;
        let deadline = Instant::now() + SOON;
        while self.run.acknowledged.load(Ordering::Relaxed) < goal {
            // No client ends before it is told to, unless something is wrong.
            if let Some(ended) = self.clients.try_join_next() {
                ended??;
                bail!("a client has ended");
            }
            if Instant::now() > deadline {
                bail!("no {count} writes were acknowledged within {} s", SOON.as_secs());
            }
            sleep(PAUSE).await;
        }
        Ok(())
    }

    /// Lets time pass, in which the clients go on slowly.
    pub async fn at_leisure(&self, passes: Duration) {
        self.run.leisurely.store(true, Ordering::Relaxed);
        sleep(passes).await;
        self.run.leisurely.store(false, Ordering::Relaxed);
    }

    /// How many writes were acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.run.acknowledged.load(Ordering::Relaxed)
    }

    /// Ends the clients, judges what they saw, and looks that the pool has nothing left half done.
    pub async fn settle(mut self, lab: &Lab) -> anyhow::Result<()> {
        self.run.stop.store(true, Ordering::Relaxed);
        let mut client = lab.client().await?;
        let mut history = History::default();
        while let Some(report) = self.clients.join_next().await {
            history.take(report??);
        }
        // What everybody must see in the end.
        for (object, vm) in self.run.objects.iter().enumerate() {
            let asked = client.persist(SOON, "VM.get_record", json!([vm]));
            let (record, span) = self.run.timed(asked).await;
            history.views.push(view(object, &record?, span)?);
        }
        let there = client.persist(SOON, "VM.get_all_records", Value::Null).await?;
        let mut objects = BTreeMap::new();
        for (reference, vm) in there.as_object().context("no VMs")? {
            objects.insert(reference.clone(), text(&vm["name_label"])?);
        }
        must_be_kept(&history.check(&objects))?;
        history.must_be_worth_something()?;
        nothing_is_left_half_done(&mut client).await
    }
}

/// All that was seen.
#[derive(Default)]
struct History {
    writes: [Vec<(String, Span, Outcome)>; OBJECTS],
    adds: [Vec<(String, Span, Outcome)>; OBJECTS],
    views: Vec<View>,
    makings: Vec<Making>,
    watches: Vec<(String, Vec<Batch>)>,
}

impl History {
    fn take(&mut self, report: Report) {
        match report {
            Report::Writes(object, writes) => self.writes[object].extend(writes),
            Report::Adds(object, adds) => self.adds[object].extend(adds),
            Report::Views(views) => self.views.extend(views),
            Report::Makings(makings) => self.makings.extend(makings),
            Report::Watch(name, batches, views) => {
                self.watches.push((name, batches));
                self.views.extend(views);
            }
            Report::Nothing => {}
        }
    }

    fn check(&self, objects: &BTreeMap<String, String>) -> Vec<Violation> {
        let mut found = making::check(&self.makings, objects);
        for object in 0..OBJECTS {
            let views = || self.views.iter().filter(move |view| view.object == object);
            let register = Register {
                initial: BEGINNING.to_owned(),
                writes: self.writes[object].clone(),
                reads: views().map(|view| (view.description.clone(), view.span)).collect(),
            };
            found.extend(register.check(&format!("name_description of VM {object}")));
            let growing = Growing {
                adds: self.adds[object].clone(),
                reads: views().map(|view| (view.keys.clone(), view.span)).collect(),
            };
            found.extend(growing.check(&format!("other_config of VM {object}")));
        }
        for (watcher, batches) in &self.watches {
            found.extend(watching::check(watcher, batches));
        }
        found
    }

    /// A history in which nothing happened proves nothing.
    fn must_be_worth_something(&self) -> anyhow::Result<()> {
        let done = |calls: &[(String, Span, Outcome)]| calls.iter().filter(|call| call.2 == Outcome::Done).count();
        let made = self.makings.iter().filter(|call| call.outcome == Outcome::Done).count();
        let told: usize = self.watches.iter().flat_map(|(_, batches)| batches).map(|batch| batch.events.len()).sum();
        let counts = [
            ("writes", done(&self.writes[0]).min(done(&self.writes[1]))),
            ("added keys", done(&self.adds[0]).min(done(&self.adds[1]))),
            ("made VMs", made),
            ("views", self.views.len()),
            ("events", told),
        ];
        eprintln!("the history: {counts:?}");
        match counts.into_iter().find(|(_, count)| *count < 10) {
            Some((what, count)) => bail!("only {count} {what}: nothing was tried"),
            None => Ok(()),
        }
    }
}

/// After any fault each task has ended or is being worked on, and no object is held by an operation that nobody does.
async fn nothing_is_left_half_done(client: &mut Client) -> anyhow::Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let vms = client.persist(SOON, "VM.get_all_records", Value::Null).await?;
        let tasks = client.persist(SOON, "task.get_all_records", Value::Null).await?;
        let records = |of: &Value| of.as_object().into_iter().flatten().map(|(_, it)| it.clone()).collect::<Vec<_>>();
        let held = records(&vms).into_iter().filter(|vm| vm["current_operations"] != json!({})).collect::<Vec<_>>();
        let open = records(&tasks).into_iter().filter(|task| task["status"] == "pending").collect::<Vec<_>>();
        if held.is_empty() && open.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("left half done after {} s: VMs {held:?}, tasks {open:?}", SOON.as_secs());
        }
        sleep(PAUSE).await;
    }
}

fn text(value: &Value) -> anyhow::Result<String> {
    Ok(value.as_str().with_context(|| format!("{value} is no string"))?.to_owned())
}

async fn template(client: &mut Client) -> anyhow::Result<String> {
    let vms = client.call("VM.get_all_records", Value::Null).await?;
    let templates = vms.as_object().into_iter().flatten().filter(|(_, vm)| vm["is_a_template"] == true);
    let named = templates.filter(|(_, vm)| vm["name_label"] == "Other install media").map(|(reference, _)| reference);
    named.min().cloned().context("the pool has no template")
}

fn pinned(client: &Client, to: &Endpoint) -> Client {
    client.only_at(to).with_call_limit(CALL_LIMIT)
}

/// What an answer says of the change that was asked for. What no fault excuses is an error.
fn outcome(result: &Result<Value, CallError>) -> anyhow::Result<Outcome> {
    match result {
        Ok(_) => Ok(Outcome::Done),
        Err(CallError::Unreached { .. }) => Ok(Outcome::Refused),
        Err(CallError::Lost { .. } | CallError::Late { .. }) => Ok(Outcome::Unknown),
        Err(CallError::Refused(failure)) => match failure.code.as_str() {
            "HOST_IS_SLAVE" | "HOST_IN_EMERGENCY_MODE" | "HOST_STILL_BOOTING" | "MAP_DUPLICATE_KEY" => {
                Ok(Outcome::Refused)
            }
            "INTERNAL_ERROR" => Ok(Outcome::Unknown),
            _ => bail!("no fault excuses {failure}"),
        },
        Err(error @ CallError::Malformed { .. }) => bail!("{error}"),
    }
}

async fn write(run: Run, mut client: Client, object: usize, writer: usize) -> anyhow::Result<Report> {
    let mut writes = Vec::new();
    for number in 0_u64.. {
        if !run.goes_on() {
            break;
        }
        let value = format!("{writer}-{number}");
        let asked = client.call("VM.set_name_description", json!([run.objects[object], value]));
        let (answer, span) = run.timed(asked).await;
        let outcome = outcome(&answer)?;
        writes.push((value, span, outcome));
        if outcome == Outcome::Done {
            run.acknowledged.fetch_add(1, Ordering::Relaxed);
            run.pace(PACE).await;
        } else {
            client.turn_to_next();
            sleep(PAUSE).await;
        }
    }
    Ok(Report::Writes(object, writes))
}

async fn add(run: Run, mut client: Client, object: usize) -> anyhow::Result<Report> {
    let mut adds = Vec::new();
    for number in 0_u64.. {
        if !run.goes_on() {
            break;
        }
        let key = format!("{KEY}{number}");
        let asked = client.call("VM.add_to_other_config", json!([run.objects[object], key, "value"]));
        let (answer, span) = run.timed(asked).await;
        let outcome = outcome(&answer)?;
        adds.push((key, span, outcome));
        if outcome != Outcome::Done {
            client.turn_to_next();
        }
        run.pace(KEY_PACE).await;
    }
    Ok(Report::Adds(object, adds))
}

async fn make(run: Run, mut client: Client) -> anyhow::Result<Report> {
    let mut makings = Vec::new();
    for number in 0_u64.. {
        if !run.goes_on() {
            break;
        }
        let name = format!("{MADE}{number}");
        client.set_key(&name);
        // Whoever has the answer asks once more, at another host: it must be the same.
        let mut answers = 0;
        let deadline = Instant::now() + SOON;
        while answers < 2 && Instant::now() < deadline {
            let answer = client.call("VM.clone", json!([*run.template, name])).await;
            let outcome = outcome(&answer)?;
            let reference = answer.ok().map(|value| text(&value)).transpose()?;
            makings.push(Making { name: name.clone(), outcome, reference });
            answers += u32::from(outcome == Outcome::Done);
            client.turn_to_next();
            sleep(PAUSE).await;
        }
        run.pace(MAKING_PACE).await;
    }
    Ok(Report::Makings(makings))
}

/// Starts and stops a VM, behind tasks and without, and cares for nothing but that it is left settled.
async fn operate(run: Run, mut client: Client, vm: String) -> anyhow::Result<Report> {
    let calls = [
        ("VM.start", json!([vm, false, false])),
        ("VM.hard_shutdown", json!([vm])),
        ("Async.VM.start", json!([vm, false, false])),
        ("Async.VM.hard_shutdown", json!([vm])),
    ];
    for (method, parameters) in calls.iter().cycle() {
        if !run.goes_on() {
            break;
        }
        if let Err(error) = client.call(method, parameters.clone()).await {
            if error.is("SESSION_INVALID") {
                bail!("{method}: {error}");
            }
            client.turn_to_next();
        }
        run.pace(OPERATION_PACE).await;
    }
    Ok(Report::Nothing)
}

/// A read or a watch that failed with what no fault excuses ends the test.
fn excused(error: CallError) -> anyhow::Result<()> {
    outcome(&Err(error)).map(drop)
}

fn view(object: usize, record: &Value, span: Span) -> anyhow::Result<View> {
    let keys = record["other_config"].as_object().context("no other_config")?.keys();
    let keys = keys.filter(|key| key.starts_with(KEY)).cloned().collect();
    Ok(View { object, description: text(&record["name_description"])?, keys, span })
}

async fn read(run: Run, mut client: Client) -> anyhow::Result<Report> {
    let mut views = Vec::new();
    for object in (0..OBJECTS).cycle() {
        if !run.goes_on() {
            break;
        }
        let parameters = json!([client.session(), run.objects[object]]);
        let (answer, span) = run.timed(client.plain("VM.get_record", &parameters)).await;
        match answer {
            Ok(record) => views.push(view(object, &record, span)?),
            Err(error) => {
                excused(error)?;
                sleep(PAUSE).await;
            }
        }
        run.pace(PACE).await;
    }
    Ok(Report::Views(views))
}

fn index(token: &str) -> anyhow::Result<u64> {
    if token.is_empty() {
        return Ok(0);
    }
    let (index, _) = token.split_once(',').with_context(|| format!("{token:?} is no token"))?;
    Ok(index.parse()?)
}

/// Watches all VMs. What it knows of the two after each answer counts as read by that call.
async fn watch(run: Run, mut client: Client) -> anyhow::Result<Report> {
    let (mut batches, mut views) = (Vec::new(), Vec::new());
    let mut token = String::new();
    let mut known: [Option<Value>; OBJECTS] = [const { None }; OBJECTS];
    while run.goes_on() {
        let parameters = json!([client.session(), ["vm"], token, 1.0]);
        let (answer, span) = run.timed(client.plain("event.from", &parameters)).await;
        let batch = match answer {
            Ok(batch) => batch,
            Err(error) => {
                excused(error)?;
                sleep(PAUSE).await;
                continue;
            }
        };
        let next = text(&batch["token"])?;
        let mut events = Vec::new();
        for event in batch["events"].as_array().context("no events")? {
            let reference = text(&event["ref"])?;
            if let Some(object) = run.objects.iter().position(|vm| *vm == reference) {
                known[object] = Some(event["snapshot"].clone());
            }
            let (id, operation) = (text(&event["id"])?.parse()?, text(&event["operation"])?);
            events.push(Told { id, operation, reference });
        }
        batches.push(Batch { span, from: index(&token)?, to: index(&next)?, events });
        for (object, record) in known.iter().enumerate() {
            let record = record.as_ref().context("a first answer without the VMs that were there")?;
            views.push(view(object, record, span)?);
        }
        token = next;
        run.pace(PACE).await;
    }
    Ok(Report::Watch(client.endpoint().to_string(), batches, views))
}
