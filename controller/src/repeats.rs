//! Calls that may be asked twice and are done once.
//!
//! A caller that sends an `Idempotency-Key` may repeat its call after a lost answer, on any host, and gets what the
//! first one came to. The answer is a row, named by who asks and by the key, and made in the very transaction that has
//! the call's effect: either both are there or neither is. A call that goes on after that transaction (an operation)
//! leaves the answer open and closes it together with its outcome; whoever asks meanwhile waits for that.
//!
//! Errors that were found before anything was changed are not kept: asking again finds them again, or does better.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use datamodel::fields::{answer, operation, session};
use datamodel::{Answer, ApiError, ClassKind, Implicit, Input, MessageDef, Operation, Ref, Timestamp, Value};
use datamodel::{convert, encode, errors};
use parking_lot::Mutex;
use raft_store::{NewRow, Row, State, Transaction};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::call::{Call, Caller, Reply};
use crate::controller::Shared;
use crate::failure::{Failure, Served, described, refuse};
use crate::in_hand::Hold;
use crate::operations::CLEAN_LIMIT;

/// Keys that a host gave to a call which it sent on, and that no client knows.
pub const OWN_KEY: &str = "xenith-";
/// A client may ask again for this long.
const KEPT_SECONDS: i64 = 24 * 3600;
/// A host asks again at once or not at all.
const OWN_KEPT_SECONDS: i64 = 600;
/// More than this many answers are not kept; the oldest go first.
const KEPT_ANSWERS: usize = 20_000;
/// A repeated call waits no longer for the first one than that may take.
const WAIT_LIMIT: Duration = CLEAN_LIMIT.saturating_add(Duration::from_secs(300));
const PASS_EVERY: Duration = Duration::from_secs(60);

const OPEN: &str = "open";
const DONE: &str = "done";
const FAILED: &str = "failed";

/// How a call is known again.
#[derive(Debug)]
pub(crate) struct Repeat {
    reference: Ref<Answer>,
    call: String,
    kept: i64,
    recorded: AtomicBool,
    /// Its answer is in hand, from the transaction that is to record it on.
    held: Mutex<Option<Hold>>,
}

/// What a transaction says of the call that commits it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Stage {
    /// More is to come: the call's outcome is not known yet.
    Open,
    /// With this transaction the call is done, and answers this.
    Done(Value),
}

impl Repeat {
    /// None where the caller sent no key, or the call changes nothing.
    pub(crate) fn of(caller: &Caller, session: Option<&Row>, message: &MessageDef, values: &[Value]) -> Option<Self> {
        let key = caller.idempotency_key.as_deref()?;
        let who = session?;
        if !changes(message) {
            return None;
        }
        let name = who.get(session::AUTH_USER_NAME);
        let digest = |parts: &[&[u8]]| {
            let mut hash = Sha256::new();
            for part in parts {
                hash.update(u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
                hash.update(part);
            }
            <[u8; 32]>::from(hash.finalize())
        };
        let named = digest(&[name.as_bytes(), key.as_bytes()]);
        let mut asked = Vec::new();
        for value in values {
            encode::json(value, &mut asked);
            asked.push(b',');
        }
        // With the key in it, nobody who reads the row can try out what a secret among the arguments may have been.
        let call = digest(&[key.as_bytes(), message.full_name.as_bytes(), &asked]);
        Some(Self {
            reference: Ref::new(Uuid::from_u128(u128::from_be_bytes(first_half(&named)))),
            call: call.iter().map(|byte| format!("{byte:02x}")).collect(),
            kept: if key.starts_with(OWN_KEY) { OWN_KEPT_SECONDS } else { KEPT_SECONDS },
            recorded: AtomicBool::new(false),
            held: Mutex::new(None),
        })
    }

    /// The row's reference, for an operation that will close it.
    pub(crate) fn reference(&self) -> Ref<Answer> {
        self.reference
    }

    /// Adds the answer to a transaction of its call.
    pub(crate) fn record(&self, shared: &Shared, change: &mut Transaction, stage: &Stage) {
        if self.recorded.load(Ordering::Relaxed) {
            show(change, self.reference, stage);
            return;
        }
        self.held.lock().get_or_insert_with(|| shared.in_hand.hold(self.reference.opaque()));
        let epoch = shared.epoch().map_or(0, |epoch| i64::try_from(epoch.0).unwrap_or(i64::MAX));
        change.expect_absent(Answer::ID, self.reference.opaque()).insert(
            NewRow::new(self.reference, shared.uuid())
                .with(answer::CALL, self.call.clone())
                .with(answer::EPOCH, epoch)
                .with(answer::EXPIRES, Timestamp(shared.now().0.saturating_add(self.kept))),
        );
        show(change, self.reference, stage);
    }

    /// The transaction that recorded the answer was committed.
    pub(crate) fn committed(&self) {
        self.recorded.store(true, Ordering::Relaxed);
    }

    /// The transaction that was to record the answer was not committed: if it is there it is another call's.
    pub(crate) fn refused(&self) {
        if !self.is_recorded() {
            *self.held.lock() = None;
        }
    }

    pub(crate) fn is_recorded(&self) -> bool {
        self.recorded.load(Ordering::Relaxed)
    }
}

fn first_half(digest: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|place| digest[place])
}

