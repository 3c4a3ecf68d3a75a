//! Connections that answer in our words also where hyper answers by itself: to a request that it cannot read, with a bare
//! status and no body. Such an answer is a head alone, written at once as the connection's last; it gets the body that all
//! our errors have.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::serve::Listener;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};

/// The first line of hyper's own answers, and what there is to say.
const SILENT: &[(&str, &str, &str)] = &[
    (
        "HTTP/1.1 400 ",
        "bad_request",
        "the request is not valid HTTP; a URL may have no raw space, control character, \", < or > in it: write %20, %22, %3C, %3E",
    ),
    ("HTTP/1.1 414 ", "uri_too_long", "the URL is longer than 65,534 bytes; ask in several requests"),
    ("HTTP/1.1 431 ", "headers_too_large", "the headers are too large; send fewer of them"),
];

/// A listener whose connections do so.
pub(super) struct Listening(pub(super) TcpListener);

impl Listener for Listening {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let (stream, address) = Listener::accept(&mut self.0).await;
        (Connection { stream, answer: Vec::new(), written: 0 }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

pub(super) struct Connection {
    stream: TcpStream,
    /// What is written instead of hyper's answer; empty if nothing is.
    answer: Vec<u8>,
    /// How much of it is.
    written: usize,
}

impl Connection {
    /// Writes the answer instead of `head`, which counts as written when all of it is.
    fn poll_answer(&mut self, context: &mut Context<'_>, head: usize) -> Poll<io::Result<usize>> {
        while self.written < self.answer.len() {
            let rest = &self.answer[self.written..];
            match ready!(Pin::new(&mut self.stream).poll_write(context, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.written += n,
            }
        }
        (self.answer, self.written) = (Vec::new(), 0);
        Poll::Ready(Ok(head))
    }
}

/// The whole answer, if `head` is one of hyper's own.
fn answer(head: &[u8]) -> Option<Vec<u8>> {
    // Most answers are others.
    if !head.starts_with(b"HTTP/1.1 4") || !head.ends_with(b"\r\n\r\n") {
        return None;
    }
    let head = std::str::from_utf8(head).ok()?;
    let (_, error, message) = SILENT.iter().find(|(status, ..)| head.starts_with(status))?;
    let (before, after) = head.split_once("content-length: 0\r\n")?;
    let body = json!({ "error": error, "message": message }).to_string();
    let described = format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len());
    Some([before, &described, after, &body].concat().into_bytes())
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.answer.is_empty() {
            match answer(bytes) {
                Some(answer) => self.answer = answer,
                None => return Pin::new(&mut self.stream).poll_write(context, bytes),
            }
        }
        self.poll_answer(context, bytes.len())
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match parts {
            [head] => self.poll_write(context, head),
            _ => Pin::new(&mut self.stream).poll_write_vectored(context, parts),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}
