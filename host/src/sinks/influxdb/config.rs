//! Configuration of an InfluxDB sink.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::line;
use super::points::Points;
use super::service::Service;
use super::target::InfluxTarget;
use crate::http_client::Address;
use crate::problems::{KeyPath, Problems};
use crate::sinks::columns::{ColumnConfig, ColumnsConfig, FullColumn, Kind, OneOrMany};
use crate::sinks::config::within;
use crate::sinks::{
    BatchConfig, Begin, BuildContext, CheckContext, Checked, Claim, Journaled, Password, Sink, SinkConfig,
    Target, look_up,
};
use crate::stream::OnLag;
use crate::topic::Namespace;
use crate::trust;
use crate::units::Period;

/// A measurement in InfluxDB 1, 2 or 3, or in a store that takes its line protocol, such as VictoriaMetrics.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// URL of the server, such as `http://127.0.0.1:8086`. A path in it is put in front of the paths of
    /// the API.
    pub url: String,
    /// Version of the write API: `1` (`/write`; also VictoriaMetrics), `2` (`/api/v2/write`) or `3`
    /// (`/api/v3/write_lp`).
    #[schemars(range(min = 1, max = 3))]
    pub version: u8,
    /// Database, for version 1 or 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
    /// Retention policy, for version 1. If unset, the database's default applies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retention_policy: Option<String>,
    /// Organization, for version 2, by name or id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub org: Option<String>,
    /// Bucket, for version 2, by name or id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bucket: Option<String>,
    /// The API token. It is read again at each connect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<Password>,
    /// User name, if there is no token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Password of the user. It is read again at each connect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<Password>,
    /// Certificates, for an https URL.
    pub tls: Tls,
    /// The measurement: its name, or a source such as `$last_level` or `/metric`.
    pub measurement: String,
    /// Maps each tag to the source of its value, which is written as text. A tag without a value is left
    /// out.
    pub tags: ColumnsConfig,
    /// Maps each field to the source of its value. `type` is `double`, `bigint`, `bool`, `text` or
    /// `jsonb` (written as text). If unset, a number is written as a float, true and false as a boolean,
    /// and any other value as text. A field without a value is left out; a message without any field
    /// becomes a dead letter.
    pub fields: ColumnsConfig,
    /// Time of the point: `$time` is the time that the device sent, otherwise the time of receipt. Or
    /// another source.
    pub time: ColumnConfig,
    /// Keeps messages of one series and one microsecond apart, which would be the same point.
    /// `nanoseconds` fills the digits below the microsecond from the message's offset, `none` leaves
    /// them 0.
    pub spread: Spread,
    /// Unit of the times that are sent, which is also the precision of a point's time. `spread` needs
    /// `ns`.
    pub precision: Precision,
    /// Compress requests.
    pub gzip: bool,
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
    /// the start, except if another sink, which this host does not have, wrote this stream to the same
    /// place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub begin: Option<Begin>,
    /// How long connecting may take.
    pub connect_timeout: Period,
    /// How long one request may take. A batch that takes longer is halved.
    pub timeout: Period,
}

/// Certificates of an https connection.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// PEM file of trusted CAs. If unset, the system's CAs are trusted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
}

/// How messages of one series and one microsecond are kept apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Spread {
    #[default]
    Nanoseconds,
    None,
}

/// Unit of a point's time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    #[default]
    Ns,
    Us,
    Ms,
    S,
}

const SECOND: Duration = Duration::from_secs(1);

impl Default for Config {
    fn default() -> Self {
        let full = |from: &[&str], kind, required| {
            let from = OneOrMany::Many(from.iter().map(|&source| source.to_owned()).collect());
            ColumnConfig::Full(FullColumn { from, kind, required, unit: None, zone: None })
        };
        let one = |source: &str| ColumnConfig::Source(source.to_owned());
        let tags = [
            ("device_id", one("$device")),
            ("location", one("/location")),
            ("metric", ColumnConfig::Sources(vec!["/metric".to_owned(), "$last_level".to_owned()])),
        ];
        let fields = [("value", full(&["/value", "$payload"], Some(Kind::Double), true))];
        Self {
            url: String::new(),
            version: 2,
            database: None,
            retention_policy: None,
            org: None,
            bucket: None,
            token: None,
            user: None,
            password: None,
            tls: Tls::default(),
            measurement: "telemetry".to_owned(),
            tags: ColumnsConfig(tags.map(|(name, tag)| (name.to_owned(), tag)).into()),
            fields: ColumnsConfig(fields.map(|(name, field)| (name.to_owned(), field)).into()),
            time: one("$time"),
            spread: Spread::default(),
            precision: Precision::default(),
            gzip: true,
            batch: BatchConfig::default(),
            on_lag: OnLag::default(),
            renamed_from: None,
            begin: None,
            connect_timeout: Period(10 * SECOND),
            timeout: Period(30 * SECOND),
        }
    }
}