/// Whether a call may have an effect worth remembering.
fn changes(message: &MessageDef) -> bool {
    let class = message.class.def().name;
    // A session is made anew at no cost; what a session has read is not an effect.
    if class == "session" || class == "event" {
        return false;
    }
    match message.implicit {
        Some(implicit) => !matches!(
            implicit,
            Implicit::GetAll
                | Implicit::GetAllRecords
                | Implicit::GetAllWhere
                | Implicit::GetAllRecordsWhere
                | Implicit::GetByUuid
                | Implicit::GetByNameLabel
                | Implicit::GetRecord
                | Implicit::Get(_)
        ),
        None => !message.name.starts_with("get_") && !message.name.starts_with("assert_"),
    }
}

fn show(change: &mut Transaction, reference: Ref<Answer>, stage: &Stage) {
    match stage {
        Stage::Open => change.set(reference, answer::STATE, OPEN.to_owned()),
        Stage::Done(value) => close(change, reference, Ok(value)),
    };
}

/// Adds a call's end to a transaction.
pub(crate) fn close<'t>(
    change: &'t mut Transaction,
    reference: Ref<Answer>,
    outcome: Result<&Value, &ApiError>,
) -> &'t mut Transaction {
    match outcome {
        Ok(value) => {
            let mut text = Vec::new();
            encode::json(value, &mut text);
            change.set(reference, answer::RESULT, String::from_utf8_lossy(&text).into_owned());
            change.set(reference, answer::STATE, DONE.to_owned())
        }
        Err(error) => {
            change.set(reference, answer::ERROR, error.description());
            change.set(reference, answer::STATE, FAILED.to_owned())
        }
    }
}

/// What the same call came to before; none where it has had no effect yet. Waits for one that is under way.
///
/// # Errors
/// What the first one was refused with; `VALUE_NOT_SUPPORTED` where the key stood for another call.
pub(crate) async fn answered(shared: &Shared, repeat: &Repeat, message: &MessageDef) -> Served<Option<Reply>> {
    let mut applied = shared.store.applied();
    let waiting = async {
        loop {
            applied.borrow_and_update();
            let state = shared.store.read().await?;
            let Some(row) = state.row(repeat.reference) else { return Ok(None) };
            if row.get(answer::CALL) != repeat.call {
                let why = "the key was used for another call";
                return refuse(errors::value_not_supported("Idempotency-Key", "", why));
            }
            match row.get(answer::STATE).as_str() {
                DONE => return Ok(Some(Reply::Value(result(message, row.get(answer::RESULT))))),
                FAILED => return refuse(described(row.get(answer::ERROR))),
                _ => {}
            }
            if applied.changed().await.is_err() {
                return Err(Failure::NotLeader);
            }
        }
    };
    match tokio::time::timeout(WAIT_LIMIT, waiting).await {
        Ok(known) => known,
        Err(_) => refuse(errors::internal_error("the first call with this key is still under way")),
    }
}

