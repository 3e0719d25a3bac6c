//! A simulated network: what is sent arrives late, in another order than on another connection, twice, or never.
//!
//! Peers speak HTTP over it, as they do over sockets, but nothing is encrypted and no bytes are framed. An exchange (one
//! call of gRPC, with a stream of frames each way) keeps its order, as a connection does, and breaks as a whole. Two
//! exchanges overtake each other. What is sent over a link that is cut waits: when the link is mended soon it arrives
//! after all, long after its time; when it is not, the exchange breaks. The frames of an exchange may reach their
//! receiver a second time, in an exchange whose answers nobody hears.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::poll_fn;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use parking_lot::Mutex;
use raft_store::{Dial, OpenError, PeerChannel};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;
use tonic::body::Body;
use tower::util::BoxCloneSyncService;

use crate::chance::Chance;
use crate::kernel;
use crate::tell;
use crate::trace::Trace;

/// A process's place on the network.
pub type Place = u64;

type Item = Result<Frame<Bytes>, Status>;
type Head = Result<http::response::Parts, Status>;
type Deliver = Box<dyn FnOnce() + Send>;

/// An exchange breaks when nothing came through for so long: two unanswered questions whether the other end is there.
const KEEP_ALIVE: i64 = 4_000_000_000;
/// Who cannot connect is told after so long.
const CONNECT: Duration = Duration::from_millis(500);
/// So many of its last frames an exchange may be told a second time.
const REPEATED: usize = 6;

/// An exchange as its answering side finds it.
pub struct Incoming {
    /// The request; its body arrives over time.
    pub request: http::Request<Body>,
    exchange: u64,
    network: Network,
}

impl Incoming {
    /// Sends the response back; ends when it is sent or nobody is there any more.
    pub async fn answer(self, response: http::Response<Body>) {
        let (head, body) = response.into_parts();
        let exchange = self.exchange;
        self.network.answer_head(exchange, Ok(head));
        let network = self.network.clone();
        pump(body, move |item| network.answer(exchange, item)).await;
    }
}

/// Hands the frames of a body on, then `None`, until one is not wanted any more.
async fn pump(mut body: Body, hand_on: impl Fn(Option<Item>) -> bool) {
    while let Some(item) = body.frame().await {
        let broken = item.is_err();
        if !hand_on(Some(item)) || broken {
            return;
        }
    }
    hand_on(None);
}

fn body_of(mut items: mpsc::UnboundedReceiver<Item>, guard: Option<Guard>) -> Body {
    Body::new(StreamBody::new(poll_fn(move |context| {
        let _kept = &guard;
        items.poll_recv(context)
    })))
}

/// The network of a simulation.
#[derive(Clone)]
pub struct Network {
    inner: Arc<Mutex<Inner>>,
    trace: Trace,
}

struct Inner {
    chance: Chance,
    /// What is under way, by when it arrives.
    parcels: BTreeMap<(i64, u64), Parcel>,
    /// What waits for a link to be mended, in the order in which it was sent.
    held: BTreeMap<(Place, Place), Vec<Parcel>>,
    /// What waits at the sockets of a process that is stopped, in the order in which it came.
    asleep: BTreeMap<Place, Vec<Parcel>>,
    /// Links that are cut, and since when.
    cut: BTreeMap<(Place, Place), i64>,
    sent: u64,
    delay: (u64, u64),
    doors: BTreeMap<Place, mpsc::UnboundedSender<Incoming>>,
    exchanges: BTreeMap<u64, Exchange>,
    /// One in so many frames breaks its exchange, or is told twice; none at zero.
    faults: u64,
}

/// What is sent one after the other, as over a connection; none once something was lost.
pub struct Lane(Mutex<Option<i64>>);

impl Default for Lane {
    fn default() -> Self {
        Self(Mutex::new(Some(0)))
    }
}

struct Parcel {
    link: (Place, Place),
    exchange: Option<u64>,
    deliver: Deliver,
}

