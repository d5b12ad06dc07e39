//! A TCP proxy: a network between a gateway and one of its servers that a test can cut.
//!
//! Owns the connections that run through it. It lives as long as the test's runtime, in tasks of it. Cut, it ends every connection, and each
//! new one at once; what was on its way is lost.

use std::net::SocketAddr;

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

/// A network. Dropping it cuts it for good.
pub struct Proxy {
    address: SocketAddr,
    connected: watch::Sender<bool>,
}

impl Proxy {
    /// A network, whole, to the server at `host:port`.
    pub async fn start(server: &str) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let (connected, watched) = watch::channel(true);
        tokio::spawn(accept(listener, server.to_owned(), watched));
        Proxy { address, connected }
    }

    /// Where its near end is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Breaks every connection, and refuses new ones.
    pub fn cut(&self) {
        self.connected.send_replace(false);
    }

    /// Lets connections through again.
    pub fn restore(&self) {
        self.connected.send_replace(true);
    }
}

async fn accept(listener: TcpListener, server: String, mut connected: watch::Receiver<bool>) {
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((near, _)) = accepted else { continue };
                if *connected.borrow() {
                    tokio::spawn(forward(near, server.clone(), connected.clone()));
                }
            }
            changed = connected.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

/// Forwards until either side ends, or the network is cut.
async fn forward(mut near: TcpStream, server: String, mut connected: watch::Receiver<bool>) {
    let exchange = async {
        if let Ok(mut far) = TcpStream::connect(&server).await {
            // How it ends is for the two sides to notice.
            let _ = copy_bidirectional(&mut near, &mut far).await;
        }
    };
    tokio::select! {
        () = exchange => {}
        // An error says that the proxy is dropped.
        _ = connected.wait_for(|connected| !connected) => {}
    }
}
