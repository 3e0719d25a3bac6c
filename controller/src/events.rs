//! Events: the log is the feed, and a token is a place in it.
//!
//! `event.from` answers with what changed since the token, one event for each object, as soon as it is
//! committed. Since a token is a log index, it means the same on every host and survives every master.

mod waiting;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use datamodel::fields::registration;
use datamodel::{ClassId, ClassKind as _, MessageDef, OpaqueRef, Ref, Registration, Session, Value, errors, model};
use raft_store::{ChangeKind, CommitError, LogIndex, NewRow, Row, State};

use crate::call::{Call, Event, EventBatch, Reply};
use crate::failure::{Failure, Served, refuse};

use self::waiting::Interest;
pub(crate) use self::waiting::{Waiting, follow};

/// Waiting longer than this for one answer serves nobody.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);
const DEFAULT_WAIT: Duration = Duration::from_secs(24 * 3600);

/// Whether a message is served here.
pub(crate) fn serves(message: &MessageDef) -> bool {
    message.class.def().name == "event" && message.implicit.is_none()
}

/// Serves every message of the class event.
pub(crate) async fn serve(call: &Call, values: Vec<Value>) -> Served<Reply> {
    let mut values = values.into_iter();
    let mut next = || values.next().unwrap_or(Value::Void);
    match call.message.name {
        "from" => {
            let (classes, token, wait) = (strings(next()), text(&next()), next());
            from(call, &classes, &token, seconds(&wait)).await.map(Reply::Events)
        }
        "inject" => inject(call, &text(&next()), &text(&next())).await,
        "register" => register(call, strings(next())).await,
        "unregister" => unregister(call, &strings(next())).await,
        "next" => next_events(call).await.map(Reply::EventList),
        "get_current_id" => Ok(Reply::Value(Value::Int(i64::try_from(call.state.applied.0).unwrap_or(i64::MAX)))),
        _ => refuse(errors::not_implemented(call.message.full_name)),
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or("").to_owned()
}

fn strings(value: Value) -> Vec<String> {
    if let Value::Set(members) = value { members.iter().map(text).collect() } else { Vec::new() }
}

fn seconds(value: &Value) -> Duration {
    match value {
        Value::Float(seconds) if *seconds <= 0.0 => Duration::ZERO,
        Value::Float(seconds) => Duration::try_from_secs_f64(*seconds).unwrap_or(DEFAULT_WAIT).min(LONGEST_WAIT),
        _ => LONGEST_WAIT,
    }
}

/// What a client wants to hear of.
#[derive(Debug, Default)]
struct Subscription {
    all: bool,
    classes: BTreeSet<ClassId>,
    objects: BTreeSet<(ClassId, OpaqueRef)>,
}

impl Subscription {
    /// `*`, `class` or `class/reference`; the class in any case. What does not exist matches nothing.
    fn new<'a>(specifications: impl IntoIterator<Item = &'a str>) -> Self {
        let mut out = Self::default();
        for specification in specifications {
            if specification == "*" {
                out.all = true;
                continue;
            }
            let (class, reference) =
                specification.split_once('/').map_or((specification, None), |(class, rest)| (class, Some(rest)));
            let Some(class) = ClassId::from_event_name(&class.to_ascii_lowercase()) else { continue };
            match reference {
                None => drop(out.classes.insert(class)),
                Some(reference) => {
                    if let Ok(reference) = reference.parse() {
                        out.objects.insert((class, reference));
                    }
                }
            }
        }
        out
    }

    /// What wakes who waits for it: what it wants, and the end of the session.
    fn interests(&self, session: Ref<Session>) -> Vec<Interest> {
        let classes = self.classes.iter().map(|class| Interest::Class(*class));
        let objects = self.objects.iter().map(|(class, reference)| Interest::Object(*class, *reference));
        let wanted = self.all.then_some(Interest::Everything).into_iter().chain(classes).chain(objects);
        wanted.chain([Interest::Object(Session::ID, session.opaque())]).collect()
    }

    fn wants(&self, class: ClassId, reference: OpaqueRef) -> bool {
        let def = class.def();
        def.emits_events && (self.all || self.classes.contains(&class) || self.objects.contains(&(class, reference)))
    }
}

/// A token: the log index, twenty digits, and a second number that older clients expect.
fn token_text(index: LogIndex) -> String {
    format!("{:020},{:020}", index.0, 0)
}

fn parse_token(token: &str) -> Served<LogIndex> {
    if token.is_empty() {
        return Ok(LogIndex(0));
    }
    let bad = || Failure::Api(errors::event_from_token_parse_failure(token));
    let (index, second) = token.split_once(',').ok_or_else(bad)?;
    second.parse::<i64>().map_err(|_| bad())?;
    index.parse::<u64>().map(LogIndex).map_err(|_| bad())
}

fn event(state_change: raft_store::Change) -> Event {
    let operation = match state_change.kind {
        ChangeKind::Added => "add",
        ChangeKind::Modified => "mod",
        ChangeKind::Deleted => "del",
    };
    Event {
        id: state_change.index.0,
        class: state_change.class.def().event_name,
        operation,
        reference: state_change.reference,
        snapshot: state_change.row,
    }
}

fn collect(state: &State, subscription: &Subscription, after: LogIndex) -> Vec<Event> {
    let changes = state.changes_since(after).filter(|change| subscription.wants(change.class, change.reference));
    changes.map(event).collect()
}

fn counts(state: &State) -> Vec<(&'static str, usize)> {
    let stored = model().classes().iter().filter(|class| class.stored && !class.internal);
    stored.map(|class| (class.event_name, state.count(class.id))).collect()
}

