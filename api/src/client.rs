// SPDX-License-Identifier: Apache-2.0
//! A client of the control API: one request, one answer, on the calling thread.

use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

/// How long an answer may take if nobody says otherwise. A pause has to wait for what a device has
/// in flight.
const PATIENCE: Duration = Duration::from_secs(60);
/// The largest answer that is read, in bytes.
const ANSWER_LIMIT: usize = 64 << 20;

/// Why there is no answer, or not the one that was hoped for.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("cannot connect to the API socket {}: is a machine running there?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the API did not answer")]
    Http(#[from] hyper::Error),
    /// The request has a form that HTTP does not know.
    #[error("this is no request")]
    Request(#[from] hyper::http::Error),
    /// It takes too long.
    #[error("the API did not answer within {} seconds", .0.as_secs())]
    TooSlow(Duration),
    /// The answer is too long or broken off.
    #[error("the answer cannot be read: {0}")]
    Body(String),
    /// The machine refused.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The machine's own words.
        message: String,
    },
    /// The host gives no event loop.
    #[error("the client cannot be started")]
    Start(#[source] io::Error),
}

/// An answer of the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// The names, in small letters, and values of the headers.
    pub headers: Vec<(String, String)>,
    /// The body; empty if there is none.
    pub body: String,
}

impl Response {
    /// The value of the header `name`, in small letters.
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(other, _)| other == name);
        found.map(|(_, value)| value.as_str())
    }

    /// The answer of a request that was carried out; the machine's words if it was not.
    ///
    /// # Errors
    ///
    /// The status says that the request failed.
    pub fn success(self) -> Result<Self, ClientError> {
        if (200..300).contains(&self.status) {
            return Ok(self);
        }
        let body: Option<Value> = serde_json::from_str(&self.body).ok();
        let message = body
            .as_ref()
            .and_then(|body| body["fault_message"].as_str());
        Err(ClientError::Refused {
            status: self.status,
            message: message.unwrap_or(self.body.trim()).to_owned(),
        })
    }
}

/// A client of the machine behind one socket.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    runtime: Runtime,
    patience: Duration,
}

impl Client {
    /// A client of the machine behind the socket at `path`; nothing is sent yet.
    ///
    /// # Errors
    ///
    /// The host gives no event loop.
    pub fn new(path: &Path) -> Result<Self, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(ClientError::Start)?;
        Ok(Self {
            path: path.into(),
            runtime,
            patience: PATIENCE,
        })
    }

    /// The same client, which waits for `patience` for each answer: to write or read much memory
    /// takes its time.
    #[must_use]
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Sends a request and waits for the answer, whatever its status.
    ///
    /// # Errors
    ///
    /// There is no answer.
    pub fn send(&self, method: &str, path: &str, body: &str) -> Result<Response, ClientError> {
        let exchange = async {
            let response = self.exchange(method, path, body).await?;
            let status = response.status().as_u16();
            let text = |value: &hyper::header::HeaderValue| {
                String::from_utf8_lossy(value.as_bytes()).into_owned()
            };
            let headers = response.headers().iter();
            let headers = headers.map(|(name, value)| (name.to_string(), text(value)));
            let headers = headers.collect();
            let body = http_body_util::Limited::new(response.into_body(), ANSWER_LIMIT);
            let body = body.collect().await;
            let body = body.map_err(|error| ClientError::Body(error.to_string()))?;
            Ok(Response {
                status,
                headers,
                body: String::from_utf8_lossy(&body.to_bytes()).into_owned(),
            })
        };
        let limited = async { tokio::time::timeout(self.patience, exchange).await };
        let result = self.runtime.block_on(limited);
        result.unwrap_or(Err(ClientError::TooSlow(self.patience)))
    }

    /// Gets `path` and hands each line of the answer to `line` as it comes, until that says to
    /// break or the machine ends.
    ///
    /// # Errors
    ///
    /// There is no answer, or it is a refusal.
    pub fn stream(
        &self,
        path: &str,
        mut line: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<(), ClientError> {
        self.runtime.block_on(async {
            let response = self.exchange("GET", path, "").await?;
            let status = response.status().as_u16();
            let mut body = response.into_body();
            let mut text = Vec::new();
            while let Some(frame) = body.frame().await {
                // The end of the machine is the end of its events.
                let Ok(frame) = frame else { break };
                text.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
                if status != 200 {
                    continue;
                }
                while let Some(end) = text.iter().position(|&byte| byte == b'\n') {
                    let rest = text.split_off(end + 1);
                    let whole = std::mem::replace(&mut text, rest);
                    if line(String::from_utf8_lossy(&whole).trim_end()).is_break() {
                        return Ok(());
                    }
                }
                if text.len() > ANSWER_LIMIT {
                    return Err(ClientError::Body("a line is too long".into()));
                }
            }
            let reply = Response {
                status,
                headers: Vec::new(),
                body: String::from_utf8_lossy(&text).into_owned(),
            };
            reply.success().map(drop)
        })
    }

    async fn exchange(
        &self,
        method: &str,
        path: &str,
        body: &str,
    ) -> Result<hyper::Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.path).await;
        let stream = stream.map_err(|source| ClientError::Connect {
            path: self.path.clone(),
            source,
        })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // It ends with the body of the answer, or with the runtime.
        self.runtime.spawn(connection);
        let request = hyper::Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, "localhost")
            .header(hyper::header::ACCEPT, "application/json")
            .body(Full::new(Bytes::copy_from_slice(body.as_bytes())))?;
        Ok(sender.send_request(request).await?)
    }
}