/// A recorded result. Tasks stand for calls behind them, whatever those answer.
fn result(message: &MessageDef, text: String) -> Value {
    let Ok(json) = serde_json::from_str::<serde_json::Value>(&text) else { return Value::Void };
    let input = Input::from(json);
    if let Input::Str(text) = &input
        && let Ok(reference) = text.parse()
    {
        return Value::Ref(reference);
    }
    convert(&message.result, input, "result").unwrap_or(Value::Void)
}

/// Ends a call that was recorded: as it was foreseen, which costs nothing, or otherwise.
pub(crate) async fn end(call: &Call, foreseen: Option<Stage>, outcome: Result<&Value, &ApiError>) {
    let Some(repeat) = call.repeat.as_ref().filter(|repeat| repeat.is_recorded()) else { return };
    if let (Some(Stage::Done(foreseen)), Ok(value)) = (&foreseen, outcome)
        && foreseen == value
    {
        return;
    }
    let state = call.shared.store.state();
    let settled = state.row(repeat.reference).is_some_and(|row| row.get(answer::STATE) != OPEN);
    if settled && matches!(foreseen, Some(Stage::Open)) {
        // The operation closed it with its outcome.
        return;
    }
    let mut change = call.transaction();
    change.expect_exists(Answer::ID, repeat.reference.opaque());
    close(&mut change, repeat.reference, outcome);
    if let Err(error) = call.shared.store.commit(change).await {
        tracing::warn!(message = call.message.full_name, %error, "a repeatable answer stays open until the next master");
    }
}

/// Open answers that no operation will close and nobody has in hand: their calls were broken off half-way.
pub(crate) async fn fail_orphans(shared: &Arc<Shared>, state: &State) -> Served<()> {
    let mut change = shared.transaction();
    for row in orphans(shared, state) {
        let lost = errors::internal_error("this call was broken off after it had begun; look before asking anew");
        // It may have been closed since.
        change.expect(row.typed::<Answer>(), answer::STATE, OPEN.to_owned());
        close(&mut change, row.typed(), Err(&lost));
    }
    if !change.is_empty() {
        shared.store.commit(change).await?;
    }
    Ok(())
}

fn orphans(shared: &Shared, state: &State) -> Vec<Arc<Row>> {
    let open = |row: &&Arc<Row>| row.get(answer::STATE) == OPEN && !shared.in_hand.has(row.reference);
    let mut open: Vec<_> = state.all::<Answer>().filter(open).cloned().collect();
    if !open.is_empty() {
        let closing: Vec<String> =
            state.all::<Operation>().filter_map(|row| row.get(operation::PARAMETERS).get(ANSWER).cloned()).collect();
        open.retain(|row| !closing.contains(&row.reference.to_string()));
    }
    open
}

/// How many calls are known to be under way.
#[cfg(test)]
pub(crate) fn open(state: &State) -> usize {
    state.all::<Answer>().filter(|row| row.get(answer::STATE) == OPEN).count()
}

/// The parameter of an operation that names the answer which it closes.
pub(crate) const ANSWER: &str = "answer";

/// Forgets answers that nobody will ask for again.
pub(crate) async fn collect(shared: &Arc<Shared>) {
    loop {
        tokio::time::sleep(PASS_EVERY).await;
        if let Err(error) = pass(shared).await {
            tracing::warn!(?error, "answers were not collected");
        }
    }
}

pub(crate) async fn pass(shared: &Arc<Shared>) -> Served<()> {
    let state = shared.store.read().await?;
    let now = shared.grown();
    let mut kept = Vec::new();
    let mut change = shared.transaction();
    for row in state.all::<Answer>().filter(|row| row.get(answer::STATE) != OPEN) {
        if row.get(answer::EXPIRES) < now {
            change.delete(row.typed::<Answer>());
        } else {
            kept.push((row.created, row.typed::<Answer>()));
        }
    }
    kept.sort_unstable();
    let surplus = kept.len().saturating_sub(KEPT_ANSWERS);
    for (_, reference) in kept.drain(..surplus) {
        change.delete(reference);
    }
    if !change.is_empty() {
        shared.store.commit(change).await?;
    }
    Ok(())
}
