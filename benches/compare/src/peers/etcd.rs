//! etcd: a server of its own with its default durability, each Put synced to its log before it is answered, and the calls that drive it.
//!
//! Owns the process and the messages of the calls, written out here: two of etcd's, with the fields that are used. Does not own the
//! load, which is that of every gRPC server (`load`).

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    sync::Arc,
};

use bytes::Bytes;
use prost::Message;

use crate::{
    Failure,
    calls::{self, Calls},
    harness::{
        SOON, eventually,
        process::{Directory, Process, free_port},
    },
    load,
};

/// etcd keeps every version until it is told to compact, and refuses writes from 2 GiB on unless configured. It never compacts here: that would
/// only cost it time. Its limit is raised to the most that its makers suggest.
const QUOTA_BYTES: u64 = 8 << 30;

/// The least bytes of an answer to a Put: the prefix, and a header.
const PUT_ANSWER_BYTES_MIN: usize = 5 + 2;

/// The most bytes of an answer that found nothing: the prefix, and a header of two random numbers and two small ones.
const ABSENCE_BYTES_MAX: usize = 5 + 2 + 2 * 11 + 7;

/// A server. Dropping it stops it and removes its files.
pub struct Etcd {
    process: Process,
    pub server: SocketAddr,
    peer_port: u16,
    directory: Directory,
}

impl Etcd {
    /// Starts a server without a record, and waits until it takes a Put and gives back its value.
    pub async fn start() -> Result<Etcd, Failure> {
        for _ in 0..20 {
            let directory = Directory::new("etcd");
            let server = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
            let peer_port = free_port();
            let process = run(&directory, server, peer_port);
            let mut etcd = Etcd {
                process,
                server,
                peer_port,
                directory,
            };
            if etcd.answers().await? {
                return Ok(etcd);
            }
            let said = etcd.process.stderr();
            if !said.contains("address already in use") {
                return Err(format!("etcd ended, or is missing (etcd-server); it said:\n{said}").into());
            }
        }
        Err("etcd finds no free port".into())
    }

    /// Stops the server and starts it on its records, and waits until it answers. It reads faster then: version 3.4 makes room in memory for the
    /// writes that it has not yet written to its files, as much as it ever needed, and copies that with every read, also when it is empty.
    pub async fn start_again(&mut self) -> Result<(), Failure> {
        self.process.signal("TERM");
        self.process.wait(SOON).await;
        self.process = run(&self.directory, self.server, self.peer_port);
        if self.answers().await? {
            return Ok(());
        }
        Err(format!("etcd does not start again; it said:\n{}", self.process.stderr()).into())
    }

    /// Waits until it takes a Put and gives back its value. False if it has ended.
    async fn answers(&mut self) -> Result<bool, Failure> {
        // Of a key that no measurement reads.
        let key = || Bytes::from_static(b"started");
        let (put, range) = (
            puts_of(1, 1, |_| key())?,
            ranges_of(1, 1, Read::Linearizable, |_| key())?,
        );
        let (process, server) = (&mut self.process, self.server);
        let ours = eventually("etcd answers", SOON, async || {
            if process.ended().is_some() {
                return Ok(false);
            }
            let answered = async {
                load::answers(server, &put).await?;
                load::answers(server, &range).await
            };
            answered.await.map_err(|error: Failure| error.to_string())?;
            // Another server on the port may have answered: then ours has ended, or is about to.
            Ok(process.ended().is_none())
        });
        Ok(ours.await)
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }
}

fn run(directory: &Directory, server: SocketAddr, peer_port: u16) -> Process {
    let clients = format!("http://{server}");
    let peers = format!("http://127.0.0.1:{peer_port}");
    let mut command = Command::new("etcd");
    command
        .arg("--data-dir")
        .arg(directory.path().join("data"))
        .args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients])
        .args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers])
        .args(["--initial-cluster", &format!("default={peers}")])
        .args(["--quota-backend-bytes", &QUOTA_BYTES.to_string()])
        .args(["--logger", "zap", "--log-level", "error"]);
    Process::start("etcd", &command, "KILL", directory.path(), "etcd")
}

/// `etcdserverpb.PutRequest`.
#[derive(Clone, PartialEq, Message)]
struct PutRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

/// `etcdserverpb.RangeRequest`: of one key, where there is no end.
#[derive(Clone, PartialEq, Message)]
struct RangeRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bool, tag = "7")]
    serializable: bool,
}

/// What a Range sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// All that was answered before: etcd's default. Asks the cluster, which here is this one member.
    Linearizable,
    /// What this member knows, as a read of a cache does.
    Serializable,
}

/// Puts of so many keys.
pub fn puts(keys: usize, value_bytes: usize) -> Result<Arc<Calls>, Failure> {
    puts_of(keys, value_bytes, key)
}

/// Ranges over one key each. An answer that is too short for the value is an error: the keys are to be put before.
pub fn ranges(keys: usize, value_bytes: usize, read: Read) -> Result<Arc<Calls>, Failure> {
    ranges_of(keys, value_bytes, read, key)
}

fn key(index: usize) -> Bytes {
    calls::key(index).into()
}

fn puts_of(keys: usize, value_bytes: usize, key: impl Fn(usize) -> Bytes) -> Result<Arc<Calls>, Failure> {
    let value = calls::value(value_bytes);
    Calls::new("/etcdserverpb.KV/Put", keys, PUT_ANSWER_BYTES_MIN, |index| PutRequest {
        key: key(index),
        value: value.clone(),
    })
}

fn ranges_of(keys: usize, value_bytes: usize, read: Read, key: impl Fn(usize) -> Bytes) -> Result<Arc<Calls>, Failure> {
    let answer_bytes_min = ABSENCE_BYTES_MAX + key(0).len() + value_bytes;
    Calls::new("/etcdserverpb.KV/Range", keys, answer_bytes_min, |index| RangeRequest {
        key: key(index),
        serializable: read == Read::Serializable,
    })
}
