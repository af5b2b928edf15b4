//! The endpoints of the admin server.

use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper::body::{Frame, SizeHint};
use serde::Serialize;
use serde_json::json;
use subtle::ConstantTimeEq;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::{
    ClientListRequest, ClientRequest, Deps, INSTANCE, RedriveError, RedriveRequest, RefusedClientsRequest,
};
use crate::plugin;

const BODY_BYTES_MAX: usize = 64 << 10;
const REDRIVE_IDS_MAX: usize = 1_000;
const CLIENTS_MAX: usize = 10_000;
/// How long an answer waits for a client's connection or session to end.
const CLIENT_ENDS_MAX: Duration =
    if cfg!(test) { Duration::from_millis(50) } else { Duration::from_secs(10) };
/// Most answers about clients that are being made or sent. Each has its whole list in memory.
pub(super) const LISTS_MAX: usize = 4;
/// Size of the pieces in which such an answer is passed to its connection.
const PIECE_BYTES: usize = 64 << 10;
/// Prometheus text exposition format, version 0.0.4.
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Builds the router. A request whose host name is not an address, `localhost` or one of `names` is
/// refused. The body of a request must arrive within `body_max`.
pub fn router(deps: Deps, names: &[String], body_max: Duration) -> Router {
    let (instance, token) = (Arc::clone(&deps.instance), Arc::clone(&deps.token));
    let listing = Router::new()
        .route("/api/clients/list", post(list_clients))
        .route("/api/clients/show", post(show_client))
        .route("/api/clients/refused", post(list_refused))
        .route_layer(middleware::from_fn_with_state(Arc::new(Semaphore::new(LISTS_MAX)), one_of_few));
    let acting = listing
        .route("/api/dead-letters/redrive", post(redrive))
        .route("/api/dead-letters/discard", post(discard))
        .route("/api/clients/kick", post(kick_client))
        .route("/api/clients/delete", post(delete_client))
        .route_layer(middleware::from_fn_with_state(body_max, whole_body))
        .route_layer(middleware::from_fn_with_state(token, with_token));
    Router::new()
        .route("/", get(index))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/api/problems", get(problems))
        .route("/api/status", get(status))
        .merge(acting)
        .fallback(async || problem(StatusCode::NOT_FOUND, "no such page"))
        .layer(middleware::from_fn_with_state(instance, as_instance))
        .layer(middleware::from_fn_with_state(Arc::from(names), only_own_names))
        .with_state(deps)
}

async fn index() -> &'static str {
    "headworks\n\n\
     /healthz                         the process works; if not, restart it\n\
     /readyz                          devices are acknowledged, or why not\n\
     /metrics                         metrics in the Prometheus text format\n\
     /api/problems                    problems that need an operator, worst first\n\
     /api/status                      state of streams, pipelines, plugins and sinks\n\
     \n\
     With the token in run.json (Authorization: Bearer TOKEN):\n\
     POST /api/dead-letters/redrive   send dead letters again\n\
     POST /api/dead-letters/discard   close dead letters without sending them\n\
     POST /api/clients/list           list MQTT clients and sessions\n\
     POST /api/clients/show           show one client or session\n\
     POST /api/clients/refused        list refused clients, newest first\n\
     POST /api/clients/kick           disconnect a client\n\
     POST /api/clients/delete         delete a session and its queued messages\n"
}