struct Exchange {
    from: Place,
    to: Place,
    head: http::request::Parts,
    repeated: Vec<Bytes>,
    forward: mpsc::UnboundedSender<Item>,
    /// The answering side's end of `forward`, until it is at the door.
    arriving: Option<mpsc::UnboundedReceiver<Item>>,
    answer_head: Option<oneshot::Sender<Head>>,
    back: mpsc::UnboundedSender<Item>,
    /// When the last frame of each direction arrives: order is kept.
    last: [i64; 2],
    ended: [bool; 2],
    calling: Option<tokio::task::AbortHandle>,
}

/// Ends an exchange when its caller is gone.
struct Guard {
    network: Network,
    exchange: u64,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.network.hang_up(self.exchange);
    }
}

fn lost(why: &str) -> Status {
    Status::unavailable(why)
}

impl Network {
    /// A network without faults.
    #[must_use]
    pub fn new(chance: Chance, trace: Trace) -> Self {
        let inner = Inner {
            chance,
            parcels: BTreeMap::new(),
            held: BTreeMap::new(),
            asleep: BTreeMap::new(),
            cut: BTreeMap::new(),
            sent: 0,
            delay: (100, 1_500),
            doors: BTreeMap::new(),
            exchanges: BTreeMap::new(),
            faults: 0,
        };
        Self { inner: Arc::new(Mutex::new(inner)), trace }
    }

    /// One in so many frames breaks its exchange or is told twice; none at zero.
    pub fn set_faults(&self, one_in: u64) {
        self.inner.lock().faults = one_in;
    }

    /// From now on a way takes between so many microseconds.
    pub fn set_delay(&self, from: u64, to: u64) {
        self.inner.lock().delay = (from, to);
    }

    /// A process listens at a place.
    #[must_use]
    pub fn listen(&self, place: Place) -> mpsc::UnboundedReceiver<Incoming> {
        let (door, arrivals) = mpsc::unbounded_channel();
        self.inner.lock().doors.insert(place, door);
        arrivals
    }

    /// How a process at a place reaches its peers, each of whom is at the place of its node id.
    #[must_use]
    pub fn dial_from(&self, from: Place) -> Arc<dyn Dial> {
        Arc::new(Dialler { network: self.clone(), from })
    }

    /// The process at a place is gone. With the power its peers are not even told.
    pub fn crash(&self, place: Place, power: bool) {
        let mut inner = self.inner.lock();
        inner.doors.remove(&place);
        inner.asleep.remove(&place);
        let touched: Vec<u64> =
            inner.exchanges.iter().filter(|(_, at)| at.from == place || at.to == place).map(|(id, _)| *id).collect();
        for id in touched {
            let silence = if power { KEEP_ALIVE } else { 0 };
            inner.break_off(id, silence, "the other end is gone");
        }
    }

    /// The process at a place is stopped: what comes for it waits.
    pub fn stop(&self, place: Place) {
        self.inner.lock().asleep.entry(place).or_default();
    }

    /// The process at a place goes on: it takes what waits for it one after the other, and acts in between.
    pub fn go_on(&self, place: Place) {
        let mut inner = self.inner.lock();
        let mut later = Duration::ZERO;
        let slowest = if inner.chance.one_in(2) { 200 } else { 4_000 };
        for parcel in inner.asleep.remove(&place).into_iter().flatten() {
            later += inner.chance.micros(0, slowest);
            inner.hand(parcel, later);
        }
    }

    /// Cuts the way from one place to another; the way back is another link.
    pub fn cut(&self, from: Place, to: Place) {
        self.inner.lock().cut.entry((from, to)).or_insert_with(kernel::now);
    }

    /// Mends every link.
    pub fn mend(&self) {
        let mut inner = self.inner.lock();
        inner.cut.clear();
        for (_, parcels) in std::mem::take(&mut inner.held) {
            for parcel in parcels {
                inner.post(parcel, None);
            }
        }
    }

    /// Sends something that is no exchange between peers; it is lost where the link is cut.
    pub fn post(&self, from: Place, to: Place, deliver: impl FnOnce() + Send + 'static) {
        let mut inner = self.inner.lock();
        if !inner.cut.contains_key(&(from, to)) {
            inner.post(Parcel { link: (from, to), exchange: None, deliver: Box::new(deliver) }, None);
        }
    }

