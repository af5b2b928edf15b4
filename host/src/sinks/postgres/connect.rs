//! A connection as a sink uses it: TLS and login, then limits of time.

use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_postgres::Client;

use super::config::{Config, SslMode};
use super::error::{cannot_connect, describe};
use super::tls;
use crate::sinks::Error;

/// Connects and logs in, each of the url's hosts within `connect_timeout`. Errors begin with
/// `prefix`. The connection ends with the task that is returned.
pub async fn connect(name: &str, config: &Config, prefix: &str) -> Result<(Client, AbortHandle), Error> {
    let hosts = config.url.parse().map_or(1, |target| target.get_hosts().len().max(1));
    let limit = config.connect_timeout.0 * hosts as u32;
    timeout(limit, log_in(name, config, prefix)).await.unwrap_or_else(|_| {
        let target = config.url.target();
        Err(Error::Retry(format!(
            "{prefix}cannot connect to {target}: no answer for {} s",
            limit.as_secs_f64()
        )))
    })
}

async fn log_in(name: &str, config: &Config, prefix: &str) -> Result<(Client, AbortHandle), Error> {
    let context = format!("{prefix}cannot connect to {}", config.url.target());
    let setup = |reason: String| Error::Setup(format!("{prefix}{reason}"));
    let mut target = config.url.parse().map_err(setup)?;
    if let Some(password) = &config.password {
        target.password(password.read().map_err(setup)?);
    }
    let mode = config.sslmode();
    let dead_after = config.dead_after.0;
    target
        .ssl_mode(match mode {
            SslMode::Disable => tokio_postgres::config::SslMode::Disable,
            SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
            _ => tokio_postgres::config::SslMode::Require,
        })
        .application_name(format!("headworks/{name}"))
        .connect_timeout(config.connect_timeout.0)
        .tcp_user_timeout(dead_after)
        .keepalives_idle(dead_after / 2)
        .keepalives_interval((dead_after / 6).max(Duration::from_secs(1)))
        .keepalives_retries(3);
    let tls = tls::connector(mode, &config.tls).map_err(setup)?;
    let failed = |error: tokio_postgres::Error| cannot_connect(&context, &error);
    let (client, connection) = target.connect(tls).await.map_err(failed)?;
    let sink = name.to_owned();
    let task = tokio::spawn(async move {
        if let Err(error) = connection.await {
            // Whoever waits for an answer gets an error of its own.
            tracing::debug!(sink, error = describe(&error), "connection ended");
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
