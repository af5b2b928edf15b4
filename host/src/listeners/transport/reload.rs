//! Reloads certificates that change while the host runs. Their folders are watched, and checked at
//! intervals for file systems that send no events (NFS). SIGHUP causes a check at once.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecursiveMode, Watcher};
use tokio::signal::unix::Signal;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use super::Service;
use super::tls::{Reloaded, Tls, Unusable};
use crate::telemetry::{Failures, Standing};

const LOOK_EVERY: Duration = Duration::from_secs(30);
/// Interval between two log lines of the same warning while nothing changes.
const TELL_EVERY: Duration = Duration::from_secs(24 * 3_600);
/// Delay of a check after a certificate's expiry, so that the clock has passed it.
const PAST_THE_END: Duration = Duration::from_millis(10);
/// How long files must be unchanged before they are read, because certificate and key are two files.
const QUIET: Duration = Duration::from_millis(300);
/// Longest wait for unchanged files.
const QUIET_WAIT_MAX: Duration = Duration::from_secs(5);

/// Reads certificates again when their files change, until shutdown. `certificates` are those of all
/// addresses.
pub async fn keep_certificates<S: Service>(
    service: Arc<S>,
    mut certificates: watch::Receiver<Vec<Arc<Tls>>>,
    mut hangup: Option<Signal>,
) {
    loop {
        let all = certificates.borrow_and_update().clone();
        let kept = keep(&*service, &all, &mut hangup);
        tokio::select! {
            () = service.shutdown().cancelled() => return,
            // The sender lives as long as the listener.
            Ok(()) = certificates.changed() => {}
            () = kept => return,
        }
        for file in all.iter().flat_map(|tls| tls.files()) {
            forget(service.failures(), file);
        }
    }
}

/// Ends what is known to be wrong with a file. It is found again if the file is still in use.
fn forget(failures: &Failures, file: &Path) {
    failures.reloaded(file);
    failures.mended(&format!("certificate {}", file.display()), "certificate");
    failures.mended(&format!("revocation list {}", file.display()), "certificate");
}

/// Reads these certificates again when their files change. Never returns.
async fn keep<S: Service>(service: &S, all: &[Arc<Tls>], hangup: &mut Option<Signal>) {
    let (changed, mut changes) = mpsc::channel(1);
    let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        // Our own look opens and reads the files.
        let only_read =
            |kind| matches!(kind, EventKind::Access(kind) if kind != AccessKind::Close(AccessMode::Write));
        if !event.is_ok_and(|event| only_read(event.kind)) {
            // Full: a look is due already.
            let _ = changed.try_send(());
        }
    });
    let folders: BTreeSet<&Path> = all.iter().flat_map(|tls| tls.folders()).collect();
    let watched = watcher.and_then(|mut watcher| {
        for folder in folders {
            watcher.watch(folder, RecursiveMode::NonRecursive)?;
        }
        Ok(watcher)
    });
    if let Err(error) = &watched {
        tracing::warn!(%error, "{}: cannot watch the certificates' folders, will check them every 30 s", S::NAME);
    }
    let mut told = Told::default();
    loop {
        tell_of_ends(service, all, &mut told);
        tokio::select! {
            () = sleep(until_next_end(all).min(LOOK_EVERY)) => {}
            Some(()) = changes.recv() => {
                let until = Instant::now() + QUIET_WAIT_MAX;
                while timeout(QUIET, changes.recv()).await == Ok(Some(())) && Instant::now() < until {}
            }
            Some(()) = async { hangup.as_mut()?.recv().await } => {}
        }
        let mut has_changed = false;
        for tls in all {
            has_changed |= look(service, tls).await;
        }
        if has_changed {
            told = Told::default();
        }
    }
}

/// Warnings, with the time at which each was last logged.
#[derive(Default)]
pub(super) struct Told(HashMap<String, Instant>);

impl Told {
    /// Returns the current warnings that were not logged within [`TELL_EVERY`].
    pub(super) fn news(&mut self, warnings: Vec<String>, now: Instant) -> Vec<String> {
        let said = std::mem::take(&mut self.0);
        let mut news = Vec::new();
        for warning in warnings {
            let said_at = said.get(&warning).filter(|at| now.duration_since(**at) < TELL_EVERY);
            if said_at.is_none() && !self.0.contains_key(&warning) {
                news.push(warning.clone());
            }
            self.0.insert(warning, said_at.copied().unwrap_or(now));
        }
        news
    }
}

