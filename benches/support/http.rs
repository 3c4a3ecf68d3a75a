//! An HTTP client that costs as little as can be, because it shares two cores with the server that it measures.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::net::TcpStream;

use super::Samples;

/// A connection that is kept. One request at a time.
pub(crate) struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// An answer, until the next request.
pub(crate) struct Answer<'a> {
    pub(crate) status: u16,
    /// Status line and headers; names as the server writes them, in lower case.
    pub(crate) head: &'a str,
    pub(crate) body: &'a [u8],
}

/// A GET as it goes over the wire.
pub(crate) fn get(path: &str, headers: &[(&str, &str)]) -> Vec<u8> {
    request("GET", path, headers, "")
}

/// A request as it goes over the wire.
pub(crate) fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Vec<u8> {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let length = if body.is_empty() { String::new() } else { format!("content-length: {}\r\n", body.len()) };
    format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\n{headers}{length}\r\n{body}").into_bytes()
}

impl Client {
    pub(crate) async fn connect(address: &str) -> Result<Client> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Client { stream, buffer: Vec::with_capacity(1 << 16) })
    }

    /// Sends a request and reads the whole answer.
    pub(crate) async fn send(&mut self, request: &[u8]) -> Result<Answer<'_>> {
        let mut sent = 0;
        while sent < request.len() {
            match self.stream.try_write(&request[sent..]) {
                Ok(n) => sent += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.stream.writable().await?,
                Err(error) => return Err(error.into()),
            }
        }
        self.buffer.clear();
        let (head, end) = loop {
            self.read().await?;
            if let Some(head) = self.buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                let length = header(std::str::from_utf8(&self.buffer[..head])?, "content-length");
                break (head, head + 4 + length.context("an answer without content-length")?.parse::<usize>()?);
            }
        };
        while self.buffer.len() < end {
            self.read().await?;
        }
        let head = std::str::from_utf8(&self.buffer[..head])?;
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        Ok(Answer { status, head, body: &self.buffer[head.len() + 4..end] })
    }

    async fn read(&mut self) -> Result<()> {
        let mut chunk = [0; 1 << 13];
        loop {
            self.stream.readable().await?;
            match self.stream.try_read(&mut chunk) {
                Ok(n) => {
                    ensure!(n > 0, "the server has closed the connection");
                    self.buffer.extend_from_slice(&chunk[..n]);
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Answer<'_> {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        header(self.head, name)
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
}

/// What came of a load.
pub(crate) struct Load {
    pub(crate) seconds: f64,
    /// Of each request, from its first byte sent to its last byte received.
    pub(crate) milliseconds: Samples,
}

impl Load {
    pub(crate) fn requests_a_second(&self) -> f64 {
        self.milliseconds.len() as f64 / self.seconds
    }
}

/// Sends these requests over and over, on so many connections, each the next when the last is answered, from one thread;
/// for that time, or until `enough`.
pub(crate) fn load(
    address: &str,
    connections: usize,
    requests: &Arc<[Vec<u8>]>,
    time: Duration,
    enough: &Arc<AtomicBool>,
) -> Result<Load> {
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio.block_on(async {
        let began = Instant::now();
        let readers = (0..connections).map(|connection| {
            let (requests, address, enough) = (requests.clone(), address.to_owned(), enough.clone());
            tokio::spawn(async move {
                let mut client = Client::connect(&address).await?;
                let mut milliseconds = Vec::new();
                let mut next = connection * requests.len() / connections;
                while began.elapsed() < time && !enough.load(Relaxed) {
                    let sent = Instant::now();
                    let answer = client.send(&requests[next % requests.len()]).await?;
                    milliseconds.push(sent.elapsed().as_secs_f64() * 1e3);
                    ensure!(answer.status == 200, "{}\n{}", answer.head, String::from_utf8_lossy(answer.body));
                    next += 1;
                }
                Ok(milliseconds)
            })
        });
        let mut milliseconds = Vec::new();
        for reader in readers.collect::<Vec<_>>() {
            milliseconds.append(&mut reader.await??);
        }
        Ok(Load { seconds: began.elapsed().as_secs_f64(), milliseconds: Samples::new(milliseconds) })
    })
}
