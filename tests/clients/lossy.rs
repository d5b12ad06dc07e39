//! A network that loses one answer: what a client's retries are for.
//!
//! `lossy ADDRESS` listens on a free port, says on its first line of output which, and passes every connection on to the gateway at
//! ADDRESS, until it is killed. The first answer that any of the connections brings back is not delivered: that connection is
//! closed instead, so that its client cannot know what became of the call. Everything after that is passed on.
//!
//! Owns of HTTP/2 what it takes to tell an answer from the rest: the head of a frame, and that a server's first HEADERS begin one.

use std::{
    env,
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

/// A frame's head: three bytes of length, one of type, one of flags, four of stream.
const HEAD_BYTES: usize = 9;
const HEADERS: u8 = 1;

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    let (Some(gateway), None) = (arguments.next(), arguments.next()) else {
        let _ = writeln!(io::stderr(), "usage: lossy ADDRESS");
        return ExitCode::from(64);
    };
    match serve(&gateway) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "lossy: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(gateway: &str) -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    writeln!(io::stdout(), "{}", listener.local_addr()?)?;
    let lost = Arc::new(AtomicBool::new(false));
    for client in listener.incoming() {
        let (client, server) = (client?, TcpStream::connect(gateway)?);
        for stream in [&client, &server] {
            stream.set_nodelay(true)?;
        }
        let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
        thread::spawn(move || {
            // However it ends, the other direction ends with it.
            let _ = io::copy(&mut from_client, &mut to_server);
            let _ = to_server.shutdown(Shutdown::Both);
        });
        let lost = Arc::clone(&lost);
        thread::spawn(move || {
            let _ = bring_back(&server, &client, &lost);
            let _ = client.shutdown(Shutdown::Both);
            let _ = server.shutdown(Shutdown::Both);
        });
    }
    Ok(())
}

/// Passes on what the server sends, frame by frame, until either end is closed, or the one answer is met that is to be lost.
fn bring_back(mut server: &TcpStream, mut client: &TcpStream, lost: &AtomicBool) -> io::Result<()> {
    let mut head = [0; HEAD_BYTES];
    let mut payload = Vec::new();
    loop {
        server.read_exact(&mut head)?;
        let [a, b, c, kind, ..] = head;
        payload.resize(u32::from_be_bytes([0, a, b, c]) as usize, 0);
        server.read_exact(&mut payload)?;
        if kind == HEADERS && !lost.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        client.write_all(&head)?;
        client.write_all(&payload)?;
    }
}
