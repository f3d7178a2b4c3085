// SPDX-License-Identifier: Apache-2.0
//! The HTTP server on a unix socket.
//!
//! It has one thread, `fc_api`, which owns the socket, its connections and the [`Controller`].
//! Requests are passed on in the order in which they arrive, and the owner of the machine carries
//! them out one at a time; what a client sends or leaves out costs no more than its connection.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Either, Full, LengthLimitError, Limited};
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::ext::ReasonPhrase;
use hyper::header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue, SERVER};
use hyper::http::uri::PathAndQuery;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::LocalSet;

use crate::events::{EventBody, EventHub};
use crate::fault::Fault;
use crate::metrics::{ApiMetrics, Finished};
use crate::request::{Answer, Controller, Reply, Request};
use crate::route::{Parsed, parse, resource_of};

/// The most connections at a time.
const MAX_CONNECTIONS: usize = 10;
/// How long clients may take to read what they are still told when the server ends.
const LAST_ANSWER: Duration = Duration::from_secs(1);
/// The OpenAPI document, which a test holds against the types.
const OPENAPI: &str = include_str!("openapi/document.json");
const SERVER_NAME: HeaderValue = HeaderValue::from_static("Firecracker API");
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const PROMETHEUS: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4");
const KEEP_ALIVE: HeaderValue = HeaderValue::from_static("keep-alive");

/// Why there is no server.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The path is taken, by a socket in use or one that was left behind.
    #[error("the API socket {} exists already: remove it if no machine uses it", .0.display())]
    Exists(PathBuf),
    /// The socket cannot be made.
    #[error("the API socket {} cannot be made", path.display())]
    Bind {
        /// Where it was to be.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No thread or no event loop.
    #[error("the API server cannot be started")]
    Start(#[source] io::Error),
}

/// A socket that clients can connect to already.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    /// The largest body of a request, in bytes.
    body_limit: usize,
}

impl Server {
    /// Makes the socket at `path`; requests may have bodies of up to `body_limit` bytes.
    ///
    /// # Errors
    ///
    /// Something is there already, or no socket can be made there.
    pub fn bind(path: &Path, body_limit: usize) -> Result<Self, ServerError> {
        let bind = || {
            let listener = UnixListener::bind(path)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener = bind().map_err(|source: io::Error| {
            if source.kind() == io::ErrorKind::AddrInUse {
                return ServerError::Exists(path.into());
            }
            let path = path.into();
            ServerError::Bind { path, source }
        })?;
        Ok(Self {
            listener,
            body_limit,
        })
    }

    /// Starts the thread that serves the socket, tells `events` to clients that watch, and counts
    /// the requests in `metrics`.
    ///
    /// # Errors
    ///
    /// The host gives no thread or event loop.
    pub fn spawn(
        self,
        controller: Box<dyn Controller>,
        events: EventHub,
        metrics: Arc<ApiMetrics>,
    ) -> Result<Serving, ServerError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(ServerError::Start)?;
        let shared = Shared {
            controller,
            events,
            metrics,
            body_limit: self.body_limit,
        };
        let (end, ends) = watch::channel(());
        let (lives, ended) = mpsc::channel();
        let serve = move || {
            LocalSet::new().block_on(&runtime, self.serve(shared, ends));
            drop(lives);
        };
        thread::Builder::new()
            .name("fc_api".into())
            .spawn(serve)
            .map_err(ServerError::Start)?;
        Ok(Serving { end, ended })
    }

    async fn serve(self, shared: Shared, mut ends: watch::Receiver<()>) {
        let listener = match tokio::net::UnixListener::from_std(self.listener) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!("the API socket cannot be served: {error}");
                return;
            }
        };
        let shared = Rc::new(shared);
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let next = ends.clone();
        while let Some(accepted) = unless(&mut ends, listener.accept()).await {
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!("a connection to the API cannot be taken: {error}");
                    // Most often file descriptors are short; others have to end first.
                    tokio::task::yield_now().await;
                    continue;
                }
            };
            let Ok(slot) = slots.clone().try_acquire_owned() else {
                // It is small enough for an empty socket, which is always writable: nobody is
                // waited for.
                if stream.writable().await.is_ok() {
                    let _ = stream.try_write(too_many_connections().as_bytes());
                }
                continue;
            };
            let connection = connection(stream, shared.clone(), next.clone());
            tokio::task::spawn_local(async move {
                connection.await;
                drop(slot);
            });
        }
        drop(listener);
        shared.events.close();
        let all = u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX);
        // It fails only if somebody closes the semaphore.
        let _ = slots.acquire_many(all).await;
    }
}

/// A server at work. When this is dropped nobody is let in any more, what has been asked is
/// answered, and events that have been told go out, if that takes no longer than a second.
#[derive(Debug)]
#[must_use = "the server ends with it"]
pub struct Serving {
    end: watch::Sender<()>,
    /// Nothing comes; the other end is the thread's.
    ended: mpsc::Receiver<Infallible>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        // A thread that has ended already listens no more.
        let _ = self.end.send(());
        let _ = self.ended.recv_timeout(LAST_ANSWER);
    }
}

/// What comes of `work`, unless the server `ends` first.
async fn unless<T>(ends: &mut watch::Receiver<()>, work: impl Future<Output = T>) -> Option<T> {
    let (mut work, mut ends) = (pin!(work), pin!(ends.changed()));
    poll_fn(|context| match work.as_mut().poll(context) {
        Poll::Ready(result) => Poll::Ready(Some(result)),
        Poll::Pending => ends.as_mut().poll(context).map(|_| None),
    })
    .await
}

