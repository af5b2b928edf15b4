//! The endpoints.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::json;

use super::{ClientListRequest, ClientRequest, Deps, INSTANCE, RedriveError, RedriveRequest};
use crate::plugin;

const BODY_BYTES_MAX: usize = 64 << 10;
const REDRIVE_IDS_MAX: usize = 1_000;
const CLIENTS_MAX: usize = 10_000;
/// Prometheus text exposition format, version 0.0.4.
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";

/// `address` is where it is served: on loopback, requests for another host's
/// name are refused. A request's body must be there within `body_max`.
pub fn router(deps: Deps, address: SocketAddr, body_max: Duration) -> Router {
    let instance = Arc::clone(&deps.instance);
    let router = Router::new()
        .route("/", get(index))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/api/problems", get(problems))
        .route("/api/status", get(status))
        .route("/api/dead-letters/redrive", post(redrive))
        .route("/api/clients/list", post(list_clients))
        .route("/api/clients/show", post(show_client))
        .route("/api/clients/kick", post(kick_client))
        .route("/api/clients/delete", post(delete_client))
        .fallback(async || problem(StatusCode::NOT_FOUND, "no such page"))
        .layer(middleware::from_fn_with_state(body_max, whole_body))
        .layer(middleware::from_fn_with_state(instance, as_instance))
        .with_state(deps);
    if address.ip().is_loopback() { router.layer(middleware::from_fn(only_local_names)) } else { router }
}

async fn index() -> &'static str {
    "headworks\n\n\
     /healthz                         the process works; restart it otherwise\n\
     /readyz                          devices can be acknowledged, or why not\n\
     /metrics                         Prometheus text\n\
     /api/problems                    what a person should act on, worst first\n\
     /api/status                      each part, streams, pipelines, plugins, sinks\n\
     POST /api/dead-letters/redrive   send dead letters again\n\
     POST /api/clients/list           MQTT clients and sessions\n\
     POST /api/clients/show           one of them\n\
     POST /api/clients/kick           end its connection\n\
     POST /api/clients/delete         end its session and all that waits for it\n"
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
    match deps.redrive.redrive(request).await {
        Ok(answer) => Json(answer).into_response(),
        Err(error @ RedriveError::NotFound(_)) => problem(StatusCode::NOT_FOUND, &error.to_string()),
        Err(error @ RedriveError::Unavailable(_)) => {
            problem(StatusCode::SERVICE_UNAVAILABLE, &error.to_string())
        }
    }
}

async fn list_clients(State(deps): State<Deps>, Json(request): Json<ClientListRequest>) -> Response {
    Json(deps.clients.list(&request.prefix, request.max.min(CLIENTS_MAX))).into_response()
}

async fn show_client(State(deps): State<Deps>, Json(request): Json<ClientRequest>) -> Response {
    match deps.clients.show(&request.client_id) {
        Some(client) => Json(client).into_response(),
        None => problem(StatusCode::NOT_FOUND, &format!("no client \"{}\" has a session", request.client_id)),
    }
}

async fn kick_client(State(deps): State<Deps>, Json(request): Json<ClientRequest>) -> Response {
    Json(json!({ "kicked": deps.clients.kick(&request.client_id) })).into_response()
}

async fn delete_client(State(deps): State<Deps>, Json(request): Json<ClientRequest>) -> Response {
    Json(json!({ "deleted": deps.clients.delete(&request.client_id).await })).into_response()
}

/// Reads the body before a handler is called: bounded in bytes and in time.
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

/// A request that names another host is not for this one, which took its port over.
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

/// A web page can point a name of its own at 127.0.0.1 and read what is served
/// there (DNS rebinding); its requests carry that name.
async fn only_local_names(headers: HeaderMap, request: Request, next: Next) -> Response {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    let is_local = name.is_empty()
        || name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
    if is_local {
        next.run(request).await
    } else {
        problem(
            StatusCode::FORBIDDEN,
            "ask for localhost, or set admin.allow_remote and bind to another address",
        )
    }
}

fn problem(code: StatusCode, message: &str) -> Response {
    (code, Json(json!({ "error": message }))).into_response()
}
