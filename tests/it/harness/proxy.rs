//! A TCP proxy: a network between a gateway and one of its servers that a test can break, in the ways in which networks break.
//!
//! Owns the connections that run through it, in tasks of the test's runtime. Does not know what is said on them. Whatever it does to a
//! connection, the bytes that arrive are the first that were sent, in their order: a connection that has lost some is ended, never mended.
//! Bounded: so much of each direction is on its way at a time, and the senders wait beyond that.

use std::{future::pending, io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};

/// How many pieces of one direction are on their way at a time, and how many bytes one has at most.
const PIECES_MAX: usize = 64;
const PIECE_BYTES_MAX: usize = 64 << 10;

/// How long the server may take to accept.
const DIAL_WAIT: Duration = Duration::from_secs(5);

/// What the network does with what it is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passage {
    /// Lets it pass, both ways.
    Open,
    /// Nothing passes: every connection is ended, and each new one at once.
    Cut,
    /// A black hole: connections stay and are accepted, and what is sent on them is lost, their end included. What went into it ends when
    /// something else is set.
    Hole,
    /// Connections stay and are accepted, and what is sent on them waits: all of it arrives, however late, when something else is set.
    Held,
    /// Requests pass, and take effect. The first answer to come is lost, and its connection ended.
    AnswersLost,
}

#[derive(Debug, Clone)]
struct Network {
    /// The far end, of connections yet to come.
    server: Arc<str>,
    passage: Passage,
    /// Of requests, and of answers.
    delays: [Duration; 2],
    /// How many times all connections were reset.
    resets: u64,
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Request,
    Answer,
}

/// A network. Dropping it cuts it for good.
pub struct Proxy {
    address: SocketAddr,
    network: watch::Sender<Network>,
}

impl Proxy {
    /// A network, whole, to the server at `host:port`.
    pub async fn start(server: &str) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let (network, watched) = watch::channel(Network {
            server: server.into(),
            passage: Passage::Open,
            delays: [Duration::ZERO; 2],
            resets: 0,
        });
        tokio::spawn(accept(listener, watched));
        Proxy { address, network }
    }

    /// A network to the server of a URL, and the URL that leads through it.
    pub async fn before(url: &str) -> (Proxy, String) {
        let (scheme, rest) = url.split_once("//").expect("a URL has a scheme");
        let (user, rest) = rest.split_at(rest.rfind('@').map_or(0, |at| at + 1));
        let (server, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let proxy = Proxy::start(server).await;
        let url = format!("{scheme}//{user}{}{path}", proxy.address());
        (proxy, url)
    }

    /// Where its near end is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Leads to another server at `host:port`: connections yet to come, for those there are end as in a crash.
    pub fn lead_to(&self, server: &str) {
        self.network.send_modify(|network| {
            network.server = server.into();
            network.resets += 1;
        });
    }

    /// From now on it does this.
    pub fn set(&self, passage: Passage) {
        self.network.send_modify(|network| network.passage = passage);
    }

    /// Breaks every connection, and refuses new ones.
    pub fn cut(&self) {
        self.set(Passage::Cut);
    }

    /// Lets everything through again, at once.
    pub fn restore(&self) {
        self.network.send_modify(|network| {
            network.passage = Passage::Open;
            network.delays = [Duration::ZERO; 2];
        });
    }

    /// From now on requests take so long to arrive, and answers so long.
    pub fn delay(&self, requests: Duration, answers: Duration) {
        self.network.send_modify(|network| network.delays = [requests, answers]);
    }

    /// Ends every connection there is as a crash does: what is on its way is lost, and both ends get a reset. New ones are let through.
    pub fn reset(&self) {
        self.network.send_modify(|network| network.resets += 1);
    }
}

async fn accept(listener: TcpListener, mut network: watch::Receiver<Network>) {
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((near, _)) = accepted else { continue };
                if network.borrow().passage != Passage::Cut {
                    tokio::spawn(forward(near, network.clone()));
                }
            }
            changed = network.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

/// Forwards until both sides have ended, or the network ends the connection.
async fn forward(mut near: TcpStream, network: watch::Receiver<Network>) {
    let Network { server, resets, .. } = network.borrow().clone();
    // How a dial fails is for the near side to notice.
    let Ok(Ok(mut far)) = timeout(DIAL_WAIT, TcpStream::connect(&*server)).await else {
        return;
    };
    for side in [&near, &far] {
        // Small messages both ways, each of them waited for. How it ends is for the two sides to notice, here and below.
        let _ = side.set_nodelay(true);
    }
    let ended = {
        let (near_read, near_write) = near.split();
        let (far_read, far_write) = far.split();
        let exchange = async {
            tokio::try_join!(
                carry(Way::Request, near_read, far_write, network.clone()),
                carry(Way::Answer, far_read, near_write, network.clone()),
            )
            .map(drop)
        };
        tokio::select! {
            ended = exchange => ended,
            () = severed(network.clone(), resets) => Ok(()),
        }
    };
    if ended.is_err() || network.borrow().resets != resets {
        let _ = near.set_zero_linger();
        let _ = far.set_zero_linger();
    }
}

/// Until the network ends its connections.
async fn severed(mut network: watch::Receiver<Network>, resets: u64) {
    // An error says that the proxy is dropped.
    let _ = network
        .wait_for(|network| network.passage == Passage::Cut || network.resets != resets)
        .await;
}

/// Carries the bytes of one direction until they end; an error says that the whole connection has to.
async fn carry(
    way: Way,
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut network: watch::Receiver<Network>,
) -> io::Result<()> {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(PIECES_MAX);
    let watched = network.clone();
    let read = async {
        let mut buffer = vec![0; PIECE_BYTES_MAX];
        loop {
            let count = from.read(&mut buffer).await?;
            let delay = watched.borrow().delays[way as usize];
            // The end is a piece without bytes.
            let piece = (Instant::now() + delay, buffer[..count].to_vec());
            if sender.send(piece).await.is_err() || count == 0 {
                return pending().await;
            }
        }
    };
    let write = async {
        while let Some((due, bytes)) = receiver.recv().await {
            sleep_until(due).await;
            if !pass(way, &mut network).await? {
                // Something is lost, so nothing more can be understood.
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if bytes.is_empty() {
                return to.shutdown().await;
            }
            to.write_all(&bytes).await?;
        }
        Ok(())
    };
    tokio::select! {
        failed = read => failed,
        ended = write => ended,
    }
}

/// Waits until a piece may pass. `false` if it is lost, once its connection has to end for that.
async fn pass(way: Way, network: &mut watch::Receiver<Network>) -> io::Result<bool> {
    let dropped = |_| io::Error::from(io::ErrorKind::ConnectionAborted);
    let passage = network
        .wait_for(|network| network.passage != Passage::Held)
        .await
        .map_err(dropped)?
        .passage;
    match passage {
        Passage::Hole => {
            network
                .wait_for(|network| network.passage != Passage::Hole)
                .await
                .map_err(dropped)?;
            Ok(false)
        }
        Passage::AnswersLost => Ok(way == Way::Request),
        Passage::Open | Passage::Cut | Passage::Held => Ok(true),
    }
}