/// What all connections use.
struct Shared {
    controller: Box<dyn Controller>,
    events: EventHub,
    metrics: Arc<ApiMetrics>,
    body_limit: usize,
}

impl Shared {
    async fn carry_out(&self, request: Request) -> Result<Answer, Fault> {
        if request == Request::GetOpenApi {
            // It is the same for every machine.
            return Ok(Answer::Json(OPENAPI.into()));
        }
        let (reply, answer) = Reply::new();
        self.controller.call(request, reply);
        let gone = |_| Err(Fault::new("The machine has ended."));
        answer.await.unwrap_or_else(gone)
    }
}

fn too_many_connections() -> String {
    let body = Fault::new(format!(
        "Too many open connections: at most {MAX_CONNECTIONS} are served at a time."
    ))
    .body();
    format!(
        "HTTP/1.1 503 \r\nServer: Firecracker API\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

async fn connection(stream: UnixStream, shared: Rc<Shared>, mut ends: watch::Receiver<()>) {
    let has_asked = Cell::new(false);
    let service = service_fn(|request| {
        has_asked.set(true);
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(respond(request, &shared).await) }
    });
    let mut served = pin!(
        http1::Builder::new()
            .title_case_headers(true)
            .auto_date_header(false)
            .serve_connection(TokioIo::new(stream), service)
    );
    let result = match unless(&mut ends, served.as_mut()).await {
        Some(result) => result,
        None => {
            // What a client has sent before it was let in is read by the second look.
            tokio::task::yield_now().await;
            let look = poll_fn(|context| Poll::Ready(served.as_mut().poll(context))).await;
            // A client that has asked nothing is owed nothing.
            if look.is_ready() || !has_asked.get() {
                return;
            }
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = result {
        tracing::debug!("a connection to the API ended: {error}");
    }
}

type HttpBody = Either<Full<Bytes>, EventBody>;
type HttpResponse = hyper::Response<HttpBody>;

async fn respond(request: hyper::Request<Incoming>, shared: &Shared) -> HttpResponse {
    let (head, body) = request.into_parts();
    let (method, path) = (head.method.as_str(), head.uri.path());
    let target = head.uri.path_and_query().map_or(path, PathAndQuery::as_str);
    if (method, path) == ("GET", "/events") {
        return event_stream(&shared.events);
    }
    let body = read_body(body, shared.body_limit).await;
    // The client's own time to send is not counted.
    let begun = Instant::now();
    let result = body.and_then(|body| parse(method, target, &body));
    let deprecated = result.as_ref().is_ok_and(|parsed| parsed.deprecated);
    let result = match result {
        Ok(Parsed { request, .. }) => shared.carry_out(request).await,
        Err(fault) => Err(fault),
    };
    match &result {
        Ok(_) => tracing::info!("API: {method} {path}"),
        Err(fault) => tracing::error!("API: {method} {path}: {fault}"),
    }
    shared.metrics.add(Finished {
        method,
        resource: resource_of(path),
        took: begun.elapsed(),
        failed: result.is_err(),
        deprecated,
    });
    response(result, deprecated)
}

async fn read_body(body: Incoming, limit: usize) -> Result<Bytes, Fault> {
    // What is said to be too large is not waited for.
    if let Some(size) = body.size_hint().exact().filter(|&size| size > limit as u64) {
        return Err(Fault::too_large(Some(size), limit));
    }
    match Limited::new(body, limit).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(Fault::too_large(None, limit)),
        Err(error) => Err(Fault::new(format!(
            "The request's body cannot be read: {error}."
        ))),
    }
}

fn response(result: Result<Answer, Fault>, deprecated: bool) -> HttpResponse {
    let (status, content) = match result {
        Ok(Answer::Nothing) => (204, None),
        Ok(Answer::Json(text)) => (200, Some((JSON, text))),
        Ok(Answer::Metrics(text)) => (200, Some((PROMETHEUS, text))),
        Err(fault) => (fault.status, Some((JSON, fault.body()))),
    };
    let mut response = bare_response(status, Either::Left(Full::default()));
    if deprecated {
        let headers = response.headers_mut();
        headers.insert("deprecation", HeaderValue::from_static("true"));
    }
    if let Some((kind, text)) = content {
        response.headers_mut().insert(CONTENT_TYPE, kind);
        *response.body_mut() = Either::Left(Full::from(text));
    }
    response
}

/// An answer that goes on for as long as the machine lives.
fn event_stream(events: &EventHub) -> HttpResponse {
    let mut response = bare_response(200, Either::Right(events.watch()));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

fn bare_response(status: u16, body: HttpBody) -> HttpResponse {
    let mut response = hyper::Response::new(body);
    // What is not a status would be a mistake of ours.
    *response.status_mut() = hyper::StatusCode::from_u16(status).unwrap_or_default();
    // Clients of Firecracker get an empty phrase.
    response
        .extensions_mut()
        .insert(ReasonPhrase::from_static(b""));
    let headers = response.headers_mut();
    headers.insert(SERVER, SERVER_NAME);
    headers.insert(CONNECTION, KEEP_ALIVE);
    response
}

#[cfg(test)]
mod tests;