    /// As [`post`](Self::post), after everything that was sent in this lane before. A lane that lost something is over.
    pub fn post_in_order(&self, lane: &Lane, from: Place, to: Place, deliver: impl FnOnce() + Send + 'static) {
        let mut inner = self.inner.lock();
        let mut last = lane.0.lock();
        if inner.cut.contains_key(&(from, to)) {
            *last = None;
        }
        let Some(earliest) = *last else { return };
        let takes = {
            let (from, to) = inner.delay;
            inner.chance.micros(from, to).as_nanos()
        };
        let due = earliest.max(kernel::now() + i64::try_from(takes).unwrap_or(0));
        *last = Some(due);
        inner.put(due, Parcel { link: (from, to), exchange: None, deliver: Box::new(deliver) });
    }

    /// Something happens at a place after a while, whatever becomes of the network.
    pub fn later(&self, place: Place, takes: Duration, happens: impl FnOnce() + Send + 'static) {
        let due = kernel::now() + i64::try_from(takes.as_nanos()).unwrap_or(i64::MAX);
        let parcel = Parcel { link: (place, place), exchange: None, deliver: Box::new(happens) };
        self.inner.lock().put(due, parcel);
    }

    /// Delivers what arrives now.
    pub fn deliver(&self) {
        let now = kernel::now();
        self.keep_alive(now);
        loop {
            let parcel = {
                let mut inner = self.inner.lock();
                match inner.parcels.first_key_value() {
                    Some(((due, _), _)) if *due <= now => inner.parcels.pop_first(),
                    _ => None,
                }
            };
            let Some((_, parcel)) = parcel else { return };
            if let Some(waiting) = self.inner.lock().asleep.get_mut(&parcel.link.1) {
                waiting.push(parcel);
                continue;
            }
            (parcel.deliver)();
        }
    }

    /// Breaks exchanges over links that have been cut for too long.
    fn keep_alive(&self, now: i64) {
        let mut inner = self.inner.lock();
        let over: Vec<(Place, Place)> =
            inner.cut.iter().filter(|(_, since)| now - **since > KEEP_ALIVE).map(|(link, _)| *link).collect();
        for (one, other) in over {
            let ends = [(one, other), (other, one)];
            let touched: Vec<u64> =
                inner.exchanges.iter().filter(|(_, at)| ends.contains(&(at.from, at.to))).map(|(id, _)| *id).collect();
            for id in touched {
                inner.break_off(id, 0, "nothing comes through");
            }
        }
    }

