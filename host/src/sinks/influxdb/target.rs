//! Writes points, and finds those that the server rejects.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;

use super::config::Config;
use super::points::{Lines, Points};
use super::service::{Client, Service, Verdict};
use crate::sinks::{Error, Put, RefusedRow, Rows, Target};
use crate::units::Period;

pub struct InfluxTarget {
    /// Place for the start screen.
    place: String,
    /// Prefix of each error.
    context: String,
    service: Service,
    points: Points,
    client: Option<Client>,
    /// Time before which the server asked for no request.
    not_before: Option<Instant>,
}

impl InfluxTarget {
    pub fn new(place: String, service: Service, points: Points, config: &Config) -> Self {
        let context = config.url.clone();
        Self { place, context, service, points, client: None, not_before: None }
    }

    /// Returns an error while the server wants no request.
    fn wait(&self) -> Result<(), Error> {
        let left = self.not_before.map(|at| at.saturating_duration_since(Instant::now()));
        match left.filter(|left| !left.is_zero()) {
            None => Ok(()),
            Some(left) => {
                let left = Period(Duration::from_secs(left.as_secs() + 1));
                Err(Error::Retry(format!("the server asked to be left alone (Retry-After), for {left} more")))
            }
        }
    }

    /// Sends lines. Temporary errors and those that need an operator are returned as errors.
    async fn write(&mut self, lines: &Bytes) -> Result<Verdict, Error> {
        self.wait()?;
        match self.service.write(&mut self.client, lines).await? {
            Verdict::Later(reason, after) => {
                self.not_before = after.map(|after| Instant::now() + after);
                Err(Error::Retry(reason))
            }
            Verdict::Setup(status, reason) => {
                Err(Error::Setup(format!("{reason}: {}", self.service.advice(status))))
            }
            other => Ok(other),
        }
    }

    /// Sends an empty request, with which the server checks the credentials and the place.
    async fn try_out(&mut self) -> Result<(), Error> {
        self.wait()?;
        self.client = None;
        // That there are no points is an error of version 2 and 3, which they find last.
        self.write(&Bytes::new()).await.map(|_| ())
    }

    /// Sends all lines. If the server rejects some, the lines are sent again in halves, down to the
    /// rejected lines. A line that is written again is the same point.
    async fn write_all(&mut self, rows: &Rows, lines: Lines) -> Result<Put, Error> {
        let Lines { text, rows: of, rejected } = lines;
        let text = Bytes::from(text);
        let end = |line: usize| line.checked_sub(1).map_or(0, |before| of[before].1);
        let mut put = Put { rejected, ..Put::default() };
        let mut parts = Vec::new();
        parts.extend((!of.is_empty()).then_some(0..of.len()));
        while let Some(part) = parts.pop() {
            let verdict = self.write(&text.slice(end(part.start)..end(part.end))).await?;
            let reason = match verdict {
                Verdict::Written => {
                    put.written.written += part.len() as u64;
                    continue;
                }
                Verdict::TooLarge(reason) if part.len() > 1 && !rows.is_of_one_message() => {
                    return Err(Error::TooMuch(reason));
                }
                Verdict::Refused(reason) => {
                    return Err(Error::Doubtful { context: self.context.clone(), reason });
                }
                Verdict::TooLarge(reason) | Verdict::Rejected(reason) => reason,
                Verdict::Later(..) | Verdict::Setup(..) => unreachable!("an error of `write`"),
            };
            if part.len() == 1 {
                let code = reason.get(..3).map(str::to_owned);
                put.rejected.push(RefusedRow { row: of[part.start].0, reason, code });
            } else {
                let half = part.start + part.len() / 2;
                // The first half comes first, so that points of a series go in their order.
                parts.extend([half..part.end, part.start..half]);
            }
        }
        put.rejected.sort_unstable_by_key(|rejected| rejected.row);
        Ok(put)
    }
}

#[async_trait]
impl Target for InfluxTarget {
    fn place(&self) -> String {
        self.place.clone()
    }

    async fn open(&mut self) -> Result<(), Error> {
        self.try_out().await.map_err(|error| error.within(&self.context))
    }

    async fn put(&mut self, rows: &Rows) -> Result<Put, Error> {
        let lines = self.points.lines(rows);
        let put = self.write_all(rows, lines).await;
        put.map_err(|error| error.within(&self.context))
    }
}
