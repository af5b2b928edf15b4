//! Configuration of a PostgreSQL sink.

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};
use tokio_postgres::config::{Host, SslNegotiation, TargetSessionAttrs};

use super::PostgresSink;
use crate::problems::{KeyPath, Problems};
use crate::sinks::columns::ColumnsConfig;
use crate::sinks::config::{validate_table, within};
use crate::sinks::password::Password;
use crate::sinks::{
    BatchConfig, Begin, BuildContext, CheckContext, Checked, Claim, OnConflict, Sink, SinkConfig,
};
use crate::stream::OnLag;
use crate::topic::Namespace;
use crate::units::Period;

/// A table in PostgreSQL.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// URL of the server, such as `postgres://writer@127.0.0.1:5432/iot`. Several hosts are tried in
    /// order; `?target_session_attrs=read-write` selects the primary among them. docs/databases.md lists
    /// the supported options.
    pub url: Url,
    /// Password of the user. It is read again at each connect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<Password>,
    /// Table, with or without its schema: `telemetry`, `iot.telemetry`.
    pub table: String,
    /// Maps each column to the source of its value. The default is the table `time, device_id, location,
    /// metric, value`.
    pub columns: ColumnsConfig,
    /// Create the table and its index (device, time) if the table is missing.
    pub create: bool,
    /// Used if Headworks creates the table and TimescaleDB is installed.
    pub hypertable: Hypertable,
    /// What happens to a row that violates a unique key of the table: `reject` makes it a dead letter,
    /// `ignore` leaves it out and counts it, `upsert` replaces the existing row. `auto` is read as
    /// `ignore`, and `refuse` as `reject`.
    pub on_conflict: OnConflict,
    /// When a batch is written.
    pub batch: BatchConfig,
    /// What retention of the stream does while this sink lags: `block` keeps the messages that the sink
    /// needs, and devices wait when the stream reaches its size limit; `detach` removes them, which is
    /// counted and reported.
    pub on_lag: OnLag,
    /// Former name of this sink. It continues at the position of the sink with that name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub renamed_from: Option<String>,
    /// Where to begin without a position: `start` with the first message that the stream has, `now`
    /// after the messages that the stream had at the first start of the host with this key. If unset: at
    /// the start, except for a table to which the stream was written before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub begin: Option<Begin>,
    /// TLS mode, as in PostgreSQL. `disable`: no TLS. `prefer`: TLS if the server has it, without
    /// verification. `require`: TLS only; verified as with `verify-ca` if `tls.ca` is set. `verify-ca`:
    /// the server's certificate must be signed by the CA, or be listed in `tls.ca` itself.
    /// `verify-full`: the certificate must also name the host, in its common name if it has no
    /// alternative names. Also read from the URL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sslmode: Option<SslMode>,
    /// Certificates of the TLS connection.
    pub tls: Tls,
    /// How long connecting and logging in may take, for each address of each host of the URL. If a host
    /// does not answer in time, the next one is tried.
    pub connect_timeout: Period,
    /// How long to wait for a lock (`lock_timeout`).
    pub lock_timeout: Period,
    /// How long one batch may take (`statement_timeout`).
    pub statement_timeout: Period,
    /// Time without an answer after which a connection is considered dead
    /// (`idle_in_transaction_session_timeout`, TCP keep-alive, TCP user timeout).
    pub dead_after: Period,
}

/// A connection URL. A password in it is never shown.
#[derive(Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Url(pub String);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SslMode {
    Disable,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// Certificates of a TLS connection.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// PEM file of trusted CAs, or of the server's own certificate. If unset, the system's CAs are
    /// trusted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// PEM file of the client's certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert: Option<PathBuf>,
    /// PEM file of the private key of `cert`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
}

/// Settings of a TimescaleDB hypertable: its chunks are compressed, and later removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Hypertable {
    /// Time that one chunk covers.
    pub chunk: Period,
    /// Age at which a chunk is compressed.
    pub compress_after: Period,
    /// Age at which a chunk is removed.
    pub retention: Period,
}

const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(86_400);

impl Default for Config {
    fn default() -> Self {
        Self {
            url: Url(String::new()),
            password: None,
            table: "telemetry".to_owned(),
            columns: ColumnsConfig::default(),
            create: true,
            hypertable: Hypertable::default(),
            on_conflict: OnConflict::default(),
            batch: BatchConfig::default(),
            on_lag: OnLag::default(),
            renamed_from: None,
            begin: None,
            sslmode: None,
            tls: Tls::default(),
            connect_timeout: Period(10 * SECOND),
            lock_timeout: Period(10 * SECOND),
            statement_timeout: Period(60 * SECOND),
            dead_after: Period(30 * SECOND),
        }
    }
}