    fn call(
        &self,
        from: Place,
        to: Place,
        request: http::Request<Body>,
    ) -> BoxFuture<'static, Result<http::Response<Body>, Status>> {
        let (head, body) = request.into_parts();
        let network = self.clone();
        Box::pin(async move {
            let (answer_head, answered) = oneshot::channel();
            let (back, arriving_back) = mpsc::unbounded_channel();
            let exchange = network.open(from, to, head, answer_head, back);
            let guard = Guard { network: network.clone(), exchange };
            let sending = network.clone();
            let calling = tokio::spawn(pump(body, move |item| sending.forward(exchange, item)));
            if let Some(at) = network.inner.lock().exchanges.get_mut(&exchange) {
                at.calling = Some(calling.abort_handle());
            }
            let head = answered.await.map_err(|_| lost("the exchange broke"))??;
            Ok(http::Response::from_parts(head, body_of(arriving_back, Some(guard))))
        })
    }

    fn open(
        &self,
        from: Place,
        to: Place,
        head: http::request::Parts,
        answer_head: oneshot::Sender<Head>,
        back: mpsc::UnboundedSender<Item>,
    ) -> u64 {
        let (forward, arriving) = mpsc::unbounded_channel();
        let mut inner = self.inner.lock();
        inner.sent += 1;
        let id = inner.sent;
        self.trace.count("open", &[from, to, id].map(u64::to_le_bytes).concat());
        if head.uri.path().ends_with("InstallSnapshot") {
            tell!(self.trace, "{from} sends {to} a snapshot");
        }
        let now = kernel::now();
        inner.exchanges.insert(
            id,
            Exchange {
                from,
                to,
                head,
                repeated: Vec::new(),
                forward,
                arriving: Some(arriving),
                answer_head: Some(answer_head),
                back,
                last: [now, now],
                ended: [false, false],
                calling: None,
            },
        );
        let unreachable = inner.cut.contains_key(&(from, to)) || inner.cut.contains_key(&(to, from));
        if unreachable && inner.chance.one_in(2) {
            // No connection is there that could be used again, and none can be made.
            let silence = i64::try_from(CONNECT.as_nanos()).unwrap_or(i64::MAX);
            inner.break_off(id, silence, "cannot connect");
        } else {
            let network = self.clone();
            inner.send(id, 0, Box::new(move || network.arrive(id)));
        }
        id
    }

    /// An exchange reaches its receiver's door.
    fn arrive(&self, id: u64) {
        let mut inner = self.inner.lock();
        let Some(at) = inner.exchanges.get_mut(&id) else { return };
        let to = at.to;
        let Some(arriving) = at.arriving.take() else { return };
        let request = http::Request::from_parts(at.head.clone(), body_of(arriving, None));
        let incoming = Incoming { request, exchange: id, network: self.clone() };
        let refused = match inner.doors.get(&to) {
            Some(door) => door.send(incoming).err().map(|error| error.0),
            None => Some(incoming),
        };
        if refused.is_some() {
            inner.break_off(id, 0, "connection refused");
        }
    }

    fn forward(&self, id: u64, item: Option<Item>) -> bool {
        let mut inner = self.inner.lock();
        let Some(at) = inner.exchanges.get_mut(&id) else { return false };
        if let Some(Ok(frame)) = &item
            && let Some(data) = frame.data_ref()
        {
            self.trace.count("forward", data);
            if at.repeated.len() == REPEATED {
                at.repeated.remove(0);
            }
            at.repeated.push(data.clone());
        }
        let forward = at.forward.clone();
        let faults = inner.faults;
        if item.is_some() && faults > 0 && inner.chance.one_in(faults) {
            if inner.chance.one_in(2) {
                inner.break_off(id, 0, "connection reset");
                return false;
            }
            self.repeat(&mut inner, id);
        }
        let network = self.clone();
        inner.send(
            id,
            0,
            match item {
                Some(item) => Box::new(move || drop(forward.send(item))),
                None => Box::new(move || network.end(id, 0)),
            },
        );
        true
    }

    /// Tells the last frames of an exchange again, a little later, to nobody's profit.
    fn repeat(&self, inner: &mut Inner, id: u64) {
        let Some(at) = inner.exchanges.get(&id) else { return };
        let (from, to, head, frames) = (at.from, at.to, at.head.clone(), at.repeated.clone());
        let later = inner.chance.millis(1, 400);
        let network = self.clone();
        let again = move || {
            let (forward, arriving) = mpsc::unbounded_channel();
            for frame in frames {
                let _ = forward.send(Ok(Frame::data(frame)));
            }
            network.trace.count("again", &id.to_le_bytes());
            let mut inner = network.inner.lock();
            let request = http::Request::from_parts(head, body_of(arriving, None));
            // No exchange has the number zero: the answer goes nowhere.
            if let Some(door) = inner.doors.get_mut(&to) {
                let _ = door.send(Incoming { request, exchange: 0, network: network.clone() });
            }
        };
        inner.post(Parcel { link: (from, to), exchange: None, deliver: Box::new(again) }, Some(later));
    }

    fn answer_head(&self, id: u64, head: Head) {
        let mut inner = self.inner.lock();
        let Some(answer_head) = inner.exchanges.get_mut(&id).and_then(|at| at.answer_head.take()) else { return };
        inner.send(id, 1, Box::new(move || drop(answer_head.send(head))));
    }

    fn answer(&self, id: u64, item: Option<Item>) -> bool {
        let mut inner = self.inner.lock();
        let Some(at) = inner.exchanges.get_mut(&id) else { return false };
        if let Some(Ok(frame)) = &item
            && let Some(data) = frame.data_ref()
        {
            self.trace.count("answer", data);
        }
        let back = at.back.clone();
        let faults = inner.faults;
        if item.is_some() && faults > 0 && inner.chance.one_in(faults * 2) {
            inner.break_off(id, 0, "connection reset");
            return false;
        }
        let network = self.clone();
        inner.send(
            id,
            1,
            match item {
                Some(item) => Box::new(move || drop(back.send(item))),
                None => Box::new(move || network.end(id, 1)),
            },
        );
        true
    }

    /// One direction has come to its end; with both the exchange is over.
    fn end(&self, id: u64, direction: usize) {
        let mut inner = self.inner.lock();
        let Some(at) = inner.exchanges.get_mut(&id) else { return };
        at.ended[direction] = true;
        if direction == 0 {
            // Dropping the sender is how a body ends.
            at.forward = mpsc::unbounded_channel().0;
        } else if let Some(calling) = inner.exchanges.remove(&id).and_then(|at| at.calling) {
            // Answered: what is still to be asked interests nobody.
            calling.abort();
        }
    }

    fn hang_up(&self, id: u64) {
        let mut inner = self.inner.lock();
        if inner.exchanges.contains_key(&id) {
            inner.break_off(id, 0, "the caller hung up");
        }
    }
}