/// Waits until something that is wanted has changed; the state in which it did, and the events.
/// Ends with an empty list when the time is up, with an error when the session or the lead is lost.
async fn wait(
    call: &Call,
    subscription: &Subscription,
    after: LogIndex,
    limit: Duration,
) -> Served<(Arc<State>, Vec<Event>)> {
    let mut leadership = call.shared.store.leadership();
    let deadline = tokio::time::Instant::now() + limit;
    let mut scanned = after;
    // ORDER: waiting first, then looking, or what happens between the two is told to nobody.
    let now = call.shared.store.state().applied;
    let waiter = call.shared.waiting.join(subscription.interests(call.session), now);
    loop {
        leadership.borrow_and_update();
        let over = tokio::time::Instant::now() >= deadline;
        let state = call.shared.store.read().await?;
        if state.row(call.session).is_none() {
            return refuse(errors::session_invalid(call.session));
        }
        if after < state.oldest_token() && after != LogIndex(0) {
            return refuse(errors::events_lost());
        }
        // What was scanned before without a find need not be scanned again: only newer changes can match.
        let found = state.changes_since(scanned).any(|change| subscription.wants(change.class, change.reference));
        if found {
            let events = collect(&state, subscription, after);
            if !events.is_empty() {
                return Ok((state, events));
            }
        }
        if over {
            return Ok((state, Vec::new()));
        }
        scanned = scanned.max(state.applied);
        tokio::select! {
            () = waiter.woken() => {}
            changed = leadership.changed() => changed.map_err(|_| Failure::NotLeader)?,
            // One last look: what is not wanted woke nobody, and the answer's token is of now.
            () = tokio::time::sleep_until(deadline) => {}
            () = call.shared.shutdown.cancelled() => return Err(Failure::NotLeader),
        }
    }
}

async fn from(call: &Call, classes: &[String], token: &str, limit: Duration) -> Served<EventBatch> {
    let subscription = Subscription::new(classes.iter().map(String::as_str));
    let after = parse_token(token)?;
    let (state, events) = wait(call, &subscription, after, limit).await?;
    // A token of the future stays what it is: the client has seen more than this host can tell.
    let token = token_text(state.applied.max(after));
    Ok(EventBatch { events, valid_ref_counts: counts(&state), token })
}

async fn inject(call: &Call, class: &str, reference: &str) -> Served<Reply> {
    let invalid = || Failure::Api(errors::handle_invalid(class, reference));
    let id =
        ClassId::named(class).or_else(|| ClassId::from_event_name(&class.to_ascii_lowercase())).ok_or_else(invalid)?;
    let object: OpaqueRef = reference.parse().map_err(|_| invalid())?;
    if call.state.row_of(id, object).is_none() {
        return Err(invalid());
    }
    let mut change = call.transaction();
    change.touch(id, object);
    let index = call.commit(change).await?;
    Ok(Reply::Value(Value::str(token_text(LogIndex(index.0.saturating_sub(1))))))
}

fn registration_of(state: &State, session: Ref<Session>) -> Option<Arc<Row>> {
    state.all::<Registration>().find(|row| row.get(registration::SESSION) == session).cloned()
}

async fn register(call: &Call, classes: Vec<String>) -> Served<Reply> {
    let mut change = call.transaction();
    match registration_of(&call.state, call.session) {
        Some(row) => {
            let mut known = row.get(registration::CLASSES);
            known.extend(classes.into_iter().filter(|class| !row.get(registration::CLASSES).contains(class)));
            change.set(row.typed::<Registration>(), registration::CLASSES, known);
        }
        None => {
            // A registration starts at the present.
            let cursor = i64::try_from(call.state.applied.0).unwrap_or(i64::MAX);
            change.insert(
                NewRow::new(call.reference::<Registration>(), call.uuid())
                    .with(registration::SESSION, call.session)
                    .with(registration::CLASSES, classes)
                    .with(registration::CURSOR, cursor),
            );
        }
    }
    call.commit(change).await?;
    Ok(Reply::Value(Value::Void))
}

async fn unregister(call: &Call, classes: &[String]) -> Served<Reply> {
    if let Some(row) = registration_of(&call.state, call.session) {
        let mut known = row.get(registration::CLASSES);
        known.retain(|class| !classes.contains(class));
        let reference = row.typed::<Registration>();
        let mut change = call.transaction();
        if known.is_empty() {
            change.delete(reference);
        } else {
            change.set(reference, registration::CLASSES, known);
        }
        call.commit(change).await?;
    }
    Ok(Reply::Value(Value::Void))
}

async fn next_events(call: &Call) -> Served<Vec<Event>> {
    loop {
        let state = call.latest().await?;
        let row = registration_of(&state, call.session).ok_or_else(|| errors::session_not_registered(call.session))?;
        let classes = row.get(registration::CLASSES);
        let subscription = Subscription::new(classes.iter().map(String::as_str));
        let cursor = LogIndex(u64::try_from(row.get(registration::CURSOR)).unwrap_or(0));
        let waited = wait(call, &subscription, cursor, LONGEST_WAIT).await;
        let read = match &waited {
            Ok((state, _)) => state.applied,
            // Told once: who has read everything anew goes on from here.
            Err(Failure::Api(error)) if error.code == errors::EVENTS_LOST => call.latest().await?.applied,
            Err(failure) => return Err(failure.clone()),
        };
        let mut change = call.transaction();
        change.expect_row(&row).set(
            row.typed::<Registration>(),
            registration::CURSOR,
            i64::try_from(read.0).unwrap_or(i64::MAX),
        );
        match call.shared.store.commit(change).await {
            Ok(_) => return waited.map(|(_, events)| events),
            // Another reader of the same registration was told these: each event goes to one of them.
            Err(CommitError::Conflict(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