async fn healthz(State(deps): State<Deps>) -> Response {
    match (deps.unhealthy)() {
        None => "ok\n".into_response(),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn readyz(State(deps): State<Deps>) -> Response {
    let components = (deps.ready)();
    let ready = components.iter().all(|component| component.ready);
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(json!({ "ready": ready, "components": components }))).into_response()
}

async fn problems(State(deps): State<Deps>) -> Response {
    Json(json!({ "problems": (deps.problems)() })).into_response()
}

async fn metrics(State(deps): State<Deps>) -> Response {
    (deps.measure)();
    let text = deps.prometheus.render() + &deps.process.render() + &plugin::render_metrics();
    ([(header::CONTENT_TYPE, EXPOSITION)], text).into_response()
}

async fn status(State(deps): State<Deps>) -> Response {
    Json((deps.status)()).into_response()
}

async fn redrive(State(deps): State<Deps>, Json(request): Json<RedriveRequest>) -> Response {
    if request.ids.len() > REDRIVE_IDS_MAX {
        return problem(StatusCode::BAD_REQUEST, &format!("at most {REDRIVE_IDS_MAX} ids at once"));
    }
    answered(deps.redrive.redrive(request).await)
}

async fn discard(State(deps): State<Deps>, Json(request): Json<RedriveRequest>) -> Response {
    if request.ids.len() > REDRIVE_IDS_MAX {
        return problem(StatusCode::BAD_REQUEST, &format!("at most {REDRIVE_IDS_MAX} ids at once"));
    }
    answered(deps.redrive.discard(request).await)
}

fn answered(done: Result<impl Serialize, RedriveError>) -> Response {
    match done {
        Ok(answer) => Json(answer).into_response(),
        Err(error @ RedriveError::NotFound(_)) => problem(StatusCode::NOT_FOUND, &error.to_string()),
        Err(error @ RedriveError::Unavailable(_)) => {
            problem(StatusCode::SERVICE_UNAVAILABLE, &error.to_string())
        }
    }
}

async fn list_clients(State(deps): State<Deps>, Json(mut request): Json<ClientListRequest>) -> Response {
    request.max = request.max.min(CLIENTS_MAX);
    Json(deps.clients.list(&request)).into_response()
}

async fn list_refused(State(deps): State<Deps>, Json(request): Json<RefusedClientsRequest>) -> Response {
    Json(deps.clients.refused(request.max.min(CLIENTS_MAX))).into_response()
}

async fn show_client(State(deps): State<Deps>, Json(request): Json<ClientRequest>) -> Response {
    match deps.clients.show(&request.client_id) {
        Some(client) => Json(client).into_response(),
        None => problem(StatusCode::NOT_FOUND, &format!("no client \"{}\" has a session", request.client_id)),
    }
}

async fn kick_client(State(deps): State<Deps>, Json(request): Json<ClientRequest>) -> Response {
    match timeout(CLIENT_ENDS_MAX, deps.clients.kick(&request.client_id)).await {
        Ok(kicked) => Json(json!({ "kicked": kicked })).into_response(),
        Err(_) => not_yet(&format!("the connection of client \"{}\" is told to end", request.client_id)),
    }
}

async fn delete_client(State(deps): State<Deps>, Json(request): Json<ClientRequest>) -> Response {
    match timeout(CLIENT_ENDS_MAX, deps.clients.delete(&request.client_id)).await {
        Ok(deleted) => Json(json!({ "deleted": deleted })).into_response(),
        Err(_) => not_yet(&format!("the session of client \"{}\" is being deleted", request.client_id)),
    }
}

/// Answers that an operation has begun but was not finished within [`CLIENT_ENDS_MAX`]; it continues.
fn not_yet(begun: &str) -> Response {
    let within = CLIENT_ENDS_MAX.as_secs();
    let why = "the disk has no room, or it or the machine is slow";
    let message = format!("{begun}, which has not finished after {within} s: {why} (see /api/problems)");
    problem(StatusCode::GATEWAY_TIMEOUT, &message)
}

/// Reads the whole body before the handler is called, within limits of size and time.
async fn whole_body(State(within): State<Duration>, request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    match tokio::time::timeout(within, to_bytes(body, BODY_BYTES_MAX)).await {
        Ok(Ok(body)) => next.run(Request::from_parts(head, Body::from(body))).await,
        Ok(Err(_)) => problem(
            StatusCode::PAYLOAD_TOO_LARGE,
            &format!("the body must come whole and have at most {BODY_BYTES_MAX} bytes"),
        ),
        Err(_) => problem(StatusCode::REQUEST_TIMEOUT, "the body took too long"),
    }
}

/// Answers a request beyond [`LISTS_MAX`] with an error instead of letting it wait, because it would
/// keep its connection from `/healthz`.
async fn one_of_few(State(places): State<Arc<Semaphore>>, request: Request, next: Next) -> Response {
    let Ok(place) = places.try_acquire_owned() else {
        let told = "other lists are not yet taken by those who asked for them; ask again";
        return problem(StatusCode::SERVICE_UNAVAILABLE, told);
    };
    let (head, body) = next.run(request).await.into_parts();
    match to_bytes(body, usize::MAX).await {
        Ok(rest) => Response::from_parts(head, Body::new(Placed { rest, _place: place })),
        Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

/// An answer that holds its place until it is sent or its connection has ended. It is sent in copies of
/// pieces, so that pieces in transit do not keep the whole answer in memory.
struct Placed {
    rest: Bytes,
    _place: OwnedSemaphorePermit,
}

impl HttpBody for Placed {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.rest.is_empty() {
            return Poll::Ready(None);
        }
        let len = self.rest.len().min(PIECE_BYTES);
        let piece = self.rest.split_to(len);
        Poll::Ready(Some(Ok(Frame::data(Bytes::copy_from_slice(&piece)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64)
    }
}

/// Refuses a request that names another host, whose port this host has taken over.
async fn as_instance(State(instance): State<Arc<str>>, request: Request, next: Next) -> Response {
    let meant = request.headers().get(INSTANCE);
    let mut response = if meant.is_none_or(|meant| meant.as_bytes() == instance.as_bytes()) {
        next.run(request).await
    } else {
        problem(StatusCode::MISDIRECTED_REQUEST, "this is another host")
    };
    if let Ok(instance) = HeaderValue::from_str(&instance) {
        response.headers_mut().insert(INSTANCE, instance);
    }
    response
}

/// Refuses requests without the token, because other users of this machine can connect too.
async fn with_token(State(token): State<Arc<str>>, request: Request, next: Next) -> Response {
    let shown = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let shown = shown.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    if bool::from(shown.as_bytes().ct_eq(token.as_bytes())) {
        return next.run(request).await;
    }
    let told = "this needs the host's token, in `Authorization: Bearer TOKEN`: it is in run.json in the data \
                folder, or in admin.token_file";
    closing(problem(StatusCode::UNAUTHORIZED, told))
}

/// Refuses requests of web pages. A page can make a name of its own resolve to this host and read what
/// is served (DNS rebinding); its requests carry that name. Requests of a page from another origin name
/// that origin.
async fn only_own_names(State(names): State<Arc<[String]>>, request: Request, next: Next) -> Response {
    match stranger(&names, request.method(), request.headers()) {
        Some(told) => closing(problem(StatusCode::FORBIDDEN, told)),
        None => next.run(request).await,
    }
}

/// Returns what is wrong with the host name of a request, or with the origin of the page that sent it.
fn stranger(names: &[String], method: &Method, headers: &HeaderMap) -> Option<&'static str> {
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let host = header(header::HOST).unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    let is_ours = name.is_empty()
        || name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok()
        || names.iter().any(|ours| ours.eq_ignore_ascii_case(name));
    if !is_ours {
        return Some("ask for localhost or an address, or add the name to admin.names");
    }
    let origin =
        header(header::ORIGIN).map(|origin| origin.split_once("://").map_or(origin, |(_, host)| host));
    let is_foreign = method != Method::GET && origin.is_some_and(|origin| origin != host);
    is_foreign.then_some("pages of other origins may not act here")
}

/// Closes the connection of a refused client.
fn closing(mut response: Response) -> Response {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

fn problem(code: StatusCode, message: &str) -> Response {
    (code, Json(json!({ "error": message }))).into_response()
}