impl Default for Hypertable {
    fn default() -> Self {
        Self { chunk: Period(DAY), compress_after: Period(7 * DAY), retention: Period(365 * DAY) }
    }
}

impl Config {
    pub fn sslmode(&self) -> SslMode {
        self.sslmode.or(self.url.split().1).unwrap_or(SslMode::Prefer)
    }
}

#[async_trait]
impl SinkConfig for Config {
    fn batch(&self) -> BatchConfig {
        self.batch
    }

    fn on_lag(&self) -> OnLag {
        self.on_lag
    }

    fn renamed_from(&self) -> Option<&str> {
        self.renamed_from.as_deref()
    }

    fn begin(&self) -> Option<Begin> {
        self.begin
    }

    fn ignores_rows(&self) -> bool {
        self.on_conflict.ignores_rows()
    }

    fn describe(&self) -> String {
        format!("PostgreSQL {} table {}", self.url.target(), self.table)
    }

    fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        self.url.validate(&path.key("url"), problems);
        validate_table(&self.table, 2, &path.key("table"), problems);
        self.columns.validate(&path.key("columns"), problems);
        self.batch.validate(&path.key("batch"), problems);
        self.hypertable.validate(&path.key("hypertable"), problems);
        for (period, name) in [
            (self.connect_timeout, "connect_timeout"),
            (self.lock_timeout, "lock_timeout"),
            (self.statement_timeout, "statement_timeout"),
            (self.dead_after, "dead_after"),
        ] {
            within(period, 1_000, 3_600_000, &path.key(name), problems);
        }
        if self.sslmode() == SslMode::Disable && self.tls != Tls::default() {
            problems.add(path.key("tls"), "has no use with sslmode disable");
        }
        if self.tls.cert.is_some() != self.tls.key.is_some() {
            problems.add(path.key("tls"), "cert and key belong together, one is missing");
        }
        if let Some(password) = &self.password {
            password.validate(&path.key("password"), problems);
        }
    }

    fn validate_namespace(&self, namespace: &Namespace, path: &KeyPath, problems: &mut Problems) {
        self.columns.validate_namespace(namespace, &path.key("columns"), problems);
    }

    fn warnings(&self, path: &str) -> Vec<String> {
        let mut warnings = self.url.warnings(&format!("{path}.url"));
        warnings.extend(self.on_conflict.warning(&format!("{path}.on_conflict")));
        warnings
    }

    /// Reads the certificates and the password, and adds what is wrong with them.
    fn look(&self, path: &KeyPath, problems: &mut Problems) {
        if let Some(password) = &self.password {
            password.look("password", &path.key("password"), problems);
        }
        if let Err(reason) = super::tls::connector(self.sslmode(), &self.tls) {
            problems.add(path.key("tls"), reason);
        }
    }

    fn build(&self, context: BuildContext<'_>) -> Box<dyn Sink> {
        let BuildContext { name, namespace, failures, .. } = context;
        Box::new(PostgresSink::new(name, self.clone(), namespace, failures))
    }

    async fn check(&self, context: CheckContext<'_>, claims: Vec<Claim>) -> Checked {
        super::check(context.name, self, context.namespace, claims).await
    }
}

impl Hypertable {
    fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        const CENTURY_MS: u64 = 100 * 366 * 86_400_000;
        for (period, name) in
            [(self.chunk, "chunk"), (self.compress_after, "compress_after"), (self.retention, "retention")]
        {
            within(period, 60_000, CENTURY_MS, &path.key(name), problems);
        }
        if self.retention.0 <= self.compress_after.0 {
            let least = self.compress_after;
            problems.add(
                path.key("retention"),
                format!("must be longer than compress_after ({least}), is {}", self.retention),
            );
        }
    }
}

impl Url {
    /// Parses the URL for the library, with the `sslmode`, of which the library does not know all
    /// values.
    pub fn parse(&self) -> Result<tokio_postgres::Config, String> {
        let (rest, _) = self.split();
        tokio_postgres::Config::from_str(&rest).map_err(|error| {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            format!("{error}{}", cause.unwrap_or_default())
        })
    }

    fn split(&self) -> (String, Option<SslMode>) {
        let Some((head, query)) = self.0.split_once('?') else { return (self.0.clone(), None) };
        let mut mode = None;
        let kept: Vec<&str> = query
            .split('&')
            .filter(|pair| match pair.strip_prefix("sslmode=").and_then(SslMode::from_name) {
                Some(found) => {
                    mode = Some(found);
                    false
                }
                None => true,
            })
            .collect();
        let rest = if kept.is_empty() { head.to_owned() } else { format!("{head}?{}", kept.join("&")) };
        (rest, mode)
    }