impl Config {
    /// Returns the source of the measurement, or `None` if the measurement has a fixed name.
    pub fn measurement_source(&self) -> Option<ColumnsConfig> {
        let is_source = self.measurement.starts_with(['$', '/']);
        let source = || {
            ColumnConfig::Full(FullColumn {
                from: OneOrMany::One(self.measurement.clone()),
                kind: Some(Kind::Text),
                required: true,
                unit: None,
                zone: None,
            })
        };
        is_source.then(|| ColumnsConfig(vec![("measurement".to_owned(), source())]))
    }

    /// Returns the time as the only column. It must have a value.
    pub fn time_source(&self) -> ColumnsConfig {
        let from = OneOrMany::Many(self.time.sources().to_vec());
        let (unit, zone) = (self.time.unit(), self.time.zone().map(str::to_owned));
        let time = FullColumn { from, kind: Some(Kind::Timestamptz), required: true, unit, zone };
        ColumnsConfig(vec![("time".to_owned(), ColumnConfig::Full(time))])
    }

    /// Returns the name of the place that the sink writes to: `127.0.0.1:8086 database iot`.
    fn place(&self) -> String {
        let server = Address::parse(&self.url).map_or("(url not valid)".to_owned(), |it| it.authority);
        let named = |noun: &str, name: &Option<String>| name.as_ref().map(|name| format!(" {noun} {name}"));
        let parts = match self.version {
            2 => [named("org", &self.org), named("bucket", &self.bucket)],
            _ => [named("database", &self.database), named("retention policy", &self.retention_policy)],
        };
        server + &parts.into_iter().flatten().collect::<String>()
    }

