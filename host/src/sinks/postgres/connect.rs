//! Opens a connection for a sink: TLS, login, and time limits.

use std::future::poll_fn;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::time::Duration;

use tokio::net::lookup_host;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_postgres::config::{Host, LoadBalanceHosts};
use tokio_postgres::error::DbError;
use tokio_postgres::{AsyncMessage, Client, SimpleQueryMessage};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::config::{Config, SslMode};
use super::error::{cannot_connect, describe, describe_db, is_end};
use super::tls;
use crate::sinks::Error;
use crate::telemetry::{Failures, alike};

/// Most addresses of a host name.
const ADDRESSES_MAX: usize = 16;

/// Statement that only Pgpool-II answers, and the server's own address.
const POOL_VERSION: &str = "SHOW pool_version";
const SERVER: &str = "SELECT current_setting('port'), host(inet_server_addr())";

/// What to do about Pgpool-II, which does not forward what a sink sends: COPY behind other messages,
/// without waiting for their answers.
const PGPOOL: &str = "Pgpool-II is in between, through which rows cannot be written (COPY among other messages ends its \
     process); connect to PostgreSQL directly, and name all servers in `url` with target_session_attrs=read-write";

/// The task of a connection. It ends with the user of the connection, whatever the server does.
pub struct Connection {
    task: AbortHandle,
    end: End,
}

