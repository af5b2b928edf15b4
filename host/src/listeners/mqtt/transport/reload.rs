//! Certificates that change while the host runs: their folders are watched, and
//! looked at now and then where watching does not reach (NFS); SIGHUP looks at once.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecursiveMode, Watcher};
use tokio::signal::unix::Signal;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::super::Broker;
use super::tls::{Reloaded, Tls};

const LOOK_EVERY: Duration = Duration::from_secs(30);
/// Between two warnings of a certificate that ends, while nothing changes.
const TELL_EVERY: Duration = Duration::from_secs(24 * 3_600);
/// Certificate and key are two files: read once both have been written.
const QUIET: Duration = Duration::from_millis(300);
/// However busy the folder.
const QUIET_WAIT_MAX: Duration = Duration::from_secs(5);

pub(super) async fn run(broker: &Broker, all: &[Arc<Tls>], mut hangup: Option<Signal>) {
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
        tracing::warn!(%error, "mqtt: cannot watch the certificates' folders, will look every 30 s");
    }
    let mut told_at = tell_of_ends(all);
    loop {
        tokio::select! {
            () = broker.shutdown.cancelled() => return,
            () = sleep(LOOK_EVERY) => {}
            Some(()) = changes.recv() => {
                let until = Instant::now() + QUIET_WAIT_MAX;
                while timeout(QUIET, changes.recv()).await == Ok(Some(())) && Instant::now() < until {}
            }
            Some(()) = async { hangup.as_mut()?.recv().await } => {}
        }
        let mut has_changed = false;
        for tls in all {
            let Some(changed) = broker.shutdown.run_until_cancelled(look(broker, tls)).await else { return };
            has_changed |= changed;
        }
        if has_changed {
            broker.access.recheck();
        }
        if has_changed || told_at.elapsed() > TELL_EVERY {
            told_at = tell_of_ends(all);
        }
        show_what_is_left(all);
    }
}

/// Says which certificates and lists have ended or end soon; returns when.
fn tell_of_ends(all: &[Arc<Tls>]) -> Instant {
    for warning in all.iter().flat_map(|tls| tls.warnings(SystemTime::now())) {
        tracing::warn!("mqtt: {warning}");
    }
    show_what_is_left(all);
    Instant::now()
}

fn show_what_is_left(all: &[Arc<Tls>]) {
    for (file, seconds) in all.iter().flat_map(|tls| tls.seconds_left(SystemTime::now())) {
        super::super::metrics::certificate_seconds_left(file, seconds);
    }
}

/// Whether there are new certificates in use.
async fn look(broker: &Broker, tls: &Arc<Tls>) -> bool {
    let looked = tls.clone();
    // A task that panics ends the process, so that there is always an answer.
    match tokio::task::spawn_blocking(move || looked.reload()).await {
        Ok(Reloaded::Same) | Err(_) => false,
        Ok(Reloaded::Taken) => {
            broker.counters.tls_reload("taken");
            broker.failures.reloaded(tls.cert());
            tracing::info!(cert = %tls.name(), "mqtt: new certificates, used for new connections");
            true
        }
        Ok(Reloaded::Broken(reason)) => {
            broker.counters.tls_reload("refused");
            broker.failures.reload_refused(tls.cert(), &reason);
            tracing::error!("mqtt: the old certificates stay in use: {reason}");
            false
        }
    }
}