    /// Returns the keys that name the place, with whether the version needs them; `None` if the version
    /// does not have the key.
    fn places(&self) -> [(&'static str, &Option<String>, Option<bool>); 4] {
        let of = |needed: [Option<bool>; 4]| {
            let [database, policy, org, bucket] = needed;
            [
                ("database", &self.database, database),
                ("retention_policy", &self.retention_policy, policy),
                ("org", &self.org, org),
                ("bucket", &self.bucket, bucket),
            ]
        };
        match self.version {
            1 => of([Some(true), Some(false), None, None]),
            2 => of([None, None, Some(true), Some(true)]),
            _ => of([Some(true), None, None, None]),
        }
    }

    pub(super) fn target(&self, namespace: Arc<Namespace>) -> InfluxTarget {
        InfluxTarget::new(self.describe(), Service::new(self), Points::new(self, namespace), self)
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

    fn describe(&self) -> String {
        format!("InfluxDB {} measurement {}", self.place(), self.measurement)
    }

    fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        match Address::parse(&self.url) {
            Err(reason) => problems.add(path.key("url"), reason),
            Ok(_) if self.url.contains(['?', '#']) => {
                problems.add(
                    path.key("url"),
                    "must end with a path: what is asked for there has keys of its own",
                );
            }
            Ok(address) if address.tls.is_none() && self.tls != Tls::default() => {
                problems.add(path.key("tls"), "has no use without a url of https");
            }
            Ok(_) => {}
        }
        if !(1..=3).contains(&self.version) {
            problems.add(path.key("version"), format!("must be 1, 2 or 3, is {}", self.version));
        } else {
            for (key, value, needed) in self.places() {
                match (needed, value.as_deref()) {
                    (Some(true), None | Some("")) => {
                        problems.add(path.key(key), format!("is missing: version {} needs it", self.version));
                    }
                    (None, Some(_)) => {
                        problems.add(path.key(key), format!("has no use with version {}", self.version));
                    }
                    _ => {}
                }
            }
        }
        for (key, secret) in [("token", &self.token), ("password", &self.password)] {
            secret.iter().for_each(|secret| secret.validate(&path.key(key), problems));
        }
        if self.token.is_some() && (self.user.is_some() || self.password.is_some()) {
            problems.add(path.key("token"), "takes the place of user and password: leave them or it out");
        }
        if self.user.is_some() != self.password.is_some() {
            problems.add(path.key("user"), "user and password belong together, one is missing");
        }
        if self.measurement_source().is_none()
            && let Err(reason) = line::check_measurement(&self.measurement)
        {
            problems.add(path.key("measurement"), format!("must be a measurement's name: {reason}"));
        }
        self.validate_names(path, problems);
        self.time_source().validate(path, problems);
        self.measurement_source().iter().for_each(|source| source.validate(path, problems));
        if self.spread == Spread::Nanoseconds && self.precision != Precision::Ns {
            problems.add(
                path.key("spread"),
                "needs precision ns: set `spread: none`, and see what that means for \
                messages of one time in host/docs/databases.md",
            );
        }
        self.batch.validate(&path.key("batch"), problems);
        for (period, name) in [(self.connect_timeout, "connect_timeout"), (self.timeout, "timeout")] {
            within(period, 1_000, 3_600_000, &path.key(name), problems);
        }
    }

    fn validate_namespace(&self, namespace: &Namespace, path: &KeyPath, problems: &mut Problems) {
        self.tags.validate_namespace(namespace, &path.key("tags"), problems);
        self.fields.validate_namespace(namespace, &path.key("fields"), problems);
        self.time_source().validate_namespace(namespace, path, problems);
        let measurement = self.measurement_source();
        measurement.iter().for_each(|source| source.validate_namespace(namespace, path, problems));
    }

    /// Reads the certificates, the token and the password, and adds what is wrong with them.
    fn look(&self, path: &KeyPath, problems: &mut Problems) {
        for (key, secret) in [("token", &self.token), ("password", &self.password)] {
            secret.iter().for_each(|secret| secret.look(key, &path.key(key), problems));
        }
        if Address::parse(&self.url).is_ok_and(|address| address.tls.is_some())
            && let Err(reason) = Service::new(self).connector()
        {
            problems.add(path.key("tls"), reason);
        }
    }

    fn build(&self, context: BuildContext<'_>) -> Box<dyn Sink> {
        Box::new(Journaled::new(self.target(context.namespace), context.journal))
    }

    async fn check(&self, context: CheckContext<'_>, claims: Vec<Claim>) -> Checked {
        let mut checked = Checked::default();
        let mut target = self.target(context.namespace);
        match target.open().await {
            Ok(()) => checked.found.push("it takes points".to_owned()),
            Err(error) => checked.problems.push(error.to_string()),
        }
        match context.journaled {
            Ok(entries) => match look_up(entries, claims, &target.place()) {
                Ok(looked) => checked.claims = looked,
                Err(error) => checked.problems.push(error.to_string()),
            },
            Err(error) => checked.warnings.push(format!(
                "the sink's positions cannot be read, so that where it begins is not known: {error}"
            )),
        }
        checked
    }
}

impl Config {
    /// Adds a problem for names that InfluxDB reserves, and for a tag and a field with the same name.
    fn validate_names(&self, path: &KeyPath, problems: &mut Problems) {
        if !self.tags.0.is_empty() {
            self.tags.validate(&path.key("tags"), problems);
        }
        self.fields.validate(&path.key("fields"), problems);
        let names = [("tags", &self.tags), ("fields", &self.fields)];
        for (key, (name, _)) in
            names.iter().flat_map(|(key, of)| of.0.iter().map(move |column| (*key, column)))
        {
            let path = path.key(key).key(name);
            if name == "time" || name.starts_with('_') {
                problems.add(
                    path,
                    "is a name that InfluxDB keeps for itself: `time`, and those that begin with _",
                );
            } else if let Err(reason) = line::check_key(name) {
                problems.add(path, reason);
            } else if key == "fields" && self.tags.0.iter().any(|(tag, _)| tag == name) {
                problems.add(path, "is the name of a tag too: take another");
            }
        }
        for (name, tag) in &self.tags.0 {
            let is_text = tag.kind().is_none_or(|kind| kind == Kind::Text);
            if matches!(tag, ColumnConfig::Full(FullColumn { kind: Some(_), .. })) && !is_text {
                problems.add(path.key("tags").key(name).key("type"), "must be text, because all tags are");
            }
        }
        for (name, field) in &self.fields.0 {
            let is_known = match field {
                ColumnConfig::Full(FullColumn { kind: Some(kind), .. }) => {
                    !matches!(kind, Kind::Timestamptz | Kind::Bytes)
                }
                _ => true,
            };
            if !is_known {
                let reason = "must be double, bigint, bool, text or jsonb; a time is a bigint with a `unit`";
                problems.add(path.key("fields").key(name).key("type"), reason);
            }
        }
    }

    /// Returns the PEM file of the CAs that are trusted.
    pub fn ca_file(&self) -> Result<PathBuf, String> {
        trust::ca_file(self.tls.ca.as_deref()).map_err(|reason| format!("{reason} in tls.ca"))
    }
}
