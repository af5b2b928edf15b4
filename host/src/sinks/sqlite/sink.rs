//! The sink's thread, and how calls are passed to it and back.

use std::sync::{Arc, mpsc};

use async_trait::async_trait;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::config::Config;
use super::connection::Session;
use crate::batch::{Offset, Partition};
use crate::sinks::columns::Columns;
use crate::sinks::{
    Advance, Claim, Epoch, Error, LogPosition, Name, Opened, Outcome, PassPosition, Rows, Sink, Written,
};
use crate::telemetry::Failures;
use crate::threads;
use crate::topic::Namespace;
use crate::units::ByteSize;

/// One call that runs and one that waits, because a call that was dropped still ends first.
const REQUESTS_MAX: usize = 2;

pub struct SqliteSink {
    name: String,
    config: Config,
    columns: Columns,
    failures: Failures,
    thread: Option<mpsc::SyncSender<Request>>,
}

enum Request {
    Open(Claim, Option<Epoch>, oneshot::Sender<Result<Opened, Error>>),
    PositionsOf(Vec<Name>, Vec<Uuid>, oneshot::Sender<Result<Vec<LogPosition>, Error>>),
    SetLetters(Vec<(Partition, String)>, oneshot::Sender<Result<(), Error>>),
    PassesOf(Vec<Name>, Uuid, Offset, oneshot::Sender<Result<Vec<PassPosition>, Error>>),
    Commit(Rows, Vec<Advance>, oneshot::Sender<Result<Outcome, Error>>),
    Finish(oneshot::Sender<Result<Written, Error>>),
}

impl SqliteSink {
    pub fn new(name: &str, mut config: Config, namespace: Arc<Namespace>, failures: Failures) -> Self {
        config.on_conflict = config.on_conflict.resolved();
        let columns = Columns::new(&config.columns, namespace);
        Self { name: name.to_owned(), config, columns, failures, thread: None }
    }

    /// Returns the prefix of each reason. The caller that shows the reason names the sink.
    fn context(&self) -> String {
        self.config.path.display().to_string()
    }

    /// Starts the thread if there is none. It ends when the sink is dropped.
    fn thread(&mut self) -> Result<&mpsc::SyncSender<Request>, Error> {
        if self.thread.is_none() {
            let (sender, requests) = mpsc::sync_channel(REQUESTS_MAX);
            let (config, columns, context) = (self.config.clone(), self.columns.clone(), self.context());
            let (name, failures) = (self.name.clone(), self.failures.clone());
            let serving = move || serve(&requests, &name, &config, &columns, &context, &failures);
            threads::spawn(format!("sink-{}", self.name), serving).map_err(|error| {
                Error::Retry(format!("{}: cannot start a thread: {error}", self.context()))
            })?;
            self.thread = Some(sender);
        }
        Ok(self.thread.as_ref().expect("started above"))
    }

    async fn call<T>(
        &mut self,
        request: Request,
        answer: oneshot::Receiver<Result<T, Error>>,
    ) -> Result<T, Error> {
        let context = self.context();
        self.thread()?
            .try_send(request)
            .map_err(|_| Error::Retry(format!("{context}: still busy with an earlier call")))?;
        match answer.await {
            Ok(outcome) => outcome,
            Err(_) => {
                self.thread = None;
                Err(Error::Unknown(format!("{context}: the sink's thread ended")))
            }
        }
    }
}

#[async_trait]
impl Sink for SqliteSink {
    async fn open(&mut self, claim: &Claim, held: Option<Epoch>) -> Result<Opened, Error> {
        let (sender, answer) = oneshot::channel();
        self.call(Request::Open(claim.clone(), held, sender), answer).await
    }

    async fn positions_of(&mut self, claims: &[Name], logs: &[Uuid]) -> Result<Vec<LogPosition>, Error> {
        let (sender, answer) = oneshot::channel();
        self.call(Request::PositionsOf(claims.to_vec(), logs.to_vec(), sender), answer).await
    }

    async fn passes_of(
        &mut self,
        claims: &[Name],
        log: Uuid,
        above: Offset,
    ) -> Result<Vec<PassPosition>, Error> {
        let (sender, answer) = oneshot::channel();
        self.call(Request::PassesOf(claims.to_vec(), log, above, sender), answer).await
    }

    async fn commit(&mut self, rows: &Rows, advance: &[Advance]) -> Result<Outcome, Error> {
        let (sender, answer) = oneshot::channel();
        self.call(Request::Commit(rows.clone(), advance.to_vec(), sender), answer).await
    }

    async fn set_letters(&mut self, letters: &[(Partition, String)]) -> Result<(), Error> {
        let (sender, answer) = oneshot::channel();
        self.call(Request::SetLetters(letters.to_vec(), sender), answer).await
    }

    async fn finish(&mut self) -> Result<Written, Error> {
        let (sender, answer) = oneshot::channel();
        self.call(Request::Finish(sender), answer).await
    }
}

/// Runs the thread: one call after the other, until the sink is dropped.
fn serve(
    requests: &mpsc::Receiver<Request>,
    name: &str,
    config: &Config,
    columns: &Columns,
    context: &str,
    failures: &Failures,
) {
    let mut session: Option<Session> = None;
    // Which files the sink wrote to last: those of another inode are other ones.
    let mut files = None;
    for request in requests {
        // A caller that has gone does not want its answer.
        match request {
            Request::Open(claim, held, answer) => {
                session = None;
                let outcome = Session::open(config, columns, &claim, held, files, context);
                let _ = answer.send(outcome.map(|(opened, answer)| {
                    files = Some(opened.files());
                    session = Some(opened);
                    answer
                }));
            }
            Request::PositionsOf(claims, logs, answer) => {
                let outcome = match &session {
                    Some(session) => session.positions_of(context, &claims, &logs),
                    None => Err(Error::Retry(format!("{context}: the file is not open"))),
                };
                let _ = answer.send(outcome);
            }
            Request::SetLetters(letters, answer) => {
                let outcome = match &mut session {
                    Some(session) => session.set_letters(context, &letters),
                    None => Err(Error::Retry(format!("{context}: the file is not open"))),
                };
                let _ = answer.send(outcome);
            }
            Request::PassesOf(claims, log, above, answer) => {
                let outcome = match &session {
                    Some(session) => session.passes_of(context, &claims, log, above),
                    None => Err(Error::Retry(format!("{context}: the file is not open"))),
                };
                let _ = answer.send(outcome);
            }
            Request::Commit(rows, advance, answer) => {
                let outcome = match &mut session {
                    Some(session) => session.commit(context, &rows, &advance),
                    None => Err(Error::Retry(format!("{context}: the file is not open"))),
                };
                if let Some(bytes) = session.as_ref().and_then(Session::wal_held) {
                    let kind = format!(
                        "sink \"{name}\": {context}: a reader keeps an older state of the file in use"
                    );
                    let detail = format!(
                        "its -wal file has {} and grows until the reader ends its transaction",
                        ByteSize(bytes)
                    );
                    failures.report(&kind, 1, &detail, "");
                }
                let _ = answer.send(outcome);
            }
            Request::Finish(answer) => {
                let outcome = match &mut session {
                    Some(session) => session.finish(context),
                    None => Err(Error::Retry(format!("{context}: the file is not open"))),
                };
                let _ = answer.send(outcome);
            }
        }
    }
}