/// Logs which certificates and lists have expired or expire soon, once when that begins and then daily.
fn tell_of_ends<S: Service>(service: &S, all: &[Arc<Tls>], told: &mut Told) {
    let now = SystemTime::now();
    let warnings = all.iter().flat_map(|tls| tls.warnings(now)).collect();
    for warning in told.news(warnings, Instant::now()) {
        tracing::warn!("{}: {warning}", S::NAME);
    }
    for (file, seconds) in all.iter().flat_map(|tls| tls.seconds_left(now)) {
        service.show_certificate(file, seconds);
    }
    for lists in all.iter().filter_map(|tls| tls.lists()) {
        service.show_revocation_list(lists.file, lists.seconds_left(now));
    }
    note_certificates(all, service.failures(), now);
    note_lists(all, service.failures(), now);
}

/// Reports certificates that have expired, expire soon or are not valid yet as problems.
pub(super) fn note_certificates(all: &[Arc<Tls>], failures: &Failures, now: SystemTime) {
    let mut faults: BTreeMap<&Path, Option<String>> = BTreeMap::new();
    for (file, fault) in all.iter().flat_map(|tls| tls.faults(now)) {
        let known = faults.entry(file).or_default();
        *known = known.take().or(fault);
    }
    for (file, fault) in faults {
        let (part, kind) = (format!("certificate {}", file.display()), "certificate");
        let Some(cause) = fault else {
            failures.mended(&part, kind);
            continue;
        };
        let advice = format!(
            "put a new certificate into {}, which is loaded while the host runs; correct the clock of this \
             machine if it is wrong",
            file.display()
        );
        failures.stands(Standing { part, kind, cause, advice });
    }
}

/// Reports revocation lists that are past their next update as problems.
pub(super) fn note_lists(all: &[Arc<Tls>], failures: &Failures, now: SystemTime) {
    let mut overdue: BTreeMap<&Path, Option<String>> = BTreeMap::new();
    for lists in all.iter().filter_map(|tls| tls.lists()) {
        let known = overdue.entry(lists.file).or_default();
        *known = known.take().or(lists.overdue(now));
    }
    for (file, overdue) in overdue {
        let (part, kind) = (format!("revocation list {}", file.display()), "certificate");
        let Some(overdue) = overdue else {
            failures.mended(&part, kind);
            continue;
        };
        let advice = format!(
            "get a new list from the CA and put it into {}; it is loaded while the host runs",
            file.display()
        );
        failures.stands(Standing { part, kind, cause: format!("the list {overdue}"), advice });
    }
}

fn until_next_end(all: &[Arc<Tls>]) -> Duration {
    let now = SystemTime::now();
    let next = all.iter().filter_map(|tls| tls.next_end(now)).min();
    let left = next.and_then(|next| next.duration_since(now).ok());
    left.map_or(LOOK_EVERY, |left| left.saturating_add(PAST_THE_END))
}

/// Checks the files, and returns whether new certificates are in use.
async fn look<S: Service>(service: &S, tls: &Arc<Tls>) -> bool {
    let (looked, looking) = (tls.clone(), service.failures().look_at(tls.cert()));
    // A task that panics ends the process, so that there is always an answer.
    let reloaded = tokio::task::spawn_blocking(move || looked.reload()).await.unwrap_or(Reloaded::Same);
    drop(looking);
    note_reload(tls, service.failures(), &reloaded);
    match reloaded {
        Reloaded::Same => false,
        Reloaded::Taken => {
            service.certificates_changed("taken");
            tracing::info!(cert = %tls.name(), "{}: new certificates, used for new connections", S::NAME);
            true
        }
        Reloaded::Broken(unusable) => {
            service.certificates_changed("refused");
            tracing::error!("{}: the old certificates stay in use: {unusable}", S::NAME);
            false
        }
    }
}

/// Reports a file that cannot be used as a problem, until the listener's files are loaded or another
/// file is at fault.
pub(super) fn note_reload(tls: &Tls, failures: &Failures, reloaded: &Reloaded) {
    let unusable = match reloaded {
        Reloaded::Same => return,
        Reloaded::Taken => None,
        Reloaded::Broken(unusable) => Some(unusable),
    };
    tls.files().for_each(|file| failures.reloaded(file));
    if let Some(Unusable { file, reason }) = unusable {
        failures.reload_refused(file, reason);
    }
}