impl Inner {
    fn post(&mut self, parcel: Parcel, later: Option<Duration>) {
        let takes = self.chance.micros(self.delay.0, self.delay.1) + later.unwrap_or_default();
        let due = kernel::now() + i64::try_from(takes.as_nanos()).unwrap_or(i64::MAX);
        self.put(due, parcel);
    }

    /// Delivers what has come already, after a while.
    fn hand(&mut self, parcel: Parcel, later: Duration) {
        self.put(kernel::now() + i64::try_from(later.as_nanos()).unwrap_or(i64::MAX), parcel);
    }

    fn put(&mut self, mut due: i64, parcel: Parcel) {
        if let Some(at) = parcel.exchange.and_then(|id| self.exchanges.get_mut(&id)) {
            let direction = usize::from(parcel.link.0 != at.from);
            due = due.max(at.last[direction]);
            at.last[direction] = due;
        }
        self.sent += 1;
        self.parcels.insert((due, self.sent), parcel);
    }

    /// Sends a part of an exchange: in its order, and not before the link is whole.
    fn send(&mut self, id: u64, direction: usize, deliver: Deliver) {
        let Some(at) = self.exchanges.get(&id) else { return };
        let link = if direction == 0 { (at.from, at.to) } else { (at.to, at.from) };
        let parcel = Parcel { link, exchange: Some(id), deliver };
        if self.cut.contains_key(&link) {
            self.held.entry(link).or_default().push(parcel);
        } else {
            self.post(parcel, None);
        }
    }

    /// Both ends of an exchange learn that it broke, after a while.
    fn break_off(&mut self, id: u64, silence: i64, why: &'static str) {
        let Some(at) = self.exchanges.remove(&id) else { return };
        for held in self.held.values_mut() {
            held.retain(|parcel| parcel.exchange != Some(id));
        }
        if let Some(calling) = at.calling {
            calling.abort();
        }
        let link = (at.from, at.to);
        let told = move || {
            let _ = at.forward.send(Err(lost(why)));
            let _ = at.back.send(Err(lost(why)));
            if let Some(head) = at.answer_head {
                let _ = head.send(Err(lost(why)));
            }
        };
        let takes = self.chance.micros(self.delay.0, self.delay.1).as_nanos();
        let due = kernel::now() + silence + i64::try_from(takes).unwrap_or(0);
        self.put(due, Parcel { link, exchange: None, deliver: Box::new(told) });
    }
}

struct Dialler {
    network: Network,
    from: Place,
}

impl Dial for Dialler {
    fn channel(&self, target: u64, _: &str) -> Result<PeerChannel, OpenError> {
        let (network, from) = (self.network.clone(), self.from);
        let call = move |request: http::Request<Body>| network.call(from, target, request);
        Ok(BoxCloneSyncService::new(tower::service_fn(call)))
    }
}
