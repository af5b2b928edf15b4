//! A connection as a sink uses it: TLS and login, then limits of time.

use std::future::poll_fn;
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_postgres::error::DbError;
use tokio_postgres::{AsyncMessage, Client};

use super::config::{Config, SslMode};
use super::error::{cannot_connect, describe};
use super::tls;
use crate::sinks::Error;
use crate::telemetry::{Failures, alike};

/// Connects and logs in, each of the url's hosts within `connect_timeout`. The connection ends
/// with the task that is returned, which reports the server's warnings.
pub async fn connect(
    name: &str,
    config: &Config,
    failures: &Failures,
) -> Result<(Client, AbortHandle), Error> {
    let hosts = config.url.parse().map_or(1, |target| target.get_hosts().len().max(1));
    let limit = config.connect_timeout.0 * hosts as u32;
    timeout(limit, log_in(name, config, failures)).await.unwrap_or_else(|_| {
        let target = config.url.target();
        Err(Error::Retry(format!("cannot connect to {target}: no answer for {} s", limit.as_secs_f64())))
    })
}

async fn log_in(name: &str, config: &Config, failures: &Failures) -> Result<(Client, AbortHandle), Error> {
    let context = format!("cannot connect to {}", config.url.target());
    let mut target = config.url.parse().map_err(Error::Setup)?;
    if let Some(password) = &config.password {
        target.password(password.read().map_err(Error::Setup)?);
    }
    if target.get_application_name().is_none() {
        target.application_name(format!("headworks/{name}"));
    }
    let mode = config.sslmode();
    let dead_after = config.dead_after.0;
    target
        .ssl_mode(match mode {
            SslMode::Disable => tokio_postgres::config::SslMode::Disable,
            SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
            _ => tokio_postgres::config::SslMode::Require,
        })
        .connect_timeout(config.connect_timeout.0)
        .keepalives(true)
        .tcp_user_timeout(dead_after)
        .keepalives_idle(dead_after / 2)
        .keepalives_interval((dead_after / 6).max(Duration::from_secs(1)))
        .keepalives_retries(3);
    let tls = tls::connector(mode, &config.tls).map_err(Error::Setup)?;
    let failed = |error: tokio_postgres::Error| cannot_connect(&context, &error);
    let (client, mut connection) = target.connect(tls).await.map_err(failed)?;
    let (sink, failures) = (name.to_owned(), failures.clone());
    let task = tokio::spawn(async move {
        while let Some(message) = poll_fn(|context| connection.poll_message(context)).await {
            match message {
                Ok(AsyncMessage::Notice(notice)) => report(&failures, &sink, &notice),
                Ok(_) => {}
                Err(error) => {
                    // Whoever waits for an answer gets an error of its own.
                    tracing::debug!(sink, error = describe(&error), "connection ended");
                    break;
                }
            }
        }
    });
    Ok((client, task.abort_handle()))
}

/// Limits of a session, as SQL. Sent within a transaction, so that a pooler that changes server
/// connections between transactions does not set them for another client.
pub fn settings(config: &Config) -> String {
    let ms = |period: crate::units::Period| period.0.as_millis();
    format!(
        "SET lock_timeout = {}; SET statement_timeout = {}; \
         SET idle_in_transaction_session_timeout = {}; SET client_min_messages = warning; \
         SELECT set_config('synchronous_commit', 'on', false) \
         WHERE current_setting('synchronous_commit') IN ('off', 'local')",
        ms(config.lock_timeout),
        ms(config.statement_timeout),
        ms(config.dead_after),
    )
}

/// Reports a warning of the server, such as RAISE WARNING in a trigger: these come with each row.
fn report(failures: &Failures, sink: &str, notice: &DbError) {
    let (severity, message) = (notice.severity(), notice.message());
    let kind = format!("sink \"{sink}\": the database says {severity}");
    failures.report_by(&kind, &alike(message), 1, message, "");
}