impl Connection {
    pub fn end(&self) -> End {
        self.end.clone()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How a connection ended. If a server ends a connection between two requests, no request receives the
/// reason: the next one only learns that the connection is closed.
#[derive(Clone)]
pub struct End(watch::Receiver<Option<String>>);

impl End {
    /// Adds the reason why the connection ended to an error, in the words of the server if it gave one.
    /// Called after the connection is closed or dropped.
    pub async fn explain(mut self, error: Error) -> Error {
        // The task has said all once it is gone.
        while self.0.changed().await.is_ok() {}
        let words = self.0.borrow();
        let add = |reason: String| match &*words {
            Some(words) if !reason.contains(words) => format!("{reason}: {words}"),
            None if reason.ends_with(CLOSED) => format!("{reason}; the server's log may say why"),
            _ => reason,
        };
        error.map(add)
    }
}

/// The client's error for a request on a connection that has ended.
const CLOSED: &str = "connection closed";

/// Connects and logs in. The addresses of the URL's hosts are tried one after the other, each for
/// `connect_timeout`. The returned task reports warnings of the server.
pub async fn connect(
    name: &str,
    config: &Config,
    failures: &Failures,
) -> Result<(Client, Connection), Error> {
    let target = target(name, config)?;
    let (hosts, ports) = (target.get_hosts().len(), target.get_ports().len());
    if ports > 1 && ports != hosts || ![0, hosts].contains(&target.get_hostaddrs().len()) {
        return Err(Error::Setup("the `url` has not as many ports or addresses as it has hosts".to_owned()));
    }
    let limit = config.connect_timeout.0;
    let tls = tls::connector(config.sslmode(), &config.tls).map_err(Error::Setup)?;
    let mut failed: Vec<(String, Error)> = Vec::new();
    for host in order(&target) {
        for (place, target) in addresses(&target, host, limit).await {
            let silent = |_| Err(Error::Retry(format!("no answer for {} s", limit.as_secs_f64())));
            let logged_in = log_in(name, &target, tls.clone(), failures);
            match timeout(limit, logged_in).await.unwrap_or_else(silent) {
                Ok(connected) => return Ok(connected),
                Err(error) => failed.push((place, error)),
            }
        }
    }
    let reasons: Vec<String> = match &failed[..] {
        [(_, error)] => vec![error.to_string()],
        several => several.iter().map(|(place, error)| format!("{place}: {error}")).collect(),
    };
    let reason = format!("cannot connect to {}: {}", config.url.target(), reasons.join("; "));
    // Where one host may come back, it is tried again soon.
    let is_setup = failed.iter().all(|(_, error)| matches!(error, Error::Setup(_)));
    Err(if is_setup { Error::Setup(reason) } else { Error::Retry(reason) })
}

/// Returns the hosts of the URL, and how to connect to each.
fn target(name: &str, config: &Config) -> Result<tokio_postgres::Config, Error> {
    let mut target = config.url.parse().map_err(Error::Setup)?;
    if let Some(password) = &config.password {
        target.password(password.read("password").map_err(Error::Setup)?);
    }
    if target.get_application_name().is_none() {
        target.application_name(format!("headworks/{name}"));
    }
    let dead_after = config.dead_after.0;
    target
        .ssl_mode(match config.sslmode() {
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
    Ok(target)
}

/// Returns the order in which the hosts of the URL are tried.
fn order(target: &tokio_postgres::Config) -> Vec<usize> {
    let mut hosts: Vec<usize> = (0..target.get_hosts().len()).collect();
    if target.get_load_balance_hosts() == LoadBalanceHosts::Random {
        let drawn = RandomState::new();
        hosts.sort_by_cached_key(|host| drawn.hash_one(host));
    }
    hosts
}

/// Returns one target for each address of a host, with its name for error messages. A name that cannot
/// be resolved is one target, whose error says so.
async fn addresses(
    target: &tokio_postgres::Config,
    host: usize,
    limit: Duration,
) -> Vec<(String, tokio_postgres::Config)> {
    let port = target.get_ports().get(host).or(target.get_ports().first()).copied().unwrap_or(5432);
    let given = target.get_hostaddrs().get(host).copied();
    let name = match &target.get_hosts()[host] {
        Host::Tcp(name) => name,
        Host::Unix(path) => {
            return vec![(format!("{}:{port}", path.display()), one(target, host, port, None))];
        }
    };
    let mut found: Vec<IpAddr> = match given {
        Some(address) => vec![address],
        None => match timeout(limit, lookup_host((name.as_str(), port))).await {
            Ok(Ok(found)) => found.map(|address| address.ip()).take(ADDRESSES_MAX).collect(),
            _ => Vec::new(),
        },
    };
    found.dedup();
    if found.is_empty() {
        return vec![(format!("{name}:{port}"), one(target, host, port, None))];
    }
    let of = |address: &IpAddr| {
        let place = match address.to_string() {
            address if address == *name => format!("{name}:{port}"),
            address => format!("{name}:{port} ({address})"),
        };
        (place, one(target, host, port, Some(*address)))
    };
    found.iter().map(of).collect()
}

/// Returns the target with only one of its hosts.
fn one(
    target: &tokio_postgres::Config,
    host: usize,
    port: u16,
    address: Option<IpAddr>,
) -> tokio_postgres::Config {
    let mut one = tokio_postgres::Config::new();
    match &target.get_hosts()[host] {
        Host::Tcp(name) => one.host(name),
        Host::Unix(path) => one.host_path(path),
    };
    one.port(port)
        .ssl_mode(target.get_ssl_mode())
        .ssl_negotiation(target.get_ssl_negotiation())
        .target_session_attrs(target.get_target_session_attrs())
        .channel_binding(target.get_channel_binding())
        .keepalives(target.get_keepalives())
        .keepalives_idle(target.get_keepalives_idle());
    if let Some(address) = address {
        one.hostaddr(address);
    }
    if let Some(user) = target.get_user() {
        one.user(user);
    }
    if let Some(password) = target.get_password() {
        one.password(password);
    }
    if let Some(name) = target.get_dbname() {
        one.dbname(name);
    }
    if let Some(options) = target.get_options() {
        one.options(options);
    }
    if let Some(name) = target.get_application_name() {
        one.application_name(name);
    }
    if let Some(limit) = target.get_connect_timeout() {
        one.connect_timeout(*limit);
    }
    if let Some(limit) = target.get_tcp_user_timeout() {
        one.tcp_user_timeout(*limit);
    }
    if let Some(interval) = target.get_keepalives_interval() {
        one.keepalives_interval(interval);
    }
    if let Some(retries) = target.get_keepalives_retries() {
        one.keepalives_retries(retries);
    }
    one
}

async fn log_in(
    name: &str,
    target: &tokio_postgres::Config,
    tls: MakeRustlsConnect,
    failures: &Failures,
) -> Result<(Client, Connection), Error> {
    let failed = |error: tokio_postgres::Error| cannot_connect(&error);
    let (client, mut connection) = target.connect(tls).await.map_err(failed)?;
    let (sink, failures) = (name.to_owned(), failures.clone());
    let (words, end) = watch::channel(None);
    let task = tokio::spawn(async move {
        while let Some(message) = poll_fn(|context| connection.poll_message(context)).await {
            match message {
                Ok(AsyncMessage::Notice(notice)) => {
                    // An immediate shutdown says so in a warning.
                    if is_end(notice.code().code()) {
                        words.send_replace(Some(describe_db(&notice)));
                    }
                    report(&failures, &sink, &notice);
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(sink, error = describe(&error), "connection ended");
                    if !error.is_closed() {
                        words.send_replace(Some(describe(&error)));
                    }
                    break;
                }
            }
        }
    });
    let connection = Connection { task: task.abort_handle(), end: End(end) };
    match is_pgpool(&client, target).await {
        Ok(false) => Ok((client, connection)),
        Ok(true) => Err(Error::Setup(PGPOOL.to_owned())),
        Err(error) => {
            let end = connection.end();
            drop(connection);
            Err(end.explain(failed(error)).await)
        }
    }
}

/// Returns whether the peer is Pgpool-II. A server logs each unknown statement, so it is asked only if
/// its own address is not the one to which the sink has connected.
async fn is_pgpool(client: &Client, target: &tokio_postgres::Config) -> Result<bool, tokio_postgres::Error> {
    let answers = client.simple_query(SERVER).await?;
    let row = answers.iter().find_map(|answer| match answer {
        SimpleQueryMessage::Row(row) => Some((row.get(0)?, row.get(1))),
        _ => None,
    });
    let port = target.get_ports().first().map(u16::to_string);
    let address = target.get_hostaddrs().first().map(IpAddr::to_string);
    if row.is_none_or(|(is, at)| Some(is) == port.as_deref() && at == address.as_deref()) {
        return Ok(false);
    }
    let answers = match client.simple_query(POOL_VERSION).await {
        Ok(answers) => answers,
        Err(error) if error.as_db_error().is_some() => return Ok(false),
        Err(error) => return Err(error),
    };
    Ok(answers.iter().any(|answer| matches!(answer, SimpleQueryMessage::Row(_))))
}

/// Returns the time limits of a session as SQL. They are sent within a transaction, so that a pooler
/// that changes server connections between transactions does not set them for another client. The last
/// two limits exist since PostgreSQL 14 and 17: an idle connection is not an error, and a whole
/// transaction is limited through its statements.
pub fn settings(config: &Config) -> String {
    let ms = |period: crate::units::Period| period.0.as_millis();
    format!(
        "SET lock_timeout = {}; SET statement_timeout = {}; \
         SET idle_in_transaction_session_timeout = {}; SET client_min_messages = warning; \
         {}; SET quote_all_identifiers = off; \
         SELECT set_config(name, '0', false) FROM pg_settings \
         WHERE name IN ('idle_session_timeout', 'transaction_timeout'); \
         SELECT set_config('synchronous_commit', 'on', false) \
         WHERE current_setting('synchronous_commit') IN ('off', 'local')",
        ms(config.lock_timeout),
        ms(config.statement_timeout),
        ms(config.dead_after),
        TEXT_FORMS.map(|(name, value)| format!("SET {name} = '{value}'")).join("; "),
    )
}

/// Settings for reading values in text form. Only dates that begin with the year are accepted:
/// `02/03/2026` is rejected, not guessed.
const TEXT_FORMS: [(&str, &str); 8] = [
    ("client_encoding", "UTF8"),
    ("TimeZone", "UTC"),
    ("timezone_abbreviations", "Default"),
    ("DateStyle", "ISO, YMD"),
    ("IntervalStyle", "postgres"),
    ("lc_monetary", "C"),
    ("xmloption", "content"),
    ("array_nulls", "on"),
];

/// Returns the expressions that set them for the rest of a transaction, after `SELECT` or `PERFORM`,
/// because a trigger may have changed them for the session.
pub fn text_forms() -> String {
    let rows = TEXT_FORMS.map(|(name, value)| format!("('{name}', '{value}')")).join(", ");
    format!(
        "set_config(form.name, form.value, true) FROM (VALUES {rows}) AS form (name, value) \
         WHERE current_setting(form.name) <> form.value"
    )
}

/// Returns the condition that one of them differs from what [`text_forms`] sets.
pub fn text_forms_differ() -> String {
    TEXT_FORMS.map(|(name, value)| format!("current_setting('{name}') <> '{value}'")).join(" OR ")
}

/// Reports a warning of the server, such as RAISE WARNING in a trigger, which is repeated for each row.
fn report(failures: &Failures, sink: &str, notice: &DbError) {
    let (severity, message) = (notice.severity(), notice.message());
    let kind = format!("sink \"{sink}\": the database says {severity}");
    failures.report_by(&kind, &alike(message), 1, message, "");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(url: &str) -> tokio_postgres::Config {
        url.parse().expect("a url")
    }

    #[test]
    fn a_target_of_one_host_is_what_the_url_says() {
        for url in [
            "postgres://w:x@db:5433/iot?target_session_attrs=read-write&options=-c%20a%3Db&channel_binding=require",
            "postgres://w@db:5433/iot?application_name=a&keepalives=0&keepalives_idle=7&keepalives_interval=8\
             &keepalives_retries=9&tcp_user_timeout=10&connect_timeout=11&sslmode=require",
        ] {
            assert_eq!(one(&target(url), 0, 5433, None), target(url));
        }
    }

    #[tokio::test]
    async fn each_address_of_each_host_is_tried_by_itself() {
        let target = target(
            "postgres://w@a.test:5432,192.0.2.2:5433,%2Frun%2Fpg:5432/iot?hostaddr=192.0.2.1,192.0.2.2,192.0.2.3",
        );
        assert_eq!(order(&target), [0, 1, 2]);
        let mut places = Vec::new();
        for host in order(&target) {
            for (place, target) in addresses(&target, host, Duration::from_secs(9)).await {
                assert_eq!((target.get_hosts().len(), target.get_ports().len()), (1, 1));
                places.push((place, target.get_hostaddrs().first().map(IpAddr::to_string)));
            }
        }
        let expected = [
            ("a.test:5432 (192.0.2.1)", Some("192.0.2.1")),
            ("192.0.2.2:5433", Some("192.0.2.2")),
            ("/run/pg:5432", None),
        ];
        assert_eq!(places, expected.map(|(place, address)| (place.to_owned(), address.map(str::to_owned))));
    }

    #[tokio::test]
    async fn a_name_is_tried_at_each_of_its_addresses() {
        let target = target("postgres://w@localhost:5433/iot");
        let found: Vec<IpAddr> =
            lookup_host(("localhost", 5433)).await.expect("it has one").map(|a| a.ip()).collect();
        let tried = addresses(&target, 0, Duration::from_secs(9)).await;
        let tried: Vec<IpAddr> = tried.iter().map(|(_, target)| target.get_hostaddrs()[0]).collect();
        assert!(!tried.is_empty() && found.iter().all(|address| tried.contains(address)), "{tried:?}");
    }
}
