//! A way for bytes that can go silent: nothing comes through any more, and neither end is told. So looks a host that lost
//! its power, or a firewall that forgot a connection, to whoever is connected through it.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// What comes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Everything.
    All,
    /// Nothing on the connections that there are; new ones work.
    NewOnly,
    /// Nothing at all: new connections are accepted, and that is all that becomes of them.
    Nothing,
}

/// A relay from one address to another. It ends, and closes all it has, when it is dropped.
pub struct Relay {
    flow: watch::Sender<(Flow, u64)>,
    _accepting: JoinSet<()>,
}

const PIECE: usize = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

impl Relay {
    /// Listens at `from` and connects to `to` for each connection that it accepts.
    pub async fn start(from: SocketAddr, to: SocketAddr) -> anyhow::Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let listener = loop {
            match TcpListener::bind(from).await {
                Ok(listener) => break listener,
                // A daemon that was just killed may hold its address for a moment.
                Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {
                    sleep(LOOK_AGAIN).await
                }
                Err(error) => return Err(error).with_context(|| format!("a relay cannot listen on {from}")),
            }
        };
        let (flow, _) = watch::channel((Flow::All, 0));
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, to, flow.clone()));
        Ok(Self { flow, _accepting: accepting })
    }

    /// From now on this comes through. What was silenced stays so.
    pub fn set(&self, flow: Flow) {
        self.flow.send_modify(|(now, generation)| {
            *now = flow;
            *generation += u64::from(flow != Flow::All);
        });
    }
}

async fn accept(listener: TcpListener, to: SocketAddr, flow: watch::Sender<(Flow, u64)>) {
    let mut all = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        while all.try_join_next().is_some() {}
        all.spawn(relay(stream, to, flow.subscribe()));
    }
}

async fn relay(mut near: TcpStream, to: SocketAddr, mut flow: watch::Receiver<(Flow, u64)>) {
    let (now, generation) = *flow.borrow();
    let mut far = None;
    if now != Flow::Nothing {
        let Ok(stream) = TcpStream::connect(to).await else { return };
        let far = far.insert(stream);
        let _ = (near.set_nodelay(true), far.set_nodelay(true));
        let (near_in, near_out) = near.split();
        let (far_in, far_out) = far.split();
        tokio::select! {
            // One end has closed: so does the other.
            () = pump(near_in, far_out) => return,
            () = pump(far_in, near_out) => return,
            _ = flow.wait_for(|(_, silences)| *silences != generation) => {}
        }
    }
    // Both stay open, and nothing is read of either, until the relay ends.
    std::future::pending::<()>().await;
    drop((near, far));
}

async fn pump(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    let mut piece = vec![0; PIECE];
    while let Ok(length) = from.read(&mut piece).await {
        if length == 0 || to.write_all(&piece[..length]).await.is_err() {
            return;
        }
    }
}