    /// Returns the target without user and password: `db.example.com:5432/iot`.
    pub fn target(&self) -> String {
        let Ok(config) = self.parse() else { return "(url not valid)".to_owned() };
        if self.misplaced().is_some() {
            return "(url not valid)".to_owned();
        }
        let hosts: Vec<String> = config
            .get_hosts()
            .iter()
            .enumerate()
            .map(|(i, host)| {
                let ports = config.get_ports();
                let port = ports.get(i).or(ports.first()).copied().unwrap_or(5432);
                match host {
                    Host::Tcp(name) => format!("{name}:{port}"),
                    Host::Unix(path) => format!("{}:{port}", path.display()),
                }
            })
            .collect();
        format!("{}/{}", hosts.join(","), config.get_dbname().or(config.get_user()).unwrap_or_default())
    }

    fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        if !self.0.starts_with("postgres://") && !self.0.starts_with("postgresql://") {
            problems.add(path.clone(), "must be a url such as postgres://writer@127.0.0.1:5432/iot");
            return;
        }
        if let Some((c, encoded)) = self.misplaced() {
            problems.add(
                path.clone(),
                format!("the user or password has a {c}, which ends it there: write {encoded} for it, or use `password:`"),
            );
            return;
        }
        match self.parse() {
            Ok(config) => {
                if config.get_hosts().is_empty() {
                    problems.add(path.clone(), "must name a host, such as postgres://writer@127.0.0.1/iot");
                }
                if config.get_user().is_none() {
                    problems.add(path.clone(), "must name a user, such as postgres://writer@127.0.0.1/iot");
                }
                if config.get_target_session_attrs() == TargetSessionAttrs::ReadOnly {
                    problems.add(
                        path.clone(),
                        "a sink cannot write to a read-only server: write target_session_attrs=read-write",
                    );
                }
                if config.get_ssl_negotiation() != SslNegotiation::Postgres {
                    problems.add(path.clone(), "sslnegotiation=direct is not there: leave it out");
                }
            }
            Err(error) => {
                let hint = hint(&error);
                problems.add(path.clone(), format!("cannot be read: {error}; {hint}"));
            }
        }
    }

    /// Returns the names of the options in the URL.
    fn options(&self) -> impl Iterator<Item = &str> {
        let query = self.0.split_once('?').map_or("", |(_, query)| query);
        query.split('&').filter_map(|pair| Some(pair.split_once('=')?.0))
    }

    /// Returns a warning for each option of the URL that has no effect, because a key of the sink takes
    /// precedence.
    pub fn warnings(&self, path: &str) -> Vec<String> {
        let key = |option| match option {
            "connect_timeout" => Some("connect_timeout"),
            "tcp_user_timeout" => Some("dead_after"),
            "keepalives" | "keepalives_idle" | "keepalives_interval" | "keepalives_retries" => {
                Some("dead_after")
            }
            _ => None,
        };
        let unused = self.options().filter_map(|option| Some((option, key(option)?)));
        unused
            .map(|(option, key)| format!("{path}: {option} has no effect here: set `{key}` of the sink"))
            .collect()
    }
}

/// Returns what to do about an option of the URL that the library does not accept.
fn hint(error: &str) -> &'static str {
    let is_about = |options: &[&str]| options.iter().any(|option| error.contains(&format!("`{option}`")));
    if is_about(&["sslrootcert", "sslcert", "sslkey"]) {
        "certificates go into `tls`: ca, cert, key"
    } else if is_about(&["passfile", "service"]) {
        "the password goes into `password`"
    } else if is_about(&["keepalives_count"]) {
        "leave it out, `dead_after` of the sink says it"
    } else if is_about(&["target_session_attrs"]) {
        "write read-write"
    } else {
        "leave it out; host/docs/databases.md lists the options that are understood"
    }
}

impl SslMode {
    fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "disable" => Self::Disable,
            // libpq's `allow` is `prefer` in the other order; both end the same.
            "allow" | "prefer" => Self::Prefer,
            "require" => Self::Require,
            "verify-ca" => Self::VerifyCa,
            "verify-full" => Self::VerifyFull,
            _ => return None,
        })
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown())
    }
}

impl Serialize for Url {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.shown())
    }
}

impl Url {
    /// Splits the URL before the host. An @ or a question mark in a password belongs to the first part.
    fn user_info(&self) -> Option<(&str, &str)> {
        let (_, rest) = self.0.split_once("://")?;
        let head = rest.split('?').next().unwrap_or_default();
        if head.contains('@') {
            let at = head.rfind('@')?;
            return Some((&rest[..at], &rest[at + 1..]));
        }
        // `user:pass?word@host`: no host would have a colon and no slash behind it.
        (head.contains(':') && !head.contains('/')).then(|| rest.rsplit_once('@')).flatten()
    }

    /// Returns the first character of the user or password that must be percent-encoded (RFC 3986,
    /// 3.2.1), and its encoding.
    fn misplaced(&self) -> Option<(char, &'static str)> {
        let (user_info, _) = self.user_info()?;
        [('@', "%40"), ('/', "%2F"), ('?', "%3F")].into_iter().find(|(c, _)| user_info.contains(*c))
    }

    fn shown(&self) -> String {
        if self.0.is_empty() {
            return String::new();
        }
        let Some((scheme, rest)) = self.0.split_once("://") else { return "(url not valid)".to_owned() };
        let (user, place) = match self.user_info() {
            Some((user_info, place)) => match user_info.split_once(':') {
                Some((user, _)) => (format!("{user}:***@"), place),
                // Who knows which part of it is secret.
                None if self.misplaced().is_some() => ("***@".to_owned(), place),
                None => (format!("{user_info}@"), place),
            },
            None => (String::new(), rest),
        };
        let (head, query) = place.split_once('?').map_or((place, None), |(head, query)| (head, Some(query)));
        let query = query.map(|query| {
            let pairs = query.split('&').map(|pair| match pair.split_once('=') {
                Some((key, _)) if key.eq_ignore_ascii_case("password") => format!("{key}=***"),
                _ => pair.to_owned(),
            });
            format!("?{}", pairs.collect::<Vec<_>>().join("&"))
        });
        format!("{scheme}://{user}{head}{}", query.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_password_is_shown_however_it_is_written() {
        for password in
            ["S3cret", "top@S3cret", "a@b@S3cret", "to/S3cret", "to?S3cret", "S3cret?x", ":S3cret", "@S3cret"]
        {
            for tail in
                ["db.example.com:5432/iot", "db/iot?sslmode=require", "db/iot?application_name=a@b", "db"]
            {
                let url = Url(format!("postgres://writer:{password}@{tail}"));
                let mut problems = Problems::default();
                url.validate(&KeyPath::root(), &mut problems);
                let problems = problems.into_vec();
                let shown =
                    format!("{url:?} {} {problems:?} {}", url.target(), serde_json::to_string(&url).unwrap());
                assert!(!shown.contains("cret"), "{}: {shown}", url.0);
                assert_eq!(
                    problems.is_empty(),
                    !password.contains(['@', '/', '?']),
                    "{}: {problems:?}",
                    url.0
                );
            }
        }
        let url = Url("postgres://writer:top%40S3cret@db:5432/iot?application_name=a@b".to_owned());
        assert_eq!(url.target(), "db:5432/iot");
        assert_eq!(url.shown(), "postgres://writer:***@db:5432/iot?application_name=a@b");
    }

    /// What `validate` says of a url with this option: problems and warnings.
    fn said(option: &str) -> (String, String) {
        let url = Url(format!("postgres://w@db/iot?{option}"));
        let mut problems = Problems::default();
        url.validate(&KeyPath::root(), &mut problems);
        let problems: Vec<_> = problems.into_vec().into_iter().map(|problem| problem.message).collect();
        (problems.join(", "), url.warnings("sinks.w.url").join(", "))
    }

    /// The table of options in databases.md is held to what the sink does.
    #[test]
    fn the_options_of_a_url_are_those_that_the_page_names() {
        let page = include_str!("../../../docs/databases.md");
        let (_, table) = page.split_once("| option of `url` |").expect("the table");
        let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
        let mut checked = 0;
        for row in rows {
            let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
            for option in cells[0].split('`').skip(1).step_by(2) {
                let (problems, warnings) = said(option);
                let (is_refused, has_no_effect) = (!problems.is_empty(), !warnings.is_empty());
                let wanted = (cells[1].starts_with("refused"), cells[1].starts_with("no effect"));
                assert_eq!((is_refused, has_no_effect), wanted, "{option}: {problems}{warnings}");
                checked += 1;
            }
        }
        assert!(checked > 30, "{checked}");
    }

    #[test]
    fn an_option_that_is_not_taken_is_told_with_what_to_do() {
        for (option, advice) in [
            ("sslrootcert=ca.pem", "certificates go into `tls`: ca, cert, key"),
            ("passfile=x", "the password goes into `password`"),
            ("target_session_attrs=primary", "write read-write"),
            ("target_session_attrs=read-only", "write target_session_attrs=read-write"),
            (
                "gssencmode=disable",
                "leave it out; host/docs/databases.md lists the options that are understood",
            ),
        ] {
            let (problem, _) = said(option);
            assert!(problem.ends_with(advice), "{option}: {problem}");
        }
        let (_, warning) = said("connect_timeout=3");
        assert_eq!(
            warning,
            "sinks.w.url: connect_timeout has no effect here: set `connect_timeout` of the sink"
        );
    }
}
